"""Compile the kernels for compute capability 9.0 on a machine that may have no GPU; print what each example compiled as JSON.

Run as a script, in a process of its own: what it does to Triton's driver and launches stays there. Triton brings the assembler.
With the word `orders` only norms are compiled, and the order of their sums is printed. With the word `ahead` everything is
compiled in threads first, then launched, as far as that goes without a GPU. With the word `turns` it prints, of each kernel
that may start before its turn, what it does before it has waited for it. `products_for_hopper.py` looks closer at products.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler
from attrs import evolve
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from paddock.errors import KernelError
from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.int4 import int4_weight
from paddock.plugins import AttentionNeeds, resolve
from paddock_triton import attention, linear_ring, ops_activation_fp8, ops_linear_int4, ops_norm, ops_quantize, plugin

FP8, HALF = torch.float8_e4m3fn, torch.bfloat16
# (H, K, D), KV dtype, page size, features: each tile shape, both ways to read pages, and pairs of FP8 values.
STEPS: dict[str, tuple[tuple[int, int, int], torch.dtype, int, dict[str, Any]]] = {
    "attention, bfloat16 pages of 64": ((8, 2, 128), HALF, 64, {}),
    "attention, bfloat16 pages of 64, ALiBi": ((8, 2, 128), HALF, 64, {"alibi_slopes_H": torch.ones(8)}),
    "attention, FP8 pages of 64": ((8, 2, 128), FP8, 64, {}),
    "attention, FP8 pages of 64, FP8 out": ((8, 2, 128), FP8, 64, {"out_scale": torch.ones(())}),
    "attention, 29 query heads a KV head, FP8 pages of 16, softcap": ((29, 1, 64), FP8, 16, {"softcap": 2.0}),
    "attention in FP8 arithmetic": ((8, 2, 128), FP8, 64, {"in_fp8": True}),
    "attention in FP8 arithmetic, heads of 256, ALiBi, a stored scale of queries": (
        (6, 2, 256),
        FP8,
        16,
        {"in_fp8": True, "alibi_slopes_H": torch.ones(6), "q_scale": torch.ones(())},
    ),
    "attention, heads of 256, window": ((6, 2, 256), HALF, 64, {"window": 100}),
}
# What a kernel is for: it compiles to something slower where a tile's sides are not the unit's, or addresses not multiples of 16.
INSTRUCTIONS = {
    ("paddock_triton.ops_linear_fp8", "_few_kernel"): "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3",
    ("paddock_triton.linear_ring", "_ring_kernel"): "k32.f32.e4m3.e4m3",
    ("paddock_triton.ops_int4", "_fp8_kernel"): "st.global.v4.b32",
    ("paddock_triton.ops_linear_fp8_blocks", "_block_few_kernel"): "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3",
    ("paddock_triton.ops_linear_fp8_blocks", "_block_one_kernel"): "cvt.rn.f16x2.e4m3x2",
}
RING_IN_HALVES = "k16.f32.bf16.bf16"
PROMPTS_IN_FP8 = ".f32.f16.f16"  # float16 holds each FP8 value; products of e4m3 came out not finite on a GPU
IN_REGISTERS = {"_largest_kernel", "_part_kernel"}  # kernels that may keep nothing in a stack
TOKENS, OTHER_TOKENS = 20, (21, 32)  # of a step: rows that begin at multiples of 16 bytes, rows that do not, a power of two
FEW, MANY = 1, 40  # of a step: wide rows that programs share, and wide rows that they do not, whichever way TOKENS take


class Hopper:
    """A driver that names the target and has no device: code is loaded, and launched, to nowhere."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda name, code, shared, device: (0, 0, 0, 0, 1024),
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        """Return what launches a kernel."""
        return lambda *_: None

    def get_current_target(self) -> GPUTarget:
        """Return compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the default stream."""
        return 0


def _attend(heads: tuple[int, int, int], kv_dtype: torch.dtype, page: int, features: dict[str, Any], *, tokens: int) -> None:
    """Launch a decode and a prefill, as one step has them."""
    num_heads, num_kv_heads, head = heads
    (spec,), device = plugin.paddock_attention_backends(), torch.device("cpu")
    backend = resolve(spec.factory)(AttentionNeeds(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head), device)
    pages = torch.zeros(2, 8, page, num_kv_heads, head).to(kv_dtype)
    inputs = AttentionInputs(
        positions_T=torch.arange(tokens),
        slots_T=torch.arange(tokens),
        query_start_S1=torch.tensor([0, 1, tokens], dtype=torch.int32),
        seq_lens_S=torch.tensor([3, tokens - 1], dtype=torch.int32),
        block_tables_SM=torch.zeros(2, tokens, dtype=torch.int32),
        page_size=page,
        num_decodes=1,
        max_query_len=tokens - 1,
        max_seq_len=tokens - 1,
    )
    scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(()) if kv_dtype == FP8 else None)
    params = AttentionParams(scale=head**-0.5, **scales, **features)
    if params.out_scale is not None:  # decodes alone emit it
        inputs, tokens = evolve(inputs, num_decodes=2), 2
    q_THD = torch.zeros(tokens, num_heads, head, dtype=HALF)
    backend.attend(q_THD, LayerKV(*pages), evolve(inputs, prepared=backend.prepare(inputs)), params)


