"""What steps cost by arithmetic: operations, and bytes read from and written to memory.

    operations = 2 x weights of the linears x rows + 2 x weights of the head x rows that it judges
               + 2 x heads x (key + value channels) x tokens seen, in each layer's attention
    read       = the packed weights, once for all rows of a step, and the tokens seen of the cache
    written    = the cache's new tokens

Over the seconds that steps took, this is how much of the machine's arithmetic and of its memory's
bandwidth is used, without a profiler. What lies between layers is left out: it stays in caches. Of
experts, those that the rows of a step can have chosen count, in models that transformers' own code
runs all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

from torch import nn

from qtool.arch import find_family
from qtool.runtime.engine.scheduler import Scheduled
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.model import Model
from qtool.runtime.models.packed_modules import PackedLinear
from qtool.runtime.models.split import SplitDecoder
from qtool.runtime.models.tensors import EXPERTS, has, role_shapes


@dataclass(frozen=True, slots=True)
class LinearSizes:
    """Numbers of weights.

    block          of the linears in all blocks that every row is multiplied by
    experts        of all experts
    experts_used   share of the experts that one row is multiplied by
    head           of the head
    """

    block: int
    experts: int = 0
    experts_used: float = 0.0
    head: int = 0


# Upper ends of the classes that steps are counted in, by their tokens; vLLM's.
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))


@dataclass(slots=True)
class WorkCounts:
    """Since the start.

    seconds        spent in steps
    tokens         computed in steps, guesses among them
    steps_by_size  steps of as many tokens as each of STEP_TOKENS or fewer, but more than the one
                   before; at the end those of more than the last
    """

    operations: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    steps_by_size: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))


class WorkMeter:
    """
    weight_bytes           the model's, packed as they are, of all ranks
    cache_bytes_per_token  over all layers, keys and values
    """

    def __init__(self, model: Model, *, weight_bytes: int, cache_bytes_per_token: float) -> None:
        self.counts = WorkCounts()
        self._sizes = sizes_of(model)
        looked_up = model.looked_up_bytes if isinstance(model, Decoder | SplitDecoder) else 0
        ranks = model.num_ranks if isinstance(model, Decoder | SplitDecoder) else 1
        self._weight_bytes = weight_bytes - looked_up * ranks
        # Layers of one window see the same tokens, and few models have more than two windows.
        operations: Counter[int | None] = Counter()
        channels: Counter[int | None] = Counter()
        for spec in model.attention:
            heads = spec.num_heads * ranks
            operations[spec.window] += 2 * heads * (spec.key_dim + spec.value_dim)
            channels[spec.window] += spec.cached_channels
        per_channel = cache_bytes_per_token / max(channels.total(), 1)
        self._windows = tuple(
            (window, operations[window], channels[window] * per_channel) for window in operations
        )
        self._cache_bytes_per_token = cache_bytes_per_token

    def observe(self, scheduled: Series[Scheduled], seconds: float) -> None:
        """A step that has been computed."""
        counts, sizes = self.counts, self._sizes
        rows = head_rows = 0
        for work in scheduled:
            start = work.start
            stop = start + work.num_tokens
            rows += work.num_tokens
            head_rows += work.num_prompt_rows + work.num_draw_rows
            for window, operations, cached_bytes in self._windows:
                counts.operations += operations * tokens_seen(start, stop, window)
                first = 0 if window is None else max(start + 1 - window, 0)
                counts.bytes_read += cached_bytes * (stop - first)
        used = min(1.0, rows * sizes.experts_used)
        linear = sizes.block + sizes.experts * sizes.experts_used
        counts.operations += 2 * (linear * rows + sizes.head * head_rows)
        total = sizes.block + sizes.experts + sizes.head
        unread = sizes.experts * (1.0 - used) + (0 if head_rows else sizes.head)
        counts.bytes_read += self._weight_bytes * (1.0 - unread / max(total, 1))
        counts.bytes_written += rows * self._cache_bytes_per_token
        counts.seconds += seconds
        counts.tokens += rows
        counts.steps_by_size[bisect_left(STEP_TOKENS, rows)] += 1


def tokens_seen(start: int, stop: int, window: int | None) -> int:
    """Sum over the rows at positions start ... stop - 1 of the tokens that each attends to.

    >>> tokens_seen(0, 3, None), tokens_seen(2, 5, 2)
    (6, 6)
    """
    if window is None:
        return (start + 1 + stop) * (stop - start) // 2
    ramp_stop = min(max(window, start), stop)  # rows before it see all that is before them
    ramp = (start + 1 + ramp_stop) * (ramp_stop - start) // 2
    return ramp + (stop - ramp_stop) * window


def sizes_of(model: Model) -> LinearSizes:
    """The decoder's by its config, transformers' code's by its modules; no other model has any."""
    if not isinstance(model, Decoder | SplitDecoder):
        # By what it has: its class is in a module that loads transformers, which takes seconds.
        base, head = getattr(model, "base", None), getattr(model, "head", None)
        if isinstance(base, nn.Module) and isinstance(head, nn.Module):
            return _sizes_of_modules(base, head)
        return LinearSizes(block=0)
    config = model.whole_config
    family = find_family({"model_type": config.model_type})
    shapes = role_shapes(family, config)
    block = experts = 0
    for index in range(config.num_layers):
        for role in family.block_roles:
            shape = shapes[role]
            if len(shape) != 2 or not has(config, role, index):
                continue
            if role in EXPERTS:
                assert config.experts is not None
                experts += shape[0] * shape[1] * config.experts.count
            else:
                block += shape[0] * shape[1]
    used = config.experts.per_token / config.experts.count if config.experts else 0.0
    return LinearSizes(block, experts, used, config.vocab_size * config.hidden_size)


def _sizes_of_modules(base: nn.Module, head: nn.Module) -> LinearSizes:
    def weights(module: nn.Module) -> dict[int, int]:
        return {
            id(part): part.in_features * part.out_features
            for part in module.modules()
            if isinstance(part, nn.Linear | PackedLinear)
        }

    block = weights(base)
    rest = {key: size for key, size in weights(head).items() if key not in block}
    return LinearSizes(block=sum(block.values()), head=sum(rest.values()))
