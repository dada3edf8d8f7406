"""Which node gets which job."""

from collections.abc import Mapping, Sequence

from fedjets_flwr.wire.binding import Binding
from fedjets_flwr.wire.messages import Job
from fedjets_flwr.wire.nodes import Host, Nodes

ANYONE: tuple[int, ...] = ()


def handed_out(costs: Sequence[float], hosts: Mapping[int, tuple[int, ...]]) -> tuple[dict[int, list[int]], list[int]]:
    """Return the clients by node of jobs of some costs, client 0's first, and the clients without a node.

    ``hosts``: the clients of each node; a node of none runs any client.
    """
    nodes = Nodes(None, {}, Binding())
    nodes.hosts = {n: Host(not clients, frozenset(clients), True, "", False) for n, clients in hosts.items()}
    shares, homeless = nodes.hand_out([Job(client, cost=cost) for client, cost in enumerate(costs)])
    return {node: [job.client for job in share] for node, share in shares.items()}, homeless


def test_the_longest_job_goes_out_first_and_each_to_the_node_with_the_least_to_do() -> None:
    """9 to one node, 5 and 4 to the other, 3 to the first: 12 and 9. The shortest first would make it 13 and 8."""
    assert handed_out([4, 9, 3, 5], {1: ANYONE, 2: ANYONE}) == ({1: [1, 2], 2: [0, 3]}, [])


def test_jobs_of_one_cost_are_dealt_by_client_and_node() -> None:
    """A run that is done again hands out as before, whatever order the nodes came in."""
    assert handed_out([1, 1, 1], {2: ANYONE, 1: ANYONE}) == ({1: [0, 2], 2: [1]}, [])


def test_a_client_goes_to_the_node_that_hosts_it_however_much_that_has_to_do() -> None:
    """Its samples are there alone; and no client of another goes to a node that hosts its own."""
    hosts = {1: ANYONE, 2: ANYONE, 3: (0, 2)}
    assert handed_out([9, 1, 8, 1], hosts) == ({1: [1], 2: [3], 3: [0, 2]}, [])


def test_a_client_that_no_node_hosts_is_named() -> None:
    """The round goes on without it."""
    assert handed_out([1, 1, 1], {3: (0,), 5: (2,)}) == ({3: [0], 5: [2]}, [1])
