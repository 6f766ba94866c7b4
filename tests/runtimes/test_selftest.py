"""Canaries: a sound bundle answers them, a changed tokenizer or weight does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtimes.bundle import open_bundle
from runtimes.selftest import FILE, TEXTS, make_selftest, run_selftest
from targets.errors import BundleError


@pytest.fixture
def bundle(tmp_path: Path, decoder: SimpleNamespace, write_manifest: Callable[..., Path]) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(decoder.directory, folder)
    (folder / FILE).write_text(json.dumps(make_selftest(open_bundle(folder))))
    return write_manifest(folder, kind="decoder")


def test_a_sound_bundle_answers_its_canaries(bundle: Path) -> None:
    assert [canary["text"] for canary in run_selftest(bundle)] == list(TEXTS)
    written = json.loads((bundle / FILE).read_text())
    assert written["atol"] > 0 and not {"noise", "spread"} & set(written["canaries"][0])


def test_damage_that_still_loads_is_found(bundle: Path, write_manifest: Callable[..., Path]) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    half = len(data) // 2
    data[half:] = bytes(len(data) - half)
    (bundle / "model.onnx.data").write_bytes(data)
    write_manifest(bundle, kind="decoder")  # the hashes agree: only the answers tell
    with pytest.raises(BundleError, match=r"is answered differently.*do not serve it"):
        run_selftest(bundle)


def test_another_tokenizer_is_found(bundle: Path, write_manifest: Callable[..., Path]) -> None:
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_manifest(bundle, kind="decoder")
    with pytest.raises(BundleError, match="is tokenized differently"):
        run_selftest(bundle)


def test_an_encoder_answers_too(encoder_bundle: Callable[..., Path], write_manifest: Callable[..., Path]) -> None:
    folder = encoder_bundle("sentence_embedding", pooled=True)
    (folder / FILE).write_text(json.dumps(make_selftest(open_bundle(folder))))
    assert len(run_selftest(write_manifest(folder, kind="encoder"))) == len(TEXTS)
    (folder / FILE).write_text("{}")
    with pytest.raises(BundleError, match="expected canaries and a tolerance"):
        run_selftest(write_manifest(folder, kind="encoder"))
