"""`distil` of a recipe: how small a student is, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from compiler.distil.trim import Sizes
from compiler.errors import RecipeError
from compiler.scenarios import Part
from compiler.text import nearest

OF_TOKENS = ("kl", "reverse-kl", "jsd", "cross-entropy")  # rows of `distil.objectives`, which imports torch
OF_TEXTS = ("cosine", "similarity", "hidden", "relations")


class Distil(Part):
    """A smaller model trained to answer as the merged one.

    layers, intermediate, heads   how many are kept, chosen by measured importance; left out: all
    student      another checkpoint with the same tokenizer, instead of a part of the teacher
    quantized    the student is seen through the recipe's scheme while it is trained, so that the rounding is trained with it
    data         builtin, recipe (rows of evaluate.data that are not scored), or a file of text or JSONL (chats or texts)
    objectives   name or {name: weight} of compiler.distil.objectives; default kl (decoders, classifiers), cosine (sentence vectors)
    top_k        keep the teacher's likeliest tokens only (kl and cross-entropy); 0: its whole distribution
    tokens       to be seen in training, over as many passes as that takes
    length       tokens of a window, or at most of a text; batch: windows (texts) a step
    precision    of the student's matrix products while it trains; weights, optimizer, teacher and what is held out stay float32
    """

    layers: int | None = Field(default=None, ge=1)
    intermediate: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    student: str | None = None
    quantized: bool = False
    data: str = "builtin"
    objectives: Mapping[str, float] = Field(default_factory=dict)
    temperature: float = Field(default=1.0, gt=0, le=100)
    top_k: int = Field(default=0, ge=0)
    train: Literal["full", "lora", "none"] = "full"
    rank: int = Field(default=16, ge=1)
    tokens: int = Field(default=200_000, ge=1)
    length: int | None = Field(default=None, ge=8)
    batch: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    noise: float = Field(default=0.0, ge=0)
    patience: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"

    @field_validator("objectives", mode="before")
    @classmethod
    def named(cls, objectives: Any) -> Any:
        return {objectives: 1.0} if isinstance(objectives, str) else objectives

    @field_validator("objectives")
    @classmethod
    def known(cls, objectives: Mapping[str, float]) -> Mapping[str, float]:
        for name, weight in objectives.items():
            if name not in (*OF_TOKENS, *OF_TEXTS):
                expected = f"one of {', '.join((*OF_TOKENS, *OF_TEXTS))}"
                raise RecipeError("distil.objectives", expected=expected, found=repr(name), remedy=nearest(name, (*OF_TOKENS, *OF_TEXTS)))
            if not 0 < weight < float("inf"):
                raise RecipeError(f"distil.objectives.{name}", expected="a weight above 0", found=str(weight), remedy="change it, or remove the objective")
        return objectives

    @model_validator(mode="after")
    def something_to_do(self) -> Distil:
        def wrong(expected: str, found: str, remedy: str) -> RecipeError:
            return RecipeError("distil", expected=expected, found=found, remedy=remedy)

        if not self.sizes.smaller and not self.student and not self.quantized:
            raise wrong("layers, intermediate, heads, student or quantized", "none of them", "say how the student is smaller, or remove distil")
        if self.student and self.sizes.smaller:
            raise wrong("a student's path, or sizes to cut the teacher to", "both", "remove one of them")
        if self.top_k and set(self.objectives) - {"kl", "cross-entropy"}:
            raise wrong("kl (and cross-entropy) beside top_k", ", ".join(self.objectives), "remove top_k, or the other objectives")
        if self.top_k and self.temperature != 1:
            raise wrong("temperature 1 beside top_k", str(self.temperature), "remove one of them")
        if self.quantized and self.train != "full":
            raise wrong("train: full beside quantized", self.train, "remove one of them")
        return self

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.layers, self.intermediate, self.heads)
