import pytest

from qtool.arch import ARCHITECTURES, find_architecture, find_family
from qtool.errors import UnsupportedModel


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match="'qwen4'") as error:
        find_architecture({"model_type": "qwen4"})
    assert error.value.hint is not None
    assert all(name in error.value.hint for name in ("llama", "qwen3", "deepseek_v3"))


def test_a_family_that_is_only_converted_is_not_run() -> None:
    phi = {"model_type": "phi"}
    assert find_family(phi).gguf_name == "phi2"
    with pytest.raises(UnsupportedModel, match="'phi' is not one that the native decoder runs"):
        find_architecture(phi)


def test_a_multimodal_model_is_said_to_be_one() -> None:
    with pytest.raises(
        UnsupportedModel, match="multimodal: its text part is 'gemma3_text'"
    ) as error:
        find_family({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    assert "gemma3_text" in str(error.value.hint)


def test_every_row_names_its_roles() -> None:
    for architecture in ARCHITECTURES.values():
        assert architecture.gguf_tensor("embed") == "token_embd"
        assert architecture.gguf_tensor("o", 3) == "blk.3.attn_output"
        assert len(set(architecture.tensors.values())) == len(architecture.tensors)
        used = {role for s in architecture.smoothing for role in (s.source, *s.targets)}
        used |= {*architecture.transposed}
        assert used <= set(architecture.tensors)