def _examples(tokens: int) -> dict[str, tuple[Any, ...]]:
    """Return arguments for every op, as a layer or the sampler gives them."""
    x_TE, weight_E = torch.zeros(tokens, 512, dtype=HALF), torch.zeros(512, dtype=HALF)
    groups_GO = torch.zeros(4, 256, dtype=torch.uint8)
    weight_int4 = int4_weight(torch.zeros(256, 512, dtype=torch.uint8), groups_GO.to(HALF), groups_GO)
    table_LD, index_T = torch.zeros(64, 64), torch.arange(tokens)
    q_THD, k_TKD = torch.zeros(tokens, 8, 64, dtype=HALF), torch.zeros(tokens, 2, 64, dtype=HALF)
    kv, one = LayerKV(*torch.zeros(2, 4, 16, 2, 64).to(FP8)), torch.ones(())
    logits_RV, top_R, index_R = torch.zeros(tokens, 128_256), torch.zeros(tokens), torch.zeros(tokens, dtype=torch.int32)
    temperature_R, top_p_R, min_p_R = torch.ones(3, tokens)  # the sampler's: slices of one tensor, at any address
    integers_3R = torch.ones(3, tokens, dtype=torch.int32)
    draw, noise = (logits_RV, top_R, index_T, temperature_R), (integers_3R[1:].T, index_R)
    return {
        "embed": (index_T, x_TE),
        "linear": (x_TE, torch.zeros(256, 512, dtype=HALF)),
        "rms_norm": (x_TE, weight_E, 1e-5),
        "add_rms_norm": (x_TE, x_TE, weight_E, 1e-5),
        "layer_norm": (x_TE, weight_E, weight_E, 1e-5),
        "add_layer_norm": (x_TE, x_TE, weight_E, None, 1e-5),
        "silu_mul": (x_TE,),
        "gelu": (x_TE,),
        "rope_and_cache": (q_THD, k_TKD, k_TKD, table_LD, index_T, kv, index_T, one, one),
        "cache_kv": (k_TKD, k_TKD, kv, index_T, one, one),
        "quantize_fp8_static": (x_TE, one),
        "quantize_fp8_token": (x_TE, None),
        "linear_fp8": (x_TE.to(FP8), one, torch.zeros(256, 512).to(FP8), torch.ones(256, 1), HALF),
        "linear_fp8_fast": (x_TE.to(FP8), one, torch.zeros(256, 512).to(FP8), torch.ones(256, 1), HALF),
        "linear_fp8_blocks": (
            x_TE.to(FP8),
            torch.ones(tokens, 4),
            torch.zeros(256, 512).to(FP8),
            torch.ones(2, 4),
            (128, 128),
            HALF,
        ),
        "linear_int4": (x_TE, weight_int4),
        "linear_int4_fp8": (x_TE.to(FP8), torch.ones(tokens, 1), weight_int4, HALF),
        "int4_to_fp8": (weight_int4, weight_int4.row_scales()),
        "rms_norm_fp8": (x_TE, x_TE, weight_E, 1e-5, one, None),
        "layer_norm_fp8": (x_TE, x_TE, weight_E, None, 1e-5, one, None),
        "silu_mul_fp8": (x_TE, one, None),
        "gelu_fp8": (x_TE, one, None),
        "linear_silu_mul_fp8": (x_TE.to(FP8), one, torch.zeros(256, 512).to(FP8), torch.ones(256, 1), HALF, one),
        "linear_silu_mul_fp8_fast": (x_TE.to(FP8), one, torch.zeros(256, 512).to(FP8), torch.ones(256, 1), HALF, one),
        "most_likely": (logits_RV,),
        "draw": (*draw, *noise),
        "draw_filtered": (*draw, integers_3R[0], top_p_R, min_p_R, *noise),
    }


