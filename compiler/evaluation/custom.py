"""Metrics of the user's own: a function `metric(row, output) -> number` for each row, found by an entry point or as `module:function`.

    evaluate:
      custom: {politeness: "my_metrics:politeness"}     my_metrics.py lies beside the recipe, or is installed
      custom: {politeness: politeness}                  an entry point of the group `trimtab.metrics`

row is the object as it stands in the data. output depends on the form of the row:

    chat                      the answer, text
    choices                   log-likelihood of each choice, nats
    continuation              log-likelihood of the continuation, nats
    text, with an encoder     the model's output: vector or logits, a list of numbers
    pair, with an encoder     cosine of both vectors

Greater is better; where less is better the function returns the negative, as scikit-learn's scorers do. The function is called for base, merged model and
bundle with the same rows. What it raises or returns besides a finite number is an error that names the function, its line and the row.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.errors import RecipeError, TrimtabError
from compiler.text import nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = "trimtab.metrics"


@dataclass(frozen=True)
class Custom:
    """One metric: its name in the recipe, the function, and what identifies the function's code for the cache."""

    name: str
    function: Callable[[Mapping[str, Any], Any], Any]
    identity: str

    def values(self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> list[float]:
        """One number a row. Raises TrimtabError for what the function raises and for what is no finite number."""
        return [self._value(number, row, output) for number, (row, output) in enumerate(zip(rows, outputs, strict=True), 1)]

    def _value(self, number: int, row: Mapping[str, Any], output: Any) -> float:
        place, expected = f"evaluate.custom.{self.name}: row {number}", "a finite number from the function"
        try:
            found = self.function(row, output)
        except Exception as error:  # whatever foreign code raises becomes one line with its place; nothing carries on
            remedy = f"correct the function at {_line_of(error, self.function)}"
            raise TrimtabError(place, expected=expected, found=f"{type(error).__name__}: {_short(error)}", remedy=remedy) from error
        try:
            value = float(found)
        except (TypeError, ValueError) as error:
            raise TrimtabError(place, expected=expected, found=f"a {type(found).__name__}", remedy=f"correct {_where(self.function)}") from error
        if not math.isfinite(value):
            raise TrimtabError(place, expected=expected, found=str(value), remedy=f"correct {_where(self.function)}")
        return value


def load_custom(named: Mapping[str, str], folder: Path) -> tuple[Custom, ...]:
    """The metrics of a recipe, imported. Raises RecipeError with the key that names what cannot be found or does not load."""
    return tuple(_load(name, text, folder) for name, text in named.items())


def _load(name: str, text: str, folder: Path) -> Custom:
    place = f"evaluate.custom.{name}"
    module, colon, function_name = text.partition(":")
    try:
        with importable(folder):
            if colon:
                found: Any = importlib.import_module(module)
                for part in function_name.split("."):
                    found = getattr(found, part)
            else:
                found = _entry_point(place, text).load()
    except TrimtabError:
        raise
    except ImportError as error:
        remedy = "install it, or lay the file beside the recipe"
        raise RecipeError(place, expected=f"a module that can be imported for {text!r}", found=_short(error), remedy=remedy) from error
    except AttributeError as error:
        raise RecipeError(place, expected=f"a function {text!r}", found=_short(error), remedy="check the name behind the colon") from error
    except Exception as error:  # importing runs foreign code
        found_text = f"{type(error).__name__}: {_short(error)}"
        raise RecipeError(place, expected=f"{text!r} to load", found=found_text, remedy="correct the module: it fails while it is imported") from error
    if not callable(found):
        raise RecipeError(place, expected="a function", found=f"a {type(found).__name__}", remedy=f"check what {text!r} is")
    return Custom(name, found, identity(found, text))


def _entry_point(place: str, name: str) -> Any:
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in points:
        remedy = nearest(name, points) if points else "write it as module:function, or install the package that has it"
        raise RecipeError(place, expected=f"an entry point of the group {GROUP}", found=repr(name), remedy=remedy)
    return points[name]


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported inside; those that are installed come first."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def identity(function: Any, text: str) -> str:
    """sha256 over the source file that holds the function: a changed file evaluates again."""
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        source = None
    content = Path(source).read_bytes() if source and Path(source).is_file() else repr(function).encode()
    return f"{text}@{hashlib.sha256(content).hexdigest()}"


def _where(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else repr(function)


def _line_of(error: BaseException, function: Any) -> str:
    """The innermost line of the traceback in the function's own file."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else _where(function)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or "no message"
