"""What ``deploy-local`` writes for its sites."""

from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.launch.local_deployment import write_images


def test_a_site_gets_the_parts_that_the_split_keeps_apart_too(tmp_path: Path) -> None:
    """It deals them anew, by the same shares."""
    config = Config.from_flat({
        "partition.name": "majority", "partition.clients": 6, "partition.samples-per-client": 60,
        "partition.val-share": 0.2, "partition.test-share": 0.2, "partition.unseen-clients": 2,
        "cohort.normals": 1, "run.cache-dir": str(tmp_path / "cache"),
    })  # fmt: skip
    write_images(config, 0, tmp_path / "site")
    sizes = [len(open_client(config, 0, part=part).images) for part in ("train", "val", "test")]
    assert sizes == [36, 12, 12]
    assert len(list((tmp_path / "site").rglob("*.png"))) == sum(sizes)
