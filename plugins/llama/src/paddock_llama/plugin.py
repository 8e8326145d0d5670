"""What this plugin adds to Paddock. Free of torch."""

from __future__ import annotations

from paddock.plugins import ModelSpec, hookimpl


@hookimpl
def paddock_models() -> list[ModelSpec]:
    """Return the Llama family."""
    return [
        ModelSpec(
            name="llama",
            architectures=("LlamaForCausalLM",),
            parse_config="paddock_llama.config:parse_config",
            weights="paddock_llama.weights:weight_table",
            attention="paddock_llama.config:attention_needs",
            build="paddock_llama.model:build",
            summary="Llama 2, 3.x and every LlamaForCausalLM",
        )
    ]
