"""Recipes: what to do to a model, a few strict lines of YAML, runnable by name.

    description: 4-bit weights, GPTQ with a Hessian-weighted scale search.
    bits: 4
    symmetric: true
    group_size: auto        # the largest of 128, 64, 32 that divides; a number; or row
    rotations: []           # R1, R2: spread outliers over channels first
    keep: []                # fnmatch patterns of modules that stay in 16 bit
    effort: default         # fast | default | best: how far gptq goes
    method:
      name: gptq            # rtn | gptq | awq | smoothquant, each with its own few fields
      damping: 0.01
    calibration:
      num_samples: 128
      sequence_length: 512

An unknown key is refused with its file, line and a did-you-mean: a misspelt option must not
quantize with the default.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from qtool.errors import UnknownName, UsageError, closest
from qtool.scheme import FloatScheme, QuantScheme, codebook_scheme

RECIPE_FOLDER = Path(__file__).parent / "recipes"

GroupSize = int | Literal["auto", "row"]


@dataclass(frozen=True, slots=True)
class Rtn:
    """Round to nearest, no data. ``scale_search``: try shrunken scales and keep the least squared
    error.
    """

    scale_search: bool = False


@dataclass(frozen=True, slots=True)
class Gptq:
    """GPTQ (arXiv 2210.17323) with static act-order.

    damping        share of the mean diagonal added to the Hessian
    scale_search   choose signed scales by Hessian-weighted error before the sweep, instead of
                   absmax
    sequential     take statistics anew after each set of linears that share an input, in place of
                   once a block
    correction     aim at the original model's activations, where held-out text says that it helps
    refine_rounds  rounds of closed-form scale refit and code descent after the sweep
    tabu_steps     moves of every row in a tabu search after that
    tuning_steps   gradient steps on a block's codes and scales, kept where held-out error falls
    """

    damping: float = 0.01
    scale_search: bool = True
    sequential: bool = True
    correction: bool = False
    refine_rounds: int = 0
    tabu_steps: int = 0
    tuning_steps: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise UsageError(f"damping {self.damping} is not between 0 and 1")
        for name in ("refine_rounds", "tabu_steps", "tuning_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is negative")
        if self.correction and not self.sequential:
            raise UsageError("correction needs sequential statistics")

    @property
    def beyond_one_sweep(self) -> bool:
        return self.tabu_steps > 0 or self.tuning_steps > 0

    @property
    def follows_original(self) -> bool:
        """Whether the original model's activations are computed beside the quantized one's."""
        return self.correction or self.tuning_steps > 0


@dataclass(frozen=True, slots=True)
class Awq:
    """AWQ (arXiv 2306.00978): scale salient channels up before rounding, fold the inverse into
    the layer before.

    grid_points   exponents tried in [0, 1); 0, which changes nothing, is always among them
    clip_search   shrink scales where that lowers the error
    sweep         solve the scaled weights as GPTQ does, in place of rounding them
    """

    grid_points: int = 20
    clip_search: bool = True
    sweep: bool = False

    def __post_init__(self) -> None:
        if self.grid_points < 1:
            raise UsageError(f"grid_points {self.grid_points} is not a positive number")


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """SmoothQuant (arXiv 2211.10438): move loudness from activations into weights, so that both can
    be rounded to 8 bits.

    strength  how much of it: 0 leaves activations as they are, 1 makes all channels equally loud
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise UsageError(f"strength {self.strength} is not between 0 and 1")


Method = Rtn | Gptq | Awq | SmoothQuant

METHODS: dict[str, type[Rtn] | type[Gptq] | type[Awq] | type[SmoothQuant]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "smoothquant": SmoothQuant,
}


Effort = Literal["fast", "default", "best"]

# How far GPTQ goes. fast: one solve on statistics taken once a block; default: everything that has
# a closed form; best: a tabu search over each linear, and a gradient pass over each block.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"sequential": False, "correction": False, "refine_rounds": 0},
    "default": {"correction": True, "refine_rounds": 2},
    "best": {"correction": True, "refine_rounds": 2, "tabu_steps": 512, "tuning_steps": 32},
}


def method_name(method: Method) -> str:
    return next(name for name, kind in METHODS.items() if isinstance(method, kind))


@dataclass(frozen=True, slots=True)
class Calibration:
    """``dataset``: a .txt, .jsonl or .parquet file, a Hub dataset id, or None for the text that
    ships.
    """

    dataset: str | None = None
    num_samples: int = 128
    sequence_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "sequence_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, at least 1 is needed")


# What weights can be beside integers, and how many of them share a scale.
FLOAT_WEIGHTS: dict[str, FloatScheme] = {
    "fp8": FloatScheme("fp8", (1, None)),
    "fp8-block": FloatScheme("fp8", (128, 128)),
    "nvfp4": FloatScheme("nvfp4", (1, 16)),
    "mxfp4": FloatScheme("mxfp4", (1, 32)),
    "nf4": FloatScheme("nf4", (1, 64)),
}
# Tables of each row's own, and the bits of a place in them.
CODEBOOK = "codebook"
CODEBOOK_BITS = (2, 3, 4)
ACTIVATIONS = ("none", "int8")
# QuaRot's that fold into weights: of the residual stream, and of each head's values.
ROTATIONS = ("R1", "R2")


