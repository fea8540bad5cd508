"""A block's forward pass as a list of tensor operations, which can be run in parts.

A block is run once under a TorchDispatchMode, which sees every operation that its modules come down
to; each tensor gets a number. Afterwards any of these values can be computed from any others that
suffice, without its modules: what is needed is found by walking back. So a pass can stop where a
linear's inputs are known, and go on from there when its weight is final; nothing is computed twice.
On the way three things are saved that modules cannot save: an operation that is written twice (the
rounding of one tensor for q, k and v) is done once, what depends on parameters alone is done once
for all chunks, and what nobody asks for is not done.

Not every block can be recorded: one that changes tensors in place, looks at values to decide what
to do (routers that pick experts), draws random numbers, calls an operation that gives no tensor, or
uses tensors that are neither its parameters nor its arguments. `record` says None then, and the
block is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

_UNSAFE_TAGS = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)
# Tagged as random for the sake of a dropout that models in evaluation do not have.
_ATTENTION = "aten::_scaled_dot_product"


class Value(NamedTuple):
    """A tensor's number, in place of the tensor."""

    number: int


@dataclass(frozen=True, slots=True)
class Operation:
    """function  an ATen operation
    args      with Value for every tensor
    outputs   numbers of the tensors it gives, None for what is no tensor
    single    whether it gives one tensor rather than several
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]
    single: bool

    @property
    def inputs(self) -> list[int]:
        return list(_numbers((*self.args, *self.kwargs.values())))


class _Part(NamedTuple):
    """Operations in order, each with the numbers that nobody needs after it."""

    constant: tuple[Operation, ...]
    steps: tuple[tuple[Operation, tuple[int, ...]], ...]


@dataclass(slots=True)
class Recording:
    """operations  in the order in which they were seen, doubles left out
    tensors     numbers of parameters and buffers, by their name in the block
    arguments   numbers of the tensors among the block's arguments, in order
    output      what the block returns
    marks       numbers of tensors that a caller named
    """

    operations: tuple[Operation, ...]
    tensors: Mapping[str, int]
    arguments: tuple[int, ...]
    output: int
    marks: Mapping[Any, int]
    _constants: frozenset[int] = field(init=False)
    _parts: dict[tuple[frozenset[int], frozenset[int]], _Part] = field(
        init=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        constants = set(self.tensors.values())
        for operation in self.operations:
            if constants.issuperset(operation.inputs):
                constants.update(n for n in operation.outputs if n is not None)
        self._constants = frozenset(constants)

    def same_as(self, other: Recording) -> bool:
        """Whether numbers mean the same in both, shapes aside."""
        mine = [(operation.function, operation.outputs) for operation in self.operations]
        theirs = [(operation.function, operation.outputs) for operation in other.operations]
        return mine == theirs and (self.output, self.marks) == (other.output, other.marks)

    def rounded(self, number: int) -> int:
        """The bfloat16 form of a value where the recording makes one, else the value."""
        for operation in self.operations:
            if (
                operation.function is torch.ops.aten._to_copy.default
                and operation.inputs == [number]
                and operation.kwargs.get("dtype") is torch.bfloat16
            ):
                (found,) = operation.outputs
                assert found is not None
                return found
        return number

    def place(self, number: int) -> int:
        """How many operations are done once this value is there."""
        for index, operation in enumerate(self.operations):
            if number in operation.outputs:
                return index + 1
        return 0

    def live(self, place: int) -> frozenset[int]:
        """What has to be kept after so many operations to do the rest; arguments among it."""
        made = set(self.arguments)
        for operation in self.operations[:place]:
            made.update(n for n in operation.outputs if n is not None)
        used = {self.output}
        for operation in self.operations[place:]:
            used.update(operation.inputs)
        return frozenset((made & used) - self._constants)

    def constants(
        self, parameters: Mapping[str, Tensor], given: Iterable[int], wanted: Iterable[int]
    ) -> dict[int, Tensor]:
        """What `run` needs of all that depends on parameters alone, as they are now."""
        values = {number: parameters[name] for name, number in self.tensors.items()}
        for operation in self._part(frozenset(given), frozenset(wanted)).constant:
            _do(operation, values)
        return values

    def run(
        self, constants: Mapping[int, Tensor], given: Mapping[int, Tensor], wanted: Iterable[int]
    ) -> dict[int, Tensor]:
        """Values by their numbers.

        constants  from `constants`, for the same given and wanted numbers
        """
        asked = frozenset(wanted)
        values = {**constants, **given}
        for operation, done in self._part(frozenset(given), asked).steps:
            _do(operation, values)
            for number in done:
                values.pop(number, None)
        return {number: values[number] for number in asked}

    def _part(self, given: frozenset[int], wanted: frozenset[int]) -> _Part:
        """The operations that lead from some values to others."""
        key = given, wanted
        if key not in self._parts:
            self._parts[key] = self._traced_back(given, wanted)
        return self._parts[key]

    def _traced_back(self, given: frozenset[int], wanted: frozenset[int]) -> _Part:
        needed = set(wanted - given)
        chosen: list[Operation] = []
        for operation in reversed(self.operations):
            made = {n for n in operation.outputs if n is not None}
            if made & needed:
                chosen.append(operation)
                needed.update(n for n in operation.inputs if n not in given)
        chosen.reverse()
        constant = [
            operation
            for operation in chosen
            if all(n is None or n in self._constants for n in operation.outputs)
        ]
        steps = [operation for operation in chosen if operation not in constant]
        last: dict[int, int] = {}
        for index, operation in enumerate(steps):
            for number in (*operation.inputs, *operation.outputs):
                if number is not None:
                    last[number] = index
        done: list[list[int]] = [[] for _ in steps]
        for number, index in last.items():
            if number not in wanted and number not in self._constants:
                done[index].append(number)
        return _Part(
            tuple(constant), tuple(zip(steps, (tuple(numbers) for numbers in done), strict=True))
        )


def record(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    watched: Callable[[Callable[[Any, Tensor], None]], Tensor | None],
) -> Recording | None:
    """Run a block once and write down what it does; None where that cannot be run in parts.

    args, kwargs  what the block is called with; tensors may lie in tuples, lists and dicts
    watched       calls the block with them and returns its output, or None where it returns more
                  than a tensor; may name what it sees on the way to the function it is given
    """
    recorder = _Recorder()
    tensors = {
        name: recorder.number(tensor)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    }
    arguments = tuple(recorder.number(tensor) for tensor in tensors_of((args, dict(kwargs))))
    marks: dict[Any, int] = {}

    def mark(name: Any, tensor: Tensor) -> None:
        found = recorder.found(tensor)
        if found is None:
            recorder.refuse()
        else:
            marks.setdefault(name, found)

    with torch.no_grad(), recorder:
        output = watched(mark)
    last = recorder.found(output) if output is not None else None
    if last is None or recorder.refused:
        return None
    kept, same = _without_doubles(recorder.operations)
    return Recording(
        operations=tuple(kept),
        tensors=tensors,
        arguments=arguments,
        output=same.get(last, last),
        marks={name: same.get(number, number) for name, number in marks.items()},
    )


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_of(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    return []


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.refused = False
        # By identity and weakly: a recording must not hold a chunk's every tensor at once.
        self._numbers: Any = WeakIdKeyDictionary()
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = self._count
            self._count += 1
        found: int = self._numbers[tensor]
        return found

    def found(self, tensor: Tensor) -> int | None:
        found: int | None = self._numbers.get(tensor)
        return found

    def refuse(self) -> None:
        self.refused = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = func(*args, **kwargs)
        if not _is_pure(func) or not isinstance(given, Tensor | tuple | list):
            self.refused = True
        if not self.refused:
            single = isinstance(given, Tensor)
            outputs = (given,) if single else tuple(given)
            self.operations.append(
                Operation(
                    func,
                    self._values(args),
                    {name: self._values(value) for name, value in kwargs.items()},
                    tuple(self.number(x) if isinstance(x, Tensor) else None for x in outputs),
                    single,
                )
            )
        return given

    def _values(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            found = self.found(item)
            if found is None:
                self.refused = True
                return None
            return Value(found)
        if isinstance(item, tuple | list):
            return type(item)(self._values(each) for each in item)
        return item


def _is_pure(function: Any) -> bool:
    """Whether it gives the same for the same arguments, and changes none of them."""
    if function._schema.is_mutable:
        return False
    return function.name().startswith(_ATTENTION) or not set(_UNSAFE_TAGS) & set(function.tags)


def _numbers(item: Any) -> Iterable[int]:
    if isinstance(item, Value):
        yield item.number
    elif isinstance(item, tuple | list):
        for each in item:
            yield from _numbers(each)


def _do(operation: Operation, values: dict[int, Tensor]) -> None:
    args = [_filled(item, values) for item in operation.args]
    kwargs = {name: _filled(item, values) for name, item in operation.kwargs.items()}
    given = operation.function(*args, **kwargs)
    for number, tensor in zip(
        operation.outputs, (given,) if operation.single else given, strict=True
    ):
        if number is not None:
            values[number] = tensor


def _filled(item: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(item, Value):
        return values[item.number]
    if type(item) is list or type(item) is tuple:
        return type(item)(_filled(each, values) for each in item)
    return item


def _without_doubles(
    operations: Sequence[Operation],
) -> tuple[list[Operation], dict[int, int]]:
    """Operations of which none repeats another, and which number stands for which that fell out.
    Nothing is changed in place, so equal operations give equal values."""
    same: dict[int, int] = {}
    first: dict[Any, Operation] = {}
    kept = []
    for operation in operations:
        args = renumbered(operation.args, same)
        kwargs = {name: renumbered(item, same) for name, item in operation.kwargs.items()}
        key = operation.function, _key(args), _key(tuple(kwargs.items()))
        if key in first:
            for mine, theirs in zip(operation.outputs, first[key].outputs, strict=True):
                if mine is not None and theirs is not None:
                    same[mine] = theirs
            continue
        renewed = Operation(operation.function, args, kwargs, operation.outputs, operation.single)
        first[key] = renewed
        kept.append(renewed)
    return kept, same


def renumbered(item: Any, same: Mapping[int, int]) -> Any:
    if isinstance(item, Value):
        return Value(same.get(item.number, item.number))
    if isinstance(item, tuple | list):
        return type(item)(renumbered(each, same) for each in item)
    return item


def _key(item: Any) -> Any:
    """Equal where the arguments are, 1 and 1.0 and True apart."""
    if isinstance(item, Value):
        return item
    if isinstance(item, tuple | list):
        return tuple(_key(each) for each in item)
    return type(item), item
