"""trimtab's own runtime on a bundle: what `trimtab run` runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers  # noqa: F401  (imported before the clock starts)
from protocol import serve

from runtimes.bundle import open_bundle
from runtimes.encode import Encoder as BundleEncoder
from runtimes.generate import Generator, Options
from runtimes.session import SessionSettings


def settings(question: dict[str, Any]) -> SessionSettings:
    """As `trimtab run` opens a bundle: this process does nothing else, so denormals are flushed."""
    return SessionSettings(threads=question["threads"], flush_denormals=True)


class Decoder:
    def __init__(self, question: dict[str, Any]) -> None:
        self.folder = Path(question["model"])
        self.generator = Generator(open_bundle(self.folder), settings(question))
        self.about = {"version": f"onnxruntime {onnxruntime.__version__}"}
        self.all_positions: Any = None

    def generate(self, prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        (answer,) = self.generator.generate([prompt], Options(max_new_tokens=new, ignore_eos=True))
        return answer.ttft_ms / 1e3, (answer.token_ms[-1] - answer.ttft_ms) / 1e3, list(answer.token_ids)

    def logits(self, ids: list[int], first: int) -> Any:
        from compiler.evaluation.decoder import open_all_logits

        if self.all_positions is None:
            self.all_positions = open_all_logits(self.folder)
        return self.all_positions.all_logits(np.array([ids], np.int64))[0, first:-1]


class Encoder:
    def __init__(self, question: dict[str, Any]) -> None:
        self.encoder = BundleEncoder(open_bundle(Path(question["model"])), settings(question))
        self.about = {"version": f"onnxruntime {onnxruntime.__version__}"}

    def encode(self, ids: list[list[int]]) -> tuple[float, Any]:
        tokens = np.array(ids, np.int64)
        feeds = self.encoder.feeds(tokens, np.ones_like(tokens), np.zeros_like(tokens))
        started = time.perf_counter()
        output = self.encoder.run(feeds)
        seconds = time.perf_counter() - started
        vectors = output.mean(axis=1) if output.ndim == 3 else output
        return seconds, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


serve(lambda question: Encoder(question) if question.get("embeddings") else Decoder(question))
