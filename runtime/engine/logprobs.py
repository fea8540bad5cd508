"""Log-probabilities of tokens, of the distribution that the model computed.

They are taken before anything that sampling changes (masks, penalties, temperature), so they say
what the model thinks and not what it was allowed to write. All of one row's numbers come from one
float32 tensor: a client that compares the chosen token's with the best one's may use `==`.
"""

from collections.abc import Sequence as Series
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """One position of a text.

    rank  1 for the likeliest token
    top   the likeliest tokens and their log-probabilities, best first; the chosen one is in it only
          if it is one of them
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


# A row of 150,000 logits takes 0.6 MB, and its log-probabilities as much again.
ROWS_AT_ONCE = 64


def token_logprobs(
    logits: Tensor, token_ids: Series[int], num_top: Series[int]
) -> list[TokenLogprobs]:
    """What each row says of its token; logits [rows, vocab] float32, left as they are.

    num_top  how many of the likeliest tokens each row reports; -1: all of them
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        found.extend(_of_rows(logits[part], token_ids[part], num_top[part]))
    return found


def _of_rows(logits: Tensor, token_ids: Series[int], num_top: Series[int]) -> list[TokenLogprobs]:
    rows = logits.log_softmax(dim=-1)
    vocab = rows.shape[1]
    chosen = rows.gather(1, torch.tensor(token_ids, device=rows.device)[:, None])
    ranks = (rows > chosen).sum(dim=1).add_(1).tolist()
    counts = [vocab if count < 0 else min(count, vocab) for count in num_top]
    values, indices = rows.topk(max(counts), dim=-1)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:count], tops[:count], strict=True)))
        for token_id, logprob, rank, count, ids, tops in zip(
            token_ids,
            chosen[:, 0].tolist(),
            ranks,
            counts,
            indices.tolist(),
            values.tolist(),
            strict=True,
        )
    ]
