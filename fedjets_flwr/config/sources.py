"""Where settings come from: presets of the package, TOML files, and what is typed after ``-c``; the later one wins."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from fedjets_flwr.config.schema import Config, flatten
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.reading import Format, read

PATHS = ("run.output-dir", "run.cache-dir", "run.start-from", "data.dir", "common-expert.path", "nodes.roster")
"""Settings that name folders and files."""

FLAT_TOML = Format("TOML", lambda text: dict(flatten(tomllib.loads(text))))
"""Dotted settings, as a TOML file has them."""

PRESETS = files("fedjets_flwr") / "presets"

_NEXT = r"""(?=\s+[\w-]+\.[\w-]+\s*=|\s*$)"""
_PAIR = re.compile(rf"""\s*([^\s=]+)\s*=(\s*"(?:[^"\\]|\\.)*"|\s*'[^']*'|.*?){_NEXT}""", re.DOTALL)


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in PRESETS.iterdir() if path.name.endswith(".toml"))


def about_preset(name: str) -> str:
    """Return the first line of a preset: what it is for."""
    return (PRESETS / f"{name}.toml").read_text().partition("\n")[0].removeprefix("#").strip()


def read_preset(name: str) -> dict[str, Scalar]:
    """Return the settings of a preset.

    Raises:
        FedjetsError: there is none of that name.
    """
    if name not in preset_names():
        raise FedjetsError(f"--preset {name}: no such preset; choose one of {', '.join(preset_names())}")
    return dict(flatten(tomllib.loads((PRESETS / f"{name}.toml").read_text())))


def read_toml(path: Path, option: str = "--config") -> dict[str, Scalar]:
    """Return the settings in a TOML file, which ``option`` named.

    Raises:
        FedjetsError: it cannot be read, or is not TOML.
    """
    found: dict[str, Scalar] = read(path, FLAT_TOML, f"{option} {path}")
    return found


def parse_pairs(texts: Sequence[str]) -> dict[str, Scalar]:
    """Return the settings in texts of one ``key=value`` each, or of several with blanks between (Flower's way).

    A value is what TOML takes it for, or else text; one that holds ``another.key =`` needs quotes.

    Raises:
        FedjetsError: a text is no pairs.
    """
    flat: dict[str, Scalar] = {}
    for text in texts:
        at = 0
        while pair := _PAIR.match(text, at):
            flat[pair[1]] = _scalar(pair[2].strip())
            at = pair.end()
        if text[at:].strip() or not at:
            raise FedjetsError(f"-c {text}: write it as key=value, e.g. -c run.rounds=10")
    return flat


def _scalar(text: str) -> Scalar:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, str | int | float | bool) else text


def read_flat(preset: str, path: Path | None, texts: Sequence[str]) -> dict[str, Scalar]:
    """Return the settings of a preset or a file, and of ``key=value`` texts, as they are written.

    Raises:
        FedjetsError: names the option that is wrong.
    """
    if preset and path is not None:
        raise FedjetsError(f"--preset {preset} --config {path}: give one of them, and single settings by -c")
    chosen = read_preset(preset) if preset else read_toml(path) if path is not None else {}
    return chosen | parse_pairs(texts)


def absolute_paths(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings whose folders and files are absolute: a run works in a folder of its own."""
    return {**flat, **{key: _absolute(key, str(flat[key])) for key in PATHS if flat.get(key)}}


def _absolute(key: str, path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise FedjetsError(f"{key} = {path!r}: no such user; write the folder out") from None


def local_config(
    written: Mapping[str, Scalar], output_dir: Path | None = None, defaults: Mapping[str, Scalar] | None = None
) -> Config:
    """Return the checked settings of a run on this machine; ``defaults`` stand where nothing was written.

    Raises:
        FedjetsError: names the setting that is wrong.
    """
    flat = {**(defaults or {}), **written}
    flat["run.output-dir"] = str(output_dir or flat.get("run.output-dir") or "runs")
    return Config.from_flat(absolute_paths(flat))


def remote_config(written: Mapping[str, Scalar], output_dir: Path | None) -> tuple[Config, Config]:
    """Return the settings for a SuperLink on another machine, and the same with the results folder on this one.

    Raises:
        FedjetsError: names the setting that is wrong; paths of the other machine must be absolute.
    """
    for key in PATHS:
        if written.get(key) and not str(written[key]).startswith(("/", "~")):
            raise FedjetsError(f"{key} = {written[key]!r}: with --superlink a path there, not here; make it absolute")
    config = Config.from_flat(written)
    folder = str((output_dir or Path("runs")).expanduser().absolute())
    return config, config.model_copy(update={"run": config.run.model_copy(update={"output_dir": folder})})
