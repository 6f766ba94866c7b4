"""Two checkpoints -> the smallest delta that leads from one to the other within an error bound.

Every tensor that differs is measured once: how many entries changed, the norm of the difference D, and, for a matrix, the
smallest rank r whose best approximation leaves at most

    max(error * |D|, u * |W|)     Frobenius norms; W the new tensor, u = 2^-24 where it is stored in 32 bits, else 0

(the second term: entries of W were rounded when they were stored, so D carries that noise and no rank explains it; at 16
bits the rounding is as large as real deltas are, so it is never taken for noise). Given the rms of each layer's inputs, D and W are taken times it,
so the bound is one on the outputs (compiler.activations). Three forms are compared by their bytes:

    lora     B A of rank r where 4 r (n + m) bytes are fewer than the tensor, other tensors whole, as PEFT stores them
    sparse   position and difference of every entry that changed
    diff     the whole difference of every tensor that changed

sparse and diff are exact but for one rounding in float32. All three stream: a tensor's factors are computed again when they are written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compiler.checkpoints.safetensors import FLOATS, STORED
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import wrong_delta
from compiler.deltas.names import EMBEDDINGS, HEADS, STORED_INPUT_FIRST, Names
from compiler.deltas.spectrum import Spectrum, beyond, spectrum

FORMAT = {"format": "trimtab-delta", "version": "1"}  # metadata of our own files, as compiler.deltas.sparse and diff read them
LOOKUPS = (*EMBEDDINGS, "wpe.weight", "position_embeddings.weight", "token_type_embeddings.weight")  # 2-D, and no matrix product
BLOCK_BYTES = 4 << 20
FIRST_GUESS = 16
Update = Callable[[str, int, int], None]
Stored = tuple[str, str, tuple[int, ...], Callable[[], Iterable[bytes]]]  # name, dtype, shape, its bytes in pieces


@dataclass(frozen=True)
class Difference:
    """One tensor that differs. old: None for a tensor that the base lacks. rank: None where no low rank will do."""

    name: str
    old: TensorView | None
    new: TensorView
    changed: int
    norm: float
    allowed: float
    rank: int | None = None
    error: float = 0.0  # relative, of the low-rank form
    rms: np.ndarray | None = None  # of the inputs, float64 [in]; None: the plain Frobenius norm
    turned: bool = False  # stored [in, out]

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Rows of new - old, float32."""
        block = self.new.rows(first, stop)
        return block if self.old is None else block - self.old.rows(first, stop)

    def weighted(self, first: int, stop: int) -> np.ndarray:
        """The same rows in the norm that the rank is chosen in: times the rms of the inputs, float64 where there is one."""
        block = self.rows(first, stop)
        if self.rms is None:
            return block
        return np.asarray(block * (self.rms[first:stop, None] if self.turned else self.rms))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(flat index of the first entry, flat difference)."""
        width = self.new.size // max(self.new.row_count, 1)
        step = max(1, BLOCK_BYTES // max(4 * width, 1))
        for first in range(0, self.new.row_count, step):
            yield first * width, self.rows(first, min(first + step, self.new.row_count)).reshape(-1)

    @property
    def whole_bytes(self) -> int:
        return 4 * self.new.size

    @property
    def lora_bytes(self) -> int:
        return self.whole_bytes if self.rank is None else 4 * self.rank * sum(self.new.shape)

    @property
    def sparse_bytes(self) -> int:
        return self.changed * (4 + self.index.itemsize)

    @property
    def index(self) -> np.dtype[Any]:
        return STORED["I32" if self.new.size < 1 << 31 else "I64"]


def differences(
    old: Checkpoint, new: Checkpoint, error: float, most: int, update: Update | None = None, rms: Mapping[str, np.ndarray] | None = None
) -> list[Difference]:
    """What differs, measured. rms: of the inputs of old's linear layers (compiler.activations), for a rank chosen by the error of outputs.

    Raises DeltaError: a tensor that only the base has, another shape, values that are not finite, or no difference at all."""
    names = Names(old.tensors, str(old.config.get("model_type")))
    pairs = {(names.find(name) or name): view for name, view in new.tensors.items()}
    gone = [name for name in old.tensors if name not in pairs and not (name in HEADS and new.config.get("tie_word_embeddings", True))]
    if gone:
        raise wrong_delta(new.origin, f"every tensor of {old.origin}", f"no {gone[0]} ({len(gone)} missing)", "a delta cannot remove tensors")
    found = []
    for number, (name, view) in enumerate(pairs.items(), 1):
        turned = old.config.get("model_type") in STORED_INPUT_FIRST and name not in HEADS
        one = _measure(Difference(name, old.tensors.get(name), view, 0, 0.0, 0.0, rms=(rms or {}).get(name), turned=turned), error, most)
        if one:
            found.append(one)
        if update:
            update(name, number, len(pairs))
    if not found:
        raise wrong_delta(new.origin, f"a checkpoint that differs from {old.origin}", "the same values in every tensor", "compare two others")
    return found


def _measure(one: Difference, error: float, most: int) -> Difference | None:
    name, old, new = one.name, one.old, one.new
    if old is not None and old.shape != new.shape:
        remedy = "a delta changes values: bring both to one shape first (for a grown vocabulary, resize the base's embedding)"
        raise wrong_delta(name, f"shape {list(old.shape)} as in the base", f"{list(new.shape)}", remedy)
    changed, energy, size = 0, 0.0, 0.0
    for first, block in one.blocks():
        changed += int(np.count_nonzero(block))
        energy += float(np.sum(np.square(block, dtype=np.float64)))
        if not math.isfinite(energy):
            raise wrong_delta(name, "finite numbers in both checkpoints", f"NaN or infinity near entry {first}", "repair the checkpoint")
        size += float(np.sum(np.square(_flat(new, first, block.size), dtype=np.float64))) if new.dtype == "F32" else 0.0
    if not changed and old is not None:
        return None
    norm = math.sqrt(energy)
    allowed = max(error * norm, 2.0**-24 * math.sqrt(size))
    measured = replace(one, changed=changed, norm=norm, allowed=allowed)
    if old is None or len(new.shape) != 2 or new.dtype not in FLOATS:
        return measured
    return _ranked(measured, error, most)


def _ranked(measured: Difference, error: float, most: int) -> Difference:
    """The same with its smallest rank, where one of at most `most` will do."""
    new, norm, allowed = measured.new, measured.norm, measured.allowed
    if measured.rms is not None:  # the outputs' norm takes the place of the weights'; the noise of float32 grows with the largest input at most
        noise = (allowed if allowed > error * norm else 0.0) * float(measured.rms.max())
        norm = _weighted_norm(measured)
        allowed = max(error * norm, noise)
        measured = replace(measured, norm=norm, allowed=allowed)
    n, m = new.shape
    most = min(most, (n * m - 1) // (n + m))  # beyond it the tensor itself is smaller
    if most > 0 and beyond(measured.weighted, (n, m), most, allowed):
        return measured
    for guess in sorted({min(most, FIRST_GUESS), most} - {0}):  # most adapters have a small rank, and a small sketch is quick
        found = spectrum(measured.weighted, (n, m), guess, allowed / norm)
        rank = found.rank_within(allowed, guess)
        if rank is not None:
            return replace(measured, rank=rank, error=found.residual(rank) / norm)
    return measured


def _weighted_norm(one: Difference) -> float:
    step, total = max(1, BLOCK_BYTES // (4 * one.new.shape[1])), 0.0
    for first in range(0, one.new.row_count, step):
        total += float(np.sum(np.square(one.weighted(first, min(first + step, one.new.row_count)), dtype=np.float64)))
    return math.sqrt(total)


def _flat(view: TensorView, first: int, count: int) -> np.ndarray:
    width = view.size // max(view.row_count, 1)
    return view.rows(first // width, (first + count) // width)


def smallest(found: Iterable[Difference]) -> tuple[str, dict[str, int]]:
    """(form, bytes by form). A tensor that the base lacks can only be stored as PEFT's whole modules are."""
    found = list(found)
    sizes = {"diff": sum(one.whole_bytes for one in found), "sparse": sum(one.sparse_bytes for one in found)}
    added = any(one.old is None for one in found)
    if added or any(one.rank is not None for one in found):
        sizes["lora"] = sum(one.lora_bytes for one in found)
    return ("lora" if added else min(sizes, key=lambda form: (sizes[form], form))), sizes


