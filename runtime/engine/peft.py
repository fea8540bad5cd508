"""Reads a LoRA adapter as peft saves it: adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight  [rank, in]
    base_model.model.MODULE.lora_B.weight  [out, rank]

    W x  becomes  W x + scale B (A x)      scale = alpha / rank, or alpha / sqrt(rank) (rslora)

Hu et al., LoRA (2021), arXiv:2106.09685. What changes a model in another way (DoRA, trained
embeddings or biases, whole modules) is refused by name: an adapter that is half applied writes
text that nobody asked for.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.errors import FormatError, UnsupportedModel, UsageError
from qtool.json_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# Settings that would change what is computed -> the values that do not.
PLAIN_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "megatron_config": (),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "use_qalora": (False,),
}


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What is added to one linear: down [rank, in] and up [out, rank], which has the scale in it;
    float32.
    """

    down: Tensor
    up: Tensor


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """By the name of the module that it changes."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} has no {name}",
                hint="a LoRA adapter is a folder as peft's save_pretrained writes it",
            )
    config = read_json(folder / CONFIG)
    for setting, plain in PLAIN_SETTINGS.items():
        value = config.get(setting)
        if value is not None and value not in plain:
            raise UnsupportedModel(
                f"{folder / CONFIG}: {setting} is {value!r}, which is not offered"
            )
    halves: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():
                match = _NAME.fullmatch(name)
                if match is None:
                    raise UnsupportedModel(f"{folder / WEIGHTS}: {name} is not a LoRA of a linear")
                halves.setdefault(match["module"], {})[match["part"]] = file.get_tensor(name)
    except SafetensorError as error:
        raise FormatError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    if not halves:
        raise FormatError(f"{folder / WEIGHTS} holds no adapter")
    return {module: _low_rank(folder, config, module, parts) for module, parts in halves.items()}


def _low_rank(
    folder: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]
) -> LowRank:
    if set(parts) != {"A", "B"}:
        raise FormatError(f"{folder / WEIGHTS}: {module} has only one of lora_A and lora_B")
    down, up = parts["A"].float(), parts["B"].float()
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise FormatError(
            f"{folder / WEIGHTS}: {module} has lora_A {list(down.shape)} and lora_B "
            f"{list(up.shape)}, which do not multiply"
        )
    rank = _setting(config, "rank_pattern", module, config.get("r"))
    alpha = _setting(config, "alpha_pattern", module, config.get("lora_alpha"))
    if rank != down.shape[0]:
        raise FormatError(f"{folder}: {module} has rank {down.shape[0]}, and {CONFIG} says {rank}")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(down, up * scale)


def _setting(config: Mapping[str, Any], patterns: str, module: str, usual: Any) -> float:
    """A pattern fits a module's last names, as a regular expression (peft's rule)."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            usual = value
            break
    if not isinstance(usual, int | float) or isinstance(usual, bool) or usual <= 0:
        raise FormatError(f"{CONFIG}: {patterns} or its default is {usual!r} for {module}")
    return usual
