"""tokenizer.json and tokenizer_config.json from the vocabulary in a GGUF file.

GGUF keeps tokens, merges or scores, token types, and the *name* of the pre-tokenizer; the rules behind the names are rows
here, after the regular expressions in llama-vocab.cpp of llama.cpp and the tokenizer.json that each name came from. The
class in tokenizer_config.json is PreTrainedTokenizerFast: a model's own class (LlamaTokenizer) may rebuild the
pre-tokenizer and lose every space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compiler.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # token types other than normal text

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST_SLASH
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = f"{_CASED}{_UPPER}*{_LOWER}+{_SHORT}|{_CASED}{_UPPER}+{_LOWER}*{_SHORT}" + r"|\p{N}{1,3}" + _REST_SLASH


@dataclass(frozen=True)
class Pre:
    """Splits applied in turn before byte-level BPE. ignore_merges: a word that is a token stays whole; nfc: normalised first."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False  # what holds when the file does not say


_GPT2, _DIGITS = Pre((GPT2,)), Pre((r"\p{N}", GPT2))
_LLAMA3 = Pre((LLAMA3,), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS: Mapping[str, Pre] = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "phi-2", "granite-docling", "jais"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), Pre((QWEN2,), nfc=True)),
    "tekken": Pre((TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": Pre((GPT4O,)),
    # llama.cpp's own fallback for files that predate the names
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def tokenizer_json(metadata: Mapping[str, Any], place: str) -> bytes:
    """The content of tokenizer.json. Raises CheckpointError for a tokenizer model or pre-tokenizer that is not here."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, place)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata, place)
    else:
        raise CheckpointError(
            place, expected="a GGUF tokenizer gpt2 or llama", found=repr(kind), remedy="use the model's safetensors folder, or put its tokenizer.json there"
        )
    tokenizer.add_tokens(_added(metadata))
    _add_ends(tokenizer, metadata)
    return str(tokenizer.to_str(pretty=False)).encode()


def _byte_level(metadata: Mapping[str, Any], place: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _pre(metadata)
    if pre is None:
        found = repr(metadata.get("tokenizer.ggml.pre"))
        raise CheckpointError(
            place, expected=f"a pre-tokenizer of {', '.join(PRE_TOKENIZERS)}", found=found, remedy="use the model's safetensors folder with its tokenizer.json"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(metadata, place), merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    last = pre.splits[-1] == GPT2  # ByteLevel brings this expression itself, and runs it faster
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in (pre.splits[:-1] if last else pre.splits)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], place: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(metadata, place)
    tokens = list(vocabulary)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(vocab=vocabulary, merges=merges_from_scores(metadata, vocabulary), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def merges_from_scores(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merge list behind SentencePiece scores: each piece's splits into two pieces, the best scored piece first.

    vocabulary a b ab with scores 0 0 -1 -> [("a", "b")]. Among splits of one piece the longest left part comes first.
    """
    scores, types = metadata["tokenizer.ggml.scores"], _types(metadata)
    found: list[tuple[float, int, int, str, str]] = []
    for piece, number in vocabulary.items():
        if types[number] in (UNKNOWN, CONTROL, BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-float(scores[number]), -len(left), -len(right), left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for _, _, _, left, right in found]


def _pre(metadata: Mapping[str, Any]) -> Pre | None:
    return PRE_TOKENIZERS.get(str(metadata.get("tokenizer.ggml.pre")))


def _vocabulary(metadata: Mapping[str, Any], place: str) -> dict[str, int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(
            place, expected="distinct tokens", found=f"{len(tokens) - len(vocabulary)} twice", remedy="convert the model again with a current llama.cpp"
        )
    return vocabulary


def _types(metadata: Mapping[str, Any]) -> Any:
    return metadata.get("tokenizer.ggml.token_type", [1] * len(metadata["tokenizer.ggml.tokens"]))


def _added(metadata: Mapping[str, Any]) -> list[Any]:
    """Control tokens are special (dropped when decoding), user defined ones are matched whole but kept."""
    from tokenizers import AddedToken

    tokens, types = metadata["tokenizer.ggml.tokens"], _types(metadata)
    pairs = [(token, int(kind)) for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    return [AddedToken(token, special=kind != USER_DEFINED, normalized=False) for token, kind in pairs]


def ends(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """(a bos is put before every text, an eos after it)."""
    pre = _pre(metadata)
    default = metadata.get("tokenizer.ggml.model") == "llama" or bool(pre and pre.add_bos)
    bos = metadata.get("tokenizer.ggml.add_bos_token", default) and metadata.get("tokenizer.ggml.bos_token_id") is not None
    eos = metadata.get("tokenizer.ggml.add_eos_token", False) and metadata.get("tokenizer.ggml.eos_token_id") is not None
    return bool(bos), bool(eos)


def _add_ends(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    from tokenizers import processors

    bos, eos = ends(metadata)
    if not bos and not eos:
        return
    names = {key: metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{key}_token_id"]] for key, on in (("bos", bos), ("eos", eos)) if on}
    before, after = ([f"{names['bos']}"] if bos else []), ([f"{names['eos']}"] if eos else [])
    special = [(names[key], metadata[f"tokenizer.ggml.{key}_token_id"]) for key in names]
    pair = [*before, "$A:0", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], pair=pair, special_tokens=special)


def tokenizer_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: a class that reads tokenizer.json as it is, the special tokens, the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos = ends(metadata)
    result: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "add_bos_token": bos,
        "add_eos_token": eos,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and 0 <= number < len(tokens):
            result[f"{name}_token"] = tokens[number]
    if "tokenizer.chat_template" in metadata:
        result["chat_template"] = metadata["tokenizer.chat_template"]
    return json.loads(json.dumps(result))  # plain JSON values only
