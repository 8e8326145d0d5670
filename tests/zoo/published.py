"""Writes tests/zoo/published: tiny Llamas quantised by the tools that publish FP8, each with the logits its tool computes.

Run as `python -m tests.zoo.published [FOLDER]` with `PYTHONPATH=.tools`, where `make tools` puts both tools;
tests read the files and need neither. Logits come from the tools' own fake quantisation in float32, activations and KV included.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "published"
VOCAB = 48
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "tie_word_embeddings": False}
KV_SCALES = (0.0075, 0.009)  # of keys and values in compressed-tensors' checkpoint: about amax / 448
SPARED = ["lm_head", "re:.*layers.1.self_attn.o_proj"]


def new_model() -> Any:
    """Return a Llama of two layers with weights of a trained one's magnitude."""
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]))
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return model


def tokens(rows: int) -> Tensor:
    """Return token ids [rows, 24]."""
    return torch.randint(0, VOCAB, (rows, 24), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def compressed(folder: Path, arguments: dict[str, Any], **more: Any) -> Tensor:
    """Write a checkpoint of compressed-tensors; return its logits for `tokens(1)`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
    from compressed_tensors.quantization import apply_quantization_config as apply

    model = new_model()
    amax = _largest_inputs(model)
    group = QuantizationScheme(targets=["Linear"], **arguments)
    apply(model, QuantizationConfig(config_groups={"group_0": group}, ignore=SPARED, **more))
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            _calibrate(module, group, amax[name])
        if hasattr(module, "k_scale"):
            module.k_scale.data.fill_(KV_SCALES[0])
            module.v_scale.data.fill_(KV_SCALES[1])
        if hasattr(module, "quantization_status"):
            module.quantization_status = QuantizationStatus.FROZEN
    logits: Tensor = model(tokens(1), use_cache=True).logits[0]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return logits


def _largest_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return the largest magnitude of every linear's input over the calibration tokens."""
    amax: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            amax[name] = inputs[0].abs().max()

        return hook

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears]
    model(tokens(4))
    for handle in handles:
        handle.remove()
    return amax


def _calibrate(module: Any, group: Any, amax: Tensor) -> None:
    """Fill the scales of a linear as llm-compressor's min-max observers do."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, how = module.weight, group.weights
    outs, ins = weight.shape
    step_out, step_in = {"tensor": (outs, ins), "channel": (1, ins)}.get(how.strategy) or tuple(how.block_structure)
    blocks = weight.unflatten(0, (-1, step_out)).unflatten(2, (-1, step_in))
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    module.weight_scale.data.copy_(calculate_qparams(low, high, how)[0].reshape(module.weight_scale.shape))
    if hasattr(module, "input_scale"):
        scale = calculate_qparams(-amax, amax, group.input_activations)[0]
        module.input_scale.data.copy_(scale.reshape(module.input_scale.shape))


def modelopt(folder: Path, config: str, *, kv: bool = False, head: bool = False) -> Tensor:
    """Write a checkpoint of ModelOpt, its head quantised too where `head`; return its logits for `tokens(1)`."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers as unify

    model, settings = new_model(), copy.deepcopy(getattr(mtq, config))
    if kv:
        settings["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    if head:
        settings["quant_cfg"] = [rule for rule in settings["quant_cfg"] if rule["quantizer_name"] != "*lm_head*"]
    mtq.quantize(model, settings, lambda model: model(tokens(4)))
    unify(model)  # as the export does: linears that share an input share the scale of their input, or of their blocks
    with torch.no_grad():
        logits: Tensor = model(tokens(1)).logits[0]
    export_hf_checkpoint(model, export_dir=str(folder))
    return logits


def _float(**more: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=8, type="float", **more)


WRITERS: dict[str, Callable[[Path], Tensor]] = {
    "compressed-static": lambda folder: compressed(
        folder, {"weights": _float(strategy="tensor"), "input_activations": _float(strategy="tensor", dynamic=False)}
    ),
    "compressed-dynamic": lambda folder: compressed(
        folder, {"weights": _float(strategy="channel"), "input_activations": _float(strategy="token", dynamic=True)}
    ),
    "compressed-block": lambda folder: compressed(
        folder,
        {
            "weights": _float(strategy="block", block_structure=[16, 16]),
            "input_activations": _float(strategy="group", group_size=16, dynamic=True),
        },
    ),
    "compressed-weights": lambda folder: compressed(folder, {"weights": _float(strategy="channel")}),
    "compressed-kv": lambda folder: compressed(
        folder,
        {"weights": _float(strategy="channel"), "input_activations": _float(strategy="token", dynamic=True)},
        kv_cache_scheme=_float(strategy="tensor", dynamic=False),
    ),
    "modelopt-fp8": lambda folder: modelopt(folder, "FP8_DEFAULT_CFG"),
    "modelopt-fp8-kv": lambda folder: modelopt(folder, "FP8_DEFAULT_CFG", kv=True),
    "modelopt-head": lambda folder: modelopt(folder, "FP8_DEFAULT_CFG", head=True),
    "modelopt-channel": lambda folder: modelopt(folder, "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "modelopt-block": lambda folder: modelopt(folder, "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
}


def main(target: Path) -> None:
    """Write every checkpoint below `target`, with `expected.safetensors` beside each."""
    for name, write in WRITERS.items():
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        logits = write(folder)
        save_file({"token_ids": tokens(1)[0], "logits": logits.contiguous()}, folder / "expected.safetensors")
        (folder / "generation_config.json").unlink(missing_ok=True)
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said, indent=1) + "\n")
        print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