def _only_compile() -> list[str]:
    """Make every launch compile and stop there; return the list that the names of kernels go to, each when it is new."""
    names: list[str] = []
    known: list[Any] = []
    run = JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        assert kernel.asm["cubin"], self.fn.__name__
        instruction = INSTRUCTIONS.get((self.fn.__module__, self.fn.__name__), "")
        if self.fn.__name__ == "_ring_kernel" and options["spec"].item > 1:
            instruction = RING_IN_HALVES
        if self.fn.__name__ == "_prefill" and "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]:
            instruction = PROMPTS_IN_FP8
        assert instruction in kernel.asm["ptx"], f"{self.fn.__name__} has no {instruction}"
        if self.fn.__name__ in IN_REGISTERS:
            assert not resources(kernel.asm["cubin"])["stack"], f"{self.fn.__name__} does not fit its registers"
        if all(kernel is not one for one in known):
            known.append(kernel)
            names.append(self.fn.__name__)
        return kernel

    JITFunction.run = compiled
    return names


def _calls(tokens: int) -> dict[str, Callable[[], Any]]:
    """Return a call of every op and every step of attention."""
    ops: dict[str, Callable[[], Any]] = {
        spec.op: partial(resolve(spec.implementation), *_examples(tokens)[spec.op]) for spec in plugin.paddock_ops()
    }
    more: dict[str, Callable[[], Any]] = {}
    for op in ("rms_norm_fp8", "layer_norm_fp8", "silu_mul_fp8", "gelu_fp8"):
        *given, _, bound = _examples(tokens)[op]
        more[f"{op}, a scale a token"] = partial(ops[op].func, *given, None, bound)  # type: ignore[attr-defined]
        more[f"{op}, a scale a group"] = partial(ops[op].func, *given, None, bound, 128)  # type: ignore[attr-defined]
    for op in ("add_layer_norm", "layer_norm_fp8"):
        example = _examples(tokens)[op]
        more[f"{op}, two deltas"] = partial(ops[op].func, *example, more_TE=example[1])  # type: ignore[attr-defined]
    q_THD, *rest = _examples(tokens)["rope_and_cache"]
    q_TKGD = q_THD.view(tokens, 2, 4, 64)
    more["rope_and_cache, in groups"] = partial(ops["rope_and_cache"].func, q_TKGD, *rest)  # type: ignore[attr-defined]
    more |= _wide_rows(tokens)
    more["quantize_fp8_token, a scale a group"] = partial(
        ops["quantize_fp8_token"].func,  # type: ignore[attr-defined]
        *_examples(tokens)["quantize_fp8_token"],
        128,
    )
    values_TI, scale_TG, *blocks = _examples(tokens)["linear_fp8_blocks"]
    more["linear_fp8_blocks, one token"] = partial(
        ops["linear_fp8_blocks"].func,  # type: ignore[attr-defined]
        values_TI[:1],
        scale_TG[:1],
        *blocks,
    )
    for op in ("linear_fp8", "linear_silu_mul_fp8"):
        values_TI, one, *weight = _examples(tokens)[op]
        product, scale_T1 = ops[op].func, torch.ones(tokens, 1)  # type: ignore[attr-defined]
        more[f"{op}, one token"] = partial(product, values_TI[:1], one, *weight)
        more[f"{op}, a scale a token"] = partial(product, values_TI, scale_T1, *weight)
    values_TI, one, weight_OI, weight_scale_O1, dtype = _examples(tokens)["linear_fp8"]
    odd = values_TI[:, :500].contiguous(), one, weight_OI[:, :500].contiguous(), weight_scale_O1, dtype
    more["linear_fp8, rows at odd addresses"] = partial(ops["linear_fp8"].func, *odd)  # type: ignore[attr-defined]
    x_TE, weight_OE = _examples(tokens)["linear"]
    linear = ops["linear"].func  # type: ignore[attr-defined]
    more["linear, one token"] = partial(linear, x_TE[:1], weight_OE)
    more["linear, rows at odd addresses"] = partial(linear, x_TE[:, :500].contiguous(), weight_OE[:, :500].contiguous())
    return ops | more | {name: partial(_attend, *step, tokens=tokens) for name, step in STEPS.items()}


def _wide_rows(tokens: int) -> dict[str, Callable[[], Any]]:
    """Return calls, with a scale a token, of rows that few tokens or, of activations, any number of them have shared."""
    x_TX, fits = torch.zeros(tokens, 2 * 53248, dtype=HALF), {14336: "a wide row", 53248: "a row too wide for a program"}
    more: dict[str, Callable[[], Any]] = {}
    for width, row in fits.items():
        more[f"silu_mul_fp8, {row}"] = partial(ops_activation_fp8.silu_mul_fp8, x_TX[:, : 2 * width], None, None)
        more[f"gelu_fp8, {row}"] = partial(ops_activation_fp8.gelu_fp8, x_TX[:, :width], None, None)
        more[f"quantize_fp8_token, {row}"] = partial(ops_quantize.quantize_fp8_token, x_TX[:, :width], None)
    return more


