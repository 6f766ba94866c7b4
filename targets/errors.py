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
    """

    exit_code = 1

    def __init__(self, place: str, *, expected: str, found: str, remedy: str) -> None:
        self.place, self.expected, self.found, self.remedy = place, expected, found, remedy
        super().__init__(f"{place}: expected {expected}, found {found}; {remedy}")


class TargetError(TrimtabError):
    """A profile that cannot be read, or a machine that is not the one it names."""


class BundleError(TrimtabError):
    """A bundle that is incomplete, altered, or not one."""
