"""A deployment rehearsed on this machine: a bundled data set becomes image folders of sites that only share weights."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjets_flwr.config.schema import Config, Scalar
from fedjets_flwr.data.clients import open_client, open_dataset
from fedjets_flwr.data.image_folder import to_picture
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.deployment import Deployment
from fedjets_flwr.launch.follow import check, follow_to_the_end, run_folder, tell_who_reaches
from fedjets_flwr.models.pretraining import cached_path, named_common_expert, provide_common_expert

Sites = dict[int, dict[str, Scalar]]


def rehearse(config: Config, console: Console) -> dict[str, Any]:
    """Do a run on one SuperLink and a SuperNode per client, all on this machine, and return its summary.

    The images of each client stay in ``sites/`` of the run folder.

    Raises:
        FedjetsError: the settings, a daemon or the run failed; one line that says why.
    """
    if config.data.name == "image-folder":
        raise FedjetsError("data.name = 'image-folder': a rehearsal makes the folders itself, e.g. of 'digits'")
    check(config)
    tell_who_reaches(console)
    with run_folder(config, console) as folder, tempfile.TemporaryDirectory(prefix="fedjets-") as scratch:
        deployed, sites = as_sites(config, folder / "sites", console)
        with Deployment(Path(scratch), sites) as deployment:
            try:
                deployment.wait_for_sites()
                console.print(f"{len(sites)} SuperNodes on 127.0.0.1:{deployment.port}, TLS, registered keys")
                bound = Config.from_flat(deployed.flat() | {"nodes.roster": str(deployment.roster)})
                return follow_to_the_end(deployment.submit(bound, folder), bound, console)
            finally:
                keep_logs(deployment, folder)


def as_sites(config: Config, folder: Path, console: Console) -> tuple[Config, Sites]:
    """Write every client's images; return the settings for them and what each SuperNode must know.

    Args:
        config: settings of a data set that this machine holds.
        folder: takes ``site<client>/<class>/<image>.png``.
        console: where the common expert's training is shown.
    """
    dataset = open_dataset(config)
    if config.common_expert.path:
        named_common_expert(config)
        common = config.common_expert.path
    else:
        provide_common_expert(config, console.print)
        common = str(cached_path(config))
    changes: dict[str, Scalar] = {
        "run.name": config.run_name, "data.name": "image-folder", "data.classes": ",".join(dataset.classes),
        "data.channels": dataset.shape[0], "data.size": dataset.shape[1], "common-expert.path": common,
        "transport.name": "inline",  # as between machines
    }  # fmt: skip
    sites: Sites = {}
    for client in range(config.partition.all_clients):
        path = folder / f"site{client}"
        shutil.rmtree(path, ignore_errors=True)
        write_images(config, client, path)
        sites[client] = {"client-id": client, "data-path": str(path), "role": config.partition.role_of(client)}
    return Config.from_flat(config.flat() | changes), sites


def write_images(config: Config, client: int, folder: Path) -> None:
    """Write a client's images as PNG files below one folder per class."""
    images, classes = open_client(config, client, part="all").images, open_dataset(config).classes
    for position, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        path = folder / classes[label] / f"{position:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_picture(pixels).save(path)


def keep_logs(deployment: Deployment, folder: Path) -> None:
    """Copy the daemons' logs to ``logs/`` of a run folder."""
    (folder / "logs").mkdir(exist_ok=True)
    for path in sorted((deployment.folder / "logs").glob("*.log")):
        (folder / "logs" / path.name).write_bytes(path.read_bytes())
