"""Read back what was written and compare it with what was meant, before success is reported.

- Every tensor is finite.
- Every packed linear, decoded from the final files, has the very bits that its solver meant: by
  compressed-tensors' own decompressor for its format, by this project's reader for the others.
- Where the model is small enough, it is loaded by transformers from the folder, and its logits
  agree with those of the original's code run block by block on the decoded weights.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.auto_class import auto_class
from qtool.calibration.linears import Linear
from qtool.calibration.placement import Placement
from qtool.calibration.runner import BlockRunner
from qtool.calibration.skeleton import Skeleton, assign
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import FORMATS, Format, open_weights
from qtool.errors import VerificationFailed
from qtool.progress import bar
from qtool.quantize.journal import digest
from qtool.quantize.layouts import Scheme, compressed_format, quantizes_activations
from qtool.quantize.plan import Plan
from qtool.scheme import QuantScheme
from qtool.source import Source

# A reload holds every weight in float32 and, while it decompresses, some of them twice.
RELOAD_LIMIT_BYTES = 4_000_000_000
# Of the largest logit. Both sides are float32; sums are taken in another order.
_LOGIT_TOLERANCE = 1e-3
# Where transformers decodes a layer to the type of its scales, bfloat16, before it is asked for
# float32: 1.4e-3 was seen for 8-bit floats.
_ROUNDED_LOGIT_TOLERANCE = 1e-2

NEEDS_DEQUANTIZE = (
    "transformers runs this model's packed layers only when it is loaded with "
    "quantization_config=CompressedTensorsConfig(dequantize=True)"
)


@dataclass(frozen=True, slots=True)
class Verification:
    """decoded       linears whose bits were compared
    logit_error   largest difference over the largest logit, None where there was no reload
    notes         what was not checked, and why
    """

    decoded: int
    logit_error: float | None
    notes: tuple[str, ...]


def verify(
    artifact: Source,
    skeleton: Skeleton,
    plan: Plan,
    layout: Format,
    *,
    digests: Mapping[str, str],
    changed: Sequence[str],
    sample: Tensor | None,
    trust_remote_code: bool,
) -> Verification:
    """Raises VerificationFailed that names what differs. All is done on the CPU, wherever the work
    was, and the skeleton stays there.

    digests  linear -> sha256 of the weight the solver meant
    changed  tensors of the source that the artifact holds with new values
    sample   [sequences, length] int64 for the logits; None for arbitrary tokens
    """
    written = Checkpoint.open(artifact.path)
    skeleton.placement = Placement()
    reload, reason = _reload_decision(skeleton, plan, layout)
    runner = None
    if reload:
        skeleton.load_outside()
        reload = skeleton.can_finish
    if reload:
        runner = BlockRunner(skeleton, _sample(skeleton) if sample is None else sample)
    hidden: Tensor | None = None
    with bar("Verifying", len(skeleton.blocks) + 1) as progress:
        _check_finite(written)
        progress.advance()
        for index in range(len(skeleton.blocks)):
            decoded = {
                linear: _decode(written, artifact, linear, plan.quantized[linear], layout)
                for linear in plan.block(index)
            }
            for linear, values in decoded.items():
                if digest(values) != digests[linear.name]:
                    raise VerificationFailed(
                        f"{linear.name} decodes to other values than were solved",
                        "this is a fault of qtool or of the disk; please report it",
                    )
            if runner is not None:
                hidden = _run_block(skeleton, runner, index, hidden, decoded, written, changed)
            progress.advance()
    if runner is None or hidden is None:
        return Verification(len(digests), None, (reason,) if reason else ())
    logits = runner.finish(0, hidden)
    error, notes = _compare_reload(
        artifact,
        logits,
        runner.tokens(0),
        trust_remote_code,
        weights_only=quantizes_activations(layout),
    )
    return Verification(len(digests), error, notes)


def _reload_decision(skeleton: Skeleton, plan: Plan, layout: Format) -> tuple[bool, str]:
    if layout.name != "compressed-tensors":
        return False, ""
    if any(linear.transposed for linear in plan.quantized):
        return False, "not reloaded: transformers does not read packed Conv1D layers"
    integers = [s for s in plan.quantized.values() if isinstance(s, QuantScheme)]
    if any(not scheme.symmetric for scheme in integers):
        return False, "not reloaded: transformers does not read packed asymmetric layers"
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    parameters += sum(p.numel() for block in skeleton.blocks for p in block.parameters())
    if parameters * torch.float32.itemsize > RELOAD_LIMIT_BYTES:
        return False, "not reloaded: the model is too large to be held whole"
    return True, ""


def _sample(skeleton: Skeleton) -> Tensor:
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, 32), generator=generator)


def is_finite(tensor: Tensor) -> bool:
    """Of any floating type: torch does not know the question for those of one byte."""
    values = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(values).all())


def _check_finite(written: Checkpoint) -> None:
    for name, info in written.tensors.items():
        if info.dtype.is_floating_point and not is_finite(written.tensor(name)):
            raise VerificationFailed(f"{name} holds values that are NaN or infinite")


def _decode(
    written: Checkpoint, artifact: Source, linear: Linear, scheme: Scheme, layout: Format
) -> Tensor:
    """[out, in] float32 from the written file."""
    tensors = {
        suffix: written.tensor(name)
        for suffix in layout.suffixes
        if (name := f"{linear.name}.{suffix}") in written
    }
    if layout.name == "compressed-tensors":
        if layout is FORMATS["compressed-tensors"]:
            assert isinstance(scheme, QuantScheme)
            return decompress(tensors, scheme)
        return decompress_as(tensors, *compressed_format(layout))
    return open_weights(artifact).weight(linear.name).dequantize()


def decompress(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor:
    """One layer by compressed-tensors' own decompressor, with its scales in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {**tensors, "weight_scale": tensors["weight_scale"].to(torch.float32)}
    layer = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight: Tensor = compressor.decompress(state, layer)["weight"]
    return weight.to(torch.float32)


