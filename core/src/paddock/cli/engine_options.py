"""The options of every command that runs a model, and the LLM they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paddock.cli.session import Session, parse_owners
from paddock.config import ATTENTION_COMPUTES, DEVICES, DTYPES, FP8_ACCUMULATIONS, INT4_COMPUTES, KV_CACHE_DTYPES, LOAD_FORMATS

if TYPE_CHECKING:
    from paddock.llm import LLM

Command = TypeVar("Command", bound=Callable[..., object])


def _owners_of_ops(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, str] | None:
    return parse_owners("--op", texts) or None


_OPTIONS = (
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="Type of weights and activations; `paddock plan` says what auto gives."
    ),
    click.option("--device", type=click.Choice(DEVICES), help="Where to run [auto: a GPU where there is one]."),
    click.option("--max-model-len", type=int, metavar="N", help="Most tokens of prompt and answer together [the model's]."),
    click.option("--max-num-seqs", type=int, metavar="N", help="Most sequences that run at once."),
    click.option("--max-num-batched-tokens", type=int, metavar="N", help="Most tokens computed in a step."),
    click.option("--load-format", type=click.Choice(LOAD_FORMATS), help="dummy: random weights, config.json is enough."),
    click.option("--quantization", metavar="NAME", help="Format of the weights; fp8 quantises plain ones [auto: as stored]."),
    click.option(
        "--int4-compute",
        type=click.Choice(INT4_COMPUTES),
        help="Products with 4-bit weights: inputs as they are (w4a16), rounded to FP8 (w4a8), weights of large steps too "
        "(w8a8), or by the number of tokens.",
    ),
    click.option(
        "--keep-fp8-weights",
        is_flag=True,
        default=None,
        help="With w8a8: keep the FP8 weights of large steps, a byte each beside 4-bit ones, for sooner first tokens.",
    ),
    click.option("--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), help="Type of the KV cache."),
    click.option(
        "--attention-compute",
        type=click.Choice(ATTENTION_COMPUTES),
        help="Products of attention: in the type of activations, or in FP8, over FP8 keys and values alone [plain].",
    ),
    click.option(
        "--fp8-accumulation",
        type=click.Choice(FP8_ACCUMULATIONS),
        help="Sums of large FP8 products: exact, or the matrix unit's own, quicker and of fewer bits [exact].",
    ),
    click.option("--attention-backend", metavar="NAME", help="Attention implementation; see `paddock list attention`."),
    click.option(
        "--op",
        "ops",
        multiple=True,
        callback=_owners_of_ops,
        metavar="NAME=OWNER",
        help="Take op NAME from the plugin OWNER, which for the core's own is paddock; see `paddock list ops`.",
    ),
    click.option("--gpu-memory-utilization", type=float, metavar="SHARE", help="Share of a GPU's memory to use."),
    click.option("--kv-cache-memory-bytes", type=int, metavar="N", help="Bytes for the KV cache [what is left]."),
    click.option("--tensor-parallel-size", "--tp", type=int, metavar="N", help="GPUs that share each layer."),
    click.option("--pipeline-parallel-size", "--pp", type=int, metavar="N", help="GPUs that share the layers."),
    click.option("--enforce-eager", is_flag=True, default=None, help="Capture no graphs."),
    click.option("--tokenizer", metavar="FOLDER", help="Where the tokenizer is [the model]; none: token ids only."),
    click.option("--revision", metavar="REV", help="Commit, tag or branch of a hub model."),
)


def engine_options(command: Command) -> Command:
    """Add the engine's options to a command; it takes them as keyword arguments named as EngineConfig's fields."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def open_llm(session: Session, model: str, options: Mapping[str, Any], *, progress: bool | None = None) -> LLM:
    """Return the LLM for a command's engine options; those not given keep their defaults."""
    from paddock.llm import LLM

    given = {name: value for name, value in options.items() if value is not None}
    return LLM(model, strict=session.strict, prefer=dict(session.prefer), progress=progress, **given)
