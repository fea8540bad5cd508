"""Rules applied on the device leave the logits that the engine's own rules leave."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qtool.kernels import reference_sampling
from qtool.kernels.cuda.sampling_rules import (
    IN_PROMPT,
    Biases,
    Masks,
    Penalized,
    Rules,
    apply_rules,
    num_words,
)
from qtool.runtime.engine.logit_rules import LogitRules
from qtool.runtime.engine.sampling_params import SamplingParams

Random = Callable[..., Tensor]
# More than a block of tokens, and no whole number of words.
VOCAB = 4133


def test_rules_worked_by_hand(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0, 3.0], [1.0, 2.0, -1.0, 3.0]], device=device)
    counts = torch.tensor([[0, IN_PROMPT, 2, IN_PROMPT + 1]], dtype=torch.int32, device=device)
    rules = Rules(
        Biases(
            torch.tensor([0], device=device),
            torch.tensor([1], device=device),
            torch.tensor([4.0], device=device),
        ),
        # The second row may draw tokens 1 and 3.
        Masks(
            torch.tensor([[0b1010]], dtype=torch.int32, device=device),
            torch.tensor([-1, 0], dtype=torch.int32, device=device),
        ),
        Penalized(
            counts,
            torch.tensor([0, -1], dtype=torch.int32, device=device),
            torch.tensor([2, -1], device=device),
            torch.tensor([[2.0, 1.0], [0.5, 0.0], [0.25, 0.0]], device=device),
        ),
    )
    apply_rules(logits, rules)
    # 1; (2 + 4) / 2; -1 * 2 - 3 * 0.5 - 0.25; 3 / 2 - 0.5 - 0.25
    assert logits[0].tolist() == [1.0, 3.0, -3.75, 0.75]
    assert logits[1].tolist() == [-torch.inf, 2.0, -torch.inf, 3.0]
    assert counts.tolist() == [[0, IN_PROMPT, 3, IN_PROMPT + 1]]


def test_rules_are_the_engines_own(random: Random, device: torch.device) -> None:
    """Three rows: penalized, masked, and one that asks for nothing."""
    prompt, answer = list(range(0, 4000, 7)), [5, 5, 9, 4100, 4132]
    penalized = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.3)
    masked = SamplingParams(
        allowed_token_ids=tuple(range(3, 4120, 3)), bad_words=((6,), (4132, 9)), min_tokens=9
    )
    logits = random(3, VOCAB) * 3
    expected = logits.cpu().clone()
    own = []
    for row, asked in enumerate((penalized, masked)):
        rules = LogitRules.for_request(asked, prompt, [33])
        assert rules is not None
        rules.apply(expected[row], [*prompt, *answer])
        own.append(rules)
    counts = torch.zeros(2, VOCAB, dtype=torch.int32)
    counts[1, prompt] = IN_PROMPT
    for token in answer[:-1]:
        counts[1, token] += 1
    bits = own[1].mask([*prompt, *answer], len(prompt) + len(answer), VOCAB)
    assert bits.nbytes == 4 * num_words(VOCAB)
    given = Rules(
        masks=Masks(
            torch.from_numpy(bits.view(np.int32))[None].to(device),
            torch.tensor([-1, 0, -1], dtype=torch.int32, device=device),
        ),
        penalized=Penalized(
            counts.to(device, copy=True),
            torch.tensor([1, -1, -1], dtype=torch.int32, device=device),
            torch.tensor([answer[-1], -1, -1], device=device),
            torch.tensor([[1.3, 1.0, 1.0], [0.7, 0.0, 0.0], [-0.3, 0.0, 0.0]], device=device),
        ),
    )
    assert given.penalized is not None
    assert given.masks is not None
    found = logits.clone()
    apply_rules(found, given)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-7, atol=1e-6)
    assert given.penalized.counts.cpu()[1, 4132] == 1
    assert bool(given.penalized.counts.cpu()[0].eq(0).all())
    # And the reference is the kernel, to the bit.
    referred = logits.cpu().clone()
    reference_sampling.apply_rules(
        referred,
        Rules(
            None,
            Masks(*(part.cpu() for part in given.masks)),
            Penalized(counts.clone(), *(part.cpu() for part in given.penalized[1:])),
        ),
    )
    assert torch.equal(referred, found.cpu())
