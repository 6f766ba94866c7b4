"""Templates and tokenizers that take too much, and that they take it from a process that may lose it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtimes import trial
from targets.errors import BundleError

LESS = trial.MEMORY_BYTES // 2
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


def test_a_lower_limit_of_the_machine_is_kept() -> None:
    def less() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LESS, LESS))

    program = "from runtimes.trial import try_files; try_files('{{ 1 }}', {}, '', 'model')"
    subprocess.run([sys.executable, "-c", program], preexec_fn=less, cwd=Path(__file__).parents[2], check=True)


def test_a_process_that_cannot_start_is_not_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(BundleError, match="ulimit -v") as caught:
        trial.try_files(GOOD, {}, "", "model")
    assert caught.value.code == "MEMORY"
