"""The peers that a bundle is measured against: rows of data. Where their environments are, and what makes them.

An environment is made by `python benchmarks/peers.py NAME` under TRIMTAB_BENCH_ENVS, else under benchmarks/.envs of the checkout. torch has none of its own:
it is part of `trimtab[compile]`. A peer that is not installed is an error: a table with a hole would look like a table without a rival.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.errors import BenchError

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = Path(__file__).resolve().parent / "adapters"
DECODER, ENCODER = "decoder", "encoder"


@dataclass(frozen=True)
class System:
    """One row of the table: a peer with one form of the model.

    env      name of its environment, "" for ours
    form     what `models.FORMS` makes of the merged weights, "" for a bundle as it is
    options  laid over the `load` question of its adapter
    """

    name: str
    peer: str
    kind: str
    adapter: str
    env: str
    form: str
    options: Mapping[str, Any] = field(default_factory=dict)


SYSTEMS = (
    System("llama.cpp q4_0", "llama.cpp", DECODER, "llama_cpp_model.py", "llama.cpp", "gguf-q4_0"),
    System("llama.cpp q4_k_m", "llama.cpp", DECODER, "llama_cpp_model.py", "llama.cpp", "gguf-q4_k_m"),
    System("llama.cpp q8_0", "llama.cpp", DECODER, "llama_cpp_model.py", "llama.cpp", "gguf-q8_0"),
    System("openvino int4", "openvino", DECODER, "openvino_model.py", "openvino", "openvino-int4"),
    System("openvino int8", "openvino", DECODER, "openvino_model.py", "openvino", "openvino-int8"),
    System("ort-genai int4", "ort-genai", DECODER, "ort_genai_model.py", "ort-genai", "genai-int4"),
    System("torch eager", "torch", DECODER, "torch_model.py", "", "checkpoint"),
    System("torch compiled", "torch", DECODER, "torch_model.py", "", "checkpoint", {"compiled": True}),
    System("llama.cpp f32", "llama.cpp", ENCODER, "llama_cpp_model.py", "llama.cpp", "gguf-f32"),
    System("llama.cpp q8_0", "llama.cpp", ENCODER, "llama_cpp_model.py", "llama.cpp", "gguf-q8_0"),
    System("openvino fp32", "openvino", ENCODER, "openvino_model.py", "openvino", "openvino-fp32"),
    System("openvino int8", "openvino", ENCODER, "openvino_model.py", "openvino", "openvino-int8"),
    System("torch eager", "torch", ENCODER, "torch_model.py", "", "checkpoint"),
    System("torch compiled", "torch", ENCODER, "torch_model.py", "", "checkpoint", {"compiled": True}),
)


def systems_of(peers: Sequence[str], kind: str) -> tuple[System, ...]:
    """The rows of some peers (`llama.cpp`) or of single systems (`llama.cpp q4_0`) for a kind of model. Raises BenchError for a name that has no row."""
    chosen: list[System] = []
    for name in peers:
        rows = [row for row in SYSTEMS if row.kind == kind and name in (row.peer, row.name)]
        if not rows:
            known = ", ".join(dict.fromkeys(row.peer for row in SYSTEMS if row.kind == kind))
            raise BenchError(f"--against {name}", expected=f"a peer that runs a {kind} ({known})", found="none", remedy="name one of them")
        chosen += [row for row in rows if row not in chosen]
    return tuple(chosen)


def environments() -> Path:
    """The folder that holds the peers' environments and their models."""
    return Path(os.environ.get("TRIMTAB_BENCH_ENVS") or ROOT / "benchmarks" / ".envs")


def python_of(env: str) -> Path:
    """The interpreter of an environment; ours for "". Raises BenchError when the environment is missing or was left half made."""
    if not env:
        return Path(sys.executable)
    folder = environments() / env
    if not (folder / ".complete").is_file():
        raise BenchError(
            f"peer {env}",
            expected=f"an environment in {folder}",
            found="one that is not complete" if folder.exists() else "none",
            remedy=f"run `python benchmarks/peers.py {env}` in a checkout of trimtab (TRIMTAB_BENCH_ENVS names another folder), or leave the peer out",
        )
    return folder / "bin" / "python"
