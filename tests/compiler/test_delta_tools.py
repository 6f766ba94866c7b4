"""`trimtab delta inspect` and `diff`: what is in a delta, and the smallest one between two checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.safetensors import read_header
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.checkpoints.write import write_checkpoint
from compiler.cli import cli
from compiler.delta_tools import DiffOptions, diff_checkpoints, inspect_delta
from compiler.deltas import extract
from compiler.deltas import spectrum as spectrum_module
from compiler.deltas.load import load_delta
from compiler.deltas.spectrum import beyond, spectrum
from compiler.errors import DeltaError, OutputError
from compiler.progress import Progress
from compiler.stages.merge import merged_view

QUIET = Progress(quiet=True)
Q, DOWN, EMBED, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"


def f32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


LLAMA = {EMBED: f32(48, 32, seed=1), Q: f32(40, 32, seed=2), DOWN: f32(32, 56, seed=3), NORM: f32(32, seed=4), "lm_head.weight": f32(48, 32, seed=5)}


def low(n: int, m: int, rank: int, seed: int, size: float = 0.1) -> np.ndarray:
    return size * (f32(n, rank, seed=seed) @ f32(rank, m, seed=seed + 50))


def save(folder: Path, arrays: dict[str, np.ndarray], dtype: str | None = None, **config: Any) -> str:
    def view(name: str, array: np.ndarray) -> TensorView:
        return TensorView(name, array.shape, "F32", lambda start, stop: array[start:stop].copy())

    tensors = {name: view(name, array) for name, array in arrays.items()}
    settings_ = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **config}
    write_checkpoint(Checkpoint(tensors, settings_, {}, "made", lambda: ""), folder, dtype=dtype)
    return str(folder)


def diff(tmp_path: Path, old: str, new: str, **options: Any) -> dict[str, Any]:
    arguments = {"error": 1e-5, "most": 16, "form": None, **options}
    return diff_checkpoints(old, new, tmp_path / "delta", DiffOptions(**arguments), QUIET)


def merged_back(tmp_path: Path, old: str) -> Checkpoint:
    return merged_view(open_checkpoint(old), [load_delta(str(tmp_path / "delta"))])


def distance(found: np.ndarray, new: np.ndarray, old: np.ndarray) -> float:
    return float(np.linalg.norm(found - new) / np.linalg.norm(new - old))


# spectrum


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (200, 30), (5, 5), (1, 9)])
@pytest.mark.parametrize("most", [1, 4, 64])
def test_leading_values_are_those_of_the_exact_decomposition(shape: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum_module, "BLOCK_BYTES", 7 * 4 * shape[1])
    matrix = low(*shape, rank=3, seed=1) + 1e-4 * f32(*shape, seed=9)
    found = spectrum(lambda start, stop: matrix[start:stop], shape, most)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    count = min(most, 3, *shape)
    np.testing.assert_allclose(found.values[:count], exact[:count], rtol=1e-4)
    np.testing.assert_allclose(found.energy, np.sum(exact**2), rtol=1e-9)
    if most >= 3 and min(shape) > 3:
        kept = (found.left[:, :3] * found.values[:3]) @ found.right[:3]
        np.testing.assert_allclose(found.residual(3), np.linalg.norm(matrix - kept), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(2, 40), rank=st.integers(1, 6), most=st.integers(6, 12))
def test_true_rank_is_found(n: int, m: int, rank: int, most: int) -> None:
    rank = min(rank, n, m)
    basis = np.linalg.qr(f32(max(n, m), max(n, m), seed=n))[0]
    matrix = (basis[:n, :rank] @ np.diag(np.arange(1.0, rank + 1)) @ np.linalg.qr(f32(m, m, seed=m))[0][:rank]).astype(np.float32)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    expected = next(r for r in range(1, len(exact) + 1) if np.sqrt(np.sum(exact[r:] ** 2)) <= 1e-5 * np.linalg.norm(exact))
    assert spectrum(lambda start, stop: matrix[start:stop], (n, m), most).rank_within(1e-5 * float(np.linalg.norm(matrix)), most) == expected


# diff


def test_a_merged_lora_comes_back_with_its_rank(tmp_path: Path) -> None:
    new = {**LLAMA, Q: LLAMA[Q] + low(40, 32, 3, 10), DOWN: LLAMA[DOWN] + low(32, 56, 2, 11), EMBED: LLAMA[EMBED] + low(48, 32, 1, 12)}
    old = save(tmp_path / "old", LLAMA)
    result = diff(tmp_path, old, save(tmp_path / "new", new))
    assert result["form"] == "lora" and {row["tensor"]: row["rank"] for row in result["changes"]} == {Q: 3, DOWN: 2, EMBED: 1}
    assert result["error"] < 1e-5
    config = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and config["peft_type"] == "LORA"
    found = merged_back(tmp_path, old)
    for name in (Q, DOWN, EMBED):
        assert distance(found.tensors[name].read(), new[name], LLAMA[name]) < 1e-5
    np.testing.assert_array_equal(found.tensors[NORM].read(), LLAMA[NORM])


def test_conv1d_layout(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]; a square one tells whether factors were put the right way round."""
    arrays = {"h.0.attn.c_proj.weight": f32(24, 24, seed=1), "h.0.mlp.c_fc.weight": f32(24, 60, seed=2), "wpe.weight": f32(30, 24, seed=3)}
    new = {name: array + low(*array.shape, 2, 7) for name, array in arrays.items()}
    config = {"model_type": "gpt2", "architectures": ["GPT2Model"]}
    old = save(tmp_path / "old", arrays, **config)
    assert diff(tmp_path, old, save(tmp_path / "new", new, **config))["form"] == "lora"
    found = merged_back(tmp_path, old)
    for name, array in new.items():
        assert distance(found.tensors[name].read(), array, arrays[name]) < 1e-5


