"""Weights on their way from the checkpoint to model.onnx.data: read by row block, quantized, appended, forgotten.

Peak memory is one row block and its packed form, plus the scales of the matrix at hand.

Storage by scheme, for a matrix [n, k] with g = ceil(k / group_size) groups:
    nbits   codes uint8 [n, g, group_size * bits / 8], scales float32 [n, g], zero points uint8 [n, ceil(g * bits / 8)] if asymmetric;
            with other bits than 4 and 8 the codes lie in planes (compiler.quantizers.pack), and half scales are float16:
            nodes of constants alone make the kernel's tensors of them, and onnxruntime folds those when it loads
    tokens  codes int8 [k, n], scales float32 [n]
    fp32    float32 [n, k] as the checkpoint has it: FusedMatMul(transB=1) reads it without a transpose, and a tied lookup shares it
    fp16    float16 [n, k]; a Cast that onnxruntime folds when it loads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import CheckpointError, RecipeError
from compiler.graph.external_data import DataFile
from compiler.graph.nodes import MICROSOFT, GraphBuilder
from compiler.quantizers import nbits
from compiler.quantizers.pack import Packed, plane, plane_table, planes
from compiler.quantizers.rows import gather_rows
from compiler.scheme import Scheme, Schemes, prompt_scheme

UNIT = 127  # activation codes a token's largest value stands for

Progress = Callable[[str, int, int], None]
Codes = Callable[[str], Packed | None]  # matrix -> what a calibrated quantizer made of it; None: round to nearest here


@dataclass(frozen=True)
class Matrix:
    """A stored weight matrix [n, k]. tensors: weight | codes or planes (codes_4, codes_2, codes_1), scales, zero_points; bias float32 [n]."""

    name: str
    n: int
    k: int
    scheme: Scheme
    tensors: Mapping[str, ir.ExternalTensor]
    bias: ir.ExternalTensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.length) for tensor in self.tensors.values()) + (int(self.bias.length) if self.bias is not None else 0)


@dataclass
class WeightWriter:
    """Moves tensors of a checkpoint into the data file and into nodes of the graph.

    done   counts the elements written so far, for `progress(matrix, done, total)`
    first  the writer of another graph of the same weights: what is in groups there is written here as `int8-rows`, from the checkpoint; all else (vectors,
           head, embedding, float matrices) is named where it lies, not written again
    """

    checkpoint: Checkpoint
    schemes: Schemes
    data: DataFile
    graph: GraphBuilder
    progress: Progress | None = None
    codes_of: Codes | None = None
    done: int = 0
    first: WeightWriter | None = None
    _unpacked: dict[str, ir.Value] = field(default_factory=dict)
    _written: dict[str, Matrix] = field(default_factory=dict)
    _vectors: dict[tuple[str, float, float], ir.ExternalTensor] = field(default_factory=dict)

    @cached_property
    def total(self) -> int:
        return self.checkpoint.parameter_count

    def view(self, name: str, shape: tuple[int, ...]) -> TensorView:
        """A tensor of the checkpoint. Raises CheckpointError when it is missing or has another shape."""
        if name not in self.checkpoint.tensors:
            raise CheckpointError(
                f"{self.checkpoint.origin}: {name}", expected=f"a tensor of shape {list(shape)}", found="no such tensor", remedy="complete the checkpoint"
            )
        view = self.checkpoint.tensors[name]
        if view.shape != shape:
            raise CheckpointError(
                f"{self.checkpoint.origin}: {name}",
                expected=f"shape {list(shape)} as config.json says",
                found=f"{list(view.shape)}",
                remedy="use the config.json that belongs to these weights",
            )
        return view

    def vector(self, name: str, width: int, scale: float = 1.0, offset: float = 0.0) -> ir.Value:
        """A float32 vector [width] as scale * (stored + offset)."""
        key = (name, scale, offset)
        if self.first is not None:
            return self.graph.initializer(self.first._vectors[key])
        values = self.view(name, (width,)).read()
        finite(self.checkpoint.origin, name, values)
        self._vectors[key] = self.data.add(name, (values + np.float32(offset)) * np.float32(scale))
        return self.graph.initializer(self._vectors[key])

    def by_token(self, name: str) -> bool:
        """Whether this graph is the second one and holds the first one's matrix `name` as `int8-rows`."""
        return self.first is not None and prompt_scheme(name, self.first._written[name].scheme).kernel == "tokens"

    def matrix(self, name: str, sources: Mapping[str, int], k: int, scale: float = 1.0, bias: bool = False, part_of: str = "") -> Matrix:
        """Write one matrix of the graph: the `sources` (tensor name without `.weight` -> rows), stacked, times `scale`.

        part_of: in a second graph, the first one's matrix whose rows these are, where that has another name.
        """
        scheme = self.schemes.of(name)
        if self.first is not None:
            given = self.first._written[part_of or name]
            scheme = prompt_scheme(name, given.scheme)
            if scheme == given.scheme:
                return given
        views = [self.view(f"{source}.weight", (rows, k)) for source, rows in sources.items()]
        stored_bias = None
        if bias:
            parts = [self.view(f"{source}.bias", (rows,)).read() for source, rows in sources.items()]
            stored_bias = self.data.add(f"{name}.bias", np.concatenate(parts) * np.float32(scale))
        n = sum(sources.values())
        blocks = self._blocks(name, views, scale)
        if scheme.kernel == "tokens":
            tensors = self._by_row(name, (n, k), blocks)
        elif scheme.quantized:
            tensors = self._quantized(name, (n, k), scheme, self._packed(name, scheme, blocks, scale))
        else:
            tensors = self._float(name, (n, k), scheme, blocks)
        self._written[name] = Matrix(name, n, k, scheme, tensors, stored_bias)
        return self._written[name]

    def _blocks(self, name: str, views: list[TensorView], scale: float) -> Iterator[np.ndarray]:
        for view in views:
            for _, block in view.blocks():
                finite(self.checkpoint.origin, view.name, block)
                yield block if scale == 1.0 else block * np.float32(scale)
                self.done += block.size
                if self.progress is not None:
                    self.progress(name, min(self.done, self.total), self.total)

    def _packed(self, name: str, scheme: Scheme, blocks: Iterator[np.ndarray], scale: float) -> Iterator[Packed]:
        """A quantizer's codes where there are some, else each block rounded to nearest as it passes."""
        given = self.codes_of(name) if self.codes_of is not None else None
        if given is not None:
            yield given if scale == 1.0 else replace(given, scales=given.scales * np.float32(scale))
        for block in blocks:  # with given codes still read: weights that are not finite are refused, progress is counted
            if given is None:
                yield nbits.quantize(block, scheme)

    def _quantized(self, name: str, shape: tuple[int, int], scheme: Scheme, parts: Iterator[Packed]) -> dict[str, ir.ExternalTensor]:
        """Codes go to the file as they come; the smaller rest of a matrix waits until they are through."""
        if scheme.kernel != "nbits" or scheme.group_size is None:
            raise RecipeError("quantize.scheme", expected="intB-gN, fp16 or fp32 for a decoder", found=str(scheme), remedy="choose one of these")
        n, groups = shape[0], -(-shape[1] // scheme.group_size)
        width, cuts = groups * scheme.group_size, planes(scheme.bits) if scheme.shift else []
        waiting: dict[str, list[np.ndarray]] = {key: [] for key in ("scales", "zero_points", *(f"codes_{cut[0]}" for cut in cuts[1:]))}

        def codes() -> Iterator[np.ndarray]:
            for part in parts:
                waiting["scales"].append(part.scales.astype(np.float16) if scheme.half_scales else part.scales)
                if part.zero_points is not None:
                    waiting["zero_points"].append(part.zero_points)
                for cut in cuts[1:]:
                    waiting[f"codes_{cut[0]}"].append(plane(part.codes, scheme, *cut))
                yield plane(part.codes, scheme, *cuts[0]) if cuts else part.codes

        byte, data = np.dtype(np.uint8), self.data
        stored: dict[str, ir.ExternalTensor] = {}
        if not cuts:
            stored["codes"] = data.add_blocks(f"{name}.codes", (n, groups, width // groups * scheme.bits // 8), byte, codes())
        for cut, (bits, _) in enumerate(cuts):
            key = f"codes_{bits}"
            stored[key] = data.add_blocks(f"{name}.{key}", (n, width * bits // 8), byte, waiting[key] if cut else codes())
        kind = np.dtype(np.float16 if scheme.half_scales else np.float32)
        stored["scales"] = data.add_blocks(f"{name}.scales", (n, groups), kind, waiting["scales"])
        if not scheme.symmetric:
            stored["zero_points"] = data.add_blocks(f"{name}.zero_points", (n, -(-groups * scheme.kernel_bits // 8)), byte, waiting["zero_points"])
        return stored

    def _by_row(self, name: str, shape: tuple[int, int], blocks: Iterator[np.ndarray]) -> dict[str, ir.ExternalTensor]:
        """Codes int8 [k, n]; scales float32 [n]."""
        codes, scales = gather_rows(blocks, shape)
        return {"codes": self.data.add(f"{name}.codes", codes), "scales": self.data.add(f"{name}.scales", scales)}

    def _float(self, name: str, shape: tuple[int, int], scheme: Scheme, blocks: Iterator[np.ndarray]) -> dict[str, ir.ExternalTensor]:
        dtype = np.dtype(np.float16 if scheme.bits == 16 else np.float32)

        def converted() -> Iterator[np.ndarray]:
            for block in blocks:
                with np.errstate(over="ignore"):
                    half = block.astype(dtype)
                if dtype == np.float16 and not np.isfinite(half).all():
                    raise RecipeError("quantize.scheme", expected=f"weights of {name} within float16's range", found="a larger one", remedy="choose fp32")
                yield half

        return {"weight": self.data.add_blocks(f"{name}.weight", shape, dtype, converted())}

    def linear(self, node: str, x: ir.Value, matrix: Matrix) -> ir.Value:
        """x [..., k] -> [..., n]: x @ W.T + bias on the kernel of the matrix's scheme."""
        graph = self.graph
        bias = None if matrix.bias is None else graph.initializer(matrix.bias)
        scheme = matrix.scheme
        if scheme.kernel == "tokens":
            codes, most = self.rounded(node, x)
            y = graph.op(f"{node}/scale", "Mul", [self.product(node, codes, matrix), most])
            return y if bias is None else graph.op(f"{node}/bias", "Add", [y, bias])
        if scheme.quantized:
            zero_points = graph.initializer(matrix.tensors["zero_points"]) if "zero_points" in matrix.tensors else None
            inputs = [x, self._kernel_codes(matrix), self._kernel_scales(matrix), zero_points, None, bias]
            while inputs[-1] is None:
                inputs.pop()
            shape: dict[str, Any] = {"K": matrix.k, "N": matrix.n, "bits": scheme.kernel_bits, "block_size": scheme.group_size}
            return graph.op(node, "MatMulNBits", inputs, MICROSOFT, accuracy_level=4, **shape)
        y = graph.op(node, "FusedMatMul", [x, self._widened(matrix, graph.initializer(matrix.tensors["weight"]))], MICROSOFT, transB=1)
        return y if bias is None else graph.op(f"{node}/bias", "Add", [y, bias])

    def rounded(self, node: str, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """x [..., k] -> (codes uint8 [..., k], most [..., 1]): each token is divided by its own largest value, so that one scale fits them all."""
        graph, last = self.graph, self.graph.integers(-1)
        least = graph.constant("rows_least", np.array(1e-30, np.float32))  # a token of zeros stays one
        high = graph.op(f"{node}/high", "ReduceMax", [x, last], keepdims=1)
        low = graph.op(f"{node}/low", "ReduceMin", [x, last], keepdims=1)
        most = graph.op(f"{node}/most", "Max", [high, graph.op(f"{node}/depth", "Neg", [low]), least])
        return graph.op(f"{node}/codes", "QuantizeLinear", [graph.op(f"{node}/unit", "Div", [x, most]), *self._token_step()]), most

    def product(self, node: str, codes: ir.Value, matrix: Matrix) -> ir.Value:
        """`rounded` tokens -> [..., n], still divided by the tokens' largest values."""
        step, zero = self._token_step()
        weights = [self.graph.initializer(matrix.tensors[key]) for key in ("codes", "scales")]
        y: ir.Value = self.graph.op(node, "MatMulIntegerToFloat", [codes, weights[0], step, weights[1], zero], MICROSOFT)
        return y

    def _token_step(self) -> tuple[ir.Value, ir.Value]:
        return self.graph.constant("rows_step", np.array(1 / UNIT, np.float32)), self.graph.constant("rows_zero_point", np.array(128, np.uint8))

    def _widened(self, matrix: Matrix, weight: ir.Value) -> ir.Value:
        if matrix.scheme.bits == 32:
            return weight
        return self.graph.op(f"/{matrix.name}/widen", "Cast", [weight], to=int(ir.DataType.FLOAT))

    def _kernel_codes(self, matrix: Matrix, by_row: bool = False) -> ir.Value:
        """The kernel's codes uint8 [n, groups, bytes], or [n, all bytes]: as stored, or put together of planes by nodes that fold at load."""
        graph, scheme = self.graph, matrix.scheme
        groups = -(-matrix.k // (scheme.group_size or 1))
        row_bytes = groups * (scheme.group_size or 1) * scheme.kernel_bits // 8
        if "codes" in matrix.tensors:
            codes = matrix.tensors["codes"]
            return graph.initializer(self.data.view(f"{matrix.name}.codes_by_row", codes, (matrix.n, row_bytes)) if by_row else codes)
        if matrix.name not in self._unpacked:
            parts = [self._kernel_plane(matrix, cut, row_bytes) for cut in planes(scheme.bits)]
            total = parts[0]
            for number, part in enumerate(parts[1:]):
                total = graph.op(f"/{matrix.name}/join_{number}", "Add", [total, part])
            self._unpacked[matrix.name] = total
        if by_row:
            return self._unpacked[matrix.name]
        return graph.op(f"/{matrix.name}/by_group", "Reshape", [self._unpacked[matrix.name], graph.integers(matrix.n, groups, row_bytes // groups)])

    def _kernel_plane(self, matrix: Matrix, cut: tuple[int, int], row_bytes: int) -> ir.Value:
        """What one plane adds to the kernel's codes, uint8 [n, row_bytes]: a table gives the bytes of each byte."""
        graph, scheme, bits = self.graph, matrix.scheme, cut[0]
        node = f"/{matrix.name}/plane_{bits}"
        table = graph.constant(f"plane_table_{scheme.kernel_bits}_{bits}_{scheme.shift + cut[1]}", plane_table(scheme, *cut))
        places = graph.op(f"{node}/index", "Cast", [graph.initializer(matrix.tensors[f"codes_{bits}"])], to=int(ir.DataType.INT32))
        return graph.op(f"{node}/row", "Reshape", [graph.op(node, "Gather", [table, places], axis=0), graph.integers(matrix.n, row_bytes)])

    def _kernel_scales(self, matrix: Matrix) -> ir.Value:
        scales = self.graph.initializer(matrix.tensors["scales"])
        if not matrix.scheme.half_scales:
            return scales
        if f"{matrix.name}.scales" not in self._unpacked:
            self._unpacked[f"{matrix.name}.scales"] = self.graph.op(f"/{matrix.name}/scales", "Cast", [scales], to=int(ir.DataType.FLOAT))
        return self._unpacked[f"{matrix.name}.scales"]

    def lookup(self, node: str, ids: ir.Value, matrix: Matrix) -> ir.Value:
        """ids int64 [...] -> rows of the matrix, float32 [..., k], dequantized. Shares the stored bytes with `linear`."""
        graph, scheme = self.graph, matrix.scheme
        if not scheme.quantized:
            rows = graph.op(node, "Gather", [graph.initializer(matrix.tensors["weight"]), ids], axis=0)
            return rows if scheme.bits == 32 else graph.op(f"{node}/widen", "Cast", [rows], to=int(ir.DataType.FLOAT))
        inputs = [self._kernel_codes(matrix, by_row=True), ids, self._kernel_scales(matrix)]
        if "zero_points" in matrix.tensors:
            inputs.append(graph.initializer(matrix.tensors["zero_points"]))
        layout: dict[str, Any] = {"bits": scheme.kernel_bits, "block_size": scheme.group_size, "gather_axis": 0, "quantize_axis": 1}
        rows = graph.op(node, "GatherBlockQuantized", inputs, MICROSOFT, **layout)
        if scheme.group_size and matrix.k % scheme.group_size:  # the tail of the last group is padding
            rows = graph.op(f"{node}/tail", "Slice", [rows, graph.integers(0), graph.integers(matrix.k), graph.integers(-1)])
        return rows


def finite(origin: str, name: str, values: np.ndarray) -> np.ndarray:
    """`values`, checked. Raises CheckpointError for NaN or infinity.

    A sum of squares carries both and costs one pass; where it overflows, every value is looked at.
    """
    flat = values.reshape(-1)
    if not np.isfinite(np.dot(flat, flat)) and not np.isfinite(flat).all():
        raise CheckpointError(f"{origin}: {name}", expected="finite weights", found="NaN or infinity", remedy="repair or replace the checkpoint or the delta")
    return values
