"""What every plugin's parts must hold to, as checks its tests call.

`check_model(spec, config)` is all a model plugin's test file needs beside a comparison with a reference of its own.
`paddock.testing.kernels` holds attention backends and ops to their definitions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from paddock import axes
from paddock.layers import AttentionBackend, Builder, Communicator, LinearMethod, Model, Ops, finalise, randomise, targets
from paddock.layers.reference_attention import create as create_reference
from paddock.layers.unquantized import PlainMethod
from paddock.plugins import AttentionNeeds, ModelSpec, resolve
from paddock.testing.oracle import relative_rms
from paddock.testing.paging import Chunk, Pages, step
from paddock.testing.ranks import run_ranks

MODEL_BOUND = 1e-5  # relative RMS of float32 logits computed in another order
_PAGE = 16
_OPTIONAL = ("k_scale", "v_scale")  # 1 unless a checkpoint says otherwise
_CPU = torch.device("cpu")


@frozen(eq=False, kw_only=True)
class BuiltModel:
    """A model built as planning would build it, its parameters random, and what runs it."""

    config: Any
    table: axes.WeightTable
    needs: AttentionNeeds
    model: Any
    backend: AttentionBackend
    dtype: torch.dtype
    num_layers: int

    def pages(self, *, seed: int = 0, kv_heads: int | None = None) -> Pages:
        """Return fresh pages, of `kv_heads` heads where this rank does not hold them all."""
        return Pages(
            num_layers=self.num_layers,
            num_kv_heads=kv_heads or self.needs.num_kv_heads,
            head_dim=self.needs.head_dim,
            page_size=_PAGE,
            dtype=self.dtype,
            seed=seed,
        )

    def run(self, *steps: Sequence[Chunk], seed: int = 0) -> dict[str, Tensor]:
        """Return each sequence's logits [its tokens, V] after these steps on fresh pages."""
        pages = self.pages(seed=seed)
        logits: dict[str, list[Tensor]] = {}
        model: Model = self.model
        for chunks in steps:
            for (name, _), rows in zip(chunks, step(model, pages, self.backend, chunks), strict=True):
                logits.setdefault(name, []).append(rows)
        return {name: torch.cat(rows) for name, rows in logits.items()}


