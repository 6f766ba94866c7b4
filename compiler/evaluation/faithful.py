"""Is the exported graph the model? Its answers against torch on the very weights that the graph stores.

An accuracy limit cannot tell a wrong graph from a coarse scheme: a swapped projection in one layer of thirty may cost no more than four bits do. So the
loss of rounding is taken out on both sides.

1. The torch model gets the weights that the scheme leaves: dequantize(quantize(W)) by `quantizers.affine`, the slow twin of what filled the file
   (`see_through`).
2. The graph runs with float32 activations (`SessionSettings.exact`; products of integers as DequantizeLinear and MatMul).
3. What remains is the order of float32 sums: the root mean square of a - b over the logits of a position, divided by the standard deviation of a, is 1e-6 for
   tiny models and at most 1e-4 for SmolLM2-135M at int4 (a short row, whose first token has huge activations; 1e-5 elsewhere). TOLERANCE is ten times that.
   The root mean square, because the largest of 49,152 differences is 4e-4 there, and still one missing row of as many gives 4e-3.

The probes reach over the whole vocabulary, in a padded batch of three lengths, a prompt and then steps on the cache, so that positions, masks, rotation,
cache, padding, the last-token gather, every head and every row of the output matrix take part. What they do not see: windows and rope scaling that begin
beyond their length, and rows of an untied input table that no probe names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compiler.evaluation.encoder import pool
from compiler.graph.encoder_quantize import dequantize_channels, quantize_channels
from compiler.graph.encoder_rows import Channels, stored_factors
from compiler.graph.passes import float_twin
from compiler.quantizers import affine
from compiler.quantizers.rows import dequantize_rows, quantize_rows
from compiler.reference import canonical
from compiler.scheme import Scheme, matrix_name, parse_scheme
from runtimes.adapters import Adapters
from runtimes.behaviours import EXACT, probes
from runtimes.bundle import Bundle, read_json_object
from runtimes.decode import DecodeLoop, read_layout
from runtimes.session import open_session

TOLERANCE = 1e-3
LENGTHS = (40, 17, 5)
STEPS = 3
BLOCK_ELEMENTS = 1 << 17

Made = Callable[[str], np.ndarray | None]
Factors = Mapping[str, np.ndarray]
Layers = Sequence[Mapping[str, Any]]  # rows of export.json: name, scheme


def see_through(
    model: Any, layers: Layers, facts: Mapping[str, Any], config: Mapping[str, Any], made: Made | None = None, factors: Factors | None = None
) -> Any:
    """The torch model with every stored tensor as its scheme leaves it, in place; returns it.

    layers, facts  of export.json: name and scheme of each matrix; kind and default scheme of the model
    factors        what a matrix's input channels are multiplied by, 0 where they stay float (`input_factors`)
    made           float32 [out, in] of the fused matrices that a calibrated quantizer made; None, or None for a name: round to nearest
    """
    places: dict[str, int] = {}  # rows of a fused matrix that are taken; parameters come in its order: q, k, v; gate, up
    schemes = {part: parse_scheme(row["scheme"]) for row in layers for part in str(row["name"]).split("+")}
    halved = facts["kind"] == "encoder" and facts["scheme"] == "fp16"  # an encoder's norms and positions are float16 too
    prefix = str(getattr(model, "base_model_prefix", "") or "") if facts["kind"] == "encoder" else ""
    for full, parameter in model.named_parameters():
        name = canonical(full, prefix)  # encoders' rows are named without the base model's prefix
        fused = matrix_name(name, config) or name
        scheme = schemes.get(name) or schemes.get(fused) or (schemes.get("lm_head") if fused == "model.embed_tokens" else None)
        if scheme is None:
            scheme = Scheme(16) if halved and not name.endswith("bias") else Scheme()
        weight = parameter.data.numpy()
        stored = made(fused) if made is not None and weight.ndim == 2 else None
        if stored is None and scheme.kernel in ("rows", "dynamic"):
            channels = Channels(np.asarray((factors or {}).get(name, np.ones(weight.shape[1], np.float32))), np.zeros(0, np.int64))
            rest = channels.rest(weight)
            weight -= (rest - dequantize_channels(*quantize_channels(rest.copy(), full_range=scheme.full_range))) * channels.factors
        elif stored is None:
            round_through(weight, scheme)
        else:
            start = places.get(fused, 0)
            weight[...] = stored[start : start + len(weight)]
            places[fused] = start + len(weight)
    return model


def input_factors(directory: Path) -> dict[str, np.ndarray]:
    """Tensor -> what an exported graph multiplies its input channels by (`encoder_rows.Channels.factors`)."""
    found = stored_factors(ir.load(directory / "model.onnx"))
    return {part: factors for name, factors in found.items() for part in name.split("+")}


def round_through(weight: np.ndarray, scheme: Scheme) -> None:
    """float32 [rows, width] -> the same array with what `scheme` stores of it."""
    if scheme.bits == 16:
        weight[...] = weight.astype(np.float16)
    elif scheme.kernel == "tokens":
        weight[...] = dequantize_rows(*quantize_rows(weight))
    elif scheme.quantized:
        step = max(1, BLOCK_ELEMENTS // weight.shape[1])
        blocks = [weight[start : start + step] for start in range(0, len(weight), step)]

        def through(block: np.ndarray) -> None:
            block[...] = affine.dequantize(affine.quantize(block, scheme))

        with ThreadPoolExecutor(2) as pool_of_threads:
            list(pool_of_threads.map(through, blocks))


def check(model: Any, directory: Path, facts: Mapping[str, Any], graph: str = "model.onnx") -> dict[str, Any]:
    """{value, tolerance, tokens}: the largest difference between the exported graph and `model`, which `see_through` has prepared.

    facts  the `model` section of export.json
    """
    value, tokens = decoder_difference(model, directory, facts, graph) if facts["kind"] == "decoder" else encoder_difference(model, directory, facts)
    return {"value": value, "tolerance": TOLERANCE, "tokens": tokens}


def decoder_difference(model: Any, directory: Path, facts: Mapping[str, Any], name: str = "model.onnx") -> tuple[float, int]:
    """Last-token logits of a right-padded batch, then of STEPS cached steps, against one forward pass of torch per row."""
    import torch

    genai = read_json_object(directory / "genai_config.json")
    session = open_session(directory / name, EXACT, float_twin(directory / name))
    loop = DecodeLoop(session, read_layout(session, genai, str(directory)), int(genai["model"]["context_length"]))
    loop.use(Adapters(Bundle(directory, {"model": facts}, "decoder", ()), session).values(""))
    lengths = [min(length, loop.context_length - STEPS) for length in LENGTHS]
    rows = probes(loop.layout.vocab_size, [length + STEPS for length in lengths])
    logits = [loop.start([row[:length] for row, length in zip(rows, lengths, strict=True)]).copy()]
    for step in range(STEPS):
        logits.append(loop.step([row[length + step] for row, length in zip(rows, lengths, strict=True)]).copy())
    worst = 0.0
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([row])).logits[0, length - 1 :].float().numpy()
        worst = worse(worst, difference(expected, np.stack([step[place] for step in logits])))
    return worst, sum(map(len, rows))


def encoder_difference(model: Any, directory: Path, facts: Mapping[str, Any]) -> tuple[float, int]:
    """The graph's output for a padded batch with both kinds of tokens, against torch."""
    import torch

    session = open_session(directory / "model.onnx", EXACT, float_twin(directory / "model.onnx"))
    names = [node.name for node in session.get_inputs()]
    table = model.get_input_embeddings().weight
    rows = probes(len(table), [min(length, facts["max_length"]) for length in LENGTHS], [token for token in [model.config.pad_token_id] if token is not None])
    ids = np.full((len(rows), max(map(len, rows))), model.config.pad_token_id or 0, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
        types[place, len(row) // 2 : len(row)] = 1
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    feeds = {name: feeds[name] for name in names}
    got = session.run(None, feeds)[0]
    with torch.inference_mode():
        out = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    expected = (out.logits if "logits" in out else out.last_hidden_state).numpy()
    if got.ndim == 2 and expected.ndim == 3:
        expected = pool(expected, mask, facts)
    if got.ndim == 3:
        got, expected = got[mask > 0], expected[mask > 0]
    return difference(expected, got), int(mask.sum())


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """Largest of rms(a - b) / std(a) over rows: [n, width] twice -> a number; NaN where either has one."""
    a, b = np.atleast_2d(np.asarray(left, np.float64)), np.atleast_2d(np.asarray(right, np.float64))
    return float((np.sqrt(np.square(a - b).mean(-1)) / np.maximum(a.std(-1), 1e-30)).max())


def worse(first: float, second: float) -> float:
    """The larger; NaN is larger than everything."""
    return second if np.isnan(second) or second > first else first
