"""Reading text that people write: strict YAML, and the nearest known word for an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from compiler.errors import RecipeError

SIZE_LIMIT_BYTES = 1 << 20
DEPTH_LIMIT = 32


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'scheme'?`, or the known words when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def default_name(path: str) -> str:
    """The last part of a path in the characters of a name: `adapters/support` -> `support`, `x/My delta.safetensors` -> `My-delta`."""
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1].removesuffix(".safetensors").removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:64] or "delta"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without the three things that surprise: duplicate keys, aliases and explicit tags."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if self.depth > DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(problem=f"more than {DEPTH_LIMIT} levels", problem_mark=event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)  # type: ignore[arg-type]  # the C and the Python mark are alike
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"explicit tag {event.tag} is not allowed", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError with line and column for anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(str(path), expected="a readable file", found=error.strerror or type(error).__name__, remedy="check the path") from error
    if len(data) > SIZE_LIMIT_BYTES:
        raise RecipeError(str(path), expected=f"at most {SIZE_LIMIT_BYTES} bytes", found=f"{len(data)} bytes", remedy="this is no recipe", code="YAML_UNSAFE")
    try:
        value = yaml.load(data, _StrictLoader)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        found = (getattr(error, "problem", None) or str(error) or type(error).__name__).splitlines()[0]
        raise RecipeError(where, expected="plain YAML", found=found, remedy="correct that line", code="YAML_UNSAFE") from error
    if not isinstance(value, dict):
        raise RecipeError(str(path), expected="a mapping of keys to values", found=type(value).__name__, remedy="see docs/recipe.md")
    return value
