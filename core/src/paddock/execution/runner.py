"""One device's executor: a Step in, sampled tokens out, everything between on the device.

T tokens, S slots, R sampled rows, E model size, V vocabulary.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from paddock.execution.batch import Batch, assemble
from paddock.execution.logprobs import TopLogprobs, to_host
from paddock.execution.prompt_logprobs import ChunkLogprobs, PromptLogprobs
from paddock.execution.sampler import Sampled, Sampler
from paddock.execution.slots import SlotTable
from paddock.layers.attention import AttentionBackend, LayerKV, Model
from paddock.scheduling.step import Admission, Step, StepResult


@attrs.frozen(eq=False, kw_only=True)
class Launched:
    """A step on its way: its tokens arrive in `token_R` on the host once `event` has passed (None: they are there)."""

    step: Step
    token_R: Tensor
    logprobs: TopLogprobs | None
    logprob_rows: list[int]
    logprob_widths: list[int]
    prompt_logprobs: dict[int, ChunkLogprobs]
    event: torch.cuda.Event | None

    def result(self) -> StepResult:
        """Return what the step sampled; blocks until it has run."""
        if self.event is not None:
            self.event.synchronize()
        tokens: list[int] = self.token_R.tolist()
        found = [] if self.logprobs is None else self.logprobs.rows(self.logprob_widths)
        logprobs = {row: entry for row, entry in zip(self.logprob_rows, found, strict=True) if tokens[row] >= 0}
        prompts = {i: chunk.rows() for i, chunk in self.prompt_logprobs.items()}
        return StepResult(token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompts)


class Runner:
    """Runs steps of a model on one device. On a GPU a launch returns while the step runs (`overlaps`); on a CPU after it.

    Keeps what belongs to slots: pages, last tokens, sampling state. The last token sampled for a slot feeds its next decode
    on the device; the host never waits for it.
    """

    def __init__(
        self,
        model: Model,
        kv: list[LayerKV],
        backend: AttentionBackend,
        *,
        num_slots: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        """Take a loaded model on `device`, its layers' pages and the attention backend it was built with.

        `seed` is the engine's, from which sequences without one get theirs.
        """
        self.overlaps = device.type == "cuda"
        self.vocab_size = vocab_size
        self._model, self._kv, self._backend, self._device = model, kv, backend, device
        self._slots = SlotTable(num_slots, max_model_len, kv[0].page_size)
        self._sampler = Sampler(num_slots=num_slots, vocab_size=vocab_size, device=device, seed=seed)
        self._prompt_logprobs = PromptLogprobs(vocab_size, device)
        self._last_token_S = torch.zeros(num_slots, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start the step, after all earlier ones, and return it in flight."""
        self._admit(step.admissions)
        self._slots.grant(step.pages)
        batch = assemble(step, self._slots, self._last_token_S)
        x_TE = self._forward(batch)
        prompt_logprobs = self._prompt_logprobs.launch(step, x_TE, self._model.logits)
        return self._send(step, batch, self._sample(batch, x_TE), prompt_logprobs)

    def close(self) -> None:
        """Wait for what still runs."""
        if self.overlaps:
            torch.cuda.synchronize(self._device)

    def _admit(self, admissions: list[Admission]) -> None:
        if not admissions:
            return
        for admission, features in zip(admissions, self._sampler.admit(admissions), strict=True):
            self._slots.admit(admission.slot, prompt_len=admission.prompt_len, features=features)
            self._prompt_logprobs.admit(admission)

    def _forward(self, batch: Batch) -> Tensor:
        """Return the residual stream [T, E] after the last layer; K and V of the step's tokens are in the pages."""
        inputs = attrs.evolve(batch.inputs, prepared=self._backend.prepare(batch.inputs))
        return self._model.forward(self._model.embed(batch.token_ids_T), inputs, self._kv)

    def _sample(self, batch: Batch, x_TE: Tensor) -> Sampled:
        if not len(batch.sample.slots):
            return Sampled(self._last_token_S[:0])
        x_RE = x_TE if batch.sampled_T is None else x_TE.index_select(0, batch.sampled_T)
        sampled = self._sampler.sample(self._model.logits(x_RE), batch.sample)
        self._last_token_S.index_copy_(0, batch.sample.slot_R, sampled.token_R.clamp(min=0))
        return sampled

    def _send(self, step: Step, batch: Batch, sampled: Sampled, prompts: dict[int, ChunkLogprobs]) -> Launched:
        """Start the copies to the host and mark where they end."""
        rows, widths = self._sampler.logprob_rows(batch.sample)
        token_R = to_host(sampled.token_R)
        logprobs = None if sampled.logprobs is None else sampled.logprobs.to_host()
        event = None
        if self.overlaps:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        return Launched(
            step=step,
            token_R=token_R,
            logprobs=logprobs,
            logprob_rows=rows,
            logprob_widths=widths,
            prompt_logprobs=prompts,
            event=event,
        )
