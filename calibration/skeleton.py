"""A causal language model with its structure in memory and its weights on disk.

The model is built on the meta device by transformers' own class, so any architecture that
AutoModelForCausalLM knows is taken, and custom code where it is trusted. Then one decoder block at
a time is given its weights and loses them again. Nothing here knows a model family: the decoder is
the module list that holds the most parameters.

Buffers are kept real (`include_buffers=False`): rotary frequencies and embedding scales are
computed when the model is built and are in no checkpoint.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibration.auto_class import auto_class, language_model, tower_parameters
from qtool.calibration.placement import Placement
from qtool.calibration.stored import StoredModel
from qtool.checkpoint import Checkpoint
from qtool.errors import QtoolError, UnsupportedModel, UsageError

# All arithmetic of the calibration pass: on a CPU the statistics are worth more than the time.
COMPUTE_DTYPE = torch.float32
# Embeddings above this stay in the checkpoint's type, their output is cast.
LARGE_EMBEDDING_BYTES = 1_000_000_000


@dataclass(slots=True)
class Skeleton:
    """model   on meta, but for buffers and what was loaded
    blocks  the decoder blocks, in order; the model's own list may hold stubs in their place
    prefix  the blocks' name in the model: "model.layers"
    """

    model: Any
    checkpoint: Checkpoint
    stored: StoredModel
    blocks: list[nn.Module]
    prefix: str
    # Parameters outside the blocks, by every name they have; tied ones have several. Those of a
    # multimodal model's towers are not among them.
    outside: dict[str, nn.Parameter]
    # Where weights go when they are loaded.
    placement: Placement = field(default_factory=Placement)

    @classmethod
    def build(cls, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Skeleton:
        refuse_quantized(checkpoint)
        model = _build_on_meta(checkpoint, trust_remote_code)
        stored = StoredModel(model, checkpoint)
        prefix, block_list = find_blocks(model)
        towers = tower_parameters(model)
        outside = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{prefix}.") and name not in towers
        }
        skeleton = cls(model, checkpoint, stored, list(block_list), prefix, outside)
        for index in range(len(skeleton.blocks)):
            stored.require(name for name, _ in skeleton.block_parameters(index))
        present = {id(parameter) for name, parameter in outside.items() if name in stored}
        stored.require(name for name, item in outside.items() if id(item) not in present)
        return skeleton

    @property
    def block_list(self) -> nn.ModuleList:
        found: nn.ModuleList = self.model.get_submodule(self.prefix)
        return found

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def block_parameters(self, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.blocks[index].named_parameters():
            yield f"{self.block_name(index)}.{name}", parameter

    def load_block(self, index: int) -> nn.Module:
        """The block with its weights, float32, on its device."""
        block = self.blocks[index]
        device = self.placement.block(index)
        for name, buffer in list(block.named_buffers()):
            assign(block, name, buffer.to(device))
        prefix = f"{self.block_name(index)}."
        names = [
            prefix + name
            for name, tensor in (*block.named_parameters(), *block.named_buffers())
            if isinstance(tensor, nn.Parameter) or prefix + name in self.stored
        ]
        for name, tensor in self.stored.load(names, COMPUTE_DTYPE, device):
            assign(block, name.removeprefix(prefix), tensor)
        return block

    def free_block(self, index: int) -> None:
        """Give the block's memory back; its buffers stay."""
        block = self.blocks[index]
        for name, parameter in list(block.named_parameters()):
            assign(block, name, torch.empty_like(parameter, device="meta"))
        return_freed_memory()

    def load_outside(self, *, with_head: bool = True) -> None:
        """Embeddings, final norm, head: all that is not a block, on the device for it. Without the
        head logits cannot be computed; one that is tied to the embeddings is there all the same."""
        device = self.placement.outside
        for name, buffer in list(self.model.named_buffers()):
            if not name.startswith(f"{self.prefix}."):
                assign(self.model, name, buffer.to(device))
        left = set() if with_head else self.head_alone()
        names = [name for name in self.outside if name in self.stored and name not in left]
        buffers = [
            name
            for name, _ in self.model.named_buffers()
            if name in self.stored and not name.startswith(f"{self.prefix}.")
        ]
        for name in (*names, *buffers):
            dtype = self.outside_dtype(name) if name in self.outside else COMPUTE_DTYPE
            for _, tensor in self.stored.load([name], dtype, device):
                self._assign_outside(name, tensor)
            if dtype != COMPUTE_DTYPE:
                module = self.model.get_submodule(name.removesuffix(".weight"))
                module.register_forward_hook(_cast_output)

    @property
    def can_finish(self) -> bool:
        """Whether the loaded model can compute logits: its head is in the compute type."""
        head = self.model.get_output_embeddings()
        return head is not None and head.weight.dtype == COMPUTE_DTYPE

    def head_alone(self) -> set[str]:
        """Parameters of the head that no other module shares."""
        head = self.model.get_output_embeddings()
        path = next((name for name, module in self.model.named_modules() if module is head), None)
        own = {name for name in self.outside if path and name.startswith(f"{path}.")}
        shared = {id(item) for name, item in self.outside.items() if name not in own}
        return {name for name in own if id(self.outside[name]) not in shared}

    def outside_dtype(self, name: str) -> torch.dtype:
        """What a parameter that is no block's is loaded as."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        large = self.outside[name].numel() * COMPUTE_DTYPE.itemsize > LARGE_EMBEDDING_BYTES
        if large and isinstance(module, nn.Embedding) and name.endswith(".weight"):
            return self.checkpoint_dtype(name)
        return COMPUTE_DTYPE

    def checkpoint_dtype(self, parameter: str) -> torch.dtype:
        pieces = self.stored.pieces(parameter)
        return self.checkpoint.tensors[pieces[0].tensor].dtype if pieces else COMPUTE_DTYPE

    def _assign_outside(self, name: str, tensor: Tensor) -> None:
        """Assign under every name the parameter has, so that tied weights stay tied."""
        parameter = self.outside.get(name)
        if parameter is None:
            assign(self.model, name, tensor)
            return
        ours = [other for other, item in self.outside.items() if item is parameter]
        shared = nn.Parameter(tensor, requires_grad=False)
        for other in ours:
            assign(self.model, other, shared)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else config
    raise UnsupportedModel(
        f"{checkpoint.folder.name} is already quantized ({method})",
        "quantize the original 16-bit model; to change the format of this one use `qtool convert`",
    )


def assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in a module's parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if leaf in module._parameters:
        value = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        module._parameters[leaf] = value
    else:
        module._buffers[leaf] = tensor


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder: the module list that holds the most parameters, the outermost of equals; of a
    multimodal model, in its text part.
    """
    within = language_model(model) or ""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and name.startswith(within)
    ]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _build_on_meta(checkpoint: Checkpoint, trust_remote_code: bool) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    folder = checkpoint.folder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            # A view of a checkpoint may store apart what its folder shares.
            if checkpoint.config.get("tie_word_embeddings") is False:
                config.tie_word_embeddings = False
            with init_empty_weights(include_buffers=False):
                model = auto_class(config).from_config(
                    config,
                    dtype=COMPUTE_DTYPE,
                    experts_implementation="eager",
                    trust_remote_code=trust_remote_code,
                )
    except QtoolError:
        raise
    except Exception as error:  # transformers raises nearly every kind for a config it rejects
        text = str(error).strip().splitlines()
        reason = text[0] if text else type(error).__name__
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{folder.name} comes with its own Python code",
                "read the code, then pass --trust-remote-code to run it",
            ) from error
        raise UnsupportedModel(
            f"transformers cannot build a causal language model from {folder}/config.json: "
            f"{reason}",
            "check model_type, or install a newer transformers",
        ) from error
    # Building on meta makes a new parameter at each registration, which unties what was tied.
    model.tie_weights()
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


# mallopt's names of them, and what a run of a block makes and drops again and again.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSED_BYTES = 2**28
# The most that glibc takes for the second before 2.35.
_OLD_MOST_BYTES = 2**25


def reuse_freed_memory() -> None:
    """Keep freed memory for what comes next in place of asking the system anew for every large
    tensor, whose pages it then has to clear: a third of the time of books-7m's blocks. Between
    blocks it goes back all the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        raise_thresholds(mallopt)


def raise_thresholds(mallopt: Callable[[int, int], int]) -> None:
    """mallopt  as mallopt(3): 0 where a value is refused"""
    # Where none is taken, nothing may be set: it would end glibc's own raising of them.
    if mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES) or mallopt(_M_MMAP_THRESHOLD, _OLD_MOST_BYTES):
        mallopt(_M_TRIM_THRESHOLD, 2 * _REUSED_BYTES)


def return_freed_memory() -> None:
    """Hand freed memory back to the system. glibc keeps blocks of up to 32 MB for reuse, and over
    many decoder blocks they fragment: 73 MB more a block were seen, none of it in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _cast_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.to(COMPUTE_DTYPE)
