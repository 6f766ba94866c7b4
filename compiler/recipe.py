"""`Recipe`: what the user asks for. Read from YAML, checked once, frozen.

Paths in a recipe are relative to the recipe's own folder. An unknown key is an error that names its path and the
nearest key that exists; a number that is not finite is an error; nothing is guessed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from compiler.deltas.combine import Combine, combine_named
from compiler.deltas.select import Selection, selection
from compiler.distil.ask import Distil
from compiler.economics import Alternative, Cost
from compiler.errors import RecipeError
from compiler.evaluation.noise import NOISES
from compiler.limits import CONTROL, COST_UNITS, CUSTOM, EVERY_NOISE, bare, needed_data, quantity
from compiler.scenarios import Batch, ColdStart, Part, Scenarios, Server
from compiler.scheme import Scheme, Schemes, parse_scheme
from compiler.text import default_name, nearest, read_yaml

PartOf = TypeVar("PartOf", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
DIGEST = r"^[0-9a-f]{64}$"


class DeltaItem(Part):
    """One trained delta: its weight in the mixture, and the modules it changes.

    name         default: the path's last part
    accept_base  digest of the base that may stand for the one the delta was made from
    """

    path: str
    weight: float = 1.0
    name: Name | None = None
    only: Sequence[str] = ()
    scale: Mapping[str, float] = Field(default_factory=dict)
    accept_base: str | None = Field(default=None, pattern=DIGEST)

    @model_validator(mode="after")
    def selectable(self) -> DeltaItem:
        _ = self.select  # a bad pattern or factor is told now
        return self

    @property
    def called(self) -> str:
        return self.name or default_name(self.path)

    @property
    def select(self) -> Selection:
        return selection(self.only, self.scale, "deltas")


class Deltas(Part):
    """The trained deltas; a bare list is short for {items: [...]}. only, scale: of all of them, each one's own come after.

    mode  merged into the base, or attached: each one a file beside it, by its name, that a request chooses
    """

    mode: Literal["merged", "attached"] = "merged"
    only: Sequence[str] = ()
    scale: Mapping[str, float] = Field(default_factory=dict)
    items: Sequence[DeltaItem] = ()

    @model_validator(mode="after")
    def consistent(self) -> Deltas:
        if self.mode == "attached" and not self.items:
            raise RecipeError("deltas.mode", expected="items to attach", found="none", remedy="add items, or remove mode")
        names = [name.casefold() for name in self.names]  # names of files, where they are attached
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise RecipeError("deltas", expected="a name of its own for each delta", found=f"{twice!r} twice", remedy="give one of them another `name`")
        if (self.only or self.scale) and not self.items:
            raise RecipeError("deltas", expected="items for only and scale to act on", found="none", remedy="add items, or remove only and scale")
        _ = self.select
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What each is called. Of merged ones, a folder's name that is taken is numbered: support, support-2; attached ones are asked for by name."""
        taken = {item.name.casefold() for item in self.items if item.name}
        found = []
        for item in self.items:
            name, number = item.called, 1
            while not item.name and self.mode == "merged" and name.casefold() in taken:
                number += 1
                name = f"{item.called}-{number}"
            taken.add(name.casefold())
            found.append(name)
        return tuple(found)

    @property
    def select(self) -> Selection:
        return selection(self.only, self.scale, "deltas")


class CombineItem(Part):
    """How several deltas combine: a method's name, or a mapping with its parameters. `ties` is {method: ties}."""

    method: str = "linear"
    density: float | None = None
    seed: int | None = None
    rank: int | None = None

    @model_validator(mode="after")
    def known(self) -> CombineItem:
        _ = self.checked  # an unknown method or a parameter it has not is told now
        return self

    @property
    def checked(self) -> Combine:
        return combine_named(self.method, self.density, self.seed, self.rank)


