"""One vector for a text, from a decoder that was made to write: its last hidden states, after the
final norm, averaged over the text ("mean") or those of its last token ("last").

The pass is a plain causal one beside the KV cache: an embedding has no next step to keep it for.
"""

from typing import Literal

import torch

from qtool.runtime.models.model import Model, causal_hidden

Pooling = Literal["mean", "last"]


@torch.inference_mode()
def embed(model: Model, token_ids: tuple[int, ...], pooling: Pooling) -> list[float]:
    """token_ids [tokens] -> a vector of length 1, as long as the model is wide."""
    hidden = causal_hidden(model, torch.tensor([token_ids]))[0]
    norm = getattr(model, "norm", None)
    states = (hidden if norm is None else norm(hidden)).float()
    pooled = states[-1] if pooling == "last" else states.mean(dim=0)
    vector: list[float] = torch.nn.functional.normalize(pooled, dim=0).tolist()
    return vector
