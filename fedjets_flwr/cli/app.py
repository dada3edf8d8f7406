"""The ``fedjets`` command."""

import gc
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedjets_flwr.config.schema import Config, settings
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.config.sources import about_preset, local_config, preset_names, read_flat, remote_config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.interrupts import Interrupts
from fedjets_flwr.runs.claim import agreed, claimed

cli = typer.Typer(
    help="Federated mixture of experts with just-in-time personalisation.", no_args_is_help=True, add_completion=False
)
audit = typer.Typer(help="The audit log of a run or of a site.", no_args_is_help=True)
cli.add_typer(audit, name="audit")


def _console(stderr: bool = False) -> Console:
    """Return a terminal that takes what it prints as it is: no brackets in data are markup, no colons are emoji."""
    return Console(stderr=stderr, markup=False, emoji=False)


console = _console()

PresetOption = Annotated[str, typer.Option("--preset", help="settings of the package, see `fedjets presets`")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="settings of your own, a TOML file")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-c", metavar="KEY=VALUE", help="a setting, or several with blanks between; repeatable"),
]
GpusOption = Annotated[str, typer.Option(help="GPUs of a client's process: auto, 0, or a number; 0.5 shares one")]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address", metavar="HOST:PORT", help="simulate on a Ray cluster that runs; auto: the one of this node"
    ),
]
OutputOption = Annotated[Path | None, typer.Option("--output-dir", help="parent folder of the run (default: runs/)")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="replace the results of that name, once the run has a checkpoint")
]


@cli.command()
def run(
    preset: PresetOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    supernodes: Annotated[int, typer.Option(help="SuperNodes of the simulation; 0: as many as fit")] = 0,
    cpus_per_client: Annotated[int, typer.Option(help="CPUs of a client's process")] = 1,
    gpus: GpusOption = "auto",
    output_dir: OutputOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    overwrite: OverwriteOption = False,
    superlink: Annotated[str, typer.Option(help="a connection of your Flower configuration; empty: simulate")] = "",
    ray_address: RayOption = None,
) -> None:
    """Run a federated training through Flower and follow it to its end."""
    if superlink:
        for option, given in {
            "--ray-address": ray_address is not None, "--supernodes": supernodes != 0,
            "--cpus-per-client": cpus_per_client != 1, "--gpus": gpus != "auto",
        }.items():  # fmt: skip
            if given:
                raise FedjetsError(f"{option} is for a simulation, and --superlink for a deployment; leave one out")
    written = read_flat(preset, config, set_ or []) | _switched(resume=resume, overwrite=overwrite)
    if superlink:
        elsewhere, here = agreed(*remote_config(written, output_dir))
        _validate(elsewhere)
        from fedjets_flwr.launch.follow import print_summary, run_elsewhere

        print_summary(run_elsewhere(elsewhere, superlink, here, console), here.run_dir, console)
        return
    c = claimed(local_config(written, output_dir))
    from fedjets_flwr.launch.simulation import Resources  # after the settings: a typo is told at once
    from fedjets_flwr.launch.warm import WarmFlower, find_room

    if ray_address is not None:
        _validate(c)  # before the cluster is asked, which may take minutes
    room = find_room(Resources(supernodes, cpus_per_client, gpus), ray_address, console)
    with WarmFlower(c.run_dir / "flower.log", room) as flower:
        flower.start()
        _validate(c)
        from fedjets_flwr.launch.display import Display

        with Display(console) as display:
            summary = flower.run(c, display)
        from fedjets_flwr.launch.follow import print_summary

        print_summary(summary, c.run_dir, console)


