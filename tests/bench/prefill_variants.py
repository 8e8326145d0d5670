"""Variants of the prefill kernel, checked and timed: python -m tests.bench.prefill_variants [--only NAME ...] [--compile].

Each is checked on a small ragged case against float64, then timed on 1 x 8k and 4 x 2k tokens in CUDA graphs: bfloat16, 64 query
heads on 8, D 128, pages of 64, causal. `--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers,
spills and shared memory. What was dropped on the compiler's word alone stands in docs/decisions/0053.

M rows of a query tile, N keys of a tile, D head size.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paddock.bench.kernels.attention_cases import Step, laid_out
from paddock.bench.kernels.case import Draw
from paddock.bench.kernels.timing import graph_seconds
from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.reference import FP8, cache_kv
from paddock.testing.oracle import bound, dense_attention, relative_rms
from paddock.testing.paging import Pages
from paddock_triton.attention_prefill import prefill
from paddock_triton.attention_schedule import UNIT, Units, prefill_units
from paddock_triton.attention_tile import LOG2E, Tile
from paddock_triton.dependence import DEPENDENT, start_next, wait

H, K, D, P = 64, 8, 128, 64
GROUP = H // K
LAUNCHES = 10
SMALL = [(0, 1), (0, 300), (37, 200), (511, 130), (0, 64), (1000, 9)]  # (tokens there, new tokens)
LARGE = (
    Step(name="1 x 8k", heads=(H, K, D), prompts=(8192,)),
    Step(name="4 x 2k", heads=(H, K, D), prompts=(2048,) * 4),
)

Launch = Callable[[Tensor, Tensor, LayerKV, AttentionInputs, Units], Any]


@frozen(kw_only=True)
class Variant:
    """How a kernel is made.

    `mode`: plain; lazy: rescale where a maximum grows; pair: two tiles of keys, one rescaling; ahead: the next product with K
    before the softmax.
    """

    mode: str = "plain"
    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3
    registers: int | None = None


VARIANTS = {
    "plain": Variant(),
    "lazy": Variant(mode="lazy"),
    "ahead": Variant(mode="ahead"),
    "ahead, 128 x 64, 8 warps": Variant(mode="ahead", rows=128, warps=8),
    "64 x 32, 2 stages": Variant(keys=32, stages=2),
    "64 x 32, 4 stages": Variant(keys=32, stages=4),
    "ahead, 64 x 32": Variant(mode="ahead", keys=32, registers=168),
    "pair, 128 rows, 8 warps": Variant(mode="pair", rows=128, warps=8),
}
HOUSE = {"house": Tile(block_m=64, block_n=64, warps=4, stages=3, tma=True)}
OVER_FP8 = {  # the kernel as it is, over FP8 pages
    "fp8, 256 x 64, 8 warps": Tile(block_m=256, block_n=64, warps=8, stages=3, tma=True),  # serialised, 115 spills: what runs now
    "fp8, 128 x 64, 8 warps": Tile(block_m=128, block_n=64, warps=8, stages=3, tma=True),  # 205 registers, not serialised
    "fp8, 128 x 64, 2 stages": Tile(block_m=128, block_n=64, warps=8, stages=2, tma=True),
    "fp8, 64 x 64, 4 warps": Tile(block_m=64, block_n=64, warps=4, stages=3, tma=True),
    "fp8, 256 x 32, 8 warps": Tile(block_m=256, block_n=32, warps=8, stages=3, tma=True),
}


@triton.jit
def _absorb(state: tl.tuple, logits_MN: tl.tensor, v_ND: tl.tensor, scale2: tl.constexpr, MASKED: tl.constexpr) -> tl.tuple:
    """Return (accumulator, sum, maximum) after a tile of keys."""
    acc_MD, sum_M, max_M = state
    new_M = tl.maximum(max_M, tl.max(logits_MN, 1) * scale2)
    shift_M = new_M
    if MASKED:
        shift_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    p_MN = tl.exp2(logits_MN * scale2 - shift_M[:, None])
    alpha_M = tl.exp2(max_M - shift_M)
    sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
    return tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * alpha_M[:, None]), sum_M, new_M


@triton.jit
def _absorb_lazily(state: tl.tuple, logits_MN: tl.tensor, v_ND: tl.tensor, scale2: tl.constexpr) -> tl.tuple:
    """As `_absorb`, but the maximum, and with it what is summed, moves only where some row's grows by more than 2^8."""
    acc_MD, sum_M, max_M = state
    new_M = tl.maximum(max_M, tl.max(logits_MN, 1) * scale2)
    if tl.max(tl.where(new_M - max_M > 8.0, 1, 0), 0) > 0:  # from -inf too
        alpha_M = tl.exp2(max_M - new_M)
        acc_MD, sum_M, max_M = acc_MD * alpha_M[:, None], sum_M * alpha_M, new_M
    p_MN = tl.exp2(logits_MN * scale2 - max_M[:, None])
    return tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD), sum_M + tl.sum(p_MN, 1), max_M


