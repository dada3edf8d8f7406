"""All settings of a run (:mod:`.sections`), checked once, each by itself and with the others (:mod:`.rules`).

Flower hands an app a flat table of scalars (``moe.top-k = 2``). :meth:`Config.from_flat` turns it into typed sections
(``config.moe.top_k``). Errors are one line that names the setting.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from fedjets_flwr.config.rules import broken
from fedjets_flwr.config.sections import (
    Adapt,
    Aggregation,
    Attack,
    Cohort,
    CommonExpert,
    Data,
    EarlyStopping,
    Ensembles,
    Fedadg,
    Fedmix,
    Fedmoe,
    Fedprox,
    Fedsr,
    Gate,
    LanguageModel,
    Limits,
    Model,
    Moe,
    Nodes,
    Participants,
    Partition,
    Personalize,
    Privacy,
    Run,
    Scaffold,
    Scalar,
    Section,
    Specialist,
    Strategy,
    Text,
    Train,
    Transport,
    kebab,
)
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.reading import shown


class Config(Section):
    """All settings of a run."""

    run: Run = Run()
    strategy: Strategy = Strategy()
    data: Data = Data()
    text: Text = Text()
    partition: Partition = Partition()
    model: Model = Model()
    language_model: LanguageModel = LanguageModel()
    common_expert: CommonExpert = CommonExpert()
    moe: Moe = Moe()
    gate: Gate = Gate()
    train: Train = Train()
    fedprox: Fedprox = Fedprox()
    scaffold: Scaffold = Scaffold()
    fedmix: Fedmix = Fedmix()
    ensembles: Ensembles = Ensembles()
    cohort: Cohort = Cohort()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    attack: Attack = Attack()
    limits: Limits = Limits()
    nodes: Nodes = Nodes()
    transport: Transport = Transport()
    personalize: Personalize = Personalize()
    participants: Participants = Participants()
    adapt: Adapt = Adapt()
    early_stopping: EarlyStopping = EarlyStopping()
    specialist: Specialist = Specialist()
    fedmoe: Fedmoe = Fedmoe()
    fedsr: Fedsr = Fedsr()
    fedadg: Fedadg = Fedadg()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> "Config":
        """Build from dotted kebab-case keys.

        Raises:
            FedjetsError: one line that names the first wrong setting, its value and what is allowed.
        """
        nested: dict[str, dict[str, Scalar]] = {}
        known = settings()
        for key, value in flat.items():
            if key not in known:
                raise FedjetsError(f"{key}: no such setting; {_closest(key, known)}")
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise FedjetsError(f"{where} = {shown(first['input'])}: {first['msg'].lower()}") from None
        if message := broken(config):
            raise FedjetsError(message)
        return config

    def flat(self) -> dict[str, Scalar]:
        """Return every setting by its dotted kebab-case key."""
        nested = self.model_dump(by_alias=True)
        return {f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()}

    def named(self, name: str) -> "Config":
        """Return the same settings under another ``run.name``."""
        return self.model_copy(update={"run": self.run.model_copy(update={"name": name})})

    @property
    def starts_from_clients(self) -> bool:
        """Whether the common expert is trained here on samples of the clients; a language model never is."""
        elsewhere = self.of_text or self.partition.public_share or self.common_expert.path
        return not elsewhere and self.common_expert.max_epochs > 0

    @property
    def memory_shares(self) -> tuple[float, ...]:
        """Numbers in ``fedmoe.memory``; nothing where one is none."""
        try:
            return tuple(map(float, self.fedmoe.memory.split(",")))
        except ValueError:
            return ()

    @property
    def text_elsewhere(self) -> bool:
        """Whether every client is a deployed site with text of its own, and all text that lies here is public."""
        return self.of_text and self.partition.public_share == 1

    @property
    def of_text(self) -> bool:
        """Whether samples are text."""
        return self.data.name in ("text", "text-folder") or self.of_tasks

    @property
    def of_tasks(self) -> bool:
        """Whether a sample is a text with another one to write for it."""
        return self.data.name in ("tasks", "task-folder")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in ``data.classes``."""
        return tuple(name.strip() for name in self.data.classes.split(",") if name.strip())

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names in ``partition.domains``."""
        return tuple(name.strip() for name in self.partition.domains.split(",") if name.strip())

    @property
    def text_domains(self) -> tuple[str, ...]:
        """Names in ``text.domains``."""
        return tuple(name.strip() for name in self.text.domains.split(",") if name.strip())

    @property
    def public_domains(self) -> tuple[str, ...]:
        """Domains of which some text is public."""
        names = tuple(name.strip() for name in self.text.public_domains.split(",") if name.strip())
        return names or self.text_domains

    def domain_of(self, client: int) -> int:
        """Return of which of ``text.domains`` a client's text is: clients of a role hold all in turn."""
        return self.partition.place_of(client) % len(self.text_domains)

    @property
    def text_scores(self) -> tuple[str, ...]:
        """Names in ``text.scores``."""
        return tuple(name.strip() for name in self.text.scores.split(",") if name.strip())

    @property
    def cohort_size(self) -> int:
        """Clients of a round."""
        if self.cohort.sampling == "one-per-domain":
            return len(self.text_domains)
        return self.cohort.anchors + self.cohort.normals

    @property
    def num_anchors(self) -> int:
        """Anchor clients of the partition: client m is the anchor of expert m."""
        return self.partition.anchors or self.moe.experts

    @property
    def data_dir(self) -> Path:
        """Folder of the data set (setting, environment, default)."""
        return Path(self.data.dir or os.environ.get("FEDJETS_DATA") or "~/.cache/fedjets/data").expanduser()

    @property
    def cache_dir(self) -> Path:
        """Folder of embeddings and common experts (setting, environment, default)."""
        return Path(self.run.cache_dir or os.environ.get("FEDJETS_CACHE") or "~/.cache/fedjets").expanduser()

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.output_dir or "runs").expanduser().absolute() / self.run_name

    @property
    def run_name(self) -> str:
        """Name of this run: the setting, or one made from what determines the result."""
        digest = self.identity()
        if self.personalize != Personalize():
            digest = hashlib.sha256((digest + self.personalize.model_dump_json()).encode()).hexdigest()
        return self.run.name or f"{self.strategy.name}-{self.data.name}-{digest[:8]}"

    def identity(self) -> str:
        """Return a SHA-256 over the settings that determine the weights: a resumed run must agree in it.

        Left out: folders, nodes, transport, how experts are read out, and the number of rounds where no schedule
        depends on it. Settings at their default do not count, so that a new setting does not rename old runs.
        """
        defaults = Config().flat()
        flat = {key: value for key, value in self.flat().items() if value != defaults[key] and self.decides(key)}
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()

    def decides(self, key: str) -> bool:
        """Return whether the weights depend on a setting."""
        free = key in FREE or key.endswith("-seconds") or key.startswith("personalize.")
        by_rounds = self.train.schedule != "constant" or self.early_stopping.check_every > 0
        return not free and not (key == "run.rounds" and not by_rounds)


