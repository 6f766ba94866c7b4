"""What compiling holds in memory at the least, told before anything is made: a build that cannot end is refused with its arithmetic.

    needed = LIBRARIES + 4 B x weights of the float model that answers are compared with + bytes of the exported weights that run beside it
    needed for a student = LIBRARIES + 16 B x its weights (weights, gradients, two moments) + 4 B x the teacher's

These are floors, not estimates: activations, calibration and copies come on top, so what is refused would surely have failed. What may be used is the least of
the machine's memory, the control group's limit, the address space that `ulimit -v` leaves, and what is free now.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

from compiler.errors import TrimtabError
from compiler.sources import Sources
from targets.machine import usable_memory

LIBRARIES = 300e6  # Python with torch, transformers and onnxruntime loaded
FLOAT, TRAINED = 4, 16  # bytes a weight


def available_bytes() -> tuple[int, str]:
    """What this process may still use, and whose limit that is."""
    import psutil

    own = psutil.Process().memory_info()
    found = [(usable_memory(), "that this process may use"), (int(psutil.virtual_memory().available) + own.rss, "that are free")]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        found.append((max(0, space - own.vms) + own.rss, "that `ulimit -v` leaves"))
    return min(found)


def needed_bytes(sources: Sources, stored: int, trains: bool) -> Mapping[str, float]:
    """The terms of the larger of the two sums. stored: bytes of the exported weights; trains: a student is still to be made."""
    reference, made = sources.reference.parameter_count, sources.merged.parameter_count
    judged = {
        "libraries": LIBRARIES,
        f"float model of {reference / 1e6:,.1f} M weights x {FLOAT} B": FLOAT * reference,
        "exported weights": stored,
    }
    trained = {
        "libraries": LIBRARIES,
        f"student of {made / 1e6:,.1f} M weights x {TRAINED} B": TRAINED * made,
        f"teacher of {reference / 1e6:,.1f} M weights x {FLOAT} B": FLOAT * reference,
    }
    return max([judged, *([trained] if trains else [])], key=lambda terms: sum(terms.values()))


def check(sources: Sources, stored: int, trains: bool) -> None:
    """Raises TrimtabError, code MEMORY, where even the floor is more than there is."""
    terms, (available, whose) = needed_bytes(sources, stored, trains), available_bytes()
    if sum(terms.values()) > available:
        sums = " + ".join(f"{value / 1e9:.2f} ({name})" for name, value in terms.items())
        raise TrimtabError(
            "memory",
            expected=f"at least {sum(terms.values()) / 1e9:.2f} GB = {sums}",
            found=f"{available / 1e9:.2f} GB {whose}",
            remedy="close other programs, raise the limit, or compile on a machine with more: the bundle runs where it was not compiled",
            code="MEMORY",
        )
