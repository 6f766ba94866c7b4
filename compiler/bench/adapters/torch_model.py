"""transformers on torch in float32: eager, or compiled with a static cache."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from protocol import serve


class Decoder:
    """options: "compiled" true for torch.compile (inductor) with a static cache."""

    def __init__(self, question: dict[str, Any]) -> None:
        torch.set_num_threads(question["threads"])
        self.compiled, self.context = bool(question.get("compiled")), question["context"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32).eval()
        self.forward = torch.compile(self.model.forward, dynamic=False) if self.compiled else self.model.forward
        self.about = {"version": f"torch {torch.__version__}, transformers {transformers.__version__}"}

    @torch.inference_mode()
    def generate(self, prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        started = time.perf_counter()
        cache: Any = transformers.DynamicCache()
        if self.compiled:
            cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.context)
        tokens, ids, at, first = [], torch.tensor([prompt]), 0, 0.0
        for step in range(new):
            places = torch.arange(at, at + ids.shape[1])
            out = self.forward(input_ids=ids, past_key_values=cache, position_ids=places[None], use_cache=True, logits_to_keep=1)
            at += ids.shape[1]
            ids = out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
            if step == 0:
                first = time.perf_counter()
        return first - started, time.perf_counter() - first, tokens

    @torch.inference_mode()
    def logits(self, ids: list[int], first: int) -> Any:
        return self.model(input_ids=torch.tensor([ids])).logits[0, first:-1].numpy()


class Encoder:
    """options: "compiled" as above, one graph per shape."""

    def __init__(self, question: dict[str, Any]) -> None:
        torch.set_num_threads(question["threads"])
        self.model = transformers.AutoModel.from_pretrained(question["model"], dtype=torch.float32).eval()
        self.forward = torch.compile(self.model.forward, dynamic=False) if question.get("compiled") else self.model.forward
        self.about = {"version": f"torch {torch.__version__}, transformers {transformers.__version__}"}

    @torch.inference_mode()
    def encode(self, ids: list[list[int]]) -> tuple[float, Any]:
        tokens = torch.tensor(ids)
        mask = torch.ones_like(tokens)
        started = time.perf_counter()
        hidden = self.forward(input_ids=tokens, attention_mask=mask).last_hidden_state
        seconds = time.perf_counter() - started
        return seconds, torch.nn.functional.normalize(hidden.mean(1), dim=1).numpy()


serve(lambda question: Encoder(question) if question.get("embeddings") else Decoder(question))
