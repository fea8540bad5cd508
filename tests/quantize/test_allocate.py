"""Mixed widths: the knapsack against brute force, and a real plan that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from qtool.errors import UsageError
from qtool.quantize.allocate import (
    WIDTHS,
    Option,
    Target,
    average_bits,
    choose,
    require_reachable,
)
from qtool.quantize.job import prepare
from qtool.quantize.pipeline import quantize_model
from qtool.recipe import load_recipe


def random_sets(seed: int) -> list[list[Option]]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    sets = []
    for _ in range(5):
        weights, sensitivity = 1 + 3 * draw(), draw()
        sets.append([Option(w, weights * w, sensitivity * 4.0**-w) for w in WIDTHS])
    return sets


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_fits_and_is_within_a_step_of_the_best(seed: int) -> None:
    sets = random_sets(seed)
    budget = 4.2 * sum(options[0].size / WIDTHS[0] for options in sets)
    chosen = choose(sets, budget)
    assert chosen is not None
    assert sum(option.size for option in chosen) <= budget
    best = min(
        sum(option.loss for option in tried)
        for tried in product(*sets)
        if sum(option.size for option in tried) <= budget
    )
    found = sum(option.loss for option in chosen)
    step = max(a.loss - b.loss for options in sets for a, b in pairwise(options))
    assert best <= found <= best + step


def test_options_off_the_hull_are_never_taken() -> None:
    """Width 3 costs more for each bit that it saves than going on to 4."""
    options = [Option(2, 2.0, 10.0), Option(3, 3.0, 9.0), Option(4, 4.0, 1.0)]
    assert choose([options], 3.5) == [options[0]]
    assert choose([options], 4.0) == [options[2]]
    assert choose([options], 1.9) is None


def test_a_target_is_met_by_widths_that_fused_layers_share(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Verification inside loads the artifact in transformers and compares logits."""
    source = tiny_checkpoint("qwen3_moe")
    recipe = load_recipe("rtn-int4").with_options(num_samples=2, sequence_length=32)
    plan = prepare(str(source), recipe, target=Target(bits=4.25)).plan
    assert 4.0 < average_bits(plan) <= 4.25
    widths = {linear.name: str(scheme) for linear, scheme in plan.quantized.items()}
    assert len(set(widths.values())) > 1
    for block in (0, 1):
        attention = f"model.layers.{block}.self_attn"
        assert len({widths[f"{attention}.{leaf}_proj"] for leaf in "qkv"}) == 1
        experts = {word for name, word in widths.items() if f"layers.{block}.mlp.experts" in name}
        assert len(experts) == 1
    manifest = quantize_model(
        str(source), recipe, out=tmp_path / "out", target=Target(bytes=plan.output_bytes)
    )
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size <= plan.output_bytes * 1.02
    assert len({layer.scheme for layer in manifest.layers}) > 1


def test_targets_that_cannot_be_met_are_refused_before_anything_is_measured(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tiny_checkpoint("llama"))
    recipe = load_recipe("rtn-int4").with_options(num_samples=2, sequence_length=32)
    plan = prepare(source, recipe).plan

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("qtool.quantize.allocate.input_squares", never)
    with pytest.raises(UsageError, match=r"--target-size of 1 kB: .* in 2 bits for") as caught:
        prepare(source, recipe, target=Target(bytes=1000))
    named = re.search(r"raise it to (\d+) or more", caught.value.hint or "")
    assert named is not None
    smallest = int(named[1])
    require_reachable(plan, Target(bytes=smallest + 1))
    with pytest.raises(UsageError):
        require_reachable(plan, Target(bytes=smallest - 1))
    with pytest.raises(UsageError, match=r"--target-bits 1\.5 is smaller than 2 bits"):
        prepare(source, recipe, target=Target(bits=1.5))
    with pytest.raises(UsageError, match="one width"):
        prepare(source, recipe, format="gptq", target=Target(bits=4.5))
    with pytest.raises(UsageError, match="not both"):
        Target(4.0, 10)
