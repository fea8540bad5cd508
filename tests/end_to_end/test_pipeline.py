"""From a checkpoint to an answer: every command on one model, each reading what the last wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.artifact import Manifest
from qtool.builtin import evaluation_text
from qtool.runtime.evaluate.run import evaluate
from qtool.runtime.evaluate.scorer import TransformersScorer, open_scorer
from qtool.runtime.server.process import running_server
from qtool.source import resolve

QtoolRun = Callable[..., Any]


def test_quantize_convert_and_evaluate_one_model(
    done: QtoolRun, small_int4: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = tiny_checkpoint("llama")
    marlin, q4_0, q4_k = (tmp_path / name for name in ("marlin", "Q4_0.gguf", "Q4_K_M.gguf"))
    done("verify", small_int4)
    done("convert", small_int4, "--to", "marlin", "--out", marlin)
    done("convert", small_int4, "--to", "gguf", "--out", q4_0)
    done("convert", original, "--to", "gguf", "--type", "Q4_K_M", "--out", q4_k)
    models = (small_int4, marlin, q4_0, q4_k)
    flags = ("--max-tokens", 1024, "--no-speed", "--json", "--out", tmp_path / "report")
    shown = done("eval", *models, "--against", original, *flags)

    report = json.loads(shown.out)
    int4, as_marlin, as_q4_0, as_q4_k = (
        model["divergence"]["kld"]["value"] for model in report["models"]
    )
    assert 0 < int4 < 0.1
    # Marlin holds the int4's own codes and scales; so does Q4_0, but its embeddings are Q6_K.
    assert as_marlin == pytest.approx(int4, rel=0.02)
    assert 0 < as_q4_0 < 3 * int4
    assert 0 < as_q4_k < 0.1
    formats = [model["format"] for model in report["models"]]
    assert formats == ["compressed-tensors", "marlin", "gguf", "gguf"]
    bits = [model["quantized_bits_per_weight"] for model in report["models"]]
    # Groups of 128 with 32-bit scales (the model's own type) and 16-bit ones (Marlin); groups of
    # 32 and the 6.56 bits of Q6_K.
    assert bits[:2] == [pytest.approx(4.25, abs=0.01), pytest.approx(4.125, abs=0.01)]
    assert 4.5 < bits[2] < 6.5625
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_artifact_says_where_it_came_from_and_is_compared_with_it(
    small_int4: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    manifest = Manifest.load(small_int4)
    assert manifest.source == str(tiny_checkpoint("llama"))
    assert len(manifest.layers) == 14
    report = evaluate(str(small_int4), max_tokens=1024, speed=False)
    assert report.reference is not None
    assert report.reference.model == manifest.source
    assert report.models[0].layers == manifest.layers


def test_transformers_loads_the_artifact_with_the_runtime_s_logits(small_int4: Path) -> None:
    source = resolve(str(small_int4))
    own = open_scorer(source, "runtime", dtype="float32", device="cpu", activations="bf16")
    theirs = TransformersScorer.load(source, "transformers", dtype="float32", device="cpu")
    tokens = own.tokenize(evaluation_text().read_text(encoding="utf-8")[:3000]).ids[:512]
    ours, other = (scorer.predict(tokens[None])(0, 0, 512) for scorer in (own, theirs))
    assert (ours - other).abs().max() < 1e-4


def test_the_artifact_is_served_and_answers_a_plain_curl(
    small_int4: Path, streamed: Callable[[str], str]
) -> None:
    with running_server(str(small_int4), "--dtype", "float32") as server:
        assert streamed(server.url)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awq", "gptq"])
@pytest.mark.parametrize("conversion", [None, "marlin", "gguf"])
def test_awq_and_gptq_files_and_their_conversions_are_served(
    request: pytest.FixtureRequest,
    done: QtoolRun,
    streamed: Callable[[str], str],
    tmp_path: Path,
    name: str,
    conversion: str | None,
) -> None:
    model: Path = request.getfixturevalue(name)
    if conversion is not None:
        out = tmp_path / (f"{name}.gguf" if conversion == "gguf" else f"{name}-{conversion}")
        done("convert", model, "--to", conversion, "--out", out)
        model = out
    with running_server(str(model)) as server:
        text = streamed(server.url)
    # The bundled model writes English words: broken weights do not.
    assert sum(character.isalpha() or character.isspace() for character in text) > len(text) * 0.7
    assert len(text) > 12


@pytest.mark.slow
def test_int4_is_nearer_to_the_original_than_plain_rounding(done: QtoolRun, work: Path) -> None:
    out = {recipe: work / f"books-7m-{recipe}" for recipe in ("int4", "rtn-int4")}
    for recipe, folder in out.items():
        done("quantize", "builtin:books-7m", "--recipe", recipe, "--out", folder)
    models = [str(folder) for folder in out.values()]
    report = evaluate(models, "builtin:books-7m", max_tokens=16_384, speed=False)
    int4, rtn = (model.divergence for model in report.models)
    assert int4 is not None
    assert rtn is not None
    assert int4.kld.value < rtn.kld.value
    # and by more than chance: the two errors are of the same tokens, so this is conservative
    assert rtn.kld.value - int4.kld.value > 2 * (int4.kld.error + rtn.kld.error)


@pytest.mark.slow
def test_calibrated_files_are_near_the_original(awq: Path, gptq: Path) -> None:
    models = [str(awq), str(gptq)]
    report = evaluate(models, "builtin:books-7m", max_tokens=8192, speed=False)
    for model in report.models:
        assert model.divergence is not None
        assert model.divergence.kld.value < 0.1, model.name
        assert model.divergence.same_top.value > 0.8, model.name
