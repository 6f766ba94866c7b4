"""The decoder builder on tiny numpy llamas: quantized kernels against their numpy twin, storage, determinism, faults by name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from compiler.checkpoints.view import Checkpoint
from compiler.errors import ArchitectureError, CheckpointError, RecipeError
from compiler.graph.decoder import export_decoder
from compiler.graph.external_data import DataFile
from compiler.graph.lint import lint
from compiler.graph.nodes import GraphBuilder, save_model
from compiler.graph.passes import all_logits
from compiler.graph.weights import WeightWriter
from compiler.quantizers import affine
from compiler.quantizers.rows import dequantize_rows, quantize_rows
from compiler.scheme import Scheme, Schemes, parse_scheme

Make = Callable[..., Checkpoint]
SCHEMES = [
    *("int4-g32", "int4-g32-asym", "int4-g64", "int8-g64", "int8-g32-asym", "int4-g128"),
    *("int3-g32-asym", "int5-g32-asym-s16", "int6-g64-s16", "int6-g16", "int7-g32"),
]
IDS = np.array([[3, 44, 7, 7, 21, 0, 49]], np.int64)


def schemes(text: str, **overrides: str) -> Schemes:
    return Schemes(parse_scheme(text), {pattern: parse_scheme(scheme) for pattern, scheme in overrides.items()})


def logits_of(path: Path, ids: np.ndarray = IDS, mask: np.ndarray | None = None) -> np.ndarray:
    """First output for a prompt with an empty cache."""
    session = ort.InferenceSession(path)
    past = {item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
    mask = np.ones_like(ids) if mask is None else mask
    return np.asarray(session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})[0])


def dequantized(checkpoint: Checkpoint, scheme: Scheme) -> Checkpoint:
    """Every matrix replaced by what its codes stand for (groups lie within rows, so stacking matrices changes nothing)."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if array.ndim == 2:
                arrays[name] = affine.dequantize(affine.quantize(array, scheme))

    arrays = {name: view.read() for name, view in checkpoint.tensors.items()}
    change(arrays)
    views = {name: replace(view, rows=lambda start, stop, array=arrays[name]: array[start:stop]) for name, view in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=views)


@pytest.mark.parametrize("text", SCHEMES)
def test_lookup_and_linear_equal_the_twin(text: str, tmp_path: Path, make_checkpoint: Make) -> None:
    """One stored matrix, read by GatherBlockQuantized and by MatMulNBits: the lookup is exact, the product within int8 activations."""
    checkpoint, graph = make_checkpoint(), GraphBuilder()
    table = checkpoint.tensors["model.embed_tokens.weight"].read()
    twin = affine.dequantize(affine.quantize(table, parse_scheme(text)))
    ids = graph.input("ids", ir.DataType.INT64, ["n"])
    x = graph.input("x", ir.DataType.FLOAT, ["n", table.shape[1]])
    with DataFile(tmp_path / "model.onnx.data") as data:
        writer = WeightWriter(checkpoint, schemes(text), data, graph)
        matrix = writer.matrix("lm_head", {"model.embed_tokens": table.shape[0]}, table.shape[1])
        graph.output(writer.lookup("/lookup", ids, matrix), "rows", ir.DataType.FLOAT, ["n", table.shape[1]])
        graph.output(writer.linear("/linear", x, matrix), "y", ir.DataType.FLOAT, ["n", table.shape[0]])
        stored = data.size
    save_model(graph.model(), tmp_path / "model.onnx")
    activations = np.random.default_rng(0).standard_normal((9, table.shape[1])).astype(np.float32)
    picks = np.array([0, 49, 7, 7, 1, 2, 3, 48, 20], np.int64)
    rows, y = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"ids": picks, "x": activations})
    assert np.array_equal(rows, twin[picks])
    exact = activations @ twin.T
    assert np.abs(y - exact).max() < 0.02 * np.abs(exact).max()
    assert matrix.nbytes <= stored < matrix.nbytes + 3 * 4096  # codes are there once, though two nodes read them


