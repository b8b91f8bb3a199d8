"""`pip install -e .`: the packages are there from any folder, and nothing else is."""

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".git", ".venv", "checkpoints", "wandb", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an empty virtual environment with this project in it, without dependencies."""
    work = tmp_path_factory.mktemp("install")
    source = work / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    # What builds the package; pip would fetch it.
    tools = work / "tools"
    tools.mkdir()
    site = Path(sysconfig.get_paths()["purelib"])
    for name in ("setuptools", "_distutils_hack"):
        (tools / name).symlink_to(site / name)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    flags += ["--disable-pip-version-check"]
    subprocess.run(
        [str(python), "-m", "pip", "install", *flags, "-e", str(source)],
        env={**os.environ, "PYTHONPATH": str(tools)},
        check=True,
        cwd=work,
    )
    return python


def said(python: Path, code: str, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(python), "-c", code],
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_needs_no_library_is_imported_without_any(installed, tmp_path):
    code = """
import modelwrappers, report, utils.errors, utils.registry
assert "blob" in modelwrappers.WRAPPERS
print(modelwrappers.catalogue().listed())
try:
    modelwrappers.BLoB
except ImportError as error:
    print("missing:", error.name)
try:
    import tests
except ImportError:
    print("no tests")
"""
    text = said(installed, code, tmp_path)
    assert "blob" in text and "missing: " in text and "no tests" in text


def test_with_its_libraries_it_works_from_any_folder(installed, tmp_path):
    code = """
from modelwrappers import BLoB, load_posterior
from modelwrappers.wrapperbase import WrapperBase
assert issubclass(BLoB, WrapperBase)
print(load_posterior.__module__, sys.modules["modelwrappers"].__file__)
"""
    libraries = sysconfig.get_paths()["purelib"]
    text = said(installed, f"import sys\n{code}", tmp_path, PYTHONPATH=libraries)
    module, file = text.split()
    assert module == "modelwrappers.loading"
    assert Path(file).is_relative_to(installed.parent.parent.parent / "source")


def test_every_package_is_named_in_pyproject():
    """A room that is left out there would be missing from what people install."""
    import tomllib

    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for room in ("dataset", "decisions", "modelwrappers", "report", "utils")
        for file in (ROOT / room).rglob("*.py")
    }
    assert set(named["tool"]["setuptools"]["packages"]) == folders
    assert all((ROOT / name.replace(".", "/") / "__init__.py").is_file() for name in folders)
