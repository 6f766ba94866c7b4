"""Batch, server and cold start, and smaller machines emulated: by known queues and in fresh processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtimes import confine, openloop
from runtimes.bench import BenchOptions, measure_in_child
from runtimes.collect import Budget, Limit
from runtimes.confine import Confinement, confinement, processors, siblings
from runtimes.openloop import Load, arrivals, episode, open_loop
from targets.errors import TrimtabError
from targets.machine import usable_cores, usable_memory
from targets.profile import here
from targets.spin import Spin, SpinReading

SHORT = {"prompt_tokens": 16, "new_tokens": 5, "threads": 1}


class Quiet(Spin):
    """A reference kernel that finds every window quiet, or every other one disturbed."""

    def __init__(self, pattern: tuple[bool, ...] = (True,)) -> None:
        super().__init__(1)
        self.pattern, self.reads = pattern, 0

    def calibrate(self, between: Callable[[], object] | None = None, count: int = 1) -> float:
        return 1.0

    def read(self) -> SpinReading:
        self.reads += 1
        return SpinReading(1.0, self.pattern[self.reads % len(self.pattern)])


def sleeper(ms: float) -> Callable[[], dict[str, float]]:
    def serve() -> dict[str, float]:
        started = time.perf_counter()
        time.sleep(ms / 1e3)
        return {"latency_ms": (time.perf_counter() - started) * 1e3, "ttft_ms": ms / 4}

    return serve


def test_arrivals_are_poisson_and_seeded() -> None:
    times = arrivals(Load(50.0, seed=3), 20_000, 0)
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.03) and np.std(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert times == arrivals(Load(50.0, seed=3), 20_000, 0) != arrivals(Load(50.0, seed=3), 20_000, 1)


class Clock:
    """A clock that only moves when somebody waits or serves: one slot, no real time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def serving(self, seconds: Iterator[float]) -> Callable[[], dict[str, float]]:
        """Requests that take so long, their first token after a quarter of it."""

        def serve() -> dict[str, float]:
            took = next(seconds)
            self.now += took
            return {"latency_ms": took * 1e3, "ttft_ms": took * 250.0}

        return serve


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(openloop, "time", made)
    return made


def test_waiting_counts_from_the_intended_arrival(clock: Clock) -> None:
    """Four requests at once, one slot of 40 ms each: the last waits for three others, though no request took longer than 40 ms."""
    served, whole = episode(clock.serving(itertools.repeat(0.04)), [0.0] * 4, 1)
    begin = served[0].begun
    assert whole == 4 and [one.done for one in served] == pytest.approx([begin + 0.04 * number for number in (1, 2, 3, 4)])
    assert [one.first - one.intended for one in served] == pytest.approx([begin + 0.04 * number + 0.01 for number in range(4)])


def test_slots_serve_at_the_same_time() -> None:
    four, _ = episode(sleeper(40.0), [0.0] * 4, 4)
    assert max(one.begun for one in four) < min(one.done for one in four)


def test_a_stalled_server_is_charged_for_those_who_came_meanwhile(clock: Clock) -> None:
    """The test of coordinated omission: one stall of 200 ms. A closed loop would count one slow request; here all that came during it are late."""
    served, _ = episode(clock.serving(iter([0.2] + [0.001] * 19)), [number * 0.01 for number in range(20)], 1)
    assert sum(one.done - one.begun > 0.05 for one in served) == 1 and sum(one.done - one.intended > 0.05 for one in served) == 17


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_a_queue_of_known_law(clock: Clock, utilisation: float) -> None:
    """M/M/1: with exponential service of rate m and arrivals of rate l, the time in the system is exponential with rate m - l (Kleinrock 1975, section 3.2)."""
    rng, load = np.random.default_rng(0), Load(utilisation * 10.0, seed=1)
    served, whole = episode(clock.serving(iter(rng.exponential(0.1, 25_000))), arrivals(load, 25_000, 0), 1)
    times = np.array([one.done - one.intended for one in served[2000:]])
    assert whole == 25_000
    for percentile in (50, 90, 99):
        assert np.percentile(times, percentile) == pytest.approx(-np.log(1 - percentile / 100) / (10.0 * (1 - utilisation)), rel=0.15)


def test_who_is_not_served_in_time_has_waited_at_least_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openloop, "DEADLINE", -4.0)  # the end: 0.2 s after the beginning
    served, whole = episode(sleeper(30.0), [number * 0.01 for number in range(21)], 1)
    assert len(served) == 21 and 3 <= whole < 12
    assert all(one.done == pytest.approx(0.2) and one.done - one.intended > -1e-9 for one in served[whole:])


