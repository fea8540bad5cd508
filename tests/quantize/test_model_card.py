"""The card of an artifact: its words for the Hub, its numbers, what it takes from its source."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.artifact import LayerReport, Manifest, verify_checksums
from qtool.checkpoint import Checkpoint
from qtool.cli import main
from qtool.quantize.model_card import Sizes, model_card, source_facts
from qtool.quantize.pipeline import quantize_model
from qtool.recipe import load_recipe, parse_recipe
from qtool.source import Source

SIZES = Sizes(source_bytes=15_000_000, file_bytes=5_000_000, bits=4.125)


def manifest(**given: Any) -> Manifest:
    layers = (
        LayerReport("m.0.up", "int4-g128-sym", "gptq", error=0.01, rtn_error=0.02, notes=("odd",)),
        LayerReport("m.1.up", "int4-g128-sym", "gptq", error=0.03, rtn_error=0.06),
    )
    facts: dict[str, Any] = {
        "format": "compressed-tensors",
        "source": "some/model",
        "source_revision": "0123456789abcdef",
        "recipe": load_recipe("int4").to_dict(),
        "layers": layers,
        "unquantized": {"lm_head": "outside the decoder blocks"},
        "warnings": ("few samples",),
        "versions": {"qtool": "9.9"},
    }
    return Manifest(**{**facts, **given})


def front_matter(card: str) -> dict[str, Any]:
    facts = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(facts, dict)
    return facts


def test_the_card_has_the_hubs_words_and_the_means_of_the_layers() -> None:
    card = model_card(manifest(), name="me/model-int4", found=SIZES, inherited={"license": "mit"})
    assert front_matter(card) == {
        "base_model": "some/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["qtool", "compressed-tensors", "int4"],
    }
    for text in (
        "# model-int4\n",
        "2 linears as int4-g128-sym",
        "| 2 x up | int4-g128-sym | gptq | 2.000 % | 4.000 % | 0.50 |",
        "| weight files | 5 MB | 15 MB |",
        "4.125",
        "- 1 layers: odd",
        "- few samples",
        "- `lm_head`: outside the decoder blocks",
        'from_pretrained("me/model-int4")',
        "vllm serve me/model-int4\nqtool serve me/model-int4\n",
        "No calibration data was used.",
    ):
        assert text in card


def test_the_hubs_own_reader_accepts_the_front_matter() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(manifest(), name="x", found=SIZES, inherited={}))
    assert card.data.base_model == "some/model"
    assert card.data.library_name == "transformers"


def test_folders_of_this_machine_are_not_published() -> None:
    local = manifest(
        source="/home/me/secret/model",
        source_revision=None,
        recipe=load_recipe("int4").with_options(dataset="/home/me/secret/a.jsonl").to_dict(),
        calibration={
            "dataset": "/home/me/secret/a.jsonl",
            "num_samples": 4,
            "sequence_length": 32,
            "seed": 0,
            "sha256": "abc",
        },
    )
    card = model_card(local, name="x", found=SIZES, inherited={})
    assert "base_model" not in front_matter(card)
    assert "secret" not in card
    assert "4 samples of 32 tokens from `a.jsonl`, seed 0" in card


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("---\nlicense: other\nlicense_name: x\nbase_model: y\n---\n# Hi", ("other", "x")),
        ("# No front matter\n---\nlicense: mit\n---\n", ()),
        ("---\nlicense: mit\n", ()),
        ("---\n: [\n---\n", ()),
        ("---\n- a list\n---\n", ()),
        ("", ()),
    ],
)
def test_only_what_a_copy_may_inherit_is_taken(
    text: str, facts: tuple[str, ...], tmp_path: Path
) -> None:
    assert source_facts(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert source_facts(tmp_path) == dict(zip(("license", "license_name"), facts, strict=False))


@pytest.mark.parametrize("recipe", ["rtn-int8", "nf4", "int4"])
def test_an_artifact_has_a_card_that_its_checksums_cover(
    recipe: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "tiny"
    shutil.copytree(tiny_checkpoint("llama"), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\nThe original.")
    few = load_recipe(recipe).with_options(num_samples=4, sequence_length=32)
    made = quantize_model(str(source), few, out=tmp_path / "out")
    assert "README.md" in made.files
    assert verify_checksums(tmp_path / "out") == made
    main(["verify", str(tmp_path / "out")])  # exits where it fails
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    facts = front_matter(card)
    assert (facts["license"], facts["language"]) == ("apache-2.0", "en")
    assert "base_model" not in facts
    assert f"# tiny-{recipe}\n" in card
    assert "The original." not in card


def test_the_cards_recipe_can_be_run_again(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    few = load_recipe("awq").with_options(num_samples=4, sequence_length=32, keep=("*.v_proj",))
    quantize_model(str(tiny_checkpoint("llama")), few, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```yaml\n(.*?)```", card, re.S)
    assert found is not None
    assert parse_recipe(found[1], Path("awq.yaml")).to_dict() == few.to_dict()


def test_the_bits_of_the_card_are_those_of_the_file(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Counted from the tensors that were written, by shape and type."""
    out = tmp_path / "out"
    made = quantize_model(str(tiny_checkpoint("llama", dtype="bfloat16")), "rtn-int4", out=out)
    written = Checkpoint.open(out)
    source = Checkpoint.open(Source("s", tiny_checkpoint("llama", dtype="bfloat16")).path)
    bits = weights = 0
    for layer in made.layers:
        weights += source.tensors[f"{layer.module}.weight"].nbytes // 2
        for suffix in ("weight_packed", "weight_scale"):
            bits += 8 * written.tensors[f"{layer.module}.{suffix}"].nbytes
    assert (
        f"| bits a quantized weight | {bits / weights:.3f} | |" in (out / "README.md").read_text()
    )