@dataclass(frozen=True, slots=True)
class Recipe:
    """weights      "int", "codebook", or a key of FLOAT_WEIGHTS, for which bits, symmetric and
                 group_size say nothing
    activations  "int8": runtimes round them by token, which takes 8-bit weights a row each
    rotations    of ROTATIONS: the weights are turned before anything else is done to them, and the
                 model's function stays
    """

    name: str
    description: str
    method: Method
    bits: int = 4
    symmetric: bool = True
    group_size: GroupSize = "auto"
    keep: tuple[str, ...] = ()
    weights: str = "int"
    activations: str = "none"
    calibration: Calibration = field(default_factory=Calibration)
    rotations: tuple[str, ...] = ()
    rotation_seed: int = 0

    def __post_init__(self) -> None:
        if self.weights not in ("int", CODEBOOK, *FLOAT_WEIGHTS):
            raise UnknownName("weights", self.weights, ["int", CODEBOOK, *FLOAT_WEIGHTS])
        if self.activations not in ACTIVATIONS:
            raise UnknownName("activations", self.activations, ACTIVATIONS)
        for name in self.rotations:
            if name not in ROTATIONS:
                raise UnknownName("rotation", name, ROTATIONS)
        if self.weights == CODEBOOK:
            self._require_tables()
        elif self.weights != "int" and not isinstance(self.method, Rtn):
            raise UsageError(
                f"{self.weights} weights are made by rounding, not by {method_name(self.method)}",
                "method: {name: rtn}",
            )
        if self.activations == "int8" and (self.bits, self.symmetric, self.group_size) != (
            8,
            True,
            "row",
        ):
            raise UsageError(
                "int8 activations take symmetric weights of 8 bits with one scale a row",
                "bits: 8, group_size: row",
            )
        # A scheme is valid or it raises; the group size is checked against each layer later.
        self.scheme(128 if self.group_size == "auto" else self.group_size)

    def _require_tables(self) -> None:
        if self.bits not in CODEBOOK_BITS:
            known = ", ".join(map(str, CODEBOOK_BITS))
            raise UsageError(f"a codebook of {self.bits} bits", f"tables are made for {known} bits")
        if self.group_size not in ("auto", "row"):
            raise UsageError(
                f"a codebook with groups of {self.group_size}: each row has one table",
                "leave out the group size",
            )
        fits = isinstance(self.method, Rtn) or (
            isinstance(self.method, Gptq) and not self.method.beyond_one_sweep
        )
        if not fits:
            raise UsageError(
                f"codebook weights are not made by {method_name(self.method)} with these options",
                "method rtn, or gptq at effort fast or default",
            )

    @property
    def float_scheme(self) -> FloatScheme | None:
        if self.weights == CODEBOOK:
            return codebook_scheme(self.bits)
        return FLOAT_WEIGHTS.get(self.weights)

    def scheme(self, group_size: int | Literal["row"]) -> QuantScheme:
        return QuantScheme(self.bits, None if group_size == "row" else group_size, self.symmetric)

    @property
    def needs_calibration(self) -> bool:
        return not isinstance(self.method, Rtn)

    def with_effort(self, effort: str) -> Recipe:
        """The recipe at another effort; UsageError where its method has none."""
        if effort not in EFFORTS:
            raise UnknownName("effort", effort, EFFORTS)
        if not isinstance(self.method, Gptq):
            raise UsageError(
                f"recipe {self.name} has no effort to choose",
                "fast, default and best are those of GPTQ: --recipe int4",
            )
        method = Gptq(
            damping=self.method.damping,
            scale_search=self.method.scale_search,
            **EFFORTS[effort],
        )
        return replace(self, method=method)

    def with_options(
        self,
        *,
        effort: str | None = None,
        bits: int | None = None,
        group_size: GroupSize | None = None,
        keep: tuple[str, ...] = (),
        rotations: tuple[str, ...] | None = None,
        **calibration: Any,
    ) -> Recipe:
        """The recipe with what the command line says; None leaves the recipe's own value."""
        given = {key: value for key, value in calibration.items() if value is not None}
        recipe = self if effort is None else self.with_effort(effort)
        if bits is not None and bits != self.bits:
            named = self.name.replace(f"int{self.bits}", f"int{bits}")
            kind = "" if self.weights == CODEBOOK else "int"
            named = named if named != self.name else f"{self.name}-{kind}{bits}"
            recipe = replace(recipe, name=named, bits=bits)
        return replace(
            recipe,
            group_size=self.group_size if group_size is None else group_size,
            keep=(*self.keep, *keep),
            rotations=self.rotations if rotations is None else rotations,
            calibration=replace(self.calibration, **given),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        method = {f.name: getattr(self.method, f.name) for f in fields(self.method)}
        calibration = {f.name: getattr(self.calibration, f.name) for f in fields(self.calibration)}
        return {
            "name": self.name,
            "weights": self.weights,
            "activations": self.activations,
            "bits": self.bits,
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "keep": list(self.keep),
            "rotations": list(self.rotations),
            "rotation_seed": self.rotation_seed,
            "method": {"name": method_name(self.method), **method},
            "calibration": calibration,
        }


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by name, or from a YAML file."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(
                f"no recipe file {path}", f"recipes by name: {', '.join(recipe_names())}"
            )
        return parse_recipe(path.read_text(encoding="utf-8"), path)
    if name_or_path not in recipe_names():
        raise UnknownName("recipe", name_or_path, recipe_names())
    path = RECIPE_FOLDER / f"{name_or_path}.yaml"
    return parse_recipe(path.read_text(encoding="utf-8"), path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Strict: unknown keys and wrong types are refused with file and line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path.name} is not a mapping of keys to values")
    section = _Section(path, root)
    method = section.child("method")
    kind = METHODS.get(str(method.take("name", str)))
    if kind is None:
        raise UnknownName("method", str(method.value("name")), METHODS)
    calibration = section.child("calibration", required=False)
    group_size = section.value("group_size", "auto")
    if group_size not in ("auto", "row") and type(group_size) is not int:
        raise section.error("group_size", "is not auto, row or a whole number")
    keep = section.names("keep", "patterns")
    section.refuse_unknown(
        *("description", "bits", "symmetric", "group_size", "keep", "effort", "method"),
        *("weights", "activations", "calibration", "rotations", "rotation_seed"),
    )
    recipe = Recipe(
        name=path.stem,
        description=section.take("description", str),
        bits=section.take("bits", int, 4),
        symmetric=section.take("symmetric", bool, True),
        group_size=group_size,
        keep=keep,
        rotations=section.names("rotations", "names"),
        rotation_seed=section.take("rotation_seed", int, 0),
        weights=section.take("weights", str, "int"),
        activations=section.take("activations", str, "none"),
        method=method.build(kind, "name"),
        calibration=calibration.build(Calibration) if calibration else Calibration(),
    )
    effort = section.value("effort")
    if effort is not None and effort not in EFFORTS:
        raise section.error("effort", f"is not one of {', '.join(EFFORTS)}")
    if effort is None:
        return recipe
    decided = {key for settings in EFFORTS.values() for key in settings}
    for key in decided:
        if method.value(key) is not None:
            raise method.error(key, "is decided by effort; leave one of them out")
    return recipe.with_effort(effort)


