from pathlib import Path

import pytest

from compiler.errors import RecipeError
from compiler.recipe import Deltas, load_recipe, parse_recipe, parse_scenarios

GOOD = """
name: support-assistant
base: models/base
deltas:
  - path: adapters/support
    weight: 0.5
quantize: {scheme: int4-g32-asym, layers: {lm_head: int8-g32}}
targets:
  - profile: here
    limits: {size_mb: 105, ttft_p95_ms: 400}
"""


def given(deltas: str) -> str:
    """GOOD with its list of deltas replaced."""
    return GOOD.replace("deltas:\n  - path: adapters/support\n    weight: 0.5", f"deltas: {deltas}")


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_reads_what_it_says(write, tmp_path):
    recipe = load_recipe(write(GOOD))
    assert recipe.folder == tmp_path
    assert recipe.deltas.items[0].weight == 0.5
    assert str(recipe.quantize.schemes.of("lm_head")) == "int8-g32"
    assert str(recipe.quantize.schemes.of("model.layers.0.mlp.down_proj")) == "int4-g32-asym"
    assert recipe.targets[0].limits["ttft_p95_ms"] == 400


def test_set_lays_values_over_the_file(write):
    recipe = load_recipe(write(GOOD), ["quantize.scheme=int8-g64", "targets.0.limits.size_mb=90", "seed=7"])
    assert (recipe.quantize.scheme, recipe.targets[0].limits["size_mb"], recipe.seed) == ("int8-g64", 90, 7)


