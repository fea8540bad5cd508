"""Predictions from files: llama-perplexity's own, and the likeliest tokens that we keep."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import FormatError, QtoolError, UsageError
from qtool.runtime.evaluate.divergence import compare
from qtool.runtime.evaluate.run import evaluate
from qtool.runtime.evaluate.stored import (
    LlamaCppLogits,
    Recorder,
    TopTokens,
    is_stored_reference,
    open_stored,
)

WINDOW, VOCAB, WINDOWS = 8, 401, 3
SCORED = 3


def made_up() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [24], the original's logits and another's [windows, scored, vocab]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (WINDOWS * WINDOW,), generator=generator)
    original = 3 * torch.randn(WINDOWS, SCORED, VOCAB, generator=generator)
    other = original + 0.3 * torch.randn(WINDOWS, SCORED, VOCAB, generator=generator)
    return tokens, original, other


def targets_of(tokens: torch.Tensor, window: int) -> torch.Tensor:
    return tokens.view(WINDOWS, WINDOW)[window, -SCORED:]


def llama_cpp_file(path: Path, tokens: torch.Tensor, logits: torch.Tensor) -> Path:
    """As `log_softmax` of llama.cpp's perplexity.cpp writes it, number by number."""
    data = struct.pack("<8sIii", b"_logits_", WINDOW, VOCAB, WINDOWS)
    data += tokens.numpy().astype("<i4").tobytes()
    for row in logits.reshape(-1, VOCAB).double().numpy():
        largest = row.max()
        smallest = max(row.min(), largest - 16)
        log_sum = math.log(np.exp(row - largest).sum())
        scale = (largest - smallest) / 65535
        codes = np.where(row > smallest, np.rint((row - smallest) / scale), 0).astype("<u2")
        data += struct.pack("<ff", scale, smallest - largest - log_sum) + codes.tobytes()
        data += b"\0\0" * (VOCAB % 2)
    path.write_bytes(data)
    return path


def test_llama_cpps_file_gives_the_divergence_within_its_rounding(tmp_path: Path) -> None:
    tokens, original, other = made_up()
    stored = open_stored(llama_cpp_file(tmp_path / "base.kld", tokens, original))
    assert isinstance(stored, LlamaCppLogits)
    assert (stored.window, stored.vocab_size) == (WINDOW, VOCAB)
    assert torch.equal(stored.tokens, tokens)
    for window in range(WINDOWS):
        targets = targets_of(tokens, window)
        found = stored.compare(window, 0, other[window], targets)
        expected = compare(other[window], original[window], targets)
        # A code is 16 nats / 65535; what is clipped holds less than vocab * e^-16.
        assert found.kld == pytest.approx(expected.kld, abs=1e-3)
        # 16 nats under the likeliest token all are alike to the file.
        floor = 16 - original[window].log_softmax(-1).amax(-1).double()
        reference_nll = torch.minimum(expected.reference_nll, floor)
        assert found.reference_nll == pytest.approx(reference_nll, abs=3e-4)
        assert found.delta_p == pytest.approx(expected.delta_p, abs=1e-4)
        assert found.nll == pytest.approx(expected.nll, abs=2e-6)
        assert torch.equal(found.same_top, expected.same_top)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:15], "ends within its header"),
        (lambda data: data[:-1], "bytes; 3 windows of 8 tokens"),
        (lambda data: data + b"\0", "bytes; 3 windows of 8 tokens"),
        (lambda data: data[:8] + struct.pack("<I", 2**31) + data[12:], "windows of 2147483648"),
        (lambda data: data[:20] + struct.pack("<i", -1) + data[24:], "outside its vocabulary"),
    ],
)
def test_a_damaged_file_of_logits_is_refused(tmp_path: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    tokens, original, _ = made_up()
    path = llama_cpp_file(tmp_path / "base.kld", tokens, original)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=words):
        open_stored(path)


def test_the_likeliest_tokens_and_samples_of_the_rest_say_what_all_say(tmp_path: Path) -> None:
    tokens, original, other = made_up()
    recorder = Recorder(tmp_path / "original.safetensors")
    for window in range(WINDOWS):
        recorder.add(original[window], targets_of(tokens, window))
    recorder.write(tokens, WINDOW)
    assert is_stored_reference(tmp_path / "original.safetensors")
    stored = open_stored(tmp_path / "original.safetensors")
    assert isinstance(stored, TopTokens)
    for window in range(WINDOWS):
        targets = targets_of(tokens, window)
        found = stored.compare(window, 0, other[window], targets)
        expected = compare(other[window], original[window], targets)
        assert found.kld == pytest.approx(expected.kld, rel=0.02)
        for name in ("nll", "reference_nll", "delta_p"):
            assert getattr(found, name) == pytest.approx(
                getattr(expected, name), abs=1e-6, rel=5e-7
            )
        assert torch.equal(found.same_top, expected.same_top)
        # Against itself: nothing, to float32.
        same = stored.compare(window, 0, original[window], targets)
        assert same.kld == pytest.approx(torch.zeros(SCORED), abs=1e-6)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """The model would look them up."""
    file = tmp_path / "original.safetensors"
    recorder = Recorder(file)
    recorder.add(torch.randn(3, 400), torch.arange(3))
    recorder.write(torch.full((8,), 400), 8)
    with pytest.raises(FormatError, match="do not belong together"):
        open_stored(file)


def test_an_evaluation_against_a_file_is_the_one_against_the_model(
    noisy: Path, original: Path, tmp_path: Path
) -> None:
    file = tmp_path / "original.safetensors"
    live = evaluate(
        str(noisy), str(original), max_tokens=1024, speed=False, save_reference=file
    ).models[0]
    result = CliRunner().invoke(
        qtool,
        [
            *("eval", str(noisy), "--against", str(file), "--no-speed", "--json"),
            *("--out", str(tmp_path / "report")),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    stored = report["models"][0]
    assert report["text"]["num_tokens_used"] == 1024
    assert "not known" in report["text"]["overlap"]
    assert live.divergence is not None
    assert stored["divergence"]["kld"]["value"] == pytest.approx(
        live.divergence.kld.value, rel=0.02
    )
    assert stored["divergence"]["same_top"]["value"] == live.divergence.same_top.value
    own = live.perplexity_in("llama.cpp").value
    assert stored["perplexity"][0]["value"] == pytest.approx(own, rel=1e-6)
    assert (tmp_path / "report" / "report.html").is_file()


def test_what_cannot_be_compared_or_kept_is_refused(
    noisy: Path, original: Path, tmp_path: Path
) -> None:
    tokens, logits, _ = made_up()
    path = llama_cpp_file(tmp_path / "base.kld", tokens, logits)
    with pytest.raises(QtoolError, match="holds predictions of 401"):
        evaluate(str(noisy), str(path), speed=False)
    with pytest.raises(UsageError, match="cannot choose others"):
        evaluate(str(noisy), str(path), text=tmp_path / "text", speed=False)
    with pytest.raises(FormatError, match="neither a stored reference nor a model"):
        evaluate(str(noisy), str(original / "model.safetensors"), speed=False)
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        evaluate(str(noisy), str(original), speed=False, save_reference=tmp_path / "x.bin")
