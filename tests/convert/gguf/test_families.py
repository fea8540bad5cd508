"""Every family of the table through GGUF and back, on tiny models of transformers' own classes."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from qtool.arch import ARCHITECTURES, find_family
from qtool.convert.formats import Held, WeightReader, open_weights
from qtool.convert.gguf.arrange import arrange
from qtool.convert.gguf.config_keys import settings_entries
from qtool.convert.gguf.container import KeyValue
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.families import FAMILIES
from qtool.convert.gguf.import_ import GgufWeights, read_config
from qtool.convert.gguf.mix import choose_types
from qtool.convert.gguf.mix_rules import MixModel
from qtool.convert.gguf.names import NameMap
from qtool.convert.gguf.plan import ExportPlan, plan_export
from qtool.convert.gguf.ropes import derived_tensors
from qtool.convert.gguf.sizes import Sizes
from qtool.convert.gguf.types import ValueType
from qtool.convert.run import convert_model
from qtool.errors import FormatError, QtoolError, UnsupportedModel
from qtool.source import Source
from qtool.weights import Weight

TinyCheckpoint = Callable[..., Path]

WINDOWS = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "query_pre_attn_scalar": 64}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0 + i / 8 for i in range(16)],
    "long_factor": [1.5 + i / 4 for i in range(16)],
    "original_max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

# name: (family, config, GGUF architecture, settings that its file must have)
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama": ("llama", {}, "llama", {"attention.head_count_kv": 2, "rope.dimension_count": 64}),
    "mistral": ("mistral", {}, "llama", {"feed_forward_length": 512}),
    "qwen2": ("qwen2", {}, "qwen2", {"embedding_length": 256}),
    "qwen3": ("qwen3", {"head_dim": 128}, "qwen3", {"attention.key_length": 128}),
    "gemma": ("gemma", {"head_dim": 64, **GEMMA}, "gemma", {"attention.key_length": 64}),
    "gemma2": (
        "gemma2",
        GEMMA,
        "gemma2",
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 32,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**GEMMA, **WINDOWS, "num_hidden_layers": 6},
        "gemma3",
        {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 32},
    ),
    "phi3": (
        "phi3",
        {},
        "phi3",
        {"attention.sliding_window": 0, "rope.dimension_count": 64},
    ),
    "phi3, long": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256},
        "phi3",
        {"rope.dimension_count": 32, "rope.scaling.original_context_length": 256},
    ),
    "phi2": (
        "phi",
        {"num_key_value_heads": 4},
        "phi2",
        {"rope.dimension_count": 32, "attention.layer_norm_epsilon": 1e-5},
    ),
    "gpt2": (
        "gpt2",
        {"tie_word_embeddings": True},
        "gpt2",
        {"context_length": 512, "feed_forward_length": 1024},
    ),
    "smollm3": (
        "smollm3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["full_attention"] * 4,
        },
        "smollm3",
        {"vocab_size": 4096, "rope.dimension_count": 64},
    ),
    "olmo2": ("olmo2", {}, "olmo2", {"attention.head_count_kv": 2}),
    "starcoder2": ("starcoder2", {}, "starcoder2", {"attention.layer_norm_epsilon": 1e-5}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "granite",
        {"attention.scale": 0.25, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2},
    ),
    "mixtral": ("mixtral", {}, "llama", {"expert_count": 4, "expert_used_count": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {},
        "qwen2moe",
        {"expert_feed_forward_length": 128, "expert_shared_feed_forward_length": 256},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"norm_topk_prob": True},
        "qwen3moe",
        {"expert_count": 4, "expert_feed_forward_length": 128},
    ),
    "deepseek2": (
        "deepseek_v2",
        {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 0.5}},
        "deepseek2",
        {
            "attention.head_count_kv": 1,
            "attention.key_length": 96,
            "attention.value_length": 64,
            "attention.key_length_mla": 64,
            "attention.value_length_mla": 64,
            "leading_dense_block_count": 1,
            "expert_gating_func": 1,
            "expert_shared_count": 2,
        },
    ),
    "deepseek2, without q_a": (
        "deepseek_v2",
        {"q_lora_rank": None},
        "deepseek2",
        {"rope.dimension_count": 32},
    ),
    "deepseek3": ("deepseek_v3", {}, "deepseek2", {"expert_gating_func": 2}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}, "qwen2", {"rope.scaling.factor": 4.0}),
}


def opened(path: Path) -> WeightReader:
    return open_weights(Source("tiny", path))


def export(reader: WeightReader, out: Path, type: str) -> tuple[ExportPlan, GgufWeights]:
    plan = plan_export(reader, type)
    write_gguf(plan, out, progress=lambda size: None)
    return plan, GgufWeights(Source("tiny", out))


def checkpoint(case: str, make: TinyCheckpoint, dtype: str) -> Path:
    family, overrides, _, _ = CASES[case]
    return make(family, dtype=dtype, **overrides)


def kept_names(reader: WeightReader) -> set[str]:
    """A tied head, which transformers may still store, has no tensor in GGUF."""
    tied = {"lm_head.weight"} if reader.config.get("tie_word_embeddings") else set()
    return set(reader.tensor_names()) - tied


def test_every_family_has_settings_and_a_case() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()
    assert {family for family, _, _, _ in CASES.values()} == ARCHITECTURES.keys()


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], tuple[WeightReader, ExportPlan, GgufWeights]]:
    """A case's model, its plan and its file, written once."""
    made: dict[tuple[str, str], tuple[WeightReader, ExportPlan, GgufWeights]] = {}
    folder = tmp_path_factory.mktemp("families")

    def make(case: str, type: str, dtype: str) -> tuple[WeightReader, ExportPlan, GgufWeights]:
        if (case, type) not in made:
            source = opened(checkpoint(case, tiny_checkpoint, dtype))
            made[case, type] = (source, *export(source, folder / f"{len(made)}.gguf", type))
        return made[case, type]

    return make


