"""The encoder road on a tiny BERT: pooling, schemes, operators, equal bytes, refusals; and the same model by way of the exporter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch

import compiler.graph.encoder as encoder
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import ArchitectureError, BundleError, CheckpointError, OutputError
from compiler.graph.encoder import export_encoder
from compiler.graph.encoder_rows import RANDOM_ROWS, WIDE, choose_channels, sample_tokens
from compiler.graph.lint import require_clean
from compiler.graph.passes import float_twin
from compiler.reference import reference_model
from compiler.scheme import parse_scheme
from runtimes.session import open_session

CONFIG = {
    "model_type": "bert",
    "vocab_size": 1100,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 40,
}


def tiny_checkpoint(assets: dict[str, bytes] | None = None) -> Checkpoint:
    """A seeded BERT whose widths (48, 72) are no multiples of 32."""
    rng = np.random.default_rng(7)
    tensors = {}
    for name, shape in shapes().items():
        array = rng.normal(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.12, shape).astype(np.float32)
        tensors[name] = TensorView(name, shape, "F32", lambda start, stop, array=array: array[start:stop])
    return Checkpoint(tensors, CONFIG, assets or {}, "tiny", lambda: "digest")


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        f"embeddings.{kind}_embeddings.weight": (rows, 48) for kind, rows in (("word", 1100), ("position", 40), ("token_type", 2))
    }
    linears = {"attention.self.query": (48, 48), "attention.self.key": (48, 48), "attention.self.value": (48, 48), "attention.output.dense": (48, 48)}
    linears |= {"intermediate.dense": (72, 48), "output.dense": (48, 72)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(2):
        for name, shape in linears.items():
            found[f"encoder.layer.{layer}.{name}.weight"], found[f"encoder.layer.{layer}.{name}.bias"] = shape, shape[:1]
        norms += [f"encoder.layer.{layer}.{place}.LayerNorm" for place in ("attention.output", "output")]
    for name in norms:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (48,)
    return found


def feeds() -> dict[str, np.ndarray]:
    """Three rows of 9 tokens; 0, 3 and 8 of them padding."""
    rng = np.random.default_rng(0)
    mask = (np.arange(9) < np.array([[9], [6], [1]])).astype(np.int64)
    return {"input_ids": rng.integers(0, 1100, (3, 9)), "attention_mask": mask, "token_type_ids": rng.integers(0, 2, (3, 9))}


def run(folder: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, feeds())[0]


def tokens() -> np.ndarray:
    """last_hidden_state of eager torch [3, 9, 48]."""
    model = reference_model(tiny_checkpoint(), "feature-extraction")
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in feeds().items()}).last_hidden_state.numpy()


def pooled(mode: str) -> np.ndarray:
    """The slow twin of the graph's pooling."""
    rows = []
    for vectors, mask in zip(tokens(), feeds()["attention_mask"], strict=True):
        seen = vectors[mask == 1]
        rows.append({"mean": seen.mean(0), "cls": vectors[0], "max": seen.max(0), "lasttoken": seen[-1]}[mode])
    return np.stack(rows)


class TestPooling:
    @pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
    def test_equals_the_twin(self, mode: str, tmp_path: Path) -> None:
        export = export_encoder(tiny_checkpoint(), parse_scheme("fp32"), tmp_path, pooling=mode)
        assert export.outputs == ("sentence_embedding",)
        assert np.abs(run(tmp_path) - pooled(mode)).max() <= 1e-5

    def test_normalised_by_the_files_of_sentence_transformers(self, tmp_path: Path) -> None:
        kinds = ("models.Transformer", "models.Pooling", "models.Normalize")
        modules = [{"type": f"sentence_transformers.{kind}", "path": "" if i == 0 else f"{i}_X"} for i, kind in enumerate(kinds)]
        assets = {
            "modules.json": str(modules).replace("'", '"').encode(),
            "1_X/config.json": b'{"pooling_mode_max_tokens": true, "pooling_mode_cls_token": false}',
        }
        export = export_encoder(tiny_checkpoint(assets), parse_scheme("fp32"), tmp_path)
        assert (export.task, export.pooling, export.normalize) == ("feature-extraction", "max", True)
        wanted = pooled("max")
        assert np.abs(run(tmp_path) - wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).max() <= 1e-5

    def test_none_leaves_the_tokens(self, tmp_path: Path) -> None:
        export = export_encoder(tiny_checkpoint(), parse_scheme("fp32"), tmp_path)
        assert export.outputs == ("last_hidden_state",)
        attended = feeds()["attention_mask"] == 1
        assert np.abs(run(tmp_path)[attended] - tokens()[attended]).max() <= 1e-5