FREE = frozenset([
    "run.name", "run.output-dir", "run.cache-dir", "run.resume", "run.overwrite", "run.tensorboard", "run.device",
    "run.checkpoint-every", "run.keep-checkpoints", "data.dir", "data.download", "limits.max-failure-share",
    "limits.max-samples", "limits.enough-share", "nodes.roster", "transport.name",
])  # fmt: skip
"""Settings on which no weight depends, besides those that :meth:`Config.decides` tells by their beginning or end."""


@cache
def settings() -> Mapping[str, tuple[Scalar, str, str]]:
    """Return (default, allowed values, description) by key of every setting, in order."""
    defaults, found = Config().flat(), dict[str, tuple[Scalar, str, str]]()
    for section, outer in Config.model_fields.items():
        model: type[Section] = outer.annotation  # type: ignore[assignment]
        properties = model.model_json_schema()["properties"]
        for name, field in model.model_fields.items():
            key = f"{kebab(section)}.{kebab(name)}"
            found[key] = defaults[key], _allowed(properties[kebab(name)]), field.description or ""
    return MappingProxyType(found)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield (dotted key, value) of nested TOML tables."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(str(value) or "(empty)" for value in schema["enum"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {json.dumps(schema[key])}" for key, sign in signs.items() if key in schema]
    kind = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false"}[schema["type"]]
    return " ".join([kind, *bounds])


def _closest(key: str, known: Mapping[str, Any]) -> str:
    import difflib

    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else "`fedjets settings` lists them all"
