"""Static checks of the committed examples: data without leakage, balanced labels, small adapters that name no path, recipes that hold together.

The yaml and JSON are read directly: these checks need neither torch nor the compiler.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ASSISTANT, ROUTER = EXAMPLES / "01-support-assistant", EXAMPLES / "02-ticket-router"
BOTH = pytest.mark.parametrize("example", [ASSISTANT, ROUTER], ids=lambda path: path.name)
ANSWER = re.compile(r"machine: ([a-z]+ [1-9]) \| fault: ([a-z ]+) \| priority: (high|medium|low) \| action: ([a-z ]+)")
LORA_KEY = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


def rows(example: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (example / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def ticket(row: dict) -> str:
    return row["text"] if "text" in row else row["messages"][0]["content"]


def plain(text: str) -> str:
    """Letters and digits only, case and width folded: what is left is the wording."""
    return "".join(char for char in unicodedata.normalize("NFKC", text).casefold() if char.isalnum())


def is_japanese(text: str) -> bool:
    return any("\u3040" <= char <= "\u9fff" for char in text)


def load_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name.replace('-', '_')}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def tensor_header(path: Path) -> dict[str, dict]:
    """The safetensors header: name -> {dtype, shape, data_offsets}. Layout: u64 little-endian length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def wordings(example: Path, split: str) -> list[str]:
    """The hand-written sentences of a split, machine slots removed."""
    phrases = yaml.safe_load((example / "phrases.yaml").read_text(encoding="utf-8"))
    groups = phrases["faults"] | phrases["cues"] if "faults" in phrases else phrases["teams"]
    return [plain(wording.replace("{m}", "")) for group in groups.values() for lang in ("en", "ja") for wording in group[lang][split]]


