"""Run one decoder block of a model at a time, called exactly as its own model calls it.

How a block is called (masks, rotary embeddings, layer kinds) is the outer model's business and
differs in every family. So the outer model runs as it is, with every block replaced by a stub: the
stubs before the wanted block pass the hidden state through in the shape that block returns, and
the wanted block's stub runs the real block on the stored hidden state, with exactly the arguments
the outer model computed, and stops the run. What the outer model does besides (embedding lookup,
masks) is small beside a block, and nothing has to be stored or known of any family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qtool.calibration.activations import Activations
from qtool.calibration.placement import CPU, moved
from qtool.calibration.skeleton import Skeleton, reuse_freed_memory
from qtool.errors import QtoolError, UnsupportedModel

# Tokens run through a block at once. Below this small products waste time; above it the block's
# temporaries (4 bytes x intermediate size x 3 a token) outgrow its weights and the caches: 38, 36,
# 34 and 41 ms of CPU for 4096 tokens of a block of books-7m (one Xeon core, 2026-11) in chunks of
# 512, 1024, 2048 and 4096.
CHUNK_TOKENS = 2048


class _BlockDone(Exception):
    """The wanted block has run; carries its hidden state out of the outer model."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Asked(Exception):
    """Carries what the wanted block is called with out of the outer model."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__()
        self.call = call


class BlockCall(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SeenEnough(Exception):
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


class RoundedProducts:
    """Products of float32 matrices round what they take, to bfloat16 on a CPU and TensorFloat
    (three bits more) on a CUDA device, and add in float32.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self._matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        self._rounding = "bf16"
        if device.type == "cuda":
            self._matmul, self._rounding = torch.backends.cuda.matmul, "tf32"

    def __enter__(self) -> None:
        self._precision = self._matmul.fp32_precision
        self._matmul.fp32_precision = self._rounding

    def __exit__(self, *error: object) -> None:
        self._matmul.fp32_precision = self._precision


class Bfloat16Products(TorchFunctionMode):
    """Linears and attention compute in bfloat16; what they take and give stays float32. Other
    products are `RoundedProducts`.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__()
        self._others = RoundedProducts(device)

    def __enter__(self) -> Any:
        self._others.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._others.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func is F.scaled_dot_product_attention:
            dtype = args[0].dtype
            args = tuple(_rounded(value) for value in args)
            kwargs = {name: _rounded(value) for name, value in kwargs.items()}
            return func(*args, **kwargs).to(dtype)
        return func(*args, **kwargs)


def _rounded(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if floating else value


class BlockRunner:
    """Runs the blocks of a skeleton, in order, on chunks of token sequences.

    tokens    [sequences, length] int64
    bfloat16  whether `products` rounds what linears and attention take to bfloat16: far below the
              rounding of weights to five bits or less, and faster where processors know it
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        chunk_tokens: int = CHUNK_TOKENS,
        *,
        bfloat16: bool = False,
    ) -> None:
        reuse_freed_memory()
        self._skeleton = skeleton
        self._bfloat16 = bfloat16
        self._weights: Mapping[str, Tensor] | None = None
        self._asking = False
        size = max(1, chunk_tokens // tokens.shape[1])
        self._chunks = [tokens[i : i + size] for i in range(0, tokens.shape[0], size)]
        self._wanted = 0
        self._hidden: Tensor | None = None
        # What each block returns beside the hidden state, where it returns a tuple.
        self._extras: dict[int, tuple[Any, ...]] = {}
        for index, block in enumerate(skeleton.blocks):
            skeleton.block_list[index] = _Stub(block, self._visit, index)

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    def tokens(self, chunk: int) -> Tensor:
        return self._chunks[chunk]

    def device(self, index: int) -> torch.device:
        """Where a block is run."""
        return self._skeleton.placement.block(index)

    def activations(self, file: Path, index: int = 0) -> Activations:
        """A slot a chunk for what a block is run on; see there for the file."""
        place = self._skeleton.placement
        return Activations(
            self.num_chunks, file, device=place.block(index), device_bytes=place.kept_bytes
        )

    def products(self, index: int) -> AbstractContextManager[object]:
        """How a block's products are computed inside; runs outside of it are float32 throughout."""
        return Bfloat16Products(self.device(index)) if self._bfloat16 else nullcontext()

    def recorded_products(self, index: int) -> AbstractContextManager[object]:
        """The same around operations that were recorded inside `products`, types with them."""
        return RoundedProducts(self.device(index)) if self._bfloat16 else nullcontext()

    def run(
        self,
        index: int,
        chunk: int,
        hidden: Tensor | None,
        *,
        sequences: slice | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """A block's output for one chunk; None where a watcher had seen enough.

        hidden     [sequences, length, hidden] of the chunk, on the block's device; None to start
                   from the embeddings
        sequences  a part of the chunk, None for all of it
        weights    in place of the block's parameters, by name in the block; gradients flow to them
        """
        tokens = self._chunks[chunk]
        if sequences is not None:
            tokens = tokens[sequences]
            hidden = None if hidden is None else hidden[sequences]
        self._wanted, self._hidden, self._weights = index, hidden, weights
        try:
            with torch.set_grad_enabled(weights is not None):
                self._skeleton.model(input_ids=self._outside(tokens), use_cache=False)
        except _BlockDone as done:
            return done.hidden
        except SeenEnough:
            return None
        except (_Asked, QtoolError):
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

    def call(self, index: int, chunk: int, hidden: Tensor | None) -> BlockCall:
        """What the outer model calls a block with for one chunk; the hidden state comes first or
        is named hidden_states."""
        self._asking = True
        try:
            self.run(index, chunk, hidden)
        except _Asked as asked:
            return asked.call
        finally:
            self._asking = False
        raise AssertionError("a block that is called ends its run")

    def finish(self, chunk: int, hidden: Tensor) -> Tensor:
        """Logits [sequences, length, vocabulary] from the last block's output."""
        self._wanted, self._weights = len(self._skeleton.blocks), None
        self._hidden = self._outside(hidden)
        tokens = self._outside(self._chunks[chunk])
        with torch.no_grad():
            output = self._skeleton.model(input_ids=tokens, use_cache=False)
        logits: Tensor = output.logits
        return logits.to(torch.float32)

    def _outside(self, values: Tensor) -> Tensor:
        return values.to(self._skeleton.placement.outside)

    def _visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last = len(self._skeleton.blocks) - 1
        if index != self._wanted:
            passed = args[0] if args else kwargs["hidden_states"]
            if self._wanted > last and index == last:
                passed = self._hidden
            extras = self._extras.get(index)
            return passed if extras is None else (passed, *extras)
        if self.device(index) != self._skeleton.placement.outside:
            args, kwargs = moved((args, kwargs), self.device(index))
        if self._hidden is not None:
            if args:
                args = (self._hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": self._hidden}
        if self._asking:
            raise _Asked(BlockCall(args, kwargs))
        block = self._skeleton.blocks[index]
        if self._weights is None:
            output = block(*args, **kwargs)
        else:
            output = torch.func.functional_call(block, dict(self._weights), args, kwargs)
        if isinstance(output, tuple):
            self._extras[index] = moved(output[1:], self._skeleton.placement.outside)
            output = output[0]
        raise _BlockDone(output)
