"""FedJETs' local training: an anchor trains its expert and names it to the gate, a normal client trains the mixture."""

from collections.abc import Mapping

from torch import Tensor

from client_app.client import Site
from fedjets_flwr.moe.local_training import Sgd, batches, rate, train_anchor, train_normal
from fedjets_flwr.seeds import torch_generator
from fedjets_flwr.wire.messages import Job, Number


def train(
    site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor], own_mix: str = "logits"
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Train the experts of the job and the gate; return their new vectors, the sample count and the loss.

    ``own_mix`` is what the gate weights unless ``moe.mix`` says otherwise: logits, as the paper's "standard cross
    entropy" implies.
    """
    c, local = site.config, site.local(job.client)
    ids = [int(name.removeprefix("expert.")) for name in job.vectors if name != "gate"]
    experts = site.experts([vectors[f"expert.{m}"] for m in ids])
    gate = site.gate(vectors["gate"], c.moe.experts)
    order = batches(
        len(local), c.train.batch_size, c.train.local_epochs,
        torch_generator(c.run.seed, "batches", server_round, job.client, 0),
    )  # fmt: skip
    inputs = site.inputs(local, torch_generator(c.run.seed, "augment", server_round, job.client, 0, device=site.device))
    lr = rate(c.train, server_round, c.run.rounds)
    optimizers = [Sgd(expert, lr, c.train.momentum, c.train.weight_decay) for expert in experts]
    learned = c.gate.mode == "learned"
    if learned:
        optimizers.append(Sgd(gate, c.gate.lr))
    data = (inputs, local.embedding, local.labels, order, optimizers)
    if "anchor" in job.numbers:
        loss = train_anchor(experts[0], ids[0], gate, *data, local.offset)
    else:
        loss = train_normal(
            experts, ids, gate, *data, c.moe.mix or own_mix, c.moe.renormalise, local.offset, site.oracle_scores(local)
        )
    trained = {f"expert.{m}": expert.vector for m, expert in zip(ids, experts, strict=True)}
    if learned:
        trained["gate"] = gate.vector
    return trained, {"num-examples": len(local), "loss": loss}
