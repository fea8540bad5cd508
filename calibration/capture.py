"""Run one decoder block of a model at a time, and watch what its linears are fed.

How a block is called (masks, rotary embeddings, layer kinds) is the outer model's business and
differs in every family. So the outer model runs as it is, with every block replaced by a stub: the
stubs before the wanted block pass the hidden state through in the shape that block returns, and
the wanted block's stub runs the real block on the stored hidden state, with exactly the arguments
the outer model computed, and stops the run. What the outer model does besides (embedding lookup,
masks) is small beside a block, and nothing has to be stored or known of any family.

What linears are fed is seen by intercepting torch's functions while the block runs: a product with
a weight that lies in the storage of one of the block's parameters is a call of that linear, be it
nn.Linear, GPT-2's Conv1D, or one expert's slice of a fused 3-D parameter. Linears fed the same
tensor share their statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qtool.calibration.activations import Activations
from qtool.calibration.linears import Site
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Moments
from qtool.errors import QtoolError, UnsupportedModel

# Tokens run through a block at once. Below this small products waste time; above it the block's
# temporaries (4 bytes x intermediate size x 3 a token) outgrow its weights.
CHUNK_TOKENS = 4096


class _BlockDone(Exception):
    """The wanted block has run; carries its hidden state out of the outer model."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _SeenEnough(Exception):
    """Every input that was asked for has been seen; the rest of the block need not run."""


class _Stub(nn.Module):
    """In a block's place. Attributes are the block's own: outer models read layer kinds there."""

    def __init__(self, block: nn.Module, visit: Callable[..., Any], index: int) -> None:
        super().__init__()
        # Not through nn.Module's __setattr__: the block must not become a child.
        self.__dict__["_block"] = block
        self.__dict__["_visit"] = visit
        self.__dict__["_index"] = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_visit"](self.__dict__["_index"], args, kwargs)


