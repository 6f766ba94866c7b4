"""What must hold of a model's small files before anything else reads them: config.json, tokenizer.json, and where links lead.

1. config.json names no code: `auto_map` and `custom_pipelines` are dropped (trimtab runs none), a key or value that makes a library fetch some is refused.
2. tokenizer.json is of a reasonable size, gives each token an id of its own, and no id beyond the embedding.
3. A file may be a link inside the folder, or into the `blobs` of a hub's cache, where snapshots are links; anywhere else it would carry a file of this machine
   into the bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compiler.checkpoints.files import file_size, plain_json
from compiler.errors import CheckpointError

DROPPED = ("auto_map", "custom_pipelines")
TOKENIZER_LIMIT_BYTES = 64 << 20
MOST_ADDED = 100_000
KERNEL_KEYS = ("_attn_implementation", "attn_implementation", "_experts_implementation")


def safe_config(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Rule 1, at any depth. Raises CheckpointError naming the key."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in DROPPED:
            continue
        fetches = key in KERNEL_KEYS and isinstance(value, str) and "/" in value
        if key.endswith("_internal") or (key == "trust_remote_code" and value) or fetches:
            remedy = "remove the key from config.json, after finding out who put it there"
            raise CheckpointError(f"{place}: {key}", expected="no key that loads code", found=repr(value)[:60], remedy=remedy, code="CONFIG_KEY")
        kept[key] = safe_config(value, f"{place}: {key}") if isinstance(value, Mapping) else value
    return kept


def check_tokenizer(data: bytes, rows: int | None, place: str) -> None:
    """Rule 2. rows: of the embedding, None where there is none. Raises CheckpointError."""
    if len(data) > TOKENIZER_LIMIT_BYTES:
        raise _limit(place, f"at most {TOKENIZER_LIMIT_BYTES} bytes", f"{len(data)}")
    try:
        told = plain_json(data, place, "the tokenizer")
    except CheckpointError as error:
        raise CheckpointError(place, expected=error.expected, found=error.found, remedy=error.remedy, code="TOKENIZER_JSON") from error
    added = told.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(row, dict) for row in added):
        raise CheckpointError(place, expected="a list of added_tokens", found=type(added).__name__, remedy="save the tokenizer again", code="TOKENIZER_JSON")
    if len(added) > MOST_ADDED:
        raise _limit(place, f"at most {MOST_ADDED} added tokens", f"{len(added)}")
    _check_ids(told.get("model") or {}, added, rows, place)


def _check_ids(model: Any, added: Iterable[Mapping[str, Any]], rows: int | None, place: str) -> None:
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    by_id: dict[Any, str] = {}
    pairs = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(pair[0], number) for number, pair in enumerate(vocabulary or []) if pair]
    for token, number in [*pairs, *((row.get("content"), row.get("id")) for row in added)]:
        if not isinstance(number, int) or number < 0 or by_id.setdefault(number, str(token)) != str(token):
            other = f", and of {by_id[number]!r}" if number in by_id else ""
            raise _ids(place, "an id of its own for each token", f"{number!r} of {str(token)[:40]!r}{other}")
    if rows is not None and by_id and max(by_id) >= rows:
        raise _ids(place, f"ids below {rows}, the rows of the embedding", f"{max(by_id)} of {by_id[max(by_id)][:40]!r}")


def _ids(place: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(place, expected=expected, found=found, remedy="take the tokenizer that the model was trained with", code="TOKENIZER_IDS")


def _limit(place: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(place, expected=expected, found=found, remedy="take the tokenizer that the model was trained with", code="TOKENIZER_LIMIT")


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Rule 3, and that each is a regular file. Raises CheckpointError."""
    home = folder.resolve()
    homes = (home, home.parent.parent / "blobs")
    for name in names:
        file_size(folder / name)
        if (folder / name).is_symlink() or any(parent.is_symlink() for parent in (folder / name).parents if parent.is_relative_to(folder) and parent != folder):
            target = (folder / name).resolve()
            if not any(target.is_relative_to(place) for place in homes):
                place, remedy = str(folder / name), "put the file itself there"
                raise CheckpointError(place, expected="a file of this folder", found=f"a link to {target}", remedy=remedy, code="FILE_LINK")
