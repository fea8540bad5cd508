"""How many prompt tokens a step may compute while others wait for their next token.

A step that computes p prompt tokens beside the decoding sequences takes

    seconds = decode_seconds + p * seconds_per_token

and every decoding sequence waits that long. A fixed number of tokens cannot suit: on two cores 512
tokens of a 0.5B model take most of a second, on a GPU a few milliseconds. So both terms are learned
from the steps there were, and p is what fits into the target.

`decode_seconds` comes from steps without prompt tokens, `seconds_per_token` from what others took
beyond it, weighted by their tokens: the few of a short prompt say little. Under steady prefill the
first is never renewed; what it is wrong by is then in the second term, which was measured at nearly
the same p, so the sum stays right. Both follow the latest steps (attention over a longer context
costs more), upwards faster than downwards: a step too long is felt by everybody, one too short
costs a little throughput.

Pure arithmetic on the seconds it is told: it has no clock.
"""

from dataclasses import dataclass

# What is kept of the past when the newest step was slower than it foretold, and when faster.
KEPT_RISING = 0.5
KEPT_FALLING = 0.8
# The first chunk beside decoding sequences, when nothing is known of what a token costs, and the
# fewest later, however slow the machine: a prompt has to end, too.
MIN_TOKENS = 16
# A chunk grows by no more than this from one step to the next: costs were measured near the last.
MAX_GROWTH = 2.0
# Of the target, what is aimed at: half of all steps take longer than their estimate.
AIM = 0.85
# A step of prompt tokens that took no longer than decoding alone: this share was theirs.
LEAST_SHARE = 0.1


@dataclass(slots=True)
class Pace:
    """Learns what steps cost, and sizes prompt chunks by it.

    target_seconds  how long a step with decoding sequences may take; None: no bound
    """

    target_seconds: float | None
    decode_seconds: float = 0.0
    _prompt_seconds: float = 0.0
    _prompt_tokens: float = 0.0
    _latest_tokens: int = 0

    @property
    def seconds_per_token(self) -> float | None:
        """None: nothing is known yet."""
        return self._prompt_seconds / self._prompt_tokens if self._prompt_tokens else None

    def observe(self, seconds: float, *, num_prompt_tokens: int, num_decoding: int) -> None:
        """Take note of a step that is over."""
        if num_prompt_tokens:
            beyond = max(seconds - self.decode_seconds, LEAST_SHARE * seconds)
            known = self.seconds_per_token
            kept = _kept(known or 0.0, beyond / num_prompt_tokens)
            self._prompt_seconds = kept * self._prompt_seconds + (1 - kept) * beyond
            self._prompt_tokens = kept * self._prompt_tokens + (1 - kept) * num_prompt_tokens
            self._latest_tokens = num_prompt_tokens
        elif num_decoding:
            kept = _kept(self.decode_seconds, seconds) if self.decode_seconds else 0.0
            self.decode_seconds = kept * self.decode_seconds + (1 - kept) * seconds

    def max_prompt_tokens(self, budget: int, num_decoding: int) -> int:
        """How many prompt tokens the next step may compute, of a budget."""
        if self.target_seconds is None or num_decoding == 0:
            return budget
        cost = self.seconds_per_token
        if cost is None:
            return min(budget, MIN_TOKENS)
        left = max(AIM * self.target_seconds - self.decode_seconds, 0.0)
        fitting = int(left / cost) if left < budget * cost else budget
        return min(budget, max(MIN_TOKENS, min(fitting, int(MAX_GROWTH * self._latest_tokens))))


def _kept(known: float, newest: float) -> float:
    return KEPT_RISING if newest > known else KEPT_FALLING
