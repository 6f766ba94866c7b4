"""The peers' models, each made by the peer's own tool from the same merged float32 weights, and kept beside the environments.

`reference` writes the weights of a bundle's lineage as a checkpoint that transformers reads; `make` turns it into a form. A folder is named after the
digest of the weights: another bundle of the same weights finds them again. Each is written beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compiler.bench.child import file_bytes
from compiler.bench.peers import environments, python_of
from compiler.errors import BenchError
from compiler.sources import Mixture, mixture_of
from compiler.store import cache_key

CHECKPOINT = "checkpoint"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Form:
    """How a form is made: env of the tool, its command (words with {source}, {f32}, {out}, {work}, {tools}), and which files are its size."""

    env: str
    command: tuple[str, ...]
    files: tuple[str, ...]
    file: str = ""  # the model is this file in the folder; "" for the folder itself
    after: str = ""  # another form that must be there first: its model is {f32}


PYTHON = "{python}"
CONVERT = (sys.executable, "{env}/convert/convert_hf_to_gguf.py", "{source}", "--outtype", "f32", "--outfile", "{out}/model.gguf")
OPENVINO = (PYTHON, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", "{source}", "--task", "{task}", "{out}", "--weight-format")
GENAI = (PYTHON, "-m", "onnxruntime_genai.models.builder", "-i", "{source}", "-o", "{out}", "-p", "int4", "-e", "cpu", "-c", "{work}/cache")
GENAI_OPTIONS = ("int4_accuracy_level=4", "int4_block_size=32", "int4_algo_config=k_quant", "shared_embeddings=true")
GGUF_FILES, OPENVINO_FILES = ("*.gguf",), ("openvino_model.*",)


def _gguf(kind: str) -> Form:
    return Form("llama.cpp", ("{env}/tools/llama-quantize", "{f32}", "{out}/model.gguf", kind, "2"), GGUF_FILES, "model.gguf", "gguf-f32")


FORMS: Mapping[str, Form] = {
    CHECKPOINT: Form("", (), ("*.safetensors",)),
    "gguf-f32": Form("llama.cpp", CONVERT, GGUF_FILES, "model.gguf"),
    "gguf-q4_0": _gguf("q4_0"),
    "gguf-q4_k_m": _gguf("q4_k_m"),
    "gguf-q8_0": _gguf("q8_0"),
    "openvino-fp32": Form("openvino", (*OPENVINO, "fp32"), OPENVINO_FILES),
    "openvino-int8": Form("openvino", (*OPENVINO, "int8"), OPENVINO_FILES),
    "openvino-int4": Form("openvino", (*OPENVINO, "int4", "--group-size", "64", "--ratio", "1.0"), OPENVINO_FILES),
    "genai-int4": Form("ort-genai", (*GENAI, "--extra_options", *GENAI_OPTIONS), ("model.onnx*",)),
}


def home(digest: str) -> Path:
    """The folder of all forms of some weights."""
    return environments() / "models" / digest[:16]


def reference(manifest: Mapping[str, Any], source: str | None, say: Progress) -> Path:
    """The bundle's merged weights as a float32 checkpoint on disk.

    source  the recipe that the bundle was compiled from, or its base, when what the lineage names is not found from here
    Raises BenchError when base or deltas are not those of the lineage.
    """
    from compiler.checkpoints.write import write_checkpoint

    wanted = contents(manifest["lineage"])
    place = home(cache_key(wanted)) / CHECKPOINT
    if not (place / "config.json").is_file():
        sources = _mixture(manifest["lineage"], source).open()
        if contents(sources.lineage) != wanted:
            expected, remedy = "the base and deltas that the bundle was made from", "name the recipe it was compiled from with --source"
            raise BenchError("the bundle's lineage", expected=expected, found="other contents", remedy=remedy)
        say("the merged weights in float32")
        with _beside(place) as work:
            write_checkpoint(sources.merged, work, dtype="F32")
    return place


def contents(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the merged weights, without names and paths."""
    deltas = [{key: row.get(key) for key in ("kind", "weight", "digest", "select")} for row in lineage["deltas"]]
    return {"base": lineage["base"]["digest"], "deltas": deltas, "combine": lineage["combine"], "select": lineage.get("select")}


def _mixture(lineage: Mapping[str, Any], source: str | None) -> Mixture:
    from compiler.recipe import load_recipe, parse_recipe

    if source and source.endswith((".yaml", ".yml")):
        return mixture_of(load_recipe(Path(source)))
    if "recipe" in lineage:
        mixture = mixture_of(parse_recipe(lineage["recipe"], Path("recipe.yaml")))
        return replace(mixture, base=source) if source else mixture
    return Mixture(source or lineage["base"]["origin"])


def make(form: str, checkpoint: Path, task: str, say: Progress) -> Path:
    """The model of a form, made when it is not there: a file or a folder. Raises BenchError with the tool's last words."""
    row = FORMS[form]
    place = checkpoint.parent / form
    model = place / row.file if row.file else place
    if form == CHECKPOINT or place.is_dir():
        return model
    python = python_of(row.env)
    f32 = make(row.after, checkpoint, task, say) if row.after else Path()
    say(f"{form}, by its own tool")
    with _beside(place) as out, tempfile.TemporaryDirectory(prefix="trimtab-bench-") as work:
        words = {"python": python, "env": environments() / row.env, "source": checkpoint, "f32": f32, "out": out, "work": work, "task": task}
        _run([word.format(**words) for word in row.command], row.env)
    return model


def model_bytes(form: str, model: Path) -> int:
    """Bytes of what must be shipped of a model, without tokenizer and configs where they are files of their own."""
    return file_bytes(model, FORMS[form].files)


def _run(command: list[str], env: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())[-600:]
        raise BenchError(
            f"peer {env}: {Path(command[0]).name}", expected="a model", found=f"exit code {done.returncode}: {words}", remedy="see the tool's own documentation"
        )


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A folder that becomes `place` when the block ends well, and goes when it does not."""
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield work
        work.chmod(0o755)
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
