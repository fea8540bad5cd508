"""A request, understood: names resolved, the structure read, the plan made, nothing done yet."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from qtool.calibration.dataset import CalibrationTokens, load_calibration, load_tokenizer
from qtool.calibration.decoded import DecodedExperts, open_checkpoint
from qtool.calibration.skeleton import Skeleton
from qtool.convert.formats import Format
from qtool.errors import UnknownName, UnsupportedModel, UsageError
from qtool.quantize.allocate import Target, mixed_plan
from qtool.quantize.devices import ON_CPU, DeviceRequest, Placed, accelerators, choose, place
from qtool.quantize.layouts import layout_for
from qtool.quantize.plan import Plan, make_plan
from qtool.quantize.rotated import UNTIED, rotated, unties
from qtool.recipe import Recipe, load_recipe
from qtool.source import Source, resolve

# Marlin is a layout for serving, made from any of these by `qtool convert`.
WRITABLE_FORMATS = ("compressed-tensors", "gptq", "awq")


@dataclass(frozen=True, slots=True)
class Job:
    """A request, understood: the model's structure, and what will be done to it.

    strict  whether a fallback of the numerics is an error
    placed  what of it lies on which device
    """

    source: Source
    recipe: Recipe
    layout: Format
    skeleton: Skeleton
    plan: Plan
    trust_remote_code: bool
    warnings: tuple[str, ...]
    strict: bool = False
    placed: Placed = ON_CPU

    @property
    def num_blocks(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def default_out(self) -> Path:
        return Path(f"{self.source.short_name}-{self.recipe.name}")

    def calibration_tokens(self) -> CalibrationTokens:
        return _tokens(self.source, self.recipe, self.skeleton, self.trust_remote_code)


def prepare(
    model: str | Source,
    recipe: str | Recipe = "int4",
    *,
    format: str = "compressed-tensors",
    revision: str | None = None,
    trust_remote_code: bool = False,
    target: Target | None = None,
    strict: bool = False,
    devices: DeviceRequest | None = None,
) -> Job:
    """Resolve every name and make the plan; nothing is written.

    devices  where to work [a CUDA device where there is one]
    """
    if format not in WRITABLE_FORMATS:
        hint = "Marlin is made by `qtool convert --to marlin`" if format == "marlin" else None
        error = UnknownName("format", format, WRITABLE_FORMATS)
        error.hint = hint or error.hint
        raise error
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    devices = devices or DeviceRequest()
    rooms = choose(devices, accelerators() if devices.name != "cpu" else [])
    source = resolve(model, revision) if isinstance(model, str) else model
    if source.is_gguf:
        raise UnsupportedModel(
            f"{source.name} is a GGUF file, which is already quantized or converted",
            "quantize the Hugging Face model that it was made from",
        )
    checkpoint = open_checkpoint(source)
    warnings: list[str] = []
    if isinstance(checkpoint, DecodedExperts):
        warnings.append(checkpoint.growth)
    if recipe.rotations:
        checkpoint = rotated(checkpoint, recipe.rotations, recipe.rotation_seed)
        if unties(checkpoint):
            warnings.append(UNTIED)
    skeleton = Skeleton.build(checkpoint, trust_remote_code=trust_remote_code)
    if recipe.needs_calibration:
        recipe = _within_context(recipe, skeleton, warnings)
    layout = layout_for(recipe, format)
    plan = make_plan(skeleton, recipe, layout)
    placed = place(skeleton, plan, recipe, devices, rooms)
    skeleton.placement = placed.placement
    if target is not None:
        plan = _mixed(source, recipe, skeleton, plan, layout, target, trust_remote_code)
    return Job(
        source=source,
        recipe=recipe,
        layout=layout,
        skeleton=skeleton,
        plan=plan,
        trust_remote_code=trust_remote_code,
        warnings=(*warnings, *plan.warnings, *placed.warnings),
        strict=strict,
        placed=placed,
    )


def _mixed(
    source: Source,
    recipe: Recipe,
    skeleton: Skeleton,
    plan: Plan,
    layout: Format,
    target: Target,
    trust_remote_code: bool,
) -> Plan:
    """The plan with widths chosen on the calibration data, which is run once through the model."""
    if layout.single_scheme or recipe.float_scheme is not None:
        raise UsageError(
            f"recipe {recipe.name} as {layout.name} holds one width for all layers",
            "mixed widths are written as compressed-tensors, of recipes with integer weights",
        )
    tokens = _tokens(source, recipe, skeleton, trust_remote_code)
    return mixed_plan(skeleton, plan, target, tokens.tokens)


def _within_context(recipe: Recipe, skeleton: Skeleton, warnings: list[str]) -> Recipe:
    """Calibration sequences no longer than the model was trained for."""
    context = getattr(skeleton.model.config, "max_position_embeddings", None)
    length = recipe.calibration.sequence_length
    if not isinstance(context, int) or length <= context:
        return recipe
    warnings.append(f"calibration sequences cut from {length} to the model's context of {context}")
    calibration = dataclasses.replace(recipe.calibration, sequence_length=context)
    return dataclasses.replace(recipe, calibration=calibration)


def _tokens(
    source: Source, recipe: Recipe, skeleton: Skeleton, trust_remote_code: bool
) -> CalibrationTokens:
    tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
    vocab_size = skeleton.model.get_input_embeddings().weight.shape[0]
    return load_calibration(recipe.calibration, tokenizer, vocab_size=vocab_size)
