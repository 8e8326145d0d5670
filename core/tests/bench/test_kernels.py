"""Kernels are judged before they are timed, chosen from what is installed, and held to the least they must move and compute."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch
from attrs import evolve
from click.testing import CliRunner, Result

from paddock.bench.kernels import library
from paddock.bench.kernels.attention_cases import RAGGED, SMALL_STEPS, STEPS, Step, laid_out, rows_of
from paddock.bench.kernels.case import Case, Draw
from paddock.bench.kernels.int4_cases import Int4Cases, Int4Size
from paddock.bench.kernels.measuring import Bench
from paddock.bench.kernels.op_cases import FULL, SMALL, OpCases
from paddock.bench.kernels.rows import Planned, Row
from paddock.bench.kernels.verdict import op_verdict
from paddock.cli.bench import command
from paddock.cli.bench.interruption import SIGNALS
from paddock.cli.session import Session
from paddock.config import Environment
from paddock.errors import OptionError
from paddock.layers import reference, reference_attention
from paddock.planning.hardware import this_cpu
from paddock.planning.roofs import ceilings_of
from paddock.plugins import AttentionNeeds, AttentionSpec, OpSpec, hookimpl
from paddock.plugins.host import PluginHost
from paddock.testing.oracle import relative_rms

CPU = torch.device("cpu")
DRAW = Draw(device=CPU, dtype=torch.bfloat16)
HERE = __name__


def gelu(x_TF: torch.Tensor) -> torch.Tensor:
    """Compute what the twin computes."""
    return reference.gelu(x_TF)


def silu_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """Be wrong by a hundredth."""
    return reference.silu_mul(x_T2F) * 1.01


def cache_kv(*arguments: Any) -> None:
    """Fail."""
    raise ValueError("no such pages")


def gelu_when_time_is_up(x_TF: torch.Tensor) -> torch.Tensor:
    """Compute what the twin computes of one row; of more, have the process told to end."""
    if len(x_TF) > 1:
        signal.raise_signal(signal.SIGTERM)
    return reference.gelu(x_TF)


def gelu_that_hides_it(x_TF: torch.Tensor) -> torch.Tensor:
    """Turn the interruption into an error, as the end of a capture does."""
    try:
        return gelu_when_time_is_up(x_TF)
    except KeyboardInterrupt:
        raise RuntimeError("capture failed") from None


def careless(needs: AttentionNeeds, device: torch.device) -> Any:
    """Return a backend that mixes up the heads."""
    backend = reference_attention.create(needs, device)
    attend = backend.attend
    backend.attend = lambda q_THD, *rest: attend(q_THD, *rest).flip(1)  # type: ignore[method-assign]
    return backend


class Kernels:
    """Brings a right op, a wrong one, one that raises, one for GPUs, and a wrong attention backend."""

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return the ops."""
        here = [OpSpec(op=op, implementation=f"{HERE}:{op}", devices=("cpu",), rank=1) for op in ("gelu", "silu_mul", "cache_kv")]
        return [*here, OpSpec(op="rms_norm", implementation=f"{HERE}:absent", devices=("cuda",), rank=1)]

    @hookimpl
    def paddock_attention_backends(self) -> list[AttentionSpec]:
        """Return the backend."""
        return [
            AttentionSpec(
                name="careless",
                factory=f"{HERE}:careless",
                devices=("cpu",),
                dtypes=("bfloat16",),
                kv_cache_dtypes=("bfloat16",),
                page_sizes=(16,),
            )
        ]


def bench(*plugins: object) -> Bench:
    """Return a quick bench on this CPU of what the core and some plugins bring."""
    return Bench(registry=PluginHost(plugins=plugins, autoload=False).collect(), hardware=this_cpu(), quick=True)


def op_rows(given: Bench, name: str) -> list[Row]:
    """Return the rows of an op."""
    (provided,) = given.ops([name])
    return filled(given.op_cases(provided))


def filled(planned: list[Planned]) -> list[Row]:
    """Return the rows as measured."""
    return [each.measured() for each in planned]


def test_every_op_of_the_core_is_right_at_every_size() -> None:
    """Each definition passes its own check, in time; no op is without sizes."""
    given = bench()
    ops = given.ops()
    assert not given.without_cases(ops)
    rows = [row for each in ops for row in filled(given.op_cases(each))]
    assert not [row for row in rows if row.problem]
    assert all(row.microseconds and row.twin_microseconds for row in rows)
    assert {row.subject for row in rows} == {each.spec.op for each in given.registry.ops}


