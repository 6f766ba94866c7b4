"""Added tokens: a delta trained on a base whose embedding and head were given more rows, and the tokenizer that goes with them.

1. A delta grows the tables (tensors with one row per token) when it holds the values of rows that the base lacks: whole tables
   (PEFT's modules_to_save and saved embeddings), trained tokens, another checkpoint. The base is then read with rows of zeros
   below its own, so that every edit binds as usual.
2. Every added row of every table must come from exactly one delta, at weight 1: its value is nowhere else. A tied head has the
   embedding's rows.
3. The tokenizer beside the delta becomes the model's, where it has more tokens than the base's. Rows may be more than tokens
   (tables padded to a multiple), never fewer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compiler.checkpoints.files import sha256_parts
from compiler.checkpoints.resolve import TOKENIZER_FILES
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.deltas.base import Delta, wrong_delta
from compiler.deltas.bind import Bound
from compiler.deltas.names import EMBEDDINGS, HEADS, Names

TABLE = re.compile(r"(.+\.)?(lm_head|embed_out|predictions(\.decoder)?)\.(weight|bias)")
TOKENIZER = "tokenizer.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")  # kept where the delta brings none


@dataclass(frozen=True)
class Growth:
    """The base as the deltas see it. rows: (of the base's tables, of the grown ones), None where none grows. tables: that grow, by their base names."""

    ground: Checkpoint = field(repr=False)
    rows: tuple[int, int] | None = None
    tables: tuple[str, ...] = ()
    tokenizer: str | None = None  # digest of the tokenizer that a delta brings
    notes: tuple[str, ...] = ()


def grow(base: Checkpoint, names: Names, deltas: Sequence[Delta]) -> Growth:
    """Rules 1 and 3. Raises DeltaError: deltas with different numbers of rows, a tokenizer that is missing, does not fit the rows, or is one of two."""
    embedding = names.embedding()
    before = base.tensors[embedding].shape[0] if embedding else 0
    wanted = {delta.origin: rows for delta in deltas if (rows := _rows_brought(base, names, delta, before))}
    if len(set(wanted.values())) > 1:
        found = ", ".join(f"{rows} in {origin}" for origin, rows in wanted.items())
        raise wrong_delta(" and ".join(wanted), "one number of token rows", found, "merge them apart, or train them with one tokenizer and one resize")
    after = next(iter(wanted.values()), before)
    tables = tuple(name for name, view in base.tensors.items() if after > before and _is_table(name) and view.shape[:1] == (before,))
    brought, notes = _tokenizer(base, deltas, (before, after), tuple(wanted))
    ground = base
    if tables:
        tensors = {name: _taller(view, after) if name in tables else view for name, view in base.tensors.items()}
        ground = replace(base, tensors=tensors, config=_with_rows(base.config, after))
        notes = (f"{after - before} token rows added by {' and '.join(wanted)}: {before} to {after}", *notes)
    if brought:
        ground = replace(ground, assets=_with_tokenizer(base.assets, brought))
    digest = sha256_parts({name: hashlib.sha256(brought[name]).hexdigest() for name in brought if name in TOKENIZER_FILES}) if brought else None
    return Growth(ground, (before, after) if tables else None, tables, digest, notes)


def check_added(growth: Growth, bound: Mapping[str, Sequence[Bound]], head: tuple[str, str] | None, plain: bool) -> None:
    """Rule 2. plain: differences are summed as they are, not pruned or elected. Raises DeltaError for rows that nothing brings, or twice, or scaled."""
    if growth.rows is None:
        return
    before, after = growth.rows
    for table in (*growth.tables, *(head or ())[:1]):
        bringing = [one for one in bound.get(table, ()) if one.edit.brings and one.edit.brings[-1] >= before]
        brought = {row for one in bringing for row in one.edit.brings if row >= before}
        origins = list(dict.fromkeys(one.delta.origin for one in bringing))
        place = f"{' and '.join(origins) or growth.ground.origin}: {table}"
        if missing := [row for row in range(before, after) if row not in brought]:
            remedy = "save this table with the adapter (modules_to_save, save_embedding_layers=True), or train tied tables with ensure_weight_tying=True"
            raise wrong_delta(place, f"the values of rows {before} to {after - 1}", f"none for row {missing[0]}: they are in neither base nor delta", remedy)
        if len(origins) > 1:
            raise wrong_delta(place, "one delta that adds its rows", " and ".join(origins), "merge one of them")
        if any(one.weight != 1.0 or not (plain or one.edit.replaces) for one in bringing):
            remedy = "give this delta weight and scale 1, and combine linear"
            raise wrong_delta(place, "added rows as they were trained", "a weight, scale or combine method that changes them", remedy)


def with_added(base: TensorView, merged: TensorView) -> TensorView:
    """The base's rows, and below them those that only the merged tensor has: what a comparison with and without a delta keeps in both."""
    count = base.row_count
    if merged.row_count == count:
        return base

    def rows(start: int, stop: int) -> np.ndarray:
        parts = [view.rows(max(start, low), min(stop, high)) for view, low, high in ((base, 0, count), (merged, count, stop)) if start < high and stop > low]
        return np.concatenate(parts) if parts else merged.rows(start, stop)

    return replace(merged, rows=rows)


def _is_table(name: str) -> bool:
    return name.endswith((*EMBEDDINGS, *HEADS)) or bool(TABLE.fullmatch(name))


def _rows_brought(base: Checkpoint, names: Names, delta: Delta, before: int) -> int:
    """Rows of the tables of which the delta holds some that the base lacks; 0 for none."""
    found = 0
    for edit in delta.edits:
        name = names.find(edit.target) or (edit.target if edit.target in HEADS else "")
        same = name not in base.tensors or base.tensors[name].shape[:1] == (before,)
        if before and edit.brings and _is_table(name) and same and edit.brings[-1] >= before:
            found = max(found, edit.brings[-1] + 1)
    return found


def _taller(view: TensorView, count: int) -> TensorView:
    """Rows of zeros below."""

    def rows(start: int, stop: int) -> np.ndarray:
        block = np.zeros((stop - start, *view.shape[1:]), np.float32)
        kept = max(min(stop, view.row_count) - start, 0)
        if kept:
            block[:kept] = view.rows(start, start + kept)
        return block

    return replace(view, shape=(count, *view.shape[1:]), rows=rows)


def _with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    text = config.get("text_config")
    nested = {"text_config": {**text, "vocab_size": rows}} if isinstance(text, Mapping) and "vocab_size" in text else {}
    return {**config, **nested, **({"vocab_size": rows} if "vocab_size" in config or not nested else {})}


# --- tokenizers ------------------------------------------------------------------------------------------------------------------


def token_count(content: bytes, place: str) -> int:
    """1 + the largest token id of a tokenizer.json. Raises DeltaError for one that cannot be read."""
    try:
        told = json.loads(content)
        vocabulary = told["model"]["vocab"]
        largest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        return 1 + int(max([largest, *(int(token["id"]) for token in told.get("added_tokens") or ())]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong_delta(
            f"{place}: {TOKENIZER}", "a tokenizer as the tokenizers library writes it", type(error).__name__, "save the tokenizer again"
        ) from error


def _tokenizer(base: Checkpoint, deltas: Sequence[Delta], rows: tuple[int, int], growing: Sequence[str]) -> tuple[Mapping[str, bytes] | None, tuple[str, ...]]:
    """(the files of the tokenizer that a delta brings, or None, notes)."""
    if not growing and not any(TOKENIZER in delta.assets for delta in deltas):
        return None, ()  # the base's own is not looked at: out of a GGUF it has to be made
    own = base.assets.get(TOKENIZER)
    held = token_count(own, base.origin) if own and any(delta.assets.get(TOKENIZER, own) != own for delta in deltas) else 0
    found: dict[bytes, Delta] = {}
    notes = []
    for delta in deltas:
        content = delta.assets.get(TOKENIZER)
        grows = delta.origin in growing
        count = token_count(content, delta.origin) if content and content != own else 0
        if grows and (not count or count <= held):
            seen = "one with no more tokens than the base's" if content else "none"
            remedy = "save the tokenizer of the training run into the delta's folder (tokenizer.save_pretrained)"
            raise wrong_delta(delta.origin, f"{TOKENIZER} with the added tokens of {rows[1] - rows[0]} added rows", seen, remedy)
        if count > rows[1] and grows:
            remedy = "resize the embeddings to the tokenizer's length before training, and save both from one run"
            raise wrong_delta(f"{delta.origin}: {TOKENIZER}", f"at most {rows[1]} tokens, the rows of its tables", str(count), remedy)
        if count > rows[1] > 0:
            notes.append(f"{delta.origin} has a tokenizer of {count} tokens, more than the {rows[1]} rows of the model: the base's is kept")
        elif content and (grows or (own and count > held)):
            found.setdefault(content, delta)
    if len(found) > 1:
        origins = " and ".join(delta.origin for delta in found.values())
        raise wrong_delta(origins, "one tokenizer with added tokens", "two that differ", "merge them apart, or train both with one tokenizer")
    for delta in found.values():
        return delta.assets, (*notes, f"the tokenizer is that of {delta.origin}")
    return None, tuple(notes)


def _with_tokenizer(base: Mapping[str, bytes], brought: Mapping[str, bytes]) -> dict[str, bytes]:
    kept = {name: base[name] for name in base if name not in TOKENIZER_FILES or name in TEMPLATES}
    return {**kept, **{name: brought[name] for name in brought if name in TOKENIZER_FILES}}