@BOTH
def test_data_is_what_the_script_writes(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_data.py", "--out", str(tmp_path)])
    load_script(example / "make_data.py", monkeypatch).main()
    for split in ("train", "eval"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (example / f"{split}.jsonl").read_bytes()


@BOTH
def test_no_ticket_is_in_both_splits(example: Path) -> None:
    for split in ("train", "eval"):
        texts = [ticket(r) for r in rows(example, split)]
        assert len(set(texts)) == len(texts)
    assert not {plain(ticket(r)) for r in rows(example, "train")} & {plain(ticket(r)) for r in rows(example, "eval")}


@BOTH
def test_no_wording_is_in_both_splits(example: Path) -> None:
    train, test = wordings(example, "train"), wordings(example, "eval")
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) and len(set(test)) == len(test)


@BOTH
def test_machine_numbers_cannot_hide_a_repeated_ticket(example: Path) -> None:
    """Stronger than equality: even with digits removed no eval ticket equals a training ticket."""
    train = {re.sub(r"\d", "", plain(ticket(r))) for r in rows(example, "train")}
    assert not train & {re.sub(r"\d", "", plain(ticket(r))) for r in rows(example, "eval")}


@BOTH
def test_both_languages_are_present(example: Path) -> None:
    for split in ("train", "eval"):
        share = sum(is_japanese(ticket(r)) for r in rows(example, split)) / len(rows(example, split))
        assert 0.2 < share < 0.5


def test_assistant_rows_have_the_message_format() -> None:
    assert len(rows(ASSISTANT, "train")) >= 300 and len(rows(ASSISTANT, "eval")) >= 60
    for row in rows(ASSISTANT, "train") + rows(ASSISTANT, "eval"):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert ANSWER.fullmatch(row["messages"][1]["content"])


def test_assistant_eval_answers_never_occur_in_training() -> None:
    train = {r["messages"][1]["content"] for r in rows(ASSISTANT, "train")}
    assert not train & {r["messages"][1]["content"] for r in rows(ASSISTANT, "eval")}


def test_assistant_faults_and_priorities_are_balanced() -> None:
    for split in ("train", "eval"):
        answers = [ANSWER.fullmatch(r["messages"][1]["content"]) for r in rows(ASSISTANT, split)]
        faults = Counter(m.group(2) for m in answers if m)
        priorities = Counter(m.group(3) for m in answers if m)
        assert len(faults) == 14 and len(set(faults.values())) == 1
        assert max(priorities.values()) <= 1.2 * min(priorities.values())


def test_assistant_action_follows_from_the_fault() -> None:
    pairs = {m.group(2, 4) for r in rows(ASSISTANT, "train") + rows(ASSISTANT, "eval") if (m := ANSWER.fullmatch(r["messages"][1]["content"]))}
    assert len({fault for fault, _ in pairs}) == len(pairs)


def test_assistant_ticket_names_the_machine_number_of_the_answer() -> None:
    for row in rows(ASSISTANT, "train") + rows(ASSISTANT, "eval"):
        match = ANSWER.fullmatch(row["messages"][1]["content"])
        assert match is not None and match.group(1)[-1] in row["messages"][0]["content"]


def test_router_labels_are_balanced() -> None:
    for split, least in (("train", 400), ("eval", 160)):
        counts = Counter(r["label"] for r in rows(ROUTER, split))
        assert sum(counts.values()) >= least
        assert len(counts) == 8 and len(set(counts.values())) == 1


@BOTH
def test_recipe_has_the_known_keys_and_its_files(example: Path) -> None:
    recipe = yaml.safe_load((example / "recipe.yaml").read_text(encoding="utf-8"))
    assert set(recipe) <= {"name", "base", "deltas", "combine", "distil", "quantize", "evaluate", "targets", "seed"}
    assert {"name", "base", "deltas", "quantize", "evaluate", "targets"} <= set(recipe)
    assert recipe["base"].startswith("package:")
    assert (example / recipe["evaluate"]["data"]).is_file()
    for delta in recipe["deltas"]:
        assert (example / delta["path"] / "adapter_config.json").is_file()
    for target in recipe["targets"]:
        assert all(isinstance(limit, (int, float)) and limit > 0 for limit in target["limits"].values())


@BOTH
def test_adapter_is_small_half_precision_lora(example: Path) -> None:
    adapter = example / "adapter"
    assert sum(path.stat().st_size for path in adapter.iterdir()) < 2_000_000
    tensors = tensor_header(adapter / "adapter_model.safetensors")
    assert tensors and {entry["dtype"] for entry in tensors.values()} == {"F16"}
    strangers = [name for name in tensors if not LORA_KEY.fullmatch(name)]
    assert strangers == ([] if example is ASSISTANT else ["base_model.model.classifier.bias", "base_model.model.classifier.weight"])


@BOTH
def test_adapter_names_the_recipe_base(example: Path) -> None:
    config = json.loads((example / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((example / "recipe.yaml").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == recipe["base"]
    tensors = tensor_header(example / "adapter" / "adapter_model.safetensors")
    assert {entry["shape"][0] for name, entry in tensors.items() if ".lora_A." in name} == {config["r"]}


@BOTH
def test_no_committed_text_holds_an_absolute_path(example: Path) -> None:
    for path in example.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".yaml", ".md", ".py"}:
            assert not re.search(r"(?<![\w.])/(?:work|root|tmp|home|usr)\b", path.read_text(encoding="utf-8")), path.name


def test_router_adapter_keeps_the_label_names() -> None:
    labels = json.loads((ROUTER / "adapter" / "config.json").read_text(encoding="utf-8"))["id2label"]
    assert [labels[str(i)] for i in range(len(labels))] == sorted({r["label"] for r in rows(ROUTER, "train")})
    assert tensor_header(ROUTER / "adapter" / "adapter_model.safetensors")["base_model.model.classifier.weight"]["shape"] == [len(labels), 384]


def test_the_deltas_make_the_tasks_better() -> None:
    """The figures that the READMEs quote: task accuracy after the delta stands clearly above the best without it."""
    router = json.loads((ROUTER / "train.json").read_text(encoding="utf-8"))
    assert router["accuracy_after"]["all"] > max(kind["all"] for kind in router["accuracy_before"].values())
    assistant = json.loads((ASSISTANT / "train.json").read_text(encoding="utf-8"))
    base = json.loads((ASSISTANT / "base.json").read_text(encoding="utf-8"))
    assert assistant["after"]["exact_match"] > base["plain"]["exact_match"] + 0.3
    assert assistant["after"]["answer_perplexity"] < base["plain"]["answer_perplexity"]
