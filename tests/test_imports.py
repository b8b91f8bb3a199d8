"""Who may import whom (DESIGN 2), and that no file reaches into another, read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("dataset", "decisions", "modelwrappers", "report", "utils")
PROGRAMS = [ROOT / "main.py", *sorted((ROOT / "scripts").glob("*.py"))]
FILES = [*PROGRAMS, *(f for room in TOP for f in sorted((ROOT / room).rglob("*.py")))]

# room -> the rooms that it may import besides itself
ALLOWED = {
    "program": {
        "dataset",
        "modelwrappers",
        "loading",
        "method",
        "wrapperbase",
        "engine",
        "lora",
        "decisions",
        "report",
        "utils",
    },
    # the table of methods
    "modelwrappers": {"wrapperbase", "engine", "lora", "utils"},
    # the way to a ready wrapper; what a saved posterior's rows look like is a task's matter
    "loading": {"modelwrappers", "wrapperbase", "engine", "lora", "dataset", "utils"},
    "method": {"wrapperbase", "engine", "lora", "utils"},
    "wrapperbase": {"engine", "lora", "decisions", "utils"},
    "engine": {"decisions", "utils"},
    "lora": {"utils"},
    "dataset": {"utils"},
    "report": {"decisions", "utils"},
    "decisions": {"utils"},
    "utils": set(),
}
NOT_METHODS = {
    "__init__": "modelwrappers",
    "loading": "loading",
    "wrapperbase": "wrapperbase",
}
LAZY = {"bitsandbytes", "wandb", "laplace", "matplotlib", "torchmetrics", "datasets", "trl"}
WHERE_NEEDED = {ROOT / "modelwrappers/lora/laplace_torch.py": {"laplace"}}


def room_of(parts: tuple[str, ...]) -> str:
    """Of a module's dotted name or a file's path without `.py`."""
    if parts[0] in ("main", "scripts"):
        return "program"
    if parts[0] != "modelwrappers" or len(parts) == 1:
        return parts[0]
    if parts[1] in ("engine", "lora"):
        return parts[1]
    is_module = (ROOT / "modelwrappers" / f"{parts[1]}.py").is_file()
    return NOT_METHODS.get(parts[1], "method") if is_module else "modelwrappers"


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_modules(tree: ast.AST) -> set[str]:
    """Dotted names; types that are imported for the type checker only do not count."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in ast.walk(node):
                child.is_for_types = True
        if getattr(node, "is_for_types", False):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only: the table is read off them"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_rooms_import_only_whom_they_may(file):
    room = room_of(file.relative_to(ROOT).with_suffix("").parts)
    own = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for module in imported_modules(tree_of(file)):
        parts = tuple(module.split("."))
        if parts[0] not in {*TOP, "main"} or own == "modelwrappers.__init__":
            continue
        other = room_of(parts)
        if other == "modelwrappers" and module == "modelwrappers":
            continue  # the package, of which something is imported: that counts
        assert other in ALLOWED[room] or (other == room and room != "method"), f"{own}: {module}"


def test_only_the_table_imports_methods():
    methods = {
        f"modelwrappers.{file.stem}"
        for file in (ROOT / "modelwrappers").glob("*.py")
        if file.stem not in NOT_METHODS
    }
    assert {"modelwrappers.blob", "modelwrappers.map"} <= methods
    for file in FILES:
        if name(file) != "modelwrappers/__init__.py":
            assert not imported_modules(tree_of(file)) & methods, file


@pytest.mark.parametrize("file", FILES, ids=name)
def test_heavy_optional_libraries_are_imported_where_they_are_used(file):
    top_level = ast.Module(
        [node for node in tree_of(file).body if isinstance(node, ast.Import | ast.ImportFrom)], []
    )
    found = {module.split(".")[0] for module in imported_modules(top_level)}
    assert not found & LAZY - WHERE_NEEDED.get(file, set())


def test_decisions_are_made_without_torch():
    for file in (ROOT / "decisions").glob("*.py"):
        assert not any(m.split(".")[0] == "torch" for m in imported_modules(tree_of(file))), file


def is_private(name: str) -> bool:
    return len(name) > 1 and name[0] == "_" and name[1].isalpha()


def private_names(tree: ast.Module) -> set[str]:
    """Names with an underscore that a file defines: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {n for n in names if is_private(n)}


def test_no_private_name_is_used_in_another_file():
    """Of ours; those of libraries are looked at by the tests of the files that use them."""
    trees = {file: tree_of(file) for file in FILES}
    defined = {file: private_names(tree) for file, tree in trees.items()}
    found = []
    for file, tree in trees.items():
        elsewhere = set().union(*(defined[other] for other in FILES if other != file))
        for node in ast.walk(tree):
            used = set()
            if isinstance(node, ast.Attribute):
                used = {node.attr}
            elif isinstance(node, ast.ImportFrom):
                used = {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used = {node.value}  # getattr(x, "_name")
            used = {n for n in used if is_private(n)}
            for private in used & elsewhere - defined[file]:
                found.append(f"{name(file)}:{node.lineno} {private}")
    assert not found, "\n".join(found)
