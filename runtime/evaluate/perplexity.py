"""Perplexity in the two protocols of published numbers, each number with its protocol beside it.

Perplexity is exp(mean of -ln p(next token)) over the tokens that are scored. Which tokens are
scored, and how much text a model has read before each, moves it by 10 % and more, so a number
without its protocol cannot be compared with any other.

- `llama.cpp`: what `llama-perplexity` prints (`tools/perplexity/perplexity.cpp`, `perplexity()`).
  The text is cut into windows of 512 tokens that do not overlap; the first token of each is
  replaced by BOS if the tokenizer adds one; only positions 256 to 510 are scored, each predicting
  the token after it, so that every prediction has read 256 tokens at least.
- `papers`: what GPTQ, AWQ and those after them report. Windows of 2,048 tokens that do not overlap,
  as the text gives them (a BOS stands only where the tokenizer put it, at the start of the text),
  and all predictions scored: positions 0 to 2,046.

A model whose context is shorter, or a text too short for one window, gets a shorter window, and the
protocol then says so in its name: a number in "512-token windows (context is 512)" is not to be set
beside one in 2,048.

Worked example, window 8 (llama.cpp's: first scored position 4, the last prediction has no target):

    position     0    1  2  3    4    5    6    7
    token       BOS   a  b  c    d    e    f    g
    predicts     .    .  .  .    e    f    g    .      3 = 8 - 1 - 4 predictions a window
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtool.errors import QtoolError

LLAMA_CPP_WINDOW = 512
PAPERS_WINDOW = 2048

# Elements of one float32 temporary, 1 MB: it stays in the second-level cache. On a Xeon with 2 MB,
# a vocabulary of 152k: 5.8 ns an element for `divergence.compare`, 11.8 with 8 MB.
SLICE_ELEMENTS = 1 << 18

# Logits that are made at once, 64 MB: enough rows for the head to run at full speed. A window of
# 2,048 over that vocabulary would take 1.2 GB.
LOGITS_ELEMENTS = 1 << 24

ProtocolName = Literal["llama.cpp", "papers"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text is cut into windows, and which of the predictions count.

    first_scored   the first position in a window whose prediction of the next token counts
    bos_token_id   replaces the first token of every window; None: the windows are as the text gives
                   them
    shortened      why the window is not the protocol's own ("context is 512"), or None
    """

    name: ProtocolName
    window: int
    first_scored: int
    bos_token_id: int | None
    shortened: str | None = None

    @property
    def stride(self) -> int:
        """Windows do not overlap."""
        return self.window

    @property
    def scored_per_window(self) -> int:
        return self.window - 1 - self.first_scored

    @property
    def bos_rule(self) -> str:
        if self.name == "papers":
            return "as the text gives it"
        if self.bos_token_id is None:
            return "none (the tokenizer adds none)"
        return f"first token of each window replaced by BOS ({self.bos_token_id})"

    @property
    def windows(self) -> str:
        """What was cut and scored: "512-token windows (context is 512), second half scored"."""
        scored = "second half scored" if self.first_scored else "all tokens scored"
        why = f" ({self.shortened})" if self.shortened else ""
        return f"{self.window}-token windows{why}, {scored}"

    @property
    def label(self) -> str:
        """What stands beside a number: "llama.cpp, 512-token windows, second half scored"."""
        return f"{self.name}, {self.windows}"


@dataclass(frozen=True, slots=True)
class Perplexity:
    """One perplexity with all that is needed to compare it. `error` is one standard error, as
    llama-perplexity prints it.
    """

    protocol: Protocol
    value: float
    error: float
    mean_nll: float
    num_scored: int
    num_windows: int


