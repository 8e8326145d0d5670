"""What the core itself brings, through the same hooks as everybody: plain-torch attention and ops, and the commands."""

from __future__ import annotations

from paddock.plugins.descriptors import AttentionSpec, CommandSpec, OpSpec
from paddock.plugins.hookspecs import hookimpl

DEVICES = ("cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
OPS = {
    "embed": "rows of the embedding table by token id",
    "linear": "product with a plain weight",
    "rms_norm": "RMS norm",
    "add_rms_norm": "residual add, then RMS norm",
    "layer_norm": "layer norm",
    "add_layer_norm": "residual add, then layer norm",
    "silu_mul": "SiLU of the gate times the up projection",
    "gelu": "GELU",
    "rope_and_cache": "rotary embedding of Q and K, K and V written into pages",
    "cache_kv": "K and V written into pages",
    "quantize_fp8_static": "activation to FP8 with a scale known before the run",
    "quantize_fp8_token": "activation to FP8 with a scale for each token, or each token's groups",
    "linear_fp8": "product of an FP8 activation with an FP8 weight",
    "linear_fp8_fast": "product of an FP8 activation with an FP8 weight, summed in fewer bits where that is quicker",
    "linear_fp8_blocks": "product of an FP8 activation with an FP8 weight, both with scales of blocks",
    "linear_int4": "product of an activation with a 4-bit weight",
    "linear_int4_fp8": "product of an FP8 activation with a 4-bit weight",
    "int4_to_fp8": "4-bit weight to FP8, a scale an output",
    "rms_norm_fp8": "residual add if there is one, RMS norm, then FP8",
    "layer_norm_fp8": "residual add if there is one, layer norm, then FP8",
    "silu_mul_fp8": "SiLU of the gate times the up projection, then FP8",
    "gelu_fp8": "GELU, then FP8",
    "linear_silu_mul_fp8": "product of an FP8 activation with an FP8 weight, SiLU of the gate times the up projection, then FP8",
    "linear_silu_mul_fp8_fast": "linear_silu_mul_fp8, summed in fewer bits where that is quicker",
}
SAMPLING_OPS = {
    "most_likely": "the largest logit of a row and its token",
    "draw": "a token of the softmax at a temperature, by seed",
    "draw_filtered": "a token of what min-p, top-k and top-p leave, by seed",
}
COMMANDS = {
    "generate": "Complete prompts with a model, all in one batch.",
    "chat": "Talk with a model in the terminal.",
    "bench": "Measure throughput, latency, start-up or kernels, with what each figure means.",
    "eval": "Measure how well a model predicts a text and answers multiple-choice questions.",
    "compare": "Hold two models, or two plans of one, beside each other: KL divergence, first choices, perplexity.",
    "quantize": "Make a quantised checkpoint of a plain one, layer by layer, by a recipe.",
    "plan": "Say what would run, why, and whether it fits, from config.json alone.",
    "plugins": "Show every plugin found: what it brings, or why it failed.",
    "list": "List the models, formats, recipes, backends, strategies or ops that are installed.",
}


@hookimpl
def paddock_attention_backends() -> list[AttentionSpec]:
    """Return the plain-torch backend, which serves everything and defines what the others must compute."""
    backend = AttentionSpec(
        name="torch",
        factory="paddock.layers.reference_attention:create",
        devices=DEVICES,
        dtypes=DTYPES,
        kv_cache_dtypes=(*DTYPES, "fp8"),
        page_sizes=(16, 32, 64, 128),
        features=("alibi", "sliding_window", "softcap"),
        computes=("plain", "fp8"),
        summary="plain torch, on any device; the definition of the others",
    )
    return [backend]


@hookimpl
def paddock_ops() -> list[OpSpec]:
    """Return the plain-torch definition of every op."""
    return [
        OpSpec(op=op, implementation=f"paddock.{module}:{op}", devices=DEVICES, dtypes=DTYPES, summary=summary)
        for module, ops in (("layers.reference", OPS), ("execution.sampling_reference", SAMPLING_OPS))
        for op, summary in ops.items()
    ]


@hookimpl
def paddock_commands() -> list[CommandSpec]:
    """Return the commands of the core."""
    return [CommandSpec(name=name, command=f"paddock.cli.{name}:command", help=summary) for name, summary in COMMANDS.items()]
