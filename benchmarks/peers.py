"""Make the environments of the peers that `trimtab bench --against` measures beside us. Each is its own; none touches ours.

    python benchmarks/peers.py                       all of them
    python benchmarks/peers.py llama.cpp openvino    some
    python benchmarks/peers.py --list                where each is, and whether it is complete

An environment is a folder NAME under TRIMTAB_BENCH_ENVS, or under benchmarks/.envs. Versions stand in benchmarks/envs/NAME.txt. llama.cpp is compiled for
this machine from the source package of llama-cpp-python, which carries its tree: the library goes into the environment, the tools into NAME/tools. A marker
is written last, so that what was interrupted is made again. torch (eager and compiled) needs nothing here: it runs in trimtab's own environment.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("TRIMTAB_BENCH_ENVS") or HERE / ".envs")
PEERS = ("llama.cpp", "openvino", "ort-genai")
LLAMA = "llama-cpp-python==0.3.36"
LLAMA_OPTIONS = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_NATIVE=ON", "GGML_LLAMAFILE=ON", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF",
                 "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_UI=OFF", "LLAMA_OPENSSL=OFF", "CMAKE_BUILD_WITH_INSTALL_RPATH=ON",
                 "CMAKE_INSTALL_RPATH=$ORIGIN")  # fmt: skip
LLAMA_TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def marker_text(name: str) -> str:
    """What the environment was made from: a change of either makes it anew."""
    return hashlib.sha256((HERE / "envs" / f"{name}.txt").read_bytes() + (LLAMA + " ".join(LLAMA_OPTIONS) if name == "llama.cpp" else "").encode()).hexdigest()


def complete(name: str) -> bool:
    marker = ROOT / name / ".complete"
    return marker.is_file() and marker.read_text().strip() == marker_text(name)


def make(name: str, jobs: int) -> None:
    """Environment `name`, anew. Raises CalledProcessError when a step fails."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "venv", folder)
    # --no-deps: the file names every package; pip's resolver has nothing to add.
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "-r", HERE / "envs" / f"{name}.txt")
    if name == "llama.cpp":
        with tempfile.TemporaryDirectory(prefix="llama-cpp-") as work:
            make_llama(folder, Path(work), jobs)
    (folder / ".complete").write_text(marker_text(name) + "\n")


def make_llama(folder: Path, work: Path, jobs: int) -> None:
    """Compile the tree inside the source package; library into site-packages/llama_cpp/lib, tools beside their libraries in tools/."""
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", LLAMA.split("==")[0], "--dest", work, LLAMA)
    with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    source = next(path for path in work.glob("llama_cpp_python-*") if path.is_dir())
    run("cmake", "-S", source / "vendor" / "llama.cpp", "-B", work / "build", *(f"-D{option}" for option in LLAMA_OPTIONS))
    run("cmake", "--build", work / "build", "--parallel", str(jobs), "--target", "llama", *LLAMA_TOOLS)
    made = work / "build" / "bin"
    shutil.copytree(made, folder / "tools", symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    shutil.copytree(source / "llama_cpp", purelib / "llama_cpp")
    for part in ("conversion", "gguf-py"):  # what convert_hf_to_gguf.py looks for beside itself
        shutil.copytree(source / "vendor" / "llama.cpp" / part, folder / "convert" / part)
    shutil.copy(source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py", folder / "convert")
    library = purelib / "llama_cpp" / "lib"
    library.mkdir(exist_ok=True)
    for path in made.glob("lib*.so*"):
        shutil.copy(path, library / path.name, follow_symlinks=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all when none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.peers) - set(PEERS))
    if unknown:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    for name in arguments.peers or PEERS:
        if arguments.list:
            print(f"{name:12s} {'complete' if complete(name) else 'missing':10s} {ROOT / name}")
        elif not complete(name):
            make(name, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