def test_utilisation_overload_and_dropped_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openloop, "EPISODE_SECONDS", 0.4)
    budget = Budget(least=10, most=40, seconds=20.0)
    samples, used = open_loop(sleeper(1.0), Load(20.0), [Limit("server.latency_ms", 50.0, 1e4)], budget, Quiet())
    assert 0.015 < used < 1 and samples.tests[0][1].outcome == "PASS" and len(samples.values["server.ttft_ms"]) >= 32
    (_, test), utilisation = (found := open_loop(sleeper(10.0), Load(400.0), [Limit("server.latency_ms", 50.0, 1e6)], budget, Quiet()))[0].tests[0], found[1]
    assert utilisation > 1 and test.outcome == "INCONCLUSIVE"  # under the limit while we looked, and growing
    samples, used = open_loop(sleeper(1.0), Load(200.0), [], Budget(least=4, most=4, seconds=1.0), Quiet((True, False)))
    assert samples.dropped > 0 and samples.disturbed > 0 and not samples.values["server.latency_ms"]
    assert used > 0.2  # of the disturbed ones, where there are no others
    with pytest.raises(TrimtabError, match=r"limits: expected series among server.latency_ms, server.ttft_ms, found server.tpot_ms"):
        open_loop(sleeper(1.0), Load(10.0), [Limit("server.tpot_ms", 50.0, 1.0)], budget, Quiet())
    with pytest.raises(TrimtabError, match="expected a positive rate"):
        Load(0.0)


def test_what_a_request_raises_is_raised() -> None:
    def serve() -> dict[str, float]:
        raise TrimtabError("prompt", expected="a", found="b", remedy="c")

    with pytest.raises(TrimtabError, match="prompt"):
        episode(serve, [0.0, 0.01], 2)


@pytest.mark.parametrize("scene", ["batch", "server", "cold"])
def test_scenes_of_a_decoder_in_fresh_processes(decoder: SimpleNamespace, scene: str) -> None:
    more = {"batch": {"batch": 3, "least": 4, "most": 6}, "server": {"rate_per_s": 60.0, "concurrency": 2, "least": 8, "most": 20}, "cold": {}}[scene]
    limits = {"batch": {"batch.latency_p50_ms": 1e5}, "server": {"server.latency_p90_ms": 1e5, "server.ttft_p50_ms": 1e5}, "cold": {}}[scene]
    result = measure_in_child(decoder.directory, BenchOptions(**SHORT, **more, scene=scene, seconds=2.0, limits=limits))  # type: ignore[arg-type]
    expected = {
        "batch": {"batch.latency_ms", "batch.ttft_ms", "batch.tok_s"},
        "server": {"server.latency_ms", "server.ttft_ms"},
        "cold": {"cold_start_ms"},
    }[scene]
    assert set(result.series) == expected and result.conditions["scene"] == scene
    assert {test["name"] for test in result.tests} == set(limits) and 0 < result.load_peak_rss_mb <= result.peak_rss_mb
    if scene == "cold":
        (took,) = result.series["cold_start_ms"]
        assert took > 1e3 * result.load_s > 0  # it holds the load, and Python's own start
    if scene == "server":
        assert result.conditions["rate_per_s"] == 60.0 and result.conditions["utilisation"] > 0


def test_the_server_answers_for_encoders_too(encoder_bundle: Callable[..., Path]) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True, max_length=32)
    options = BenchOptions(length=16, least=8, most=20, seconds=2.0, threads=1, scene="server", rate_per_s=100.0)
    assert list(measure_in_child(folder, options).series) == ["server.latency_ms"]


# --- smaller machines ------------------------------------------------------------------------------------------------------------------------------------


def test_processors_of_so_many_cores() -> None:
    assert processors([[0, 4], [1, 5], [2, 6]], 1, 1) == [0] and processors([[0, 4], [1, 5]], 1, 2) == [0, 4]
    assert processors([[0, 4], [1, 5], [2, 6]], 2, 2) == [0, 1] and processors([[0, 4], [1, 5]], 2, 4) == [0, 1, 4, 5]
    assert sorted(number for core in siblings({0}) for number in core) == [0]


def test_only_what_is_smaller_is_confined() -> None:
    from dataclasses import replace

    assert not confinement(here()).needed
    other = replace(here(), fingerprint="", cores=usable_cores() + 1, memory_bytes=2 * usable_memory())
    assert not confinement(other).needed
    small = confinement(replace(other, memory_bytes=10**9))
    assert small == Confinement(0, 0, 10**9) and small.told == "1 GB"
    if usable_cores() > 1:
        assert confinement(replace(other, cores=1, threads=1)) == Confinement(1, 1, 0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes")
def test_a_confined_process_says_so_and_is(decoder: SimpleNamespace) -> None:
    result = measure_in_child(decoder.directory, BenchOptions(**SHORT, least=2, most=2, cores=1, core_threads=1, memory_bytes=3 * 10**9))  # type: ignore[arg-type]
    assert "1 core by affinity (1 processor); 3 GB of memory by" in result.emulated
    code = "import os; from runtimes.confine import *; impose(Confinement(1, 1)); print(len(os.sched_getaffinity(0)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_too_little_memory_stops_the_process_and_not_us(decoder: SimpleNamespace) -> None:
    pytest.importorskip("resource")
    with pytest.raises(TrimtabError, match="check its memory limit"):
        measure_in_child(decoder.directory, BenchOptions(**SHORT, least=2, most=2, memory_bytes=25 * 10**6))  # type: ignore[arg-type]


def test_control_groups_as_files(tmp_path: Path) -> None:
    assert confine.own_group(5, tmp_path) is None
    (tmp_path / "cgroup.controllers").touch()
    group = confine.own_group(5, tmp_path)
    assert group is not None and (group / "memory.max").read_text() == "5" and (group / "cgroup.procs").read_text() == str(os.getpid())
    (tmp_path / "trimtab-0").mkdir()
    confine.clean(tmp_path)
    assert not (tmp_path / "trimtab-0").exists() and group.exists()
