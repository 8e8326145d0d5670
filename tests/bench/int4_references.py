"""What AutoAWQ and NVIDIA ModelOpt make of a model in 4 bits, as plain checkpoints: the weights their own searches end with.

Weights in 4 bits change a model as other weights do, so a folder of those weights is evaluated like any model. Both read the
calibration sequences that Paddock's recipe reads, through transformers, in float32. AutoAWQ computes on a GPU wherever there is
one; ModelOpt where it is told.

N sequences, L tokens a sequence, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from paddock.errors import PaddockError

AUTOAWQ_CLIP_TOKENS = 512  # its own choice
_CLIP_OUTPUTS = 64
_BATCH = 4  # calibration sequences at once, of ModelOpt
_DEFAULT_GROUP = 128  # of ModelOpt's configurations


def autoawq(folder: Path, out: Path, calibration_NL: Tensor, group: int, *, clip_tokens: int = AUTOAWQ_CLIP_TOKENS) -> Path:
    """Return `out` with the weights of AutoAWQ's search: scales, clipping, zero points, rounded in float16 as it packs.

    Its quantizer runs as it is, but for the text, for which it would ask a hub; clipping is searched on `clip_tokens` tokens or
    a few more. Raises PaddockError where it is not installed.
    """
    with _quiet():
        quantizer = _imported("autoawq", "awq.quantize.quantizer")
        llama = _imported("autoawq", "awq.models.llama").LlamaAWQForCausalLM
        modules = _imported("autoawq", "awq.utils.module")
        model = loaded(folder)
        # a class of functions but for the name of the model; its constructor wants a model of its own loading
        family = SimpleNamespace(
            model_type="llama",
            get_model_layers=llama.get_model_layers,
            move_embed=llama.move_embed,
            get_layers_for_scaling=llama.get_layers_for_scaling,
        )
        rows = [row_L[None] for row_L in calibration_NL]
        with mock.patch.object(quantizer, "get_calib_dataset", return_value=rows):
            search = quantizer.AwqQuantizer(
                family,
                model,
                tokenizer=None,
                w_bit=4,
                group_size=group,
                zero_point=True,
                version="gemm",
                calib_data=None,
                split=None,
                text_column=None,
                duo_scaling=True,
                export_compatible=True,
            )
            search._compute_best_clip = _any_outputs(search._compute_best_clip, clip_tokens)
            search._compute_best_scale = _with_copies(search._compute_best_scale)
            search.quantize()
        for layer in model.model.layers:
            for linear in modules.get_named_linears(layer).values():
                linear.weight.data = search.pseudo_quantize_tensor(linear.weight.data.half())[0].float()
    return _saved(model, folder, out, {})


def modelopt(folder: Path, out: Path, calibration_NL: Tensor, group: int, *, device: str = "cpu") -> Path:
    """Return `out` with the weights that ModelOpt's INT4_AWQ_CFG stands for, what it multiplies inputs with included.

    Raises PaddockError where it is not installed.
    """
    model = modelopt_simulated(folder, calibration_NL, group, "INT4_AWQ_CFG", device=device)
    with _quiet(), torch.inference_mode():
        weights = {
            f"{name}.weight": module(torch.eye(module.in_features, device=device)).T.contiguous()
            for name, module in model.named_modules()
            if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
        }
    return _saved(loaded(folder), folder, out, weights)


def modelopt_simulated(folder: Path, calibration_NL: Tensor, group: int, config: str, *, device: str = "cpu") -> Any:
    """Return a model of transformers that computes by one of ModelOpt's configurations, its groups of 128 now of `group`."""
    with _quiet(), torch.inference_mode():
        quantization = _imported("nvidia-modelopt", "modelopt.torch.quantization")
        model = loaded(folder, device)
        chosen = _with_group(copy.deepcopy(getattr(quantization, config)), group)
        quantization.quantize(model, chosen, lambda each: _run(each, calibration_NL))
    return model


MAKERS: dict[str, Callable[..., Path]] = {"autoawq": autoawq, "modelopt": modelopt}


def _any_outputs(clip: Callable[..., Tensor], tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return AutoAWQ's search of clipping for any number of outputs: it takes multiples of 64, so zeros fill them up.

    Outputs are searched each for itself: 64 at a time are as many at once, and take less memory of a CPU.
    """

    def filled(weight_OI: Tensor, x_NLI: Tensor) -> Tensor:
        outputs = len(weight_OI)
        padded_OI = torch.nn.functional.pad(weight_OI, (0, 0, 0, -outputs % _CLIP_OUTPUTS))
        at_once = _CLIP_OUTPUTS if weight_OI.is_cpu else len(padded_OI)
        limits = [clip(part_OI, x_NLI, n_sample_token=tokens) for part_OI in torch.split(padded_OI, at_once)]
        return torch.cat(limits)[:outputs]

    return filled


def _with_copies(scale: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return AutoAWQ's search of scales for a model on a CPU: what it keeps to restore is otherwise what it writes over."""

    def copying(x_NLI: Tensor, w_mean_I: Tensor, x_mean_I: Tensor, module: Any, *rest: Any) -> Tensor:
        kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with mock.patch.object(module, "state_dict", return_value=kept):
            return scale(x_NLI, w_mean_I, x_mean_I, module, *rest)

    return copying


def _with_group(value: Any, group: int) -> Any:
    if isinstance(value, dict):
        blocks = value.items()
        return {key: group if (key, each) == (-1, _DEFAULT_GROUP) else _with_group(each, group) for key, each in blocks}
    return [_with_group(each, group) for each in value] if isinstance(value, list) else value


def _run(model: Any, calibration_NL: Tensor) -> None:
    for start in range(0, len(calibration_NL), _BATCH):
        model(calibration_NL[start : start + _BATCH].to(model.device), use_cache=False)


def loaded(folder: Path, device: str = "cpu") -> Any:
    """Return a model of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


def _saved(model: Any, folder: Path, out: Path, changed: dict[str, Tensor]) -> Path:
    """Write the model's weights, some of them changed, in float32 beside the source's other files."""
    state: dict[str, Tensor] = model.state_dict()
    assert changed.keys() <= state.keys(), sorted(changed.keys() - state.keys())
    out.mkdir()
    for file in folder.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}), encoding="utf-8")
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    save_file({name: changed.get(name, tensor).contiguous() for name, tensor in state.items()}, out / "model.safetensors")
    return out


def _imported(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PaddockError(
            f"the reference is {package!r}, and {module} cannot be imported: {error}",
            fix="make tools, then set PYTHONPATH=.tools; or leave --reference out",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the tools print away from standard output, and their warnings of versions away."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
