"""What rounding the inputs of 4-bit weights to FP8 costs in quality: w4a8 against w4a16, on real weights rounded to 4 bits here.

    python -m tests.bench.int4_quality MODEL --group N [--text FILE] [--windows N] [--window TOKENS]

Every linear of the layers is rounded to the nearest of 16 values between the least and the largest weight of a group of N inputs
(no calibration) and saved as AutoAWQ saves it, in a temporary folder. The plain model, w4a16, w4a8 and w8a8 then run through
Paddock in float32 over the same windows; w8a8 rounds the weights of every step, not of large ones alone. Printed are
perplexities, their growth over the one that a row is held against, the relative RMS error of all logits, the share of tokens with
the same first choice and the mean KL divergence.

`--text` is a UTF-8 file, or `generated`: each window sampled from the plain model at temperature 1, seeded with its number.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from attrs import define, frozen
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock import LLM
from paddock.errors import OptionError, PaddockError
from paddock.evaluation.scoring import scored
from paddock.evaluation.texts import token_ids, windows
from paddock.planning import int4_compute
from paddock.quantize.text import read_text
from paddock.testing.oracle import relative_rms
from paddock_quant_awq.words import AWQ_ORDER, pack
from tests.bench.fp8_quality import GENERATED, Settings, generated, opened

PAIRS = (
    *(("plain", compute) for compute in ("w4a16", "w4a8", "w8a8")),
    *(("w4a16", compute) for compute in ("w4a8", "w8a8")),
)  # what is held against what


@define
class Sums:
    """What was found in the windows so far, of one way to compute held against another."""

    nats: float = 0.0
    nats_against: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0
    squares: float = 0.0
    windows: int = 0

    def add(self, logits_TV: Tensor, against_TV: Tensor, next_T: Tensor) -> None:
        """Take in a window: logits of both [T, V], and the tokens that came [T]."""
        logprobs_TV, against_logprobs_TV = logits_TV.log_softmax(-1), against_TV.log_softmax(-1)
        self.nats -= logprobs_TV.gather(1, next_T[:, None]).sum().item()
        self.nats_against -= against_logprobs_TV.gather(1, next_T[:, None]).sum().item()
        self.kl += (against_logprobs_TV.exp() * (against_logprobs_TV - logprobs_TV)).sum().item()
        self.same += int((logits_TV.argmax(-1) == against_TV.argmax(-1)).sum())
        self.tokens += len(next_T)
        self.squares += relative_rms(logits_TV, against_TV) ** 2
        self.windows += 1

    def row(self, name: str, against: str) -> str:
        """Return a line of Markdown."""
        perplexity, growth = math.exp(self.nats / self.tokens), math.exp((self.nats - self.nats_against) / self.tokens) - 1
        error, kl = math.sqrt(self.squares / self.windows), self.kl / self.tokens
        return (
            f"| {name} | {against} | {perplexity:.4f} | {growth:+.3%} | {error:.4f} | {self.same / self.tokens:.4f} | {kl:.6f} |"
        )


@frozen(eq=False)
class Rounded:
    """A weight [O, I] in 4 bits as AutoAWQ stores it."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def rounded(weight_OI: Tensor, group: int) -> Rounded:
    """Return a weight rounded to the nearest: (code - zero) * scale, 16 codes from the least to the largest of a group, and 0."""
    weight_OGS = weight_OI.float().view(len(weight_OI), -1, group)
    low_OG, high_OG = weight_OGS.amin(-1).clamp(max=0), weight_OGS.amax(-1).clamp(min=0)
    scales_OG = ((high_OG - low_OG) / 15).clamp(min=1e-5).half()
    zeros_OG = (-low_OG / scales_OG.float()).round().clamp(0, 15)
    codes_OGS = ((weight_OGS / scales_OG.float()[..., None]).round() + zeros_OG[..., None]).clamp(0, 15)
    qweight, qzeros = pack(codes_OGS.flatten(1).T, AWQ_ORDER), pack(zeros_OG.T, AWQ_ORDER)
    return Rounded(qweight, qzeros, scales_OG.T.contiguous())


def save_rounded(model: Path, out: Path, group: int) -> None:
    """Write the checkpoint of `model`, the linears of its layers in 4 bits; raise OptionError where groups do not divide one."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        if tensor.shape[1] % group:
            raise OptionError(
                f"{name} has {tensor.shape[1]} inputs, which groups of {group} do not divide",
                fix=f"give --group {math.gcd(tensor.shape[1], group)}",
            )
        found = rounded(tensor, group)
        prefix = name.removesuffix("weight")
        tensors |= {f"{prefix}qweight": found.qweight, f"{prefix}qzeros": found.qzeros, f"{prefix}scales": found.scales}
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    for file in model.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    entry = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": entry}), encoding="utf-8")


def logits_of(llm: LLM, ids: list[int]) -> Tensor:
    """Return the logits [T - 1, V] that predict all tokens of a window but the first."""
    logits_TV = torch.full((len(ids) - 1, llm.vocab_size), math.nan)

    def watch(_: object, position: int, rows_RV: Tensor) -> None:
        stop = min(position + len(rows_RV), len(logits_TV))
        logits_TV[position:stop] = rows_RV[: stop - position].cpu()

    with llm.watching_prompts(watch):
        list(scored(llm, [ids]))
    return logits_TV


def measured(model: Path, settings: Settings, group: int) -> dict[tuple[str, str], Sums]:
    """Return what each pair gives; raise PaddockError for a model or a text with which nothing can be measured."""
    found = {pair: Sums() for pair in PAIRS}
    with tempfile.TemporaryDirectory(prefix="paddock-int4-quality-") as scratch, ExitStack() as stack:
        stack.enter_context(mock.patch.object(int4_compute, "W8A8_FROM", 1))
        save_rounded(model, Path(scratch) / "int4", group)
        plain = stack.enter_context(opened(model, settings))
        engines = {"plain": plain}
        for compute in ("w4a16", "w4a8", "w8a8"):
            llm = opened(Path(scratch) / "int4", settings, int4_compute=compute)
            engines[compute] = stack.enter_context(llm)
        if settings.text == GENERATED:
            cut = generated(plain, settings)
        else:
            ids = token_ids(plain, read_text(settings.text).words)
            cut = windows(ids, settings.window, limit=settings.windows)
        for ids in cut:
            logits = {name: logits_of(llm, ids) for name, llm in engines.items()}
            for (against, name), sums in found.items():
                sums.add(logits[name], logits[against], torch.tensor(ids[1:]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a plain Llama checkpoint in one file")
    parser.add_argument("--group", type=int, required=True, metavar="N", help="inputs to a scale")
    parser.add_argument("--text", default=GENERATED, metavar="FILE", help="(%(default)s)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--window", type=int, default=255, metavar="TOKENS", help="(%(default)s)")
    options = parser.parse_args(arguments)
    settings = Settings(text=options.text, windows=options.windows, window=options.window)
    try:
        found = measured(options.model, settings, options.group)
    except PaddockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| computes | held against | perplexity | growth | error of logits | same first choice | KL, nats |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(sums.row(name, against) for (against, name), sums in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
