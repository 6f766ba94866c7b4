"""Who made a bundle, and which of two is the newer: detached signatures with OpenSSF model-signing, offline, by a pair of keys.

Three files beside a bundle `NAME`, so that its bytes stay what was measured:

NAME.sig           a signature over every file of the bundle, as `model_signing verify` reads it too
NAME.release.json  {"schema", "name", "digest", "manifest_sha256", "version", "expires"}: what a signature of the files alone cannot say
NAME.release.sig   the signature over that file

A verifier keeps `version` by name in a file of its own (`state`), and refuses a lower one, and a release beyond its date: else a bundle that was signed once,
and replaced for a reason, would stay valid for ever. Keys are elliptic (P-256, P-384, P-521), in PEM: `openssl ecparam -name prime256v1 -genkey -noout`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from compiler.errors import BundleError, OutputError, TrimtabError
from compiler.store import file_digest, locked, writing
from runtimes.bundle import MANIFEST, read_json_object, verify_bundle

SCHEMA = 1
INSTALL = "pip install 'trimtab[sign]'"
REMEDY = "do not deploy it; ask who built it for a signature with this key"


def sign_bundle(bundle: Path, key: Path, version: int, expires: str = "", password: str | None = None) -> dict[str, Any]:
    """Sign a bundle that is whole, and its release. expires: YYYY-MM-DD, "" for never. Raises BundleError, OutputError, TrimtabError for a key that is none."""
    from runtimes.selftest import run_selftest

    signing = _library("signing")
    last = _date(expires, "--expires")
    verify_bundle(bundle)
    run_selftest(bundle)
    manifest = read_json_object(bundle / MANIFEST)
    release = {"schema": SCHEMA, "name": manifest["name"], "digest": manifest["digest"], "manifest_sha256": file_digest(bundle / MANIFEST)}
    release |= {"version": version, "expires": last.isoformat() if last else None}
    places = release_files(bundle)
    with writing(bundle.parent):
        places["release"].write_text(json.dumps(release, indent=1, sort_keys=True) + "\n")
    for subject, signature in ((bundle, places["signature"]), (places["release"], places["release_signature"])):
        config = signing.Config()
        _guarded(partial(config.use_elliptic_key_signer, private_key=key, password=password), f"{key}", "a private key in PEM, elliptic", "ERROR")
        with writing(signature):
            config.set_hashing_config(_all_files()).sign(subject, signature)
    return {**release, **{name: str(place) for name, place in places.items()}}


def release_files(bundle: Path) -> dict[str, Path]:
    """Where signature, release and its signature lie."""
    names = {"signature": ".sig", "release": ".release.json", "release_signature": ".release.sig"}
    return {name: bundle.resolve().with_name(bundle.resolve().name + ending) for name, ending in names.items()}


def verify_signed(bundle: Path, key: Path, today: datetime.date | None = None) -> dict[str, Any]:
    """Signatures and date of a bundle; returns its release. Raises BundleError: SIGNATURE, EXPIRED (by this machine's clock, or `today`)."""
    places = release_files(bundle)
    for subject, signature in ((bundle, places["signature"]), (places["release"], places["release_signature"])):
        _check_signature(subject, signature, key)
    release = read_json_object(places["release"])
    if release.get("manifest_sha256") != file_digest(bundle / MANIFEST):
        raise BundleError(str(places["release"]), expected="the release of this bundle", found="that of another", remedy=REMEDY, code="SIGNATURE")
    now = today or datetime.datetime.now(datetime.UTC).date()
    last = _date(release.get("expires") or "", str(places["release"]))
    if last and now > last:
        remedy = "install a newer release, or correct this machine's clock"
        raise BundleError(
            str(bundle), expected=f"a release that is valid on {now} (this machine's clock)", found=f"until {last}", remedy=remedy, code="EXPIRED"
        )
    return dict(release)


def _check_signature(subject: Path, signature: Path, key: Path) -> None:
    verifying = _library("verifying")
    if not signature.is_file() or not subject.exists():
        raise BundleError(str(subject), expected=f"a signature in {signature.name}", found="none", remedy=REMEDY, code="SIGNATURE")
    config = verifying.Config()
    _guarded(lambda: config.use_elliptic_key_verifier(public_key=key), f"{key}", "a public key in PEM, elliptic", "ERROR")
    _guarded(lambda: config.set_hashing_config(_all_files()).verify(subject, signature), str(subject), f"what {signature.name} was made for", "SIGNATURE")


def raise_state(state: Path, release: Mapping[str, Any], bundle: Path) -> None:
    """Refuse a version below the highest seen of this name (BundleError, ROLLBACK), else remember it; under a lock, written beside and renamed.

    state  a file of the verifier: {name: highest version}
    """
    with writing(state):
        state.parent.mkdir(parents=True, exist_ok=True)
        with locked(state.parent):
            known = read_json_object(state) if state.exists() else {}
            name, version, highest = str(release["name"]), int(release["version"]), int(known.get(str(release["name"]), 0))
            if version < highest:
                remedy = "install the newest release; to go back on purpose, sign the old bundle again with a higher version"
                raise BundleError(str(bundle), expected=f"version {highest} or later of {name}", found=f"{version}", remedy=remedy, code="ROLLBACK")
            work = state.with_name(f".{state.name}.new")
            work.write_text(json.dumps({**known, name: version}, indent=1, sort_keys=True) + "\n")
            work.rename(state)


def _all_files() -> Any:
    """model-signing leaves out git's own files otherwise: a bundle has none, and a stranger's .git would go unsigned."""
    return _library("hashing").Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _guarded(act: Callable[[], object], place: str, expected: str, code: str) -> None:
    """The library's errors are ValueError and those of cryptography; each becomes one line."""
    try:
        act()
    except OSError as error:
        raise OutputError(place, expected="a file that can be read", found=error.strerror or type(error).__name__, remedy="check the path") from error
    except Exception as error:  # model-signing and cryptography have no common base; whatever they raise, the answer is no
        kind = BundleError if code == "SIGNATURE" else TrimtabError
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(place, expected=expected, found=found, remedy=REMEDY if code == "SIGNATURE" else "name another key", code=code) from error


def _library(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise TrimtabError("signatures", expected="the packages of the extra `sign`", found=f"no {error.name}", remedy=INSTALL) from error


def _date(text: str, place: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text) if text else None
    except (ValueError, TypeError) as error:
        raise TrimtabError(place, expected="a date as YYYY-MM-DD", found=repr(text), remedy="for example 2027-06-30") from error
