"""From a model class to a raw ONNX graph, with no weight read: transformers' OnnxExporter over a model whose parameters are empty.

The graph comes out unoptimized and in eager form (`optimize=False`, no `ort_fusions`): our own passes need seconds less, and the eager
form of attention is one clean pattern (`encoder_attention`), where the sdpa form is not. Parameters are untouched pages (`torch.empty`),
so tracing costs no memory; their values are streamed in by `encoder_weights`.

Where the time goes, MiniLM (6 layers), 2 cores shared with others: imports 8.2 s, torch.export 5.4 s, decompositions 6.2 s, the rest of the
trace 3.8 s, our passes and weights 0.9 s; `export_encoder` 16.3 s in all, peak 586 MB, nearly all of it torch and transformers. The same
exporter with `optimize=True, ort_fusions="cpu"` was timed under a profiler only (58 s; 17.5 s of them onnxscript's optimizer and its rewrites).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from compiler.errors import ArchitectureError

SAMPLE_BATCH, SAMPLE_LENGTH = 2, 7  # unequal, and neither is 0 or 1, which torch.export would take for constants
OPSET = 20  # the first with Gelu; onnxruntime fuses and runs it


def trace(model: Any, origin: str) -> ir.Model:
    """The raw graph of a model without weights (`compiler.reference.skeleton`). Inputs [batch, sequence] int64, both dynamic.

    Raises ArchitectureError when the exporter cannot follow the model's code.
    """
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    fill_with_untouched_pages(model)
    names = input_names(model)
    sample = {name: torch.ones(SAMPLE_BATCH, SAMPLE_LENGTH, dtype=torch.long) for name in names}
    axes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in names}
    settings = OnnxConfig(dynamic=True, dynamic_shapes=axes, optimize=False, opset_version=OPSET)
    with quiet():
        try:
            return OnnxExporter().export(model, sample, config=settings).program
        except (RuntimeError, ValueError, NotImplementedError, torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            place = f"{origin}: {type(model).__name__}"
            raise ArchitectureError(
                place, expected="a model that torch.export can follow", found=reason, remedy="this family has no road yet; report it with config.json"
            ) from error


def input_names(model: Any) -> list[str]:
    """input_ids, attention_mask, and token_type_ids where there is more than one kind of token."""
    names = ["input_ids", "attention_mask"]
    kinds = int(getattr(model.config, "type_vocab_size", 0) or 0)
    if kinds > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        names.append("token_type_ids")
    return names


def fill_with_untouched_pages(model: Any) -> None:
    """Meta parameters -> CPU parameters of the same shape that own address space and no memory."""
    import torch

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print and log on their own; stdout belongs to our results."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
