"""The layout keeps its promises: where files lie, which way imports point, who reads settings.

The five code folders lie at the top of the checkout and are one import package, `qtool.*`, through
relative links in `qtool/`. A regular package named `kernels` on the path would hide Hugging Face's
package of that name, which transformers imports; hence no `__init__.py` in the linked folders, and
no import that starts at one of them.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qtool.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qtool"
LINKED = ("quantize", "convert", "runtime", "kernels", "calibration", "recipes")
SOURCES = sorted(
    path
    for folder in (PACKAGE, *(PACKAGE / name for name in LINKED))
    for path in (folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"))
)

# A module belongs to the layer of its longest listed prefix, so that a new file in qtool/ itself is
# core until it is listed. "top" holds the commands and all that is built on the whole.
LAYER_OF_PREFIX = {
    "qtool": "core",
    "qtool.__main__": "top",
    "qtool.api": "top",
    "qtool.cli": "top",
    "qtool.push_command": "top",
    "qtool.verify_command": "top",
    "qtool.convert": "codecs",
    "qtool.convert.command": "top",
    "qtool.convert.gguf_options": "top",
    "qtool.convert.gguf_plan": "top",
    "qtool.convert.gguf_run": "top",
    "qtool.convert.imatrix_command": "top",
    "qtool.convert.inspect_command": "top",
    "qtool.convert.run": "top",
    "qtool.convert.search": "top",
    "qtool.convert.gguf.export": "top",
    "qtool.kernels": "kernels",
    "qtool.runtime": "top",
    "qtool.runtime.config": "engine",
    "qtool.runtime.engine": "engine",
    "qtool.runtime.layers": "engine",
    "qtool.runtime.loading": "engine",
    "qtool.runtime.memory": "engine",
    "qtool.runtime.offload": "engine",
    "qtool.runtime.packed_cache": "engine",
    "qtool.runtime.random_model": "engine",
    "qtool.runtime.models": "engine",
    "qtool.runtime.parallel": "engine",
    "qtool.runtime.tokenizer": "engine",
    "qtool.runtime.tokenizer_cache": "engine",
    "qtool.runtime.tokenizer_files": "engine",
    "qtool.runtime.tokenizer_parts": "engine",
    "qtool.calibration": "calibration",
    "qtool.quantize": "quantize",
    "qtool.quantize.command": "top",
}
MAY_IMPORT = {
    "core": {"core"},
    "codecs": {"core", "codecs"},
    "kernels": {"core", "codecs", "kernels"},
    "engine": {"core", "codecs", "kernels", "engine"},
    "calibration": {"core", "codecs", "kernels", "calibration"},
    "quantize": {"core", "codecs", "kernels", "calibration", "quantize"},
    "top": {"core", "codecs", "kernels", "engine", "calibration", "quantize", "top"},
}
# The package's own __init__ loads names on use: it may point upward where nothing is imported.
FACADE = "qtool"


class Import(NamedTuple):
    name: str  # the module, with the imported name appended when that is itself a module of ours
    line: int
    is_lazy: bool  # inside a function or for type checkers only: does not run on import


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those for type checkers too: they are arrows as well."""
    return tuple(find_imports(path))


