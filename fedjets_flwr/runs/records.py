"""What the files of a run folder may hold: they are checked once, where they are read, and are plain JSON from then on.

What a file does not tell is left open, since runs of other versions tell less; what it tells has its type and a size
that people can read.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.reading import JSON, read, shortened
from fedjets_flwr.runs.score import COURSES

Value = TypeVar("Value")
Number = Annotated[float, Field(ge=-1e100, le=1e100)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
ClientId = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Reading = Annotated[str, Field(pattern=r"^[^/]+/[^/]+(/adabn)?$")]
Experts = dict[ClientId, list[Count]]


def _rectangular(table: list[list[Value]]) -> list[list[Value]]:
    if len({len(row) for row in table}) > 1:
        raise ValueError("rows of different lengths")
    return table


def _of_some(pair: list[int]) -> list[int]:
    if len(pair) != 2 or pair[1] < 1:
        raise ValueError("not right answers of one sample or more")
    return pair


Table = Annotated[list[list[Number | None]], AfterValidator(_rectangular)]
Shares = Annotated[list[list[Annotated[float, Field(ge=0, le=1)]]], AfterValidator(_rectangular)]
Answers = Annotated[list[Count], AfterValidator(_of_some)]


class Told(BaseModel):
    """An object of a file, which may tell more than is known here."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class ScoreTold(Told):
    """A record's score."""

    name: str
    better: Literal["higher", "lower"]
    value: Number


class BestTold(ScoreTold):
    """The last score beside the best one."""

    best: Number
    best_round: Count


class RoutingTold(Told):
    """How samples found their experts."""

    sample_share: Number | None = None
    coverage: Number | None = None


class InspectionTold(Told):
    """Every expert on every class."""

    routing: RoutingTold
    expert_class_accuracy: Table


class DomainTold(Told):
    """What clients of a domain of text came to."""

    bits_per_byte: Number
    accuracy: Number
    scores: dict[str, Number] = {}


class ParticipantsTold(Told):
    """Clients that train, on their own tests."""

    clients: dict[ClientId, dict[str, Answers]] = {}
    local: Number | None = None
    bits_per_byte: Number | None = None
    tuned_bits_per_byte: Number | None = None
    bits: dict[ClientId, Number] = {}
    scores: dict[ClientId, dict[str, Number]] = {}
    domains: dict[str, DomainTold] = {}


class EvaluationTold(Told):
    """An evaluation on the unseen clients."""

    accuracy: Number
    expert_load: list[Number]
    reading: str
    readings: dict[Reading, Number]
    per_client_accuracy: dict[ClientId, Number]
    chosen: Experts
    gate_entropy: Number | None
    collapsed: bool | None


class RecordTold(Told):
    """A line of ``metrics.jsonl``."""

    round: Count
    loss: Number | None
    cohort: list[Any]
    seconds: dict[str, Number]
    failures: dict[str, Any]
    bytes_down: Count = 0
    bytes_up: Count = 0
    bytes_served: Count = 0
    wire_bytes: Count = 0
    served: Experts = {}
    evaluation: EvaluationTold = None  # type: ignore[assignment]
    validation: EvaluationTold = None  # type: ignore[assignment]
    participants: ParticipantsTold = None  # type: ignore[assignment]
    inspection: InspectionTold = None  # type: ignore[assignment]
    score: ScoreTold = None  # type: ignore[assignment]


class ValidationTold(Told):
    """What was measured on the validation clients, if there were any."""

    accuracy: Number | None = None
    best_accuracy: Number | None = None
    best_round: Count | None = None
    readings: dict[Reading, Number] = {}
    per_client_accuracy: dict[ClientId, Number] = {}


class SummaryTold(Told):
    """``summary.json``, and ``prepared.json``, which is a part of one."""

    status: str = ""
    strategy: str = ""
    dataset: str = ""
    seed: Count | None = None
    rounds: Count | None = None
    accuracy: Number | None = None
    best_accuracy: Number | None = None
    best_round: Count | None = None
    reading: str = ""
    readings: dict[Reading, Number] | None = None
    per_client_accuracy: dict[ClientId, Number] | None = None
    common_expert_accuracy: Number | None = None
    common_expert_per_client: dict[ClientId, Number] | None = None
    controls: dict[str, Number | None] | None = None
    validation: ValidationTold | None = None
    validation_controls: dict[str, Number | None] = {}
    chosen: Experts | None = None
    routing: RoutingTold | None = None
    expert_class_accuracy: Table | None = None
    gate_entropy: Number | None = None
    gate_collapsed: bool | None = None
    kept_common: list[Count] = []
    participants: ParticipantsTold | None = None
    score: BestTold | None = None
    client_rounds: Count | None = None
    bytes_down: Count | None = None
    bytes_up: Count | None = None
    bytes_served: Count | None = None
    bytes_setup: Count | None = None
    wire_bytes: Count | None = None
    embeddings_computed: Count | None = None
    trained_parameters: Count | None = None
    flops_per_answer: Count | None = None
    failures: Count | None = None
    seconds: dict[str, Number] | None = None
    classes: list[str] | None = None
    kinds: list[str] = []
    experts_held: dict[ClientId, list[list[Count]]] = {}
    activation: dict[ClientId, Shares] = {}
    domain_of: dict[ClientId, Count] = {}
    privacy: dict[str, Number | None] | None = None
    versions: dict[str, str] | None = None
    code: str = ""
    weights_hash: str = ""


class ErrorTold(Told):
    """``error.json``."""

    reason: str = ""
    status: str = ""


class ProgressTold(Told):
    """``progress.json``."""

    text: str = ""
    warnings: list[str] = []


SETTINGS_TOLD = dict[str, str | int | float | bool]
"""``config.json``."""


def read_told(path: Path, kind: Any) -> dict[str, Any] | None:
    """Return the object in a JSON file of a run folder; None without the file.

    Raises:
        FedjetsError: it cannot be read, or is not of its kind.
    """
    if not path.is_file():
        return None
    value: dict[str, Any] = checked(read(path, JSON), kind, str(path))
    return value


def checked(value: Value, kind: Any, named: str) -> Value:
    """Return a value as it is.

    Raises:
        FedjetsError: it is not of its kind.
    """
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FedjetsError(
            f"{named}: damaged, or of another version ({shortened(f'{where}: ' * bool(where) + first['msg'])})"
        ) from None
    return value


def checked_records(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise FedjetsError unless records are the rounds of one run, one after the other."""
    checked(records, list[RecordTold], str(path))
    if any(before["round"] >= after["round"] for before, after in pairwise(records)):
        raise FedjetsError(f"{path}: damaged: rounds that are not one after the other")
    evaluations = [record[kind] for record in records for kind in COURSES if kind in record]
    if len({len(evaluation["expert_load"]) for evaluation in evaluations}) > 1:
        raise FedjetsError(f"{path}: damaged: rounds of different numbers of experts")
