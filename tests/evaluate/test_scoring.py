"""Scoring real small models: against transformers and torch's cross entropy, and its refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.builtin import evaluation_text
from qtool.errors import QtoolError
from qtool.runtime.evaluate.divergence import summarize
from qtool.runtime.evaluate.perplexity import (
    Protocol,
    llama_cpp_protocol,
    papers_protocol,
    perplexity,
)
from qtool.runtime.evaluate.scorer import (
    RuntimeScorer,
    Scorer,
    TransformersScorer,
    open_scorer,
    require_same_tokens,
)
from qtool.runtime.evaluate.stream import plan_passes, score
from qtool.source import resolve

TEXT = evaluation_text().read_text(encoding="utf-8")[:12_000]
NUM_TOKENS = 1536


def opened(folder: Path) -> Scorer:
    return open_scorer(resolve(str(folder)), folder.name, dtype="float32", device="cpu")


def protocols(bos: int | None) -> tuple[Protocol, Protocol]:
    return (
        llama_cpp_protocol(context=512, num_tokens=NUM_TOKENS, bos_token_id=bos),
        papers_protocol(context=512, num_tokens=NUM_TOKENS),
    )


def ignore(windows: int) -> None:
    return


def test_perplexity_is_that_of_transformers_and_cross_entropy(books_7m: Path) -> None:
    from transformers import AutoModelForCausalLM

    scorer = opened(books_7m)
    assert isinstance(scorer, RuntimeScorer)
    ids = scorer.tokenize(TEXT).ids[:NUM_TOKENS]
    llama, papers = protocols(None)
    (scored,) = score([scorer], None, plan_passes(ids, (llama, papers)), ignore)

    model = AutoModelForCausalLM.from_pretrained(books_7m, dtype=torch.float32).eval()
    second_half, everything = [], []
    for start in range(0, NUM_TOKENS, 512):
        window = ids[start : start + 512]
        with torch.inference_mode():
            logits = model(input_ids=window[None]).logits[0].double()
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
        everything.append(loss)
        second_half.append(loss[256:])  # positions 256 .. 510, predicting 257 .. 511
    for protocol, expected in ((llama, second_half), (papers, everything)):
        result = perplexity(scored.nll[protocol.name], protocol)
        assert result.num_scored == 3 * protocol.scored_per_window
        assert result.value == pytest.approx(torch.cat(expected).mean().exp().item(), rel=1e-5)


def test_protocols_whose_windows_hold_the_same_tokens_share_a_pass(original: Path) -> None:
    ids = torch.arange(NUM_TOKENS) % 4096
    assert len(plan_passes(ids, protocols(None))) == 1
    assert len(plan_passes(ids, protocols(7))) == 2


def test_sharing_a_pass_changes_no_number(original: Path, noisy: Path) -> None:
    scorers = [opened(original), opened(noisy)]
    ids = scorers[0].tokenize(TEXT).ids[:NUM_TOKENS]
    both = protocols(None)
    together = score(scorers[1:], scorers[0], plan_passes(ids, both), ignore)
    apart = [score(scorers[1:], scorers[0], plan_passes(ids, [one]), ignore) for one in both]
    for index in range(2):
        for protocol, alone in zip(both, apart, strict=True):
            values = together[index].nll[protocol.name]
            assert torch.allclose(values, alone[index].nll[protocol.name], atol=1e-5)
    divergence, alone_divergence = together[1].divergence, apart[0][1].divergence
    assert divergence is not None
    assert alone_divergence is not None
    assert torch.allclose(divergence.kld, alone_divergence.kld, atol=1e-5)
    assert apart[1][1].divergence is None  # the divergence is taken in llama.cpp's protocol


def test_a_model_does_not_diverge_from_itself_and_noise_does(original: Path, noisy: Path) -> None:
    reference, same, other = opened(original), opened(original), opened(noisy)
    ids = reference.tokenize(TEXT).ids[:NUM_TOKENS]
    windows_done: list[int] = []
    scored = score([same, other], reference, plan_passes(ids, protocols(None)), windows_done.append)
    assert scored[0].divergence is None
    results = [summarize(part.divergence) for part in scored[1:] if part.divergence is not None]
    assert results[0].kld.value == 0.0
    assert results[0].same_top.value == 1.0
    assert results[1].kld.value > 1e-5
    assert results[1].num_scored == 3 * 255
    assert results[1].kld_min >= -1e-6
    assert sum(windows_done) == 3 * 3  # three windows, three models


def test_a_tokenizer_that_adds_bos_has_it_put_into_every_llama_cpp_window(with_bos: Path) -> None:
    scorer = opened(with_bos)
    text = scorer.tokenize(TEXT)
    assert text.bos_token_id == 0
    assert text.ids[0] == 0
    assert text.ids[1] != 0
    llama, papers = protocols(text.bos_token_id)
    passes = plan_passes(text.ids[:NUM_TOKENS], (llama, papers))
    assert [run.windows[:, 0].eq(0).tolist() for run in passes] == [
        [True, True, True],
        [True, False, False],
    ]


def test_transformers_scores_what_the_runtime_does_not_have(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    scorer = opened(tiny_checkpoint("bloom"))
    assert isinstance(scorer, TransformersScorer)
    assert (scorer.scored_by, scorer.dtype, scorer.vocab_size) == ("transformers", "float32", 4096)
    ids = scorer.tokenize(TEXT).ids[:NUM_TOKENS]
    (scored,) = score([scorer], None, plan_passes(ids, protocols(None)), ignore)
    # Random weights know nothing: the perplexity is about the size of the vocabulary.
    value = perplexity(scored.nll["papers"], protocols(None)[1]).value
    assert math.isclose(value, 4096, rel_tol=0.4)


def test_both_scorers_give_the_same_logits(original: Path) -> None:
    source = resolve(str(original))
    native = open_scorer(source, "native", dtype="float32", device="cpu")
    oracle = TransformersScorer.load(source, "oracle", dtype="float32", device="cpu")
    tokens = native.tokenize(TEXT).ids[:256].reshape(2, 128)
    assert torch.equal(oracle.tokenize(TEXT).ids, native.tokenize(TEXT).ids)
    ours, theirs = native.predict(tokens), oracle.predict(tokens)
    for window in range(2):
        assert torch.allclose(ours(window, 5, 127), theirs(window, 5, 127), atol=1e-4)


def test_not_a_number_is_refused_by_the_model_s_name(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scorer = opened(folder)
    ids = scorer.tokenize(TEXT).ids[:NUM_TOKENS]
    with pytest.raises(QtoolError) as error:
        score([scorer], None, plan_passes(ids, protocols(None)), ignore)
    assert "broken gives logits that are not finite" in error.value.message
    assert error.value.hint is not None


def test_different_bos_rules_are_named(original: Path, with_bos: Path) -> None:
    first, second = opened(original), opened(with_bos)
    with pytest.raises(QtoolError, match="the first tokenizer adds no BOS, the second puts BOS 0"):
        require_same_tokens(first, first.tokenize(TEXT), second, second.tokenize(TEXT))


def test_the_first_token_that_differs_is_named(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other-tokenizer"
    shutil.copytree(original, folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["model"]["merges"][0]
    path.write_text(json.dumps(data), encoding="utf-8")
    first, second = opened(original), opened(folder)
    with pytest.raises(QtoolError, match=r"their tokenizers differ\. Token \d+ of the text is"):
        require_same_tokens(first, first.tokenize(TEXT), second, second.tokenize(TEXT))


def test_vocabularies_of_different_sizes_are_named(
    original: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    first, second = opened(original), opened(tiny_checkpoint("llama", vocab_size=4224))
    with pytest.raises(QtoolError, match="they predict 4096 and 4224 tokens"):
        require_same_tokens(first, first.tokenize(TEXT), second, second.tokenize(TEXT))


def test_a_model_without_a_tokenizer_is_refused(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(original, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(QtoolError, match="mute has no tokenizer"):
        opened(folder).tokenize(TEXT)
