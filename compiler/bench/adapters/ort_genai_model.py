"""onnxruntime-genai: its own Generator on the model that its own builder wrote."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
from protocol import serve


class Decoder:
    def __init__(self, question: dict[str, Any]) -> None:
        self.folder, self.threads = Path(question["model"]), question["threads"]
        config = onnxruntime_genai.Config(str(self.folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": self.threads}}}}))
        self.model = onnxruntime_genai.Model(config)
        self.context = question["context"]
        self.about = {"version": onnxruntime_genai.__version__}
        self.decoder = json.loads((self.folder / "genai_config.json").read_text())["model"]["decoder"]  # its graph's shapes are names
        self.session: Any = None

    def generate(self, prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        started = time.perf_counter()
        options = onnxruntime_genai.GeneratorParams(self.model)
        options.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
        generator = onnxruntime_genai.Generator(self.model, options)
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        rest = time.perf_counter() - first
        tokens = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
        if len(tokens) != new:
            raise RuntimeError(f"{len(tokens)} tokens instead of {new}")
        return first - started, rest, tokens

    def logits(self, ids: list[int], first: int) -> Any:
        if self.session is None:
            self.session = onnxruntime.InferenceSession(str(self.folder / "model.onnx"), providers=["CPUExecutionProvider"])
        feeds: dict[str, Any] = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feeds["position_ids"] = np.arange(len(ids))[None]
        for entry in self.session.get_inputs():
            if entry.name.startswith("past_key_values"):
                feeds[entry.name] = np.zeros((1, self.decoder["num_key_value_heads"], 0, self.decoder["head_size"]), np.float32)
        names = {entry.name for entry in self.session.get_inputs()}
        return self.session.run(["logits"], {name: value for name, value in feeds.items() if name in names})[0][0, first:-1]


serve(Decoder)