Exported = Callable[[str, str, str], tuple[WeightReader, ExportPlan, GgufWeights]]


@pytest.mark.parametrize(
    ("type", "dtype"),
    [("BF16", "bfloat16"), pytest.param("F16", "float16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("case", CASES)
def test_every_bit_comes_back(case: str, type: str, dtype: str, exported: Exported) -> None:
    source, _, back = exported(case, type, dtype)
    assert kept_names(source) == set(back.tensor_names())
    for name in back.tensor_names():
        original = source.tensor(name)
        assert back.describe(name).shape == original.shape, name
        assert back.tensor(name).to(original.dtype).equal(original), name
    assert back.config["model_type"] == model_type(case)


def model_type(case: str) -> str:
    """GGUF has one architecture for Llama and for Mistral without a window."""
    return "llama" if case == "mistral" else CASES[case][0]


SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "bos_token_id"),
    *("max_position_embeddings", "tie_word_embeddings", "pad_token_id"),
)
TEXT = "It was the best of times, naïve café 123;\n\n  'twas  the worst\tof times. 日本"


@pytest.mark.parametrize("case", CASES)
def test_config_and_tokenizer_come_back(case: str, exported: Exported, tmp_path: Path) -> None:
    """What the settings do is seen by the logits, below; these are seen by nobody else."""
    source, _, back = exported(case, "BF16", "bfloat16")
    folder = convert_model(back.source, to="hf", out=tmp_path / "back")
    before, after = (AutoConfig.from_pretrained(path) for path in (source.source.path, folder))
    for name in SETTINGS:
        assert getattr(after, name, None) == getattr(before, name, None), name
    ends = after.eos_token_id
    assert before.eos_token_id == (ends[0] if isinstance(ends, list) else ends)
    first, second = (
        Tokenizer.from_file(str(path / "tokenizer.json")) for path in (source.source.path, folder)
    )
    assert second.get_vocab() == first.get_vocab()
    ids = first.encode(TEXT).ids
    assert second.encode(TEXT).ids == ids
    assert second.decode(ids) == first.decode(ids)


@pytest.mark.parametrize("case", CASES)
def test_the_gguf_package_finds_its_own_names_and_the_settings(
    case: str, exported: Exported
) -> None:
    _, plan, back = exported(case, "BF16", "bfloat16")
    _, _, name, settings = CASES[case]
    reader = gguf.GGUFReader(back.source.path)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = {
        gguf.TENSOR_NAMES[kind].format(bid=block)
        for kind in gguf.MODEL_TENSORS[number]
        for block in range(8)
    }
    for tensor in reader.tensors:
        assert tensor.name.rpartition(".")[0] in known, tensor.name
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape[::-1]) for tensor in reader.tensors}
    assert shapes == {tensor.info.name: tensor.info.shape for tensor in plan.tensors}
    for key, value in settings.items():
        assert reader.get_field(f"{name}.{key}").contents() == pytest.approx(value), key


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_from_what_comes_back(
    case: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(case, tiny_checkpoint, "bfloat16")
    export(opened(folder), tmp_path / "model.gguf", "BF16")
    convert_model(Source("tiny", tmp_path / "model.gguf"), to="hf", out=tmp_path / "back")
    ids = torch.randint(3, 4096, (1, 48), generator=torch.Generator().manual_seed(0))
    logits = []
    for path in (folder, tmp_path / "back"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert AutoConfig.from_pretrained(path).model_type in (model_type(case), CASES[case][0])
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert logits[0].equal(logits[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_logits_of_transformers(
    case: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if case == "deepseek2, without q_a":
        pytest.skip("llama.cpp takes a missing q_a from models of 26 and 27 layers only")
    folder = checkpoint(case, tiny_checkpoint, "float32")
    ids = torch.randint(3, 4096, (64,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    export(opened(folder), tmp_path / "model.gguf", "F32")
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"),
        n_ctx=64,
        verbose=False,
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llama.eval(ids.tolist())
    found = torch.from_numpy(llama.scores[:64])
    # its GELU is a table in half precision
    tolerance = 1e-2 if case.startswith("gemma") else 5e-4
    assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize("case", ["qwen2_moe", "gemma2", "deepseek2", "gpt2"])
def test_quantized_files_are_read_again(
    case: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = opened(checkpoint(case, tiny_checkpoint, "bfloat16"))
    plan, back = export(source, tmp_path / "model.gguf", "Q8_0")
    assert plan.counts()["Q8_0"] > 8
    names = {*back.tensor_names(), *(f"{module}.weight" for module in back.modules())}
    assert names == kept_names(source)
    for name in names:
        original, found = source.tensor(name).float(), back.tensor(name).float()
        assert found.shape == original.shape
        assert (found - original).abs().max() <= original.abs().max() / 100, name
    export(back, tmp_path / "again.gguf", "Q8_0")
    for tensor in plan.tensors:
        if "norm" not in tensor.info.name:  # 1 + weight - 1 + 1 may differ in the last bit
            again = GgufWeights(Source("again", tmp_path / "again.gguf")).file
            first, second = back.file.data(tensor.info.name), again.data(tensor.info.name)
            turned = tensor.arranged is not None and tensor.arranged.form != "rows"
            assert turned or first.equal(second), tensor.info.name


def test_a_stack_gets_the_mix_of_its_family(tiny_checkpoint: TinyCheckpoint) -> None:
    source = opened(tiny_checkpoint("mixtral", num_local_experts=8, hidden_size=256))
    types = {t.info.name: t.info.type.name for t in plan_export(source, "Q4_K_M").tensors}
    assert types["blk.0.attn_k.weight"] == "Q8_0"  # with eight experts
    assert types["blk.0.attn_output.weight"] == "Q5_K"
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


RAW = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", {}, "norm_topk_prob False is not True"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ("gemma2", {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar is 17"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("smollm3", {"no_rope_layers": [0, 0]}, "no_rope_layers"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "factor is 'x'"),
        ("llama", {"rope_parameters": [1]}, "no object"),
        ("deepseek_v2", {"kv_lora_rank": None}, "kv_lora_rank is None"),
        ("granite", {"logits_scaling": "big"}, "logits_scaling is 'big'"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(
    family: str, change: dict[str, Any], message: str
) -> None:
    fine = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
    with pytest.raises((UnsupportedModel, FormatError), match=message):
        settings_entries({**RAW, **fine, "model_type": family, **change})


def test_experts_in_different_types_are_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_checkpoint("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="float16"):
        plan_export(opened(folder), "F16")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"no tensor .*experts\.2\.w1"):
        plan_export(opened(folder), "F16")


def test_a_checkpoint_without_the_models_prefix_gives_the_same_file(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint("gpt2", tiny_checkpoint, "bfloat16"), folder)
    export(opened(folder), tmp_path / "full.gguf", "BF16")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "h.0.attn.c_attn.weight" in bare
    save_file(bare, folder / "model.safetensors")
    export(opened(folder), tmp_path / "bare.gguf", "BF16")
    assert (tmp_path / "bare.gguf").read_bytes() == (tmp_path / "full.gguf").read_bytes()


def test_a_family_without_a_row_is_refused_with_the_list(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(QtoolError, match="'falcon' is not in the table") as error:
        plan_export(opened(tiny_checkpoint("falcon")), "F16")
    assert "deepseek_v2, deepseek_v3, gemma, gemma2, gemma3_text" in str(error.value.hint)


ODD: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 2**31, 2**40, "x", "", True, 1.5, math.nan, math.inf, 0.0, -2.0),
    *([1, 2], [], {}, {"a": 1}, None, "linear", "yarn", "longrope"),
)


def changed(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    result = dict(values)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(result))
        if isinstance(result[key], dict) and result[key] and rng.random() < 0.7:
            result[key] = changed(result[key], rng)
        else:
            result[key] = rng.choice(ODD)
    return result


@pytest.mark.parametrize("case", ["gemma3", "phi3, long", "deepseek2", "qwen2_moe", "gpt2"])
def test_settings_with_wrong_values_are_refused_or_taken(case: str, exported: Exported) -> None:
    """Both ways: nothing but errors that name the thing."""
    source, _, back = exported(case, "BF16", "bfloat16")
    rng = random.Random(case)
    taken = refused = 0
    for _ in range(150):
        config = changed(source.config, rng) | {"model_type": source.config["model_type"]}
        try:
            names = NameMap.of(find_family(config), Sizes.of(config))
            settings_entries(config)
            derived_tensors(config, names.config.head_dim)
            taken += 1
        except QtoolError:
            refused += 1
        entries = [entry for entry in back.file.entries if not entry.key.startswith("tokenizer.")]
        metadata = changed({entry.key: entry.value for entry in entries[4:]}, rng)
        odd = [KeyValue(key, value, ValueType.UINT32) for key, value in metadata.items()]
        try:
            config = read_config(replace(back.file, entries=(*entries[:4], *odd)))
            NameMap.of(find_family(config), Sizes.of(config))
            taken += 1
        except QtoolError:
            refused += 1
    assert taken > 10
    assert refused > 10


class Headers:
    """What a reader tells without reading: every tensor that a config gives a model."""

    source = Source("headers", Path("headers"))
    format = "dense"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.names = NameMap.of(find_family(config), Sizes.of(config))

    def modules(self) -> list[str]:
        return []

    def tensor_names(self) -> list[str]:
        return self.names.required()

    def describe(self, name: str) -> Held:
        return Held(self.names.stored_shape(name), "bfloat16")

    def has(self, name: str) -> bool:
        return name in self.names.required()

    def weight(self, module: str) -> Weight:
        raise AssertionError(module)

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError(name)


LARGE: dict[str, dict[str, Any]] = {
    "deepseek-v3.1": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "gemma-3-4b-it": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
}


@pytest.mark.parametrize("model", LARGE)
def test_large_models_get_the_types_of_llama_cpps_snapshots(model: str, shared_data: Path) -> None:
    reader = Headers(LARGE[model])
    sizes = reader.names.config
    arranged = arrange(reader, reader.names)
    shapes = {name: tensor.held.shape for name, tensor in arranged.items()}
    mix = MixModel(
        reader.names.architecture.gguf_name,
        sizes.num_layers,
        sizes.num_heads,
        sizes.num_kv_heads,
        num_experts=sizes.num_experts,
    )
    text = (shared_data / "goldens" / "type-mix-snapshots" / f"{model}.schema").read_text()
    default, file_type = "", ""
    golden: dict[str, tuple[str, dict[str, str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            file_type, default = line[1:].split("] ")
            golden[file_type] = (default.upper(), {})
        elif line and not line.startswith("#"):
            tensor, type = line.rsplit(" ", 1)
            golden[file_type][1][tensor] = type.upper()
    assert len(golden) > 30
    for file_type, (default, exceptions) in golden.items():
        found = choose_types(file_type, shapes, mix)
        for tensor, choice in found.items():
            expected = exceptions.get(tensor, default)
            assert choice.type.upper() == expected, (file_type, tensor)
        assert exceptions.keys() <= found.keys()
