"""What a SuperNode says of itself in its ``--node-config``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.config.sources import PATHS
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import TRAIN

FOLDERS = {"data-dir": "data.dir", "cache-dir": "run.cache-dir"}
"""Keys of a node that stand in for settings which name folders of the server's machine."""
KEYS = (
    "client-id", "partition-id", "num-partitions", "data-path", "domain", "role", "policy", "audit-log", "opt-out",
    *FOLDERS,
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A SuperNode.

    Attributes:
        client: that it hosts; none: any, in a simulation.
        samples: where that client's own images or text lie, if it has some.
        opted_out: whether the client takes no part in rounds, and only takes what it needs for itself.
        domain: of its own text.
    """

    client: int | None
    samples: Path | None
    opted_out: bool = False
    domain: str = ""


def local_settings(
    run_config: Mapping[str, Scalar], node_config: Mapping[str, Scalar], simulated: bool
) -> dict[str, Scalar]:
    """Return the run's settings with this node's folders in place of the server's.

    A deployed site takes no path of the server's: what it does not name itself is where it is by default.
    """
    closed: dict[str, Scalar] = {} if simulated else dict.fromkeys((*PATHS, "nodes.roster"), "")
    own = {setting: node_config[key] for key, setting in FOLDERS.items() if key in node_config}
    return {**run_config, **closed, **own}


def read_node(node_config: Mapping[str, Scalar], config: Config, simulated: bool) -> Node:
    """Return what a SuperNode hosts.

    Raises:
        FedjetsError: names the key of ``--node-config`` that is missing or does not fit the run.
    """
    if simulated:
        return Node(None, None)
    if unknown := sorted(set(node_config) - set(KEYS)):
        raise FedjetsError(f"--node-config: no such key {unknown[0]}; there are {', '.join(KEYS)}")
    client = node_config.get("client-id", node_config.get("partition-id"))
    training, total = config.partition.clients, config.partition.all_clients
    if not isinstance(client, int) or not 0 <= client < total:
        raise FedjetsError(f"--node-config: give client-id, a number from 0 to {total - 1}, e.g. 'client-id=0'")
    fits = config.partition.role_of(client)
    if node_config.get("role", fits) != fits:
        raise FedjetsError(
            f"--node-config: role={node_config['role']!r} does not fit client-id={client}: training clients are 0 to"
            f" {training - 1}, others {training} to {total - 1} (partition.clients and partition.*-clients)"
        )
    path = node_config.get("data-path")
    if path is not None and not (config.data.name == "image-folder" or config.text_elsewhere):
        raise FedjetsError(
            "--node-config: data-path is for data.name = 'image-folder', or for text with partition.public-share = 1,"
            f" not for {config.data.name!r}"
        )
    opted_out = node_config.get("opt-out", False)
    if not isinstance(opted_out, bool):
        raise FedjetsError(f"--node-config: opt-out={opted_out!r} is neither true nor false")
    if opted_out and fits != TRAIN:
        raise FedjetsError(f"--node-config: opt-out=true: client {client} never trains anyway; leave it out")
    return Node(client, None if path is None else Path(str(path)).expanduser(), opted_out, _domain(node_config, config))


def _domain(node_config: Mapping[str, Scalar], config: Config) -> str:
    """Return the domain of a site's own text; it need not say so where there is one alone."""
    domains = config.text_domains
    if not config.text_elsewhere:
        if "domain" in node_config:
            raise FedjetsError(
                "--node-config: domain is for a site's own text (partition.public-share = 1); leave it out"
            )
        return ""
    found = node_config.get("domain", domains[0] if len(domains) == 1 else "")
    if found not in domains:
        raise FedjetsError(
            f"--node-config: domain={found!r}: none of text.domains; say what this site's text is, e.g."
            f" 'domain=\"{domains[0]}\"', of {', '.join(domains)}"
        )
    return str(found)
