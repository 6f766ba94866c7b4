"""8-bit arithmetic with one activation scale a token (`int8`), or a call (`int8-dynamic[-vnni]`), for encoders: y = x W^T + b, x [tokens, in], W [out, in].

    wide     the channels of x with the largest magnitude; they stay float:  x[:, wide] W[:, wide]^T
    rest     r[t] = max_k |x[t, k]|     code[t, k] = rint(x[t, k] / r[t] * 127) + 128  uint8
             y[t] = r[t] * ((code[t] - 128) . w_codes) * w_scale + wide part + b

With one scale a token it serves the matrices behind a norm (queries, keys and values; up), 7 of 12 parts of the arithmetic. Attention's output matrix and down
stay float: what comes out of gelu has most of its values in the lowest steps of an 8-bit grid.

With one scale a call (DynamicQuantizeMatMul finds it) it serves all matrices, and wide channels are dear: their product is added to [tokens, out] in a Gemm.
So inputs are pulled together first (Xiao et al. 2023, SmoothQuant), for all matrices but attention's output:

    s[k] = max(1, p[k] / median(p)) ** smoothing       p[k]: largest |x[t, k]| of the sample       y = (x / s) (W s)^T

and what stays float are channels of more than `loud` medians behind a norm, and `behind_gelu` of down (`Form`). Codes of the full range are for inputs that
are centred too: the middle of what a channel of a norm was seen to be is taken off by the norm's bias and given back by other biases, at no cost
(`encoder_weights`, rule 7). Mean cosine of 300 sentences of STS 2015 / 64 rows of 64 tokens / 8 x 128 / 32 x 256, by hand, sums in 32 bits (loud; behind_gelu;
smoothing), and times as fast as (6; 8) on AVX2 with bounded codes at 1x32 to 32x256:

    bounded codes    6; 8; 0.8              0.99869 / 0.99897 / 0.99901 / 0.99885    1
                     4; 8; 0.8              0.99872 / 0.99903 / 0.99908 / 0.99887    0.96 to 0.97
                     4; 4; 0.8: this form   0.99871 / 0.99905 / 0.99903 / 0.99888    1.00 to 1.03
                     neither smoothed nor wide: 0.993
    the full range   6; 8; 0.8              0.99882 / 0.99916 / 0.99913 / 0.99907
                     12; 2; 0.8             0.99880 / 0.99915 / 0.99908 / 0.99906    1.02 to 1.06
                     none; 4; 0.7           0.99868 / 0.99906 / 0.99910 / 0.99890    1.06 to 1.09
    and centred      none; 2; 0.7           0.99882 / 0.99916 / 0.99913 / 0.99904    this form: loud is for models louder than MiniLM (10 medians, centred)
                     none; 0; 0.7           0.99796 / 0.99743 / 0.99760 / 0.99613

Centring bounded codes gained nothing. The sample counts: by peaks of random tokens alone 0.0003 less. Factors below 1, bias correction on the sample and
weights rounded by the importance of their inputs were worse or no better.

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
(vpmaddubsw), and `quantize_channels` keeps |w[k]| + |w[k + 1]| <= 128 for even k: 255 * 128 < 2**15, so it cannot saturate, whatever x is.
`lint` proves it from the file. `int8-dynamic-vnni` has no such bound and is for processors with sums of 32 bits: elsewhere its mean cosine is 0.9886 (AVX2).
A uint8 weight (U8U8) cannot saturate either, but there its kernel gives 125 GOP/s a core where U8S8 gives 165 and float32 84 (AVX2, 1024 x 384 x 1536).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tokenizers

from compiler.checkpoints.view import Checkpoint
from compiler.errors import CheckpointError
from compiler.graph.encoder_rewrite import MICROSOFT, add_constant, insert, nodes
from compiler.quantizers.windows import calibration_set
from compiler.scheme import Scheme

WIDE = 16  # channels kept float, at most a quarter of them
FACTORS = "factors"
INTEGER = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
STEPS, MIDDLE = 127, 128
ENDS = ("ReduceMin", "ReduceMax")
RANDOM_ROWS, TEXT_ROWS, ROW = 16, 64, 64  # rows of the sample and tokens of each


@dataclass(frozen=True)
class Form:
    """With one scale a call. loud: behind a norm only channels of more than so many medians stay float; behind_gelu: so many of the widest do, where a channel
    is loud for a few tokens; smoothing: the exponent."""

    loud: float
    behind_gelu: int
    smoothing: float


BOUNDED, FULL_RANGE = Form(4, 4, 0.8), Form(20, 2, 0.7)


@dataclass(frozen=True)
class Channels:
    """What happens to the input x [tokens, in] of a matrix. factors float32 [in]: x is multiplied by them, 0 for wide ones. wide int64 [wide], ascending.

    centre  float32 [in], is taken off x before, by the bias of the norm in front; None: nothing is
    """

    factors: np.ndarray
    wide: np.ndarray
    centre: np.ndarray | None = None

    def rest(self, weight: np.ndarray) -> np.ndarray:
        """W [out, in] divided by the factors, 0 for wide channels: (x * factors) rest^T + x[:, wide] W[:, wide]^T = x W^T."""
        return np.divide(weight, self.factors, out=np.zeros_like(weight), where=self.factors != 0)


def choose_channels(span: np.ndarray, scheme: Scheme, normed: bool, centred: bool = False) -> Channels:
    """By the least and largest values [2, in] of x: which channels stay float, and, under one scale a call, by how much the others are pulled together."""
    centre = span.mean(axis=0) if centred else None
    peaks = np.abs(span if centre is None else span - centre).max(axis=0)
    typical = max(float(np.median(peaks)), 1e-9)
    count = max(1, min(WIDE, len(peaks) // 4))
    by_call, form = scheme.kernel == "dynamic", FULL_RANGE if scheme.full_range else BOUNDED
    if by_call:
        count = min(count, int((peaks > form.loud * typical).sum()) if normed else form.behind_gelu)
    wide = np.sort(np.argsort(-peaks, kind="stable")[:count]).astype(np.int64)
    factors = np.maximum(peaks / typical, 1).astype(np.float32) ** -np.float32(form.smoothing if by_call else 0)
    factors[wide] = 0
    return Channels(factors, wide, centre)


def sample_tokens(checkpoint: Checkpoint, vocabulary: int, positions: int) -> np.ndarray:
    """int64 [rows, ROW or positions / 2]: the built-in calibration text in the model's own tokens where it has a tokenizer, and random ones (seeded).

    Windows with tokens beyond the vocabulary are left out. Raises CheckpointError for a tokenizer.json that is none.
    """
    length = min(ROW, positions // 2)
    drawn = np.random.default_rng(0).integers(0, vocabulary, (RANDOM_ROWS, length))
    if "tokenizer.json" not in checkpoint.assets:
        return drawn
    try:
        tokenizer = tokenizers.Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
    except Exception as error:  # the library raises a bare Exception
        expected, remedy = "a tokenizer of the tokenizers library", "restore the file from where the model came from"
        raise CheckpointError(f"{checkpoint.origin}: tokenizer.json", expected=expected, found=" ".join(str(error).split())[:200], remedy=remedy) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    around = tokenizer.encode("").ids  # what stands before and behind every text
    before, behind = around[:1], around[1:]
    ids = [token for row in calibration_set(None).rows for token in tokenizer.encode(row.text, add_special_tokens=False).ids]
    step = length - len(around)
    rows = [[*before, *ids[at : at + step], *behind] for at in range(0, len(ids) - step + 1, step)] if step > 0 else []
    known = [row for row in rows if max(row) < vocabulary]
    chosen = [known[at] for at in np.linspace(0, len(known) - 1, min(TEXT_ROWS, len(known))).astype(int)]
    return np.concatenate([drawn, np.array(chosen, np.int64)]) if chosen else drawn


def channel_spans(folder: Path, ids: np.ndarray) -> Mapping[str, np.ndarray]:
    """Weight name -> least and largest x[t, k], [2, in], of the input of every Gemm of a float32 export in `folder`, over the texts ids [rows, tokens]."""
    import onnxruntime

    model = ir.load(folder / "model.onnx")
    graph = model.graph
    found: list[str] = []
    rows = add_constant(graph, "rows", np.array([0], np.int64))
    for node in nodes(model, "Gemm"):
        name = str(node.inputs[1].name).removesuffix("_transposed") if node.inputs[1] is not None else ""
        for end in ENDS:
            value = insert(node, end, [node.inputs[0], rows], keepdims=0).outputs[0]
            value.name, value.type = f"{end}_{len(found)}", ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
        found.append(name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # sums do not depend on how work is split
    options.log_severity_level = 3
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
        ir.save(model, file.name)
        session = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    wanted = {value.name for value in session.get_inputs()}
    names = [f"{end}_{index}" for index in range(len(found)) for end in ENDS]
    values = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    return {name: np.stack(values[2 * index : 2 * index + 2]) for index, name in enumerate(found)}


def row_scaled_linear(before: ir.Node, x: ir.Value, stored: list[ir.Value], channels: Channels) -> ir.Value:
    """The operators of the equation. stored: codes, scales, bias, and the float rows [wide, out] of the wide channels."""
    graph = graph_of(before)
    rest = scaled(before, x, channels)
    peak = insert(before, "ReduceMax", [insert(before, "Abs", [rest]).outputs[0], shared(graph, "last_axis", np.array([-1], np.int64))]).outputs[0]
    peak = insert(before, "Max", [peak, shared(graph, "tiny", np.array(1e-9, np.float32))]).outputs[0]
    step, middle = shared(graph, "step", np.array(1 / STEPS, np.float32)), shared(graph, "middle_code", np.array(MIDDLE, np.uint8))
    codes = insert(before, "QuantizeLinear", [insert(before, "Div", [rest, peak]).outputs[0], step, middle]).outputs[0]
    product = insert(before, "MatMulIntegerToFloat", [codes, stored[0], step, stored[1], middle], domain=MICROSOFT).outputs[0]
    floats = wide_part(before, x, stored[3], channels, stored[2])
    return insert(before, "Add", [insert(before, "Mul", [product, peak]).outputs[0], floats]).outputs[0]


def call_scaled_linear(before: ir.Node, x: ir.Value, stored: list[ir.Value], channels: Channels) -> ir.Value:
    """The same with one scale a call: the kernel finds the range of what is left and adds the bias; a wide part is added to its result in one Gemm."""
    product = insert(before, "DynamicQuantizeMatMul", [scaled(before, x, channels), *stored[:2], None, stored[2]], domain=MICROSOFT).outputs[0]
    return wide_part(before, x, stored[3], channels, product) if len(channels.wide) else product


def scaled(before: ir.Node, x: ir.Value, channels: Channels) -> ir.Value:
    """x times the factors of its channels."""
    return insert(before, "Mul", [x, add_constant(graph_of(before), FACTORS, channels.factors)]).outputs[0]


def wide_part(before: ir.Node, x: ir.Value, rows: ir.Value, channels: Channels, added: ir.Value) -> ir.Value:
    """x[:, wide] rows + added."""
    picked = insert(before, "Gather", [x, add_constant(graph_of(before), "wide", channels.wide)], axis=1).outputs[0]
    return insert(before, "Gemm", [picked, rows, added]).outputs[0]


def stored_factors(model: ir.Model) -> dict[str, np.ndarray]:
    """Weight name -> factors [in] of every matrix of an exported graph whose input is scaled (`Channels.factors`)."""
    found: dict[str, np.ndarray] = {}
    for node in model.graph:
        if node.op_type not in INTEGER or node.inputs[1] is None:
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        while source is not None and source.op_type in ("QuantizeLinear", "Div"):
            source = source.inputs[0].producer() if source.inputs[0] is not None else None
        factors = source.inputs[1] if source is not None and source.op_type == "Mul" else None
        if factors is not None and str(factors.name).startswith(FACTORS) and factors.const_value is not None:
            found[str(node.inputs[1].name).removesuffix("_int8")] = factors.const_value.numpy()
    return found


def graph_of(node: ir.Node) -> ir.Graph:
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name} is in no graph")
    return node.graph


def shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """One small initializer for all matrices."""
    return graph.initializers[name] if name in graph.initializers else add_constant(graph, name, array)
