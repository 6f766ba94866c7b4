"""llama.cpp through its C interface (the ctypes of llama_cpp): what llama-bench calls, without the Python loop of `Llama`."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import llama_cpp
import numpy as np
from protocol import serve

ENCODER_TOKENS = 512  # of one batch of texts


class LlamaCpp:
    """options: "embeddings" true for an encoder, "ubatch" tokens of a physical batch."""

    def __init__(self, question: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(question["model"]), model_options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {question['model']}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.width = llama_cpp.llama_model_n_embd(self.model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = max(question["context"], 64)
        options.n_threads = options.n_threads_batch = question["threads"]
        options.n_batch = max(question["context"], 64)
        options.n_ubatch = question.get("ubatch") or options.n_ubatch
        self.encoder = bool(question.get("embeddings"))
        if self.encoder:
            options.embeddings, options.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_MEAN
            options.n_ctx = options.n_batch = options.n_ubatch = ENCODER_TOKENS
            options.n_seq_max, options.kv_unified = 64, True
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        system = llama_cpp.llama_print_system_info().decode()
        self.about = {"version": llama_cpp.__version__, "system": " ".join(system.split()), "ubatch": options.n_ubatch, "cache": "f16"}

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, ids: list[int]) -> None:
        """Append tokens; logits after the last one."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode fails on {len(ids)} tokens")

    def last(self) -> int:
        address = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(address, (self.vocab_size,)).argmax())

    def generate(self, prompt: list[int], new: int) -> tuple[float, float, list[int]]:
        self.clear()
        started = time.perf_counter()
        self.decode(prompt)
        tokens = [self.last()]
        first = time.perf_counter()
        for _ in range(new - 1):
            self.decode(tokens[-1:])
            tokens.append(self.last())
        return first - started, time.perf_counter() - first, tokens

    def batch(self, ids: list[list[int]], wanted: int) -> Any:
        """Rows as sequences of one batch; logits (or embeddings) of positions from `wanted` on."""
        total = sum(map(len, ids))
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        batch.n_tokens, at = total, 0
        for row, tokens in enumerate(ids):
            for position, token in enumerate(tokens):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
                batch.seq_id[at][0], batch.logits[at] = row, position >= wanted
                at += 1
        return batch

    def logits(self, ids: list[int], first: int) -> Any:
        self.clear()
        batch = self.batch([ids], first)
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode fails")
        count = len(ids) - first
        address = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(address, (count, self.vocab_size))[:-1].copy()

    def encode(self, ids: list[list[int]]) -> tuple[float, Any]:
        """A few rows a call: attention inside a batch spans all its rows, so one huge batch is slower than several small ones."""
        rows = max(1, ENCODER_TOKENS // len(ids[0]))
        batches = [self.batch(ids[at : at + rows], 0) for at in range(0, len(ids), rows)]
        vectors = []
        started = time.perf_counter()
        for number, batch in enumerate(batches):
            if llama_cpp.llama_encode(self.context, batch):
                raise RuntimeError("llama_encode fails")
            for row in range(min(rows, len(ids) - number * rows)):
                address = llama_cpp.llama_get_embeddings_seq(self.context, row)
                vectors.append(np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self.width,)).copy())
        seconds = time.perf_counter() - started
        for batch in batches:
            llama_cpp.llama_batch_free(batch)
        joined = np.stack(vectors)
        return seconds, joined / np.linalg.norm(joined, axis=1, keepdims=True)


@llama_cpp.llama_log_callback
def quiet(*_: Any) -> None: ...


llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
serve(LlamaCpp)
