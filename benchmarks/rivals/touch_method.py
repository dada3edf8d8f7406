"""Added to our app by the transport benchmark: FedJETs' traffic of vectors, without training and without routing."""

from collections.abc import Sequence

from strategies.fedjets import FedJets


class Touch(FedJets):
    """Anchors get their expert, every normal client the K experts that follow its id."""

    local = "touch"

    def choose(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Choose without asking."""
        k, count = self.config.moe.top_k, self.num_experts
        return {client: tuple(sorted((client + i) % count for i in range(k))) for client in clients}


METHOD = Touch