def test_vectors_and_full_rank_matrices_travel_whole_beside_low_ranks(tmp_path: Path) -> None:
    big = {**LLAMA, Q: f32(400, 300, seed=2), "model.layers.0.self_attn.q_proj.bias": f32(400, seed=6)}
    new = {name: array + (low(400, 300, 2, 10) if name == Q else f32(*array.shape, seed=8)) for name, array in big.items() if name != "lm_head.weight"}
    new["lm_head.weight"] = big["lm_head.weight"]
    old = save(tmp_path / "old", big)
    result = diff(tmp_path, old, save(tmp_path / "new", new))
    assert result["form"] == "lora" and {row["tensor"]: row["rank"] for row in result["changes"]}[Q] == 2
    found = merged_back(tmp_path, old)
    for name in (NORM, DOWN, EMBED, "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"):
        np.testing.assert_array_equal(found.tensors[name].read(), new[name])
    assert distance(found.tensors[Q].read(), new[Q], big[Q]) < 1e-5


def test_a_sparse_edit_is_found_as_sparse(tmp_path: Path) -> None:
    new = {name: array.copy() for name, array in LLAMA.items()}
    places = {Q: [3, 77, 1000], DOWN: [5, 1791], NORM: [31]}
    for name, flat in places.items():
        new[name].reshape(-1)[flat] += np.float32(0.5)
    old = save(tmp_path / "old", LLAMA)
    result = diff(tmp_path, old, save(tmp_path / "new", new))
    assert result["form"] == "sparse" and {row["tensor"]: row["changed"] for row in result["changes"]} == {name: len(flat) for name, flat in places.items()}
    spans, metadata = read_header(tmp_path / "delta" / "delta.safetensors")
    assert metadata["kind"] == "sparse" and metadata["base_digest"] == open_checkpoint(old).digest and spans[f"{Q}.indices"].dtype == "I32"
    assert json.loads(metadata["shapes"])[Q] == [40, 32]
    _reads_back(tmp_path, old, new)


