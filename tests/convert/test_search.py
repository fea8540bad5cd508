"""`--search best` on whole models: the same layout, lower errors, the quantized prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.cli import main
from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.import_ import GgufWeights
from qtool.convert.gguf.plan import plan_export
from qtool.convert.search import BestSearch
from qtool.errors import UnsupportedModel
from qtool.recipe import Calibration
from qtool.source import Source

TinyCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_errors_are_those_behind_the_quantized_prefix(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family)
    reader = open_weights(Source("tiny", folder))
    plan = plan_export(reader, "Q3_K_M")
    search = BestSearch(plan, Calibration(None, num_samples=6, sequence_length=64))
    out, plain = tmp_path / "best.gguf", tmp_path / "plain.gguf"
    found = dataclasses.replace(plan, prepared=search)
    notes = write_gguf(found, out, progress=lambda n: None).notes
    write_gguf(plan, plain, progress=lambda n: None)
    assert out.stat().st_size == plain.stat().st_size
    one, other = GgufFile.open(out), GgufFile.open(plain)
    assert {n: t.type for n, t in one.tensors.items()} == {
        n: t.type for n, t in other.tensors.items()
    }
    assert one.entries == other.entries
    assert "14 linears searched with 384 tokens" in notes[0]
    assert notes[1] == "rounded without a search: output, token_embd"
    assert all(found.error <= found.plain_error for found in search.found)

    written = GgufWeights(Source("best", out))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    model.load_state_dict({name: written.tensor(name).float() for name in state})
    seen = []
    target = model.model.layers[1].self_attn.q_proj
    target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        model(search.tokens.tokens)
    vectors = seen[0].reshape(-1, 256)
    name = "model.layers.1.self_attn.q_proj.weight"
    difference = (reader.tensor(name).float() - written.tensor(name).float()).double()
    error = float((difference @ vectors.T).square().sum()) / vectors.shape[0]
    one_found = next(f for f in search.found if f.name == "blk.1.attn_q.weight")
    assert one_found.error == pytest.approx(error, rel=1e-3)


def test_the_command_searches(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("llama")
    out = tmp_path / "out.gguf"
    arguments = ["convert", str(folder), "--to", "gguf", "--type", "Q4_K_M", "--out", str(out)]
    small = ["--num-samples", "4", "--sequence-length", "32"]
    main([*arguments, "--search", "best", *small, "--json"])
    assert "linears searched" in capsys.readouterr().out
    assert "Q4_K" in {tensor.type.name for tensor in GgufFile.open(out).tensors.values()}
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--search", "bset", "--force"])
    assert exit_.value.code == 2
    assert "best" in capsys.readouterr().err


def test_a_gguf_file_cannot_be_searched(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    reader = open_weights(Source("tiny", tiny_checkpoint("llama")))
    write_gguf(plan_export(reader, "F16"), path, progress=lambda n: None)
    plan = plan_export(open_weights(Source("half.gguf", path)), "Q4_K_M")
    with pytest.raises(UnsupportedModel, match="--search best"):
        BestSearch(plan, Calibration())
