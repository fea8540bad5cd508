"""Every other family: transformers' own modelling code, with our paged attention inside it.

transformers calls attention through a table of functions (`AttentionInterface`); ours hands a
layer's queries, keys and values to `attend`. The rows of a step go through the model as one
sequence with positions of their own: everything but attention treats rows one by one, so that is
all a model has to be taught. What each layer's attention is (heads, widths, scale, window, sinks)
is not read from configs, which spell it in a hundred ways: the model runs once over a few tokens
and says it, by what it passes to the attention function and by the masks that it asks for.

The same few tokens then go through the model's own attention. A family whose text would differ
(positions added to scores, memory across tokens, attention that does not pass through the table) is
refused by name, with the reason.

Weights of any format are dequantized as they are loaded, under the names and by the conversions
that transformers loads its own checkpoints with; linears are then packed again, one by one
(runtime/models/packed_modules.py).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from qtool.convert.formats import WeightReader
from qtool.errors import FormatError, UnsupportedModel, closest
from qtool.kernels.cpu.attention import causal_attention
from qtool.progress import bar
from qtool.runtime.layers import DEFAULT_RULES, PackingRules
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.build import KernelUse
from qtool.runtime.models.model import Attend, sinks_of
from qtool.runtime.models.packed_modules import called_linears, pack_modules

PAGED = "qtool_paged"
PROBE = "qtool_probe"
PROBE_TOKENS = 24
# How far our result may be from the model's own, relative to its size: rounding, and no more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
# Packed linears round more than plain ones: activations to 8 bits, or sums in another order.
MOST_FROM_PACKING = 0.25
# Layers whose memory is the cache and nothing else.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}

# Of the forward pass under way, which transformers has no argument for.
_calls: ContextVar["_Calls"] = ContextVar("calls")
_probe: ContextVar["_Probe"] = ContextVar("probe")


@dataclass(frozen=True, slots=True, eq=False)
class TransformersModel:
    """base gives hidden states, head turns them into logits by the model's own last steps."""

    base: nn.Module
    head: nn.Module
    attention: tuple[AttentionSpec, ...]
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def for_context(self, num_tokens: int) -> "TransformersModel":
        return self

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        token = _calls.set(_Calls(attend))
        try:
            output = self.base(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False
            )
        finally:
            _calls.reset(token)
        hidden: Tensor = output[0][0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        output = self.head(inputs_embeds=hidden[None], use_cache=False)
        logits: Tensor = output.logits[0].float()
        return logits


@dataclass(slots=True, eq=False)
class _Calls:
    """Calls of attention are numbered as they come: a model makes the same ones every time, and
    some families attend more than once in a layer, or run a layer more than once.
    """

    attend: Attend
    done: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    model: TransformersModel
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    kernels: tuple[KernelUse, ...]
    nbytes: int


def load_fallback(
    reader: WeightReader,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    rules: PackingRules = DEFAULT_RULES,
) -> Loaded:
    """config is `read_config`'s. Raises UnsupportedModel for what only running the model shows."""
    _register()
    with torch.inference_mode():
        whole = _load(reader, config, dtype).to(device).eval()
        whole.set_attn_implementation(PROBE)
        with called_linears(whole) as linears:
            specs, logits = _measure(whole, config.model_type, dtype, device)
        kernels, nbytes = pack_modules(whole, linears, reader, dtype, device, rules)
        # By the model's own attention still, which `_measure` leaves it with.
        changed = _distance(whole(**_probe_inputs(whole, device)).logits.float(), logits)
        assert changed < MOST_FROM_PACKING, f"packing changed the logits by {changed:.1%}"
        whole.set_attn_implementation(PAGED)
    base = whole.base_model
    setattr(whole, whole.base_model_prefix, _Given())
    text = config.get_text_config()
    parameters = [*base.parameters(), *whole.parameters()]
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in parameters}
    eos = text.eos_token_id
    return Loaded(
        model=TransformersModel(base, whole, specs, logits.shape[-1], dtype, device),
        max_position_embeddings=_context(text),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        kernels=kernels,
        nbytes=nbytes + sum(tensors.values()),
    )


class _HiddenStates(BaseModelOutputWithPast):  # type: ignore[misc]
    """And nothing else that a family's blocks may give besides."""

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands in for the blocks when only the last steps of a model are to run: its embeddings are
    the hidden states.
    """

    @property
    def decoder(self) -> "_Given":
        """OPT's head asks for its blocks by this name."""
        return self

    def forward(self, *unused: Any, inputs_embeds: Tensor, **others: Any) -> Any:
        return _HiddenStates(last_hidden_state=inputs_embeds)


def read_config(reader: WeightReader) -> Any:
    """transformers' config of a model; raises UnsupportedModel where the family, its code or its
    config says that it cannot be served.
    """
    family = str(reader.config.get("model_type"))
    if family not in CONFIG_MAPPING:
        guess = closest(family, CONFIG_MAPPING)
        raise UnsupportedModel(
            f"model family {family!r} is neither one of the native decoder's nor of transformers'",
            "qtool serve --list-models prints what can be served"
            + (f"; did you mean {guess}?" if guess else ""),
        )
    refuse_code(family)
    try:
        config = CONFIG_MAPPING[family].from_dict(dict(reader.config))
    except (AttributeError, KeyError, StrictDataclassError, TypeError, ValueError) as error:
        raise FormatError(f"config.json is not one of {family}: {error}") from error
    refuse_config(config)
    return config


