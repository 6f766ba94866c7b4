"""Prompt lookup against single steps: SmolLM2-135M int4-g64, greedy, in one process, both ways in turn on every prompt.

    python benchmarks/lookup.py [--rounds 3] [--new 96] [--out benchmarks/results/lookup.json]

Three kinds of text, from files of this repository: `quote` asks for a passage back, which an answer can draft from its prompt; `continue` lets the model go on
with prose; `random` is random token ids, where drafting should turn itself off. Rows are of a kind: the ratio is tokens a second with lookup over tokens a
second without, pair by pair, its median and the least and largest pair; `same` is the share of answers with the same tokens both ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from steps import ours

from compiler.evaluation.data import load_rows
from runtimes.bundle import open_bundle
from runtimes.generate import Generation, Generator, Options
from runtimes.session import SessionSettings

HERE = Path(__file__).resolve().parent
PROMPTS = 4
PASSAGE = 160  # tokens


def prompts(generator: Generator) -> dict[str, list[list[int]]]:
    """Kind -> prompts as token ids."""
    text = [token for row in load_rows(None).rows for token in generator.tokenizer.encode(row.text, add_special_tokens=False).ids]
    rng = np.random.default_rng(0)
    passages = [text[start : start + PASSAGE] for start in range(0, PROMPTS * PASSAGE, PASSAGE)]
    asked = [[{"role": "user", "content": f"Repeat this text word by word:\n\n{generator.tokenizer.decode(ids)}"}] for ids in passages]
    return {
        "quote": [generator.prompt_ids(messages) for messages in asked],
        "continue": passages,
        "random": [rng.integers(0, generator.layout.vocab_size, PASSAGE).tolist() for _ in range(PROMPTS)],
    }


def rows(generator: Generator, rounds: int, new: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, texts in prompts(generator).items():
        ratios, same, drafted, accepted = list[float](), list[bool](), 0, 0
        for number in range(rounds):
            for text in texts:
                answers: dict[bool, Generation] = {}
                for lookup in (True, False) if number % 2 else (False, True):
                    (answers[lookup],) = generator.generate([text], Options(max_new_tokens=new, ignore_eos=True, lookup=lookup))
                    if lookup:
                        drafted, accepted = drafted + generator.pace.drafted, accepted + generator.pace.accepted
                ratios.append(answers[False].tpot_ms / answers[True].tpot_ms)
                same.append(answers[False].token_ids == answers[True].token_ids)
        share = accepted / max(drafted, 1)
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{kind:9s} ratio {middle:.2f} [{low:.2f}, {high:.2f}]  accepted {share:.0%} of {drafted}  same {np.mean(same):.0%}")
        row = {"system": "trimtab lookup", "metric": f"decode_ratio@{kind}", "value": middle, "unit": "", "low": low, "high": high}
        found.append({**row, "samples": len(ratios), "drafted": drafted, "accepted": accepted, "same": float(np.mean(same))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lookup.json")
    given = parser.parse_args()
    generator = Generator(open_bundle(ours()), SessionSettings(flush_denormals=True))
    given.out.write_text(json.dumps(rows(generator, given.rounds, given.new), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
