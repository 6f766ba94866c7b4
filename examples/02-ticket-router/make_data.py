"""Writes train.jsonl and eval.jsonl from phrases.yaml.

The split is by wording: an eval ticket is built from sentences, openers and closers of the `eval` lists. Run from anywhere: `python make_data.py`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
TICKETS_PER_PHRASE = {("train", "en"): 3, ("train", "ja"): 2, ("eval", "en"): 2, ("eval", "ja"): 2}
TYPO_RATE = 0.2  # share of English tickets with one damaged word
LOWER_RATE = 0.15  # share of English tickets typed without capitals


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


def one_text(phrases: dict, wording: str, split: str, lang: str, rng: random.Random) -> str:
    """A ticket's text: machine filled in, wrapped in an opener or closer, sometimes mistyped."""
    text = wording.format(m=rng.choice(phrases["machines"][lang]))
    wrapper = rng.choice(phrases["wrappers"][lang][split])
    if lang == "en":
        text = text[0].upper() + text[1:]
        if wrapper.endswith((", {t}", ": {t}")) and text[1].islower():  # "Hi, the pump ..." but "Hi, PLC output ..."
            text = text[0].lower() + text[1:]
    text = wrapper.format(t=text)
    if lang == "ja":
        return text
    if rng.random() < LOWER_RATE:
        text = text.lower()
    return typo(text, rng) if rng.random() < TYPO_RATE else text


def build(phrases: dict, split: str, rng: random.Random) -> list[dict[str, str]]:
    """All rows of a split, shuffled, no text twice."""
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for team, languages in phrases["teams"].items():
        for lang in ("en", "ja"):
            for wording in languages[lang][split]:
                for _ in range(TICKETS_PER_PHRASE[split, lang]):
                    text = one_text(phrases, wording, split, lang, rng)
                    while text in seen:
                        text = one_text(phrases, wording, split, lang, rng)
                    seen.add(text)
                    rows.append({"text": text, "label": team, "lang": lang})
    rng.shuffle(rows)
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    phrases = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    rng = random.Random(args.seed)
    train, evaluation = build(phrases, "train", rng), build(phrases, "eval", rng)
    write(args.out / "train.jsonl", train)
    write(args.out / "eval.jsonl", evaluation)
    print(f"{len(train)} train, {len(evaluation)} eval")


if __name__ == "__main__":
    main()
