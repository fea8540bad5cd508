"""The training script learns, resumes exactly, and writes a model that transformers loads."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.builtin import builtin_model, evaluation_text
from qtool.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_small_model.py"
SMALL = ("--vocab-size", "512", "--context", "32", "--layers", "1", "--windows", "4")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_small_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(evaluation_text().read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return path


def run(script: ModuleType, *arguments: str | Path) -> None:
    script.main([str(argument) for argument in arguments], standalone_mode=False)


def test_a_trained_model_loads_in_transformers_and_beats_chance(
    script: ModuleType, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    run(script, text, "--out", out, "--steps", "60", *SMALL)

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tokenizer.convert_tokens_to_ids(list(script.SPECIAL_TOKENS)) == [0, 1, 2]
    assert (
        tokenizer.decode(tokenizer("Whale! ¿Así? 鲸\n\n  x").input_ids) == "Whale! ¿Así? 鲸\n\n  x"
    )
    held_out = np.load(tmp_path / "model.training" / "validation.npy")
    loss = script.validation_loss(model.float(), held_out, context=32, batches=4)
    assert loss < math.log(512) - 0.5
    assert "60 steps of 4 windows" in " ".join((out / "MODEL_CARD.md").read_text().split())


def test_an_interrupted_run_ends_with_the_weights_of_an_unbroken_one(
    script: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (text, "--steps", "4", "--checkpoint-every", "2", *SMALL)
    run(script, *arguments, "--out", tmp_path / "unbroken")

    save = script.save_checkpoint

    def save_and_stop(*values: Any) -> None:
        save(*values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(script, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            script.main.callback(**parsed(script, *arguments, "--out", tmp_path / "resumed"))
    assert not (tmp_path / "resumed").exists()
    run(script, *arguments, "--out", tmp_path / "resumed")

    unbroken, resumed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("unbroken", "resumed")
    )
    for name, weight in unbroken.items():
        assert torch.equal(weight, resumed[name]), name


def parsed(script: ModuleType, *arguments: str | Path) -> dict[str, Any]:
    context = script.main.make_context("train", [str(argument) for argument in arguments])
    values: dict[str, Any] = context.params
    return values


def test_a_checkpoint_is_not_continued_with_other_settings(
    script: ModuleType, text: Path, tmp_path: Path
) -> None:
    run(script, text, "--out", tmp_path / "model", "--steps", "2", *SMALL)
    with pytest.raises(UsageError, match="other values of: peak_rate, steps"):
        run(
            script, text, "--out", tmp_path / "model", "--force", "--steps", "3", "--rate", "1e-3",
            *SMALL,
        )  # fmt: skip


def test_misuse_is_refused_before_any_work(script: ModuleType, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(UsageError, match="when to stop"):
        run(script, text, "--out", out)
    with pytest.raises(UsageError, match="not a file"):
        run(script, tmp_path / "absent.txt", "--out", out, "--steps", "1")
    assert list(tmp_path.iterdir()) == [text]


def test_text_too_short_for_one_window_is_refused(script: ModuleType, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Call me Ishmael.")
    with pytest.raises(UsageError, match="do not fill one window of 512"):
        run(script, short, "--out", tmp_path / "model", "--steps", "1")


def test_the_rate_warms_up_and_then_falls_to_its_final_fraction(script: ModuleType) -> None:
    training = script.Training(steps=1000, minutes=10)
    assert training.learning_rate(0, 0.0) == pytest.approx(2e-5)
    assert training.learning_rate(99, 0.0) == pytest.approx(2e-3)
    assert training.learning_rate(999, 1.0) == pytest.approx(1e-4)
    assert training.progress(500, 60.0) == 0.5  # the steps are nearer to their end
    assert training.progress(100, 540.0) == 0.9  # the minutes are


def test_targets_are_the_inputs_shifted_by_one(script: ModuleType) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    inputs, targets = script.draw_windows(tokens, 5, 8, (0, 0), torch.device("cpu"))
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs, script.draw_windows(tokens, 5, 8, (0, 0), torch.device("cpu"))[0])


def test_documents_are_closed_by_the_end_of_text_token(script: ModuleType) -> None:
    tokenizer = script.Tokenizer.from_file(str(builtin_model("books-7m") / "tokenizer.json"))
    tokens = script.encode(tokenizer, "One.<|endoftext|>Two.<|endoftext|>")
    assert tokens[-1] == 0
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == (
        "One.<|endoftext|>Two.<|endoftext|>"
    )


def test_the_bundled_model_has_the_loss_its_card_claims(script: ModuleType) -> None:
    """The card says 3.829 nats over the whole held-out text; this is a part of it, so near that."""
    folder = builtin_model("books-7m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = script.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = script.encode(tokenizer, evaluation_text().read_text(encoding="utf-8"))
    loss = script.validation_loss(model, tokens, context=512, batches=4, windows=4)
    assert 3.6 < loss < 4.1