@cli.command("deploy-local")
def deploy_local(
    preset: PresetOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    sites: Annotated[int, typer.Option(help="training sites, a SuperNode each")] = 6,
    unseen: Annotated[int, typer.Option(help="sites that never train, a SuperNode each")] = 2,
    output_dir: OutputOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Rehearse a deployment: SuperLink and SuperNodes on this machine, over TLS, with images or text of their own.

    Three rounds unless the settings say otherwise.
    """
    pairs = [*(set_ or []), f"partition.clients={sites}", f"partition.unseen-clients={unseen}"]
    few = {"run.rounds": 3, "run.evaluate-every": 1, "cohort.normals": max(0, min(5, sites - 5))}
    c = claimed(local_config(read_flat(preset, config, pairs) | _switched(overwrite=overwrite), output_dir, few))
    _validate(c)
    from fedjets_flwr.launch.follow import print_summary
    from fedjets_flwr.launch.local_deployment import rehearse

    print_summary(rehearse(c, console), c.run_dir, console)
    site = c.run_dir / "sites" / f"site{sites}"
    option = f"--text {site}.jsonl" if c.of_text else f"--images {site}"
    console.print(f"an unseen site's own model: fedjets personalize --run {c.run_dir} {option}", soft_wrap=True)


@cli.command()
def credentials(
    output: Annotated[Path, typer.Option(help="folder to write to")],
    host: Annotated[list[str] | None, typer.Option(help="name or address of the SuperLink; repeatable")] = None,
    sites: Annotated[int, typer.Option(help="key pairs of sites to make")] = 0,
    first: Annotated[int, typer.Option(help="client id of the first of them")] = 0,
    unseen: Annotated[int, typer.Option(min=0, help="how many of them, the last ones, never train")] = 0,
    validation: Annotated[int, typer.Option(min=0, help="how many, after those, are to choose settings")] = 0,
    days: Annotated[int, typer.Option(min=1, help="how long the certificates are valid")] = 825,
) -> None:
    """Make a certificate authority and the SuperLink's certificate (--host), keys and a roster of sites (--sites)."""
    from fedjets_flwr.launch.credentials import make_server_credentials, make_site_keys

    if unseen + validation > sites:
        raise FedjetsError(f"--unseen {unseen}, --validation {validation}: more than --sites {sites}")
    if not host and sites < 1:
        raise FedjetsError("give --host NAME for the SuperLink's certificate, --sites N for keys of sites, or both")
    made = make_server_credentials(output, host, days) if host else []
    made += make_site_keys(output, range(first, first + sites), unseen, validation) if sites > 0 else []
    for path in made:
        console.print(str(path), soft_wrap=True)


@cli.command()
def compare(
    experiment: Annotated[Path, typer.Argument(help="comparison, e.g. experiments/table1-cifar10-laptop.yaml")],
    output: Annotated[Path | None, typer.Option(help="folder of table and figures (default: results/<name>)")] = None,
    output_dir: OutputOption = None,
    set_: SetOption = None,
    cpus_per_client: Annotated[int, typer.Option(help="CPUs of a client's process")] = 1,
    gpus: GpusOption = "auto",
    ray_address: RayOption = None,
    parallel: Annotated[int, typer.Option(metavar="N", help="runs at once, which share this machine's CPUs")] = 1,
) -> None:
    """Run presets x seeds, skipping what is done, and write one table and its figures."""
    from fedjets_flwr.compare.experiment import read_experiment
    from fedjets_flwr.compare.running import run_experiment
    from fedjets_flwr.launch.simulation import Resources
    from fedjets_flwr.launch.warm import WarmFlowers, find_room

    if ray_address is not None and parallel != 1:
        raise FedjetsError("--parallel shares this machine, and --ray-address is for a cluster; leave one out")
    wanted = read_experiment(experiment, set_ or [], output_dir)
    folder = output or Path("results") / experiment.stem
    room = find_room(Resources(0, cpus_per_client, gpus, parallel), ray_address, console)
    with WarmFlowers(wanted.parent / "flower.log", room, parallel) as flowers:
        run_experiment(wanted, folder, flowers.run, console, _validate, parallel, flowers.stop)


@cli.command()
def pretrain(
    preset: PresetOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    target_accuracy: Annotated[float | None, typer.Option(help="stop at the first crossing, e.g. 0.73")] = None,
    output: Annotated[Path | None, typer.Option(help="file to write (default: the cache)")] = None,
) -> None:
    """Train a common expert centrally."""
    import torch

    from fedjets_flwr.cpus import cpu_count
    from fedjets_flwr.models.pretraining import cached_path, pretrain_into

    pairs = [
        *(set_ or []),
        *([f"common-expert.target-accuracy={target_accuracy}"] if target_accuracy is not None else []),
    ]
    c = local_config(read_flat(preset, config, pairs))
    if output is not None and output.is_dir():
        raise FedjetsError(f"--output {output}: a folder; name a file")
    torch.set_num_threads(cpu_count())
    path = output or cached_path(c)
    expert = pretrain_into(path, c, lambda text: console.print(text))
    console.print(f"{expert.accuracy:.4f} on held-out samples; {path}", soft_wrap=True)


@cli.command()
def cache(
    set_: SetOption = None,
    clear: Annotated[str, typer.Option(metavar="KIND", help="delete what is kept of a kind, or all")] = "",
) -> None:
    """List what the cache holds, or clear it; whatever is missing is made again."""
    from fedjets_flwr.cli.cache_view import KINDS, holdings
    from fedjets_flwr.cli.cache_view import clear as delete

    folder = local_config(read_flat("", None, set_ or [])).cache_dir
    if clear:
        delete(folder, clear)
    table = Table(title=str(folder))
    for heading in ("kind", "files", "MB", "newest", "what"):
        table.add_column(heading, justify="right" if heading in ("files", "MB", "newest") else "left")
    for held in holdings(folder):
        age = "" if held.days is None else f"{held.days:.1f} days ago"
        table.add_row(held.kind, str(held.files), f"{held.size / 1e6:.1f}", age, KINDS[held.kind])
    console.print(table)


@cli.command()
def partition(
    preset: PresetOption = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    output: Annotated[Path, typer.Option(help="picture to write")] = Path("partition.png"),
) -> None:
    """Show who holds which labels, without training."""
    from fedjets_flwr.cli.partition_view import draw, label_counts, roles_of
    from fedjets_flwr.data.clients import open_dataset, open_split

    c = local_config(read_flat(preset, config, set_ or []))
    counts = label_counts(open_dataset(c), open_split(c))
    table = Table(title=f"{c.partition.name} partition of {c.data.name}")
    for heading in ("client", "role", "samples", "labels"):
        table.add_column(heading, justify="left" if heading in ("role", "labels") else "right")
    roles = roles_of(c)
    for client, (role, row) in enumerate(zip(roles, counts, strict=True)):
        held = [f"{label}:{int(n)}" for label, n in enumerate(row) if n]
        labels = " ".join(held[:12]) + (" …" if len(held) > 12 else "")
        table.add_row(str(client), role, str(int(row.sum())), labels)
    console.print(table)
    draw(counts, roles, output)
    console.print(str(output))


@cli.command()
def text(
    set_: SetOption = None,
    show: Annotated[bool, typer.Option("--list", help="say what there is, and fetch nothing")] = False,
) -> None:
    """Fetch the text of `text.domains` into `data.dir`, by this machine's apt and pip; nothing is installed."""
    from fedjets_flwr.cli.text_view import fetch_text, list_text

    c = local_config({"data.name": "text"} | read_flat("", None, set_ or []))
    (list_text if show else fetch_text)(c, console)


@cli.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run, finished or not")],
    output: Annotated[Path | None, typer.Option(help="file to write (default: DIR/report.html)")] = None,
) -> None:
    """Write one HTML page about a run."""
    from fedjets_flwr.report.page import write_report

    console.print(str(write_report(folder, output)), soft_wrap=True)


