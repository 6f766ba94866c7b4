"""The encoder road: a checkpoint -> model.onnx + model.onnx.data.

    build      a family of `encoder_families`: the graph from names and shapes, without torch      (`encoder_builder`)
    or, for any other encoder,
    trace      transformers' OnnxExporter over a model without weights, raw eager graph             (`encoder_trace`)
    fuse       MultiHeadAttention, SkipLayerNormalization, BiasGelu                (`encoder_fusions`, `encoder_attention`)
    then
    pool       pooling and normalisation in the graph                              (`encoder_pooling`)
    lower      weights streamed into the operators of the scheme                   (`encoder_weights`)

Inputs int64 [batch, sequence], both dynamic: input_ids, attention_mask, and token_type_ids where the model has kinds of tokens.
Outputs float32: `sentence_embedding` [batch, hidden] with pooling, else `last_hidden_state` [batch, sequence, hidden]; `logits` [batch, labels]
or, for tokens, [batch, sequence, labels] (softmax is the runtime's).
The file holds no time, path or source position, so equal inputs give equal bytes.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import ArchitectureError
from compiler.graph.encoder_builder import build_encoder
from compiler.graph.encoder_families import EncoderPlan, plan_encoder
from compiler.graph.encoder_fusions import fuse
from compiler.graph.encoder_pooling import POOLINGS, add_pooling, configured_pooling
from compiler.graph.encoder_rewrite import MICROSOFT, tidy
from compiler.graph.encoder_rows import channel_spans, sample_tokens
from compiler.graph.encoder_task import TASKS, infer_task, labels_of, max_length, task_config
from compiler.graph.encoder_trace import trace
from compiler.graph.encoder_weights import Matrix, Weights, unlowered
from compiler.graph.external_data import DataFile, output_error
from compiler.reference import drop_unused_pooler, match_tensors, skeleton
from compiler.scheme import Scheme

__all__ = ["TASKS", "EncoderExport", "Matrix", "export_encoder", "infer_task"]

IR_VERSION = 10
AXES = ("batch", "sequence")


@dataclass(frozen=True)
class EncoderExport:
    """What was written. files: name -> bytes. built: by our builder, not traced.

    fusions: kind of operator -> how many; `unfused_softmax` counts attentions that a traced graph keeps as they were.
    """

    task: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    pooling: str | None
    normalize: bool
    max_length: int
    labels: tuple[str, ...]
    files: dict[str, int]
    matrices: tuple[Matrix, ...]
    fusions: dict[str, int]
    built: bool


def export_encoder(
    checkpoint: Checkpoint,
    scheme: Scheme,
    directory: Path,
    *,
    task: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EncoderExport:
    """Writes `directory`/model.onnx and model.onnx.data.

    task       one of TASKS; None: `infer_task`
    pooling    mean, cls, max, lasttoken or "none"; None: what sentence-transformers' files say
    normalize  unit length of the pooled vector; None: what the files say
    progress   called with (item, done, total) while weights are written
    Raises ArchitectureError, CheckpointError, OutputError.
    """
    chosen = task or infer_task(checkpoint)
    config = task_config(checkpoint, chosen)
    mode, unit = pooling_of(checkpoint, chosen, pooling, normalize)
    plan = plan_encoder(config, chosen)
    if plan is not None:
        graph, tensors = build_encoder(plan, checkpoint)
        fusions = {"attention": plan.layers, "unfused_softmax": 0}
    else:
        graph, tensors, fusions = traced(checkpoint, config, chosen)
    if mode is not None:
        add_pooling(graph, mode, unit)
    directory.mkdir(parents=True, exist_ok=True)
    seen = observed(checkpoint, plan, directory) if plan is not None and scheme.kernel in ("rows", "dynamic") else {}
    with DataFile(directory / "model.onnx.data") as data:
        matrices = Weights(graph, tensors, scheme, data, progress, checkpoint.origin, seen).lower()
    finish(graph)
    save(graph, directory / "model.onnx")
    files = {name: (directory / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}
    labels = () if chosen == "feature-extraction" else labels_of(checkpoint)
    inputs, outputs = (tuple(str(value.name) for value in values) for values in (graph.graph.inputs, graph.graph.outputs))
    return EncoderExport(chosen, inputs, outputs, mode, unit, max_length(checkpoint), labels, files, tuple(matrices), fusions, plan is not None)


def observed(checkpoint: Checkpoint, plan: EncoderPlan, directory: Path) -> Mapping[str, np.ndarray]:
    """`channel_spans` of a float32 export that is gone again afterwards."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        export_encoder(checkpoint, Scheme(), Path(folder), task=plan.task, pooling="none")
        return channel_spans(Path(folder), sample_tokens(checkpoint, plan.vocabulary, plan.positions))


