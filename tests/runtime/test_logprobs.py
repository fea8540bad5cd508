"""Log-probabilities of chosen tokens against torch's, in float64."""

import pytest
import torch

from qtool.runtime.engine.logprobs import ROWS_AT_ONCE, token_logprobs
from qtool.runtime.engine.sampler import Sampled, sample
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest, Sequence


def test_each_row_reports_its_token_its_rank_and_its_best() -> None:
    rows = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    chosen, counts = [3, int(rows[1].argmax()), 39, 0, 17], [2, 0, 5, -1, 1000]
    expected = rows.double().log_softmax(-1)
    for row, found in enumerate(token_logprobs(rows, chosen, counts)):
        ordered = expected[row].sort(descending=True)
        assert found.token_id == chosen[row]
        assert found.logprob == pytest.approx(float(expected[row, chosen[row]]), abs=1e-5)
        assert found.rank == int((expected[row] > expected[row, chosen[row]]).sum()) + 1
        count = [2, 0, 5, 40, 40][row]
        assert [token for token, _ in found.top] == ordered.indices[:count].tolist()
        assert [value for _, value in found.top] == pytest.approx(
            ordered.values[:count].tolist(), abs=1e-5
        )
        # Equal as floats, not nearly: clients find the greedy token by comparing.
        assert dict(found.top).get(found.token_id, found.logprob) == found.logprob


def test_many_rows_are_done_in_parts() -> None:
    rows = torch.randn(ROWS_AT_ONCE + 3, 10, generator=torch.Generator().manual_seed(1))
    chosen = [row % 10 for row in range(len(rows))]
    whole = token_logprobs(rows, chosen, [2] * len(rows))
    alone = [token_logprobs(rows[i : i + 1], chosen[i : i + 1], [2])[0] for i in range(len(rows))]
    assert whole == alone


def test_they_are_the_models_own_whatever_the_request_changes() -> None:
    rows = torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    request = GenerationRequest(
        "r", (1, 2), SamplingParams(temperature=0.2, logit_bias={4: 100.0}, logprobs=3, seed=1)
    )
    sequence = Sequence(request, seed=1, stop_token_ids=frozenset(), max_total_tokens=100)
    sequence.draft_token_ids = [4, 4]
    (found,) = sample(rows.clone(), [sequence], [3])
    assert isinstance(found, Sampled)
    assert found.token_ids == (4, 4, 4)
    assert found.logprobs == tuple(token_logprobs(rows, [4] * 3, [3] * 3))


def test_asking_for_them_changes_no_text() -> None:
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))

    def ids(**options: object) -> list[tuple[int, ...]]:
        sampling = SamplingParams(seed=7, frequency_penalty=0.5, **options)  # type: ignore[arg-type]
        sequences = [
            Sequence(GenerationRequest("r", (n, 2), sampling), 7, frozenset(), 100)
            for n in range(4)
        ]
        return [found.token_ids for found in sample(rows.clone(), sequences)]  # type: ignore[union-attr]

    assert ids() == ids(logprobs=2) == ids(logprobs=0)