def _watch_compilations(failing: set[str]) -> list[tuple[str, bool]]:
    """Return the list that every compilation goes to: the kernel, and whether in a thread. Those of `failing` fail."""
    seen: list[tuple[str, bool]] = []
    compile_kernel = triton.compiler.compile

    def watched(source: Any, **options: Any) -> Any:
        seen.append((source.name, threading.current_thread() is not threading.main_thread()))
        if source.name in failing:
            raise RuntimeError("made to fail")
        return compile_kernel(source, **options)

    triton.compiler.compile = watched
    return seen


def _compile_ahead() -> None:
    """Compile every example's kernels ahead but one's, launch all, and print which were compiled when, and what failed how.

    Wide rows are launched for other numbers of tokens too, which take other kernels.
    """
    failing = "_gelu_kernel"
    seen, calls, messages = _watch_compilations({failing}), _calls(TOKENS), []
    with resolve(plugin.COMPILE_AHEAD)(torch.device("cpu")):
        for call in calls.values():
            call()
    ahead = [*seen]
    seen.clear()
    for call in (*calls.values(), *_wide_rows(FEW).values(), *_wide_rows(MANY).values()):
        try:
            call()
        except KernelError as error:
            messages.append(error.message)
    json.dump({"failing": failing, "ahead": ahead, "launched": seen, "messages": messages}, sys.stdout)


def _orders() -> None:
    """Print, for each norm at a published width, what of a row each thread of the plain kernel and the FP8 ones adds up."""
    found: dict[str, set[str]] = {}
    x_TE, weight_E, run = torch.zeros(4, 4096, dtype=HALF), torch.zeros(4096, dtype=HALF), JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        text = kernel.asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
        found.setdefault(self.fn.__name__, set()).update(layouts[name] for name in re.findall(r"tt.load .*(#blocked\w*)>", text))
        return kernel

    JITFunction.run = compiled
    for name, vectors in (("rms_norm", (weight_E,)), ("layer_norm", (weight_E, weight_E))):
        plain, fp8 = (getattr(ops_norm, op) for op in (f"add_{name}", f"{name}_fp8"))
        plain(x_TE, x_TE, *vectors, 1e-5)
        for scale in (torch.ones(()), None):
            fp8(x_TE, x_TE, *vectors, 1e-5, scale, None)
        fp8(x_TE, x_TE, *vectors, 1e-5, None, None, 128)
    json.dump({name: sorted(layouts) for name, layouts in found.items()}, sys.stdout)


def _turns() -> None:
    """Print, for each kernel launched as dependent, whether it lets the next start, and what it touches before it has waited."""
    found: dict[str, set[str]] = {}
    run = JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        if kernel.metadata.launch_pdl:
            before, waits, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
            said = found.setdefault(self.fn.__name__, set())
            said |= {"starts the next"} if "griddepcontrol.launch_dependents" in before else set()
            said |= {"waits"} if waits else set()
            said.update(re.findall(r"\b(?:ld\.global|st\.global|atom|red|ret)\b", before))
        return kernel

    JITFunction.run = compiled
    for call in _calls(TOKENS).values():
        call()
    json.dump({name: sorted(said) for name, said in found.items()}, sys.stdout)


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread and the bytes of its stack: what does not fit its registers lies there."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    return {"registers": int(registers), "stack": int(stack)}


def pretend() -> None:
    """Let Triton and the ops take this machine for one with a Hopper GPU of an H200's size."""
    driver.set_active(Hopper())
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    attention.runs_on = lambda device: True  # type: ignore[attr-defined]
    for products in (ops_linear_int4, linear_ring):
        products.runs_on, products.processors = lambda device: True, lambda device: 132  # type: ignore[attr-defined]


def main() -> None:
    """Compile everything and print {example: [new kernel, ...]}; with other numbers of tokens after all else."""
    pretend()
    others = {"ahead": _compile_ahead, "turns": _turns, "orders": _orders}
    if sys.argv[1:]:
        others[sys.argv[1]]()
        return
    names, found = _only_compile(), {}
    examples = _calls(TOKENS)
    examples |= {f"{name}, {tokens} tokens": call for tokens in OTHER_TOKENS for name, call in _calls(tokens).items()}
    for name, example in examples.items():
        example()
        found[name] = [*names]
        names.clear()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
