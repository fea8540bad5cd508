"""Perplexity: windows and scored positions by hand, and a second implementation in float64."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from qtool.errors import QtoolError
from qtool.runtime.evaluate.perplexity import (
    Protocol,
    bits_per_byte,
    cut,
    llama_cpp_protocol,
    mean_and_error,
    next_token_nll,
    papers_protocol,
    perplexity,
)


def test_llama_cpp_scores_the_second_half_of_512_token_windows() -> None:
    protocol = llama_cpp_protocol(context=4096, num_tokens=5000, bos_token_id=1)
    assert (protocol.window, protocol.stride, protocol.first_scored) == (512, 512, 256)
    assert (
        protocol.scored_per_window == 255
    )  # positions 256 .. 510, as n_ctx - n_ctx/2 - 1 in perplexity.cpp
    assert protocol.shortened is None
    assert protocol.label == "llama.cpp, 512-token windows, second half scored"


def test_the_papers_score_every_prediction_of_2048_token_windows() -> None:
    protocol = papers_protocol(context=4096, num_tokens=5000)
    assert (protocol.window, protocol.stride, protocol.first_scored) == (2048, 2048, 0)
    assert protocol.scored_per_window == 2047
    assert protocol.bos_token_id is None
    assert protocol.label == "papers, 2048-token windows, all tokens scored"


def test_a_short_context_shortens_the_window_and_says_so() -> None:
    assert papers_protocol(context=512, num_tokens=9999).label == (
        "papers, 512-token windows (context is 512), all tokens scored"
    )
    short = llama_cpp_protocol(context=128, num_tokens=9999, bos_token_id=None)
    assert short.label == "llama.cpp, 128-token windows (context is 128), second half scored"
    assert short.first_scored == 64


def test_a_short_text_shortens_the_window_and_says_so() -> None:
    assert papers_protocol(context=4096, num_tokens=1500).label == (
        "papers, 1500-token windows (text has 1500 tokens), all tokens scored"
    )
    # llama-perplexity wants two windows of text.
    assert llama_cpp_protocol(context=4096, num_tokens=600, bos_token_id=None).window == 300


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_a_text_of_a_few_tokens_is_refused(num_tokens: int) -> None:
    with pytest.raises(QtoolError) as error:
        llama_cpp_protocol(context=512, num_tokens=num_tokens, bos_token_id=None)
    assert f"text has {num_tokens} tokens" in error.value.message
    assert error.value.hint is not None
    assert "--text" in error.value.hint


def test_windows_do_not_overlap_and_leave_the_rest_out() -> None:
    windows = cut(torch.arange(10, 20), Protocol("papers", 4, 0, None))
    assert windows.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]


def test_bos_replaces_the_first_token_of_each_window_but_not_the_text() -> None:
    text = torch.arange(10, 18)
    windows = cut(text, Protocol("llama.cpp", 4, 2, 1))
    assert windows.tolist() == [[1, 11, 12, 13], [1, 15, 16, 17]]
    assert text.tolist() == list(range(10, 18))


def test_nll_worked_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), then p = (1/8, 7/8, 0)
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.875, 0.0]]).log()
    nll = next_token_nll(logits, torch.tensor([1, 0]))
    assert nll.tolist() == pytest.approx([math.log(4), math.log(8)], rel=1e-6)
    # perplexity is the geometric mean of 4 and 8
    result = perplexity(nll, Protocol("papers", 3, 0, None))
    assert result.value == pytest.approx(math.sqrt(32), rel=1e-6)
    # the two values lie ln(2)/2 from their mean, so the error of the mean is sqrt((ln(2)/2)^2 / (2
    # - 1))
    assert result.error == pytest.approx(math.sqrt(32) * math.log(2) / 2, rel=1e-6)
    assert (result.num_scored, result.num_windows) == (2, 1)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    nll = next_token_nll(torch.zeros(40, 4096), torch.arange(40))
    result = perplexity(nll, Protocol("papers", 41, 0, None))
    assert result.value == pytest.approx(4096, rel=1e-5)
    assert result.error == pytest.approx(0, abs=1e-3)


def test_equals_a_float64_second_implementation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 997, generator=generator) * 4
    targets = torch.randint(0, 997, (500,), generator=generator)

    wide = logits.numpy().astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    nll = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(500), targets.numpy()]
    sum_nll, sum_nll2, count = nll.sum(), (nll * nll).sum(), 500
    expected = math.exp(sum_nll / count)
    expected_error = math.sqrt((sum_nll2 / count - (sum_nll / count) ** 2) / (count - 1)) * expected

    result = perplexity(next_token_nll(logits, targets), Protocol("papers", 501, 0, None))
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.error == pytest.approx(expected_error, rel=1e-5)


def test_not_a_number_reaches_the_result_and_is_not_averaged_away() -> None:
    logits = torch.zeros(4, 8)
    logits[2, 5] = float("nan")
    assert next_token_nll(logits, torch.zeros(4, dtype=torch.long)).isnan().tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_the_error_of_one_value_is_zero_not_a_division_by_zero() -> None:
    assert mean_and_error(torch.tensor([2.0], dtype=torch.float64)) == (2.0, 0.0)


def test_bits_per_byte_by_hand() -> None:
    # Two windows of 8, three predictions each; a token is two bytes long, and one is "é".
    protocol = llama_cpp_protocol(context=8, num_tokens=16, bos_token_id=None)
    nll = torch.full((6,), math.log(2), dtype=torch.float64)

    def decode(ids: Sequence[int]) -> str:
        return "".join("é" if token == 6 else "ab" for token in ids)

    assert bits_per_byte(nll, torch.arange(16), protocol, decode) == pytest.approx(6 / 12)
    with pytest.raises(QtoolError, match="stand for no text"):
        bits_per_byte(nll, torch.arange(16), protocol, lambda ids: "")
