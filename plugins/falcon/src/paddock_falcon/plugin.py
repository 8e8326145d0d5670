"""The Falcon plugin: what it adds, as data. Imports neither torch nor the model."""

from __future__ import annotations

from collections.abc import Iterable

from paddock.plugins import ModelSpec, hookimpl


@hookimpl
def paddock_models() -> Iterable[ModelSpec]:
    """Return the Falcon family."""
    return (
        ModelSpec(
            name="falcon",
            architectures=("FalconForCausalLM", "RWForCausalLM"),
            parse_config="paddock_falcon.config:parse_config",
            weights="paddock_falcon.weights:weight_table",
            attention="paddock_falcon.config:attention_needs",
            build="paddock_falcon.model:build",
            summary="Falcon 7B, 40B, 180B, 11B and RW",
        ),
    )