def test_what_is_neither_is_a_difference(tmp_path: Path) -> None:
    new = {name: array + f32(*array.shape, seed=8) for name, array in LLAMA.items()}
    old = save(tmp_path / "old", LLAMA)
    result = diff(tmp_path, old, save(tmp_path / "new", new))
    assert result["form"] == "diff" and "lora_mb" not in result
    _reads_back(tmp_path, old, new)


def _reads_back(tmp_path: Path, old: str, new: dict[str, np.ndarray]) -> None:
    pytest.importorskip("compiler.deltas.sparse", reason="the readers of sparse and diff are not there")
    found = merged_back(tmp_path, old)
    for name, array in new.items():
        np.testing.assert_allclose(found.tensors[name].read(), array, rtol=2e-7, atol=1e-7)


def test_bfloat16_rounding_is_not_taken_for_noise(tmp_path: Path) -> None:
    """A small change of a 16-bit model is as large as its rounding: low rank cannot tell them apart, so the exact forms win."""
    new = {**LLAMA, Q: LLAMA[Q] + low(40, 32, 2, 10, size=0.002)}
    old = save(tmp_path / "old", LLAMA, "bf16")
    result = diff(tmp_path, old, save(tmp_path / "new", new, "bf16"))
    assert result["form"] in ("sparse", "diff")
    after = {name: view.read() for name, view in open_checkpoint(str(tmp_path / "new")).tensors.items()}
    _reads_back(tmp_path, old, after)


def test_an_added_head_is_stored_as_peft_does(tmp_path: Path) -> None:
    query = "encoder.layer.0.attention.self.query.weight"
    old = save(tmp_path / "old", {query: f32(40, 32), "pooler.dense.weight": f32(4, 4)}, model_type="bert", architectures=["BertModel"])
    head = {"classifier.weight": f32(3, 4), "classifier.bias": f32(3)}
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    tuned = {f"bert.{query}": f32(40, 32) + low(40, 32, 2, 3), "bert.pooler.dense.weight": f32(4, 4), **head}
    new = save(tmp_path / "new", tuned, model_type="bert", architectures=["BertForSequenceClassification"], **labels)
    assert diff(tmp_path, old, new)["form"] == "lora"
    found = merged_back(tmp_path, old)
    assert set(found.tensors) == set(tuned) and found.config["id2label"]["2"] == "c"
    np.testing.assert_array_equal(found.tensors["classifier.bias"].read(), head["classifier.bias"])
    assert distance(found.tensors[f"bert.{query}"].read(), tuned[f"bert.{query}"], f32(40, 32)) < 1e-5


REFUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "nothing differs": (LLAMA, "expected a checkpoint that differs from .*, found the same values in every tensor"),
    "a tensor gone": ({name: one for name, one in LLAMA.items() if name != NORM}, r"found no model.norm.weight \(1 missing\); a delta cannot remove"),
    "another shape": ({**LLAMA, EMBED: f32(50, 32)}, r"embed_tokens.weight: expected shape \[48, 32\] as in the base, found \[50, 32\]"),
    "not finite": ({**LLAMA, NORM: np.full(32, np.nan, "<f4")}, "model.norm.weight: expected finite numbers in both checkpoints"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    new, message = REFUSED[case]
    with pytest.raises(DeltaError, match=message):
        diff(tmp_path, save(tmp_path / "old", LLAMA), save(tmp_path / "new", new))
    assert not (tmp_path / "delta").exists()


def test_a_form_that_cannot_hold_it(tmp_path: Path) -> None:
    new = {**LLAMA, Q: LLAMA[Q] + f32(40, 32, seed=8)}
    with pytest.raises(DeltaError, match="expected differences that lora can hold, found no matrix of rank 16 or less; leave --form out"):
        diff(tmp_path, save(tmp_path / "old", LLAMA), save(tmp_path / "new", new), form="lora")


# inspect


def adapter(tmp_path: Path) -> tuple[str, str]:
    """(folder of a LoRA of ranks 3 and 1 with a saved norm, its base)."""
    new = {**LLAMA, Q: LLAMA[Q] + low(40, 32, 3, 10), DOWN: LLAMA[DOWN] + low(32, 56, 1, 11), NORM: LLAMA[NORM] + 1}
    old = save(tmp_path / "old", LLAMA)
    diff(tmp_path, old, save(tmp_path / "new", new), form="lora")
    return str(tmp_path / "delta"), old


def test_inspect_against_numpy(tmp_path: Path) -> None:
    path, old = adapter(tmp_path)
    found = inspect_delta(path, None, None)
    rows = {row["tensor"]: row for row in found["tensors"]}
    one, two = low(40, 32, 3, 10), low(32, 56, 1, 11)
    total = np.sum(one**2) + np.sum(two**2)
    assert (rows[Q]["rank"], rows[DOWN]["rank"], rows[NORM]["replaced"]) == (3, 1, True)
    np.testing.assert_allclose([rows[Q]["norm"], rows[Q]["energy"]], [np.linalg.norm(one), np.sum(one**2) / total], rtol=1e-4)
    layers = {row["layer"]: row for row in found["layers"]}
    np.testing.assert_allclose(layers["model.layers.1"]["energy"], np.sum(two**2) / total, rtol=1e-4)
    assert sum(row["energy"] for row in found["layers"]) == pytest.approx(1)
    against = {row["tensor"]: row for row in inspect_delta(path, old, None)["tensors"]}
    assert against[NORM]["norm"] == pytest.approx(np.sqrt(32), rel=1e-5) and not against[NORM]["replaced"]
    assert against[Q]["relative"] == pytest.approx(np.linalg.norm(one) / np.linalg.norm(LLAMA[Q]), rel=1e-4)
    json.dumps(found)


def test_inspect_prints_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, old = adapter(tmp_path)
    result = CliRunner().invoke(cli, ["delta", "inspect", path, "--base", old, "--plot", str(tmp_path / "energy.svg")])
    assert result.exit_code == 0, result.output
    assert "model.layers.0" in result.output and Q in result.output
    assert (tmp_path / "energy.svg").read_text().lstrip().startswith("<?xml")
    assert json.loads(CliRunner().invoke(cli, ["delta", "inspect", path, "--json"]).output)["kind"] == "lora"
    with pytest.raises(OutputError, match=r"expected a file ending in .svg, .png, .pdf, found '.txt'"):
        inspect_delta(path, None, tmp_path / "energy.txt")


def test_diff_command(tmp_path: Path) -> None:
    old, new = save(tmp_path / "old", LLAMA), save(tmp_path / "new", {**LLAMA, Q: LLAMA[Q] + low(40, 32, 3, 10)})
    result = CliRunner().invoke(cli, ["delta", "diff", old, new, "--out", str(tmp_path / "delta"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["form"] == "lora"


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_what_diff_writes(tmp_path: Path) -> None:
    torch, peft, transformers = pytest.importorskip("torch"), pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for number, module in enumerate(model.model.layers):
            weight = module.mlp.up_proj.weight
            weight += torch.from_numpy(low(*weight.shape, number + 1, number))
        model.model.embed_tokens.weight += torch.from_numpy(low(64, 24, 2, 5))
    model.save_pretrained(tmp_path / "new")
    assert diff(tmp_path, str(tmp_path / "old"), str(tmp_path / "new"))["form"] == "lora"
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "delta")).merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(theirs[name].numpy(), tensor.numpy(), atol=1e-5)


# kinds together


def write_lora(folder: Path, dora: bool = False) -> str:
    folder.mkdir()
    rng, stem = np.random.default_rng(7), f"base_model.model.{Q.removesuffix('.weight')}"
    tensors = {f"{stem}.lora_A.weight": rng.standard_normal((2, 32)).astype("<f4"), f"{stem}.lora_B.weight": rng.standard_normal((40, 2)).astype("<f4")}
    if dora:
        tensors[f"{stem}.lora_magnitude_vector"] = (np.linalg.norm(LLAMA[Q], axis=1) * 1.3).astype("<f4")
    pytest.importorskip("safetensors.numpy").save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": dora}))
    return str(folder)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "magnitude_prune"])
