"""The two places outside ``config.py`` that list every setting, generated from it."""

import json
from pathlib import Path

from fedjets_flwr.config import settings
from fedjets_flwr.errors import FedjetsError

APP_TABLE = "[tool.flwr.app.config]\n"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"


def app_config() -> str:
    """Return the body of ``[tool.flwr.app.config]``: Flower accepts only keys that stand there."""
    return "".join(f"{key} = {json.dumps(default)}\n" for key, (default, _, _) in settings())


def markdown_table() -> str:
    """Return every setting as a Markdown table."""
    rows = ["| setting | default | allowed | meaning |\n", "|---|---|---|---|\n"]
    rows += [
        f"| `{key}` | `{json.dumps(default)}` | {allowed} | {text} |\n" for key, (default, allowed, text) in settings()
    ]
    return "".join(rows)


def pyproject_with_settings(text: str) -> str:
    """Return ``pyproject.toml`` with the app's settings written anew."""
    before, _, after = text.partition(APP_TABLE)
    rest = after[after.index("\n[") :] if "\n[" in after else ""
    return before + APP_TABLE + app_config() + rest


def readme_with_settings(text: str) -> str:
    """Return the README with the settings table written anew."""
    before, _, after = text.partition(BEGIN)
    return before + BEGIN + markdown_table() + END + after.partition(END)[2]


def write(root: Path) -> None:
    """Write both files of a checkout.

    Raises:
        FedjetsError: this is none.
    """
    if not (root / "pyproject.toml").is_file():
        raise FedjetsError(f"--write: {root} is no checkout; clone the repository")
    for name, change in (("pyproject.toml", pyproject_with_settings), ("README.md", readme_with_settings)):
        path = root / name
        path.write_text(change(path.read_text()))
