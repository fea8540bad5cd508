"""The decoder of the Llama line, written once: llama, mistral, qwen2, qwen3.

What sets the families apart is data: biases that are there or not, a norm on each head of q and k
or none, the stretch of the rotary frequencies, a head of its own or the embedding's. The model
knows neither batches nor caches: it computes rows, one a token, and asks `attend` for what a row
needs of the others (runtime/models/model.py).

    x = embedding[tokens]
    each block:  x += o(attend(rope(qk_norm(qkv(norm(x))))))
                 x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.arch import DecoderConfig
from qtool.kernels.cpu.torch_ops import rms_norm, rope, silu_mul
from qtool.runtime.layers import Linear, Linears
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.model import Attend


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """attn_norm, mlp_norm [hidden]; qk_norm [heads + kv_heads, head_dim] or None."""

    attn_norm: Tensor
    qkv: Linear | Linears
    qk_norm: Tensor | None
    o: Linear | Linears
    mlp_norm: Tensor
    gate_up: Linear | Linears
    down: Linear | Linears


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """embedding [vocab, hidden]; inverse_frequencies [head_dim / 2] float32; norm [hidden]."""

    config: DecoderConfig
    attention: tuple[AttentionSpec, ...]
    embedding: Tensor
    inverse_frequencies: Tensor
    blocks: tuple[Block, ...]
    norm: Tensor
    head: Linear | Linears

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """token_ids, positions [rows] int64 -> the last block's output [rows, hidden]."""
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        eps = config.rms_norm_eps
        cos, sin = self._rotations(positions)
        x = self.embedding.index_select(0, token_ids)
        for index, block in enumerate(self.blocks):
            qkv = block.qkv(rms_norm(x, block.attn_norm, eps))
            heads = qkv.view(qkv.shape[0], -1, config.head_dim)
            qk = heads[:, :num_rotated]
            if block.qk_norm is not None:
                qk = rms_norm(qk, None, eps) * block.qk_norm
            qk = rope(qk, cos, sin)
            attended = attend(
                index, qk[:, : config.num_heads], qk[:, config.num_heads :], heads[:, num_rotated:]
            )
            x = x.add_(block.o(attended.reshape(attended.shape[0], -1)))
            gate_up = block.gate_up(rms_norm(x, block.mlp_norm, eps))
            x = x.add_(block.down(silu_mul(gate_up)))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32."""
        return self.head(rms_norm(hidden, self.norm, self.config.rms_norm_eps)).float()

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [rows, 1, head_dim] as `rope` takes them: sin's first half negated."""
        angles = positions.float()[:, None, None] * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1).to(self.dtype),
            torch.cat((-sin, sin), dim=-1).to(self.dtype),
        )


def attention_specs(config: DecoderConfig) -> tuple[AttentionSpec, ...]:
    """One a layer."""
    spec = AttentionSpec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        window=config.sliding_window,
    )
    return (spec,) * config.num_layers