BAD = {
    "unknown key": (GOOD + "quantise: int4\n", r"recipe.yaml: quantise: expected one of .* found unknown key 'quantise'; did you mean 'quantize'\?"),
    "unknown nested key": (GOOD.replace("weight: 0.5", "wieght: 0.5"), r"deltas.0.wieght: .*did you mean 'weight'\?"),
    "name twice": (
        GOOD.replace("    weight: 0.5", "    name: a\n  - {path: other/support, name: A}"),
        r"deltas: expected a name of its own for each delta, found 'a' twice",
    ),
    "bad delta name": (GOOD.replace("weight: 0.5", "name: a/b"), r"deltas.0.name: expected"),
    "attached": (given("{mode: attached}"), r"deltas.mode: .*items to attach"),
    "unknown key of deltas": (
        given("{ony: [a]}"),
        r"deltas.ony: .*did you mean 'only'\?",
    ),
    "infinite factor": (GOOD.replace("weight: 0.5", "scale: {a: .inf}"), r"deltas.0.scale.a: expected a finite number"),
    "empty pattern": (GOOD.replace("weight: 0.5", 'only: [""]'), r"expected patterns of module names, found an empty one"),
    "only of nothing": (given("{only: [a]}"), r"expected items for only and scale"),
    "unknown limit": (GOOD.replace("size_mb", "sise_mb"), r"limits.sise_mb: .*did you mean 'size_mb'\?"),
    "NaN limit": (GOOD.replace("105", ".nan"), r"targets.0.limits.size_mb: expected a finite number"),
    "infinite limit": (GOOD.replace("105", ".inf"), r"targets.0.limits.size_mb: expected a finite number"),
    "negative limit": (GOOD.replace("105", "-1"), r"targets.limits.size_mb: expected a finite number above 0, found -1"),
    "text limit": (GOOD.replace("105", "small"), r"targets.0.limits.size_mb: expected a valid number"),
    "unknown scheme": (GOOD.replace("int4-g32-asym", "int9-g32"), r"quantize.scheme: expected intB-gN"),
    "unknown layer scheme": (GOOD.replace("int8-g32", "int9"), r"quantize.layers.lm_head"),
    "missing base": (GOOD.replace("base: models/base\n", ""), r"recipe.yaml: base: expected this key"),
    "duplicate key": (GOOD + "name: other\n", r"recipe.yaml:\d+:1: expected plain YAML, found key 'name' appears twice"),
    "alias": ("name: &a x\nbase: *a\n", r"aliases are not allowed"),
    "tag": ("name: !!python/object:os.system x\n", r"explicit tag .* is not allowed"),
    "list": ("- 1\n", r"expected a mapping"),
    "broken": ("name: [\n", r"expected plain YAML"),
    "same target twice": (GOOD + "  - profile: here\n", r"'here' twice"),
    "bad name": (GOOD.replace("support-assistant", "../../etc"), r"recipe.yaml: name"),
    "unknown method": (GOOD.replace("scheme: int4-g32-asym,", "scheme: int4-g32-asym, method: awq,"), r"quantize.method: expected 'rtn'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_are_told_in_one_line(case, write):
    text, message = BAD[case]
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(text))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("setting", ["scheme", "name.x=1", "targets.5.limits=1"])
def test_bad_settings(setting, write):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(write(GOOD), [setting])


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="expected a readable file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_list_of_deltas_is_short_for_a_mapping(write):
    listed = load_recipe(write(GOOD))
    mapped = load_recipe(write(given("{items: [{path: adapters/support, weight: 0.5}]}")))
    assert listed == mapped and listed.deltas.mode == "merged"
    assert [item.called for item in listed.deltas.items] == ["support"]


def test_selections_of_a_recipe(write):
    text = "{only: ['model.layers.*'], scale: {'*.mlp.*': 0.5}, items: [{path: a/b, name: tone, scale: {'*.0.*': -1}}]}"
    recipe = load_recipe(write(given(text)), ["deltas.items.0.weight=2"])
    (item,) = recipe.deltas.items
    assert (item.called, item.weight) == ("tone", 2.0)
    assert recipe.deltas.select.as_dict() == {"only": ["model.layers.*"], "scale": [["*.mlp.*", 0.5]]}
    assert item.select.factor("model.layers.0.mlp.up_proj", recipe.deltas.select.factor("model.layers.0.mlp.up_proj")) == -1


def test_deltas_of_one_folder_name_are_numbered_where_they_are_merged() -> None:
    items = [{"path": "a/support"}, {"path": "b/support"}, {"path": "c/x", "name": "support-2"}, {"path": "d/Support"}]
    assert Deltas(items=items).names == ("support", "support-3", "support-2", "Support-4")
    with pytest.raises(RecipeError, match=r"expected a name of its own for each delta, found 'support' twice"):
        Deltas(mode="attached", items=items[:2])


def test_scenarios_on_the_command_line_are_laid_over_those_of_the_bundle():
    found = parse_scenarios(["server.rate_per_s=2", "batch.size=4"], {"server": {"rate_per_s": 1.0, "concurrency": 3}}, {"server.latency_p99_ms": 1.0})
    assert (found.server.rate_per_s, found.server.concurrency, found.batch.size, found.cold_start) == (2.0, 3, 4, None)
    server, batch = found.measurements({"server.latency_p99_ms": 9.0, "batch.tok_s": 1.0, "batch.latency_p50_ms": 5.0, "server.ttft_p50_ms": 0.0})[1::-1]
    assert server == {"scene": "server", "rate_per_s": 2.0, "concurrency": 3, "limits": {"server.latency_p99_ms": 9.0}}
    assert batch == {"scene": "batch", "batch": 4, "limits": {"batch.tok_s": 1.0, "batch.latency_p50_ms": 5.0}}
    assert found.options == {} and parse_scenarios(["slow_spell=10"], {"seconds": 200}, {}).options == {"slow_spell": 10.0, "seconds": 200.0}
    assert parse_scenarios([], {}, {}).measurements({"cold_start_ms": 5.0}) == [{"scene": "cold"}] * 5


@pytest.mark.parametrize(
    ("settings", "limits", "message"),
    [
        (["server.rate=2"], {}, r"--scenario: server.rate: expected one of .*, found unknown key 'rate'; did you mean 'rate_per_s'"),
        (
            ["server.rate_per_s=0"],
            {},
            r"--scenario: server.rate_per_s: expected greater than 0|--scenario: server.rate_per_s: expected .*greater than 0, found 0",
        ),
        (["serve.rate_per_s=2"], {}, r"found unknown key 'serve'; did you mean 'server'"),
        (["server"], {}, r"--scenario server: expected key.path=value"),
        ([], {"server.latency_p99_ms": 1.0}, r"--limit server.latency_p99_ms: expected a scenario `server`.*; add --scenario server.rate_per_s=2"),
        ([], {"batch.tok_s": 1.0}, r"add --scenario batch.size=8"),
    ],
)
def test_bad_scenarios_on_the_command_line(settings, limits, message):
    with pytest.raises(RecipeError, match=message):
        parse_scenarios(settings, {}, limits)


def test_a_limit_of_a_scenario_needs_it_in_the_recipe():
    raw = {"name": "x", "base": "b", "targets": [{"profile": "here", "limits": {"server.ttft_p95_ms": 1.0}}]}
    with pytest.raises(RecipeError, match=r"targets.limits.server.ttft_p95_ms: expected a scenario `server`.*; add targets.scenarios: {server: {rate"):
        parse_recipe(raw, Path("recipe.yaml"))