def bits_per_byte(
    nll: Tensor, tokens: Tensor, protocol: Protocol, decode: Callable[[Sequence[int]], str]
) -> float:
    """What the scored tokens cost for each byte of their text: -log2 p in all, by UTF-8 bytes.

    nll [scored tokens] float64, of the windows that `cut` gives of tokens [tokens] int64

    Perplexity is by token, and tokens of one vocabulary are longer than those of another; bytes are
    the same to all. Which bytes are scored still depends a little on where windows begin.
    """
    count = 0
    for window in cut(tokens, protocol).tolist():
        before = decode(window[: protocol.first_scored + 1])
        count += len(decode(window).encode()) - len(before.encode())
    if count <= 0:
        raise QtoolError(
            "the tokens that are scored stand for no text, so they have no bytes to count",
            "evaluate on text that the tokenizer knows",
        )
    return nll.sum().item() / math.log(2) / count


def llama_cpp_protocol(*, context: int, num_tokens: int, bos_token_id: int | None) -> Protocol:
    """llama-perplexity's protocol for a model with this context; like it, asks for two windows of
    text at least.
    """
    window, shortened = _window(
        LLAMA_CPP_WINDOW, context, num_tokens // 2, f"text has {num_tokens} tokens"
    )
    return Protocol("llama.cpp", window, window // 2, bos_token_id, shortened)


def papers_protocol(*, context: int, num_tokens: int) -> Protocol:
    """The protocol of the GPTQ and AWQ papers for a model with this context."""
    window, shortened = _window(PAPERS_WINDOW, context, num_tokens, f"text has {num_tokens} tokens")
    return Protocol("papers", window, 0, None, shortened)


def cut(tokens: Tensor, protocol: Protocol) -> Tensor:
    """The windows a model is run on.

    tokens    [tokens] int64, the text
    returns   [windows, window] int64, the whole windows in it, BOS put in where the protocol says
              so

    Position 0 is never a target in either protocol (its prediction would come from the window
    before), so the tokens that are scored stay those of the text.
    """
    num_windows = tokens.numel() // protocol.window
    windows = tokens[: num_windows * protocol.window].reshape(num_windows, protocol.window).clone()
    if protocol.bos_token_id is not None:
        windows[:, 0] = protocol.bos_token_id
    return windows


def next_token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) of each row.

    logits [rows, vocab] float32, targets [rows] int64 -> [rows] float64. A row that holds NaN or
    +inf gives NaN.
    """
    rows = rows_per_slice(logits.shape[-1])
    parts = [
        part.logsumexp(dim=-1) - part.gather(-1, index[:, None]).squeeze(-1)
        for part, index in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(parts).double()


def rows_per_slice(vocab_size: int) -> int:
    """How many rows of logits to work on at a time, so that temporaries stay in the cache."""
    return max(1, SLICE_ELEMENTS // vocab_size)


def rows_of_logits(vocab_size: int) -> int:
    """How many rows to give the head at a time."""
    return max(1, LOGITS_ELEMENTS // vocab_size)


def perplexity(nll: Tensor, protocol: Protocol) -> Perplexity:
    """exp(mean nll) and its standard error exp(mean) * sqrt(var / (n - 1)); nll [scored tokens]
    float64.
    """
    mean, error = mean_and_error(nll)
    value = math.exp(mean)
    return Perplexity(
        protocol, value, value * error, mean, nll.numel(), nll.numel() // protocol.scored_per_window
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of float64 values and its standard error, sqrt((E[x^2] - E[x]^2) / (n - 1)), as
    llama-perplexity takes it.
    """
    mean = values.mean().item()
    if values.numel() < 2:
        return mean, 0.0
    variance = (values - mean).square().mean().item()
    return mean, math.sqrt(variance / (values.numel() - 1))


def _window(wanted: int, context: int, available: int, too_little: str) -> tuple[int, str | None]:
    """The largest window up to `wanted` that the model and the text allow, and the reason if it is
    a shorter one.
    """
    window = min(wanted, context, available)
    if window < 4:
        raise QtoolError(
            f"too little to evaluate: {too_little}, the model's context is {context}",
            "give a longer text with --text, or raise --max-tokens",
        )
    if window == wanted:
        return window, None
    return window, f"context is {context}" if window == context else too_little
