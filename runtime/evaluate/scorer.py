"""What evaluation asks of a model: its tokenizer, and the logits of windows.

Two implementations. `RuntimeScorer` is the runtime itself, so what is measured is what `qtool
serve` answers with, whatever the file: a plain folder, compressed-tensors, GPTQ, AWQ, Marlin or
GGUF. Its quantized layers are multiplied by the kernels that serve them, which round their inputs
to 8 bits (`kernels.cpu.native_linear`), as llama.cpp's do; all else is in float32, so that a model
that is not quantized is measured exactly. `activations="bf16"` leaves the inputs alone and shows
what the weights alone have lost, at half the speed; "llama.cpp" rounds a GGUF file's inputs as that
program does, so that the numbers are those that its users see (`kernels.llama_cpp`), several times
slower. `TransformersScorer` is for families that the
native decoder does not have. The original and its candidate are always of one family, so both are
scored by the same implementation.

Models are compared token by token, which means something only if they read the same tokens: all
tokenizers of one evaluation are run on the text, and the first difference is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.convert.formats import open_weights
from qtool.errors import QtoolError, UnsupportedModel
from qtool.progress import bar
from qtool.runtime.config import Device
from qtool.runtime.evaluate.tasks.likelihood import (
    Continuation,
    Likelihood,
    batches,
    grow,
    score_trees,
)
from qtool.runtime.evaluate.text import ScoringDtype
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import LoadedModel, choose_device, load_model
from qtool.runtime.models.model import causal_hidden
from qtool.runtime.tokenizer import Tokenizer
from qtool.settings import Rounding, settings
from qtool.source import Source

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The text as one model reads it.

    ids            [tokens], with the BOS first if the tokenizer adds one
    bos_token_id   None where the tokenizer adds no BOS
    """

    ids: Tensor
    bos_token_id: int | None


# (window, first position, one past the last) -> their logits [positions, vocab] float32.
# Windows are asked for in order.
Rows = Callable[[int, int, int], Tensor]


class Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...


