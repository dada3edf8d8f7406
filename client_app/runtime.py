"""What a client's process keeps between messages: settings, common expert, models, data and embeddings.

In a simulation an actor lives for the whole run and serves many clients; deployed, a process serves one message. Both
read the same disk cache.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from client_app.node import Node
from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.partition import Labels, groups_held
from fedjets_flwr.data.site_cache import site_folder
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import AnyArchitecture, build, tail
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.models.common_expert import CommonExpert, kept_common_expert, load_common_expert
from fedjets_flwr.models.device import device_of
from fedjets_flwr.models.expert import build_configured_gate, decode_architectures, expert_specs
from fedjets_flwr.models.flat_model import FlatModel, VectorSpec, digest_of
from fedjets_flwr.moe.embedding import Embedded, embed, embed_adapted
from fedjets_flwr.moe.gating import label_offset
from fedjets_flwr.names import SHARED_OF
from fedjets_flwr.tasks import open_task
from fedjets_flwr.tasks.base import Inputs, Samples
from fedjets_flwr.wire.vector_cache import VectorStore

KEPT_FLOATS = 50_000_000
"""Of a process's models, those it used last: sets of a language model's experts differ by client and round."""
KEPT_CLIENTS = 256
"""Clients whose data a process keeps at hand; the others' comes from the disk again, by memory map."""


@dataclass(frozen=True)
class LocalData:
    """One client's data on this process's device.

    Attributes:
        samples: as they lie here, on the CPU.
        embedded: what the common expert says of them, memory-mapped.
        embedding: the gate's input, (n, d) float32.
        targets: what the samples are labelled with, (n, ...).
        offset: of the experts' logits, (C,), for logit-adjusted training (``gating.label_offset``); or 0.
        computed: whether this process had to embed the data.
    """

    samples: Samples
    embedded: Embedded
    embedding: Tensor
    targets: Tensor
    offset: Tensor | float
    computed: bool

    def __len__(self) -> int:
        return len(self.targets)


