"""Students: cut out of a model, trained against it, stopped and gone on with, judged and reported; on tiny real models."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.write import write_checkpoint
from compiler.distil import objectives
from compiler.distil.importance import choose, influences, largest
from compiler.distil.lessons import Pooling, TextLesson, TokenLesson, split, top_kl
from compiler.distil.teacher import top
from compiler.distil.through import seen_through
from compiler.distil.training import Settings, batch, rate_at, train
from compiler.distil.trim import Cut, Sizes, check, cut, first, some, spans
from compiler.errors import OutputError, RecipeError, TrimtabError
from compiler.evaluation.data import builtin_text
from compiler.reference import reference_model
from compiler.scheme import Schemes, parse_scheme


@pytest.fixture(scope="module")
def four_layers(tiny_llama, tmp_path_factory):
    """The tiny llama with four layers of its own and weights large enough that each matters."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("four-layers")
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 4, 2, 24
    config.layer_types = None
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            parameter.data.normal_(std=0.12)
    model.model.embed_tokens.weight.data.normal_(std=0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=99, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Steps of a few milliseconds: a second thread would only wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(count, length=32, vocab=300):
    return np.random.default_rng(0).integers(5, vocab, (count, length))


def test_a_cut_is_the_model_without_what_was_cut(four_layers):
    """Against transformers: layers taken out of its list, channels and heads zeroed where they are multiplied last."""
    teacher = open_checkpoint(str(four_layers))
    kept = Cut((0, 2, 3), {at: np.array([*range(50), *range(100, 180)]) for at in (0, 2, 3)}, {0: np.array([1]), 2: np.array([0]), 3: np.array([1])})
    student = reference_model(cut(teacher, kept), "text-generation")
    model = reference_model(teacher, "text-generation")
    for at in (0, 2, 3):
        layer = model.model.layers[at]
        gone = [channel for channel in range(200) if channel not in set(kept.channels[at])]
        layer.mlp.down_proj.weight[:, gone] = 0
        lost = 1 - int(kept.groups[at][0])
        layer.self_attn.o_proj.weight[:, lost * 48 : (lost + 1) * 48] = 0
    del model.model.layers[1]
    ids = torch.from_numpy(tokens(2))
    expected, got = (one(input_ids=ids, use_cache=False).logits for one in (model, student))
    assert torch.allclose(expected, got, atol=1e-5)
    assert student.config.intermediate_size == 130 and student.config.num_key_value_heads == 1 and student.config.head_dim == 24


def test_a_cut_travels_through_a_file(four_layers, tmp_path):
    teacher = open_checkpoint(str(four_layers))
    smaller = cut(teacher, first(teacher, Sizes(3, 96, 2)))
    write_checkpoint(smaller, tmp_path / "student")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert (again.config.num_hidden_layers, again.config.intermediate_size, again.config.num_attention_heads) == (3, 96, 2)
    assert smaller.digest != teacher.digest and Cut.from_dict(json.loads(json.dumps(Cut((1,), {1: np.arange(3)}).as_dict()))).channels[1].tolist() == [0, 1, 2]


def test_windows_by_layer_follow_their_layers(tmp_path):
    """Which layers of a family have a window goes by their number: after a cut each keeps its own kind."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    config = Qwen3Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2, **sizes)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    kinds = list(config.layer_types)
    assert kinds[0] != kinds[3]
    smaller = cut(open_checkpoint(str(tmp_path)), Cut((1, 3)))
    assert smaller.config["layer_types"] == [kinds[1], kinds[3]]
    assert reference_model(smaller, "text-generation").config.layer_types == [kinds[1], kinds[3]]


def test_an_encoder_is_cut_too(bert):
    teacher = open_checkpoint(str(bert))
    student = reference_model(cut(teacher, Cut((0, 2), {0: np.arange(32), 2: np.arange(16, 48)})), "feature-extraction")
    model = reference_model(teacher, "feature-extraction")
    model.encoder.layer[0].output.dense.weight[:, 32:] = 0
    model.encoder.layer[2].output.dense.weight[:, [*range(16), *range(48, 64)]] = 0
    del model.encoder.layer[1]
    ids = torch.from_numpy(tokens(2, vocab=99))
    assert torch.allclose(model(input_ids=ids).last_hidden_state, student(input_ids=ids).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(5), "distil.layers: expected 1 to 4"),
        (Sizes(intermediate=300), "distil.intermediate: expected 1 to 200"),
        (Sizes(heads=3), "a multiple of 2"),
    ],
)
def test_sizes_that_cannot_be(four_layers, sizes, message):
    with pytest.raises(RecipeError, match=message):
        check(open_checkpoint(str(four_layers)), sizes)


def test_rows_and_columns_of_a_view(four_layers):
    view = open_checkpoint(str(four_layers)).tensors["model.layers.0.mlp.down_proj.weight"]
    rows, columns = np.array([1, 4, 5, 90]), np.array([0, 199])
    narrow = some(view, rows, columns)
    assert narrow.shape == (4, 2) and np.array_equal(narrow.read(), view.read()[np.ix_(rows, columns)])
    assert np.array_equal(narrow.rows(1, 3), view.read()[[4, 5]][:, columns]) and narrow.rows(2, 2).shape == (0, 2)
    assert spans(np.array([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_the_layer_that_does_nothing_goes_first(four_layers):
    """A layer whose outputs are zero has no influence; the channels that never meet a weight go before the others."""
    teacher = open_checkpoint(str(four_layers))
    idle = {f"model.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}

    def quieter(name, view):
        if name in idle:
            return replace(view, rows=lambda start, stop: np.zeros((stop - start, view.shape[1]), np.float32))
        if name == "model.layers.0.mlp.down_proj.weight":
            return replace(view, rows=lambda start, stop: view.rows(start, stop) * (np.arange(200) >= 50))
        return view

    teacher = replace(teacher, tensors={name: quieter(name, view) for name, view in teacher.tensors.items()})
    ids = torch.from_numpy(tokens(2))
    feeds = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    chosen, dropped = choose(teacher, "text-generation", feeds, Sizes(3, 150), lambda *_: None)
    assert chosen.layers == (0, 1, 3) and dropped[0]["layer"] == 2 and dropped[0]["influence"] == pytest.approx(0, abs=1e-6)
    assert chosen.channels[0].tolist() == list(range(50, 200)) and len(chosen.channels[3]) == 150


def test_influence_is_what_the_paper_says(four_layers):
    model = reference_model(open_checkpoint(str(four_layers)), "text-generation")
    ids = torch.from_numpy(tokens(2))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    measured = influences(model, [{"input_ids": ids, "attention_mask": mask}], 4)
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    near = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1)[mask.bool()]
    assert measured[1] == pytest.approx(float(1 - near.mean()), rel=1e-4)
    assert largest(np.array([3.0, 1.0, 2.0]), 2).tolist() == [0, 2]


def test_objectives_by_hand():
    p, q = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    assert objectives.kl(p, q).item() == pytest.approx(0.1438, abs=1e-4)
    middle = torch.log(torch.tensor([[0.375, 0.625]]))
    assert objectives.jsd(p, q).item() == pytest.approx((objectives.kl(p, middle) + objectives.kl(q, middle)).item() / 2, abs=1e-6)
    got = objectives.distribution_loss({"kl": 1.0, "cross-entropy": 2.0}, p, q, torch.tensor([1]), 1.0)
    assert got.item() == pytest.approx(0.1438 - 2 * np.log(0.75), abs=1e-3)
    softer = objectives.distribution_loss({"kl": 1.0}, p, q, None, 2.0)
    assert softer.item() == pytest.approx(4 * objectives.kl((p / 2).log_softmax(-1), (q / 2).log_softmax(-1)).item(), abs=1e-6)
    x, mask = torch.randn(2, 5, 24), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert objectives.relations(x, x, mask).item() == pytest.approx(0, abs=1e-6) and objectives.relations(x, -3 * x, mask) > 0.1
    assert objectives.hidden(x, x, mask) == 0 and objectives.similarity(x[0], x[0]).item() == pytest.approx(0, abs=1e-9)


def test_names_in_recipes_are_the_rows():
    from compiler.distil.ask import OF_TEXTS, OF_TOKENS

    assert set(objectives.OBJECTIVES) == {*OF_TOKENS, *OF_TEXTS}


def test_a_teacher_of_few_tokens_tells_almost_all():
    logits = np.random.default_rng(0).normal(size=(6, 50)) * 4
    whole = torch.from_numpy(logits).log_softmax(-1)
    student = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 50)) * 4).requires_grad_()
    exact = objectives.kl(whole, student.log_softmax(-1))
    for count, room in ((50, 1e-2), (20, 0.5)):
        told = {name: torch.from_numpy(value) for name, value in top(logits, count).items()}
        found = top_kl(told, student)
        assert (found <= exact + 1e-2).all() and (exact - found).max() < room * exact.max()
    top_kl(told, student).sum().backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().max() > 0


def lesson(folder, path, windows=160, **more):
    ids = np.array(json.loads((folder / "ids.json").read_text())[: windows * 32]).reshape(windows, 32)
    return TokenLesson(open_checkpoint(str(path)), ids, more.pop("weights", {"kl": 1.0}), folder / "answers", **more)


@pytest.fixture
def corpus(four_layers, tmp_path):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(four_layers / "tokenizer.json")).encode(builtin_text().decode()).ids
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    return tmp_path


def student_of(path, layers=(0, 1, 3)):
    return reference_model(cut(open_checkpoint(str(path)), Cut(tuple(layers))), "text-generation")


@pytest.mark.parametrize("more", [{}, {"weights": {"reverse-kl": 0.5, "cross-entropy": 0.2}}, {"top_k": 40}, {"weights": {"jsd": 1.0}, "temperature": 2.0}])
def test_gradients_of_chunks_are_those_of_the_whole(four_layers, corpus, monkeypatch, more):
    from compiler.distil import lessons

    grads = []
    for chunk in (7, 1000):
        monkeypatch.setattr(lessons, "CHUNK", chunk)
        student = student_of(four_layers).requires_grad_(True)
        one = lesson(corpus, four_layers, **more)
        loss = one.learn(student, [1, 2])
        grads.append([loss, student.model.layers[0].mlp.up_proj.weight.grad.clone(), student.model.embed_tokens.weight.grad.clone()])
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    for left, right in zip(grads[0][1:], grads[1][1:], strict=True):
        assert torch.allclose(left, right, atol=1e-6) and left.abs().max() > 0


@pytest.mark.parametrize("how", [{}, {"train": "lora", "rate": 5e-3}, {"layer_decay": 0.8, "noise": 1.0}, {"precision": "bf16"}])
def test_training_brings_the_student_nearer(four_layers, corpus, how):
    student, one = student_of(four_layers), lesson(corpus, four_layers)
    settings = Settings(**{"steps": 60, "batch": 4, "rate": 1e-3, **how})
    before = one.held_loss(student)
    progress = train(student, 3, one, settings, corpus / "state", lambda *_: None)
    assert progress.before == pytest.approx(before, rel=1e-6) and progress.best < 0.93 * before
    assert one.held_loss(student) == pytest.approx(progress.best, rel=1e-4)
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert set(student.state_dict()) == set(student_of(four_layers).state_dict())


def test_bf16_rounds_the_student_and_not_its_teacher(four_layers, corpus):
    student, one = student_of(four_layers).requires_grad_(True), lesson(corpus, four_layers)
    exact = one.learn(student, [0])
    told = one._told(0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = one.learn(student, [0])
        assert torch.equal(one._told(0, 0), told) and told.dtype == torch.float32
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)


def test_training_that_brings_nothing_leaves_the_student_as_it_was(four_layers, corpus):
    """The whole teacher is its own best student: whatever a step does is worse, and is not kept."""
    student, one = student_of(four_layers, range(4)), lesson(corpus, four_layers)
    told = {name: value.clone() for name, value in student.state_dict().items()}
    progress = train(student, 4, one, Settings(40, rate=1e-2, patience=2), corpus / "s", lambda *_: None)
    assert progress.best_step == 0 and progress.step < 40  # patience ended it
    assert all(torch.equal(value, told[name]) for name, value in student.state_dict().items())


def test_a_loss_that_is_not_finite_stops_with_step_and_items(four_layers, corpus, monkeypatch):
    one = lesson(corpus, four_layers)
    learn = one.learn
    monkeypatch.setattr(one, "learn", lambda student, places, count=[0]: float("nan") if count.append(1) or len(count) > 4 else learn(student, places))
    with pytest.raises(TrimtabError, match=r"found nan .* at step 4, items \d+") as told:
        train(student_of(four_layers), 3, one, Settings(steps=20), corpus / "state", lambda *_: None)
    assert told.value.code == "DISTIL_DIVERGED"


def test_a_full_disk_leaves_the_state_before(four_layers, corpus, monkeypatch):
    from compiler.distil import training

    monkeypatch.setattr(training, "SAVE_S", 0.0)
    saved, whole = [], torch.save

    def save(told, file):
        saved.append(1)
        if len(saved) == 3:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        whole(told, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OutputError, match="no space left"):
        train(student_of(four_layers), 3, lesson(corpus, four_layers), Settings(steps=20), corpus / "state", lambda *_: None)
    assert [path.name for path in (corpus / "state").iterdir()] == ["state.pt"]
    assert torch.load(corpus / "state" / "state.pt", weights_only=True)["progress"]["step"] == 4


def _train_and_keep(path, corpus, how, kill_at):
    from compiler.distil import training

    torch.set_num_threads(1)
    training.SAVE_S = training.SAVE_MOST_S = 0.0

    def report(_what, done, _most):
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    student = student_of(path)
    settings = Settings(steps=30, rate=2e-3, noise=1.0, batch=2, train=how)
    train(student, 3, lesson(corpus, path), settings, corpus / "state", report)
    torch.save(student.state_dict(), corpus / "done.pt")


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(four_layers, corpus, tmp_path_factory, how):
    context = multiprocessing.get_context("forkserver")  # one import of torch for all of them
    context.set_forkserver_preload([__name__])
    results = []
    for kills in ((), (7, 19)):
        folder = tmp_path_factory.mktemp("run")
        (folder / "ids.json").write_text((corpus / "ids.json").read_text())
        for kill_at in (*kills, 0):
            child = context.Process(target=_train_and_keep, args=(four_layers, folder, how, kill_at))
            child.start()
            child.join()
            assert child.exitcode == (-signal.SIGKILL if kill_at else 0)
        results.append(torch.load(folder / "done.pt", weights_only=True))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_items_and_rates():
    assert split(16, 16) == ([place for place in range(16) if place not in (4, 12)], [4, 12]) and len(split(1000, 10)[1]) == 10
    settings = Settings(steps=10, batch=2, seed=3)
    seen = [place for step in range(3) for place in batch([10, 11, 12, 13, 14], step, settings)]
    assert sorted(seen[:5]) == [10, 11, 12, 13, 14] and seen[5] in range(10, 15)
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    steps = [batch(range(400), step, Settings(steps=50, batch=8), lengths) for step in range(50)]
    assert sorted(place for places in steps for place in places) == list(range(400))
    assert sum(8 * max(lengths[places]) for places in steps) < 1.2 * lengths.sum() and steps[0] != batch(range(400), 50, Settings(steps=99, batch=8), lengths)
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == 1.0 and rates[99] < 0.02


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", [{"cosine": 1.0}, {"cosine": 1.0, "similarity": 1.0}, {"hidden": 1.0}, {"relations": 1.0, "cosine": 1.0}])
def test_an_encoder_learns_its_teachers_vectors(bert, tmp_path, weights, precision):
    teacher = open_checkpoint(str(bert))
    texts = [row[: 8 + number % 12].tolist() for number, row in enumerate(tokens(96, vocab=99))]
    one = TextLesson(teacher, "feature-extraction", texts, weights, tmp_path / "answers", Pooling("mean", True))
    student = reference_model(cut(teacher, Cut((0,))), "feature-extraction")
    progress = train(student, 1, one, Settings(steps=60, batch=16, rate=2e-3, precision=precision), tmp_path / "state", lambda *_: None)
    assert progress.best < 0.8 * progress.before


def test_pooling_is_the_graphs():
    from compiler.evaluation.encoder import pool

    states, mask = torch.randn(3, 7, 8), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    output = type("Output", (), {"last_hidden_state": states})
    for kind in ("mean", "cls", "max", "lasttoken"):
        expected = pool(states.numpy(), mask.numpy(), {"pooling": kind, "normalize": True})
        assert np.allclose(Pooling(kind, True).of(output, mask).numpy(), expected, atol=1e-6)


def test_a_student_seen_through_its_scheme_is_what_rounding_leaves(four_layers, corpus):
    """Trained through int4, then rounded to nearest: the held-out loss is the one that training saw."""
    schemes = Schemes(parse_scheme("int4-g32"))
    config = open_checkpoint(str(four_layers)).config
    student, one = student_of(four_layers, range(4)), lesson(corpus, four_layers)
    with seen_through(student, schemes, config):
        progress = train(student, 4, one, Settings(steps=40, batch=4, rate=1e-4), corpus / "state", lambda *_: None)
    assert progress.best < 0.9 * progress.before
    unseen = one.held_loss(student)
    with seen_through(student, schemes, config):
        assert one.held_loss(student) == pytest.approx(progress.best, rel=1e-5)
    assert unseen != pytest.approx(progress.best, rel=1e-3)  # outside, the float weights stand there again
    assert set(student.state_dict()) == set(student_of(four_layers, range(4)).state_dict())


@pytest.fixture
def recipe(four_layers, tmp_path):
    def write(distil, **more):
        (tmp_path / "text.txt").write_text(builtin_text().decode())
        limits = {"targets": [{"profile": "here", "limits": {"size_mb": 5}}]}
        parts = {"name": "small", "base": str(four_layers), "distil": distil, "quantize": {"scheme": "int8-g32"}, **limits, **more}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(parts))
        return path

    return write


def test_a_student_is_planned_built_judged_and_told(trimtab, recipe, tmp_path, monkeypatch):
    from compiler import judge

    monkeypatch.setattr(judge, "MEASURE_SECONDS", 1.0)
    path = recipe({"layers": 3, "data": "text.txt", "tokens": 8000, "length": 64, "batch": 2, "rate": 1e-3})
    (plan,) = json.loads(trimtab("plan", path, "--json")[1])
    assert [step["stage"] for step in plan["steps"]] == ["merge", "distil", "export", "evaluate", "measure", "package"]
    code, stdout, stderr = trimtab("compile", path, "--out", tmp_path / "out")
    assert code == 0, stdout + stderr
    bundle = tmp_path / "out" / "small-here"
    report, manifest = (json.loads((bundle / name).read_text()) for name in ("report.json", "manifest.json"))
    distil = report["distil"]
    assert distil["after"] < distil["before"] and distil["parameters"]["student"] < distil["parameters"]["teacher"] and len(distil["dropped"]) == 1
    stages = [row["stage"] for row in report["stages"] if row["metric"] == "kl_mean"]
    assert stages == ["merge", "distil", "quantize", "export"]
    faithful = next(row for row in report["verdict"]["checks"] if row["name"] == "export_faithful")
    assert faithful["outcome"] == "PASS"
    files = {row["path"]: row["bytes"] for row in manifest["files"]}
    assert abs(plan["predicted_size_mb"] - sum(size for name, size in files.items() if "onnx" in name) / 1e6) < 0.1
    record = next(row for row in manifest["records"] if row["stage"] == "distil")
    assert record["measured"]["data"]["rows"] == 1 and len(record["measured"]["data"]["sha256"]) == 64
    cost = next(row for row in report["records"] if row["stage"] == "distil")
    assert cost["seconds"] > 0 and cost["bytes"] > 0 and not cost["cached"]
    assert json.loads((bundle / "config.json").read_text())["num_hidden_layers"] == 3
    html = (bundle / "report.html").read_text()
    assert "The student" in html and "held out" in html
    assert not list((tmp_path / "store" / "scratch").glob("[0-9a-f]*/state.pt"))
    (row,) = json.loads(trimtab("plan", path, "--json")[1])
    assert [step["state"] for step in row["steps"]][1:4] == ["cached"] * 3


def test_what_no_recipe_can_ask_of_a_student(trimtab, recipe, tiny_llama, tmp_path):
    (tmp_path / "empty.txt").write_text("Too little.")
    cases = [
        ({}, "layers, intermediate, heads, student or quantized"),
        ({"layers": 9}, "1 to 4"),
        ({"layers": 3, "objectives": "cosin"}, "did you mean 'cosine'"),
        ({"layers": 3, "objectives": "cosine"}, "for text-generation"),
        ({"layers": 3, "data": "empty.txt"}, "tokens of text"),
        ({"layers": 3, "top_k": 5, "objectives": "jsd"}, "beside top_k"),
        ({"student": "nowhere"}, "nowhere"),
        ({"layers": 3, "layrs": 2}, "did you mean 'layers'"),
    ]
    for distil, message in cases:
        code, _, stderr = trimtab("compile", recipe(distil), "--out", tmp_path / "out")
        assert code in (1, 2) and message in stderr and "Traceback" not in stderr, stderr
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    told = json.loads((other / "tokenizer.json").read_text())
    told["model"]["merges"] = told["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(told))
    code, _, stderr = trimtab("plan", recipe({"student": str(other)}))
    assert code == 1 and "the teacher's tokenizer" in stderr


def test_a_student_as_files(trimtab, four_layers, tmp_path):
    (tmp_path / "text.txt").write_text(builtin_text().decode())
    given = ("--layers", 3, "--data", tmp_path / "text.txt", "--tokens", 2000, "--length", 64, "--objective", "kl", "--objective", "cross-entropy=0.1")
    code, stdout, stderr = trimtab("distil", four_layers, *given, "--out", tmp_path / "student", "--json")
    assert code == 0, stderr
    told = json.loads(stdout)
    assert told["parameters"]["student"] < told["parameters"]["teacher"] and told["steps"] == 2000 // 64
    assert LlamaForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 3
    code, _, stderr = trimtab("distil", four_layers, "--layers", 9, "--out", tmp_path / "none")
    assert code == 2 and "distil.layers: expected 1 to 4" in stderr and not (tmp_path / "none").exists()
    code, _, stderr = trimtab("distil", four_layers, "--layers", 2, "--objective", "kl=much", "--out", tmp_path / "none")
    assert code == 2 and "NAME=number" in stderr


def test_answers_are_those_to_the_same_questions(trimtab, four_layers, tmp_path, monkeypatch):
    """Other windows of the same text, as another budget takes them, do not get the answers that were kept for the first ones."""
    (tmp_path / "text.txt").write_text(builtin_text().decode())
    given = ("distil", four_layers, "--layers", 3, "--data", tmp_path / "text.txt", "--length", 64, "--json")
    assert trimtab(*given, "--tokens", 1000, "--out", tmp_path / "first")[0] == 0
    after_another = json.loads(trimtab(*given, "--tokens", 3000, "--out", tmp_path / "second")[1])
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "other"))
    alone = json.loads(trimtab(*given, "--tokens", 3000, "--out", tmp_path / "third")[1])
    assert after_another["checks"] == alone["checks"]


def test_scratch_is_left_while_in_use_and_goes_when_room_is_needed(tmp_path):
    from compiler.store import Store

    store = Store(tmp_path)
    with store.scratch("training") as folder:
        (folder / "state.pt").write_bytes(bytes(1000))
        store.collect(0)
        assert (folder / "state.pt").is_file()
    store.collect(10_000)
    assert (folder / "state.pt").is_file()
    store.collect(0)
    assert not folder.exists()
