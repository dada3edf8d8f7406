"""One run at a terminal: checks before Flower starts, progress, summary."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.superlink import Launched, NamedSuperLink, ended
from fedjets_flwr.models.pretraining import named_common_expert
from fedjets_flwr.moe.controls import CONTROLS, shown
from fedjets_flwr.report.plots import draw_plots
from fedjets_flwr.runs.checkpoint import RunLock
from fedjets_flwr.runs.claim import make_room, put_back
from fedjets_flwr.runs.score import COURSES
from fedjets_flwr.runs.stopping import Stopped, error_facts, request_file
from fedjets_flwr.runs.tracking import facts_of, read_metrics, write_json
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
    with run_folder(here, console) as folder:
        launched = superlink.submit(config, folder)
        console.print(f"run {launched.run_id} on the SuperLink {name}")
        summary = follow_to_the_end(launched, config, console, mirrored=True)
        draw_plots(folder)
        return summary


@contextmanager
def run_folder(config: Config, console: Console) -> Iterator[Path]:
    """Yield the run folder, without what an earlier run said of its end; note that the run was stopped, if it was."""
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(config):  # not while another run writes there
        make_room(config)
        for path in (folder / "error.json", folder / "progress.json", request_file(folder)):
            path.unlink(missing_ok=True)
    console.print(Text.assemble((config.strategy.name, "bold"), f" on {config.data.name}: {folder}"), soft_wrap=True)
    try:
        yield folder
    except INTERRUPTS:
        request_file(folder).unlink(missing_ok=True)
        if not ended(folder):  # the ServerApp could not tell
            write_json(folder / "error.json", error_facts(Stopped()))
        done = len(read_metrics(folder))
        console.print(f"stopped after {done} of {config.run.rounds} rounds; go on with --resume")
        raise
    finally:
        with suppress(FedjetsError), RunLock(config, seconds=0):
            if not read_metrics(folder):  # a run elsewhere that did rounds may have a checkpoint there
                put_back(folder)


def follow_to_the_end(launched: Launched, config: Config, console: Console, mirrored: bool = False) -> dict[str, Any]:
    """Show the progress of a run, keep its log, and return its summary; an interrupt stops it.

    Raises:
        FedjetsError: the run failed.
    """
    try:
        with launched.mirrored() if mirrored else nullcontext():
            try:
                follow(launched, config, console)
            except INTERRUPTS:
                launched.stop()
                console.print("stopping the Flower run")
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


def follow(launched: Launched, config: Config, console: Console) -> None:
    """Show a run's progress until it ends: a bar at a terminal, a line per evaluation elsewhere."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[facts]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=config.run.rounds, facts="")
        said, shown = "", 0
        for text, records in launched.watch():
            if text != said and not records:
                progress.update(task, description=text)
                if not console.is_terminal:
                    console.print(text)
                said = text
            if len(records) > shown:
                facts = facts_of(records)
                progress.update(task, description="round", completed=records[-1]["round"], facts=facts)
                for position in range(shown, len(records)):
                    if not console.is_terminal and not COURSES.keys().isdisjoint(records[position]):
                        facts = facts_of(records[: position + 1])
                        console.print(f"round {records[position]['round']}/{config.run.rounds} {facts}")
                shown = len(records)


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
