"""A model's runner on rank 0: what it runs, all ranks run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from qtool.runtime.config import KvCacheDtype
from qtool.runtime.engine.adapters import Adapters
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.engine.device_draw import DeviceDraw
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.models.model import Model
from qtool.runtime.parallel.message import ClearBlocks, CopyBlocks, Open, Step, Text
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
        max_num_seqs: int,
        enforce_eager: bool,
        adapters: Adapters | None = None,
    ) -> None:
        """context: tokens of the longest sequence; max_num_seqs: in a recorded step, at the most;
        adapters: which the model was wrapped for, selected before each step
        """
        self._adapters = adapters
        # Adapters that the others have, by the numbers that name them.
        self._told: list[str] = []
        self._team = team
        self._number = team.new_runner()
        self.device_draw: DeviceDraw | None = None
        team.tell(
            Open(
                self._number,
                num_blocks,
                block_size,
                kv_cache_dtype == "int8",
                context,
                max_num_seqs,
                enforce_eager,
                adapters is not None,
            )
        )
        self._own = ModelRunner(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=context,
            max_num_seqs=max_num_seqs,
            enforce_eager=enforce_eager,
        )

    def run(self, batch: Batch) -> Tensor:
        """See `ModelRunner.run`. Raises RankLost."""
        step = Step(
            self._number,
            batch.token_ids.tolist(),
            batch.sampled_rows.tolist(),
            batch.spans,
            self._adapter_rows(),
        )
        with self._team.together(step):
            return self._own.run(batch)

    def _adapter_rows(self) -> list[tuple[int, int, int]]:
        """What is selected, once the others have the adapters."""
        if self._adapters is None:
            return []
        folders = self._adapters.folders
        for name in [name for name in folders if name not in self._told]:
            adapter = [self._number, name, str(folders[name].resolve())]
            self._team.tell(Text(json.dumps({"adapter": adapter})))
            self._told.append(name)
        selected = self._adapters.selected
        return [(self._told.index(rows.adapter), rows.start, rows.stop) for rows in selected]

    def copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            with self._team.together(CopyBlocks(self._number, copies)):
                self._own.copy(copies)

    def clear(self, block_ids: Sequence[int]) -> None:
        if block_ids:
            with self._team.together(ClearBlocks(self._number, block_ids)):
                self._own.clear(block_ids)
