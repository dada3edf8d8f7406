"""A run's folder as a site gets it that never trained: what its own model needs, and little of anybody else."""

import json
from pathlib import Path

import safetensors.torch

from fedjets_flwr.config.sources import PATHS
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.common_expert import COMMON_EXPERT
from fedjets_flwr.personalize.bundle import check_free, write_folder
from fedjets_flwr.runs.checkpoint import checkpoint_name
from fedjets_flwr.runs.trained_language_run import open_language_run
from fedjets_flwr.runs.trained_run import SUMMARY, open_run, vectors_in, written_settings

USED = ("dataset", "rounds", "weights_hash", "classes", "image_shape", "serving", "usual")
"""Of a run's summary, what a site's own model is made by."""


def hand_out(run: StrPath, folder: StrPath) -> str:
    """Write a folder from which `fedjets personalize` makes the models that it makes from the run's own.

    Returns the hash of the weights.

    Left out: what was measured, chosen and sent by client; names of the server's folders; the seed, from which every
    cohort can be drawn again; and the header of the checkpoint, where a method may have noted what clients told. All
    experts are in it, and weights tell of those who trained them.

    Args:
        run: of a finished run.
        folder: is made.

    Raises:
        FedjetsError: it is no folder of such a run, its files are damaged, or something is in the other one.
    """
    run, folder = Path(run), Path(folder)
    check_free(folder)
    config = written_settings(run)
    summary = (open_language_run if config.of_text else open_run)(run).summary  # or what is wrong with it
    settings = config.flat()
    settings |= {key: Path(str(settings[key])).name for key in PATHS}
    del settings["run.seed"]
    weights = safetensors.torch.save(vectors_in(run / "checkpoints"))
    files = {
        "config.json": _json(settings),
        SUMMARY: _json({key: summary[key] for key in USED if key in summary}),
        COMMON_EXPERT: (run / COMMON_EXPERT).read_bytes(),
        f"checkpoints/{checkpoint_name(summary['rounds'], weights)}": weights,
    }
    write_folder(folder, files)
    return str(summary["weights_hash"])


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()
