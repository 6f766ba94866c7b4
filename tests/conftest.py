"""Shared by all tests: a real, tiny language model with a tokenizer, and the command line run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_tiny_llama(folder: Path) -> Path:
    """A two-layer llama with 3 heads over 1 key/value head, tied embeddings, a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    from compiler.evaluation.data import builtin_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([builtin_text().decode()[:20000]], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session")
def tiny_lora(tiny_llama, tmp_path_factory) -> Path:
    return make_tiny_lora(tiny_llama, tmp_path_factory.mktemp("tiny-lora"))


def make_tiny_lora(base: Path, folder: Path) -> Path:
    """A LoRA of `tiny_llama` as PEFT writes it, with non-zero B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def trimtab(capsys, monkeypatch, tmp_path):
    """trimtab("plan", path) -> (exit code, stdout, stderr), with a store of its own."""
    from compiler.cli import main

    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "store"))

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return done.value.code, out, err

    return run


TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def schema_faults(value, schema, root, place="report"):
    """Where a JSON value breaks a JSON schema of draft 2020-12, by the keywords that pydantic writes; [] where it does not."""
    if "$ref" in schema:
        return schema_faults(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, place)
    if "anyOf" in schema:
        tried = [schema_faults(value, one, root, place) for one in schema["anyOf"]]
        return [] if [] in tried else [f"{place}: none of {len(tried)} forms: {tried[0][0]}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place}: {value!r} is none of {schema['enum']}"]
    if "const" in schema and value != schema["const"]:
        return [f"{place}: {value!r} is not {schema['const']!r}"]
    wanted = schema.get("type")
    if wanted and (not isinstance(value, TYPES[wanted]) or (isinstance(value, bool) and wanted != "boolean")):
        return [f"{place}: {type(value).__name__} is no {wanted}"]
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        faults = [f"{place}: no {name}" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            inner = known.get(name, rest if isinstance(rest, dict) else {})
            faults += [f"{place}: unknown {name}"] if name not in known and rest is False else schema_faults(item, inner, root, f"{place}.{name}")
        return faults
    if isinstance(value, list) and "items" in schema:
        return [fault for number, item in enumerate(value) for fault in schema_faults(item, schema["items"], root, f"{place}[{number}]")]
    return []


@pytest.fixture
def breaks_schema():
    """breaks_schema(report) -> where a report document breaks the published schema."""
    schema = json.loads((Path(__file__).parent.parent / "compiler/report/templates/report.schema.json").read_text())
    return lambda value: schema_faults(value, schema, schema)
