"""`--search best`: GGUF bytes found with the inputs that each linear will really get.

Block by block, as quantization to integers goes: the calibration data runs through the blocks that
are already quantized, each linear's second moment H is taken with all before it in its block
quantized too, and its codes are chosen by error feedback (quantize/block_grid.py). The token
embedding is quantized first. Tensors are asked for in the file's order, which is that of the
blocks, so a file is written while its blocks are solved, and memory is a block. Where an earlier
run has written all of a block, its bytes are decoded into the model in place of a search.

Matrices of stacked experts are searched one by one; an expert that saw fewer vectors than it has
inputs borrows from what the layer's experts saw together. Matrices that GGUF cuts into two stacks
(kv_b of latent attention) are rounded as ever.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.arch import find_family
from qtool.calibration.activations import Activations
from qtool.calibration.capture import BlockCapture
from qtool.calibration.dataset import load_calibration, load_tokenizer
from qtool.calibration.groups import stages
from qtool.calibration.linears import Linear, Site, block_linears
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Moments
from qtool.checkpoint import Checkpoint
from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.mix import block_number
from qtool.convert.gguf.names import NameMap, inverse_order
from qtool.convert.gguf.plan import ExportPlan, PlannedTensor
from qtool.convert.gguf.sizes import Sizes
from qtool.errors import QtoolError, UnsupportedModel
from qtool.quantize import block_grid
from qtool.quantize.group import expert_prior, put_weights, require_finite
from qtool.recipe import Calibration

_EMBEDDING = "token_embd.weight"


class _Target(NamedTuple):
    """Where a linear's rows go: a matrix of a tensor of the file, which is a stack or one alone."""

    tensor: PlannedTensor
    number: int

    @property
    def importance(self) -> Tensor | None:
        """[in], of this matrix."""
        known, columns = self.tensor.importance, self.tensor.info.shape[-1]
        if known is None or known.numel() == columns:
            return known
        return known[self.number * columns : (self.number + 1) * columns]


