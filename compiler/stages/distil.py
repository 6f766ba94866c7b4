"""Distil: a smaller student of the merged model, trained to answer as it does (compiler.distil). Cached by all that it was made from.

What the bundle is measured against stays the merged fp32 model, the teacher: a limit on kl_mean holds for student, rounding and kernels together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.checkpoints.write import write_checkpoint
from compiler.distil.ask import OF_TEXTS, OF_TOKENS, Distil
from compiler.distil.trim import DEPTH, Cut, check, cut, first
from compiler.errors import CheckpointError, RecipeError
from compiler.evaluation.data import EvaluationSet
from compiler.plan import Step
from compiler.record import versions
from compiler.scheme import Schemes
from compiler.sources import Sources
from compiler.stages import export as export_stage
from compiler.store import Store, cache_key

if TYPE_CHECKING:
    from compiler.distil.lessons import Lesson

DISTIL_VERSION = 1
FACTS, STUDENT = "distil.json", "student"
WINDOW, TEXT = 512, 128  # tokens of a window, most of a text
BATCHES = {export_stage.DECODER: 1, export_stage.ENCODER: 32}
RATES = {"full": 1e-4, "lora": 1e-3, "none": 0.0}
MEASURED = 4  # windows that importance is measured on
MEASURED_TEXTS = 128
LEAST_TOKENS = 8  # of a text
Report = Callable[[str, int, int], None]


def distil_step(ask: Distil, sources: Sources, rows: EvaluationSet, task: str | None, schemes: Schemes | None, seed: int, folder: Path) -> Step:
    """Everything that the student depends on. schemes: what it is seen through, where that is asked for.

    Raises RecipeError for sizes or objectives that do not fit the model, CheckpointError for a student of another tokenizer.
    """
    road = export_stage.road(sources.merged.config, task)
    decoder = road == export_stage.DECODER
    kind = task or ("text-generation" if decoder else infer_task(sources.merged))
    check(sources.merged, ask.sizes)
    objectives = dict(ask.objectives) or {("cosine" if kind == "feature-extraction" else "kl"): 1.0}
    _check_objectives(objectives, kind)
    if ask.quantized and not decoder:
        raise RecipeError("distil.quantized", expected="a decoder", found="an encoder", remedy="remove it: encoders of 8 bits lose too little to train for")
    if ask.top_k and not decoder:
        raise RecipeError("distil.top_k", expected="a decoder", found="an encoder", remedy="remove it")
    params = ask.model_dump(mode="json") | {
        "objectives": objectives,
        "length": ask.length or (WINDOW if decoder else TEXT),
        "batch": ask.batch or BATCHES[road],
        "rate": ask.rate or RATES[ask.train],
        "data": {"origin": rows.origin, "sha256": rows.digest, "rows": len(rows.rows)},
        "task": kind,
        "seed": seed,
        "scheme": str(schemes.default) if schemes else None,
        "schemes": {pattern: str(scheme) for pattern, scheme in schemes.overrides.items()} if schemes else {},
    }
    given = student_checkpoint(ask, sources.merged, folder) if ask.student else None
    told = {**params, "data": rows.digest, "student": given.digest if given else None}
    tools = versions(["numpy", "torch", "transformers", "tokenizers", *(["peft"] if ask.train == "lora" else [])])
    return Step("distil", params, {"version": DISTIL_VERSION, "merge": dict(sources.identity), "options": told, "tools": tools})


def infer_task(checkpoint: Checkpoint) -> str:
    from compiler.graph.encoder import infer_task as infer

    return infer(checkpoint)


def _check_objectives(objectives: Mapping[str, float], task: str) -> None:
    allowed = {"text-generation": OF_TOKENS, "feature-extraction": OF_TEXTS}.get(task, ("kl", "reverse-kl", "jsd", "hidden", "relations"))
    wrong = next((name for name in objectives if name not in allowed), None)
    if wrong:
        raise RecipeError("distil.objectives", expected=f"some of {', '.join(allowed)} for {task}", found=wrong, remedy="choose another")


def student_checkpoint(ask: Distil, teacher: Checkpoint, folder: Path) -> Checkpoint:
    """The student that the recipe names. Raises CheckpointError where it does not read text as the teacher does."""
    given = open_checkpoint(str(ask.student), relative_to=folder)
    mine, theirs = (json.loads(one.assets.get("tokenizer.json", b"{}")) for one in (given, teacher))
    if mine.get("model") != theirs.get("model") or mine.get("pre_tokenizer") != theirs.get("pre_tokenizer"):
        sizes = [len(one.get("model", {}).get("vocab", ())) for one in (mine, theirs)]
        found = f"another, of {sizes[0]} tokens beside {sizes[1]}"
        raise CheckpointError(f"distil.student: {ask.student}", expected="the teacher's tokenizer", found=found, remedy="choose a student of the same family")
    wide = {one.config.get("vocab_size") for one in (given, teacher)}
    if len(wide) > 1:
        found = f"{given.config.get('vocab_size')} rows beside {teacher.config.get('vocab_size')}"
        raise CheckpointError(f"distil.student: {ask.student}", expected="as many tokens as the teacher", found=found, remedy="choose another student")
    return given


def planned_student(sources: Sources, step: Step, ask: Distil, folder: Path) -> Sources:
    """The sources with a student of the right size that nothing has been measured or trained for: what plans and predictions need."""
    student = student_checkpoint(ask, sources.merged, folder) if ask.student else cut(sources.merged, first(sources.merged, ask.sizes))
    return replace(sources, merged=student, teacher=sources.merged, distil=step)


def distilled_sources(sources: Sources, ask: Distil, rows: EvaluationSet, store: Store, report: Report, folder: Path) -> Sources:
    """The sources with the trained student, from the store or made now; a run that was killed goes on. Raises as `training.train` does."""
    step, teacher = sources.distil, sources.teacher
    assert step is not None and teacher is not None  # planned_student put both there

    def fill(work: Path) -> None:
        items = lesson_items(teacher, step.params, rows)
        asked = {"teacher": teacher.digest, "items": items_digest(items), "top_k": step.params["top_k"], "task": step.params["task"]}
        with store.scratch(step.key) as scratch, store.scratch(f"teacher-{cache_key(asked)}") as answers:
            make_student(teacher, sources.merged if ask.student else None, step.params, items, work, (scratch, answers), report)

    place = store.get(step.key) or store.obtain(step.key, fill, step.named)
    store.forget(step.key)
    return replace(sources, merged=open_checkpoint(str(place / STUDENT)))


def make_student(
    teacher: Checkpoint, given: Checkpoint | None, params: Mapping[str, Any], items: Any, work: Path, folders: tuple[Path, Path], report: Report
) -> None:
    """Fill `work` with the student as a checkpoint and what is to be told of it.

    given    the student to begin with; None: a part of the teacher
    items    of `lesson_items`
    folders  for the state of training, and for what the teacher says
    """
    from compiler.distil.through import seen_through
    from compiler.distil.training import Settings, train
    from compiler.reference import reference_model

    ask = Distil.model_validate({key: params[key] for key in Distil.model_fields if key not in ("data", "rate")})
    start, chosen = given, Cut(())
    dropped: list[dict[str, Any]] = []
    if start is None:
        chosen, dropped = _chosen(teacher, ask, params, items, folders[0], report)
        start = cut(teacher, chosen)
    lesson = lesson_for(teacher, params, items, folders[1])
    student = reference_model(start, params["task"])
    facts: dict[str, Any] = {"dropped": dropped, "cut": chosen.as_dict(), "measure": lesson.measure, "held": len(lesson.held), "items": len(items)}
    if ask.train == "none":
        held = lesson.held_loss(student)
        facts |= {"steps": 0, "tokens": 0, "before": held, "after": held, "best_step": 0, "checks": []}
    else:
        per_step = params["batch"] * max(1, sum(map(len, items)) // len(items))
        settings = Settings(
            max(1, ask.tokens // per_step),
            *(params[key] for key in ("batch", "train", "rank", "rate", "layer_decay", "weight_decay", "noise", "patience", "seed", "precision")),
        )
        with seen_through(student, _schemes(params), start.config) if ask.quantized else nullcontext():
            progress = train(student, int(start.config[DEPTH]), lesson, settings, folders[0], report)
        facts |= {**progress.as_dict(), "tokens": progress.step * per_step}
    facts["parameters"] = {"teacher": teacher.parameter_count, "student": start.parameter_count}
    write_checkpoint(trained(start, student), work / STUDENT, dtype="F32")
    (work / FACTS).write_text(json.dumps(facts, sort_keys=True))


def _schemes(params: Mapping[str, Any]) -> Schemes:
    return export_stage.schemes_in({"scheme": params["scheme"], "layers": params["schemes"]})


def _chosen(teacher: Checkpoint, ask: Distil, params: Mapping[str, Any], items: Any, folder: Path, report: Report) -> tuple[Cut, list[dict[str, Any]]]:
    """What is kept of the teacher: measured, or from the folder of a run that was killed."""
    from compiler.distil.importance import choose

    file = folder / "cut.json"
    if file.is_file():
        told = json.loads(file.read_text())
        return Cut.from_dict(told["cut"]), told["dropped"]
    if not ask.sizes.smaller:
        return first(teacher, ask.sizes), []
    chosen, dropped = choose(teacher, params["task"], feeds(teacher, params, items), ask.sizes, report)
    beside = file.with_suffix(".writing")
    beside.write_text(json.dumps({"cut": chosen.as_dict(), "dropped": dropped}))
    beside.rename(file)
    return chosen, dropped


def lesson_items(teacher: Checkpoint, params: Mapping[str, Any], rows: EvaluationSet) -> Any:
    """Windows int64 [count, length] for a decoder, lists of token ids for an encoder. Raises RecipeError where there are too few."""
    if params["task"] == "text-generation":
        from compiler.quantizers.windows import token_windows

        wanted = -(-params["tokens"] // params["length"]) + 2 * params["batch"]
        return token_windows(rows, teacher, count=max(16, wanted * 9 // 8), length=params["length"])  # an eighth is held out
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(teacher.assets["tokenizer.json"].decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(params["length"], int(teacher.config.get("max_position_embeddings") or params["length"])))
    texts = [one.ids for one in tokenizer.encode_batch(texts_of(rows)) if len(one.ids) >= LEAST_TOKENS]
    wanted = max(16 * params["batch"], params["tokens"] * len(texts) * 9 // (8 * max(1, sum(map(len, texts)))))  # an eighth is held out
    texts = [texts[place] for place in np.linspace(0, len(texts) - 1, min(len(texts), wanted)).round().astype(int)]
    texts.sort(key=len)  # the teacher is asked by blocks of neighbours: little of them is padding
    if len(texts) < 2 * params["batch"]:
        expected = f"at least {2 * params['batch']} texts of {LEAST_TOKENS} tokens"
        raise RecipeError("distil.data", expected=expected, found=str(len(texts)), remedy="give more texts, or a smaller batch", code="DATA_EMPTY")
    return texts


def items_digest(items: Any) -> str:
    """sha256 (hex) of what the teacher is asked, in order: its answers are kept by number."""
    made = hashlib.sha256()
    for item in items:
        made.update(np.asarray([len(item), *item], np.int64).tobytes())
    return made.hexdigest()


def texts_of(rows: EvaluationSet) -> list[str]:
    """Texts to embed: of rows, of both sides of pairs, of messages; a single long text is taken line by line."""
    found = [text for row in rows.rows for text in (row.text, *(row.pair or ()), *(message["content"] for message in row.messages or ())) if text]
    return [line.strip() for line in found[0].splitlines() if line.strip()] if len(found) == 1 else found


def feeds(teacher: Checkpoint, params: Mapping[str, Any], items: Any) -> list[dict[str, Any]]:
    """Some items, evenly picked, as the model takes them: what importance is measured on."""
    import torch

    if params["task"] == "text-generation":
        places = np.linspace(0, len(items) - 1, min(MEASURED, len(items))).round().astype(int)
        ids = [torch.from_numpy(items[place])[None] for place in places]
        return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    from compiler.distil.lessons import Pooling, TextLesson

    picked = [items[place] for place in np.linspace(0, len(items) - 1, min(MEASURED_TEXTS, len(items))).round().astype(int)]
    return [TextLesson(teacher, params["task"], picked, {}, Path(), Pooling("")).feed(range(len(picked)))]


def lesson_for(teacher: Checkpoint, params: Mapping[str, Any], items: Any, answers: Path) -> Lesson:
    """The lesson of a task."""
    from compiler.distil.lessons import Pooling, TextLesson, TokenLesson

    if params["task"] == "text-generation":
        return TokenLesson(teacher, items, params["objectives"], answers, params["temperature"], params["top_k"])
    from compiler.graph.encoder_pooling import configured_pooling

    kind, normalize = configured_pooling(teacher)
    pooling = Pooling(kind or "mean", normalize) if params["task"] == "feature-extraction" else Pooling("")
    return TextLesson(teacher, params["task"], items, params["objectives"], answers, pooling, params["temperature"])


def trained(start: Checkpoint, student: Any) -> Checkpoint:
    """The student's weights as a checkpoint under the names of what it began with."""
    from compiler.reference import match_tensors

    state = student.state_dict()
    names = {view.name: name for name, view in match_tensors(student, start).items()}
    tensors = {name: _filled(view, state[names[name]].numpy()) if name in names else view for name, view in start.tensors.items()}
    return replace(start, tensors=tensors)


def _filled(view: TensorView, array: np.ndarray) -> TensorView:
    """The view with another content, float32."""

    def rows(begin: int, end: int) -> np.ndarray:
        return array[begin:end].copy()

    return replace(view, dtype="F32", rows=rows)


def told_of(step: Step | None, store: Store) -> dict[str, Any]:
    """For the report: settings and what came of them; {} without a student."""
    if step is None:
        return {}
    facts = json.loads((store.place(step.key) / FACTS).read_text())
    return {"distil": {"settings": dict(step.params), **facts}}
