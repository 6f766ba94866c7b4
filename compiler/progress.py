"""Progress of long work: a live line on a terminal, plain lines elsewhere, nothing when asked for JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import psutil

PLAIN_INTERVAL_S = 5.0


class Progress:
    """Says which stage runs, how far it is, at which rate, when it will end and how much memory is held.

    `stage` brackets a stage; `update` is handed to the stage and called with (item, done, total).
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty()
        self._name, self._started, self._said = "", 0.0, 0.0
        self._loop_started, self._done = 0.0, 0

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        self._name, self._started, self._said = name, time.monotonic(), 0.0
        self._loop_started, self._done = self._started, 0
        self._say(f"{name:10s} {detail}")
        yield
        from compiler.record import peak_rss_mb  # it brings numpy, which --help must not wait for

        self._say(f"{name:10s} done in {time.monotonic() - self._started:.1f} s, at most {peak_rss_mb():.0f} MB held so far", last=True)

    def update(self, item: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self._done:  # another loop of the same stage began: its rate is its own
            self._loop_started = now
        self._done = done
        if self.quiet or now - self._said < (0.1 if self.live else PLAIN_INTERVAL_S):
            return
        if not self._said and not self.live and now - self._started < PLAIN_INTERVAL_S:
            return
        self._said = now
        spent = now - self._loop_started
        left = f", {spent / done * (total - done):.0f} s left" if done and spent else ""
        memory = psutil.Process().memory_info().rss / 1e6
        self._say(f"{self._name:10s} {done}/{total} {item}, {done / spent if spent else 0:.3g}/s{left}, {memory:.0f} MB held", keep=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._say(text, last=True)

    def _say(self, text: str, last: bool = False, keep: bool = False) -> None:
        if self.quiet:
            return
        if self.live:
            self.stream.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        else:
            self.stream.write(text.rstrip() + "\n")
        self.stream.flush()
