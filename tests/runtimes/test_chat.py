"""Chat templates: golden prompts, the same text as transformers, and what a hostile template may not do."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from runtimes.chat import OUTPUT_CAP_CHARS, render_chat
from targets.errors import BundleError

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}
{% for message in messages %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' -}}
{% endif %}"""
MESSAGES = [{"role": "user", "content": " Hello <b>&</b> "}, {"role": "assistant", "content": "ポンプ"}]


def test_golden_prompt() -> None:
    text = render_chat(CHATML, MESSAGES)
    assert text == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHello <b>&</b><|im_end|>\n<|im_start|>assistant\nポンプ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(CHATML, MESSAGES, add_generation_prompt=False) == text.removesuffix("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s> Hello <b>&</b> "),
        ("{{ messages | tojson }}", '[{"role": "user", "content": " Hello <b>&</b> "}, {"role": "assistant", "content": "ポンプ"}]'),
        ("{{ {'b': 1, 'a': [1]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    1\n  ]\n}'),
        ("{% generation %}a{{ bos_token }}{% endgeneration %}b", "a<s>b"),
        ("{{ strftime_now('%d %b %Y') }}", "21 Nov 2026"),
        ("{% if tools %}no{% endif %}{% if missing is defined %}no{% endif %}ok", "ok"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for m in messages[::-1] %}{{ m.role }};{% endfor %}", "assistant;user;"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% else %}none{% endfor %}", "1/1True"),
        ("{% for key, value in {'a': 1}.items() %}{{ key ~ '=' ~ value ~ none }}{% endfor %}", "a=1None"),
        ("{% for m in messages | map(attribute='role') %}{{ m }}{{ '' if loop.last else ',' }}{% endfor %}", "user,assistant"),
        ("{% for m in nothing %}x{% else %}empty{% endfor %}{{ 2 * 3 + 2 ** 3 }}", "empty14"),
        ("{% macro show(m) %}[{{ m.role }}]{% endmacro %}{{ show(messages[0]) }}", "[user]"),
    ],
)
def test_what_a_template_may_use(template: str, expected: str) -> None:
    assert render_chat(template, MESSAGES, variables={"bos_token": "<s>"}, now=datetime(2026, 11, 21)) == expected


def test_the_same_text_as_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools: list[Any] = [{"type": "function", "function": {"name": "stop", "parameters": {}}}]
    template = CHATML + "{% for tool in tools or [] %}\n  {{ tool | tojson(indent=4) }}\n{% endfor %}{% generation %}x{% endgeneration %}"
    theirs = render_jinja_template([MESSAGES], chat_template=template, tools=tools, add_generation_prompt=True)[0][0]
    assert render_chat(template, MESSAGES, variables={"tools": tools}) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) | map('string') %}{% for b in range(9999) | select %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='xy') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='xy') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ [0] * 100000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}",
    ],
)
def test_a_hostile_template_is_refused(template: str) -> None:
    with pytest.raises(BundleError, match=r"chat template: .*(unsafe|SecurityError)"):
        render_chat(template, MESSAGES)
    assert OUTPUT_CAP_CHARS < 1000 * 100000


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[5].content + 'x' }}", "Undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_fails_says_why_in_one_line(template: str, found: str) -> None:
    with pytest.raises(BundleError, match=found) as caught:
        render_chat(template, MESSAGES)
    assert "\n" not in str(caught.value)
