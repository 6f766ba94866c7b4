"""Sampling until decided: with a scripted machine in place of the real one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from runtimes.collect import CROWDED, FIRST_LOOK, SLOW_SPELL, Budget, Limit, Samples, collect, warm_up
from runtimes.metrics import FAIL, INCONCLUSIVE, LEAST_WORTH, PASS, look_confidence, min_samples, spell_effect
from targets.errors import TrimtabError
from targets.spin import Company, Spin, SpinReading

P95_FIRST_LOOK = math.ceil(spell_effect(SLOW_SPELL) * min_samples(95, 0, look_confidence(1)))


class Script(Spin):
    """A reference kernel whose readings are scripted; quiet when the script ends."""

    company = ""

    def __init__(self, readings: Iterator[bool] | None = None) -> None:
        super().__init__(1)
        self._readings = readings or iter(())

    def time_ms(self) -> float:
        return 1.0

    def crowded(self) -> str:
        return self.company

    def read(self) -> SpinReading:
        quiet = next(self._readings, True)
        return SpinReading(1.0 if quiet else 9.0, quiet)


def run(values: Iterator[float], limits: list[Limit], budget: Budget, spin: Script | None = None) -> Samples:
    """Collect with one call a window."""
    with spin or Script() as kernel:
        return collect(lambda: {"ttft_ms": next(values)}, limits, budget, kernel)


def constant(value: float) -> Iterator[float]:
    while True:
        yield value


def budget(**changes: float) -> Budget:
    return Budget(**{"least": 1, "most": 3000, "window_ms": 0.0, **changes})  # type: ignore[arg-type]


def test_a_clear_pass_takes_the_first_look_and_no_more() -> None:
    samples = run(constant(10.0), [Limit("ttft_ms", 95, 20.0)], budget())
    ((limit, test),) = samples.tests
    assert (limit.percentile, test.outcome, test.misses, test.samples) == (95, PASS, 0, P95_FIRST_LOOK)
    assert len(samples.values["ttft_ms"]) == P95_FIRST_LOOK and samples.looks == 1
    assert test.confidence == look_confidence(1) and test.false_pass <= 0.005


def test_a_clear_fail_is_told_at_the_first_look() -> None:
    ((_, test),) = run(constant(30.0), [Limit("ttft_ms", 95, 20.0)], budget()).tests
    assert (test.outcome, test.samples) == (FAIL, FIRST_LOOK)


@pytest.mark.parametrize("limit", [5.0, 20.0])
def test_spells_that_are_told_take_as_many_samples_as_tell_them(limit: float) -> None:
    ((_, test),) = run(constant(10.0), [Limit("ttft_ms", 95, limit)], budget(slow_spell=10.0)).tests
    worth = LEAST_WORTH if limit < 10 else min_samples(95, 0, look_confidence(1))
    assert (test.outcome, test.samples, test.effect) == (FAIL if limit < 10 else PASS, 19 * worth, 19.0)


@pytest.mark.parametrize(("limit", "outcome"), [(90.0, PASS), (110.0, FAIL), (100.0, PASS)])
def test_a_rate_is_judged_by_its_median_from_below(limit: float, outcome: str) -> None:
    samples = run(constant(100.0), [Limit("ttft_ms", 50, limit, at_least=True)], budget())
    ((_, test),) = samples.tests
    assert (test.outcome, test.samples, test.limit) == (outcome, FIRST_LOOK, limit)
    assert (test.estimate, test.lower, test.upper) == pytest.approx((100.0, 100.0, 100.0))


def test_a_rates_bounds_stand_the_right_way_round() -> None:
    rng = np.random.default_rng(1)
    ((_, test),) = run(iter(rng.uniform(90, 110, 10_000)), [Limit("ttft_ms", 50, 80.0, at_least=True)], budget()).tests
    assert test.outcome == PASS and test.lower is not None and test.estimate is not None and test.upper is not None
    assert 90 < test.lower < test.estimate < test.upper < 110


@pytest.mark.parametrize(("limit", "beside"), [(90.0, PASS), (110.0, INCONCLUSIVE), (CROWDED * 90.0, INCONCLUSIVE), (CROWDED * 110.0, FAIL)])
def test_company_fails_no_rate(limit: float, beside: str) -> None:
    crowd = Script()
    crowd.company = "other processes took the time of 1.0 processors"
    assert run(constant(100.0), [Limit("ttft_ms", 50, limit, at_least=True)], budget(), crowd).tests[0][1].outcome == beside


def test_a_close_call_ends_at_the_cap_without_a_verdict() -> None:
    rng = np.random.default_rng(0)
    values = iter(np.where(rng.random(10_000) < 0.05, 30.0, 10.0).tolist())
    samples = run(values, [Limit("ttft_ms", 95, 20.0)], budget(most=400))
    ((_, test),) = samples.tests
    assert (test.outcome, test.samples) == (INCONCLUSIVE, 400) and samples.looks >= 2


def test_sampling_goes_on_until_every_limit_is_decided() -> None:
    samples = run(constant(10.0), [Limit("ttft_ms", 50, 20.0), Limit("ttft_ms", 95, 20.0), Limit("ttft_ms", 90, 5.0)], budget())
    assert [test.outcome for _, test in samples.tests] == [PASS, PASS, FAIL]
    assert [test.samples for _, test in samples.tests] == [FIRST_LOOK, P95_FIRST_LOOK, FIRST_LOOK]


def test_disturbed_windows_are_dropped_and_counted() -> None:
    # readings: before, then one after each window; a bad one spoils the window before it and the one after
    samples = run(iter([*[1.0] * 13, *range(100, 110)]), [], budget(least=6), Script(iter([True, True, False, True])))  # type: ignore[arg-type]
    assert (samples.windows, samples.disturbed, samples.dropped) == (8, 2, 2)
    kept = samples.values["ttft_ms"]
    assert len(kept) == 6 and samples.tests == ()


def test_a_machine_that_is_never_quiet_gives_no_verdict() -> None:
    samples = run(constant(10.0), [Limit("ttft_ms", 50, 20.0)], budget(most=50), Script(constant(0.0)))  # type: ignore[arg-type]
    ((_, test),) = samples.tests
    assert (test.outcome, test.samples, samples.dropped) == (INCONCLUSIVE, 0, 150)  # three times the cap, and then it is enough


def test_short_calls_wait_for_a_quiet_window() -> None:
    samples = run(constant(10.0), [], budget(least=4, most=4), Script(iter([False] * 14 + [True] * 10)))  # type: ignore[arg-type]
    assert (samples.dropped, len(samples.values["ttft_ms"])) == (14, 4)  # 12 calls are three times the cap


@pytest.mark.parametrize(("limit", "alone", "beside"), [(20.0, PASS, PASS), (9.0, FAIL, INCONCLUSIVE), (1.3, FAIL, INCONCLUSIVE), (1.2, FAIL, FAIL)])
def test_company_never_makes_a_machine_fail(limit: float, alone: str, beside: str) -> None:
    """Latencies of 10 ms: an eighth of them is 1.25."""
    crowd = Script()
    crowd.company = "other processes took the time of 1.0 processors"
    for spin, outcome in ((None, alone), (crowd, beside)):
        samples = run(constant(10.0), [Limit("ttft_ms", 95, limit)], budget(), spin)
        assert samples.tests[0][1].outcome == outcome and samples.crowded == (spin.company if spin else "")


class _Times(NamedTuple):
    """As psutil tells /proc/stat."""

    user: float
    nice: float
    system: float
    idle: float
    iowait: float
    irq: float
    softirq: float
    steal: float
    guest: float
    guest_nice: float


def test_company_is_the_time_of_others_beyond_what_we_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    company = Company(threads=2)
    for allowed, others, excess in (({0, 1}, 0.0, 0.0), ({0, 1}, 1.5, 1.5), ({0, 1, 2, 3}, 1.5, 0.0), ({0, 1, 2, 3}, 2.5, 0.5)):
        company._allowed, company._wall, company._others = allowed, 10.0, 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: 14.0)
        monkeypatch.setattr(company, "_used", lambda others=others: 100.0 + 4 * others)
        assert company.excess() == pytest.approx(excess)


def test_idle_time_and_our_own_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    each = [_Times(5.0, 1.0, 2.0, 100.0, 7.0, 0.0, 0.5, 1.5, 3.0, 0.0), _Times(*[9.0] * 10)]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: each)
    company = Company(threads=1)
    company._allowed = {0}
    monkeypatch.setattr(time, "process_time", lambda: 4.0)
    assert company._used() == 5.0 + 1.0 + 2.0 + 0.5 + 1.5 - 4.0


def test_a_baseline_above_the_quiet_machines_is_company() -> None:
    for known, told in ((0.0, ""), (1.0, ""), (0.5, "the reference kernel took 1.00 ms, 0.50 ms when this machine was probed")):
        with Spin(1, known_ms=known) as spin:
            spin.baseline_ms = 1.0
            spin._company.excess = lambda: 0.0  # type: ignore[method-assign]
            assert spin.crowded() == told


def test_disturbed_windows_do_not_use_up_the_cap() -> None:
    # a disturbed window pair after every third: half of the windows are lost, and the cap of 50 kept ones is still reached
    readings = iter([True, True, False] * 1000)
    samples = run(constant(10.0), [Limit("ttft_ms", 99, 20.0)], budget(most=50), Script(readings))
    assert len(samples.values["ttft_ms"]) == 50 and samples.dropped > 50


def test_time_is_a_cap_too() -> None:
    samples = run(constant(10.0), [Limit("ttft_ms", 99.9, 20.0)], budget(seconds=0.02))
    assert samples.tests[0][1].outcome == INCONCLUSIVE and samples.seconds < 5


def test_simulated_false_passes_over_many_looks() -> None:
    """250 machines exactly at the limit, each looked at many times: together the looks keep the 1 % (bound at four standard errors)."""
    rng = np.random.default_rng(5)
    passes = 0
    for _ in range(250):
        values = iter(np.where(rng.random(200) < 0.5, 30.0, 10.0).tolist())
        passes += run(values, [Limit("ttft_ms", 50, 20.0)], budget(most=100)).tests[0][1].outcome == PASS
    assert passes / 250 <= 0.01 + 4 * (0.01 * 0.99 / 250) ** 0.5


def chain(seed: int, phi: float) -> Iterator[float]:
    """Log-normal latencies around 10 ms, each like the one before it."""
    rng, state = np.random.default_rng(seed), 0.0
    while True:
        state = phi * state + (1 - phi**2) ** 0.5 * rng.standard_normal()
        yield 10.0 * math.exp(0.1 * state)


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_limits_ten_percent_off_are_told_right(phi: float) -> None:
    """The true p90 is 10 exp(0.128) ms: limits 10 % above pass, 10 % below fail, for 19 of 20 machines at least."""
    truth = 10.0 * math.exp(0.1 * 1.28155)
    for factor, outcome in ((1.1, PASS), (0.9, FAIL)):
        found = [run(chain(seed, phi), [Limit("ttft_ms", 90, factor * truth)], budget(most=2000)).tests[0][1].outcome for seed in range(20)]
        assert found.count(outcome) >= 19 and set(found) <= {outcome, INCONCLUSIVE}


def test_slow_waves_far_below_the_limit_do_not_stop_a_pass() -> None:
    """A machine that is twice as slow for fifty requests in a hundred, and its limit four times as high as the slow half."""
    waves = iter([10.0 if number % 100 < 50 else 20.0 for number in range(4000)])
    assert run(waves, [Limit("ttft_ms", 95, 80.0)], budget()).tests[0][1].outcome == PASS


def test_false_passes_of_dependent_requests_stay_at_the_stated_rate() -> None:
    """Each request like the one before it (0.9): 150 machines exactly at their median, where samples taken for independent would pass every twentieth."""
    found = [run(chain(seed, 0.9), [Limit("ttft_ms", 50, 10.0)], budget(most=400)).tests[0][1].outcome for seed in range(150)]
    assert found.count(PASS) / 150 <= 0.01 + 4 * (0.01 * 0.99 / 150) ** 0.5


def test_a_machine_disturbed_now_and_then_is_judged_by_its_quiet_windows() -> None:
    """A neighbour doubles the latency in every third window and is seen by the kernel: the limit still passes, and what was dropped is told."""
    taken = [0]

    def readings() -> Iterator[bool]:
        for number in range(5000):
            taken[0] = number
            yield number % 6 != 5

    def neighbour() -> Iterator[float]:
        while True:
            beside = (taken[0] % 6 == 5, (taken[0] + 1) % 6 == 5)  # the readings before and after this request
            yield 20.0 if any(beside) else 10.0

    samples = run(neighbour(), [Limit("ttft_ms", 90, 12.0)], budget(most=300), Script(readings()))
    assert samples.tests[0][1].outcome == PASS and samples.dropped >= 20


def test_warm_up_stops_when_calls_get_no_faster() -> None:
    calls = []

    def call() -> dict[str, float]:
        calls.append(1)
        return {"x": 1.0}

    warm_up(call)
    assert 2 <= len(calls) <= 8


def test_mistakes() -> None:
    with pytest.raises(TrimtabError, match="limits: expected series among ttft_ms, found encode_ms"):
        run(constant(1.0), [Limit("encode_ms", 50, 1.0)], budget())
    with pytest.raises(TrimtabError, match="measuring budget"):
        Budget(least=5, most=2)
