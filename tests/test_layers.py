"""The layers of the package: imports point to lower layers only. Also the maximum lengths of files and functions."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moelm"

LAYERS = [
    ["errors", "formats"],
    ["atomic", "console"],
    ["config", "hardware"],
    ["data"],
    ["model"],
    ["distributed"],
    ["runs"],
    ["inference"],
    ["evaluation"],
    ["train", "huggingface", "report"],
    ["analyze", "compare", "plan", "upcycle"],
    ["bench"],
    ["sweep"],
    ["cli"],
    ["__main__"],
]
"""Lowest first. Folders and files of one layer do not import each other; `moelm/__init__.py` may import any."""

LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Full names of everything of this package that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "moelm"}


def test_every_folder_and_file_has_a_layer() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert names - {"__init__"} == LAYER_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if folder == "__init__":
        return
    for name in imported_names(path):
        other = name.split(".")[1]
        if other not in (folder, "__version__"):
            assert LAYER_OF[other] < LAYER_OF[folder], f"{path.name} imports {name}"


def test_no_circular_imports() -> None:
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in imported_names(path)} & modules.keys()
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    visited: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " -> ".join([*chain, module])
        if module not in visited:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*chain, module))
            visited.add(module)

    for module in graph:
        visit(module, ())


def test_files_and_functions_stay_short() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 70, f"{path.name}: {node.name}"
