"""AWQ's other half: move channel scales out of a group of linears and into the layer before them.

Where scale can go is found, not listed:

- into a norm, where the tensor the linears are fed *is* a norm's output (seen when the block was
  traced); its gain is divided, whether the family stores the gain itself or its distance from one;
- into the rows of the linear before (v for o, up for down), where the table of families says that
  nothing but linear steps lies between. Value heads shared by several query heads get one scale.

A norm may feed more than those linears (a router, a residual), and a table may be wrong about a
variant. So after folding, the block is run on one chunk and must give what it gave before; where
it does not, pairs are tried one by one and those that change the output are undone, and say so.

What is stored is rounded, so the scale that counts is the one that the *rounded* gain implies:
targets are multiplied by gain / rounded gain, and the product is exact again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtool.arch import ARCHITECTURES
from qtool.calibration.groups import InputGroup
from qtool.calibration.linears import Linear, Site
from qtool.calibration.placement import CPU
from qtool.calibration.skeleton import Skeleton, assign
from qtool.calibration.statistics import Moments
from qtool.quantize.awq import search_channel_scales
from qtool.recipe import Awq, SmoothQuant
from qtool.scheme import QuantScheme

# How far a folded block may be from the original, relative to its largest output. Folding is exact
# but for float32 rounding (1e-6 seen) and biases rounded to the checkpoint's type.
_TOLERANCE = 1e-3

NO_SOURCE = "not smoothed: its input comes from no norm or linear that scale can move into"
CHANGED_OUTPUT = "not smoothed: folding changed the block's output, so it was undone"


@dataclass(slots=True)
class Smoothed:
    """scales   by a group's first site, [in] float32: what its weights were multiplied by
    changed  checkpoint tensors with new values, in their own types
    notes    by a group's first site
    """

    scales: dict[Site, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[Site, tuple[str, ...]] = field(default_factory=dict)


class _Pair(NamedTuple):
    """A group, and where its scale goes: a norm's name in the block, or a linear and the source's
    channel of each column.
    """

    group: InputGroup
    norm: str | None
    linear: Linear | None
    source_channel: Tensor | None


def smooth(
    skeleton: Skeleton,
    index: int,
    *,
    groups: Sequence[InputGroup],
    moments: Mapping[Site, Moments],
    planned: Mapping[Linear, QuantScheme],
    all_linears: Sequence[Linear],
    options: Awq | SmoothQuant,
    run: Callable[[], Tensor],
) -> Smoothed:
    """Scale the loaded block's linears and fold the inverse into what feeds them.

    run  the block on one chunk, for the comparison
    """
    found = Smoothed()
    fold = _Folder(skeleton, index, all_linears, set(planned), found)
    pairs = []
    for group in groups:
        pair = _pair(skeleton, index, group, all_linears)
        if pair is None:
            found.notes[group.first] = (NO_SOURCE,)
        elif moments[group.first].count > 0:
            pairs.append(pair)
    before = run()
    chosen = []
    for pair in pairs:
        scales = _best_scales(skeleton, index, pair, moments, planned, options)
        if scales is not None:
            chosen.append((pair, scales))
    if _try(fold, chosen, run, before):
        return found
    for pair, scales in chosen:
        if not _try(fold, [(pair, scales)], run, before):
            found.notes[pair.group.first] = (CHANGED_OUTPUT,)
    return found


def _try(
    fold: _Folder,
    chosen: Iterable[tuple[_Pair, Tensor]],
    run: Callable[[], Tensor],
    before: Tensor,
) -> bool:
    """Fold, compare, and undo all where the block's output moved."""
    checkpoint = fold.save()
    for pair, scales in chosen:
        fold.apply(pair, scales)
    after = run()
    moved = (after - before).abs().max() / before.abs().max().clamp(min=1e-12)
    if bool(moved <= _TOLERANCE):
        return True
    fold.restore(checkpoint)
    return False