class Quantize(Part):
    """Scheme of the weights. `layers` overrides it by fused-matrix pattern, the last match wins: {"lm_head": int8-g32}.

    calibration: builtin, recipe (rows of evaluate.data that are not scored), or a file of text or JSONL (chats or texts); only methods that look at
    activations, smooth, tune and auto read it. smooth: fold loud inputs of a decoder's matrices into their weights first (compiler.quantizers.smooth).
    tune: train against the float model on the same text: codes (compiler.quantizers.blockwise), or scales with codes as they are (compiler.quantizers.tune).
    prompts: a second graph that reads prompts in 8-bit integers (compiler.graph.decoder).
    """

    scheme: str = "int4-g64"
    method: Literal["rtn", "search", "imatrix", "gptq"] = "rtn"
    calibration: str = "builtin"
    smooth: bool = False
    tune: Literal["codes", "scales"] | None = None
    prompts: Literal["int8-rows"] | None = None
    layers: Mapping[str, str] = Field(default_factory=dict)

    @property
    def auto(self) -> bool:
        """Whether rows are chosen by matrix for a target's limits (compiler.auto); `layers` are then what stays as written."""
        return self.scheme == "auto"

    @property
    def chosen_later(self) -> bool:
        """Whether the words name no scheme before the model, or the target too, is known: `auto`, `as-is` (compiler.stages.keep)."""
        return self.scheme in ("auto", "as-is")

    @property
    def fixed(self) -> dict[str, Scheme]:
        return {pattern: parse_scheme(text, f"quantize.layers.{pattern}") for pattern, text in self.layers.items()}

    @property
    def schemes(self) -> Schemes:
        """The schemes as written. Raises RecipeError where they are chosen later."""
        return Schemes(parse_scheme(self.scheme), self.fixed)