@dataclass(frozen=True, slots=True)
class Found:
    """What the search made of one matrix of a tensor; errors are tr(d H dᵀ)."""

    name: str
    number: int
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
            part.removesuffix(".weight"): _Target(tensor, number)
            for tensor in plan.tensors
            for number, part in enumerate(_searched_parts(tensor))
        }
        self._rounded = [tensor.info.name for tensor in plan.tensors if tensor.how == "quantize"]
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
        # of the block that was solved last: a stack's matrices by number
        self._ready: dict[str, dict[int, Tensor]] = {}
        self._written: dict[str, Callable[[], Tensor]] = {}
        self._num_recalled = 0

    def __call__(self, tensor: PlannedTensor) -> Tensor | None:
        name = tensor.info.name
        block = block_number(name)
        if block < 0:
            return None
        while self._next <= block:
            self._ready = {}  # of a block before, all written
            self._take_block(self._next)
            self._next += 1
        parts = self._ready.pop(name, None)
        return None if parts is None else torch.cat([parts[number] for number in sorted(parts)])

    def recall(self, tensor: PlannedTensor, read: Callable[[], Tensor]) -> None:
        self._written[tensor.info.name] = read

    def identity(self) -> Mapping[str, Any]:
        return self.tokens.to_dict()

    def notes(self) -> tuple[str, ...]:
        lines = []
        if self.found:
            ratios = [f.error / f.plain_error for f in self.found if f.plain_error > 0]
            good = bool(ratios) and all(ratio > 0 for ratio in ratios)
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if good else 1.0
            lines.append(
                f"{len(self.found)} linears searched with {self.tokens.tokens.numel():,} tokens: "
                f"their output errors are {mean:.2f} of plain rounding's with importance "
                "(geometric mean)"
            )
        if self._num_recalled:
            lines.append(f"{self._num_recalled} linears are those of the run that was interrupted")
        done = {found.name for found in self.found} | self._written.keys()
        left = sorted({name.split(".")[-2] for name in self._rounded if name not in done})
        if self.found and left:
            lines.append(f"rounded without a search: {', '.join(left)}")
        return tuple(lines)

    def _start(self) -> tuple[BlockRunner, Activations]:
        if self._runner is None or self._activations is None:
            self._skeleton.load_outside()
            self._quantize_embedding()
            self._runner = BlockRunner(self._skeleton, self.tokens.tokens)
            file = Path(self._folder.name) / "activations.bin"
            self._activations = self._runner.activations(file)
        return self._runner, self._activations

    def _quantize_embedding(self) -> None:
        embedding = self._skeleton.model.get_input_embeddings().weight
        targets = self._by_module.values()
        tensor = next((t.tensor for t in targets if t.tensor.info.name == _EMBEDDING), None)
        if tensor is None or embedding.dtype != torch.float32:
            return
        type = tensor.info.type.name
        with torch.no_grad():
            embedding.copy_(BLOCK_CODECS[type].dequantize(quantize(type, embedding.data)))

    def _take_block(self, index: int) -> None:
        """Search a block, or take up what an earlier run made of it; then run the data through."""
        runner, activations = self._start()
        skeleton = self._skeleton
        skeleton.load_block(index)
        capture = BlockCapture(skeleton, runner, activations, index, Path(self._folder.name))
        linears = [
            linear
            for linear in block_linears(skeleton, index)
            if isinstance(linear, Linear) and linear.name in self._by_module
        ]
        targets = [self._by_module[linear.name] for linear in linears]
        if targets and all(target.tensor.info.name in self._written for target in targets):
            put_weights(skeleton, index, map(self._decoded, linears))
            self._num_recalled += len(linears)
        else:
            self._search_block(index, capture, linears)
        if index + 1 < len(skeleton.blocks):
            capture.advance()
        else:
            activations.close()
        capture.close()
        skeleton.free_block(index)
        if index + 1 == len(skeleton.blocks):
            self._folder.cleanup()

    def _decoded(self, linear: Linear) -> tuple[Linear, Tensor]:
        """A linear's weight as the file has it already."""
        tensor, number = self._by_module[linear.name]
        rows = linear.out_features
        data = self._written[tensor.info.name]()[number * rows : (number + 1) * rows]
        order = self._names.row_order(linear.name)
        if order is not None:
            data = data[inverse_order(order)]
        return linear, BLOCK_CODECS[tensor.info.type.name].dequantize(data)

    def _search_block(self, index: int, capture: BlockCapture, linears: Sequence[Linear]) -> None:
        everything = [x for x in block_linears(self._skeleton, index) if isinstance(x, Linear)]
        widths = {linear.site: linear.in_features for linear in everything}
        by_site: dict[Site, list[Linear]] = {}
        for linear in linears:
            by_site.setdefault(linear.site, []).append(linear)
        groups = [group for group in capture.trace(widths) if by_site.keys() & set(group.sites)]
        pending = set(by_site)
        for stage in stages(groups, sequential=True):
            moments = capture.collect(stage, widths.__getitem__, pending)
            prior = expert_prior(stage, moments)
            for group in stage.groups:
                seen = moments.pop(group.first)
                members = [linear for site in group.sites for linear in by_site.get(site, ())]
                self._solve(index, members, seen, prior.get(group.first.parameter))
                pending -= set(group.sites)
        self._complete_stacks(index, linears)

    def _solve(
        self, index: int, members: list[Linear], seen: Moments, prior: Moments | None
    ) -> None:
        """prior  what the layer's experts saw together, where these linears are an expert's"""
        if not seen.is_finite:
            raise QtoolError(
                f"the inputs of {members[0].name} are not finite",
                "the checkpoint holds NaN or infinite weights, or overflows on this text",
            )
        if prior is not None:
            seen = seen.blended(prior)
        if seen.count == 0:
            return
        hessian = seen.take_hessian()
        solved = []
        for linear in members:
            target = self._by_module[linear.name]
            info = target.tensor.info
            weight = self._weight(index, linear)
            others = () if target.importance is None else (target.importance,)
            solution = block_grid.solve(info.type.name, weight, hessian, others)
            self._keep(linear, solution.data)
            self.found.append(
                Found(
                    info.name,
                    target.number,
                    info.type.name,
                    solution.error,
                    solution.plain_error,
                )
            )
            solved.append((linear, solution.dequantized))
        put_weights(self._skeleton, index, solved)

    def _complete_stacks(self, index: int, linears: Sequence[Linear]) -> None:
        """Matrices without inputs, in stacks that others had some of, are rounded as ever."""
        for linear in linears:
            target = self._by_module[linear.name]
            parts = self._ready.get(target.tensor.info.name)
            if parts is not None and target.number not in parts:
                weight = self._weight(index, linear)
                self._keep(
                    linear, quantize(target.tensor.info.type.name, weight, target.importance)
                )

    def _weight(self, index: int, linear: Linear) -> Tensor:
        """[out, in] float32, of the loaded block."""
        parameters = dict(self._skeleton.block_parameters(index))
        weight = linear.matrix(parameters[linear.parameter]).contiguous()
        require_finite(weight, linear)
        return weight

    def _keep(self, linear: Linear, data: Tensor) -> None:
        """Bytes of a linear's rows, in its own order."""
        target = self._by_module[linear.name]
        order = self._names.row_order(linear.name)
        parts = self._ready.setdefault(target.tensor.info.name, {})
        parts[target.number] = data if order is None else data[order]


def _searched_parts(tensor: PlannedTensor) -> tuple[str, ...]:
    """The checkpoint's matrices that a tensor is made of, where it is rounded here and each is a
    linear's whole weight.
    """
    arranged = tensor.arranged
    if arranged is None or tensor.how != "quantize" or arranged.offset != 0:
        return ()
    return arranged.parts if arranged.form in ("rows", "transposed") else ()
