"""The GPU part of the probe: its refusals everywhere, its figures where a GPU is, its code on the processor."""

from __future__ import annotations

import subprocess

import onnxruntime
import pytest

from targets import gpu
from targets.errors import TargetError
from targets.gpu import CUDA, device_facts, has_gpu, measure_device, probe_gpu
from targets.probe import probe, repeat
from targets.profile import dump_profile, here, load_profile, with_measured

FIELDS = {"gpu_read_gb_s", "gpu_fp32_gflop_s", "gpu_fp16_gflop_s", "gpu_copy_gb_s"}
needs_gpu = pytest.mark.skipif(not has_gpu(), reason=f"this build of onnxruntime holds no {CUDA}")


@pytest.mark.skipif(has_gpu(), reason="this build of onnxruntime holds the provider")
def test_without_the_provider_the_package_that_brings_it_is_named(trimtab) -> None:
    with pytest.raises(TargetError, match=rf"expected an onnxruntime that runs {CUDA}, found onnxruntime .* with .*; install onnxruntime-gpu"):
        probe_gpu(1.0, repeat)
    code, _, stderr = trimtab("targets", "probe", "--seconds", 5, "--gpu")
    assert code == 1 and "onnxruntime-gpu" in stderr  # at once, not after the probe


def test_a_provider_that_does_not_start_is_refused() -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TargetError, match=rf"found {CUDA} did not start; install the CUDA and cuDNN libraries"):
        patch.setattr(gpu, "open_model", lambda *_: Session())
        measure_device("cuda", CUDA, 0.1, repeat)


@pytest.mark.parametrize("told, expected", [("Tesla T4, 15360\n", ("NVIDIA Tesla T4", 15360 << 20)), ("NVIDIA L4, 23034\n", ("NVIDIA L4", 23034 << 20))])
def test_name_and_memory_as_the_driver_tells_them(told: str, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, told, ""))
    assert device_facts() == expected


def test_a_missing_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", none)
    with pytest.raises(TargetError, match=r"nvidia-smi did not answer .* install NVIDIA's driver"):
        device_facts()


def test_figures_become_a_profile(tmp_path) -> None:
    """The same code on the processor: sizes a five-hundredth of a GPU's."""
    found = measure_device("cpu", "CPUExecutionProvider", 0.08, repeat, 0.002)
    assert set(found) == FIELDS and all(value > 0 and source.samples >= 3 for value, source in found.values())
    path = tmp_path / "gpu.yaml"
    path.write_text(dump_profile(with_measured(here(), found)))
    assert load_profile(path).gpu_copy_gb_s == found["gpu_copy_gb_s"][0]


@needs_gpu
def test_a_gpu_is_measured() -> None:
    profile = probe(10.0)
    assert profile.gpu.startswith("NVIDIA") and profile.gpu_memory_bytes and all(getattr(profile, name) > 0 for name in FIELDS)
    assert profile.gpu_fp16_gflop_s > profile.gpu_fp32_gflop_s and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
