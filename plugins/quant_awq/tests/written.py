"""4-bit checkpoints written by the letter of each format, number by number; nothing here is shared with the code that reads them.

O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

Stored = dict[str, Tensor]
Meaning = tuple[Stored, Tensor]
IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)  # the number that each nibble holds


@frozen(eq=False)
class Rounded:
    """A weight [O, I] as signed numbers -8..7, zero points -8..7 [O, G] and scales [O, G]; `group` -1 is one group."""

    numbers_OI: Tensor
    zeros_OG: Tensor
    scales_OG: Tensor

    @property
    def meaning(self) -> Tensor:
        """Return (number - zero) * scale [O, I] in float32."""
        size = self.numbers_OI.shape[1] // self.scales_OG.shape[1]
        zeros_OI, scales_OI = (x.float().repeat_interleave(size, dim=1) for x in (self.zeros_OG, self.scales_OG))
        return (self.numbers_OI.float() - zeros_OI) * scales_OI


def rounded(weight_OI: Tensor, group: int, *, symmetric: bool, dtype: torch.dtype = torch.float16) -> Rounded:
    """Return a weight rounded to 4 bits, its scales in `dtype`."""
    outs, ins = weight_OI.shape
    grouped_OGS = weight_OI.float().view(outs, -1, ins if group == -1 else group)
    low_OG, high_OG = grouped_OGS.amin(-1).clamp(max=0), grouped_OGS.amax(-1).clamp(min=0)
    if symmetric:
        scales_OG = (torch.maximum(high_OG, -low_OG) / 7.5).clamp(min=1e-5).to(dtype)
        zeros_OG = torch.zeros_like(scales_OG, dtype=torch.int32)
    else:
        scales_OG = ((high_OG - low_OG) / 15).clamp(min=1e-5).to(dtype)
        zeros_OG = (-8 - low_OG / scales_OG.float()).round().clamp(-8, 7).int()
    numbers_OGS = ((grouped_OGS / scales_OG.float()[..., None]).round() + zeros_OG[..., None]).clamp(-8, 7)
    return Rounded(numbers_OGS.view(outs, ins).int(), zeros_OG, scales_OG)


def words(numbers: Tensor, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Return unsigned numbers 0..15 [N, M] as int32 [N, ceil(M / 8)], nibble i of a word holding its number order[i]."""
    filled_NWB = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % 8)).view(len(numbers), -1, 8)
    word_NW = torch.stack([filled_NWB[..., number] << (4 * nibble) for nibble, number in enumerate(order)]).sum(0)
    return (word_NW - (word_NW >> 31 << 32)).int()  # the last bit is the sign's


def awq(weight_OI: Tensor, group: int, *, dtype: torch.dtype = torch.float16) -> Meaning:
    """Return AutoAWQ's gemm tensors."""
    r = rounded(weight_OI, group, symmetric=False, dtype=dtype)
    stored = {
        "qweight": words((r.numbers_OI + 8).T, AWQ_ORDER),
        "qzeros": words((r.zeros_OG + 8).T, AWQ_ORDER),
        "scales": r.scales_OG.T.contiguous(),
    }
    return stored, r.meaning


