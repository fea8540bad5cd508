"""Compute in bfloat16 what a recorded block rounds to bfloat16 anyway.

Between a product that gives bfloat16 and one that takes it, a block may widen to float32, turn,
gate or scale, and round again: passes over memory that cost as much as the products do. Where every
use of a value ends in a rounding to bfloat16, and all it is made of is no wider, it is computed in
bfloat16 from the start, as a model loaded in bfloat16 does: each operation still computes in
float32 inside and rounds what it stores. A block of books-7m takes 21 ms for 2048 tokens in place
of 27 (least of 30 runs each, one core of a Xeon that others use, 2026-11).

What goes into a norm or the residual stream, and what a norm gives, stays float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qtool.calibration.recording import Operation, Recording, Value, renumbered

_aten = torch.ops.aten
# Give the numbers they take, in another order or shape.
_MOVES = frozenset(
    {
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.t.default,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten.squeeze.dim,
        _aten.unsqueeze.default,
        _aten.expand.default,
        _aten.clone.default,
        _aten.cat.default,
        _aten.neg.default,
    }
)
# Round once more where they are done in bfloat16.
_ROUNDED = frozenset(
    {
        _aten.mul.Tensor,
        _aten.add.Tensor,
        _aten.sub.Tensor,
        _aten.silu.default,
        _aten.gelu.default,
        _aten.relu.default,
    }
)
# Give the type they take.
_PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def narrowed(recording: Recording, hidden: int, keep: Collection[int]) -> Recording:
    """The same block with fewer bytes moved.

    hidden  the number of the hidden state
    keep    numbers that are asked for in float32
    """
    facts = _Facts.of(recording, hidden)
    chosen = _chosen(recording, facts, {*keep, recording.output})
    if not chosen:
        return recording
    return _rewritten(recording, facts, chosen)


def _cast(operation: Operation, dtype: torch.dtype) -> bool:
    return operation.function is _aten._to_copy.default and operation.kwargs.get("dtype") is dtype


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of a recording's values, by number.

    short   values that are bfloat16
    source  of a float32 copy of one of these, the bfloat16 value
    fixed   made of the block's parameters alone
    side    made of its arguments alone, the hidden state aside: angles, masks
    uses    the operations that take a value
    """

    short: frozenset[int]
    source: Mapping[int, int]
    fixed: frozenset[int]
    side: frozenset[int]
    uses: Mapping[int, Sequence[Operation]]

    @classmethod
    def of(cls, recording: Recording, hidden: int) -> _Facts:
        short: set[int] = set()
        source: dict[int, int] = {}
        fixed = set(recording.tensors.values())
        side = set(recording.arguments) - {hidden}
        uses: dict[int, list[Operation]] = {}
        for operation in recording.operations:
            inputs = operation.inputs
            made = [number for number in operation.outputs if number is not None]
            for number in dict.fromkeys(inputs):
                uses.setdefault(number, []).append(operation)
            if _cast(operation, torch.bfloat16):
                short.update(made)
            elif operation.function in _MOVES | _PRODUCTS and short.issuperset(inputs):
                short.add(made[0])
            elif _cast(operation, torch.float32) and short.issuperset(inputs):
                source[made[0]] = inputs[0]
            if fixed.issuperset(inputs):
                fixed.update(made)
            elif operation.function in _MOVES and side.issuperset(inputs):
                side.update(made)
        return cls(frozenset(short), source, frozenset(fixed), frozenset(side), uses)


def _chosen(recording: Recording, facts: _Facts, keep: Collection[int]) -> frozenset[int]:
    """Values that are to be computed in bfloat16: the largest set of which every member is used
    by others of it or rounded, and made of others of it or of what is no wider."""
    made_by = {
        operation.outputs[0]: operation
        for operation in recording.operations
        if operation.single and operation.function in _MOVES | _ROUNDED
    }
    found = {
        number
        for number in made_by
        if number is not None and number not in {*keep, *facts.short, *facts.fixed, *facts.side}
    }

    def fits(number: int) -> bool:
        operation = made_by[number]
        scaled = operation.function is _aten.mul.Tensor
        return all(
            one in found
            or one in facts.source
            or one in facts.fixed
            or (scaled and one in facts.side)
            for one in operation.inputs
        ) and all(
            _cast(use, torch.bfloat16) or use.outputs[0] in found
            for use in facts.uses.get(number, ())
        )

    while True:
        wrong = {number for number in found if not fits(number)}
        if not wrong:
            return frozenset(found)
        found -= wrong


def _rewritten(recording: Recording, facts: _Facts, chosen: frozenset[int]) -> Recording:
    operations: list[Operation] = []
    same: dict[int, int] = {}
    casts: dict[int, int] = {}
    unused = 1 + max(_all_numbers(recording))

    def short(number: int) -> int:
        """Of an input, the bfloat16 form."""
        nonlocal unused
        number = facts.source.get(number, number)
        if number in chosen or number in facts.short:
            return same.get(number, number)
        if number not in casts:
            casts[number] = unused
            kwargs = {"dtype": torch.bfloat16}
            cast = _aten._to_copy.default
            operations.append(Operation(cast, (Value(number),), kwargs, (unused,), single=True))
            unused += 1
        return casts[number]

    for operation in recording.operations:
        (made, *_) = operation.outputs
        if _cast(operation, torch.bfloat16) and operation.inputs[0] in chosen:
            assert made is not None
            same[made] = operation.inputs[0]
        elif made in chosen:
            operations.append(_with(operation, {one: short(one) for one in operation.inputs}))
        else:
            operations.append(_with(operation, same))
    marks = {name: same.get(number, number) for name, number in recording.marks.items()}
    return Recording(
        _needed(operations, {recording.output, *marks.values()}),
        recording.tensors,
        recording.arguments,
        recording.output,
        marks,
    )


def _with(operation: Operation, same: Mapping[int, int]) -> Operation:
    args = renumbered(operation.args, same)
    kwargs = {name: renumbered(item, same) for name, item in operation.kwargs.items()}
    return Operation(operation.function, args, kwargs, operation.outputs, operation.single)


def _needed(operations: Sequence[Operation], wanted: Iterable[int]) -> tuple[Operation, ...]:
    """Without those whose values nobody takes any more."""
    needed = set(wanted)
    kept = []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return tuple(reversed(kept))


def _all_numbers(recording: Recording) -> Iterable[int]:
    yield from recording.tensors.values()
    yield from recording.arguments
    for operation in recording.operations:
        yield from (number for number in operation.outputs if number is not None)
