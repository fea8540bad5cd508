"""What vLLM cannot load, by config.json alone, and the conversion that helps.

Looked up in vLLM 0.32: its quantization folder, and for CPUs model_executor/kernels/linear and
model_executor/layers/fused_moe. vLLM itself says so only after minutes of starting.
"""

from __future__ import annotations

from qtool.convert import codebook
from qtool.runtime.deploy.facts import ModelFacts
from qtool.runtime.deploy.vllm_installed import Installed

QUANTIZED_FOR_CPU_BITS = 4

# quant_method of config.json -> why the formats that are not in it cannot be loaded.
READABLE = (
    "awq", "auto_awq", "awq_marlin", "gptq", "gptq_marlin", "auto_gptq", "fp8", "fbgemm_fp8",
    "compressed-tensors", "modelopt", "mxfp4", "gpt_oss_mxfp4", "quark", "torchao", "inc",
    "auto-round",
)  # fmt: skip
# What no packed format helps with where a CPU's kernels are what is missing.
ONE_WAY_ON_CPU = ("gptq", "compressed-tensors", "mxfp4", "gpt_oss_mxfp4")
FLOAT4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


def why_not(facts: ModelFacts, vllm: Installed) -> str | None:
    """Why this vLLM cannot load the model; None: nothing known is in the way."""
    method, config = facts.quant_method, facts.quantization
    if method == "gguf":
        if vllm.is_cpu:
            return "vLLM has no GGUF kernels for CPUs"
        if "vllm-gguf-plugin" not in vllm.plugins:
            return "vLLM reads GGUF files only with its plugin vllm-gguf-plugin, not installed here"
        return None
    if method == "dense":
        return None
    if method == "qtool-marlin":
        return "qtool's Marlin files are a cache for `qtool serve`; vLLM packs for Marlin by itself"
    if method == codebook.QUANT_METHOD:
        return "qtool alone reads tables that differ from row to row"
    if method not in READABLE:
        return f"vLLM has no loader for quant_method {method!r}"
    if method in ("gptq", "gptq_marlin", "auto_gptq"):
        bits, symmetric = config.get("bits"), config.get("sym", True)
        if bits not in (4, 8) or not symmetric:
            kind = "symmetric" if symmetric else "asymmetric"
            return f"vLLM reads GPTQ with 4 or 8 bits and symmetric, and this is {bits}, {kind}"
    if method in ("awq", "auto_awq", "awq_marlin"):
        bits = config.get("bits", config.get("w_bit"))
        if bits != QUANTIZED_FOR_CPU_BITS:
            return f"vLLM reads AWQ with 4 bits, and this has {bits}"
    return _why_not_on_cpu(facts, vllm) if vllm.is_cpu else None


def _why_not_on_cpu(facts: ModelFacts, vllm: Installed) -> str | None:
    config = facts.quantization
    method = facts.quant_method
    if facts.has_experts and not vllm.has_amx:
        return "vLLM multiplies packed experts on CPUs with AMX only, which this one lacks"
    if facts.has_experts and config.get("desc_act"):
        return "vLLM has no kernel for CPUs for experts whose groups are out of order (desc_act)"
    if method in ("gptq", "gptq_marlin", "auto_gptq") and config.get("bits") != 4:
        return f"vLLM multiplies GPTQ weights on CPUs with 4 bits, and these have {config['bits']}"
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return "vLLM has no 4-bit float kernels for CPUs"
    if method != "compressed-tensors":
        return None
    if config.get("format") in FLOAT4:
        return "vLLM has no 4-bit float kernels for CPUs"
    for group in (config.get("config_groups") or {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        is_integer = weights.get("type", "int") == "int"
        if is_integer and inputs is None and weights.get("num_bits") != QUANTIZED_FOR_CPU_BITS:
            bits = weights.get("num_bits")
            return f"vLLM multiplies packed weights on CPUs with 4 bits, and these have {bits}"
    return None


def cure(facts: ModelFacts, vllm: Installed) -> str:
    """The conversion after which vLLM loads the model."""
    one_way = vllm.is_cpu and (facts.has_experts or facts.quant_method in ONE_WAY_ON_CPU)
    if one_way or facts.quant_method == codebook.QUANT_METHOD:
        return f"`qtool convert {facts.name} --to hf` writes it in 16 bit, which every vLLM loads"
    return (
        f"`qtool convert {facts.name} --to compressed-tensors` keeps what has 4 or 8 bits as it is "
        "and writes the rest in 16"
    )
