"""`scheme: auto`: sensitivities add up to what was measured, limits hold, and checks that disagree are repaired."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from compiler import auto
from compiler.checkpoints.resolve import open_checkpoint
from compiler.quantizers.sensitivity import LEAD, Question, Sensitivity, in_blocks, rounded, sensitivity
from compiler.quantizers.windows import calibration_set, token_windows
from compiler.recipe import parse_recipe
from compiler.reference import reference_model
from compiler.scheme import matrix_name, parse_scheme
from compiler.workload import MatrixUse
from targets.errors import TargetError, TrimtabError
from targets.kernels import TOKENS, cases
from targets.profile import KernelTime, here

CHOICES = auto.CHOICES


@pytest.fixture(scope="module")
def measured(tiny_llama):
    """Two windows: too few to part, so codes are made from what they are checked on."""
    checkpoint = open_checkpoint(str(tiny_llama))
    windows = token_windows(calibration_set(None), checkpoint, 2, 96)
    return checkpoint, windows, sensitivity(checkpoint, windows, Question(CHOICES, auto.PROBED), lambda *_: None)


class Whole:
    """The slow twin: the whole float model over windows, some of its matrices rounded."""

    def __init__(self, checkpoint: Any, windows: np.ndarray) -> None:
        import torch

        self.module: Any = reference_model(checkpoint, "text-generation")
        self.windows = torch.from_numpy(windows)
        self.linears: dict[str, list[Any]] = {}
        for name, part in self.module.named_modules():
            matrix = matrix_name(f"{name}.weight", checkpoint.config) if isinstance(part, torch.nn.Linear) else None
            if matrix:
                self.linears.setdefault(matrix, []).append(part)
        self.reference = self.log_probabilities()

    def log_probabilities(self):
        import torch

        with torch.inference_mode():
            return self.module(input_ids=self.windows, use_cache=False).logits[:, self.windows.shape[1] // LEAD :].log_softmax(-1)

    def kl_with(self, matrices, scheme) -> float:
        """Mean KL in nats per token with `matrices` rounded, a tied embedding with its head; the weights are put back."""
        import torch

        kept = [(linear, linear.weight.data.clone()) for matrix in matrices for linear in self.linears[matrix]]
        for linear, weight in kept:
            linear.weight.data.copy_(torch.from_numpy(rounded(weight.numpy(), scheme)))
        found = float((self.reference.exp() * (self.reference - self.log_probabilities())).sum(-1).mean())
        for linear, weight in kept:
            linear.weight.data.copy_(weight)
        return found

    def inputs(self, matrix: str):
        """float32 [tokens, width]"""
        seen: list[Any] = []
        handle = self.linears[matrix][0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
        self.log_probabilities()
        handle.remove()
        return seen[0]


def kernels(profile=None):
    """A machine on which 8 bits take twice the time of 4, and a token of every byte the same."""
    rows = [
        KernelTime("MatMulNBits", bits, block, k, n, point.m, 2, 1 + point.m * k * n * bits * 1e-5)
        for bits in (4, 8)
        for block in (32, 64, 128)
        for k, n in ((64, 64), (256, 512))
        for point in TOKENS
    ]
    return replace(profile or here(), kernels=tuple(rows), read_gb_s=20.0, fp32_gflop_s=100.0, int8_gop_s=100.0)


def by_weights(found: Sensitivity) -> dict[tuple[str, str], float]:
    """The part of each row's loss that its weights cost."""
    return {(row.matrix, row.scheme): found.joint * found.slope[row.matrix] * row.error for row in found.rows}


def test_losses_add_up_to_the_kl_that_was_measured(measured) -> None:
    checkpoint, windows, found = measured
    names = sorted({row.matrix for row in found.rows})
    assert len(names) == 9 and len(found.rows) == 9 * len(CHOICES)
    whole, losses = Whole(checkpoint, windows), by_weights(found)
    assert sum(losses[name, str(auto.PROBED)] for name in names) == pytest.approx(whole.kl_with(names, auto.PROBED), rel=1e-3)
    for name in names:
        assert losses[name, str(auto.PROBED)] / found.joint == pytest.approx(whole.kl_with([name], auto.PROBED), rel=2e-3), name


def test_errors_are_those_of_the_weights_on_the_models_inputs(measured) -> None:
    import torch

    checkpoint, windows, found = measured
    whole, name = Whole(checkpoint, windows), "model.layers.1.mlp.down_proj"
    weight, inputs = whole.linears[name][0].weight, whole.inputs(name)
    for choice in CHOICES:
        (row,) = [row for row in found.rows if row.matrix == name and row.scheme == str(choice)]
        change = torch.from_numpy(rounded(weight.numpy(), choice)) - weight
        assert row.error == pytest.approx(float((inputs @ change.T).square().sum(1).mean()), rel=1e-3)


