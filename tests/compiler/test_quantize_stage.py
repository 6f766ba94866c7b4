"""Calibrated quantization as a step: what it writes is what the exporter stores, and the recipe's words reach it."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.errors import RecipeError
from compiler.evaluation.data import Row
from compiler.quantizers import affine
from compiler.quantizers.calibrate import second_moments
from compiler.quantizers.moments import output_error
from compiler.quantizers.pack import unpack
from compiler.quantizers.windows import calibration_set, token_windows, unscored_rows
from compiler.scheme import Schemes, parse_scheme
from compiler.stages.quantize import BY_TOKEN, MatrixQuantizer, codes_in, matrices, method_of, quantize_matrices, resolve_method

RECIPE = """
name: tiny
base: {base}
quantize: {{scheme: int4-g32-asym, method: gptq, calibration: notes.txt, layers: {{lm_head: int5-g32-s16}}}}
targets: [{{profile: here, limits: {{size_mb: 5}}}}]
"""


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def text():
    whole = calibration_set(None)
    return replace(whole, rows=(Row(text=whole.rows[0].text[:2500]),))


@pytest.fixture(scope="module")
def quantized(tiny_llama, text, tmp_path_factory):
    """(checkpoint, schemes, codes_of) of the tiny model under GPTQ."""
    folder = tmp_path_factory.mktemp("codes")
    checkpoint, schemes = open_checkpoint(str(tiny_llama)), Schemes(parse_scheme("int4-g32-asym"), {"lm_head": parse_scheme("int5-g32-s16")})
    params = resolve_method(checkpoint, schemes, {"*": "gptq"}, text)
    quantize_matrices(checkpoint, params, text, folder, quiet)
    return checkpoint, schemes, codes_in(folder)


def test_every_matrix_loses_less_than_by_rounding(quantized, text):
    checkpoint, schemes, codes_of = quantized
    moments = dict(second_moments(checkpoint, token_windows(text, checkpoint)))
    stacked = {name: np.concatenate([view.read() for view in views]) for name, views in matrices(checkpoint).items()}
    assert len(stacked) == 9
    for name, weight in stacked.items():
        scheme = schemes.of(name)
        restored = affine.dequantize(unpack(codes_of(name), scheme, weight.shape[1]))
        plain = affine.dequantize(affine.quantize(weight, scheme))
        assert output_error(weight - restored, moments[name]) < output_error(weight - plain, moments[name]), name


def test_one_recipe_to_one_bundle_with_those_codes(tiny_llama, trimtab, tmp_path):
    (tmp_path / "notes.txt").write_text("The ferry leaves at seven and returns at nine. " * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=tiny_llama))
    code, _, err = trimtab("compile", recipe, "--out", tmp_path / "out")
    assert code == 0, err
    bundle = tmp_path / "out" / "tiny-here"
    record = next(row for row in json.loads((bundle / "manifest.json").read_text())["records"] if row["stage"] == "quantize")
    assert record["measured"]["methods"] == {"*": "gptq"} and len(record["measured"]["calibration"]) == 64
    codes_of = codes_in(tmp_path / "store" / "entries" / record["key"])
    graph = ir.load(bundle / "model.onnx").graph
    stored = graph.initializers["model.layers.1.mlp.down_proj.codes"].const_value.numpy()
    assert np.array_equal(stored, codes_of("model.layers.1.mlp.down_proj").codes)
    code, out, _ = trimtab("plan", recipe, "--json")
    steps = {step["stage"]: step["state"] for step in json.loads(out)[0]["steps"]}
    assert code == 0 and steps["quantize"] == "cached"
    (tmp_path / "notes.txt").write_text("Another text, which is another calibration. " * 40)
    steps = {step["stage"]: step["state"] for step in json.loads(trimtab("plan", recipe, "--json")[1])[0]["steps"]}
    assert steps["quantize"] == steps["export"] == "to do"


def test_the_recipe_s_own_rows_calibrate(tiny_llama, trimtab, tmp_path):
    """Chats of the evaluation that are not scored; where all are, the report says what that does to the scores."""
    chats = [[{"role": "user", "content": f"When does ferry {n} leave?"}, {"role": "assistant", "content": f"At {n % 24} on the hour."}] for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    held, flag = unscored_rows(tmp_path / "rows.jsonl", 30)
    assert [row.messages[0]["content"] for row in held.rows] == [f"When does ferry {n} leave?" for n in range(30, 40)] and flag == ""
    assert len(unscored_rows(tmp_path / "rows.jsonl", 40)[0].rows) == len(unscored_rows(tmp_path / "rows.jsonl", None)[0].rows) == 40
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(base=tiny_llama).replace("notes.txt", "recipe")
    digests = set()
    for limit in ("", "limit_rows: 30", "limit_rows: 20"):
        recipe.write_text(f"{text}evaluate: {{data: rows.jsonl, {limit}}}\n")
        steps = json.loads(trimtab("plan", recipe, "--json")[1])[0]["steps"]
        digests.add(next(step["params"]["calibration"] for step in steps if step["stage"] == "quantize"))
    assert len(digests) == 3
    code, _, err = trimtab("compile", recipe, "--out", tmp_path / "out")
    assert code == 0 and "flatters" not in err, err
    recipe.write_text(f"{text}evaluate: {{data: rows.jsonl}}\n")
    code, _, err = trimtab("compile", recipe, "--out", tmp_path / "out2", "--set", "quantize.tune=scales")
    assert code == 0 and "flatters the scores" in err and "on calibration windows held out: KL" in err
    manifest = json.loads((tmp_path / "out2" / "tiny-here" / "manifest.json").read_text())
    (note,) = manifest["lineage"]["notes"]
    assert "flatters the scores" in note
    keys = {record["stage"]: record["key"] for record in manifest["records"]}
    made, tuned = (codes_in(tmp_path / "store" / "entries" / keys[stage])("model.layers.1.mlp.down_proj") for stage in ("quantize", "tune"))
    graph = ir.load(tmp_path / "out2" / "tiny-here" / "model.onnx").graph
    stored = {part: graph.initializers[f"model.layers.1.mlp.down_proj.{part}"].const_value.numpy() for part in ("codes", "scales")}
    assert np.array_equal(made.codes, tuned.codes) and np.array_equal(tuned.codes, stored["codes"])
    assert np.array_equal(tuned.scales, stored["scales"]) and not np.array_equal(made.scales, tuned.scales)
    recipe.write_text(text)
    code, _, err = trimtab("plan", recipe)
    assert code == 2 and "evaluate.data to calibrate on" in err


def test_a_tied_head_is_judged_as_head_and_a_little_by_token(tiny_llama, tmp_path):
    checkpoint, schemes = open_checkpoint(str(tiny_llama)), Schemes(parse_scheme("int4-g32"))
    moment = np.diag([8.0, 0.0, 4.0, 0.0]).astype(np.float32)
    tied, untied = (replace(checkpoint, config=checkpoint.config | {"tie_word_embeddings": one}) for one in (True, False))
    assert np.allclose(MatrixQuantizer(tied, schemes, {}, tmp_path).shared(moment), np.diag([8 / 3 + BY_TOKEN, BY_TOKEN, 4 / 3 + BY_TOKEN, BY_TOKEN]))
    assert np.array_equal(MatrixQuantizer(untied, schemes, {}, tmp_path).shared(moment), moment)


def test_rtn_is_no_step(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    assert resolve_method(checkpoint, Schemes(parse_scheme("int4-g32")), {"*": "rtn"}, None) is None
    assert resolve_method(checkpoint, Schemes(parse_scheme("fp16")), {"*": "gptq"}, None) is None
    assert resolve_method(checkpoint, Schemes(parse_scheme("int4-g32")), {"*": "search"}, None)["calibration"] is None


def test_the_last_pattern_names_the_method():
    methods = {"*": "gptq", "lm_head": "search", "*.o_proj": "rtn"}
    assert [method_of(name, methods) for name in ("lm_head", "model.layers.0.attn.o_proj", "model.layers.0.mlp.down_proj")] == ["search", "rtn", "gptq"]
    assert method_of("lm_head", {"model.*": "gptq"}) == "rtn"


def test_search_needs_no_text(tiny_llama, tmp_path):
    checkpoint, schemes = open_checkpoint(str(tiny_llama)), Schemes(parse_scheme("int4-g32"))
    params = resolve_method(checkpoint, schemes, {"*": "search", "lm_head": "rtn"}, None)
    quantize_matrices(checkpoint, params, None, tmp_path, quiet)
    assert len(list(tmp_path.iterdir())) == 8 and codes_in(tmp_path)("lm_head") is None


def test_mistakes_are_named(tiny_llama):
    checkpoint, schemes = open_checkpoint(str(tiny_llama)), Schemes(parse_scheme("int4-g32"))
    with pytest.raises(RecipeError, match="one of rtn, search"):
        resolve_method(checkpoint, schemes, {"*": "hqq"}, None)
    with pytest.raises(RecipeError, match="text to calibrate on"):
        resolve_method(checkpoint, schemes, {"*": "gptq"}, None)


def test_weights_that_are_not_finite_are_still_refused(quantized, tmp_path):
    from compiler.errors import CheckpointError
    from compiler.graph.decoder import export_decoder

    checkpoint, schemes, codes_of = quantized
    view = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    spoilt = replace(view, rows=lambda start, stop: view.rows(start, stop) * np.float32(np.nan))
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, view.name: spoilt})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="finite"):
        export_decoder(checkpoint, schemes, tmp_path / "out", codes_of=codes_of)
