"""What an engine needs of a model, whoever wrote its code.

A model knows neither batches nor caches: it computes rows, one a token, and asks `attend` for what
a row needs of the others. The runner's `attend` reads the paged cache, evaluation's a plain causal
one (`causal_logits`). Rows are independent of each other but for `attend`.
"""

from typing import Protocol

import torch
from torch import Tensor

from qtool.kernels.cpu.attention import causal_attention
from qtool.runtime.models.attention_spec import AttentionSpec


class Attend(Protocol):
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [rows, heads, key_dim]; key [rows, kv_heads, key_dim]; value [rows, kv_heads,
        value_dim] -> [rows, heads, value_dim].
        """
        ...


class Model(Protocol):
    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """Of every layer that calls `attend`, in the order of the layers' numbers."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    def for_context(self, num_tokens: int) -> "Model":
        """The same weights as sequences of up to `num_tokens` need them. Rotary embeddings that
        depend on the length take it from here: cached keys are turned already, so it cannot change
        while a sequence grows.
        """
        ...

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """token_ids, positions [rows] int64 -> the last block's output [rows, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32."""
        ...


def sinks_of(spec: AttentionSpec, device: torch.device) -> Tensor | None:
    """[heads] float32 as kernels take them."""
    return None if spec.sinks is None else torch.tensor(spec.sinks, device=device)


def causal_logits(model: Model, tokens: Tensor) -> Tensor:
    """One full pass without a cache: [batch, tokens] int64 -> float32 [batch, tokens, vocab]."""
    batch, length = tokens.shape
    model = model.for_context(length)
    with torch.inference_mode():
        hidden = causal_hidden(model, tokens)
        return model.logits(hidden.flatten(0, 1)).view(batch, length, -1)


def causal_hidden(model: Model, tokens: Tensor) -> Tensor:
    """The last block's output of such a pass, [batch, tokens, hidden]."""
    batch, length = tokens.shape
    model = model.for_context(length)
    positions = torch.arange(length, device=model.device)
    with torch.inference_mode():
        flat = tokens.reshape(-1).to(model.device)
        hidden = model.hidden(flat, positions.repeat(batch), _causal(model, batch, length))
        return hidden.view(batch, length, -1)


def _causal(model: Model, batch: int, length: int) -> Attend:
    """`attend` for `batch` sequences of `length` rows each, one after the other."""
    positions = torch.arange(length, device=model.device)
    distance = positions[:, None] - positions[None, :]
    masks: dict[int | None, Tensor] = {
        window: (distance >= 0) & (distance < window)
        for window in {spec.window for spec in model.attention}
        if window is not None and window < length
    }

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (
            part.reshape(batch, length, *part.shape[1:]) for part in (query, key, value)
        )
        spec = model.attention[layer]
        # Layers may be on several devices.
        mask = masks.get(spec.window)
        output = causal_attention(
            query,
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=spec.scale,
            mask=None if mask is None else mask.to(query.device),
            softcap=spec.softcap,
            sinks=sinks_of(spec, query.device),
        )
        return output.flatten(0, 1)

    return attend
