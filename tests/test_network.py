"""Nothing leaves the machine: a whole compile and a run of its bundle, in processes in which a socket is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from targets.telemetry import SWITCHES

ROOT = Path(__file__).parents[1]

# connecting and looking up a name end the process with 77
GUARD = """
import sys
def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        sys.stderr.write(f"NETWORK {event} {arguments}\\n")
        import os
        os._exit(77)
sys.addaudithook(forbid)
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ORT_", "DO_NOT_TRACK"))}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", GUARD + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, "PYTHONPATH": paths, **environment})


def test_the_guard_sees_a_socket() -> None:
    assert run("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)").returncode == 77


def test_compiling_and_running_opens_no_socket(tiny_llama: Path, tiny_lora: Path, tmp_path: Path) -> None:
    """Python's hooks see every socket that Python code opens; native code they do not see, and that it stays silent is onnxruntime's and torch's word."""
    recipe = {"name": "tiny", "base": str(tiny_llama), "deltas": [{"path": str(tiny_lora)}], "quantize": {"scheme": "int8-g32"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "targets": [{"profile": "here", "limits": {"size_mb": 5}}]}))
    quick = "from compiler import judge\njudge.MEASURE_SECONDS, judge.FRESH_PROCESSES = 1.0, 1\nfrom compiler.cli import main\n"
    out = str(tmp_path / "out")
    done = run(quick + "main(sys.argv[1:])", "compile", str(tmp_path / "recipe.yaml"), "--out", out, TRIMTAB_CACHE=str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    told = run("from compiler.cli import main\nmain(sys.argv[1:])", "run", f"{out}/tiny-here", "Say 3.", "--max-new-tokens", "3", "--json")
    assert told.returncode == 0 and "NETWORK" not in told.stderr, told.stderr


def test_telemetry_of_dependencies_is_off_before_they_are_imported() -> None:
    code = """
order = []
sys.addaudithook(lambda event, arguments: order.append(arguments[0]) if event == "import" else None)
import os
from compiler.cli import main
try: main(["--help"])
except SystemExit: pass
heavy = {"onnxruntime", "transformers", "huggingface_hub", "torch"} & set(order)
print(not heavy and all(os.environ.get(name) == "1" for name in sys.argv[1:]))
"""
    done = run(code, *SWITCHES)
    assert done.stdout.splitlines()[-1] == "True", done.stdout + done.stderr
    one = "from runtimes.session import open_session\nfrom pathlib import Path\nimport os\ntry: open_session(Path('none.onnx'))\nexcept Exception: pass\n"
    done = run(one + "print(os.environ.get('ORT_DISABLE_TELEMETRY'))")
    assert done.stdout.splitlines()[-1] == "1", done.stdout + done.stderr


def test_a_path_that_exists_asks_no_hub(tiny_llama: Path) -> None:
    done = run("from compiler.cli import main\nmain(sys.argv[1:])", "inspect", str(tiny_llama), "--json")
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr
