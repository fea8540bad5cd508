"""Carrying a conversion out: tensor by tensor, then read back and compared, then named.

Memory is a layer and an output shard. The output is built in a hidden sibling folder, opened again
as any reader would open it, and every weight compared with the source's; only then does it take its
name. Codes and zeros must be equal. Scales may have been rounded where the target's type is
narrower (fp16 to bfloat16), by no more than that type's rounding, and by how much is reported. What
was rounded a second time must read back as it was rounded, and how far that is from the source is
reported too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.artifact import MANIFEST_NAME, Manifest, write_manifest
from qtool.convert.fidelity import DENSE_TARGET, GGUF_TARGET
from qtool.convert.formats import FORMATS, WeightReader, open_weights
from qtool.convert.gguf.blocks.legacy import unpack_q8_0
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf.vocab import tokenizer_from_gguf
from qtool.convert.gguf_plan import plan_gguf
from qtool.convert.gguf_run import check_gguf_out, default_gguf_out, write_gguf_files
from qtool.convert.huggingface import GPTQ_CONFIG_NAME
from qtool.convert.outcome import MAX_SCALE_ERROR, TINY, Outcome
from qtool.convert.plan import (
    PACKING,
    ConversionPlan,
    Step,
    check_requantize,
    check_target,
    plan_conversion,
)
from qtool.errors import QtoolError, UsageError, VerificationFailed
from qtool.json_files import write_json
from qtool.output import OutputFolder, copy_side_files
from qtool.progress import track
from qtool.quantize import rtn
from qtool.shards import ShardWriter
from qtool.source import Source, resolve
from qtool.weights import BlockWeight, QuantizedWeight

# The special tokens that a Hugging Face tokenizer names.
HF_SPECIAL = {"bos", "eos", "unk", "sep", "pad", "mask"}


def convert_model(
    source: str | Source,
    *,
    to: str,
    type: str | None = None,
    out: Path | str | None = None,
    force: bool = False,
    requantize: bool = False,
    gguf: GgufOptions | None = None,
) -> Path:
    """Convert a model; returns what was written: a folder, a .gguf file or the first of several.

    source      a folder, a .gguf file, a Hub id or builtin:NAME
    to          gguf, marlin, gptq, awq, compressed-tensors or hf
    type        a GGUF type (Q4_K_M, ...), or a dtype with hf
    out         "<model>-<to>" in the current folder where None
    requantize  round a second time what the target cannot hold as it is
    gguf        all that an export to GGUF can be told beside its type
    """
    check_target(to)
    check_requantize(to, requantize)
    if isinstance(source, str):
        source = resolve(source)
    path = None if out is None else Path(out)
    if to == GGUF_TARGET:
        if path is not None:
            check_gguf_out(source, path)
        export = plan_gguf(open_weights(source), type, gguf or GgufOptions())
        path = path or default_gguf_out(source, export.file_type)
        return write_gguf_files(export, path, force=force).out
    if gguf is not None:
        raise UsageError(f"options for GGUF were given, and the target is {to}")
    path = path or default_out(source, to)
    check_out(source, path, force=force)
    reader = open_weights(source)
    plan = plan_conversion(reader, target=to, type=type, requantize=requantize)
    return write_checkpoint(reader, plan, path, force=force).out


def default_out(source: Source, suffix: str) -> Path:
    return Path(f"{source.short_name}-{suffix}")


def check_out(source: Source, out: Path, *, force: bool = False) -> None:
    """Refuse a folder that could not be made."""
    if out.resolve() == source.path.resolve():
        raise UsageError(f"{out} is the source itself", "name another --out")
    OutputFolder(out, force=force)  # refuses what it could not replace


def write_checkpoint(
    reader: WeightReader, plan: ConversionPlan, out: Path, *, force: bool = False
) -> Outcome:
    """Write, read back, compare, name."""
    check_out(reader.source, out, force=force)
    again: dict[str, _Again] = {}
    with OutputFolder(out, force=force, needed_bytes=plan.nbytes) as stage:
        shards = ShardWriter(stage.path)
        for step in track(plan.steps, f"writing {out.name}"):
            for name, tensor in _tensors(reader, plan, step, again).items():
                _require_finite(name, tensor)
                shards.add(name, tensor)
        shards.finish()
        write_json(stage.path / "config.json", _config(reader, plan))
        if plan.target == "gptq":
            # Where older readers of the format look.
            write_json(stage.path / GPTQ_CONFIG_NAME, plan.quantization_config or {})
        _write_side_files(reader, stage.path)
        outcome = _compare(reader, plan, stage.path, out, again)
        write_manifest(stage.path, _manifest(reader, plan, outcome))
    return outcome


class _Again(NamedTuple):
    """A linear that was rounded a second time: what it decodes to, and how far from the source."""

    digest: str
    error: float


def _tensors(
    reader: WeightReader, plan: ConversionPlan, step: Step, again: dict[str, _Again]
) -> dict[str, Tensor]:
    """The tensors that a step puts in the output, by full name; notes in `again` what it rounds."""
    if step.action in PACKING:
        if step.action == "requantize":
            weight, again[step.name] = _round_again(reader, step)
        else:
            weight = _integer_weight(reader, step)
        packed = FORMATS[plan.target].pack(weight, plan.dtype)
        return {f"{step.name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return {_dense_name(step): _dense_tensor(reader, plan, step)}


def _dense_name(step: Step) -> str:
    return f"{step.name}.weight" if step.action == "dequantize" else step.name


def _dense_tensor(reader: WeightReader, plan: ConversionPlan, step: Step) -> Tensor:
    if step.action == "dequantize":
        return reader.weight(step.name).dequantize(plan.dtype)
    tensor = reader.tensor(step.name)
    return tensor.to(plan.dtype) if step.action == "cast" else tensor


def _round_again(reader: WeightReader, step: Step) -> tuple[QuantizedWeight, _Again]:
    """To nearest, on the grid that a search finds: the best there is without calibration."""
    values = reader.weight(step.name).dequantize()
    _require_finite(step.name, values)
    assert step.scheme is not None, step
    solved = rtn.solve(values, step.scheme, scale_search=True)
    error = (solved.dequantized - values).norm() / values.norm().clamp(min=TINY)
    assert isinstance(solved.weight, QuantizedWeight), type(solved.weight)
    return solved.weight, _Again(_digest(solved.dequantized), float(error))


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _integer_weight(reader: WeightReader, step: Step) -> QuantizedWeight:
    """A weight whose codes are kept, as wide as the step writes them."""
    weight = reader.weight(step.name)
    if isinstance(weight, BlockWeight) and weight.codec.name == "Q8_0":
        weight = unpack_q8_0(weight)
    assert isinstance(weight, QuantizedWeight), (step, type(weight))
    assert step.scheme is not None, step
    return weight.widened(step.scheme.bits)


def _require_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise QtoolError(
            f"{name} would be written with NaN or infinite values as {tensor.dtype}",
            "the source holds them already, or its values exceed that type; try --type bf16 or f32",
        )


def _config(reader: WeightReader, plan: ConversionPlan) -> dict[str, Any]:
    config = dict(reader.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.quantization_config is not None:
        config["quantization_config"] = plan.quantization_config
    return config


def _write_side_files(reader: WeightReader, folder: Path) -> None:
    """The tokenizer and what else stands beside the weights; rebuilt where the source is GGUF."""
    if not isinstance(reader, GgufWeights):
        copy_side_files(reader.source.path, folder)
        return
    found = tokenizer_from_gguf(reader.metadata)
    found.tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": found.token(name) for name in HF_SPECIAL & {*found.special_ids}}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if found.chat_template is not None:
        settings["chat_template"] = found.chat_template
    write_json(folder / "tokenizer_config.json", settings)


def _compare(
    reader: WeightReader,
    plan: ConversionPlan,
    folder: Path,
    out: Path,
    again: dict[str, _Again],
) -> Outcome:
    """Open what was written and compare every step with the source."""
    written = open_weights(Source(str(out), folder))
    errors = []
    for step in track(plan.steps, f"checking {out.name}"):
        if step.action == "repack":
            meant, found = _integer_weight(reader, step), _integer_weight(written, step)
            errors.append(_scale_error(step.name, meant, found))
        elif step.action == "requantize":
            if _digest(written.weight(step.name).dequantize()) != again[step.name].digest:
                raise VerificationFailed(f"{step.name} reads back other than it was written")
        else:
            name = _dense_name(step)
            if not torch.equal(written.tensor(name), _dense_tensor(reader, plan, step)):
                raise VerificationFailed(f"{name} reads back other than it was written")
    return Outcome(
        out=out,
        exact_layers=errors.count(0.0),
        rounded_layers=len(errors) - errors.count(0.0),
        max_scale_error=max(errors, default=0.0),
        nbytes=sum(file.stat().st_size for file in folder.iterdir()),
        again_layers=len(again),
        max_again_error=max((rounded.error for rounded in again.values()), default=0.0),
    )


def _scale_error(module: str, meant: QuantizedWeight, found: QuantizedWeight) -> float:
    """The largest relative change of a scale; raises where anything else differs."""
    if not torch.equal(meant.codes, found.codes) or not torch.equal(_zeros(meant), _zeros(found)):
        raise VerificationFailed(f"{module}: the codes read back differ from the source's")
    scales, others = meant.scales.double(), found.scales.double()
    change = ((scales - others).abs() / scales.abs().clamp(min=TINY)).max().item()
    if change > MAX_SCALE_ERROR:
        raise VerificationFailed(
            f"{module}: a scale changes by {change:.1%} in the target's type",
            "its scales are too small or too large for it; compressed-tensors keeps them",
        )
    return float(change)


def _zeros(weight: QuantizedWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, weight.scheme.midpoint, dtype=torch.uint8)


def _manifest(reader: WeightReader, plan: ConversionPlan, outcome: Outcome) -> Manifest:
    """Where it comes from; the recipe and errors of a quantized source stay with it."""
    source = reader.source
    origin = _source_manifest(source)
    warnings = () if origin is None else tuple(origin.warnings)
    if outcome.rounded_layers:
        warnings += (
            f"scales of {outcome.rounded_layers} layers rounded to fit, "
            f"by at most {outcome.max_scale_error:.2g} of a scale",
        )
    warnings += plan.warnings
    return Manifest(
        format="dense" if plan.target == DENSE_TARGET else plan.target,
        source=source.name,
        source_revision=source.revision,
        recipe=None if origin is None else origin.recipe,
        calibration=None if origin is None else origin.calibration,
        layers=() if origin is None else origin.layers,
        unquantized={**({} if origin is None else origin.unquantized), **plan.left_dense},
        warnings=warnings,
    )


def _source_manifest(source: Source) -> Manifest | None:
    if source.is_gguf or not (source.path / MANIFEST_NAME).is_file():
        return None
    return Manifest.load(source.path)
