"""The benchmark scripts: what they compute and what they read of their peers, without the peers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qtool.runtime.evaluate.divergence import compare, summarize

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
BLOCK = """
0.00.873.594 I kl_divergence: 0.68 seconds per pass - ETA 0.00 minutes
   1      44.5905 \u00b1    1.4254       0.00224 \u00b1    0.00116       0.00478 \u00b1    0.00006
====== Perplexity statistics ======
Mean PPL(Q)                   :  45.373152 \u00b1   1.386351
Cor(ln(PPL(Q)), ln(PPL(base))):  99.93%
====== KL divergence statistics ======
Mean    KLD:   0.004818 \u00b1   0.000062
99.9%   KLD:   0.055392
 0.1%   KLD:  -0.000001
====== Token probability statistics ======
 1.0%   \u0394p: -5.694%
RMS \u0394p    :  1.440 \u00b1 0.034 %
Same top p: 94.032 \u00b1 0.262 %
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        # As Python starts a script where PYTHONSAFEPATH is set: without its folder.
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(FOLDER)])
        for sibling in FOLDER.glob("*.py"):
            monkeypatch.delitem(sys.modules, sibling.stem, raising=False)
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_claims_about_other_machines_by_hand(script: Callable[[str], ModuleType]) -> None:
    found = {finding.claim: finding for finding in script("claims").by_arithmetic()}
    decode = next(finding for claim, finding in found.items() if "A100" in claim)
    assert decode.figures["tokens_per_second_at_2_TB_s"] == pytest.approx(1000 / 7)
    offload = next(finding for claim, finding in found.items() if "RTX 4090: 15" in claim)
    # 43.2 GB of weights, 10 of cache and overhead, 24 on the card: 29.2 GB at 25 GB/s, 24 at 1,008.
    assert offload.figures["tokens_per_second_with_offload"] == pytest.approx(
        1 / (29.16 / 25 + 24 / 1008), rel=2e-3
    )
    assert offload.holds is False
    cache = next(finding for claim, finding in found.items() if "KV cache" in claim)
    assert cache.figures["kilobytes_per_token"] == 320
    assert cache.figures["gigabytes_per_sequence"] == pytest.approx(1.342, abs=1e-3)


def test_every_line_of_llama_perplexitys_block_is_read(
    script: Callable[[str], ModuleType],
) -> None:
    evaluate = script("evaluate")
    block = script("llama_perplexity").printed_block(BLOCK)
    assert block["Mean PPL(Q)"] == ([45.373152, 1.386351], 6)
    assert block["0.1%   KLD"] == ([-0.000001], 6)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 300, 50, generator=generator)
    ours = summarize(compare(logits[0], logits[1], torch.arange(300) % 50))
    expected = {
        "Mean PPL(Q)": [ours.perplexity.value, ours.perplexity.error],
        "Cor(ln(PPL(Q)), ln(PPL(base)))": [100 * ours.ln_perplexity_correlation],
        "Mean    KLD": [ours.kld.value, ours.kld.error],
        "99.9%   KLD": [ours.kld_percentiles[99.9]],
        "0.1%   KLD": [ours.kld_percentiles[0.1]],
        "1.0%   \u0394p": [100 * ours.delta_p_percentiles[1.0]],
        "RMS \u0394p": [100 * ours.delta_p_rms.value, 100 * ours.delta_p_rms.error],
        "Same top p": [100 * ours.same_top.value, 100 * ours.same_top.error],
    }
    found = {line: evaluate.our_line(line, ours) for line in block}
    assert {line: value for line, value in found.items() if value is not None} == expected


def test_questions_are_made_alike_each_time(script: Callable[[str], ModuleType]) -> None:
    rows = script("tasks").questions(None, 5)
    assert rows == script("tasks").questions(None, 5)
    for row in rows:
        assert len(row["choices"]) == 4
        assert len(row["query"].split()) == 64


def test_every_benchmark_that_is_listed_is_there(script: Callable[[str], ModuleType]) -> None:
    areas = script("all").AREAS
    assert all((FOLDER / area.script).is_file() for area in areas.values())
    listed = {area.script for area in areas.values()}
    # The others are parts of these, or want a GPU.
    parts = {
        "all.py",
        "peers.py",
        "engine_worker.py",
        "serve_host.py",
        "quantize_child.py",
        "llama_perplexity.py",
        "gpu.py",
        "gpu_products.py",
    }
    assert listed | parts == {path.name for path in FOLDER.glob("*.py")}


def test_every_benchmark_finds_what_it_imports(script: Callable[[str], ModuleType]) -> None:
    for area in script("all").AREAS.values():
        assert callable(script(Path(area.script).stem).main)


def program(folder: Path, body: str) -> Path:
    path = folder / "llama-perplexity"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_run_whose_last_lines_are_lost_is_repeated(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    peer = script("llama_perplexity").Peer
    count, block = tmp_path / "count", tmp_path / "block.txt"
    # The head of a column has the words of the block's last line.
    block.write_text(f"chunk   PPL   Same top p\n{BLOCK}", encoding="utf-8")
    forgetful = program(
        tmp_path,
        f"echo run >> {count}; if [ $(wc -l < {count}) -lt 2 ]; then lines=5; else lines=99; fi; "
        f"head -n $lines {block}",
    )
    found = peer(forgetful, sys.executable, tmp_path).divergence(
        tmp_path / "model.gguf", tmp_path / "text", 2, 1, tmp_path / "base.kld"
    )
    assert found["Same top p"] == ([94.032, 0.262], 3)
    assert count.read_text(encoding="utf-8").count("run") == 2


def test_what_llama_perplexity_says_of_its_failure_is_passed_on(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    peer = script("llama_perplexity").Peer
    said = "0.01.124.007 E kl_divergence: failed reading log-probs for chunk 1"
    failing = program(tmp_path, f'echo "chunk PPL"; echo "{said}" >&2; exit 0')
    with pytest.raises(SystemExit) as caught:
        peer(failing, sys.executable, tmp_path).divergence(
            tmp_path / "model.gguf", tmp_path / "text", 2, 1, tmp_path / "base.kld"
        )
    assert said in str(caught.value)
    assert "never printed 'Same top p'" in str(caught.value)


def test_one_that_dies_says_how(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    dying = program(tmp_path, "echo no model; exit 3")
    with pytest.raises(SystemExit, match="ended with 3:\nno model"):
        script("llama_perplexity").run([str(dying)], 1)