@pytest.mark.parametrize("text", SCHEMES)
def test_quantized_graph_follows_the_dequantized_model(text: str, tmp_path: Path, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=False)
    for name, source, scheme in (("q", checkpoint, text), ("f", dequantized(checkpoint, parse_scheme(text)), "fp32")):
        (tmp_path / name).mkdir()
        export_decoder(source, schemes(scheme), tmp_path / name, logits="all")
    found, exact = logits_of(tmp_path / "q" / "model.onnx"), logits_of(tmp_path / "f" / "model.onnx")
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))
    assert lint(ir.load(tmp_path / "q" / "model.onnx")) == []


def with_biases(arrays: dict[str, np.ndarray]) -> None:
    for name in [name for name in arrays if name.endswith("_proj.weight")]:
        arrays[name.replace(".weight", ".bias")] = np.linspace(-1, 1, len(arrays[name]), dtype=np.float32)


def test_one_scale_a_token_in_integers(tmp_path: Path, make_checkpoint: Make) -> None:
    """int8-rows equals its twin, a token does not see how large its neighbour is, zeros stay zeros, and head and embedding keep groups."""
    checkpoint, graph = make_checkpoint(with_biases, attention_bias=True, mlp_bias=True), GraphBuilder()
    name = "model.layers.0.mlp.down_proj"
    weight = checkpoint.tensors[f"{name}.weight"].read()
    x = graph.input("x", ir.DataType.FLOAT, ["n", weight.shape[1]])
    with DataFile(tmp_path / "model.onnx.data") as data:
        writer = WeightWriter(checkpoint, schemes("int8-rows"), data, graph)
        graph.output(writer.linear("/down", x, writer.matrix(name, {name: weight.shape[0]}, weight.shape[1])), "y", ir.DataType.FLOAT, ["n", weight.shape[0]])
    save_model(graph.model(), tmp_path / "model.onnx")
    assert lint(ir.load(tmp_path / "model.onnx")) == []
    tokens = np.random.default_rng(0).standard_normal((4, weight.shape[1])).astype(np.float32)
    tokens[1] *= 1000
    tokens[2] = 0
    session = ort.InferenceSession(tmp_path / "model.onnx")
    (y,), (alone,) = session.run(None, {"x": tokens}), session.run(None, {"x": tokens[:1]})
    exact = tokens @ dequantize_rows(*quantize_rows(weight)).T
    assert (np.abs(y - exact).max(axis=1) <= 0.02 * np.abs(exact).max(axis=1)).all()
    assert np.array_equal(y[0], alone[0])
    assert not y[2].any()
    done = export_decoder(checkpoint, schemes("int8-rows"), tmp_path)
    assert {row.scheme for row in done.matrices} == {"int8-rows", "int8-g64"}
    assert [row.name for row in done.matrices if row.scheme == "int8-g64"] == ["lm_head"]
    fp32 = tmp_path / "fp32"
    fp32.mkdir()
    export_decoder(checkpoint, schemes("fp32"), fp32)
    found, wanted = logits_of(tmp_path / "model.onnx"), logits_of(fp32 / "model.onnx")
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.05 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("text", ["int4-g32", "int8-g64-asym", "int5-g32-asym-s16", "fp32", "fp16"])
def test_tied_table_is_stored_once(text: str, tmp_path: Path, make_checkpoint: Make) -> None:
    sizes, found = {}, {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()

        def same_head(arrays: dict[str, np.ndarray]) -> None:
            arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]

        sizes[tied] = export_decoder(make_checkpoint(same_head, tie_word_embeddings=tied, vocab_size=4000), schemes(text), folder)
        found[tied] = logits_of(folder / "model.onnx")
    head = next(row for row in sizes[False].matrices if row.name == "lm_head")
    assert sizes[False].data_bytes - sizes[True].data_bytes >= head.bytes
    assert (tmp_path / "True" / "model.onnx.data").stat().st_size == sizes[True].data_bytes
    assert np.array_equal(found[True], found[False])


