"""Tokens drawn on the device are those that the engine's own sampler draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference_sampling
from qtool.kernels.cuda import sampling
from qtool.kernels.cuda.sampling import Draws
from qtool.runtime.engine.sampler import candidates, pick
from qtool.runtime.engine.sampling_params import SamplingParams

Random = Callable[..., Tensor]


def drawn(logits: Tensor, params: SamplingParams, numbers: list[float]) -> list[int]:
    """Of one row [vocab], a token for each number."""
    rows = len(numbers)
    device = logits.device
    draws = Draws(
        temperatures=torch.full((rows,), params.temperature, device=device),
        top_ks=torch.full((rows,), params.top_k, dtype=torch.int32, device=device),
        top_ps=torch.full((rows,), params.top_p, device=device),
        min_ps=torch.full((rows,), params.min_p, device=device),
        typical_ps=torch.full((rows,), params.typical_p, device=device),
        numbers=torch.tensor([sampling.shorten(number) for number in numbers], device=device),
    )
    tokens, finite = sampling.draw_tokens(logits.expand(rows, -1), draws)
    assert finite.tolist() == [1] * rows
    # The reference draws as the kernel does.
    plain = Draws(*(part.cpu() for part in draws))
    referred, _ = reference_sampling.draw_tokens(logits.cpu().expand(rows, -1), plain)
    assert referred.tolist() == tokens.tolist()
    return tokens.tolist()


def expected(logits: Tensor, params: SamplingParams, number: float) -> int:
    found = candidates(logits.cpu(), params)
    index = pick(torch.from_numpy(found.probabilities), sampling.shorten(number))
    return index if found.token_ids is None else int(found.token_ids[index])


NUMBERS = [0.0, 0.2, 0.47, 0.81, 0.999]
RULES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 2.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "min_p": 0.02, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.0, "typical_p": 0.3},
    {"temperature": 1.3, "top_k": 30, "typical_p": 0.7},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("vocab", [37, pytest.param(6000, marks=pytest.mark.slow)])
def test_the_same_numbers_draw_the_same_tokens(
    rule: dict[str, float], vocab: int, random: Random
) -> None:
    logits = random(vocab, seed=vocab) * 3
    params = SamplingParams(**rule)  # type: ignore[arg-type]
    found = drawn(logits, params, NUMBERS)
    assert found == [expected(logits, params, number) for number in NUMBERS]


def test_drawing_worked_by_hand(device: torch.device) -> None:
    # Probabilities 1/8, 1/2, 1/8, 1/4.
    logits = torch.tensor([1.0, 4.0, 1.0, 2.0], device=device).log()
    plain = SamplingParams(temperature=1.0)
    assert drawn(logits, plain, [0.1, 0.125, 0.624, 0.625, 0.75, 0.999]) == [0, 1, 1, 2, 3, 3]
    two = SamplingParams(temperature=1.0, top_k=2)  # 2/3 and 1/3
    assert drawn(logits, two, [0.0, 0.66, 0.67]) == [1, 1, 3]
    half = SamplingParams(temperature=1.0, top_p=0.5)
    assert drawn(logits, half, [0.0, 0.99]) == [1, 1]
    # Surprises of 3, 1, 3 and 2 bits, 1.75 expected: the last token is nearest, then the second.
    near = SamplingParams(temperature=1.0, typical_p=0.2)
    assert drawn(logits, near, [0.0, 0.99]) == [3, 3]
    nearer = SamplingParams(temperature=1.0, typical_p=0.75)
    assert drawn(logits, nearer, [0.0, 0.66, 0.67]) == [1, 1, 3]


def test_without_temperature_the_first_of_the_likeliest_is_taken(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]], device=device)
    tokens, finite = sampling.draw_tokens(logits, Draws.empty(2, device))
    assert tokens.tolist() == [1, 0]
    assert finite.tolist() == [1, 1]


def test_rows_that_are_no_numbers_are_told(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[1.0, nan, 2.0], [1.0, inf, 2.0], [-inf, -inf, -inf], [-inf, 1.0, -inf]], device=device
    )
    tokens, finite = sampling.draw_tokens(logits, Draws.empty(4, device))
    assert finite.tolist() == [0, 0, 0, 1]
    assert tokens[3].item() == 1


def test_ruled_out_tokens_are_never_drawn(random: Random, device: torch.device) -> None:
    logits = random(50)
    logits[10:] = float("-inf")
    params = SamplingParams(temperature=5.0, top_p=0.999)
    found = drawn(logits, params, [0.0, 0.3, 0.6, 0.9, 1 - 2.0**-40])
    assert set(found) <= set(range(10))
    assert len(set(found)) > 2