def test_activation_rounding_is_what_blocks_of_eight_bits_do(measured) -> None:
    """Inputs rounded in blocks as the kernel does, through the float matrix: within a tenth of the estimate that takes their errors as independent."""
    import torch

    checkpoint, windows, found = measured
    whole, name = Whole(checkpoint, windows), "model.layers.1.mlp.down_proj"
    inputs, weight = whole.inputs(name), whole.linears[name][0].weight
    for choice in CHOICES:
        (row,) = [row for row in found.rows if row.matrix == name and row.scheme == str(choice)]
        error = in_blocks(inputs, choice.group_size) - inputs
        assert row.activation == pytest.approx(float((error @ weight.T).square().sum(1).mean()), rel=0.1), choice
    np.testing.assert_allclose(in_blocks(torch.tensor([[127.0, 1.4, -254.0]]), 2), [[127, 1, -254]])
    np.testing.assert_allclose(in_blocks(torch.zeros(2, 3), 2), np.zeros((2, 3)))


def test_rounded_activations_add_up_to_the_kl_that_was_measured(measured) -> None:
    checkpoint, windows, found = measured
    whole, size = Whole(checkpoint, windows), auto.PROBED.group_size
    for linears in whole.linears.values():
        for linear in linears:
            linear.register_forward_pre_hook(lambda _m, inputs: (in_blocks(inputs[0], size),))
    expected = float((whole.reference.exp() * (whole.reference - whole.log_probabilities())).sum(-1).mean())
    weights = by_weights(found)
    total = sum(row.loss - weights[row.matrix, row.scheme] for row in found.rows if row.scheme == str(auto.PROBED))
    assert total == pytest.approx(expected, rel=1e-3)


