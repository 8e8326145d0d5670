"""What the FP8 recipes cost in quality, beside the plain model and, where asked for, beside NVIDIA ModelOpt.

    python -m tests.bench.fp8_quality MODEL... [--text FILE] [--windows N] [--reference modelopt]

For each model folder, checkpoints of every recipe are made in a temporary folder, with and without FP8 keys and values, and each
is held to the plain model over the same windows of text that calibration never read: perplexity, share of tokens with the same
first choice, mean KL(plain || quantised). Both run through Paddock, computing in `--dtype`. What is calibrated reads all but the
last fifth of `--calibration`, computing in the checkpoint's own dtype.

`--recipes` and `--kv` name fewer of the rows. `--text` is what is evaluated: `held-out`, the last fifth of the calibration text;
`generated`, each window sampled from the plain model itself at temperature 1, seeded with the window's number; or a UTF-8 file.
With `--reference modelopt` NVIDIA ModelOpt's simulation of FP8 runs through transformers on the same weights, sequences and
windows, and is held to transformers' plain model; below the table each row of Paddock is held to ModelOpt's row of the same keys
and values, over the same windows in pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, frozen
from torch import Tensor

from paddock import LLM, SamplingParams
from paddock.config import EngineConfig
from paddock.errors import OptionError, PaddockError
from paddock.evaluation import compare
from paddock.evaluation.texts import check_window, token_ids, windows
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from paddock.quantize.text import read_text, sequences
from tests.bench import modelopt_simulation
from tests.bench.quality_rows import Row, differences, line, printed

RECIPES = ("fp8-static", "fp8-dynamic", "fp8-official")
PLAIN_KV, FP8_KV = "plain", "fp8"
HELD_OUT, GENERATED = "held-out", "generated"
WINDOW = 512  # tokens, where the model's context is no shorter
SHARED_RUN = 32  # tokens: a run of so many that calibration also read is an overlap
KV_BYTES = 1 << 28


@frozen(kw_only=True)
class Settings:
    """What is measured and how. `text` is HELD_OUT, GENERATED or a file; `samples` sequences are calibrated on."""

    calibration: str = "default"
    text: str = HELD_OUT
    windows: int = 8
    window: int = WINDOW
    samples: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    reference: str | None = None
    recipes: Sequence[str] = RECIPES
    kv: Sequence[str] = (PLAIN_KV, FP8_KV)


@frozen(kw_only=True)
class Texts:
    """The windows that are scored, in token ids, and the calibration sequences [N, L]."""

    windows: list[list[int]]
    calibration_NL: Tensor


def table(model: Path, settings: Settings) -> Iterator[Row]:
    """Yield the rows of a model: Paddock's plain model and its recipes, then the reference's where one is asked for.

    Raises PaddockError for a model, a text or an option with which nothing can be measured.
    """
    with opened(model, settings) as plain:
        texts = read(plain, settings)
        rows = [(recipe, kv == FP8_KV) for recipe in settings.recipes for kv in settings.kv]
        for recipe, kv in [("plain", False), *rows]:
            yield ours(model, plain, texts, settings, recipe=recipe, kv=kv)
    if settings.reference is not None:
        yield from modelopt_simulation.table(
            model, texts.calibration_NL, texts.windows, dtype=settings.dtype, device=settings.device
        )


def opened(folder: Path, settings: Settings, *, kv: bool = False, **options: Any) -> LLM:
    """Return the engine over a folder with these options; `kv` keeps keys and values in FP8, whatever the folder says."""
    return LLM(
        folder,
        dtype=settings.dtype,
        device=settings.device,
        max_model_len=settings.window + 1,
        kv_cache_dtype="fp8" if kv else settings.dtype,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        progress=False,
        **options,
    )


def ours(model: Path, plain: LLM, texts: Texts, settings: Settings, *, recipe: str, kv: bool) -> Row:
    """Return the row of a recipe, or of the plain model for `plain`."""
    if recipe == "plain":
        found = [compare(plain, plain, ids, window=settings.window) for ids in texts.windows]
    else:
        with tempfile.TemporaryDirectory(prefix="paddock-quality-") as scratch:
            folder = made(model, Path(scratch) / recipe, settings, recipe=recipe, kv=kv)
            with opened(folder, settings, kv=kv) as quantised:
                found = [compare(plain, quantised, ids, window=settings.window) for ids in texts.windows]
    return Row.of(found, model=model.name, library="paddock", recipe=recipe, kv="fp8" if kv else settings.dtype)


def made(model: Path, out: Path, settings: Settings, *, recipe: str, kv: bool) -> Path:
    """Return `out`, with the quantised checkpoint of `model` in it."""
    options: dict[str, Any] = {"kv_cache_dtype": "fp8"} if kv else {}
    if kv or recipe == "fp8-static":
        options |= {"calibration": settings.calibration, "samples": settings.samples, "sequence_length": settings.window}
    config = EngineConfig(model=str(model), device=settings.device)
    quantize(config, QuantizeOptions(recipe=recipe, out=out, **options), progress=False)
    return out


def read(plain: LLM, settings: Settings) -> Texts:
    """Return the windows and the calibration sequences.

    Raises PaddockError for a text that cannot be read or is too short, and where both have SHARED_RUN tokens in a row.
    """
    check_window(settings.window, plain.max_model_len, limit=settings.windows)
    assert plain.tokenizer is not None, "an engine over a folder has a tokenizer"
    options = QuantizeOptions(recipe=RECIPES[0], out=Path(), samples=settings.samples, sequence_length=settings.window)
    calibration_NL = sequences(read_text(settings.calibration).for_calibration, plain.tokenizer, options)
    if settings.text == GENERATED:
        cut = generated(plain, settings)
    else:
        held_out = settings.text == HELD_OUT
        words = read_text(settings.calibration).kept_apart.words if held_out else read_text(settings.text).words
        cut = windows(token_ids(plain, words), settings.window, limit=settings.windows)
    rows: list[list[int]] = calibration_NL.tolist()
    if runs(rows) & runs(cut):
        raise OptionError(
            f"the text {settings.text!r} has {SHARED_RUN} tokens in a row that calibration on {settings.calibration!r} reads",
            fix=f"evaluate on another text, or on --text {HELD_OUT}",
        )
    return Texts(windows=cut, calibration_NL=calibration_NL)


def generated(plain: LLM, settings: Settings) -> list[list[int]]:
    """Return windows that the plain model writes after its bos token, at temperature 1; ends of text end nothing."""
    assert plain.tokenizer is not None, "an engine over a folder has a tokenizer"
    bos = plain.tokenizer.bos_id
    if bos is None:
        raise OptionError(f"text is {GENERATED!r}, and the tokenizer has no bos token to begin with", fix="give --text FILE")
    params = [
        SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=settings.window - 1, ignore_eos=True, seed=number)
        for number in range(settings.windows)
    ]
    return [[bos, *output.token_ids] for output in plain.generate([[bos]] * len(params), params)]


def runs(rows: Iterable[Sequence[int]]) -> set[tuple[int, ...]]:
    """Return every run of SHARED_RUN tokens, or the whole of a shorter row."""
    found = set()
    for row in rows:
        found |= {tuple(row[at : at + SHARED_RUN]) for at in range(max(1, len(row) - SHARED_RUN + 1))}
    return found


def context_of(model: Path) -> int:
    """Return how many tokens the model was made for; raise OptionError where its config does not say."""
    try:
        found = json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"{str(model)!r} does not say its context: {error!r}", fix="give --window TOKENS") from error
    return int(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and then JSON, or write the JSON to a file; return the exit code."""
    options = parsed(arguments)
    names = ("calibration", "text", "windows", "samples", "dtype", "device", "reference", "recipes", "kv")
    rows: list[Row] = []
    used = {}
    try:
        for model in options.models:
            window = options.window or min(WINDOW, context_of(model) - 1)
            settings = Settings(window=window, **{name: getattr(options, name) for name in names})
            used[model.name] = asdict(settings)
            for row in table(model, settings):
                print(line(row), file=sys.stderr, flush=True)
                rows.append(row)
    except PaddockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    beside = differences(rows, options.reference)
    print(printed(rows, beside))
    found = {"rows": [asdict(row) for row in rows], "differences": [asdict(each) for each in beside]}
    text = json.dumps({"settings": used, "machine": machine(options), **found}, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of a plain checkpoint")
    parser.add_argument("--calibration", default="default", metavar="FILE", help="text to calibrate on (default: Paddock's own)")
    parser.add_argument("--text", default=HELD_OUT, metavar="FILE", help=f"{HELD_OUT}, {GENERATED}, or a file (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="how many windows are scored (%(default)s)")
    parser.add_argument("--window", type=int, metavar="TOKENS", help=f"of each (default: {WINDOW}, or the context less 1)")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="sequences of a window's length to calibrate on")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="those to measure (all)")
    parser.add_argument("--kv", nargs="+", choices=(PLAIN_KV, FP8_KV), default=(PLAIN_KV, FP8_KV), help="keys and values (both)")
    parser.add_argument("--reference", choices=("modelopt",), help="also measure this library's own simulation")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = ["paddock", "paddock-quant-fp8", "torch"]
    if options.reference is not None:
        packages += ["transformers", "nvidia-modelopt"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
