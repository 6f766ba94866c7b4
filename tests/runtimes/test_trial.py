"""Templates and tokenizers that take too much, and that they take it from a process that may lose it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtimes import trial
from targets.errors import BundleError

GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_a_plain_template_and_tokenizer_pass(byte_tokenizer: Any) -> None:
    trial.try_files(GOOD, {"bos_token": "<s>"}, byte_tokenizer.to_str(), "model")


@pytest.mark.parametrize(
    ("code", "template"),
    [
        ("TEMPLATE_UNSAFE", "{{ ''.__class__.__mro__ }}"),
        ("TEMPLATE_LIMIT", "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"),
        ("TEMPLATE_LIMIT", "{{ 'x' | center(10 ** 10) }}"),
        ("TEMPLATE", "{{ raise_exception('never') }}"),
        ("TEMPLATE", "{% for %}"),
    ],
)
def test_hostile_templates(code: str, template: str) -> None:
    with pytest.raises(BundleError) as caught:
        trial.try_files(template, {}, "", "model")
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_a_regular_expression_that_takes_for_ever(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(byte_tokenizer.to_str())
    told["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"(?=(a+)+b)(a|a)*c"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(BundleError) as caught:
        trial.try_files("", {}, json.dumps(told), "model")
    assert caught.value.code in ("TOKENIZER_LIMIT", "TOKENIZER_JSON")


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(BundleError) as caught:
        trial.try_files("", {}, "{}", "model")
    assert caught.value.code == "TOKENIZER_JSON"
