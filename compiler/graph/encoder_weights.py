"""Streams a checkpoint's tensors into a fused encoder graph: placeholders become the operators of a scheme, weights external data.

1. A Linear over tokens (input [batch, sequence, in]) takes the scheme: MatMul, MatMulNBits, or `dynamic` as `encoder_quantize` says.
2. Heads are small and decide: a Linear over one vector a row, or with fewer than 32 outputs, stays float.
3. The word table (a Gather of at least 1024 rows) follows: float16 rows cast after the lookup, or GatherBlockQuantized (rule 4).
4. Under `dynamic` the table has 8 bits in groups of the largest size of 128, 64, 32, 16 that divides the width; under nbits the scheme's
   own bits, group size permitting; a width that none divides stays float.
5. Everything else (norms, biases, positions) is float32 (float16 under fp16, cast once at load).
6. Under `rows` a Linear behind a norm takes `encoder_rows`; any other is stored as float16 and multiplied in float32, and so is all of a traced graph.
   Under `dynamic` so does every Linear of a built graph but attention's output, with one scale a call; a traced graph has neither factors nor wide channels.
7. Under `dynamic` with codes of the full range what a norm gives is centred, at no cost: y - c by the norm's bias, W c in the bias of the matrix behind it,
   and + c in the bias of the matrix whose output is added to y. Where anything else reads y or a bias, nothing is.
One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.checkpoints.view import TensorView
from compiler.graph.encoder_builder import PLACEHOLDER
from compiler.graph.encoder_quantize import dequantize_channels, quantize_channels
from compiler.graph.encoder_rewrite import MICROSOFT, SMALL, add_constant, attribute, insert, nodes, replace
from compiler.graph.encoder_rows import call_scaled_linear, choose_channels, row_scaled_linear
from compiler.graph.external_data import DataFile
from compiler.graph.weights import finite
from compiler.quantizers import nbits
from compiler.scheme import Scheme

FEW_OUTPUTS = 32
WORDS = 1024
EMBEDDING_GROUPS = (128, 64, 32, 16)
Update = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Matrix:
    """One stored matrix: HF shape [out, in], how it is stored, and its bytes in the file (scales included)."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int


