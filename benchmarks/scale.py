"""100, 1,000 and 10,000 clients with cohorts of the same size, on the digits: what grows that should not.

Linear experts over a small common expert, cohorts of 5 anchors and 5 normal clients. Start-up (which embeds the data of
every client once) may grow with the clients; a round and the server's memory may not. Memory is a peak (VmHWM).
"""

from contextlib import ExitStack

from benchmarks.engine import Engine, ours
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from benchmarks.paced import memory
from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.launch.simulation import Resources


def measure(plan: Plan) -> Outcome:
    """Start all three, then alternate blocks of their rounds."""
    sizes, block = ((20, 40), 1) if plan.quick else ((100, 1_000, 10_000), 20)
    outcome = Outcome("scale", (__doc__ or "").strip())
    with ExitStack() as stack:
        engines: dict[int, Engine] = {}
        for clients in sizes:
            changes: dict[str, Scalar] = {
                "partition.clients": clients, "partition.samples-per-client": 20, "moe.trainable": "head",
                "moe.init": "common",
            }  # fmt: skip
            config = settings(plan, f"clients-{clients}", changes)
            engine = engines[clients] = stack.enter_context(ours(config, Resources()))
            first = engine.rounds(1, seconds=1200)[0]
            outcome.samples[f"{clients} clients: seconds to the end of round 1"] = Samples((first,))
        for engine in engines.values():
            engine.rounds(block)
        seconds: dict[int, list[float]] = {clients: [] for clients in sizes}
        for _ in range(plan.rounds):
            for clients, engine in engines.items():
                seconds[clients].append(sum(engine.rounds(block)) / block)
        server = {clients: memory(engine.server, "VmHWM") for clients, engine in engines.items()}
        nodes = {c: max(memory(node, "VmHWM") for node in engine.nodes) for c, engine in engines.items()}
    few, many = min(sizes), max(sizes)
    outcome.bounds = [
        Bound(f"seconds a round, {many} / {few} clients", ratios(seconds[many], seconds[few]), 1.2),
        Bound(f"memory of the server, {many} / {few} clients", ratios([server[many]], [server[few]]), 1.3),
    ]
    outcome.samples |= {f"{clients} clients: s a round": Samples(tuple(v)) for clients, v in seconds.items()}
    outcome.samples |= {f"{clients} clients: server, MB": Samples((v,)) for clients, v in server.items()}
    outcome.samples |= {f"{clients} clients: largest node, MB": Samples((v,)) for clients, v in nodes.items()}
    outcome.samples[f"memory of a node, {many} / {few} clients"] = ratios([nodes[many]], [nodes[few]])
    return outcome