def test_fp16_storage_is_half_and_close(tmp_path: Path, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint()
    exports = {}
    for text in ("fp32", "fp16"):
        (tmp_path / text).mkdir()
        exports[text] = export_decoder(checkpoint, schemes(text), tmp_path / text, logits="all")
    assert sum(row.bytes for row in exports["fp16"].matrices) * 2 == sum(row.bytes for row in exports["fp32"].matrices)
    assert np.abs(logits_of(tmp_path / "fp16" / "model.onnx") - logits_of(tmp_path / "fp32" / "model.onnx")).max() < 0.02


@pytest.mark.parametrize("text", ["int4-g32", "fp32"])
def test_the_twin_yields_all_positions(text: str, tmp_path: Path, make_checkpoint: Make) -> None:
    checkpoint = make_checkpoint()
    export_decoder(checkpoint, schemes(text), tmp_path)
    all_logits(tmp_path / "model.onnx", tmp_path / "all.onnx")
    mask = np.array([[1] * 7, [1] * 3 + [0] * 4], np.int64)
    ids = np.concatenate([IDS, IDS])
    last, every = logits_of(tmp_path / "model.onnx", ids, mask), logits_of(tmp_path / "all.onnx", ids, mask)
    assert last.shape == (2, 1, 50)
    assert every.shape == (2, 7, 50)
    assert np.allclose(last[:, 0], every[[0, 1], [6, 2]], atol=1e-5)
    (tmp_path / "direct").mkdir()
    export_decoder(checkpoint, schemes(text), tmp_path / "direct", logits="all")
    assert [node.name for node in ir.load(tmp_path / "all.onnx").graph] == [node.name for node in ir.load(tmp_path / "direct" / "model.onnx").graph]


def test_prompt_in_chunks_equals_the_prompt_at_once(tmp_path: Path, make_checkpoint: Make) -> None:
    export_decoder(make_checkpoint(), schemes("fp32"), tmp_path)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    cache = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
    for start, stop in ((0, 3), (3, 6), (6, 7)):
        logits, *present = session.run(None, {"input_ids": IDS[:, start:stop], "attention_mask": np.ones((1, stop), np.int64), **cache})
        cache = dict(zip(cache, present, strict=True))
        assert logits.shape == (1, 1, 50)
    assert np.allclose(logits, logits_of(tmp_path / "model.onnx"), atol=1e-5)


def test_same_bytes_each_time(tmp_path: Path, make_checkpoint: Make) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_decoder(make_checkpoint(), schemes("int4-g32-asym"), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a" / "model.onnx").read_bytes()


def test_standard_checker_accepts_it(tmp_path: Path, make_checkpoint: Make) -> None:
    import onnx

    export_decoder(make_checkpoint(), schemes("int4-g32-asym"), tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_twelve_nodes_a_layer_and_no_shape_arithmetic_inside(tmp_path: Path, make_checkpoint: Make) -> None:
    export_decoder(make_checkpoint(), schemes("int4-g32"), tmp_path)
    layer = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph if (node.name or "").startswith("/layers.1/")]
    assert len(layer) == 12
    assert not {"Cast", "Shape", "Reshape", "Transpose", "Concat"} & set(layer)


def test_schemes_by_name_and_rows(tmp_path: Path, make_checkpoint: Make) -> None:
    export = export_decoder(make_checkpoint(), schemes("int4-g32", **{"*.down_proj": "int8-g64", "lm_head": "fp16"}), tmp_path)
    rows = {row.name: row for row in export.matrices}
    assert rows["model.layers.0.mlp.down_proj"].scheme == "int8-g64"
    assert rows["lm_head"].scheme == "fp16"
    assert rows["model.layers.1.attn.qkv_proj"].scheme == "int4-g32"
    assert rows["model.layers.1.attn.qkv_proj"].shape == (5 * 32, 80)
    assert logits_of(tmp_path / "model.onnx").shape == (1, 1, 50)


def test_reads_by_row_block_only(tmp_path: Path, make_checkpoint: Make) -> None:
    """No read is longer than a block, however tall the matrix."""
    checkpoint = make_checkpoint(vocab_size=120_000)
    view = checkpoint.tensors["model.embed_tokens.weight"]
    longest = 0

    def rows(start: int, stop: int) -> np.ndarray:
        nonlocal longest
        longest = max(longest, stop - start)
        return view.rows(start, stop)

    seen: list[tuple[str, int, int]] = []
    watched = replace(checkpoint, tensors={**checkpoint.tensors, view.name: replace(view, rows=rows)})
    export_decoder(watched, schemes("int4-g32"), tmp_path, progress=lambda *step: seen.append(step))
    assert longest <= (16 << 20) // (80 * 4)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] <= seen[-1][2] == checkpoint.parameter_count


@pytest.mark.parametrize("text", ["int4-g64-asym", "fp32"])
def test_peak_memory_is_a_few_blocks(text: str, tmp_path: Path, make_checkpoint: Make) -> None:
    """A table of 160 MB that exists only while it is read passes through within 80 MB (a block is 16)."""
    config = {**make_checkpoint().config, "vocab_size": 500_000}
    checkpoint = make_checkpoint()
    table = replace(checkpoint.tensors["model.embed_tokens.weight"], shape=(500_000, 80), rows=lambda start, stop: np.ones((stop - start, 80), np.float32))
    tall = replace(checkpoint, config=config, tensors={**checkpoint.tensors, table.name: table})
    tracemalloc.start()
    try:
        export = export_decoder(tall, schemes(text), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80e6
    assert export.data_bytes == (tmp_path / "model.onnx.data").stat().st_size


def drop(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: arrays.pop(name)


def spoil(name: str, value: float) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: arrays[name].__setitem__((3,) * arrays[name].ndim, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), ["tiny: model.layers.1.mlp.up_proj.weight", "no such tensor"]),
        (drop("model.norm.weight"), ["model.norm.weight", "no such tensor"]),
        (lambda arrays: arrays.update({"model.embed_tokens.weight": np.zeros((51, 80), np.float32)}), ["[50, 80]", "[51, 80]"]),
        (spoil("model.layers.0.self_attn.k_proj.weight", np.nan), ["model.layers.0.self_attn.k_proj.weight", "NaN"]),
        (spoil("model.layers.0.input_layernorm.weight", np.inf), ["input_layernorm", "NaN or infinity"]),
        (lambda arrays: arrays.update({"lm_head.weight": np.ones((50, 80), np.float32)}), ["lm_head.weight", "tie_word_embeddings"]),
    ],
)
@pytest.mark.parametrize("text", ["int4-g32-asym", "fp32"])
def test_bad_checkpoints_are_named(change: Any, words: list[str], text: str, tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError) as caught:
        export_decoder(make_checkpoint(change), schemes(text), tmp_path)
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "model.onnx").exists()


