"""transformers as the oracle: the same folders, in float32, through its own modelling code."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Logits = Callable[[Path, Tensor], Tensor]
Greedy = Callable[[Path, Sequence[int], int], list[int]]


@functools.cache
def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def transformers_logits() -> Logits:
    """(folder, tokens [batch, tokens]) -> float32 [batch, tokens, vocab]"""

    def logits(folder: Path, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = _model(folder)(tokens).logits
        return found

    return logits


@pytest.fixture(scope="session")
def transformers_greedy() -> Greedy:
    """(folder, prompt ids, number of new tokens) -> what `generate` appends, end of text or not."""

    def greedy(folder: Path, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        tokens = torch.tensor([list(prompt)])
        with torch.no_grad():
            found = _model(folder).generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ids: list[int] = found[0, len(prompt) :].tolist()
        return ids

    return greedy
