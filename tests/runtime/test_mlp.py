"""Experts: who is chosen, that each multiplies once by all of its tokens, and that no token's
result depends on the others.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.decoder_config import ExpertsConfig
from qtool.kernels.cpu import torch_ops
from qtool.kernels.dispatch import KERNELS
from qtool.runtime.layers import Linear
from qtool.runtime.models.mlp import Mlp, SparseMlp, route
from qtool.runtime.models.parts import GATED

HIDDEN, INNER = 16, 8
DENSE = next(kernel for kernel in KERNELS if kernel.name == "dense")


def config(**changes: Any) -> ExpertsConfig:
    settings: dict[str, Any] = {
        "count": 6,
        "per_token": 2,
        "intermediate_size": INNER,
        "scoring": "softmax",
        "normalized": False,
        "scaling": 1.0,
        "groups": 1,
        "used_groups": 1,
        "shared_size": 0,
    }
    return ExpertsConfig(**{**settings, **changes})


def linear(rows: int, columns: int, seed: int) -> Linear:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Linear(DENSE, torch_ops.DensePacked(values), None)


def mlp(seed: int, calls: list[int] | None = None) -> Mlp:
    gated = GATED["silu"]

    def counted(x: Tensor) -> Tensor:
        if calls is not None:
            calls.append(x.shape[0])
        return gated(x)

    return Mlp(linear(2 * INNER, HIDDEN, seed), counted, linear(HIDDEN, INNER, seed + 100))


def sparse(calls: list[int] | None = None, **changes: Any) -> SparseMlp:
    settings = config(**changes)
    return SparseMlp(
        config=settings,
        router=torch.randn(settings.count, HIDDEN, generator=torch.Generator().manual_seed(9)),
        router_bias=None,
        experts=tuple(mlp(expert, calls) for expert in range(settings.count)),
        shared=mlp(50) if settings.shared_size else None,
        shared_gate=torch.ones(1, HIDDEN) if settings.shared_size else None,
    )


def rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shared", [0, INNER])
def test_the_sum_is_that_of_each_tokens_experts(shared: int) -> None:
    layer, x = sparse(shared_size=shared), rows(20)
    chosen, weights = route(F.linear(x, layer.router), layer.config, None)
    expected = torch.zeros_like(x)
    for row, token in enumerate(x):
        for expert, weight in zip(chosen[row], weights[row], strict=True):
            expected[row] += float(weight) * layer.experts[int(expert)](token[None])[0]
    if layer.shared is not None:
        expected += x.sum(1, keepdim=True).sigmoid() * layer.shared(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_multiplies_once_and_only_where_it_is_chosen() -> None:
    calls: list[int] = []
    layer = sparse(calls, count=64)
    layer(rows(10))
    assert sum(calls) == 20
    assert len(calls) <= 20
    assert all(calls)


def test_a_token_does_not_depend_on_the_others() -> None:
    layer, x = sparse(), rows(12)
    whole = layer(x)
    for row in range(12):
        torch.testing.assert_close(layer(x[row : row + 1])[0], whole[row], rtol=1e-4, atol=1e-5)


def test_scores_are_normalized_and_scaled_where_the_config_says_so() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    _, plain = route(logits, config(count=4), None)
    assert plain.sum() < 1
    _, weights = route(logits, config(count=4, normalized=True, scaling=2.5), None)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([2.5]))
    torch.testing.assert_close(weights, plain / plain.sum() * 2.5)


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    chosen, weights = route(logits, config(count=4, scoring="sigmoid"), bias)
    assert set(chosen[0].tolist()) == {0, 3}
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, chosen))


@pytest.mark.parametrize(
    ("bias", "expected"), [(None, {0, 1}), (torch.zeros(6), {2, 3})], ids=["best", "best two"]
)
def test_experts_are_chosen_within_the_best_group(bias: Tensor | None, expected: set[int]) -> None:
    """Groups (0, 1), (2, 3), (4, 5): the first has the best expert, the second the best two."""
    logits = torch.tensor([[3.0, -3.0, 2.0, 1.9, 0.0, 0.0]])
    chosen, _ = route(logits, config(groups=3, used_groups=1, scoring="sigmoid"), bias)
    assert set(chosen[0].tolist()) == expected
