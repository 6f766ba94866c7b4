"""GPTQ and AWQ checkpoints: written here by the formats' own words, read against a slow decoder, kept by the kernels, and refused when broken."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from compiler.checkpoints.coded import common, holds, kernel_group
from compiler.checkpoints.packed import unpack_interleaved, unpack_stream
from compiler.checkpoints.resolve import open_checkpoint
from compiler.errors import CheckpointError, RecipeError
from compiler.quantizers import affine
from compiler.quantizers.pack import unpack
from compiler.scheme import Scheme, Schemes, parse_scheme
from compiler.stages.keep import as_is, codes_for, rounded_again
from compiler.stages.quantize import matrices, quantized_view

AWQ_PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # output of eight -> its nibble, as AutoAWQ's packing loop puts them


def stream(values: list[int], bits: int) -> list[int]:
    """Codes one after the other as one long binary number, cut into 32-bit words, lowest first: the format's definition, in Python's whole numbers."""
    number = sum(value << (bits * place) for place, value in enumerate(values))
    return [(number >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(values) * bits // 32))]


def signed(words: list[list[int]]) -> np.ndarray:
    return np.array(words, np.uint32).view(np.int32)


def gptq_tensors(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, less: int = 1) -> dict[str, np.ndarray]:
    """codes [n, k], zeros and scales [n, groups] -> the tensors of AutoGPTQ."""
    return {
        "qweight": signed([stream(row.tolist(), bits) for row in codes]).T.copy(),
        "qzeros": signed([stream([(int(zero) - less) % 2**bits for zero in column], bits) for column in zeros.T]),
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
    }


def awq_tensors(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    def word(eight: list[int]) -> int:
        return sum(eight[output] << (4 * nibble) for output, nibble in AWQ_PLACES.items())

    def words(columns: np.ndarray) -> np.ndarray:  # [rows, n] -> [rows, n / 8]
        return signed([[word(row[at : at + 8].tolist()) for at in range(0, len(row), 8)] for row in columns])

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": np.ascontiguousarray(scales.T.astype(np.float16))}


def slow_weight(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One weight at a time."""
    made = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = groups[column]
            made[row, column] = np.float32(int(codes[row, column]) - int(zeros[row, group])) * np.float32(scales[row, group])
    return made


