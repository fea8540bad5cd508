"""A packed linear as named tensors and numbers, for files, and back.

The numbers come from a file that somebody else may have written, and the kernel trusts its record:
`thaw` refuses a record that says more than its tensors hold.
"""

from collections.abc import Mapping
from ctypes import c_void_p

from torch import Tensor

from qtool.errors import FormatError
from qtool.kernels.cpu.native import ELEMENT_TYPES, Native
from qtool.kernels.cpu.native_linear import (
    BLOCKS,
    CODE_BITS,
    MAX_SPAN,
    PANEL_ROWS,
    STRIP,
    SUPER,
    LinearRecord,
    NativePacked,
)

# Of the record: addresses of tensors, and plain numbers.
POINTERS = tuple(name for name, kind in LinearRecord._fields_ if kind is c_void_p)
NUMBERS = tuple(name for name, kind in LinearRecord._fields_ if kind is not c_void_p)


def freeze(packed: NativePacked) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors and the numbers that `thaw` makes the same of, for a file."""
    tensors = {name: getattr(packed, name) for name in POINTERS}
    numbers = {name: getattr(packed.record, name) for name in NUMBERS}
    return {name: part for name, part in tensors.items() if part is not None}, numbers


def thaw(native: Native, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> NativePacked:
    """What `freeze` was given, on these very tensors; raises FormatError for sizes that the kernel
    would read beyond.
    """
    parts = {name: tensors.get(name) for name in POINTERS}
    if set(numbers) != set(NUMBERS) or not set(tensors) <= set(POINTERS):
        raise FormatError(f"a packed linear has {sorted({*numbers, *tensors})}")
    addresses = {name: None if part is None else part.data_ptr() for name, part in parts.items()}
    shape = numbers["out_features"], numbers["in_features"]
    packed = NativePacked(
        **parts,  # type: ignore[arg-type]
        record=LinearRecord(**addresses, **numbers),
        out_features=shape[0],
        in_features=shape[1],
        native=native,
    )
    _check_sizes(packed, numbers)
    return packed


def _check_sizes(packed: NativePacked, numbers: Mapping[str, int]) -> None:
    bits, group, kind = numbers["bits"], numbers["group"], numbers["scale_kind"]
    out_features, in_features = packed.out_features, packed.in_features
    fields = {block.scale_kind: block.field_bytes for block in BLOCKS.values()}
    kinds = {(block.scale_kind, block.bits, block.group) for block in BLOCKS.values()}
    if not (
        bits in CODE_BITS
        and (kind == 0 or (kind, bits, group) in kinds)
        and out_features > 0
        and in_features > 0
        and in_features % STRIP == 0
        and group > 0
        and group % (STRIP // 2) == 0
        and in_features % group == 0
        and packed.codes is not None
        and packed.scales is not None
    ):
        raise FormatError(f"a packed linear says {dict(numbers)}")
    panels = -(-out_features // PANEL_ROWS)
    scales = panels * (in_features // (SUPER if fields[kind] else group)) * PANEL_ROWS
    expected = {
        "codes": panels * PANEL_ROWS * in_features * bits // 8,
        "scales": scales * packed.scales.itemsize,
        "offsets": scales * packed.scales.itemsize,
        "zeros": panels * (in_features // group) * PANEL_ROWS,
        "fields": panels * (in_features // SUPER) * fields[kind] * PANEL_ROWS,
        "table": 1 << bits,
    }
    found = {name: part.nbytes for name in POINTERS if (part := getattr(packed, name)) is not None}
    step = next(size for size in (MAX_SPAN, 64, STRIP, STRIP // 2) if group % size == 0)
    if (
        any(expected[name] != nbytes for name, nbytes in found.items())
        or (fields[kind] > 0) != ("fields" in found)
        or ELEMENT_TYPES.get(packed.scales.dtype) != numbers["scale_type"]
        or (numbers["step"], numbers["span"]) != (step, max(step, STRIP))
    ):
        raise FormatError(f"a packed linear of {dict(numbers)} has tensors of {found} bytes")