class _Section:
    """One mapping of a YAML file that remembers the line of each key."""

    def __init__(self, path: Path, node: yaml.MappingNode) -> None:
        self._path = path
        self._lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
        self._nodes = {str(key.value): value for key, value in node.value}
        loader = yaml.SafeLoader("")
        self._values = {
            key: loader.construct_object(value, deep=True) for key, value in self._nodes.items()
        }
        self._line = node.start_mark.line + 1

    def error(self, key: str, rule: str) -> UsageError:
        line = self._lines.get(key, self._line)
        found = f" {self._values[key]!r}" if key in self._values else ""
        return UsageError(f"{self._path.name}:{line}: {key}{found} {rule}")

    def value(self, key: str, default: object = None) -> Any:
        return self._values.get(key, default)

    def take(self, key: str, kind: type, default: object = None) -> Any:
        value = self._values.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, "is missing" if value is None else f"is not a {kind.__name__}")
        return value

    def names(self, key: str, of: str) -> tuple[str, ...]:
        """A list of texts, empty where there is none."""
        found = self._values.get(key, [])
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self.error(key, f"is not a list of {of}")
        return tuple(found)

    def child(self, key: str, required: bool = True) -> Any:
        node = self._nodes.get(key)
        if node is None and not required:
            return None
        if not isinstance(node, yaml.MappingNode):
            raise self.error(key, "is not a mapping" if node else "is missing")
        return _Section(self._path, node)

    def refuse_unknown(self, *known: str) -> None:
        for key, line in self._lines.items():
            if key not in known:
                guess = closest(key, known)
                raise UsageError(
                    f"{self._path.name}:{line}: unknown key {key!r}",
                    f"did you mean {guess}?" if guess else f"known keys: {', '.join(known)}",
                )

    def build(self, kind: type, *also: str) -> Any:
        """An instance of a dataclass from this section's keys, each of its default's type."""
        declared = {f.name: f for f in fields(kind)}
        self.refuse_unknown(*also, *declared)
        given = {}
        for key in self._values:
            if key in declared:
                default = declared[key].default
                given[key] = self.take(key, str if default is None else type(default))
        return kind(**given)
