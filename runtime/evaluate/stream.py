"""Runs models over the windows of a text, a batch at a time, and keeps six numbers a token.

A batch of windows goes through the blocks of every model; then, some rows at a time, through their
heads and into the sums. The logits of those rows, of the original and of one candidate, are all
that is ever held: a vocabulary of 128k takes half a megabyte a token, so a text of 300k tokens
would be 150 GB. The head sees only rows that count, half of them in llama.cpp's protocol. Protocols
whose windows hold the same tokens share one run: where the context is 512 and no BOS is put in,
llama.cpp's protocol and the papers' differ only in which positions count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.runtime.evaluate.divergence import TokenDivergence, compare, join
from qtool.runtime.evaluate.perplexity import Protocol, cut, next_token_nll, rows_of_logits
from qtool.runtime.evaluate.scorer import Scorer
from qtool.runtime.evaluate.stored import Recorder, StoredReference

# Rows of one batch: enough for every linear to run at full speed. More gains nothing on a CPU.
BATCH_ROWS = 2048

# The divergence is taken over the tokens that llama-perplexity scores, to compare with its numbers.
DIVERGENCE_PROTOCOL = "llama.cpp"


class Pass(NamedTuple):
    """One run over the text: windows [windows, window] int64, for all protocols that cut so."""

    windows: Tensor
    protocols: tuple[Protocol, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """One model's results: the nll of each scored token in each protocol, and the divergence."""

    nll: dict[str, Tensor]
    divergence: TokenDivergence | None


def plan_passes(tokens: Tensor, protocols: Sequence[Protocol]) -> list[Pass]:
    """The fewest runs that serve all protocols.  tokens [tokens] int64."""
    passes: list[Pass] = []
    for protocol in protocols:
        windows = cut(tokens, protocol)
        for index, known in enumerate(passes):
            if torch.equal(known.windows, windows):
                passes[index] = Pass(windows, (*known.protocols, protocol))
                break
        else:
            passes.append(Pass(windows, (protocol,)))
    return passes


def score(
    candidates: Sequence[Scorer],
    reference: Scorer | None,
    passes: Sequence[Pass],
    advance: Callable[[int], None],
    *,
    stored: StoredReference | None = None,
    recorder: Recorder | None = None,
) -> list[Scored]:
    """Score every model on every pass: the reference first where there is one, then candidates.

    advance    called with the windows done, once a model and batch
    stored     the reference's predictions, where a file has them and no model
    recorder   is given the first model's predictions
    """
    models = [*([] if reference is None else [reference]), *candidates]
    nll: list[dict[str, Tensor]] = [{} for _ in models]
    divergence: list[TokenDivergence | None] = [None for _ in models]
    for run in passes:
        size = max(1, BATCH_ROWS // run.windows.shape[1])
        compared = any(protocol.name == DIVERGENCE_PROTOCOL for protocol in run.protocols)
        batches = [
            _score_batch(
                models,
                run.protocols,
                windows,
                number * size,
                advance,
                has_reference=compared and reference is not None,
                stored=stored if compared else None,
                recorder=recorder if compared else None,
            )
            for number, windows in enumerate(torch.split(run.windows, size))
        ]
        for index in range(len(models)):
            parts = [batch[index] for batch in batches]
            for protocol in run.protocols:
                nll[index][protocol.name] = torch.cat([part.nll[protocol.name] for part in parts])
            found = [part.divergence for part in parts if part.divergence is not None]
            if found:
                divergence[index] = join(found)
    return [Scored(*pair) for pair in zip(nll, divergence, strict=True)]


def _score_batch(
    models: Sequence[Scorer],
    protocols: Sequence[Protocol],
    windows: Tensor,
    first_window: int,
    advance: Callable[[int], None],
    *,
    has_reference: bool,
    stored: StoredReference | None,
    recorder: Recorder | None,
) -> list[Scored]:
    """windows [windows, window] int64, the first of them number `first_window` of the text."""
    predictions = []
    for model in models:
        predictions.append(model.predict(windows))
        advance(len(windows))
    found = [_Found([], []) for _ in models]
    compares = has_reference or stored is not None or recorder is not None
    begin = _compared_protocol(protocols).first_scored if compares else windows.shape[1]
    for window, start, stop in _pieces(
        windows, protocols, begin, max(m.vocab_size for m in models)
    ):
        original: Tensor | None = None
        for number, rows in enumerate(predictions):
            logits = rows(window, start, stop)
            targets = windows[window, start + 1 : stop + 1].to(logits.device)
            nll, divergence = found[number]
            if start >= begin and original is not None:
                divergence.append(compare(logits, original.to(logits.device), targets))
                nll.append(divergence[-1].nll)
            elif start >= begin and stored is not None:
                place = first_window + window, start - begin
                divergence.append(stored.compare(*place, logits, targets))
                nll.append(divergence[-1].nll)
            else:
                nll.append(next_token_nll(logits, targets))
            if number == 0 and start >= begin:
                if recorder is not None:
                    recorder.add(logits, targets)
                if has_reference:
                    original = logits
    return [
        _joined(model, part, protocols, len(windows))
        for model, part in zip(models, found, strict=True)
    ]


class _Found(NamedTuple):
    """Of one model and batch, piece by piece: -ln p of the tokens that came, and divergences."""

    nll: list[Tensor]
    divergence: list[TokenDivergence]


def _pieces(
    windows: Tensor, protocols: Sequence[Protocol], begin: int, vocab_size: int
) -> Iterator[tuple[int, int, int]]:
    """(window, first position, one past the last) of what is scored, in order; none of them
    crosses `begin`.
    """
    first = min(protocol.first_scored for protocol in protocols)
    last = windows.shape[1] - 1
    at_once = rows_of_logits(vocab_size)
    bounds = sorted({first, *([begin] if first < begin < last else []), last})
    for window in range(len(windows)):
        for low, high in pairwise(bounds):
            for start in range(low, high, at_once):
                yield window, start, min(start + at_once, high)


def _joined(
    model: Scorer, found: _Found, protocols: Sequence[Protocol], num_windows: int
) -> Scored:
    first = min(protocol.first_scored for protocol in protocols)
    nll = torch.cat(found.nll).cpu().view(num_windows, -1)
    _require_finite(model, nll)
    divergence = None
    if found.divergence:
        divergence = TokenDivergence(*(column.cpu() for column in join(found.divergence)))
        _require_finite(model, divergence.kld)
    return Scored(
        {p.name: nll[:, p.first_scored - first :].flatten() for p in protocols}, divergence
    )


def _compared_protocol(protocols: Sequence[Protocol]) -> Protocol:
    return next(protocol for protocol in protocols if protocol.name == DIVERGENCE_PROTOCOL)


def _require_finite(model: Scorer, values: Tensor) -> None:
    if bool(values.isfinite().all()):
        return
    raise QtoolError(
        f"{model.name} gives logits that are not finite for "
        f"{int((~values.isfinite()).sum())} of {values.numel()} tokens (computed in {model.dtype})",
        "try --dtype float32; if that fails too, the weights are damaged: run qtool verify",
    )
