"""A model's tensors as GGUF has them: stacked, split, transposed, in another order of rows.

`arrange` groups a reader's tensors by the tensor of the file that they go into, from headers alone;
`matrices` and `vector` read one of them. What GGUF changes is listed in names.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qtool.convert.formats import Held, WeightReader
from qtool.convert.gguf.names import NameMap
from qtool.errors import FormatError, UnsupportedModel
from qtool.weights import DenseWeight, Weight

Form = Literal["rows", "transposed", "keys", "values"]


@dataclass(frozen=True, slots=True)
class Arranged:
    """One tensor of the file.

    parts  the Hugging Face tensors it is made of: one, or one an expert
    held   its shape in the file, and what the parts are held in
    form   "rows": rows of the parts, one part after the other; "transposed": the part is [in, out];
           "keys" and "values": that half of each head of kv_b
    offset what is added to its values
    """

    name: str
    parts: tuple[str, ...]
    held: Held
    form: Form = "rows"
    offset: float = 0.0

    @property
    def is_vector(self) -> bool:
        return len(self.held.shape) == 1


def arrange(reader: WeightReader, names: NameMap) -> dict[str, Arranged]:
    """The tensors of the file by GGUF name; raises where one is missing or of another shape."""
    packed = {f"{module}.weight": module for module in reader.modules()}
    found: dict[str, Held] = {}
    groups: dict[str, list[str]] = {}
    for hf in (*packed, *reader.tensor_names()):
        gguf = names.to_gguf(hf)
        if gguf is None or (gguf == "output.weight" and names.config.tie_word_embeddings):
            continue
        found[hf] = reader.describe(packed.get(hf, hf))
        expected = names.shape(hf) if hf in packed else names.stored_shape(hf)
        if found[hf].shape != expected:
            raise FormatError(
                f"{hf} has shape {list(found[hf].shape)}, config.json says {list(expected)}"
            )
        groups.setdefault(gguf, []).append(hf)
    present = {names.full_name(name) for name in found}
    missing = [name for name in names.required() if name not in present]
    if missing:
        raise FormatError(f"{reader.source.name} has no tensor {missing[0]}")
    arranged: dict[str, Arranged] = {}
    for gguf, parts in groups.items():
        for tensor in _tensors(gguf, parts, found, names):
            arranged[tensor.name] = tensor
    return arranged


def _tensors(
    gguf: str, parts: list[str], found: dict[str, Held], names: NameMap
) -> Iterator[Arranged]:
    held, place = found[parts[0]], names.place(parts[0])
    assert place is not None, parts[0]
    shape = names.shape(parts[0])
    loose = Held(shape, held.kind)  # its codes do not survive
    if place.role == "kv_b":
        sizes, heads = names.config.by_name, names.config.num_heads
        keys = (heads, sizes["latent"], sizes["nope"])
        values = (heads, sizes["value"], sizes["latent"])
        whole = (parts[0],)
        yield Arranged(gguf.replace("kv_b", "k_b"), whole, Held(keys, held.kind), "keys")
        yield Arranged(gguf.replace("kv_b", "v_b"), whole, Held(values, held.kind), "values")
    elif place.role in names.architecture.transposed and len(shape) == 2:
        if not held.is_plain:
            raise UnsupportedModel(
                f"{parts[0]} is packed ({held.kind}) and stored [in, out], which is not read",
                "convert the model that it was quantized from",
            )
        yield Arranged(gguf, (parts[0],), loose, "transposed")
    elif place.expert is not None:
        yield _stack(gguf, parts, found, names)
    elif place.role == "shared_router":
        yield Arranged(gguf, (parts[0],), Held(shape[1:], held.kind))
    else:
        yield Arranged(gguf, (parts[0],), held, offset=names.offset(parts[0]))


def _stack(gguf: str, parts: list[str], found: dict[str, Held], names: NameMap) -> Arranged:
    by_expert: dict[int, str] = {}
    for part in parts:
        place = names.place(part)
        if place is not None and place.expert is not None:
            by_expert[place.expert] = part
    ordered = tuple(by_expert[expert] for expert in sorted(by_expert))
    held = found[ordered[0]]
    other = next((part for part in ordered if found[part] != held), None)
    if other is not None:
        raise UnsupportedModel(
            f"{other} is held in {found[other].kind} and {ordered[0]} in {held.kind}; GGUF stacks "
            "experts, so they need one type"
        )
    return Arranged(gguf, ordered, Held((len(ordered), *held.shape), held.kind, held.scheme))


def matrices(tensor: Arranged, reader: WeightReader, names: NameMap) -> Iterator[Weight]:
    """The matrices that follow one another in a tensor of the file, read one at a time."""
    if tensor.form == "rows":
        for part in tensor.parts:
            yield reader.weight(part.rpartition(".")[0])
        return
    values = reader.tensor(tensor.parts[0])
    if tensor.form == "transposed":
        yield DenseWeight(values.T.contiguous())
        return
    keys = names.config.by_name["nope"]
    for head in values.view(names.config.num_heads, -1, values.shape[-1]):
        half = head[:keys].T if tensor.form == "keys" else head[keys:]
        yield DenseWeight(half.contiguous())


def vector(tensor: Arranged, reader: WeightReader, names: NameMap) -> Tensor:
    """A one-dimensional tensor's values, in GGUF's order."""
    name = tensor.parts[0]
    values = reader.tensor(name).reshape(tensor.held.shape)
    if tensor.offset:
        return values.float() + tensor.offset
    module = name.rpartition(".")[0]
    order = names.row_order(module)
    return values if order is None else values[order]
