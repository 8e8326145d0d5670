"""One device's executor: a Step in, sampled tokens out, everything between on the device.

T tokens, S slots and a row for padding, R sampled rows, E model size, V vocabulary.
"""

from __future__ import annotations

from enum import Enum

import attrs
import torch
from torch import Tensor

from paddock.execution.batch import PICKED, HostBatch, Pick, SampleRows, lay_out, send
from paddock.execution.logprobs import TopLogprobs, to_host
from paddock.execution.memory import NOTHING_LOADED, Loaded, MemoryUse
from paddock.execution.packing import to_device
from paddock.execution.padded import PaddedSteps, is_shortage
from paddock.execution.padded_inputs import Scratch, StepInputs
from paddock.execution.prompt_logprobs import ChunkLogprobs, PromptLogprobs, PromptWatcher
from paddock.execution.sampler import Sampled, Sampler
from paddock.execution.sampling_ops import REFERENCE_OPS, SamplingOps
from paddock.execution.sampling_state import DRAWN, FILTERED, plain_kind
from paddock.execution.slots import SlotTable
from paddock.layers.attention import AttentionBackend, AttentionInputs, LayerKV, Model
from paddock.planning.padding import REHEARSED_CHUNKS, StepShape, rehearsed_sizes
from paddock.planning.plan import Plan
from paddock.scheduling.step import Admission, Step, StepResult


class SmallSteps(Enum):
    """How small steps run: at their own size, or at a few padded ones, those captured as graphs or not."""

    AS_THEY_COME = "as they come"
    PADDED = "padded"
    CAPTURED = "captured"


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
        sampling_ops: SamplingOps = REFERENCE_OPS,
        small_steps: SmallSteps = SmallSteps.AS_THEY_COME,
        loaded: Loaded = NOTHING_LOADED,
        buffer_bytes: int = 0,
    ) -> None:
        """Take a loaded model on `device`, its layers' pages and the attention backend it was built with.

        `seed` is the engine's, from which sequences without one get theirs. Where small steps are padded, the last of the
        pages is padding's, and `buffer_bytes` what the largest captured step allocates. `loaded` is what the device's
        allocator counted before there were pages, for `memory_use`.
        """
        self.overlaps = device.type == "cuda"
        self.vocab_size, self._max_model_len = vocab_size, max_model_len
        self._model, self._kv, self._backend, self._device = model, kv, backend, device
        self._slots = SlotTable(num_slots, max_model_len, kv[0].page_size, device)
        self._sampler = Sampler(num_slots=num_slots, vocab_size=vocab_size, device=device, seed=seed, ops=sampling_ops)
        self._prompt_logprobs = PromptLogprobs(vocab_size, device)
        self._last_token_S = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        as_they_come = small_steps is SmallSteps.AS_THEY_COME
        self.num_pages = len(kv[0].k_pages_NPKD) - (not as_they_come)
        self._loaded = loaded
        self._padded = None if as_they_come else self._padding(num_slots, small_steps, buffer_bytes)

    @classmethod
    def of(
        cls,
        plan: Plan,
        model: Model,
        kv: list[LayerKV],
        backend: AttentionBackend,
        *,
        device: torch.device,
        sampling_ops: SamplingOps,
        small_steps: SmallSteps,
        loaded: Loaded = NOTHING_LOADED,
        buffer_bytes: int = 0,
    ) -> Runner:
        """Return the runner of a plan's sizes and seed; all else is as in `__init__`."""
        return cls(
            model,
            kv,
            backend,
            num_slots=plan.max_num_seqs,
            max_model_len=plan.max_model_len,
            vocab_size=plan.vocab_size,
            device=device,
            seed=plan.asked.seed,
            sampling_ops=sampling_ops,
            small_steps=small_steps,
            loaded=loaded,
            buffer_bytes=buffer_bytes,
        )

    def _padding(self, num_slots: int, small_steps: SmallSteps, buffer_bytes: int) -> PaddedSteps:
        self._slots.pad_with(self.num_pages)
        return PaddedSteps(
            self._padded_step,
            most=num_slots,
            scratch=Scratch(slot=self._slots.scratch_slot, kv_slot=self.num_pages * self._slots.page_size),
            device=self._device,
            capture=small_steps is SmallSteps.CAPTURED,
            buffer_bytes=buffer_bytes,
        )

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start the step, after all earlier ones, and return it in flight."""
        try:
            return self._launch(step)
        except torch.AcceleratorError as error:
            if not is_shortage(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error  # the driver's, which the engine knows how to live with

    def _launch(self, step: Step) -> Launched:
        self._admit(step.admissions)
        self._slots.grant(step.pages)
        host, every_row = lay_out(step, self._slots), self._prompt_logprobs.wants(step)
        if self._padded is not None and not every_row:
            shape = self._padded.shape_for(host)
            if shape is not None:
                return self._launch_padded(step, host, shape, self._padded)
        batch = send(host, self._slots, self._last_token_S)
        if not every_row:
            x_RE = self._forward(batch.token_ids_T, batch.inputs, batch.sampled_T)
            return self._send(step, batch.sample, self._sample(batch.sample, x_RE), {})
        x_TE = self._forward(batch.token_ids_T, batch.inputs)
        prompt_logprobs = self._prompt_logprobs.launch(step, x_TE, lambda x_RE: self._model.logits(x_RE).float())
        sampled = self._sample(batch.sample, _rows(x_TE, batch.sampled_T))
        return self._send(step, batch.sample, sampled, prompt_logprobs)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Take small steps of many sizes, and a mixed one, as padding alone: uncaptured, read by nobody.

        Decodes draw their tokens, which finds the likeliest too; one of them from what filters leave. Each step starts from
        token 0, for what the one before it sampled nobody wrote.
        """
        assert self._padded is not None, "only padded steps have shapes to rehearse"
        short = REHEARSED_CHUNKS[0]
        steps = [(StepShape(decodes=decodes), DRAWN) for decodes in rehearsed_sizes(self._padded.most)]
        steps += [(StepShape(decodes=0, chunks=1, chunk_tokens=tokens), 0) for tokens in REHEARSED_CHUNKS]
        steps += [(StepShape(decodes=1, chunks=1, chunk_tokens=short), 0), (StepShape(decodes=1), FILTERED)]
        for shape, kind in steps:
            self._last_token_S.zero_()
            self._padded.rehearse(shape, kind)

    def recover(self) -> None:
        """Wait for what runs and give back to the device what a launch that ran out of memory left."""
        if self.overlaps:
            torch.cuda.synchronize(self._device)
            if self._padded is not None:
                self._padded.forget()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Wait for what still runs, and let padded steps go: they hold the runner, which holds them."""
        if self.overlaps:
            torch.cuda.synchronize(self._device)
        self._padded = None

    def watch_prompts(self, watcher: PromptWatcher | None) -> None:
        """Show `watcher` (None: nobody) the logits of each prompt whose logprobs are asked for."""
        self._prompt_logprobs.watcher = watcher

    def memory_use(self) -> MemoryUse | None:
        """Return what the device's allocator has handed out, None on a CPU."""
        if not self.overlaps:
            return None
        kv_bytes = sum(pages.nbytes for kv in self._kv for pages in (kv.k_pages_NPKD, kv.v_pages_NPKD))
        peak = torch.cuda.max_memory_allocated(self._device)
        return MemoryUse(
            weight_bytes=self._loaded.weight_bytes,
            kv_bytes=kv_bytes,
            workspace_bytes=max(self._loaded.workspace_bytes, peak - self._loaded.weight_bytes - kv_bytes),
            graph_bytes=0 if self._padded is None else self._padded.graph_bytes,
            peak_bytes=peak,
            reserved_bytes=torch.cuda.memory_reserved(self._device),
        )

    def _admit(self, admissions: list[Admission]) -> None:
        if not admissions:
            return
        for admission, features in zip(admissions, self._sampler.admit(admissions), strict=True):
            self._slots.admit(admission.slot, prompt_len=admission.prompt_len, features=features)
            self._prompt_logprobs.admit(admission)

    def _forward(self, token_ids_T: Tensor, inputs: AttentionInputs, wanted_R: Tensor | None = None) -> Tensor:
        """Return the residual stream [R, E] after the last layer, of all tokens or those that are wanted.

        K and V of all are in the pages then. Where none is wanted the model is told that the first one is: a step of no rows
        would ask of every kernel what they are never asked for otherwise.
        """
        if wanted_R is not None and not len(wanted_R):
            return self._forward(token_ids_T, inputs, wanted_R.new_zeros(1))[:0]
        inputs = attrs.evolve(inputs, prepared=self._backend.prepare(inputs), wanted_R=wanted_R)
        return _rows(self._model.forward(self._model.embed(token_ids_T), inputs, self._kv), wanted_R)

    def _padded_step(self, padded: StepInputs, kind: int | None) -> Tensor:
        """Return the tokens [R] of a padded step, sampled as `kind` says; for None the sampled rows' residual stream [R, E].

        Reads nothing but the device's memory at fixed addresses: a graph can hold it.
        """
        shape = padded.shape
        token_ids_T = self._last_token_S.index_select(0, padded.slots_S[: shape.decodes])
        if shape.chunks:
            token_ids_T = torch.cat((token_ids_T, padded.chunk_ids_C))
        inputs = AttentionInputs(
            positions_T=padded.positions_T,
            slots_T=padded.kv_slots_T,
            query_start_S1=padded.query_start_S1,
            seq_lens_S=padded.seq_lens_S,
            block_tables_SM=self._slots.device_tables_SM.index_select(0, padded.slots_S),
            page_size=self._slots.page_size,
            num_decodes=shape.decodes,
            max_query_len=max(1, shape.chunk_tokens),
            max_seq_len=self._max_model_len,
        )
        x_RE = self._forward(token_ids_T, inputs, padded.sampled_R if shape.chunks else None)
        if kind is None:
            return x_RE
        token_R = self._sampler.plain(self._model.logits(x_RE), padded.sampled_slots_R, padded.output_index_R, kind=kind)
        self._last_token_S.index_copy_(0, padded.sampled_slots_R, token_R.clamp(min=0))
        return token_R

    def _launch_padded(self, step: Step, host: HostBatch, shape: StepShape, padded: PaddedSteps) -> Launched:
        kind = plain_kind(host.picks)
        inputs, out = padded.run(host, shape, kind)
        slot_R, output_index_R = inputs.sampled_slots_R[: len(out)], inputs.output_index_R[: len(out)]
        picks: dict[int, Pick] = {}
        if kind is None:
            picked = {name: array for name, array in host.arrays.items() if name.startswith(PICKED)}
            picks = host.picks_from(to_device(picked, self._device))
        rows = SampleRows(slots=host.sampled_slots, slot_R=slot_R, output_index_R=output_index_R, picks=picks)
        return self._send(step, rows, Sampled(out) if kind is not None else self._sample_rows(rows, out), {})

    def _sample(self, rows: SampleRows, x_RE: Tensor) -> Sampled:
        return self._sample_rows(rows, x_RE) if len(rows.slots) else Sampled(self._last_token_S[:0])

    def _sample_rows(self, rows: SampleRows, x_RE: Tensor) -> Sampled:
        sampled = self._sampler.sample(self._model.logits(x_RE), rows)
        self._last_token_S.index_copy_(0, rows.slot_R, sampled.token_R.clamp(min=0))
        return sampled

    def _send(self, step: Step, sample: SampleRows, sampled: Sampled, prompts: dict[int, ChunkLogprobs]) -> Launched:
        """Start the copies to the host and mark where they end."""
        rows, widths = self._sampler.logprob_rows(sample)
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


def _rows(x_TE: Tensor, wanted_R: Tensor | None) -> Tensor:
    """Return the wanted rows [R, E] of all tokens', or of what are these rows already."""
    return x_TE if wanted_R is None or len(x_TE) == len(wanted_R) else x_TE.index_select(0, wanted_R)