def _switched(**given: bool) -> dict[str, Scalar]:
    """Return the settings of ``run`` that switches of the command line turned on."""
    return {f"run.{name}": True for name, on in given.items() if on}


def _validate(config: Config) -> None:
    from strategies import validate  # after the settings: a typo is told at once

    validate(config)


AuditOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="FEDJETS_AUDIT_LOG", help="a site's audit log to note it in (default: none)"),
]
DeviceOption = Annotated[str, typer.Option(help="where to compute: cpu or cuda")]


@cli.command()
def personalize(
    run: Annotated[Path, typer.Option(metavar="DIR", help="folder of a finished run")],
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="a site's images; labels are not needed")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="of a run on text: a site's .txt files, or a file of JSON lines"),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="with --text: of all experts, those that may be chosen (default: 0.5)"),
    ] = None,
    experts: Annotated[int, typer.Option(metavar="K", help="experts to choose; 0: as many as in the run")] = 0,
    read_out: Annotated[
        str, typer.Option(help="top-1, mixture, blend, mean, surest or familiar (default: as in the run)")
    ] = "",
    prior: Annotated[str, typer.Option(help="none, em, support or map (default: as in the run)")] = "",
    statistics: Annotated[
        str, typer.Option(help="trained, or own: the experts' batch norm adapts to the images (default: as in the run)")
    ] = "",
    labels: Annotated[
        bool, typer.Option("--labels", help="class folders tell labels: train a specialist beside the run's one model")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="bundle to write (default: bundles/<run>-<folder>)")] = None,
    device: DeviceOption = "cpu",
    audit_log: AuditOption = None,
) -> None:
    """Give a site its own model: the experts of a finished run that suit its unlabelled images, or its text."""
    from fedjets_flwr.cli.personal_view import show_personalised
    from fedjets_flwr.personalize.bundle import check_free
    from fedjets_flwr.personalize.personaliser import personalise
    from fedjets_flwr.runs.trained_run import open_run

    if (images is None) == (text is None):
        raise FedjetsError("give --images FOLDER, or --text FOLDER for a run on text")
    own = images or text
    assert own is not None
    folder = output or Path("bundles") / f"{run.absolute().name}-{own.absolute().name}"
    check_free(folder)
    if text is not None:
        from fedjets_flwr.cli.language_view import show_text_model
        from fedjets_flwr.personalize.language import personalise_text
        from fedjets_flwr.runs.trained_language_run import open_language_run

        if experts or read_out or prior or statistics or labels:
            raise FedjetsError(
                "--text: not with --experts, --read-out, --prior, --statistics or --labels; use --memory"
            )
        fitted = personalise_text(open_language_run(run), text, 0.5 if memory is None else memory, device)
        fitted.save(folder)
        _note_export(audit_log, folder, fitted.card.weights_hash)
        show_text_model(fitted, folder, console)
        return
    if memory is not None:
        raise FedjetsError("--memory: only with --text; --experts says how many of them classify images")
    if labels:
        from fedjets_flwr.personalize.own_mixture import personalise_labelled

        if experts or read_out or prior or statistics:
            raise FedjetsError("--labels: not with --experts, --read-out, --prior or --statistics; leave them out")
        made = personalise_labelled(open_run(run), own, device)
    else:
        made = personalise(open_run(run), own, experts, read_out, prior, device, statistics)
    made.save(folder)
    _note_export(audit_log, folder, made.card.weights_hash)
    show_personalised(made, folder, console)


