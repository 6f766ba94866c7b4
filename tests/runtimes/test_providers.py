"""Execution providers: rows, and a build that lacks one."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.providers import CPU, PROVIDERS, session_providers
from runtimes.session import SessionSettings, open_session
from targets.errors import TargetError


def test_the_cpu_is_there_and_alone() -> None:
    assert session_providers("cpu") == [CPU]


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(TargetError, match="expected one of cpu, cuda"):
        session_providers("gpu")


def test_a_build_without_the_provider_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(TargetError, match="install onnxruntime-gpu in place of onnxruntime"):
        open_session(tmp_path / "model.onnx", SessionSettings(threads=1, provider="cuda"))


def test_a_provider_comes_with_its_options_and_the_cpu_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    assert session_providers("cuda") == [("CUDAExecutionProvider", dict(PROVIDERS["cuda"].options)), CPU]
