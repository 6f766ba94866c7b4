"""The one training loop: AdamW, held-out checks, the best weights kept, and a state on disk from which a killed run goes on.

1. What is trained: all weights (`full`), or LoRA factors beside every matrix of the layers (`lora`, by PEFT), merged into them at the end.
2. The rate rises over WARM of the steps and falls to zero in a straight line; by layer it is multiplied by layer_decay for each layer between it and the last.
3. Items come in an order drawn anew for each pass from (seed, pass), noise from (seed, step): a step depends on nothing but its number and the weights.
4. Before the first step, CHECKS times on the way and at the end the held-out items are asked. The best weights are kept, those before training among them;
   after `patience` checks without a better one training stops.
5. The state (weights, optimizer, best weights, checks) is written beside its place and renamed: after a check when SAVE_S have passed since the last, at the
   latest after SAVE_MOST_S. What it is written for changes no number: a run that was killed ends with the same weights, bit for bit, on as many threads.
6. A loss that is not finite ends training with the step and the items it came from.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.parametrize import cached  # what `through` rounds is rounded once a step

from compiler.distil.importance import stack_of
from compiler.distil.lessons import Lesson
from compiler.errors import RecipeError, TrimtabError
from compiler.memory import large_blocks_kept
from compiler.store import sync, writing

WARM = 0.05
POOL = 16  # steps
CHECKS = 10
CLIP = 1.0
BETAS = (0.9, 0.98)
SAVE_S, SAVE_MOST_S = 30.0, 120.0
LORA_ALPHA = 2.0  # times the rank
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to train. batch: items a step. noise: NEFTune's alpha on the embeddings (arXiv 2310.05914), 0 for none. patience: checks; 0 never stops early.

    precision: bf16 has torch's autocast round the operands of the student's products; all that is kept stays float32.
    """

    steps: int
    batch: int = 1
    train: str = "full"
    rank: int = 16
    rate: float = 1e-4
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    noise: float = 0.0
    patience: int = 0
    seed: int = 0
    precision: str = "fp32"