class Runtime:
    """Everything that a process needs to serve clients of one run.

    Attributes:
        config: the settings, with this node's own folders.
        common: the common expert.
        architectures: of the experts, or of the models whose tails they are: one for all, or one each.
        own: where a deployed site's own samples lie.
        task: what a sample is; it opens what lies here.
    """

    def __init__(
        self,
        config: Config,
        common: CommonExpert,
        architectures: Sequence[AnyArchitecture],
        own: Path | None = None,
        domain: str = "",
    ) -> None:
        torch.set_num_threads(config.run.threads_per_client)
        self.config, self.common, self.architectures, self.own = config, common, list(architectures), own
        self.device, self.backbone = device_of(config), Backbone(common, config.moe.trainable)
        self.task = open_task(config, common, domain)
        self._pools: defaultdict[AnyArchitecture, list[FlatModel]] = defaultdict(list)
        self._data: dict[tuple[int, str], LocalData] = {}

    def architecture(self, expert: int) -> AnyArchitecture:
        """Return the architecture of an expert."""
        return self.architectures[expert if len(self.architectures) > 1 else 0]

    def experts(self, ids: Sequence[int], vectors: Sequence[Tensor]) -> list[FlatModel]:
        """Return models that hold ``vectors``; the same objects are written over at each call."""
        taken: Counter[AnyArchitecture] = Counter()
        chosen = []
        for expert, vector in zip(ids, vectors, strict=True):
            architecture = self.architecture(expert)
            pool = self._pools[architecture]
            if taken[architecture] == len(pool):
                pool.append(self._new(architecture))
            model = pool[taken[architecture]]
            taken[architecture] += 1
            model.load(vector)
            chosen.append(model)
        return chosen

    def model(self, architecture: AnyArchitecture, vector: Tensor) -> FlatModel:
        """Return a model of some architecture that holds a vector; the next call, or job, writes over it."""
        pool = self._pools.pop(architecture, None) or [self._new(architecture)]
        self._pools[architecture] = pool
        while len(self._pools) > 1 and sum(p[0].spec.size for p in self._pools.values() if p) > KEPT_FLOATS:
            del self._pools[next(iter(self._pools))]
        pool[0].load(vector)
        return pool[0]

    def new_expert(self, expert: int, vector: Tensor) -> FlatModel:
        """Return a model of its own that holds a vector."""
        model = self._new(self.architecture(expert))
        model.load(vector)
        return model

    def _new(self, architecture: AnyArchitecture) -> FlatModel:
        return FlatModel(tail(build(architecture, 0), self.config.moe.trainable).to(self.device))

    @cached_property
    def specs(self) -> list[VectorSpec]:
        """Layouts of the experts: one for all, or one each."""
        return expert_specs(self.architectures, self.config.moe.trainable)

    @cached_property
    def layout(self) -> str:
        """Digest of the experts' layouts, as the server has it."""
        return digest_of(self.specs)

    @cached_property
    def _gate(self) -> FlatModel:
        module = build_configured_gate(self.config, self.common, self.config.moe.experts)
        return FlatModel(module.to(self.device))

    def gate(self, vector: Tensor) -> FlatModel:
        """Return the gate that holds ``vector``; the same object is written over at each call."""
        self._gate.load(vector)
        return self._gate

    def data(self, client: int, part: str = "train") -> LocalData:
        """Return a client's data with its embeddings, from memory, disk or, once, the common expert.

        ``part``: of a training client's samples, ``train``, ``val`` or ``test``; ``shared``, ``shared-val``: what of
        ``train`` or ``val`` takes part in rounds; ``global``: those that all share.
        """
        if not (self.config.partition.private_share or self.config.partition.opt_out):
            part = SHARED_OF.get(part, part)
        key = (-1 if part == "global" else client, part)
        if key not in self._data:
            c = self.config
            if len(self._data) >= KEPT_CLIENTS:
                self._data.pop(next(iter(self._data)))
            samples = self.task.samples(client, self.own, part)
            embedded, computed = self._embedded(samples)
            targets = samples.targets.to(self.device)
            adjusted = c.train.logit_adjust and samples.training
            offset = label_offset(targets, len(self.task.spec.classes)) if adjusted else 0.0
            self._data[key] = LocalData(
                samples, embedded, embedded.embedding.to(self.device), targets, offset, computed
            )
        return self._data[key]

    def _embedded(self, samples: Samples) -> tuple[Embedded, bool]:
        """Return what the common expert says of samples, if they are of classes, and whether it was computed."""
        if not self.task.classifies:
            nothing = torch.empty(len(samples), 0)
            return Embedded(nothing, nothing, None), False
        layer = self.config.common_expert.embedding
        return embed(self.backbone, samples.stored, layer, self._kept_in, self.device)

    @property
    def _kept_in(self) -> Path:
        cache = self.config.cache_dir
        return cache if self.own is None else site_folder(cache, self.own)

    @property
    def has_global(self) -> bool:
        """Whether test samples that all clients share are here; a site with samples of its own has none."""
        return self.own is None and self.task.has_global

    def inputs(self, data: LocalData, generator: torch.Generator | None = None) -> Inputs:
        """Return how to get the experts' input batch; a generator turns training augmentation on."""
        if data.embedded.features is not None:
            features = data.embedded.features.to(self.device)
            return lambda rows: features[rows]
        return self.task.inputs(data.samples.stored.to(self.device), self.common, generator)

    def adapted_logits(self, data: LocalData) -> Tensor:
        """Return the common expert's logits (n, C) of samples, with their own batch-norm statistics; on the CPU."""
        images = self.task.inputs(data.samples.stored.to(self.device), self.common)
        return embed_adapted(self.backbone, data.samples.stored, images, self._kept_in)

    @cached_property
    def experts_have_batch_norm(self) -> bool:
        """Whether a vector of some expert holds running statistics."""
        return any(len(spec.positions("running_var")) for spec in self.specs)

    @cached_property
    def groups_held(self) -> tuple[list[Labels], int]:
        """The groups of classes of the label-groups split and how many a client holds; a site's own data has none."""
        return groups_held(self.config, len(self.task.spec.classes)) if self.task.simulates else ([], 0)

    def oracle_scores(self, data: LocalData) -> Tensor | None:
        """Return the scores (n, M) of a gate that reads labels, if ``gate.mode`` asks for one."""
        if self.config.gate.mode != "oracle":
            return None
        one_hot = torch.nn.functional.one_hot(self.expert_of_column[data.samples.columns], self.config.moe.experts)
        return one_hot.float().to(self.device)

    @property
    def oracle_of_domains(self) -> bool:
        """Whether the gate reads of which domain a sample is, which test images that all share do not tell."""
        return self.config.gate.mode == "oracle" and bool(self.task.spec.kinds)

    @cached_property
    def expert_of_column(self) -> Tensor:
        """The expert whose anchor holds most samples of each class or domain; only a simulation can know it."""
        if not self.task.simulates:
            raise FedjetsError("gate.mode = 'oracle': only a simulation knows the labels of the anchors; set 'learned'")
        anchors = range(self.config.num_anchors)
        columns = len(self.task.spec.columns)
        counts = [torch.bincount(self.task.samples(m).columns, minlength=columns) for m in anchors]
        return torch.stack(counts).argmax(dim=0)


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
def open_runtime(config: Config, node: Node, digest: str, experts: str, layout: str, samples: str = "") -> Runtime:
    """Return this process's runtime for a run.

    Args:
        config: the settings.
        node: this SuperNode.
        digest: of the common expert.
        experts: the server's architectures, encoded.
        layout: digest of the experts' vectors at the server.
        samples: the server's ``Task.digest``.

    Raises:
        FedjetsError: the common expert was never sent here or is another one, or the server's experts are.
    """
    path = common_expert_path(config, digest)
    common = kept_common_expert(path) if path.is_file() else load_common_expert(path)  # which says what is missing
    if common is None or common.digest != digest:
        path.unlink(missing_ok=True)  # or it would not be sent again
        raise FedjetsError(f"{path} is damaged: it is fetched anew")
    runtime = Runtime(config, common, decode_architectures(experts), node.samples, node.domain)
    if runtime.layout != layout:
        raise FedjetsError("server and client build different experts; install the same release on both")
    if runtime.task.digest != samples:
        raise FedjetsError(
            "the text here is not the server's, and tokens would differ; take the same packages and Python, or texts"
        )
    return runtime
