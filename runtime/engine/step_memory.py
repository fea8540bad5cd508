"""What a step takes of a GPU's memory beside weights and cache: measured, by running the largest.

Activations, the products of linears in parts, unpacked weights of large steps and the logits come
and go within a step; what they take together at the most follows from the model, the kernels that
were chosen and PyTorch's libraries, and no arithmetic knows all of them. Recorded steps keep
theirs: the largest is recorded, which takes what all of them share (`runtime.engine.graphs`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.reference import Span
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.token_counts import num_slots
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.model import Model


def largest_step(num_tokens: int, num_drawn: int, block_size: int, device: torch.device) -> Batch:
    """A prompt of `num_tokens`, whose last `num_drawn` rows are drawn from."""
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    blocks = tuple(range(-(-num_tokens // block_size)))
    drawn = min(num_drawn, num_tokens)
    return Batch(
        token_ids=ids,
        positions=torch.arange(num_tokens, device=device),
        spans=(Span(num_tokens, num_tokens, blocks),),
        sampled_rows=torch.arange(num_tokens - drawn, num_tokens, device=device),
        row_ranges=(range(drawn),),
    )


def measure_step_bytes(model: Model, config: EngineConfig, longest: int) -> int:
    """Of the largest step that the config allows, with what recorded steps keep and the counts of
    tokens that penalties need; longest: tokens that a sequence can have.

    Kernels are compiled on the way, and libraries take their workspaces.
    """
    device = model.device
    num_tokens = min(config.max_num_batched_tokens, longest)
    runner = ModelRunner(
        model,
        num_blocks=-(-num_tokens // config.block_size),
        block_size=config.block_size,
        kv_cache_dtype=config.kv_cache_dtype,
        max_model_len=longest,
        max_num_seqs=config.max_num_seqs,
        enforce_eager=config.enforce_eager,
    )
    batch = largest_step(num_tokens, config.max_num_seqs, config.block_size, device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.run(batch, _before(model, num_tokens))
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    kept = 0
    if runner.gpu is not None and runner.gpu.graphs is not None:
        # All of a graph's pool, used at the moment or not.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        runner.gpu.graphs.record_largest()
        torch.cuda.empty_cache()
        kept = torch.cuda.memory_reserved(device) - before
    del runner, batch
    # What was taken goes back, or it would count as in use beside what was measured.
    torch.cuda.empty_cache()
    return int(taken) + kept + counts_bytes(config.max_num_seqs, model.vocab_size)


def counts_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Of `token_counts.TokenCounts` when every sequence of a step is penalized.

    >>> counts_bytes(48, 1000) == 64 * 1000 * 4
    True
    """
    return num_slots(max_num_seqs) * vocab_size * 4


def _before(model: Model, num_tokens: int) -> Tensor | None:
    """What comes in from the parts before, of a model on several devices."""
    if not isinstance(model, Decoder) or model.embedding.device == model.device:
        return None
    shape = num_tokens, model.embedding.hidden_size
    return torch.zeros(shape, dtype=model.dtype, device=model.device)
