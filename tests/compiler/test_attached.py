"""`deltas: {mode: attached}` end to end on a tiny real model, through the command line."""

import json

import pytest

from compiler import attached, judge
from compiler.errors import RecipeError
from compiler.recipe import load_recipe


@pytest.fixture
def recipe(tiny_llama, tiny_lora, tmp_path):
    """recipe(deltas=..., limits=...) -> the path of a recipe with two tenants of one adapter at different weights."""

    def write(limits=None, scheme="int8-g32", items=None, **more):
        rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]} for n in range(8)]
        (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        one = {"path": str(tiny_lora)}
        tenants = [{**one, "name": "support"}, {**one, "name": "sales", "weight": -1.0, "scale": {"*.down_proj": 0.5}}]
        parts = {
            "name": "tenants",
            "base": str(tiny_llama),
            "deltas": {"mode": "attached", "items": tenants if items is None else items},
            "quantize": {"scheme": scheme},
            "evaluate": {"data": "eval.jsonl"},
            "targets": [{"profile": "here", "limits": limits or {}}],
            **more,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(parts))
        return path

    return write


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(judge, "MEASURE_SECONDS", 1.0)
    monkeypatch.setattr(judge, "FRESH_PROCESSES", 1)
    monkeypatch.setattr(attached, "ROUNDS", 1)


def test_two_tenants_over_one_base_are_judged_published_and_run(trimtab, recipe, tmp_path):
    path, out = recipe({"size_mb": 5, "kl_mean": 0.05, "tpot_p50_ms": 2000}), tmp_path / "out"
    (plan,) = json.loads(trimtab("plan", path, "--json")[1])
    code, stdout, stderr = trimtab("compile", path, "--out", out)
    assert code == 0, stdout + stderr
    bundle = out / "tenants-here"
    manifest, report = (json.loads((bundle / name).read_text()) for name in ("manifest.json", "report.json"))
    files = {row["path"]: row for row in manifest["files"]}
    rows = {row["name"]: row for row in manifest["model"]["adapters"]}
    assert set(rows) == {"support", "sales"} and all(files[row["file"]]["bytes"] == row["bytes"] for row in rows.values())
    assert [row["name"] for row in manifest["lineage"]["deltas"]] == ["support", "sales"]
    decided = {row["name"]: row["outcome"] for row in report["verdict"]["checks"] if row["limit"] is not None}
    assert decided == dict.fromkeys(("size_mb", "kl_mean@support", "kl_mean@sales", "tpot_p50_ms"), "PASS")
    assert {row["metric"] for row in report["task"]} == {"exact_match@support", "exact_match@sales"}
    assert "adapter support" in next(row["note"] for row in report["verdict"]["checks"] if row["name"] == "tpot_p50_ms")
    systems = {row["system"] for row in report["adapters"]}
    assert systems == {"merged support", "attached, no adapter", "attached, support", "attached, all adapters"}
    assert "What unmerged adapters cost" in (bundle / "report.html").read_text() and "2 unmerged adapters" in (bundle / "README.md").read_text()
    assert abs(plan["predicted_size_mb"] - sum(files[name]["bytes"] for name in files if "onnx" in name) / 1e6) < 0.1

    canaries = json.loads((bundle / "selftest.json").read_text())["canaries"]
    assert [canary.get("adapter", "") for canary in canaries] == [""] * 4 + ["support"] * 4 + ["sales"] * 4
    assert trimtab("verify", bundle)[0] == 0
    assert "support (rank 8 at most" in trimtab("inspect", bundle)[1]
    assert len({str(canary["logits"]) for canary in canaries}) == 12  # no two answer alike
    code, stdout, _ = trimtab("run", bundle, "Say 3.", "--max-new-tokens", 3, "--json", "--adapter", "sales")
    assert code == 0 and len(json.loads(stdout)["token_ids"]) == 3
    code, _, stderr = trimtab("run", bundle, "Say 3.", "--adapter", "suport")
    assert code == 1 and "did you mean 'support'" in stderr and stderr.count("\n") == 1
    code, stdout, _ = trimtab("validate", bundle, "--limit", "kl_mean=1e-9")
    assert code == 3 and "kl_mean@sales" in stdout

    (bundle / "support.onnx_adapter").write_bytes((bundle / "sales.onnx_adapter").read_bytes())
    code, _, stderr = trimtab("verify", bundle)
    assert code == 1 and "support.onnx_adapter is altered" in stderr


def test_what_attached_deltas_cannot_have_is_told_before_any_work(trimtab, recipe, tiny_lora, tmp_path):
    cases = {
        "nothing to attach": ({"items": []}, "items to attach"),
        "combine": ({"combine": "ties"}, "attached deltas are not combined"),
        "one file for two": ({"items": [{"path": str(tiny_lora), "name": name} for name in ("a", "A")]}, "a name of its own for each delta"),
    }
    for changes, message in cases.values():
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe(**changes))
    code, _, stderr = trimtab("compile", recipe(task="feature-extraction"), "--out", tmp_path / "out")
    assert code == 2 and "only decoders serve unmerged adapters" in stderr and not (tmp_path / "out").exists()
