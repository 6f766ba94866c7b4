"""How large the inputs of each linear layer are on a text: what weights the rank that `trimtab delta diff --activations` chooses.

    rms_j = sqrt(mean over tokens of x_j^2)        x [tokens, in], the layer's inputs in the base model

With C = diag(rms^2) as the second moment of the inputs, a difference D moves the outputs by E |D x|^2 = |D diag(rms)|_F^2, so the best
low-rank form in that norm is the truncated SVD of D diag(rms), divided by rms again (weighted low rank; ASVD, Yuan et al. 2023, arXiv 2312.05821,
scales by such a diagonal). Inputs that the text never excites count as FLOOR of the largest: they may matter elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compiler.checkpoints.view import Checkpoint
from compiler.errors import CheckpointError
from compiler.evaluation.data import EvaluationSet, Row
from compiler.reference import match_tensors, reference_model

FLOOR = 1e-2
WINDOW = 512
MOST_WINDOWS = 12


def input_rms(checkpoint: Checkpoint, data: EvaluationSet, task: str) -> dict[str, np.ndarray]:
    """Parameter name -> rms of its inputs, float64 [in], above 0. Only linear layers and Conv1D have one. Raises CheckpointError without a tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from transformers.pytorch_utils import Conv1D

    if "tokenizer.json" not in checkpoint.assets:
        raise CheckpointError(checkpoint.origin, expected="tokenizer.json", found="none", remedy="put it beside the weights: --activations reads a text")
    model: Any = reference_model(checkpoint, task)
    sums: dict[str, np.ndarray] = {}
    tokens = [0]

    def listen(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            squares = inputs[0].detach().double().square().reshape(-1, inputs[0].shape[-1]).mean(0).numpy()
            sums[name] = sums.get(name, 0.0) + squares * tokens[0]

        return hook

    hooks = [one.register_forward_pre_hook(listen(name)) for name, one in model.named_modules() if isinstance(one, (torch.nn.Linear, Conv1D))]
    total = 0
    for ids in _windows(Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode()), data, checkpoint):
        tokens[0] = len(ids)
        total += len(ids)
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]))
    for one in hooks:
        one.remove()
    named = {name: view.name for name, view in match_tensors(model, checkpoint).items()}
    found = {named[f"{module}.weight"]: np.sqrt(squares / total) for module, squares in sums.items() if f"{module}.weight" in named}
    return {name: np.maximum(rms, FLOOR * float(rms.max() or 1.0)) for name, rms in found.items()}


def _windows(tokenizer: Any, data: EvaluationSet, checkpoint: Checkpoint) -> list[list[int]]:
    width = min(WINDOW, int(checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions") or WINDOW))
    ids: list[int] = [token for row in data.rows for token in tokenizer.encode(_text(row), add_special_tokens=False).ids]
    return [part for start in range(0, len(ids), width) if (part := ids[start : start + width])][:MOST_WINDOWS]


def _text(row: Row) -> str:
    return row.text or "\n".join(message["content"] for message in row.messages or ())
