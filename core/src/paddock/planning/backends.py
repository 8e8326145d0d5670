"""What computes: the attention backend with its page size and KV dtype, and an implementation of every op."""

from __future__ import annotations

from attrs import frozen

from paddock.config import AUTO, PLAIN_ATTENTION, EngineConfig
from paddock.errors import OptionError, PlanError, did_you_mean
from paddock.planning.attention_compute import over_fp8, say_compute
from paddock.planning.formats import Format
from paddock.planning.hardware import Hardware
from paddock.planning.notes import ASKED, Candidate, Notes, Obstacle, reasons, ways_around, why_not_here
from paddock.planning.plan import Rejected
from paddock.plugins.descriptors import AttentionNeeds, AttentionSpec, ObserverSpec, OpSpec
from paddock.plugins.provider import Provided
from paddock.plugins.registry import Registry

_WHAT_EACH_TAKES = "paddock list attention shows what each backend takes"


@frozen(kw_only=True)
class Attention:
    """The backend, what its pages hold and how many tokens a page."""

    spec: AttentionSpec
    kv_cache_dtype: str
    page_size: int


@frozen(kw_only=True)
class Question:
    """What an attention backend is asked to serve."""

    hardware: Hardware
    dtype: str
    needs: AttentionNeeds
    block_size: int | None
    compute: str = PLAIN_ATTENTION

    def why_not(self, spec: AttentionSpec, kv_dtype: str) -> list[Obstacle]:
        """Return what keeps the backend from serving; nothing when it can."""
        found = why_not_here(spec, self.hardware, self.dtype)
        if kv_dtype not in spec.kv_cache_dtypes:
            kept = sorted(spec.kv_cache_dtypes)
            found.append(
                Obstacle(f"keeps KV in {', '.join(kept)}, not in {kv_dtype}", f"set kv_cache_dtype to {' or '.join(kept)}")
            )
        if spec.head_dims and self.needs.head_dim not in spec.head_dims:
            sizes = ", ".join(map(str, sorted(spec.head_dims)))
            found.append(Obstacle(f"serves head sizes {sizes}, not {self.needs.head_dim}"))
        missing = self.needs.features - spec.features
        if missing:
            found.append(Obstacle(f"lacks {', '.join(sorted(missing))}"))
        if self.compute not in spec.computes:
            found.append(Obstacle(f"does not multiply in {self.compute}", f"leave attention_compute at {PLAIN_ATTENTION}"))
        if self.block_size is not None and self.block_size not in spec.page_sizes:
            sizes = ", ".join(map(str, spec.page_sizes))
            found.append(Obstacle(f"has pages of {sizes} tokens, not {self.block_size}", f"set block_size to one of {sizes}"))
        return found


def choose_attention(
    config: EngineConfig, registry: Registry, hardware: Hardware, fmt: Format, needs: AttentionNeeds, notes: Notes
) -> Attention:
    """Return the best ranked backend that serves, at the first KV dtype some backend serves.

    Raises PlanError with every backend's reasons when none does; a backend asked for by name is never replaced. A warning
    says so where one of higher rank is made for this device and still cannot serve.
    """
    question = Question(
        hardware=hardware, dtype=fmt.dtype, needs=needs, block_size=config.block_size, compute=config.attention_compute
    )
    backends = _backends_to_ask(config, registry)
    refused: list[Rejected] = []
    for kv in over_fp8(config.attention_compute, kv_candidates(config.kv_cache_dtype, fmt)):
        obstacles = {provided.spec.name: question.why_not(provided.spec, kv.value) for provided in backends}
        serving = [provided for provided in backends if not obstacles[provided.spec.name]]
        unfit = [Rejected(name, reasons(why)) for name, why in obstacles.items() if why]
        if serving:
            notes.choose("kv_cache_dtype", kv.value, kv.reason, refused)
            say_compute(config.attention_compute, kv.value, hardware, notes)
            registry.attention(serving[0].spec.name)  # raises where another plugin owns the name too
            better = [
                one.spec for one in backends if one.spec.rank > serving[0].spec.rank and hardware.device in one.spec.devices
            ]
            _say_fallback(better, serving[0].spec, obstacles, notes)
            return _noted(config, serving, unfit, kv.value, notes)
        refused.append(Rejected(kv.value, " | ".join(f"{one.value}: {one.reason}" for one in unfit)))
    said = " | ".join(f"KV {one.value}: {one.reason}" for one in refused)
    if config.attention_backend != AUTO:
        kvs = over_fp8(config.attention_compute, kv_candidates(config.kv_cache_dtype, fmt))
        raise _refusal(config, registry, question, kvs, said)
    raise PlanError(
        f"no attention backend can serve this: {said}",
        fix=f"{_WHAT_EACH_TAKES}; change what it refuses, or install another",
    )


def _refusal(config: EngineConfig, registry: Registry, question: Question, kvs: list[Candidate], said: str) -> PlanError:
    """Return the error for a backend that was asked for and cannot serve: what would let it, and which others serve as it is."""
    name = config.attention_backend
    obstacles = question.why_not(registry.attention(name).spec, kvs[-1].value)
    every = sorted(registry.attention_backends, key=lambda one: (-one.spec.rank, one.spec.name))
    others = [one.spec.name for one in every if any(not question.why_not(one.spec, kv.value) for kv in kvs)]
    instead = f"leave attention_backend at auto: {', '.join(others)} can serve" if others else ""
    fix = ", or ".join(filter(None, (ways_around(obstacles), instead)))
    return PlanError(
        f"attention_backend is {name!r}, which cannot serve this: {said}",
        fix=fix or f"{_WHAT_EACH_TAKES}; change what {name} refuses",
    )