class Evaluate(Part):
    """Data to compare the bundle with the merged fp32 model on (compiler.evaluation.data lists the forms of rows).

    noise    kinds of noise to evaluate the same data with: names of rows of `compiler.evaluation.noise.NOISES`, or `all`
    control  data outside of the task that the deltas were trained for, or `builtin`
    custom   metrics of the user's own: name -> `module:function`, or an entry point of the group trimtab.metrics
    """

    data: str | None = None  # None: the built-in text
    metrics: Sequence[str] = ()
    limit_rows: int | None = Field(default=None, ge=1)
    noise: Sequence[str] | Literal["all"] = ()
    control: str | None = None
    custom: Mapping[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")], str] = Field(default_factory=dict)

    @field_validator("metrics")
    @classmethod
    def known(cls, metrics: Sequence[str]) -> Sequence[str]:
        for name in metrics:
            quantity(name, "evaluate.metrics")
        return metrics

    @field_validator("noise")
    @classmethod
    def known_noise(cls, noise: Sequence[str] | str) -> Sequence[str] | str:
        for name in noise if noise != "all" else ():
            if name not in NOISES:
                expected = f"all, or some of {', '.join(NOISES)}"
                raise RecipeError("evaluate.noise", expected=expected, found=repr(name), remedy=nearest(name, NOISES))
        return noise

    @property
    def noises(self) -> tuple[str, ...]:
        return tuple(NOISES) if self.noise == "all" else tuple(self.noise)

    def has(self, name: str) -> bool:
        """Whether what a limit needs is evaluated: `typos.kl_mean` needs that noise, `control.kl_mean` a control set, `custom.polite` that function."""
        data, metric = needed_data(name), bare(name)
        own = metric.removeprefix("custom.").removesuffix("_drop") if CUSTOM.fullmatch(metric) else None
        there = bool(self.control) if data == CONTROL else bool(self.noises) if data == EVERY_NOISE else not data or data in self.noises
        return there and (own is None or own in self.custom or metric.removeprefix("custom.") in self.custom)


class TargetItem(Part):
    """A machine and what the bundle must not exceed on it."""

    profile: str = "here"
    limits: Mapping[str, float] = Field(default_factory=dict)
    scenarios: Scenarios = Scenarios()

    @field_validator("limits")
    @classmethod
    def known_and_finite(cls, limits: Mapping[str, float]) -> Mapping[str, float]:
        for name, value in limits.items():
            place, positive = f"targets.limits.{name}", quantity(name, f"targets.limits.{name}").unit in COST_UNITS
            if not math.isfinite(value) or (positive and value <= 0):
                expected = "a finite number above 0" if positive else "a finite number"
                raise RecipeError(place, expected=expected, found=str(value), remedy="write the limit as a plain number", code="RECIPE_VALUE")
        return limits


class Recipe(Part):
    """The whole recipe; see docs/recipe.md for every key."""

    name: Name
    base: str
    deltas: Deltas = Deltas()
    combine: CombineItem = CombineItem()
    distil: Distil | None = None
    quantize: Quantize = Quantize()
    evaluate: Evaluate = Evaluate()
    targets: Sequence[TargetItem] = (TargetItem(),)
    cost: Cost = Cost()
    task: str | None = None
    max_length: int | None = Field(default=None, ge=16)
    seed: int = 0

    _folder: Path = Path()

    @model_validator(mode="after")
    def nothing_to_combine(self) -> Recipe:
        if self.deltas.mode == "attached" and self.combine != CombineItem():
            found = f"{self.combine.method!r} with deltas.mode attached"
            raise RecipeError("combine", expected="nothing: attached deltas are not combined", found=found, remedy="remove combine, or mode")
        return self

    @model_validator(mode="after")
    def limits_have_what_measures_them(self) -> Recipe:
        for item in self.targets:
            for name in item.limits:
                item.scenarios.require(name)
                if not self.evaluate.has(name):
                    key = "custom" if bare(name).startswith("custom.") else CONTROL if needed_data(name) == CONTROL else "noise"
                    found = "nothing that measures it"
                    raise RecipeError(f"targets.limits.{name}", expected=f"what it needs under evaluate.{key}", found=found, remedy=f"add evaluate.{key}")
        return self

    @field_validator("deltas", mode="before")
    @classmethod
    def listed(cls, deltas: Any) -> Any:
        return {"items": deltas} if isinstance(deltas, (list, tuple)) else deltas

    @field_validator("combine", mode="before")
    @classmethod
    def named(cls, combine: Any) -> Any:
        return {"method": combine} if isinstance(combine, str) else combine

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self._folder


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Recipe from a YAML file, with `key.path=value` settings laid over it. Raises RecipeError."""
    raw = read_yaml(path)
    for setting in settings:
        _override(raw, setting)
    return parse_recipe(raw, path)


def parse_recipe(raw: Mapping[str, Any], path: Path) -> Recipe:
    """Checked recipe from a mapping; `path` names it in messages and anchors its relative paths."""
    try:
        recipe = Recipe.model_validate(dict(raw))
    except ValidationError as error:
        raise _first_problem(error, path, listed=isinstance(raw.get("deltas"), list)) from error
    for target in {item.profile for item in recipe.targets if [t.profile for t in recipe.targets].count(item.profile) > 1}:
        raise RecipeError(f"{path}: targets", expected="each profile once", found=f"{target!r} twice", remedy="merge the two entries")
    _ = recipe.quantize.fixed if recipe.quantize.chosen_later else recipe.quantize.schemes  # an unknown scheme is told now, not after the merge
    recipe._folder = path.resolve().parent  # a private attribute: set once here, pydantic keeps it out of equality and dumps
    return recipe


def parse_part(part: type[PartOf], raw: Mapping[str, Any], name: str) -> PartOf:
    """One section of a recipe that came from elsewhere, such as options. Raises RecipeError that names keys as in a recipe: `distil.layers`."""
    try:
        return part.model_validate(dict(raw))
    except ValidationError as error:
        raise _first_problem(error, Path(name), inside=(name,)) from error


def parse_limits(settings: Sequence[str]) -> dict[str, float]:
    """`["tpot_p95_ms=12"]` -> {"tpot_p95_ms": 12.0}. Raises RecipeError for unknown names and numbers that are not finite."""
    limits: dict[str, Any] = {}
    for setting in settings:
        key, _separator, text = setting.partition("=")
        try:
            limits[key] = float(text)
        except ValueError as error:
            raise RecipeError(f"--limit {setting}", expected="key=number", found=repr(text or setting), remedy="for example --limit size_mb=90") from error
    try:
        return dict(TargetItem(limits=limits).limits)
    except ValidationError as error:
        raise _first_problem(error, Path("--limit")) from error


def parse_scenarios(settings: Sequence[str], known: Mapping[str, Any], limits: Mapping[str, float]) -> Scenarios:
    """`["server.rate_per_s=2"]` laid over known scenarios. Raises RecipeError for what is none, and for a limit of a scenario that is not there."""
    raw: dict[str, Any] = copy.deepcopy(dict(known))
    for setting in settings:
        _override(raw, setting, "--scenario")
    try:
        found = Scenarios.model_validate(raw)
    except ValidationError as error:
        raise _first_problem(error, Path("--scenario"), inside=("scenarios",)) from error
    for name in limits:
        found.require(name, "--scenario")
    return found


def _override(raw: dict[str, Any], setting: str, option: str = "--set") -> None:
    """`quantize.scheme=int4-g32` or `targets.0.limits.size_mb=90` laid over the raw mapping."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise RecipeError(f"{option} {setting}", expected="key.path=value", found="no `=`", remedy="for example --set quantize.scheme=int4-g32")
    node: Any = raw
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"{option} {setting}", expected=f"a mapping or a list entry at {part!r}", found=type(node).__name__, remedy="check the path")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{option} {setting}", expected="a YAML value", found=repr(text), remedy="quote the value") from error
    if isinstance(node, list) and parts[-1].isdigit() and int(parts[-1]) < len(node):
        node[int(parts[-1])] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise RecipeError(f"{option} {setting}", expected=f"a key at {parts[-1]!r}", found=type(node).__name__, remedy="check the path")


