"""Codes that a checkpoint brings along: handed to the kernels unchanged where a scheme can take them, rounded again where not.

1. A matrix whose stored codes the scheme of its recipe `holds` (compiler.checkpoints.coded) keeps them, if its method is rtn: rounding what is
   on the lattice would find that lattice again, or a worse one.
2. `scheme: as-is` gives every matrix the scheme of its own codes; a float16 one stays float16, other floats float32. What a kernel cannot take is an error that
   names it: an order of inputs (act-order), a type with offsets (Q4_1, Q4_K), or weights that a delta changed.
3. Whatever came quantized and is rounded again is told in a note: two roundings cost more than one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from compiler.checkpoints.coded import common, holds
from compiler.checkpoints.safetensors import STORED
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import RecipeError
from compiler.quantizers.affine import Quantized
from compiler.quantizers.pack import Packed, pack
from compiler.scheme import Scheme, Schemes, parse_scheme
from compiler.stages.quantize import codes_in, matrices

AS_IS = "as-is"


def schemes_for(scheme: str, fixed: Mapping[str, Scheme], checkpoint: Checkpoint, place: str = "quantize.scheme") -> Schemes:
    """The schemes that a recipe's words give the matrices of a checkpoint. Raises RecipeError for unknown words, and by rule 2."""
    return as_is(checkpoint, fixed, place) if scheme == AS_IS else Schemes(parse_scheme(scheme, place), fixed)


def as_is(checkpoint: Checkpoint, fixed: Mapping[str, Scheme], place: str = "quantize.scheme") -> Schemes:
    """Rule 2. fixed: schemes by pattern, which stand. Raises RecipeError for a checkpoint without codes, and for codes that cannot be kept."""
    found = matrices(checkpoint)
    open_to_choice = {name: views for name, views in found.items() if not any(fnmatchcase(name, pattern) for pattern in fixed)}
    stored = {name: _stored(views) for name, views in open_to_choice.items()}
    refused = [name for name, scheme in stored.items() if scheme is None]
    if refused:
        types = ", ".join(sorted({view.dtype for name in refused for view in open_to_choice[name]}))
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise RecipeError(
            place,
            expected="codes that a kernel takes as they are",
            found=f"{refused[0]}{more} ({types}): offsets, another order of inputs, or a delta that changes them",
            remedy="name a scheme for these under quantize.layers, or choose another scheme than as-is",
        )
    counts = Counter(scheme for scheme in stored.values() if scheme is not None)
    if not any(scheme.quantized for scheme in counts):
        raise RecipeError(
            place, expected="a checkpoint that is quantized already, for as-is", found="float weights", remedy="choose a scheme, such as int4-g64"
        )
    default = counts.most_common(1)[0][0]
    return Schemes(default, {**{name: scheme for name, scheme in stored.items() if scheme is not None and scheme != default}, **fixed})


def _stored(views: Sequence[TensorView]) -> Scheme | None:
    """The scheme that a fused matrix is stored in; None where nothing can hold it as it is."""
    coded = [view.coded for view in views]
    if all(one is not None for one in coded):
        return common([one.scheme for one in coded if one is not None])
    if all(view.dtype in STORED for view in views):
        return Scheme(16 if all(view.dtype == "F16" for view in views) else 32)
    return None


def codes_for(checkpoint: Checkpoint, schemes: Schemes, directory: Path | None = None) -> Callable[[str], Packed | None]:
    """The codes of a fused matrix: those that a quantizer left in `directory`, else those that came along (rule 1); None: round to nearest."""
    made = codes_in(directory) if directory is not None else lambda _: None
    found = matrices(checkpoint)

    def codes_of(name: str) -> Packed | None:
        given = made(name)
        views, scheme = found.get(name, []), schemes.of(name)
        return _kept(views, scheme) if given is None and _keeps(views, scheme) else given

    return codes_of


def _keeps(views: Sequence[TensorView], scheme: Scheme) -> bool:
    return bool(views) and all(view.coded is not None and holds(scheme, view.coded.scheme) for view in views)


def _kept(views: Sequence[TensorView], scheme: Scheme) -> Packed:
    parts = [view.coded.under(scheme, 0, view.row_count) for view in views if view.coded is not None]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return pack(
        Quantized(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(zeros) if zeros else None,
            scheme,
            parts[0].width,
        )
    )


def rounded_again(checkpoint: Checkpoint, schemes: Schemes, methods: Callable[[str], str]) -> list[str]:
    """Rule 3, at most one note. methods: fused matrix -> its method."""
    types: Counter[str] = Counter()
    for name, views in matrices(checkpoint).items():
        if any(view.dtype not in STORED for view in views) and not (methods(name) == "rtn" and _keeps(views, schemes.of(name))):
            types.update(view.dtype for view in views if view.dtype not in STORED)
    if not types:
        return []
    listed = ", ".join(f"{count} of {dtype}" for dtype, count in types.most_common())
    return [f"matrices that came quantized ({listed}) are decoded and rounded again; what the first rounding lost is in no metric"]
