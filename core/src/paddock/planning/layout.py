"""How a model is spread: tensor and pipeline sizes, the layers of each stage, and whether parts and groups can be cut so."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from attrs import evolve, field, frozen

from paddock.axes import FFN, HEADS, KV_HEADS, VOCAB, WHOLE, Embedding, Linear, Part, Shard, WeightTable
from paddock.config import EngineConfig
from paddock.errors import PlanError
from paddock.planning.hardware import Hardware
from paddock.planning.notes import ASKED, Notes
from paddock.planning.plan import Rejected
from paddock.planning.weights import Stage, Tensors, straddling_groups
from paddock.plugins import kinds
from paddock.plugins.descriptors import AttentionNeeds, ParallelSpec
from paddock.plugins.provider import Provided
from paddock.plugins.registry import Registry

# What tensor parallelism cuts, for the ledger of a plan made before any plugin that does it is installed.
USUAL_CUTS = frozenset({HEADS, KV_HEADS, FFN, VOCAB})


Strategy = Provided[ParallelSpec] | None


@frozen(kw_only=True)
class Sizes:
    """Ranks that share each layer, and stages that share the layers."""

    tensor: int
    pipeline: int

    @property
    def devices(self) -> int:
        """Return how many devices that takes."""
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        """Return `tp 2 x pp 1`."""
        return f"tp {self.tensor} x pp {self.pipeline}"


@frozen(kw_only=True)
class Layout:
    """The sizes, the share of one rank, the stages, and the strategies that carry them out."""

    sizes: Sizes
    shard: Shard
    stages: tuple[Stage, ...]
    strategies: tuple[ParallelSpec, ...] = ()


@frozen(kw_only=True)
class Divisible:
    """What is to be cut: the weight table, the tensors that hold it, the KV heads; `cuts` names the axes."""

    table: WeightTable
    tensors: Tensors
    needs: AttentionNeeds
    cuts: frozenset[str] = USUAL_CUTS
    layer_cost: Callable[[int], float] = field(default=lambda _: 1.0)

    def shard(self, world: int) -> Shard:
        """Return the first rank's share; all ranks hold the same amounts."""
        return Shard(0, world, self.cuts) if world > 1 else WHOLE

    def why_not(self, sizes: Sizes) -> list[str]:
        """Return every reason why the model cannot be spread so."""
        reasons = []
        if sizes.pipeline > self.table.num_layers:
            reasons.append(f"{sizes.pipeline} stages for {self.table.num_layers} layers")
        uneven = self._uneven(self.shard(sizes.tensor))
        return reasons + (uneven or list(straddling_groups(self.table, self.tensors, self.shard(sizes.tensor))))

    def copies(self, world: int) -> dict[int, list[str]]:
        """Return what several ranks hold alike, by how many do: checkpoint prefixes of linears, and the KV pages.

        A part with fewer units than ranks is held by all that share a unit; a linear that takes in a whole part, by all.
        """
        shard, found = self.shard(world), dict[int, list[str]]()
        linears = (module for module in (*self.table.outer, *self.table.layer) if isinstance(module, Linear))
        for linear in (linear for linear in linears if not linear.tied_to):
            for part in linear.out:
                times = _times(shard, part if part.axis in self.cuts else linear.inp)
                if times > 1:
                    found.setdefault(times, []).append(part.source)
        times = _times(shard, Part("kv", KV_HEADS, self.needs.num_kv_heads))
        if times > 1:
            found.setdefault(times, []).append("the KV pages")
        return found

    def stages(self, count: int) -> tuple[Stage, ...]:
        """Return the layers of each stage, the costliest stage as cheap as it can be."""
        ends = cut_layers([self.layer_cost(i) for i in range(self.table.num_layers)], count)
        starts = [0, *ends[:-1]]
        return tuple(Stage(index=i, count=count, first=starts[i], end=ends[i]) for i in range(count))

    def _uneven(self, shard: Shard) -> list[str]:
        parts, inputs = [Part("kv", KV_HEADS, self.needs.num_kv_heads, self.needs.head_dim)], []
        for module in (*self.table.outer, *self.table.layer):
            if isinstance(module, Linear):
                parts += module.out
                inputs.append(module.inp)
            else:
                parts += [module.rows, module.width] if isinstance(module, Embedding) else [module.width]
        said = [_refusal(shard, part) for part in parts] + [_refusal(shard, part, summed=True) for part in inputs]
        return list(dict.fromkeys(filter(None, said)))


def _times(shard: Shard, part: Part) -> int:
    """Return how many ranks hold each unit of a part that is cut."""
    return shard.part(part).units * shard.world // part.units


def _refusal(shard: Shard, part: Part, *, summed: bool = False) -> str:
    """Return why the shard cannot cut the part. Ranks may hold one unit twice, unless their results are `summed`."""
    try:
        share = shard.part(part)
    except PlanError as error:
        return error.message
    if summed and share.units < part.units and share.units * shard.world != part.units:
        return f"input {part.name!r} has {part.units} {part.axis}: {shard.world} ranks cannot sum over it"
    return ""


def cut_layers(costs: Sequence[float], stages: int) -> list[int]:
    """Return the end of each of `stages` runs of layers, none empty, whose largest cost is the least possible."""
    prefix = [0.0, *accumulate(costs)]
    best, cuts = prefix, []  # best[i]: the largest run when layers 0..i make the runs so far
    for stage in range(1, stages):
        cut = [_last_cut(best, prefix, end, stage) for end in range(stage + 1, len(prefix))]
        cuts.append([0] * (stage + 1) + cut)
        best = [math.inf] * (stage + 1) + [max(best[k], prefix[stage + 1 + i] - prefix[k]) for i, k in enumerate(cut)]
    ends = [len(costs)]
    for cut in reversed(cuts):
        ends.insert(0, cut[ends[0]])
    return ends


