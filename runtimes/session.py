"""One way to open an onnxruntime session: nothing leaves the machine, and every option has its reason here.

threads      intra-op threads. An explicit number also drops onnxruntime's pinning, which is wrong inside a container with fewer cores than the host.
spinning     worker threads spin between operators. A decode step is some hundred short parallel regions: sleeping between them costs more than the work.
             Right for one tenant, wrong on a battery or a shared machine.
sequential   one operator at a time: transformer graphs are chains, and parallel execution only splits the caches.
mem pattern  off: it plans buffers for the shapes of an earlier run, and lengths change from call to call.
provider     a row of `runtimes.providers`; the CPU unless another is asked for.
denormals    flushed to zero where a process does nothing but run a bundle (`trimtab run`, the child that measures): decoding SmolLM2 int4-g64 at
             context 0 on an AMD Zen 3 took 1.12 (quartiles 1.07 to 1.20, 40 interleaved rounds) and 1.20 (1.04 to 1.31, 60 rounds) times as long without it;
             longer contexts were not measured alone. onnxruntime sets this for the calling thread for good, so a process that also merges or evaluates
             leaves it alone.
defaults     dynamic_block_base and the length of the spin keep theirs: no figure that a command repeats speaks for others (`benchmarks/steps.py`).
exact        MatMulNBits with float32 activations (`accuracy_level` 1) in place of what the graph says: slower, and free of the rounding of activations to
             8 bits, which turns the last bit of a sum into a step. What must be equal is compared so (`runtimes.behaviours`). One byte of the graph changes.
optimisation onnxruntime's graph optimisations: all, basic or none.
entries      further entries of onnxruntime's session configuration, for benchmarks that try them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.external import check_graph
from runtimes.providers import session_providers
from targets.errors import BundleError
from targets.machine import usable_cores
from targets.telemetry import switch_off

LEVELS = {"all": "ORT_ENABLE_ALL", "basic": "ORT_ENABLE_BASIC", "none": "ORT_DISABLE_ALL"}
# AttributeProto (onnx.proto3): field 1, name, 14 bytes; field 3, i, a varint. Both varints have one byte, so no length around them changes.
ACCURACY, FLOAT_ACCURACY = b"\x0a\x0eaccuracy_level\x18\x04", b"\x0a\x0eaccuracy_level\x18\x01"
REMEDY = "check the bundle with `trimtab verify`, and its onnxruntime version against the one named in manifest.json"


@dataclass(frozen=True)
class SessionSettings:
    """How a session runs. threads 0 = as many as this process may use physical cores."""

    threads: int = 0
    spinning: bool = True
    flush_denormals: bool = False
    use_arena: bool = True
    provider: str = "cpu"
    profile_prefix: str = ""
    exact: bool = False
    optimization: str = "all"
    entries: tuple[tuple[str, str], ...] = ()

    def resolved_threads(self) -> int:
        return self.threads or usable_cores()


def open_session(model_path: Path, settings: SessionSettings | None = None, graph: bytes | None = None) -> Any:
    """An onnxruntime.InferenceSession. Raises BundleError, in one line, when the model does not load, TargetError for a provider that is not there.

    graph  another graph over the same external data, in place of the one at `model_path`

    Warnings of onnxruntime are kept off the terminal (severity 3): what matters is checked by us and said in our words.
    """
    switch_off()
    import onnxruntime

    settings = settings or SessionSettings()
    providers = session_providers(settings.provider)
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.resolved_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[settings.optimization])
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = settings.use_arena
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1" if settings.flush_denormals else "0")
    for key, value in settings.entries:
        options.add_session_config_entry(key, value)
    if settings.exact:  # else DequantizeLinear and MatMul become an operator that rounds activations
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if settings.profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = settings.profile_prefix
    if not Path(model_path).is_file():
        raise BundleError(str(model_path), expected="an ONNX file", found="none", remedy=REMEDY)
    check_graph(Path(model_path))
    source: str | bytes = str(model_path)
    if settings.exact or graph is not None:
        source = graph or Path(model_path).read_bytes()
        source = source.replace(ACCURACY, FLOAT_ACCURACY) if settings.exact else source
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(model_path).parent))
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers)
    except _load_errors() as error:
        raise BundleError(str(model_path), expected="a model that onnxruntime loads", found=_one_line(error), remedy=REMEDY) from error


def _load_errors() -> tuple[type[BaseException], ...]:
    """onnxruntime's own error classes share no base but Exception; those that a bad file causes are named here."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException", "EPFail")
    return (*(getattr(state, name) for name in names if hasattr(state, name)), RuntimeError)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