@dataclass
class Progress:
    """Where training stands. checks: {step, loss, held} each; best_step 0: nothing was better than what it began with; recent: losses since the last check."""

    step: int = 0
    best_step: int = 0
    checks: list[dict[str, Any]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    @property
    def before(self) -> float:
        return float(self.checks[0]["held"])

    @property
    def best(self) -> float:
        return float(min(check["held"] for check in self.checks))

    def as_dict(self) -> dict[str, Any]:
        return {"steps": self.step, "best_step": self.best_step, "before": self.before, "after": self.best, "checks": self.checks}


def train(student: Any, depth: int, lesson: Lesson, settings: Settings, folder: Path, report: Report) -> Progress:
    """Train `student` (transformers, float32) in place and leave the best weights in it; goes on from the state in `folder` where there is one.

    depth  its number of layers
    Raises RecipeError for too little data, TrimtabError for a loss that is not finite, OutputError where the state cannot be written.
    """
    if not lesson.trained or not lesson.held:
        count = len(lesson.trained) + len(lesson.held)
        remedy = "give more text in distil.data"
        raise RecipeError("distil.data", expected="items to train on and to hold out", found=f"{count} in all", remedy=remedy, code="DATA_EMPTY")
    student.train()
    still(student)
    with large_blocks_kept(), adapted(student, settings) as weights:
        run = Run(student, lesson, settings, weights, optimizer_of(weights, depth, student, settings), folder)
        run.resume()
        return run.go(report)


def still(student: Any) -> None:
    """No dropout: a student that heals on little data has less to fear from fitting than from forgetting, and a step then depends on its number alone."""
    for part in student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


@contextmanager
def adapted(student: Any, settings: Settings) -> Iterator[dict[str, Any]]:
    """The trainable tensors by name. On leaving LoRA factors are merged into the weights, and nothing is trainable any more."""
    student.requires_grad_(False)
    if settings.train == "full":
        student.requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(settings.seed)  # PEFT draws A; nothing else here draws from torch's own state
        names = sorted({name.rpartition(".")[2] for name, part in linears(student)})
        config = LoraConfig(r=settings.rank, lora_alpha=LORA_ALPHA * settings.rank, target_modules=names, exclude_modules=["lm_head"])
        inject_adapter_in_model(config, student)
    yield {name: tensor for name, tensor in student.named_parameters() if tensor.requires_grad}
    student.requires_grad_(False)
    if settings.train != "full":
        merge_lora(student)
    student.eval()


def linears(student: Any) -> list[tuple[str, Any]]:
    """The matrices of the layers, not the head."""
    return [(name, part) for name, part in student.named_modules() if isinstance(part, torch.nn.Linear) and any(piece.isdigit() for piece in name.split("."))]


def merge_lora(student: Any) -> None:
    """W + scale B A in place of each adapted matrix."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in [(name, part) for name, part in student.named_modules() if isinstance(part, BaseTunerLayer)]:
        part.merge()
        parent, _, last = name.rpartition(".")
        setattr(student.get_submodule(parent), last, part.get_base_layer())


def optimizer_of(weights: Mapping[str, Any], depth: int, student: Any, settings: Settings) -> Any:
    """Rule 2's rates by layer: what stands before the first layer counts as one more below it."""
    stack = next(name for name, part in student.named_modules() if part is stack_of(student, depth))
    groups: dict[float, list[Any]] = {}
    for name, tensor in weights.items():
        number = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else ""
        below = depth - 1 - int(number) if number.isdigit() else depth if "embed" in name else 0
        groups.setdefault(settings.layer_decay**below, []).append(tensor)
    rows = [{"params": tensors, "scale": scale} for scale, tensors in groups.items()]
    return torch.optim.AdamW(rows, lr=settings.rate, betas=BETAS, weight_decay=settings.weight_decay, fused=True)


@dataclass
class Run:
    """One training on its way."""

    student: Any
    lesson: Lesson
    settings: Settings
    weights: Mapping[str, Any]
    optimizer: Any
    folder: Path
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] = field(default_factory=dict)
    saved: float = field(default_factory=time.monotonic)

    @property
    def state(self) -> Path:
        return self.folder / "state.pt"

    def resume(self) -> None:
        """From the state on disk, if there is one; else the first check."""
        if self.state.is_file():
            told = torch.load(self.state, weights_only=True)
            self._put(told["weights"])
            self.optimizer.load_state_dict(told["optimizer"])
            self.best = told["best"]
            self.progress = Progress(**told["progress"])
            return
        self._keep()
        self._check(0.0)

    def go(self, report: Report) -> Progress:
        every = max(1, self.settings.steps // CHECKS)
        while self.progress.step < self.settings.steps and not self._tired():
            recent = self.progress.recent
            recent.append(self._step())
            held = self.progress.checks[-1]["held"]
            report(f"steps of training, loss {np.mean(recent[-20:]):.4f}, held out {held:.4f}", self.progress.step, self.settings.steps)
            due = self.progress.step % every == 0 or self.progress.step == self.settings.steps
            if due:
                self._check(float(np.mean(recent)))
                recent.clear()
            if time.monotonic() - self.saved >= (SAVE_S if due else SAVE_MOST_S):
                self.save()
        self._put(self.best)
        return self.progress

    def _step(self) -> float:
        step, settings = self.progress.step, self.settings
        places = batch(self.lesson.trained, step, settings, self.lesson.lengths)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * group["scale"] * rate_at(step, settings.steps)
        self.optimizer.zero_grad()
        rounded = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16")
        with noisy(self.student, settings.noise, (settings.seed, step)), cached(), rounded:
            loss = self.lesson.learn(self.student, places)
        norm = torch.nn.utils.clip_grad_norm_([tensor for tensor in self.weights.values() if tensor.grad is not None], CLIP)
        if not (np.isfinite(loss) and torch.isfinite(norm)):
            found = f"{loss:g} (gradient {float(norm):g}) at step {step + 1}, items {', '.join(map(str, places))}"
            raise TrimtabError("distil", expected="a finite loss", found=found, remedy="lower distil.rate, or look at these items", code="DISTIL_DIVERGED")
        self.optimizer.step()
        self.progress.step += 1
        return loss

    def _check(self, loss: float) -> None:
        self.student.eval()
        with cached():
            held = self.lesson.held_loss(self.student)
        self.student.train()
        better = not self.progress.checks or held < self.progress.best
        self.progress.checks.append({"step": self.progress.step, "loss": loss, "held": held})
        if better:
            self.progress.best_step = self.progress.step
            self._keep()

    def _tired(self) -> bool:
        checks, patience = self.progress.checks, self.settings.patience
        since = sum(check["step"] > self.progress.best_step for check in checks)
        return bool(patience) and since >= patience

    def _keep(self) -> None:
        self.best = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    def _put(self, values: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(values[name])

    def save(self) -> None:
        """Rule 5. Raises OutputError; the state before stays."""
        weights = {name: tensor.detach() for name, tensor in self.weights.items()}
        told = {"weights": weights, "best": self.best, "optimizer": self.optimizer.state_dict(), "progress": vars(self.progress)}
        beside = self.state.with_suffix(".writing")
        with writing(self.state):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("wb") as file:
                    try:
                        torch.save(told, file)
                    except RuntimeError as error:  # its writer's word for a write that failed
                        raise OSError(errno.ENOSPC, "no space left", str(beside)) from error
                    file.flush()
                    os.fsync(file.fileno())
                beside.rename(self.state)
                sync(self.folder)
            finally:
                beside.unlink(missing_ok=True)
        self.saved = time.monotonic()


def batch(items: Sequence[int], step: int, settings: Settings, lengths: Sequence[int] = ()) -> list[int]:
    """The items of a step. 5 items, 2 a step: steps 0 to 2 take the five of pass 0 and the first of pass 1.

    lengths  of all items: where they differ, those of POOL steps are dealt by length, so that little of a step is padding
    """
    made: list[int] = []
    for number in {at // len(items): None for at in range(step * settings.batch, (step + 1) * settings.batch)}:
        draw = np.random.default_rng([settings.seed, number])
        order = np.asarray(items)[draw.permutation(len(items))]
        if len(lengths):
            order = _by_length(order, np.asarray(lengths), settings.batch, draw)
        first, last = (max(0, (step + more) * settings.batch - number * len(items)) for more in (0, 1))
        made += order[first:last].tolist()
    return made


def _by_length(order: np.ndarray, lengths: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """Items sorted by length within every POOL batches, whose order is drawn again."""
    dealt = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        whole = len(pool) // size
        dealt += [pool[at * size : (at + 1) * size] for at in draw.permutation(whole)] + [pool[whole * size :]]
    return np.concatenate(dealt)


def rate_at(step: int, steps: int) -> float:
    """Share of the full rate: rises over WARM of the steps, then falls to zero."""
    warm = max(1, round(WARM * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


@contextmanager
def noisy(student: Any, alpha: float, seed: tuple[int, int]) -> Iterator[None]:
    """Uniform noise of alpha / sqrt(length x width) on the embeddings of a forward pass inside."""
    if not alpha:
        yield
        return
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])

    def add(module: Any, args: Any, output: Any) -> Any:
        spread = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + spread * (2 * torch.rand(output.shape, generator=generator) - 1)

    handle = student.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
