"""The two places outside ``config.py`` that list every setting, generated from it."""

import json
from pathlib import Path

from fedjets_flwr.config.schema import settings
from fedjets_flwr.errors import FedjetsError

APP_TABLE = "[tool.flwr.app.config]\n"
INTRODUCTION = """# Settings

Give them as `-c "key=value key=value"`, or in a TOML file: `--config FILE`. `fedjets settings` shows this list, and
`fedjets settings --write` wrote it.

"""


def app_config() -> str:
    """Return the body of ``[tool.flwr.app.config]``: Flower accepts only keys that stand there."""
    return "".join(f"{key} = {json.dumps(default)}\n" for key, (default, _, _) in settings().items())


def pyproject_with_settings(text: str) -> str:
    """Return ``pyproject.toml`` with the app's settings written anew."""
    before, _, after = text.partition(APP_TABLE)
    rest = after[after.index("\n[") :] if "\n[" in after else ""
    return before + APP_TABLE + app_config() + rest


def document() -> str:
    """Return ``docs/settings.md``, every setting as a row of a Markdown table."""
    rows = ["| setting | default | allowed | meaning |\n", "|---|---|---|---|\n"]
    for key, (default, allowed, text) in settings().items():
        rows.append(f"| `{key}` | `{json.dumps(default)}` | {allowed} | {text} |\n")
    return INTRODUCTION + "".join(rows)


def write(root: Path) -> None:
    """Write both files of a checkout.

    Raises:
        FedjetsError: this is none.
    """
    pyproject = root / "pyproject.toml"
    if not pyproject.is_file():
        raise FedjetsError(f"--write: {root} is no checkout; clone the repository")
    pyproject.write_text(pyproject_with_settings(pyproject.read_text()))
    (root / "docs" / "settings.md").write_text(document())
