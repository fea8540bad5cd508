"""The families that can be served, as `qtool serve --list-models` prints them.

Those of the native decoder are rows of `qtool.arch`. Those that transformers' code runs are found
by trying (runtime/models/fallback.py); listed here are the ones that tests run, so the list is what
is known to work and no limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qtool.arch import ARCHITECTURES

Code = Literal["native", "transformers"]

# By model_type: under what names models of a family are published.
NATIVE: dict[str, str] = {
    "llama": "Llama 1 to 3.3, Yi, SmolLM 1 and 2, DeepSeek LLM, Vicuna, TinyLlama",
    "mistral": "Mistral, Mistral Nemo, Codestral, Zephyr",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 1.5, 2, 2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    "qwen2_moe": "Qwen 1.5 MoE, Qwen 2 MoE",
    "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen 3 MoE",
    "gemma": "Gemma 1, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text only",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4 mini",
    "smollm3": "SmolLM 3",
    "olmo2": "OLMo 2",
    "granite": "Granite 3",
    "starcoder2": "StarCoder 2",
    "deepseek_v2": "DeepSeek V2, V2 Lite, Coder V2",
    "deepseek_v3": "DeepSeek V3, V3.1, R1",
}
# Multimodal models, of which the part that writes text is run (runtime/models/text_part.py).
TEXT_PARTS: dict[str, str] = {
    "gemma3": "Gemma 3 4B to 27B, MedGemma",
    "llava": "LLaVA 1.5",
    "mistral3": "Mistral Small 3.1, 3.2",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
TRANSFORMERS: dict[str, str] = {
    "afmoe": "Arcee Trinity",
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "axk1": "A.X K1",
    "biogpt": "BioGPT",
    "bitnet": "BitNet b1.58, weights in 16 bit",
    "cohere": "Command R, Aya",
    "cohere2": "Command R7B, Command A",
    "cohere2_moe": "Command, with experts",
    "ctrl": "CTRL",
    "cwm": "Code World Model",
    "dbrx": "DBRX",
    "diffllama": "DiffLlama",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5",
    "ernie4_5_moe": "ERNIE 4.5 MoE",
    "exaone4": "EXAONE 4",
    "exaone_moe": "EXAONE MoE",
    "flex_olmo": "FlexOlmo",
    "gemma3n_text": "Gemma 3n, text only",
    "gemma4_text": "Gemma 4, text only",
    "glm": "GLM-4 9B, GLM-Edge",
    "glm4": "GLM-4 0414, GLM-Z1",
    "glm4_moe": "GLM-4.5, 4.6",
    "glm4_moe_lite": "GLM-4.7 Flash",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder 1, SantaCoder",
    "gpt_neox": "GPT-NeoX, Pythia, Dolly",
    "gpt_oss": "gpt-oss",
    "granite_swa": "Granite with windows",
    "granitemoe": "Granite MoE",
    "granitemoe_swa": "Granite MoE with windows",
    "granitemoeshared": "Granite MoE with shared experts",
    "helium": "Helium",
    "hrm_text": "HRM",
    "hunyuan_v1_dense": "Hunyuan dense",
    "hunyuan_v1_moe": "Hunyuan A13B",
    "hy_v3": "Hy 3",
    "hyperclovax": "HyperCLOVA X SEED",
    "internlm3": "InternLM 3",
    "iquestcoder": "IQuest Coder",
    "jais2": "Jais 2",
    "jetmoe": "JetMoE",
    "laguna": "Laguna",
    "longcat_flash": "LongCat Flash",
    "mellum": "Mellum",
    "mimo_v2_flash": "MiMo V2 Flash",
    "minicpm3": "MiniCPM 3",
    "minimax_m2": "MiniMax M2",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "modernbert-decoder": "Ettin decoders",
    "nanochat": "nanochat",
    "nemotron": "Nemotron, Minitron",
    "olmo": "OLMo 1",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "persimmon": "Persimmon",
    "phi": "Phi-1, 1.5, 2",
    "phimoe": "Phi-3.5 MoE",
    "seed_oss": "Seed-OSS",
    "solar_open": "Solar Open",
    "stablelm": "StableLM",
    "vaultgemma": "VaultGemma",
    "youtu": "Youtu-LLM",
}


@dataclass(frozen=True, slots=True)
class ServedFamily:
    model_type: str
    code: Code
    models: str
    gguf: bool


def served_families() -> Iterator[ServedFamily]:
    """Native ones first, each group by name; gguf: whether files of that kind are read, too."""
    for name, models in sorted(NATIVE.items()):
        yield ServedFamily(name, "native", models, name in ARCHITECTURES)
    for name, models in sorted(TEXT_PARTS.items()):
        yield ServedFamily(name, "native", f"{models}: text alone", gguf=False)
    for name, models in sorted(TRANSFORMERS.items()):
        yield ServedFamily(name, "transformers", models, name in ARCHITECTURES)
