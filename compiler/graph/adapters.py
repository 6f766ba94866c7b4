"""Low-rank products beside the matrices of a decoder graph, and the `.onnx_adapter` files that fill them, one per tenant.

    y = MatMulNBits(x) + (x A) B        A [k, r], B [r, n]

A and B are graph inputs with a default (onnxruntime's form for LoRA): float32 of rank r = 0, for which the product is zero,
so a run that feeds nothing is the base alone. The rank is a symbolic dimension of each matrix, so tenants of different ranks
share the graph. The weight of a delta, alpha / r and the graph's own scale of a matrix are folded into B.

Where the graph holds several tensors as one matrix (q, k, v; gate, up), A is their factors side by side and B is
block-diagonal, which is exact: ranks 8, 8 on q [576 rows] and v [192 of 960] -> A [k, 16], B [16, 960] with two blocks.

A matrix that no tenant changes gets no nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.errors import ArchitectureError
from compiler.graph.nodes import GraphBuilder

Product = Callable[[], tuple[np.ndarray, np.ndarray]]  # -> left [rows, r], right [r, k], float32: what is added to a tensor is their product
SUFFIX = ".onnx_adapter"
FORMAT_VERSION = 1  # of the names and shapes of our parameters; onnxruntime calls it the adapter's version


@dataclass(frozen=True)
class Tenant:
    """One unmerged adapter. products: tensor of the checkpoint -> its change. digest: of the delta's files."""

    name: str
    products: Mapping[str, Product] = field(repr=False)
    digest: str = ""


@dataclass(frozen=True)
class AdapterRow:
    """One adapter file, for the manifest. rank: the largest of one matrix; matrices: those of the graph that it changes; parameters: numbers in the file."""

    name: str
    file: str
    rank: int
    matrices: tuple[str, ...]
    parameters: int
    bytes: int
    digest: str
    model_version: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Site:
    """A matrix of the graph, [rows of all sources, k], that may have a product beside it.

    sources  tensor without `.weight` -> its rows, stacked in this order
    scale    the graph's own factor on the matrix
    """

    matrix: str
    sources: Mapping[str, int]
    k: int
    scale: float = 1.0

    @property
    def n(self) -> int:
        return sum(self.sources.values())

    def parameters(self, tenant: Tenant) -> dict[str, np.ndarray]:
        """{input name: A [k, r], input name: B [r, n]}, float32; empty where the tenant changes nothing here."""
        downs, ups, row = [np.zeros((self.k, 0), np.float32)], [np.zeros((0, self.n), np.float32)], 0
        for source, rows in self.sources.items():
            if f"{source}.weight" in tenant.products:
                left, right = tenant.products[f"{source}.weight"]()
                block = np.zeros((right.shape[0], self.n), np.float32)
                block[:, row : row + rows] = left.T * np.float32(self.scale)
                downs.append(right.T)
                ups.append(block)
            row += rows
        down, up = np.concatenate(downs, axis=1), np.concatenate(ups, axis=0)
        return {f"{self.matrix}.lora_A": np.ascontiguousarray(down), f"{self.matrix}.lora_B": up} if down.shape[1] else {}


class Attachments:
    """The products of one graph: `beside` adds the nodes of a matrix while the graph is built, `write` makes the files when it is done."""

    def __init__(self, tenants: Sequence[Tenant], graph: GraphBuilder) -> None:
        self.tenants, self._graph = tuple(tenants), graph
        self._sites: list[Site] = []

    def beside(self, node: str, x: ir.Value, y: ir.Value, site: Site) -> ir.Value:
        """x [..., k] and y = x W^T [..., n] -> y plus the active tenant's product; y itself for a matrix that no tenant changes."""
        if not any(f"{source}.weight" in tenant.products for tenant in self.tenants for source in site.sources):
            return y
        self._sites.append(site)
        rank = f"{site.matrix}.lora_rank"
        down = self._optional(f"{site.matrix}.lora_A", (site.k, 0), [site.k, rank])
        up = self._optional(f"{site.matrix}.lora_B", (0, site.n), [rank, site.n])
        thin = self._graph.op(f"{node}/lora_A", "MatMul", [x, down])
        return self._graph.op(f"{node}/lora", "Add", [y, self._graph.op(f"{node}/lora_B", "MatMul", [thin, up])])

    def _optional(self, name: str, empty: tuple[int, int], shape: list[int | str]) -> ir.Value:
        """A graph input that need not be fed: an initializer of the same name holds its default."""
        value = self._graph.constant(name, np.zeros(empty, np.float32))
        value.shape = ir.Shape(shape)
        self._graph.inputs.append(value)
        return value

    def write(self, directory: Path, model_version: int) -> tuple[AdapterRow, ...]:
        """One file per tenant, one tenant in memory at a time. Raises ArchitectureError for a change of a tensor that is no matrix of the graph."""
        reached = {f"{source}.weight" for site in self._sites for source in site.sources}
        for tenant in self.tenants:
            if lost := sorted(set(tenant.products) - reached):
                raise ArchitectureError(
                    f"adapter {tenant.name}: {lost[0]}", expected="a linear weight of the decoder", found="a tensor that the graph does not multiply with",
                    remedy="merge this delta instead (`deltas: {mode: merged, ...}`)",
                )  # fmt: skip
        return tuple(self._file(tenant, directory, model_version) for tenant in self.tenants)

    def _file(self, tenant: Tenant, directory: Path, model_version: int) -> AdapterRow:
        from onnxruntime import AdapterFormat, OrtValue

        filled = {site.matrix: site.parameters(tenant) for site in self._sites}
        touched = {matrix: arrays for matrix, arrays in filled.items() if arrays}
        arrays = {name: array for pair in touched.values() for name, array in sorted(pair.items())}
        stored = AdapterFormat()
        stored.set_adapter_version(FORMAT_VERSION)
        stored.set_model_version(model_version)
        stored.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
        path = directory / f"{tenant.name}{SUFFIX}"
        stored.export_adapter(str(path))
        rank = max((array.shape[1] for name, array in arrays.items() if name.endswith(".lora_A")), default=0)
        parameters = sum(array.size for array in arrays.values())
        return AdapterRow(tenant.name, path.name, rank, tuple(touched), parameters, path.stat().st_size, tenant.digest, model_version)


def model_version(digest: str) -> int:
    """What the adapters of one base share: the first 28 bits of its digest, for onnxruntime's format has room for 31."""
    return int(digest[:7], 16)
