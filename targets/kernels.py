"""The kernels that a bundle is made of, as small models that can be timed: `Case` says which, `open_case` makes a session, `CaseRun.time` runs it.

The table's columns say what they mean by operator:

    op                               bits block      k            n           m        context
    MatMulNBits                      4, 8 group      inputs       outputs     tokens   -
    MatMul, FusedMatMul              32   0          inputs       outputs     tokens   -
    DynamicQuantizeMatMul            8    0          inputs       outputs     tokens   -
    GroupQueryAttention              32   head size  query width  kv width    tokens   tokens in the cache before
    Attention                        32   head size  query width  kv width    tokens   -                                every token sees every one, by a mask
    norms, activations, Split, Mul   32   0          width        1           tokens   -                                RMSNormalization with the Add before it

How they are timed. One token (decode) streams its weights from memory, as a model larger than the caches does: the session holds as many copies of the node as
fill STREAM_BYTES, and a run goes through all of them. Many tokens (prefill) do arithmetic: one or two copies. Either way the cost of starting a node is in the
figure and the cost of starting a run is not. Graph optimisation is off, so no copy is folded away, and no two copies have the same weights: equal ones run
as fast as one that stays in the cache (measured: 135 GB/s where memory gives 25).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.errors import TargetError
from targets.wire import INT32, MICROSOFT, Graph, Node, Value, model_bytes

STREAM_BYTES = 64 << 20  # twice the last cache of the machines we know
COPIES_MOST = 256
ROPE_POSITIONS = 4096
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One kernel of the table; the head of this file says what the numbers mean."""

    op: str
    bits: int
    block: int
    k: int
    n: int
    symmetric: bool = True

    def __str__(self) -> str:
        kind = f" {self.bits} bit, block {self.block}{'' if self.symmetric else ', zero points'}" if self.bits < 16 else ""
        return f"{self.op}{kind}, {self.k} x {self.n}"


@dataclass(frozen=True)
class Point:
    """Sizes at which a case is timed."""

    m: int
    context: int = 0


Part = tuple[list[Node], dict[str, NDArray[Any]], list[Value], list[Value]]  # nodes, constants, further inputs, outputs of one copy


@lru_cache(maxsize=8)
def _drawn(*shape: int) -> NDArray[np.int8]:
    return np.random.default_rng(0).integers(-127, 128, shape, np.int8)


def _codes(index: int, *shape: int) -> NDArray[np.int8]:
    """Random codes, others for every copy."""
    return np.roll(_drawn(*shape), index)


