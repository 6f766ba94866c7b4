"""One fuzz target a loader: whatever the bytes, a TrimtabError with a code or a result, and nothing else.

Each target takes a good file and writes random bytes over, into or instead of it. TRIMTAB_FUZZ=5000 tries that many of each. The walk over graphs has a
target of its own in tests/runtimes/test_external.py.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoints.gguf_header import read_header as read_gguf
from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.safetensors import file_tensors
from compiler.checkpoints.strict import check_tokenizer, safe_config
from compiler.deltas.load import load_delta
from compiler.deltas.peft import by_pattern
from compiler.evaluation.data import load_rows
from compiler.recipe import load_recipe
from runtimes.bundle import open_bundle, verify_bundle
from runtimes.chat import render_chat
from targets.codes import CODES
from targets.errors import TrimtabError
from targets.profile import load_profile

EXAMPLES = int(os.environ.get("TRIMTAB_FUZZ", "50"))  # of each target


def tensors_file() -> bytes:
    head = json.dumps(
        {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}
    ).encode()
    return len(head).to_bytes(8, "little") + head + bytes(22)


def gguf_file() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    values = text("general.alignment") + struct.pack("<II", 4, 32) + text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    tensor = text("w") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + values + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


def read_tensors(path: Path) -> None:
    for view in file_tensors(path).values():
        view.read()


def read_adapter(path: Path) -> None:
    (path.parent / "adapter_model.safetensors").write_bytes(tensors_file())
    load_delta(str(path.parent))


def read_manifest(path: Path) -> None:
    for name in ("model.onnx", "genai_config.json", "tokenizer.json"):
        (path.parent / name).write_bytes(b"")
    open_bundle(path.parent)
    verify_bundle(path.parent)


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "rank_pattern": {"q.*": 3}, "base_model_name_or_path": "x"}
TOKENIZER = {"added_tokens": [{"id": 2, "content": "<s>"}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
MANIFEST = {"schema": 1, "name": "x", "model": {"kind": "decoder"}, "files": [{"path": "model.onnx", "sha256": "0" * 64, "bytes": 0}]}
TEMPLATE = "{% for m in messages %}{{ m['role'] | upper }}{{ m.content.split(' ')[0] ~ 'x' * 3 }}{% endfor %}{{ namespace(a=1).a }}"

# loader -> (file name, a good file, what reads it)
TARGETS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "safetensors": ("model.safetensors", tensors_file(), read_tensors),
    "gguf": ("model.gguf", gguf_file(), lambda path: (read_gguf(path), open_checkpoint(str(path)))),
    "config": ("config.json", b'{"model_type": "llama", "a": {"b": [1, 2.5, null]}}', lambda path: read_config(path)),
    "tokenizer": ("tokenizer.json", json.dumps(TOKENIZER).encode(), lambda path: check_tokenizer(path.read_bytes(), 3, "t")),
    "adapter": ("adapter_config.json", json.dumps(ADAPTER).encode(), read_adapter),
    "pattern": (
        "pattern",
        rb"model\.layers\.(\d+|x)\..*(q|v)_proj",
        lambda path: by_pattern({path.read_text("utf-8", "replace"): 1}, "model.layers.0.self_attn.q_proj", 0),
    ),
    "recipe": ("recipe.yaml", b"name: x\nbase: base\ntargets: [{profile: here, limits: {size_mb: 5}}]\n", load_recipe),
    "profile": ("machine.yaml", b"id: m\ncores: 2\nisa: [avx2]\nprovenance: {cores: {source: datasheet}}\n", lambda path: load_profile(str(path))),
    "rows": ("rows.jsonl", b'{"text": "a", "label": "b"}\n{"messages": [{"role": "user", "content": "a"}]}\n', lambda path: load_rows(path)),
    "template": ("chat.jinja", TEMPLATE.encode(), lambda path: render_chat(path.read_text("utf-8", "replace"), [{"role": "user", "content": "a b"}])),
    "manifest": ("manifest.json", json.dumps(MANIFEST).encode(), read_manifest),
}


def read_config(path: Path) -> None:
    from compiler.checkpoints.files import read_json

    safe_config(read_json(path, "the config"), "config.json")


@st.composite
def harmed(draw: st.DrawFn, good: bytes) -> bytes:
    """Random bytes; or the good file with some replaced, inserted, removed, doubled, or a number in it made large."""
    how = draw(st.sampled_from(["random", "replace", "insert", "cut", "double", "large"]))
    piece, at = draw(st.binary(max_size=12)), draw(st.integers(0, len(good)))
    if how == "random":
        return draw(st.binary(max_size=200))
    if how == "replace":
        return good[:at] + piece + good[at + len(piece) :]
    if how == "insert":
        return good[:at] + piece + good[at:]
    if how == "cut":
        return good[:at]
    if how == "double":
        end = draw(st.integers(at, len(good)))
        return good[:end] + good[at:end] + good[end:]
    return good[:at] + draw(st.sampled_from([b"\xff" * 8, b"99999999999999999999", b"-1", b"NaN", b"[[[[[[", b"null", b'"'])) + good[at:]


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str, tmp_path: Path) -> None:
    file, good, read = TARGETS[name]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(content=harmed(good))
    def check(content: bytes) -> None:
        (tmp_path / file).write_bytes(content)
        try:
            read(tmp_path / file)
        except TrimtabError as error:
            assert error.code in CODES and str(error).isprintable()

    check()
