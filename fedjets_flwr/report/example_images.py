"""Images of unseen clients with the expert that answered them: what a report shows besides figures."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import ClientData, open_client
from fedjets_flwr.data.image_folder import to_picture
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.personalize.inference import Predictions
from fedjets_flwr.personalize.personaliser import personalise
from fedjets_flwr.runs.run_folder import Recorded
from fedjets_flwr.runs.trained_run import TrainedRun, open_run
from fedjets_flwr.seeds import torch_generator

SHOWN = 8
"""Right answers shown, and wrong ones."""
MOST_CLIENTS = 8
MOST_IMAGES = 512
FEWEST_IMAGES = 32
MOST_FLOPS = 2e12
"""What the experts may compute for one page: a minute or so on a laptop."""


@dataclass(frozen=True)
class Sample:
    """An unseen client's image and its answer.

    Attributes:
        image: data URI of a PNG.
        expert: the expert that answered or, where several did, led; None if no expert stands out.
        probability: of the answer.
    """

    client: int
    image: str
    expert: int | None
    answer: str
    label: str
    probability: float

    @property
    def right(self) -> bool:
        """Whether the answer is the label."""
        return self.answer == self.label


@dataclass(frozen=True)
class Samples:
    """The images and what they are, or one line that says why there are none."""

    images: tuple[Sample, ...] = ()
    told: str = ""
    why_none: str = ""


def find_samples(recorded: Recorded) -> Samples:
    """Return some right and some wrong answers of unseen clients, drawn at random, if their images lie here."""
    if not recorded.finished:
        return Samples(why_none="The run is not finished: there are no final experts to ask.")
    if recorded.settings.get("data.name") == "image-folder":
        return Samples(why_none="None are shown: the images never leave the sites that hold them.")
    clients = sorted(map(int, recorded.results.get("per_client_accuracy") or {}))
    if not clients:
        return Samples(why_none="None are shown: no unseen client has labels to tell right from wrong.")
    try:
        return _samples(open_run(recorded.folder), clients)
    except FedjetsError as error:
        return Samples(why_none=f"None are shown: {error}")


def _samples(run: TrainedRun, clients: list[int]) -> Samples:
    if clients[-1] >= run.config.partition.clients + run.config.partition.unseen_clients:
        raise FedjetsError(f"{run.folder}: damaged: results of clients that it did not have")
    asked = clients[:: -(-len(clients) // MOST_CLIENTS)]
    work = max(1, (run.summary.get("flops_per_answer") or 0) * len(asked))
    most = int(min(MOST_IMAGES, max(FEWEST_IMAGES, MOST_FLOPS / work)))
    read_out, whole = "", True
    answered: dict[int, tuple[ClientData, Predictions]] = {}
    for client in asked:
        data = _client(run.config, client)
        if len(data.images) and int(data.images.labels.max()) >= len(run.spec.classes):
            raise FedjetsError(f"{run.folder}: damaged: other classes than {run.config.data.name} has")
        made = personalise(run, data.images.pixels[:most])
        assert made.predictions is not None
        answered[client] = data, made.predictions
        read_out, whole = made.card.read_out, whole and len(data.images) <= most
    drawn = [
        sample
        for wanted in (False, True)
        for sample in islice(_in_turn(run, answered, read_out, wanted), SHOWN)
    ]  # fmt: skip
    told = "Drawn at random among the wrong and the right answers, client by client: no measure of accuracy."
    if run.num_experts > 1:
        verb = "answered" if read_out == "top-1" else "weighs most"
        if any(sample.expert is not None for sample in drawn):
            told += f" The numbered chip is the expert that {verb}."
    if not whole:
        told += f" Experts were chosen here for the first {most} images of a client, not for all."
    return Samples(tuple(drawn), told)


def _client(config: Config, client: int) -> ClientData:
    """Return a client's data as it lies here: where the run found it, or in this machine's own folder."""
    here = config.model_copy(update={"data": config.data.model_copy(update={"download": False})})
    try:
        return open_client(here, client)
    except FedjetsError:
        if not config.data.dir:
            raise
        elsewhere = here.data.model_copy(update={"dir": ""})
        return open_client(here.model_copy(update={"data": elsewhere}), client)


def _in_turn(
    run: TrainedRun, answered: Mapping[int, tuple[ClientData, Predictions]], read_out: str, wanted: bool
) -> Iterator[Sample]:
    """Yield right or wrong answers, one of each client in turn, and no image twice: clients may share some."""
    seen: set[str] = set()
    for row in zip_longest(*(_of_client(run, *pair, read_out, wanted) for pair in answered.values())):
        for sample in row:
            if sample is not None and sample.image not in seen:
                seen.add(sample.image)
                yield sample


def _of_client(
    run: TrainedRun, data: ClientData, predictions: Predictions, read_out: str, wanted: bool
) -> Iterator[Sample]:
    labels = data.images.labels[: len(predictions)]
    rows = ((predictions.classes == labels) == wanted).nonzero().flatten()
    order = torch.randperm(len(rows), generator=torch_generator(run.config.run.seed, "report", 0, data.client))
    named = run.num_experts > 1 and read_out != "mean" and not bool((predictions.experts < 0).any())
    for row in rows[order].tolist():
        answer = int(predictions.classes[row])
        yield Sample(
            client=data.client,
            image=data_uri(data.images.pixels[row]),
            expert=int(predictions.experts[row]) if named else None,
            answer=predictions.names[answer],
            label=predictions.names[int(labels[row])],
            probability=float(predictions.probabilities[row, answer]),
        )


def data_uri(pixels: Tensor) -> str:
    """Return an image (c, h, w) uint8 as a PNG within a URI."""
    file = io.BytesIO()
    to_picture(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