def test_a_methods_gain_is_measured_on_windows_it_has_not_seen(tiny_llama) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    windows = token_windows(calibration_set(None), checkpoint, 16, 128)
    plain, calibrated = (sensitivity(checkpoint, windows, Question(CHOICES[:3], auto.PROBED, method), lambda *_: None) for method in ("rtn", "gptq"))
    assert set(plain.gain.values()) == {1.0}
    assert all(0.1 < gain < 1 for gain in calibrated.gain.values())
    total = [sum(by_weights(found)[name, str(auto.PROBED)] for name in found.gain) for found in (plain, calibrated)]
    assert total[1] < total[0]
    plain, calibrated = ({(row.matrix, row.scheme): row.error for row in found.rows} for found in (plain, calibrated))
    shares = {name: calibrated[name] / plain[name] for name in plain}
    of_groups = {scheme: {shares[name, scheme] / shares[name, str(auto.PROBED)] for name, scheme_of in shares if scheme_of == scheme} for _, scheme in shares}
    assert max(of_groups[str(auto.PROBED)]) == min(of_groups[str(auto.PROBED)]) == 1
    assert all(max(ratios) == pytest.approx(min(ratios)) for ratios in of_groups.values())  # one ratio a kind of group, the same for all matrices
    assert any(max(ratios) != 1 for ratios in of_groups.values())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_head_some_rows_at_a_time_is_the_head(method, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((70, 64), np.float32), rng.standard_normal((200, 64), np.float32)
    question = Question(CHOICES, auto.PROBED, method)
    whole = question.quantized(weight, inputs.T @ inputs)
    monkeypatch.setattr("compiler.quantizers.sensitivity.AT_A_TIME", 32)
    assert np.allclose(whole, question.quantized(weight, inputs.T @ inputs), rtol=1e-5) and not np.array_equal(whole, weight)


def test_an_untied_table_is_chosen_for_too(tmp_path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    windows = np.random.default_rng(0).integers(3, 96, (2, 64))
    found = sensitivity(open_checkpoint(str(tmp_path)), windows, Question(CHOICES[:3], auto.PROBED), lambda *_: None)
    losses = by_weights(found)
    assert losses["model.embed_tokens", str(auto.PROBED)] > 0 and losses["lm_head", str(auto.PROBED)] > 0


def test_more_bits_lose_less(measured) -> None:
    _, _, found = measured
    losses = found.table(sorted({row.matrix for row in found.rows}), [parse_scheme("int4-g64-asym-s16"), parse_scheme("int8-g64-s16")])
    assert (losses[:, 1] < losses[:, 0]).all() and (losses > 0).all()
    assert Sensitivity.from_dict(found.as_dict()) == found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_size_and_latency_limits_hold(measured, share: float) -> None:
    checkpoint, _, found = measured
    free = auto.Chooser(checkpoint, found, kernels(), {})
    size, tpot = free.costs["size_mb"], free.costs["tpot"]
    between = {
        "size_mb": free.base["size_mb"] + float((1 - share) * size.min(1).sum() + share * size.max(1).sum()),
        "tpot_p95_ms": auto.HEADROOM * (free.base["tpot"] + float((1 - share) * tpot.min(1).sum() + share * tpot.max(1).sum())),
    }
    for limits in ({"size_mb": between["size_mb"]}, {"tpot_p95_ms": between["tpot_p95_ms"]}, between):
        chosen = replace(free, limits=limits).choose()
        assert chosen.expected["size_mb"] <= limits.get("size_mb", np.inf) * (1 + 1e-9)
        assert auto.HEADROOM * chosen.expected["tpot_ms"] <= limits.get("tpot_p95_ms", np.inf) * (1 + 1e-9)
        assert {use.name for use in free.items} == {row["name"] for row in chosen.rows}


def test_a_limit_on_kl_takes_the_least_bytes_that_keep_it(measured) -> None:
    checkpoint, _, found = measured
    free = auto.Chooser(checkpoint, found, here(), {})
    default = free.choose()
    kept = replace(free, limits={"kl_mean": default.expected["kl_mean"]}).choose()
    assert kept.expected["kl_mean"] <= default.expected["kl_mean"] * (1 + 1e-9)
    assert kept.expected["size_mb"] <= default.expected["size_mb"] * (1 + 1e-9)
    sizes = [point["size_mb"] for point in free.choose(curve=True).curve]
    assert sizes == sorted(sizes) and len(sizes) == auto.CURVE


def test_without_limits_no_more_bytes_than_the_default(measured) -> None:
    checkpoint, _, found = measured
    chooser = auto.Chooser(checkpoint, found, here(), {})
    at = CHOICES.index(auto.DEFAULT)
    loss = found.table([use.name for use in chooser.items], CHOICES)
    chosen = chooser.choose()
    assert chosen.expected["size_mb"] <= chooser.base["size_mb"] + chooser.costs["size_mb"][:, at].sum() + 1e-9
    assert chosen.expected["kl_mean"] <= loss[:, at].sum()


def test_fixed_layers_stay_as_written(measured) -> None:
    checkpoint, _, found = measured
    chosen = auto.Chooser(checkpoint, found, here(), {}, {"lm_head": parse_scheme("int8-g32")}).choose()
    assert str(chosen.schemes.of("lm_head")) == "int8-g32" and "lm_head" not in {row["name"] for row in chosen.rows}


def test_the_probe_measures_the_kernel_of_every_choice() -> None:
    measured = {(case.op, case.bits, case.block, case.symmetric) for case, _ in cases()}
    for choice in auto.CHOICES:
        case = MatrixUse("x", (4096, 512), choice).case()
        assert (case.op, case.bits, case.block, case.symmetric) in measured, choice


def test_latency_needs_a_kernel_table(measured) -> None:
    checkpoint, _, found = measured
    with pytest.raises(TargetError, match=r"a kernel table, to choose by tpot_p95_ms.*trimtab targets probe"):
        auto.Chooser(checkpoint, found, here(), {"tpot_p95_ms": 10}).choose()
    with pytest.raises(TrimtabError, match="limit size_mb"):
        auto.Chooser(checkpoint, found, here(), {"size_mb": 0.001}).choose()


def test_a_tied_head_counts_twice_in_memory(measured) -> None:
    checkpoint, _, found = measured
    chooser, scheme = auto.Chooser(checkpoint, found, here(), {}), parse_scheme("int8-g64-s16")
    head, other = MatrixUse("lm_head", (64, 64), scheme), MatrixUse("x", (64, 64), scheme)
    assert chooser._resident(head) == pytest.approx(chooser._resident(other) + head.bytes / 1e6)


@dataclass(frozen=True)
class Built:
    document: dict[str, Any]


def test_a_check_that_disagrees_is_repaired(measured) -> None:
    """The build turns out 3 % larger than expected, twice as far from the reference: both limits are kept in the end."""
    checkpoint, _, found = measured
    free = auto.Chooser(checkpoint, found, here(), {}).choose()
    limits = {"size_mb": free.expected["size_mb"]}
    seen = []

    def build(chosen: auto.Chosen) -> Built:
        size = 1.03 * chosen.expected["size_mb"]
        seen.append(size)
        check = {"name": "size_mb", "measured": size, "limit": limits["size_mb"], "outcome": "PASS" if size <= limits["size_mb"] else "FAIL"}
        return Built({"verdict": {"checks": [check]}})

    outcome = auto.settle(auto.Chooser(checkpoint, found, here(), limits), build)
    assert outcome.document["verdict"]["checks"][0]["outcome"] == "PASS" and 2 <= len(seen) <= auto.ROUNDS


def test_a_latency_is_tightened_down_to_the_least_and_no_further(measured) -> None:
    """What the table holds for the least is an estimate: under a limit tightened beyond it the fastest choices are tried, once, before giving up."""
    checkpoint, _, found = measured
    free = auto.Chooser(checkpoint, found, kernels(), {"tpot_p50_ms": 1e3}).choose().expected["tpot_ms"]
    limits, seen = {"tpot_p50_ms": free * auto.HEADROOM}, []

    def build(chosen: auto.Chosen) -> Built:
        seen.append(chosen.expected["tpot_ms"])
        return Built({"verdict": {"checks": [{"name": "tpot_p50_ms", "measured": 9 * free, "limit": limits["tpot_p50_ms"], "outcome": "FAIL"}]}})

    auto.settle(auto.Chooser(checkpoint, found, kernels(), limits), build)
    chooser = auto.Chooser(checkpoint, found, kernels(), limits)
    least = chooser.base["tpot"] + float(chooser.costs["tpot"].min(axis=1).sum())
    assert len(seen) == 2 and seen[0] <= free and least <= seen[1] <= 1.02 * least < seen[0]
    with pytest.raises(TrimtabError):  # the limit itself is not bent
        auto.Chooser(checkpoint, found, kernels(), {"tpot_p50_ms": 0.5 * least}).choose()


def test_what_cannot_be_steered_is_left_alone() -> None:
    rows = [
        {"name": "load_s", "measured": 9.0, "limit": 1.0, "outcome": "FAIL"},
        {"name": "tpot_p95_ms", "measured": 9.0, "limit": 1.0, "outcome": "INCONCLUSIVE"},
        {"name": "kl_mean", "measured": 0.5, "high": float("inf"), "limit": 1.0, "outcome": "INCONCLUSIVE"},
        {"name": "size_mb", "measured": 0.5, "limit": 1.0, "outcome": "PASS"},
    ]
    assert auto.moved_limits(rows, {}, {}) is None


def test_a_limit_that_did_not_bind_is_moved_from_what_was_expected() -> None:
    """Expected 6 ms under a limit of 13, measured up to 15: from where it stood, 13/15 of the limit would still let everything through."""
    row = {"name": "tpot_p95_ms", "measured": 13.5, "high": 15.0, "limit": 13.0, "outcome": "FAIL"}
    (moved,) = auto.moved_limits([row], {}, {"tpot_ms": 6.0}).values()
    assert 13.0 * moved / auto.HEADROOM == pytest.approx(6.0 * 13 / 15 * 0.998)
    (again,) = auto.moved_limits([row], {"tpot_p95_ms": moved}, {"tpot_ms": 6.0 * 13 / 15}).values()
    assert again < moved


def test_a_latency_on_its_limit_is_aimed_lower() -> None:
    failed = {"name": "tpot_p95_ms", "measured": 13.0, "high": 13.2, "limit": 12.0, "outcome": "FAIL"}
    (moved,) = auto.moved_limits([failed], {}, {"tpot_ms": 5.2}).values()
    assert 12.0 * moved / auto.HEADROOM == pytest.approx(5.2 * 12 / (13.0 * 1.1) * 0.998)
    row = {"name": "tpot_p95_ms", "measured": 12.2, "high": float("inf"), "limit": 12.0, "outcome": "INCONCLUSIVE"}
    (moved,) = auto.moved_limits([row], {}, {"tpot_ms": 5.2}).values()
    assert 12.0 * moved / auto.HEADROOM == pytest.approx(5.2 * 12 / (12.2 * 1.1) * 0.998)
    assert auto.moved_limits([{**row, "measured": 20.0}], {}, {"tpot_ms": 5.2}) is None  # a busy machine


def test_recipes_say_auto(tmp_path) -> None:
    recipe = parse_recipe({"name": "x", "base": "base", "quantize": {"scheme": "auto", "layers": {"lm_head": "int8-g32"}}}, tmp_path / "recipe.yaml")
    assert recipe.quantize.auto and str(recipe.quantize.fixed["lm_head"]) == "int8-g32"
    with pytest.raises(TrimtabError, match=r"quantize\.layers\.lm_head"):
        parse_recipe({"name": "x", "base": "base", "quantize": {"scheme": "auto", "layers": {"lm_head": "int9"}}}, tmp_path / "recipe.yaml")
