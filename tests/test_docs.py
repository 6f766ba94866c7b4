"""The pages under docs/ against the code: links, keys, limits, commands, recipes, figures and error messages."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from pydantic import BaseModel

from compiler import economics, scenarios
from compiler import recipe as recipe_module
from compiler.checkpoints.resolve import open_checkpoint, require_tokenizer
from compiler.cli import cli
from compiler.deltas.load import load_delta
from compiler.errors import TrimtabError
from compiler.limits import PERCENTILE, ROWS, SCENE_PERCENTILE, quantity
from compiler.recipe import Recipe, load_recipe, parse_limits, parse_recipe
from compiler.scheme import Schemes, parse_scheme, stored_bytes
from compiler.stages.export import road
from compiler.stages.merge import merged_view
from compiler.store import writing
from compiler.text import read_yaml
from runtimes.metrics import look_confidence, min_samples
from targets.profile import known_fields, profile_names

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PER_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table_keys(name: str) -> set[str]:
    """What stands in backquotes in the first cells of a page's tables."""
    first = [line.split("|")[1] for line in text_of(name).splitlines() if line.startswith("| ")]
    return {word for cell in first for word in re.findall(r"`([^`]+)`", cell)}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@PER_PAGE
def test_relative_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall(text_of("index.md")))
    assert {page.name for page in PAGES} - {"index.md"} <= listed


@PER_PAGE
def test_paths_of_the_repository_exist(page: Path) -> None:
    """`compiler/scheme.py` in a page is a file."""
    for path in re.findall(r"`((?:compiler|runtimes|targets|tests|docs)/[\w./]+\.(?:py|md|yaml))`", page.read_text(encoding="utf-8")):
        assert (DOCS.parent / path).is_file(), f"{page.name}: {path}"


