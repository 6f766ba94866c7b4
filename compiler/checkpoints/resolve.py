"""`open_checkpoint`: from what a user writes to a `Checkpoint`.

path/to/folder                   safetensors, one file or shards, with config.json
path/to/model.gguf               GGUF
package:MODULE/path/inside       a file or folder of an installed package, found without importing it
owner/name                       a hub id, downloaded only when no such path exists
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from compiler.checkpoints.files import FolderAssets, read_json, sha256_file, sha256_parts
from compiler.checkpoints.packed import config_files, unpacked
from compiler.checkpoints.safetensors import file_tensors, sharded_tensors
from compiler.checkpoints.strict import check_files, check_tokenizer, safe_config
from compiler.checkpoints.view import Checkpoint
from compiler.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
ASSETS = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")


def open_checkpoint(source: str, *, relative_to: Path | None = None) -> Checkpoint:
    """The checkpoint that `source` names (forms above); a relative path starts at `relative_to`. Raises CheckpointError."""
    path = locate(source, relative_to)
    if path.is_dir():
        return open_folder(path, source)
    if path.suffix == ".gguf":
        from compiler.checkpoints.gguf import open_gguf

        return open_gguf(path, source)
    if path.suffix == ".safetensors":
        return open_folder(path.parent, source, weights=path.name)
    if any(path.match(pattern) for pattern in PICKLES):
        raise _pickle_refused(path)
    raise CheckpointError(source, expected="a folder with safetensors, or a .gguf file", found=f"a file named {path.name}", remedy="name the model's folder")


def locate(source: str, relative_to: Path | None = None) -> Path:
    """The file or folder that `source` names, downloaded where it is a hub id. Raises CheckpointError."""
    if source.startswith("package:"):
        return _package_path(source)
    path = (relative_to or Path()) / Path(source).expanduser()
    if path.exists():
        return path
    # a folder that exists up to the last part is a misspelt path: its name is nobody else's business
    if HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return _download(source)
    raise CheckpointError(
        source, expected="a model folder, a .gguf file, package:MODULE/path or a hub id owner/name", found="no such path", remedy="check the spelling"
    )


def _package_path(source: str) -> Path:
    module, _, inside = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise CheckpointError(
            source,
            expected="an installed package",
            found=f"no package {module!r}",
            remedy=f"pip install the distribution that holds {module}, for instance the demo extra",
        )
    roots = [Path(place).resolve() for place in places]
    for root in roots:
        path = (root / inside).resolve()
        if path.exists() and path.is_relative_to(root):
            return path
    raise CheckpointError(
        source, expected=f"a file or folder inside {module}", found=f"no {inside!r} there", remedy="list the package's files and correct the path"
    )


def _download(source: str) -> Path:
    """Only a text that is no path and looks like owner/name comes here: the one place that may use the network."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            source, expected="a local path, or huggingface_hub to download it", found="neither", remedy="pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        # httpx and requests raise OSError children or their own; hub wraps most as LocalEntryNotFoundError
        raise _hub_failed(source, error) from error
    except RuntimeError as error:
        raise _hub_failed(source, error) from error


def _hub_failed(source: str, error: BaseException) -> CheckpointError:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return CheckpointError(
        source,
        expected="an existing path, or a hub id that can be downloaded",
        found=reason,
        remedy="check the spelling, or download the model and name its folder",
    )


def open_folder(folder: Path, origin: str, weights: str | None = None) -> Checkpoint:
    """A folder with config.json and safetensors. weights: one file of it, otherwise found. Raises CheckpointError."""
    config_path = folder / "config.json"
    index = folder / "model.safetensors.index.json"
    if not config_path.is_file():
        raise CheckpointError(str(folder), expected="config.json", found="none", remedy="name the folder that holds the model's config.json")
    if weights is None and index.is_file():
        tensors, files = sharded_tensors(index)
    else:
        path = folder / weights if weights else _single_file(folder)
        tensors, files = file_tensors(path), [path]
    names = tuple(name for name in ASSETS if (folder / name).is_file())
    check_files(folder, [*(str(path.relative_to(folder)) for path in files), "config.json", *names])
    config = safe_config(read_json(config_path, "the model's config"), str(config_path))

    def digest() -> str:
        small = ["config.json", *names]
        paths = [*files, *(folder / name for name in small), *config_files(folder)]
        return sha256_parts({str(path.relative_to(folder)): sha256_file(path) for path in paths})

    weights_of, plain = unpacked(tensors, config, folder, origin)
    return Checkpoint(weights_of, plain, FolderAssets(folder, names), origin, digest)


def _single_file(folder: Path) -> Path:
    named = folder / "model.safetensors"
    if named.is_file():
        return named
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if len(found) == 1:
        return found[0]
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            str(folder), expected="a base model", found="an adapter (adapter_config.json)", remedy="name the base model here and the adapter under deltas"
        )
    if found:
        raise CheckpointError(
            str(folder),
            expected="model.safetensors or its index",
            found=f"{len(found)} safetensors files and no index",
            remedy="restore model.safetensors.index.json",
        )
    for path in _pickles(folder):
        raise _pickle_refused(path)
    raise CheckpointError(str(folder), expected="model.safetensors or its shards", found="no safetensors file", remedy="name the folder that holds the weights")


def _pickles(folder: Path) -> Iterator[Path]:
    for pattern in PICKLES:
        yield from sorted(folder.glob(pattern))


def _pickle_refused(path: Path) -> CheckpointError:
    return CheckpointError(
        str(path),
        expected="safetensors",
        found="a pickle, which runs code when it is opened: refused",
        remedy="convert it to safetensors in a sandbox (load with torch weights_only=True, save with save_pretrained) or ask for a safetensors copy",
        code="PICKLE_REFUSED",
    )


def require_tokenizer(checkpoint: Checkpoint) -> bytes:
    """tokenizer.json of the checkpoint. Raises CheckpointError when it is missing (merging needs none, exporting does) or breaks a rule of `strict`."""
    if "tokenizer.json" in checkpoint.assets:
        data, rows = checkpoint.assets["tokenizer.json"], checkpoint.config.get("vocab_size")
        check_tokenizer(data, rows if isinstance(rows, int) else None, f"{checkpoint.origin}: tokenizer.json")
        return data
    slow = [name for name in SLOW_TOKENIZERS if name in checkpoint.assets]
    found = f"only {', '.join(slow)}" if slow else "no tokenizer file"
    remedy = "put tokenizer.json beside the weights"
    if slow:
        remedy = "write it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    raise CheckpointError(checkpoint.origin, expected="tokenizer.json", found=found, remedy=remedy)