def random_codes(rows: int, width: int, bits: int, group: int, seed: int = 0, symmetric: bool = False):
    rng = np.random.default_rng(seed)
    groups = -(-width // group)
    zeros = np.full((rows, groups), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (rows, groups))
    return rng.integers(0, 1 << bits, (rows, width)).astype(np.uint8), zeros.astype(np.uint8), (rng.random((rows, groups)) * 0.02 + 1e-3).astype(np.float16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(count=st.integers(1, 100), columns=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_stream_of_codes_is_undone(bits, count, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (count, columns))
    words = np.array([stream(column.tolist(), bits) for column in codes.T], np.uint32).T
    assert np.array_equal(unpack_stream(words, bits, count), codes)


def test_worked_words():
    assert unpack_stream(np.array([[0x87654321]], np.uint32), 4, 8).ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert unpack_interleaved(np.array([[0x76543210]], np.uint32)).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# whole checkpoints


GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def linears(tensors: dict[str, np.ndarray]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def packed_model(base, folder, stated=GPTQ, *, scheme="int4-g32-asym-s16", order=None):
    """A copy of the tiny model whose linears are packed; gives the folder and the weights that its codes stand for."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    wanted = {}
    for stem in linears(tensors):
        weight = tensors.pop(f"{stem}.weight")
        made = affine.quantize(weight if order is None else weight[:, np.argsort(order(weight.shape[1]), kind="stable")], parse_scheme(scheme))
        codes = made.codes[:, : weight.shape[1]]
        zeros = made.zero_points if made.zero_points is not None else np.full(made.scales.shape, 1 << (made.scheme.bits - 1), np.uint8)
        groups = np.arange(weight.shape[1]) // (made.scheme.group_size or 1)
        if order is not None:  # back to the order of the inputs, each with the group it was rounded in
            back = np.argsort(np.argsort(order(weight.shape[1]), kind="stable"), kind="stable")
            codes, groups = codes[:, back], groups[back]
        if stated["quant_method"] == "awq":
            parts = awq_tensors(codes, zeros, made.scales)
        else:
            less = 0 if stated.get("checkpoint_format") == "gptq_v2" else 1
            parts = gptq_tensors(codes, zeros, made.scales, stated["bits"], less) | {"g_idx": groups.astype(np.int32)}
        tensors |= {f"{stem}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
        wanted[f"{stem}.weight"] = slow_weight(codes, zeros, made.scales.astype(np.float16), groups)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return folder, wanted


@pytest.fixture(scope="module")
def gptq_model(tiny_llama, tmp_path_factory):
    return packed_model(tiny_llama, tmp_path_factory.mktemp("gptq") / "model")


@pytest.fixture(scope="module")
def awq_model(tiny_llama, tmp_path_factory):
    return packed_model(tiny_llama, tmp_path_factory.mktemp("awq") / "model", AWQ)


@pytest.mark.parametrize("model", ["gptq_model", "awq_model"])
def test_weights_are_those_of_the_slow_decoder(model, request):
    folder, wanted = request.getfixturevalue(model)
    checkpoint = open_checkpoint(str(folder))
    assert "quantization_config" not in checkpoint.config and not any(name.endswith(("qweight", "g_idx")) for name in checkpoint.tensors)
    for name, weight in wanted.items():
        view = checkpoint.tensors[name]
        assert np.array_equal(view.read(), weight), name
        assert np.array_equal(view.rows(5, 11), weight[5:11]) and view.coded is not None
        assert np.array_equal(affine.dequantize(view.coded.rows(5, 11)), weight[5:11])
        assert str(view.coded.scheme) == "int4-g32-asym-s16"


def test_zero_points_of_the_second_format_are_stored_as_they_are(tiny_llama, gptq_model, tmp_path):
    folder, wanted = packed_model(tiny_llama, tmp_path / "v2", {**GPTQ, "checkpoint_format": "gptq_v2"})
    first = load_file(gptq_model[0] / "model.safetensors")
    second = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert not np.array_equal(first[f"{name}.qzeros"], second[f"{name}.qzeros"])
    assert np.array_equal(open_checkpoint(str(folder)).tensors[f"{name}.weight"].read(), wanted[f"{name}.weight"])


def test_older_configs_beside_config_json(gptq_model, awq_model, tmp_path):
    for model, name, stated in (
        (gptq_model, "quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False}),
        (awq_model, "quant_config.json", {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"}),
    ):
        folder = shutil.copytree(model[0], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps(stated))
        checkpoint = open_checkpoint(str(folder))
        key = next(iter(model[1]))
        assert np.array_equal(checkpoint.tensors[key].read(), model[1][key])
        before = checkpoint.digest
        (folder / name).write_text(json.dumps({**stated, "comment": 1}))
        assert open_checkpoint(str(folder)).digest != before


# kept, or not


def test_as_is_names_every_matrix_and_its_codes_are_the_file_s(gptq_model):
    folder, wanted = gptq_model
    checkpoint = open_checkpoint(str(folder))
    schemes = as_is(checkpoint, {})
    assert str(schemes.of("model.layers.1.attn.qkv_proj")) == "int4-g32-asym-s16" and str(schemes.of("lm_head")) == "fp32"
    codes_of = codes_for(checkpoint, schemes)
    for name, views in matrices(checkpoint).items():
        stacked = [wanted.get(view.name) for view in views]
        if name == "lm_head":
            assert codes_of(name) is None
            continue
        packed = codes_of(name)
        assert np.array_equal(affine.dequantize(unpack(packed, schemes.of(name), views[0].shape[1])), np.concatenate(stacked)), name
    assert rounded_again(checkpoint, schemes, lambda _: "rtn") == []
    (note,) = rounded_again(checkpoint, Schemes(parse_scheme("int8-g32")), lambda _: "rtn")
    assert "14 of GPTQ-4 g32" in note
    assert rounded_again(checkpoint, schemes, lambda _: "search")


def test_one_recipe_keeps_the_codes_in_the_bundle(awq_model, trimtab, tmp_path):
    folder, _ = awq_model
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: kept\nbase: {folder}\nquantize: {{scheme: as-is, layers: {{lm_head: int8-g32}}}}\n")
    code, _, err = trimtab("compile", recipe, "--out", tmp_path / "out")
    assert code == 0 and "rounded again" not in err, err
    graph = ir.load(tmp_path / "out" / "kept-here" / "model.onnx").graph
    view = open_checkpoint(str(folder)).tensors["model.layers.1.mlp.down_proj.weight"]
    codes = graph.initializers["model.layers.1.mlp.down_proj.codes"].const_value.numpy()
    assert np.array_equal(np.stack([codes & 15, codes >> 4], -1).reshape(96, -1), view.coded.rows(0, 96).codes)
    report = json.loads((tmp_path / "out" / "kept-here" / "report.json").read_text())
    assert report["stages"] and report["lineage"]["notes"] == []
    losses = {row["stage"]: row["value"] for row in report["stages"] if row["metric"] == "kl_mean"}
    assert losses["quantize"] < 1e-4  # what is left is the head in 8 bits: the linears lost nothing more


def test_another_scheme_says_what_it_does(awq_model, trimtab, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: again\nbase: {awq_model[0]}\nquantize: {{scheme: int8-g32}}\n")
    code, _, err = trimtab("compile", recipe, "--out", tmp_path / "out")
    assert code == 0 and "came quantized (14 of AWQ-4 g32) are decoded and rounded again" in err, err
    report = json.loads((tmp_path / "out" / "again-here" / "report.json").read_text())
    assert "rounded again" in report["lineage"]["notes"][0]


def test_act_order_is_decoded_and_never_kept(tiny_llama, tmp_path):
    order = lambda width: np.random.default_rng(width).permutation(width)  # noqa: E731
    folder, wanted = packed_model(tiny_llama, tmp_path / "model", {**GPTQ, "desc_act": True}, order=order)
    checkpoint = open_checkpoint(str(folder))
    for name, weight in wanted.items():
        assert checkpoint.tensors[name].coded is None
        assert np.array_equal(checkpoint.tensors[name].read(), weight), name
    with pytest.raises(RecipeError, match="another order of inputs"):
        as_is(checkpoint, {})


def test_a_delta_takes_the_codes_of_what_it_changes(gptq_model, tiny_lora, trimtab, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = f"name: mixed\nbase: {gptq_model[0]}\ndeltas: [{{path: {tiny_lora}, accept_base: {open_checkpoint(str(gptq_model[0])).digest}}}]\n"
    recipe.write_text(text + "quantize: {scheme: as-is}\n")
    code, _, err = trimtab("plan", recipe)
    assert code == 2 and "down_proj and 3 more" in err and "a delta that changes them" in err
    changed = "{'*.qkv_proj': int8-g32, '*.down_proj': int8-g32}"
    recipe.write_text(text + f"quantize: {{scheme: as-is, layers: {changed}}}\n")
    code, out, err = trimtab("plan", recipe, "--json")
    assert code == 0, err
    layers = next(step for step in json.loads(out)[0]["steps"] if step["stage"] == "export")["params"]
    assert layers["scheme"] == "int4-g32-asym-s16" and layers["layers"]["*.qkv_proj"] == "int8-g32"


def test_float_weights_have_nothing_to_keep(tiny_llama):
    with pytest.raises(RecipeError, match="float weights"):
        as_is(open_checkpoint(str(tiny_llama)), {})


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "scheme"),
    [
        (4, 32, True, "int4-g32-s16"),
        (8, 64, False, "int8-g64-asym-s16"),
        (2, 128, False, "int2-g128-asym-s16"),
        (4, -1, True, "int4-g32-s16"),
        (3, 32, False, "int3-g32-asym-s16"),
    ],
)
def test_every_form_of_a_matrix(bits, group, symmetric, scheme, tmp_path):
    """Widths with a tail group, one group a row, and words that hold parts of codes."""
    width, rows = (96 if bits == 3 else 160), 16
    codes, zeros, scales = random_codes(rows, width, bits, width if group == -1 else group, bits, symmetric)
    parts = gptq_tensors(codes, zeros, scales, bits)
    save_file({f"x.{key}": value for key, value in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": group}}))
    view = open_checkpoint(str(tmp_path)).tensors["x.weight"]
    groups = np.arange(width) // (width if group == -1 else group)
    assert np.array_equal(view.read(), slow_weight(codes, zeros, scales, groups))
    assert str(view.coded.scheme) == scheme
    kept = view.coded.under(parse_scheme(scheme), 3, 9)
    assert np.array_equal(affine.dequantize(kept), view.read()[3:9])
    finer = Scheme(bits, 16, symmetric, "nbits")
    assert np.array_equal(affine.dequantize(view.coded.under(finer, 0, rows)), view.read())


def test_what_holds_what():
    def can(scheme, stored):
        return holds(parse_scheme(scheme), parse_scheme(stored))

    assert can("int4-g64-asym", "int4-g128") and can("int4-g32", "int4-g32-s16")
    assert not (can("int4-g128", "int4-g64") or can("int4-g64", "int4-g64-asym") or can("int4-g64-s16", "int4-g64") or can("int8-g64", "int4-g64"))
    assert not can("int8-rows", "int8-g64") and not can("fp16", "int8-g64")
    assert str(common([parse_scheme("int4-g128-s16"), parse_scheme("int4-g64-asym-s16")])) == "int4-g64-asym-s16"
    assert common([parse_scheme("int4-g64"), parse_scheme("int8-g64")]) is None
    assert [kernel_group(size) for size in (512, 128, 48, 24)] == [256, 128, 16, None]


def test_a_scheme_that_holds_the_codes_keeps_them_without_being_asked(gptq_model):
    checkpoint = open_checkpoint(str(gptq_model[0]))
    seen = quantized_view(checkpoint, Schemes(parse_scheme("int4-g16-asym")))
    rounded = quantized_view(checkpoint, Schemes(parse_scheme("int4-g32")))
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(seen.tensors[name].read(), checkpoint.tensors[name].read())
    assert not np.array_equal(rounded.tensors[name].read(), checkpoint.tensors[name].read())


# broken files


def change(stem_part, make):
    return lambda tensors, config: tensors.update({stem_part: make(tensors[stem_part])})


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def state(**more):
    return lambda tensors, config: config.update(quantization_config={**config["quantization_config"], **more})


ONE = "model.layers.0.mlp.up_proj"
BROKEN = {
    "no zeros": (drop(f"{ONE}.qzeros"), [f"{ONE}.qzeros", "this tensor beside qweight"]),
    "no scales": (drop(f"{ONE}.scales"), [f"{ONE}.scales"]),
    "no config": (lambda tensors, config: config.pop("quantization_config"), ["quantization_config", "quantize_config.json"]),
    "unknown bits": (state(bits=5), ["quantization_config.bits", "2, 3, 4, 8", "5"]),
    "bits of another width": (state(bits=8), ["8 bits"]),
    "unknown method": (state(quant_method="bitsandbytes"), ["gptq or awq", "bitsandbytes"]),
    "unknown format": (state(checkpoint_format="marlin"), ["gptq or gptq_v2", "marlin"]),
    "marlin": (state(is_marlin_format=True), ["marlin"]),
    "group size": (state(group_size="all"), ["group_size", "'all'"]),
    "other group": (state(group_size=64), ["qzeros", "groups of 64"]),
    "zeros cut": (change(f"{ONE}.qzeros", lambda array: array[:, :-1].copy()), [f"{ONE}.qzeros", "expected [3, 25]", "[3, 24]"]),
    "scales of whole numbers": (change(f"{ONE}.scales", lambda array: array.astype(np.int32)), [f"{ONE}.scales", "F16 or F32 or BF16"]),
    "one dimension": (change(f"{ONE}.qweight", lambda array: array.reshape(-1)), [f"{ONE}.qweight", "2 dimension(s)"]),
    "g_idx of another width": (change(f"{ONE}.g_idx", lambda array: array[:-1].copy()), [f"{ONE}.g_idx", "[96]"]),
    "a group that is not there": (change(f"{ONE}.g_idx", lambda array: array + 1), [f"{ONE}.g_idx", "groups below 3"]),
    "scales that are not finite": (change(f"{ONE}.scales", lambda array: array * np.float16(np.nan)), [f"{ONE}.weight", "NaN or infinity"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_one_line(case, gptq_model, trimtab, tmp_path):
    harm, fragments = BROKEN[case]
    folder = shutil.copytree(gptq_model[0], tmp_path / "base")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    harm(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = trimtab("export", folder, "--scheme", "int4-g32", "--out", tmp_path / "out")
    lines = [line for line in err.splitlines() if line.startswith("trimtab: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    assert all(fragment in lines[0] for fragment in fragments), lines[0]
    assert not (tmp_path / "out").exists()


def test_awq_in_another_packing_is_refused(awq_model, tmp_path):
    folder = shutil.copytree(awq_model[0], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    for stated, message in (({**AWQ, "version": "gemv"}, "gemm"), ({**AWQ, "bits": 8}, "one of 4 for awq")):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(folder))