def _best_scales(
    skeleton: Skeleton,
    index: int,
    pair: _Pair,
    moments: Mapping[Site, Moments],
    planned: Mapping[Linear, QuantScheme],
    options: Awq | SmoothQuant,
) -> Tensor | None:
    """Scales for the source's channels, or None where doing nothing is best."""
    parameters = dict(skeleton.block_parameters(index))
    sites = set(pair.group.sites)
    members = [linear for linear in planned if linear.site in sites]
    weight = torch.cat([linear.matrix(parameters[linear.parameter]) for linear in members])
    seen = moments[pair.group.first]
    if isinstance(options, SmoothQuant):
        # Scales of the activations' own: only a norm takes them, as the paper has it.
        if pair.norm is None:
            return None
        return smooth_scales(weight, seen.peak, options.strength)
    best = search_channel_scales(
        weight,
        seen.hessian,
        seen.mean_magnitude,
        planned[members[0]],
        options,
        pair.source_channel,
    )
    return best.scales if best.changes_anything else None


def smooth_scales(weight: Tensor, peak: Tensor, strength: float) -> Tensor:
    """[in]: s = max|x|^a / max|w|^(1-a) of each channel, around one. Inputs are divided by s.

    weight  [out, in] float32, all linears that share the input stacked
    peak    [in] float32, largest |x|
    """
    inputs = peak.clamp(min=1e-5)
    weights = weight.abs().amax(0).clamp(min=1e-5)
    scales = inputs.pow(strength) / weights.pow(1 - strength)
    return scales / scales.log().mean().exp()


def _pair(
    skeleton: Skeleton, index: int, group: InputGroup, all_linears: Sequence[Linear]
) -> _Pair | None:
    if group.source is not None:
        return _Pair(group, group.source, None, None)
    architecture = ARCHITECTURES.get(str(skeleton.checkpoint.config.get("model_type")))
    if architecture is None or len(group.sites) != 1:
        return None
    by_name = {linear.name: linear for linear in all_linears}
    target = next((item for item in all_linears if item.site == group.first), None)
    for pair in architecture.smoothing:
        # Norms were found by structure; of the table, only pairs of linears are used.
        source = by_name.get(architecture.hf_name(pair.source, index))
        targets = [architecture.hf_name(role, index) for role in pair.targets]
        if source is None or target is None or targets != [target.name]:
            continue
        channels = _source_channels(skeleton, source.out_features, target.in_features)
        if channels is None:
            return None
        return _Pair(group, None, source, channels.to(skeleton.placement.block(index)))
    return None


def _source_channels(skeleton: Skeleton, out_features: int, in_features: int) -> Tensor | None:
    """Which output of the source feeds each input of the target.

    With 4 query heads and 2 value heads of width 2, o's inputs come from v's outputs
    [0 1 | 0 1 | 2 3 | 2 3].
    """
    if out_features == in_features:
        return torch.arange(in_features)
    config = skeleton.model.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    if in_features % out_features or out_features % head_dim or in_features % head_dim:
        return None
    repeats = in_features // out_features
    heads = torch.arange(out_features).view(-1, head_dim)
    return heads.repeat_interleave(repeats, 0).reshape(-1)


