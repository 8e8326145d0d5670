"""Static FP8 against Meta's recipe on one engine: python -m tests.bench.recipe_ratio CONFIG_FOLDER [--layers N].

Two checkpoints of one Llama are run with random weights, `paddock bench throughput` each: `static`, FP8 weights and activations
with static scales in all linears of the layers, over FP8 keys and values; and `official` (`fbgemm_fp8`), FP8 rows with a scale a
token in the feed-forward of all layers but the first and the last, attention in bfloat16, over bfloat16 keys and values. What is
compared is output tokens a second. NVIDIA's own ratios of the two, on 405B and other hardware, are 1.16, 1.39 and 1.44 at
2048/128, 32768/2048 and 120000/2048.

Each shape runs as many requests as fit the GPU at once with the whole model, by its plan, at most `--most`. With `--layers` only
so many of its layers run, with the whole model's requests: of a layer's time nothing changes, of the rest (embedding, head,
sampling, the host) a larger part counts, so that a ratio errs towards 1. Each line says how many layers ran.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from attrs import frozen

STATIC, OFFICIAL = "static", "official"
SHAPES = ("2048/128", "32768/2048", "120000/2048")
PAGE = 64  # tokens
_ATTENTION, _FEED_FORWARD = ("q", "k", "v", "o"), ("gate", "up", "down")
_BOUND = 1200.0  # of a token's magnitudes, as Meta's checkpoints have it


@frozen(kw_only=True)
class Shape:
    """Tokens in and out of a request."""

    isl: int
    osl: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """Return the shape that `text` names; raise click's error for one that is none."""
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise click.BadParameter(f"{text} is no ISL/OSL: two whole numbers, as in {SHAPES[0]}")
        return cls(isl=int(parts[0]), osl=int(parts[1]))

    @property
    def length(self) -> int:
        """Return the tokens of a sequence, in whole pages, and a page to spare."""
        return -(-(self.isl + self.osl) // PAGE) * PAGE + PAGE


def quantization_of(recipe: str, layers: int) -> dict[str, Any]:
    """Return the quantization_config of a recipe for so many layers."""
    if recipe == STATIC:
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    attention = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(layers) for part in _ATTENTION]
    ends = [f"model.layers.{i}.mlp.{part}_proj" for i in sorted({0, layers - 1}) for part in _FEED_FORWARD]
    return {"quant_method": "fbgemm_fp8", "activation_scale_ub": _BOUND, "modules_to_not_convert": ["lm_head", *attention, *ends]}


def write(source: Path, folder: Path, recipe: str, layers: int | None) -> Path:
    """Write a config.json of the recipe into a new folder and return it; raise click's error for more layers than there are."""
    config = json.loads((source / "config.json").read_text())
    has = config["num_hidden_layers"]
    layers = layers or has
    if layers > has:
        raise click.BadParameter(f"--layers is {layers}, and the model has {has}: give 1 to {has}")
    folder.mkdir()
    config |= {"num_hidden_layers": layers, "quantization_config": quantization_of(recipe, layers)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def options_of(recipe: str, shape: Shape) -> list[str]:
    """Return the engine's options for a run."""
    kv = "fp8" if recipe == STATIC else "auto"
    return ["--load-format", "dummy", "--max-model-len", str(shape.length), "--kv-cache-dtype", kv]


def _json(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "paddock", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}: what it says stands above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def that_fit(whole: Path, recipe: str, shape: Shape, gpu: str) -> int:
    """Return how many sequences of the shape fit the whole model's plan."""
    return int(_json("plan", str(whole), "--gpus", gpu, *options_of(recipe, shape))["full_sequences"])


def measured(folder: Path, recipe: str, shape: Shape, requests: int, runs: int) -> dict[str, Any]:
    """Return what `paddock bench throughput` says of a run."""
    sizes = ["--requests", str(requests), "--isl", str(shape.isl), "--osl", str(shape.osl), "--runs", str(runs)]
    return _json("bench", "throughput", str(folder), "--tokenizer", "none", *options_of(recipe, shape), *sizes)


def lines(
    source: Path, shapes: tuple[Shape, ...], layers: int | None, most: int, gpu: str, runs: int
) -> Iterator[dict[str, Any]]:
    """Yield a line a shape and recipe, and after each shape's two the ratio."""
    with tempfile.TemporaryDirectory(prefix="paddock-ratio-") as scratch:
        wholes = {recipe: write(source, Path(scratch) / f"whole-{recipe}", recipe, None) for recipe in (STATIC, OFFICIAL)}
        parts = {recipe: write(source, Path(scratch) / recipe, recipe, layers) for recipe in (STATIC, OFFICIAL)}
        for shape in shapes:
            speeds = {}
            for recipe, folder in parts.items():
                requests = min(most, that_fit(wholes[recipe], recipe, shape, gpu))
                if not requests:
                    raise click.ClickException(
                        f"no sequence of {shape.length} tokens fits {gpu} with {recipe}: ask for a shorter shape"
                    )
                found = measured(folder, recipe, shape, requests, runs)
                speeds[recipe] = found["output_tokens_per_second"]
                named = {"shape": f"{shape.isl}/{shape.osl}", "recipe": recipe, "layers": layers or "all", "requests": requests}
                yield named | {name: found[name] for name in ("output_tokens_per_second", "ttft_median_ms", "itl_median_ms")}
            yield {"shape": f"{shape.isl}/{shape.osl}", "static_over_official": round(speeds[STATIC] / speeds[OFFICIAL], 3)}


@click.command()
@click.argument("config_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="So many of the model's layers alone.")
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="ISL/OSL; repeatable.")
@click.option("--most", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at most.")
@click.option("--gpu", default="1xH200", show_default=True, help="What the whole model is planned for.")
@click.option("--runs", type=click.IntRange(min=1), default=1, show_default=True)
def main(config_folder: Path, layers: int | None, shapes: tuple[str, ...], most: int, gpu: str, runs: int) -> None:
    """Print a line a run, and the ratio of each shape, as JSON."""
    for line in lines(config_folder, tuple(Shape.of(text) for text in shapes), layers, most, gpu, runs):
        click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
