"""What the smaller commands do: run, inspect and targets, as library calls that return plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from compiler.errors import BundleError, CheckpointError, TrimtabError
from compiler.progress import Progress


def run_bundle(directory: Path, prompt: str, as_json: bool, options: Mapping[str, Any]) -> None:
    """Generate (streaming), classify or encode one prompt and print the answer."""
    from runtimes.bundle import open_bundle, verify_bundle

    if options["verify"]:
        verify_bundle(directory)
    bundle = open_bundle(directory)
    if bundle.kind == "encoder":
        if options["adapter"]:
            remedy = "leave --adapter out: an encoder's deltas are merged"
            raise TrimtabError("--adapter", expected="a decoder with unmerged adapters", found="an encoder", remedy=remedy)
        _print_encoding(bundle, prompt, as_json)
        return
    from runtimes.generate import Generator, Options
    from runtimes.sampling import Sampling
    from runtimes.session import SessionSettings

    generator = Generator(bundle, SessionSettings(flush_denormals=True))
    chat = not options["raw"] and generator.has_chat_template
    wanted: Any = [{"role": "user", "content": prompt}] if chat else prompt
    sampling = Sampling(temperature=options["temperature"], top_k=options["top_k"], top_p=options["top_p"], seed=options["seed"])
    settings = Options(max_new_tokens=options["max_new_tokens"], sampling=sampling, adapter=options["adapter"], lookup=options["lookup"])
    if as_json:
        (answer,) = generator.generate([wanted], settings)
        row = {"text": answer.text, "token_ids": list(answer.token_ids), "finish": answer.finish, "prompt_tokens": answer.prompt_tokens}
        if options["lookup"]:
            row["lookup"] = {"drafted": generator.pace.drafted, "accepted": generator.pace.accepted, "pauses": len(generator.pace.pauses)}
        click.echo(json.dumps({**row, "ttft_ms": answer.ttft_ms, "tpot_ms": answer.tpot_ms}, ensure_ascii=False))
        return
    for piece in generator.stream(wanted, settings):
        click.echo(piece.text, nl=False)
    click.echo()


def _print_encoding(bundle: Any, text: str, as_json: bool) -> None:
    from runtimes.encode import Encoder

    encoder = Encoder(bundle)
    if bundle.model["task"] == "text-classification":
        (found,) = encoder.classify([text])
        shares = {label: float(share) for label, share in zip(encoder.labels, found.probabilities, strict=True)}
        rows = sorted(shares.items(), key=lambda item: -item[1])
        click.echo(json.dumps({"label": found.label, "probabilities": shares}) if as_json else "\n".join(f"{share:7.1%}  {label}" for label, share in rows))
    elif bundle.model["task"] == "token-classification":
        (tokens,) = encoder.classify_tokens([text])
        if as_json:
            click.echo(json.dumps([vars(token) for token in tokens]))
        else:
            click.echo("\n".join(f"{token.probability:7.1%}  {token.label:12s} {text[token.start : token.end]}" for token in tokens))
    else:
        (vector,) = encoder.encode([text])
        click.echo(json.dumps({"vector": [float(value) for value in vector]}) if as_json else " ".join(f"{value:.4f}" for value in vector))


def describe(path: str) -> dict[str, Any]:
    """What a path is. Raises BundleError or CheckpointError when it is none of bundle, adapter and checkpoint."""
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return _describe_bundle(folder)
    if (folder / "adapter_config.json").is_file() or is_own_delta(folder):
        return _describe_adapter(path)
    try:
        return _describe_checkpoint(path)
    except CheckpointError as error:
        if folder.is_dir():
            raise BundleError(path, expected="a bundle, an adapter or a checkpoint", found=error.found, remedy=error.remedy) from error
        raise


def is_own_delta(path: Path) -> bool:
    """A sparse delta or a file of differences in our own format, as a file or in a folder."""
    from compiler.checkpoints.safetensors import read_header
    from compiler.deltas.load import OWN_FILE
    from compiler.deltas.sparse import FORMAT

    file = path / OWN_FILE if path.is_dir() else path
    return file.is_file() and file.suffix == ".safetensors" and read_header(file)[1].get("format") == FORMAT


def _describe_bundle(folder: Path) -> dict[str, Any]:
    from compiler.foresight import foresee_bundle
    from runtimes.bundle import open_bundle
    from targets.profile import load_profile

    bundle = open_bundle(folder)
    manifest, model = bundle.manifest, bundle.model
    lineage = manifest["lineage"]
    return {
        "kind": f"{bundle.kind} bundle",
        "name": bundle.name,
        "target": manifest["target"]["id"],
        "task": model["task"],
        "family": model["family"],
        "parameters": model["parameters"],
        "scheme": model["scheme"],
        "size_mb": round(bundle.size_bytes / 1e6, 2),
        "base": lineage["base"]["origin"],
        "deltas": [f"{row['origin']} ({row['kind']}, weight {row['weight']}, {row['touched']} tensors)" for row in lineage["deltas"]],
        **({"adapters": [_adapter_line(row) for row in model["adapters"]]} if model.get("adapters") else {}),
        "digest": manifest["digest"],
        "files": len(bundle.files),
        "prediction": foresee_bundle(folder, load_profile("here")),
    }


def _adapter_line(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (rank {row['rank']} at most, {len(row['matrices'])} matrices, {row['bytes'] / 1e6:.2f} MB)"


def _describe_adapter(path: str) -> dict[str, Any]:
    from compiler.deltas.load import load_delta

    delta = load_delta(path)
    return {"kind": f"{delta.kind} delta", "trained_on": delta.base_name, "task": delta.task, "tensors": len(delta.names), "digest": delta.digest}


def _describe_checkpoint(path: str) -> dict[str, Any]:
    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.stages.export import road

    checkpoint = open_checkpoint(path)
    types: dict[str, int] = {}
    for view in checkpoint.tensors.values():
        types[view.dtype] = types.get(view.dtype, 0) + view.size
    return {
        "kind": "checkpoint",
        "family": checkpoint.config.get("model_type"),
        "architectures": checkpoint.config.get("architectures"),
        "parameters": checkpoint.parameter_count,
        "tensors": len(checkpoint.tensors),
        "stored": types,
        "road": road(checkpoint.config),
        "assets": sorted(checkpoint.assets),
        "digest": checkpoint.digest,
    }


def list_targets() -> list[dict[str, str]]:
    """Known profiles: id and a one-line summary."""
    from targets.profile import list_profiles

    rows = []
    for profile in list_profiles():
        memory = f"{profile.memory_bytes / 2**30:.0f} GiB" if profile.memory_bytes else "memory unknown"
        rows.append({"id": profile.id, "summary": f"{profile.cores} cores, {memory}, {profile.uarch or profile.vendor}"})
    return rows


def show_target(name: str) -> dict[str, Any]:
    """All fields of a profile, with their provenance."""
    from targets.profile import load_profile

    return load_profile(name).as_dict()


def probe_target(seconds: float, out: Path | None, progress: Progress, gpu: bool | None = None) -> tuple[dict[str, Any], list[Path]]:
    """Measure this machine; keep the profile for `here`, and write it to `out` too. Returns its fields and the files written.

    gpu  measure the GPU as well; None: where onnxruntime runs on it
    """
    from compiler.store import writing
    from targets.probe import probe
    from targets.profile import dump_profile, measured_place

    with progress.stage("probe", f"this machine, about {seconds:.0f} s"):
        profile = probe(seconds, lambda item, done, total: progress.update(item, done, total), gpu=gpu)
    places = [measured_place(profile.fingerprint), *([out] if out else [])]
    for place in places:
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            work = place.with_name(f".{place.name}.new")
            work.write_text(dump_profile(profile), encoding="utf-8")
            work.rename(place)
    return profile.as_dict(), places