@triton.jit
def _absorb_two(
    state: tl.tuple, a_MN: tl.tensor, b_MN: tl.tensor, v_ND: tl.tensor, w_ND: tl.tensor, scale2: tl.constexpr
) -> tl.tuple:
    """Absorb two tiles with one maximum and one rescaling."""
    acc_MD, sum_M, max_M = state
    new_M = tl.maximum(max_M, tl.max(tl.maximum(a_MN, b_MN), 1) * scale2)
    alpha_M = tl.exp2(max_M - new_M)
    p_MN, r_MN = tl.exp2(a_MN * scale2 - new_M[:, None]), tl.exp2(b_MN * scale2 - new_M[:, None])
    sum_M = sum_M * alpha_M + tl.sum(p_MN + r_MN, 1)
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * alpha_M[:, None])
    return tl.dot(r_MN.to(v_ND.dtype), w_ND, acc_MD), sum_M, new_M


@triton.jit
def _page(table_ptr: tl.tensor, key: tl.tensor, end: tl.tensor, PAGE: tl.constexpr) -> tl.tensor:
    """Return the row of the pages that a key lies in."""
    return tl.load(table_ptr + key // PAGE, mask=key < end, other=0) * PAGE + key % PAGE


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables_ptr", "starts_ptr"])
def _kernel(
    out_ptr: tl.tensor, q_ptr: tl.tensor, k_source: tl.tensor, v_source: tl.tensor, tables_ptr: tl.tensor, units_ptr: tl.tensor,
    starts_ptr: tl.tensor, table_stride: tl.tensor, scale2: tl.constexpr, MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, KV: tl.constexpr, PAGE: tl.constexpr,
) -> None:  # fmt: skip
    """Write a tile of rows: tokens and query heads of one KV head."""
    start_next()
    kv_head, unit_ptr = tl.program_id(0) % KV, units_ptr + tl.program_id(0) // KV * UNIT
    wait()
    seq, first_row, stop_row = tl.load(unit_ptr), tl.load(unit_ptr + 1), tl.load(unit_ptr + 2)
    if seq < 0:
        return
    start, length = tl.load(starts_ptr + seq), tl.load(unit_ptr + 5)
    context = length - (tl.load(starts_ptr + seq + 1) - start)
    table_ptr, column = tables_ptr + seq.to(tl.int64) * table_stride, kv_head * D
    lowest, end = context + first_row // GROUP, context + (stop_row - 1) // GROUP + 1
    step: tl.constexpr = 2 * N if MODE == "pair" else N
    whole_end = (lowest + 1) // step * step
    row_M = first_row + tl.arange(0, M)
    token_M = start.to(tl.int64) + row_M // GROUP
    at_MD = (token_M * (GROUP * KV) + kv_head * GROUP + row_M % GROUP)[:, None] * D + tl.arange(0, D)[None, :]
    used_MD = (row_M < stop_row)[:, None] & (tl.arange(0, D) < D)[None, :]
    q_MD = tl.load(q_ptr + at_MD, mask=used_MD, other=0.0)
    state = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32), tl.full([M], float("-inf"), tl.float32)
    page = _page(table_ptr, 0, end, PAGE)
    if MODE == "pair":
        next_page = _page(table_ptr, N, end, PAGE)
        for key in tl.range(0, whole_end, step):
            k_ND, v_ND = k_source.load([page, column]), v_source.load([page, column])
            l_ND, w_ND = k_source.load([next_page, column]), v_source.load([next_page, column])
            page, next_page = _page(table_ptr, key + step, end, PAGE), _page(table_ptr, key + step + N, end, PAGE)
            state = _absorb_two(state, tl.dot(q_MD, k_ND.T), tl.dot(q_MD, l_ND.T), v_ND, w_ND, scale2)
    elif MODE == "ahead":
        logits_MN = tl.dot(q_MD, k_source.load([page, column]).T)
        for key in tl.range(0, whole_end, N):
            after = _page(table_ptr, key + N, end, PAGE)
            next_MN = tl.dot(q_MD, k_source.load([after, column]).T)  # of no row where there is no next page
            state = _absorb(state, logits_MN, v_source.load([page, column]), scale2, False)
            logits_MN, page = next_MN, after
    else:
        for key in tl.range(0, whole_end, N):
            k_ND, v_ND = k_source.load([page, column]), v_source.load([page, column])
            page = _page(table_ptr, key + N, end, PAGE)
            if MODE == "lazy":
                state = _absorb_lazily(state, tl.dot(q_MD, k_ND.T), v_ND, scale2)
            else:
                state = _absorb(state, tl.dot(q_MD, k_ND.T), v_ND, scale2, False)
    for key in tl.range(whole_end, end, N, num_stages=1):
        here = _page(table_ptr, key, end, PAGE)
        k_ND, v_ND = k_source.load([here, column]), v_source.load([here, column])
        key_N = key + tl.arange(0, N)
        v_ND = tl.where((key_N < end)[:, None], v_ND, tl.zeros_like(v_ND))
        seen_MN = key_N[None, :] <= (context + row_M // GROUP)[:, None]
        state = _absorb(state, tl.where(seen_MN, tl.dot(q_MD, k_ND.T), float("-inf")), v_ND, scale2, True)
    acc_MD, sum_M, _ = state
    tl.store(out_ptr + at_MD, (acc_MD * (1.0 / sum_M)[:, None]).to(out_ptr.dtype.element_ty), mask=used_MD)


def variant_launch(variant: Variant) -> Launch:
    """Return what launches a variant."""

    def launch(out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, units: Units) -> Any:
        rows = kv.k_pages_NPKD.shape[0] * P
        sources = [
            TensorDescriptor(x.view(rows, K * D), [rows, K * D], [K * D, 1], [variant.keys, D])
            for x in (kv.k_pages_NPKD, kv.v_pages_NPKD)
        ]
        return _kernel[(K * units.count,)](
            out_THD, q_THD, *sources, inputs.block_tables_SM, units.units_U8, inputs.query_start_S1,
            inputs.block_tables_SM.stride(0), scale2=D**-0.5 * LOG2E, MODE=variant.mode, M=variant.rows, N=variant.keys, D=D,
            GROUP=GROUP, KV=K, PAGE=P, num_warps=variant.warps, num_stages=variant.stages, maxnreg=variant.registers, **DEPENDENT,
        )  # fmt: skip

    return launch


def house_launch(tile: Tile) -> Launch:
    """Return what launches the plugin's own kernel with a tile."""

    def launch(out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, units: Units) -> Any:
        one = torch.ones((), device=q_THD.device) if kv.k_pages_NPKD.dtype == FP8 else None
        return prefill(out_THD, q_THD, kv, inputs, units, AttentionParams(scale=D**-0.5, k_scale=one, v_scale=one), tile)

    return launch


@frozen(eq=False, kw_only=True)
class Candidate:
    """What is checked and timed: a launch, its rows of a tile, and what the pages hold."""

    launch: Launch
    rows: int
    kept: torch.dtype = torch.bfloat16

    def error(self) -> float:
        """Return the relative RMS error on the small case: scattered pages whose unused rows are NaN."""
        q_THD, pages, inputs = small_case(torch.device("cuda"), self.kept)
        (kv,) = pages.layers
        out_THD = torch.full_like(q_THD, torch.nan)
        self.launch(out_THD, q_THD, kv, inputs, self._units(q_THD, inputs))
        expected = []
        for name, q_LHD in enumerate(torch.split(q_THD, [new for _, new in SMALL])):
            k_LKD, v_LKD = (pages.rows(str(name), x_NPKD).to(q_THD.dtype) for x_NPKD in (kv.k_pages_NPKD, kv.v_pages_NPKD))
            expected.append(dense_attention(q_LHD, k_LKD, v_LKD, scale=D**-0.5))
        return relative_rms(out_THD, torch.cat(expected))

    def teraflops(self, step: Step) -> float:
        """Return TFLOP/s of a launch in a captured graph of several."""
        draw = Draw(device=torch.device("cuda"), dtype=torch.bfloat16)
        laid = laid_out(step, page_size=P, kv_dtype=self.kept, draw=draw)
        q_THD, kv = laid.case.make(0)
        given = (torch.empty_like(q_THD), q_THD, kv, laid.inputs, self._units(q_THD, laid.inputs))
        return step.flops() / graph_seconds(self.launch, [given] * LAUNCHES) / 1e12

    def compiled(self) -> None:
        """Launch once on tensors of a CPU, where launches only compile."""
        q_THD, pages, inputs = small_case(torch.device("cpu"), self.kept)
        self.launch(q_THD, q_THD, pages.layers[0], inputs, self._units(q_THD, inputs))

    def _units(self, q_THD: Tensor, inputs: AttentionInputs) -> Units:
        return prefill_units(inputs, num_tokens=len(q_THD), group=GROUP, tile=self.rows)


CANDIDATES = {
    **{name: Candidate(launch=house_launch(tile), rows=tile.block_m) for name, tile in HOUSE.items()},
    **{name: Candidate(launch=variant_launch(variant), rows=variant.rows) for name, variant in VARIANTS.items()},
    **{name: Candidate(launch=house_launch(tile), rows=tile.block_m, kept=FP8) for name, tile in OVER_FP8.items()},
}


def small_case(device: torch.device, kept: torch.dtype) -> tuple[Tensor, Pages, AttentionInputs]:
    """Return random q, the pages with random keys and values written, and the inputs of the ragged step."""
    pages = Pages(num_layers=1, num_kv_heads=K, head_dim=D, page_size=P, dtype=kept, device=device)
    draw, one = Draw(device=device, dtype=torch.bfloat16), torch.ones((), device=device) if kept == FP8 else None
    there = [(name, length) for name, (length, _) in enumerate(SMALL) if length]
    before = pages.inputs([(str(name), length) for name, length in there])
    inputs = pages.inputs([(str(name), new) for name, (_, new) in enumerate(SMALL)])
    for seed, step in enumerate((before, inputs)):
        k_TKD, v_TKD = draw.normal(seed, 2, len(step.positions_T), K, D)
        cache_kv(k_TKD, v_TKD, pages.layers[0], step.slots_T, one, one)
    return draw.normal(2, len(inputs.positions_T), H, D), pages, evolve(inputs, num_decodes=0)


def measure(name: str) -> None:
    """Print a candidate's error and, where that is small enough, its speed."""
    candidate = CANDIDATES[name]
    error = candidate.error()
    if error > bound("attention", torch.bfloat16):
        click.echo(f"{name:28} error {error:.2e}: wrong")
        return
    speeds = (f"{step.name} {candidate.teraflops(step):6.1f}" for step in LARGE)
    click.echo(f"{name:28} error {error:.2e}   {'   '.join(speeds)} TFLOP/s")


def compile_all(names: tuple[str, ...]) -> None:
    """Compile for compute capability 9.0 and print what the assembler says of each."""
    from plugins.triton.tests.compile_for_hopper import Hopper
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Hopper())
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    made, run = [], JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, warmup=True, **options))
        return made[-1]

    JITFunction.run = compiled
    for name in names:
        CANDIDATES[name].compiled()
        click.echo(f"{name:28} {described(made[-1])}")


def described(kernel: Any) -> str:
    """Return registers, instructions that spill, and shared memory of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.findall(r"REG:(\d+)", usage)
    return f"{' '.join(registers)} registers, {len(re.findall('STL|LDL', code))} spills, {kernel.metadata.shared} bytes shared"


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(CANDIDATES)), help="These alone; repeatable.")
@click.option("--compile", "compile_only", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], compile_only: bool) -> None:
    """Check and time every candidate."""
    names = only or tuple(CANDIDATES)
    if compile_only:
        compile_all(names)
        return
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}")
    for name in names:
        measure(name)


if __name__ == "__main__":
    main()
