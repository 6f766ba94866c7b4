"""Worked cases of what the evaluation computes."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from compiler.errors import RecipeError
from compiler.evaluation import decoder, encoder, statistics
from compiler.evaluation.data import Row, builtin_text
from compiler.evaluation.run import ChatFormat


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


def logits_of(*rows):
    """The given logits for every sequence, whatever its ids."""
    return lambda sequences: [np.array(rows, np.float32) for _ in sequences]


def test_kl_of_two_known_distributions():
    # P = (3/4, 1/4), Q = (1/2, 1/2): KL(P || Q) = 3/4 ln(3/2) + 1/4 ln(1/2)
    p, q = np.log([0.75, 0.25]), np.log([0.5, 0.5])
    scored = [decoder.Scored(np.array([0, 0]), 1)]
    scores = decoder.score(scored, logits_of(p, p), logits_of(q, q), lambda *_: None)
    assert scores.kl[0] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
    assert scores.reference_nll[0] == pytest.approx(-np.log(0.75), rel=1e-5)


def test_the_same_model_has_no_distance_and_a_broken_one_no_pass():
    rows = np.random.default_rng(0).standard_normal((6, 11))
    scored = [decoder.Scored(np.arange(6), 3)]
    same = decoder.score(scored, logits_of(*rows), logits_of(*rows), lambda *_: None)
    assert same.kl.max() < 1e-6 and same.same.all()
    broken = decoder.score(scored, logits_of(*rows), logits_of(*(rows * np.nan)), lambda *_: None)
    assert np.isnan(broken.kl).all()


def test_batches_hold_similar_lengths_and_every_place_once():
    lengths = [3, 500, 4, 1000, 30, 2000]
    made = decoder.batches(lengths)
    assert sorted(place for batch in made for place in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= decoder.BATCH_TOKENS for batch in made)


def test_only_the_second_half_of_a_window_is_scored(tokenizer):
    sequences = decoder.scored_sequences([Row(text=builtin_text().decode())], tokenizer, None, "")
    assert len(sequences) == decoder.MAX_WINDOWS
    assert {(len(one.ids), one.first) for one in sequences} == {(decoder.WINDOW, decoder.WINDOW // 2)}


def test_a_chat_is_scored_on_its_answer_and_end_token(tiny_llama):
    from compiler.checkpoints.resolve import open_checkpoint

    chat = ChatFormat(open_checkpoint(str(tiny_llama)))
    row = Row(messages=({"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "3 it is."}))
    (scored,) = decoder.scored_sequences([row], chat.tokenizer, chat.render, chat.eos_text)
    assert chat.tokenizer.decode(scored.ids[: scored.first].tolist(), skip_special_tokens=False) == "<|user|>Say 3.</s><|assistant|>"
    assert chat.tokenizer.decode(scored.ids[scored.first :].tolist(), skip_special_tokens=False) == "3 it is.</s>"


def test_chats_need_a_template_and_text_needs_length(tokenizer):
    row = Row(messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))
    with pytest.raises(RecipeError, match="without a chat template"):
        decoder.scored_sequences([row], tokenizer, None, "")
    with pytest.raises(RecipeError, match="at least 16 tokens"):
        decoder.scored_sequences([Row(text="short")], tokenizer, None, "")


def test_intervals_draw_sequences_and_need_five_of_them():
    values, groups = np.random.default_rng(1).standard_normal(500), np.repeat(np.arange(10), 50)
    low, high = statistics.cluster_interval(values, groups)
    assert low < values.mean() < high
    assert statistics.cluster_interval(values[:200], groups[:200]) == (float("-inf"), float("inf"))
    assert statistics.cluster_interval(values, groups) == (low, high) != statistics.cluster_interval(values, groups, seed=1)
    assert statistics.cluster_interval(np.ones(500), groups) == (1.0, 1.0)
    few = statistics.cluster_interval(np.repeat(values[::50], 50), groups)  # 50 equal tokens are one value
    assert few[1] - few[0] > 2 * (high - low)


@pytest.mark.parametrize(("kind", "wrong_most"), [("gamma", 0.08), ("normal", 0.05)])
def test_intervals_cover_as_stated_at_24_sequences(kind, wrong_most):
    """docs/evaluation.md states 2.5 % a side and what is measured for skewed losses; four standard errors of room."""
    rng, missed, trials = np.random.default_rng(3), np.zeros(2), 250
    groups = np.repeat(np.arange(24), 20)
    for trial in range(trials):
        means = rng.gamma(1.0, 0.05, 24) if kind == "gamma" else rng.normal(0.05, 0.02, 24)
        low, high = statistics.cluster_interval(np.repeat(means, 20), groups, seed=trial, resamples=400)
        missed += (low > 0.05, high < 0.05)
    assert missed[1] / trials <= wrong_most and missed[0] / trials <= 0.06


def test_exact_shares():
    # Clopper-Pearson, 0 of 10 at 95 %: upper = 1 - 0.025 ** (1 / 10)
    assert statistics.share([False] * 10)["high"] == pytest.approx(1 - 0.025**0.1)
    assert statistics.share([True] * 10)["low"] == pytest.approx(0.025**0.1)


def test_agreement_on_few_rows_proves_little():
    few, many = statistics.paired_drop([True] * 5, [True] * 5), statistics.paired_drop([True] * 2000, [True] * 2000)
    assert few["value"] == many["value"] == 0
    assert few["high"] > 0.5 and many["high"] < 0.005
    lost = statistics.paired_drop([True] * 100, [True] * 90 + [False] * 10)
    assert lost["value"] == pytest.approx(0.1) and lost["low"] < 0.1 < lost["high"]


def test_pooling_by_hand():
    hidden, mask = np.array([[[1.0, 0], [3, 0], [9, 9]]]), np.array([[1, 1, 0]])
    assert encoder.pool(hidden, mask, {"pooling": "mean"}).tolist() == [[2, 0]]
    assert encoder.pool(hidden, mask, {"pooling": "mean", "normalize": True}).tolist() == [[1, 0]]
    assert encoder.pool(hidden, mask, {"pooling": "cls"}).tolist() == [[1, 0]]
    assert encoder.pool(hidden, mask, {"pooling": "max"}).tolist() == [[3, 0]]
    assert encoder.pool(hidden, mask, {"pooling": "lasttoken"}).tolist() == [[3, 0]]


def test_labels_must_be_the_models():
    scores = np.eye(2)
    assert encoder.label_metrics(scores, scores, ["a", "b"], ["a", "b"])["accuracy"]["value"] == 1
    with pytest.raises(RecipeError, match="one of a, b, found c"):
        encoder.label_metrics(scores, scores, ["a", "c"], ["a", "b"])
