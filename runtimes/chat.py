"""Chat templates, rendered as transformers renders them, in a sandbox with a budget.

A template comes from outside and is a program. Three rules:

1. jinja2's ImmutableSandboxedEnvironment: no private attributes, no changes to what is passed in.
2. A budget: steps of all loops together, the size of what +, ~, * and ** make, and the length of the output are bounded. (Memory that a filter
   takes, as in 'x' | center(10**9), is not: where templates of strangers are rendered, do so in a process with a limit.)
3. Whatever it raises reaches the user as one line that names the template.

What a template may use is what transformers offers (transformers.utils.chat_template_utils): trim_blocks, lstrip_blocks, loop controls,
{% generation %}, the filter tojson, the functions raise_exception and strftime_now.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from targets.errors import BundleError

OUTPUT_CAP_CHARS = 8 << 20
LOOP_STEPS = 1_000_000
SIZE_CAP = 4 << 20  # characters or elements of what +, ~ and * make


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _OverBudget(SecurityError):
    """Rule 2 is broken."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which bounds one range() but neither loops within loops nor texts that double, with a budget for both."""

    intercepted_binops = frozenset(("*", "**", "+"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.steps_left = LOOP_STEPS
        self.filters.update(tojson=_tojson, _counted=self._counted, _joined=_joined)
        self.globals["raise_exception"] = _raise_exception

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The syntax tree, with every loop's values sent through `_counted` and every `a ~ b` through `_joined`."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None)
        for join in list(tree.find_all(nodes.Concat)):
            join.nodes = [nodes.Filter(nodes.List(join.nodes), "_joined", [], [], None, None)]
        return tree

    def _counted(self, values: Any) -> Any:
        """The same values, paid for: a sized collection at once and as it is, an iterator as it runs."""
        if hasattr(values, "__len__"):
            self._pay(len(values))
            return values
        return self._paid(values)

    def _paid(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._pay(1)
            yield value

    def _pay(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise _OverBudget(f"more than {LOOP_STEPS} steps of loops")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(left, (int, float)) and isinstance(right, (int, float)) and abs(left) <= 1024 and abs(right) <= 64):
            raise _OverBudget("a power that large is not allowed")
        sized = [isinstance(side, (str, list, tuple)) for side in (left, right)]
        if operator == "*" and any(sized):
            size = (len(left) if sized[0] else left) * (len(right) if sized[1] else right)
            if isinstance(size, (int, float)) and size > SIZE_CAP:
                raise _OverBudget(f"a repetition of more than {SIZE_CAP} elements is not allowed")
        if operator == "+" and all(sized) and len(left) + len(right) > SIZE_CAP:
            raise _OverBudget(f"a sum of more than {SIZE_CAP} elements is not allowed")
        return super().call_binop(context, operator, left, right)


def _joined(parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > SIZE_CAP:
        raise _OverBudget(f"a text of more than {SIZE_CAP} characters is not allowed")
    return "".join(texts)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # jinja2's own tojson escapes for HTML, which would put < into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
) -> str:
    """The prompt of a conversation.

    messages   [{"role": "user", "content": "Hello"}, ...]
    variables  what else the template may read: bos_token, eos_token, tools, enable_thinking ...
    now        the clock of strftime_now; the present when None

    Raises BundleError when the template is wrong, unsafe, or exceeds its budget.
    """
    sandbox = _Sandbox()
    sandbox.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
    values = {
        "tools": None,
        "documents": None,
        **(variables or {}),
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    written, length = [], 0
    try:
        for piece in sandbox.from_string(template).generate(values):
            length += len(piece)
            if length > OUTPUT_CAP_CHARS:
                raise _OverBudget(f"an output of more than {OUTPUT_CAP_CHARS} characters")
            written.append(piece)
    except SecurityError as error:
        raise BundleError(
            "chat template",
            expected="a template that only reads its messages",
            found=f"unsafe: {error}",
            remedy="do not use this bundle's chat template",
            code="TEMPLATE_LIMIT" if isinstance(error, _OverBudget) else "TEMPLATE_UNSAFE",
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise BundleError(
            "chat template", expected="a template that renders these messages", found=found, remedy="change the messages or the template", code="TEMPLATE"
        ) from error
    return "".join(written)
