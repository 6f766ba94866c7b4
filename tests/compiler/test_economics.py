"""Cost, return, and the place among other builds: figures by hand, nothing invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.economics import Cost, delta_bytes, economics, saving_rows, stage_rows
from compiler.errors import RecipeError
from compiler.history import Point, front, point_of, position, remember
from compiler.recipe import parse_recipe
from compiler.report.verdict import Check
from compiler.store import Store

FACTS = {"size_mb": 100.0, "peak_rss_mb": 300.0, "request_ms": 500.0, "parameters": 100_000_000, "delta_mb": 4.0}


def point(export: str, size: float, loss: float) -> Point:
    return Point(export, f"scheme-{export}", size, "kl_mean", loss, 5.0, "here")


def test_only_rows_whose_inputs_are_stated() -> None:
    (plain,) = saving_rows(Cost(), FACTS)
    assert (plain["alternative"], plain["bundle"]) == (400.0, 100.0)
    assert saving_rows(Cost(), {}) == []
    tuned = saving_rows(Cost(tenants=10), FACTS)[1]
    assert (tuned["alternative"], tuned["bundle"]) == (4000.0, 440.0)
    cost = Cost.model_validate(
        {
            "watts": 20,
            "price_per_kwh": 0.5,
            "currency": "EUR",
            "requests_per_day": 7200,
            "devices": 1000,
            "alternative": {"name": "fp32", "size_mb": 400, "request_ms": 1000},
        }
    )
    rows = {row["what"].split(":")[0]: row for row in saving_rows(cost, FACTS)[1:]}
    assert list(rows) == [
        "Size",
        "Shipping one release to 1,000 devices",
        "Time of one request",
        "Energy of one request",
        "Energy of a day",
        "Electricity of a year",
    ]
    assert rows["Shipping one release to 1,000 devices"]["alternative"] == 400  # GB
    assert rows["Energy of one request"]["bundle"] == pytest.approx(10)  # 20 W for half a second
    assert rows["Energy of a day"]["bundle"] == pytest.approx(7200 * 10 / 3.6e6)
    assert rows["Electricity of a year"]["alternative"] == pytest.approx(365 * 7200 * 20 / 3.6e6 * 0.5)


def test_energy_of_a_stage_needs_stated_watts() -> None:
    record = {"stage": "export", "seconds": 18.0, "cpu_seconds": 30.0, "peak_rss_mb": 1.0, "bytes": 5, "cached": False}
    assert stage_rows([record], None)[0]["energy_wh"] is None
    assert stage_rows([record], 100.0)[0]["energy_wh"] == pytest.approx(0.5)


def test_request_time_is_what_was_measured() -> None:
    checks = [{"name": "ttft_p50_ms", "measured": 100.0}, {"name": "tpot_p50_ms", "measured": 10.0}, {"name": "size_mb", "measured": 1.0}]
    document = {"verdict": {"checks": checks}, "records": [], "model": {"parameters": None}}
    cost = Cost.model_validate({"alternative": {"name": "x", "request_ms": 820}})
    (row,) = economics(cost, document, 0)["savings"]
    assert row["bundle"] == pytest.approx(100 + 31 * 10)
    assert economics(Cost(), document, 0) == {"stages": [], "savings": [], "inputs": {}}


def test_inputs_are_checked_and_deltas_are_weighed(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(bytes(100))
    raw = {"name": "x", "base": "b", "deltas": [{"path": "adapter"}, {"path": "someone/else"}], "cost": {"watts": 15}}
    assert delta_bytes(parse_recipe(raw, tmp_path / "recipe.yaml")) == 100
    for cost, message in (({"wats": 15}, "cost.*unknown key 'wats'; did you mean 'watts'"), ({"watts": -1}, "cost.watts")):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**raw, "cost": cost}, tmp_path / "recipe.yaml")


def test_the_front_is_what_no_other_build_beats() -> None:
    points = [point("a", 100, 0.1), point("b", 80, 0.3), point("c", 90, 0.35), point("d", 120, 0.1)]
    assert [one.export for one in front(points)] == ["b", "a"]
    told = position(points, "here")
    assert [row["front"] for row in told["builds"]] == [True, True, False, False] and told["builds"][-1]["this"]
    assert position(points, "elsewhere")["builds"][0]["latency_ms"] is None  # measured on another machine


def test_builds_are_remembered_once_each(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert remember(store, "f", point("a", 100, 0.1)) == [point("a", 100, 0.1)]
    remember(store, "f", point("b", 80, 0.3))
    assert remember(store, "f", point("a", 100, 0.2)) == [point("b", 80, 0.3), point("a", 100, 0.2)]
    (tmp_path / "builds" / "f.json").write_text("{")
    assert len(remember(store, "f", point("c", 1, 1))) == 1
    assert point_of("x", "int8", [Check("size_mb", 5.0, "MB"), Check("cosine_mean", 0.99, "")], "m") == Point(
        "x", "int8", 5.0, "cosine_mean", pytest.approx(0.01), None, "m"
    )
    assert point_of("x", "int8", [Check("size_mb", 5.0, "MB"), Check("kl_mean@a", 0.1, "")], "m") is None
