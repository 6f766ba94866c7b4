"""Quantize: weights seen through their scheme.

The exporter quantizes as it streams, so no quantized checkpoint lies on the way to a bundle. This stage is the same
step as files in, files out: each weight becomes `dequantize(quantize(weight))` in float32, by the same code that fills
the kernels. It answers "what does the rounding alone cost", apart from kernels and activations.

Methods other than rtn look at more than a row block, and calibrated ones at what enters each matrix (compiler.quantizers.methods). For those,
`quantize_matrices` makes the codes before the export, block by block, each block calibrated on the outputs of the quantized ones before it, and the
exporter takes them by name (`Quantized matrices` on disk: `<matrix>.npz` with codes, scales and zero points in the kernel's layout).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.coded import holds
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import RecipeError
from compiler.evaluation.data import EvaluationSet
from compiler.quantizers import affine
from compiler.quantizers.methods import METHODS
from compiler.quantizers.pack import Packed, unpack
from compiler.quantizers.rows import dequantize_rows, quantize_rows
from compiler.scheme import Scheme, Schemes, matrix_name, parse_scheme, stored_bytes
from compiler.store import cache_key, writing

Report = Callable[[str, int, int], None]
HEAD = "lm_head"
BY_TOKEN = 0.02  # of a tied head's H: on SmolLM2 (by hand, 24 windows) 0 loses 1 % more KL, 1 loses 4 to 6 %


def scheme_of(view: TensorView, schemes: Schemes, config: Mapping[str, Any]) -> Scheme | None:
    """The scheme a tensor is stored in, or None where it stays float32."""
    name = matrix_name(view.name, config)
    scheme = schemes.of(name) if name else None
    return scheme if scheme and scheme.bits < 32 else None


def quantized_view(checkpoint: Checkpoint, schemes: Schemes) -> Checkpoint:
    """The checkpoint with every matrix seen through its scheme; lazy, the input is never changed."""

    def through(view: TensorView, scheme: Scheme) -> TensorView:
        def rows(start: int, stop: int) -> np.ndarray:
            block = view.rows(start, stop)
            if scheme.bits == 16:
                return block.astype(np.float16).astype(np.float32)
            if scheme.kernel == "tokens":
                return dequantize_rows(*quantize_rows(block))
            return affine.dequantize(affine.quantize(block, scheme))

        if view.coded is not None and holds(scheme, view.coded.scheme):
            return replace(view, dtype="F32")
        return replace(view, dtype="F32", rows=rows)

    tensors = {name: through(view, scheme) if (scheme := scheme_of(view, schemes, checkpoint.config)) else view for name, view in checkpoint.tensors.items()}
    identity = {"default": str(schemes.default), "layers": {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}}
    return replace(checkpoint, tensors=tensors, digest_of=lambda: cache_key({"base": checkpoint.digest, "quantize": identity}))


def predicted_bytes(checkpoint: Checkpoint, schemes: Schemes, *, every_matrix: bool = False) -> int:
    """Bytes of the weights in a bundle, from shapes alone: codes, float32 scales, packed zero points, float32 for the rest.

    every_matrix  the encoder road: any 2-D tensor takes the default scheme
    """
    total = 0
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for view in checkpoint.tensors.values():
        if tied and view.name == "lm_head.weight":
            continue
        scheme = schemes.default if every_matrix and len(view.shape) == 2 else scheme_of(view, schemes, checkpoint.config)
        total += 4 * view.size if scheme is None else stored_bytes(view.shape, scheme)
    return total


def resolve_method(checkpoint: Checkpoint, schemes: Schemes, methods: Mapping[str, str], calibration: EvaluationSet | None) -> dict[str, Any] | None:
    """The printable parameters of a calibrated quantization, which its key is made of; None where everything is rounded to nearest.

    methods  matrix pattern -> method, the last match wins; a matrix that none matches, or whose scheme is a float, is left to the exporter
    Raises RecipeError for a method that is not known, or one that needs text and has none.
    """
    for pattern, method in methods.items():
        if method not in METHODS:
            raise RecipeError(f"quantize.method ({pattern})", expected=f"one of {', '.join(METHODS)}", found=repr(method), remedy="choose one of these")
    chosen = {name: method_of(name, methods) for name in matrices(checkpoint) if schemes.of(name).quantized}
    for name, method in chosen.items():
        if method != "rtn" and schemes.of(name).group_size is None:
            raise RecipeError(f"quantize.method ({name})", expected="rtn for int8-rows", found=repr(method), remedy="choose rtn, or a scheme with groups")
    if all(method == "rtn" for method in chosen.values()):
        return None
    calibrated = any(METHODS[method].calibrated for method in chosen.values())
    if calibrated and calibration is None:
        raise RecipeError("quantize.calibration", expected="text to calibrate on", found="none", remedy="name a file, or builtin")
    layers = {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}
    digest = calibration.digest if calibrated and calibration is not None else None
    return {"scheme": str(schemes.default), "layers": layers, "methods": dict(methods), "calibration": digest}


def method_of(name: str, methods: Mapping[str, str]) -> str:
    """The method of a fused matrix: the last pattern that matches, else rtn."""
    return next((method for pattern, method in reversed(list(methods.items())) if fnmatchcase(name, pattern)), "rtn")


def matrices(checkpoint: Checkpoint) -> dict[str, list[TensorView]]:
    """Fused matrix -> the tensors stacked in it, in the order of the graph's rows (q, k, v; gate, up)."""
    found: dict[str, list[TensorView]] = {}
    for name, view in checkpoint.tensors.items():
        matrix = matrix_name(name, checkpoint.config)
        if matrix and not (name == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings")):
            found.setdefault(matrix, []).append(view)
    order = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for views in found.values():
        views.sort(key=lambda view: next((place for place, part in enumerate(order) if f".{part}." in view.name), 0))
    return found


def quantize_matrices(checkpoint: Checkpoint, params: Mapping[str, Any], calibration: EvaluationSet | None, directory: Path, report: Report) -> None:
    """Fill `directory` with the codes of every matrix that `params` (of `resolve_method`) gives a method other than rtn.

    Peak memory is one block with the activations of the windows, or the head. Raises RecipeError, CheckpointError or OutputError.
    """
    schemes = Schemes(parse_scheme(params["scheme"]), {pattern: parse_scheme(text) for pattern, text in params["layers"].items()})
    work = MatrixQuantizer(checkpoint, schemes, params["methods"], directory)
    with writing(directory):
        if params["calibration"] is None or calibration is None:
            work.uncalibrated(report)
        else:
            work.calibrated(calibration, report)


class MatrixQuantizer:
    """One run of quantize_matrices."""

    def __init__(self, checkpoint: Checkpoint, schemes: Schemes, methods: Mapping[str, str], directory: Path) -> None:
        self.checkpoint, self.schemes, self.methods, self.directory = checkpoint, schemes, methods, directory
        self.views = matrices(checkpoint)

    def uncalibrated(self, report: Report) -> None:
        for number, name in enumerate(self.views):
            self.quantize(name, None)
            report("matrices quantized", number + 1, len(self.views))

    def calibrated(self, calibration: EvaluationSet, report: Report) -> None:
        """Blocks front to back, each on what the quantized ones before it give; the head last."""
        from compiler.quantizers.calibrate import BlockStream
        from compiler.quantizers.windows import token_windows

        stream = BlockStream(self.checkpoint, token_windows(calibration, self.checkpoint), self.rounded_rows)
        for number, block in enumerate(stream.blocks()):
            for name, moment in block.moments().items():
                restored = self.quantize(name, moment)
                if restored is not None:
                    block.replace(name, restored)
            report("blocks quantized", number + 1, stream.block_count + 1)
        moment = stream.head_moment()
        for name in self.views:
            if name == HEAD:
                self.quantize(name, self.shared(moment))
            elif not name.startswith("model.layers."):  # an embedding of its own: every input counts alike
                self.quantize(name, np.eye(len(moment), dtype=np.float32))
        report("blocks quantized", stream.block_count + 1, stream.block_count + 1)

    def shared(self, moment: np.ndarray) -> np.ndarray:
        """The head's H; a tied one is read by token too, where every column counts alike: a little of that is added."""
        if not self.checkpoint.config.get("tie_word_embeddings"):
            return moment
        scaled = moment / np.float32(max(moment.diagonal().mean(), np.finfo(np.float32).tiny))
        return scaled + np.float32(BY_TOKEN) * np.eye(len(moment), dtype=np.float32)

    def rounded_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the embedding as they will about be read: rounded to nearest in their scheme."""
        scheme = self.schemes.of(HEAD if self.checkpoint.config.get("tie_word_embeddings") else "model.embed_tokens")
        return affine.dequantize(affine.quantize(rows, scheme)) if scheme.kernel == "nbits" else rows

    def quantize(self, name: str, moment: np.ndarray | None) -> np.ndarray | None:
        """Write the codes of one matrix and give back what they stand for, float32 [rows, k]; None where the exporter will do it or it stays float."""
        scheme, method = self.schemes.of(name), METHODS[method_of(name, self.methods)]
        if scheme.kernel != "nbits":
            return None
        weight = np.concatenate([view.read() for view in self.views[name]])
        packed = method.quantize(weight, scheme, moment if method.calibrated else None)
        if method_of(name, self.methods) != "rtn":
            save_packed(self.directory / f"{name}.npz", packed)
        return affine.dequantize(unpack(packed, scheme, weight.shape[1])) if name not in (HEAD, "model.embed_tokens") else None


def save_packed(path: Path, packed: Packed) -> None:
    """codes, scales and zero points of one matrix in a file."""
    arrays = {"codes": packed.codes, "scales": packed.scales} | ({} if packed.zero_points is None else {"zero_points": packed.zero_points})
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's own `allow_pickle` is not among the names


def codes_in(directory: Path) -> Callable[[str], Packed | None]:
    """What `quantize_matrices` left in a folder, by name of the matrix."""

    def codes_of(name: str) -> Packed | None:
        file = directory / f"{name}.npz"
        if not file.is_file():
            return None
        with np.load(file) as stored:
            return Packed(stored["codes"], stored["scales"], stored.get("zero_points"))

    return codes_of