@pytest.mark.parametrize(
    ("scheme", "cosine"),
    [("fp16", 0.99999), ("int8", 0.9999), ("int8-stored", 0.9999), ("int8-dynamic", 0.99), ("int8-g32", 0.9995), ("int4-g16-asym", 0.98)],
)
def test_schemes_stay_near_float(scheme: str, cosine: float, tmp_path: Path) -> None:
    export = export_encoder(tiny_checkpoint(), parse_scheme(scheme), tmp_path, pooling="mean")
    got, wanted = run(tmp_path), pooled("mean")
    assert ((got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)).min() >= cosine
    stored = {matrix.name: matrix.scheme for matrix in export.matrices}
    joined = "encoder.layer.0.attention.self.{}.weight"
    assert stored["+".join(joined.format(part) for part in ("query", "key", "value"))] == str(parse_scheme(scheme))
    assert (stored["encoder.layer.1.output.dense.weight"] == "fp16") == (scheme in ("int8", "fp16"))
    assert sum(matrix.nbytes for matrix in export.matrices) <= export.files["model.onnx.data"]


def test_codes_of_the_full_range_are_nearer_and_told_apart(tmp_path: Path) -> None:
    """By the float twin, so that it holds on processors where these sums saturate."""
    error = {}
    for scheme in ("int8-dynamic", "int8-dynamic-vnni"):
        export = export_encoder(tiny_checkpoint(), parse_scheme(scheme), tmp_path / scheme, pooling="mean")
        session = open_session(tmp_path / scheme / "model.onnx", graph=float_twin(tmp_path / scheme / "model.onnx"))
        (got,) = session.run(None, feeds())
        error[scheme] = np.square(got - pooled("mean")).mean()
        assert {matrix.scheme for matrix in export.matrices if "dense" in matrix.name} == {scheme}
        norms = [value for value in onnx.load(tmp_path / scheme / "model.onnx").graph.initializer if value.name.endswith("LayerNorm.bias")]
        given = {value.name: tiny_checkpoint().tensors[value.name].read() for value in norms}
        moved = {value.name for value in norms if not np.array_equal(onnx.numpy_helper.to_array(value), given[value.name])}
        assert len(moved) == {"int8-dynamic": 0, "int8-dynamic-vnni": 4}[scheme] and len(norms) == 5  # what the last norm gives is the answer
    assert 0 < 1.3 * error["int8-dynamic-vnni"] < error["int8-dynamic"], error
    require_clean(tmp_path / "int8-dynamic" / "model.onnx")
    require_clean(tmp_path / "int8-dynamic-vnni" / "model.onnx", full_range=True)
    with pytest.raises(BundleError, match="16-bit sums saturate"):
        require_clean(tmp_path / "int8-dynamic-vnni" / "model.onnx")