SERVED = sum(1 if step.in_fp8 else 2 for step in SMALL_STEPS)  # in bf16 and FP8, products in FP8 over FP8 alone


def test_the_cores_attention_is_right_on_every_step() -> None:
    """Decodes, prompts and both, KV in bf16 and FP8, products in FP8; torch's own is timed where one call can take the step."""
    given = bench()
    (backend,) = given.backends()
    rows = filled(given.attention_cases(backend))
    assert not [row for row in rows if row.problem]
    assert [row.case for row in rows if "FP8 products" in row.case] == [
        "decode 17, 40, 1, FP8 products, FP8 KV, pages of 16",
        "prefill 2 x 33, FP8 products, FP8 KV, pages of 16",
    ]
    assert len(rows) == SERVED
    assert [index for index, row in enumerate(rows) if row.library is not None] == [0, 4]


@pytest.mark.parametrize("op", ["rope_and_cache", "cache_kv", "quantize_fp8_static", "quantize_fp8_token"])
def test_a_definition_writes_fp8_as_itself(op: str) -> None:
    """Held against itself no value differs: keys are rounded to the activations' type on their way to FP8."""
    twin, cases = getattr(reference, op), OpCases(table=evolve(SMALL, tokens=(64,)), draw=DRAW).of(op)
    for verdict in (op_verdict(op, twin, twin, case.make) for case in cases):
        assert verdict.error == 0 or "FP8" not in verdict.what


@pytest.mark.parametrize("op", ["rms_norm_fp8", "layer_norm_fp8", "silu_mul_fp8", "gelu_fp8"])
def test_a_producer_of_fp8_is_held_to_its_definition(op: str) -> None:
    """Itself differs in nothing; a scale 2 percent off, a value in 50 and a sum that is not added are seen."""
    twin, cases = getattr(reference, op), OpCases(table=evolve(SMALL, tokens=(64,)), draw=DRAW).of(op)
    assert [case.name.partition(", ")[2] for case in cases] == ["static", "a scale a token", "a scale a token and 128"]

    def spoilt(*given: Any) -> Any:
        found = twin(*given)
        total, values = found if isinstance(found, tuple) else (None, found)
        values.values_TI.view(torch.uint8)[::5, ::10] ^= 1
        return values if total is None else (total, values)

    def rescaled(*given: Any) -> Any:
        found = twin(*given)
        total, values = found if isinstance(found, tuple) else (None, found)
        values = evolve(values, scale=values.scale * 1.02)
        return values if total is None else (total, values)

    for case in cases:
        assert op_verdict(op, twin, twin, case.make).error == 0
        assert not op_verdict(op, spoilt, twin, case.make).right
        assert not op_verdict(op, rescaled, twin, case.make).right
        if "norm" in op:
            assert not op_verdict(op, lambda x, delta, *rest: twin(x, None, *rest), twin, case.make).right


def test_an_fp8_product_is_held_to_float32() -> None:
    """Its definition is right, one percent is not; its bytes are the weight's, one each, and its products the matrix unit's."""
    (case, *_), twin = OpCases(table=FULL, draw=DRAW).of("linear_fp8"), reference.linear_fp8
    assert (case.name, case.kind) == ("8B 1 x 4096 -> 6144", "fp8")
    assert (case.nbytes, case.flops) == (6144 * 4096 + 4096 + 2 * 6144 + 4 * (1 + 6144), 2 * 6144 * 4096)
    for small in OpCases(table=SMALL, draw=DRAW).of("linear_fp8"):
        assert op_verdict("linear_fp8", twin, twin, small.make).right
        assert not op_verdict("linear_fp8", lambda *given: twin(*given) * 1.01, twin, small.make).right
    names = {case.name for case in OpCases(table=FULL, draw=DRAW).of("linear_fp8")}
    assert {f"70B {tokens} x 28672 -> 8192" for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 4096)} <= names
    assert not [name for name in names if "128256" in name]


