"""Runs models over the windows of a text, a batch at a time, and keeps six numbers a token.

The logits of one batch of windows, of the original and of one candidate, are all that is ever held:
a vocabulary of 128k takes half a megabyte a token, so a text of 300k tokens would be 150 GB. The
original is run once a batch, whatever the number of candidates. Protocols whose windows hold the
same tokens share one run: where the context is 512 and no BOS is put in, llama.cpp's protocol and
the papers' differ only in which positions count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.runtime.evaluate.divergence import TokenDivergence, compare, join
from qtool.runtime.evaluate.perplexity import Protocol, cut, next_token_nll
from qtool.runtime.evaluate.scorer import Scorer
from qtool.runtime.evaluate.stored import Recorder, StoredReference

# Logits of one model and one batch. More gains nothing on a CPU and little on a GPU: 256 MB is
# 4 windows of 512 for a vocabulary of 32k, enough rows for every linear to run at full speed.
BATCH_LOGITS_BYTES = 256 << 20
MAX_BATCH_WINDOWS = 16

# The divergence is taken over the tokens that llama-perplexity scores, to compare with its numbers.
DIVERGENCE_PROTOCOL = "llama.cpp"


# (number of a window in the batch, its scored logits, the tokens that came) -> how far they are.
Judge = Callable[[int, Tensor, Tensor], TokenDivergence]


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
        size = _windows_per_batch(models, run.windows.shape[1])
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
    original: Tensor | None = None
    results = []
    for index, model in enumerate(models):
        logits = model.logits(windows)
        judge: Judge | None = None
        if original is not None:
            judge = _against_logits(original)
        elif stored is not None:
            judge = _against_file(stored, first_window)
        results.append(_score_windows(model, logits, judge, protocols, windows))
        if index == 0 and recorder is not None:
            _record(recorder, logits, protocols, windows)
        if index == 0 and has_reference:
            # Kept only where it is needed: it is as large as the batch allows.
            begin = _compared_protocol(protocols).first_scored
            original = logits[:, begin:-1]
        advance(windows.shape[0])
    return results


def _against_logits(original: Tensor) -> Judge:
    """original [windows, scored, vocab] float32."""
    return lambda window, logits, targets: compare(
        logits, original[window].to(logits.device), targets
    )


def _against_file(stored: StoredReference, first_window: int) -> Judge:
    return lambda window, logits, targets: stored.compare(first_window + window, logits, targets)


def _record(
    recorder: Recorder, logits: Tensor, protocols: Sequence[Protocol], windows: Tensor
) -> None:
    begin = _compared_protocol(protocols).first_scored
    for rows, tokens in zip(logits, windows.to(logits.device), strict=True):
        recorder.add(rows[begin:-1], tokens[begin + 1 :])


def _compared_protocol(protocols: Sequence[Protocol]) -> Protocol:
    return next(protocol for protocol in protocols if protocol.name == DIVERGENCE_PROTOCOL)


def _score_windows(
    model: Scorer,
    logits: Tensor,
    judge: Judge | None,
    protocols: Sequence[Protocol],
    windows: Tensor,
) -> Scored:
    """logits [windows, window, vocab] float32; windows [windows, window] int64."""
    first = min(protocol.first_scored for protocol in protocols)
    targets = windows.to(logits.device)
    # A window at a time: its rows are contiguous, so nothing as large as the batch is copied.
    nll = torch.stack(
        [next_token_nll(logits[w, first:-1], targets[w, first + 1 :]) for w in range(len(logits))]
    ).cpu()
    _require_finite(model, nll)
    divergence = None
    if judge is not None:
        begin = _compared_protocol(protocols).first_scored
        parts = [judge(w, logits[w, begin:-1], targets[w, begin + 1 :]) for w in range(len(logits))]
        divergence = TokenDivergence(*(column.cpu() for column in join(parts)))
        _require_finite(model, divergence.kld)
    return Scored(
        {p.name: nll[:, p.first_scored - first :].flatten() for p in protocols}, divergence
    )


def _windows_per_batch(models: Sequence[Scorer], window: int) -> int:
    window_bytes = window * max(model.vocab_size for model in models) * 4
    return max(1, min(MAX_BATCH_WINDOWS, BATCH_LOGITS_BYTES // window_bytes))


def _require_finite(model: Scorer, values: Tensor) -> None:
    if bool(values.isfinite().all()):
        return
    raise QtoolError(
        f"{model.name} gives logits that are not finite for "
        f"{int((~values.isfinite()).sum())} of {values.numel()} tokens (computed in {model.dtype})",
        "try --dtype float32; if that fails too, the weights are damaged: run qtool verify",
    )
