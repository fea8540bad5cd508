"""README.md of an artifact: what it was made from and how, what was lost, and how to load it.

The front matter has the Hub's words (https://huggingface.co/docs/hub/model-cards): `base_model`
with the relation `quantized` lists the artifact on its original's page. Licence and language are
those of the source's own card, as a quantized copy changes neither. Every number is one of the
run's; times and memory are left to qtool.json, so that the same run gives the same card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from qtool.artifact import CARD_NAME, Manifest
from qtool.calibration.auto_class import auto_class_name
from qtool.json_files import read_json
from qtool.quantize.layouts import bits_per_weight
from qtool.quantize.plan import Plan
from qtool.quantize.summary import KIND_COLUMNS, grouped_reasons, lost_by_kind, shortened
from qtool.units import size_text

CONFIG_NAME = "config.json"
# What a copy in fewer bits takes over from the card of its source.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")

# What transformers needs beside itself to read a format.
_TRANSFORMERS_NEEDS = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
}


class Sizes(NamedTuple):
    """source_bytes  of the source's tensors
    file_bytes    of the artifact's weight files
    bits          stored bits a quantized weight on average, scales included
    """

    source_bytes: int
    file_bytes: int
    bits: float


def sizes(plan: Plan, artifact: Path) -> Sizes:
    """Of a plan and the folder that was written by it."""
    weights = {linear: linear.out_features * linear.in_features for linear in plan.quantized}
    stored = sum(
        count * bits_per_weight(plan.quantized[linear], linear.out_features, linear.in_features)
        for linear, count in weights.items()
    )
    file_bytes = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    return Sizes(plan.source_bytes, file_bytes, stored / sum(weights.values()))


def source_facts(folder: Path) -> dict[str, Any]:
    """What is taken over from the front matter of a folder's card; nothing where there is none, or
    none that can be read.
    """
    try:
        lines = (folder / CARD_NAME).read_text(encoding="utf-8").splitlines()
        if not lines or lines[0].rstrip() != "---":
            return {}
        end = next(i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
        facts = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, UnicodeDecodeError, StopIteration, yaml.YAMLError):
        return {}
    if not isinstance(facts, Mapping):
        return {}
    return {key: facts[key] for key in _INHERITED if facts.get(key)}


def write_card(artifact: Path, manifest: Manifest, plan: Plan, source: Path, name: str) -> None:
    """Put the card into the folder of an artifact that has everything but its manifest."""
    text = model_card(
        manifest,
        name=name,
        found=sizes(plan, artifact),
        inherited=source_facts(source),
        loader=auto_class_name(read_json(artifact / CONFIG_NAME)),
    )
    (artifact / CARD_NAME).write_text(text, encoding="utf-8")


def model_card(
    manifest: Manifest,
    *,
    name: str,
    found: Sizes,
    inherited: Mapping[str, Any],
    loader: str = "AutoModelForCausalLM",
) -> str:
    """The card as Markdown.

    name       by which loaders are shown the artifact: a repository on the Hub, or a folder
    inherited  from the source's card, as `source_facts` has it
    loader     transformers' class that loads the artifact
    """
    parts = [
        _front_matter(manifest, inherited),
        f"# {PurePath(name).name}",
        _summary(manifest, found),
        _loading(manifest, name, loader),
        _measured(manifest, found),
        _making(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Manifest, inherited: Mapping[str, Any]) -> str:
    recipe = manifest.recipe or {}
    facts: dict[str, Any] = {}
    if _from_hub(manifest):
        facts |= {"base_model": manifest.source, "base_model_relation": "quantized"}
    facts |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    facts |= dict(inherited)
    tags = ["qtool", manifest.format, str(recipe.get("name", ""))]
    facts["tags"] = [tag for tag in dict.fromkeys(tags) if tag]
    return f"---\n{_yaml(facts)}---"


def _from_hub(manifest: Manifest) -> bool:
    """A folder of this machine is no one's `base_model`: only what the Hub gave has a commit."""
    return manifest.source_revision is not None


def _source(manifest: Manifest) -> str:
    if _from_hub(manifest):
        commit = manifest.source_revision or ""
        page = f"https://huggingface.co/{manifest.source}"
        return f"[{manifest.source}]({page}) at commit `{commit[:12]}`"
    # A path of the machine it was made on says nothing to a reader.
    return f"`{PurePath(manifest.source).name}`"


