"""The calibration data on its way through the blocks, finished ones and those to be solved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.calibration.capture import BlockCapture
from qtool.calibration.dataset import CalibrationTokens
from qtool.calibration.linears import Linear, all_linears
from qtool.calibration.originals import Originals
from qtool.calibration.ranks import DataRanks, SharedCapture
from qtool.calibration.runner import CHUNK_TOKENS, BlockRunner
from qtool.calibration.skeleton import Skeleton, assign
from qtool.quantize.group import put_weights
from qtool.quantize.job import Job
from qtool.quantize.journal import Journal
from qtool.quantize.layouts import spec_of
from qtool.recipe import Gptq
from qtool.scheme import QuantScheme

# Widths whose rounding is far coarser than bfloat16's 2**-9.
_COARSE_BITS = 5
# Chunks at least, so that there is something to hold out.
_FEWEST_CHUNKS = 8


def in_bfloat16(job: Job) -> bool:
    """Whether the blocks are run with bfloat16 products."""
    coarse = all(
        (scheme.bits <= _COARSE_BITS)
        if isinstance(scheme, QuantScheme)
        else scheme.table_bits is not None
        for scheme in job.plan.quantized.values()
    )
    return coarse and job.skeleton.placement.bfloat16


class CalibrationStream:
    """The calibration data on its way through the blocks."""

    def __init__(
        self,
        job: Job,
        tokens: CalibrationTokens,
        journal: Journal,
        ranks: DataRanks | None = None,
    ) -> None:
        self._job = job
        self._journal = journal
        self._ranks = ranks
        job.skeleton.load_outside(with_head=False)
        chunk_tokens = min(CHUNK_TOKENS, tokens.tokens.numel() // _FEWEST_CHUNKS)
        own = tokens.tokens
        if ranks is not None:
            own = ranks.own_chunks(own, max(1, chunk_tokens // own.shape[1]))
        self._runner = BlockRunner(job.skeleton, own, chunk_tokens, bfloat16=in_bfloat16(job))
        file = journal.folder / "activations.bin"
        self._activations = self._runner.activations(file)
        method = job.recipe.method
        follows = isinstance(method, Gptq) and method.follows_original
        self.originals = Originals(job.skeleton, self._runner, journal.folder) if follows else None

    def open(self, index: int) -> BlockCapture:
        """The block with its weights: as they were, or as an earlier run left them."""
        skeleton = self._job.skeleton
        skeleton.load_block(index)
        place = skeleton, self._runner, self._activations, index, self._journal.folder
        ranks = self._ranks
        capture = BlockCapture(*place) if ranks is None else SharedCapture(ranks, *place)
        if index < len(self._journal.blocks):
            if self._job.plan.block(index):
                # Recorded where its solver had it recorded: what is recorded rounds elsewhere.
                capture.trace(dict.fromkeys(linear.site for linear in all_linears(skeleton, index)))
            if self.originals is not None:
                self.originals.record(index, (), capture.recorded)
            restore_block(self._job, index, self._journal)
        return capture

    def close(self, capture: BlockCapture) -> None:
        """Run the data on through the block, and give its memory back."""
        if capture.index + 1 < self._job.num_blocks:
            capture.advance()
        else:
            self._activations.close()
        capture.close()
        if self.originals is not None:
            self.originals.forget()
            if capture.index + 1 == self._job.num_blocks:
                self.originals.close()
        self._job.skeleton.free_block(capture.index)


def restore_block(job: Job, index: int, journal: Journal) -> None:
    """Give a loaded block the weights of its finished file."""
    tensors = journal.tensors(index)
    put_weights(job.skeleton, index, unpacked(job, index, tensors))
    put_changed(job.skeleton, {name: tensors[name] for name in journal.blocks[index].changed})


def unpacked(job: Job, index: int, tensors: Mapping[str, Tensor]) -> list[tuple[Linear, Tensor]]:
    """A block's linears decoded from packed tensors, float32 [out, in]."""
    decoded = []
    for linear in job.plan.block(index):
        parts = {
            suffix: tensors[name]
            for suffix in job.layout.suffixes
            if (name := f"{linear.name}.{suffix}") in tensors
        }
        spec = spec_of(linear.name, job.plan.quantized[linear])
        decoded.append((linear, job.layout.unpack(parts, spec).dequantize()))
    return decoded


def put_changed(skeleton: Skeleton, changed: Mapping[str, Tensor]) -> None:
    """Give checkpoint tensors' new values to the parameters they are."""
    for name, tensor in changed.items():
        owner = skeleton.stored.owner(name)
        assert owner is not None, name
        assert skeleton.stored.sole_tensor(owner) == name, name
        path = owner.removeprefix(f"{skeleton.prefix}.")
        index, _, rest = path.partition(".")
        device = skeleton.placement.block(int(index))
        assign(skeleton.blocks[int(index)], rest, tensor.to(device, torch.float32))
