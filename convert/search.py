"""`--search best`: GGUF bytes found with the inputs that each linear will really get.

Block by block, as quantization to integers goes: the calibration data runs through the blocks that
are already quantized, each linear's second moment H is taken with all before it in its block
quantized too, and its codes are chosen by error feedback (quantize/block_grid.py). The token
embedding is quantized first. Tensors are asked for in the file's order, which is that of the
blocks, so a file is written while its blocks are solved, and memory is a block. Stacked experts,
fused and transposed matrices are rounded as ever.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool.arch import find_family
from qtool.calibration.activations import Activations
from qtool.calibration.capture import BlockCapture, stages
from qtool.calibration.dataset import load_calibration, load_tokenizer
from qtool.calibration.linears import Linear, Site, block_linears
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Moments
from qtool.checkpoint import Checkpoint
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.export import ExportPlan, PlannedTensor
from qtool.convert.gguf.mix import block_number
from qtool.convert.gguf.names import NameMap
from qtool.convert.gguf.sizes import Sizes
from qtool.errors import QtoolError, UnsupportedModel
from qtool.quantize import block_grid
from qtool.quantize.block import put_weights, require_finite
from qtool.recipe import Calibration


@dataclass(frozen=True, slots=True)
class Found:
    """What the search made of one tensor; errors are tr(d H dᵀ)."""

    name: str
    type: str
    error: float
    plain_error: float


class BestSearch:
    """`prepared` of an ExportPlan. Keeps what it found for the report."""

    def __init__(
        self, plan: ExportPlan, wanted: Calibration, *, trust_remote_code: bool = False
    ) -> None:
        source = plan.reader.source
        if source.is_gguf:
            raise UnsupportedModel(
                f"{source.name} is a GGUF file, which --search best cannot run",
                "convert the Hugging Face model that it was made from",
            )
        checkpoint = Checkpoint.open(source.path)
        self._skeleton = Skeleton.build(checkpoint, trust_remote_code=trust_remote_code)
        self._names = NameMap.of(find_family(checkpoint.config), Sizes.of(checkpoint.config))
        self._by_module = {
            tensor.source.removesuffix(".weight"): tensor
            for tensor in plan.tensors
            if tensor.source is not None and _is_plain_matrix(tensor)
        }
        tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
        context = getattr(self._skeleton.model.config, "max_position_embeddings", None)
        if isinstance(context, int) and context < wanted.sequence_length:
            wanted = Calibration(wanted.dataset, wanted.num_samples, context, wanted.seed)
        vocab_size = self._skeleton.model.get_input_embeddings().weight.shape[0]
        self.tokens = load_calibration(wanted, tokenizer, vocab_size=vocab_size)
        self.found: list[Found] = []
        self._folder = tempfile.TemporaryDirectory(prefix="qtool-search-")
        self._runner: BlockRunner | None = None
        self._activations: Activations | None = None
        self._next = 0
        self._ready: dict[str, Tensor] = {}

    def __call__(self, tensor: PlannedTensor) -> Tensor | None:
        name = tensor.info.name
        block = block_number(name)
        if block < 0:
            return None
        while self._next <= block:
            self._ready = {}  # of a block before, all written
            self._solve_block(self._next)
            self._next += 1
        return self._ready.pop(name, None)

    def notes(self) -> tuple[str, ...]:
        if not self.found:
            return ()
        ratios = [f.error / f.plain_error for f in self.found if f.plain_error > 0]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios and all(ratios) else 1.0
        left = len(self._by_module) - len(self.found)
        lines = [
            f"{len(self.found)} linears searched with {self.tokens.tokens.numel():,} tokens: their "
            f"output errors are {mean:.2f} of plain rounding's with importance (geometric mean)"
        ]
        if left > 0:
            lines.append(f"{left} matrices were not searched: embeddings, heads, unreached experts")
        return tuple(lines)

    def _start(self) -> tuple[BlockRunner, Activations]:
        if self._runner is None or self._activations is None:
            self._skeleton.load_outside()
            self._quantize_embedding()
            self._runner = BlockRunner(self._skeleton, self.tokens.tokens)
            file = Path(self._folder.name) / "activations.bin"
            self._activations = Activations(self._runner.num_chunks, file)
        return self._runner, self._activations

    def _quantize_embedding(self) -> None:
        embedding = self._skeleton.model.get_input_embeddings().weight
        tensor = next(
            (t for t in self._by_module.values() if t.info.name == "token_embd.weight"), None
        )
        if tensor is None or embedding.dtype != torch.float32:
            return
        type = tensor.info.type.name
        with torch.no_grad():
            embedding.copy_(BLOCK_CODECS[type].dequantize(quantize(type, embedding.data)))

    def _solve_block(self, index: int) -> None:
        runner, activations = self._start()
        skeleton = self._skeleton
        skeleton.load_block(index)
        folder = Path(self._folder.name)
        capture = BlockCapture(skeleton, runner, activations, index, folder)
        linears = [item for item in block_linears(skeleton, index) if isinstance(item, Linear)]
        widths = {linear.site: linear.in_features for linear in linears}
        by_site: dict[Site, list[Linear]] = {}
        for linear in linears:
            if linear.name in self._by_module:
                by_site.setdefault(linear.site, []).append(linear)
        groups = [group for group in capture.trace(widths) if by_site.keys() & set(group.sites)]
        pending = set(by_site)
        for stage in stages(groups, sequential=True):
            moments = capture.collect(stage, widths.__getitem__, pending)
            for group in stage.groups:
                members = [linear for site in group.sites for linear in by_site.get(site, ())]
                self._solve(index, members, moments[group.first])
                pending -= set(group.sites)
        if index + 1 < len(skeleton.blocks):
            capture.advance()
        else:
            activations.close()
        capture.close()
        skeleton.free_block(index)
        if index + 1 == len(skeleton.blocks):
            self._folder.cleanup()

    def _solve(self, index: int, members: list[Linear], seen: Moments) -> None:
        if not seen.is_finite:
            raise QtoolError(
                f"the inputs of {members[0].name} are not finite",
                "the checkpoint holds NaN or infinite weights, or overflows on this text",
            )
        if seen.count == 0:
            return
        hessian = seen.hessian
        parameters = dict(self._skeleton.block_parameters(index))
        solved = []
        for linear in members:
            tensor = self._by_module[linear.name]
            weight = linear.matrix(parameters[linear.parameter]).contiguous()
            require_finite(weight, linear)
            others = () if tensor.importance is None else (tensor.importance,)
            type = tensor.info.type.name
            solution = block_grid.solve(type, weight, hessian, others)
            order = self._names.row_order(linear.name)
            self._ready[tensor.info.name] = solution.data if order is None else solution.data[order]
            self.found.append(Found(tensor.info.name, type, solution.error, solution.plain_error))
            solved.append((linear, solution.dequantized))
        put_weights(self._skeleton, index, solved)


def _is_plain_matrix(tensor: PlannedTensor) -> bool:
    """One matrix of the checkpoint, its rows those of the file, that is rounded here."""
    arranged = tensor.arranged
    return (
        arranged is not None
        and tensor.how == "quantize"
        and arranged.form == "rows"
        and len(arranged.parts) == 1
        and arranged.offset == 0
        and len(tensor.info.shape) == 2
    )
