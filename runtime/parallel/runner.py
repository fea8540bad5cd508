"""A model's runner on rank 0: what it runs, all ranks run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qtool.runtime.config import KvCacheDtype
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.models.model import Model
from qtool.runtime.parallel.message import ClearBlocks, CopyBlocks, Open, Step
from qtool.runtime.parallel.team import Team


class TeamRunner:
    """A `ModelRunner` whose pool is shared out with the model: a block has each rank's heads."""

    def __init__(
        self,
        team: Team,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        kv_cache_dtype: KvCacheDtype,
        context: int,
    ) -> None:
        self._team = team
        self._number = team.new_runner()
        team.tell(Open(self._number, num_blocks, block_size, kv_cache_dtype == "int8", context))
        self._own = ModelRunner(
            model, num_blocks=num_blocks, block_size=block_size, kv_cache_dtype=kv_cache_dtype
        )

    def run(self, batch: Batch) -> Tensor:
        """See `ModelRunner.run`. Raises RankLost."""
        step = Step(
            self._number, batch.token_ids.tolist(), batch.sampled_rows.tolist(), batch.spans
        )
        with self._team.together(step):
            return self._own.run(batch)

    def copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            with self._team.together(CopyBlocks(self._number, copies)):
                self._own.copy(copies)

    def clear(self, block_ids: Sequence[int]) -> None:
        if block_ids:
            with self._team.together(ClearBlocks(self._number, block_ids)):
                self._own.clear(block_ids)