def recipe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe as docs/recipe.md writes it: `deltas.path`, without list numbers."""
    parts: dict[str, type[BaseModel]] = {
        "deltas": recipe_module.Deltas,
        "items": recipe_module.DeltaItem,
        "combine": recipe_module.CombineItem,
        "quantize": recipe_module.Quantize,
        "evaluate": recipe_module.Evaluate,
        "targets": recipe_module.TargetItem,
        "scenarios": scenarios.Scenarios,
        "server": scenarios.Server,
        "batch": scenarios.Batch,
        "cold_start": scenarios.ColdStart,
        "distil": recipe_module.Distil,
        "cost": economics.Cost,
        "alternative": economics.Alternative,
    }
    for name in model.model_fields:
        yield prefix + name
        if name in parts and prefix != "distil.":  # whose batch is a number
            yield from recipe_keys(parts[name], f"{prefix}{name}.")


def test_every_recipe_key_is_explained_and_no_other() -> None:
    documented, known = table_keys("recipe.md"), set(recipe_keys(Recipe))
    both = [*vars(recipe_module).values(), *vars(scenarios).values(), *vars(economics).values()]
    models = {model for model in both if isinstance(model, type) and issubclass(model, recipe_module.Part)}
    rooms = {recipe_module.Deltas, recipe_module.DeltaItem, recipe_module.CombineItem, recipe_module.Quantize, recipe_module.Evaluate, recipe_module.TargetItem}
    rooms |= {scenarios.Scenarios, scenarios.Server, scenarios.Batch, scenarios.ColdStart}
    rooms |= {economics.Cost, economics.Alternative, recipe_module.Distil}
    assert models == {recipe_module.Part, scenarios.Requests, Recipe, *rooms}
    assert known <= documented, known - documented
    extra = {key for key in documented - known if not (PERCENTILE.fullmatch(key) or SCENE_PERCENTILE.fullmatch(key)) and key not in {row.name for row in ROWS}}
    assert not extra


def test_every_limit_is_explained_with_its_unit_and_direction() -> None:
    rows = {cells[1].strip(): cells for line in text_of("recipe.md").splitlines() if line.startswith("| `") and len(cells := line.split("|")) == 6}
    for limit in ROWS:
        cells = rows[f"`{limit.name}`"]
        assert cells[2].strip().split(" (")[0] == limit.unit
        assert cells[3].strip() == ("at most" if limit.at_most else "at least")
    for series in ("ttft", "tpot", "encode", "server.latency", "server.ttft", "batch.latency", "batch.ttft"):
        for percentile in (50, 90, 95, 99):
            assert quantity(f"{series}_p{percentile}_ms", "docs").name in table_keys("recipe.md")


def test_every_command_is_in_the_reference() -> None:
    def names(group: click.Group, path: str) -> Iterator[str]:
        for name, command in group.commands.items():
            yield f"{path} {name}"
            if isinstance(command, click.Group):
                yield from names(command, f"{path} {name}")

    headings = set(re.findall(r"^## (.+)$", text_of("cli.md"), re.MULTILINE))
    assert set(names(cli, "trimtab")) <= headings


@PER_PAGE
def test_commands_and_options_in_pages_exist(page: Path) -> None:
    """`trimtab validate --junit` in a page: the command and its options are known. Pages say `not built` of the rest."""
    for line in re.findall(r"^    trimtab (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = line.split()
        command: click.Command = cli
        while isinstance(command, click.Group):
            assert words[0] in command.commands, f"{page.name}: trimtab {line}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: trimtab {line}"


def test_recipes_in_pages_parse(tmp_path: Path) -> None:
    blocks = [
        (page.name, body) for page in PAGES for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "yaml" and body.startswith("name:")
    ]
    assert blocks
    for page, body in blocks:
        path = tmp_path / page
        path.write_text(body, encoding="utf-8")
        assert parse_recipe(read_yaml(path), path).name


def test_python_in_pages_compiles() -> None:
    for page in PAGES:
        for kind, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if kind == "python":
                compile(body, page.name, "exec")


def test_rows_of_evaluation_data_parse(tmp_path: Path) -> None:
    from compiler.evaluation.data import load_rows

    (body,) = [body for kind, body in FENCE.findall(text_of("evaluation.md")) if kind == "json"]
    (tmp_path / "eval.jsonl").write_text(body, encoding="utf-8")
    assert len(load_rows(tmp_path / "eval.jsonl").rows) == 9


def test_bytes_of_a_matrix_are_what_the_table_says() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \|$", text_of("quantization.md"), re.MULTILINE)
    assert len(rows) >= 9
    assert {scheme: stored_bytes((576, 576), parse_scheme(scheme)) for scheme, _ in rows} == {scheme: int(size) for scheme, size in rows}


def test_fewest_samples_are_what_the_table_says() -> None:
    rows = re.findall(r"^\| p(\d+) \| (\d+) \| (\d+) \|$", text_of("verdicts.md"), re.MULTILINE)
    assert len(rows) == 4
    for percentile, once, first in rows:
        assert min_samples(float(percentile)) == int(once)
        assert min_samples(float(percentile), 0, look_confidence(1)) == int(first)


def test_smallest_drops_are_what_the_table_says() -> None:
    from compiler.evaluation.statistics import paired_drop

    rows = re.findall(r"^\| (\d+) \| (0\.\d{4}) \|$", text_of("evaluation.md"), re.MULTILINE)
    assert len(rows) == 5
    for count, limit in rows:
        assert float(limit) - 1e-4 < paired_drop([True] * int(count), [True] * int(count))["high"] <= float(limit)


def test_constants_in_the_prose_are_the_codes() -> None:
    from compiler import judge
    from compiler.checkpoints.view import ROW_BLOCK_BYTES
    from compiler.evaluation import data, decoder, encoder, statistics
    from compiler.graph.architectures import FAMILIES
    from compiler.graph.encoder_task import TESTED
    from compiler.stages.export import CARRIED
    from runtimes import collect, selftest
    from runtimes.bench import BenchOptions
    from targets.spin import TOLERANCE

    budget, bench = collect.Budget(), BenchOptions()
    verdicts, evaluation, export = text_of("verdicts.md"), text_of("evaluation.md"), text_of("export.md")
    assert f"{bench.most:,} requests or {judge.MEASURE_SECONDS:.0f} seconds" in verdicts
    assert f"about {budget.window_ms:.0f} ms" in verdicts and f"more than {TOLERANCE} times" in verdicts
    assert f"{bench.prompt_tokens} random prompt tokens and {bench.new_tokens} greedy tokens" in verdicts
    assert (
        f"nothing is told before {collect.FIRST_LOOK} samples" in verdicts
        and f"{collect.SLOW_SPELL} requests on average" in verdicts
        and judge.FRESH_PROCESSES + 1 == 3
        and "three fresh processes" in verdicts
    )
    assert f"windows of {decoder.WINDOW} tokens, at most {decoder.MAX_WINDOWS}" in evaluation and f"at most {encoder.MAX_SENTENCES} pieces" in evaluation
    assert f"Fewer than {statistics.LEAST_SEQUENCES} sequences" in evaluation
    assert data.ROW_LIMIT_BYTES == ROW_BLOCK_BYTES // 16 == 1 << 20
    assert (len(selftest.TEXTS), selftest.TOP, selftest.KEPT) == (4, 5, 8)
    assert set(FAMILIES) <= table_keys("export.md") and all(name in export for name in TESTED)
    assert set(CARRIED) <= table_keys("bundle.md")


def test_every_profile_field_is_explained() -> None:
    assert set(known_fields()) <= table_keys("targets.md")
    assert "here" in profile_names()


# --- what errors.md says one gets ------------------------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Zeros in float32 as safetensors."""
    header, data = {}, b""
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base`, a model without a tokenizer; it is the working directory, so that messages name no other place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "base" / "model.safetensors", {"model.embed_tokens.weight": (8, 4), "model.layers.0.self_attn.q_proj.weight": (6, 4)})
    return tmp_path


def without_weights() -> None:
    Path("base/model.safetensors").unlink()
    open_checkpoint("base")


def cut() -> None:
    path = Path("base/model.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    open_checkpoint("base")


def pickled() -> None:
    Path("base/model.safetensors").rename("base/pytorch_model.bin")
    open_checkpoint("base")


def adapted(module: str, rows: int, columns: int) -> None:
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "acme/base-1"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    name = f"base_model.model.{module}"
    write_tensors(Path("adapter/adapter_model.safetensors"), {f"{name}.lora_A.weight": (2, columns), f"{name}.lora_B.weight": (rows, 2)})
    merged_view(open_checkpoint("base"), [load_delta("adapter")])


def from_recipe(more: str) -> None:
    Path("recipe.yaml").write_text(f"name: x\nbase: base\n{more}")
    load_recipe(Path("recipe.yaml"))


def full() -> None:
    with writing(Path("out")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


BAD: dict[str, tuple[Callable[[], Any], int]] = {
    "missing": (without_weights, 1),
    "truncated": (cut, 1),
    "other base": (lambda: adapted("model.layers.0.self_attn.q_proj", 8, 5), 1),
    "no match": (lambda: adapted("model.layers.7.self_attn.q_proj", 6, 4), 1),
    "architecture": (lambda: road({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}), 1),
    "key": (lambda: from_recipe("quantise: {}\n"), 2),
    "pickle": (pickled, 1),
    "tokenizer": (lambda: require_tokenizer(open_checkpoint("base")), 1),
    "space": (full, 1),
    "NaN in a recipe": (lambda: from_recipe("targets: [{profile: here, limits: {size_mb: .nan}}]\n"), 2),
    "NaN as an option": (lambda: parse_limits(["tpot_p95_ms=nan"]), 2),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_page_says_what_one_gets(case: str, here: Path) -> None:
    cause, code = BAD[case]
    with pytest.raises(TrimtabError) as caught:
        cause()
    assert caught.value.exit_code == code
    assert f"    trimtab: {caught.value}\n" in text_of("errors.md")


def test_each_bad_input_stands_on_the_page_once() -> None:
    assert len(re.findall(r"^    trimtab: (?!PLACE)", text_of("errors.md"), re.MULTILINE)) == len(BAD)


def test_refused_and_not_built_are_refused() -> None:
    """What index.md and distil.md say is not built: were it built, the pages would be wrong."""
    for more in ({"distil": {"vocabulary": 9}}, {"distil": {"layers": 2, "objectives": "contrastive"}}):
        with pytest.raises(TrimtabError):
            parse_recipe({"name": "x", "base": "base", **more}, Path("recipe.yaml"))
    assert Schemes(parse_scheme("int4-g64")).default == Recipe(name="x", base="base").quantize.schemes.default
