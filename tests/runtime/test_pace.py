"""Chunks of prompts follow what steps were seen to cost; the seconds are made up."""

import pytest

from qtool.runtime.engine.pace import AIM, MIN_TOKENS, Pace


def run(
    pace: Pace, steps: int, *, decode: float, per_token: float, budget: int = 2048
) -> list[tuple[int, float]]:
    """A long prompt beside decoding sequences on a machine of this speed: (tokens, seconds)."""
    taken = []
    for _ in range(steps):
        tokens = pace.max_prompt_tokens(budget, num_decoding=16)
        seconds = decode + tokens * per_token
        pace.observe(seconds, num_prompt_tokens=tokens, num_decoding=16)
        taken.append((tokens, seconds))
    return taken


def decoding(pace: Pace, seconds: float, steps: int = 10) -> None:
    for _ in range(steps):
        pace.observe(seconds, num_prompt_tokens=0, num_decoding=16)


@pytest.mark.parametrize("per_token", [0.00005, 0.0005, 0.002, 0.003])
def test_steps_come_close_to_the_target_and_not_beyond(per_token: float) -> None:
    pace = Pace(0.2)
    decoding(pace, 0.05)
    taken = run(pace, 20, decode=0.05, per_token=per_token)
    assert taken[0][0] == MIN_TOKENS
    assert all(seconds <= 0.2 + 1e-9 for _, seconds in taken)
    assert taken[-1][0] == pytest.approx(min((AIM * 0.2 - 0.05) / per_token, 2048), rel=0.03)


def test_a_machine_that_becomes_slower_is_noticed_within_few_steps() -> None:
    pace = Pace(0.2)
    decoding(pace, 0.05)
    run(pace, 10, decode=0.05, per_token=0.001)
    taken = run(pace, 8, decode=0.05, per_token=0.003)
    assert [seconds > 0.25 for _, seconds in taken] == [True] + [False] * 7
    assert taken[-1][1] == pytest.approx(AIM * 0.2, rel=0.1)


def test_decoding_that_becomes_slower_under_steady_prefill_is_in_the_sum() -> None:
    pace = Pace(0.2)
    decoding(pace, 0.02)
    run(pace, 10, decode=0.02, per_token=0.001)
    taken = run(pace, 20, decode=0.1, per_token=0.001)
    assert taken[-1][1] == pytest.approx(AIM * 0.2, rel=0.1)


def test_short_prompts_say_little_about_long_ones() -> None:
    pace = Pace(0.2)
    decoding(pace, 0.02)
    for _ in range(20):
        pace.observe(0.03, num_prompt_tokens=3, num_decoding=16)
    taken = run(pace, 8, decode=0.02, per_token=0.0005)
    assert taken[-1][0] == pytest.approx((AIM * 0.2 - 0.02) / 0.0005, rel=0.1)


def test_without_anybody_waiting_or_a_target_the_budget_is_all() -> None:
    pace = Pace(0.2)
    pace.observe(1.0, num_prompt_tokens=100, num_decoding=0)
    assert pace.max_prompt_tokens(512, num_decoding=0) == 512
    assert Pace(None).max_prompt_tokens(512, num_decoding=16) == 512


def test_a_target_that_cannot_be_met_still_lets_prompts_advance() -> None:
    pace = Pace(0.01)
    decoding(pace, 0.05)
    taken = run(pace, 5, decode=0.05, per_token=0.01)
    assert {tokens for tokens, _ in taken} == {MIN_TOKENS}
    assert pace.max_prompt_tokens(7, num_decoding=1) == 7
