"""Signatures, releases and what an attacker or an old disk may hand back; bills of materials."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compiler import provenance
from compiler.errors import BundleError, TrimtabError
from compiler.signing import raise_state, release_files

TODAY = datetime.date(2026, 11, 22)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """As much of a bundle as signing looks at."""
    import hashlib

    folder = tmp_path / "out" / "tiny-here"
    folder.mkdir(parents=True)
    rows = []
    for name in ("genai_config.json", "model.onnx", "tokenizer.json"):
        (folder / name).write_bytes(name.encode())
        rows.append({"path": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "bytes": len(name)})
    lineage = {"base": {"origin": "acme/base", "digest": "a" * 64}, "recipe": {"name": "tiny"}, "tools": {"numpy": "2"}}
    lineage |= {"deltas": [{"origin": "adapter", "kind": "LORA", "weight": 1.0, "digest": "b" * 64}]}
    manifest = {"schema": 1, "name": "tiny", "model": {"kind": "decoder", "task": "text-generation", "family": "llama"}, "digest": "d" * 64, "files": rows}
    manifest |= {"lineage": lineage, "target": {"id": "here"}, "limits": {}, "records": [{"stage": "export", "key": "k"}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("model_signing.signing", reason="needs the extra `sign`")
    place = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", place / f"{name}.pem"], check=True)
        subprocess.run(["openssl", "ec", "-in", place / f"{name}.pem", "-pubout", "-out", place / f"{name}.pub"], check=True, capture_output=True)
    return {path.name: path for path in place.iterdir()}


@pytest.fixture
def signed(bundle: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    from compiler.signing import sign_bundle

    monkeypatch.setattr("runtimes.selftest.run_selftest", lambda _: [])
    sign_bundle(bundle, keys["ours.pem"], 3, "2027-06-30")
    return bundle


def code_of(act: Any) -> str:
    with pytest.raises(TrimtabError) as caught:
        act()
    assert str(caught.value).isprintable()
    return caught.value.code


def test_what_must_not_verify(signed: Path, keys: dict[str, Path]) -> None:
    """The negative paths first: a verifier that always says yes would pass the others."""
    from compiler.signing import verify_signed

    def verify(key: str = "ours.pub", today: datetime.date = TODAY) -> Any:
        return verify_signed(signed, keys[key], today)

    places = release_files(signed)
    assert code_of(lambda: verify("theirs.pub")) == "SIGNATURE"
    assert code_of(lambda: verify(today=datetime.date(2027, 7, 1))) == "EXPIRED"
    for path in (signed / "model.onnx", signed / "manifest.json", places["release"], places["signature"], places["release_signature"]):
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        assert code_of(verify) == "SIGNATURE", path.name
        path.write_bytes(whole)
    (signed / ".git").mkdir()
    (signed / ".git" / "hook").write_text("x")
    assert code_of(verify) == "SIGNATURE"
    shutil.rmtree(signed / ".git")
    places["release_signature"].rename(places["release_signature"].with_suffix(".away"))
    assert code_of(verify) == "SIGNATURE"
    places["release_signature"].with_suffix(".away").rename(places["release_signature"])
    release = verify()
    assert (release["version"], release["expires"], release["name"]) == (3, "2027-06-30", "tiny")


def test_another_bundles_release_is_refused(signed: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    from compiler.signing import sign_bundle, verify_signed

    other = shutil.copytree(signed, tmp_path / "other" / "tiny-here")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "limits": {"size_mb": 1}}))
    sign_bundle(other, keys["ours.pem"], 9)
    for name in ("release", "release_signature"):
        shutil.copy(release_files(other)[name], release_files(signed)[name])
    assert code_of(lambda: verify_signed(signed, keys["ours.pub"], TODAY)) == "SIGNATURE"


def test_a_key_that_is_none(bundle: Path, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.signing import sign_bundle

    monkeypatch.setattr("runtimes.selftest.run_selftest", lambda _: [])
    (tmp_path / "key.pem").write_text("no key")
    assert code_of(lambda: sign_bundle(bundle, tmp_path / "key.pem", 1)) == "ERROR"
    assert code_of(lambda: sign_bundle(bundle, keys["ours.pem"], 1, "tomorrow")) == "ERROR"


def test_releases_only_go_up(tmp_path: Path) -> None:
    state = tmp_path / "state" / "releases.json"
    for version in (2, 2, 5):
        raise_state(state, {"name": "tiny", "version": version}, tmp_path)
    with pytest.raises(BundleError) as caught:
        raise_state(state, {"name": "tiny", "version": 4}, tmp_path)
    assert caught.value.code == "ROLLBACK"
    raise_state(state, {"name": "other", "version": 1}, tmp_path)
    assert json.loads(state.read_text()) == {"other": 1, "tiny": 5} and len(list(state.parent.iterdir())) == 1


def test_a_bill_of_materials_says_what_is_verified_and_what_declared(bundle: Path) -> None:
    told = provenance.describe_bundle(bundle)
    bom, statement = told["bom"], told["provenance"]
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["hashes"][0]["content"] == "d" * 64
    assert {row["value"] for row in model["properties"]} == {"verified", "declared"}
    assert [row["hashes"][0]["content"] for row in bom["components"]] == ["a" * 64, "b" * 64]
    refs = {model["bom-ref"], *(row["bom-ref"] for row in bom["components"])}
    assert all({row["ref"], *row["dependsOn"]} <= refs for row in bom["dependencies"])
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1" and len(statement["subject"]) == 3
    assert set(statement["predicate"]) == {"buildDefinition", "runDetails"}
    assert [row["digest"]["sha256"] for row in statement["predicate"]["buildDefinition"]["resolvedDependencies"]] == ["a" * 64, "b" * 64]
    (bundle / "model.onnx").write_bytes(b"other")
    assert code_of(lambda: provenance.describe_bundle(bundle)) == "BUNDLE_DIGEST"