def test_an_fp8_product_of_blocks_is_held_to_float32() -> None:
    """Its definition is right, one percent is not, nor is a token's scale taken for its neighbour's; it has a scale a block."""
    op, twin = "linear_fp8_blocks", reference.linear_fp8_blocks
    (case, *_) = OpCases(table=FULL, draw=DRAW).of(op)
    assert (case.name, case.kind, case.flops) == ("8B 1 x 4096 -> 6144", "fp8", 2 * 6144 * 4096)
    assert case.nbytes == 6144 * 4096 + 4096 + 2 * 6144 + 4 * 32 * (1 + 48)
    for small in OpCases(table=SMALL, draw=DRAW).of(op):
        assert op_verdict(op, twin, twin, small.make).right
        assert not op_verdict(op, lambda *given: twin(*given) * 1.01, twin, small.make).right

        def shifted(x: torch.Tensor, scale: torch.Tensor, *rest: Any) -> torch.Tensor:
            return twin(x, scale.roll(1, 0), *rest)

        assert op_verdict(op, shifted, twin, small.make).right == (len(small.make(0)[0]) == 1)


@pytest.mark.parametrize(("op", "kind", "x_bytes"), [("linear_int4", "bf16", 2 * 8192), ("linear_int4_fp8", "fp8", 8192 + 4)])
def test_a_4_bit_product_is_held_to_float32(op: str, kind: str, x_bytes: int) -> None:
    """Its definition is right, one percent is not; its bytes are half of one a weight, scales and zeros, x and the result."""
    twin, cases = getattr(reference, op), OpCases(table=FULL, draw=DRAW).of(op)
    assert (cases[0].name, cases[0].kind) == ("70B 1 x 8192 -> 10240", kind)
    weight_bytes = 10240 * 8192 // 2 + 10240 * (8192 // 128) * 2 + 10240 * (8192 // 128) // 2
    assert (cases[0].nbytes, cases[0].flops) == (weight_bytes + x_bytes + 2 * 10240, 2 * 10240 * 8192)
    assert len(cases) == 8 * 11
    assert {"70B 4096 x 28672 -> 8192", "Falcon-180B 16 x 59392 -> 14848"} <= {case.name for case in cases}
    for small in OpCases(table=SMALL, draw=DRAW).of(op):
        assert op_verdict(op, twin, twin, small.make).right
        assert not op_verdict(op, lambda *given: twin(*given) * 1.01, twin, small.make).right


def test_torchs_4_bit_product_does_the_same_work() -> None:
    """On a CPU its result is the definition's but for zeros times scales in bfloat16; it is for few tokens of that type."""
    best = library.OPS["linear_int4"]
    size = Int4Size(name="made", group=32, linears=((128, 256),))
    few, many = Int4Cases(sizes=(size,), tokens=(5, 100), draw=DRAW).of("linear_int4")
    given = few.make(0)
    (prepared,) = best.sets([given])
    assert relative_rms(best.call(*prepared), reference.linear_int4(*given)) < 0.01
    with pytest.raises(RuntimeError, match="few tokens"):
        best.sets([many.make(0)])


def test_a_wrong_kernel_has_an_error_and_no_time() -> None:
    """An op one percent off and attention with its heads mixed up are found out; their times are not told."""
    given = bench(Kernels())
    (backend,) = given.backends(["careless"])
    for row in (*op_rows(given, "silu_mul"), *filled(given.attention_cases(backend))):
        assert row.problem is not None
        assert row.problem.startswith("wrong: relative RMS error")
        assert (row.error or 0) > (row.allowed or 0)
        assert row.microseconds is None


def test_a_kernel_that_raises_is_one_problem() -> None:
    """Its rows say what it raised; a right kernel beside it is timed."""
    given = bench(Kernels())
    assert {row.problem for row in op_rows(given, "cache_kv")} == {"ValueError: no such pages"}
    assert all(row.microseconds for row in op_rows(given, "gelu"))


def test_who_is_measured() -> None:
    """What serves this device: a plugin's kernel in place of the core's, and the core's own where nobody else serves."""
    given = bench(Kernels())
    chosen = {each.spec.op: each.spec.implementation for each in given.ops()}
    assert chosen["gelu"] == f"{HERE}:gelu"
    assert chosen["rms_norm"] == "paddock.layers.reference:rms_norm"
    assert [each.spec.name for each in given.backends()] == ["careless"]
    assert [each.spec.name for each in given.backends(["torch"])] == ["torch"]
    with pytest.raises(OptionError, match="'gelo'"):
        given.ops(["gelo"])
    with pytest.raises(OptionError, match="'tritan'"):
        given.backends(["tritan"])


