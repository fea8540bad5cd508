"""What drawing a token costs, and what guessing ahead brings.

    python benchmarks/sampling.py --json sampling.json

draw         microseconds to draw one token from logits of 32,000 and of 151,936, by what the
             request asks for, beside transformers' own processors and torch.multinomial, which
             sort the vocabulary for top_p. The logits are those of a model that has an idea: 50
             tokens stand out of the rest
speculation  tokens a second without guesses, with prompt lookup, and with the model itself as its
             draft, for a text that repeats itself and for one that does not. Texts are checked to
             be the same. The bundled model in float32

Times are CPU time of this process, best of several, so that a busy machine does little harm.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import LLM, SamplingParams
from qtool.runtime.bench.conditions import write_result
from qtool.runtime.engine.sampler import sample
from qtool.runtime.engine.sequence import GenerationRequest, Sequence

VOCABULARIES = (32_000, 151_936)
REQUESTS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "temperature, top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k 20, top_p": SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
}
TEXTS = {
    "repeats itself": ("the cat sat on the mat. the cat sat on the mat. the cat", 0.0),
    "does not": ("It was a cold evening in November, and", 0.9),
}
GUESSES = {
    "off": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 4},
    "draft": {"method": "draft", "model": "builtin:books-7m", "num_speculative_tokens": 4},
}
NEW_TOKENS = 120


def best_microseconds(work: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time_ns()
        work()
        best = min(best, time.process_time_ns() - started)
    return best / 1000


def draws(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for vocab in VOCABULARIES:
        logits = 2 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
        logits[:, :50] += 9
        for name, sampling in REQUESTS.items():
            sequence = Sequence(GenerationRequest("r", (1,), sampling), 1, frozenset(), 100)
            ours = partial(sample, logits, [sequence])
            theirs = partial(_transformers(sampling), logits)
            rows.append(
                {
                    "vocabulary": vocab,
                    "request": name,
                    "qtool_us": best_microseconds(ours, repeats),
                    "transformers_us": best_microseconds(theirs, repeats),
                }
            )
    return rows


def _transformers(sampling: SamplingParams) -> Callable[[Tensor], Tensor]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.greedy:
        return lambda logits: logits.argmax(-1)
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    def draw(logits: Tensor) -> Tensor:
        for warper in warpers:
            logits = warper(prompt, logits)
        return torch.multinomial(logits.softmax(-1), 1)

    return draw


def speculation(batch: int) -> list[dict[str, Any]]:
    rows = []
    texts: dict[str, set[tuple[int, ...]]] = {}
    for guesses, config in GUESSES.items():
        llm = LLM("builtin:books-7m", dtype="float32", speculative_config=config)
        for text, (prompt, temperature) in TEXTS.items():
            sampling = SamplingParams(
                temperature=temperature, seed=1, max_tokens=NEW_TOKENS, ignore_eos=True
            )
            llm.generate([prompt] * batch, sampling, use_tqdm=False)  # measures what pays
            before, started = llm.engine.stats(), time.process_time()
            found = llm.generate([prompt] * batch, sampling, use_tqdm=False)
            seconds, after = time.process_time() - started, llm.engine.stats()
            texts.setdefault(text, set()).update(one.outputs[0].token_ids for one in found)
            guessed = after.spec_decode_num_draft_tokens - before.spec_decode_num_draft_tokens
            right = after.spec_decode_num_accepted_tokens - before.spec_decode_num_accepted_tokens
            rows.append(
                {
                    "text": text,
                    "guesses": guesses,
                    "batch": batch,
                    "tokens_per_second": batch * NEW_TOKENS / seconds,
                    "guessed": guessed,
                    "right": right,
                }
            )
    assert all(len(same) == 1 for same in texts.values()), "guesses changed a text"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(1)
    with torch.inference_mode():
        results = {"draw": draws(arguments.repeats)}
    results["speculation"] = speculation(arguments.batch)
    for row in results["draw"]:
        ratio = row["transformers_us"] / row["qtool_us"]
        print(
            f"{row['vocabulary']:>7} {row['request']:<20} {row['qtool_us']:8.0f} us, "
            f"transformers {row['transformers_us']:8.0f} us, {ratio:5.1f} x"
        )
    off = {
        r["text"]: r["tokens_per_second"] for r in results["speculation"] if r["guesses"] == "off"
    }
    for row in results["speculation"]:
        print(
            f"{row['text']:<15} {row['guesses']:<6} {row['tokens_per_second']:7.1f} tokens/s, "
            f"{row['tokens_per_second'] / off[row['text']]:4.2f} x, "
            f"{row['right']} of {row['guessed']} guesses right"
        )
    if arguments.json is not None:
        write_result(arguments.json, {"threads": 1, **results}, load_before=load_before)


if __name__ == "__main__":
    main()
