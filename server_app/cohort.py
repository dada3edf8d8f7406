"""Which clients take part in a round."""

from fedjets_flwr.config import Config
from fedjets_flwr.seeds import numpy_generator


def draw_cohort(config: Config, server_round: int, sampling: str, member: int = 0) -> tuple[list[int], list[int]]:
    """Return the anchors and the normal clients of a round, each in ascending order.

    Args:
        config: ``cohort.*`` and ``partition.*``.
        server_round: decides the draw.
        sampling: ``anchored``: N_a anchors + N_c of the others (FedJETs); ``uniform``: N_a + N_c of all clients, where
            anchors that happen to be drawn count as normal.
        member: which of several independent models draws (an ensemble's member).
    """
    rng = numpy_generator(config.run.seed, "cohort", server_round, member)
    anchors, normals, training = config.num_anchors, config.cohort.normals, config.partition.clients
    if sampling == "uniform":
        count = min(config.cohort.anchors + normals, training)
        return [], sorted(rng.choice(training, count, replace=False).tolist())
    drawn = rng.choice(anchors, config.cohort.anchors, replace=False)
    others = anchors + rng.choice(training - anchors, normals, replace=False)
    return sorted(drawn.tolist()), sorted(others.tolist())