def test_the_exporters_road_gives_the_same_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a family without a row takes: traced, then fused."""
    monkeypatch.setattr(encoder, "plan_encoder", lambda config, task: None)
    export = export_encoder(tiny_checkpoint(), parse_scheme("int8"), tmp_path, pooling="mean")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node)
    assert (kinds["MultiHeadAttention"], kinds["SkipLayerNormalization"], kinds["BiasGelu"]) == (2, 4, 2)
    assert not {"Softmax", "Transpose", "Reshape", "Expand", "Where", "Identity"} & set(kinds)
    assert (export.fusions["unfused_softmax"], export.built) == (0, False)
    assert np.abs(run(tmp_path) - pooled("mean")).max() <= 1e-2  # its matrices are float16, its word table has 8 bits


def test_the_graph_is_fused_and_bare(tmp_path: Path) -> None:
    export = export_encoder(tiny_checkpoint(), parse_scheme("fp32"), tmp_path, pooling="mean")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["Attention"], kinds["LayerNormalization"], kinds["Gelu"], kinds["Gemm"]) == (2, 5, 2, 4 * 2)
    assert kinds["Expand"] == 1  # the mask of all attentions
    assert not {"Softmax", "Transpose", "Where", "Identity", "SkipLayerNormalization"} & set(kinds)
    assert export.built
    assert [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model.graph.input] == [["batch", "sequence"]] * 3
    content = (tmp_path / "model.onnx").read_bytes()
    assert not any(path in content for path in (b"site-packages", b".py", str(tmp_path).encode()))
    assert not model.producer_version and not model.doc_string and not model.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_two_processes_write_equal_bytes(tmp_path: Path) -> None:
    """Torch and transformers are not even imported."""
    code = (
        "import sys, pathlib;"
        "source = pathlib.Path(sys.argv[1]).read_text().replace('import torch', '').replace('from compiler.reference import reference_model', '');"
        "names = {'__name__': 'names'}; exec(compile(source, sys.argv[1], 'exec'), names);"
        "names['export_encoder'](names['tiny_checkpoint'](), names['parse_scheme']('int8'), pathlib.Path(sys.argv[2]), pooling='mean');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    (tmp_path / "other").mkdir()
    subprocess.run([sys.executable, "-c", code, __file__, str(tmp_path / "other")], check=True, timeout=240, cwd=Path(__file__).parents[3])
    export_encoder(tiny_checkpoint(), parse_scheme("int8"), tmp_path / "here", pooling="mean")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def test_progress_names_the_weights(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_encoder(tiny_checkpoint(), parse_scheme("int8"), tmp_path, progress=lambda name, done, total: seen.append((name, done, total)))
    assert [done for _, done, _ in seen] == list(range(seen[0][2]))
    assert any("query.weight" in name for name, _, _ in seen)


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").mkdir()
    with pytest.raises(OutputError, match=r"model\.onnx\.data"):
        export_encoder(tiny_checkpoint(), parse_scheme("fp32"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "summarization"}, "feature-extraction | text-classification"),
        ({"pooling": "median"}, "'median'"),
        ({"normalize": True}, "set pooling to one of mean"),
        ({"task": "text-classification", "pooling": "mean"}, "none for a classifier"),
    ],
)
def test_wrong_settings_say_what_is_right(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError) as caught:
        export_encoder(tiny_checkpoint(), parse_scheme("fp32"), tmp_path, **settings)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def changed(name: str, array: np.ndarray | None) -> Checkpoint:
    """The tiny model with one tensor replaced, or left out."""
    good = tiny_checkpoint()
    tensors = dict(good.tensors)
    tensors.pop(name, None)
    if array is not None:
        tensors[name] = TensorView(name, array.shape, "F32", lambda start, stop: array[start:stop])
    return Checkpoint(tensors, CONFIG, {}, "tiny", lambda: "digest")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("embeddings.word_embeddings.weight", np.full((1100, 48), np.nan, np.float32), "NaN or infinity"),
        ("encoder.layer.1.attention.self.key.weight", np.full((48, 48), np.inf, np.float32), "NaN or infinity"),
        ("encoder.layer.0.output.LayerNorm.bias", np.full(48, -np.inf, np.float32), "NaN or infinity"),
        ("encoder.layer.0.output.dense.bias", None, "a tensor for every parameter"),
        ("encoder.layer.0.output.dense.bias", np.zeros(47, np.float32), r"shape \[48\] by config.json"),
        ("encoder.layer.7.output.dense.bias", np.zeros(48, np.float32), "unused encoder.layer.7"),
    ],
)
@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_a_bad_tensor_is_named(name: str, array: np.ndarray | None, message: str, scheme: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        export_encoder(changed(name, array), parse_scheme(scheme), tmp_path)
    assert name in str(caught.value)


def huge_channel() -> Checkpoint:
    gamma = np.ones(48, np.float32)
    gamma[5] = 100
    return changed("embeddings.LayerNorm.weight", gamma)


class TestRows:
    """The integer forms against their equations."""

    def test_one_huge_channel_costs_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A norm that scales one channel by 100: one scale a tensor would leave the others two bits."""
        checkpoint, vectors = huge_channel(), {}
        for scheme in ("fp32", "int8", "int8-dynamic"):
            export_encoder(checkpoint, parse_scheme(scheme), tmp_path / scheme, pooling="mean")
            vectors[scheme] = run(tmp_path / scheme)
        monkeypatch.setattr(encoder, "observed", lambda *_: {})  # as if nobody had looked: no wide channels
        export_encoder(checkpoint, parse_scheme("int8-dynamic"), tmp_path / "blind", pooling="mean")
        vectors["blind"] = run(tmp_path / "blind")
        wanted = vectors["fp32"]
        error = {scheme: np.abs(got - wanted).max() for scheme, got in vectors.items()}
        assert 3 * error["int8"] < error["blind"] and 2 * error["int8-dynamic"] < error["blind"], error

    def test_one_scale_a_call_pulls_channels_together_and_leaves_the_loudest_out(self, tmp_path: Path) -> None:
        """Queries, keys and values in one; up; down: inputs are multiplied by factors, 0 for those that a Gemm adds in float. Not attention's output."""
        export_encoder(huge_channel(), parse_scheme("int8-dynamic"), tmp_path, pooling="mean")
        graph = onnx.load(tmp_path / "model.onnx").graph
        made = {output: node for node in graph.node for output in node.output}
        values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        split = {str(node.input[1]): made[node.input[0]] for node in graph.node if node.op_type == "DynamicQuantizeMatMul"}
        assert len(split) == 2 * 4
        for name, before in split.items():
            masked = before.op_type == "Mul" and before.input[1] in values
            assert masked != ("attention.output" in name)
            if masked:
                factors = values[before.input[1]]
                assert ((factors >= 0) & (factors <= 1)).all() and (factors == 1).any() and (factors < 1).any()
                wide = np.flatnonzero(factors == 0)
                assert ("self.query" not in name or 5 in wide or "layer.1" in name) and len(wide) <= WIDE  # the norm's channel 5
                assert not values[name][wide].any()
        gemms = [node for node in graph.node if node.op_type == "Gemm" and made[node.input[2]].op_type == "DynamicQuantizeMatMul"]
        assert len(gemms) >= 3 and all(made[node.input[0]].op_type == "Gather" for node in gemms)

    def test_a_text_does_not_depend_on_its_neighbours(self, tmp_path: Path) -> None:
        """Each token has its own scale, so a row of a batch is what it is alone."""
        export_encoder(tiny_checkpoint(), parse_scheme("int8"), tmp_path, pooling="mean")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        together = session.run(None, feeds())[0]
        for row in range(3):
            alone = session.run(None, {name: array[row : row + 1] for name, array in feeds().items()})[0]
            assert np.abs(alone[0] - together[row]).max() <= 1e-5


