"""The decode loop and `Generator` against eager transformers, which is slow and right."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compiler.checkpoints.resolve import open_checkpoint
from compiler.graph.decoder import export_decoder
from compiler.scheme import Schemes, parse_scheme
from runtimes.bundle import open_bundle
from runtimes.decode import FIRST_CAPACITY, PREFILL_CHUNK, PROMPT_TOKENS, DecodeLoop, open_graphs
from runtimes.generate import Generator, Options, generate
from runtimes.sampling import Sampling
from runtimes.session import SessionSettings
from targets.errors import BundleError, TrimtabError

PROMPTS = ([7, 30, 31], [12], [50, 51, 52, 53, 54, 55, 56, 57, 58])
QUIET = SessionSettings(threads=1, spinning=False)


@pytest.fixture(scope="module")
def generator(decoder: SimpleNamespace) -> Generator:
    return Generator.open(decoder.directory, QUIET)


def eager(decoder: SimpleNamespace, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers, stop tokens ignored."""
    import torch

    out = decoder.model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers(generator: Generator, decoder: SimpleNamespace, prompt: list[int]) -> None:
    answer = generator.generate([prompt], Options(max_new_tokens=32, ignore_eos=True))[0]
    assert list(answer.token_ids) == eager(decoder, prompt, 32)
    assert (answer.finish, answer.prompt_tokens, len(answer.token_ms)) == ("length", len(prompt), 32)
    assert 0 < answer.ttft_ms <= answer.token_ms[-1] and answer.tpot_ms > 0


def test_a_batch_answers_like_its_rows_alone(generator: Generator) -> None:
    options = Options(max_new_tokens=40)
    together = generator.generate(PROMPTS, options)
    assert [row.token_ids for row in together] == [generator.generate([prompt], options)[0].token_ids for prompt in PROMPTS]


def test_a_finished_row_waits_without_filling_the_context(decoder: SimpleNamespace) -> None:
    generator = Generator.open(decoder.directory, QUIET)
    long = [5 + at % 200 for at in range(generator.context_length - 4)]
    rows = generator.generate([long, [7, 8]], Options(max_new_tokens=30, ignore_eos=True))
    assert (len(rows[0].token_ids), len(rows[1].token_ids)) == (4, 30)
    assert list(rows[1].token_ids) == eager(decoder, [7, 8], 30)