class _Folder:
    """Applies pairs to a loaded block, and can put it back."""

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        linears: Sequence[Linear],
        packed: set[Linear],
        found: Smoothed,
    ) -> None:
        self._skeleton = skeleton
        self._index = index
        self._linears = linears
        self._packed = packed
        self._found = found
        self._block = skeleton.blocks[index]
        self._prefix = f"{skeleton.block_name(index)}."

    def save(self) -> tuple[dict[str, Tensor], dict[Site, Tensor], dict[str, Tensor]]:
        values = {name: item.detach().clone() for name, item in self._block.named_parameters()}
        return values, dict(self._found.scales), dict(self._found.changed)

    def restore(
        self, saved: tuple[dict[str, Tensor], dict[Site, Tensor], dict[str, Tensor]]
    ) -> None:
        values, self._found.scales, self._found.changed = saved
        for name, tensor in values.items():
            assign(self._block, name, tensor)

    def apply(self, pair: _Pair, scales: Tensor) -> None:
        if pair.norm is not None:
            actual = self._divide_norm(pair.norm, scales)
        else:
            assert pair.linear is not None
            assert pair.source_channel is not None
            self._divide_rows(pair.linear, scales)
            actual = scales[pair.source_channel]
        if actual is None:
            return
        self._found.scales[pair.group.first] = actual
        sites = set(pair.group.sites)
        with torch.no_grad():
            for linear in self._linears:
                if linear.site in sites:
                    self._scale(linear, actual)

    def _divide_norm(self, name: str, scales: Tensor) -> Tensor | None:
        """Divide a norm's gain; returns the scales that the rounded gain implies."""
        norm = self._block.get_submodule(name)
        gain = norm._parameters["weight"]
        assert gain is not None
        offset = _gain_offset(norm)
        tensor = self._skeleton.stored.sole_tensor(f"{self._prefix}{name}.weight")
        if offset is None or tensor is None:
            return None
        dtype = self._skeleton.checkpoint.tensors[tensor].dtype
        rounded = ((gain.detach() + offset) / scales - offset).to(dtype).to(torch.float32)
        new, old = rounded + offset, gain.detach() + offset
        actual = torch.where((new != 0) & (old != 0), old / new, 1.0)
        rounded = torch.where((new != 0) & (old != 0), rounded, gain.detach())
        with torch.no_grad():
            gain.copy_(rounded)
            self._note_change(tensor, rounded)
            bias = norm._parameters.get("bias")
            if bias is not None:
                self._round_bias(bias, bias.detach() / actual, f"{self._prefix}{name}.bias")
        return actual

    def _divide_rows(self, linear: Linear, scales: Tensor) -> None:
        with torch.no_grad():
            self._scale(linear, 1 / scales.unsqueeze(1))
            bias_name = linear.parameter.removesuffix("weight") + "bias"
            bias = dict(self._skeleton.block_parameters(self._index)).get(bias_name)
            if bias is not None:
                self._round_bias(bias, bias.detach() / scales, bias_name)

    def _scale(self, linear: Linear, factors: Tensor) -> None:
        """Multiply a weight [out, in]; one that stays dense is rounded to what its file holds."""
        matrix = linear.matrix(self._parameter(linear.parameter))
        matrix.mul_(factors)
        if linear not in self._packed:
            dtype = self._skeleton.checkpoint.tensors[linear.tensor].dtype
            matrix.copy_(matrix.to(dtype))
            self._note_change(linear.tensor, matrix.t() if linear.transposed else matrix)

    def _round_bias(self, bias: Tensor, values: Tensor, name: str) -> None:
        tensor = self._skeleton.stored.sole_tensor(name)
        assert tensor is not None, name
        dtype = self._skeleton.checkpoint.tensors[tensor].dtype
        bias.copy_(values.to(dtype).to(torch.float32))
        self._note_change(tensor, bias)

    def _note_change(self, tensor: str, values: Tensor) -> None:
        dtype = self._skeleton.checkpoint.tensors[tensor].dtype
        self._found.changed[tensor] = values.detach().to(CPU, dtype, copy=True).contiguous()

    def _parameter(self, name: str) -> Tensor:
        return dict(self._skeleton.block_parameters(self._index))[name]


def _gain_offset(norm: nn.Module) -> float | None:
    """0 where the norm multiplies by its weight, 1 where by one plus it (Gemma); None for neither.

    Found by running it with the weight at zero and at one.
    """
    gain = norm._parameters["weight"]
    assert gain is not None
    kept = gain.detach().clone()
    probe = torch.linspace(-1.0, 2.0, kept.shape[0], device=kept.device).unsqueeze(0)
    bias = norm._parameters.get("bias")
    with torch.no_grad():
        gain.zero_()
        at_zero = norm(probe) - (0.0 if bias is None else bias)
        gain.fill_(1.0)
        at_one = norm(probe) - (0.0 if bias is None else bias)
        gain.copy_(kept)
    if not isinstance(at_zero, Tensor) or at_zero.shape != at_one.shape:
        return None
    if float(at_zero.abs().max()) == 0.0:
        return 0.0
    return 1.0 if torch.allclose(at_one, 2 * at_zero, rtol=1e-5, atol=1e-6) else None