def spans(peaks: np.ndarray) -> np.ndarray:
    return np.stack([np.zeros_like(peaks), peaks])


class TestChannels:
    """What is done to the inputs of a matrix in integers."""

    def test_one_scale_a_call_pulls_loud_channels_together(self) -> None:
        """Median 2: 4 is twice as large, 32 is beyond LOUD medians and stays float."""
        peaks = np.array([1, 2, 2, 4, 2, 32, 2, 1], np.float32)
        channels = choose_channels(spans(peaks), parse_scheme("int8-dynamic"), normed=True)
        assert channels.wide.tolist() == [5]
        np.testing.assert_allclose(channels.factors, [1, 1, 1, 2**-0.8, 1, 0, 1, 1], rtol=1e-6)

    def test_codes_of_the_full_range_need_fewer_float_channels(self) -> None:
        """Median 2: 20 is 10 medians, 50 is 25."""
        peaks = np.array([1, 2, 2, 20, 2, 50, 2, 1], np.float32)
        assert choose_channels(spans(peaks), parse_scheme("int8-dynamic"), normed=True).wide.tolist() == [3, 5]
        assert choose_channels(spans(peaks), parse_scheme("int8-dynamic-vnni"), normed=True).wide.tolist() == [5]
        assert len(choose_channels(spans(np.arange(1, 81, dtype=np.float32)), parse_scheme("int8-dynamic-vnni"), normed=False).wide) == 2

    def test_a_channel_that_is_always_large_is_loud_no_more_once_centred(self) -> None:
        seen = np.array([[-1, -1, 49, -2], [1, 1, 51, 2]], np.float32)
        scheme = parse_scheme("int8-dynamic-vnni")
        assert choose_channels(seen, scheme, normed=True).wide.tolist() == [2]
        channels = choose_channels(seen, scheme, normed=True, centred=True)
        assert channels.wide.tolist() == [] and channels.centre is not None and channels.centre.tolist() == [0, 0, 50, 0]
        np.testing.assert_allclose(channels.factors, [1, 1, 1, 2**-0.7], rtol=1e-6)

    def test_one_scale_a_token_leaves_the_others_as_they_are(self) -> None:
        channels = choose_channels(spans(np.arange(1, 81, dtype=np.float32)), parse_scheme("int8"), normed=True)
        assert channels.wide.tolist() == list(range(64, 80)) and set(np.unique(channels.factors)) == {0.0, 1.0}

    def test_factors_and_wide_part_are_the_product(self) -> None:
        rng = np.random.default_rng(0)
        x, weight = rng.standard_normal((5, 16)).astype(np.float32), rng.standard_normal((3, 16)).astype(np.float32)
        x[:, 7] *= 100
        channels = choose_channels(np.stack([x.min(0), x.max(0)]), parse_scheme("int8-dynamic"), normed=True)
        assert 7 in channels.wide
        got = (x * channels.factors) @ channels.rest(weight).T + x[:, channels.wide] @ weight[:, channels.wide].T
        np.testing.assert_allclose(got, x @ weight.T, rtol=1e-4, atol=1e-3)


