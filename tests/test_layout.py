"""The tests lie in the rooms of what they test, and share what they share in ``tests/support``."""

import ast
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

TESTS = Path(__file__).resolve().parent


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return froms | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_no_test_module_imports_another() -> None:
    found = {
        str(path.relative_to(TESTS)): names
        for path in TESTS.rglob("*.py")
        if (names := {name for name in imported(path) if ".test_" in name or name.startswith("test_")})
    }
    assert found == {}


def test_every_room_of_the_tests_is_one_of_the_code() -> None:
    root = TESTS.parent
    rooms = {path.name for path in (root / "fedjets_flwr").iterdir() if (path / "__init__.py").is_file()}
    rooms |= {"client_app", "server_app", "strategies", "benchmarks"}
    own = {"support", "documents", "end_to_end"}
    here = {path.name for path in TESTS.iterdir() if (path / "__init__.py").is_file()}
    assert here - own <= rooms


def test_the_locked_versions_are_in_the_ranges_that_the_project_asks_for() -> None:
    root = TESTS.parent
    lines = (root / "requirements.lock").read_text().splitlines()[1:]
    locked = {Requirement(line).name.lower().replace("_", "-"): line.partition("==")[2] for line in lines}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *(t for extra in project["optional-dependencies"].values() for t in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[wanted.name.lower()]), text