@cli.command("hand-out")
def hand_out(
    run: Annotated[Path, typer.Option(help="folder of a finished run")],
    output: Annotated[Path, typer.Option(help="folder to write")],
    audit_log: AuditOption = None,
) -> None:
    """Write what a site that never trained needs for its own model, without what the run tells of others."""
    from fedjets_flwr.personalize.hand_out import hand_out as write

    _note_export(audit_log, output, write(run, output))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    console.print(f"{output} ({size:.2f} MB), for fedjets personalize --run", soft_wrap=True)


@cli.command()
def predict(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `fedjets personalize` wrote")],
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="folder of images, or one; of a language model a folder of text")
    ],
    output: Annotated[Path | None, typer.Option(help="CSV file to write (default: standard output)")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Classify images with a personalised model, or tell how well one for a text tells others."""
    from fedjets_flwr.personalize.bundle import LANGUAGE, format_of

    if format_of(bundle) == LANGUAGE:
        from fedjets_flwr.cli.language_view import show_scores
        from fedjets_flwr.personalize.language import LanguagePersonaliser

        scores = LanguagePersonaliser.load(bundle, device).score(samples)
        _put(scores.csv(), output)
        show_scores(scores, _console(stderr=True))
        return
    from fedjets_flwr.cli.personal_view import show_accuracy
    from fedjets_flwr.personalize.personaliser import Personaliser

    found = Personaliser.load(bundle, device).predict(samples)
    _put(found.csv(), output)
    show_accuracy(found, _console(stderr=True))


def _put(table: bytes, output: Path | None) -> None:
    """Write a table to a file, or to standard output."""
    if output is None:
        typer.echo(table, nl=False)
    else:
        output.write_bytes(table)


def _note_export(log: Path | None, written: Path, weights_hash: str) -> None:
    """Note in a site's audit log what was written, made from the weights of a hash."""
    if log is not None:
        from fedjets_flwr.runs.audit import append

        append(log, "exported", {"file": str(written.absolute()), "weights_hash": weights_hash}, durable=True)


@cli.command()
def export(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `fedjets personalize` wrote")],
    onnx: Annotated[Path, typer.Option(metavar="FILE", help="ONNX file to write")],
    images: Annotated[Path | None, typer.Option(help="images to check it on (default: random pixels)")] = None,
    audit_log: AuditOption = None,
) -> None:
    """Write a personalised model as one ONNX graph, checked against PyTorch."""
    from fedjets_flwr.personalize.onnx_export import export_onnx
    from fedjets_flwr.personalize.personaliser import Personaliser

    loaded = Personaliser.load(bundle)
    difference = export_onnx(loaded, onnx, images)
    _note_export(audit_log, onnx, loaded.card.weights_hash)
    size = onnx.stat().st_size / 1e6
    console.print(f"{onnx} ({size:.2f} MB; probabilities differ from PyTorch's by {difference:.1g})", soft_wrap=True)


@audit.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="audit.jsonl of a run's folder or a site's cache")],
    head: Annotated[str, typer.Option(metavar="HASH", help="a hash noted before (default: that in FILE.head)")] = "",
) -> None:
    """Check that nothing in an audit log was changed, cut out, put in or moved; says the first line that was."""
    from fedjets_flwr.runs.audit import verify as check

    found = check(file, head)
    for number in found.torn:
        console.print(f"line {number} was cut off in writing; the chain goes on after it")
    console.print(f"{found.lines} lines are as they were written; the last one's hash is {found.head}", soft_wrap=True)


