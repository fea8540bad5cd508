"""Put a finished run together as a model folder: shards, config.json and what stands beside them.

Tensors are copied one at a time in the source's order; a packed linear's tensors take the place of
its weight. What was not quantized is copied as it is, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.calibration.skeleton import Skeleton
from qtool.convert.formats import Format
from qtool.json_files import write_json
from qtool.output import copy_side_files
from qtool.progress import track
from qtool.quantize.journal import Journal
from qtool.quantize.plan import Plan
from qtool.shards import ShardWriter

# A shard is held in memory until it is written, so smaller than the usual 5 GB.
_SHARD_BYTES = 2_000_000_000


def assemble(
    stage: Path,
    skeleton: Skeleton,
    plan: Plan,
    layout: Format,
    journal: Journal,
    *,
    copy_code: bool,
) -> None:
    """Write everything of the artifact but its manifest."""
    checkpoint = skeleton.checkpoint
    packed = {linear.tensor: linear for linear in plan.quantized}
    finished = journal.names()
    skipped = tied_tensors(skeleton)
    writer = ShardWriter(stage, _SHARD_BYTES)
    for name in track(list(checkpoint.tensors), "Writing the model"):
        if name in packed:
            module = packed[name].name
            for suffix in layout.suffixes:
                part = f"{module}.{suffix}"
                if part in finished:
                    writer.add(part, journal.tensor(finished[part], part))
        elif name in finished:
            writer.add(name, journal.tensor(finished[name], name))
        elif name not in skipped:
            writer.add(name, checkpoint.tensor(name))
    writer.finish()
    config = artifact_config(checkpoint.config, plan, layout)
    write_json(stage / "config.json", config)
    if layout.name == "gptq":
        # Where older readers of the format look.
        write_json(stage / "quantize_config.json", config["quantization_config"])
    copy_side_files(checkpoint.folder, stage)
    if copy_code:
        for code in sorted(checkpoint.folder.glob("*.py")):
            shutil.copyfile(code, stage / code.name)


def artifact_config(config: Mapping[str, Any], plan: Plan, layout: Format) -> dict[str, Any]:
    # Schemes of the one kind that this layout packs.
    quantized: dict[str, Any] = {linear.module: scheme for linear, scheme in plan.quantized.items()}
    return {
        **config,
        "quantization_config": layout.quantization_config(quantized, plan.dense_modules),
    }


def tied_tensors(skeleton: Skeleton) -> set[str]:
    """Copies of the embedding stored as the head of a model that ties them: loaders refuse both."""
    head = skeleton.model.get_output_embeddings()
    embedding = skeleton.model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    stored = skeleton.stored
    names = {
        name: tensor
        for name, item in skeleton.outside.items()
        if item is skeleton.outside.get(name) and (tensor := stored.sole_tensor(name)) is not None
    }
    by_module = {id(module): name for name, module in skeleton.model.named_modules()}
    head_tensor = names.get(f"{by_module[id(head)]}.weight")
    embedding_tensor = names.get(f"{by_module[id(embedding)]}.weight")
    if head_tensor is None or embedding_tensor is None or head_tensor == embedding_tensor:
        return set()
    return {head_tensor}


def model_dtype(skeleton: Skeleton, tensor: str) -> torch.dtype:
    """The type of a linear as it was stored: packed scales take it."""
    return skeleton.checkpoint.tensors[tensor].dtype
