"""The architecture, held in place: imports point down only, light modules stay light, and nobody asks for `scenes`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = [
    set(modules.split())
    for modules in (
        # 0: settings, errors, and what everybody may use; no torch
        "allocator config errors files hiding hub pickles reporting signals",
        # 1: the mathematics
        "losses randomness schedule timesteps transfer",
        # 2: plain functions over a denoiser, and the shapes of what goes in and comes out
        "arms records sampling solver",
        # 3: one concept a module
        "arithmetic backbone checkpoint data ema locks lora methods metrics pictures processes quiet "
        "report safety scenes sd15 telemetry timing",
        # 4: one readable procedure each, and the parts that procedures share
        "benchmark doctor export generate pretrain train ui walkthrough opening oracle previews proving redraw "
        "validation",
        # 5: the doors
        "__init__ __main__ cli",
    )
]
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

SHARED = {"quiet", "sd15"}
"""In layer 3 for the libraries they need, but no concepts to come to depend on: silence, and package data."""

TORCH_ONLY = LAYERS[0] | LAYERS[1] | LAYERS[2] | {"methods"}
MODEL_LIBRARIES = {"accelerate", "diffusers", "peft", "transformers"}
HEAVY = MODEL_LIBRARIES | {"datasets", "tensorboard", "torch", "torchmetrics"}


@dataclass(frozen=True)
class Import:
    """One imported module, as written at a line; `typing_only` where it stands under `if TYPE_CHECKING`."""

    name: str
    line: int
    typing_only: bool

    @property
    def ours(self) -> str | None:
        """The first name below `fewstep`, if it is one of ours: `fewstep.data.coco` is `data`."""
        package, _, rest = self.name.partition(".")
        return (rest.partition(".")[0] or "__init__") if package == "fewstep" else None


def imports_of(tree: ast.AST, package: list[str], typing_only: bool = False) -> Iterator[Import]:
    """Every import in `tree`, at any depth, of a module in `package`; relative ones resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "fewstep":  # from fewstep import lora
                modules = [f"fewstep.{alias.name}" if alias.name in LAYER else name for alias in node.names]
            else:
                modules = [name]
            yield from (Import(module, node.lineno, typing_only) for module in modules)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports_of(ast.Module(node.body, []), package, typing_only=True)
            yield from imports_of(ast.Module(node.orelse, []), package, typing_only)
        else:
            yield from imports_of(node, package, typing_only)


def imports(file: Path) -> list[Import]:
    return list(imports_of(ast.parse(file.read_text()), ["fewstep", *file.relative_to(ROOT).parts[:-1]]))


def top(file: Path) -> str:
    """The name under which LAYERS knows the module or the subpackage that `file` belongs to."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def shown(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_module_has_its_layer() -> None:
    assert {top(file) for file in FILES} - set(LAYER) == set(), "give the new module its place in LAYERS"


@pytest.mark.parametrize("file", FILES, ids=shown)
def test_imports_point_down(file: Path) -> None:
    here = top(file)
    for one in imports(file):
        if one.ours is not None and one.ours != here:
            assert LAYER[one.ours] <= LAYER[here], f"{shown(file)}:{one.line} imports {one.name} from a layer above"


@pytest.mark.parametrize("file", [file for file in FILES if top(file) in LAYERS[3]], ids=shown)
def test_concepts_do_not_know_each_other(file: Path) -> None:
    for one in imports(file):
        if one.ours in LAYERS[3] - SHARED and one.ours != top(file):
            assert one.typing_only, f"{shown(file)}:{one.line} imports {one.name}; go through layers 0 to 2"


@pytest.mark.parametrize("file", [file for file in FILES if top(file) in TORCH_ONLY], ids=shown)
def test_the_mathematics_needs_torch_alone(file: Path) -> None:
    for one in imports(file):
        assert one.name.partition(".")[0] not in MODEL_LIBRARIES, f"{shown(file)}:{one.line} imports {one.name}"


@pytest.mark.parametrize("file", [file for file in FILES if top(file) in LAYERS[0]], ids=shown)
def test_layer_0_needs_no_torch(file: Path) -> None:
    for one in imports(file):
        assert one.name.partition(".")[0] != "torch", f"{shown(file)}:{one.line} imports {one.name}"


@pytest.mark.parametrize("module", ["fewstep", "fewstep.cli", *(f"fewstep.{name}" for name in sorted(LAYERS[0]))])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def docstrings(tree: ast.AST) -> set[ast.expr]:
    """Strings that stand as statements: docstrings of modules, classes, functions and attributes."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("file", [file for file in FILES if top(file) != "scenes"], ids=shown)
def test_nobody_knows_which_base_it_works_on(file: Path) -> None:
    """Only the registry of bases and the default setting name `scenes`; only its own rebuilding imports it."""
    tree = ast.parse(file.read_text())
    if top(file) != "pretrain":
        assert all(one.ours != "scenes" for one in imports(file)), f"{shown(file)} imports the base"
    if top(file) in ("cli", "config") or shown(file) in ("backbone.py", "backbone/registry.py"):
        return
    documentation = docstrings(tree)
    named = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in documentation
        and (node.value == "scenes" or node.value.startswith("fewstep.scenes"))
    ]
    asked = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Compare) and "EMBEDDED_BASE" in ast.unparse(node)
    ]
    assert named + asked == [], f"{shown(file)} asks for a base by name at these lines; ask it for its abilities"


def test_the_checks_see_what_they_are_for() -> None:
    """A guard for the guards: imports in functions, under TYPE_CHECKING, relative ones, and modules by name."""
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from fewstep.lora import attach
def f():
    import diffusers.schedulers
    from fewstep import train, errors
    from .. import cli
    from ..data.coco import read
    from .kstep import KStep
"""
    found = {(one.name, one.ours, one.typing_only) for one in imports_of(ast.parse(source), ["fewstep", "methods"])}
    assert found == {
        ("typing", None, False),
        ("fewstep.lora", "lora", True),
        ("diffusers.schedulers", None, False),
        ("fewstep.train", "train", False),
        ("fewstep.errors", "errors", False),
        ("fewstep.cli", "cli", False),
        ("fewstep.data.coco", "data", False),
        ("fewstep.methods.kstep", "methods", False),
    }
