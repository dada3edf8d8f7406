"""The ``fedjets`` command."""

import signal
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedjets_flwr.config import Config, Scalar, settings
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.tracking import facts_of

cli = typer.Typer(
    help="Federated mixture of experts with just-in-time personalisation.", no_args_is_help=True, add_completion=False
)
console = Console()

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML preset, e.g. configs/cifar10-laptop.toml")]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-c", metavar="KEY=VALUE", help="a setting; repeatable")]
OutputOption = Annotated[Path | None, typer.Option("--output-dir", help="parent folder of the run (default: runs/)")]


def read_settings(path: Path | None, pairs: list[str] | None, output_dir: Path | None = None) -> Config:
    """Return the checked settings of a preset and ``key=value`` pairs; the later one wins.

    Raises:
        FedjetsError: names the file or setting that is wrong.
    """
    flat: dict[str, Scalar] = {}
    if path is not None:
        try:
            flat |= dict(_flatten(tomllib.loads(path.read_text())))
        except (OSError, UnicodeDecodeError) as error:
            raise FedjetsError(f"--config {path}: cannot be read ({getattr(error, 'strerror', error)})") from None
        except tomllib.TOMLDecodeError as error:
            raise FedjetsError(f"--config {path}: not TOML: {error}") from None
    for pair in pairs or []:
        key, sign, text = pair.partition("=")
        if not sign:
            raise FedjetsError(f"-c {pair}: write it as key=value, e.g. -c run.rounds=10")
        flat[key.strip()] = _scalar(text.strip())
    flat["run.output-dir"] = str(
        (output_dir or Path(str(flat.get("run.output-dir") or "runs"))).expanduser().absolute()
    )
    return Config.from_flat(flat)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _scalar(text: str) -> Scalar:
    try:
        value: Scalar = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value


@cli.command()
def run(
    config: ConfigOption = None,
    set_: SetOption = None,
    supernodes: Annotated[int, typer.Option(help="SuperNodes of the simulation; 0: as many as fit")] = 0,
    cpus_per_client: Annotated[int, typer.Option(help="CPUs of a client's process")] = 1,
    gpus_per_client: Annotated[float, typer.Option(help="GPUs of a client's process; a fraction shares one")] = 0.0,
    output_dir: OutputOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
) -> None:
    """Run a federated training through Flower and follow it to its end."""
    pairs = [*(set_ or []), *(["run.resume=true"] if resume else [])]
    c = read_settings(config, pairs, output_dir)
    from fedjets_flwr.launcher import LocalFlower, Resources  # after the settings: a typo is told at once
    from strategies import method

    method(c.strategy.name).validate(c)
    _check_data(c)
    resources = Resources(supernodes, cpus_per_client, gpus_per_client)
    resources.federation_config()
    c.run_dir.mkdir(parents=True, exist_ok=True)
    for stale in ("summary.json", "error.json", "progress.json", *([] if c.run.resume else ["metrics.jsonl"])):
        (c.run_dir / stale).unlink(missing_ok=True)
    console.print(f"[bold]{c.strategy.name}[/] on {c.data.name}: {c.run_dir}")
    with LocalFlower(c.run_dir / "flower.log") as flower:
        launched = flower.run(c, resources)
        try:
            _follow(launched, c)
        except KeyboardInterrupt:
            console.print("stopping the Flower run")
            launched.stop()
            raise
        finally:
            launched.keep_log(c.run_dir / "run.log")
        summary = launched.outcome()
    _print_summary(summary, c.run_dir)


def _check_data(config: Config) -> None:
    """Find what is wrong with data and partition here, before Flower starts."""
    from fedjets_flwr.data.clients import open_split
    from fedjets_flwr.pretraining import named_common_expert

    open_split(config)
    if config.common_expert.path:
        named_common_expert(config)


def _follow(launched: Any, config: Config) -> None:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
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
                if not console.is_terminal and any("evaluation" in r for r in records[shown:]):
                    console.print(f"round {records[-1]['round']}/{config.run.rounds} {facts}")
                shown = len(records)


