"""`paddock quantize MODEL --recipe NAME --out DIR`: a quantised checkpoint of a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paddock.cli.session import Session
from paddock.config import DEVICES, EngineConfig
from paddock.planning.quality_gate import measured_kv
from paddock.quantize.options import MAX_SHARD_BYTES, QuantizeOptions, parse_gate


def _gate(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    return None if text is None else parse_gate(text)


@click.command()
@click.argument("model")
@click.option("--recipe", required=True, metavar="NAME", help="What to do; `paddock list recipes` names them.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new folder, or one to go on with.")
@click.option("--kv-cache", "kv_cache_dtype", metavar="DTYPE", help="fp8: also find scales for a KV cache in FP8.")
@click.option("--scheme", metavar="NAME", help="Bits of weights and activations, such as w4a16, where a recipe has several.")
@click.option("--format", metavar="NAME", help="Whose layout to write, where a recipe has several.")
@click.option("--group-size", type=int, metavar="N", help="Inputs that share a scale, where a recipe groups them.")
@click.option("--zero-points/--no-zero-points", default=None, help="Let a group's range lie unevenly about 0, or not.")
@click.option("--tp-compatible", type=int, metavar="N", help="Choose groups that no share of N tensor-parallel ranks slices.")
@click.option("--calibration", metavar="FILE", help="A text in UTF-8, or `default`; its last fifth is kept for the gate.")
@click.option("--samples", type=int, metavar="N", help="Sequences of the text to run [as many as it gives, at most 128].")
@click.option("--sequence-length", type=int, metavar="L", help="Tokens of a sequence [512, or what the model takes if less].")
@click.option("--gate", callback=_gate, metavar="LIMIT", help="ppl<=1%: fail where perplexity grows by more than that.")
@click.option("--gate-text", type=click.Path(path_type=Path), metavar="FILE", help="Text for the gate [what was kept for it].")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute.")
@click.option("--tokenizer", metavar="FOLDER", help="Where the tokenizer is [the model].")
@click.option("--revision", metavar="REV", help="Commit, tag or branch of a hub model.")
@click.option("--ignore-config-keys", default="", metavar="KEY,...", help="Keys of config.json to let pass unread.")
@click.option("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES, show_default=True, metavar="N", help="Size of a file.")
@click.pass_obj
def command(
    session: Session,
    /,
    model: str,
    device: str,
    tokenizer: str | None,
    revision: str | None,
    ignore_config_keys: str,
    **options: Any,
) -> None:
    """Make a quantised checkpoint of MODEL, a folder or a hub id, by a recipe.

    One layer at a time is on the device, so the model may be larger than its memory. Interrupted, the same command goes on where
    it was. The folder is a model once the command has ended well; until then its paddock_manifest.json says `partial`.
    """
    asked = QuantizeOptions(**options)
    config = EngineConfig.from_options(
        model,
        device=device,
        tokenizer=tokenizer,
        revision=revision,
        ignore_config_keys=tuple(filter(None, ignore_config_keys.split(","))),
        prefer=session.prefer,
        strict=session.strict,
    )
    from paddock.quantize.run import quantize

    try:
        manifest = quantize(config, asked)
    except KeyboardInterrupt:
        click.echo(f"stopped; the same command goes on with what is finished in {asked.out}", err=True)
        raise
    size = sum(shard.file.nbytes for shard in manifest.shards)
    click.echo(f"{asked.out}: {manifest.layers_done} layers by {asked.recipe}, {size:,} bytes in {len(manifest.shards)} files")
    if manifest.gate:
        before, after = manifest.gate["before"]["perplexity"], manifest.gate["after"]["perplexity"]
        click.echo(
            f"perplexity {before:.3f} before, {after:.3f} after{measured_kv(manifest.gate)}: {manifest.gate['growth']:+.2%}"
        )