@pytest.fixture(scope="module")
def with_prompts(decoder: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, write_manifest: Callable[..., Path]) -> Path:
    """The same model in groups of 8 bits, with a second graph for prompts."""
    folder = tmp_path_factory.mktemp("prompts") / "bundle"
    folder.mkdir()
    export_decoder(open_checkpoint(str(decoder.directory.parent / "hf")), Schemes(parse_scheme("int8-g32")), folder, prompts=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(decoder.directory / name, folder)
    return write_manifest(folder, kind="decoder", task="text-generation", max_length=384, prompts="int8-rows")


def test_runs_of_many_tokens_go_through_the_second_graph(with_prompts: Path) -> None:
    """Its arithmetic differs, its answers do not; few tokens and single steps are the first graph's, on the same cache, across growths of it."""
    both = Generator.open(with_prompts, QUIET)
    plain = Generator(replace(both.bundle, manifest={**both.bundle.manifest, "model": {**both.bundle.model, "prompts": None}}), QUIET)
    text = [5 + at * 7 % 200 for at in range(PREFILL_CHUNK + PROMPT_TOKENS)]
    few = text[: PROMPT_TOKENS - 1]
    assert np.array_equal(both.next_logits(few), plain.next_logits(few))
    for prompt in (text[:PROMPT_TOKENS], text, text[:-1]):  # the last chunk of the third is read by the first graph
        mine, wanted = both.next_logits(prompt), plain.next_logits(prompt)
        assert np.abs(mine - wanted).max() > 0 and np.corrcoef(mine, wanted)[0, 1] > 0.95  # a random net with large weights rounds coarsely
    short, grown = text[:240], Options(max_new_tokens=40, ignore_eos=True)  # a token has its own scale, so chunks change nothing
    assert both.generate([short], grown)[0].token_ids == both.generate([short], replace(grown, prefill_chunk=60))[0].token_ids
    assert both.generate([short, text[:9]], grown)[0].token_ids == both.generate([short], grown)[0].token_ids
    assert both.bundle.model_bytes == sum(path.stat().st_size for path in with_prompts.glob("*.onnx*"))


def test_the_second_graph_is_left_alone_where_nothing_may_be_rounded(with_prompts: Path) -> None:
    exact = SessionSettings(threads=1, spinning=False, exact=True)
    assert open_graphs(open_bundle(with_prompts), exact)[1] is None and open_graphs(open_bundle(with_prompts), QUIET)[1] is not None
    (with_prompts / "prompt.onnx").rename(with_prompts / "elsewhere")
    try:
        with pytest.raises(BundleError, match=r"found prompt\.onnx is missing"):
            Generator(open_bundle(with_prompts), QUIET)
    finally:
        (with_prompts / "elsewhere").rename(with_prompts / "prompt.onnx")


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prefill_in_chunks_changes_nothing(generator: Generator, chunk: int) -> None:
    whole = generator.generate([PROMPTS[2]], Options(max_new_tokens=16))[0]
    assert generator.generate([PROMPTS[2]], Options(max_new_tokens=16, prefill_chunk=chunk))[0].token_ids == whole.token_ids


def test_a_prompt_longer_than_a_chunk(generator: Generator, decoder: SimpleNamespace) -> None:
    prompt = [5 + at * 7 % 200 for at in range(PREFILL_CHUNK + 1)]  # the last chunk is a single token
    once = generator.generate([prompt], Options(max_new_tokens=4, ignore_eos=True, prefill_chunk=0))[0]
    assert generator.generate([prompt], Options(max_new_tokens=4, ignore_eos=True))[0].token_ids == once.token_ids
    np.testing.assert_allclose(generator.next_logits(prompt), generator.all_logits(np.array([prompt]))[0, -1], atol=1e-4)


def test_the_cache_grows_and_keeps_what_it_holds(decoder: SimpleNamespace) -> None:
    import torch

    generator = Generator.open(decoder.directory, QUIET)
    loop = DecodeLoop(generator._session, generator.layout, generator.context_length)
    count = FIRST_CAPACITY + 60
    logits, ids = loop.start([PROMPTS[0]]), []
    assert loop.capacity == FIRST_CAPACITY
    for _ in range(count):
        ids.append(int(logits[0].argmax()))
        logits = loop.step([ids[-1]])
    assert loop.capacity > FIRST_CAPACITY
    assert loop.lengths.tolist() == [len(PROMPTS[0]) + count]
    with torch.inference_mode():  # one pass over the whole text: each token must be the best one after those before it
        best = decoder.model(torch.tensor([[*PROMPTS[0], *ids]])).logits[0].argmax(-1)
    assert ids == best[len(PROMPTS[0]) - 1 : -1].tolist()


@pytest.mark.parametrize("which", ["directory", "directory_all"])
def test_all_logits_equal_transformers_in_both_graphs(decoder: SimpleNamespace, which: str) -> None:
    import torch

    ids = np.array([[7, 30, 31, 9, 100], [12, 13, 200, 15, 16]])
    with torch.inference_mode():
        expected = decoder.model(torch.from_numpy(ids)).logits.numpy()
    generator = Generator.open(getattr(decoder, which), QUIET)
    assert generator.layout.last_token_only == (which == "directory")
    np.testing.assert_allclose(generator.all_logits(ids), expected, atol=1e-4)
    np.testing.assert_allclose(generator.next_logits(ids[0].tolist()), expected[0, -1], atol=1e-4)


def test_sampling_is_fixed_by_its_seed_and_not_by_its_batch(generator: Generator) -> None:
    def draw(seed: int, prompts: list[list[int]]) -> tuple[int, ...]:
        return generator.generate(prompts, Options(max_new_tokens=24, ignore_eos=True, sampling=Sampling(temperature=5.0, top_k=50, top_p=0.9, seed=seed)))[
            0
        ].token_ids

    assert draw(1, [PROMPTS[0]]) == draw(1, [PROMPTS[0]]) == draw(1, [PROMPTS[0], PROMPTS[1]])
    assert draw(1, [PROMPTS[0]]) != draw(2, [PROMPTS[0]])


def test_a_stop_token_ends_the_answer_and_is_not_text(decoder: SimpleNamespace) -> None:
    generator = Generator.open(decoder.directory, QUIET)
    assert generator.stop_ids == {2, 4}  # genai_config.json says 2, generation_config.json [2, 4]
    free = generator.generate([PROMPTS[0]], Options(max_new_tokens=20, ignore_eos=True))[0]
    at = 5
    stop = free.token_ids[at]
    generator.stop_ids = frozenset([stop])
    ended = generator.generate([PROMPTS[0]], Options(max_new_tokens=20))[0]
    first = free.token_ids.index(stop)
    assert ended.finish == "stop" and ended.token_ids == free.token_ids[: first + 1]
    assert free.text.startswith(ended.text)


def test_streaming_gives_the_same_text_and_stop_strings_cut_it(generator: Generator) -> None:
    options = Options(max_new_tokens=48, ignore_eos=True)
    whole = generator.generate(["Once upon"], options)[0]
    pieces = list(generator.stream("Once upon", options))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.index for piece in pieces] == list(range(48)) and [piece.finish for piece in pieces[:-1]] == [""] * 47
    stop = whole.text[6:9]
    cut = generator.generate(["Once upon"], Options(max_new_tokens=48, ignore_eos=True, stop=(stop,)))[0]
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(stop)] and len(cut.token_ids) < 48