def find_imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    deferred = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    )
    lazy = {id(node) for branch in deferred for node in ast.walk(branch)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(
                    full if full in MODULES else node.module or "", node.lineno, id(node) in lazy
                )


def layer(module: str) -> str:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if found := LAYER_OF_PREFIX.get(".".join(parts[:end])):
            return found
    raise AssertionError(f"{module} is not part of qtool")


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("name", LINKED)
def test_each_code_folder_is_linked_into_the_package(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_hold_no_init_file(name: str) -> None:
    found = [str(path.relative_to(ROOT)) for path in (ROOT / name).rglob("__init__.py")]
    assert not found, f"{found}: a regular package here would hide others of the same name"


def test_the_package_has_modules_in_every_code_folder() -> None:
    """Guards the other tests of this file against looking at nothing."""
    for name in LINKED[:-1]:
        assert any(module.startswith(f"qtool.{name}.") for module in MODULES), name


def test_imports_start_at_qtool() -> None:
    wrong = [
        f"{place(path, found.line)}: {found.name}"
        for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
        for found in imports_of(path)
        if found.name.split(".")[0] in LINKED
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_point_one_way() -> None:
    wrong = []
    for module, path in MODULES.items():
        for found in imports_of(path):
            if found.name.split(".")[0] != "qtool" or found.name == FACADE:
                continue
            if module == FACADE and found.is_lazy:
                continue
            here, there = layer(module), layer(found.name)
            if there not in MAY_IMPORT[here]:
                wrong.append(f"{place(path, found.line)}: {here} imports {found.name} ({there})")
    assert not wrong, "\n".join(wrong)


def test_imports_of_qtool_name_existing_modules() -> None:
    wrong = [
        f"{place(path, found.line)}: {found.name}"
        for path in SOURCES
        for found in imports_of(path)
        if found.name.split(".")[0] == "qtool" and found.name not in MODULES
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_and_the_demo_reach_commands_and_server() -> None:
    commands = {target.partition(":")[0] for target, _ in COMMANDS.values()}
    # Those of the runtime itself: serve and chat, the demo, what manages models and batches.
    of_runtime = {name for name in commands if name.rpartition(".")[0] == "qtool.runtime"}
    allowed = {"qtool.cli", "qtool.__main__", *of_runtime}
    server = "qtool.runtime.server"
    wrong = []
    for module, path in MODULES.items():
        for found in imports_of(path):
            ours = found.name.startswith("qtool.")
            names_command = ours and found.name.endswith(("command", "runtime.demo"))
            enters_server = found.name.startswith(server) and not module.startswith(server)
            deploys = module.startswith("qtool.runtime.deploy.")
            if (names_command or enters_server) and not (deploys or module in allowed):
                wrong.append(f"{place(path, found.line)}: {found.name}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    eager = {
        module: {
            found.name for found in imports_of(path) if found.name in MODULES and not found.is_lazy
        }
        - {FACADE}
        for module, path in MODULES.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in finished:
            for target in sorted(eager[module]):
                visit(target, (*trail, module))
            finished.add(module)

    for module in eager:
        visit(module, ())


def test_only_settings_reads_the_environment() -> None:
    reads = re.compile(r"os\.environ|os\.getenv|\bgetenv\(|from os import .*\benviron")
    wrong = [
        place(path, number)
        for path in SOURCES
        if path != PACKAGE / "settings.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if reads.search(line)
    ]
    assert not wrong, "\n".join(wrong)


# Where the import name differs from the name on the registry.
DISTRIBUTION_OF_IMPORT = {"yaml": "pyyaml"}


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(extra: str | None = None) -> list[Requirement]:
    table = project()
    listed = table["dependencies"] if extra is None else table["optional-dependencies"][extra]  # type: ignore[index]
    return [Requirement(text) for text in listed]  # type: ignore[attr-defined]


def test_every_imported_distribution_is_declared() -> None:
    known = {
        canonicalize_name(requirement.name)
        for requirement in [*declared(), *declared("gpu"), *declared("eval"), *declared("ray")]
    }
    wrong = []
    for path in SOURCES:
        for found in imports_of(path):
            top = found.name.split(".")[0]
            if top == "qtool" or top in sys.stdlib_module_names:
                continue
            if canonicalize_name(DISTRIBUTION_OF_IMPORT.get(top, top)) not in known:
                wrong.append(f"{place(path, found.line)}: {found.name}")
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_every_declared_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if line and line[0] != "#")
    }
    assert pins["torch"] == "2.13.0"  # no local version: the index chooses CPU or CUDA
    for requirement in [*declared(), *declared("dev"), *declared("gpu")]:
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pinned), f"{requirement} against {pinned}"
