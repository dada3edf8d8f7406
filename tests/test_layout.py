"""The tests lie in the rooms of what they test, and share what they share in ``tests/support``."""

import ast
from pathlib import Path

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
