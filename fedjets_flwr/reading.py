"""Files that anybody may have written: read, or refused with one line that names the file."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.printable import one_line


@dataclass(frozen=True)
class Format:
    """A language of files.

    Attributes:
        name: as people know it.
        load: returns what a text means.
    """

    name: str
    load: Callable[[str], Any]


def _load_json(text: str) -> Any:
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half a character is text that cannot be written anywhere
    return value


JSON = Format("JSON", _load_json)
TOML = Format("TOML", tomllib.loads)
YAML = Format("YAML", yaml.safe_load)


def read(path: Path, form: Format, named: str = "") -> Any:
    """Return what a file means.

    Args:
        path: the file.
        form: its language.
        named: how a person knows the file; empty: by its path.

    Raises:
        FedjetsError: it cannot be read, or is not of that language.
    """
    return parse(read_text(path, named), form, named or str(path))


def read_text(path: Path, named: str = "") -> str:
    """Return a file's text.

    Raises:
        FedjetsError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise FedjetsError(f"{named or path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def parse(text: str, form: Format, named: str) -> Any:
    """Return what a text means.

    Raises:
        FedjetsError: it is not of that language, or nested deeper than any sensible file.
    """
    try:
        return form.load(text)
    except RecursionError:
        raise FedjetsError(f"{named}: nested too deep") from None
    except Exception as error:  # parsers trip over hostile text in many ways of their own
        words = one_line(" ".join(str(error).split()) or type(error).__name__)  # YAML's are of several lines
        raise FedjetsError(f"{named}: not {form.name}: {words}") from None


def shortened(text: str, most: int = 300) -> str:
    """Return a text, cut off if a line cannot hold it."""
    return text if len(text) <= most else f"{text[:most]}…"


def shown(value: object) -> str:
    """Return a value as a message shows it."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return "something huge"
