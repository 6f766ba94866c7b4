"""Sentences that an encoder's student is trained on, and pairs that it is judged on, from data as it is published.

    python benchmarks/sentences.py FILE [FILE ...] --out SENTENCES.jsonl [--without PAIRS.jsonl ...]
    python benchmarks/sentences.py --pairs TEST.tsv --out PAIRS.jsonl

FILE: text; .csv, whose column `text` is taken; .jsonl, whose strings are taken. Each is cut where a sentence ends; sentences of fewer than --least characters,
those met before and those of --without are left out. TEST.tsv: lines `gold<TAB>sentence<TAB>sentence` as in SemEval's tasks of textual similarity; lines
without gold are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def passages(path: Path) -> Iterator[str]:
    """Texts of one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        yield from (row["text"] for row in csv.DictReader(text.splitlines()))
    elif path.suffix == ".jsonl":
        yield from (value for line in text.splitlines() for value in json.loads(line).values() if isinstance(value, str))
    else:
        yield text


def sentences(path: Path, least: int) -> Iterator[str]:
    """Sentences of one file, blanks run together."""
    for passage in passages(path):
        for part in END.split(passage):
            sentence = " ".join(part.split())
            if len(sentence) >= least:
                yield sentence


def pairs(path: Path) -> Iterator[dict[str, object]]:
    """{sentence1, sentence2, score} of each line with a gold score."""
    for line in path.read_text(encoding="utf-8").splitlines():
        gold, first, second = line.split("\t")[:3]
        if gold.strip():
            yield {"sentence1": first, "sentence2": second, "score": float(gold)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--without", type=Path, nargs="*", default=[])
    parser.add_argument("--least", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if bool(arguments.files) == bool(arguments.pairs):
        parser.error("either files or --pairs")
    if arguments.pairs:
        rows: list[dict[str, object]] = list(pairs(arguments.pairs))
    else:
        kept_aside = {" ".join(passage.split()) for path in arguments.without for passage in passages(path)}
        found = dict.fromkeys(sentence for path in arguments.files for sentence in sentences(path, arguments.least))
        rows = [{"text": sentence} for sentence in found if sentence not in kept_aside]
    arguments.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {arguments.out}")


if __name__ == "__main__":
    main()
