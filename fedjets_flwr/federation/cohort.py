"""Which clients take part in a round."""

from collections.abc import Sequence

from fedjets_flwr.config.schema import Config
from fedjets_flwr.seeds import numpy_generator


def draw_cohort(
    config: Config, server_round: int, sampling: str, all_anchors: Sequence[int], member: int = 0
) -> tuple[list[int], list[int]]:
    """Return the anchors and the normal clients of a round, each in ascending order.

    Args:
        config: ``cohort.*`` and ``partition.*``.
        server_round: decides the draw.
        sampling: ``anchored``: N_a anchors + N_c of the others (FedJETs); ``uniform``: N_a + N_c of all clients, where
            anchors that happen to be drawn count as normal.
        all_anchors: ids of all anchor clients.
        member: which of several independent models draws (an ensemble's member).
    """
    rng = numpy_generator(config.run.seed, "cohort", server_round, member)
    normals, training = config.cohort.normals, config.partition.clients
    if sampling == "uniform":
        count = min(config.cohort.anchors + normals, training)
        return [], sorted(rng.choice(training, count, replace=False).tolist())
    others = [client for client in range(training) if client not in all_anchors]
    drawn = rng.choice(len(all_anchors), config.cohort.anchors, replace=False)
    rest = rng.choice(len(others), normals, replace=False)
    return sorted(all_anchors[i] for i in drawn), sorted(others[i] for i in rest)
