"""What a deployed site lets a run do with its machine and its samples: its policy, a TOML file of its own.

Settings and messages come from the server; what they may ask is said here, and the checks are pure. In a simulation
there is no policy.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from client_app.algorithms import algorithms
from client_app.client import Update
from fedjets_flwr.config.schema import Config, flatten
from fedjets_flwr.config.sections import Scalar, Section
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.wire.messages import Job

Thing = Literal["loss", "routes", "class-counts", "mean-embedding", "own-tests", "activation"]
THINGS: Mapping[str, Thing] = {
    "loss": "loss",
    "validation-loss": "loss",
    "usual-entropy": "loss",
    "experts": "routes",
    "mass": "routes",
    "cluster": "routes",
    "kept-common": "routes",
    "answered": "class-counts",
    "answered-right": "class-counts",
    "classes": "class-counts",
    "query.inspect right": "class-counts",
    "mean-embedding": "mean-embedding",
    "local": "own-tests",
    "global": "own-tests",
    "specialist-share": "own-tests",
    "bits-per-byte": "own-tests",
    "tuned-bits-per-byte": "own-tests",
    "accuracy": "own-tests",
    "f1": "own-tests",
    "exact-match": "own-tests",
    "rouge-2": "own-tests",
    "score": "own-tests",
    "domain": "class-counts",
    "activation": "activation",
    "used": "activation",
}
"""What a number or vector of a reply tells, by its name, or by the message's type and its name."""


class Refused(FedjetsError):
    """What this site's policy does not allow; its text names the key."""

    def __init__(self, why: str) -> None:
        super().__init__(f"refused by its policy: {why}")


class Noise(Section):
    """Clipping and noise of the site's own on every update that leaves it."""

    clip_norm: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    delta: float = Field(1e-5, gt=0, lt=1)


class Policy(Section):
    """A site's policy; what is not given is not restricted.

    Attributes:
        algorithms: client algorithms that may run here.
        at_most: upper bounds of the run's settings, by key.
        at_least: lower bounds of them.
        most_experts: experts that a message may bring.
        most_megabytes: of vectors and common expert in a message.
        may_leave: what replies may tell besides updates, sample counts and totals.
        noise: on updates.
    """

    algorithms: tuple[str, ...] = ()
    at_most: dict[str, float] = {}
    at_least: dict[str, float] = {}
    most_experts: int | None = Field(None, ge=0)
    most_megabytes: float | None = Field(None, gt=0)
    may_leave: frozenset[Thing] = frozenset(get_args(Thing))
    noise: Noise | None = None

    @field_validator("at_most", "at_least", mode="before")
    @classmethod
    def _flat(cls, bounds: Any) -> Any:
        return dict(flatten(bounds)) if isinstance(bounds, Mapping) else bounds

    @model_validator(mode="after")
    def _known(self) -> Self:
        numbers = {key for key, value in Config().flat().items() if type(value) in (int, float)}
        if unknown := sorted({*self.at_most, *self.at_least} - numbers):
            raise ValueError(f"at-most, at-least: {unknown[0]} is no setting that is a number")
        if unknown := sorted(set(self.algorithms) - set(algorithms())):
            raise ValueError(f"algorithms: no {unknown[0]}; there are {', '.join(algorithms())}")
        return self


@dataclass(frozen=True)
class Asked:
    """What a message asks of this site: its type, its jobs, and how many bytes it brings."""

    kind: str
    jobs: tuple[Job, ...]
    received: int


def policy_of(node_config: Mapping[str, Scalar]) -> Policy:
    """Return a site's policy; without one everything is allowed.

    Raises:
        FedjetsError: it cannot be read, or says what no policy says.
    """
    if "policy" not in node_config:
        return Policy()
    path = Path(str(node_config["policy"])).expanduser()
    try:
        return Policy.model_validate_json(json.dumps(tomllib.loads(path.read_text()), default=str))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FedjetsError(f"--node-config: policy={str(path)!r} cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "policy"
        raise FedjetsError(f"--node-config: policy={str(path)!r}: {where}: {first['msg']}") from None


def check_asked(policy: Policy, config: Config, asked: Asked) -> None:
    """Raise Refused where the settings of a run, or what a message asks, is not allowed."""
    flat, action = config.flat(), asked.kind.partition(".")[2]
    algorithm = action if not asked.kind.startswith("query") or action in algorithms() else ""
    if algorithm and policy.algorithms and algorithm not in policy.algorithms:
        raise Refused(f"algorithms = {', '.join(policy.algorithms)}; the run has {algorithm}")
    for key, most in policy.at_most.items():
        if flat[key] > most:  # type: ignore[operator]
            raise Refused(f"at-most {key} = {most:g}, the run has {flat[key]}")
    for key, least in policy.at_least.items():
        if flat[key] < least:  # type: ignore[operator]
            raise Refused(f"at-least {key} = {least:g}, the run has {flat[key]}")
    experts = max((sum(n.startswith("expert.") for n in job.vectors) for job in asked.jobs), default=0)
    if policy.most_experts is not None and experts > policy.most_experts:
        raise Refused(f"most-experts = {policy.most_experts}, the message brings {experts}")
    if policy.most_megabytes is not None and asked.received > 1e6 * policy.most_megabytes:
        raise Refused(f"most-megabytes = {policy.most_megabytes:g}, the message brings {asked.received / 1e6:.3g}")


def check_leaving(policy: Policy, kind: str, update: Update) -> None:
    """Raise Refused where a reply tells what may not leave."""
    for name in (*update.vectors, *update.numbers):
        thing = THINGS.get(f"{kind} {name}") or THINGS.get(name)
        if thing is not None and thing not in policy.may_leave:
            raise Refused(f"may-leave has no {thing}, which the reply to {kind} holds")
