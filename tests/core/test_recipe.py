from pathlib import Path

import pytest

from qtool.errors import UnknownName, UsageError
from qtool.recipe import Awq, Calibration, Gptq, load_recipe, parse_recipe, recipe_names

GOOD = """\
description: a test
bits: 3
group_size: 64
keep: ["*.down_proj"]
method:
  name: gptq
  damping: 0.05
calibration:
  num_samples: 7
"""


def parse(text: str) -> object:
    return parse_recipe(text, Path("mine.yaml"))


def test_a_recipe_is_read_whole() -> None:
    recipe = parse_recipe(GOOD, Path("mine.yaml"))
    assert recipe.name == "mine"
    assert recipe.method == Gptq(damping=0.05)
    assert recipe.calibration == Calibration(num_samples=7)
    assert str(recipe.scheme(64)) == "int3-g64-sym"
    assert recipe.keep == ("*.down_proj",)


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("group_size", "group_sise"), r"mine.yaml:3: unknown key 'group_sise'", "group_size"),
        (("  damping", "  dampin"), r"mine.yaml:7: unknown key 'dampin'", "damping"),
        (("bits: 3", "bits: three"), r"mine.yaml:2: bits 'three' is not a int", None),
        (("bits: 3", "bits: 9"), "9 bits is outside 2 to 8", None),
        (("64", "big"), r"mine.yaml:3: group_size 'big' is not auto, row", None),
        (("0.05", "yes"), r"mine.yaml:7: damping", None),
        (("name: gptq", "name: gptk"), "unknown method 'gptk'", "gptq"),
        (("num_samples: 7", "num_samples: 0"), "num_samples is 0", None),
        (("description: a test\n", ""), "description is missing", None),
        (("method:", "method: ["), "is not YAML", None),
    ],
)
def test_a_mistake_names_its_line(change: tuple[str, str], message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(GOOD.replace(*change))
    if hint:
        assert error.value.hint is not None
        assert hint in error.value.hint


def test_effort_decides_how_far_gptq_goes() -> None:
    fast, best = (load_recipe("int4").with_effort(effort) for effort in ("fast", "best"))
    assert isinstance(fast.method, Gptq)
    assert isinstance(best.method, Gptq)
    assert (fast.method.sequential, fast.method.correction) == (False, False)
    assert best.method.tuning_steps > 0
    assert load_recipe("int4").with_effort("default") == load_recipe("int4")
    with pytest.raises(UsageError, match="awq has no effort"):
        load_recipe("awq").with_effort("best")
    with pytest.raises(UsageError, match=r"mine.yaml:8: refine_rounds 1 is decided by effort"):
        parse(
            GOOD.replace("  damping: 0.05", "  refine_rounds: 1").replace(
                "method:", "effort: best\nmethod:"
            )
        )


def test_bits_are_part_of_a_recipes_name() -> None:
    assert load_recipe("int4").with_options(bits=3).name == "int3"
    assert load_recipe("gptq").with_options(bits=3).name == "gptq-int3"
    assert load_recipe("int4").with_options(bits=4).name == "int4"


def test_an_unknown_recipe_gets_a_guess() -> None:
    with pytest.raises(UnknownName, match="unknown recipe 'int44'") as error:
        load_recipe("int44")
    assert error.value.hint is not None
    assert "did you mean int4?" in error.value.hint


def test_every_shipped_recipe_loads() -> None:
    assert {"int4", "awq", "gptq", "rtn-int4", "rtn-int8"} <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).description


def test_options_replace_only_what_is_given() -> None:
    recipe = load_recipe("awq")
    changed = recipe.with_options(group_size=32, keep=("lm_head",), num_samples=3, seed=None)
    assert isinstance(changed.method, Awq)
    assert changed.group_size == 32
    assert changed.calibration.num_samples == 3
    assert changed.calibration.seed == recipe.calibration.seed
    assert changed.keep == (*recipe.keep, "lm_head")
