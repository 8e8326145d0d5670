"""What first-party plugins bring, so that an error about a missing name can say which distribution to install."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from paddock.plugins import kinds
from paddock.plugins.kinds import Kind


@frozen(kw_only=True)
class KnownPlugin:
    """A distribution, the name of its plugin, and the names it answers to, by the name of their kind."""

    plugin: str
    distribution: str
    brings: Mapping[str, tuple[str, ...]] = field(hash=False)


KNOWN = (
    KnownPlugin(
        plugin="llama",
        distribution="paddock-llama",
        brings={kinds.MODELS.name: ("LlamaForCausalLM",)},
    ),
    KnownPlugin(
        plugin="falcon",
        distribution="paddock-falcon",
        brings={kinds.MODELS.name: ("FalconForCausalLM", "RWForCausalLM")},
    ),
    KnownPlugin(
        plugin="quant-fp8",
        distribution="paddock-quant-fp8",
        brings={
            kinds.QUANTIZATIONS.name: ("fbgemm_fp8", "fp8", "modelopt", "modelopt-kv", "compressed-tensors"),
            kinds.RECIPES.name: ("fp8-static", "fp8-dynamic", "fp8-official"),
        },
    ),
    KnownPlugin(
        plugin="quant-awq",
        distribution="paddock-quant-awq",
        brings={
            kinds.QUANTIZATIONS.name: (
                "awq",
                "gptq",
                "auto-round",
                "compressed-tensors-w4a16",
                "compressed-tensors-w4a8",
                "modelopt-w4a16",
                "modelopt-w4a8",
            ),
            kinds.RECIPES.name: ("awq",),
        },
    ),
    KnownPlugin(plugin="triton", distribution="paddock-triton", brings={kinds.ATTENTION.name: ("triton",)}),
    KnownPlugin(plugin="parallel", distribution="paddock-parallel", brings={kinds.PARALLEL.name: ("tp", "pp")}),
    KnownPlugin(plugin="serve", distribution="paddock-serve", brings={kinds.COMMANDS.name: ("serve",)}),
)


# Formats of other tools that no first-party plugin reads, as config.json names them.
# fmt: off
READ_BY_NOBODY = frozenset({
    "aqlm", "bitblas", "bitnet", "bitsandbytes", "eetq", "exl2", "exl3", "fp_quant", "gguf", "higgs", "hqq", "llm-awq",
    "marlin", "mxfp4", "quanto", "quark", "quip", "spqr", "squeezellm", "torchao", "vptq",
})
# fmt: on
# What some of these call a tensor of a linear, and nobody else does.
TENSORS_READ_BY_NOBODY = {"SCB": "bitsandbytes", "scaled_zeros": "llm-awq"}


def who_brings(kind: Kind, name: str) -> KnownPlugin | None:
    """Return the first-party plugin that brings `name`, installed or not."""
    return next((plugin for plugin in KNOWN if name in plugin.brings.get(kind.name, ())), None)


def plugin_called(name: str) -> KnownPlugin | None:
    """Return the first-party plugin of that plugin or distribution name."""
    return next((plugin for plugin in KNOWN if name in (plugin.plugin, plugin.distribution)), None)


def names_known(kind: Kind) -> tuple[str, ...]:
    """Return every name of this kind that some first-party plugin brings."""
    return tuple(name for plugin in KNOWN for name in plugin.brings.get(kind.name, ()))
