"""Who may import whom (DESIGN 2), held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("dataset", "modelwrappers", "report", "utils")
ALLOWED = {
    "main": set(ROOMS),
    "dataset": {"utils"},
    "modelwrappers": {"utils"},
    "report": {"utils"},
    "utils": set(),
}
NOT_METHODS = {
    "__init__",
    "wrapperbase",
}
LAZY = {"bitsandbytes", "wandb", "laplace", "matplotlib", "datasets", "torchmetrics"}
FILES = [
    ROOT / "main.py",
    *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))),
]


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: the table is read off them"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rooms_import_only_whom_they_may(file):
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported_modules(ast.parse(file.read_text(encoding="utf-8"))):
        other = name.split(".")[0]
        if other in {*ROOMS, "main"} and other != room:
            assert other in ALLOWED[room], f"{file} imports {name}"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "modelwrappers").glob("*.py")), ids=lambda f: f.stem
)
def test_methods_never_import_one_another(file):
    methods = {f.stem for f in (ROOT / "modelwrappers").glob("*.py")} - NOT_METHODS
    if file.stem == "__init__":
        return
    for name in imported_modules(ast.parse(file.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "modelwrappers" and len(parts) > 1 and parts[1] != file.stem:
            assert parts[1] not in methods, f"{file} imports the method {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_heavy_optional_libraries_are_imported_where_they_are_used(file):
    top_level = ast.Module(
        [
            node
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ],
        [],
    )
    assert not {name.split(".")[0] for name in imported_modules(top_level)} & LAZY
