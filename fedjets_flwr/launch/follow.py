"""One run at a terminal: checks before Flower starts, progress, summary."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.superlink import Launched, NamedSuperLink, ended
from fedjets_flwr.models.pretraining import named_common_expert
from fedjets_flwr.moe.controls import CONTROLS, shown
from fedjets_flwr.report.plots import draw_or_say
from fedjets_flwr.runs.checkpoint import RunLock
from fedjets_flwr.runs.claim import BEFORE, make_room, put_back
from fedjets_flwr.runs.score import COURSES
from fedjets_flwr.runs.stopping import Stopped, error_facts, request_file
from fedjets_flwr.runs.tracking import facts_of, read_metrics, read_warnings, write_json
from fedjets_flwr.tasks import open_task

INTERRUPTS = (KeyboardInterrupt, SystemExit)
"""SystemExit is what rich makes of a closed pipe, such as that to a ``tee`` which heard the same Ctrl-C."""


def run_elsewhere(config: Config, name: str, here: Config, console: Console) -> dict[str, Any]:
    """Run on a SuperLink of the user's Flower configuration, show the progress, return the summary.

    Args:
        config: the settings, with the folders of the SuperLink's machine.
        name: of the connection.
        here: the same settings, with the folder of this machine that takes the results.
        console: where the progress is shown.

    Raises:
        FedjetsError: the settings, the connection or the run failed; one line that says why.
    """
    superlink = NamedSuperLink(name)
    with Display(console) as display, run_folder(here, display) as folder:
        launched = superlink.submit(config, folder)
        console.print(f"run {launched.run_id} on the SuperLink {name}")
        summary = follow_to_the_end(launched, config, display, mirrored=True)
        draw_or_say(folder, console.print)
        return summary


@contextmanager
def run_folder(config: Config, display: Display) -> Iterator[Path]:
    """Yield the run folder, without what an earlier run said of its end; note that the run was stopped, if it was."""
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(config):  # not while another run writes there
        make_room(config)
        for path in (folder / "error.json", folder / "progress.json", request_file(folder)):
            path.unlink(missing_ok=True)
    earlier = read_metrics(folder / BEFORE)
    about = Text.assemble((config.strategy.name, "bold"), f" on {config.data.name}: {folder}")
    display.tell(config.run_name, about)
    try:
        yield folder
    except INTERRUPTS:
        request_file(folder).unlink(missing_ok=True)
        _give_back(config)
        if not ended(folder):  # the ServerApp could not tell
            write_json(folder / "error.json", error_facts(Stopped()))
        done = read_metrics(folder)
        if earlier and done == earlier:
            display.tell(config.run_name, "stopped in its first round; what it was to replace is back")
        elif not (folder / "summary.json").is_file():
            rounds = f"{len(done)} of {config.run.rounds} rounds"
            display.tell(config.run_name, f"stopped after {rounds}; go on with --resume")
        raise
    except BaseException:
        _give_back(config)
        raise


def _give_back(config: Config) -> None:
    """Bring back what a run was to replace, if it came to nothing and nobody writes there any more."""
    with suppress(FedjetsError), RunLock(config, seconds=0):
        if not read_metrics(config.run_dir):  # a run elsewhere that did rounds may have a checkpoint there
            put_back(config.run_dir)


def follow_to_the_end(launched: Launched, config: Config, display: Display, mirrored: bool = False) -> dict[str, Any]:
    """Show the progress of a run, keep its log, and return its summary; an interrupt stops it.

    Raises:
        FedjetsError: the run failed.
    """
    try:
        with launched.mirrored() if mirrored else nullcontext():
            try:
                follow(launched, config, display)
            except INTERRUPTS:
                launched.stop()
                display.tell(config.run_name, "stopping the Flower run")
                raise
    finally:
        launched.keep_log()
    return launched.outcome()


def check(config: Config) -> None:
    """Find what is wrong with data and common expert here, before Flower starts.

    Raises:
        FedjetsError: one line that says what.
    """
    open_task(config).deal()
    if config.common_expert.path or config.run.start_from:
        named_common_expert(config)


def follow(launched: Launched, config: Config, display: Display) -> None:
    """Show a run's progress until it ends: a bar at a terminal, of which a line stays; a line per evaluation elsewhere.

    Raises:
        FedjetsError: Flower does not answer any more.
    """
    name, rounds, at_terminal = config.run_name, config.run.rounds, display.console.is_terminal
    said, shown, at, facts = "", 0, 0, ""
    warned = 0
    with display.bar(display.titled(name, "starting"), rounds) as bar:
        for text, records in launched.watch():
            for warning in read_warnings(launched.folder)[warned:]:
                display.tell(name, Text(f"warning: {warning}"))
                warned += 1
            if text != said and not records:
                display.update(bar, description=display.titled(name, text))
                if not at_terminal:
                    display.tell(name, text)
                said = text
            if len(records) > shown:
                facts, at = facts_of(records), records[-1]["round"]
                display.update(bar, description=display.titled(name, "round"), completed=at, facts=facts)
                for position in range(shown, len(records)):
                    if not at_terminal and not COURSES.keys().isdisjoint(records[position]):
                        evaluated = facts_of(records[: position + 1])
                        display.tell(name, f"round {records[position]['round']}/{rounds} {evaluated}")
                shown = len(records)
    if at_terminal and shown:
        display.tell(name, f"round {at}/{rounds} {facts}")


def print_summary(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print the result beside its controls, what it took, and where the pictures are."""
    if summary["accuracy"] is not None:
        _print_accuracy(summary, console)
    if own := summary.get("participants"):
        wide = f", {own['global']:.4f} on test images of all classes" if "global" in own else ""
        console.print(
            f"{len(own['clients'])} clients that train: accuracy {own['local']:.4f} on test samples of their own{wide}"
        )
    seconds = summary["seconds"]
    console.print(
        f"{summary['rounds']} rounds, {summary['bytes_down'] / 1e6:.1f} MB down, {summary['bytes_up'] / 1e6:.1f} MB up,"
        f" {sum(summary['seconds_before'].values()):.0f} s before the first and {seconds['round']:.0f} s in them,"
        f" {summary['embeddings_computed']} embeddings computed"
    )
    for path in sorted((folder / "plots").glob("*.png")):
        console.print(str(path), soft_wrap=True)


def _print_accuracy(summary: Mapping[str, Any], console: Console) -> None:
    common, accuracy = summary["common_expert_accuracy"], summary["accuracy"]
    table = Table(title="unseen clients", show_header=True)
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("gain", justify="right")
    rows = {
        f"{summary['strategy']}, last round": accuracy,
        f"{summary['strategy']}, best (round {summary['best_round']})": summary["best_accuracy"],
        **{CONTROLS[key]: summary["controls"][key] for key in shown(summary["controls"])},
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}", f"{value - common:+.4f}")
    console.print(table)
    routing = summary["routing"]
    load = " ".join(f"{share:.2f}" for share in routing["expert_load"])
    console.print(
        f"right expert for {routing['sample_share']:.1%} of samples; the chosen experts are the right ones for"
        f" {routing['coverage']:.1%}; load {load}; gate entropy {summary['gate_entropy']:.2f}"
    )
    if summary["gate_collapsed"]:
        warning = ("warning", "bold red")
        console.print(
            Text.assemble(warning, ": the gate collapsed to one expert; raise cohort.anchors or lower gate.lr")
        )