class Scorer(Named, Protocol):
    """A loaded model, as evaluation sees it."""

    @property
    def scored_by(self) -> str:
        """What computes the logits: "qtool runtime" or "transformers"."""
        ...

    @property
    def dtype(self) -> str: ...

    def tokenize(self, text: str) -> TokenizedText: ...

    def predict(self, windows: Tensor) -> Rows:
        """windows [windows, window] int64, independent sequences."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def likelihoods(
        self, questions: Sequence[Sequence[Continuation]], advance: Callable[[int], None]
    ) -> list[list[Likelihood]]:
        """Of every continuation of every question; `advance` is told of questions as they end."""
        ...


def open_scorer(
    source: Source,
    name: str,
    *,
    dtype: ScoringDtype,
    device: Device,
    activations: Rounding | None = None,
) -> Scorer:
    """Load a model for scoring: by the runtime if it has the family, else by transformers.

    activations  None: what QTOOL_ACTIVATIONS says, or else int8, as they are served. "llama.cpp"
                 leaves the inputs of what is no GGUF file alone, of originals
    """
    if activations == "llama.cpp" and not source.is_gguf:
        activations = "bf16"
    rules = PackingRules(activations or settings().activations or "int8")
    try:
        loaded = load_model(str(source.path), dtype=dtype, device=device, rules=rules)
    except UnsupportedModel:
        if source.is_gguf:
            raise
        return TransformersScorer.load(source, name, dtype=dtype, device=device)
    return RuntimeScorer(name, loaded)


@dataclass(frozen=True, slots=True)
class RuntimeScorer:
    """The model as `qtool serve` runs it."""

    name: str
    loaded: LoadedModel
    scored_by: str = "qtool runtime"

    @property
    def dtype(self) -> str:
        name = str(self.loaded.dtype).removeprefix("torch.")
        # Kernels are named for the bits of weights and activations, w4a8, where the latter round.
        if any(use.kernel == "llama_cpp" for use in self.loaded.kernels):
            return f"{name} with inputs rounded as llama.cpp rounds them on CPUs"
        rounds = any(use.kernel.endswith("a8") for use in self.loaded.kernels)
        return f"{name} with quantized layers on 8-bit activations" if rounds else name

    @property
    def vocab_size(self) -> int:
        return self.loaded.decoder.vocab_size

    def tokenize(self, text: str) -> TokenizedText:
        return tokenize(self.name, self.loaded.tokenizer, text)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.loaded.tokenizer

    def predict(self, windows: Tensor) -> Rows:
        model = self.loaded.decoder
        hidden = causal_hidden(model, windows)

        @torch.inference_mode()
        def rows(window: int, start: int, stop: int) -> Tensor:
            return model.logits(hidden[window, start:stop])

        return rows

    def likelihoods(
        self, questions: Sequence[Sequence[Continuation]], advance: Callable[[int], None]
    ) -> list[list[Likelihood]]:
        context = self.loaded.max_position_embeddings
        results: list[list[Likelihood]] = []
        for batch in batches([grow(question, context) for question in questions]):
            results += score_trees(self.loaded.decoder, batch)
            advance(len(batch))
        return results


@dataclass(frozen=True, slots=True)
class TransformersScorer:
    """Any causal language model that transformers loads from the folder."""

    name: str
    model: Any
    tokenizer: Tokenizer | None
    scored_by: str = "transformers"

    @classmethod
    def load(
        cls, source: Source, name: str, *, dtype: ScoringDtype, device: Device
    ) -> TransformersScorer:
        from transformers import AutoModelForCausalLM

        try:
            with bar(f"loading {name} in transformers"), _no_foreign_bars():
                model = AutoModelForCausalLM.from_pretrained(source.path, dtype=DTYPES[dtype])
        except (ImportError, KeyError, OSError, ValueError) as error:
            raise UnsupportedModel(
                f"the runtime does not have this family and transformers cannot load {name}: "
                f"{error}",
                "compressed-tensors is the format that transformers reads for every family",
            ) from error
        tokenizer = Tokenizer.load(source, open_weights(source))
        return cls(name, model.to(choose_device(device)).eval(), tokenizer)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def tokenize(self, text: str) -> TokenizedText:
        return tokenize(self.name, self.tokenizer, text)

    def predict(self, windows: Tensor) -> Rows:
        """A window at a time: a foreign model gives the logits of all positions at once."""
        held: dict[int, Tensor] = {}

        @torch.inference_mode()
        def rows(window: int, start: int, stop: int) -> Tensor:
            if window not in held:
                held.clear()
                inputs = windows[window : window + 1].to(self.model.device)
                held[window] = self.model(input_ids=inputs, use_cache=False).logits[0]
            return held[window][start:stop].float()

        return rows

    def likelihoods(
        self, questions: Sequence[Sequence[Continuation]], advance: Callable[[int], None]
    ) -> list[list[Likelihood]]:
        """One text at a time: a foreign model's cache and masks are its own."""
        results = []
        for question in questions:
            results.append([self._likelihood(continuation) for continuation in question])
            advance(1)
        return results

    def _likelihood(self, continuation: Continuation) -> Likelihood:
        context = self.model.config.get_text_config().max_position_embeddings
        tree = grow([continuation], context)
        logits = self.predict(torch.tensor([tree.token_ids]))(0, 0, tree.num_rows).cpu()
        rows, targets = torch.tensor(tree.predictions[0]).unbind(dim=-1)
        chosen = logits[rows]
        logprobs = chosen.log_softmax(dim=-1).gather(-1, targets[:, None])
        greedy = bool((chosen.argmax(dim=-1) == targets).all())
        return Likelihood(float(logprobs.double().sum()), greedy)


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """transformers draws a bar of its own over ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def tokenize(name: str, tokenizer: Tokenizer | None, text: str) -> TokenizedText:
    """The text's ids, behind a BOS if the tokenizer puts one before text, and with no end token."""
    if tokenizer is None:
        raise QtoolError(
            f"{name} has no tokenizer, so no text can be scored with it",
            "put the original's tokenizer.json and tokenizer_config.json in its folder",
        )
    bos = tokenizer.bos_token_id
    marked, plain = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if bos is None or marked == plain or marked[0] != bos:
        return TokenizedText(torch.tensor(ids, dtype=torch.long), None)
    return TokenizedText(torch.tensor([bos, *ids], dtype=torch.long), bos)


def require_same_tokens(
    first: Named, first_text: TokenizedText, other: Named, other_text: TokenizedText
) -> None:
    """Raise the first difference between what two models read, or between what they predict."""
    names = f"{first.name} and {other.name}"
    if first_text.bos_token_id != other_text.bos_token_id:
        rules = [
            "adds no BOS" if text.bos_token_id is None else f"puts BOS {text.bos_token_id} first"
            for text in (first_text, other_text)
        ]
        raise QtoolError(
            f"{names} cannot be compared: the first tokenizer {rules[0]}, the second {rules[1]}",
            _SAME_TOKENIZER,
        )
    if not torch.equal(first_text.ids, other_text.ids):
        shorter = min(first_text.ids.numel(), other_text.ids.numel())
        differs = (first_text.ids[:shorter] != other_text.ids[:shorter]).nonzero()
        at = int(differs[0]) if differs.numel() else shorter
        ids = [
            int(text.ids[at]) if at < text.ids.numel() else "the end"
            for text in (first_text, other_text)
        ]
        raise QtoolError(
            f"{names} cannot be compared: their tokenizers differ. Token {at} of the text is "
            f"{ids[0]} in the first and {ids[1]} in the second (of {first_text.ids.numel()} and "
            f"{other_text.ids.numel()} tokens)",
            _SAME_TOKENIZER,
        )
    if first.vocab_size != other.vocab_size:
        raise QtoolError(
            f"{names} cannot be compared: they predict {first.vocab_size} and "
            f"{other.vocab_size} tokens",
            "compare a model with the one that it was made from",
        )


_SAME_TOKENIZER = (
    "compare a model with the one that it was made from; without --against, models of different "
    "tokenizers are set side by side by bits per byte"
)
