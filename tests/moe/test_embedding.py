from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.models.common_expert import CommonExpert, freeze
from fedjets_flwr.moe import embedding
from fedjets_flwr.moe.embedding import Embedded, embed, embed_adapted
from fedjets_flwr.tasks.base import Inputs

CPU = torch.device("cpu")


def common_expert(seed: int = 0, mean: float = 0.3) -> CommonExpert:
    architecture = Architecture("resnet8", 4, "batch", "cifar", 1, 10)
    return CommonExpert(freeze(build(architecture, seed)), architecture, (mean,), (0.4,), "digits", 0.5)


def pixels(n: int = 300, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(
    folder: Path,
    common: CommonExpert | None = None,
    x: Tensor | None = None,
    layer: str = "penultimate",
    trainable: str = "all",
) -> tuple[Embedded, bool]:
    backbone = Backbone(common or common_expert(), trainable)
    return embed(backbone, pixels() if x is None else x, layer, folder, CPU)


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "embeddings").iterdir())


def assert_same(a: Embedded, b: Embedded) -> None:
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.embedding, b.embedding)


def test_embeds_once_then_reads(tmp_path: Path) -> None:
    first, computed = run(tmp_path)
    again, recomputed = run(tmp_path)
    assert (computed, recomputed) == (True, False)
    assert_same(first, again)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("layer", ["penultimate", "logits"])
def test_equals_the_model(tmp_path: Path, layer: str) -> None:
    """More samples than one internal batch."""
    common, x = common_expert(), pixels(300)
    found, _ = run(tmp_path, common, x, layer)
    with torch.inference_mode():
        features = common.model[:-1](common.normalise(x))
        logits = common.model[-1](features)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.embedding, features if layer == "penultimate" else logits, rtol=1e-4, atol=1e-5)
    assert found.logits.dtype == found.embedding.dtype == torch.float32
    assert found.features is None


@pytest.mark.parametrize(("trainable", "tail"), [("stage", 3), ("head", 1)])
def test_tails_over_cached_features_equal_the_model(tmp_path: Path, trainable: str, tail: int) -> None:
    common = common_expert()
    found, _ = run(tmp_path, common, trainable=trainable)
    assert found.features is not None
    with torch.inference_mode():
        torch.testing.assert_close(common.model[-tail:](found.features), found.logits)
        torch.testing.assert_close(found.logits, common.model(common.normalise(pixels())), rtol=1e-4, atol=1e-5)


def test_whatever_decides_the_result_decides_the_entry(tmp_path: Path) -> None:
    """Changed pixels, order, number, weights and preprocessing each make an entry of their own."""
    x = pixels()
    changed = x.clone()
    changed[7, 0, 0, 0] ^= 1
    variants = [
        (common_expert(), x), (common_expert(), changed), (common_expert(), x.flip(0)), (common_expert(), x[:-1]),
        (common_expert(1), x), (common_expert(mean=0.31), x),
    ]  # fmt: skip
    results = [run(tmp_path, common, rows) for common, rows in variants]
    assert all(computed for _, computed in results)
    assert len(entries(tmp_path)) == len(variants)
    torch.testing.assert_close(results[2][0].logits, results[0][0].logits.flip(0), rtol=1e-4, atol=1e-5)
    assert not any(run(tmp_path, common, rows)[1] for common, rows in variants)


def test_the_layer_read_shares_one_entry_and_a_trunk_does_not(tmp_path: Path) -> None:
    run(tmp_path)
    assert not run(tmp_path, layer="logits")[1]
    assert not run(tmp_path, trainable="head")[1]
    assert run(tmp_path, trainable="stage")[1]
    assert len(entries(tmp_path)) == 2


def test_what_a_gpu_computed_is_no_entry_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They round otherwise, and a folder may be shared by machines with and without one."""
    backbone, x = Backbone(common_expert(), "all"), pixels()
    values = embedding.compute(backbone, x, CPU)
    computed: list[torch.device] = []

    def on_its_device(backbone: Backbone, pixels: Tensor, device: torch.device) -> dict[str, Tensor]:
        computed.append(device)
        return {name: value + (device.type == "cuda") for name, value in values.items()}

    monkeypatch.setattr(embedding, "compute", on_its_device)
    devices = [torch.device("cuda", 0), CPU, torch.device("cuda", 1)]
    found = [embed(backbone, x, "logits", tmp_path, device)[0].logits for device in devices]
    assert computed == devices[:2]
    assert torch.equal(found[1], values["logits"])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_what_another_device_adapted_is_no_entry_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; ``meta`` stands for the device that is not here, and another sum for what it would come to."""
    backbone, x = Backbone(common_expert(), "all"), pixels()
    honest = embedding.adapted_logits
    computed: list[str] = []

    def on_its_device(model: nn.Module, inputs: Inputs, count: int) -> Tensor:
        computed.append(inputs(torch.arange(1)).device.type)
        return honest(model, on("cpu"), count) + (computed[-1] != "cpu")

    def on(device: str) -> Inputs:
        return lambda rows: backbone.common.normalise(x[rows]).to(device)

    monkeypatch.setattr(embedding, "adapted_logits", on_its_device)
    found = [embed_adapted(backbone, x, on(device), tmp_path) for device in ("meta", "cpu", "meta", "cpu")]
    assert computed == ["meta", "cpu"]
    assert torch.equal(found[1], honest(backbone.common.model, on("cpu"), len(x)))
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"garbage", lambda data: data[: len(data) // 2], flipped]
)
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """The damaged entry stands at a path that this process has not read yet."""
    whole, _ = run(tmp_path / "a")
    path = entries(tmp_path / "a")[0]
    data = path.read_bytes()
    (tmp_path / "b" / "embeddings").mkdir(parents=True)
    (tmp_path / "b" / "embeddings" / path.name).write_bytes(damage(data))
    found, computed = run(tmp_path / "b")
    assert computed
    assert_same(found, whole)
    assert entries(tmp_path / "b")[0].read_bytes() == data
    assert f"{path.name} is damaged: it is made anew" in caplog.text


@pytest.mark.parametrize("trainable", ["all", "stage"])
def test_no_temporary_file_stays(tmp_path: Path, trainable: str) -> None:
    run(tmp_path, trainable=trainable)
    assert [path.suffix for path in entries(tmp_path)] == [".safetensors"]
    assert not entries(tmp_path)[0].name.startswith(".")
