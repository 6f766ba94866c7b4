"""Measure a graphics processor through onnxruntime: bandwidth of its memory, arithmetic in float32 and float16, and what copying to it and back costs.

What is measured is what a bundle would use: onnxruntime's CUDA provider, on values that lie on the device. The package that holds the provider replaces
`onnxruntime`; without it there is nothing to measure, and `probe_gpu` says so. Name and memory come from `nvidia-smi`, which the driver brings.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from targets.errors import TargetError
from targets.kernels import open_model
from targets.passes import Timing
from targets.profile import Provenance
from targets.wire import FLOAT, FLOAT16, Graph, Node, Value, model_bytes

CUDA, PACKAGE = "CUDAExecutionProvider", "onnxruntime-gpu"
STREAM_BYTES = 1 << 30  # read by one run: many times any cache of a GPU
COPY_BYTES = 256 << 20
GEMM = 8192  # a square product; 1.1e12 operations
Measured = dict[str, tuple[Any, Provenance]]
Repeat = Callable[[Callable[[], object], float], Timing]


def has_gpu() -> bool:
    """Whether this build of onnxruntime holds the CUDA provider."""
    import onnxruntime

    return CUDA in onnxruntime.get_available_providers()


def probe_gpu(seconds: float, repeat: Repeat) -> Measured:
    """The fields gpu... of a profile, each with its source.

    Raises TargetError where onnxruntime holds no CUDA provider, or holds one that does not start (a driver or CUDA library is missing): it would run on the
    processor without a word.
    """
    import onnxruntime

    built = onnxruntime.get_available_providers()
    if CUDA not in built:
        found = f"onnxruntime {onnxruntime.__version__} with {', '.join(built)}"
        raise _no_gpu(found, f"install {PACKAGE} in place of onnxruntime, or probe without --gpu")
    name, memory = device_facts()
    told = Provenance("measured", "as nvidia-smi tells it", datetime.now(UTC).date().isoformat())
    return {"gpu": (name, told), "gpu_memory_bytes": (memory, told), **measure_device("cuda", CUDA, seconds, repeat)}


def device_facts() -> tuple[str, int]:
    """Name, and bytes of memory, of the first NVIDIA device. Raises TargetError without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        name, memory = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip().splitlines()[0].rsplit(",", 1)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise _no_gpu(f"nvidia-smi did not answer ({type(error).__name__})", "install NVIDIA's driver, or probe without --gpu") from error
    return (name if name.startswith("NVIDIA") else f"NVIDIA {name}").strip(), int(memory) << 20


def measure_device(device: str, provider: str, seconds: float, repeat: Repeat, scale: float = 1.0) -> Measured:
    """Bandwidth, products and copies on a device of onnxruntime's. scale: of all sizes, for devices that are no GPU. Raises TargetError (see `probe_gpu`)."""
    share, side = seconds / 4, max(64, int(GEMM * scale))
    note = f"onnxruntime, {provider}"
    found: Measured = {}

    def keep(name: str, value: float, what: str, timing: Timing) -> None:
        source = Provenance("measured", f"{note}: {what}", datetime.now(UTC).date().isoformat(), timing.samples, round(timing.spread, 3))
        found[name] = (round(value, 2), source)

    rows = max(1, int(STREAM_BYTES * scale) >> 14)
    read = Graph([Node("ReduceMax", ["x"], ["y"], {"keepdims": 0})], [Value("x", ("rows", 4096))], [Value("y", ())])
    timing = repeat(_bound(read, device, provider, {"x": np.ones((rows, 4096), np.float32)}), share)
    keep("gpu_read_gb_s", rows * 4096 * 4 / timing.seconds / 1e9, "maximum of numbers in its memory", timing)
    for name, kind, dtype in (("gpu_fp32_gflop_s", FLOAT, np.float32), ("gpu_fp16_gflop_s", FLOAT16, np.float16)):
        shape = (side, side)
        product = Graph([Node("MatMul", ["a", "b"], ["y"])], [Value("a", shape, kind), Value("b", shape, kind)], [Value("y", shape, kind)])
        timing = repeat(_bound(product, device, provider, {"a": np.ones(shape, dtype), "b": np.ones(shape, dtype)}), share)
        keep(name, 2e-9 * side**3 / timing.seconds, f"MatMul {side} x {side} x {side}", timing)
    timing = repeat(_copies(device, max(1 << 16, int(COPY_BYTES * scale))), share)
    keep("gpu_copy_gb_s", 2 * max(1 << 16, int(COPY_BYTES * scale)) / timing.seconds / 1e9, "a value there and back", timing)
    return found


def _bound(graph: Graph, device: str, provider: str, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """A run on values that lie on the device, result included; waits for it."""
    import onnxruntime

    session = open_model(model_bytes(graph), 1, (provider,))
    if session.get_providers()[0] != provider:
        raise _no_gpu(f"{provider} did not start", f"install the CUDA and cuDNN libraries that {PACKAGE} {onnxruntime.__version__} asks for")
    binding = session.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y", device, 0)

    def run() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return held

    return run


def _copies(device: str, size: int) -> Callable[[], object]:
    """A value to the device and back."""
    import onnxruntime

    array = np.ones(size // 4, np.float32)
    return lambda: onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0).numpy()


def _no_gpu(found: str, remedy: str) -> TargetError:
    return TargetError("probe of the GPU", expected=f"an onnxruntime that runs {CUDA}", found=found, remedy=remedy)