def test_a_backend_that_is_named_and_does_not_serve_is_an_error() -> None:
    """It says why, and what would let the backend serve; an empty table would say neither."""
    with pytest.raises(OptionError, match="'careless' does not serve here: takes bfloat16, not float32") as caught:
        evolve(bench(Kernels()), dtype="float32").backends(["torch", "careless"])
    assert caught.value.fix == "set dtype to bfloat16"


def test_a_call_is_bound_by_bytes_or_by_operations() -> None:
    """The limit is whichever takes longer; without ceilings there is none."""
    ceilings = ceilings_of("NVIDIA H200")
    moving = Case(name="", make=lambda seed: (), nbytes=43_000_000, flops=690e4, kind="bf16")
    computing = evolve(moving, flops=690e9)
    slow, quick = computing.limit(ceilings), moving.limit(ceilings)
    assert slow is not None
    assert quick is not None
    assert (quick.computes, slow.computes) == (False, True)
    assert [quick.seconds, slow.seconds] == pytest.approx([1e-5, 1e-3])
    assert moving.limit(None) is None


def test_bytes_and_operations_are_counted_once() -> None:
    """By hand: a norm's input and output, a product's weight, a causal prompt's pairs, a decode's keys and values."""
    cases = OpCases(table=FULL, draw=DRAW)
    assert next(case for case in cases.of("add_rms_norm") if case.name == "8B 64 x 4096").nbytes == 4 * 2 * 64 * 4096
    linear = next(case for case in cases.of("linear") if case.name == "8B 2 x 4096 -> 6144")
    assert (linear.nbytes, linear.flops) == (2 * (6144 * 4096 + 2 * (6144 + 4096)), 2 * 2 * 6144 * 4096)
    prompt = Step(name="", heads=(4, 2, 16), prompts=(3,))
    assert prompt.flops() == 4 * 4 * 16 * (1 + 2 + 3)
    decode = Step(name="", heads=(4, 2, 16), decodes=(10, 20))
    assert decode.nbytes(2, 1) == 2 * 30 * 2 * 16 * 1 + 2 * 2 * 4 * 16 * 2
    assert decode.flops() == 4 * 4 * 16 * 30