def gptq(
    weight_OI: Tensor,
    group: int,
    *,
    version: int = 1,
    symmetric: bool = True,
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Meaning:
    """Return GPTQ's tensors; `order` [I]: the inputs of the first group come first, of the last one last (`desc_act`)."""
    ins = weight_OI.shape[1]
    size = ins if group == -1 else group
    placed_I = torch.arange(ins) if order is None else order
    r = rounded(weight_OI[:, placed_I], group, symmetric=symmetric, dtype=dtype)
    if version == 1:  # a zero point of 0 cannot be written less one
        low = r.zeros_OG == -8
        r = Rounded(r.numbers_OI, torch.where(low, -7, r.zeros_OG), r.scales_OG)
    back_I = placed_I.argsort()
    stored = {
        "qweight": words((r.numbers_OI + 8)[:, back_I]).T.contiguous(),
        "qzeros": words((r.zeros_OG + 8 - (1 if version == 1 else 0)).T),
        "scales": r.scales_OG.T.contiguous(),
        "g_idx": (torch.arange(ins) // size)[back_I].int(),
    }
    return stored, r.meaning[:, back_I]


def packed(weight_OI: Tensor, group: int, *, symmetric: bool = True, dtype: torch.dtype = torch.float32) -> Meaning:
    """Return compressed-tensors' pack-quantized tensors."""
    r = rounded(weight_OI, group, symmetric=symmetric, dtype=dtype)
    stored = {
        "weight_packed": words(r.numbers_OI + 8),
        "weight_scale": r.scales_OG.contiguous(),
        "weight_shape": torch.tensor(weight_OI.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = words((r.zeros_OG + 8).T).T.contiguous()
    return stored, r.meaning


def unpacked(weight_OI: Tensor, group: int, *, symmetric: bool = True, dtype: torch.dtype = torch.float32) -> Meaning:
    """Return compressed-tensors' int-quantized tensors."""
    r = rounded(weight_OI, group, symmetric=symmetric, dtype=dtype)
    stored = {"weight": r.numbers_OI.to(torch.int8), "weight_scale": r.scales_OG.contiguous()}
    if not symmetric:
        stored["weight_zero_point"] = r.zeros_OG.to(torch.int8)
    return stored, r.meaning


def modelopt(weight_OI: Tensor, group: int, *, factor_I: Tensor | None = None, fp8: bool = False) -> Meaning:
    """Return ModelOpt's tensors; the meaning includes the factor of the inputs."""
    plain_OI = weight_OI if factor_I is None else weight_OI / factor_I
    r = rounded(plain_OI, group, symmetric=True, dtype=torch.float32)
    rows = r.numbers_OI.tolist()
    pairs = zip(rows[0::2], rows[1::2], strict=True)
    stored = {
        "weight": torch.tensor(
            [[(a & 15) | ((b & 15) << 4) for a, b in zip(*pair, strict=True)] for pair in pairs], dtype=torch.uint8
        ),
        "weight_scale": r.scales_OG.contiguous(),
    }
    if factor_I is not None:
        stored["pre_quant_scale"] = factor_I
    if fp8:
        stored |= {"weight_scale_2": r.meaning.abs().max() / 448, "input_scale": torch.tensor(0.01)}
    return stored, r.meaning if factor_I is None else r.meaning * factor_I


def compressed_entry(group: int, *, symmetric: bool = True, format_: str = "pack-quantized", fp8: bool = False) -> dict[str, Any]:
    """Return the section of config.json that compressed-tensors writes."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
        "observer": "minmax",
        "actorder": None,
    }
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": token if fp8 else None,
                "output_activations": None,
            }
        },
    }


@frozen(kw_only=True)
class Format:
    """A way to store a checkpoint: its entry in config.json and what a weight becomes, both for a group size."""

    entry: Callable[[int], dict[str, Any]]
    store: Callable[[Tensor, int], Meaning]
    fp8: bool = False
    together: int = 1  # outputs that must come together


def _shuffled(ins: int) -> Tensor:
    return torch.randperm(ins, generator=torch.Generator().manual_seed(ins))


def _gptq_entry(**keys: Any) -> Callable[[int], dict[str, Any]]:
    return lambda group: {"quant_method": "gptq", "bits": 4, "group_size": group, **keys}


def _modelopt_entry(algorithm: str) -> Callable[[int], dict[str, Any]]:
    return lambda group: {"quant_method": "modelopt", "quant_algo": algorithm, "group_size": group, "ignore": ["lm_head"]}


def _round_entry(packing: str, **keys: Any) -> Callable[[int], dict[str, Any]]:
    return lambda group: {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": group,
        "packing_format": packing,
        "block_name_to_quantize": None,
        **keys,
    }


FORMATS = {
    "awq": Format(
        entry=lambda group: {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
        store=awq,
        together=8,
    ),
    "gptq": Format(entry=_gptq_entry(), store=gptq, together=8),
    "gptq-v2": Format(
        entry=_gptq_entry(checkpoint_format="gptq_v2", sym=False),
        store=lambda weight, group: gptq(weight, group, version=2, symmetric=False),
        together=8,
    ),
    "gptq-asymmetric": Format(
        entry=_gptq_entry(sym=False), store=lambda weight, group: gptq(weight, group, symmetric=False), together=8
    ),
    "gptq-ordered": Format(
        entry=_gptq_entry(desc_act=True),
        store=lambda weight, group: gptq(weight, group, order=_shuffled(weight.shape[1])),
        together=8,
    ),
    "auto-round-gptq": Format(entry=_round_entry("auto_round:auto_gptq"), store=gptq, together=8),
    "auto-round-awq": Format(entry=_round_entry("auto_round:auto_awq", sym=False), store=awq, together=8),
    "packed": Format(entry=compressed_entry, store=packed),
    "packed-asymmetric": Format(
        entry=lambda group: compressed_entry(group, symmetric=False),
        store=lambda weight, group: packed(weight, group, symmetric=False),
    ),
    "unpacked": Format(entry=lambda group: compressed_entry(group, format_="int-quantized"), store=unpacked),
    "unpacked-asymmetric": Format(
        entry=lambda group: compressed_entry(group, symmetric=False, format_="int-quantized"),
        store=lambda weight, group: unpacked(weight, group, symmetric=False),
    ),
    "packed-w4a8": Format(entry=lambda group: compressed_entry(group, fp8=True), store=packed, fp8=True),
    "modelopt": Format(entry=_modelopt_entry("W4A16_AWQ"), store=modelopt, together=2),
    "modelopt-w4a8": Format(
        entry=_modelopt_entry("W4A8_AWQ"),
        store=lambda weight, group: modelopt(weight, group, fp8=True),
        fp8=True,
        together=2,
    ),
}
