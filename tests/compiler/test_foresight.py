"""What a plan and a bundle say about the future, from checkpoints as they are."""

from __future__ import annotations

from pathlib import Path

from compiler.checkpoints.resolve import open_checkpoint
from compiler.foresight import foresee, prediction_lines
from compiler.graph.decoder import export_decoder
from compiler.scheme import Schemes, parse_scheme
from compiler.workload import MatrixUse, matrices, workload
from targets.profile import here, load_profile


def test_the_plans_matrices_are_the_graphs(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    schemes = Schemes(parse_scheme("int4-g32"), {"lm_head": parse_scheme("int8-g32-asym")})
    made = {(row.name, row.shape, row.scheme, row.bytes) for row in export_decoder(checkpoint, schemes, tmp_path).matrices}
    assert {(use.name, use.shape, str(use.scheme), use.bytes) for use in matrices(checkpoint, schemes)} == made


def test_operators_of_a_decoder(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    work = workload(checkpoint.config, matrices(checkpoint, Schemes(parse_scheme("int4-g32"))), decoder=True)
    counts: dict[str, int] = {}
    for operator in work.operators:
        counts[operator.case.op] = counts.get(operator.case.op, 0) + operator.count
    assert counts == {"MatMulNBits": 9, "GroupQueryAttention": 2, "RMSNormalization": 5, "Split": 2, "QuickGelu": 2, "Mul": 2}
    hidden, inner, words = (checkpoint.config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    late = sorted((operator.case.k, operator.case.n) for operator in work.operators if operator.last and operator.case.op == "MatMulNBits")
    assert late == sorted([(hidden, words), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)])  # behind the last attention one token goes on


def test_query_key_and_value_of_an_encoder_are_one_matrix() -> None:
    uses = [MatrixUse("encoder.layer.0.attention.self.qkv", (96, 32), parse_scheme("int8-dynamic"))]
    config = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    ops = [operator.case.op for operator in workload(config, uses, decoder=False).operators]
    assert ops == ["DynamicQuantizeMatMul", "Attention", "SkipLayerNormalization", "Split", "BiasGelu"]


def test_a_prediction_or_the_reason_why_not(tiny_llama: Path) -> None:
    checkpoint, schemes = open_checkpoint(str(tiny_llama)), Schemes(parse_scheme("int4-g32"))
    told = foresee(checkpoint, schemes, True, load_profile("raspberry-pi-5"))
    assert told["basis"] == "roofline" and any("tpot_ms" in line and "no verdict" in line for line in prediction_lines(told))
    unknown = foresee(checkpoint, schemes, True, here())
    (line,) = prediction_lines(unknown)
    assert "read_gb_s is not known" in line and "trimtab targets probe" in line


def test_targets_diff_and_a_remembered_probe(trimtab, tmp_path: Path) -> None:
    code, stdout, _ = trimtab("targets", "diff", "raspberry-pi-5", "nvidia-l4")
    assert code == 0 and "read_gb_s" in stdout and "x 2.73" in stdout
    code, stdout, stderr = trimtab("targets", "probe", "--seconds", 5, "--out", tmp_path / "line4.yaml")
    assert code == 0, stderr
    assert "fp32_gflop_s" in stdout and load_profile(tmp_path / "line4.yaml").kernels
    remembered = load_profile("here")
    assert remembered.kernels and remembered.is_here and not here().kernels
