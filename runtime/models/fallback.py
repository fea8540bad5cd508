"""Every other family: transformers' own modelling code, with our paged attention inside it.

transformers calls attention through a table of functions (`AttentionInterface`); ours hands a
layer's queries, keys and values to `attend`. The rows of a step go through the model as one
sequence with positions of their own: everything but attention treats rows one by one, so that is
all a model has to be taught. What each layer's attention is (heads, widths, scale, window, sinks)
is not read from configs, which spell it in a hundred ways: the model runs once over a few tokens
and says it (runtime/models/probe.py). A family whose text would differ (positions added to scores,
memory across tokens, attention that does not pass through the table) is refused by name, with the
reason.

Weights of any format are loaded under the names and by the conversions that transformers loads its
own checkpoints with. Linears that the file holds packed stay so (runtime/models/packed_modules.py);
experts, which transformers stacks, are dequantized.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from qtool.convert.formats import WeightReader
from qtool.errors import FormatError, UnsupportedModel, closest
from qtool.progress import bar
from qtool.runtime.layers import DEFAULT_RULES, PackingRules
from qtool.runtime.models.attention_spec import AttentionSpec
from qtool.runtime.models.fallback_rotary import Turn, settle_turns
from qtool.runtime.models.kernel_use import KernelUse, count_uses
from qtool.runtime.models.model import Attend
from qtool.runtime.models.packed_modules import (
    called_linears,
    model_bytes,
    pack_modules,
    packed_in_file,
    unpack_modules,
)
from qtool.runtime.models.probe import (
    cannot_serve,
    distance,
    measure,
    probe_inputs,
    rows_of,
)

PAGED = "qtool_paged"
# Packed linears round more than plain ones: activations to 8 bits, or sums in another order.
MOST_FROM_PACKING = 0.25
# Layers whose memory is the cache and nothing else.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}

# Of the forward pass under way, which transformers has no argument for.
_calls: ContextVar["_Calls"] = ContextVar("calls")


@dataclass(frozen=True, slots=True, eq=False)
class TransformersModel:
    """base gives hidden states, head turns them into logits by the model's own last steps.

    turns  of the rotary modules that depend on the context
    """

    base: nn.Module
    head: nn.Module
    attention: tuple[AttentionSpec, ...]
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    turns: tuple[Turn, ...] = ()

    def for_context(self, num_tokens: int) -> "TransformersModel":
        turns = tuple(turn.for_context(num_tokens, self.device) for turn in self.turns)
        return dataclasses.replace(self, turns=turns)

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        for turn in self.turns:
            turn.apply()
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
    AttentionInterface.register(PAGED, _paged)
    with torch.inference_mode():
        with torch.device("meta"):
            skeleton = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)
        packed = packed_in_file(skeleton, reader)
        whole = _load(reader, config, dtype, packed).to(device).eval()
        uses = pack_modules(whole, packed, reader, dtype, device, rules)
        with called_linears(whole) as called:
            specs, logits = measure(whole, config.model_type, dtype, device)
        uncalled = packed - called
        if uncalled:
            unpack_modules(whole, uncalled, reader, dtype, device)
            specs, logits = measure(whole, config.model_type, dtype, device)
        uses += pack_modules(whole, called - packed, reader, dtype, device, rules)
        # By the model's own attention still, which `measure` leaves it with.
        changed = distance(whole(**probe_inputs(whole, device)).logits.float(), logits)
        assert changed < MOST_FROM_PACKING, f"packing changed the logits by {changed:.1%}"
        whole.set_attn_implementation(PAGED)
    nbytes = model_bytes(whole)
    base = whole.base_model
    setattr(whole, whole.base_model_prefix, _Given())
    text = config.get_text_config()
    eos = text.eos_token_id
    return Loaded(
        model=TransformersModel(
            base=base,
            head=whole,
            attention=specs,
            vocab_size=logits.shape[-1],
            dtype=dtype,
            device=device,
            turns=settle_turns(base, device),
        ),
        max_position_embeddings=_context(text),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        kernels=count_uses(uses),
        nbytes=nbytes,
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
    raise cannot_serve(family, reason)


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
    raise cannot_serve(config.model_type, reason)


def _load(reader: WeightReader, config: Any, dtype: torch.dtype, packed: Collection[str]) -> Any:
    """`packed` linears get placeholders that take no memory."""
    placeholders = {f"{module}.weight" for module in packed}
    names = [*reader.tensor_names(), *(f"{module}.weight" for module in reader.modules())]
    with bar(f"loading {reader.source.name}", len(names)) as progress, _no_foreign_bars():
        tensors = {
            name: _Lazy(reader, name, progress.advance, is_placeholder=name in placeholders)
            for name in names
        }
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
    is_placeholder: bool

    def __getitem__(self, index: Any) -> Tensor:
        self.advance()
        if self.is_placeholder:
            shape = self.reader.describe(self.name.removesuffix(".weight")).shape
            return torch.zeros(1).expand(shape)
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


def _paged(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    calls = _calls.get()
    output = calls.attend(calls.done, rows_of(query), rows_of(key), rows_of(value))
    calls.done += 1
    return output[None], None
