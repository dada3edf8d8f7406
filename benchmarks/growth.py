"""How a round and the server's memory grow with the work, each kind of work varied alone; stock Flower beside.

On the digits, M = 5 linear experts over a small common expert, 1,000 clients of 20 samples, 5 anchors and 5 normal
clients a round, where nothing else is said. Start-up (which embeds the data of every client once) may grow with the
clients; a round and the server's memory may not. Experts are whole models of 0.1 M floats there. For the floats of a
model (ResNet-8 of growing width) no gradient is computed: 2 clients a round, M = 2 and K = 1, load one each, change one
number and send it back, as in `transport`; stock Flower's 2 clients do the same. For the clients of a round stock
Flower's have one linear head to move and no training, ours train. Memory is a peak (VmHWM) of the process that runs the
ServerApp and hands out the simulation. Every point is a run of its own, but for those of the bounds, whose blocks of
rounds alternate. The seconds to the end of round 1 begin when Flower has taken the run: Ray is up by then in ours, and
comes up meanwhile in stock Flower.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.engine import Engine, ours, stock
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from benchmarks.paced import Stuck, memory
from benchmarks.transport import EXTRA
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.simulation import Resources
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.flat_model import VectorSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, STOCK = "fedjets-flwr", "stock Flower"
PATIENCE = 120.0
"""Seconds, its start included, after which a point of stock Flower is left out."""
COMPARED = (1_000, 100_000)
"""Clients of the partitions that the bounds are about."""
WARM = 2
"""Rounds of a run before those that count."""

Settings = dict[str, Scalar]
Rival = tuple[Settings, int]
"""Settings of the stock app, and its virtual nodes, all of which take part."""


@dataclass(frozen=True)
class Series:
    """One kind of work: its sizes (and those of a quick run), what one means for either side, its place on the axis."""

    name: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    ours: Callable[[int], Settings]
    stock: Callable[[int], Rival] | None = None
    at: Callable[[int], int] = int


@dataclass(frozen=True)
class Point:
    """What one run was seen to take.

    Attributes:
        series: name of what was varied.
        side: whose run it is.
        at: how much of it.
        seconds: of a round.
        first: seconds from when Flower has taken the run to the end of round 1.
        server: peak memory of the server, MB.
        node: the same of the largest process of clients.
    """

    series: str
    side: str
    at: int
    seconds: Samples
    first: float
    server: float
    node: float

    def as_json(self) -> dict[str, Any]:
        """Return what goes to disk."""
        seconds = {"median": self.seconds.median, "values": self.seconds.values}
        rest = {"first": self.first, "server": self.server, "node": self.node}
        return {"series": self.series, "side": self.side, "at": self.at, "seconds": seconds, **rest}


@dataclass
class Growth(Outcome):
    """The outcome, with its points and their picture."""

    points: list[Point] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the points besides."""
        return super().as_json() | {"points": [point.as_json() for point in self.points]}

    def as_markdown(self) -> str:
        """Return the picture and a table of the points besides."""
        head = (
            "| varied | side | s a round | range | server, MB | largest client process, MB | s to the end of round 1 |"
        )
        lines = ["", f"![{self.name}]({self.name}.png)", "", head, "|---|---|---:|---:|---:|---:|---:|"]
        for p in self.points:
            low, high = p.seconds.spread
            lines.append(
                f"| {p.at:,} {p.series} | {p.side} | {p.seconds.median:.3g} | {low:.3g} to {high:.3g} | {p.server:.0f}"
                f" | {p.node:.0f} | {p.first:.1f} |"
            )
        return super().as_markdown() + "\n".join(lines) + "\n"

    def picture(self) -> "Figure":
        """Draw the points."""
        return draw(self.as_json()["points"])


def of_clients(count: int) -> Settings:
    """Return the settings of a partition of so many clients."""
    common: Settings = {"moe.trainable": "head", "moe.init": "common"}
    return {"partition.clients": count, "partition.samples-per-client": 20, **common}


def of_experts(count: int) -> Settings:
    """Return the settings of so many whole experts, ten clients a round all the same."""
    return of_clients(1_000) | whole_experts(count) | {"model.width": 73} | cohort(10, count)