def _matmul_nbits(case: Case, index: int) -> Part:
    blocks = -(-case.k // case.block)
    constants: dict[str, NDArray[Any]] = {
        f"codes{index}": _codes(index, case.n, blocks, case.block * case.bits // 8).view(np.uint8),
        f"scales{index}": _codes(index, case.n, blocks) * np.float32(0.0001),
    }
    if not case.symmetric:
        constants[f"zeros{index}"] = _codes(index, case.n, -(-blocks * case.bits // 8)).view(np.uint8)
    attributes = {"K": case.k, "N": case.n, "bits": case.bits, "block_size": case.block, "accuracy_level": 4}
    node = Node(case.op, ["x", *constants], [f"y{index}"], attributes, MICROSOFT)
    return [node], constants, [], [Value(f"y{index}", ("m", case.n))]


def _matmul(case: Case, index: int) -> Part:
    """MatMul takes [k, n], which onnxruntime packs once; FusedMatMul with transB takes [n, k] as a checkpoint stores it, unpacked."""
    turned = case.op == "FusedMatMul"
    weight = _codes(index, *((case.n, case.k) if turned else (case.k, case.n))) * np.float32(0.01)
    node = Node(case.op, ["x", f"w{index}"], [f"y{index}"], {"transB": 1} if turned else {}, MICROSOFT if turned else "")
    return [node], {f"w{index}": weight}, [], [Value(f"y{index}", ("m", case.n))]


def _dynamic(case: Case, index: int) -> Part:
    constants: dict[str, NDArray[Any]] = {f"codes{index}": _codes(index, case.k, case.n), f"scales{index}": np.full(case.n, 0.01, np.float32)}
    return [Node(case.op, ["x", *constants], [f"y{index}"], {}, MICROSOFT)], constants, [], [Value(f"y{index}", ("m", case.n))]


def _group_query(case: Case, index: int) -> Part:
    """x [1, m, k + 2 n] is queries, keys and values side by side; each copy has a cache of its own, which it extends in place."""
    heads, kv_heads = case.k // case.block, case.n // case.block
    shape = (1, kv_heads, "capacity", case.block)
    past = [Value(f"past{index}.{part}", shape) for part in ("key", "value")]
    present = [Value(f"present{index}.{part}", shape) for part in ("key", "value")]
    inputs = ["x", "", "", *(value.name for value in past), "seqlens", "total", "cos", "sin"]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
    node = Node(case.op, inputs, [f"y{index}", *(value.name for value in present)], attributes, MICROSOFT)
    angles = np.linspace(0, 1, ROPE_POSITIONS * case.block // 2, dtype=np.float32).reshape(ROPE_POSITIONS, -1)
    return [node], {"cos": np.cos(angles), "sin": np.sin(angles)}, past, [Value(f"y{index}", (1, "m", case.k)), *present]


def _attention(case: Case, index: int) -> Part:
    heads = case.k // case.block
    node = Node(case.op, ["x", "x", "x", "mask"], [f"y{index}"], {"q_num_heads": heads, "kv_num_heads": heads})
    return [node], {}, [], [Value(f"y{index}", (1, "m", case.k))]


def _norm(case: Case, index: int) -> Part:
    gamma = np.ones(case.k, np.float32)
    output, total = (Value(f"{name}{index}", (1, "m", case.k)) for name in ("y", "sum"))
    if case.op == "SkipLayerNormalization":
        constants: dict[str, NDArray[Any]] = {f"gamma{index}": gamma, f"beta{index}": gamma}
        return [Node(case.op, ["x", "x", *constants], [output.name], {"epsilon": 1e-5}, MICROSOFT)], constants, [], [output]
    norm = Node(case.op, [total.name, f"gamma{index}"], [output.name], {"epsilon": 1e-5})
    return [Node("Add", ["x", "x"], [total.name]), norm], {f"gamma{index}": gamma}, [], [output, total]


def _pointwise(case: Case, index: int) -> Part:
    outputs = [Value(f"y{index}", ("m", case.k))]
    if case.op == "BiasGelu":
        return [Node(case.op, ["x", f"bias{index}"], [f"y{index}"], {}, MICROSOFT)], {f"bias{index}": np.zeros(case.k, np.float32)}, [], outputs
    if case.op == "QuickGelu":
        return [Node(case.op, ["x"], [f"y{index}"], {"alpha": 1.0}, MICROSOFT)], {}, [], outputs
    return [Node(case.op, ["x", "x"], [f"y{index}"])], {}, [], outputs


def _split(case: Case, index: int) -> Part:
    halves = [f"y{index}", f"z{index}"]
    return [Node(case.op, ["x"], halves, {"axis": 1, "num_outputs": 2})], {}, [], [Value(name, ("m", case.k // 2)) for name in halves]


Builder = Callable[[Case, int], Part]
OPERATORS: Mapping[str, Builder] = {
    "MatMulNBits": _matmul_nbits,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "DynamicQuantizeMatMul": _dynamic,
    "GroupQueryAttention": _group_query,
    "Attention": _attention,
    "RMSNormalization": _norm,
    "SkipLayerNormalization": _norm,
    "QuickGelu": _pointwise,
    "BiasGelu": _pointwise,
    "Mul": _pointwise,
    "Split": _split,
}
MATRICES = ("MatMulNBits", "MatMul", "FusedMatMul", "DynamicQuantizeMatMul")
ATTENTION = ("GroupQueryAttention", "Attention")

SHAPES = ((512, 512), (2048, 512), (512, 4096), (2048, 4096))  # (K, N): corners; `targets.table` says how what lies between and beyond is read
BLOCKS = ((4, 64), (4, 32), (8, 64), (8, 32), (4, 128), (8, 128), (8, 16))
TOKENS = (Point(1), Point(32), Point(512))
HEADS = ((576, 192, 64), (2048, 512, 64))  # query width, key and value width, head size
CONTEXTS = (Point(1, 64), Point(1, 512), Point(1, 2048), Point(32), Point(32, 1024), Point(128), Point(256), Point(256, 1024))
LENGTHS = (Point(32), Point(128), Point(512))
WIDTHS = (512, 4096)


def cases() -> Iterator[tuple[Case, tuple[Point, ...]]]:
    """The table's rows with the points they are timed at, the most telling first: what does not fit the budget is left out from the end."""
    for bits, block in BLOCKS[:3]:
        for k, n in SHAPES:
            yield Case("MatMulNBits", bits, block, k, n), TOKENS
    for k, n, head in HEADS:
        yield Case("GroupQueryAttention", 32, head, k, n), CONTEXTS
    for op in ("RMSNormalization", "QuickGelu", "Mul", "Split", "SkipLayerNormalization", "BiasGelu"):
        for width in WIDTHS:
            yield Case(op, 32, 0, width, 1), TOKENS
    for op, bits in (("FusedMatMul", 32), ("MatMul", 32), ("DynamicQuantizeMatMul", 8)):
        for k, n in SHAPES:
            yield Case(op, bits, 0, k, n), TOKENS
    for k, head in ((384, 32), (768, 64)):
        yield Case("Attention", 32, head, k, k), LENGTHS
    for bits, block in BLOCKS[3:]:
        for k, n in SHAPES:
            yield Case("MatMulNBits", bits, block, k, n), TOKENS
    for bits, block in BLOCKS:
        for k, n in SHAPES[2:3]:  # zero points cost a share that hardly depends on the shape
            yield Case("MatMulNBits", bits, block, k, n, symmetric=False), TOKENS


def weight_bytes(case: Case) -> int:
    """Bytes that one copy streams per token: weights as the kernel holds them, or for attention nothing (its cache is counted by context)."""
    if case.op not in MATRICES:
        return 0
    scale = 8 * -(-case.k // case.block) * case.n if case.block else 0
    return case.k * case.n * case.bits // 8 + scale


def copies(case: Case, point: Point) -> int:
    """How many nodes a session gets (see the head of this file)."""
    if point.m > 1 or case.op in ATTENTION:
        return 8 if case.op not in MATRICES else 2 if point.m <= 64 else 1
    return min(COPIES_MOST, -(-STREAM_BYTES // weight_bytes(case))) if case.op in MATRICES else 16


def case_model(case: Case, count: int = 1) -> bytes:
    """The model of a case: `count` copies side by side on one input. Raises KeyError for an operator that the table does not hold."""
    build = OPERATORS[case.op]
    nodes, constants, outputs = list[Node](), dict[str, NDArray[Any]](), list[Value]()
    inputs = [input_value(case)]
    if case.op == "GroupQueryAttention":
        inputs += [Value("seqlens", (1,), INT32), Value("total", (1,), INT32)]
    if case.op == "Attention":
        inputs.append(Value("mask", (1, 1, "m", "m")))
    for index in range(count):
        made, weights, more, out = build(case, index)
        nodes += made
        constants |= weights
        inputs += more
        outputs += out
    return model_bytes(Graph(nodes, inputs, outputs, constants))


def input_value(case: Case) -> Value:
    if case.op == "GroupQueryAttention":
        return Value("x", (1, "m", case.k + 2 * case.n))
    if case.op == "Attention" or "Normalization" in case.op:
        return Value("x", (1, "m", case.k))
    return Value("x", ("m", case.k))


def open_case(case: Case, point: Point, threads: int) -> CaseRun:
    """A session of the case with enough copies for the point. Raises TargetError without onnxruntime."""
    count = copies(case, point)
    return CaseRun(case, count, open_model(case_model(case, count), threads))


def open_model(model: bytes, threads: int, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> Any:
    """An onnxruntime session, optimisation off: what is timed is the node that was written."""
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError("probe", expected="onnxruntime", found="none", remedy="install onnxruntime") from error
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=list(providers))


@dataclass
class CaseRun:
    """A session of `count` copies of a case."""

    case: Case
    count: int
    session: Any

    def bind(self, point: Point) -> Callable[[], object]:
        """A function that runs the model once at these sizes, on buffers of its own."""
        binding, keep = self.session.io_binding(), []
        free: dict[str, int] = {"m": point.m, "capacity": point.m + point.context}
        caches: dict[str, NDArray[Any]] = {}

        def array(value: Any, fill: float = 0.5) -> NDArray[Any]:
            shape = [free[size] if isinstance(size, str) else size for size in value.shape]
            made = np.full(shape, fill, np.int32 if "int32" in value.type else np.float32)
            keep.append(made)
            return made

        for value in self.session.get_inputs():
            held = array(value, {"seqlens": point.m + point.context - 1, "total": point.m + point.context}.get(value.name, 0.5))
            if value.name.startswith("past"):
                caches[value.name.replace("past", "present")] = held
            binding.bind_input(value.name, "cpu", 0, held.dtype.type, list(held.shape), held.ctypes.data)
        shared: dict[tuple[Any, ...], NDArray[Any]] = {}  # copies write their results to one place, as layers do
        for value in self.session.get_outputs():
            kind = (value.name.rstrip("0123456789"), *value.shape)
            held = caches[value.name] if value.name in caches else shared.setdefault(kind, array(value))
            binding.bind_output(value.name, "cpu", 0, held.dtype.type, list(held.shape), held.ctypes.data)
        keep.append(binding)
        return lambda: (self.session.run_with_iobinding(binding), keep)
