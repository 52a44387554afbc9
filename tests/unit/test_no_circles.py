"""No import circles among dircluster's modules, imports inside functions and for type checking included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import dircluster

PACKAGE = Path(dircluster.__file__).parent


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, packages by the names of their folders."""
    files = sorted(PACKAGE.rglob("*.py"))
    parts = {file: ("dircluster", *file.relative_to(PACKAGE).with_suffix("").parts) for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}


def imports(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports: the deepest one that each import names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which module imports which, without the public verbs of the package itself, which import what they need."""
    found = {name: set(imports(ast.parse(file.read_text()), files)) for name, file in files.items()}
    return {name: targets - {name, "dircluster"} for name, targets in found.items() if name != "dircluster"}


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """A circle as the list of its modules, the first one again at its end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_relative_imports_are_not_used() -> None:
    """The graph knows absolute imports alone."""
    for name, file in modules().items():
        relative = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, name


def test_no_import_circles() -> None:
    edges = graph(modules())
    assert len(edges) > 50
    assert edges["dircluster.training.run"], "the graph is empty"
    assert circle(edges) == [], " -> ".join(circle(edges))