def _say_fallback(better: list[AttentionSpec], taken: AttentionSpec, obstacles: dict[str, list[Obstacle]], notes: Notes) -> None:
    for spec in better:
        why = obstacles[spec.name]
        enough = f"set attention_backend to {taken.name} to say that this is enough"
        notes.find(
            "warning",
            "attention_fallback",
            f"attention backend {spec.name}, of rank {spec.rank}, {reasons(why)}: {taken.name}, of rank {taken.rank}, is taken",
            ", or ".join(filter(None, (ways_around(why), enough))),
        )


def kv_candidates(asked: str, fmt: Format) -> list[Candidate]:
    """Return the KV dtypes to try, best first: what was asked for; else the one the checkpoint was made for; the activations'."""
    if asked != AUTO:
        return [Candidate(asked, ASKED)]
    same = Candidate(fmt.dtype, "the dtype of the activations")
    calibrated = fmt.scheme.kv_cache_dtype
    if calibrated is None or calibrated == fmt.dtype:
        return [same]
    return [Candidate(calibrated, "the checkpoint was calibrated for it"), same]


def _backends_to_ask(config: EngineConfig, registry: Registry) -> list[Provided[AttentionSpec]]:
    if config.attention_backend != AUTO:
        return [registry.attention(config.attention_backend)]
    return sorted(registry.attention_backends, key=lambda provided: (-provided.spec.rank, provided.spec.name))


def _noted(
    config: EngineConfig, serving: list[Provided[AttentionSpec]], unfit: list[Rejected], kv_dtype: str, notes: Notes
) -> Attention:
    best, *others = serving
    spec = best.spec
    lower = [Rejected(other.spec.name, f"rank {other.spec.rank}, below {spec.rank}") for other in others]
    asked = config.attention_backend != AUTO
    notes.choose("attention_backend", spec.name, ASKED if asked else f"rank {spec.rank} of those that serve", unfit + lower)
    notes.use("attention", spec.name, best.provider)
    page = spec.page_sizes[0] if config.block_size is None else config.block_size
    rest = [Rejected(str(size), f"{spec.name} prefers {page}") for size in spec.page_sizes if size != page]
    notes.choose("page_size", page, f"{spec.name} prefers it" if config.block_size is None else ASKED, rest)
    return Attention(spec=spec, kv_cache_dtype=kv_dtype, page_size=page)


def choose_ops(config: EngineConfig, registry: Registry, hardware: Hardware, dtype: str, notes: Notes) -> tuple[OpSpec, ...]:
    """Return one implementation of every op: of the plugin that was asked for, else the best ranked one that serves."""
    names, asked = sorted({provided.spec.op for provided in registry.ops}), dict(config.ops)
    for op, owner in config.ops:
        if op not in names:
            raise OptionError(f"option ops names {op!r} (from {owner}), which no plugin implements", fix=did_you_mean(op, names))
    return tuple(
        _choose_op(op, _implementations(op, registry, asked.get(op)), asked.get(op), hardware, dtype, notes) for op in names
    )


def _implementations(op: str, registry: Registry, owner: str | None) -> list[Provided[OpSpec]]:
    """Return those that may serve, best first: all of them, or only those of the plugin that was asked for."""
    if owner is None:
        return list(registry.ops_for(op))
    every = [provided for provided in registry.ops if provided.spec.op == op]
    mine = [provided for provided in every if provided.provider.is_called(owner)]
    if not mine:
        owners = [provided.provider.plugin for provided in every]
        raise OptionError(f"option ops wants {op!r} from {owner!r}, which does not implement it", fix=did_you_mean(owner, owners))
    return sorted(mine, key=lambda provided: (-provided.spec.rank, provided.provider))


def _choose_op(
    op: str, implementations: list[Provided[OpSpec]], owner: str | None, hardware: Hardware, dtype: str, notes: Notes
) -> OpSpec:
    why = {one.spec.implementation: why_not_here(one.spec, hardware, dtype) for one in implementations}
    serving = [one for one in implementations if not why[one.spec.implementation]]
    unfit = [Rejected(name, reasons(obstacles)) for name, obstacles in why.items() if obstacles]
    if not serving:
        said = " | ".join(f"{one.value}: {one.reason}" for one in unfit)
        around = "; ".join(filter(None, map(ways_around, why.values())))
        fix = ", or ".join(filter(None, (around, f"leave {op} out of ops" if owner else "")))
        raise PlanError(f"no implementation of op {op!r} serves here: {said}", fix=fix or "choose another dtype or device")
    best, *others = serving
    lower = [Rejected(one.spec.implementation, f"rank {one.spec.rank}") for one in others]
    reason = f"rank {best.spec.rank}, from {best.provider.distribution}" if owner is None else ASKED
    notes.choose(f"op {op}", best.spec.implementation, reason, unfit + lower)
    notes.use("op", op, best.provider)
    return best.spec


def choose_observers(config: EngineConfig, registry: Registry, notes: Notes) -> tuple[ObserverSpec, ...]:
    """Return the observers that were asked for by name; an unknown one raises PluginError."""
    chosen = []
    for name in config.observers:
        provided = registry.observer(name)
        notes.use("observer", name, provided.provider)
        chosen.append(provided.spec)
    return tuple(chosen)
