"""What a step costs on this machine: the engine runs a few kinds of steps, each several times.

    M prompt tokens at once, M = 1, 2, 4 ...      rows(M), with one draw
    a long prompt, chunk after chunk              seconds a pair: the last chunk beyond the first
    B short sequences that decode                 seconds a draw, beyond B prompt tokens
    long sequences that decode                    seconds a read, beyond short ones

Medians: a plan is for what the machine does, not for its best moment.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qtool.errors import FormatError, UsageError
from qtool.json_files import read_json
from qtool.progress import bar
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.llm import LLM
from qtool.runtime.plan.costs import MeasuredCosts
from qtool.runtime.plan.simulate import Limits

REPEATS = 5
DECODE_BATCHES = (1, 2, 4, 8, 16, 32)
SHORT = 16
LONG_BATCH = 4
DECODE_STEPS = 6
SEED = 0
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """What steps cost on a machine, and what an engine is started with there.

    environment  machine and versions
    """

    model: str
    costs: MeasuredCosts
    limits: Limits
    environment: Mapping[str, str]

    def save(self, path: Path) -> None:
        text = json.dumps({"qtool_costs": FORMAT, **asdict(self)}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Raises FormatError for what `save` has not written."""
        found = read_json(path)
        if found.get("qtool_costs") != FORMAT:
            raise FormatError(
                f"{path} holds no measured costs of version {FORMAT}",
                "write them with `qtool plan MODEL --measure --save-costs FILE`",
            )
        try:
            costs: dict[str, Any] = found["costs"]
            rows = tuple((int(rows), float(seconds)) for rows, seconds in costs.pop("rows"))
            return cls(
                str(found["model"]),
                MeasuredCosts(rows, **{name: float(value) for name, value in costs.items()}),
                Limits(**found["limits"]),
                dict(found["environment"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: something is missing or no number: {error}") from error


def measure(model: str, **engine_args: Any) -> Measurement:
    """Load a model as the server does, run its steps, and let go of it.

    engine_args  fields of `EngineConfig`
    """
    from contextlib import closing

    from qtool.runtime.bench.conditions import environment
    from qtool.runtime.llm import LLM

    # As served, but for what would blur a step's cost.
    plain = {"enable_prefix_caching": False, "target_itl_ms": 0.0, "async_scheduling": False}
    with closing(LLM(model, **{**engine_args, **plain})) as llm:
        info = llm.info
        return Measurement(
            model=info.name,
            costs=measure_costs(llm),
            limits=Limits(
                num_blocks=info.num_kv_blocks,
                block_size=info.block_size,
                max_num_seqs=info.max_num_seqs,
                max_num_batched_tokens=info.max_num_batched_tokens,
                target_step_seconds=EngineConfig(model, **engine_args).target_step_seconds(
                    info.device
                ),
            ),
            environment=environment(),
        )


def measure_costs(llm: LLM) -> MeasuredCosts:
    """llm  made without prefix cache, chunk target and speculation; its token budget is the largest
    chunk that is measured
    """
    info = llm.info
    chunk = min(info.max_num_batched_tokens, info.max_model_len // 2)
    long = min(1024, info.max_model_len - DECODE_STEPS - 2)
    if chunk < 2 * SHORT or long < 4 * SHORT:
        raise UsageError(
            f"the model's context of {info.max_model_len} tokens is too short to measure with"
        )
    sizes = [1 << exponent for exponent in range(12) if 1 << exponent < chunk] + [chunk]
    batches = [batch for batch in DECODE_BATCHES if batch <= info.max_num_seqs]
    bench = _Bench(llm.engine, info.vocab_size)
    with bar("measuring steps", total=len(sizes) + len(batches) + 2) as shown:
        prompts: dict[int, float] = {}
        bench.prefill(chunk)  # warms up
        for size in sizes:
            prompts[size] = median(bench.prefill(size)[0] for _ in range(REPEATS))
            shown.advance()
        decodes: dict[int, float] = {}
        for batch in batches:
            decodes[batch] = bench.decode(batch, SHORT)
            shown.advance()
        far = bench.decode(min(LONG_BATCH, max(batches)), long)
        shown.advance()
        num_chunks = min((info.max_model_len - 1) // chunk, 4)
        chunks = [bench.prefill(num_chunks * chunk) for _ in range(REPEATS)]
        shown.advance()
    return _fit(
        prompts, decodes, chunk, long, far, [list(times) for times in zip(*chunks, strict=True)]
    )


def _fit(
    prompts: dict[int, float],
    decodes: dict[int, float],
    chunk: int,
    long: int,
    far: float,
    chunks: Sequence[Sequence[float]],
) -> MeasuredCosts:
    """prompts  seconds of a step by its prompt tokens; decodes: by sequences of SHORT tokens
    far      of a step of LONG_BATCH sequences of `long` tokens
    chunks   of each chunk of a long prompt, several times
    """
    batch = min(LONG_BATCH, max(decodes))
    middle = DECODE_STEPS / 2
    read = max((far - decodes[batch]) / (batch * (long - SHORT)), 0.0)
    pair = 0.0
    if len(chunks) > 1:
        pairs = chunk * chunk * (len(chunks) - 1)
        pair = max((median(chunks[-1]) - median(chunks[0])) / pairs, 0.0)
    largest = max(size for size in decodes if size in prompts)
    beyond = decodes[largest] - prompts[largest] - largest * (SHORT + middle) * read
    draw = max(beyond / (largest - 1), 0.0) if largest > 1 else 0.0
    rows = {
        size: seconds - draw - pair * size * (size + 1) / 2 for size, seconds in prompts.items()
    }
    # Few rows are measured where they come up, in decoding.
    for size, seconds in decodes.items():
        rows[size] = seconds - size * draw - size * (SHORT + middle) * read
    rising, least = [], 0.0
    for size in sorted(rows):
        least = max(least, rows[size])
        rising.append((size, least))
    return MeasuredCosts(tuple(rising), draw, read, pair)


class _Bench:
    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._draw = random.Random(SEED)
        self._count = 0

    def prefill(self, num_tokens: int) -> list[float]:
        """Seconds of each step of a prompt."""
        self._add(num_tokens, 1)
        return self._run()

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a step of sequences with `context` tokens behind them."""
        for _ in range(batch):
            self._add(context, 1 + DECODE_STEPS)
        return median(self._run()[-DECODE_STEPS:])

    def _add(self, num_tokens: int, max_tokens: int) -> None:
        self._count += 1
        prompt = tuple(self._draw.randrange(self._vocab_size) for _ in range(num_tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.add(GenerationRequest(str(self._count), prompt, sampling))

    def _run(self) -> list[float]:
        seconds = []
        while self._engine.has_work:
            start = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds
