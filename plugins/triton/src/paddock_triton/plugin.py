"""What this plugin adds to Paddock. Free of torch and of triton."""

from __future__ import annotations

from paddock.plugins import AttentionSpec, OpSpec, hookimpl

HOPPER = (9, 0)
COMPILE_AHEAD = "paddock_triton.launch:compile_ahead"
OPS = {
    "embed": "ops_embed",
    "linear": "ops_linear",
    "rms_norm": "ops_norm",
    "add_rms_norm": "ops_norm",
    "layer_norm": "ops_norm",
    "add_layer_norm": "ops_norm",
    "silu_mul": "ops_activation",
    "gelu": "ops_activation",
    "rope_and_cache": "ops_rope",
    "cache_kv": "ops_rope",
    "quantize_fp8_static": "ops_quantize",
    "quantize_fp8_token": "ops_quantize",
    "linear_fp8": "ops_linear_fp8",
    "linear_fp8_fast": "ops_linear_fp8",
    "linear_fp8_blocks": "ops_linear_fp8_blocks",
    "linear_int4": "ops_linear_int4",
    "linear_int4_fp8": "ops_linear_int4",
    "int4_to_fp8": "ops_int4",
    "rms_norm_fp8": "ops_norm",
    "layer_norm_fp8": "ops_norm",
    "silu_mul_fp8": "ops_activation_fp8",
    "gelu_fp8": "ops_activation_fp8",
    "linear_silu_mul_fp8": "ops_linear_fp8_gated",
    "linear_silu_mul_fp8_fast": "ops_linear_fp8_gated",
    "most_likely": "ops_sampling",
    "draw": "ops_sampling",
    "draw_filtered": "ops_filter",
}  # op: module

HALVES = ("bfloat16", "float16")
OPS_OF_HALVES = frozenset(
    {
        "linear_fp8",
        "linear_fp8_fast",
        "linear_fp8_blocks",
        "linear_silu_mul_fp8",
        "linear_silu_mul_fp8_fast",
        "linear_int4",
        "linear_int4_fp8",
    }
)  # not exact enough for float32

INT4_GROUPS = frozenset({32, 64, 128})  # inputs that share a scale, beside multiples of the largest: a copy's step
GROUPS_OF_OPS = {"linear_int4": INT4_GROUPS, "linear_int4_fp8": INT4_GROUPS}


@hookimpl
def paddock_attention_backends() -> list[AttentionSpec]:
    """Return the paged attention."""
    return [
        AttentionSpec(
            name="triton",
            factory="paddock_triton.attention:create",
            devices=("cuda",),
            dtypes=HALVES,
            kv_cache_dtypes=("bfloat16", "float16", "fp8"),
            page_sizes=(64, 128, 32, 16),
            head_dims=(16, 32, 48, 64, 80, 96, 128, 256),
            features=("alibi", "sliding_window", "softcap"),
            computes=("plain", "fp8"),
            graph_capturable=True,
            min_compute_capability=HOPPER,
            requires=("triton",),
            workspace="paddock_triton.attention_limits:workspace",
            compile_ahead=COMPILE_AHEAD,
            rank=10,
            summary="split decode and chunked prefill over pages, in Triton",
        )
    ]


@hookimpl
def paddock_ops() -> list[OpSpec]:
    """Return the fused ops."""
    return [
        OpSpec(
            op=op,
            implementation=f"paddock_triton.{module}:{op}",
            devices=("cuda",),
            dtypes=HALVES if op in OPS_OF_HALVES else (*HALVES, "float32"),
            min_compute_capability=HOPPER,
            requires=("triton",),
            groups=GROUPS_OF_OPS.get(op, ()),
            compile_ahead=COMPILE_AHEAD,
            rank=10,
            summary="fused, in Triton",
        )
        for op, module in OPS.items()
    ]
