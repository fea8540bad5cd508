"""ln p(continuation | context) for the choices of a question, in one pass that shares what they
share.

The choices of a question begin with the same context, mostly the longer part. So a question is a
tree: rows of the tokens that all its choices begin with, once, then a branch of rows for each
choice. A row attends to the trunk and to the earlier rows of its own branch, at the position that
its token has in its own text, so every number is the one of a pass over that text alone:

    context "a b c", choices "d e" and "f g h"; the last token of a choice is never an input

    rows        a  b  c | d | f  g            trunk | branch 0 | branch 1
    positions   0  1  2 | 3 | 3  4
    predicts    .  . d,f | e | g  h           row c serves both choices

Many trees make one batch: their rows lie one after the other, and only attention, tree by tree,
knows of it. The logits are computed for rows that predict a token of a choice and for no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.kernels.cpu.attention import causal_attention
from qtool.runtime.evaluate.perplexity import rows_of_logits
from qtool.runtime.models.model import Attend, Model, sinks_of

# Rows of one pass: enough for every linear to run at full speed, few enough for a laptop's memory.
ROWS_PER_BATCH = 2048


class Continuation(NamedTuple):
    """token_ids: the context, of at least one token, and what follows it."""

    token_ids: tuple[int, ...]
    num_context_tokens: int


class Likelihood(NamedTuple):
    """logprob: natural, of all tokens of the continuation. is_greedy: each was the likeliest."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Tree:
    """The continuations of one question as rows.

    token_ids, positions, branches   of each row; branch -1 is the trunk
    predictions                      for each continuation its (row, token that comes next)
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    predictions: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


def grow(continuations: Sequence[Continuation], max_tokens: int) -> Tree:
    """One tree; a text longer than max_tokens + 1 loses its beginning, as in lm-eval."""
    texts = [_cut(continuation, max_tokens) for continuation in continuations]
    inputs = [text.token_ids[:-1] for text in texts]
    trunk = _num_common(inputs)
    token_ids = list(inputs[0][:trunk])
    positions = list(range(trunk))
    branches = [-1] * trunk
    predictions = []
    for number, (text, tokens) in enumerate(zip(texts, inputs, strict=True)):
        shift = len(token_ids) - trunk
        token_ids += tokens[trunk:]
        positions += range(trunk, len(tokens))
        branches += [number] * (len(tokens) - trunk)
        predictions.append(
            tuple(
                (place if place < trunk else place + shift, text.token_ids[place + 1])
                for place in range(text.num_context_tokens - 1, len(tokens))
            )
        )
    return Tree(tuple(token_ids), tuple(positions), tuple(branches), tuple(predictions))


def _cut(text: Continuation, max_tokens: int) -> Continuation:
    surplus = max(0, len(text.token_ids) - (max_tokens + 1))
    # A continuation that fills the window alone keeps one token of context: it must have one.
    num_context = max(1, text.num_context_tokens - surplus)
    return Continuation(text.token_ids[surplus:], num_context)


def _num_common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(map(len, texts))
    for place in range(shortest):
        if len({text[place] for text in texts}) > 1:
            return place
    return shortest


def batches(trees: Sequence[Tree], max_rows: int = ROWS_PER_BATCH) -> Iterator[list[Tree]]:
    """Trees in order, as many at a time as have max_rows rows; at least one."""
    batch: list[Tree] = []
    num_rows = 0
    for tree in trees:
        if batch and num_rows + tree.num_rows > max_rows:
            yield batch
            batch, num_rows = [], 0
        batch.append(tree)
        num_rows += tree.num_rows
    if batch:
        yield batch


@torch.inference_mode()
def score_trees(model: Model, trees: Sequence[Tree]) -> list[list[Likelihood]]:
    """For each tree the likelihood of each continuation; NaN where the model's logits are."""
    device = model.device
    token_ids = torch.tensor([token for tree in trees for token in tree.token_ids], device=device)
    positions = torch.tensor([place for tree in trees for place in tree.positions], device=device)
    hidden = model.hidden(token_ids, positions, _attend_in_trees(model, trees))
    starts = [0]
    for tree in trees:
        starts.append(starts[-1] + tree.num_rows)
    wanted = [
        (start + row, token)
        for start, tree in zip(starts, trees, strict=False)
        for predictions in tree.predictions
        for row, token in predictions
    ]
    rows, targets = torch.tensor(wanted, dtype=torch.long, device=device).unbind(dim=-1)
    logprobs, greedy = _score_rows(model.logits, hidden, rows, targets, model.vocab_size)
    results: list[list[Likelihood]] = []
    at = 0
    for tree in trees:
        likelihoods = []
        for predictions in tree.predictions:
            part = slice(at, at + len(predictions))
            at = part.stop
            likelihoods.append(Likelihood(sum(logprobs[part]), all(greedy[part])))
        results.append(likelihoods)
    return results


def _score_rows(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    vocab_size: int,
) -> tuple[list[float], list[bool]]:
    """ln p(target) and whether the target is the likeliest, of each row; [rows] each."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    at_once = rows_of_logits(vocab_size)
    for some, wanted in zip(torch.split(rows, at_once), torch.split(targets, at_once), strict=True):
        logits = logits_of(hidden.index_select(0, some))
        chosen = logits.gather(-1, wanted[:, None]).squeeze(-1)
        logprobs += (chosen.double() - logits.logsumexp(dim=-1).double()).tolist()
        greedy += (logits.argmax(dim=-1) == wanted).tolist()
    return logprobs, greedy


def _attend_in_trees(model: Model, trees: Sequence[Tree]) -> Attend:
    bounds = [0]
    for tree in trees:
        bounds.append(bounds[-1] + tree.num_rows)
    windows = {spec.window for spec in model.attention}
    masks = {
        window: [tree_mask(tree, window).to(model.device) for tree in trees] for window in windows
    }
    sinks = [sinks_of(spec, model.device) for spec in model.attention]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec = model.attention[layer]
        parts = [
            causal_attention(
                query[None, start:stop].contiguous(),
                key[start:stop].transpose(0, 1)[None],
                value[start:stop].transpose(0, 1)[None],
                scale=spec.scale,
                mask=mask,
                softcap=spec.softcap,
                sinks=sinks[layer],
            )[0]
            for (start, stop), mask in zip(pairwise(bounds), masks[spec.window], strict=True)
        ]
        return torch.cat(parts)

    return attend


def tree_mask(tree: Tree, window: int | None) -> Tensor:
    """[rows, rows] bool: which rows (columns) a row sees."""
    positions, branches = torch.tensor(tree.positions), torch.tensor(tree.branches)
    distance = positions[:, None] - positions[None, :]
    same = (branches[None, :] == -1) | (branches[:, None] == branches[None, :])
    mask = same & (distance >= 0)
    return mask if window is None else mask & (distance < window)