def _last_cut(best: Sequence[float], prefix: Sequence[float], end: int, low: int) -> int:
    """Return where the last run before `end` best begins: as k grows the runs before k grow, the last one shrinks."""
    crossing = bisect_left(range(low, end - 1), 0.0, key=lambda k: best[k] - (prefix[end] - prefix[k])) + low
    return min((k for k in (crossing - 1, crossing) if k >= low), key=lambda k: max(best[k], prefix[end] - prefix[k]))


def choose_layout(config: EngineConfig, registry: Registry, hardware: Hardware, model: Divisible, notes: Notes) -> Layout:
    """Return the layout that was asked for, else the widest tensor parallelism over all devices that divides the model.

    Raises PlanError when the model cannot be cut as asked. A missing plugin, or more GPUs than there are, is an issue, so that
    the plan still shows its ledger.
    """
    found = {axis: _strategy(registry, axis) for axis in ("pp", "tp")}
    model = _with_cuts(model, found["tp"])
    sizes = _choose_sizes(config, hardware, model, notes)
    if sizes.devices > hardware.count:
        notes.find(
            "error",
            "too_few_devices",
            f"{sizes} needs {sizes.devices} devices, there are {hardware.count}",
            f"give more, as in --gpus {sizes.devices}xH200, or lower tensor_parallel_size or pipeline_parallel_size",
        )
    elif sizes.devices < hardware.count:
        notes.find("info", "idle_devices", f"{sizes} uses {sizes.devices} of {hardware.count} devices")
    _say_copies(model, sizes, notes)
    strategies = _strategies(sizes, found, registry, notes)
    return Layout(sizes=sizes, shard=model.shard(sizes.tensor), stages=model.stages(sizes.pipeline), strategies=strategies)


def _say_copies(model: Divisible, sizes: Sizes, notes: Notes) -> None:
    heads = model.needs.num_kv_heads
    shared = f"{sizes.tensor} ranks share {heads} KV head{'' if heads == 1 else 's'}"
    for times, names in model.copies(sizes.tensor).items():
        notes.find(
            "info",
            "held_alike",
            f"{shared}, so that they hold {times} copies each of {', '.join(names)}",
            "pipeline_parallel_size in place of tensor_parallel_size keeps one of each",
        )


def _with_cuts(model: Divisible, tensor: Strategy) -> Divisible:
    return model if tensor is None else evolve(model, cuts=tensor.spec.cuts)


def _choose_sizes(config: EngineConfig, hardware: Hardware, model: Divisible, notes: Notes) -> Sizes:
    asked = config.tensor_parallel_size is not None or config.pipeline_parallel_size is not None
    rejected: list[Rejected] = []
    for sizes in _candidates(config, hardware.count):
        reasons = model.why_not(sizes)
        if not reasons:
            one = "one device" if hardware.count == 1 else f"the widest tensor parallelism {hardware.count} devices allow"
            notes.choose("parallel", sizes, ASKED if asked else one, rejected)
            return sizes
        rejected.append(Rejected(str(sizes), "; ".join(reasons)))
    said = " | ".join(f"{one.value}: {one.reason}" for one in rejected)
    divisors = [n for n in (1, 2, 4, 8, 16) if not model.why_not(Sizes(tensor=n, pipeline=1))]
    raise PlanError(
        f"the model cannot be spread so: {said}", fix=f"tensor_parallel_size {', '.join(map(str, divisors))} would divide it"
    )


def _candidates(config: EngineConfig, count: int) -> list[Sizes]:
    tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
    if tensor is not None:
        return [Sizes(tensor=tensor, pipeline=pipeline or 1)]
    if pipeline is not None:
        return [Sizes(tensor=max(1, count // pipeline), pipeline=pipeline)]
    return [Sizes(tensor=n, pipeline=count // n) for n in range(count, 0, -1) if count % n == 0]


def _strategy(registry: Registry, axis: str) -> Strategy:
    """Return the one strategy of an axis, None when no plugin brings any; two of them cannot be chosen between."""
    if not any(provided.spec.axis == axis for provided in registry.parallel_strategies):
        return None
    first, *others = registry.parallel_for(axis)
    if others:
        owners = ", ".join(f"{provided.spec.name!r} of {provided.provider}" for provided in (first, *others))
        raise PlanError(f"several strategies carry out {axis}: {owners}", fix="keep one: PADDOCK_PLUGINS lists what may load")
    return first


def _strategies(sizes: Sizes, found: dict[str, Strategy], registry: Registry, notes: Notes) -> tuple[ParallelSpec, ...]:
    """Return the strategies of every size above 1, outermost first."""
    chosen = []
    for axis, size, option in (("pp", sizes.pipeline, "pipeline_parallel_size"), ("tp", sizes.tensor, "tensor_parallel_size")):
        provided = found[axis]
        if size == 1:
            continue
        if provided is None:
            missing = registry.missing(kinds.PARALLEL, axis)
            notes.find("error", f"no_{axis}_plugin", f"{option} is {size}, but {missing.message}", missing.fix)
            continue
        spec = provided.spec
        if spec.max_size is not None and size > spec.max_size:
            notes.find("error", f"{axis}_too_large", f"{option} is {size}, {spec.name} takes {spec.max_size}", f"lower {option}")
        notes.use("parallel", spec.name, provided.provider)
        chosen.append(spec)
    return tuple(sorted(chosen, key=lambda spec: spec.nesting))
