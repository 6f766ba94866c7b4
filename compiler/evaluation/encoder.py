"""An encoder bundle against the merged fp32 model: cosine of what comes out, and accuracy where rows have labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compiler.errors import RecipeError
from compiler.evaluation.data import Row
from compiler.evaluation.statistics import cluster_interval, paired_drop, share

BATCH = 16
MAX_SENTENCES = 256

Report = Callable[[str, int, int], None]


def texts_of(rows: Sequence[Row]) -> list[str]:
    """The texts to encode: one per row; a single long text is split into its paragraphs."""
    texts = [row.text for row in rows if row.text]
    if len(texts) == 1:
        texts = [part.strip().replace("\n", " ") for part in texts[0].split("\n\n") if part.strip()][:MAX_SENTENCES]
    if not texts:
        raise RecipeError("evaluate.data", expected="rows of {text}", found="none", remedy="an encoder is evaluated on texts")
    return texts


def reference_outputs(model: Any, tokenizer: Any, texts: Sequence[str], spec: Mapping[str, Any], report: Report) -> np.ndarray:
    """What the merged fp32 model gives in eager torch: logits [n, labels], or sentence vectors [n, hidden] pooled as the bundle pools.

    spec  the manifest's `model`: task, pooling, normalize, max_length
    """
    import torch

    rows = []
    for start in range(0, len(texts), BATCH):
        encoded = [tokenizer.encode(text) for text in texts[start : start + BATCH]]
        for one in encoded:
            one.truncate(spec["max_length"])
        width = max(len(one.ids) for one in encoded)
        ids = torch.zeros((len(encoded), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(encoded):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = 1
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask)
        values = (out.logits if "logits" in out else out.last_hidden_state).numpy()
        rows.append(values if values.ndim == 2 else pool(values, mask.numpy(), spec))
        report("texts by the reference", min(start + BATCH, len(texts)), len(texts))
    return np.concatenate(rows)


def pool(hidden: np.ndarray, mask: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """[batch, tokens, hidden] -> [batch, hidden] by spec["pooling"] (mean, cls, max, lasttoken), L2-normalised where spec says so."""
    weights = mask[..., None].astype(hidden.dtype)
    kind = spec.get("pooling") or "mean"
    if kind == "cls":
        vectors = hidden[:, 0]
    elif kind == "max":
        vectors = np.where(weights > 0, hidden, -np.inf).max(axis=1)
    elif kind == "lasttoken":
        vectors = hidden[np.arange(len(hidden)), mask.sum(axis=1) - 1]
    else:
        vectors = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    if spec.get("normalize"):
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors)


def output_metrics(reference: np.ndarray, bundle: np.ndarray) -> dict[str, Any]:
    """Cosine per text: mean with a bootstrap interval over texts, and the smallest."""
    from runtimes.metrics import cosine

    cosines = cosine(reference, bundle)
    low, high = np.clip(cluster_interval(cosines, np.arange(len(cosines))), -1.0, 1.0).tolist()
    return {
        "cosine_mean": {"value": float(cosines.mean()), "low": low, "high": high, "samples": len(cosines)},
        "cosine_min": {"value": float(cosines.min()), "low": None, "high": None, "samples": len(cosines)},
    }


def label_metrics(reference: np.ndarray, bundle: np.ndarray, wanted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy of both models on labelled rows, and the drop from one to the other."""
    unknown = sorted({label for label in wanted if label not in labels})
    if unknown:
        raise RecipeError("evaluate.data: label", expected=f"one of {', '.join(labels)}", found=unknown[0], remedy="use the model's own labels")
    truth = np.array([labels.index(label) for label in wanted])
    right, kept = reference.argmax(-1) == truth, bundle.argmax(-1) == truth
    return {
        "accuracy": share(kept.tolist()),
        "accuracy_reference": share(right.tolist()),
        "accuracy_drop": paired_drop(right.tolist(), kept.tolist()),
        "label_agreement": share((reference.argmax(-1) == bundle.argmax(-1)).tolist()),
    }
