"""What benchmarks run on: settings, and a common expert of random weights, whose speed is that of a trained one."""

from pathlib import Path

from benchmarks.outcome import Plan
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.config.sources import absolute_paths, read_preset
from fedjets_flwr.data.clients import open_dataset
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.common_expert import CommonExpert, freeze
from fedjets_flwr.models.expert import configured_architecture
from fedjets_flwr.models.pretraining import save_common_expert

ENDLESS: dict[str, Scalar] = {
    # The benchmark ends a run when it has seen enough; nothing but rounds happens until then.
    "run.rounds": 999_999,
    "run.evaluate-every": 1_000_000,
    "run.checkpoint-every": 1_000_000,
    "limits.node-seconds": 600.0,
}


def settings(plan: Plan, name: str, changes: dict[str, Scalar], preset: str = "") -> Config:
    """Return the settings of a benchmark's run below ``plan.scratch``, with a common expert of random weights."""
    flat = read_preset(preset) if preset else {}
    flat |= ENDLESS | {"run.name": name, "run.output-dir": str(plan.scratch)}
    flat |= {"run.cache-dir": str(plan.scratch / "cache")} | changes
    config = Config.from_flat(absolute_paths(flat))
    path = plan.scratch / f"common-{config.data.name}-{config.model.name}.safetensors"
    if not path.is_file():
        random_common_expert(config, path)
    return Config.from_flat({**config.flat(), "common-expert.path": str(path)})


def random_common_expert(config: Config, path: Path, architecture: Architecture | None = None) -> None:
    """Write a common expert that was never trained, of the configured architecture unless another is named."""
    dataset = open_dataset(config)
    architecture = architecture or configured_architecture(config, dataset.spec)
    model = freeze(build(architecture, 0))
    save_common_expert(CommonExpert(model, architecture, dataset.mean, dataset.std, dataset.name, 0.1), path)
