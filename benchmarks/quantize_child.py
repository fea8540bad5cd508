"""One quantization by one method, in the virtual environment of the method: see quantize.py.

python benchmarks/quantize_child.py METHOD MODEL TOKENS.pt TARGET BITS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OURS = ("rtn", "gptq", "fast", "default", "best")
# What pip installs for each method of others.
PEERS = {
    "llm-compressor": "llmcompressor",
    "llm-compressor-imatrix": "llmcompressor",
    "gptqmodel": "gptqmodel",
    "gptqmodel-mse": "gptqmodel",
    "gptqmodel-gptaq": "gptqmodel",
    "gptqmodel-mse-gptaq": "gptqmodel",
    "auto-round-50": "auto-round",
    "auto-round-200": "auto-round",
    "auto-round-1000": "auto-round",
}
GROUP_SIZE = 128


def main() -> None:
    """One quantization in this process."""
    import torch

    method, model, tokens, target, bits = sys.argv[1:]
    torch.set_num_threads(1)
    if method in OURS:
        run_ours(method, model, tokens, target, int(bits))
    elif method.startswith("llm-compressor"):
        run_llm_compressor(method, model, torch.load(tokens), target, int(bits))
    elif method.startswith("gptqmodel"):
        run_gptqmodel(method, model, torch.load(tokens), target, int(bits))
    else:
        run_auto_round(method, model, torch.load(tokens), target, int(bits))


def run_ours(method: str, model: str, tokens: str, target: str, bits: int) -> None:
    """The tokens are drawn again by their seed: the same tensor, and the time it takes counts."""
    import torch

    from qtool.quantize.pipeline import quantize_model
    from qtool.recipe import load_recipe

    shape = torch.load(tokens).shape
    seed = int(Path(tokens).stem.rpartition("-")[2])
    name = {"rtn": "rtn-int4", "gptq": "gptq"}.get(method, "int4")
    recipe = load_recipe(name).with_options(
        effort=method if name == "int4" else None,
        bits=bits,
        group_size=GROUP_SIZE,
        num_samples=shape[0],
        sequence_length=shape[1],
        seed=seed,
    )
    quantize_model(model, recipe, out=target)


def run_llm_compressor(method: str, model: str, tokens: Any, target: str, bits: int) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    if method.endswith("imatrix"):
        weights["observer"] = "imatrix_mse"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict(rows),
        recipe=[GPTQModifier(ignore=["lm_head"], config_groups=groups)],
        num_calibration_samples=tokens.shape[0],
        max_seq_length=tokens.shape[1],
    )
    loaded.save_pretrained(target, save_compressed=True)


def run_gptqmodel(method: str, model: str, tokens: Any, target: str, bits: int) -> None:
    import os

    # It refuses to start where it would make itself fewer than two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    # 2.4 is the exponent that its documentation gives.
    better: dict[str, Any] = {"mse": 2.4} if "-mse" in method else {}
    if method.endswith("-gptaq"):
        better["gptaq"] = GPTAQConfig()
    config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=True, desc_act=False, **better)
    loaded = GPTQModel.load(model, config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    loaded.quantize(rows, batch_size=8)
    loaded.save(target)


def run_auto_round(method: str, model: str, tokens: Any, target: str, bits: int) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        bits=bits,
        group_size=GROUP_SIZE,
        sym=True,
        iters=int(method.rpartition("-")[2]),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row.unsqueeze(0)} for row in tokens],
        enable_torch_compile=False,
        device_map="cpu",
    ).quantize_and_save(target, format="auto_gptq")


if __name__ == "__main__":
    main()
