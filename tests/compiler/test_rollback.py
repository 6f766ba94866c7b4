"""Merge, then roll back: the base's words, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.safetensors import STORED
from compiler.checkpoints.view import Checkpoint
from compiler.checkpoints.write import narrow
from compiler.deltas import rollback
from compiler.errors import CheckpointError, OutputError, TrimtabError
from compiler.progress import Progress

QUIET = Progress(quiet=True)
Q = "model.layers.0.self_attn.q_proj"
SHAPES = {"model.embed_tokens.weight": (10, 4), f"{Q}.weight": (6, 4), "model.layers.0.mlp.down_proj.weight": (4, 8), "model.norm.weight": (4,)}


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """name -> (dtype, words) as safetensors."""
    entries, data = {}, b""
    for name, (dtype, words) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(words.shape), "data_offsets": [len(data), len(data) + words.nbytes]}
        data += words.tobytes()
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_base(folder: Path, dtype: str, seed: int = 0, **config: Any) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(shape).astype("<f4") for name, shape in SHAPES.items()}
    tensors = {name: (dtype, narrow(block, dtype, name)) for name, block in values.items()}
    tensors["model.position_ids"] = ("I64", np.arange(2**53, 2**53 + 5, dtype="<i8"))  # no float32 holds these
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_lora(folder: Path, scale: float = 1.0, seed: int = 1, modules: tuple[str, ...] = (Q,), **config: Any) -> Path:
    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(seed), {}
    for module in modules:
        out, width = SHAPES[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = ("F32", rng.standard_normal((2, width)).astype("<f4"))
        tensors[f"base_model.model.{module}.lora_B.weight"] = ("F32", (scale * rng.standard_normal((out, 2))).astype("<f4"))
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
    return folder


def words(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, view in checkpoint.tensors.items():
        assert view.raw is not None
        found[name] = (view.dtype, view.shape, view.raw(0, view.row_count))
    return found


def merge(base: Path, deltas: list[Path], out: Path, mode: str = "auto", dtype: str | None = None, combine: Any = None) -> dict[str, Any]:
    from compiler.delta_tools import merge_reversibly
    from compiler.deltas.combine import combine_named
    from compiler.sources import DeltaSource, Mixture

    return merge_reversibly(Mixture(str(base), [DeltaSource(str(one)) for one in deltas], combine or combine_named("linear")), dtype, out, mode, QUIET)


def back(merged: Path, out: Path, record: Path | None = None, base: str | None = None) -> dict[str, Any]:
    from compiler.delta_tools import roll_back

    return roll_back(str(merged), record, base, out, QUIET)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
    method=st.sampled_from(["linear", "ties", "dare_linear"]),
    mode=st.sampled_from(["auto", "residual", "reference"]),
)
def test_base_comes_back_bit_for_bit(tmp_path: Path, dtype: str, scale: float, seed: int, method: str, mode: str) -> None:
    from compiler.deltas.combine import combine_named

    here = tmp_path / "case"
    shutil.rmtree(here, ignore_errors=True)
    base = write_base(here / "base", dtype, seed)
    deltas = [write_lora(here / "a", scale, seed + 1), write_lora(here / "b", scale, seed + 2, (Q, "model.layers.0.mlp.down_proj"))]
    merge(base, deltas, here / "merged", mode, combine=combine_named(method))
    back(here / "merged", here / "again")
    assert words(open_checkpoint(str(here / "again"))) == words(open_checkpoint(str(base)))
    if scale >= 1.0:
        assert words(open_checkpoint(str(here / "merged"))) != words(open_checkpoint(str(base)))


BITS = st.integers(0, 2**64 - 1)


@settings(max_examples=150, deadline=None)
@given(item=st.sampled_from([1, 2, 4, 8]), base=st.lists(BITS, min_size=0, max_size=50), edits=st.dictionaries(st.integers(0, 49), BITS, max_size=50))
def test_any_words_come_back(item: int, base: list[int], edits: dict[int, int]) -> None:
    """Also those of NaN payloads, signed zeros, infinities and subnormals: nothing is read as a number."""
    old = (np.array(base, np.uint64) & np.uint64(2 ** (8 * item) - 1)).astype(f"<u{item}")
    new = old.copy()
    for place, value in edits.items():
        if place < len(new):
            new[place] = value & (2 ** (8 * item) - 1)
    form, payload = rollback.encode(old.tobytes(), new.tobytes(), item)
    assert rollback.decode(form, payload, new.tobytes(), item, len(old)) == old.tobytes()
    assert (form == "same") == (old.tobytes() == new.tobytes())
    form, payload = rollback.encode(old.tobytes(), None, item)
    assert form == "words" and rollback.decode(form, payload, None, item, len(old)) == old.tobytes()


def test_the_smallest_form_is_chosen() -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal(4096).astype("<f4")
    few, slightly = old.copy(), old + np.float32(1e-6)
    few[7] = 3
    assert rollback.encode(old.tobytes(), few.tobytes(), 4) == ("sparse", np.array([7], "<u4").tobytes() + (old.view("<u4") ^ few.view("<u4"))[[7]].tobytes())
    form, payload = rollback.encode(old.tobytes(), slightly.tobytes(), 4)
    assert form == "xor" and len(payload) < old.nbytes / 2  # sign, exponent and leading bits agree


def test_blocks_smaller_than_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "ROW_BLOCK_BYTES", 40)
    base = write_base(tmp_path / "base", "BF16")
    merge(base, [write_lora(tmp_path / "a")], tmp_path / "merged")
    record = rollback.read_record(tmp_path / "merged" / rollback.RECORD)
    assert len(record["tensors"]["model.embed_tokens.weight"]["blocks"]) == 5
    again = rollback.restored(open_checkpoint(str(tmp_path / "merged")), tmp_path / "merged" / rollback.RECORD)
    old = open_checkpoint(str(base))
    for name, view in old.tensors.items():
        for start in range(view.row_count):
            for stop in range(start + 1, view.row_count + 1):
                assert again.tensors[name].raw(start, stop) == view.raw(start, stop)
                np.testing.assert_array_equal(again.tensors[name].rows(start, stop), view.rows(start, stop))


def test_other_dtype_untied_head_and_added_head(tmp_path: Path) -> None:
    """What a merge does beyond adding: it changes types, names, config and the list of tensors. All of it is undone."""
    base = write_base(tmp_path / "base", "F16", tie_word_embeddings=True)
    module = "base_model.model.lm_head"
    write_lora(tmp_path / "a")
    tensors = {f"{module}.lora_A.weight": ("F32", np.ones((2, 4), "<f4")), f"{module}.lora_B.weight": ("F32", np.ones((10, 2), "<f4"))}
    write(tmp_path / "a" / "adapter_model.safetensors", tensors)
    merge(base, [tmp_path / "a"], tmp_path / "merged", dtype="F32")
    merged = open_checkpoint(str(tmp_path / "merged"))
    assert "lm_head.weight" in merged.tensors and merged.config["tie_word_embeddings"] is False and merged.tensors["model.norm.weight"].dtype == "F32"
    back(tmp_path / "merged", tmp_path / "again")
    again = open_checkpoint(str(tmp_path / "again"))
    assert words(again) == words(open_checkpoint(str(base)))
    assert again.config["tie_word_embeddings"] is True and again.assets["tokenizer.json"] == b"{}"


def test_a_bare_encoder_with_a_new_head(tmp_path: Path) -> None:
    query = "encoder.layer.0.attention.self.query"
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "model.safetensors", {f"{query}.weight": ("F32", np.ones((4, 4), "<f4")), "pooler.dense.weight": ("F32", np.ones((4, 4), "<f4"))})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (tmp_path / "a").mkdir()
    stem = f"base_model.model.bert.{query}"
    head = {"base_model.model.classifier.weight": ("F32", np.ones((3, 4), "<f4")), "base_model.model.classifier.bias": ("F32", np.ones(3, "<f4"))}
    factors = {f"{stem}.lora_A.weight": ("F32", np.ones((2, 4), "<f4")), f"{stem}.lora_B.weight": ("F32", np.ones((4, 2), "<f4"))}
    write(tmp_path / "a" / "adapter_model.safetensors", {**factors, **head})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    assert f"bert.{query}.weight" in open_checkpoint(str(tmp_path / "merged")).tensors
    back(tmp_path / "merged", tmp_path / "again")
    again, old = open_checkpoint(str(tmp_path / "again")), open_checkpoint(str(tmp_path / "base"))
    assert words(again) == words(old) and again.config["architectures"] == ["BertModel"]


# guards


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = write_base(tmp_path / "base", "F32")
    merge(base, [write_lora(tmp_path / "a")], tmp_path / "merged", "residual")
    return tmp_path / "merged"


def altered(path: Path, place: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_record_is_plain_and_names_the_merge(merged: Path) -> None:
    record = json.loads((merged / "rollback.json").read_text())
    assert (record["format"], record["mode"]) == ("trimtab-rollback", "residual") and record["merge"]["deltas"][0]["kind"] == "lora"
    assert record["base"]["digest"] == open_checkpoint(str(merged.parent / "base")).digest
    assert 0 < record["residual_bytes"] < record["base_bytes"]
    assert [name for name, row in record["tensors"].items() if row["blocks"] != [["same", 0]]] == [f"{Q}.weight"]


def test_an_altered_checkpoint_is_refused_and_nothing_is_written(merged: Path, tmp_path: Path) -> None:
    altered(merged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected the base's words, sha256 .*, found others; roll back the very checkpoint"):
        back(merged, tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


def test_altered_residuals_are_refused(merged: Path, tmp_path: Path) -> None:
    altered(merged / "rollback.safetensors")
    with pytest.raises(CheckpointError, match=r"rollback.safetensors: expected the residuals rollback.json was written with, found another digest"):
        back(merged, tmp_path / "again")


def test_no_record_and_another_file(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: expected a rollback record of version 1, found format None"):
        back(merged, tmp_path / "again", merged / "config.json")
    (merged / "rollback.json").unlink()
    with pytest.raises(CheckpointError, match=r"rollback.json: expected a file that can be read"):
        back(merged, tmp_path / "again")


BROKEN = {"tensors": [], "config": 3, "residuals": "0" * 64}


@pytest.mark.parametrize("key", BROKEN)
def test_broken_records_are_told_in_one_line(key: str, merged: Path, tmp_path: Path) -> None:
    path = merged / "rollback.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: BROKEN[key]}))
    with pytest.raises(CheckpointError) as caught:
        back(merged, tmp_path / "again")
    assert "\n" not in str(caught.value) and "rollback" in str(caught.value)


def test_a_block_cut_short_is_told(merged: Path, tmp_path: Path) -> None:
    path = merged / "rollback.json"
    record = json.loads(path.read_text())
    record["tensors"][f"{Q}.weight"]["blocks"][0][1] -= 1
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"{Q}.weight: expected a whole rollback record"):
        back(merged, tmp_path / "again")


def test_reference_needs_the_very_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "F32")
    merge(base, [write_lora(tmp_path / "a")], tmp_path / "merged", "reference")
    assert not (tmp_path / "merged" / "rollback.safetensors").exists()
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="found no such path"):
        back(tmp_path / "merged", tmp_path / "again")
    back(tmp_path / "merged", tmp_path / "again", base=str(tmp_path / "moved"))
    assert words(open_checkpoint(str(tmp_path / "again"))) == words(open_checkpoint(str(tmp_path / "moved")))
    other = write_base(tmp_path / "other", "F32", seed=5)
    with pytest.raises(CheckpointError, match="found others"):
        back(tmp_path / "merged", tmp_path / "never", base=str(other))


def test_auto_refers_to_a_base_that_is_smaller_than_its_residuals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = write_base(tmp_path / "base", "F16")
    noise = {"model.norm.weight": ("F16", rng.integers(0, 0x7C00, 4096).astype("<u2"))}  # no two words alike: deflate cannot help
    write(base / "model.safetensors", noise)
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "adapter_model.safetensors", {"base_model.model.model.norm.weight": ("F32", rng.standard_normal(4096).astype("<f4"))})
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["norm"]}))
    result = merge(base, [tmp_path / "a"], tmp_path / "merged")
    assert result["rollback"] == "reference" and STORED["F16"].itemsize == 2


def test_merge_refuses_what_cannot_be_taken_back(tmp_path: Path) -> None:
    from compiler.checkpoints.view import TensorView

    computed = Checkpoint({"w": TensorView("w", (2, 2), "Q4_1", lambda start, stop: np.zeros((stop - start, 2), np.float32))}, {}, {}, "base.gguf", lambda: "")
    with pytest.raises(CheckpointError, match=r"base.gguf: w: expected a base whose words can be kept, found Q4_1, decoded; write the base as safetensors"):
        rollback.write_record(tmp_path, computed, computed, {"w": "w"}, {})
    with pytest.raises(TrimtabError, match="--rollback: expected one of auto, residual, reference, found 'zip'"):
        rollback.write_record(tmp_path, computed, computed, {"w": "w"}, {}, mode="zip")


def test_out_must_be_free(merged: Path) -> None:
    with pytest.raises(OutputError, match="expected a new or empty folder"):
        back(merged, merged)


def test_commands(merged: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from compiler.cli import cli

    run = CliRunner().invoke
    arguments = ["merge", str(tmp_path / "base"), "--delta", str(tmp_path / "a"), "--combine", "ties", "--density", "0.5", "--rollback", "--json"]
    result = run(cli, [*arguments, "--out", str(tmp_path / "m")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["rollback"] == "residual" and json.loads(result.output)["lineage"]["combine"] == "ties density=0.5"
    result = run(cli, ["delta", "rollback", str(tmp_path / "m"), "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert words(open_checkpoint(str(tmp_path / "again"))) == words(open_checkpoint(str(tmp_path / "base")))