@dataclass
class Weights:
    """The one pass over a graph's weights. `lower` fills `matrices`."""

    model: ir.Model
    tensors: Mapping[str, TensorView]
    scheme: Scheme
    data: DataFile
    update: Update | None = None
    origin: str = ""
    spans: Mapping[str, np.ndarray] = field(default_factory=dict)  # weight -> least and largest value of each input channel [2, in]; rule 6
    matrices: list[Matrix] = field(default_factory=list)
    stored: dict[str, list[ir.Value]] = field(default_factory=dict)
    shifts: dict[str, np.ndarray] = field(default_factory=dict)  # bias -> what is added to it; rule 7

    def lower(self) -> list[Matrix]:
        """Every Linear, Gather and initializer, in graph order."""
        work = [node for node in self.model.graph if node.domain == PLACEHOLDER or is_lookup(node, self.tensors)]
        for done, node in enumerate(work):
            weight = node.inputs[1] if node.domain == PLACEHOLDER else node.inputs[0]
            if self.update is not None:
                self.update(str(weight.name if weight is not None else ""), done, len(work))
            if node.domain == PLACEHOLDER:
                self.lower_linear(node)
            else:
                self.lower_lookup(node)
        for name, value in list(self.model.graph.initializers.items()):
            self.store_float(name, value)
        return self.matrices

    def read(self, value: ir.Value) -> np.ndarray:
        """float32 [out, in] of a weight, the parts of a joined one on top of each other."""
        parts = value.meta.get("parts") or [value.name]
        arrays = [finite(self.origin, name, self.tensors[name].read()) for name in parts]
        arrays = [array + self.shifts[name] if name in self.shifts else array for name, array in zip(parts, arrays, strict=True)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def checked(self, view: TensorView) -> Iterator[np.ndarray]:
        """The blocks of a table. Raises CheckpointError for NaN or infinity."""
        return (finite(self.origin, view.name, block) for _, block in view.blocks())

    def lower_linear(self, node: ir.Node) -> None:
        """Rules 1 and 2."""
        source, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if source is None or weight is None or weight.shape is None:
            raise ValueError(f"{node.name}: a Linear without input or weight")
        name, (out, width) = str(weight.name), (int(weight.shape[0]), int(weight.shape[1]))
        scheme = self.scheme_of(node, name)
        if scheme.kernel in ("rows", "dynamic") and name in self.spans and not node.meta.get("even"):
            self.lower_split(node, source, weight, bias)
            return
        if name not in self.stored:
            self.stored[name] = self.store_matrix(name, self.read(weight), scheme)
        stored = self.stored[name]
        if scheme.kernel == "dynamic":
            new = insert(node, "DynamicQuantizeMatMul", [source, *stored, None, bias], domain=MICROSOFT)
        elif scheme.kernel == "nbits":
            codes, scales, *zeros = stored
            settings: dict[str, Any] = {"K": width, "N": out, "bits": scheme.bits, "block_size": scheme.group_size, "accuracy_level": 4}
            new = insert(node, "MatMulNBits", [source, codes, scales, zeros[0] if zeros else None, None, bias], domain=MICROSOFT, **settings)
        else:
            weights = self.dequantized(node, stored, width) if scheme.kernel == "stored" else self.widened(node, stored[0])
            if node.meta.get("tokens"):  # rows of tokens: one Gemm, its bias inside
                new = insert(node, "Gemm", [source, weights, bias])
            else:
                new = insert(node, "MatMul", [source, weights])
                new = insert(node, "Add", [new.outputs[0], bias]) if bias is not None else new
        replace(node.outputs[0], new.outputs[0])
        self.model.graph.remove(node, safe=True)

    def scheme_of(self, node: ir.Node, name: str) -> Scheme:
        """Rules 1, 2 and 6."""
        if not takes_scheme(node):
            return Scheme()
        if self.scheme.kernel == "rows" and not (node.meta.get("normed") and name in self.spans):
            return Scheme(16)
        return self.scheme

    def lower_split(self, node: ir.Node, source: ir.Value, weight: ir.Value, bias: ir.Value | None) -> None:
        """Rule 6, by `encoder_rows`."""
        name, matrix = str(weight.name), self.read(weight)
        lowered = row_scaled_linear if self.scheme.kernel == "rows" else call_scaled_linear
        around = biases_around(node) if self.scheme.full_range else None
        channels = choose_channels(self.spans[name], self.scheme, bool(node.meta.get("normed")), around is not None)
        start = self.data.size
        codes, scales = quantize_channels(channels.rest(matrix), full_range=self.scheme.full_range)
        offset = self.read(bias) if bias is not None else np.zeros(len(matrix), np.float32)
        if around is not None and channels.centre is not None:  # rule 7
            self.shifts |= dict(zip(around, (-channels.centre, channels.centre), strict=True))
            kept = np.where(channels.factors == 0, matrix, dequantize_channels(codes, scales) * channels.factors)
            offset = offset + kept @ channels.centre
        parts = {"int8": codes, "scales": scales, "offset": offset}
        if len(channels.wide):
            parts["wide"] = np.ascontiguousarray(matrix[:, channels.wide].T)
        stored = [self.put(name, suffix, array) for suffix, array in parts.items()]
        self.matrices.append(Matrix(name, matrix.shape, str(self.scheme), self.data.size - start))
        replace(node.outputs[0], lowered(node, source, stored, channels))
        self.model.graph.remove(node, safe=True)

    def store_matrix(self, name: str, weight: np.ndarray, scheme: Scheme) -> list[ir.Value]:
        """Writes [out, in] as the kernel wants it; the operator's inputs after x."""
        start = self.data.size
        if scheme.kernel == "dynamic":
            codes, scales = quantize_channels(weight, full_range=scheme.full_range)
            values = [self.put(name, "int8", codes), self.put(name, "scales", scales)]
        elif scheme.kernel == "stored":
            packed = nbits.quantize(weight, scheme)
            values = [self.put(name, "q8", packed.codes), self.put(name, "scales", packed.scales[..., None])]
        elif scheme.kernel == "nbits":
            packed = nbits.quantize(weight, scheme)
            values = [self.put(name, f"q{scheme.bits}", packed.codes), self.put(name, "scales", packed.scales)]
            if packed.zero_points is not None:
                values.append(self.put(name, "zeros", packed.zero_points))
        else:
            values = [self.put(name, "transposed", np.ascontiguousarray(weight.T, np.float16 if scheme.bits == 16 else np.float32))]
        self.matrices.append(Matrix(name, weight.shape, str(scheme), self.data.size - start))
        return values

    def lower_lookup(self, node: ir.Node) -> None:
        """Rules 3 and 4."""
        table = node.inputs[0]
        if table is None:
            return
        view = self.tensors[str(table.name)]
        scheme = self.table_scheme(view)
        name = str(table.name)
        start = self.data.size
        if scheme.quantized:
            new = self.quantized_lookup(node, name, view, scheme)
        elif scheme.bits == 16:
            halves = self.data.add_blocks(name + "_f16", view.shape, np.dtype(np.float16), self.checked(view))
            rows = insert(node, "Gather", [self.register(halves), node.inputs[1]])
            new = insert(node, "Cast", [rows.outputs[0]], to=ir.DataType.FLOAT.value)
        else:
            return
        self.matrices.append(Matrix(name, view.shape, str(scheme), self.data.size - start))
        replace(node.outputs[0], new.outputs[0])
        self.model.graph.remove(node, safe=True)

    def quantized_lookup(self, node: ir.Node, name: str, view: TensorView, scheme: Scheme) -> ir.Node:
        """GatherBlockQuantized over the codes of a table [words, width]: quantized block by block, scales kept until the codes are written."""
        rest: list[Any] = []

        def codes() -> Iterator[np.ndarray]:
            for block in self.checked(view):
                packed = nbits.quantize(block, scheme)
                rest.append((packed.scales, packed.zero_points))
                yield packed.codes.reshape(len(block), -1)

        shape = (view.shape[0], view.shape[1] * scheme.bits // 8)
        table = self.register(self.data.add_blocks(f"{name}_q{scheme.bits}", shape, np.dtype(np.uint8), codes()))
        inputs = [table, node.inputs[1], self.put(name, "scales", np.concatenate([scales for scales, _ in rest]))]
        if not scheme.symmetric:
            inputs.append(self.put(name, "zeros", np.concatenate([zeros for _, zeros in rest])))
        return insert(node, "GatherBlockQuantized", inputs, domain=MICROSOFT, bits=scheme.bits, block_size=scheme.group_size, gather_axis=0, quantize_axis=1)

    def table_scheme(self, view: TensorView) -> Scheme:
        """Rule 4."""
        if not self.scheme.quantized:
            return self.scheme
        own = self.scheme.group_size if self.scheme.kernel == "nbits" else None
        fits = [size for size in ((own,) if own else EMBEDDING_GROUPS) if view.shape[1] % size == 0]
        return Scheme(self.scheme.bits, fits[0], self.scheme.symmetric, "nbits") if fits else Scheme()

    def store_float(self, name: str, value: ir.Value) -> None:
        """Rule 5. Small computed constants stay inside model.onnx."""
        if not value.uses() or name not in self.model.graph.initializers:
            self.model.graph.initializers.pop(name, None)
            return
        parts = value.meta.get("parts") or [name]
        if not all(part in self.tensors for part in parts):
            if value.const_value is not None and value.const_value.size > SMALL and not isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = self.data.add(name, value.const_value.numpy())
            return
        if self.scheme.bits == 16 and not name.endswith("bias"):
            self.store_half(name, value)
            return
        array = self.read(value)
        start = self.data.size
        value.const_value = self.data.add(name, array)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        if array.ndim == 2:
            self.matrices.append(Matrix(name, array.shape, "fp32", self.data.size - start))

    def store_half(self, name: str, value: ir.Value) -> None:
        half = self.register(self.data.add(name + "_f16", self.read(value).astype(np.float16)))
        first = self.model.graph[0]
        value.replace_all_uses_with(self.widened(first, half))
        self.model.graph.initializers.pop(name, None)

    def dequantized(self, before: ir.Node, stored: list[ir.Value], width: int) -> ir.Value:
        """codes uint8 [out, groups, 32], scales [out, groups, 1] -> float32 [in, out]: constants only, so onnxruntime folds it once, at load."""
        graph = self.model.graph
        numbers = insert(before, "Cast", [stored[0]], to=ir.DataType.FLOAT.value).outputs[0]
        centred = insert(before, "Sub", [numbers, self.constant("middle", np.array(1 << (self.scheme.bits - 1), np.float32))]).outputs[0]
        scaled = insert(before, "Mul", [centred, stored[1]]).outputs[0]
        flat = insert(before, "Reshape", [scaled, self.constant("flat", np.array([0, -1], np.int64))]).outputs[0]
        padded = stored[0].shape is not None and int(stored[0].shape[1]) * int(stored[0].shape[2]) != width
        if padded:
            ends = [np.array([number], np.int64) for number in (0, width, 1)]
            flat = insert(before, "Slice", [flat, *(add_constant(graph, "tail", end) for end in ends)]).outputs[0]
        return insert(before, "Transpose", [flat], perm=[1, 0]).outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer that all matrices share."""
        if name not in self.stored:
            self.stored[name] = [add_constant(self.model.graph, name, array)]
        return self.stored[name][0]

    def widened(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """float16 -> float32 once at load (onnxruntime folds it); float32 passes through."""
        if value.dtype != ir.DataType.FLOAT16:
            return value
        return insert(before, "Cast", [value], to=ir.DataType.FLOAT.value).outputs[0]

    def put(self, name: str, suffix: str, array: np.ndarray) -> ir.Value:
        return self.register(self.data.add(f"{name}_{suffix}", array))

    def register(self, tensor: ir.ExternalTensor) -> ir.Value:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value


def is_lookup(node: ir.Node, tensors: Mapping[str, TensorView]) -> bool:
    """A Gather of rows from a table of words."""
    table = node.inputs[0] if node.op_type == "Gather" and attribute(node, "axis", 0) == 0 else None
    view = tensors.get(str(table.name)) if table is not None else None
    return view is not None and len(view.shape) == 2 and view.shape[0] >= WORDS


def biases_around(node: ir.Node) -> tuple[str, str] | None:
    """Rule 7: the bias of the norm in front of a Linear, and of the Linear whose output is added to the norm's. None where others would notice."""
    y = node.inputs[0]
    norm = y.producer() if y is not None else None
    if y is None or norm is None or norm.op_type != "LayerNormalization":
        return None
    others = [use.node for use in y.uses() if use.node is not node]
    if len(others) != 1 or others[0].op_type != "Add":
        return None
    beside = next((value.producer() for value in others[0].inputs if value is not None and value is not y), None)
    if beside is None or beside.domain != PLACEHOLDER or len(beside.outputs[0].uses()) != 1:
        return None
    biases = [one.inputs[2] if len(one.inputs) > 2 else None for one in (norm, beside)]
    names = [str(bias.name) for bias in biases if bias is not None and len(bias.uses()) == 1 and not bias.meta.get("parts")]
    return (names[0], names[1]) if len(names) == 2 else None


def takes_scheme(node: ir.Node) -> bool:
    """Rule 2. The builder says what runs over tokens; in a traced graph the rank does."""
    source, weight = node.inputs[0], node.inputs[1]
    over_tokens = node.meta.get("tokens", source is not None and source.shape is not None and source.shape.rank() == 3)
    return over_tokens and weight is not None and weight.shape is not None and int(weight.shape[0]) >= FEW_OUTPUTS


def unlowered(model: ir.Model) -> int:
    """Placeholders left: 0 once `Weights.lower` has run."""
    return sum(node.domain == PLACEHOLDER for node in nodes(model, "Linear"))
