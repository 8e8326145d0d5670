"""The Plan: everything decided before anything is allocated. A frozen value that workers rebuild an engine from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from attrs import frozen

from paddock.config import EngineConfig
from paddock.planning.hardware import Hardware
from paddock.plugins.descriptors import (
    AttentionSpec,
    Issue,
    ModelSpec,
    ObserverSpec,
    OpSpec,
    ParallelSpec,
    QuantizationSpec,
)


@frozen
class Wanted:
    """What a tensor of a checkpoint must be to fill a parameter: of a dtype that loading takes for `dtype`, and of `shape`.

    Axes of one element aside.
    """

    dtype: str
    shape: tuple[int, ...]


class ModelFiles(Protocol):
    """A model folder's small JSON files, parsed: what `checkpoint.source.open_source` returns."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Return config.json."""

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """Return generation_config.json, empty when there is none."""

    @property
    def quantization_files(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the files beside config.json that describe a quantisation, by name."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Return what `paddock quantize` says of a folder that it made, empty where it made none."""

    @property
    def revision(self) -> str | None:
        """Return the commit they were read at, None for a plain folder."""

    @property
    def tensor_names(self) -> frozenset[str] | None:
        """Return the names of the weights' tensors, None where no weights are at hand."""

    def read_dtypes(self) -> Mapping[str, str] | None:
        """Return each tensor's dtype by its name, from the headers of the weights' files; None where they are not all at hand."""

    def read_scalars(self, names: Iterable[str]) -> Mapping[str, float]:
        """Return those of the named tensors that are one float each, by name, out of the weights' files."""

    def check_weights(self, wanted: Mapping[str, Wanted]) -> None:
        """Raise the PaddockError of loading where a file of weights at hand is unsound or a tensor is not what is wanted.

        `wanted` says by its name what a tensor must be, if it is there.
        """


@frozen
class Rejected:
    """A candidate that was not taken, and why."""

    value: str
    reason: str


@frozen(kw_only=True)
class Choice:
    """One decision: what was chosen, why, and what else was looked at."""

    name: str
    value: str
    reason: str
    rejected: tuple[Rejected, ...] = ()


@frozen(kw_only=True)
class Used:
    """A plugin the plan relies on, and for what."""

    role: str
    name: str
    plugin: str
    distribution: str
    version: str


@frozen(kw_only=True)
class WeightBytes:
    """Bytes of parameters on one device; `copies` are 4-bit weights once more, in FP8."""

    embeddings: int
    layers: int
    head: int
    norms: int
    copies: int = 0

    @property
    def total(self) -> int:
        """Return all of them."""
        return self.embeddings + self.layers + self.head + self.norms + self.copies


@frozen(kw_only=True)
class Workspace:
    """Estimated bytes a step needs beside weights and KV: activations, attention, a weight in another form; then logits."""

    activations: int
    logits: int
    attention: int
    weights: int = 0

    @property
    def total(self) -> int:
        """Return the most that is held at once: a layer's tensors are gone before the logits come."""
        return max(self.activations + self.attention + self.weights, self.logits)


@frozen(kw_only=True)
class Ledger:
    """The bytes of one device of a pipeline stage. All its tensor-parallel ranks hold the same amounts.

    `budget_bytes` is what the engine may use; `needed_bytes` what it cannot run without: everything but KV, and the pages of
    one sequence of `max_model_len`.
    """

    stage: int
    first_layer: int
    end_layer: int
    budget_bytes: int
    weights: WeightBytes
    workspace: Workspace
    graph_bytes: int
    kv_bytes_per_token: int
    page_bytes: int
    num_pages: int
    pages_per_sequence: int

    @property
    def fixed_bytes(self) -> int:
        """Return everything but KV."""
        return self.weights.total + self.workspace.total + self.graph_bytes

    @property
    def kv_bytes(self) -> int:
        """Return the size of the page pool."""
        return self.num_pages * self.page_bytes

    @property
    def needed_bytes(self) -> int:
        """Return the least the engine can run in."""
        return self.fixed_bytes + self.pages_per_sequence * self.page_bytes

    @property
    def missing_bytes(self) -> int:
        """Return by how much the least exceeds the budget; 0 when it fits."""
        return max(0, self.needed_bytes - self.budget_bytes)

    @property
    def free_bytes(self) -> int:
        """Return what the engine leaves of its budget."""
        return max(0, self.budget_bytes - self.fixed_bytes - self.kv_bytes)


@frozen(kw_only=True)
class Plan:
    """What will run and whether it fits; complete: a worker needs the Plan, the weights and the plugins it names.

    `asked` is what the user set, `auto` and all; every other field is resolved. `model_config` and `generation_config` are the
    files as published, `quantization_files` what `detect` reads beside config.json. Linears with 4-bit weights take FP8 inputs in
    steps of `fp8_inputs_from` tokens and more, and FP8 weights from `fp8_weights_from` on, None for never, which are kept if
    `keeps_fp8_weights`; their scales are kept in `scale_dtype`, None where the format leaves no choice. `attention_compute` is
    what attention multiplies in, `plain` or `fp8`, `fp8_accumulation` how sums of FP8 products are kept, `exact` or `fast`.
    `stages` holds the layers (first, end) of each pipeline stage. `ledgers` holds one entry a stage.
    """

    paddock: str
    asked: EngineConfig
    model: ModelSpec
    revision: str | None
    model_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    quantization_files: Mapping[str, Mapping[str, Any]]
    hardware: Hardware
    dtype: str
    quantization: QuantizationSpec | None
    scheme: str
    fp8_inputs_from: int | None
    fp8_weights_from: int | None
    keeps_fp8_weights: bool
    scale_dtype: str | None
    kv_cache_dtype: str
    attention_compute: str
    fp8_accumulation: str
    attention: AttentionSpec
    page_size: int
    ops: tuple[OpSpec, ...]
    observers: tuple[ObserverSpec, ...]
    parallel: tuple[ParallelSpec, ...]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    stages: tuple[tuple[int, int], ...]
    num_layers: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    graphs: bool
    ledgers: tuple[Ledger, ...]
    choices: tuple[Choice, ...] = ()
    plugins: tuple[Used, ...] = ()
    issues: tuple[Issue, ...] = ()

    @property
    def num_gpus(self) -> int:
        """Return how many devices the plan uses."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of the stage with the least to spare."""
        return max(self.ledgers, key=lambda ledger: (ledger.missing_bytes, ledger.fixed_bytes))

    @property
    def num_pages(self) -> int:
        """Return the pages of the pool, the same on every device."""
        return min(ledger.num_pages for ledger in self.ledgers)

    @property
    def kv_tokens(self) -> int:
        """Return how many tokens the pool holds."""
        return self.num_pages * self.page_size

    @property
    def full_sequences(self) -> int:
        """Return how many sequences of `max_model_len` the pool holds at once."""
        return self.num_pages // self.ledgers[0].pages_per_sequence

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of K and V of one token over all devices."""
        return self.tensor_parallel_size * sum(ledger.kv_bytes_per_token for ledger in self.ledgers)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of parameters over all devices."""
        return self.tensor_parallel_size * sum(ledger.weights.total for ledger in self.ledgers)

    @property
    def errors(self) -> tuple[Issue, ...]:
        """Return the issues that keep the plan from running."""
        return tuple(issue for issue in self.issues if issue.level == "error")

    def choice(self, name: str) -> Choice:
        """Return the recorded decision of that name; KeyError when there is none."""
        found = next((choice for choice in self.choices if choice.name == name), None)
        if found is None:
            raise KeyError(name)
        return found
