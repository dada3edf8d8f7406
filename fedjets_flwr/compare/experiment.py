"""Comparisons: rows x seeds, each run once, one Markdown table and its figures.

An experiment is a YAML file: ``preset`` (TOML), ``seeds``, ``settings`` for all rows, optionally ``by-seed``, settings
of the common expert or the data with a value for each of the seeds, and ``rows``: ``name``, ``settings`` that win over
those of all rows, and optionally ``seeds``, ``readings``, the read-outs of the same run that get a line each, and
``start``, the name of a row above from whose models it starts (``run.start-from``); with ``run.rounds = 0`` it only
scores them.
On text ``gain`` may name two rows, ``before`` and ``after``: every line then tells its rounds to shares of what lies
between their bits per byte.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import OWN_DATA, Scalar
from fedjets_flwr.config.sources import absolute_paths, parse_pairs, read_preset, read_toml
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.moe.metrics import READINGS, Reading
from fedjets_flwr.reading import YAML, read
from fedjets_flwr.runs.records import SummaryTold, read_told

Settings = dict[str, Scalar]


class Row(BaseModel):
    """One method of the comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    settings: dict[str, str | int | float | bool] = {}
    seeds: list[int] = []
    readings: list[str] = []
    start: str = ""

    @field_validator("readings")
    @classmethod
    def _known(cls, readings: list[str]) -> list[str]:
        if unknown := set(readings) - set(READINGS):
            raise ValueError(f"no such reading {', '.join(sorted(unknown))}; there are {', '.join(READINGS)}")
        return readings


class Gain(BaseModel):
    """Between which rows' last bits per byte a gain lies, seed by seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: str
    after: str


class File(BaseModel):
    """What an experiment's YAML file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    preset: str
    seeds: list[int] = Field(min_length=1)
    settings: dict[str, str | int | float | bool] = {}
    by_seed: dict[str, list[str | int | float | bool]] = Field({}, alias="by-seed")
    rows: list[Row] = Field(min_length=1)
    gain: Gain | None = None

    @model_validator(mode="after")
    def _sound(self) -> "File":
        for key, values in self.by_seed.items():
            if len(values) != len(self.seeds):
                raise ValueError(f"by-seed: {key}: {len(values)} value(s) for {len(self.seeds)} seed(s)")
            if key in self.settings:
                raise ValueError(f"by-seed: {key}: settings has it, too")
            if not key.startswith(("common-expert.", "data.")):  # the table tells what a row costs once for all seeds
                raise ValueError(f"by-seed: {key}: expected a setting of the common expert or the data")
        names = [row.name for row in self.rows]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"rows: two are called {twice!r}")
        for seeds in (self.seeds, *(row.seeds for row in self.rows)):
            if len(set(seeds)) < len(seeds):
                raise ValueError("seeds: one stands there twice, and would count as two")
        for row in self.rows:
            if self.by_seed and (strangers := set(row.seeds) - set(self.seeds)):
                raise ValueError(f"by-seed: no value for seed {min(strangers)} of row {row.name!r}")
        return self

    def of_seed(self, seed: int) -> Settings:
        """Return the settings that runs of a seed share, besides the seed."""
        return {key: values[self.seeds.index(seed)] for key, values in self.by_seed.items()}


@dataclass(frozen=True)
class Experiment:
    """A checked experiment: the runs of each row, whose folders lie in ``parent``, and what may differ by seed."""

    title: str
    parent: Path
    rows: tuple[tuple[Row, tuple[Config, ...]], ...]
    gain: Gain | None = None
    by_seed: tuple[str, ...] = ()


def read_experiment(path: StrPath, extra: Sequence[str], output_dir: Path | None) -> Experiment:
    """Return the experiment in a YAML file, every setting of every run checked.

    Args:
        path: the file; its ``preset`` is the name of one, or a TOML file relative to the checkout.
        extra: ``key=value`` pairs that override every row.
        output_dir: parent folder of the runs; default: ``runs/<name of the file>``.

    Raises:
        FedjetsError: names the file and what is wrong in it.
    """
    path = Path(path)
    try:
        file = File.model_validate(read(path, YAML))
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"].removeprefix("Value error, ")
        parts = (str(path), ".".join(map(str, first["loc"])), why[:1].lower() + why[1:])
        raise FedjetsError(": ".join(filter(None, parts))) from None
    shared = _preset(file.preset, path) | file.settings
    parent = (output_dir or Path("runs") / path.stem).expanduser().absolute()
    shared |= {"run.output-dir": str(parent)}
    final = parse_pairs(extra)
    for key, instead in (("run.seed", f"change the seeds in {path}"), ("run.output-dir", "use --output-dir")):
        if key in final:
            raise FedjetsError(f"{key}: all rows would have the same; {instead}")
    rows = []
    above: dict[tuple[str, int], Config] = {}
    for row in file.rows:
        configs = []
        for seed in row.seeds or file.seeds:
            own = file.of_seed(seed) | row.settings | {"run.seed": seed}
            if row.start:
                if (row.start, seed) not in above:
                    raise FedjetsError(f"{path}, row {row.name!r}: start: no row {row.start!r} of seed {seed} above it")
                own["run.start-from"] = str(above[row.start, seed].run_dir)
            no_rounds: Settings = {"run.rounds": 0} if own.get("run.rounds") == 0 else {}  # whatever all others have
            try:
                configs.append(_named(absolute_paths(shared | own | final | no_rounds), parent))
            except FedjetsError as error:
                raise FedjetsError(f"{path}, row {row.name!r}: {error}") from None
            if configs[-1].personalize.read_out != "familiar" and any(
                Reading.of(r).read_out == "familiar" for r in row.readings
            ):
                raise FedjetsError(f"{path}, row {row.name!r}: readings: familiar needs personalize.read-out: familiar")
            above[row.name, seed] = configs[-1]
        rows.append((row, tuple(configs)))
    names = {row.name for row in file.rows}
    for key, name in file.gain or ():
        if name not in names:
            raise FedjetsError(f"{path}: gain.{key}: no row {name!r}")
    return Experiment(file.title, parent, tuple(rows), file.gain, tuple(file.by_seed))


def _preset(preset: str, path: Path) -> dict[str, Scalar]:
    """Return the settings of a preset by its name or, with its ending, of a file of the checkout of ``path``."""
    try:
        if preset.endswith(".toml"):
            return read_toml(path.resolve().parent.parent / preset, "preset:")
        return read_preset(preset)
    except FedjetsError as error:
        raise FedjetsError(f"{path}: {error}") from None


def _named(flat: Mapping[str, Scalar], parent: Path) -> Config:
    """Return the settings with a run name of all that matters to the table, rounds and read-out included.

    ``parent``: of the runs, which get the same names wherever it lies, also those that start from one of them.
    """
    elsewhere = ("run.output-dir", "run.cache-dir", *(() if flat.get("data.name") in OWN_DATA else ("data.dir",)))
    matters = {k: v for k, v in flat.items() if k not in elsewhere}
    start = Path(str(matters.get("run.start-from") or ""))
    if start.parent == parent:
        matters["run.start-from"] = start.name
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:8]
    return Config.from_flat({**flat, "run.name": f"{flat.get('strategy.name', 'fedjets')}-{digest}"})


def done(run_dir: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run.

    Raises:
        FedjetsError: it is damaged.
    """
    summary = read_told(run_dir / "summary.json", SummaryTold)
    return summary if summary and summary.get("status") == "completed" else None
