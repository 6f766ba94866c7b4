"""The codes of errors: stable between versions, unlike the words. docs/codes.md is made from these rows.

A class of the error tree has a code of its own, for faults without a finer one; the rest are given where the fault is found.
"""

from __future__ import annotations

from collections.abc import Mapping

CODES: Mapping[str, str] = {
    # whole classes
    "ERROR": "an option or argument that makes no sense here",
    "RECIPE": "a recipe or option that cannot be read, or asks for what does not exist",
    "CHECKPOINT": "a base that is missing, refused or inconsistent",
    "DELTA": "a delta that cannot be read or does not fit its base",
    "ARCHITECTURE": "a model or task that the chosen road cannot build",
    "OUTPUT": "the result could not be written",
    "LIMIT": "a limit was exceeded",
    "BENCH": "a comparison that cannot be run as asked",
    "TARGET": "a profile that cannot be read, or makes no sense",
    "BUNDLE": "a bundle that is incomplete, does not load, or is none",
    # the machine
    "SYSTEM": "the system refused a call: a permission, too many open files, a failing disk",
    "MEMORY": "not enough memory; the estimate is told before work begins where there is one",
    "DISK_FULL": "no space left",
    "CACHE": "a stored result changed while it was used",
    # any input file
    "FILE_KIND": "a folder, pipe, device or socket where a file should be",
    "FILE_LINK": "a link that leads out of the model's folder",
    "INPUT_CHANGED": "a file changed while it was read",
    "PICKLE_REFUSED": "a pickle: opening one runs code",
    "MAGIC_MISMATCH": "a file that is not what its name says",
    # safetensors
    "ST_HEADER_SMALL": "fewer than 8 bytes",
    "ST_HEADER_LENGTH": "a header longer than the file or than 100 MiB",
    "ST_HEADER_JSON": "a header that is not one JSON object of tensors",
    "ST_DUPLICATE": "a tensor name that stands twice",
    "ST_DTYPE": "a stored type that is not read",
    "ST_SHAPE": "a span that is not shape times item size",
    "ST_OVERLAP": "two tensors over the same bytes",
    "ST_NOT_COVERED": "bytes that belong to no tensor",
    "ST_TRUNCATED": "a file that ends before its last tensor",
    "LIMIT_TENSORS": "more tensors than any model has",
    "INDEX_PATH": "an index that names a file which is not beside it, or is not there",
    "INDEX_MISMATCH": "index and shards that name different tensors",
    "WEIGHT_NONFINITE": "NaN or infinity in a weight",
    # GGUF
    "GGUF": "no whole GGUF file, or a value type that is unknown",
    "GGUF_LIMIT": "a count or length that runs past the end of the file",
    "GGUF_SHAPE": "a tensor with a shape or type that cannot be, or that ends beyond the file",
    "GGUF_ALIGN": "an alignment that is no power of two",
    "GGUF_DUPLICATE": "a key or tensor that stands twice",
    # the small files of a model
    "CONFIG_JSON": "a JSON file that is no plain object: a key twice, NaN, nesting or size beyond reason",
    "CONFIG_KEY": "a config key that would load code from elsewhere",
    "TOKENIZER_JSON": "a tokenizer.json that cannot be read",
    "TOKENIZER_IDS": "token ids that stand twice, or lie beyond the embedding",
    "TOKENIZER_LIMIT": "a tokenizer too large, or too slow for a short text",
    "TEMPLATE": "a chat template that does not render",
    "TEMPLATE_UNSAFE": "a chat template that reaches beyond its messages",
    "TEMPLATE_LIMIT": "a chat template that takes too much time, memory or output",
    # deltas
    "ADAPTER_BASE": "a delta made from another base",
    "ADAPTER_SHAPE": "a rank or factor that does not fit",
    "ADAPTER_SCALE": "an alpha or weight that is no finite number",
    "ADAPTER_NONFINITE": "NaN or infinity in a delta",
    "ADAPTER_UNMATCHED": "keys of a delta that match nothing in the base",
    "REGEX_LIMIT": "a pattern of a delta that is no regular expression, or may take for ever",
    "SPARSE_INDEX": "positions that do not ascend inside the tensor",
    "SPARSE_SHAPE": "positions and values that do not belong together",
    "MERGE_OVERFLOW": "a merged value too large for the stored type",
    # recipes, profiles, data
    "YAML_UNSAFE": "YAML that is not plain: an alias, a tag, a key twice, nesting or size beyond reason",
    "RECIPE_KEY": "an unknown key; the nearest known one is named",
    "RECIPE_VALUE": "a value of another type, or a number that is not finite",
    "DISTIL_DIVERGED": "training a student gave a loss that is not finite",
    "DATA_EMPTY": "no row or text to work on",
    "DATA_TEXT": "text that is not UTF-8, or a row that cannot be read",
    # bundles
    "MANIFEST": "a manifest that is no manifest",
    "SCHEMA_NEWER": "a manifest of a newer version",
    "BUNDLE_PATH": "a manifest that names a file outside of the bundle",
    "BUNDLE_DIGEST": "a file with other bytes than the manifest says",
    "BUNDLE_MISSING": "a file that the manifest names and is not there",
    "BUNDLE_EXTRA": "a file that the manifest does not name",
    "SELFTEST": "a bundle that answers its canaries differently",
    "SIGNATURE": "a bundle that is not signed, signed with another key, or changed since",
    "EXPIRED": "a release beyond its date, by this machine's clock",
    "ROLLBACK": "a release older than one that was verified here before",
    "REBUILD": "a bundle whose bytes do not come out again",
    "REBUILD_SOURCE": "a base or delta that is not the one the bundle was made from",
    "ONNX_PARSE": "a graph that is no protobuf",
    "ONNX_GRAPH": "graphs nested beyond reason",
    "ONNX_OP": "an operator of a domain that is not onnxruntime's own",
    "ONNX_EXTERNAL_PATH": "external data in a file that is not the bundle's own",
    "ONNX_EXTERNAL_KEY": "external data described with unknown keys, or one key twice",
    "ONNX_EXTERNAL_RANGE": "external data that begins or ends beyond its file",
}
