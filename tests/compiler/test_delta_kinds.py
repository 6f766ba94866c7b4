"""Kinds beyond LoRA by hand: formulas on two by two matrices, our own file formats, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.load import load_delta
from compiler.deltas.sparse import write_sparse
from compiler.errors import DeltaError
from compiler.stages.merge import merged_view

ROOT = "base_model.model."
W = np.array([[3, 4], [0, 2]], "<f4")


def base_of(arrays: dict[str, np.ndarray], **config: Any) -> Checkpoint:
    def view(name: str, array: np.ndarray) -> TensorView:
        return TensorView(name, array.shape, "F32", lambda start, stop: array[start:stop].copy())

    return Checkpoint({name: view(name, array) for name, array in arrays.items()}, {"model_type": "llama", **config}, {}, "the base", lambda: "b" * 64)


def adapter(folder: Path, kind: str, tensors: dict[str, Any], **config: Any) -> str:
    """A PEFT adapter folder of module m: part -> values, float32 unless an array says otherwise. A part with base_model is a whole name."""
    package = pytest.importorskip("safetensors.numpy")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
    arrays = {
        part if "base_model" in part else f"{ROOT}m.{part}": np.asarray(value, None if isinstance(value, np.ndarray) else "<f4")
        for part, value in tensors.items()
    }
    package.save_file(arrays, folder / "adapter_model.safetensors")
    return str(folder)


def merged(source: str, weight: np.ndarray = W, bias: np.ndarray | None = None, **config: Any) -> dict[str, np.ndarray]:
    arrays = {"m.weight": weight} if bias is None else {"m.weight": weight, "m.bias": bias}
    return {name: view.read() for name, view in merged_view(base_of(arrays, **config), [load_delta(source)]).tensors.items()}


# kind, parts of module m, config, merged weight for W = [[3 4] [0 2]]
HADAMARD = {"hada_w1_a": [[1], [2]], "hada_w1_b": [[1, 1]], "hada_w2_a": [[1], [1]], "hada_w2_b": [[3, 5]]}
BY_HAND: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[list[float]]]] = {
    # V = W + [[0 0] [0 1]] = [[3 4] [0 3]], norms 5 and 3, m = 10 and 6
    "dora": (
        "LORA",
        {"lora_A.weight": [[0, 1]], "lora_B.weight": [[0], [1]], "lora_magnitude_vector": [10, 6]},
        {"r": 1, "lora_alpha": 1, "use_dora": True},
        [[6, 8], [0, 6]],
    ),
    # 2 * ([1 1; 2 2] o [3 5; 3 5])
    "loha": ("LOHA", HADAMARD, {"r": 1, "alpha": 2}, [[9, 14], [12, 22]]),
    # 0.5 * [2] (x) [[1 2] [3 4]]
    "lokr": ("LOKR", {"lokr_w1": [[2]], "lokr_w2": [[1, 2], [3, 4]]}, {"r": 2, "alpha": 1}, [[4, 6], [3, 6]]),
    "ia3 output": ("IA3", {"ia3_l": [[2], [3]]}, {}, [[6, 8], [0, 6]]),
    "ia3 input": ("IA3", {"ia3_l": [[2, 3]]}, {}, [[6, 12], [0, 6]]),
    # 4 / (2 + 1e-5) * [1 0]^T [1 1] * 3, the second singular value 0
    "adalora": ("ADALORA", {"lora_A": [[1, 1], [1, 1]], "lora_B": [[1, 0], [0, 1]], "lora_E": [[3], [0]]}, {"init_r": 2, "lora_alpha": 4}, [[9, 10], [0, 2]]),
    # (b o B) (d o A) = [1 2]^T o [1 1]^T * 3 [1 1]
    "vera": (
        "VERA",
        {"vera_lambda_b": [1, 2], "vera_lambda_d": [3], "base_model.vera_A": [[1, 1, 9]], "base_model.vera_B": [[1], [1], [9]]},
        {"r": 1},
        [[6, 7], [6, 8]],
    ),
    # K = [[0 1] [-1 0]]: Q = (I - K)(I + K)^-1 = [[0 -1] [1 0]], W Q^T = [[-4 3] [-2 0]]
    "oft": ("OFT", {"oft_R.weight": [[1]]}, {"use_cayley_neumann": False}, [[-4, 3], [-2, 0]]),
    # Q = I + 2 K = [[1 2] [-2 1]], W Q^T = [[3 + 8, -6 + 4] [4, 2]]
    "oft, two terms": ("OFT", {"oft_R.weight": [[1]]}, {"peft_version": "0.21.0", "num_cayley_neumann_terms": 2}, [[11, -2], [4, 2]]),
    "boft": ("BOFT", {"boft_R": [[[[0, 2], [0, 0]]]], "boft_s": [[1], [2]]}, {}, [[-4, 3], [-4, 0]]),
    "shira": ("SHIRA", {"shira_indices": np.array([[1, 0, 0, 1], [1, 1, 0, 0]], np.int32), "shira_weight": [1, 2, 3, 4]}, {"r": 1}, [[6, 6], [4, 3]]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str, tmp_path: Path) -> None:
    kind, tensors, config, expected = BY_HAND[case]
    found = merged(adapter(tmp_path / "d", kind, tensors, **config))
    np.testing.assert_allclose(found["m.weight"], expected, atol=2e-4 if kind == "ADALORA" else 1e-6)


@pytest.mark.parametrize("case", ["dora", "loha", "lokr", "ia3 output", "ia3 input", "adalora", "vera"])
def test_input_first_bases_are_the_transpose(case: str, tmp_path: Path) -> None:
    kind, tensors, config, expected = BY_HAND[case]
    found = merged(adapter(tmp_path / "d", kind, tensors, **config), np.ascontiguousarray(W.T), model_type="gpt2")
    np.testing.assert_allclose(found["m.weight"], np.transpose(expected), atol=2e-4 if kind == "ADALORA" else 1e-6)


def test_ia3_scales_a_bias_only_where_the_output_is_scaled(tmp_path: Path) -> None:
    bias = np.array([1, 10], "<f4")
    np.testing.assert_array_equal(merged(adapter(tmp_path / "out", "IA3", {"ia3_l": [[2], [3]]}), bias=bias)["m.bias"], [2, 30])
    np.testing.assert_array_equal(merged(adapter(tmp_path / "in", "IA3", {"ia3_l": [[2, 3]]}), bias=bias)["m.bias"], bias)


def test_a_pruned_away_module_is_as_in_the_base(tmp_path: Path) -> None:
    tensors = {"lora_A": np.zeros((0, 2), "<f4"), "lora_B": np.zeros((2, 0), "<f4"), "lora_E": np.zeros((0, 1), "<f4")}
    np.testing.assert_array_equal(merged(adapter(tmp_path / "d", "ADALORA", tensors))["m.weight"], W)


def test_two_multiplicative_deltas_each_see_the_base(tmp_path: Path) -> None:
    sources = [adapter(tmp_path / name, "IA3", {"ia3_l": [[factor], [factor]]}) for name, factor in (("two", 2), ("five", 5))]
    found = merged_view(base_of({"m.weight": W}), [load_delta(source) for source in sources]).tensors["m.weight"].read()
    np.testing.assert_array_equal(found, W + W + 4 * W)  # one after the other would give 10 W


# our own formats


def sparse(path: Path, positions: Any = (0, 3), values: Any = (1, -2), shape: tuple[int, ...] = (2, 2), **more: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sparse(path, {"m.weight": (shape, np.array(positions), np.array(values, "<f4"))}, **more)
    return str(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_sparse_is_its_dense_twin(tmp_path: Path, rows: int, columns: int, data: st.DataObject) -> None:
    size = rows * columns
    positions = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    values = np.arange(1, len(positions) + 1, dtype="<f4")
    source = sparse(tmp_path / "s.safetensors", np.array(positions, np.int64), values, (rows, columns))
    dense = np.zeros(size, np.float32)
    dense[positions] = values
    base = np.ones((rows, columns), "<f4")
    view = merged_view(base_of({"m.weight": base}), [load_delta(source, weight=2)]).tensors["m.weight"]
    expected = base + 2 * dense.reshape(rows, columns)
    np.testing.assert_array_equal(view.read(), expected)
    np.testing.assert_array_equal(np.concatenate([block for _, block in view.blocks(data.draw(st.integers(1, 80)))]), expected)


def test_sparse_file_folder_and_vector(tmp_path: Path) -> None:
    write_sparse(tmp_path / "delta.safetensors", {"m.bias": ((3,), np.array([1]), np.array([5], "<f4"))}, base_digest="b" * 64, base_name="acme/base-1")
    base = base_of({"m.bias": np.zeros(3, "<f4")})
    for source in (tmp_path, tmp_path / "delta.safetensors"):
        delta = load_delta(str(source))
        assert (delta.kind, delta.base_name, delta.base_digest) == ("sparse", "acme/base-1", "b" * 64)
        np.testing.assert_array_equal(merged_view(base, [delta]).tensors["m.bias"].read(), [0, 5, 0])


def test_sparse_positions_past_what_float32_counts(tmp_path: Path) -> None:
    """2^24 + 1 is no float32, so indices may not be read as the rows of a tensor are."""
    shape = (2**24 + 2, 1)
    source = sparse(tmp_path / "s.safetensors", [2**24 + 1], [7], shape)
    (edit,) = load_delta(source).edits
    np.testing.assert_array_equal(edit.change(2**24, np.zeros((2, 1), np.float32), False), [[0], [7]])


def test_a_delta_of_another_base_by_digest(tmp_path: Path) -> None:
    delta = load_delta(sparse(tmp_path / "s.safetensors", base_digest="c" * 64))
    with pytest.raises(DeltaError, match="expected the base it was made from, cccccccccccc, found bbbbbbbbbbbb; compile it with the base it names"):
        merged_view(base_of({"m.weight": W}), [delta])


def own(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> str:
    package = pytest.importorskip("safetensors.numpy")
    package.save_file(tensors, path, {"format": "trimtab-delta", "version": "1", **metadata})
    return str(path)


def test_a_file_of_differences(tmp_path: Path) -> None:
    source = own(tmp_path / "d.safetensors", {"m.weight": W}, kind="diff", base_name="acme/base-1")
    delta = load_delta(source, weight=-0.5)
    assert (delta.kind, delta.base_name) == ("diff", "acme/base-1")
    np.testing.assert_array_equal(merged_view(base_of({"m.weight": W}), [delta]).tensors["m.weight"].read(), W / 2)


def checkpoint(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> str:
    package = pytest.importorskip("safetensors.numpy")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}))
    package.save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_a_tied_checkpoint_changes_both_sides_of_an_untied_base(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "o", {"model.embed_tokens.weight": 2 * W, "ids": np.arange(3)}, tie_word_embeddings=True)
    untied = base_of({"model.embed_tokens.weight": W, "lm_head.weight": -W}, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    found = merged_view(untied, [load_delta(other)]).tensors
    np.testing.assert_array_equal(found["model.embed_tokens.weight"].read(), 2 * W)
    np.testing.assert_array_equal(found["lm_head.weight"].read(), 2 * W)
    tied = base_of({"model.embed_tokens.weight": W}, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    view = merged_view(tied, [load_delta(other)])
    assert set(view.tensors) == {"model.embed_tokens.weight"} and view.config["tie_word_embeddings"] is True
    np.testing.assert_array_equal(view.tensors["model.embed_tokens.weight"].read(), 2 * W)


# guards, each with its message

WHOLE = {"lokr_w1": [[2]], "lokr_w2": [[1, 2], [3, 4]]}
LEARNED = {"vera_lambda_b": [1, 2], "vera_lambda_d": [3]}
SHARED = {"base_model.vera_A": [[1, 1]], "base_model.vera_B": [[1], [1]]}
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "loha part": ("LOHA", {"hada_w1_a": [[1]]}, {}, "m: expected hada_w1_a and .*, found no hada_w1_b; save the adapter again: a part of it is missing"),
    "loha convolution": ("LOHA", {**HADAMARD, "hada_t1": [[1]]}, {}, "hada_t1: expected hada_w1_a, .*, found a part that is not built; .*convolutions"),
    "loha shapes": ("LOHA", {**HADAMARD, "hada_w2_b": [[1]]}, {"r": 1}, r"expected two pairs of one shape, .*found hada_w1_a \[2, 1\]"),
    "loha rank": ("LOHA", HADAMARD, {"r": 3}, "expected rank 3 as adapter_config.json says, found rank 1 in the weights"),
    "loha NaN": ("LOHA", {**HADAMARD, "hada_w2_b": [[np.nan, 1]]}, {"r": 1}, "hada_w2_b: expected finite numbers, found 1 NaN or infinite"),
    "loha surprise": ("LOHA", {**HADAMARD, "surprise": [[1]]}, {"r": 1}, "expected loha factors, or a module that modules_to_save names"),
    "loha empty": ("LOHA", {}, {}, "expected loha factors, found none: the file holds no tensors"),
    "lokr part": ("LOKR", {"lokr_w1": [[2]]}, {}, "expected lokr_w2_a and lokr_w2_b, found no lokr_w2_a"),
    "lokr convolution": ("LOKR", {**WHOLE, "lokr_t2": [[1]]}, {}, "lokr_t2: expected lokr_w1, .*found a part that is not built"),
    "lokr kernel": ("LOKR", {"lokr_w1": [[2]], "lokr_w2": [[[1]]]}, {}, "expected factors of two dimensions"),
    "lokr halves": ("LOKR", {"lokr_w1": [[2]], "lokr_w2_a": [[1, 1]], "lokr_w2_b": [[1]]}, {}, r"expected lokr_w2_a \[_, r\] and lokr_w2_b \[r, _\]"),
    "lokr rank": ("LOKR", {"lokr_w1": [[2]], "lokr_w2_a": [[1]], "lokr_w2_b": [[1]]}, {"r": 4}, "expected rank 4 as adapter_config.json says, found rank 1"),
    "lokr r 0": ("LOKR", WHOLE, {"r": 0}, "expected a rank of at least 1, found r 0 in adapter_config.json"),
    "ia3 convolution": ("IA3", {"ia3_l": [[[[1]]]]}, {}, r"expected ia3_l of shape \[out, 1\] or \[1, in\], found ia3_l \[1, 1, 1, 1\]"),
    "adalora part": ("ADALORA", {"lora_A": [[1, 1]], "lora_B": [[1], [1]]}, {}, "expected lora_A and lora_B and lora_E, found no lora_E"),
    "adalora values": ("ADALORA", {"lora_A": [[1, 1]], "lora_B": [[1], [1]], "lora_E": [[1], [1]]}, {}, r"expected lora_E \[r, 1\] beside"),
    "adalora halves": ("ADALORA", {"lora_A": [[1, 1]], "lora_B": [[1, 1]], "lora_E": [[1]]}, {}, r"expected one rank in A and B"),
    "vera shapes": ("VERA", {**LEARNED, **SHARED, "vera_lambda_d": [3, 3]}, {}, r"expected vera_lambda_b \[out\], vera_lambda_d \[r\]"),
    "oft of old": ("OFT", {"oft_R.weight": [[1]]}, {}, "expected OFT as PEFT writes it since 0.18, found no peft_version, so one before 0.18; train it again"),
    "oft of 0.17": ("OFT", {"oft_R.weight": [[1]]}, {"peft_version": "0.17.1"}, "found PEFT 0.17.1; train it again"),
    "oft older still": ("OFT", {"oft_r": [[[1]]]}, {"peft_version": "0.21.0"}, "oft_r: expected oft_R, oft_embedding_R, found a part that is not built"),
    "oft shape": ("OFT", {"oft_R.weight": [[1, 1]]}, {"peft_version": "0.21.0"}, r"expected oft_R of shape \[blocks, b \(b - 1\) / 2\]"),
    "boft butterfly": (
        "BOFT",
        {"boft_R": np.zeros((2, 1, 2, 2), "<f4"), "boft_s": [[1], [1]]},
        {},
        "expected blocks of an even size, 2 or a multiple of them, for 2 butterfly factors",
    ),
    "boft shape": ("BOFT", {"boft_R": np.zeros((1, 1, 2, 3), "<f4"), "boft_s": [[1], [1]]}, {}, r"expected boft_R \[factors, blocks, b, b\] and boft_s"),
    "shira shape": ("SHIRA", {"shira_indices": np.zeros((2, 3), np.int32), "shira_weight": [1]}, {}, r"expected shira_indices \[2, n\] and shira_weight \[n\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_loaded(case: str, tmp_path: Path) -> None:
    kind, tensors, config, message = REFUSED[case]
    with pytest.raises(DeltaError, match=message) as caught:
        load_delta(adapter(tmp_path / "d", kind, tensors, **config))
    assert "\n" not in str(caught.value)


MISFITS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "vera inputs": ("VERA", {**LEARNED, **SHARED, "base_model.vera_A": [[1]]}, {}, r"expected inputs that vera_A covers, found 2, and vera_A \[1, 1\]"),
    "oft blocks": ("OFT", {"oft_R.weight": [[1, 1, 1]]}, {"peft_version": "0.21.0", "block_share": True}, "expected inputs in whole blocks of 3, found 2"),
    "shira outside": ("SHIRA", {"shira_indices": np.array([[0, 1, 2, 1], [0, 0, 0, 1]]), "shira_weight": [1] * 4}, {"r": 1}, "up to row 2, column 1"),
    "shira repeated": ("SHIRA", {"shira_indices": np.zeros((2, 4), np.int32), "shira_weight": [1] * 4}, {"r": 1}, "not ascending or repeated"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_refused_when_bound(case: str, tmp_path: Path) -> None:
    kind, tensors, config, message = MISFITS[case]
    with pytest.raises(DeltaError, match=message):
        merged(adapter(tmp_path / "d", kind, tensors, **config))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dora_of_weights_without_a_direction(model_type: str, tmp_path: Path) -> None:
    kind, tensors, config, _ = BY_HAND["dora"]
    weight = np.array([[3, 4], [0, -1]], "<f4")
    with pytest.raises(DeltaError, match="expected weights with a direction for DoRA to scale, found 1 outputs whose weights are all 0 in the base"):
        merged(adapter(tmp_path / "d", kind, tensors, **config), weight.T.copy() if model_type == "gpt2" else weight, model_type=model_type)


OWN: dict[str, tuple[dict[str, np.ndarray], dict[str, str], str]] = {
    "version": (
        {},
        {"kind": "sparse", "version": "2"},
        "expected metadata format trimtab-delta, version 1, kind sparse or diff, found .*version 2, kind sparse",
    ),
    "kind": ({}, {"kind": "dense"}, "found format trimtab-delta, version 1, kind dense; write the delta as docs/deltas.md says"),
    "no shapes": ({}, {"kind": "sparse"}, "expected shapes in the metadata: JSON of parameter name to shape, found None"),
    "bad shapes": ({}, {"kind": "sparse", "shapes": "[1]"}, "expected shapes in the metadata"),
    "empty": ({}, {"kind": "sparse", "shapes": "{}"}, "expected at least one parameter in shapes"),
    "half": ({"m.indices": np.zeros(1, "<i4")}, {"kind": "sparse", "shapes": '{"m": [2]}'}, "expected indices and values, found no values"),
    "other": ({"m": np.zeros(1, "<i4")}, {"kind": "sparse", "shapes": '{"m": [2]}'}, "m: expected NAME.indices and NAME.values of each name in shapes"),
    "types": (
        {"m.indices": np.zeros(1, "<f4"), "m.values": np.zeros(1, "<f4")},
        {"kind": "sparse", "shapes": '{"m": [2]}'},
        "expected int32 or int64 indices and float values, found F32 and F32",
    ),
    "lengths": (
        {"m.indices": np.zeros(2, "<i4"), "m.values": np.zeros(1, "<f4")},
        {"kind": "sparse", "shapes": '{"m": [2]}'},
        "expected one value for each index",
    ),
    "outside": (
        {"m.indices": np.array([2], "<i8"), "m.values": np.ones(1, "<f4")},
        {"kind": "sparse", "shapes": '{"m": [2]}'},
        "indices from 0 to 1, found 2 to 2",
    ),
    "order": (
        {"m.indices": np.array([1, 0], "<i4"), "m.values": np.ones(2, "<f4")},
        {"kind": "sparse", "shapes": '{"m": [2]}'},
        "expected strictly ascending indices from 0 to 1, found 0 to 1, not ascending or repeated",
    ),
    "NaN": ({"m.indices": np.zeros(1, "<i4"), "m.values": np.array([np.nan], "<f4")}, {"kind": "sparse", "shapes": '{"m": [2]}'}, "m.values: expected finite"),
    "no differences": ({}, {"kind": "diff"}, "expected differences of at least one tensor, found none"),
    "integers": ({"m": np.zeros(1, "<i4")}, {"kind": "diff"}, "m: expected differences of a float type, found I32"),
    "infinite": ({"m": np.array([np.inf], "<f4")}, {"kind": "diff"}, "m: expected finite numbers"),
}


@pytest.mark.parametrize("case", OWN)
def test_own_files_are_checked(case: str, tmp_path: Path) -> None:
    tensors, metadata, message = OWN[case]
    with pytest.raises(DeltaError, match=message):
        load_delta(own(tmp_path / "d.safetensors", tensors, **metadata))


def test_a_delta_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=r"m.weight: expected a base tensor of shape \[3, 2\], found \[2, 2\] in the base: the adapter is for another base"):
        merged(sparse(tmp_path / "s.safetensors", shape=(3, 2)))


def test_a_checkpoint_without_floats(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="expected a checkpoint with float tensors, found none"):
        load_delta(checkpoint(tmp_path / "o", {"ids": np.arange(3)}))


def test_a_checkpoint_of_another_depth(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "o", {"model.layers.0.x.weight": W})
    base = base_of({"model.layers.0.x.weight": W, "model.layers.1.x.weight": W})
    with pytest.raises(DeltaError, match=r"expected all 2 layers of the base, .*found 1 adapted, 1 not"):
        merged_view(base, [load_delta(other)])
