"""What the attention of transformers' code is, found by running it over a few tokens.

Every layer tells its heads and widths by the tensors that it passes, its scale, sinks and softcap
by the arguments beside them. Its window is in the mask that the model asked transformers for: ours
is a tensor that holds the mask's number, and the mask's function is asked which keys two far
queries see. Then the same tokens go through the model's own attention, and the two have to agree.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from qtool.errors import UnsupportedModel
from qtool.kernels.cpu.attention import causal_attention
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.model import sinks_of

PROBE = "qtool_probe"
PROBE_TOKENS = 24
# How far our result may be from the model's own, relative to its size: rounding, and no more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
# The probe's masks hold this plus their number, which layers hand on to the attention function.
_FIRST_MASK = 1000

# Of the forward pass under way, which transformers has no argument for.
_probe: ContextVar["_Probe"] = ContextVar("probe")


def rows_of(x: Tensor) -> Tensor:
    """[1, heads, rows, dim] as transformers has it -> [rows, heads, dim]."""
    return x[0].transpose(0, 1).contiguous()


@dataclass(slots=True, eq=False)
class _Probe:
    """specs of the calls and masks, each in the order in which the model came to them."""

    specs: list[AttentionSpec] = field(default_factory=list)
    masks: list[int | None] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def _probed_mask(
    *, q_length: int, kv_length: int, mask_function: Any, device: Any = None, **options: Any
) -> Tensor:
    probe = _probe.get()
    window = _window_of(mask_function)
    if isinstance(window, str):
        probe.refusals.append(window)
        window = None
    probe.masks.append(window)
    number = _FIRST_MASK + len(probe.masks) - 1
    return torch.full((1, 1, q_length, kv_length), float(number), device=device)


def _window_of(visible: Callable[..., Any]) -> int | str | None:
    """The window of a mask function (batch, head, query, key) -> bool; None: plain causal; a text:
    neither.
    """
    zero = torch.tensor(0)
    counts = []
    for query in (100_000, 100_001):
        keys = torch.arange(query + 2)
        seen = visible(zero, zero, torch.tensor(query), keys)
        seen = torch.as_tensor(seen).expand(keys.shape)
        count = int(seen.sum())
        if bool(seen[-1]) or not bool(seen[query + 1 - count : query + 1].all()):
            return "its mask is not causal, or not a window of the last tokens"
        counts.append((count, count == query + 1))
    (first, first_all), (second, second_all) = counts
    if first_all and second_all:
        return None
    return first if first == second else "its mask is cut into chunks"


def _probed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    probe = _probe.get()
    if getattr(module, "is_causal", True) is False:
        probe.refusals.append("its attention is not causal")
    window = sliding_window
    if isinstance(attention_mask, Tensor):
        number = int(attention_mask.flatten()[0]) - _FIRST_MASK
        if 0 <= number < len(probe.masks):
            window = probe.masks[number]
    spec = AttentionSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=window,
        softcap=softcap,
        sinks=None if s_aux is None else tuple(s_aux.float().tolist()),
    )
    probe.specs.append(spec)
    output = causal_attention(
        rows_of(query)[None],
        key,
        value,
        scale=spec.scale,
        mask=_plain_mask(query.shape[2], window, query.device),
        softcap=softcap,
        sinks=sinks_of(spec, query.device),
    )
    return output, None


def _plain_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or window >= length:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def probe_inputs(model: Any, device: torch.device) -> dict[str, Any]:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(PROBE_TOKENS) * 7919 + 11) % vocab_size
    return {
        "input_ids": ids[None].to(device),
        "position_ids": torch.arange(PROBE_TOKENS, device=device)[None],
        "attention_mask": torch.ones(1, PROBE_TOKENS, dtype=torch.int64, device=device),
        "use_cache": False,
    }


def measure(
    model: Any, family: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[AttentionSpec, ...], Tensor]:
    """(what every layer's attention is, the model's own logits of the probe's tokens), or a
    refusal. Leaves the model with its own attention.
    """
    AttentionInterface.register(PROBE, _probed)
    AttentionMaskInterface.register(PROBE, _probed_mask)
    model.set_attn_implementation(PROBE)
    inputs = probe_inputs(model, device)
    probe = _Probe()
    token = _probe.set(probe)
    try:
        ours = model(**inputs).logits.float()
    except TypeError as error:
        raise cannot_serve(family, str(error)) from error
    finally:
        _probe.reset(token)
    _refuse(family, probe.specs, probe.refusals, model.config)
    model.set_attn_implementation("eager")
    theirs: Tensor = model(**inputs).logits.float()
    difference = distance(ours, theirs)
    if not difference < TOLERANCE[dtype]:
        raise cannot_serve(
            family,
            f"through paged attention its logits differ from its own by {difference:.1%}",
        )
    return tuple(probe.specs), theirs


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _refuse(
    family: str, specs: Sequence[AttentionSpec], refusals: Sequence[str], config: Any
) -> None:
    num_layers = config.get_text_config().num_hidden_layers
    if refusals:
        reason = refusals[0]
    elif not specs:
        reason = "its attention does not go through transformers' attention interface"
    elif len(specs) < num_layers:
        reason = f"{len(specs)} of its {num_layers} layers have attention that can be paged"
    else:
        return
    raise cannot_serve(family, reason)


def cannot_serve(family: str, reason: str) -> UnsupportedModel:
    """With what to do instead."""
    return UnsupportedModel(
        f"{family} cannot be served: {reason}",
        "serve it by its own code (`transformers serve MODEL`: a cache for each request, in 16 or "
        "32 bits), or take a model of a family that qtool serve --list-models prints",
    )
