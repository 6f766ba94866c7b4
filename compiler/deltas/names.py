"""Finding a base's tensor by the name that a delta gives it.

An adapter trained on BertForSequenceClassification says `bert.encoder.layer.0...`; the checkpoint of a bare BertModel says
`encoder.layer.0...`. Transformers joins the two by the class's base_model_prefix; these are its rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cached_property

# model_type -> base_model_prefix, where it is not "model" (transformers 5.23, modeling files)
PREFIXES: Mapping[str, str] = {
    "albert": "albert",
    "bert": "bert",
    "bloom": "transformer",
    "camembert": "roberta",
    "deberta": "deberta",
    "deberta-v2": "deberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "falcon": "transformer",
    "gpt2": "transformer",
    "gpt_neo": "transformer",
    "gpt_neox": "gpt_neox",
    "gptj": "transformer",
    "mpnet": "mpnet",
    "mpt": "transformer",
    "nomic_bert": "nomic_bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
}
STORED_INPUT_FIRST = ("gpt2",)  # families whose linear weights are Conv1D, [in, out]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


class Names:
    """Lookup over a base's tensor names, given its model_type."""

    def __init__(self, names: Iterable[str], model_type: str) -> None:
        self.names = tuple(names)
        self.known = frozenset(self.names)
        self.prefix = PREFIXES.get(model_type, "model") + "."

    def find(self, target: str) -> str | None:
        """The base's name for a delta's target, by these rules in turn: equal; with or without the prefix; a unique suffix either way."""
        if target in self.known:
            return target
        for name in (target.removeprefix(self.prefix), self.prefix + target):
            if name in self.known:
                return name
        longer = self._by_suffix.get(target, ())
        if len(longer) == 1:
            return longer[0]
        parts = target.split(".")
        shorter = [name for cut in range(1, len(parts) - 2) if (name := ".".join(parts[cut:])) in self.known]
        return shorter[0] if len(shorter) == 1 else None

    @cached_property
    def _by_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            parts = name.split(".")
            for cut in range(1, min(len(parts) - 2, 4)):  # wrappers nest a few levels: base_model.model.model.
                found.setdefault(".".join(parts[cut:]), []).append(name)
        return found

    @property
    def bare(self) -> bool:
        """Does no tensor carry the prefix of a model with a head?"""
        return not any(name.startswith(self.prefix) for name in self.names)

    def nearest(self, target: str, count: int = 3) -> list[str]:
        return difflib.get_close_matches(target, self.names, count, 0.5)

    def embedding(self) -> str | None:
        """The input embedding's name, None when there is not exactly one."""
        found = [name for name in self.names if name.endswith(EMBEDDINGS)]
        return found[0] if len(found) == 1 else None