@cli.command()
def presets() -> None:
    """List the presets that come with the package."""
    table = Table()
    table.add_column("--preset", no_wrap=True)
    table.add_column("what it is")
    for name in preset_names():
        table.add_row(name, about_preset(name))
    console.print(table)


@cli.command("settings")
def show_settings(
    write: Annotated[bool, typer.Option("--write", help="rewrite pyproject.toml's list and docs/settings.md")] = False,
) -> None:
    """List every setting with its default."""
    if write:
        from fedjets_flwr.config import docs as settings_doc
        from fedjets_flwr.release import APP_ROOT

        settings_doc.write(APP_ROOT)
        return
    table = Table()
    for heading in ("setting", "default", "allowed", "meaning"):
        table.add_column(heading)
    for key, (default, allowed, meaning) in settings().items():
        table.add_row(key, str(default), allowed, meaning)
    console.print(table)


def main() -> None:
    """Run the command; every expected error is one line and exit code 1, signal n is exit code 128+n."""
    interrupts = Interrupts()
    if isinstance(sys.stdout, TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cli(standalone_mode=True)
    except SystemExit as ending:
        sys.exit(128 + interrupts.number if ending.code and interrupts.number else ending.code)
    except (FedjetsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # else Python looks for cycles among all objects of PyTorch as it ends, for half a second
