"""Likelihoods of trees are those of each text alone, and answers are counted as others count."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from qtool.runtime.evaluate.scorer import Scorer, TransformersScorer, open_scorer
from qtool.runtime.evaluate.tasks.items import following
from qtool.runtime.evaluate.tasks.likelihood import (
    Continuation,
    Likelihood,
    batches,
    grow,
    score_trees,
    tree_mask,
)
from qtool.runtime.evaluate.tasks.results import compare, judge, mcnemar, share, summarize
from qtool.runtime.evaluate.tasks.scoring import answer, encode_pair
from qtool.runtime.evaluate.tasks.tasks import Task
from qtool.runtime.loading import load_model
from qtool.source import Source, resolve


def test_a_tree_by_hand() -> None:
    # a b c, then d e or f g h: the row of c predicts for both.
    tree = grow([Continuation((1, 2, 3, 4, 5), 3), Continuation((1, 2, 3, 6, 7, 8), 3)], 100)
    assert tree.token_ids == (1, 2, 3, 4, 6, 7)
    assert tree.positions == (0, 1, 2, 3, 3, 4)
    assert tree.branches == (-1, -1, -1, 0, 1, 1)
    assert tree.predictions == (((2, 4), (3, 5)), ((2, 6), (4, 7), (5, 8)))
    assert tree_mask(tree, None).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert tree_mask(tree, 2).int().tolist()[-1] == [0, 0, 0, 0, 1, 1]


def test_what_does_not_fit_loses_its_beginning() -> None:
    tree = grow([Continuation((1, 2, 3, 4, 5, 6), 4)], 3)
    assert tree.token_ids == (3, 4, 5)
    assert tree.positions == (0, 1, 2)
    assert tree.predictions == (((1, 5), (2, 6)),)
    # A continuation longer than the window keeps one token to be predicted from.
    assert grow([Continuation((1, 2, 3, 4, 5, 6), 1)], 3).predictions == (((0, 4), (1, 5), (2, 6)),)


def test_batches_hold_every_tree_once_and_no_more_rows_than_allowed() -> None:
    trees = [grow([Continuation((1,) * n, 1)], 100) for n in (4, 9, 3, 30, 2, 2)]
    found = list(batches(trees, max_rows=12))
    assert [tree for batch in found for tree in batch] == trees
    assert [[tree.num_rows for tree in batch] for batch in found] == [[3, 8], [2], [29], [1, 1]]


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_likelihoods_are_those_of_each_text_alone(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    overrides = {"sliding_window": 8} if family == "mistral" else {}
    loaded = load_model(str(tiny_checkpoint(family, **overrides)), dtype="float32")
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 1000, (length,), generator=generator).tolist())

    questions = []
    for length, ends in ((12, (3, 1, 7)), (1, (2, 2)), (30, (4,))):
        context = text(length)
        questions.append([Continuation(context + text(end), length) for end in ends])
    # Two choices that begin alike: the trunk reaches into them.
    first = questions[0][0].token_ids
    questions.append([Continuation(first, 12), Continuation((*first[:13], 9, 10), 12)])
    found = score_trees(loaded.decoder, [grow(question, 512) for question in questions])
    for question, likelihoods in zip(questions, found, strict=True):
        for (tokens, num_context), likelihood in zip(question, likelihoods, strict=True):
            logits = loaded.logits(torch.tensor([tokens]))[0, num_context - 1 : -1].double()
            targets = torch.tensor(tokens[num_context:])
            expected = logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
            assert likelihood.logprob == pytest.approx(expected, abs=1e-3)
            assert likelihood.is_greedy == bool((logits.argmax(-1) == targets).all())


def test_a_greedy_continuation_is_seen_as_one(books_7m: Path) -> None:
    loaded = load_model(str(books_7m), dtype="float32")
    tokens = [5, 17, 42, 99]
    for _ in range(3):
        tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    (found,) = score_trees(
        loaded.decoder,
        [grow([Continuation(tuple(tokens), 4), Continuation((*tokens[:-1], 7), 4)], 512)],
    )
    assert [likelihood.is_greedy for likelihood in found] == [True, False]


def test_the_runtime_and_transformers_answer_alike(books_7m: Path) -> None:
    source = Source(str(books_7m), books_7m)
    own = open_scorer(source, "own", dtype="float32", device="cpu")
    theirs = TransformersScorer.load(source, "theirs", dtype="float32", device="cpu")
    items = tuple(
        following(f"He said that the {noun}", ["was very old", "had gone", "of of of"], 0)
        for noun in ("house", "king", "sea ")
    )
    task = Task("mine", "acc", "here", items, 3)

    def likelihoods(scorer: Scorer) -> list[float]:
        questions = [[encode_pair(scorer, *choice) for choice in item.choices] for item in items]
        found = scorer.likelihoods(questions, lambda count: None)
        return [likelihood.logprob for choices in found for likelihood in choices]

    assert likelihoods(own) == pytest.approx(likelihoods(theirs), abs=1e-3)
    advanced: list[int] = []
    assert answer(own, task, advanced.append) == answer(theirs, task, lambda count: None)
    assert sum(advanced) == 3


def test_spaces_at_the_end_of_a_context_go_over_to_the_continuation(books_7m: Path) -> None:
    scorer = open_scorer(resolve(str(books_7m)), "own", dtype="float32", device="cpu")
    assert encode_pair(scorer, "the king ", "was") == encode_pair(scorer, "the king", " was")
    alone = encode_pair(scorer, "", "was")
    assert alone.num_context_tokens == 1
    assert len(alone.token_ids) >= 2


def test_accuracy_counts_the_likeliest_choice_and_its_length() -> None:
    items = [following("q", ["yes", "certainly so"], gold) for gold in (0, 1)]
    # ln p a character: -1 and -0.25.
    found = [[Likelihood(-3.0, False), Likelihood(-3.5, False)]] * 2
    answers = judge(items, found)
    assert answers.acc == (True, False)
    assert answers.acc_norm == (False, True)
    cloze = judge(
        [following("q", ["a"], None)] * 2,
        [[Likelihood(-1.0, True)], [Likelihood(-3.0, False)]],
    )
    assert (cloze.acc, cloze.acc_norm) == ((True, False), None)
    result = summarize(Task("x", "acc_norm", "here", (), 2), cloze, None)
    assert result.metric == "acc"
    assert result.perplexity == pytest.approx(math.exp(2))


def test_the_standard_error_of_a_share() -> None:
    right = [True] * 3 + [False] * 7
    mean = 0.3
    spread = math.sqrt(sum((value - mean) ** 2 for value in right) / 9 / 10)
    assert share(right).value == pytest.approx(mean)
    assert share(right).error == pytest.approx(spread)
    assert share([True]).error == 0.0


def test_mcnemar_is_the_share_of_coin_throws_at_least_as_uneven() -> None:
    for first, second in ((0, 0), (1, 5), (4, 4), (0, 7), (6, 2)):
        count = first + second
        uneven = abs(first - second)
        throws = [abs(count - 2 * sum(heads)) for heads in product((0, 1), repeat=count)]
        expected = sum(value >= uneven for value in throws) / len(throws)
        assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(4800, 5200) < 1e-3


def test_two_models_are_compared_on_the_questions_where_they_differ() -> None:
    model = [True, True, False, False, True]
    original = [True, False, True, True, False]
    found = compare(model, original)
    assert (found.num_only_model, found.num_only_original) == (2, 2)
    assert found.difference.value == 0.0
    differences = [own - other for own, other in zip(model, original, strict=True)]
    spread = math.sqrt(sum(value**2 for value in differences) / 4 / 5)
    assert found.difference.error == pytest.approx(spread)
    assert found.is_noise
    assert not compare([True] * 12, [False] * 12).is_noise
