"""One layer at a time: loaded, shown the calibration sequences, and let go.

N sequences, L tokens a sequence, B sequences of a batch, T = B * L tokens, E model size, K KV heads, D head size, M pages a
sequence, P tokens a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from paddock import layers
from paddock.execution.kvcache import allocate_kv
from paddock.layers import reference_attention
from paddock.layers.attention_layer import Attention
from paddock.layers.norm import LayerNorm, RMSNorm
from paddock.quantize.again import LayerAgain, sample
from paddock.quantize.recipe import LayerWork, PlainLayer, PlainLinear, PlainVector
from paddock.quantize.source import PlainCheckpoint

BATCH_TOKENS = 8192  # run at once: bounds activations to about a layer's weights in the largest models
_PAGE = 64
_PLACES = tuple[layers.AttentionInputs, layers.LayerKV]


@frozen(eq=False, kw_only=True)
class LoadedLayer:
    """A layer on the device. `plain` is what the recipe is given of it, `model` what runs it."""

    plain: PlainLayer
    model: nn.Module


@frozen(eq=False, kw_only=True)
class LayerStack:
    """A model of which one layer at a time is on the device, computed in `dtype` over sequences of `length` tokens."""

    checkpoint: PlainCheckpoint
    device: torch.device
    dtype: torch.dtype
    length: int
    _places: dict[int, _PLACES] = field(factory=dict)

    @torch.inference_mode()
    def embed(self, ids_NL: Tensor) -> Tensor:
        """Return the residual stream [N, L, E] before the first layer, in the host's memory."""
        model = self._built(range(0), outer=True)
        stored = {target.name for target in layers.targets(model)} | {a for t in layers.targets(model) for a in t.aliases}
        outside = self.checkpoint.outside_layers()
        self.checkpoint.fill(model, {name: outside[name] for name in sorted(stored & outside.keys())})
        rows = [cast(layers.Model, model).embed(row_L.to(self.device)).cpu() for row_L in ids_NL]
        return torch.stack(rows)

    @torch.inference_mode()
    def load(self, index: int) -> LoadedLayer:
        """Return a layer, its weights as stored."""
        model = self._built(range(index, index + 1), outer=False)
        self.checkpoint.fill(model, self.checkpoint.of_layer(index))
        sources = [m.scales_source for m in model.modules() if isinstance(m, Attention)]
        plain = PlainLayer(
            index=index,
            linears={m.whole.name: _plain_linear(m) for m in model.modules() if isinstance(m, layers.LinearLayer)},
            vectors={m.declared.name: _plain_vector(m) for m in model.modules() if isinstance(m, RMSNorm | LayerNorm)},
            attention_source=sources[0] if sources else "",
        )
        layers.finalise(model)
        return LoadedLayer(plain=plain, model=model.eval())

    @torch.inference_mode()
    def run(self, layer: LoadedLayer, x_NLE: Tensor, work: LayerWork) -> None:
        """Put every sequence through a layer, in place, and show `work` what its linears and its attention are given."""
        with ExitStack() as stack:
            for module in layer.model.modules():
                if isinstance(module, layers.LinearLayer):
                    handle = module.register_forward_pre_hook(_seen_by(work, module.whole.name))
                    stack.callback(handle.remove)
            for batch in self._batches(len(x_NLE)):
                x_BLE = x_NLE[batch]
                y_TE, kv = self._forward(layer.model, x_BLE)
                work.see_kv(self._written(kv.k_pages_NPKD, len(x_BLE)), self._written(kv.v_pages_NPKD, len(x_BLE)))
                x_BLE.copy_(y_TE.view(x_BLE.shape))

    def again(self, layer: LoadedLayer, x_NLE: Tensor) -> LayerAgain:
        """Return what runs a sample of these sequences through a layer; the sample is copied."""
        x_BLE = sample(x_NLE, BATCH_TOKENS)
        return LayerAgain(layer.model, layer.plain.linears, lambda: self._forward(layer.model, x_BLE)[0])

    def _forward(self, model: nn.Module, x_BLE: Tensor) -> tuple[Tensor, layers.LayerKV]:
        """Return a layer's output [T, E] for a batch, and the pages it wrote."""
        inputs, kv = self._place(len(x_BLE))
        x_TE = x_BLE.flatten(0, 1).to(self.device)
        y_TE: Tensor = cast(layers.Model, model).forward(x_TE, inputs, [kv])
        return y_TE, kv

    def _built(self, part: range, *, outer: bool) -> nn.Module:
        builder = self.checkpoint.builder(part, outer=outer, dtype=self.dtype, device=self.device, max_model_len=self.length)
        return self.checkpoint.build(self.checkpoint.config, builder)

    def _batches(self, count: int) -> Iterator[slice]:
        step = max(1, BATCH_TOKENS // self.length)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def _place(self, count: int) -> _PLACES:
        """Return where a batch of so many sequences is computed: each at position 0, in pages of its own, kept for all layers."""
        if count not in self._places:
            inputs = self._inputs(count)
            kv = allocate_kv(
                num_layers=1,
                num_pages=count * self._pages_each,
                page_size=_PAGE,
                num_kv_heads=self.checkpoint.needs.num_kv_heads,
                head_dim=self.checkpoint.needs.head_dim,
                dtype=str(self.dtype).removeprefix("torch."),
                device=self.device,
            )
            self._places[count] = (inputs, kv[0])
        return self._places[count]

    @property
    def _pages_each(self) -> int:
        return -(-self.length // _PAGE)

    def _inputs(self, count: int) -> layers.AttentionInputs:
        length, pages = self.length, self._pages_each
        starts_B = torch.arange(count, device=self.device)
        positions_L = torch.arange(length, device=self.device)
        inputs = layers.AttentionInputs(
            positions_T=positions_L.repeat(count),
            slots_T=(starts_B[:, None] * pages * _PAGE + positions_L).flatten(),
            query_start_S1=(torch.arange(count + 1, device=self.device) * length).to(torch.int32),
            seq_lens_S=torch.full((count,), length, dtype=torch.int32, device=self.device),
            block_tables_SM=torch.arange(count * pages, dtype=torch.int32, device=self.device).view(count, pages),
            page_size=_PAGE,
            num_decodes=0,
            max_query_len=length,
            max_seq_len=length,
        )
        backend = reference_attention.create(self.checkpoint.needs, self.device)
        return evolve(inputs, prepared=backend.prepare(inputs))

    def _written(self, pages_NPKD: Tensor, count: int) -> Tensor:
        """Return the rows of the pages that the batch filled [T, K, D]."""
        rows_BRKD = pages_NPKD.view(count, self._pages_each * _PAGE, *pages_NPKD.shape[2:])
        return rows_BRKD[:, : self.length].flatten(0, 1)


def _plain_linear(layer: layers.LinearLayer) -> PlainLinear:
    sizes = [part.size for part in layer.whole.out]
    parts = torch.split_with_sizes(layer.get_parameter("weight").detach(), sizes)
    names = [layer.source + part.source for part in layer.whole.out]
    biases = () if layer.bias is None else torch.split_with_sizes(layer.bias.detach(), sizes)
    return PlainLinear(
        declared=layer.whole,
        weights=dict(zip(names, parts, strict=True)),
        biases=dict(zip(names, biases, strict=True)) if biases else {},
    )


def _plain_vector(norm: RMSNorm | LayerNorm) -> PlainVector:
    return PlainVector(
        declared=norm.declared,
        path=norm.source + norm.declared.source,
        weight_E=norm.weight.detach(),
        bias_E=None if norm.bias is None else norm.bias.detach(),
    )


def _seen_by(work: LayerWork, name: str) -> Any:
    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        work.see_input(name, arguments[0])

    return see
