"""The layers of the package: imports point to lower layers only, at the top of a file or inside a function."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moelm"

LAYERS = [
    ["errors", "formats"],
    ["atomic", "config", "console", "hardware"],
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


def imported(path: Path) -> set[str]:
    """Full names of moelm's own modules that a file imports anywhere."""
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
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imported(path):
        other = name.split(".")[1]
        if other not in (own, "__version__"):
            assert LAYER_OF[other] < LAYER_OF[own], f"{path.name} imports {name}"


def test_no_circular_imports() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    graph = {
        name: {wanted.rpartition(".")[0] if wanted not in names else wanted for wanted in imported(path)} & names.keys()
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for wanted in sorted(graph.get(name, ())):
                visit(wanted, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_and_functions_stay_short() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 70, f"{path.name}: {node.name}"