class BlockRunner:
    """Runs the blocks of a skeleton, in order, on chunks of token sequences.

    tokens  [sequences, length] int64
    """

    def __init__(
        self, skeleton: Skeleton, tokens: Tensor, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self._skeleton = skeleton
        self._chunks = tokens.split(max(1, chunk_tokens // tokens.shape[1]))
        self._wanted = 0
        self._hidden: Tensor | None = None
        # What each block returns beside the hidden state, where it returns a tuple.
        self._extras: dict[int, tuple[Any, ...]] = {}
        for index, block in enumerate(skeleton.blocks):
            skeleton.block_list[index] = _Stub(block, self._visit, index)

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    def run(self, index: int, chunk: int, hidden: Tensor | None) -> Tensor | None:
        """A block's output for one chunk; None where a watcher had seen enough.

        hidden  [sequences, length, hidden]; None to start from the embeddings
        """
        self._wanted, self._hidden = index, hidden
        try:
            with torch.no_grad():
                self._skeleton.model(input_ids=self._chunks[chunk], use_cache=False)
        except _BlockDone as done:
            return done.hidden
        except _SeenEnough:
            return None
        except QtoolError:
            raise
        except Exception as error:  # whatever a model's own code may raise
            raise UnsupportedModel(
                f"{self._skeleton.block_name(index)} cannot be run by itself: "
                f"{type(error).__name__}: {error}",
                "its blocks share more than a hidden state; --recipe rtn-int4 needs no data",
            ) from error
        raise UnsupportedModel(
            f"the forward pass of {type(self._skeleton.model).__name__} does not reach "
            f"{self._skeleton.block_name(index)}",
            "--recipe rtn-int4 needs no forward pass",
        )

    def finish(self, chunk: int, hidden: Tensor) -> Tensor:
        """Logits [sequences, length, vocabulary] from the last block's output."""
        self._wanted, self._hidden = len(self._skeleton.blocks), hidden
        with torch.no_grad():
            output = self._skeleton.model(input_ids=self._chunks[chunk], use_cache=False)
        logits: Tensor = output.logits
        return logits.to(torch.float32)

    def _visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last = len(self._skeleton.blocks) - 1
        if index != self._wanted:
            passed = args[0] if args else kwargs["hidden_states"]
            if self._wanted > last and index == last:
                passed = self._hidden
            extras = self._extras.get(index)
            return passed if extras is None else (passed, *extras)
        if self._hidden is not None:
            if args:
                args = (self._hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": self._hidden}
        output = self._skeleton.blocks[index](*args, **kwargs)
        if isinstance(output, tuple):
            self._extras[index] = output[1:]
            output = output[0]
        raise _BlockDone(output)


class InputGroup(NamedTuple):
    """Linears fed the same tensor. The first stands for all of them.

    calls   how often it was fed in the traced chunk
    source  the module whose output the tensor was, where that is a norm: a name in the block
    """

    sites: tuple[Site, ...]
    calls: int
    source: str | None

    @property
    def first(self) -> Site:
        return self.sites[0]


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups whose statistics are taken in one pass."""

    groups: tuple[InputGroup, ...]

    @property
    def stops_early(self) -> bool:
        """Whether the pass can end as soon as each group was fed once."""
        return all(group.calls == 1 and group.first.expert is None for group in self.groups)


def trace(
    runner: BlockRunner, skeleton: Skeleton, index: int, hidden: Tensor | None, sites: Iterable[Site]
) -> list[InputGroup]:
    """Run a block on the first chunk and see in which order its linears are fed, and which of them
    share inputs. Experts that no token reached come last, each by itself; a linear that is never
    called (its weight is used some other way) is in no group.
    """
    wanted = list(sites)
    fed: dict[Site, list[_Identity]] = {}
    sources: dict[_Identity, str] = {}
    alive: list[Tensor] = []  # what identities are made of must not be freed and reused

    def on_input(site: Site, inputs: Tensor) -> None:
        alive.append(inputs)
        fed.setdefault(site, []).append(_identity(inputs))

    def on_norm(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                sources[_identity(output)] = name

        return hook

    block = skeleton.blocks[index]
    hooks = [
        module.register_forward_hook(on_norm(name))
        for name, module in block.named_modules()
        if is_norm(module)
    ]
    try:
        with _Watch(skeleton, index, set(wanted), on_input):
            runner.run(index, 0, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    shared: dict[tuple[_Identity, ...], list[Site]] = {}
    for site, identities in fed.items():
        shared.setdefault(tuple(identities), []).append(site)
    groups = [
        InputGroup(tuple(found), len(identities), sources.get(identities[0]))
        for identities, found in shared.items()
    ]
    idle = [site for site in wanted if site not in fed and site.expert is not None]
    return groups + [InputGroup((site,), 0, None) for site in idle]


def stages(groups: Sequence[InputGroup], *, sequential: bool) -> list[Stage]:
    """The passes to take: one for all groups, or, sequentially, one for each in the order they are
    fed, so that each sees the linears before it already quantized. The experts of a parameter go
    together.
    """
    if not sequential:
        return [Stage(tuple(groups))] if groups else []
    by_parameter: dict[tuple[str, bool], list[InputGroup]] = {}
    for group in groups:
        key = (group.first.parameter, group.first.expert is None)
        by_parameter.setdefault(key, []).append(group)
    return [Stage(tuple(found)) for found in by_parameter.values()]


def collect(
    runner: BlockRunner,
    skeleton: Skeleton,
    index: int,
    activations: Activations,
    stage: Stage,
    in_features: Callable[[Site], int],
) -> dict[Site, Moments]:
    """Moments of each group's inputs over all chunks, under the group's first site."""
    moments = {group.first: Moments.zeros(in_features(group.first)) for group in stage.groups}
    seen: set[Site] = set()

    def on_input(site: Site, inputs: Tensor) -> None:
        moments[site].add(inputs)
        seen.add(site)
        if stage.stops_early and len(seen) == len(moments):
            raise _SeenEnough

    with _Watch(skeleton, index, set(moments), on_input):
        for chunk in range(runner.num_chunks):
            seen.clear()
            runner.run(index, chunk, activations.get(chunk))
    return moments


def advance(
    runner: BlockRunner, index: int, activations: Activations, on_chunk: Callable[[], None]
) -> None:
    """Replace each chunk's hidden state by the block's output."""
    for chunk in range(runner.num_chunks):
        output = runner.run(index, chunk, activations.get(chunk))
        assert output is not None
        activations.put(chunk, output)
        on_chunk()


def is_norm(module: nn.Module) -> bool:
    """A leaf whose weight is one gain a channel: RMSNorm, LayerNorm and their kin."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not list(module.children())


# torch's own linear, and x @ weight.T as some families write it; the weight comes second. addmm,
# of GPT-2's Conv1D, takes it third.
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}


class _Identity(NamedTuple):
    """Two views with equal identities hold the same vectors."""

    storage: int
    offset: int
    count: int
    width: int
    version: int


def _identity(tensor: Tensor) -> _Identity:
    return _Identity(
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.numel(),
        tensor.shape[-1],
        tensor._version,
    )


class _Watch(TorchFunctionMode):
    """Calls `on_input(site, inputs)` for each product with one of the wanted weights."""

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        wanted: set[Site],
        on_input: Callable[[Site, Tensor], None],
    ) -> None:
        super().__init__()
        self._wanted = wanted
        self._on_input = on_input
        self._owners = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in skeleton.block_parameters(index)
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _PRODUCTS and len(args) >= 2:
            self._look(args[0], args[1])
        elif func is torch.addmm and len(args) >= 3:
            self._look(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _look(self, inputs: Tensor, weight: Tensor) -> None:
        owner = self._owners.get(weight.untyped_storage().data_ptr())
        if owner is None:
            return
        name, parameter = owner
        expert = None
        if parameter.ndim == 3 and weight.ndim == 2:
            expert = weight.storage_offset() // parameter[0].numel()
        site = Site(name, expert)
        if site in self._wanted:
            self._on_input(site, inputs)
