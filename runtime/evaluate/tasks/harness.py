"""Any task of EleutherAI's lm-evaluation-harness (the `eval` extra), run in this process.

The harness makes the prompts and counts; the model is ours, through `lm_eval`'s own interface:
likelihoods of tokens by the same trees that our own tasks use, generation by the engine. Choices
that follow one context come to us one after the other, so they share it.

The import of `lm_eval` waits until `run_harness` is called: it takes seconds, and most people do
without.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.progress import bar
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.evaluate.tasks.likelihood import Continuation
from qtool.runtime.evaluate.tasks.results import HarnessResult, compare
from qtool.runtime.evaluate.tasks.scoring import LikelihoodScorer
from qtool.runtime.llm import LLM
from qtool.runtime.loading import LoadedModel
from qtool.runtime.tokenizer import Tokenizer

# What the harness resamples for errors that have no formula; its own 100,000 take minutes.
BOOTSTRAP_ITERATIONS = 1000

# How the harness names the error of a metric "acc,none".
ERROR = "_stderr"


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """All results of one model, and for metrics of right and wrong which questions were right."""

    results: tuple[HarnessResult, ...]
    right: Mapping[tuple[str, str], tuple[bool, ...]]


def run_harness(
    scorer: LikelihoodScorer,
    loaded: LoadedModel | None,
    tasks: Sequence[str],
    *,
    context: int,
    limit: int | None,
    include: Path | None = None,
    original: HarnessRun | None = None,
) -> HarnessRun:
    """Evaluate one model.

    loaded    what generates, for tasks that ask for text; None: those are refused
    include   a folder with task files (YAML) of one's own
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise QtoolError(
            f"tasks of lm-eval need the lm-eval package: {error}", "pip install 'qtool[eval]'"
        ) from error
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"lm-eval has no task {', '.join(unknown)}",
            "`lm-eval ls tasks` prints all of them; a folder of your own is named with "
            "--lm-eval-include",
        )
    found = lm_eval.simple_evaluate(
        model=_model_class()(scorer, loaded, context),
        tasks=[*tasks],
        limit=limit,
        task_manager=manager,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        log_samples=True,
    )
    assert found is not None
    right = _right_answers(found["samples"])
    before = original.right if original is not None else {}
    results = tuple(
        HarnessResult(
            task=task,
            metric=metric.removesuffix(",none"),
            version=str(found["versions"].get(task, "")),
            num_items=len(found["samples"].get(task, ())),
            value=float(value),
            error=_number(values.get(_error_name(metric))),
            compared=(
                compare(right[task, metric], before[task, metric])
                if (task, metric) in right and (task, metric) in before
                else None
            ),
        )
        for task, values in found["results"].items()
        for metric, value in values.items()
        if "," in metric and ERROR not in metric and _number(value) is not None
    )
    return HarnessRun(results, right)


def _error_name(metric: str) -> str:
    name, _, rule = metric.partition(",")
    return f"{name}{ERROR},{rule}"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _right_answers(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[tuple[str, str], tuple[bool, ...]]:
    """Of every metric whose value is 0 or 1 for each question, in the order of the questions."""
    right = {}
    for task, rows in samples.items():
        rules = dict.fromkeys(str(row.get("filter", "none")) for row in rows)
        for rule in rules:
            of_rule = sorted(
                (row for row in rows if str(row.get("filter", "none")) == rule),
                key=lambda row: int(row["doc_id"]),
            )
            for name in of_rule[0].get("metrics", ()):
                values = [row.get(name) for row in of_rule]
                if all(value in (0, 1) for value in values):
                    right[task, f"{name},{rule}"] = tuple(bool(value) for value in values)
    return right


def _model_class() -> Any:
    """Made when it is needed: its base class is lm_eval's."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class QtoolModel(TemplateLM):  # type: ignore[misc]
        """A loaded model, as the harness wants one."""

        def __init__(
            self, scorer: LikelihoodScorer, loaded: LoadedModel | None, context: int
        ) -> None:
            super().__init__()
            if scorer.tokenizer is None:
                raise QtoolError(
                    f"{scorer.name} has no tokenizer, so no question can be put to it",
                    "put the original's tokenizer.json and tokenizer_config.json in its folder",
                )
            self._scorer = scorer
            self._loaded = loaded
            self._context = context
            self._tokens: Tokenizer = scorer.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self._tokens.eos_token_ids[0]

        @property
        def prefix_token_id(self) -> int:
            bos = self._tokens.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            return self._scorer.name

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return self._tokens.apply_chat_template(
                chat_history, add_generation_prompt=add_generation_prompt
            )

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **others: object
        ) -> list[int]:
            if add_special_tokens is None:
                plain = self._tokens.encode(string, add_special_tokens=False)
                bos = self._tokens.bos_token_id
                if bos is not None and plain[:1] == [bos]:
                    return plain
            return self._tokens.encode(string, add_special_tokens is not False)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: object
        ) -> list[tuple[float, bool]]:
            questions = [
                [Continuation((*before, *after), len(before)) for _, before, after in group]
                for _, group in itertools.groupby(requests, key=lambda request: request[1])
            ]
            with bar(f"lm-eval by {self._scorer.name}", total=len(questions)) as shown:
                found = self._scorer.likelihoods(questions, shown.advance)
            return [likelihood for choices in found for likelihood in choices]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            totals = []
            for request in requests:
                windows = map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self._context,
                        context_len=1,
                    ),
                )
                found = self._loglikelihood_tokens([(None, *window) for window in windows])
                totals.append(sum(logprob for logprob, _ in found))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            if self._loaded is None:
                raise QtoolError(
                    f"{self._scorer.name} is scored by transformers, and only the runtime "
                    "generates text",
                    "choose tasks of likelihoods",
                )
            llm = LLM.from_loaded(self._loaded, EngineConfig(self._loaded.source.name))
            prompts, parameters = [], []
            for request in requests:
                wishes = normalize_gen_kwargs(dict(request.args[1]))
                length = int(wishes["max_gen_toks"])
                # As the harness's own backend: what does not fit loses its beginning.
                prompts.append(self.tok_encode(request.args[0])[-(self._context - length) :])
                parameters.append(
                    SamplingParams(
                        temperature=float(wishes.get("temperature", 0.0)),
                        top_p=float(wishes.get("top_p", 1.0)),
                        max_tokens=length,
                        stop=tuple(text for text in wishes["until"] if text),
                        seed=0,
                    )
                )
            return [output.outputs[0].text for output in llm.generate(prompts, parameters)]

    return QtoolModel
