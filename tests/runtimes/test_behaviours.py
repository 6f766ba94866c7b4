"""Behaviours hold for healthy bundles of every kernel, and each breaks when what it looks at is broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import behaviours as tried
from runtimes.behaviours import Subject, behaviours, difference, probes
from runtimes.bundle import open_bundle
from runtimes.decode import DecodeLoop
from runtimes.session import SessionSettings
from targets.errors import BundleError

NAMES = {
    "finite_outputs",
    "batch_invariance",
    "padding_invariance",
    "length_1",
    "length_max",
    "length_over",
    "empty_input",
    "optimization_basic",
    "optimization_none",
    "threads_1",
    "threads_2",
    "second_process",
    "activation_rounding",
}


def test_a_healthy_decoder_holds_them_all(decoder: SimpleNamespace) -> None:
    found = {finding.name: finding for finding in behaviours(open_bundle(decoder.directory), threads=1)}
    assert set(found) == NAMES | {"cache_equals_recompute", "chunked_prompt"}
    assert [name for name, finding in found.items() if not finding.holds] == []
    assert "token 384" in found["length_max"].note and "refused" in found["length_over"].note
    assert found["second_process"].measured == 0.0


def test_a_healthy_encoder_holds_them_all(encoder_bundle: Callable[..., Path]) -> None:
    found = behaviours(open_bundle(encoder_bundle("sentence_embedding", pooled=True, max_length=32)), threads=1)
    assert {finding.name for finding in found} == NAMES and all(finding.holds for finding in found)


@pytest.fixture
def quantized(decoder: SimpleNamespace, tmp_path: Path, write_manifest: Callable[..., Path]) -> Path:
    """The decoder's weights in four bits."""
    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.graph.decoder import export_decoder
    from compiler.scheme import Schemes, parse_scheme

    folder = tmp_path / "int4"
    shutil.copytree(decoder.directory, folder)
    export_decoder(open_checkpoint(str(decoder.directory.parent / "hf")), Schemes(parse_scheme("int4-g32")), folder)
    return write_manifest(folder, kind="decoder", task="text-generation", max_length=384)


def test_eight_bit_activations_are_told_apart_from_faults(quantized: Path) -> None:
    subject = Subject(open_bundle(quantized), 1)
    assert subject.twin
    rounding = tried.activation_rounding(subject)
    assert 1e-3 < rounding.measured <= rounding.limit
    cache = tried.cache_equals_recompute(subject)
    assert cache.holds and cache.measured < 1e-4
    left, right = (subject.answers(settings, subject.prompts[:1]) for settings in (tried.SHIPPED, tried.EXACT))
    assert difference(left, right) > 1e-3  # the twin is another computation, or the test above says nothing


def test_a_graph_for_prompts_is_held_against_its_own_weights(decoder: SimpleNamespace, tmp_path: Path, write_manifest: Callable[..., Path]) -> None:
    """Not against those of the graph that decodes, which has two bits here: that difference is no rounding of activations."""
    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.graph.decoder import export_decoder
    from compiler.judge import float_twins
    from compiler.scheme import Schemes, parse_scheme

    folder = tmp_path / "prompts"
    shutil.copytree(decoder.directory, folder)
    export_decoder(open_checkpoint(str(decoder.directory.parent / "hf")), Schemes(parse_scheme("int2-g32")), folder, prompts=True)
    write_manifest(folder, kind="decoder", task="text-generation", max_length=384, prompts="int8-rows")
    bundle = open_bundle(folder)
    twins = float_twins(bundle)
    assert set(twins) == {"prompt.onnx"}
    blind, seeing = (tried.activation_rounding(Subject(bundle, 1, known)).measured for known in ({}, twins))
    assert 1e-3 < seeing < 0.25 < blind
    (folder / "prompt.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="expected a graph as the exporter writes it"):
        float_twins(bundle)


def test_a_decoder_in_integers_has_a_twin_of_its_own(decoder: SimpleNamespace, tmp_path: Path, write_manifest: Callable[..., Path]) -> None:
    """`int8-rows`: every comparison on the twin runs under the settings that it asks for."""
    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.graph.decoder import export_decoder
    from compiler.judge import float_twins
    from compiler.scheme import Schemes, parse_scheme

    folder = tmp_path / "rows"
    shutil.copytree(decoder.directory, folder)
    export_decoder(open_checkpoint(str(decoder.directory.parent / "hf")), Schemes(parse_scheme("int8-rows")), folder)
    bundle = open_bundle(write_manifest(folder, kind="decoder", task="text-generation", max_length=384))
    subject = Subject(bundle, 1, float_twins(bundle))
    one, two = (subject.opened(replace(tried.EXACT, threads=threads)) for threads in (1, 2))
    assert one is not two and set(subject.twins) == {"model.onnx"}
    assert 1e-3 < tried.activation_rounding(subject).measured < 0.25
    assert [finding.name for finding in behaviours(bundle, 1, twins=subject.twins) if not finding.holds] == []


def test_a_cache_that_forgets_is_found(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DecodeLoop.step

    def forgetful(loop: DecodeLoop, ids: Any, active: Any = None) -> Any:
        for buffer in loop._cache:
            buffer[:, :, 3] = 0
        return step(loop, ids, active)

    monkeypatch.setattr(DecodeLoop, "step", forgetful)
    assert not tried.cache_equals_recompute(Subject(open_bundle(quantized), 1)).holds


def test_answers_that_depend_on_neighbours_are_found(encoder_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(open_bundle(encoder_bundle("sentence_embedding", pooled=True, max_length=32)), 1)
    answers = Subject.answers

    def mixed(self: Subject, settings: SessionSettings, rows: Any, chunk: int = 0) -> Any:
        found = answers(self, settings, rows, chunk)
        return found + 0.01 * found.mean(0) * (len(rows) > 1)

    monkeypatch.setattr(Subject, "answers", mixed)
    assert not tried.batch_invariance(subject).holds and not tried.padding_invariance(subject).holds


def test_not_a_number_holds_nothing(encoder_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(open_bundle(encoder_bundle("sentence_embedding", pooled=True, max_length=32)), 1)
    monkeypatch.setattr(Subject, "answers", lambda self, settings, rows, chunk=0: np.full((len(rows), 5), np.nan, np.float32))
    assert not tried.finite_outputs(subject).holds and not tried.length_1(subject).holds
    assert not tried.batch_invariance(subject).holds and not tried.second_process(subject).holds


def test_a_second_process_that_dies_is_a_fault(decoder: SimpleNamespace, tmp_path: Path) -> None:
    subject = Subject(open_bundle(decoder.directory), 1)
    subject.bundle = replace(subject.bundle, directory=tmp_path)
    finding = tried.second_process(subject)
    assert not finding.holds and "ended with" in finding.note


def test_probes_reach_over_the_vocabulary_and_repeat() -> None:
    rows = probes(1000)
    assert rows == probes(1000) and [len(row) for row in rows] == list(tried.LENGTHS)
    assert {0, 999} <= {token for row in rows for token in row}
    assert 0 not in {token for row in probes(50, avoid=[0]) for token in row}


def test_a_graph_that_does_not_load_is_an_error(decoder: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(decoder.directory, tmp_path / "bundle")
    graph = tmp_path / "bundle" / "model.onnx"
    graph.write_bytes(b"\x00" * graph.stat().st_size)
    with pytest.raises(BundleError):
        behaviours(open_bundle(tmp_path / "bundle"))
