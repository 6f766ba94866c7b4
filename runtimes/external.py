"""Every reference of an ONNX file to bytes outside of it, checked before onnxruntime follows one.

External data hangs on a TensorProto, and tensors stand in more places than a graph's initializers: sparse initializers, attributes of nodes (Constant's value,
sparse_value), subgraphs, functions, training graphs. This walks protobuf's wire format (a device has no `onnx` package) through all of them. Field numbers are
those of onnx.proto3. Rules:

1. `location` is the plain name of a regular file beside the graph: no folder, no link, no address of memory.
2. Keys are location, offset, length and checksum, each at most once.
3. offset and length are whole numbers inside the file.
4. Messages nest at most DEPTH deep, and every length stays inside its message.
5. An operator's domain is one of onnxruntime's own or of a function in the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path

from targets.errors import BundleError

DEPTH = 64
KEYS = {"location", "offset", "length", "checksum"}
DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
MOST_BYTES = 2 << 30
LEAVES, SMALL = ("attribute", "tensor"), 100  # bytes; a shorter one without the word location refers to nothing, and most are such
# message -> field number -> message that stands there
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "external": {},
}
TEXTS = {"node": {4: "op", 7: "domain"}, "function": {10: "domain"}, "tensor": {8: "name"}, "external": {1: "key", 2: "value"}}
LOADS = "a model that onnxruntime loads"
WANTED = {kind: {*inside, *TEXTS.get(kind, {})} for kind, inside in MESSAGES.items()}
REMEDY = "do not use this file: build it again with `trimtab compile`"


def check_graph(path: Path) -> None:
    """Raises BundleError naming the first tensor or operator that breaks a rule."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise _wrong(path, "at most 2 GB, as protobuf allows", f"{size} bytes", "ONNX_PARSE")
    data = path.read_bytes()
    domains, used = set(DOMAINS), dict[str, str]()
    pending = [("model", data, 0)]
    while pending:
        kind, message, depth = pending.pop()
        if depth > DEPTH:
            raise _wrong(path, f"at most {DEPTH} levels", "more", "ONNX_GRAPH")
        texts: dict[str, str] = {}
        entries: list[bytes] = []
        inside, named = MESSAGES[kind], TEXTS.get(kind, {})
        for number, part in _fields(path, message, WANTED[kind]):
            if number in named:
                texts[named[number]] = part.decode("utf-8", "replace")
            elif number in inside and inside[number] == "external":
                entries.append(part)
            elif number in inside and (inside[number] not in LEAVES or len(part) > SMALL or b"location" in part):
                pending.append((inside[number], part, depth + 1))
        if kind == "function":
            domains.add(texts.get("domain", ""))
        if kind == "node":
            used.setdefault(texts.get("domain", ""), texts.get("op", ""))
        if entries:
            _check_external(path, texts.get("name", ""), entries)
    for domain, operator in used.items():
        if domain not in domains:
            raise _wrong(path, "operators of onnxruntime", f"{operator} of domain {domain!r}", "ONNX_OP")


def _fields(path: Path, message: bytes, wanted: Container[int]) -> Iterator[tuple[int, bytes]]:
    """(field number, content) of every wanted length-delimited field; the others are skipped, and checked only to end where they should.

    Nearly all tags and lengths of a graph are one byte, which is read here without a call: a walk over 160 kB takes some hundredths of a second.
    """
    at, end = 0, len(message)
    while at < end:
        tag = message[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(path, message, at - 1)
        form = tag & 7
        if form == 2:
            length = message[at] if at < end else 0x80
            at += 1
            if length >= 0x80:
                length, at = _varint(path, message, at - 1)
            if length > end - at:
                raise _wrong(path, LOADS, f"{length} bytes where {end - at} are left", "ONNX_PARSE")
            if tag >> 3 in wanted:
                yield tag >> 3, message[at : at + length]
            at += length
        elif form == 0:
            _, at = _varint(path, message, at)
        elif form in (1, 5):
            at += 8 if form == 1 else 4
        else:
            raise _wrong(path, LOADS, f"a field of wire type {form}", "ONNX_PARSE")
    if at != end:
        raise _wrong(path, LOADS, "a field that is cut off", "ONNX_PARSE")


def _varint(path: Path, message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in message[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _wrong(path, LOADS, "a number that does not end", "ONNX_PARSE")


def _check_external(path: Path, tensor: str, entries: list[bytes]) -> None:
    """Rules 1 to 3 for one tensor."""
    told: dict[str, str] = {}
    for entry in entries:
        pair = {number: part.decode("utf-8", "replace") for number, part in _fields(path, entry, (1, 2))}
        key = pair.get(1, "")
        if key not in KEYS or key in told:
            raise _wrong(path, f"each of {', '.join(sorted(KEYS))} once", f"{key!r} of {tensor!r}", "ONNX_EXTERNAL_KEY")
        told[key] = pair.get(2, "")
    location = told.get("location", "")
    if not location or location in (".", "..") or any(letter in location for letter in "/\\:\0") or not _is_plain(path.parent / location):
        raise _wrong(path, "external data in a file of the bundle", f"{location!r} of {tensor!r}", "ONNX_EXTERNAL_PATH")
    size = (path.parent / location).stat().st_size
    numbers = {key: int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1 for key in ("offset", "length") if (text := told.get(key, "0"))}
    begin, length = numbers.get("offset", 0), numbers.get("length", 0)
    if begin < 0 or length < 0 or begin + length > size:
        found = f"offset {told.get('offset')}, length {told.get('length')} of {tensor!r} in {size} bytes"
        raise _wrong(path, "external data inside its file", found, "ONNX_EXTERNAL_RANGE")


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _wrong(path: Path, expected: str, found: str, code: str) -> BundleError:
    return BundleError(str(path), expected=expected, found=found, remedy=REMEDY, code=code)
