"""The engine's steps: computed and read at once, or launched and read later.

A step whose tokens the device draws is left running. The next one is scheduled meanwhile, and
launched before this one's tokens are read, unless the host has to know them for it; so the device
never waits for the host, and what the host does (reading, stopping, text) costs nothing. A sequence
that is found to have stopped has then been computed once more: nobody reads that token.

One grammar in a step makes all of it wait for its tokens, as does whatever takes logits to the
host. Waiting for some rows only would cut a step in two, and reading the weights twice costs more
than what is waited for: the host's part of a step, of which scheduling is not waited for even so.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from qtool.runtime.engine.adapters import Adapters
from qtool.runtime.engine.batch import Unread, make_batch
from qtool.runtime.engine.blocks import BlockManager
from qtool.runtime.engine.device_draw import Launched, draws_on_device, needs_unread
from qtool.runtime.engine.draw import Drawn, draw
from qtool.runtime.engine.runner import Runner
from qtool.runtime.engine.scheduler import Scheduled


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """
    started  in the engine's seconds
    found    what was drawn, or where it will be
    """

    scheduled: Series[Scheduled]
    started: float
    found: Launched | Series[Drawn | Exception]

    @property
    def is_running(self) -> bool:
        return isinstance(self.found, Launched)

    @property
    def unread(self) -> Unread | None:
        return self.found.unread if isinstance(self.found, Launched) else None

    def read(self) -> Series[Drawn | Exception]:
        """For each sequence what it drew, or its own failure; waits for the device."""
        if isinstance(self.found, Launched):
            return self.found.read(self.scheduled)
        return self.found


class Steps:
    """adapters: of requests, chosen before each step; None: there are none"""

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        adapters: Adapters | None,
        device: torch.device,
    ) -> None:
        self._runner = runner
        self._blocks = blocks
        self._adapters = adapters
        self._device = device
        # Starts its thread with the first grammar.
        self._mask_worker = ThreadPoolExecutor(1, "qtool-grammar")

    def can_follow(self, scheduled: Series[Scheduled]) -> bool:
        """Whether the step can be launched while tokens of the one before are not read."""
        return draws_on_device(scheduled) and not needs_unread(scheduled)

    def begin(
        self, scheduled: Series[Scheduled], started: float, before: Step | None = None
    ) -> Step:
        """before: a step that has not been read, which this one `can_follow`"""
        for work in scheduled:
            grammar = work.sequence.grammar
            if grammar is not None and work.samples:
                drafts = work.sequence.draft_token_ids[: work.num_draft_tokens]
                grammar.prepare(self._mask_worker, work.sequence.token_ids, drafts)
        if self._adapters is not None:
            self._adapters.select([(work.sequence.adapter, work.num_tokens) for work in scheduled])
        unread = None if before is None else before.unread
        batch = make_batch(scheduled, self._blocks.table, self._device, unread)
        device_draw = self._runner.device_draw
        if device_draw is not None and draws_on_device(scheduled):
            return Step(scheduled, started, device_draw.launch(batch, scheduled))
        return Step(scheduled, started, draw(self._runner.run(batch), batch, scheduled))
