"""LoRA deltas written by hand: the formula, what is refused and how, names, row blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import low_rank
from compiler.deltas.combine import linear
from compiler.deltas.load import load_delta
from compiler.deltas.lora import scale_of
from compiler.deltas.names import Names
from compiler.errors import DeltaError, RecipeError
from compiler.stages.merge import merged_view, plan_merge

ROOT = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def f32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> str:
    """A PEFT adapter folder with these arrays; the config is LoRA with r 2, alpha 4 unless told otherwise."""
    package = pytest.importorskip("safetensors.numpy")
    folder.mkdir(parents=True, exist_ok=True)
    settings_ = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "acme/base-1", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    package.save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def pair(module: str, out: int, width: int, rank: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    return {f"{ROOT}{module}.lora_A.weight": f32(rank, width, seed=seed), f"{ROOT}{module}.lora_B.weight": f32(out, rank, seed=seed + 100)}


def base_of(arrays: dict[str, np.ndarray], **config: Any) -> Checkpoint:
    def view(name: str, array: np.ndarray) -> TensorView:
        return TensorView(name, array.shape, "F32", lambda start, stop: array[start:stop].copy())

    return Checkpoint({name: view(name, array) for name, array in arrays.items()}, {"model_type": "llama", **config}, {}, "the base", lambda: "b" * 64)


LLAMA = {
    "model.embed_tokens.weight": f32(10, 4, seed=20),
    f"{Q}.weight": f32(6, 4, seed=21),
    "model.layers.0.mlp.down_proj.weight": f32(4, 8, seed=22),
    "model.norm.weight": f32(4, seed=23),
    "lm_head.weight": f32(10, 4, seed=24),
}


# the formula


def test_lora_by_hand(tmp_path: Path) -> None:
    # W = 0, A = [1 2], B = [3 4]^T, r = 1, alpha = 2: W' = 2 * [[3 6] [4 8]]
    tensors = {f"{ROOT}m.lora_A.weight": np.array([[1, 2]], "<f4"), f"{ROOT}m.lora_B.weight": np.array([[3], [4]], "<f4")}
    delta = load_delta(write_adapter(tmp_path / "d", tensors, r=1, lora_alpha=2))
    assert delta.names == ("m.weight",) and delta.base_name == "acme/base-1"
    np.testing.assert_array_equal(delta.apply("m.weight", np.zeros((2, 2), np.float32), 0), [[6, 12], [8, 16]])
    np.testing.assert_array_equal(delta.apply("m.weight", np.zeros((1, 2), np.float32), 1), [[8, 16]])
    np.testing.assert_array_equal(delta.apply("other", np.ones((1, 2), np.float32), 0), [[1, 1]])


@pytest.mark.parametrize(
    "config, module, expected",
    [
        ({"r": 8, "lora_alpha": 16}, "m", (2.0, 8)),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, "m", (2.0, 16)),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}}, "a.q_proj", (4.0, 4)),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 4}}, "a.xq_proj", (2.0, 8)),  # a pattern starts after a dot
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {r"layers\.\d\.q": 4, "q": 1}}, "layers.3.q", (0.5, 8)),  # the first match counts
    ],
)
def test_scale(config: dict[str, Any], module: str, expected: tuple[float, int]) -> None:
    assert scale_of(module, config) == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(out=st.integers(1, 12), width=st.integers(1, 12), rank=st.integers(1, 4), limit=st.integers(1, 300), transposed=st.booleans())
def test_row_blocks_make_the_whole(tmp_path: Path, out: int, width: int, rank: int, limit: int, transposed: bool) -> None:
    a, b = f32(rank, width, seed=1), f32(out, rank, seed=2)
    tensors = {f"{ROOT}{Q}.lora_A.weight": a, f"{ROOT}{Q}.lora_B.weight": b}
    delta = load_delta(write_adapter(tmp_path / "d", tensors, r=rank, fan_in_fan_out=transposed), weight=0.5)
    weight = f32(width, out, seed=3) if transposed else f32(out, width, seed=3)
    view = merged_view(base_of({f"{Q}.weight": weight}), [delta]).tensors[f"{Q}.weight"]
    difference = 0.5 * 4 / rank * (b.astype(np.float64) @ a)
    expected = weight + (difference.T if transposed else difference)
    np.testing.assert_allclose(view.read(), expected, atol=1e-4)
    blocks = np.concatenate([block for _, block in view.blocks(limit)])
    np.testing.assert_allclose(blocks, view.read(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows, columns, rank", [(7, 5, 2), (700, 1100, 16), (300, 2500, 32), (3, 4000, 33), (2000, 3, 8)])
def test_tiled_product_is_the_product(rows: int, columns: int, rank: int) -> None:
    left, right = f32(rank, rows, seed=1).T, f32(rank, columns, seed=2)
    np.testing.assert_allclose(low_rank(left, right), left.astype(np.float64) @ right, atol=1e-5 * rank)


def test_embedding_rows(tmp_path: Path) -> None:
    a, b = f32(2, 10, seed=1), f32(4, 2, seed=2)
    module = f"{ROOT}model.embed_tokens"
    delta = load_delta(write_adapter(tmp_path / "d", {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}))
    found = merged_view(base_of(LLAMA, tie_word_embeddings=False), [delta]).tensors["model.embed_tokens.weight"].rows(3, 7)
    np.testing.assert_allclose(found, LLAMA["model.embed_tokens.weight"][3:7] + 2 * (b @ a).T[3:7], atol=1e-5)


# merging


def test_the_base_is_never_changed_and_untouched_tensors_pass_through(tmp_path: Path) -> None:
    before = {name: array.copy() for name, array in LLAMA.items()}
    base = base_of(LLAMA, tie_word_embeddings=False)
    merged = merged_view(base, [load_delta(write_adapter(tmp_path / "d", pair(Q, 6, 4)))])
    for view in merged.tensors.values():
        view.read()
    for name, array in before.items():
        np.testing.assert_array_equal(base.tensors[name].read(), array)
        assert (merged.tensors[name] is base.tensors[name]) == (name != f"{Q}.weight")
    assert merged_view(base, []) is base


def test_two_deltas_with_weights(tmp_path: Path) -> None:
    one, two = pair(Q, 6, 4, seed=1), pair(Q, 6, 4, seed=5)
    deltas = [load_delta(write_adapter(tmp_path / "one", one), weight=0.25), load_delta(write_adapter(tmp_path / "two", two), weight=-2)]
    found = merged_view(base_of(LLAMA), deltas).tensors[f"{Q}.weight"].read()

    def difference(tensors: dict[str, np.ndarray]) -> np.ndarray:
        a, b = tensors.values()
        return 2 * b @ a

    np.testing.assert_allclose(found, LLAMA[f"{Q}.weight"] + 0.25 * difference(one) - 2 * difference(two), atol=1e-5)


def test_digest_moves_with_every_part(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "one", pair(Q, 6, 4))
    other = write_adapter(tmp_path / "two", pair(Q, 6, 4, seed=9))
    base = base_of(LLAMA)
    lists = [
        [],
        [load_delta(source)],
        [load_delta(source, weight=0.5)],
        [load_delta(other)],
        [load_delta(source), load_delta(other)],
        [load_delta(other), load_delta(source)],
    ]
    assert len({merged_view(base, deltas).digest for deltas in lists}) == len(lists)
    copy = write_adapter(tmp_path / "elsewhere" / "copy", pair(Q, 6, 4))
    assert load_delta(copy).digest == load_delta(source).digest


def test_record_names_what_was_touched(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "d", {**pair(Q, 6, 4), f"{ROOT}model.norm.weight": f32(4)}, modules_to_save=["model.norm"])
    plan = plan_merge(base_of(LLAMA), [load_delta(source)])
    record = plan.record()
    assert record["base"] == {"name": "the base", "digest": "b" * 64} and record["combine"] == "linear"
    (entry,) = record["deltas"]
    assert entry["tensors"] == [f"{Q}.weight", "model.norm.weight"]
    assert (entry["kind"], entry["weight"], entry["trained_on"], len(entry["digest"])) == ("lora", 1.0, "acme/base-1", 64)
    np.testing.assert_array_equal(plan.view().tensors["model.norm.weight"].read(), f32(4))
    json.dumps(record)


def test_head_on_a_bare_encoder(tmp_path: Path) -> None:
    """The adapter speaks of bert.*, the base does not; the result is one model with the head, its labels, and one naming."""
    query = "encoder.layer.0.attention.self.query"
    source = write_adapter(
        tmp_path / "d",
        {**pair(f"bert.{query}", 4, 4), f"{ROOT}classifier.weight": f32(3, 4), f"{ROOT}classifier.bias": f32(3)},
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    (tmp_path / "d" / "config.json").write_text(json.dumps({"id2label": {"0": "billing", "1": "outage", "2": "other"}}))
    base = base_of({f"{query}.weight": f32(4, 4), "pooler.dense.weight": f32(4, 4)}, model_type="bert", architectures=["BertModel"])
    merged = merged_view(base, [load_delta(source)])
    assert set(merged.tensors) == {f"bert.{query}.weight", "bert.pooler.dense.weight", "classifier.weight", "classifier.bias"}
    assert all(name == view.name for name, view in merged.tensors.items())
    np.testing.assert_array_equal(merged.tensors["classifier.weight"].rows(1, 3), f32(3, 4)[1:3])
    assert merged.config["architectures"] == ["BertForSequenceClassification"]
    assert merged.config["id2label"] == {"0": "billing", "1": "outage", "2": "other"} and merged.config["label2id"]["outage"] == 1


def test_saved_head_and_embedding_that_agree_stay_tied(tmp_path: Path) -> None:
    base = base_of({name: array for name, array in LLAMA.items() if name != "lm_head.weight"}, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    same = {f"{ROOT}model.embed_tokens.weight": f32(10, 4), f"{ROOT}lm_head.weight": f32(10, 4)}
    source = write_adapter(tmp_path / "same", {**pair(Q, 6, 4), **same}, modules_to_save=["embed_tokens", "lm_head"])
    plan = plan_merge(base, [load_delta(source)])
    assert plan.view().config["tie_word_embeddings"] is True and "lm_head.weight" not in plan.view().tensors and not plan.notes
    np.testing.assert_array_equal(plan.view().tensors["model.embed_tokens.weight"].read(), f32(10, 4))
    other = {**same, f"{ROOT}lm_head.weight": f32(10, 4, seed=8)}
    source = write_adapter(tmp_path / "other", {**pair(Q, 6, 4), **other}, modules_to_save=["embed_tokens", "lm_head"])
    plan = plan_merge(base, [load_delta(source)])
    assert plan.view().config["tie_word_embeddings"] is False
    assert "untied lm_head.weight from model.embed_tokens.weight" in plan.notes[0] and "costs 160 bytes" in plan.notes[0]


# names


@pytest.mark.parametrize(
    "model_type, names, target, expected",
    [
        ("bert", ["encoder.layer.0.x.weight"], "bert.encoder.layer.0.x.weight", "encoder.layer.0.x.weight"),
        ("bert", ["bert.encoder.layer.0.x.weight"], "encoder.layer.0.x.weight", "bert.encoder.layer.0.x.weight"),
        ("xlm-roberta", ["encoder.layer.0.x.weight"], "roberta.encoder.layer.0.x.weight", "encoder.layer.0.x.weight"),
        ("gpt2", ["h.0.attn.c_attn.weight"], "transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("other", ["wrap.layers.0.x.weight"], "layers.0.x.weight", "wrap.layers.0.x.weight"),  # a unique suffix
        ("other", ["a.layers.0.x.weight", "b.layers.0.x.weight"], "layers.0.x.weight", None),  # not unique
        ("other", ["layers.0.x.weight"], "wrap.layers.0.x.weight", "layers.0.x.weight"),
        ("llama", ["model.layers.1.x.weight"], "model.layers.11.x.weight", None),
        ("roberta", ["dense.weight"], "classifier.dense.weight", None),
    ],
)
def test_finding_names(model_type: str, names: list[str], target: str, expected: str | None) -> None:
    assert Names(names, model_type).find(target) == expected


# guards, each with its message


def test_keys_that_match_nothing(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "d", {**pair("model.layers.7.self_attn.q_proj", 6, 4), **pair("gpt.block", 4, 4)})
    with pytest.raises(DeltaError, match=r"expected parameters of the base, found nothing matches: .*q_proj.weight.*acme/base-1"):
        merged_view(base_of(LLAMA), [load_delta(source)])


def test_partial_match_lists_the_lost_and_the_nearest(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "d", {**pair(Q, 6, 4), **pair("model.layers.1.self_attn.q_proj", 6, 4)})
    message = (
        rf"found 1 of 2 keys match nothing: model.layers.1.self_attn.q_proj.weight; nearest to .*: {Q}.weight.*use the base it was trained on, acme/base-1"
    )
    with pytest.raises(DeltaError, match=message):
        merged_view(base_of(LLAMA), [load_delta(source)])


def test_shape_of_another_base(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "d", pair(Q, 8, 5))
    with pytest.raises(
        DeltaError, match=r"q_proj.weight: expected a base tensor of shape \[8, 5\], found \[6, 4\] in the base: the adapter is for another base; use the base"
    ):
        merged_view(base_of(LLAMA), [load_delta(source)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values(value: float, tmp_path: Path) -> None:
    tensors = pair(Q, 6, 4)
    tensors[f"{ROOT}{Q}.lora_B.weight"][4, 1] = value
    with pytest.raises(DeltaError, match=r"lora_B.weight: expected finite numbers, found 1 NaN or infinite from row 0; train the adapter again"):
        load_delta(write_adapter(tmp_path / "d", tensors))


def test_half_a_pair(tmp_path: Path) -> None:
    tensors = pair(Q, 6, 4)
    del tensors[f"{ROOT}{Q}.lora_B.weight"]
    with pytest.raises(DeltaError, match=f"{Q}: expected lora_A and lora_B, found no lora_B; save the adapter again"):
        load_delta(write_adapter(tmp_path / "d", tensors))


REFUSED: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "rank 0 in the weights": (pair(Q, 6, 4, rank=0), {}, r"expected a rank of at least 1, found A \[0, 4\], B \[6, 0\]; gather sharded weights"),
    "rank 0 in the config": (pair(Q, 6, 4), {"r": 0}, "found r 0 in adapter_config.json"),
    "rank of another run": (pair(Q, 6, 4), {"r": 8}, "expected rank 8 as adapter_config.json says, found rank 2 in the weights"),
    "halves of two ranks": (
        {f"{ROOT}{Q}.lora_A.weight": f32(2, 4), f"{ROOT}{Q}.lora_B.weight": f32(6, 3)},
        {},
        r"expected one rank in A and B, found A \[2, 4\], B \[6, 3\]",
    ),
    "convolution": ({f"{ROOT}c.lora_A.weight": f32(2, 4, 3, 3), f"{ROOT}c.lora_B.weight": f32(6, 2, 1, 1)}, {}, "convolutions are not built yet"),
    "no tensors": ({}, {}, "found none: the file holds no tensors"),
    "dora without magnitudes": (
        pair(Q, 6, 4),
        {"use_dora": True},
        "expected magnitudes where use_dora is set, found use_dora set, and no lora_magnitude_vector",
    ),
    "dora weights": ({**pair(Q, 6, 4), f"{ROOT}{Q}.lora_magnitude_vector": f32(6)}, {}, "found DoRA magnitudes, and use_dora not set"),
    "dora of another length": (
        {**pair(Q, 6, 4), f"{ROOT}{Q}.lora_magnitude_vector": f32(5)},
        {"use_dora": True},
        r"expected a lora_magnitude_vector of shape \[6\], found \[5\]",
    ),
    "dora with lora_bias": (pair(Q, 6, 4), {"use_dora": True, "lora_bias": True}, "expected DoRA without lora_bias"),
    "dora on a tied head": (
        {**pair("lm_head", 6, 4), f"{ROOT}lm_head.lora_magnitude_vector": f32(6)},
        {"use_dora": True, "ensure_weight_tying": True},
        "expected DoRA on layers other than a tied embedding or head, found lm_head, with ensure_weight_tying; leave these modules out",
    ),
    "qalora": (pair(Q, 6, 4), {"use_qalora": True}, "expected a plain LoRA, found QALoRA: use_qalora is set; merge this adapter with PEFT"),
    "trainable tokens": (
        pair(Q, 6, 4),
        {"trainable_token_indices": [1]},
        "expected trainable_tokens_delta, as trainable_token_indices says, found no such rows",
    ),
    "activated": (pair(Q, 6, 4), {"alora_invocation_tokens": [1]}, "activated LoRA"),
    "pissa": (pair(Q, 6, 4), {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changed the base; save it again with save_pretrained"),
    "another kind": (pair(Q, 6, 4), {"peft_type": "HIRA"}, "expected a delta of kind LORA, .*, found HIRA; merge it with PEFT.*: HIRA is not built"),
    "a tensor of neither": (
        {**pair(Q, 6, 4), f"{ROOT}surprise.weight": f32(2, 2)},
        {},
        "surprise.weight: expected lora factors, or a module that modules_to_save names",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSED[case]
    source = write_adapter(tmp_path / "d", tensors, **config)
    with pytest.raises(DeltaError, match=message) as caught:
        load_delta(source)
    assert "\n" not in str(caught.value)


def test_replaced_modules_need_weight_one(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "d", {**pair(Q, 6, 4), f"{ROOT}model.norm.weight": f32(4)}, modules_to_save=["norm"])
    with pytest.raises(
        DeltaError, match=r"model.norm.weight: expected weight 1.0 for a module that is replaced or added whole, found 0.5; give this delta weight 1.0"
    ):
        merged_view(base_of(LLAMA), [load_delta(source, weight=0.5)])
    with pytest.raises(DeltaError, match=r"model.norm.weight: expected one delta that replaces it, found .* and .*; keep the module in one"):
        merged_view(base_of(LLAMA), [load_delta(source), load_delta(source)])


FOLDERS: dict[str, tuple[dict[str, str], list[str], str]] = {
    "no config": ({}, ["adapter_config.json"], "expected an adapter folder with adapter_config.json, a delta.safetensors, or a checkpoint, found none"),
    "bad config": ({"adapter_config.json": "{"}, [], "expected the adapter's config in JSON"),
    "no weights": ({}, ["adapter_model.safetensors"], "expected adapter_model.safetensors, found none"),
    "pickle": (
        {"adapter_model.bin": "x"},
        ["adapter_model.safetensors"],
        "adapter_model.bin: expected adapter_model.safetensors, found a pickle.*refused; convert it in a sandbox",
    ),
    "truncated": ({"adapter_model.safetensors": "x"}, [], "expected a whole safetensors file, found 1 bytes"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folder(case: str, tmp_path: Path) -> None:
    written, removed, message = FOLDERS[case]
    source = write_adapter(tmp_path / "d", pair(Q, 6, 4))
    for name, content in written.items():
        (tmp_path / "d" / name).write_text(content)
    for name in removed:
        (tmp_path / "d" / name).unlink()
    with pytest.raises(DeltaError, match=message):
        load_delta(source)


def test_missing_folder_and_bad_weight(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=r"no-such-adapter: .*found no such path"):
        load_delta("no-such-adapter", relative_to=tmp_path)
    write_adapter(tmp_path / "d", pair(Q, 6, 4))
    assert load_delta("d", relative_to=tmp_path).weight == 1.0
    with pytest.raises(DeltaError, match=r"expected a finite weight, found nan; correct deltas.weight"):
        load_delta("d", weight=float("nan"), relative_to=tmp_path)


def test_unknown_combine_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"combine: expected one of linear, .*, found 'tise'; did you mean 'ties'"):
        merged_view(base_of(LLAMA), [load_delta(write_adapter(tmp_path / "d", pair(Q, 6, 4)))], "tise")
    assert linear(np.ones((1, 2), np.float32), [(2.0, np.ones((1, 2), np.float32))]).tolist() == [[3, 3]]


def test_another_base_by_digest(tmp_path: Path) -> None:
    from dataclasses import replace

    delta = replace(load_delta(write_adapter(tmp_path / "d", pair(Q, 6, 4))), base_digest="c" * 64)
    with pytest.raises(DeltaError, match="expected the base it was made from, cccccccccccc, found bbbbbbbbbbbb; compile it with the base it names"):
        merged_view(base_of(LLAMA), [delta])


def test_adapter_of_a_shallower_base(tmp_path: Path) -> None:
    """By name and shape an adapter of one layer fits a base of two; that it says "every q_proj" gives it away."""
    two = {**LLAMA, "model.layers.1.self_attn.q_proj.weight": f32(6, 4)}
    source = write_adapter(tmp_path / "d", pair(Q, 6, 4), target_modules=["q_proj"])
    message = (
        r"model.layers.\*.self_attn.q_proj.weight: expected all 2 layers of the base, .* found 1 adapted, 1 not: the adapter is for a base of another depth"
    )
    with pytest.raises(DeltaError, match=message):
        merged_view(base_of(two), [load_delta(source)])
    merged_view(base_of(LLAMA), [load_delta(source)])
    for choice in ({"layers_to_transform": [0]}, {"target_modules": r".*\.0\..*q_proj"}, {"target_modules": ["layers.0.self_attn.q_proj"]}):
        merged_view(base_of(two), [load_delta(write_adapter(tmp_path / "chosen", pair(Q, 6, 4), **{"target_modules": ["q_proj"], **choice}))])


def test_embedding_under_a_mask_head_is_refused(tmp_path: Path) -> None:
    module = f"{ROOT}bert.embeddings.word_embeddings"
    factors = {f"{module}.lora_embedding_A": f32(2, 9), f"{module}.lora_embedding_B": f32(4, 2)}
    base = base_of({"bert.embeddings.word_embeddings.weight": f32(9, 4)}, model_type="bert", architectures=["BertForMaskedLM"])
    with pytest.raises(DeltaError, match="which this base ties to its mask head; set task_type"):
        merged_view(base, [load_delta(write_adapter(tmp_path / "d", factors))])
    merged_view(base, [load_delta(write_adapter(tmp_path / "d", factors, task_type="FEATURE_EXTRACTION"))])


# the guards of a base that is not the delta's own


def made_from(folder: Path, digest: str) -> str:
    """An adapter that says which base it was made from, in the metadata of its weights."""
    package = pytest.importorskip("safetensors.numpy")
    source = write_adapter(folder, pair(Q, 6, 4))
    package.save_file(pair(Q, 6, 4), folder / "adapter_model.safetensors", {"base_digest": digest})
    return source


def test_a_base_is_accepted_by_its_digest_only_and_recorded(tmp_path: Path) -> None:
    source, base = made_from(tmp_path / "d", "c" * 64), base_of(LLAMA)
    with pytest.raises(DeltaError, match=f"found bbbbbbbbbbbb; compile it with the base it names; to accept .* write accept_base: {'b' * 64}"):
        plan_merge(base, [load_delta(source)])
    with pytest.raises(DeltaError, match=f"expected the base that accept_base names, {'a' * 64}, found {'b' * 64}; name the digest of the base"):
        plan_merge(base, [load_delta(source, accept_base="a" * 64)])
    record = plan_merge(base, [load_delta(source, accept_base="b" * 64)]).record()
    assert (record["deltas"][0]["made_from"], record["deltas"][0]["accepted_base"]) == ("c" * 64, "b" * 64)
    assert record["notes"] == [f"{source} was made from base {'c' * 64}; accept_base names {'b' * 64} in its place"]


def test_accept_base_pins_a_base_that_needs_no_override(tmp_path: Path) -> None:
    """A delta of that very base, and one that names none: merged, and no override recorded."""
    for source in (made_from(tmp_path / "own", "b" * 64), write_adapter(tmp_path / "silent", pair(Q, 6, 4))):
        record = plan_merge(base_of(LLAMA), [load_delta(source, accept_base="b" * 64)]).record()
        assert record["deltas"][0]["accepted_base"] is None and not record["notes"]
    with pytest.raises(DeltaError, match="the base that accept_base names"):
        plan_merge(base_of(LLAMA), [load_delta(str(tmp_path / "silent"), accept_base="a" * 64)])


def test_a_merge_that_overflows_its_type_leaves_nothing(tmp_path: Path) -> None:
    """float16 ends at 65504: the sum is finite in float32 and would become infinite when it is stored."""
    from compiler.checkpoints.write import write_checkpoint
    from compiler.errors import OutputError

    big = {name: array * np.float32(1e3) for name, array in pair(Q, 6, 4).items()}
    merged = merged_view(base_of(LLAMA), [load_delta(write_adapter(tmp_path / "d", big))])
    with pytest.raises(OutputError, match=rf"{Q}.weight: expected values that fit F16, found .*, which becomes infinite; write it as fp32 or bf16"):
        write_checkpoint(merged, tmp_path / "out", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