def of_floats(width: int) -> Settings:
    """Return the settings under which two clients a round move a ResNet-8 of a width and train nothing."""
    moved: Settings = {"strategy.name": "touch", "moe.top-k": 1, "model.name": "resnet8", "model.width": width}
    return of_clients(4) | whole_experts(2) | moved | cohort(2, 2)


def of_cohort(count: int) -> Settings:
    """Return the settings of so many clients a round."""
    return of_clients(1_000) | cohort(count, 5)


def cohort(count: int, experts: int) -> Settings:
    """Return a cohort of so many clients, of which anchors are half, and five or one an expert at most."""
    anchors = min(5, experts, count // 2)
    return {"cohort.anchors": anchors, "cohort.normals": count - anchors}


def whole_experts(count: int) -> Settings:
    """Return experts that are whole models, of any number: five of them have an anchor at most."""
    experts: Settings = {"moe.experts": count, "moe.trainable": "all", "moe.init": "random"}
    return experts | {"partition.name": "quantity", "partition.anchors": min(5, count)}


def floats(width: int) -> int:
    """Return the floats of a ResNet-8 for the digits."""
    with torch.device("meta"):
        return VectorSpec.of(build(Architecture("resnet8", width, "batch", "cifar", 1, 10), 0)).size


def stock_of_floats(width: int) -> Rival:
    """Return how two clients of stock Flower move the same model."""
    return {"task": "move-resnet8", "width": width}, 2


def stock_of_cohort(count: int) -> Rival:
    """Return how so many clients of stock Flower move a linear head over 32 features."""
    return {"task": "move-head", "width": 32}, count


CLIENTS = Series("clients", (100, 1_000, 10_000, 100_000), (20, 40), of_clients)
SERIES = (
    CLIENTS,
    Series("experts", (2, 4, 8, 16, 32, 64), (), of_experts),
    Series("floats of a model", (18, 59, 186, 589), (18,), of_floats, stock_of_floats, floats),
    Series("clients a round", (5, 10, 50, 100, 500), (), of_cohort, stock_of_cohort),
)


def measure(plan: Plan) -> Growth:
    """Measure the points that the bounds compare side by side, then every other by itself."""
    outcome = Growth("growth", (__doc__ or "").strip())
    known = _bounded(plan, outcome)
    for series in SERIES:
        for size in _sizes(plan, series):
            changes = series.ours(size)
            key = _key(changes)
            if key not in known:
                config = _config(plan, f"{series.name}-{size}", changes)
                with ours(config, Resources(), EXTRA if "strategy.name" in changes else None) as engine:
                    known[key] = _watched(engine, plan.rounds)
            outcome.points.append(Point(series.name, OURS, series.at(size), *known[key]))
        if series.stock is not None:
            _add_stock(plan, outcome, series, series.stock)
    return outcome


Seen = tuple[Samples, float, float, float]
"""Seconds of rounds, to the end of the first, and MB of the server and of the largest client process."""


def _bounded(plan: Plan, outcome: Growth) -> dict[frozenset[tuple[str, Scalar]], Seen]:
    """Alternate rounds of the fewest and the most clients that the bounds are about; return what was seen of each."""
    (few, many), block = (CLIENTS.quick, 1) if plan.quick else (COMPARED, 20)
    with ExitStack() as stack:
        engines, first = dict[int, Engine](), dict[int, float]()
        for clients in (few, many):
            config = _config(plan, f"bound-{clients}", of_clients(clients))
            engines[clients] = stack.enter_context(ours(config, Resources()))
            first[clients] = engines[clients].rounds(1, seconds=1200)[0]
        for engine in engines.values():
            engine.rounds(block)
        seconds: dict[int, list[float]] = {clients: [] for clients in engines}
        for _ in range(plan.rounds):
            for clients, engine in engines.items():
                seconds[clients].append(sum(engine.rounds(block)) / block)
        seen = {c: (Samples(tuple(seconds[c])), first[c], *_memory(engine)) for c, engine in engines.items()}
    of = f"{many} / {few} clients"
    outcome.bounds = [
        Bound(f"seconds a round, {of}", ratios(seconds[many], seconds[few]), 1.2),
        Bound(f"memory of the server, {of}", ratios([seen[many][2]], [seen[few][2]]), 1.3),
    ]
    outcome.samples[f"memory of a client process, {of}"] = ratios([seen[many][3]], [seen[few][3]])
    return {_key(of_clients(clients)): what for clients, what in seen.items()}


def _add_stock(plan: Plan, outcome: Growth, series: Series, rival: Callable[[int], Rival]) -> None:
    """Add the points of stock Flower; from the first that is too much for it on they are left out."""
    for size in _sizes(plan, series):
        given, nodes = rival(size)
        given |= {"nodes": nodes, "fraction": 1.0, "threads": 1}
        try:
            with stock(plan.scratch / f"stock-{series.name}-{size}", given, Resources(nodes)) as engine:
                seen = _watched(engine, plan.rounds, PATIENCE)
        except Stuck as error:
            why = f"left out from here on: {error}".replace(str(plan.scratch), "")
            outcome.facts[f"{STOCK}, {series.at(size):,} {series.name}"] = why
            return
        outcome.points.append(Point(series.name, STOCK, series.at(size), *seen))


def _watched(engine: Engine, rounds: int, patience: float = 600.0) -> Seen:
    """Let a run do its rounds alone; return what was seen of it."""
    seconds = engine.rounds(WARM + rounds, patience)
    return Samples(tuple(seconds[WARM:])), seconds[0], *_memory(engine)


def _memory(engine: Engine) -> tuple[float, float]:
    """Return MB of the server and of the largest client process."""
    return memory(engine.server, "VmHWM"), max(memory(node, "VmHWM") for node in engine.nodes)


def _sizes(plan: Plan, series: Series) -> tuple[int, ...]:
    return series.quick if plan.quick else series.sizes


def _config(plan: Plan, name: str, changes: Settings) -> Config:
    """Return the settings of a run; its common expert is the same small one, whatever its experts are."""
    return Config.from_flat({**settings(plan, name.replace(" ", "-"), {}).flat(), **changes})


def _key(changes: Mapping[str, Scalar]) -> frozenset[tuple[str, Scalar]]:
    """Return what two points share that are the same run; a cohort of five and five is the usual one."""
    return frozenset((cohort(10, 5) | dict(changes)).items())


def draw(points: Sequence[Mapping[str, Any]]) -> "Figure":
    """Return the picture of points as their JSON has them: seconds a round, and under it the server's memory.

    A column for each series, in the order in which they come; a line for each side.
    """
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, FixedLocator, FormatStrFormatter, LogLocator, NullLocator

    seaborn.set_theme(style="whitegrid", context="notebook")
    names, sides = _distinct(points, "series"), _distinct(points, "side")
    figure, axes = pyplot.subplots(
        2, len(names), figsize=(3.6 * len(names), 6.4), sharex="col", sharey="row", squeeze=False
    )
    for column, name in zip(axes.T, names, strict=True):
        for number, side in enumerate(sides):
            own = sorted((p for p in points if (p["series"], p["side"]) == (name, side)), key=lambda p: p["at"])
            at, style = [p["at"] for p in own], {"color": f"C{number}", "marker": "os^"[number % 3], "label": side}
            column[0].plot(at, [p["seconds"]["median"] for p in own], **style)
            column[1].plot(at, [p["server"] for p in own], **style)
        column[1].set_xlabel(name)
        sizes = sorted({p["at"] for p in points if p["series"] == name})
        for axis in column:
            axis.set(xscale="log", yscale="log")
            axis.xaxis.set(major_locator=FixedLocator(sizes), major_formatter=EngFormatter(places=0, sep=""))
            axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=FormatStrFormatter("%g"))
            for side_of in (axis.xaxis, axis.yaxis):
                side_of.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("seconds a round")
    axes[1, 0].set_ylabel("server's peak memory, MB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(sides))
    figure.tight_layout()
    pyplot.close(figure)
    return figure


def _distinct(points: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(point[key] for point in points))
