"""What compiling holds in memory at the least, told before anything is made: a build that cannot end is refused with its arithmetic.

    needed = LIBRARIES + 4 B x weights of the float model that answers are compared with + bytes of the exported weights that run beside it
    needed for a student = LIBRARIES + 16 B x its weights (weights, gradients, two moments) + 4 B x the teacher's

These are floors, not estimates: activations, calibration and copies come on top, so what is refused would surely have failed. What may be used is the least of
the machine's memory, the control group's limit, the address space that `ulimit -v` leaves, and what is free now.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from compiler.errors import TrimtabError
from compiler.sources import Sources
from targets.machine import usable_memory

LIBRARIES = 300e6  # Python with torch, transformers and onnxruntime loaded
FLOAT, TRAINED = 4, 16  # bytes a weight

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT, LARGEST, DEFAULT_THRESHOLD = 2**31 - 1, (2**30, 2**25), 2**17  # bytes; older versions of glibc refuse more than 32 MiB


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Inside, glibc keeps freed blocks of up to LARGEST bytes for the next that asks; on leaving it gives back what is free. Elsewhere nothing changes.

    Otherwise a tensor of 50 MB is new memory each time, and its first touch costs a page fault for every 4 KiB: a third of a step of training.
    """
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if not (mallopt and trim):
        yield
        return
    mallopt(M_TRIM_THRESHOLD, KEPT)
    any(mallopt(M_MMAP_THRESHOLD, largest) for largest in LARGEST)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, DEFAULT_THRESHOLD)
        mallopt(M_MMAP_THRESHOLD, DEFAULT_THRESHOLD)
        trim(0)


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
