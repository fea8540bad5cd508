"""All experts at once compute what each does with its own tokens."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.kernels import reference
from qtool.kernels.cuda import experts, marlin_linear, tuning
from qtool.kernels.cuda.fused import Activation
from qtool.weights import QuantizedWeight

Random = Callable[..., Tensor]
Quantized = Callable[..., QuantizedWeight]
Error = Callable[[Tensor, Tensor], float]


def test_the_alignment_worked_by_hand() -> None:
    found = experts.align(torch.tensor([[1, 0], [1, 2]]), num_experts=4, height=2)
    assert found.rows.tolist()[:6] == [0, -1, 0, 1, 1, -1]
    assert found.places.tolist() == [[2, 0], [3, 4]]
    assert found.experts.tolist() == [0, 1, 2, -1, -1, -1]


@pytest.mark.parametrize(
    ("tokens", "choices", "num"), [(1, 2, 8), (50, 4, 8), (7, 1, 3), (9, 3, 3)]
)
def test_every_choice_has_a_place_in_a_tile_of_its_expert(
    tokens: int, choices: int, num: int
) -> None:
    scores = torch.rand(tokens, num, generator=torch.Generator().manual_seed(tokens))
    chosen = scores.topk(choices, dim=-1).indices
    found = experts.align(chosen, num, 4)
    assert len(found.rows) == 4 * len(found.experts)
    assert len(set(found.places.flatten().tolist())) == tokens * choices
    for token in range(tokens):
        for choice in range(choices):
            place = int(found.places[token, choice])
            assert found.rows[place] == token
            assert found.experts[place // 4] == chosen[token, choice]
    assert int((found.rows >= 0).sum()) == tokens * choices


@pytest.fixture
def _only_gate_up_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> Iterator[None]:
    """As where another linear of the model has the experts' shape: tiles of 32 rows, not of 16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = {"bits": 4, "max_rows": 32, "out": 128, "in": 64, "strips": 1, "rows": 32, "warps": 4}
    tuning.write_tuned(device, [row | {"stages": 2, "split": 1}])
    yield
    monkeypatch.undo()
    tuning.forget()


@pytest.mark.usefixtures("_only_gate_up_tuned")
@pytest.mark.parametrize(
    ("scheme", "activation", "tokens"),
    [("int4-g32-asym", "silu", 3), ("int8-g32-sym", "gelu_tanh", 9)],
)
def test_experts_equal_the_reference(
    scheme: str,
    activation: Activation,
    tokens: int,
    device: torch.device,
    quantized: Quantized,
    random: Random,
    relative_error: Error,
) -> None:
    num, choices, hidden, inner = 4, 2, 64, 64
    ups = [quantized(2 * inner, hidden, scheme, seed=index) for index in range(num)]
    downs = [quantized(hidden, inner, scheme, seed=10 + index) for index in range(num)]
    stacked = experts.stack(
        [marlin_linear.pack(weight, torch.float32, device) for weight in ups],
        [marlin_linear.pack(weight, torch.float32, device) for weight in downs],
        activation,
    )
    assert stacked is not None
    x, scores = random(tokens, hidden), random(tokens, num, seed=1).softmax(-1)
    weights, chosen = scores.topk(choices, dim=-1)
    found = stacked(x, chosen, weights)
    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for weight, expert in zip(weights[token].tolist(), chosen[token].tolist(), strict=True):
            both = reference.linear(x[token : token + 1].cpu(), ups[expert])
            gate, up = both.chunk(2, dim=-1)
            if activation == "silu":
                active = torch.nn.functional.silu(gate)
            else:
                active = torch.nn.functional.gelu(gate, approximate="tanh")
            expected[token] += weight * reference.linear(active * up, downs[expert])[0]
    assert relative_error(found, expected) < 1e-5


def test_experts_packed_differently_are_not_stacked(
    device: torch.device, quantized: Quantized
) -> None:
    ups = [quantized(128, 64, "int4-g32-sym"), quantized(128, 64, "int8-g32-sym")]
    downs = [quantized(64, 64, "int4-g32-sym")] * 2
    packed = [
        [marlin_linear.pack(weight, torch.float32, device) for weight in weights]
        for weights in (ups, downs)
    ]
    assert experts.stack(*packed, "silu") is None


def test_a_view_of_one_expert_is_that_expert(device: torch.device, quantized: Quantized) -> None:
    each = [
        marlin_linear.pack(quantized(64, 64, "int4-g32-asym", seed=seed), torch.float32, device)
        for seed in (1, 2)
    ]
    stacked = experts.stack(each, each, "silu")
    assert stacked is not None
    for index, one in enumerate(each):
        seen = experts.view(stacked.down, index)
        assert torch.equal(seen.words, one.words)
        assert seen[3:] == one[3:]
        assert seen.words.data_ptr() == stacked.down.words[index].data_ptr()
