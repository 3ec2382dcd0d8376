"""The layers point one way: passes <- codegen <- rewriter; tvm only in codegen; doors are light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "passes": {"passes"},
    "codegen": {"passes", "codegen"},
    "rewriter": {"passes", "codegen", "rewriter"},
}
FILES = sorted(p for package in ALLOWED for p in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{a.name}" for a in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops & set(ALLOWED) <= ALLOWED[package]
    if package != "codegen":
        assert not tops & {"tvm", "tvm_ffi"}, "tvm is imported only in codegen/"


def test_the_walk_sees_all_packages_and_real_imports() -> None:
    assert len(FILES) > 20
    assert any("torch" in imported(p) for p in FILES)
    assert any("tvm" in {n.split(".")[0] for n in imported(p)} for p in FILES)


def test_no_import_cycles_between_modules_at_import_time() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        for node in tree.body:  # only what runs at import; imports in functions are lazy
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
                graph.add_edges_from((name, t) for t in targets if t in modules)
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("door", ["rewriter", "codegen", "passes", "passes.errors"])
def test_importing_a_door_is_light(door: str) -> None:
    code = (
        f"import {door}, sys; print(sorted({{'torch', 'tvm', 'transformers'}} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_doors_are_frozen() -> None:
    import rewriter

    assert rewriter.__all__ == [
        "__version__",
        "rewrite",
        "compile",
        "load",
        "fine_tune",
        "tune",
        "Result",
        "Plan",
        "RewriteReport",
        "Artifact",
        "Target",
        "TuningSession",
    ]


def test_no_module_hides_a_door() -> None:
    """Importing a submodule sets it on the package, where it would stand in place of the door."""
    import rewriter

    package = ROOT / "rewriter"
    assert not [name for name in rewriter._DOORS if (package / f"{name}.py").exists()]