def test_dynamic_int8_is_refused(tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(RecipeError, match="for a decoder"):
        export_decoder(make_checkpoint(), schemes("int8"), tmp_path)


def test_weights_beyond_float16_are_refused(tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(RecipeError, match="float16"):
        export_decoder(make_checkpoint(spoil("model.layers.0.mlp.down_proj.weight", 1e5)), schemes("fp16"), tmp_path)


@pytest.mark.parametrize("length", [0, 65])
def test_lengths_outside_the_model_are_refused(length: int, tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(ArchitectureError, match="1 to 64 tokens"):
        export_decoder(make_checkpoint(), schemes("fp32"), tmp_path, max_length=length)


@pytest.mark.parametrize("head_dim", [12, 20])
def test_head_widths_without_a_kernel_are_refused(head_dim: int, tmp_path: Path, make_checkpoint: Make) -> None:
    with pytest.raises(ArchitectureError, match="multiple of 8"):
        export_decoder(make_checkpoint(head_dim=head_dim), schemes("fp32"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_genai_config_says_what_the_graph_is(tmp_path: Path, make_checkpoint: Make) -> None:
    generation = json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}).encode()
    checkpoint = replace(make_checkpoint(bos_token_id=1, eos_token_id=2), assets={"generation_config.json": generation})
    export_decoder(checkpoint, schemes("fp32"), tmp_path, max_length=40)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    model, search = config["model"], config["search"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("llama", 40, 50)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 7], 2)
    assert (search["max_length"], search["temperature"], search["do_sample"], search["past_present_share_buffer"]) == (40, 0.6, True, True)
    inputs = {item.name for item in ort.InferenceSession(tmp_path / "model.onnx").get_inputs()}
    named = model["decoder"]["inputs"]
    assert inputs == {named["input_ids"], named["attention_mask"]} | {named[f"past_{part}_names"] % layer for part in ("key", "value") for layer in (0, 1)}