def refuse_code(family: str) -> None:
    """Raise UnsupportedModel for what transformers says of a family's code."""
    config = CONFIG_MAPPING[family]
    if config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{family} is not a family of causal language models")
    code = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    if getattr(code, "_is_stateful", False):
        reason = "its layers carry a state from token to token that is no KV cache"
    elif not hasattr(sys.modules[code.__module__], "ALL_ATTENTION_FUNCTIONS"):
        reason = "its attention does not go through transformers' attention interface"
    else:
        return
    raise UnsupportedModel(f"{family} cannot be served: {reason}")


def refuse_config(config: Any) -> None:
    """Raise UnsupportedModel for what a model's config says of its layers."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS
    if config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        reason = "it attends to an encoder's output as well"
    elif kinds:
        reason = f"it has layers of {', '.join(sorted(kinds))}, which are not paged"
    else:
        return
    raise UnsupportedModel(f"{config.model_type} cannot be served: {reason}")


def _load(reader: WeightReader, config: Any, dtype: torch.dtype) -> Any:
    names = [*reader.tensor_names(), *(f"{module}.weight" for module in reader.modules())]
    with bar(f"loading {reader.source.name}", len(names)) as progress, _no_foreign_bars():
        tensors = {name: _Lazy(reader, name, progress.advance) for name in names}
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            # So that all of them are told, here.
            ignore_mismatched_sizes=True,
        )
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [
        f"{name} has shape {list(found)}, not {list(shape)}"
        for name, found, shape in sorted(info["mismatched_keys"])
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise FormatError(
            f"{reader.source.name}: {'; '.join(wrong[:5])}{more}",
            hint="the weights and config.json do not belong together, or the file is incomplete",
        )
    return model


@dataclass(frozen=True, slots=True, eq=False)
class _Lazy:
    """A tensor that is read and dequantized when transformers comes to it, which it does by
    indexing, as it does with the slices of a safetensors file.
    """

    reader: WeightReader
    name: str
    advance: Callable[[], None]

    def __getitem__(self, index: Any) -> Tensor:
        self.advance()
        return self.reader.tensor(self.name)[index]


def _context(text: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """transformers draws a bar of its own over ours, and a table of what it loaded."""
    enabled, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            logging.enable_progress_bar()


def _register() -> None:
    """Add our functions to transformers' tables; the same ones however often."""
    AttentionInterface.register(PAGED, _paged)
    AttentionInterface.register(PROBE, _probed)
    AttentionMaskInterface.register(PROBE, _probed_mask)


def _rows(x: Tensor) -> Tensor:
    """[1, heads, rows, dim] as transformers has it -> [rows, heads, dim]."""
    return x[0].transpose(0, 1).contiguous()


def _paged(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    calls = _calls.get()
    output = calls.attend(calls.done, _rows(query), _rows(key), _rows(value))
    calls.done += 1
    return output[None], None


# --- what a model's attention is, measured ---


@dataclass(slots=True, eq=False)
class _Probe:
    """specs of the calls and masks, each in the order in which the model came to them."""

    specs: list[AttentionSpec] = field(default_factory=list)
    masks: list[int | None] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


# The probe's masks hold this plus their number, which layers hand on to the attention function.
_FIRST_MASK = 1000


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
        _rows(query)[None],
        key,
        value,
        scale=spec.scale,
        mask=_plain_mask(query.shape[2], window),
        softcap=softcap,
        sinks=sinks_of(spec, query.device),
    )
    return output, None


def _plain_mask(length: int, window: int | None) -> Tensor | None:
    if window is None or window >= length:
        return None
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def _probe_inputs(model: Any, device: torch.device) -> dict[str, Any]:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(PROBE_TOKENS) * 7919 + 11) % vocab_size
    return {
        "input_ids": ids[None].to(device),
        "position_ids": torch.arange(PROBE_TOKENS, device=device)[None],
        "attention_mask": torch.ones(1, PROBE_TOKENS, dtype=torch.int64, device=device),
        "use_cache": False,
    }


def _measure(
    model: Any, family: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[AttentionSpec, ...], Tensor]:
    """(what every layer's attention is, the model's own logits of the probe's tokens), or a
    refusal.
    """
    inputs = _probe_inputs(model, device)
    probe = _Probe()
    token = _probe.set(probe)
    try:
        ours = model(**inputs).logits.float()
    except TypeError as error:
        raise UnsupportedModel(f"{family} cannot be served: {error}") from error
    finally:
        _probe.reset(token)
    refuse_measured(family, probe.specs, probe.refusals, model.config)
    model.set_attn_implementation("eager")
    theirs: Tensor = model(**inputs).logits.float()
    difference = _distance(ours, theirs)
    if not difference < TOLERANCE[dtype]:
        raise UnsupportedModel(
            f"{family} cannot be served: through paged attention its logits differ from its own "
            f"by {difference:.1%}"
        )
    return tuple(probe.specs), theirs


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def refuse_measured(
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
    raise UnsupportedModel(f"{family} cannot be served: {reason}")
