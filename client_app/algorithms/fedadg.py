"""FedADG's local training (Zhang et al. 2021): features that look like those of a reference of their class."""

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from client_app.client import ClientContext, Update
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.adversarial import (
    Discriminator,
    build_generator,
    label_input,
    look_generated,
    look_real,
    seeded,
    smoothed_cross_entropy,
    tell_apart,
)
from fedjets_flwr.moe.local_training import Sgd, steps_of
from fedjets_flwr.seeds import derive


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train ``expert.0``, the shared generator if it is learned, and the client's own discriminator, which stays.

    First ``fedadg.warm-up-epochs`` of plain cross entropy; then, for each batch, a step of the discriminator, one of
    the extractor and classifier, one of the generator, all on the same noise.
    """
    how, data, model = context.config.fedadg, context.data, context.expert(0, vectors["expert.0"])
    batch, epochs = context.config.train.batch_size, (how.warm_up_epochs, how.epochs)
    body, head = nn.Sequential(*list(model.module.children())[:-1]), model.module[-1]  # type: ignore[index]
    inputs, order, optimizer = context.inputs(), context.order(epochs=sum(epochs)), context.sgd(model)
    losses: list[Tensor] = []

    def classify(features: Tensor, rows: Tensor) -> Tensor:
        loss = smoothed_cross_entropy(head(features) + data.offset, data.targets[rows], how.smoothing)
        losses.append(loss.detach())
        return loss

    model.module.train()
    for rows in islice(order, steps_of(len(data), batch, how.warm_up_epochs)):
        _step(classify(context.forward(body, inputs(rows)), rows), model, optimizer)
    game = _Game(context, vectors, head.in_features)
    for rows in order:
        x, labels = inputs(rows), label_input(data.targets[rows], context.num_classes)
        noise = game.draw(len(rows))
        model.module.eval()
        with torch.no_grad():
            features = context.forward(body, x)
        game.tell_apart(features, noise, labels)
        model.module.train()
        features = context.forward(body, x)
        fooled = look_generated(game.discriminator.module(features, labels))
        _step(how.alpha * classify(features, rows) + (1 - how.alpha) * fooled, model, optimizer)
        game.follow(noise, labels)
    trained = {"expert.0": model.vector} | ({"generator": game.generator.vector} if game.learned else {})
    return Update(trained, {"num-examples": len(data), "loss": float(torch.stack(losses).mean())}, game.state)


def _step(loss: Tensor, model: FlatModel, optimizer: Sgd) -> None:
    """Take one step of one model; no other gets a gradient."""
    model.zero_grad()
    loss.backward(inputs=model.parameters)
    optimizer.step()


class _Game:
    """The client's discriminator against the generator of all."""

    def __init__(self, context: ClientContext, vectors: Mapping[str, Tensor], features: int) -> None:
        how, classes, seed = context.config.fedadg, context.num_classes, context.config.run.seed
        self._how, self._device = how, context.device
        self._noise = context.generator("fedadg noise", device=context.device)
        start = build_generator(context.config, classes, features)
        self.generator, self.learned = FlatModel(start.to(context.device)), how.reference == "learned"
        if self.learned:
            self.generator.load(vectors["generator"])
        own = derive(seed, "discriminator", context.client)
        made = seeded(own, Discriminator, (features, classes, how.projection, how.discriminator_hidden))
        self.discriminator = FlatModel(made.to(context.device))
        if kept := context.state:
            self.discriminator.load(kept["discriminator"])
        self._critic = Sgd(self.discriminator, how.lr, how.momentum, how.weight_decay)
        self._momentum = self._critic.carry(kept.get("momentum"))
        self._author = Sgd(self.generator, how.lr, how.momentum, how.weight_decay)

    def draw(self, count: int) -> Tensor:
        """Return noise from [0, 1), (count, N)."""
        return torch.rand(count, self._how.noise, generator=self._noise, device=self._device)

    def tell_apart(self, features: Tensor, noise: Tensor, labels: Tensor) -> None:
        """Take a step of the discriminator."""
        with torch.no_grad():
            generated = self.generator.module(noise, labels)
        scores = (self.discriminator.module(each, labels) for each in (generated, features))
        _step(tell_apart(*scores), self.discriminator, self._critic)

    def follow(self, noise: Tensor, labels: Tensor) -> None:
        """Take a step of the generator, if it is learned."""
        if self.learned:
            generated = self.generator.module(noise, labels)
            _step(look_real(self.discriminator.module(generated, labels)), self.generator, self._author)

    @property
    def state(self) -> dict[str, Tensor]:
        """What stays with the client."""
        return {"discriminator": self.discriminator.vector, "momentum": self._momentum}
