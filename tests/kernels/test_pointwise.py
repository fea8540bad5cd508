"""RMSNorm, rotary embedding and the gated activation equal the reference and transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qtool.kernels import reference
from qtool.kernels.cpu import torch_ops


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 256), (3, 4, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype)
    found = torch_ops.rms_norm(x, weight, 1e-5)
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rms_norm_of_a_small_vector() -> None:
    # The mean square of (3, 4) is 12.5.
    found = torch_ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def rotations(angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@pytest.mark.parametrize("heads", [1, 6])
def test_rope_equals_the_reference_and_transformers(heads: int) -> None:
    x = random(5, heads, 16)
    angles = reference.rope_angles(torch.tensor([0, 1, 7, 100, 4000]), random(8, seed=1).abs())
    expected = reference.rope(x, angles)
    torch.testing.assert_close(torch_ops.rope(x, *rotations(angles)), expected)
    both = torch.cat((angles, angles), -1)[None]
    theirs, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], both.cos(), both.sin()
    )
    torch.testing.assert_close(theirs[0].transpose(0, 1), expected)


def test_rope_turns_a_pair_by_its_angle() -> None:
    quarter = torch.tensor([[torch.pi / 2]])
    turned = reference.rope(torch.tensor([[[1.0, 0.0]]]), quarter)
    torch.testing.assert_close(turned, torch.tensor([[[0.0, 1.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = random(3, 20).to(dtype)
    expected = reference.silu_mul(gate_up)
    torch.testing.assert_close(
        torch_ops.silu_mul(gate_up), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
