"""The canaries of a bundle: known inputs with the answers that were right when it was built.

A device runs them before it serves. They catch a damaged file that still loads, a runtime with a broken kernel, and a
tokenizer that is not the model's. Bits differ between CPUs, so outputs are compared within the tolerance that the file
states; token ids are compared exactly.

selftest.json: {"schema": 1, "canaries": [{"text", "ids", "top_ids", "logits"} | {"text", "ids", "vector"}], "atol": float}. A bundle with unmerged adapters
has canaries of the base and of each adapter, which `"adapter"` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, open_bundle
from runtimes.encode import Encoder
from runtimes.generate import Generator
from targets.errors import BundleError

FILE = "selftest.json"
TEXTS = ("The pump on line 4 stopped.", "価格は 1,280 円です。", "if x < 3:\n    return 'naïve'", "Hello   world  12345 🙂")
TOP = 5
KEPT = 8  # numbers of a vector that are written down


def make_selftest(bundle: Bundle) -> dict[str, Any]:
    """Canaries of a bundle from its own answers.

    The tolerance is a tenth of the spread of its outputs, or four times the bundle's own noise if that is more: int8 activations turn the last bit of a sum
    into a step, so that an int4 decoder's best logit moves by up to 0.45 (spread 3) between kernels for one token and for many, on one machine.
    """
    adapters = [str(row["name"]) for row in bundle.model.get("adapters") or ()]
    answers = _answers(bundle, [(text, name) for name in ("", *adapters) for text in TEXTS])
    spread = max(float(answer["spread"]) for answer in answers)
    noise = max(float(answer["noise"]) for answer in answers)
    canaries = [{key: value for key, value in answer.items() if key not in ("spread", "noise")} for answer in answers]
    return {"schema": 1, "atol": round(max(0.1 * spread, 4.0 * noise), 6), "canaries": canaries}


def run_selftest(directory: Path) -> Sequence[Mapping[str, Any]]:
    """Let the bundle answer its canaries; returns them. Raises BundleError naming every one that differs."""
    bundle = open_bundle(directory)
    expected = bundle.read_json(FILE)
    canaries, atol = expected.get("canaries"), expected.get("atol")
    if not isinstance(canaries, list) or not canaries or not isinstance(atol, float):
        raise BundleError(f"{directory}/{FILE}", expected="canaries and a tolerance", found="none", remedy="build the bundle again")
    faults = []
    for want, got in zip(canaries, _answers(bundle, [(str(canary.get("text")), str(canary.get("adapter", ""))) for canary in canaries]), strict=True):
        by = f" by adapter {want['adapter']}" if want.get("adapter") else ""
        if want.get("ids") != got["ids"]:
            faults.append(f"{want['text']!r} is tokenized differently")
        elif not _near(want, got, atol):
            faults.append(f"{want['text']!r} is answered differently{by}")
    if faults:
        raise BundleError(
            str(directory), expected="the answers of selftest.json", found="; ".join(faults), remedy="do not serve it: build or copy it again", code="SELFTEST"
        )
    return canaries


def _answers(bundle: Bundle, asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Answers to (text, adapter)."""
    if bundle.kind == "decoder":
        generator = Generator(bundle)
        return [_next_tokens(generator, text, adapter) for text, adapter in asked]
    encoder = Encoder(bundle)
    return [_vector(encoder, text) for text, _ in asked]


def _next_tokens(generator: Generator, text: str, adapter: str) -> dict[str, Any]:
    ids = generator.tokenizer.encode(text, add_special_tokens=False).ids
    logits = generator.next_logits(ids, adapter=adapter)
    top = np.argsort(-logits, kind="stable")[:TOP]
    noise = abs(float(generator.next_logits(ids, chunk=1, adapter=adapter)[top[0]]) - float(logits[top[0]]))  # token by token: other kernels, the same model
    kept = [round(float(logits[i]), 4) for i in top]
    named = {"adapter": adapter} if adapter else {}
    return {"text": text, **named, "ids": ids, "top_ids": top.tolist(), "logits": kept, "spread": float(logits.std()), "noise": noise}


def _vector(encoder: Encoder, text: str) -> dict[str, Any]:
    vector = np.asarray(encoder.encode([text])[0], np.float64)
    ids = encoder.tokenizer.encode(text).ids
    return {"text": text, "ids": ids, "vector": [round(float(value), 5) for value in vector[:KEPT]], "spread": float(vector.std()), "noise": 0.0}


def _near(want: Mapping[str, Any], got: Mapping[str, Any], atol: float) -> bool:
    """Vectors number by number; for logits those of the expected top ids must appear again among the top, close to what they were."""
    if "vector" in want:
        return bool(np.allclose(want["vector"], got["vector"], rtol=0, atol=atol))
    found = dict(zip(got["top_ids"], got["logits"], strict=True))
    best = want["top_ids"][0]
    return best in found and abs(found[best] - want["logits"][0]) <= atol