def test_mixed_kinds_combine_and_come_back(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA, DoRA (which looks at the base) and sparse in one mixture: as whole arrays, by small blocks, merged and rolled back."""
    from compiler.delta_tools import merge_reversibly, roll_back
    from compiler.deltas import mix
    from compiler.deltas.combine import combine_named
    from compiler.sources import DeltaSource, Mixture

    new = {**LLAMA, Q: LLAMA[Q].copy()}
    new[Q].reshape(-1)[[3, 700]] += 1
    old = save(tmp_path / "old", LLAMA)
    diff(tmp_path, old, save(tmp_path / "new", new))
    sources = [(write_lora(tmp_path / "lora"), 0.5), (write_lora(tmp_path / "dora", True), 0.8), (str(tmp_path / "delta"), 1.0)]
    base, deltas = open_checkpoint(old), [load_delta(path, weight=weight) for path, weight in sources]
    assert {delta.kind for delta in deltas} == {"lora", "dora", "sparse"}
    alone = [merged_view(base, [load_delta(path)]).tensors[Q].read() - LLAMA[Q] for path, _ in sources]
    combine, weights = combine_named(method), [weight for _, weight in sources]
    density, seed, prune = combine.density or 1.0, combine.seed or 0, combine.row.prune
    if prune == "magnitude":
        cut = [np.sort(np.abs(one).reshape(-1))[-int(density * one.size)] for one in alone]
        alone = [np.where(np.abs(one) >= least, one, 0) for one, least in zip(alone, cut, strict=True)]
    if prune == "random":
        stays = [mix.survivors((seed, Q, delta.digest), 0, one.size, density).reshape(one.shape) for one, delta in zip(alone, deltas, strict=True)]
        alone = [np.where(keep, one / np.float32(density), 0) for one, keep in zip(alone, stays, strict=True)]
    expected = LLAMA[Q] + (mix.elect(weights, alone) if combine.row.elect else mix.weighted_sum(weights, alone))
    monkeypatch.setattr(mix, "GRID_BYTES", 5 * 4 * 32)
    found = merged_view(base, deltas, combine).tensors[Q]
    parts = np.concatenate([found.rows(start, min(start + 7, 40)) for start in range(0, 40, 7)])
    wrong = ~np.isclose(parts, expected, rtol=1e-5, atol=1e-5)  # the differences of `alone` went through the base's rounding: a sign may fall the other way
    assert wrong.mean() <= 0.005
    merge_reversibly(Mixture(old, [DeltaSource(*one) for one in sources], combine), None, tmp_path / "merged", "residual", QUIET)
    roll_back(str(tmp_path / "merged"), None, None, tmp_path / "again", QUIET)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "old" / "model.safetensors").read_bytes()


def test_kinds_that_depend_on_the_base_ask_for_it(tmp_path: Path) -> None:
    old, path = save(tmp_path / "old", LLAMA), write_lora(tmp_path / "dora", True)
    with pytest.raises(DeltaError, match="expected a base beside it, found none, and the difference of a dora delta depends on it; add --base BASE"):
        inspect_delta(path, None, None)
    (row,) = inspect_delta(path, old, None)["tensors"]
    change = merged_view(open_checkpoint(old), [load_delta(path)]).tensors[Q].read() - LLAMA[Q]
    assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-4)


# the bound by a sample of rows, and ranks chosen for the error of outputs


@settings(max_examples=40, deadline=None)
@given(n=st.integers(70, 300), m=st.integers(20, 80), rank=st.integers(1, 8), most=st.integers(1, 8), noise=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
def test_a_sample_never_denies_what_the_whole_allows(n: int, m: int, rank: int, most: int, noise: float) -> None:
    matrix = low(n, m, rank, seed=n) + np.float32(noise) * f32(n, m, seed=m)
    left = float(np.sqrt(np.sum(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[most:] ** 2)))
    rows = lambda start, stop: matrix[start:stop]  # noqa: E731
    assert not beyond(rows, (n, m), most, 1.0001 * left + 1e-5 * float(np.linalg.norm(matrix)))
    if noise == 1.0 and n > 40 * most and m > 4 * most:
        assert beyond(rows, (n, m), most, 1e-3 * float(np.linalg.norm(matrix)))


@pytest.mark.parametrize("turned", [False, True])
def test_rank_and_factors_for_the_error_of_outputs(turned: bool, tmp_path: Path) -> None:
    """A change that is large only on inputs that never come: by outputs its rank is lower, and rank 1 keeps outputs better."""
    rms = np.where(np.arange(32) < 16, 1.0, 1e-2)
    change = low(40, 32, 1, seed=1)
    change[:, 16:] += 10 * low(40, 16, 2, seed=2)
    change[:, :16] += 1e-4 * f32(40, 16, seed=3)
    name, shown = ("transformer.h.0.attn.c_attn.weight", change.T) if turned else (Q, change)
    old = {name: f32(*shown.shape, seed=6)}
    family = {"model_type": "gpt2"} if turned else {}
    pair = [open_checkpoint(save(tmp_path / key, arrays, **family)) for key, arrays in (("a", old), ("b", {name: old[name] + shown}))]
    (plain,), (by_outputs,) = (extract.differences(*pair, 0.3, 8, None, weights) for weights in (None, {name: rms}))
    assert plain.rank is not None and by_outputs.rank is not None and by_outputs.rank < plain.rank
    error = {}
    for key, one in (("plain", replace(plain, rank=1)), ("outputs", replace(by_outputs, rank=1))):
        folder = tmp_path / key
        folder.mkdir()
        extract.write_delta(folder, "lora", [one], *pair)
        found = merged_view(pair[0], [load_delta(str(folder))]).tensors[name].read() - old[name]
        miss = (found - shown).T if turned else found - shown
        error[key] = float(np.linalg.norm(miss * rms) / np.linalg.norm(change * rms))
    assert error["outputs"] < 0.5 * error["plain"]


def test_input_rms_is_that_of_the_layers_inputs(tiny_llama: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    from compiler.activations import FLOOR, input_rms
    from compiler.evaluation.data import EvaluationSet, Row
    from compiler.reference import reference_model

    base, text = open_checkpoint(str(tiny_llama)), "the coolant pump of lathe 3 leaks again"
    found = input_rms(base, EvaluationSet((Row(text=text),), "", "here"), "text-generation")
    assert {name for name in base.tensors if name.endswith("_proj.weight")} <= set(found)
    model = reference_model(base, "text-generation")
    ids = torch.tensor([Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode(text, add_special_tokens=False).ids])
    inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))[0].double().numpy()
    expected = np.sqrt((inputs**2).mean(0))
    np.testing.assert_allclose(found[Q], np.maximum(expected, FLOOR * expected.max()), rtol=1e-5)


def test_diff_by_activations_end_to_end(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    base = open_checkpoint(str(tiny_llama))
    write_checkpoint(merged_view(base, [load_delta(str(tiny_lora))]), tmp_path / "new")
    found = diff(tmp_path, str(tiny_llama), str(tmp_path / "new"), activations="builtin", error=1e-4)
    assert found["form"] == "lora" and {row["rank"] for row in found["changes"]} == {4} and found["error"] <= 1e-4
