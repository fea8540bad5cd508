"""Multiple-choice questions and cloze texts as a model meets them: contexts and what may follow.

Every task here is scored the same way: ln p(continuation | context), the likeliest choice wins. So
a task is a list of items, whatever its files look like. What a row of a file means is told by its
keys alone, which is why any local JSONL with one of these sets of keys is a task:

    query, choices, gold                    a question and its answers (MosaicML's llm-foundry)
    context_options, continuation, gold     two beginnings, one end (WinoGrande, scored "partially")
    context, continuation                   a text and its last word (LAMBADA)
    question, choices {text, label}, answerKey        ARC as the Hub has it; also question_stem
    question, choices [...], answer         MMLU as the Hub has it
    goal, sol1, sol2, label                 PIQA as the Hub has it
    activity_label, ctx_a, ctx_b, endings, label      HellaSwag as the Hub has it
    sentence, option1, option2, answer      WinoGrande as the Hub has it
    text                                    LAMBADA as the Hub has it

Prompts are those of EleutherAI's lm-evaluation-harness, so that numbers can be set beside its own:
"Question: ...\\nAnswer:" where a row's text begins with "Question:", a space between a context and
its continuation, and HellaSwag without WikiHow's marks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Choice(NamedTuple):
    """Scored as ln p(continuation | context); a space between words belongs to the continuation."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    choices   what may follow, each behind its own context
    gold      the right one; None: there is one choice, and it is right if greedy decoding gives it
    """

    choices: tuple[Choice, ...]
    gold: int | None

    def __post_init__(self) -> None:
        if self.gold is None:
            if len(self.choices) != 1:
                raise ValueError(f"{len(self.choices)} choices and none of them marked as right")
        elif len(self.choices) < 2:
            raise ValueError("fewer than two choices")
        elif not 0 <= self.gold < len(self.choices):
            raise ValueError(f"the right answer is {self.gold} of {len(self.choices)} choices")
        if not all(choice.continuation.strip() for choice in self.choices):
            raise ValueError("a choice is empty")


class Shape(NamedTuple):
    """Rows that hold `keys` are read by `read`, which raises ValueError, KeyError or TypeError for
    values that make no item.
    """

    keys: frozenset[str]
    read: Callable[[Row], Item]


def read_row(row: object) -> Item:
    """Raises ValueError with what is wrong, for any value at all."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a {type(row).__name__}, not an object")
    for shape in SHAPES:
        if shape.keys <= row.keys():
            try:
                return shape.read(row)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(f"{type(error).__name__} {error} in {_shortly(row)}") from error
    known = "; ".join(", ".join(sorted(shape.keys)) for shape in SHAPES)
    raise ValueError(f"its keys are {', '.join(map(str, row))}; known are: {known}")


def following(context: str, choices: Sequence[str], gold: int | None) -> Item:
    """Choices behind one context, a space between."""
    return Item(tuple(Choice(context, f" {choice}") for choice in choices), gold)


def lettered(question: str, choices: Sequence[str], gold: int, description: str = "") -> Item:
    """MMLU's form: the answers are listed in the context, and a letter is asked for."""
    letters = "ABCDEFGHIJ"[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    context = "\n".join([f"{description}{question.strip()}", *lines, "Answer:"])
    return following(context, letters, gold)


def described(subject: str) -> str:
    """What MMLU puts before a question of "abstract_algebra"."""
    words = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


def blank_filled(sentence: str, options: Sequence[str], gold: int) -> Item:
    """WinoGrande: each option in the place of "_" is a beginning, the rest of the text the end."""
    before, found, after = sentence.partition("_")
    if not found:
        raise ValueError(f"no _ in {sentence!r}")
    end = f" {after.strip()}"
    return Item(tuple(Choice(before + option, end) for option in options), gold)


def without_marks(text: str) -> str:
    """HellaSwag's WikiHow texts without their [title] and [step]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _query(row: Row) -> Item:
    query = _text(row["query"])
    if query.startswith("Question:"):
        query = f"{query.rstrip()}\nAnswer:"
    return following(query, _texts(row["choices"]), int(row["gold"]))


def _context_options(row: Row) -> Item:
    end = f" {_text(row['continuation']).strip()}"
    contexts = _texts(row["context_options"])
    return Item(tuple(Choice(context, end) for context in contexts), int(row["gold"]))


def _cloze(row: Row) -> Item:
    return following(_text(row["context"]), [_text(row["continuation"]).strip()], None)


def _labelled(row: Row) -> Item:
    choices = row["choices"]
    gold = list(choices["label"]).index(str(row["answerKey"]).strip())
    if "question_stem" in row:
        return following(_text(row["question_stem"]), _texts(choices["text"]), gold)
    context = f"Question: {_text(row['question'])}\nAnswer:"
    return following(context, _texts(choices["text"]), gold)


def _mmlu(row: Row) -> Item:
    if isinstance(row["choices"], Mapping):
        return _labelled(row)
    description = described(_text(row["subject"])) if "subject" in row else ""
    return lettered(_text(row["question"]), _texts(row["choices"]), int(row["answer"]), description)


def _piqa(row: Row) -> Item:
    choices = [_text(row["sol1"]), _text(row["sol2"])]
    return following(f"Question: {_text(row['goal'])}\nAnswer:", choices, int(row["label"]))


def _hellaswag(row: Row) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [without_marks(ending) for ending in _texts(row["endings"])]
    return following(without_marks(context), endings, int(row["label"]))


def _winogrande(row: Row) -> Item:
    options = [_text(row["option1"]), _text(row["option2"])]
    return blank_filled(_text(row["sentence"]), options, int(row["answer"]) - 1)


def _lambada(row: Row) -> Item:
    context, _, word = _text(row["text"]).rpartition(" ")
    return following(context, [word], None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: object) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{values!r} is no list of texts")
    return [_text(value) for value in values]


def _shortly(row: Row) -> str:
    text = repr(dict(row))
    return text if len(text) <= 200 else f"{text[:200]} ..."


# The first that fits; those with more keys come before those that hold a part of them.
SHAPES = (
    Shape(frozenset({"query", "choices", "gold"}), _query),
    Shape(frozenset({"context_options", "continuation", "gold"}), _context_options),
    Shape(frozenset({"context", "continuation"}), _cloze),
    Shape(frozenset({"question", "choices", "answerKey"}), _labelled),
    Shape(frozenset({"question_stem", "choices", "answerKey"}), _labelled),
    Shape(frozenset({"question", "choices", "answer"}), _mmlu),
    Shape(frozenset({"goal", "sol1", "sol2", "label"}), _piqa),
    Shape(frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"}), _hellaswag),
    Shape(frozenset({"sentence", "option1", "option2", "answer"}), _winogrande),
    Shape(frozenset({"text"}), _lambada),
)
