"""FedJETs: just-in-time personalisation with a federated mixture of experts, as a Flower app."""

__version__ = "0.1.0"
