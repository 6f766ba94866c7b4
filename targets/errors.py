"""The root of trimtab's one error tree. Every error a user can cause says place, expected, found and remedy.

It lives in `targets` because imports point one way: targets <- runtimes <- compiler.
"""

from __future__ import annotations

from targets.codes import CODES


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
        if code:
            self.code = code
        assert self.code in CODES, self.code
        self.place, self.expected, self.found, self.remedy = (_one_line(part) for part in (place, expected, found, remedy))
        super().__init__(f"{self.place}: expected {self.expected}, found {self.found}; {self.remedy}")

    def as_dict(self) -> dict[str, str]:
        """What `--json` prints under "error"."""
        return {"code": self.code, "place": self.place, "expected": self.expected, "found": self.found, "remedy": self.remedy}


def _one_line(text: str) -> str:
    """Names come from files of strangers: what would break the line or steer a terminal is written as an escape."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class TargetError(TrimtabError):
    """A profile that cannot be read, or a machine that is not the one it names."""

    code = "TARGET"


class BundleError(TrimtabError):
    """A bundle that is incomplete, altered, or not one."""

    code = "BUNDLE"
