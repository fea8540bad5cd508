"""The decoder, written once for every family of `qtool.arch`: blocks made of a few parts.

    x = embedding[tokens] * embedding_scale
    each block:  x += residual_scale * post_norm(attention(norm(x)))
                 x += residual_scale * post_norm(mlp(norm(x)))
    logits = softcap(head(norm(x)) * logits_scale)

A family has some of these norms and not the others, and the parts that its row and its config.json
name: see runtime/models/build.py, which makes them. The model knows neither batches nor caches
(runtime/models/model.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.decoder_config import DecoderConfig
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.attention import LatentAttention, SelfAttention
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.embedding import Embedding
from qtool.runtime.models.mlp import Mlp, SparseMlp
from qtool.runtime.models.model import Attend
from qtool.runtime.models.parts import Norm, Rotation, Turn
from qtool.runtime.parallel.layers import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """None: the family has no norm there."""

    attention_norm: Norm | None
    attention: SelfAttention | LatentAttention
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp | SparseMlp
    mlp_post_norm: Norm | None
    residual_scale: float

    def __call__(self, x: Tensor, turns: Sequence[Turn], attend: Attend) -> Tensor:
        """x [rows, hidden], in place."""
        scale = self.residual_scale
        y = x if self.attention_norm is None else self.attention_norm(x)
        y = self.attention(y, turns, attend)
        x = x.add_(
            y if self.attention_post_norm is None else self.attention_post_norm(y), alpha=scale
        )
        y = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        return x.add_(y if self.mlp_post_norm is None else self.mlp_post_norm(y), alpha=scale)


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """embedding [vocab, hidden]; rotations are those that the blocks' attention numbers.

    device  of the blocks, and of all else but in a part of a model (`runtime.models.split`)
    ranks   the others that compute this model, where it is shared out: embedding and head have this
            rank's tokens, attention its heads
    """

    config: DecoderConfig
    attention: tuple[AttentionSpec, ...]
    embedding: Embedding
    rotations: tuple[Rotation, ...]
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear | Linears
    device: torch.device
    ranks: Ranks | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_logits(self) -> int:
        """Logits of a row here: of the whole vocabulary at rank 0, at others of their part."""
        if self.ranks is None or self.ranks.plan.shard.rank == 0:
            return self.vocab_size
        return len(self.ranks.plan.vocabulary)

    @property
    def num_ranks(self) -> int:
        return 1 if self.ranks is None else self.ranks.plan.shard.size

    @property
    def whole_config(self) -> DecoderConfig:
        """Of the model; `config` is what is computed here."""
        return self.config if self.ranks is None else self.ranks.plan.config

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head multiplies by the very tensor that tokens are looked up in."""
        values = self.embedding.values
        return values is not None and isinstance(self.head, Linear) and self.head.shares(values)

    @property
    def looked_up_bytes(self) -> int:
        """Bytes of which a step reads the rows of its tokens only."""
        return 0 if self.head_is_embedding else self.embedding.nbytes

    def for_context(self, num_tokens: int) -> "Decoder":
        """The same weights, turned as sequences of up to `num_tokens` need it."""
        rotations = tuple(
            Rotation.of(rotation.rope, rotation.head_dim, num_tokens, self.device)
            for rotation in self.rotations
        )
        return dataclasses.replace(self, rotations=rotations)

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """token_ids, positions [rows] int64 -> the last block's output [rows, hidden]."""
        return self.through(self.embed(token_ids), positions, attend)

    def through(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x [rows, hidden], the first block's input -> the last one's output; may be in place."""
        turns = [rotation.turn(positions, self.dtype) for rotation in self.rotations]
        for block in self.blocks:
            x = block(x, turns, attend)
        return x

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [rows] int64 -> the first block's input [rows, hidden]."""
        if self.ranks is None:
            x = self.embedding(token_ids)
        else:
            x = self.ranks.look_up(self.embedding, token_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the model's type, as it was when the model was trained.
            x = x.mul_(torch.tensor(self.config.embedding_scale, dtype=self.dtype))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32."""
        return self.shape_logits(self.head(self.norm(hidden)).float())

    def shape_logits(self, logits: Tensor) -> Tensor:
        """The head's output [rows, vocab] float32 as the family scales and caps it, in place."""
        config = self.config
        if config.logits_scale != 1.0:
            logits = logits.mul_(config.logits_scale)
        if config.logits_softcap is not None:
            cap = config.logits_softcap
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits


def attention_specs(config: DecoderConfig) -> tuple[AttentionSpec, ...]:
    """One a layer. Latent attention is one KV head, whose value is in its key."""
    latent = config.latent
    if latent is None:
        kv_heads, key_dim, value_dim = config.num_kv_heads, config.head_dim, config.head_dim
    else:
        kv_heads, key_dim, value_dim = 1, latent.rank + latent.rope, latent.rank
    return tuple(
        AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            scale=config.attention_scale,
            window=layer.window,
            softcap=config.attention_softcap,
            value_in_key=latent is not None,
        )
        for layer in config.layers
    )
