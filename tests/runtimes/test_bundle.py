"""Bundles that are whole, and every way in which one is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import open_bundle, verify_bundle
from runtimes.session import SessionSettings, open_session
from targets.errors import BundleError


@pytest.fixture
def bundle(tmp_path: Path, write_manifest: Callable[..., Path]) -> Path:
    folder = tmp_path / "bundle"
    (folder / "extra").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "extra/notes.txt"):
        (folder / name).write_bytes(name.encode() * 3)
    return write_manifest(folder, kind="decoder")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_bundle(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert (opened.kind, opened.name, len(opened.files)) == ("decoder", "tiny", 5)
    assert opened.size_bytes == sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert opened.model_bytes == 3 * len("model.onnx" + "model.onnx.data")
    assert {entry.path for entry in verify_bundle(bundle)} == {entry.path for entry in opened.files}


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[7] ^= 1
    (folder / "model.onnx.data").write_bytes(data)


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes((folder / "model.onnx.data").read_bytes())
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to(outside)


def link_folder(folder: Path) -> None:
    (folder / "extra").rename(folder.parent / "extra")
    (folder / "extra").symlink_to(folder.parent / "extra")


def fifo(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def several(folder: Path) -> None:
    flip(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "planted.so").write_text("x")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (flip, "model.onnx.data is altered"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"short"), "model.onnx has 5 bytes, not 30"),
        (lambda folder: (folder / "planted.so").write_text("x"), "planted.so is not in the manifest"),
        (lambda folder: (folder / "extra" / "more").write_text("x"), "extra/more is not in the manifest"),
        (link_outside, "model.onnx.data is a link"),
        (link_folder, "extra/notes.txt is a link or lies behind one"),
        (fifo, "tokenizer.json is not a regular file"),
        (lambda folder: (folder / "loop").symlink_to(folder), "loop is not in the manifest"),
    ],
)
def test_verify_names_the_fault(bundle: Path, spoil: Callable[[Path], object], found: str) -> None:
    spoil(bundle)
    with pytest.raises(BundleError, match=found) as caught:
        verify_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_verify_tells_all_faults_at_once(bundle: Path) -> None:
    several(bundle)
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle)
    assert all(fault in str(caught.value) for fault in ("model.onnx.data is altered", "tokenizer.json is missing", "planted.so is not in the manifest"))


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "C:x", "", "./model.onnx", "a//b", "a\0b"])
def test_paths_that_leave_the_directory(bundle: Path, path: str) -> None:
    edit(bundle, lambda manifest: manifest["files"][0].update(path=path))
    for check in (open_bundle, verify_bundle):
        with pytest.raises(BundleError, match="expected a path inside the bundle"):
            check(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "schema: expected 1, found 2; open it with the version"),
        (lambda m: m["model"].update(kind="picture"), "model.kind: expected decoder or encoder, found 'picture'"),
        (lambda m: m.pop("model"), "model.kind: expected decoder or encoder, found None"),
        (lambda m: m.update(files=[]), "files: expected a list"),
        (lambda m: m["files"].append(dict(m["files"][0])), "expected each path once"),
        (lambda m: m["files"][0].update(bytes=-1), "expected a sha256 of 64 hex digits and a size"),
        (lambda m: m["files"][0].update(sha256="abc"), "expected a sha256"),
        (lambda m: m["files"].pop(2), "is not listed"),
    ],
)
def test_manifests_that_are_wrong(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 2000, "\xff"])
def test_manifests_that_are_no_json(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match="expected a JSON object"):
        open_bundle(bundle)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found no such directory; name the directory"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"expected a bundle: a directory with a manifest\.json, found none"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all" * 10])
def test_a_model_that_does_not_load_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="expected a model that onnxruntime loads") as caught:
        open_session(tmp_path / "model.onnx", SessionSettings(threads=1))
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="expected an ONNX file, found none"):
        open_session(tmp_path / "absent.onnx")
