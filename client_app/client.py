"""What a client's process keeps between messages: settings, common expert, models, data and embeddings.

In a simulation an actor lives for the whole run and serves many clients; deployed, a process serves one message. Both
read the same disk cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from client_app.node import Node
from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import ClientData, open_client, open_dataset, open_split
from fedjets_flwr.data.transforms import AUGMENTATIONS
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import CommonExpert, load_common_expert
from fedjets_flwr.models.device import device_of
from fedjets_flwr.models.expert import build_configured_gate, build_expert
from fedjets_flwr.models.flat_model import FlatModel, Layout
from fedjets_flwr.moe.embedding import Embedded, embed
from fedjets_flwr.moe.gating import label_offset
from fedjets_flwr.moe.local_training import Inputs
from fedjets_flwr.wire.vector_cache import VectorStore

KEPT_CLIENTS = 256
"""Clients whose data a process keeps at hand; the others' comes from the disk again, by memory map."""


@dataclass(frozen=True)
class Local:
    """One client's data on this site's device."""

    data: ClientData
    embedded: Embedded
    embedding: Tensor
    labels: Tensor
    offset: Tensor | float
    computed: bool

    def __len__(self) -> int:
        return len(self.labels)


class Site:
    """Everything that a process needs to serve clients of one run."""

    def __init__(self, config: Config, common: CommonExpert, init: str = "", images: Path | None = None) -> None:
        torch.set_num_threads(config.run.threads_per_client)
        self.config, self.common, self.init = config, common, init or config.moe.init
        self.images = images
        self.device = device_of(config)
        self.dataset = open_dataset(config)
        self._experts: list[FlatModel] = []
        self._gates: dict[int, FlatModel] = {}
        self._locals: dict[int, Local] = {}

    def experts(self, vectors: Sequence[Tensor]) -> list[FlatModel]:
        """Return models that hold ``vectors``; the same objects are overwritten at each call."""
        while len(self._experts) < len(vectors):
            module = build_expert(self.config, self.common, self.dataset, 0, self.init)
            self._experts.append(FlatModel(module.to(self.device)))
        chosen = self._experts[: len(vectors)]
        for model, vector in zip(chosen, vectors, strict=True):
            model.load(vector)
        return chosen

    @cached_property
    def layout(self) -> Layout:
        """What an expert's vector holds."""
        return FlatModel(build_expert(self.config, self.common, self.dataset, 0, self.init)).layout

    def gate(self, vector: Tensor, experts: int) -> FlatModel:
        """Return the gate over ``experts`` experts that holds ``vector``."""
        if experts not in self._gates:
            module = build_configured_gate(self.config, self.common, experts)
            self._gates[experts] = FlatModel(module.to(self.device))
        self._gates[experts].load(vector)
        return self._gates[experts]

    def local(self, client: int) -> Local:
        """Return a client's data with its embeddings, from memory, disk or, once, the common expert."""
        if client not in self._locals:
            c = self.config
            if len(self._locals) >= KEPT_CLIENTS:
                self._locals.pop(next(iter(self._locals)))
            data = open_client(c, client, self.images)
            embedded, computed = embed(
                self.common, data.images.pixels, c.common_expert.embedding, c.moe.trainable, c.cache_dir, self.device
            )
            labels = data.images.labels.to(self.device)
            adjusted = c.train.logit_adjust and data.training
            offset = label_offset(labels, len(self.dataset.classes)) if adjusted else 0.0
            self._locals[client] = Local(data, embedded, embedded.embedding.to(self.device), labels, offset, computed)
        return self._locals[client]

    @contextmanager
    def relabelled(self, client: int, change: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Let a client train on changed labels (a simulated attack)."""
        honest = self.local(client)
        self._locals[client] = replace(honest, labels=change(honest.labels, len(self.dataset.classes)))
        try:
            yield
        finally:
            self._locals[client] = honest

    def inputs(self, local: Local, generator: torch.Generator | None = None) -> Inputs:
        """Return how to get the experts' input batch; a generator turns training augmentation on."""
        if local.embedded.features is not None:
            features = local.embedded.features.to(self.device)
            return lambda rows: features[rows]
        pixels = local.data.images.pixels.to(self.device)
        augment = AUGMENTATIONS[self.config.data.augment if generator is not None else "none"]
        draw = generator if generator is not None else torch.Generator()
        return lambda rows: self.common.normalise(augment(pixels[rows], draw))

    def oracle_scores(self, local: Local) -> Tensor | None:
        """Return the scores (n, M) of a gate that reads labels, if ``gate.mode`` asks for one."""
        if self.config.gate.mode != "oracle":
            return None
        one_hot = torch.nn.functional.one_hot(self.expert_of_label[local.data.images.labels], self.config.moe.experts)
        return one_hot.float().to(self.device)

    @cached_property
    def expert_of_label(self) -> Tensor:
        """The expert whose anchor holds most samples of a label, (C,); only a simulation can know it."""
        if not len(self.dataset.train):
            raise FedjetsError("gate.mode = 'oracle': only a simulation knows the labels of the anchors; set 'learned'")
        split = open_split(self.config)
        held = torch.stack(
            [
                torch.bincount(open_client(self.config, m).images.labels, minlength=len(self.dataset.classes))
                for m in range(split.anchors)
            ]
        )
        return held.argmax(dim=0)


def common_expert_path(config: Config, digest: str) -> Path:
    """Return where a site keeps a common expert that it was sent."""
    if not digest.isalnum():
        raise FedjetsError("the server sent a malformed digest of the common expert")
    return config.cache_dir / "common-experts" / f"{digest}.safetensors"


def vector_store(config: Config, node: Node) -> VectorStore | None:
    """Return where a deployed site keeps the vectors that it receives; a simulation keeps none."""
    if node.client is None:
        return None
    return VectorStore(config.cache_dir / "vectors" / f"client-{node.client}")


@lru_cache(maxsize=1)
def open_site(config: Config, node: Node, digest: str, init: str, layout: str) -> Site:
    """Return this process's site for a run.

    Args:
        config: the settings.
        node: this SuperNode.
        digest: of the common expert.
        init: how the method's experts start; decides their architecture.
        layout: digest of an expert's vector at the server; empty: not yet known.

    Raises:
        FedjetsError: the common expert was never sent here, or is another one.
    """
    common = load_common_expert(common_expert_path(config, digest))
    if common.digest != digest:
        raise FedjetsError(f"{common_expert_path(config, digest)}: damaged; delete it and run again")
    site = Site(config, common, init, node.images)
    if layout and site.layout.digest != layout:
        raise FedjetsError("server and client build different experts; install the same release on both")
    return site
