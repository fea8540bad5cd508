"""`--strict`: where the numerics fall back, the run stops and names the layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.artifact import LayerReport
from qtool.cli import main
from qtool.errors import QtoolError
from qtool.quantize.gptq import NOT_FACTORED
from qtool.quantize.strict import require_no_fallback

# 32 tokens span 32 of the 256 inputs, and no retry's damping is above the rounding of float32.
SINGULAR = """\
description: GPTQ with next to no damping.
method: {name: gptq, damping: 1.0e-10}
calibration: {num_samples: 1, sequence_length: 32}
"""


def test_a_fallback_is_an_error_and_a_note_is_not() -> None:
    plain = LayerReport("m.a", "int4-g128-sym", "gptq", notes=("few tokens",))
    require_no_fallback([plain])
    fell = LayerReport("m.b", "int4-g128-sym", "rtn", fallbacks=("rounded", "damped"))
    with pytest.raises(QtoolError, match=r"m\.b: rounded; damped") as error:
        require_no_fallback([plain, fell])
    assert "--num-samples" in (error.value.hint or "")


def test_singular_inputs_stop_a_strict_run_and_no_other(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "singular.yaml", tmp_path / "out"
    recipe.write_text(SINGULAR)
    command = ["quantize", str(tiny_checkpoint("llama")), "--recipe", str(recipe)]
    command += ["--out", str(out)]
    for _ in range(2):  # the finished block is kept, and is no less of a fallback the second time
        with pytest.raises(SystemExit) as stop:
            main([*command, "--strict"])
        assert stop.value.code == 1
        text = " ".join(capsys.readouterr().err.split())
        assert f"Error: model.layers.0.self_attn.q_proj: {NOT_FACTORED} (--strict" in text
        assert not out.exists()
    main(command)
    text = capsys.readouterr().err
    assert "going on after block 1 of 2" in text
    assert re.search(rf"note: \d+ layers: {NOT_FACTORED}", text)
    assert out.is_dir()


def test_a_strict_run_without_a_fallback_ends_as_any_other(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    few = ["--num-samples", "4", "--sequence-length", "32", "--strict"]
    main(["quantize", str(tiny_checkpoint("llama")), "--out", str(tmp_path / "out"), *few])
    assert (tmp_path / "out" / "qtool.json").is_file()
