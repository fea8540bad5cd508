"""How many devices a model can be split over: refused by its config, before any weight is read.

Tensor parallel cuts every layer: whole attention heads to each device, key-value heads split or
copied, and the inner width of the MLP at the boundaries of quantization groups: vLLM gives every
device as many of them, qtool one more to some (`runtime.parallel.shard`). Pipeline parallel cuts
between layers.
"""

from __future__ import annotations

from qtool.errors import UsageError
from qtool.runtime.deploy.facts import ModelFacts


def check_split(
    facts: ModelFacts, tensor_parallel: int, pipeline_parallel: int, *, evenly: bool
) -> None:
    """Raise UsageError naming the number that does not divide, and those that would do.

    evenly  whether all devices must have as many groups of the MLP
    """
    if tensor_parallel > 1:
        _check_tensor_parallel(facts, tensor_parallel, evenly)
    layers = facts.size("num_hidden_layers", "n_layer", "num_layers")
    if layers is not None and pipeline_parallel > layers:
        raise UsageError(
            f"--pipeline-parallel-size {pipeline_parallel}: {facts.name} has {layers} layers, and "
            "each part needs one at least",
            f"pass at most {layers}",
        )


def _check_tensor_parallel(facts: ModelFacts, parts: int, evenly: bool) -> None:
    if obstacle := _obstacle(facts, parts, evenly):
        fitting = [n for n in range(1, 65) if _obstacle(facts, n, evenly) is None]
        raise UsageError(
            f"--tensor-parallel-size {parts}: {obstacle}",
            f"{facts.name} can be split over {', '.join(map(str, fitting))}",
        )


def _obstacle(facts: ModelFacts, parts: int, evenly: bool) -> str | None:
    heads = facts.size("num_attention_heads", "n_head")
    if heads is not None and heads % parts:
        return f"{facts.name} has {heads} attention heads, which {parts} does not divide"
    kv_heads = facts.size("num_key_value_heads")
    if kv_heads and kv_heads % parts and parts % kv_heads:
        return (
            f"{facts.name} has {kv_heads} key-value heads, which can neither be split over "
            f"{parts} nor be copied evenly"
        )
    inner, group = facts.size("intermediate_size", "n_inner"), group_size(facts)
    if inner is not None and not evenly and inner // group < parts:
        return (
            f"the MLPs of {facts.name} are {inner} wide, in groups of {group} that cannot be cut: "
            f"fewer than {parts}"
        )
    if inner is not None and evenly and inner % (parts * group):
        return (
            f"the MLPs of {facts.name} are {inner} wide, which does not split into {parts} parts "
            f"of whole groups of {group}"
            if group > 1
            else f"the MLPs of {facts.name} are {inner} wide, which {parts} does not divide"
        )
    return None


def group_size(facts: ModelFacts) -> int:
    """The largest group of weights with a scale of its own; 1: there are none."""
    found = [facts.quantization.get("group_size")]
    groups = facts.quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("group_size") if isinstance(weights, dict) else None)
    return max([size for size in found if isinstance(size, int) and size > 0], default=1)
