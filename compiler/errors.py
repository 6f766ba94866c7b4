"""Errors of the compiler, on the tree that starts in `targets.errors`."""

from __future__ import annotations

from targets.errors import BundleError, TargetError, TrimtabError

__all__ = [
    "ArchitectureError",
    "BenchError",
    "BundleError",
    "CheckpointError",
    "DeltaError",
    "LimitError",
    "OutputError",
    "RecipeError",
    "TargetError",
    "TrimtabError",
]


class RecipeError(TrimtabError):
    """A recipe that cannot be read, or asks for what does not exist. A usage error: exit code 2."""

    code = "RECIPE"
    exit_code = 2


class CheckpointError(TrimtabError):
    """A base checkpoint that is missing, truncated, refused (pickle) or inconsistent."""

    code = "CHECKPOINT"


class DeltaError(TrimtabError):
    """A delta that does not fit its base."""

    code = "DELTA"


class ArchitectureError(TrimtabError):
    """A model family that the chosen road cannot build."""

    code = "ARCHITECTURE"


class OutputError(TrimtabError):
    """The result could not be written: no space left, no permission, a file in the way."""

    code = "OUTPUT"


class LimitError(TrimtabError):
    """A limit of the recipe was exceeded: no bundle is published. Exit code 3."""

    code = "LIMIT"
    exit_code = 3


class BenchError(TrimtabError):
    """A side-by-side benchmark that cannot be run as asked: a peer that is not installed, a system that fails, results of another bundle."""

    code = "BENCH"
