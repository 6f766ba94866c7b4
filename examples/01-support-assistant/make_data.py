"""Writes train.jsonl and eval.jsonl from phrases.yaml.

The split is by wording, then by answer: an eval ticket uses only `eval` phrases, and no eval answer occurs among the training answers.
So an eval row cannot be solved by recalling a training row. Run from anywhere: `python make_data.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
PRIORITIES = ("high", "medium", "low")
TICKETS_PER_PHRASE = {("train", "en"): 2, ("train", "ja"): 2, ("eval", "en"): 1, ("eval", "ja"): 1}
TYPO_RATE = 0.2  # share of English tickets with one damaged word
LOWER_RATE = 0.15  # share of English tickets typed without capitals


@dataclass(frozen=True)
class Ticket:
    """One ticket and the structured answer that is expected of it."""

    text: str
    answer: str

    def row(self) -> dict[str, list[dict[str, str]]]:
        return {"messages": [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.answer}]}


def answer(machine: str, fault: str, priority: str, action: str) -> str:
    """The format that the assistant learns: four fields, fixed order, lower case."""
    return f"machine: {machine} | fault: {fault} | priority: {priority} | action: {action}"


def typo(text: str, rng: random.Random) -> str:
    """Swaps, drops or doubles one inner letter of one long word."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return text
    at = rng.choice(long)
    word = words[at]
    k = rng.randrange(1, len(word) - 2)
    words[at] = rng.choice([word[:k] + word[k + 1] + word[k] + word[k + 2 :], word[:k] + word[k + 1 :], word[:k] + word[k] + word[k:]])
    return " ".join(words)


def english_manner(text: str, rng: random.Random) -> str:
    """Capitalises each sentence, then sometimes types it in a hurry."""
    text = re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda match: match.group().upper(), text)
    if rng.random() < LOWER_RATE:
        text = text.lower()
    return typo(text, rng) if rng.random() < TYPO_RATE else text


def one_ticket(phrases: dict, fault: str, wording: str, kind: tuple[str, str, str], rng: random.Random) -> Ticket:
    """Builds a ticket; kind is (split, language, priority)."""
    split, lang, priority = kind
    row = phrases["faults"][fault]
    label = rng.choice(row["machines"])
    number = rng.randint(1, 9)
    name = rng.choice(phrases["machines"][label][lang])
    spoken = rng.choice(phrases["numbering"][lang]).format(name=name, n=number)
    frame = rng.choice(phrases["frames"][lang][split])
    text = frame.format(fault=wording.format(m=spoken), cue=rng.choice(phrases["cues"][priority][lang][split]))
    text = english_manner(text, rng) if lang == "en" else text
    return Ticket(text, answer(f"{label} {number}", fault, priority, row["action"]))


def build(phrases: dict, split: str, rng: random.Random, taken: set[str]) -> list[Ticket]:
    """All tickets of a split, shuffled; priorities take turns. An answer in `taken` is drawn again."""
    tickets: list[Ticket] = []
    for fault, row in phrases["faults"].items():
        turn = rng.randrange(len(PRIORITIES))
        for lang in ("en", "ja"):
            for wording in row[lang][split]:
                for _ in range(TICKETS_PER_PHRASE[split, lang]):
                    priority = PRIORITIES[turn % len(PRIORITIES)]
                    turn += 1
                    ticket = one_ticket(phrases, fault, wording, (split, lang, priority), rng)
                    while ticket.answer in taken:
                        ticket = one_ticket(phrases, fault, wording, (split, lang, priority), rng)
                    tickets.append(ticket)
    rng.shuffle(tickets)
    return tickets


def write(path: Path, tickets: list[Ticket]) -> None:
    path.write_text("".join(json.dumps(t.row(), ensure_ascii=False) + "\n" for t in tickets), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    phrases = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    rng = random.Random(args.seed)
    train = build(phrases, "train", rng, set())
    evaluation = build(phrases, "eval", rng, {t.answer for t in train})
    write(args.out / "train.jsonl", train)
    write(args.out / "eval.jsonl", evaluation)
    print(f"{len(train)} train, {len(evaluation)} eval")


if __name__ == "__main__":
    main()
