"""LoRA adapters: what merged weights would write, side by side in one batch, sharing no cache."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool import LLM, LoRARequest, SamplingParams
from qtool.convert.run import convert_model
from qtool.errors import FormatError, QtoolError, UnknownName, UnsupportedModel, UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.layers import DEFAULT_RULES
from qtool.runtime.loading import find_model
from qtool.runtime.models.split import Stretch
from qtool.runtime.offload import load_parts
from qtool.runtime.outputs import RequestOutput

LAYERS = 8
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PROMPTS = [list(range(50, 90)), [7, 8, 9], list(range(50, 80)), [100, 200, 300, 400]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def write_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    modules: tuple[str, ...] = ATTENTION + MLP,
    rank: int = 4,
    config: Mapping[str, Any] = {},
) -> Path:
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for index in range(LAYERS):
        for module in modules:
            name = f"model.layers.{index}.{module}"
            out, inner = weights[f"{name}.weight"].shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inner, generator=generator)
            up = torch.randn(out, rank, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.02 * up
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    return folder


def merge(base: Path, adapter: Path, out: Path, scale: float) -> Path:
    """The same by hand, in float64."""
    shutil.copytree(base, out)
    weights = load_file(base / "model.safetensors")
    additions = load_file(adapter / "adapter_model.safetensors")
    for name, down in additions.items():
        if name.endswith(".lora_A.weight"):
            up = additions[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            merged = weights[target].double() + scale * up.double() @ down.double()
            weights[target] = merged.float()
    save_file({name: w.float() for name, w in weights.items()}, out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def folders(books_7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    write_adapter(root / "all", books_7m, seed=1)
    write_adapter(root / "some", books_7m, seed=2, modules=("self_attn.v_proj", "mlp.up_proj"))
    merge(books_7m, root / "all", root / "merged-all", scale=8 / 4)
    merge(books_7m, root / "some", root / "merged-some", scale=8 / 4)
    return root


def texts(found: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in found]


@pytest.fixture(scope="module")
def llm(folders: Path) -> LLM:
    modules = {name: str(folders / name) for name in ("all", "some")}
    return LLM("builtin:books-7m", dtype="float32", lora_modules=modules)


def test_rows_of_different_adapters_write_what_merged_weights_write(
    llm: LLM, folders: Path
) -> None:
    plain = texts(LLM("builtin:books-7m", dtype="float32").generate(PROMPTS, GREEDY))
    whole = texts(LLM(str(folders / "merged-all"), dtype="float32").generate(PROMPTS, GREEDY))
    some = texts(LLM(str(folders / "merged-some"), dtype="float32").generate(PROMPTS, GREEDY))
    assert plain != whole != some != plain
    adapters = [LoRARequest("all", 1), LoRARequest("some", 2), None]
    for turn in range(3):
        order = [adapters[(turn + place) % 3] for place in range(len(PROMPTS))]
        expected = [
            (plain if one is None else whole if one.lora_name == "all" else some)[place]
            for place, one in enumerate(order)
        ]
        assert texts(llm.generate(PROMPTS, GREEDY, lora_request=order)) == expected
    # In small chunks too, where one prompt's rows lie in several steps beside others'.
    tight = LLM.from_loaded(
        llm.loaded,
        EngineConfig(
            "builtin:books-7m",
            lora_modules=llm.config.lora_modules,
            max_num_batched_tokens=7,
        ),
    )
    assert texts(tight.generate(PROMPTS, GREEDY, lora_request=LoRARequest("all"))) == whole


@pytest.fixture(scope="module")
def quantized(folders: Path) -> LLM:
    packed = convert_model("builtin:books-7m", to="gguf", type="Q8_0", out=folders / "b.gguf")
    modules = {name: str(folders / name) for name in ("all", "some")}
    return LLM(str(packed), dtype="bfloat16", lora_modules=modules, enable_prefix_caching=False)


@pytest.mark.parametrize("count", [8, 32])
def test_greedy_text_of_an_adapter_is_the_same_in_any_company(quantized: LLM, count: int) -> None:
    """On packed linears in bfloat16, adapters and the base by turns."""
    words = "the sea was dark and cold when he came to her house by night with a lamp".split()
    asked = [" ".join(words[i % 9 : i % 9 + 2 + i % 7]) for i in range(count)]
    adapters = [LoRARequest("all", 1), LoRARequest("some", 2), None]
    order = [adapters[place % 3] for place in range(count)]
    together = texts(quantized.generate(asked, GREEDY, lora_request=order))
    for place in range(0, count, 3 if count == 8 else 7):
        found = quantized.generate(asked[place], GREEDY, lora_request=order[place])
        assert texts(found) == [together[place]]


def test_logprobs_are_those_of_merged_weights(llm: LLM, folders: Path) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    merged = LLM(str(folders / "merged-all"), dtype="float32")
    (found,) = llm.generate(PROMPTS[0], sampling, lora_request=LoRARequest("all"))
    (expected,) = merged.generate(PROMPTS[0], sampling)
    assert found.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    for one, other in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert one is not None
        assert other is not None
        for token, entry in one.items():
            assert entry.logprob == pytest.approx(other[token].logprob, abs=2e-4)


@pytest.mark.slow
def test_ranks_have_their_part_of_every_adapter(llm: LLM, folders: Path) -> None:
    """Two processes; one adapter is there at the start, the other comes with its request."""
    shared = LLM(
        "builtin:books-7m",
        dtype="float32",
        tensor_parallel_size=2,
        lora_modules={"all": str(folders / "all")},
        enable_lora=True,
    )
    try:
        given = [LoRARequest("all", 1), LoRARequest("some", 2, str(folders / "some")), None]
        known = [LoRARequest("all", 1), LoRARequest("some", 2), None]
        for turn in range(2):
            order = [(turn + place) % 3 for place in range(len(PROMPTS))]
            found = shared.generate(PROMPTS, GREEDY, lora_request=[given[n] for n in order])
            expected = llm.generate(PROMPTS, GREEDY, lora_request=[known[n] for n in order])
            assert texts(found) == texts(expected)
    finally:
        shared.close()


def test_a_model_on_two_devices_takes_adapters(llm: LLM) -> None:
    """A CPU stands for both."""
    found = find_model(
        "builtin:books-7m", dtype="float32", device="cpu", revision=None, budget=None
    )
    parts = (
        Stretch(range(3), torch.device("cpu")),
        Stretch(range(3, LAYERS), torch.device("cpu", 0)),
    )
    two = LLM.from_loaded(load_parts(found, parts, DEFAULT_RULES), llm.config)
    order = [LoRARequest("all", 1), LoRARequest("some", 2), None, LoRARequest("all", 1)]
    expected = texts(llm.generate(PROMPTS, GREEDY, lora_request=order))
    assert texts(two.generate(PROMPTS, GREEDY, lora_request=order)) == expected


def test_the_engine_tells_which_adapters_run_and_wait(folders: Path) -> None:
    modules = {name: str(folders / name) for name in ("all", "some")}
    llm = LLM("builtin:books-7m", dtype="float32", lora_modules=modules, max_num_seqs=1)
    seen = []

    def look() -> None:
        stats = llm.engine.stats()
        seen.append((stats.running_lora_adapters, stats.waiting_lora_adapters))

    for number, name in enumerate(("all", "some", None, "some")):
        lora = None if name is None else LoRARequest(name)
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        llm.engine.add(GenerationRequest(str(number), (1, 2, 3), sampling, lora=lora))
    look()
    while llm.engine.has_work:
        llm.engine.step()
        look()
    assert seen[0] == ((), ("all", "some"))
    assert seen[1] == (("all",), ("some",))
    assert (("some",), ()) in seen, "the last one runs alone"
    assert seen[-1] == ((), ())


def test_adapters_share_no_cache(llm: LLM) -> None:
    llm.engine.blocks.clear_cache()
    prompt = list(range(300, 400))
    for adapter in (None, LoRARequest("all"), LoRARequest("some")):
        (first,) = llm.generate(prompt, GREEDY, lora_request=adapter)
        assert first.num_cached_tokens == 0
        (again,) = llm.generate(prompt, GREEDY, lora_request=adapter)
        assert again.num_cached_tokens > 0
        assert again.outputs == first.outputs


def test_an_adapter_can_come_with_its_request(llm: LLM, folders: Path) -> None:
    dynamic = LLM.from_loaded(llm.loaded, EngineConfig("builtin:books-7m", enable_lora=True))
    lora = LoRARequest("late", 1, str(folders / "all"))
    expected = texts(llm.generate(PROMPTS, GREEDY, lora_request=LoRARequest("all")))
    assert texts(dynamic.generate(PROMPTS, GREEDY, lora_request=lora)) == expected
    known = LoRARequest("late")
    assert texts(dynamic.generate(PROMPTS, GREEDY, lora_request=known)) == expected
    with pytest.raises(UsageError, match="the adapter late is"):
        dynamic.generate("x", GREEDY, lora_request=LoRARequest("late", 1, str(folders / "some")))
    with pytest.raises(UnknownName, match="lat "):
        dynamic.generate("x", GREEDY, lora_request=LoRARequest("lat "))
    without = LLM.from_loaded(llm.loaded, EngineConfig("builtin:books-7m"))
    with pytest.raises(UsageError, match="started without adapters"):
        without.generate("x", GREEDY, lora_request=LoRARequest("all"))


def test_the_base_may_be_quantized(folders: Path, tmp_path: Path) -> None:
    packed = convert_model("builtin:books-7m", to="gguf", type="Q8_0", out=tmp_path / "b.gguf")
    unpacked = convert_model(str(packed), to="hf", out=tmp_path / "hf")
    merge(unpacked, folders / "all", tmp_path / "merged", scale=8 / 4)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    adapted = LLM(str(packed), dtype="float32", lora_modules={"all": str(folders / "all")})
    models = (adapted, LLM(str(tmp_path / "merged"), dtype="float32"))
    found, expected = (
        model.generate(PROMPTS[0], sampling, lora_request=lora)[0].prompt_logprobs
        for model, lora in zip(models, (LoRARequest("all"), None), strict=True)
    )
    assert found is not None
    assert expected is not None
    for token, one, other in zip(PROMPTS[0][1:], found[1:], expected[1:], strict=True):
        assert one is not None
        assert other is not None
        # The kernel rounds activations to 8 bits.
        assert one[token].logprob == pytest.approx(other[token].logprob, abs=0.15)


def test_rank_stabilized_scales_and_patterns_are_peft_s(books_7m: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "rs", books_7m, seed=3, config={"use_rslora": True})
    merge(books_7m, tmp_path / "rs", tmp_path / "merged", scale=8 / math.sqrt(4))
    expected = texts(LLM(str(tmp_path / "merged"), dtype="float32").generate(PROMPTS, GREEDY))
    rs = LLM("builtin:books-7m", dtype="float32", lora_modules=[f"rs={tmp_path / 'rs'}"])
    assert texts(rs.generate(PROMPTS, GREEDY, lora_request=LoRARequest("rs"))) == expected
    patterns = {"r": 64, "rank_pattern": {"q_proj|v_proj": 4}, "alpha_pattern": {"q_proj": 2}}
    modules = ("self_attn.q_proj", "self_attn.v_proj")
    write_adapter(tmp_path / "p", books_7m, seed=3, modules=modules, config=patterns)
    from qtool.runtime.engine.peft import read_adapter

    stored = load_file(tmp_path / "p" / "adapter_model.safetensors")
    for name, addition in read_adapter(tmp_path / "p").items():
        up = stored[f"base_model.model.{name}.lora_B.weight"]
        assert torch.allclose(addition.up, up * (2 if "q_proj" in name else 8) / 4)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"use_dora": True}, UnsupportedModel, "use_dora"),
        ({"peft_type": "IA3"}, UnsupportedModel, "peft_type"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, "modules_to_save"),
        ({"r": 5}, FormatError, "rank 4"),
        ({"lora_alpha": None}, FormatError, "alpha_pattern"),
    ],
)
def test_what_would_be_half_applied_is_refused(
    config: dict[str, Any],
    error: type[QtoolError],
    message: str,
    books_7m: Path,
    llm: LLM,
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path / "bad", books_7m, seed=4, config=config)
    assert llm.engine._adapters is not None
    with pytest.raises(error, match=message):
        llm.engine._adapters.load("bad", tmp_path / "bad")
    assert "bad" not in llm.engine._adapters.names


def test_adapters_of_other_models_are_refused(
    llm: LLM, books_7m: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    adapters = llm.engine._adapters
    assert adapters is not None
    with pytest.raises(UsageError, match=r"has no adapter_config\.json"):
        adapters.load("none", tmp_path)
    folder = write_adapter(tmp_path / "wide", books_7m, seed=5, modules=("mlp.down_proj",))
    path = folder / "adapter_model.safetensors"
    wide = {n: torch.cat((t, t)) if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(wide, path)
    with pytest.raises(UsageError, match=r"made for another model.*\[512, 768\] there"):
        adapters.load("wide", folder)
    renamed = {n.replace("mlp.down_proj", "mlp.other"): t for n, t in wide.items()}
    save_file(renamed, path)
    with pytest.raises(UnsupportedModel, match=r"changes model\.layers\.0\.mlp\.other"):
        adapters.load("other", folder)
    path.write_bytes(b"junk")
    with pytest.raises(FormatError, match="cannot be read"):
        adapters.load("junk", folder)
    with pytest.raises(UnsupportedModel, match="transformers' code"):
        LLM(str(tiny_checkpoint("gpt2")), enable_lora=True)


def test_modules_are_read_in_every_form() -> None:
    pairs = (("a", "x"), ("b", "y=z"))
    for value in ({"a": "x", "b": "y=z"}, ["a=x", "b=y=z"], [("a", "x"), ("b", "y=z")]):
        assert EngineConfig("m", lora_modules=value).lora_modules == pairs  # type: ignore[arg-type]
    as_json = ['{"name": "a", "path": "x", "base_model_name": "m"}', "b=y=z"]
    assert EngineConfig("m", lora_modules=as_json).lora_modules == pairs  # type: ignore[arg-type]
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"], ['{"name": "a"}'], ["{"], [5]):
        with pytest.raises(UsageError, match="lora_modules"):
            EngineConfig("m", lora_modules=wrong)  # type: ignore[arg-type]
