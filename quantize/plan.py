"""Decide what is done to each linear before anything is done, and why the rest is left alone.

The plan is made from the model's structure and the checkpoint's headers; no weight is read. It is
what `--dry-run` shows, what the run prints first, and what the run then does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from qtool.calibration.linears import Linear, Unpacked, block_linears
from qtool.calibration.skeleton import Skeleton
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import Format
from qtool.errors import UnsupportedModel, UsageError, closest
from qtool.quantize.layouts import Scheme, bits_per_weight
from qtool.recipe import Recipe
from qtool.scheme import PORTABLE_GROUP_SIZES, divisors_text, portable_group_size

# Named one by one in messages; the rest are counted.
_NAMED = 6
# Shape and pointers of a packed layer beside its codes and scales.
_LAYER_OVERHEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """quantized    linears and the scheme of each
    left         what stays in 16 bit inside the blocks, by name, with the reason
    head         linears outside the blocks, which stay in 16 bit as well
    """

    quantized: Mapping[Linear, Scheme]
    left: Mapping[str, str]
    head: tuple[str, ...]
    # Matrices of the blocks that stay dense, linears or not, as loaders name them.
    dense_modules: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    warnings: tuple[str, ...] = field(default=())

    def block(self, index: int) -> list[Linear]:
        return [linear for linear in self.quantized if linear.block == index]

    @property
    def schemes(self) -> Counter[str]:
        return Counter(str(scheme) for scheme in self.quantized.values())

    @property
    def working_bytes(self) -> int:
        """Disk: finished blocks are kept until the final shards are complete."""
        return 2 * self.output_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantized": {linear.name: str(scheme) for linear, scheme in self.quantized.items()},
            "left_in_16_bit": {**self.left, **dict.fromkeys(self.head, _HEAD_REASON)},
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "disk_bytes_needed": self.working_bytes,
            "warnings": list(self.warnings),
        }


_HEAD_REASON = "outside the decoder blocks"


def make_plan(skeleton: Skeleton, recipe: Recipe, layout: Format) -> Plan:
    """What a recipe does to a model in a format. UsageError where the request cannot be met."""
    linears: list[Linear] = []
    left: dict[str, str] = {}
    for block in range(len(skeleton.blocks)):
        for found in block_linears(skeleton, block):
            if isinstance(found, Unpacked):
                left[found.name] = found.reason
            else:
                linears.append(found)
    kept = {linear: reason for linear in linears if (reason := _kept(linear, recipe.keep))}
    wanted = [linear for linear in linears if linear not in kept]
    left |= {linear.name: reason for linear, reason in kept.items()}
    quantized: dict[Linear, Scheme] = {}
    for linear, decision in _decide(wanted, recipe, layout).items():
        if isinstance(decision, str):
            left[linear.name] = decision
        else:
            quantized[linear] = decision
    if not quantized:
        reasons = ", ".join(sorted(set(left.values()))[:3]) or "it has no linears in its blocks"
        raise UnsupportedModel(
            f"nothing in {skeleton.checkpoint.folder.name} can be quantized: {reasons}"
        )
    packed = {linear.tensor: linear for linear in quantized}
    warnings = [
        *_unmatched_patterns(recipe.keep, linears),
        *_loader_warnings(quantized, recipe, layout),
        *_broken_sets(quantized, kept),
    ]
    return Plan(
        quantized=quantized,
        left=left,
        head=_outside_linears(skeleton),
        dense_modules=_dense_modules(skeleton, linears, packed),
        source_bytes=skeleton.checkpoint.nbytes,
        output_bytes=_output_bytes(skeleton.checkpoint, packed, quantized),
        warnings=tuple(warnings),
    )


def _kept(linear: Linear, patterns: Sequence[str]) -> str | None:
    for pattern in patterns:
        if fnmatchcase(linear.name, pattern) or fnmatchcase(linear.module, pattern):
            return f"kept by {pattern!r}"
    return None


def _decide(
    linears: Sequence[Linear], recipe: Recipe, layout: Format
) -> dict[Linear, Scheme | str]:
    """A scheme, or the reason why there is none."""
    given = recipe.float_scheme
    if given is not None:
        refusals = {
            linear: layout.refuses(given, linear.out_features, linear.in_features)  # type: ignore[arg-type]
            for linear in linears
        }
        return {linear: refusal or given for linear, refusal in refusals.items()}
    if isinstance(recipe.group_size, int):
        _require_divisible(linears, recipe.group_size)
    shared = _shared_group_size(linears) if layout.single_scheme else None
    decisions: dict[Linear, Scheme | str] = {}
    for linear in linears:
        group_size = recipe.group_size
        if group_size == "auto":
            fitting = portable_group_size(linear.in_features)
            if fitting is None:
                sizes = ", ".join(map(str, PORTABLE_GROUP_SIZES[:-1]))
                decisions[linear] = (
                    f"its {linear.in_features} inputs are not a multiple of {sizes} or "
                    f"{PORTABLE_GROUP_SIZES[-1]}"
                )
                continue
            group_size = shared or fitting
        scheme = recipe.scheme(group_size)
        refusal = layout.refuses(scheme, linear.out_features, linear.in_features)
        decisions[linear] = refusal or scheme
    return decisions


def _shared_group_size(linears: Iterable[Linear]) -> int | None:
    """The largest portable size that divides every width that any portable size divides."""
    widths = {linear.in_features for linear in linears if portable_group_size(linear.in_features)}
    return next(
        (size for size in PORTABLE_GROUP_SIZES if all(width % size == 0 for width in widths)), None
    )


def _require_divisible(linears: Sequence[Linear], group_size: int) -> None:
    wrong = [linear for linear in linears if linear.in_features % group_size]
    if not wrong:
        return
    names = ", ".join(linear.name for linear in wrong[:_NAMED])
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    widths = sorted({linear.in_features for linear in wrong})
    patterns = sorted({"*." + ".".join(linear.name.split(".")[-2:]) for linear in wrong})
    keep = " ".join(f"--keep '{pattern}'" for pattern in patterns)
    divisors = "; ".join(f"{width} by {divisors_text(width)}" for width in widths)
    raise UsageError(
        f"group size {group_size} does not divide the {', '.join(map(str, widths))} inputs of "
        f"{names}{more}",
        f"leave them in 16 bit with {keep}, or pick a size that divides ({divisors}), or leave "
        "out --group-size to fit each layer",
    )


def _unmatched_patterns(patterns: Sequence[str], linears: Sequence[Linear]) -> list[str]:
    names = {name for linear in linears for name in (linear.name, linear.module)}
    warnings = []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            guess = closest(pattern, names)
            warnings.append(
                f"keep pattern {pattern!r} matches no layer" + (f"; near: {guess}" if guess else "")
            )
    return warnings


def _loader_warnings(quantized: Iterable[Linear], recipe: Recipe, layout: Format) -> Iterable[str]:
    """What the file cannot be used for, said before the work and not after it."""
    linears = list(quantized)
    if layout.name in ("gptq", "awq") and any(linear.expert is not None for linear in linears):
        yield (
            f"transformers loads the experts of {layout.name} files as random weights without an "
            "error; vLLM and SGLang read them. --format compressed-tensors loads in all three"
        )
    if layout.name == "compressed-tensors" and any(linear.transposed for linear in linears):
        yield (
            "transformers leaves Conv1D layers of compressed-tensors files random; "
            "use --format gptq to load this model there"
        )
    if layout.name == "codebook":
        yield (
            "qtool alone reads tables that differ from row to row; `qtool convert --to hf` makes a "
            "16-bit model of them that every loader takes"
        )
    if layout.name == "gptq" and recipe.bits < 4:
        yield f"vLLM refuses {recipe.bits}-bit GPTQ files; --format compressed-tensors is read"


def _broken_sets(quantized: Mapping[Linear, Scheme], kept: Iterable[Linear]) -> Iterable[str]:
    """Runtimes fuse q, k, v and gate, up: a set that is quantized in part does not load there."""
    names = {linear.name for linear in quantized}
    for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for linear in kept:
            parent, _, leaf = linear.name.rpartition(".")
            others = [f"{parent}.{member}" for member in members if member != leaf]
            if leaf in members and any(name in names for name in others):
                yield (
                    f"{linear.name} is kept but {' or '.join(others)} is not: vLLM and SGLang fuse "
                    f"{', '.join(members)} and need one scheme for them"
                )
                break


def _outside_linears(skeleton: Skeleton) -> tuple[str, ...]:
    from torch import nn

    prefix = f"{skeleton.prefix}."
    return tuple(
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(prefix)
    )


def _dense_modules(
    skeleton: Skeleton, linears: Sequence[Linear], packed: Mapping[str, Linear]
) -> tuple[str, ...]:
    """Every matrix that stays dense, where a loader might take it for a packed linear: linears by
    module name, routers and the like by their name on disk.
    """
    by_tensor = {linear.tensor: linear for linear in linears}
    names = []
    for tensor, info in skeleton.checkpoint.tensors.items():
        owner = skeleton.stored.owner(tensor)
        if tensor in packed or len(info.shape) != 2 or not tensor.endswith(".weight"):
            continue
        if owner is not None and owner.startswith(f"{skeleton.prefix}."):
            linear = by_tensor.get(tensor)
            names.append(linear.module if linear else tensor.removesuffix(".weight"))
    return tuple(dict.fromkeys((*names, *_outside_linears(skeleton))))


def _output_bytes(
    checkpoint: Checkpoint,
    packed: Mapping[str, Linear],
    quantized: Mapping[Linear, Scheme],
) -> int:
    total = 0.0
    for name, info in checkpoint.tensors.items():
        linear = packed.get(name)
        if linear is None:
            total += info.nbytes
            continue
        shape = linear.out_features, linear.in_features
        total += shape[0] * shape[1] * bits_per_weight(quantized[linear], *shape) / 8
        total += _LAYER_OVERHEAD_BYTES
    return int(total)