def test_the_same_seed_makes_the_same_arguments() -> None:
    """A check may run a kernel and its twin on arguments made twice."""
    for op in ("rms_norm", "rope_and_cache", "linear", "draw_filtered"):
        for case in OpCases(table=SMALL, draw=DRAW).of(op):
            pairs = zip(case.make(3), case.make(3), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_a_step_is_laid_out_as_the_executor_lays_it() -> None:
    """Pages are shuffled and belong to one sequence each; slots are where the rows of this step's tokens lie."""
    laid = laid_out(SMALL_STEPS[-1], page_size=16, kv_dtype=torch.bfloat16, draw=DRAW)
    inputs, (q_THD, kv) = laid.inputs, laid.case.make(0)
    assert len(q_THD) == len(inputs.positions_T) == sum(laid.step.news)
    assert (inputs.num_decodes, inputs.max_query_len, inputs.max_seq_len) == (2, 33, 33)
    last = kv.k_pages_NPKD.flatten(0, 1)[inputs.slots_T[1]]
    assert torch.equal(rows_of(laid, kv.k_pages_NPKD, 1)[-1], last)
    used = [page for s, length in enumerate(laid.step.lens) for page in inputs.block_tables_SM[s, : -(-length // 16)].tolist()]
    assert sorted(used) == list(range(len(kv.k_pages_NPKD)))


def test_published_steps_are_there() -> None:
    """Decodes of every shape, prompts, and both at once."""
    assert sum(bool(step.decodes and step.prompts) for step in STEPS) == 1
    assert len(set(RAGGED)) > 50
    assert sum(step.in_fp8 for step in STEPS) == 3
    assert {step.heads for step in STEPS} == {(64, 8, 128), (32, 8, 128), (232, 8, 64), (71, 1, 64)}


def test_the_sizes_a_reader_asks_about_are_there() -> None:
    """Long prompts and many decodes over GQA and Falcon-180B's heads; wide rows and linears of few tokens."""
    names = {step.name for step in STEPS}
    assert {f"decode {size}" for size in ("64 x 2k", "64 x 8k", "64 x 100..4096", "1 x 131k")} <= names
    assert {"prefill 1 x 8k", "prefill 4 x 2k", "prefill 1 x 4k, Falcon-180B heads", "decode 64 x 2k, Falcon-180B heads"} <= names
    cases = OpCases(table=FULL, draw=DRAW)
    norms = {case.name for case in cases.of("add_rms_norm")}
    assert {f"{model} {tokens}" for model in ("70B", "Falcon-180B") for tokens in (1, 4096)} <= {n.split(" x ")[0] for n in norms}
    assert {"70B 1 x 8192", "Falcon-180B 4096 x 14848"} <= norms
    assert {f"70B {tokens} x 8192 -> 8192" for tokens in (1, 2, 4, 8, 16, 32, 64)} <= {case.name for case in cases.of("linear")}
    assert all(cases.of(op) for op in ("silu_mul", "gelu", "rope_and_cache", "most_likely", "draw", "draw_filtered"))


def run(*arguments: str) -> Result:
    """Return what `paddock bench kernels --quick` on the CPU prints, with no plugin but the core."""
    session = Session(environment=Environment(plugins=()))
    words = ["kernels", "--quick", "--device", "cpu", *arguments]
    return CliRunner().invoke(command, words, obj=session, catch_exceptions=False)


def test_the_command_prints_one_json_object() -> None:
    """Rows with definitions, ceilings, versions and the command."""
    report = json.loads(run("--op", "gelu", "--op", "draw", "--json").stdout)
    assert report["bench"] == "kernels"
    assert {row["subject"] for row in report["rows"]} == {"gelu", "draw"}
    assert (report["complete"], report["interrupted_at"], report["cases_not_measured"]) == (True, None, 0)
    assert all(0 < row["check_seconds"] < row["wall_seconds"] for row in report["rows"])
    assert {"definitions", "ceilings", "gpu", "versions", "commit", "date", "command"} <= set(report)


def test_the_command_prints_a_line_a_case() -> None:
    """A backend that is named is measured alone."""
    lines = [line for line in run("--backend", "torch").stdout.splitlines() if line.startswith("torch ")]
    assert len(lines) == SERVED


@pytest.mark.parametrize("words", [("--op", "gelo"), ("--backend", "tritan")])
def test_a_wrong_name_is_all_the_command_says(words: tuple[str, str]) -> None:
    """No head of a table is printed before it."""
    session = Session(environment=Environment(plugins=()))
    result = CliRunner().invoke(command, ["kernels", "--quick", "--device", "cpu", *words], obj=session)
    assert isinstance(result.exception, OptionError)
    assert result.stdout == ""


def test_a_run_on_a_pipe_says_each_case_as_it_ends() -> None:
    """A line a case on standard error, with its number, the seconds it took and its name; the JSON alone on standard output."""
    result = run("--op", "gelu", "--json")
    assert [line.split(maxsplit=3)[0] for line in result.stderr.splitlines()] == ["1/2", "2/2"]
    assert result.stderr.splitlines()[0].endswith(" s  gelu quick 1 x 96")
    assert json.loads(result.stdout)["complete"]


@pytest.mark.parametrize("kernel", ["gelu_when_time_is_up", "gelu_that_hides_it"])
def test_an_interrupted_run_tells_what_was_measured(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows before the signal, the case it fell in, and that it is not all; the signal's handlers are as before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(reference, "gelu", globals()[kernel])
    session = Session(environment=Environment(plugins=()))
    result = CliRunner().invoke(command, ["kernels", "--quick", "--device", "cpu", "--op", "gelu", "--json"], obj=session)
    report = json.loads(result.stdout)
    assert [row["case"] for row in report["rows"]] == ["quick 1 x 96"]
    assert (report["complete"], report["interrupted_at"], report["cases_not_measured"]) == (False, "gelu quick 7 x 96", 1)
    assert result.exit_code != 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_interrupted_table_says_that_it_is_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does the table."""
    monkeypatch.setattr(reference, "gelu", gelu_when_time_is_up)
    session = Session(environment=Environment(plugins=()))
    result = CliRunner().invoke(command, ["kernels", "--quick", "--device", "cpu", "--op", "gelu"], obj=session)
    assert "incomplete: interrupted at gelu quick 7 x 96, 1 cases not measured" in result.stdout
