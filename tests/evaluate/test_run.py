"""`evaluate` and `qtool eval`: whole runs on tiny real models, and what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifact import LayerReport, Manifest, write_manifest
from qtool.builtin import evaluation_text
from qtool.cli import main
from qtool.errors import QtoolError
from qtool.runtime.evaluate.outcomes import memory_groups
from qtool.runtime.evaluate.run import as_command, evaluate
from qtool.runtime.evaluate.scorer import RuntimeScorer, Scorer, open_scorer
from qtool.runtime.models.decoder import Decoder
from qtool.weights import DenseWeight


@pytest.fixture
def artifact(noisy: Path, original: Path, tmp_path: Path) -> Path:
    """A model with a manifest that names its source, as `qtool quantize` leaves one."""
    folder = tmp_path / "artifact"
    shutil.copytree(noisy, folder)
    layer = LayerReport("model.layers.0.mlp.up_proj", "int4-g128-sym", "gptq", 0.01, 0.02)
    write_manifest(folder, Manifest("compressed-tensors", str(original), layers=(layer,)))
    return folder


def test_a_report_has_all_that_was_asked_for(noisy: Path, original: Path) -> None:
    report = evaluate(str(noisy), str(original), max_tokens=2048)
    assert report.reference is not None
    assert report.reference.divergence is None
    (model,) = report.models
    assert model.divergence is not None
    assert model.divergence.kld.value > 0
    # Four windows of 512; the divergence's own perplexity is that of the llama.cpp protocol.
    assert [result.num_windows for result in model.perplexity] == [4, 4]
    assert [result.num_scored for result in model.perplexity] == [4 * 255, 4 * 511]
    own = model.perplexity_in("llama.cpp")
    assert model.divergence.perplexity.value == pytest.approx(own.value, rel=1e-5)
    assert model.divergence.perplexity.error == pytest.approx(own.error, rel=1e-4)
    assert report.text.num_tokens_used == 2048 < report.text.num_tokens
    assert model.size_bytes == (noisy / "model.safetensors").stat().st_size
    assert model.bits_per_weight == 32
    assert model.quantized_bits_per_weight is None
    assert model.speed is not None
    assert model.speed.tokens_per_second > 0
    assert model.speed.load_seconds > 0
    # Two bytes a weight or four, as it is served; the head is the embedding.
    assert model.num_weights <= model.speed.weight_bytes <= 5 * model.num_weights
    assert set(model.sha256) == {"model.safetensors"}
    assert model.sha256 != report.reference.sha256


def test_the_files_are_written_together_and_agree(
    noisy: Path, original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    report = evaluate(str(noisy), str(original), max_tokens=1024, out=out, speed=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report.models[0].divergence is not None
    assert data["models"][0]["divergence"]["kld"]["value"] == report.models[0].divergence.kld.value
    assert "noisy" in (out / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_the_source_that_the_manifest_names_is_the_original(artifact: Path, original: Path) -> None:
    report = evaluate(str(artifact), max_tokens=1024, speed=False)
    assert report.reference is not None
    assert report.reference.model == str(original)
    assert report.notes == (f"Compared with {original}, which qtool.json names as the source.",)
    assert report.models[0].layers[0].rtn_error == 0.02


def test_an_artifact_made_from_an_artifact_leads_to_the_first_source(
    artifact: Path, original: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    shutil.copytree(artifact, second)
    write_manifest(second, Manifest("marlin", str(artifact)))
    report = evaluate(str(second), max_tokens=1024, speed=False)
    assert report.reference is not None
    assert report.reference.model == str(original)


def test_a_source_that_is_not_here_is_said_and_not_fetched(artifact: Path) -> None:
    write_manifest(artifact, Manifest("compressed-tensors", "nobody/no-such-model-here"))
    report = evaluate(str(artifact), max_tokens=1024, speed=False)
    assert report.reference is None
    assert report.models[0].divergence is None
    assert "nobody/no-such-model-here, which is not on this machine" in report.notes[0]


def test_a_source_in_the_hub_cache_is_used_if_its_weights_are_there(
    artifact: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write_manifest(artifact, Manifest("compressed-tensors", "someone/tiny", commit))
    snapshot.mkdir(parents=True)
    shutil.copy(original / "config.json", snapshot)
    assert evaluate(str(artifact), max_tokens=1024, speed=False).reference is None
    shutil.copytree(original, snapshot, dirs_exist_ok=True)
    report = evaluate(str(artifact), max_tokens=1024, speed=False)
    assert report.reference is not None
    assert (report.reference.name, report.reference.model) == ("tiny", "someone/tiny")


def test_a_model_without_a_manifest_is_evaluated_alone(original: Path) -> None:
    report = evaluate(str(original), max_tokens=1024, speed=False)
    assert report.reference is None
    assert report.notes == ("Not compared with an original: name one with --against.",)


def test_models_of_one_name_are_told_apart(noisy: Path, original: Path, tmp_path: Path) -> None:
    twin = tmp_path / "noisy"
    shutil.copytree(noisy, twin)
    models = [str(noisy), str(twin)]
    report = evaluate(models, str(original), max_tokens=1024, speed=False)
    assert [model.name for model in report.models] == models
    assert report.models[0].divergence == report.models[1].divergence


def test_another_text_gives_other_numbers_and_its_name(
    noisy: Path, original: Path, tmp_path: Path
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(evaluation_text().read_text(encoding="utf-8")[50_000:56_000], encoding="utf-8")
    report = evaluate(str(noisy), str(original), text=text, max_tokens=None, speed=False)
    assert report.text.name == str(text)
    assert report.text.num_tokens_used == report.text.num_tokens
    assert "--text" in report.command
    assert report.command.endswith("--max-tokens 0")


def test_memory_is_kept_to_by_taking_models_in_turn() -> None:
    assert memory_groups([4, 4, 9], beside=2, budget=10) == [[0, 1], [2]]
    assert memory_groups([1, 1, 1], beside=1, budget=100) == [[0, 1, 2]]
    assert memory_groups([50, 50], beside=50, budget=10) == [[0], [1]]


def test_models_in_turn_give_the_numbers_of_models_together(
    noisy: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(noisy), str(original)]
    together = evaluate(models, str(original), max_tokens=1024, speed=False)
    monkeypatch.setattr("qtool.runtime.evaluate.outcomes.MEMORY_SHARE", 0.0)
    opened: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watched(*arguments: Any, **options: Any) -> Scorer:
        alive.append(sum(one() is not None for one in opened))
        scorer = open_scorer(*arguments, **options)
        assert isinstance(scorer, RuntimeScorer)
        assert isinstance(scorer.loaded.decoder, Decoder)
        stored = scorer.loaded.decoder.embedding.stored
        assert isinstance(stored, DenseWeight)
        opened.append(weakref.ref(stored.values))
        return scorer

    monkeypatch.setattr("qtool.runtime.evaluate.outcomes.open_scorer", watched)
    in_turn = evaluate(models, str(original), max_tokens=1024, speed=False)
    # The original and one candidate, twice; the first two are gone when the others come.
    assert alive == [0, 1, 0, 1]
    assert [m.divergence for m in in_turn.models] == [m.divergence for m in together.models]


def test_the_command_can_be_pasted() -> None:
    assert as_command(["my model"], None, None, 32_768, "float32") == "qtool eval 'my model'"
    assert as_command(["a", "b"], "c", Path("t.txt"), 100, "bfloat16") == (
        "qtool eval a b --against c --text t.txt --max-tokens 100 --dtype bfloat16"
    )


def run_cli(arguments: Sequence[str]) -> int:
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_prints_a_table_and_writes_the_report(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    flags = ["--max-tokens", "1024", "--no-speed", "--out", str(out)]
    assert run_cli(["eval", str(artifact), *flags]) == 0
    shown = capsys.readouterr()
    assert "same top token" in shown.out
    assert "512-token windows (context is 512)" in shown.out
    assert str(out / "report.html") in shown.out
    assert run_cli(["eval", str(artifact), *flags]) == 2  # it exists now
    assert "--force" in capsys.readouterr().err
    assert run_cli(["eval", str(artifact), *flags, "--force"]) == 0


def test_the_command_prints_json_for_machines(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "report")
    flags = ["--max-tokens", "1024", "--no-speed", "--json", "--out", out]
    assert run_cli(["eval", str(artifact), *flags]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["models"][0]["name"] == "artifact"


def test_what_is_wrong_is_refused_without_a_partial_report(
    original: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Callable[..., Path],
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    empty, malformed = tmp_path / "empty.jsonl", tmp_path / "malformed.jsonl"
    empty.touch()
    malformed.write_text("{", encoding="utf-8")
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("inf"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    wider = str(tiny_checkpoint("llama", vocab_size=4224))
    table: list[tuple[list[str], int, str]] = [
        ([str(tmp_path / "nothing")], 2, "no model at"),
        ([str(original), "--against", str(tmp_path / "nothing")], 2, "no model at"),
        ([str(original), "--against", "builtin:books-8m"], 2, "did you mean books-7m"),
        ([str(original), "--text", str(tmp_path / "nothing.txt")], 2, "no text at"),
        ([str(original), "--text", str(short)], 1, "--text"),
        ([str(original), "--against", wider], 1, "they predict 4224 and 4096 tokens"),
        ([str(broken)], 1, "broken gives logits that are not finite"),
        ([str(original), "--dtype", "float8"], 2, "float8"),
        ([str(original), "--tasks", str(empty)], 1, "holds no questions"),
        ([str(original), "--tasks", str(malformed)], 1, "line 1 is not JSON"),
        ([str(original), "--tasks", "hellaswga"], 2, "hellaswga"),
        ([], 2, "MODEL"),
    ]
    for arguments, code, words in table:
        flags = ["--max-tokens", "1024", "--no-speed", "--out", str(tmp_path / "report")]
        assert run_cli(["eval", *arguments, *flags]) == code, arguments
        shown = capsys.readouterr()
        assert words in shown.err, arguments
        assert "Traceback" not in shown.err
        assert shown.out == ""
        assert not (tmp_path / "report").exists()
        assert not (tmp_path / ".report.partial").exists()


def test_models_of_different_tokenizers_are_set_side_by_side_by_bits_per_byte(
    original: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(original, other)
    path = other / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["model"]["merges"][0]
    path.write_text(json.dumps(data), encoding="utf-8")
    report = evaluate([str(original), str(other)], max_tokens=1024, speed=True)
    first, second = report.models
    assert first.divergence is None
    assert second.divergence is None
    assert first.bits_per_byte is not None
    assert second.bits_per_byte is not None
    # Random weights spend ln 4096 a token; the second reads more tokens for the same bytes.
    assert second.bits_per_byte > first.bits_per_byte
    (note,) = [note for note in report.notes if "tokenizers differ" in note]
    assert f"other {second.bits_per_byte:.4f}" in note
    assert "no KL divergence" in note
    with pytest.raises(QtoolError, match=r"their tokenizers differ\. Token"):
        evaluate(str(other), str(original), max_tokens=1024, speed=False)
    alike = evaluate([str(original), str(original)], max_tokens=1024, speed=False)
    assert not [note for note in alike.notes if "tokenizers differ" in note]


KILLED = """
import os, signal, sys
from pathlib import Path
from qtool.runtime.evaluate import run
# The page is written last: report.json and report.md are there by then.
run.to_html = lambda report: os.kill(os.getpid(), signal.SIGKILL)
run.evaluate(sys.argv[1], max_tokens=1024, speed=False, out=Path(sys.argv[2]))
"""


def test_killed_while_it_writes_it_leaves_no_report(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(original), str(out)])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list(tmp_path.rglob("report.html"))
    evaluate(str(original), max_tokens=1024, speed=False, out=out)
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
