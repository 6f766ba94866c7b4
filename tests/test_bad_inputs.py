"""Every bad input of the first issue, through the command line: one line, exit code by contract, nothing half-written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

LIMITS = "targets: [{profile: here, limits: {size_mb: 5}}]\n"


@pytest.fixture
def base(tiny_llama, tmp_path):
    """A copy of the tiny model that a test may harm."""
    return shutil.copytree(tiny_llama, tmp_path / "base")


@pytest.fixture
def adapter(tiny_lora, tmp_path):
    return shutil.copytree(tiny_lora, tmp_path / "adapter")


@pytest.fixture
def refuses(trimtab, tmp_path):
    """refuses(expected code, fragments..., arguments) checks the promise as a whole."""

    def check(code, *fragments, arguments):
        before = {path for path in tmp_path.rglob("*") if "store" not in path.parts}
        got, stdout, stderr = trimtab(*arguments)
        errors = [line for line in stderr.splitlines() if line.startswith("trimtab: ") or "Error" in line]
        assert got == code, (got, stdout, stderr)
        assert len(errors) == 1 and "Traceback" not in stderr
        for fragment in fragments:
            assert fragment in errors[0], errors[0]
        left = {path for path in tmp_path.rglob("*") if "store" not in path.parts} - before
        assert left <= {tmp_path / "out"} and not list((tmp_path / "out").glob("*") if (tmp_path / "out").exists() else [])
        assert not list((tmp_path / "store").rglob("making-*"))

    return check


def export(base, tmp_path, *more):
    return ["export", base, "--scheme", "int4-g32", "--out", tmp_path / "out" / "onnx", *more]


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_safetensors(base, refuses, tmp_path):
    (base / "model.safetensors").unlink()
    refuses(1, "safetensors", arguments=export(base, tmp_path))


def test_truncated_safetensors(base, refuses, tmp_path):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(1, "model.safetensors", "expected", arguments=export(base, tmp_path))


def test_missing_tensor(base, refuses, tmp_path):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    refuses(1, "model.layers.1.mlp.up_proj.weight", arguments=export(base, tmp_path))


def test_adapter_for_another_base(base, adapter, refuses, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = {name: np.pad(value, ((0, 0), (0, 32))) if "lora_A" in name else value for name, value in load_file(file).items()}
    save_file(tensors, file)
    refuses(1, "the adapter is for another base", arguments=export(base, tmp_path, "--delta", adapter))


def test_adapter_that_matches_nothing(base, adapter, refuses, tmp_path):
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): value for name, value in load_file(file).items()}, file)
    refuses(1, "nothing matches", arguments=export(base, tmp_path, "--delta", adapter))


def test_adapter_that_is_not_finite(base, adapter, refuses, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, file)
    refuses(1, "finite", arguments=export(base, tmp_path, "--delta", adapter))


def test_unknown_architecture_names_the_known_and_the_other_road(base, refuses, tmp_path):
    edit_json(base / "config.json", model_type="mamba2", architectures=["Mamba2ForCausalLM"])
    refuses(1, "mamba2", "llama", "qwen3", "--task feature-extraction", arguments=export(base, tmp_path))


def test_unknown_recipe_key(base, refuses, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"name: x\nbase: {base}\nquantise: {{}}\n{LIMITS}")
    refuses(2, "unknown key 'quantise'", "did you mean 'quantize'?", arguments=["compile", tmp_path / "recipe.yaml", "--out", tmp_path / "out"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_remedy(base, refuses, tmp_path, name):
    (base / "model.safetensors").rename(base / name)
    refuses(1, "pickle", "safetensors", arguments=export(base, tmp_path))


def test_missing_tokenizer(base, refuses, tmp_path):
    (base / "tokenizer.json").unlink()
    refuses(1, "tokenizer.json", arguments=export(base, tmp_path))


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_limits_that_are_no_numbers(base, refuses, tmp_path, value):
    (tmp_path / "recipe.yaml").write_text(f"name: x\nbase: {base}\n{LIMITS.replace('5', value)}")
    refuses(2, "limits.size_mb: expected a finite number", arguments=["compile", tmp_path / "recipe.yaml", "--out", tmp_path / "out"])


def test_limit_option_that_is_no_number(refuses, tmp_path):
    refuses(2, "--limit", "finite", arguments=["validate", tmp_path, "--limit", "size_mb=nan"])


def test_no_such_base(refuses, tmp_path):
    refuses(1, "nowhere", arguments=export(tmp_path / "nowhere", tmp_path))


def test_dynamic_int8_is_refused_for_decoders(base, refuses, tmp_path):
    refuses(1, "forms for encoders", "use int8-g64", arguments=["export", base, "--scheme", "int8", "--out", tmp_path / "out" / "onnx"])


def test_a_bundle_that_is_none(refuses, tmp_path):
    refuses(1, "manifest.json", arguments=["verify", tmp_path])


def test_usage_errors_are_exit_2(trimtab):
    assert trimtab("compile")[0] == 2
    assert trimtab("no-such-command")[0] == 2


SMALL_FILES = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from compiler.cli import main
main(sys.argv[1:])
"""


def test_a_file_that_the_system_refuses_to_grow(base, tmp_path):
    """RLIMIT_FSIZE makes a real write fail in the middle of the weights, as a full disk would."""
    arguments = [str(argument) for argument in export(base, tmp_path)]
    done = subprocess.run([sys.executable, "-c", SMALL_FILES, *arguments], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "found File too large" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_no_space_left(base, tmp_path):
    """A real full disk where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        command = [sys.executable, "-m", "compiler", "export", str(base), "--scheme", "int4-g32", "--out", str(disk / "onnx")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert "found No space left on device; free space" in done.stderr.splitlines()[-1]
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
