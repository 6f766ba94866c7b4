"""OpenVINO: decoders through openvino_genai's LLMPipeline, encoders through a compiled model, both with their defaults but for the threads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import serve


class Decoder:
    """options: "backend" PA (paged attention, the default of openvino_genai) or SDPA."""

    def __init__(self, question: dict[str, Any]) -> None:
        self.folder, self.threads = question["model"], question["threads"]
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
        if question.get("backend"):
            properties["ATTENTION_BACKEND"] = question["backend"]
        self.pipeline = openvino_genai.LLMPipeline(self.folder, "CPU", **properties)
        self.about = {"version": openvino_genai.get_version(), "backend": question.get("backend", "default")}
        self.all_positions: Any = None

    def generate(self, prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        config.apply_chat_template = False
        started = time.perf_counter()
        result = self.pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config)
        total = time.perf_counter() - started
        metrics = result.perf_metrics.raw_metrics
        first = float(metrics.m_times_to_first_token[0]) / 1e6  # microseconds
        tokens = [int(token) for token in result.tokens[0]]
        if len(tokens) != new:
            raise RuntimeError(f"{len(tokens)} tokens instead of {new}")
        return first, total - first, tokens

    def logits(self, ids: list[int], first: int) -> Any:
        if self.all_positions is None:
            options = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
            model = openvino.Core().compile_model(Path(self.folder) / "openvino_model.xml", "CPU", options)
            self.all_positions = model.create_infer_request()
        self.all_positions.reset_state()
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feeds |= {"position_ids": np.arange(len(ids), dtype=np.int64)[None], "beam_idx": np.zeros(1, np.int32)}
        names = {name for port in self.all_positions.model_inputs for name in port.names}
        result = self.all_positions.infer({name: value for name, value in feeds.items() if name in names})
        return result["logits"][0, first:-1]


class Encoder:
    def __init__(self, question: dict[str, Any]) -> None:
        options = {"INFERENCE_NUM_THREADS": question["threads"], "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(Path(question["model"]) / "openvino_model.xml", "CPU", options)
        self.request = model.create_infer_request()
        self.names = {name for port in self.request.model_inputs for name in port.names}
        self.about = {"version": openvino.__version__}

    def encode(self, ids: list[list[int]]) -> tuple[float, Any]:
        tokens = np.array(ids, np.int64)
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
        feeds = {name: value for name, value in feeds.items() if name in self.names}
        started = time.perf_counter()
        self.request.infer(feeds, share_inputs=True, share_outputs=True)
        seconds = time.perf_counter() - started
        hidden = self.request.get_output_tensor(0).data
        return seconds, pooled(hidden)


def pooled(hidden: Any) -> Any:
    """Token vectors [batch, length, hidden] -> unit vectors [batch, hidden]; no padding here."""
    vectors = hidden.mean(axis=1) if hidden.ndim == 3 else hidden
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


serve(lambda question: Encoder(question) if question.get("embeddings") else Decoder(question))
