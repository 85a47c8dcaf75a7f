"""The rooms of the house: packages only, no cycle among them, verbs use each other's fronts."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ramgguf"
VERBS = (
    *("measure", "calibrate", "sensitivity", "plan", "refine", "transform"),
    *("quantize", "evaluate", "deploy"),
)


def _imports() -> list[tuple[Path, str]]:
    """Return every import of a module of ramgguf, by the file that has it."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramgguf."):
                found.append((path.relative_to(PACKAGE), str(node.module)))
            elif isinstance(node, ast.Import):
                found += [
                    (path.relative_to(PACKAGE), a.name)
                    for a in node.names
                    if a.name.startswith("ramgguf.")
                ]
    return found


def test_the_package_holds_packages_only() -> None:
    files = {p.name for p in PACKAGE.iterdir() if p.is_file() and not p.name.startswith("_core.")}
    assert files == {"__init__.py", "__main__.py", "py.typed"}


def test_no_packages_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for path, module in _imports():
        here, there = path.parts[0], module.split(".")[1]
        if len(path.parts) > 1 and here != there:
            graph.setdefault(here, set()).add(there)
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError for a cycle
    assert {"core", "gguf", "quants", "llama", "cli", *VERBS} <= set(order)


def test_a_verb_uses_only_the_fronts_and_results_of_others() -> None:
    inside = [
        f"{path}: {module}"
        for path, module in _imports()
        for _, room, *rest in [module.split(".")]
        if path.parts[0] in VERBS and room in VERBS and path.parts[0] != room
        if rest and not rest[0].endswith("result")
    ]
    assert inside == []