# --- writing -----------------------------------------------------------------------------------------------------------------------


def write_delta(folder: Path, form: str, found: Sequence[Difference], old: Checkpoint, new: Checkpoint) -> None:
    """The delta as `load_delta` reads it. form: lora, sparse or diff. The caller turns OSError into its own."""
    if form == "lora":
        config, stored = _lora(list(found), old, new)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_tensors(folder / "adapter_model.safetensors", stored, {"format": "pt", "base_digest": old.digest})
        labels = {key: new.config[key] for key in ("id2label", "label2id") if key in new.config}
        if any(one.old is None for one in found) and labels:
            (folder / "config.json").write_text(json.dumps(labels, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    metadata = {**FORMAT, "kind": form, "base_digest": old.digest, "base_name": old.origin}
    if form == "sparse":
        metadata["shapes"] = json.dumps({one.name: list(one.new.shape) for one in found})
    rows = [row for one in found for row in (_sparse(one) if form == "sparse" else _whole(one, one.name))]
    write_tensors(folder / "delta.safetensors", sorted(rows, key=lambda row: -STORED[row[1]].itemsize), metadata)


def write_tensors(path: Path, stored: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    """A safetensors file whose tensors arrive in pieces. stored: wide types first, so that all are aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, shape, _ in stored:
        size = math.prod(shape) * STORED[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, pieces in stored:
            for piece in pieces():
                file.write(piece)


def _sparse(one: Difference) -> Iterator[Stored]:
    index = one.index

    def indices() -> Iterator[bytes]:
        return ((np.flatnonzero(block) + first).astype(index).tobytes() for first, block in one.blocks())

    yield f"{one.name}.indices", "I32" if index.itemsize == 4 else "I64", (one.changed,), indices
    yield f"{one.name}.values", "F32", (one.changed,), lambda: (block[block != 0].astype("<f4").tobytes() for _, block in one.blocks())


def _whole(one: Difference, name: str) -> Iterator[Stored]:
    yield name, "F32", one.new.shape, lambda: (block.astype("<f4").tobytes() for _, block in one.blocks())


def _lora(found: list[Difference], old: Checkpoint, new: Checkpoint) -> tuple[dict[str, Any], list[Stored]]:
    """(adapter_config.json, tensors). lora_alpha = r for every module, so the scale is 1."""
    ranks = {one.name.removesuffix(".weight"): one.rank for one in found if one.rank is not None}
    input_first = old.config.get("model_type") in STORED_INPUT_FIRST
    stored: list[Stored] = []
    for one in found:
        if one.rank is None:
            width = Difference(one.name, None, one.new, 0, 0.0, 0.0)  # whole modules replace: the new values, not the difference
            stored += _whole(width, f"base_model.model.{one.name}")
        else:
            stored += _factors(one, input_first)
    patterns = {f"^{re.escape(module)}": rank for module, rank in ranks.items()}
    whole = [one.name for one in found if one.rank is None]
    most = max(ranks.values(), default=8)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": old.origin,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] or name for name in whole if not _bias(name, old)}) or None,
        "bias": "all" if any(_bias(name, old) for name in whole) else "none",
        "fan_in_fan_out": input_first,
        "ensure_weight_tying": bool(old.config.get("tie_word_embeddings")) and bool(new.config.get("tie_word_embeddings")),
        "task_type": "SEQ_CLS" if any(one.old is None for one in found) else None,
        "inference_mode": True,
    }
    return config, stored


def _bias(name: str, old: Checkpoint) -> bool:
    return name.endswith(".bias") and name in old.tensors


def _factors(one: Difference, input_first: bool) -> list[Stored]:
    """A and B of one matrix. Stored [out, in]: B = left sqrt(S), A = sqrt(S) right; where the stored tensor is (B A)^T they change places."""
    rank, module = int(one.rank or 1), f"base_model.model.{one.name.removesuffix('.weight')}"
    held: list[Spectrum] = []  # from A until B is written

    def halves(last: bool) -> tuple[np.ndarray, np.ndarray]:
        if not held:
            held.append(spectrum(one.weighted, (one.new.shape[0], one.new.shape[1]), rank, one.allowed / one.norm))
        found = held.pop() if last else held[0]
        root = np.sqrt(found.values[:rank])
        left, right = found.left[:, :rank] * root, root[:, None] * found.right[:rank]
        if one.rms is not None and one.turned:
            left = left / one.rms[:, None]
        elif one.rms is not None:
            right = right / one.rms
        return left, right

    n, m = one.new.shape
    lookup = one.name.endswith(LOOKUPS)
    turned = lookup or (input_first and one.name not in HEADS)
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A.weight", "lora_B.weight")
    if turned:
        return [
            (f"{module}.{a_name}", "F32", (rank, n), lambda: [_f32(halves(False)[0].T)]),
            (f"{module}.{b_name}", "F32", (m, rank), lambda: [_f32(halves(True)[1].T)]),
        ]
    return [
        (f"{module}.{a_name}", "F32", (rank, m), lambda: [_f32(halves(False)[1])]),
        (f"{module}.{b_name}", "F32", (n, rank), lambda: [_f32(halves(True)[0])]),
    ]


def _f32(matrix: np.ndarray) -> bytes:
    return np.ascontiguousarray(matrix, "<f4").tobytes()


def summary(found: Iterable[Difference], form: str) -> list[Mapping[str, Any]]:
    """One row per tensor that differs, for the report."""
    return [
        {
            "tensor": one.name,
            "shape": list(one.new.shape),
            "changed": one.changed,
            "norm": one.norm,
            "rank": one.rank if form == "lora" else None,
            "error": one.error if form == "lora" else 0.0,
        }
        for one in found
    ]