def build_model(
    spec: ModelSpec,
    raw: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    max_model_len: int = 128,
    seed: int = 0,
    shard: axes.Shard = axes.WHOLE,
    communicator: Communicator | None = None,
    layers: range | None = None,
    method_for: Callable[[str, axes.Linear], LinearMethod] | None = None,
    state: Mapping[str, Tensor] | None = None,
    finalised: bool = True,
) -> BuiltModel:
    """Return the model of a config.json, on the CPU with the core's own ops: parameters from `state`, else random.

    `finalised` False leaves the parameters as a checkpoint has them, for looking at; such a model does not run.
    """
    config = resolve(spec.parse_config)(raw, ())
    table, needs = resolve(spec.weights)(config), resolve(spec.attention)(config)
    backend = create_reference(needs, _CPU)
    builder = Builder(
        table,
        method_for=method_for or (lambda path, linear: PlainMethod.of(linear, dtype)),
        ops=Ops(),
        backend=backend,
        dtype=dtype,
        device=_CPU,
        max_model_len=max_model_len,
        shard=shard,
        communicator=communicator,
        layers=layers,
    )
    model = resolve(spec.build)(config, builder)
    if state is None:
        randomise(model, torch.Generator().manual_seed(seed))
    else:
        load(model, state)
    if finalised:
        finalise(model)
    return BuiltModel(
        config=config, table=table, needs=needs, model=model, backend=backend, dtype=dtype, num_layers=len(builder.layers)
    )


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model's parameters from whole tensors by checkpoint name."""
    with torch.no_grad():
        for target in targets(model):
            found = [state[name] for name in (target.name, *target.aliases) if name in state]
            assert found or target.optional, f"no {target.name} in the checkpoint"
            for tensor in found[:1]:
                assert tuple(tensor.shape) == target.shape, (target.name, tuple(tensor.shape), target.shape)
                target.view.copy_(tensor[tuple(slice(*span) for span in target.region)])


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole tensors of a model built on one rank and not finalised, by checkpoint name."""
    return {target.name: target.view.clone() for target in targets(model)}


def check_model(spec: ModelSpec, raw: Mapping[str, Any], *, world: int = 2) -> None:
    """Check every contract of a model plugin on a (small) config.json; `world` ranks must be able to share it, 1 to skip."""
    built = build_model(spec, raw)
    check_parameters(build_model(spec, raw, finalised=False))
    check_chunking(built)
    check_batching(built)
    check_wanted(built)
    if world > 1:
        check_pipeline(spec, raw)
        check_tensor_parallel(spec, raw, world=world)


@torch.no_grad()
def check_parameters(built: BuiltModel) -> None:
    """Check of a model not finalised that each checkpoint tensor is used, and each parameter filled, exactly once."""
    found = [target for target in targets(built.model) if not target.optional]
    names = sorted(target.name for target in found)
    declared = sorted(_declared_names(built.table))
    assert names == declared, f"the modules load {names}, the weight table declares {declared}"
    before = {name: parameter.clone() for name, parameter in built.model.named_parameters()}
    for target in found:
        target.view.copy_(torch.zeros_like(target.view))
    for target in found:
        target.view.add_(1)
    wrong = [n for n, p in built.model.named_parameters() if n.rsplit(".")[-1] not in _OPTIONAL and not (p == 1).all()]
    for name, parameter in built.model.named_parameters():
        parameter.copy_(before[name])
    assert not wrong, f"not filled exactly once: {wrong}"


def check_chunking(built: BuiltModel, *, length: int = 41, bound: float = MODEL_BOUND) -> None:
    """Check that a prompt gives the same logits whole, in chunks across page borders, and token by token.

    A model that rounds activations to few bits needs a wider `bound`: where a sum in another order falls on the other side of a
    rounding, all that depends on it differs by a rounding.
    """
    prompt = _tokens(built, length)
    (whole,) = built.run([("a", prompt)]).values()
    for sizes in ((7, 9, 1, length - 17), (_PAGE, length - _PAGE), (1,) * length):
        steps, start = [], 0
        for size in sizes:
            steps.append([("a", prompt[start : start + size])])
            start += size
        _same(built.run(*steps, seed=1)["a"], whole, f"prompt of {length} in chunks of {sizes}", bound)


def check_batching(built: BuiltModel, *, bound: float = MODEL_BOUND) -> None:
    """Check that sequences of mixed length give together, and in any order, what each gives alone; `bound` as above."""
    prompts = {name: _tokens(built, length, seed=length) for name, length in (("a", 1), ("b", 16), ("c", 40), ("d", 5))}
    nexts = {name: [i % _vocab(built)] for i, name in enumerate(prompts)}
    alone = {name: built.run([(name, tokens)], [(name, nexts[name])])[name] for name, tokens in prompts.items()}
    for order in ("abcd", "adcb"):
        mixed = [[(name, nexts[name]) for name in order[:2]] + [(name, prompts[name]) for name in order[2:]]]
        first, last = [(name, prompts[name]) for name in order[:2]], [(name, nexts[name]) for name in order[2:]]
        for name, logits in built.run(first, *mixed, last, seed=2).items():
            _same(logits, alone[name], f"sequence {name} of batch {order}", bound)


@torch.inference_mode()
def check_wanted(built: BuiltModel, *, bound: float = MODEL_BOUND) -> None:
    """Check that a step of which some tokens alone are wanted gives their logits, of them alone or of all; `bound` as above."""
    lengths, wanted = (1, 5, 23), [0, 5, 28]
    tokens = torch.tensor(_tokens(built, sum(lengths)))

    def logits_of(rows: Tensor | None) -> Tensor:
        pages = built.pages()
        inputs = pages.inputs([(str(i), length) for i, length in enumerate(lengths)])
        inputs = evolve(inputs, prepared=built.backend.prepare(inputs), wanted_R=rows)
        found: Tensor = built.model.logits(built.model.forward(built.model.embed(tokens), inputs, pages.layers))
        return found

    expected, logits = logits_of(None)[wanted], logits_of(torch.tensor(wanted))
    assert len(logits) in (len(wanted), len(tokens)), f"{len(logits)} rows where {len(wanted)} of {len(tokens)} are wanted"
    _same(logits if len(logits) == len(wanted) else logits[wanted], expected, "tokens that are wanted", bound)


def check_tensor_parallel(spec: ModelSpec, raw: Mapping[str, Any], *, world: int = 2) -> None:
    """Check that `world` ranks, each with its share of the weights, give the logits of one."""
    state = checkpoint(build_model(spec, raw, finalised=False).model)
    single = build_model(spec, raw, state=state)
    prompt = _tokens(single, 21)
    (expected,) = single.run([("a", prompt)]).values()
    cuts = frozenset({axes.HEADS, axes.KV_HEADS, axes.FFN, axes.VOCAB})
    for rank, logits in enumerate(run_ranks(world, partial(_rank_logits, spec, raw, state, prompt, world, cuts))):
        _same(logits, expected, f"rank {rank} of {world}")


def check_pipeline(spec: ModelSpec, raw: Mapping[str, Any]) -> None:
    """Check that two stages, one after the other, give the logits of one, each holding only its own tensors."""
    state = checkpoint(build_model(spec, raw, finalised=False).model)
    single = build_model(spec, raw, state=state)
    prompt = _tokens(single, 21)
    (expected,) = single.run([("a", prompt)]).values()
    cut, total = max(1, single.table.num_layers // 2), single.table.num_layers
    first, last = (build_model(spec, raw, state=state, layers=layers) for layers in (range(cut), range(cut, total)))
    logits = _through_stages(first, last, prompt)
    _same(logits, expected, "two pipeline stages")


@torch.inference_mode()
def _through_stages(first: BuiltModel, last: BuiltModel, prompt: Sequence[int]) -> Tensor:
    x_TE = first.model.embed(torch.tensor(prompt))
    for stage in (first, last):
        pages = stage.pages()
        inputs = pages.inputs([("a", len(prompt))])
        x_TE = stage.model.forward(x_TE, evolve(inputs, prepared=stage.backend.prepare(inputs)), pages.layers)
    logits_TV: Tensor = last.model.logits(x_TE)
    return logits_TV


def _rank_logits(
    spec: ModelSpec,
    raw: Mapping[str, Any],
    state: Mapping[str, Tensor],
    prompt: Sequence[int],
    world: int,
    cuts: frozenset[str],
    rank: int,
    communicator: Communicator,
) -> Tensor:
    shard = axes.Shard(rank, world, cuts)
    built = build_model(spec, raw, shard=shard, communicator=communicator, state=state)
    kv_heads = shard.part(axes.Part("kv", axes.KV_HEADS, built.needs.num_kv_heads)).size
    (logits,) = step(built.model, built.pages(kv_heads=kv_heads), built.backend, [("a", prompt)])
    return logits


def _declared_names(table: axes.WeightTable) -> Iterator[str]:
    for _, source, module in table.modules():
        if isinstance(module, axes.Embedding):
            yield f"{source}{module.rows.source}.weight"
        elif isinstance(module, axes.Vector):
            yield from (f"{source}{module.source}.{name}" for name in _names(module.bias))
        elif not module.tied_to:
            yield from (f"{source}{part.source}.{name}" for part in module.out for name in _names(module.bias))


def _names(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _tokens(built: BuiltModel, count: int, *, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(_vocab(built)), k=count)


def _vocab(built: BuiltModel) -> int:
    return int(built.config.vocab_size)


def _same(actual: Tensor, expected: Tensor, what: str, bound: float = MODEL_BOUND) -> None:
    error = relative_rms(actual, expected)
    assert error <= bound, f"{what}: logits differ by a relative RMS of {error:.3g}, allowed {bound:.3g}"
