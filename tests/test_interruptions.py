"""A few points of benchmarks/interruptions.py, which runs all of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "benchmarks" / "interruptions.py"


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="LD_PRELOAD and a C compiler")
def test_interrupted_anywhere_nothing_is_torn(tiny_llama, tiny_lora, tmp_path):
    sweeps = "kill:4,full:3,short:1,interrupt:1,terminate:1"
    command = [sys.executable, str(BENCH), "--sweeps", sweeps, "--base", str(tiny_llama), "--delta", str(tiny_lora), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = {row["sweep"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {name: row["tried"] for name, row in rows.items()} == {"kill": 4, "full": 3, "short": 1, "interrupt": 1, "terminate": 1}
    assert rows["kill"]["points"] > 100 and not any(row["broken"] for row in rows.values())
