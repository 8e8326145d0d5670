"""NVIDIA ModelOpt's simulation of FP8 through transformers: how far it is from transformers' plain model.

N sequences, L tokens a sequence, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paddock.errors import PaddockError
from paddock.evaluation import Comparison
from paddock.evaluation.divergence import Against, Reference
from tests.bench.quality_rows import Row

_BATCH = 4  # calibration sequences at once


def table(folder: Path, calibration_NL: Tensor, windows: Sequence[Sequence[int]], *, dtype: str, device: str) -> Iterator[Row]:
    """Yield transformers' plain model, FP8_DEFAULT_CFG, and that with FP8_KV_CFG where ModelOpt finds keys and values.

    Weights, calibration and windows are computed in `dtype`. Raises PaddockError where ModelOpt is not installed.
    """
    quantization, name = _modelopt(), folder.name
    plain = _loaded(folder, dtype, device)
    yield row(plain, plain, windows, name=name, library="transformers", recipe="plain", kv=dtype)
    for kv in (False, True):
        model = _loaded(folder, dtype, device)
        with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
            quantization.quantize(model, _config(quantization, kv=kv), lambda each: _run(each, calibration_NL))
        if kv and not _keys_are_quantised(model):
            print("modelopt finds no keys and values in this model: no row for FP8_KV_CFG", file=sys.stderr)
            continue
        yield row(plain, model, windows, name=name, library="modelopt", recipe="FP8_DEFAULT_CFG", kv="fp8" if kv else dtype)


def _modelopt() -> Any:
    try:
        return importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise PaddockError(
            f"the reference is 'modelopt', and it cannot be imported: {error}",
            fix="make tools, then set PYTHONPATH=.tools; or leave --reference out",
        ) from error


def _config(quantization: Any, *, kv: bool) -> Any:
    config = copy.deepcopy(quantization.FP8_DEFAULT_CFG)
    if not kv:
        return config
    return quantization.utils.update_quant_cfg_with_kv_cache_quant(config, copy.deepcopy(quantization.FP8_KV_CFG["quant_cfg"]))


def _loaded(folder: Path, dtype: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def _run(model: Any, calibration_NL: Tensor) -> None:
    for start in range(0, len(calibration_NL), _BATCH):
        model(calibration_NL[start : start + _BATCH].to(model.device), use_cache=False)


def _keys_are_quantised(model: Any) -> bool:
    found = [module for name, module in model.named_modules() if name.endswith("k_bmm_quantizer")]
    return bool(found) and all(module.is_enabled and module.amax is not None for module in found)


@torch.inference_mode()
def row(plain: Any, model: Any, windows: Sequence[Sequence[int]], *, name: str, library: str, recipe: str, kv: str) -> Row:
    """Return how far a model of transformers is from the plain one over the windows."""
    return Row.of([_compared(plain, model, ids) for ids in windows], model=name, library=library, recipe=recipe, kv=kv)


def _compared(plain: Any, model: Any, ids: Sequence[int]) -> Comparison:
    """Return what one window says of a model beside the plain one, A."""
    ids_T = torch.tensor(ids, device=model.device)
    plain_TV = _logits(plain, ids_T)
    logits_TV = plain_TV if model is plain else _logits(model, ids_T)
    reference = Reference(len(ids) - 1)
    reference.watch("", 0, plain_TV)
    against = Against.of(reference)
    against.watch("", 0, logits_TV)
    return Comparison(
        tokens=len(ids) - 1,
        windows=1,
        kl=against.kl_T.mean().item(),
        kl_max=against.kl_T.max().item(),
        top1=against.same_T.mean().item(),
        nats_a=_nats(plain_TV, ids_T[1:]),
        nats_b=_nats(logits_TV, ids_T[1:]),
    )


def _logits(model: Any, ids_T: Tensor) -> Tensor:
    found: Tensor = model(ids_T[None], use_cache=False).logits[0, :-1].float()
    return found


def _nats(logits_TV: Tensor, ids_T: Tensor) -> float:
    """Return the mean negative log-likelihood of the tokens, in nats."""
    logprobs: list[float] = logits_TV.log_softmax(-1).gather(-1, ids_T[:, None])[:, 0].tolist()
    return -math.fsum(logprobs) / len(logprobs)
