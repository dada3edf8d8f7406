"""A deployment rehearsed on this machine: a data set becomes folders or files of sites that only share weights."""

import json
import shutil
import tempfile
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client, open_dataset, open_split
from fedjets_flwr.data.image_folder import to_picture
from fedjets_flwr.data.text import FEDERATED, TEST, documents_of, open_text, split_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.launch.deployment import Deployment
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.follow import check, follow_to_the_end, run_folder
from fedjets_flwr.launch.peers import tell_who_reaches
from fedjets_flwr.models.pretraining import cached_path, named_common_expert, provide_common_expert
from fedjets_flwr.names import PARTS, TRAIN

Sites = dict[int, dict[str, Scalar]]
"""What each SuperNode's ``--node-config`` says, by client id."""


def rehearse(config: Config, console: Console) -> dict[str, Any]:
    """Do a run on one SuperLink and a SuperNode per client, all on this machine, and return its summary.

    The images or the text of each client stay in ``sites/`` of the run folder.

    Raises:
        FedjetsError: the settings, a daemon or the run failed; one line that says why.
    """
    if config.data.name == "image-folder":
        raise FedjetsError("data.name = 'image-folder': a rehearsal makes the folders itself, e.g. of 'digits'")
    if config.of_tasks:
        raise FedjetsError(
            f"data.name = {config.data.name!r}: a rehearsal is of images or of text; set it to 'text', say"
        )
    if config.text_elsewhere:
        raise FedjetsError("partition.public-share = 1: a rehearsal makes the sites' files itself; set it to 0")
    if config.of_text and config.cohort.sampling == "one-per-domain":
        raise FedjetsError(
            "cohort.sampling = 'one-per-domain': a server of sites knows no domains; set it to 'uniform'"
        )
    check(config)
    tell_who_reaches(console)
    with (
        Display(console) as display,
        run_folder(config, display) as folder,
        tempfile.TemporaryDirectory(prefix="fedjets-") as scratch,
    ):
        deployed, sites = as_sites(config, folder / "sites", console)
        with Deployment(Path(scratch), sites) as deployment:
            try:
                deployment.wait_for_sites()
                console.print(f"{len(sites)} SuperNodes on 127.0.0.1:{deployment.port}, TLS, registered keys")
                bound = Config.from_flat(deployed.flat() | {"nodes.roster": str(deployment.roster)})
                return follow_to_the_end(deployment.submit(bound, folder), bound, display)
            finally:
                keep_logs(deployment, folder)


def as_sites(config: Config, folder: Path, console: Console) -> tuple[Config, Sites]:
    """Write every client's images or text; return the settings for them and what each SuperNode must know.

    Args:
        config: settings of a data set that this machine holds.
        folder: takes ``site<client>/<class>/<image>.png``, or ``site<client>.jsonl``.
        console: where the common expert's training is shown.
    """
    if config.common_expert.path:
        named_common_expert(config)
        common = config.common_expert.path
    else:
        provide_common_expert(config, console.print)
        common = str(cached_path(config))
    changes, own = (_as_text_sites if config.of_text else _as_image_sites)(config, folder)
    changes |= {"run.name": config.run_name, "common-expert.path": common, "transport.name": "inline"}  # as elsewhere
    roles = {client: config.partition.role_of(client) for client in own}
    sites: Sites = {client: {"client-id": client, **facts, "role": roles[client]} for client, facts in own.items()}
    return Config.from_flat(config.flat() | changes), sites


def _as_image_sites(config: Config, folder: Path) -> tuple[dict[str, Scalar], Sites]:
    """Write every client's images; return the settings for them and where each site's are."""
    dataset, sites = open_dataset(config), Sites()
    for client in range(config.partition.all_clients):
        path = folder / f"site{client}"
        shutil.rmtree(path, ignore_errors=True)
        write_images(config, client, path)
        sites[client] = {"data-path": str(path)}
    changes: dict[str, Scalar] = {
        "data.name": "image-folder", "data.classes": ",".join(dataset.classes), "data.channels": dataset.shape[0],
        "data.size": dataset.shape[1], "data.dir": "",
    }  # fmt: skip
    return changes, sites


def _as_text_sites(config: Config, folder: Path) -> tuple[dict[str, Scalar], Sites]:
    """Write every client's text; return the settings for it, and where each site's is and of which domain.

    What is not public of a domain, its clients get document by document in turn. The server keeps no text.
    """
    text, sites, lines = open_text(config), Sites(), dict[int, list[str]]()
    everyone = range(config.partition.all_clients)
    for position, domain in enumerate(text.domains):
        clients = [client for client in everyone if text.domain_of(client) == position]
        lines |= {client: [] for client in clients}
        turns = {FEDERATED: cycle(clients), TEST: cycle(clients)}
        for document in documents_of(config, domain) if clients else ():
            if (turn := turns.get(split_of(document))) is not None:
                lines[next(turn)].append(json.dumps({"name": document.name, "text": document.text}) + "\n")
    for client in everyone:
        path = folder / f"site{client}.jsonl"
        with written(path) as file:
            file.write_text("".join(lines[client]), encoding="utf-8")
        sites[client] = {"data-path": str(path), "domain": text.domains[text.domain_of(client)]}
    return {"data.name": "text-folder", "data.dir": "", "partition.public-share": 1.0}, sites


def write_images(config: Config, client: int, folder: Path) -> None:
    """Write a client's images as PNG files below one folder per class."""
    split, classes = open_split(config), open_dataset(config).classes
    apart = config.partition.role_of(client) == TRAIN and bool(split.val or split.test)  # which the site deals anew
    held = [open_client(config, client, part=part).images for part in (PARTS if apart else ("all",))]
    images = chain.from_iterable(zip(images.pixels, images.labels.tolist(), strict=True) for images in held)
    for position, (pixels, label) in enumerate(images):
        path = folder / classes[label] / f"{position:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_picture(pixels).save(path)


def keep_logs(deployment: Deployment, folder: Path) -> None:
    """Copy the daemons' logs to ``logs/`` of a run folder."""
    (folder / "logs").mkdir(exist_ok=True)
    for path in sorted((deployment.folder / "logs").glob("*.log")):
        (folder / "logs" / path.name).write_bytes(path.read_bytes())
