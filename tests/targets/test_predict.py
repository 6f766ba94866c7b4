"""Predictions: sums of the table, or rooflines with wide intervals, or the reason why there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from targets.difference import difference
from targets.errors import TargetError
from targets.kernels import Case
from targets.predict import REGION_US, ROOFLINE, RUNTIME_BYTES, TABLE, TABLE_HERE, Conditions, Operator, Workload, predict
from targets.profile import KernelTime, Profile, here, list_profiles, load_profile

MATRIX, ATTEND = Case("MatMulNBits", 4, 64, 512, 512), Case("GroupQueryAttention", 32, 64, 512, 128)
WORK = Workload("decoder", (Operator(MATRIX, 3), Operator(MATRIX, 1, last=True), Operator(ATTEND, 3)), stored_bytes=10**6, resident_bytes=2 * 10**6)
ROWS = (
    *(KernelTime("MatMulNBits", 4, 64, 512, 512, m, 2, us) for m, us in ((1, 10.0), (128, 1000.0))),
    *(KernelTime("GroupQueryAttention", 32, 64, 512, 128, m, 2, us, True, context) for m, context, us in ((1, 144, 20.0), (128, 0, 500.0))),
)


def profile(**change: object) -> Profile:
    plain = Profile("line4", "GenuineIntel", "icelake", ("avx2",), 4, 4, 1 << 33, read_gb_s=20.0, fp32_gflop_s=100.0, int8_gop_s=200.0, run_us=50.0)
    return replace(plain, **change)  # type: ignore[arg-type]


def test_figures_are_the_tables_sums() -> None:
    figures = predict(WORK, profile(kernels=ROWS), Conditions(prompt_tokens=128, new_tokens=32)).figures
    assert figures["ttft_ms"].value == pytest.approx((50 + 3 * 1000 + 10 + 3 * 500) / 1e3)  # the head sees the last token alone
    assert figures["tpot_ms"].value == pytest.approx((50 + 3 * 10 + 10 + 3 * 20) / 1e3)
    assert figures["decode_tok_s"].value == pytest.approx(1e3 / figures["tpot_ms"].value)
    assert figures["peak_rss_mb"].value == pytest.approx((RUNTIME_BYTES + 2e6) / 1e6)


def test_a_long_prompt_is_read_in_chunks() -> None:
    table = profile(kernels=ROWS)
    one, two = (predict(WORK, table, Conditions(prompt_tokens=128 * n, prefill_chunk=128)).figures["ttft_ms"].value for n in (1, 2))
    assert two > 2 * one  # the second chunk sees the first in the cache


def test_intervals_are_as_wide_as_the_evidence() -> None:
    measured = replace(here(), kernels=ROWS)
    cases = [(measured, TABLE_HERE, "kernel table"), (profile(kernels=ROWS), TABLE, "kernel table"), (profile(), ROOFLINE, "roofline")]
    cases += [(profile(kernels=ROWS[:2]), ROOFLINE, "kernel table and roofline")]
    for machine, width, basis in cases:
        told = predict(WORK, machine)
        estimate = told.figures["tpot_ms"]
        assert told.basis == basis
        assert estimate.high / estimate.value == pytest.approx(estimate.value / estimate.low) == pytest.approx(1 + width)


def test_roofline_takes_the_slower_of_memory_and_arithmetic() -> None:
    only = Workload("decoder", (Operator(MATRIX),), 0, 0)
    told = predict(only, profile(run_us=None), Conditions(prompt_tokens=1000, prefill_chunk=0)).figures
    codes, scales = 512 * 512 / 2, 8 * 512 * 8
    assert told["tpot_ms"].value == pytest.approx((REGION_US + (codes + scales + 4 * 1024) / 20e3) / 1e3)
    assert told["ttft_ms"].value == pytest.approx((REGION_US + 2e-3 * 1000 * 512 * 512 / (200 * 0.45)) / 1e3)


def test_a_profile_that_knows_nothing_says_what_is_missing() -> None:
    with pytest.raises(TargetError, match=r"profile line4: read_gb_s.*trimtab targets probe"):
        predict(WORK, profile(read_gb_s=None))


def test_an_encoder_attends_row_by_row() -> None:
    work = Workload("encoder", (Operator(Case("Attention", 32, 64, 512, 512)), Operator(MATRIX)), 0, 0)
    rows = (*ROWS, *(KernelTime("Attention", 32, 64, 512, 512, m, 2, us) for m, us in ((32, 30.0), (128, 400.0))))
    told = predict(work, profile(kernels=rows), Conditions(batch=4, length=32)).figures["encode_ms"].value
    assert told == pytest.approx((50 + 4 * 30 + 1000) / 1e3)


@pytest.mark.parametrize("machine", [row.id for row in list_profiles() if row.id != "here"])
def test_every_shipped_profile_can_be_predicted_for(machine: str) -> None:
    figures = predict(WORK, load_profile(machine)).figures
    assert all(0 < row.low < row.value < row.high for row in figures.values())


def test_difference_names_fields_and_kernels() -> None:
    faster = tuple(replace(row, us=row.us / 2) for row in ROWS)
    rows = difference(profile(kernels=ROWS), profile(id="line5", read_gb_s=40.0, kernels=faster))
    assert {row["name"]: row["ratio"] for row in rows} == {
        "id": None,
        "read_gb_s": 2.0,
        **{f"MatMulNBits 4 bit block 64, {m} tokens": pytest.approx(2.0) for m in (1, 128)},
        **{f"GroupQueryAttention 32 bit block 64, {m} tokens": pytest.approx(2.0) for m in (1, 128)},
    }
    assert difference(profile(), profile()) == []
