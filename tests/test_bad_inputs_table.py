"""Bad inputs by kind, each with the code it must be told with: one line, exit code by contract, no traceback, nothing left, no socket, no process.

The numbers are those of the project's list of sixty (its kinds: pickles, safetensors, shards, adapters, configs, tokenizers, files, GGUF, bundles, recipes,
targets, data); ONNX files are in tests/runtimes/test_external.py, chat templates in tests/runtimes/test_trial.py. What has no part here yet (archives, servers,
converting pickles) has no row.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WATCHED = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
SECONDS = 5.0
seen: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is not None and event in WATCHED:
        seen.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_audit)


class Evil:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("marker"),)


@pytest.fixture
def here(tiny_llama: Path, tiny_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a delta and a recipe that may be harmed; it is the working directory."""
    place = tmp_path / "here"
    place.mkdir()
    shutil.copytree(tiny_llama, place / "base")
    shutil.copytree(tiny_lora, place / "delta")
    recipe = "name: x\nbase: base\ntargets: [{profile: here, limits: {size_mb: 5}}]\n"
    (place / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(place)
    return place


BASE, WEIGHTS, CONFIG = Path("base"), Path("base/model.safetensors"), Path("base/config.json")
EXPORT = ["export", "base", "--scheme", "int4-g32", "--out", "out"]
MERGE = ["merge", "base", "--delta", "delta", "--out", "out"]
PLAN = ["plan", "recipe.yaml"]


def header(change: Callable[[dict[str, Any]], Any], data: bytes | None = None, path: Path = WEIGHTS) -> None:
    """Rewrite the header of a safetensors file; `change` edits it in place or returns the new text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    told = json.loads(content[8 : 8 + length])
    text = change(told)
    text = text if isinstance(text, bytes) else json.dumps(told).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (content[8 + length :] if data is None else data))


def shift(told: dict[str, Any], by: int, which: int = 1) -> None:
    row = [row for name, row in told.items() if name != "__metadata__"][which]
    row["data_offsets"] = [offset + by for offset in row["data_offsets"]]


def first(told: dict[str, Any], **changes: Any) -> None:
    next(row for name, row in told.items() if name != "__metadata__").update(changes)


def poke(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data) : at % len(data) + len(content)] = content
    path.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def zipped() -> None:
    WEIGHTS.unlink()
    with zipfile.ZipFile("base/pytorch_model.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil()))


def renamed() -> None:
    WEIGHTS.write_bytes(pickle.dumps(Evil()) + bytes(100))


def sharded(change: Callable[[dict[str, str]], Any]) -> None:
    """One shard and its index, the index changed."""
    names = [name for name in json.loads(WEIGHTS.read_bytes()[8 : 8 + int.from_bytes(WEIGHTS.read_bytes()[:8], "little")]) if name != "__metadata__"]
    index = dict.fromkeys(names, "model-1.safetensors")
    WEIGHTS.rename(BASE / "model-1.safetensors")
    change(index)
    (BASE / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def nan_weights(value: float) -> None:
    poke(WEIGHTS, -400, struct.pack("<f", value))


def links(name: str, target: str) -> None:
    (BASE / name).unlink(missing_ok=True)
    (BASE / name).symlink_to(target)


def pipe() -> None:
    WEIGHTS.unlink()
    os.mkfifo(WEIGHTS)
    (BASE / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((BASE / "tokenizer.json").read_text())
    change(told)
    (BASE / "tokenizer.json").write_text(json.dumps(told))


def gguf(tensors: int = 0, values: int = 0, body: bytes = b"") -> None:
    Path("model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + body)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape) + struct.pack("<IQ", 0, offset)


def recipe(content: str) -> None:
    Path("recipe.yaml").write_text(content)


def recipe_with(more: str) -> None:
    recipe(f"name: x\nbase: base\n{more}\n")


def data_file(content: bytes) -> None:
    Path("rows.jsonl").write_bytes(content)
    recipe_with("evaluate: {data: rows.jsonl}")


def own_delta(change: Callable[[dict[str, Any]], None]) -> None:
    """A sparse delta of our own format, changed."""
    import numpy as np
    from safetensors.numpy import save_file

    name = "model.layers.0.self_attn.q_proj.weight"
    parts = {"indices": np.array([1, 5, 9], np.int64), "values": np.ones(3, np.float32)}
    change(parts)
    metadata = {"format": "trimtab-delta", "version": "1", "kind": "sparse", "shapes": json.dumps({name: [96, 96]})}
    shutil.rmtree("delta")
    save_file({f"{name}.{key}": value for key, value in parts.items()}, "delta.safetensors", metadata)


OWN = ["merge", "base", "--delta", "delta.safetensors", "--out", "out"]
GGUF = ["inspect", "model.gguf"]
ONE_KEY = text("general.alignment") + struct.pack("<II", 4, 3)

# number of the list: (code, exit code, what harms the inputs, arguments)
CASES: dict[str, tuple[str, int, Callable[[], Any], list[str]]] = {
    "1 pickle": ("PICKLE_REFUSED", 1, lambda: (WEIGHTS.unlink(), (BASE / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))), EXPORT),
    "2 pickle renamed": ("MAGIC_MISMATCH", 1, renamed, EXPORT),
    "3 pickle in an archive": ("PICKLE_REFUSED", 1, zipped, EXPORT),
    "6 no fallback": ("ST_HEADER_LENGTH", 1, lambda: (poke(WEIGHTS, 0, b"\xff" * 8), (BASE / "pytorch_model.bin").write_bytes(b"x")), EXPORT),
    "8 seven bytes": ("ST_HEADER_SMALL", 1, lambda: WEIGHTS.write_bytes(b"1234567"), EXPORT),
    "8 empty": ("ST_HEADER_SMALL", 1, lambda: WEIGHTS.write_bytes(b""), EXPORT),
    "9 long header": ("ST_HEADER_LENGTH", 1, lambda: poke(WEIGHTS, 0, struct.pack("<Q", 10**7)), EXPORT),
    "9 endless header": ("ST_HEADER_LENGTH", 1, lambda: poke(WEIGHTS, 0, struct.pack("<Q", 2**63)), EXPORT),
    "10 a million tensors": ("LIMIT_TENSORS", 1, lambda: header(lambda _: b"{" + b'"data_offsets"' * 300_000), EXPORT),
    "11 bad UTF-8": ("ST_HEADER_JSON", 1, lambda: poke(WEIGHTS, 12, b"\xff\xfe"), EXPORT),
    "11 no object": ("ST_HEADER_JSON", 1, lambda: header(lambda _: b"[1]"), EXPORT),
    "11 more after it": ("ST_HEADER_JSON", 1, lambda: header(lambda told: json.dumps(told).encode() + b"x"), EXPORT),
    "12 twice": ("ST_DUPLICATE", 1, lambda: header(lambda _: b'{"a": {}, "a": {}}'), EXPORT),
    "13 overlap": ("ST_OVERLAP", 1, lambda: header(lambda told: shift(told, -4)), EXPORT),
    "14 hole": ("ST_NOT_COVERED", 1, lambda: header(lambda told: shift(told, 4)), EXPORT),
    "14 polyglot": ("ST_NOT_COVERED", 1, lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes() + b"PK\x05\x06" + bytes(18)), EXPORT),
    "15 shape": ("ST_SHAPE", 1, lambda: header(lambda told: first(told, shape=[3, 5])), EXPORT),
    "15 shape beyond 2^64": ("ST_SHAPE", 1, lambda: header(lambda told: first(told, shape=[2**40, 2**40])), EXPORT),
    "15 shape of fractions": ("ST_HEADER_JSON", 1, lambda: header(lambda told: first(told, shape=[1.5, 2])), EXPORT),
    "15 type": ("ST_DTYPE", 1, lambda: header(lambda told: first(told, dtype="F8_E5M2")), EXPORT),
    "16 NaN": ("WEIGHT_NONFINITE", 1, lambda: nan_weights(float("nan")), EXPORT),
    "16 infinity": ("WEIGHT_NONFINITE", 1, lambda: nan_weights(float("inf")), EXPORT),
    "17 cut by a byte": ("ST_TRUNCATED", 1, lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-1]), EXPORT),
    "18 no shard": ("INDEX_PATH", 1, lambda: sharded(lambda index: index.update(more="model-2.safetensors")), EXPORT),
    "18 shard outside": ("INDEX_PATH", 1, lambda: sharded(lambda index: index.update(more="../x.safetensors")), EXPORT),
    "18 absolute shard": ("INDEX_PATH", 1, lambda: sharded(lambda index: index.update(more="/etc/passwd")), EXPORT),
    "19 tensor in none": ("INDEX_MISMATCH", 1, lambda: sharded(lambda index: index.update(more="model-1.safetensors")), EXPORT),
    "19 tensor not listed": ("INDEX_MISMATCH", 1, lambda: sharded(lambda index: index.popitem()), EXPORT),
    "21 another base": ("ADAPTER_BASE", 1, lambda: other_base(), MERGE),
    "22 rank 0": ("ADAPTER_SHAPE", 1, lambda: edit(Path("delta/adapter_config.json"), r=0), MERGE),
    "22 rank a billion": ("ADAPTER_SHAPE", 1, lambda: edit(Path("delta/adapter_config.json"), r=10**9), MERGE),
    "22 rank text": ("ADAPTER_SHAPE", 1, lambda: edit(Path("delta/adapter_config.json"), r="8"), MERGE),
    "23 alpha infinite": ("ADAPTER_SCALE", 1, lambda: edit(Path("delta/adapter_config.json"), lora_alpha=10**400), MERGE),
    "23 alpha text": ("ADAPTER_SCALE", 1, lambda: edit(Path("delta/adapter_config.json"), lora_alpha="high"), MERGE),
    "24 pattern for ever": ("REGEX_LIMIT", 1, lambda: edit(Path("delta/adapter_config.json"), rank_pattern={"(a+)+$": 4}), MERGE),
    "24 no pattern": ("REGEX_LIMIT", 1, lambda: edit(Path("delta/adapter_config.json"), rank_pattern={"(": 4}), MERGE),
    "24 pattern of itself": ("REGEX_LIMIT", 1, lambda: edit(Path("delta/adapter_config.json"), rank_pattern={r"(q)\2": 4}), MERGE),
    "24 pattern that looks back": ("REGEX_LIMIT", 1, lambda: edit(Path("delta/adapter_config.json"), rank_pattern={"(?<=a+)q": 4}), MERGE),
    "25 matches nothing": ("ADAPTER_UNMATCHED", 1, lambda: header(rename, path=Path("delta/adapter_model.safetensors")), MERGE),
    "26 index negative": ("SPARSE_INDEX", 1, lambda: own_delta(lambda parts: parts["indices"].put(0, -1)), OWN),
    "26 index beyond": ("SPARSE_INDEX", 1, lambda: own_delta(lambda parts: parts["indices"].put(2, 96 * 96)), OWN),
    "26 index twice": ("SPARSE_INDEX", 1, lambda: own_delta(lambda parts: parts["indices"].put(1, 1)), OWN),
    "27 values and indices": ("SPARSE_SHAPE", 1, lambda: own_delta(lambda parts: parts.update(values=parts["values"][:2])), OWN),
    "27 types": ("SPARSE_SHAPE", 1, lambda: own_delta(lambda parts: parts.update(values=parts["indices"].copy())), OWN),
    "28 overflow": ("MERGE_OVERFLOW", 1, lambda: poke(WEIGHTS, -400, struct.pack("<f", 1e30)), [*MERGE, "--dtype", "F16"]),
    "31 code by another name": ("CONFIG_KEY", 1, lambda: edit(CONFIG, _attn_implementation_internal="evil/x"), EXPORT),
    "31 trust": ("CONFIG_KEY", 1, lambda: edit(CONFIG, trust_remote_code=True), EXPORT),
    "31 kernel from a hub": ("CONFIG_KEY", 1, lambda: edit(CONFIG, attn_implementation="evil/kernel"), EXPORT),
    "32 a million layers": ("CHECKPOINT", 1, lambda: edit(CONFIG, num_hidden_layers=10**6), EXPORT),
    "33 depth": ("CONFIG_JSON", 1, lambda: CONFIG.write_text('{"a":' * 100_000), EXPORT),
    "33 twice": ("CONFIG_JSON", 1, lambda: CONFIG.write_text('{"model_type": "llama", "model_type": "gemma"}'), EXPORT),
    "33 NaN": ("CONFIG_JSON", 1, lambda: CONFIG.write_text('{"rope_theta": NaN}'), EXPORT),
    "37 id beyond": ("TOKENIZER_IDS", 1, lambda: tokenizer(lambda told: told["model"]["vocab"].update(zzz=10**6)), EXPORT),
    "37 id twice": ("TOKENIZER_IDS", 1, lambda: tokenizer(lambda told: told["model"]["vocab"].update(zzz=5)), EXPORT),
    "38 added tokens": ("TOKENIZER_LIMIT", 1, lambda: tokenizer(lambda told: told.update(added_tokens=[{}] * 100_001)), EXPORT),
    "39 link outside": ("FILE_LINK", 1, lambda: links("LICENSE", "/etc/hostname"), EXPORT),
    "39 pipe": ("INDEX_PATH", 1, pipe, EXPORT),
    "39 folder": ("FILE_KIND", 1, lambda: (WEIGHTS.unlink(), WEIGHTS.mkdir()), EXPORT),
    "41 tensors without end": ("GGUF_LIMIT", 1, lambda: gguf(tensors=2**64 - 1), GGUF),
    "41 values without end": ("GGUF_LIMIT", 1, lambda: gguf(values=2**64 - 1), GGUF),
    "41 text without end": ("GGUF_LIMIT", 1, lambda: gguf(values=1, body=struct.pack("<Q", 2**62)), GGUF),
    "42 shape": ("GGUF_SHAPE", 1, lambda: gguf(tensors=1, body=entry("a", (2**40, 2**40))), GGUF),
    "42 alignment": ("GGUF_ALIGN", 1, lambda: gguf(values=1, body=ONE_KEY), GGUF),
    "42 twice": ("GGUF_DUPLICATE", 1, lambda: gguf(values=2, body=ONE_KEY * 2), GGUF),
    "55 alias": ("YAML_UNSAFE", 2, lambda: recipe("name: &a x\nbase: *a\n"), PLAN),
    "55 tag": ("YAML_UNSAFE", 2, lambda: recipe("name: !!python/object/apply:os.system [touch marker]\n"), PLAN),
    "55 twice": ("YAML_UNSAFE", 2, lambda: recipe("name: x\nname: y\n"), PLAN),
    "55 depth": ("YAML_UNSAFE", 2, lambda: recipe("name: " + "[" * 10_000), PLAN),
    "56 key": ("RECIPE_KEY", 2, lambda: recipe_with("precison: int8"), PLAN),
    "57 NaN": ("RECIPE_VALUE", 2, lambda: recipe_with("targets: [{profile: here, limits: {size_mb: .nan}}]"), PLAN),
    "57 infinity": ("RECIPE_VALUE", 2, lambda: recipe_with("targets: [{profile: here, limits: {kl_mean: 1e999}}]"), PLAN),
    "58 memory 0": ("TARGET", 1, lambda: profile("memory_bytes: 0"), PLAN),
    "58 instruction set": ("TARGET", 1, lambda: profile("isa: [mmx9]"), PLAN),
    "59 empty": ("DATA_EMPTY", 2, lambda: data_file(b"\n"), PLAN),
    "59 no UTF-8": ("DATA_TEXT", 2, lambda: data_file(b'{"text": "\xff"}'), PLAN),
    "59 a line without end": ("DATA_TEXT", 2, lambda: data_file(b'{"text": "' + b"x" * (2 << 20) + b'"}'), PLAN),
    "59 no row": ("DATA_TEXT", 2, lambda: data_file(b'{"text": 3}'), PLAN),
}


def other_base() -> None:
    """The base's matrices get one column less than the adapter was trained for."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(WEIGHTS)
    save_file({name: value[:, :-1].copy() if name.endswith("q_proj.weight") else value for name, value in tensors.items()}, WEIGHTS)


def rename(told: dict[str, Any]) -> None:
    for name in [name for name in told if "layers.0" in name]:
        told[name.replace("layers.0", "layers.70")] = told.pop(name)


def profile(line: str) -> None:
    Path("machine.yaml").write_text(f"id: machine\n{line}\n")
    recipe("name: x\nbase: base\ntargets: [{profile: machine.yaml}]\n")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if "store" not in path.parts}


