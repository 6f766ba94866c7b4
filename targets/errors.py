"""The root of trimtab's one error tree. Every error a user can cause says place, expected, found and remedy.

It lives in `targets` because imports point one way: targets <- runtimes <- compiler.
"""

from __future__ import annotations


class TrimtabError(Exception):
    """A user's mistake or a fault of the machine, told in one line.

    place     what was being read or done: a path, `recipe.yaml: quantize.scheme`, a tensor name
    expected  what would have been right
    found     what was there
    remedy    what to do about it
    code      a row of `targets.codes.CODES`: stable between versions, unlike the words; default: the class's own
    """

    exit_code = 1
    code = "ERROR"

    def __init__(self, place: str, *, expected: str, found: str, remedy: str, code: str = "") -> None:
        self.place, self.expected, self.found, self.remedy = place, expected, found, remedy
        if code:
            self.code = code
        super().__init__(f"{place}: expected {expected}, found {found}; {remedy}")

    def as_dict(self) -> dict[str, str]:
        """What `--json` prints under "error"."""
        return {"code": self.code, "place": self.place, "expected": self.expected, "found": self.found, "remedy": self.remedy}


class TargetError(TrimtabError):
    """A profile that cannot be read, or a machine that is not the one it names."""

    code = "TARGET"


class BundleError(TrimtabError):
    """A bundle that is incomplete, altered, or not one."""

    code = "BUNDLE"