def traced(checkpoint: Checkpoint, config: dict[str, Any], task: str) -> tuple[ir.Model, dict[str, TensorView], dict[str, int]]:
    """(fused graph, name -> tensor, how often each pass fired) by way of transformers' exporter."""
    model = skeleton(config, task, checkpoint.origin)
    if task == "feature-extraction" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # no task of ours reads it
    drop_unused_pooler(model, checkpoint)
    tensors = match_tensors(model, checkpoint)
    graph = trace(model, checkpoint.origin)
    single_output(graph, task)
    return graph, tensors, fuse(graph)


def pooling_of(checkpoint: Checkpoint, task: str, pooling: str | None, normalize: bool | None) -> tuple[str | None, bool]:
    """(pooling, normalize) to build. Raises ArchitectureError for what cannot be."""
    if task != "feature-extraction":
        if pooling not in (None, "none") or normalize:
            raise ArchitectureError(
                "pooling", expected="none for a classifier", found=str(pooling or "normalize"), remedy="leave pooling out, or set task: feature-extraction"
            )
        return None, False
    if pooling is not None and pooling not in (*POOLINGS, "none"):
        raise ArchitectureError("pooling", expected=f"{', '.join(POOLINGS)} or none", found=repr(pooling), remedy="choose one of these")
    mode, unit = configured_pooling(checkpoint) if pooling is None else (None if pooling == "none" else pooling, False)
    if normalize is not None:
        unit = normalize
    elif pooling is not None and mode is not None and "modules.json" in checkpoint.assets:
        unit = configured_normalize(checkpoint)
    if unit and mode is None:
        raise ArchitectureError("normalize", expected="a pooling to normalise after", found="none", remedy=f"set pooling to one of {', '.join(POOLINGS)}")
    return mode, unit


def configured_normalize(checkpoint: Checkpoint) -> bool:
    """Whether modules.json ends in Normalize, whatever its pooling is."""
    return b"Normalize" in checkpoint.assets["modules.json"]


def single_output(model: ir.Model, task: str) -> None:
    """Keeps the task's output only. Raises ArchitectureError when the exporter named none so."""
    wanted = "last_hidden_state" if task == "feature-extraction" else "logits"
    kept = [value for value in model.graph.outputs if value.name == wanted]
    if not kept:
        found = ", ".join(str(value.name) for value in model.graph.outputs)
        raise ArchitectureError("graph", expected=f"an output {wanted}", found=found, remedy="choose another task for this family")
    model.graph.outputs[:] = kept


def finish(model: ir.Model) -> None:
    """Stable names, named axes, no trace of the exporter. Raises ValueError when a placeholder is left: a bug of ours."""
    if unlowered(model):
        raise ValueError("a placeholder was not lowered")
    tidy(model)
    common.ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    given = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in graph.inputs:
        value.shape = ir.Shape(AXES)
    for value in graph.outputs:
        dims: list[Any] = list(value.shape or [])
        value.shape = ir.Shape([AXES[i] if not isinstance(dim, int) and i < len(AXES) else dim for i, dim in enumerate(dims)])
    for index, node in enumerate(graph):
        node.name = f"{node.op_type}_{index}"
        for position, value in enumerate(node.outputs):
            if id(value) not in given:
                value.name = f"{node.name}_{position}"
                value.shape, value.type = None, None
    graph.name = "encoder"
    model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string = "trimtab", None, None, None, None
    model.metadata_props.clear()
    model.ir_version = IR_VERSION
    opset = graph.opset_imports[""]
    graph.opset_imports.clear()
    graph.opset_imports.update({"": opset, MICROSOFT: 1})


def save(model: ir.Model, path: Path) -> None:
    """The graph; its weights are external already. Raises OutputError."""
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    try:
        path.write_bytes(content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            path.unlink(missing_ok=True)
        raise output_error(path, error) from error