def decompress_as(tensors: Mapping[str, Tensor], name: str, group: Mapping[str, Any]) -> Tensor:
    """The same for compressed-tensors' other formats; `group` is the config's entry."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(name)
    layer = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    state = dict(tensors)
    if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        state["weight_scale"] = state["weight_scale"].to(torch.float32)
    weight: Tensor = compressor.decompress(state, layer)["weight"]
    return weight.to(torch.float32)


def _run_block(
    skeleton: Skeleton,
    runner: BlockRunner,
    index: int,
    hidden: Tensor | None,
    decoded: Mapping[Linear, Tensor],
    written: Checkpoint,
    changed: Sequence[str],
) -> Tensor:
    block = skeleton.load_block(index)
    prefix = f"{skeleton.block_name(index)}."
    parameters = dict(skeleton.block_parameters(index))
    with torch.no_grad():
        for linear, values in decoded.items():
            linear.matrix(parameters[linear.parameter]).copy_(values)
    for name in changed:
        owner = skeleton.stored.owner(name)
        if owner is not None and owner.startswith(prefix):
            assign(block, owner.removeprefix(prefix), written.tensor(name).to(torch.float32))
    output = runner.run(index, 0, hidden)
    assert output is not None
    skeleton.free_block(index)
    return output


def _compare_reload(
    artifact: Source,
    expected: Tensor,
    tokens: Tensor,
    trust_remote_code: bool,
    *,
    weights_only: bool,
) -> tuple[float, tuple[str, ...]]:
    """The difference of the logits, and what there is to say about the way they were got.

    weights_only  compare without the rounding of activations that the file asks loaders for
    """
    notes: tuple[str, ...] = ()
    try:
        logits = _reloaded_logits(artifact, tokens, trust_remote_code, dequantize=weights_only)
    except VerificationFailed:
        raise
    except Exception:  # a layer class that compressed-tensors cannot wrap, as Falcon's
        notes = (NEEDS_DEQUANTIZE,)
        logits = _reloaded_logits(artifact, tokens, trust_remote_code, dequantize=True)
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error <= (_ROUNDED_LOGIT_TOLERANCE if weights_only else _LOGIT_TOLERANCE):
        raise VerificationFailed(
            f"the artifact's logits in transformers differ from the solver's by {error:.2e} of the "
            "largest"
        )
    return error, notes


def _reloaded_logits(
    artifact: Source, tokens: Tensor, trust_remote_code: bool, *, dequantize: bool
) -> Tensor:
    from transformers import AutoConfig, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(artifact.path, trust_remote_code=trust_remote_code)
        model, info = auto_class(config).from_pretrained(
            artifact.path,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **(options if dequantize else {}),
        )
        lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if lost:
            names = ", ".join(str(name) for name in lost[:3])
            raise VerificationFailed(
                f"transformers loads the artifact without {names}"
                + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            )
        with torch.no_grad():
            logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits.to(torch.float32)
