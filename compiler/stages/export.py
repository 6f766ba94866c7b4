"""Export: merged weights to ONNX, quantized as they stream, with the files that a runtime needs beside the graph.

Two roads. Decoders of known families go through our own graph builder (no torch, no model object); everything else
goes through transformers' exporter and our passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.checkpoints.files import plain_json
from compiler.checkpoints.view import Checkpoint
from compiler.errors import ArchitectureError, RecipeError
from compiler.scheme import ENCODER_SCHEMES, Scheme, Schemes, matrix_name, parse_scheme
from compiler.stages.keep import codes_for
from compiler.store import writing
from targets.machine import ISA_OF_WIDE_SUMS, sums_in_32_bits

if TYPE_CHECKING:
    from compiler.graph.adapters import Tenant

CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
SUMMARY = "export.json"
DECODER, ENCODER = "decoder", "encoder"

Report = Callable[[str, int, int], None]


def road(config: Mapping[str, Any], task: str | None = None) -> str:
    """Which of the two roads a model takes: "decoder" for text generation of a known family, else "encoder"."""
    from compiler.graph.architectures import FAMILIES

    heads = config.get("architectures") or ["ForCausalLM"]
    generates = any(head.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for head in heads)
    if task in (None, "text-generation") and generates and config.get("model_type") in FAMILIES:
        return DECODER
    if task == "text-generation" or (task is None and generates and "architectures" in config):
        known = ", ".join(sorted(FAMILIES))
        raise ArchitectureError(
            f"model_type {config.get('model_type')!r}",
            expected=f"a decoder family that is built here ({known})",
            found="a family without a row",
            remedy="use a model of a known family, or add a row to compiler/graph/architectures.py; encoders take the other road (--task feature-extraction)",
        )
    return ENCODER


def resolve_options(checkpoint: Checkpoint, schemes: Schemes, task: str | None, max_length: int | None, prompts: str | None = None) -> dict[str, Any]:
    """The concrete, printable parameters of an export: what its cache key is made of.

    prompts  "int8-rows" for a second graph that reads prompts
    Raises RecipeError, ArchitectureError for what this model or road does not take.
    """
    layers = {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()}
    way = road(checkpoint.config, task)
    _check_patterns(checkpoint, schemes, way)
    if prompts and (way != DECODER or schemes.default.kernel != "nbits"):
        found = "an encoder" if way != DECODER else str(schemes.default)
        raise RecipeError("quantize.prompts", expected="a decoder in groups, such as int4-g64", found=found, remedy="remove it")
    if way == DECODER:
        _refuse_dynamic([schemes.default, *schemes.overrides.values()])
        options = {"road": way, "scheme": str(schemes.default), "layers": layers, "task": "text-generation", "max_length": max_length, "logits": "last"}
        return options | ({"prompts": prompts} if prompts else {})
    from compiler.graph.encoder import infer_task

    if schemes.default.kernel in ("nbits", "tokens") and (schemes.default.shift or schemes.default.half_scales):
        raise RecipeError(
            "quantize.scheme", expected="4 or 8 bits with float32 scales for an encoder", found=str(schemes.default), remedy="use int4-g32 or int8"
        )
    return {"road": way, "scheme": str(schemes.default), "layers": layers, "task": task or infer_task(checkpoint), "max_length": max_length}


def schemes_in(options: Mapping[str, Any]) -> Schemes:
    """The schemes that the parameters of an export name."""
    return Schemes(parse_scheme(options["scheme"]), {pattern: parse_scheme(text) for pattern, text in options["layers"].items()})


def require_processor(schemes: Schemes, machine: str, isa: Sequence[str]) -> None:
    """Raises RecipeError where codes of the full range would saturate on a machine with the instruction sets `isa`."""
    if schemes.default.full_range and not sums_in_32_bits(isa):
        expected, has = f"a processor with one of {', '.join(ISA_OF_WIDE_SUMS)}", ", ".join(isa) or "none that is known"
        found = f"{schemes.default} for {machine} ({has}): sums would saturate"
        raise RecipeError("quantize.scheme", expected=expected, found=found, remedy="use int8-dynamic, which is right on every processor")


def _check_patterns(checkpoint: Checkpoint, schemes: Schemes, way: str) -> None:
    """An override that changes nothing is a mistake that would otherwise look like a choice."""
    if schemes.overrides and way == ENCODER:
        raise RecipeError("quantize.layers", expected="one scheme for an encoder", found="overrides", remedy="remove them: encoders have one scheme so far")
    names = {name for tensor in checkpoint.tensors if (name := matrix_name(tensor, checkpoint.config))}
    for pattern in schemes.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(sorted(names)[:4])
            raise RecipeError(f"quantize.layers.{pattern}", expected=f"a pattern that matches a matrix ({some}, ...)", found="no match", remedy="correct it")


def _refuse_dynamic(schemes: list[Scheme]) -> None:
    for scheme in (scheme for scheme in schemes if scheme in ENCODER_SCHEMES.values()):
        raise ArchitectureError(
            "quantize.scheme",
            expected="a weight-only scheme for a decoder (int8-g32, int4-g64, ...)",
            found=f"{scheme}, one of the forms for encoders",
            remedy="use int8-g64",
        )


def try_small_files(checkpoint: Checkpoint) -> None:
    """Chat template and tokenizer at work in a limited process, before anything here runs them. Raises CheckpointError or BundleError."""
    from runtimes.trial import try_files

    settings = plain_json(checkpoint.assets.get("tokenizer_config.json", b"{}"), f"{checkpoint.origin}: tokenizer_config.json", "the tokenizer's config")
    template = checkpoint.assets.get("chat_template.jinja", b"").decode("utf-8", "replace") or settings.get("chat_template") or ""
    if not isinstance(template, str):
        template = next((str(part.get("template")) for part in template if isinstance(part, dict) and part.get("name") == "default"), "")
    named = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if isinstance(settings.get(key), str)}
    tokenizer = checkpoint.assets.get("tokenizer.json", b"").decode("utf-8", "replace")
    try_files(template, named, tokenizer, checkpoint.origin)


def export(
    checkpoint: Checkpoint, options: Mapping[str, Any], directory: Path, report: Report, codes: Path | None = None, tenants: Sequence[Tenant] = ()
) -> dict[str, Any]:
    """Fill `directory` with graph, weights, configs and tokenizer; returns {"model": ..., "layers": [...]} and writes it as export.json.

    codes    a folder of the quantize step (decoders); None: what came with codes that the scheme holds keeps them, the rest is rounded to nearest
    tenants  adapters that stay unmerged; decoders only

    Raises ArchitectureError, CheckpointError or OutputError.
    """
    from compiler.checkpoints.resolve import require_tokenizer
    from compiler.graph.lint import require_clean

    require_tokenizer(checkpoint)
    checkpoint = checkpoint.finite()
    schemes = schemes_in(options)
    with writing(directory):
        if options["road"] == DECODER:
            more = {"codes_of": codes_for(checkpoint, schemes, codes), "tenants": tenants, "prompts": "prompts" in options}
            summary = _decoder(checkpoint, schemes, options, directory, report, more)
        else:
            summary = _encoder(checkpoint, schemes, options, directory, report)
        for graph in directory.glob("*.onnx"):
            require_clean(graph, full_range=schemes.default.full_range)
        for name in (*CARRIED, *LICENCES):
            if name in checkpoint.assets:
                (directory / name).write_bytes(checkpoint.assets[name])
        (directory / "config.json").write_text(json.dumps(_safe_config(checkpoint.config), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        (directory / SUMMARY).write_text(json.dumps(summary, sort_keys=True))
    return summary


def _decoder(checkpoint: Checkpoint, schemes: Schemes, options: Mapping[str, Any], directory: Path, report: Report, more: Mapping[str, Any]) -> dict[str, Any]:
    from compiler.graph.decoder import export_decoder

    done = export_decoder(checkpoint, schemes, directory, logits=options["logits"], max_length=options["max_length"], progress=report, **more)
    model = {
        "kind": DECODER,
        "family": checkpoint.config["model_type"],
        "task": "text-generation",
        "parameters": checkpoint.parameter_count,
        "max_length": done.max_length,
        "logits": options["logits"],
        "scheme": options["scheme"],
        **({"prompts": options["prompts"]} if "prompts" in options else {}),
        **({"adapters": [row.as_dict() for row in done.adapters]} if done.adapters else {}),
    }
    return {"model": model, "layers": [asdict(row) for row in done.matrices]}


def _encoder(checkpoint: Checkpoint, schemes: Schemes, options: Mapping[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    from compiler.graph.encoder import export_encoder

    done = export_encoder(checkpoint, schemes.default, directory, task=options["task"], progress=report)
    model = {
        "kind": ENCODER,
        "family": checkpoint.config["model_type"],
        "task": done.task,
        "parameters": checkpoint.parameter_count,
        "max_length": min(done.max_length, options["max_length"] or done.max_length),
        "labels": list(done.labels),
        "pooling": done.pooling,
        "normalize": done.normalize,
        "scheme": options["scheme"],
    }
    return {"model": model, "layers": [asdict(row) for row in done.matrices]}


def _safe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what could run code elsewhere or name a place on this machine."""
    return {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path", "custom_pipelines") and not key.endswith("_internal")}
