"""What the engine is asked to do: one frozen value, with vLLM's names, checked when it is built.

The command line reads its defaults from here, so help text, code and documentation cannot drift
apart. What the engine decides from it (the number of KV blocks, the data type that "auto" became)
is a second value, `runtime.engine.client.ModelInfo`, and never written back.

`max_num_batched_tokens` bounds how long one step may take and so the gap between two tokens of
everybody else: on a CPU that prefills at a few hundred tokens a second, vLLM's 2048 would stall
every stream for seconds. 512 costs little prefill speed and keeps the stall under a second for
models of up to a billion parameters.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from qtool.errors import UnknownName, UsageError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


# No slots: they would hide the defaults, which the command line reads as EngineConfig.max_num_seqs.
@dataclass(frozen=True)
class EngineConfig:
    """How to load and run one model.

    model                    folder, .gguf file, builtin:NAME or Hub id
    max_model_len            longest prompt plus answer; None: what the model was made for
    max_num_seqs             sequences in one step
    max_num_batched_tokens   tokens in one step, prompts and answers together
    block_size               tokens in one KV block
    kv_cache_memory_bytes    size of the KV pool; None: a fraction of free memory, never more than
                             max_num_seqs sequences of max_model_len tokens can use
    seed                     what requests without a seed of their own are sampled from
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_cache_memory_bytes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise UnknownName("dtype", self.dtype, get_args(Dtype))
        if self.device not in get_args(Device):
            raise UnknownName("device", self.device, get_args(Device))
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("max_model_len", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, must be at least 1")
