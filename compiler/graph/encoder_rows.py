"""8-bit arithmetic with one activation scale a token (`int8`), or a call (`int8-dynamic`), for encoders: y = x W^T + b with x [tokens, in], W [out, in].

    wide     the channels of x with the largest magnitude; they stay float:  x[:, wide] W[:, wide]^T
    rest     r[t] = max_k |x[t, k]|     code[t, k] = rint(x[t, k] / r[t] * 127) + 128  uint8
             y[t] = r[t] * ((code[t] - 128) . w_codes) * w_scale + wide part + b

With one scale a token it serves the matrices behind a norm (queries, keys and values; up), 7 of 12 parts of the arithmetic. Attention's output matrix and down
stay float: what comes out of gelu has most of its values in the lowest steps of an 8-bit grid.

With one scale a call (DynamicQuantizeMatMul finds it) it serves all matrices; attention's output needs no wide channels, each other one does. Mean / min cosine
of 300 sentences of STS 2015, AVX512-VNNI: none wide 0.9930 / 0.982, 16 wide behind norms 0.9962 / 0.990, of down alone 0.9959 / 0.986, of both 0.9992 / 0.997
(4: 0.9988, 8: 0.9991, 32: 0.9992), of attention's output too 0.9992. By hand; weights alone cost most of what is left: 0.9993 with float activations.

all-MiniLM-L6-v2 in onnxruntime, min / mean cosine to float32 of 32 sentences
(tests/conformance/test_encoders.py) and of 100 sentences of STS 2015:

    every matrix, one scale a call, weights per channel                    0.9730 / 0.9895
    every matrix, 16 wide channels (down: 8), one scale a call, U8U8       0.9980 / 0.9993
    the same with a static range from calibration                          0.9939 / 0.9987
    the same with one scale a token                                        0.9986 / 0.9996
        of which qkv alone 0.9998, up 0.9997, attention's output 0.9999, down 0.9993 (min)
    every matrix, one scale a token, U8S8 in bounded pairs                 0.9982 / 0.9994      0.9990 / 0.9995
    without down                                                           0.9990 / 0.9997      0.9993 / 0.9997
    without down and attention's output: this form                         0.9992 / 0.9997      0.9994 / 0.9998
Rounding with error feedback (GPTQ) on random tokens was no better (0.9986 without down, its float parts stored in 8 bits, where plain rounding had 0.9988).
Five channels of the residual stream (99, 63, 157, 223, 338) reach 5 to 30 where the median channel reaches 2, the same ones in every layer.

The integer product is MatMulIntegerToFloat (com.microsoft) with int8 weights, U8S8: on x86 without VNNI its kernel adds two neighbouring products in 16 bits
(vpmaddubsw), and `quantize_pairs` keeps |w[k]| + |w[k + 1]| <= 128 for even k: 255 * 128 < 2**15, so it cannot saturate, whatever x is.
`lint` proves it from the file.
A uint8 weight (U8U8) cannot saturate either, but there its kernel gives 125 GOP/s a core where U8S8 gives 165 and float32 84 (AVX2, 1024 x 384 x 1536).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compiler.graph.encoder_rewrite import MICROSOFT, add_constant, insert, nodes

WIDE = 16  # channels kept float, at most a quarter of them
STEPS, MIDDLE = 127, 128
SAMPLE_ROWS, SAMPLE_LENGTH = 8, 64


def wide_channels(peaks: np.ndarray) -> np.ndarray:
    """Indices int64 [wide] of the largest peaks [in], ascending: WIDE of them, at most a quarter."""
    count = max(1, min(WIDE, len(peaks) // 4))
    return np.sort(np.argsort(-peaks, kind="stable")[:count]).astype(np.int64)


def channel_peaks(folder: Path, vocabulary: int, positions: int) -> Mapping[str, np.ndarray]:
    """Weight name -> max |x[t, k]| [in] of the input of every Gemm of a float32 export in `folder`, over random tokens (seeded): no text, no tokenizer."""
    import onnxruntime

    model = ir.load(folder / "model.onnx")
    graph = model.graph
    found: list[str] = []
    rows = add_constant(graph, "rows", np.array([0], np.int64))
    for node in nodes(model, "Gemm"):
        name = str(node.inputs[1].name).removesuffix("_transposed") if node.inputs[1] is not None else ""
        peak = insert(node, "ReduceMax", [insert(node, "Abs", [node.inputs[0]]).outputs[0], rows], keepdims=0).outputs[0]
        peak.name, peak.type = f"peak_{len(found)}", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(peak)
        found.append(name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # sums do not depend on how work is split
    options.log_severity_level = 3
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
        ir.save(model, file.name)
        session = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, vocabulary, (SAMPLE_ROWS, min(SAMPLE_LENGTH, positions // 2)))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    wanted = {value.name for value in session.get_inputs()}
    peaks = session.run([f"peak_{index}" for index in range(len(found))], {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip(found, peaks, strict=True))


def row_scaled_linear(before: ir.Node, x: ir.Value, stored: list[ir.Value], wide: np.ndarray, width: int) -> ir.Value:
    """The operators of the equation. stored: codes, scales, bias, and the float rows [wide, out] of the wide channels."""
    graph = graph_of(before)
    rest = without(before, x, wide, width)
    peak = insert(before, "ReduceMax", [insert(before, "Abs", [rest]).outputs[0], shared(graph, "last_axis", np.array([-1], np.int64))]).outputs[0]
    peak = insert(before, "Max", [peak, shared(graph, "tiny", np.array(1e-9, np.float32))]).outputs[0]
    step, middle = shared(graph, "step", np.array(1 / STEPS, np.float32)), shared(graph, "middle_code", np.array(MIDDLE, np.uint8))
    codes = insert(before, "QuantizeLinear", [insert(before, "Div", [rest, peak]).outputs[0], step, middle]).outputs[0]
    product = insert(before, "MatMulIntegerToFloat", [codes, stored[0], step, stored[1], middle], domain=MICROSOFT).outputs[0]
    picked = insert(before, "Gather", [x, add_constant(graph, "wide", wide)], axis=1).outputs[0]
    floats = insert(before, "Gemm", [picked, stored[3], stored[2]]).outputs[0]
    return insert(before, "Add", [insert(before, "Mul", [product, peak]).outputs[0], floats]).outputs[0]


def call_scaled_linear(before: ir.Node, x: ir.Value, stored: list[ir.Value], wide: np.ndarray, width: int) -> ir.Value:
    """The same with one scale a call: the kernel finds the range of what is left and adds the bias; the wide part is added to its result in one Gemm."""
    codes, scales, bias, floats = stored
    product = insert(before, "DynamicQuantizeMatMul", [without(before, x, wide, width), codes, scales, None, bias], domain=MICROSOFT).outputs[0]
    picked = insert(before, "Gather", [x, add_constant(graph_of(before), "wide", wide)], axis=1).outputs[0]
    return insert(before, "Gemm", [picked, floats, product]).outputs[0]


def without(before: ir.Node, x: ir.Value, wide: np.ndarray, width: int) -> ir.Value:
    """x with zeros in the wide channels."""
    kept = np.ones(width, np.float32)
    kept[wide] = 0
    return insert(before, "Mul", [x, add_constant(graph_of(before), "kept", kept)]).outputs[0]


def graph_of(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name} is in no graph")
    return node.graph


def shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """One small initializer for all matrices."""
    return graph.initializers[name] if name in graph.initializers else add_constant(graph, name, array)
