"""What the headline says about chance: only exact tests may promise a probability."""

from dataclasses import asdict

from compiler.report.summary import summary_line
from compiler.report.verdict import PASS, Check, Verdict

EXACT = Check("ttft_p90_ms", 300.0, "ms", 400.0, PASS, 51, 290.0, 310.0, 0.995, 0.0046)
ROUGH = Check("kl_mean", 0.06, "nats", 0.2, PASS, 485, 0.04, 0.09, 0.95, None)
PLAIN = Check("size_mb", 88.0, "MB", 95.0, PASS)


def line(*checks: Check) -> str:
    verdict = Verdict("here", checks)
    return summary_line({"schema": 1, "name": "m", "verdict": {**verdict.as_dict(), "checks": [asdict(check) for check in checks]}})


def test_exact_tests_promise_their_probability() -> None:
    assert "If one were really missed, the chance of this pass would be at most 0.46 %." in line(EXACT, PLAIN)


def test_bootstraps_are_named_as_approximate_and_promise_nothing() -> None:
    both = line(EXACT, ROUGH, PLAIN)
    assert "Of those tested exactly" in both and "1 rests on an interval that is approximate (bootstrap)." in both
    alone = line(ROUGH, PLAIN)
    assert "chance" not in alone and "approximate" in alone
