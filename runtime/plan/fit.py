"""What of a model fits on a device, and how fast it runs there."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.runtime.config import TARGET_ITL_MS
from qtool.runtime.plan.costs import RooflineCosts, StepShape
from qtool.runtime.plan.hardware import Gpu
from qtool.runtime.plan.paper import PaperModel
from qtool.runtime.plan.simulate import Limits
from qtool.runtime.plan.variants import Variant

# Tokens of a block on CUDA, and of a step where prompts are computed.
BLOCK_SIZE = 16
MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_CONTEXT = 4096
# What a driver, its libraries and a graph take, and no setting gives back.
OVERHEAD_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Setting:
    """How a replica is started.

    utilization  share of a GPU's memory that may be used
    num_gpus     that share a replica's matrices (tensor parallel)
    """

    max_num_seqs: int = 64
    utilization: float = 0.9
    kv_int8: bool = False
    num_gpus: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise UsageError(
                f"gpu_memory_utilization is {self.utilization}, must be above 0 and at most 1"
            )


@dataclass(frozen=True, slots=True)
class Fit:
    """A form of a model on one kind of GPU; bytes are of one replica, all its GPUs together.

    kv_tokens   that the cache has room for; below 1: the model does not fit
    sequences   of a context, at once
    *_tokens_per_second  by the roofline: of one sequence, of as many as fit (at most max_num_seqs),
                         of a prompt
    """

    gpu: str
    num_gpus: int
    variant: str
    memory_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_tokens: int
    sequences: int
    decode_tokens_per_second: float
    batch_tokens_per_second: float
    prefill_tokens_per_second: float

    @property
    def fits(self) -> bool:
        return self.kv_tokens > 0


def fit(model: PaperModel, variant: Variant, gpu: Gpu, setting: Setting, context: int) -> Fit:
    """context  tokens of a sequence, for `sequences` and for what decoding reads"""
    check_shares(model, setting.num_gpus)
    activations = setting.num_gpus * model.activation_bytes(
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, max_num_seqs=setting.max_num_seqs
    )
    memory = setting.num_gpus * gpu.memory_bytes
    usable = int(memory * setting.utilization) - setting.num_gpus * OVERHEAD_BYTES
    left = usable - variant.num_bytes - activations
    kv_tokens = max(left, 0) // model.kv_bytes_per_token(int8=setting.kv_int8)
    sequences = min(kv_tokens // context, setting.max_num_seqs)
    costs = RooflineCosts.of(
        model, variant, gpu, kv_int8=setting.kv_int8, num_gpus=setting.num_gpus
    )
    seen = model.attended_tokens(context)

    def rate(batch: int) -> float:
        return batch / costs.seconds(StepShape(batch, batch, batch * seen)) if batch else 0.0

    chunk = MAX_NUM_BATCHED_TOKENS
    prefill = chunk / costs.seconds(StepShape(chunk, 1, pairs=chunk * chunk / 2))
    return Fit(
        gpu=gpu.name,
        num_gpus=setting.num_gpus,
        variant=variant.name,
        memory_bytes=memory,
        weight_bytes=variant.num_bytes,
        activation_bytes=activations,
        kv_tokens=kv_tokens,
        sequences=sequences,
        decode_tokens_per_second=rate(min(sequences, 1)),
        batch_tokens_per_second=rate(sequences),
        prefill_tokens_per_second=prefill if sequences else 0.0,
    )


def limits(found: Fit, setting: Setting) -> Limits:
    """What the engine of a replica is started with; raises UsageError where the model is larger
    than the memory.
    """
    if not found.fits:
        raise UsageError(
            f"{found.variant} of {found.weight_bytes / 1e9:.1f} GB and "
            f"{found.activation_bytes / 1e9:.1f} GB of activations do not fit into "
            f"{found.num_gpus} x {found.gpu} ({found.memory_bytes / 1e9:.0f} GB)",
            "choose fewer bits (--as int4), more GPUs (--tensor-parallel-size), or a larger one",
        )
    return Limits(
        num_blocks=max(found.kv_tokens // BLOCK_SIZE, 1),
        block_size=BLOCK_SIZE,
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        target_step_seconds=TARGET_ITL_MS["cuda"] / 1e3,
    )


def check_room(limits: Limits, longest: int) -> None:
    """Raise UsageError unless the pool holds a sequence of this many tokens."""
    room = limits.num_blocks * limits.block_size
    if longest > room:
        raise UsageError(
            f"a request of {longest} tokens does not fit into a KV cache of {room}",
            "choose shorter lengths, fewer bits, or a device with more memory",
        )


def choose_context(longest: int, asked: int | None) -> int:
    """Tokens of a sequence, of at most the model's `longest`; raises UsageError beyond it."""
    if asked is not None and asked > longest:
        raise UsageError(
            f"{asked} tokens are asked for, and the model was made for {longest}",
            "choose a smaller --context, or shorter --input-len and --output-len",
        )
    return min(DEFAULT_CONTEXT, longest) if asked is None else asked


def check_shares(model: PaperModel, num_gpus: int) -> None:
    """Raise UsageError unless so many GPUs can share the model's heads."""
    heads, kv_heads = model.config.num_heads, model.config.num_kv_heads
    if heads % num_gpus or (kv_heads % num_gpus and num_gpus % kv_heads):
        divisors = [
            count
            for count in range(1, heads + 1)
            if heads % count == 0 and (kv_heads % count == 0 or count % kv_heads == 0)
        ]
        raise UsageError(
            f"{num_gpus} GPUs cannot share {heads} heads and {kv_heads} KV heads",
            f"--tensor-parallel-size can be {', '.join(map(str, divisors[:8]))}",
        )