@pytest.fixture
def watched() -> Iterator[list[str]]:
    global seen
    seen = []
    yield seen
    seen = None


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, here: Path, trimtab: Any, watched: list[str]) -> None:
    code, exit_code, harm, arguments = CASES[case]
    harm()
    before, memory = tree(here), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()  # of the processor: a busy machine is no fault of the reader
    got, stdout, stderr = trimtab(*arguments, "--json")
    assert got == exit_code, stderr
    fault = json.loads(stdout)["error"]
    assert fault["code"] == code, stderr
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("trimtab: ") and lines[0].isprintable() and len(lines[0]) < 1500
    assert time.process_time() - started < SECONDS
    assert tree(here) == before and not watched
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 256 << 10  # kB


def test_codes_are_rows_of_the_table_and_every_row_is_used() -> None:
    """A code in the sources is in the table; a row that no source gives is a promise nobody keeps."""
    import ast

    from targets.codes import CODES

    given: set[str] = set()
    for folder in ("targets", "runtimes", "compiler"):
        for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
            if path.name != "codes.py":
                given |= {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(CODES) <= given, set(CODES) - given


def test_names_from_files_cannot_break_the_line() -> None:
    from targets.errors import TrimtabError

    error = TrimtabError("a\nb\x1b[31m", expected="x", found="\u202ey\u2028", remedy="z")
    assert str(error).isprintable() and "a\\nb\\x1b[31m" in str(error)