def _summary(manifest: Manifest, found: Sizes) -> str:
    schemes: dict[str, int] = {}
    for layer in manifest.layers:
        schemes[str(layer.scheme)] = schemes.get(str(layer.scheme), 0) + 1
    kinds = ", ".join(f"{count} linears as {scheme}" for scheme, count in schemes.items())
    version = manifest.versions.get("qtool", "")
    return (
        f"{_source(manifest)}, quantized by qtool {version}: {kinds}, in the format "
        f"{manifest.format}. {size_text(found.file_bytes)} instead of "
        f"{size_text(found.source_bytes)}; the quantized weights take {found.bits:.3f} bits each, "
        "scales included."
    )


def _loading(manifest: Manifest, name: str, loader: str) -> str:
    needs = _TRANSFORMERS_NEEDS.get(manifest.format)
    shown = _own_loader(name) if needs is None else _loaders(name, needs, loader)
    lines = ["## Load it", "", *shown]
    if manifest.warnings:
        lines += ["", "Said when it was made:", "", *(f"- {text}" for text in manifest.warnings)]
    return "\n".join(lines)


def _own_loader(name: str) -> list[str]:
    return [
        "With qtool, which alone reads this format; the second command makes a 16-bit model of it "
        "that every loader takes:",
        "",
        "```sh",
        f"qtool serve {name}",
        f"qtool convert {name} --to hf",
        "```",
    ]


def _loaders(name: str, needs: str, loader: str) -> list[str]:
    return [
        f"With transformers, after `pip install transformers {needs}`:",
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        "With vLLM, or with qtool:",
        "",
        "```sh",
        f"vllm serve {name}",
        f"qtool serve {name}",
        "```",
    ]


def _measured(manifest: Manifest, found: Sizes) -> str:
    calibrated = manifest.calibration is not None
    lines = [
        "## What was lost",
        "",
        "The share of each layer's output power that is lost, "
        + ("on the calibration data" if calibrated else "for inputs of equal power")
        + ", beside plain rounding to the same scheme; means over the layers.",
        "",
        f"| {' | '.join(KIND_COLUMNS)} |",
        f"|{'|'.join('---' for _ in KIND_COLUMNS)}|",
        *(f"| {' | '.join(row)} |" for row in lost_by_kind(manifest.layers)),
        "",
        f"| | this model | {PurePath(manifest.source).name} |",
        "|---|---|---|",
        f"| weight files | {size_text(found.file_bytes)} | {size_text(found.source_bytes)} |",
        f"| bits a quantized weight | {found.bits:.3f} | |",
    ]
    notes: dict[str, int] = {}
    for note in (note for layer in manifest.layers for note in layer.remarks):
        notes[note] = notes.get(note, 0) + 1
    if notes:
        lines += ["", *(f"- {count} layers: {note}" for note, count in notes.items())]
    if manifest.unquantized:
        lines += ["", "Left as they were:", ""]
        for reason, names in grouped_reasons(manifest.unquantized, ()).items():
            lines.append(f"- `{shortened(names)}`: {reason}")
    lines += ["", "`qtool.json` has these numbers for every layer, and a checksum of every file."]
    return "\n".join(lines)


def _making(manifest: Manifest) -> str:
    lines = ["## How it was made", "", *_calibration(manifest)]
    if manifest.recipe is not None:
        lines += ["The recipe, as `qtool quantize --recipe FILE.yaml` reads it:", ""]
        lines += [f"```yaml\n{_yaml(_recipe_file(manifest.recipe))}```", ""]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines.append(f"Versions: {versions}.")
    return "\n".join(lines)


def _calibration(manifest: Manifest) -> list[str]:
    data = manifest.calibration
    if data is None:
        return ["No calibration data was used.", ""]
    shipped = data["dataset"] == "builtin"
    dataset = "the text that ships with qtool" if shipped else f"`{_public_name(data['dataset'])}`"
    return [
        f"Calibration: {data['num_samples']} samples of {data['sequence_length']} tokens from "
        f"{dataset}, seed {data['seed']}; sha256 of the tokens `{data['sha256']}`.",
        "",
    ]


def _public_name(dataset: str) -> str:
    """Without the folders of the machine where it was made."""
    is_file = PurePath(dataset).suffix in (".txt", ".jsonl", ".parquet")
    return PurePath(dataset).name if is_file else dataset


def _recipe_file(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's facts under the keys of a recipe file, whose name is the recipe's."""
    facts = json.loads(json.dumps(recipe))  # lists in place of tuples, which YAML has not
    name, calibration = facts.pop("name"), facts["calibration"]
    dataset = calibration.pop("dataset")
    if dataset is not None:  # a recipe file leaves the shipped text out
        calibration["dataset"] = _public_name(dataset)
    return {"description": f"The recipe {name} as it was run.", **facts}


def _yaml(facts: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)
    return text