def _print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    common, accuracy = summary["common_expert_accuracy"], summary["accuracy"]
    table = Table(title="unseen clients", show_header=True)
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("gain", justify="right")
    rows = {
        f"[bold]{summary['strategy']}[/], last round": accuracy,
        f"{summary['strategy']}, best (round {summary['best_round']})": summary["best_accuracy"],
        "common expert": common,
        "common expert + EM prior (control)": summary["controls"]["common_expert_em"],
        "common expert, classes known (bound)": summary["controls"]["common_expert_masked"],
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:.4f}", f"{value - common:+.4f}")
    console.print(table)
    routing, seconds = summary["routing"], summary["seconds"]
    load = " ".join(f"{share:.2f}" for share in routing["expert_load"])
    console.print(
        f"right expert for {routing['sample_share']:.1%} of samples; the chosen experts are the right ones for"
        f" {routing['coverage']:.1%}; load {load}; gate entropy {summary['gate_entropy']:.2f}"
    )
    if summary["gate_collapsed"]:
        console.print("[bold red]warning[/]: the gate collapsed to one expert; raise cohort.anchors or lower gate.lr")
    console.print(
        f"{summary['rounds']} rounds, {summary['bytes_down'] / 1e6:.1f} MB down, {summary['bytes_up'] / 1e6:.1f} MB up,"
        f" {seconds['round']:.0f} s in rounds, {summary['embeddings_computed']} embeddings computed"
    )
    for path in sorted((folder / "plots").glob("*.png")):
        console.print(str(path), soft_wrap=True)


@cli.command()
def pretrain(
    config: ConfigOption = None,
    set_: SetOption = None,
    target_accuracy: Annotated[float | None, typer.Option(help="stop at the first crossing, e.g. 0.73")] = None,
    output: Annotated[Path | None, typer.Option(help="file to write (default: the cache)")] = None,
) -> None:
    """Train a common expert centrally."""
    import os

    import torch

    from fedjets_flwr.pretraining import cached_path, save_common_expert
    from fedjets_flwr.pretraining import pretrain as train

    pairs = [
        *(set_ or []),
        *([f"common-expert.target-accuracy={target_accuracy}"] if target_accuracy is not None else []),
    ]
    c = read_settings(config, pairs)
    torch.set_num_threads(os.cpu_count() or 1)
    expert = train(c, lambda text: console.print(text))
    path = output or cached_path(c)
    save_common_expert(expert, path)
    console.print(f"{expert.accuracy:.4f} on the test split; [bold]{path}[/]", soft_wrap=True)


@cli.command()
def partition(
    config: ConfigOption = None,
    set_: SetOption = None,
    output: Annotated[Path, typer.Option(help="picture to write")] = Path("partition.png"),
) -> None:
    """Show who holds which labels, without training."""
    from fedjets_flwr.data.clients import open_dataset, open_split
    from fedjets_flwr.partition_view import draw, label_counts

    c = read_settings(config, set_)
    counts = label_counts(open_dataset(c), open_split(c))
    roles = ["anchor"] * c.num_anchors + ["normal"] * (c.partition.clients - c.num_anchors)
    table = Table(title=f"{c.partition.name} partition of {c.data.name}")
    for heading in ("client", "role", "samples", "labels"):
        table.add_column(heading, justify="left" if heading in ("role", "labels") else "right")
    for client, row in enumerate(counts):
        held = [f"{label}:{int(n)}" for label, n in enumerate(row) if n]
        labels = " ".join(held[:12]) + (" …" if len(held) > 12 else "")
        table.add_row(str(client), roles[client] if client < len(roles) else "unseen", str(int(row.sum())), labels)
    console.print(table)
    draw(counts, c.num_anchors, c.partition.clients, output)
    console.print(str(output))


@cli.command("settings")
def show_settings(
    write: Annotated[bool, typer.Option("--write", help="rewrite the lists in pyproject.toml and README.md")] = False,
) -> None:
    """List every setting with its default."""
    if write:
        from fedjets_flwr import settings_doc
        from fedjets_flwr.launcher import APP_ROOT

        settings_doc.write(APP_ROOT)
        return
    table = Table()
    for heading in ("setting", "default", "allowed", "meaning"):
        table.add_column(heading)
    for key, (default, allowed, meaning) in settings():
        table.add_row(key, str(default), allowed, meaning)
    console.print(table)


def main() -> None:
    """Run the command; every expected error is one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        cli(standalone_mode=True)
    except FedjetsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
