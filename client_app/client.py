"""What an algorithm gets to work with: one client's job, its data, and models that hold the vectors it was sent."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor, nn

from client_app.runtime import LocalData, Runtime
from client_app.state import ClientState
from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Adam, Optimizer, Sgd, batches, rate
from fedjets_flwr.names import expert_name
from fedjets_flwr.seeds import torch_generator
from fedjets_flwr.tasks.base import Inputs, Task
from fedjets_flwr.wire.messages import Job, Number


@dataclass(frozen=True)
class Update:
    """What a client's work came to: the vectors and the numbers of its reply, and what it keeps to itself."""

    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


Work = Callable[["ClientContext", Mapping[str, Tensor]], Update]
"""What a client does for a message: its context and the vectors it was sent -> its reply's content."""


@dataclass(frozen=True)
class Adapted:
    """A client's own model, ready to answer.

    Attributes:
        predict: class probabilities (n, C), on the CPU, of the samples of a context (:meth:`ClientContext.on`).
        state: what the client keeps of it and never sends; empty: what it has stays.
        numbers: what it tells of it, each from 0 to 1, by the names in the method's ``tells``.
        model: the one model that answers, if it is one.
    """

    predict: Callable[["ClientContext"], Tensor]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    model: FlatModel | None = None


Adapt = Callable[["ClientContext", Mapping[str, Tensor]], Adapted]
"""What a client makes of the vectors that it is sent for its own predictions."""


@dataclass(frozen=True)
class ClientContext:
    """One job of one client.

    Attributes:
        runtime: this process: settings, common expert, models that are used again.
        job: what the client is asked.
        server_round: of the run; every draw depends on it.
        data: the client's, embedded: targets (n,), the gate's input (n, d).
        kept: the client's private state, if the method keeps any.
    """

    runtime: Runtime
    job: Job
    server_round: int
    data: LocalData
    kept: ClientState | None = None

    @property
    def config(self) -> Config:
        """All settings."""
        return self.runtime.config

    @property
    def client(self) -> int:
        """Client id."""
        return self.job.client

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Named tensors that this client kept when it last worked in this run, and never sent; nothing at first."""
        return {} if self.kept is None else self.kept.tensors

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors on this client's own disk in place of those of :attr:`state`.

        Raises:
            FedjetsError: the method keeps no state.
        """
        if self.kept is None:
            raise FedjetsError("this method keeps no private state; set keeps_state in its Strategy")
        self.kept.write(tensors)

    def on(self, part: str) -> "ClientContext":
        """Return this context with another part of the client's samples.

        ``part``: ``train``, ``val`` or ``test``; ``shared``, ``shared-val``: what of ``train`` or ``val`` takes part in
        rounds; ``global``: test images that are the same for all clients.
        """
        return replace(self, data=self.runtime.data(self.client, part))

    @property
    def device(self) -> torch.device:
        """Where models and data lie."""
        return self.runtime.device

    @property
    def task(self) -> Task:
        """What a sample is and what a model's output says of it."""
        return self.runtime.task

    @property
    def num_columns(self) -> int:
        """Of how many classes or domains samples may be, whichever experts specialise in."""
        return len(self.runtime.task.spec.columns)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.runtime.task.spec.classes)

    def experts(self, vectors: Mapping[str, Tensor]) -> dict[int, FlatModel]:
        """Return models that hold the experts of the job, by id in the job's order; the next job writes over them."""
        ids = self.job.experts
        return dict(zip(ids, self.runtime.experts(ids, [vectors[expert_name(m)] for m in ids]), strict=True))

    def expert(self, expert: int, vector: Tensor) -> FlatModel:
        """Return one expert that holds a vector; the next call, or job, writes over it."""
        return self.runtime.experts([expert], [vector])[0]

    def copy(self, expert: int, vector: Tensor) -> FlatModel:
        """Return one expert that holds a vector, and that nothing writes over."""
        return self.runtime.new_expert(expert, vector)

    def gate(self, vectors: Mapping[str, Tensor]) -> FlatModel:
        """Return the gate."""
        return self.runtime.gate(vectors["gate"])

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return a model's outputs in training, float32, computed in ``train.precision``."""
        halved = self.config.train.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=halved):
            outputs: Tensor = model(inputs)
        return outputs.float()

    def generator(self, purpose: str, member: int = 0, device: torch.device | None = None) -> torch.Generator:
        """Return a generator of the (seed, purpose, round, client, member), on the CPU unless said otherwise."""
        seed, ids = self.config.run.seed, (self.server_round, self.client, member)
        return torch_generator(seed, purpose, *ids, device=device or torch.device("cpu"))

    def order(self, member: int = 0, epochs: int | None = None) -> Iterator[Tensor]:
        """Yield the index batches of the round's local epochs or steps, or of so many epochs."""
        t, generator = self.config.train, self.generator("batches", member)
        if epochs is None and t.local_steps:  # an epoch has a step at least
            return islice(batches(len(self.data), t.batch_size, t.local_steps, generator), t.local_steps)
        return batches(len(self.data), t.batch_size, t.local_epochs if epochs is None else epochs, generator)

    def inputs(self, member: int = 0) -> Inputs:
        """Return how to get the experts' training input of some samples, augmented as the settings say."""
        return self.runtime.inputs(self.data, self.generator("augment", member, self.device))

    def plain_inputs(self) -> Inputs:
        """Return how to get the experts' input of some samples as they are."""
        return self.runtime.inputs(self.data)

    def adapted_logits(self) -> Tensor:
        """Return the common expert's logits (n, C) with the batch-norm statistics of the client's own samples."""
        return self.runtime.adapted_logits(self.data)

    @property
    def experts_have_batch_norm(self) -> bool:
        """Whether what experts train, and not only the trunk below, has statistics that a client can make its own."""
        return self.runtime.experts_have_batch_norm

    def sgd(self, model: FlatModel) -> Sgd:
        """Return SGD at the round's rate; momentum begins empty."""
        t = self.config.train
        return Sgd(model, rate(t, self.server_round, self.config.run.rounds), t.momentum, t.weight_decay)

    def optimizer(self, model: FlatModel) -> Optimizer:
        """Return what trains a model in the round (``train.optimizer``); its moments begin empty."""
        t = self.config.train
        if t.optimizer == "sgd":
            return self.sgd(model)
        return Adam(model, rate(t, self.server_round, self.config.run.rounds))

    def oracle_scores(self) -> Tensor | None:
        """Return the scores (n, M) of a gate that reads labels, if ``gate.mode`` asks for one."""
        return self.runtime.oracle_scores(self.data)
