import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith
from tunesmith.engines import ENGINES
from tunesmith.methods import METHODS
from tunesmith.objectives import OBJECTIVES

SOURCE = Path(tunesmith.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LOOP_LINES = 450, 80, 200

HEAVY = ("torch", "transformers", "peft", "numpy", "pyarrow", "matplotlib")


def loaded(code: str, *names: str) -> list[str]:
    """Those of the packages that a fresh interpreter has imported after `code`."""
    script = f"{code}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["tunesmith", "tunesmith.cli"])
def test_the_command_line_starts_without_heavy_packages(module: str) -> None:
    assert loaded(f"import {module}", *HEAVY, "pydantic", "yaml", "rich") == []


@pytest.mark.parametrize("module", ["tunesmith.config", "tunesmith.config_file", "tunesmith.types"])
def test_configurations_are_read_without_torch(module: str) -> None:
    assert loaded(f"import {module}", *HEAVY) == []


def test_help_loads_nothing_heavy() -> None:
    code = "import contextlib, io\nfrom tunesmith.cli import app\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    assert loaded(code + "    app(['train', '--help'], standalone_mode=False)", *HEAVY, "tunesmith.config") == []


def test_showing_a_configuration_loads_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: demo\ndata: demo\noutput: a\n")
    code = "import contextlib, io\nfrom tunesmith.cli import app\nwith contextlib.redirect_stdout(io.StringIO()):\n"
    assert loaded(code + f"    app(['config', 'show', {str(file)!r}], standalone_mode=False)", *HEAVY) == []


def imports(file: Path) -> set[str]:
    """The modules that a file imports anywhere, also inside functions and for the type checker alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(where: str, *packages: str) -> list[str]:
    """`file imports module` for all files below `where` that import one of the packages."""
    files = sorted((SOURCE / where).rglob("*.py")) if (SOURCE / where).is_dir() else [SOURCE / where]
    assert files
    return [
        f"{file.relative_to(SOURCE)} imports {module}"
        for file in files
        for module in sorted(imports(file))
        if any(module == package or module.startswith(f"{package}.") for package in packages)
    ]


@pytest.mark.parametrize("file", ["config.py", "config_file.py", "errors.py", "cli.py", "schedules.py"])
def test_configuration_and_command_line_import_no_torch(file: str) -> None:
    assert forbidden(file, "torch", "transformers", "peft") == []


def test_objectives_see_no_model_engine_or_method() -> None:
    packages = [f"tunesmith.{name}" for name in ("models", "engines", "methods", "learner", "run", "loop")]
    assert forbidden("objectives", *packages, "transformers", "peft") == []


def test_methods_see_no_objective() -> None:
    packages = [f"tunesmith.{name}" for name in ("objectives", "engines", "data", "learner", "run", "loop")]
    assert forbidden("methods", *packages) == []


def test_engines_see_no_objective_and_no_method() -> None:
    packages = [f"tunesmith.{name}" for name in ("objectives", "methods", "data", "learner", "run", "loop")]
    assert forbidden("engines", *packages) == []


def test_data_sees_no_other_axis() -> None:
    packages = [
        f"tunesmith.{name}" for name in ("models", "objectives", "methods", "engines", "learner", "run", "loop")
    ]
    assert forbidden("data", *packages) == []


def test_the_loop_knows_no_objective_method_or_engine_by_name() -> None:
    loop = SOURCE / "loop.py"
    nodes = list(ast.walk(ast.parse(loop.read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    of_axes = {module for module in modules if module.split(".")[1:2] in (["objectives"], ["methods"], ["engines"])}
    bases = {f"tunesmith.{axis}" for axis in ("objectives", "methods", "engines")}
    assert of_axes <= bases | {f"{base}.base" for base in bases}
    assert not any(
        name.startswith("tunesmith") for node in nodes if isinstance(node, ast.Import) for name in _names(node)
    )
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    classes = {part.__name__ for table in (OBJECTIVES, METHODS, ENGINES) for part in table.values()}
    assert not words & (classes | {*OBJECTIVES, *METHODS, *ENGINES})


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


def test_the_loop_is_short() -> None:
    assert len((SOURCE / "loop.py").read_text().splitlines()) < MAX_LOOP_LINES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_are_of_a_size_that_one_reads(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