class TestSample:
    """Tokens that the peaks are taken over."""

    def tokenizer(self) -> bytes:
        words = {word: index for index, word in enumerate(["[UNK]", "the", "of", "and"])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return made.to_str().encode()

    def test_text_in_the_model_s_own_tokens_and_random_ones(self) -> None:
        given = dataclasses.replace(tiny_checkpoint(), assets={"tokenizer.json": self.tokenizer()})
        rows = sample_tokens(given, vocabulary=50, positions=40)
        assert rows.shape[1] == 20 and len(rows) > RANDOM_ROWS and rows[RANDOM_ROWS:].max() <= 3 and rows[:RANDOM_ROWS].max() > 3
        assert sample_tokens(given, vocabulary=1, positions=40).max() == 0 < rows[RANDOM_ROWS:].max()  # windows with tokens that the model lacks are left out

    def test_no_tokenizer_is_random_tokens_alone(self) -> None:
        assert sample_tokens(dataclasses.replace(tiny_checkpoint(), assets={}), 50, 40).shape == (RANDOM_ROWS, 20)

    def test_a_broken_tokenizer_is_named(self) -> None:
        given = dataclasses.replace(tiny_checkpoint(), assets={"tokenizer.json": b'{"version": "1.0", "model": {"type": "Nonsense"}}'})
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            sample_tokens(given, 50, 40)
