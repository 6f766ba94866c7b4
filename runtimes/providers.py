"""Execution providers as rows: what onnxruntime calls each, its options, the package that brings it, and what it can run of ours.

`onnxruntime` alone holds the CPU provider (on macOS CoreML too); each other provider comes with a package of its own, which replaces `onnxruntime`. A build
that lacks a provider would run on the CPU without a word: here that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from targets.errors import TargetError

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """One way to execute a graph, for a caller to name (`SessionSettings.provider`). Targets do not choose one yet: everything is measured on the CPU.

    CUDA is for encoders: a decoder's graph holds a float32 GroupQueryAttention, and onnxruntime's CUDA kernel takes float16 only.
    """

    name: str
    package: str
    options: Mapping[str, str] = field(default_factory=dict)


PROVIDERS = {
    "cpu": Provider(CPU, "onnxruntime"),
    # the arena grows by what is asked for, not by doubling: a bundle shares the device's memory
    "cuda": Provider("CUDAExecutionProvider", "onnxruntime-gpu", {"arena_extend_strategy": "kSameAsRequested"}),
    "openvino": Provider("OpenVINOExecutionProvider", "onnxruntime-openvino", {"device_type": "CPU"}),
    "directml": Provider("DmlExecutionProvider", "onnxruntime-directml"),
    "coreml": Provider("CoreMLExecutionProvider", "onnxruntime", {"ModelFormat": "MLProgram"}),
}


def session_providers(name: str) -> list[Any]:
    """onnxruntime's `providers` argument for a row; the CPU takes what the provider has no kernel for.

    Raises TargetError for a name without a row and for a provider that this build of onnxruntime lacks.
    """
    import onnxruntime

    if name not in PROVIDERS:
        raise TargetError("execution provider", expected=f"one of {', '.join(PROVIDERS)}", found=repr(name), remedy="name one of them")
    row, built = PROVIDERS[name], onnxruntime.get_available_providers()
    if row.name not in built:
        raise TargetError(
            f"execution provider {name!r}",
            expected=f"an onnxruntime that holds {row.name}",
            found=f"onnxruntime {onnxruntime.__version__} with {', '.join(built)}",
            remedy=f"install {row.package} in place of onnxruntime, or run on the CPU",
        )
    return [CPU] if row.name == CPU else [(row.name, dict(row.options)), CPU]