def _first_problem(error: ValidationError, path: Path, listed: bool = False, inside: tuple[str, ...] = ()) -> RecipeError:
    """pydantic's first complaint in our words: path, expected, found, remedy. listed: the user wrote `deltas` as a list. inside: the part
    of a recipe that was read alone."""
    first, *others = error.errors()
    unknown = [one for one in others if one["type"] == "extra_forbidden" and one["loc"][:-1] == first["loc"][:-1]]
    problem = unknown[0] if first["type"] == "missing" and unknown else first  # a key that is missing may be the one that is misspelt
    parts = [str(part) for number, part in enumerate(problem["loc"]) if not (listed and number == 1 and problem["loc"][:2] == ("deltas", "items"))]
    place = f"{path}: {'.'.join(parts) or 'recipe'}"
    found = repr(problem["input"]) if not isinstance(problem["input"], (dict, list)) else type(problem["input"]).__name__
    if problem["type"] == "extra_forbidden":
        siblings = _keys_at((*inside, *problem["loc"][:-1]))
        key = str(problem["loc"][-1])
        return RecipeError(place, expected=f"one of {', '.join(siblings)}", found=f"unknown key {key!r}", remedy=nearest(key, siblings), code="RECIPE_KEY")
    if problem["type"] == "missing":
        return RecipeError(place, expected="this key", found="nothing", remedy="add it; see docs/recipe.md")
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return RecipeError(place, expected=expected, found=found, remedy="see docs/recipe.md for what this key takes", code="RECIPE_VALUE")


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """The keys that may stand at a location such as ("targets", 0)."""
    model: type[BaseModel] = Recipe
    rooms: dict[str, type[BaseModel]] = {
        "deltas": Deltas,
        "items": DeltaItem,
        "combine": CombineItem,
        "quantize": Quantize,
        "evaluate": Evaluate,
        "targets": TargetItem,
        "scenarios": Scenarios,
        "server": Server,
        "batch": Batch,
        "cold_start": ColdStart,
        "cost": Cost,
        "distil": Distil,
        "alternative": Alternative,
    }
    for part in location:
        model = rooms.get(str(part), model)
    return sorted(model.model_fields)
