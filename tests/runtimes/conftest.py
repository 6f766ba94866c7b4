"""A tiny real decoder bundle and a tiny encoder bundle, built once a session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

TEXT = "Once upon a time there was a pump. The pump on line 4 stopped! Der Motor läuft. 価格は 1,280 円です。 🙂🚀 naïve café. " * 4
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 384


@pytest.fixture(scope="session")
def write_manifest() -> Callable[..., Path]:
    """Close a folder with a manifest: write_manifest(folder, kind="decoder", task=...)."""

    def write(folder: Path, **model: Any) -> Path:
        rows = []
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "manifest.json":
                data = path.read_bytes()
                rows.append({"path": path.relative_to(folder).as_posix(), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "name": "tiny", "model": model, "files": rows}))
        return folder

    return write


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Byte-level BPE: an emoji is four tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["Once upon a time there was a pump on line."], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory, write_manifest: Callable[..., Path], byte_tokenizer: Any) -> SimpleNamespace:
    """A random llama as a bundle (`directory`, last-token logits), the same with all logits (`directory_all`), and its eager twin (`model`)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.graph.decoder import export_decoder
    from compiler.scheme import Scheme, Schemes

    torch.manual_seed(0)
    size = byte_tokenizer.get_vocab_size()
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # confident logits: greedy paths do not hang on rounding
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    root = tmp_path_factory.mktemp("decoder")
    model.save_pretrained(root / "hf")
    folders = {}
    for logits in ("last", "all"):
        folder = root / logits
        folder.mkdir()
        export_decoder(open_checkpoint(str(root / "hf")), Schemes(Scheme()), folder, logits=logits)
        byte_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": CHATML}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
        folders[logits] = write_manifest(folder, kind="decoder", task="text-generation", max_length=CONTEXT)
    return SimpleNamespace(directory=folders["last"], directory_all=folders["all"], model=model, vocab_size=size, tokenizer=byte_tokenizer)


@pytest.fixture(scope="session")
def encoder_model() -> Callable[..., bytes]:
    """A one-lookup encoder: output [batch, length, width], or the masked mean of it, [batch, width]."""

    def build(table: np.ndarray, output: str, pooled: bool) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask", "token_type_ids")]
        constants = [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([2], np.int64), "two"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
        ]
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["words"]),
            helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["types", "two"], ["type_column"]),
            helper.make_node("Add", ["words", "type_column"], ["tokens"]),
        ]
        shape: list[Any] = ["batch", "length", table.shape[1]]
        if pooled:
            shape = ["batch", table.shape[1]]
            nodes += [
                helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
                helper.make_node("Unsqueeze", ["mask", "two"], ["mask_column"]),
                helper.make_node("Mul", ["tokens", "mask_column"], ["kept"]),
                helper.make_node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
                helper.make_node("ReduceSum", ["mask_column", "one"], ["count"], keepdims=0),
                helper.make_node("Div", ["sum", "count"], [output]),
            ]
        else:
            nodes.append(helper.make_node("Identity", ["tokens"], [output]))
        graph = helper.make_graph(nodes, "encoder", inputs, [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()

    return build


@pytest.fixture
def encoder_bundle(tmp_path: Path, write_manifest: Callable[..., Path], byte_tokenizer: Any, encoder_model: Callable[..., bytes]) -> Callable[..., Path]:
    """encoder_bundle("sentence_embedding", pooled=True, width=5, task=..., labels=[...]) -> folder."""

    def build(output: str, *, pooled: bool, width: int = 5, **model: Any) -> Path:
        table = np.random.default_rng(0).standard_normal((byte_tokenizer.get_vocab_size(), width)).astype(np.float32)
        np.save(tmp_path / "table.npy", table)
        folder = tmp_path / "bundle"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(encoder_model(table, output, pooled))
        byte_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>", "model_max_length": 10**30}))
        return write_manifest(folder, kind="encoder", **model)

    return build
