"""What one layer's attention is: the figures from which caches, plans and kernels are chosen.

A decoder says it once for every layer (`Model.attention`). Whoever runs it makes the KV pool of a
layer from `num_kv_heads`, `key_dim` and `value_dim`, one plan of a step for each distinct window,
and passes the rest to the kernel with every call.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """softmax(cap(scale * q k) + mask) v of one layer.

    num_heads     query heads; a multiple of num_kv_heads
    key_dim       channels of a query and a key head
    value_dim     channels of a value head, and of the output's heads
    scale         what scores are multiplied by
    window        a token sees itself and the window - 1 tokens before it; None: all before it
    softcap       scores become softcap * tanh(score / softcap); None: they stay
    sinks         a logit a head that takes its share of the softmax and has no value (GPT-OSS)
    value_in_key  values are the first value_dim channels of the keys: latent attention caches one
                  vector a token, and the value that is passed is a view of the key
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None
    value_in_key: bool = False

    def __post_init__(self) -> None:
        assert self.num_heads > 0, self
        assert self.num_heads % self.num_kv_heads == 0, self
        assert self.window is None or self.window > 0, self
        assert self.sinks is None or len(self.sinks) == self.num_heads, self
        assert not self.value_in_key or self.value_dim <= self.key_dim, self

    @property
    def cached_channels(self) -> int:
        """Numbers that the cache holds for one token of this layer."""
        per_head = self.key_dim if self.value_in_key else self.key_dim + self.value_dim
        return self.num_kv_heads * per_head
