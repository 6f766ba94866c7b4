"""Rules of the house that no single module can keep: import direction, start-up, what the wheel holds, generated docs."""

import ast
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("targets", "runtimes", "compiler")
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "peft", "optimum"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def importers(folder: str, forbidden: set[str]) -> list[str]:
    """Files below `folder` that import a forbidden module or something in it."""
    bad = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        hits = {name for name in imports(path) if any(name == bar or name.startswith(bar + ".") for bar in forbidden)}
        bad += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
    return bad


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("targets", {"runtimes", "compiler"} | HEAVY),
        ("runtimes", {"compiler"} | HEAVY),
        ("compiler/deltas", {"compiler.stages", "compiler.pipeline", "compiler.cli"}),
        ("compiler/quantizers", {"compiler.stages", "compiler.pipeline", "compiler.cli"}),
        ("compiler/graph", {"compiler.stages", "compiler.pipeline", "compiler.cli"}),
        ("compiler/checkpoints", {"compiler.stages", "compiler.pipeline", "compiler.cli"}),
        ("compiler/stages", {"compiler.pipeline", "compiler.judge", "compiler.cli"}),
    ],
)
def test_imports_point_one_way(folder, forbidden):
    assert importers(folder, forbidden) == []


def test_only_what_runs_a_job_calls_stages():
    callers = {line.split(":")[0] for line in importers("compiler", {"compiler.stages"})}
    callers = {caller for caller in callers if not caller.startswith("compiler/stages/")}
    assert callers <= {
        f"compiler/{name}.py" for name in ("pipeline", "prepare", "sources", "judge", "rebuild", "model_tools", "delta_tools", "commands", "attached")
    }


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; sys.argv = ['trimtab', '--help']\nfrom compiler.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(time.perf_counter() - started)
    loaded = set(done.stderr.split())
    assert not loaded & (HEAVY | {"numpy", "onnxruntime", "pydantic", "yaml"})
    assert "Example" in done.stdout
    assert min(seconds) < 0.3  # the promise itself; the best of five, so that a busy neighbour cannot break the build


def test_every_command_shows_an_example():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate import cli, commands
    finally:
        sys.path.pop(0)
    assert [name for name, command in commands(cli, "trimtab") if "Example:" not in (command.help or "")] == []


def test_command_reference_is_what_help_says():
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_exactly_the_three_packages(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack stale files from there
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(PACKAGES)
    assert {"compiler/data/builtin.txt", "compiler/report/templates/report.schema.json"} <= set(names)
    assert any(name.startswith("targets/profiles/") for name in names)


def test_no_other_distribution_claims_our_names():
    owners = packages_distributions()
    assert {name: owners[name] for name in PACKAGES if name in owners and set(owners[name]) != {"trimtab"}} == {}