def test_two_streams_at_once_do_not_disturb_each_other(generator: Generator) -> None:
    options = Options(max_new_tokens=12, ignore_eos=True)
    alone = [generator.generate([prompt], options)[0].token_ids for prompt in PROMPTS[:2]]
    mixed = list(itertools.zip_longest(generator.stream(PROMPTS[0], options), generator.stream(PROMPTS[1], options)))
    assert [tuple(pair[row].token_id for pair in mixed) for row in range(2)] == alone


def test_the_answer_ends_where_the_context_does(generator: Generator) -> None:
    prompt = [5 + at % 200 for at in range(generator.context_length - 3)]
    answer = generator.generate([prompt], Options(max_new_tokens=50, ignore_eos=True))[0]
    assert (len(answer.token_ids), answer.finish) == (3, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 384, "prompt: expected at most 383 tokens, found 384 tokens; shorten the prompt"),
        ([], "expected 1 to 384 tokens, found no tokens"),
        ([5, 99999], "expected token ids below"),
    ],
)
def test_prompts_that_cannot_be_answered(generator: Generator, prompt: list[int], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        generator.generate([prompt])


def test_stepping_past_the_context_is_refused(generator: Generator) -> None:
    loop = DecodeLoop(generator._session, generator.layout, generator.context_length)
    loop.start([[5] * generator.context_length])
    with pytest.raises(TrimtabError, match="expected at most 384 tokens"):
        loop.step([5])


def test_a_conversation_goes_through_the_template(generator: Generator, decoder: SimpleNamespace) -> None:
    messages = [{"role": "user", "content": "a pump"}]
    text = "<|im_start|>user\na pump<|im_end|>\n<|im_start|>assistant\n"
    assert generator.has_chat_template and generator.chat_text(messages) == text
    assert generator.prompt_ids(messages) == decoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert generator.prompt_ids(messages)[0] == 3  # <|im_start|> is one token, not its letters


def test_a_bundle_without_template_says_so(generator: Generator, tmp_path: Path, decoder: SimpleNamespace) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in decoder.directory.iterdir():
        if path.name not in ("tokenizer_config.json", "manifest.json"):
            (copy / path.name).write_bytes(path.read_bytes())
    bundle = open_bundle(decoder.directory)
    without = Generator(type(bundle)(copy, bundle.manifest, bundle.kind, bundle.files), QUIET)
    assert not without.has_chat_template
    with pytest.raises(BundleError, match="expected a chat template"):
        without.chat_text([{"role": "user", "content": "x"}])


def test_one_call_is_enough(decoder: SimpleNamespace) -> None:
    (answer,) = generate(decoder.directory, ["Once"], Options(max_new_tokens=3, ignore_eos=True), threads=1)
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize(
    "wrong",
    [lambda: Options(max_new_tokens=0), lambda: Sampling(temperature=float("nan")), lambda: Sampling(top_p=0.0), lambda: Sampling(repetition_penalty=0.0)],
)
def test_options_that_make_no_sense(wrong: object) -> None:
    with pytest.raises(TrimtabError, match="change the option"):
        wrong()  # type: ignore[operator]


def test_the_runtime_brings_no_training_library() -> None:
    """A device has neither torch nor onnx; importing any of the two packages must not ask for them."""
    modules = ["bench", "bundle", "chat", "collect", "decode", "encode", "generate", "metrics", "sampling", "session", "text"]
    code = "".join(f"import runtimes.{name}\n" for name in modules) + "import targets.probe, targets.schema, targets.wire\nimport sys\n"
    code += "print([name for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'scipy', 'compiler') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
