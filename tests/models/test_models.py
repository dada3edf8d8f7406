import copy
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Model
from fedjets_flwr.data.datasets import Spec, load_dataset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import Architecture, BasicBlock, build, tail_start
from fedjets_flwr.models.common_expert import CommonExpert, accuracy_of, freeze, load_common_expert, logits_of
from fedjets_flwr.models.expert import (
    build_configured_gate,
    build_expert,
    configured_architecture,
    expert_architecture,
)
from fedjets_flwr.models.gate import build_gate

NAMES = get_args(Model.model_fields["name"].annotation)
STEMS = get_args(Model.model_fields["stem"].annotation)
TINY = Architecture("cnn", 4, "batch", "cifar", 1, 10)


def common_expert(architecture: Architecture = TINY, mean: float = 0.31, accuracy: float = 0.5) -> CommonExpert:
    channels = architecture.channels
    model = freeze(build(architecture, 3))
    return CommonExpert(model, architecture, (mean,) * channels, (0.4,) * channels, "digits", accuracy)


def images(architecture: Architecture, size: int = 32) -> Tensor:
    return torch.randn(2, architecture.channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_slices(name: str) -> None:
    """Trunk then tail equals the whole model, wherever it is cut."""
    architecture = Architecture(name, 4, "batch", "cifar", 3, 7)
    model = build(architecture, 0).eval()
    x = images(architecture, 16)
    with torch.inference_mode():
        whole = model(x)
        assert whole.shape == (2, 7)
        assert isinstance(model[-1], nn.Linear)
        penultimate = model[:-1](x)
        assert penultimate.shape == (2, model[-1].in_features)
        starts = {part: tail_start(model, part) for part in ("all", "stage", "head")}
        for start in starts.values():
            assert torch.equal(model[start:](model[:start](x)), whole)
    assert starts["all"] == 0 < starts["stage"] < starts["head"] == len(model) - 1
    assert sum(p.numel() for p in model[starts["stage"] :].parameters()) > sum(
        p.numel() for p in model[starts["head"] :].parameters()
    )


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_pooling_before_the_relu_changes_no_bit(norm: str) -> None:
    model = build(Architecture("cnn", 8, norm, "cifar", 3, 10), 0).train()
    usual = copy.deepcopy(model)
    for name in ("layer1", "layer2"):
        conv, normalisation, pool, relu = usual.get_submodule(name).children()
        setattr(usual, name, nn.Sequential(conv, normalisation, nn.ReLU(), pool))
        assert (type(pool), type(relu)) == (nn.MaxPool2d, nn.ReLU)
    x = images(Architecture("cnn", 8, norm, "cifar", 3, 10))
    gradients = []
    for net in (model, usual):
        net(x).logsumexp(dim=1).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert torch.equal(model(x), usual(x))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet18_stems(stem: str, norm: str) -> None:
    """The ImageNet stem reduces 4 times more than the CIFAR stem before the stages."""
    architecture = Architecture("resnet18", 64, norm, stem, 1, 5)
    model = build(architecture, 0).eval()
    with torch.inference_mode():
        assert model(images(architecture)).shape == (2, 5)
        assert model[0](images(architecture)).shape[-1] == (32 if stem == "cifar" else 8)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (norm == "batch")


def test_a_batch_of_one_image_trains_where_nothing_is_left_of_its_extent() -> None:
    """It is normalised as in evaluation and leaves no trace in the statistics; two images are PyTorch's."""
    architecture = Architecture("resnet18", 4, "batch", "imagenet", 3, 5)
    model, usual = build(architecture, 0).train(), build(architecture, 0).train()
    for module in [*usual.modules()]:
        for child, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(layer.num_features)
                plain.load_state_dict(layer.state_dict())
                setattr(module, child, plain)
    x = images(architecture)
    assert torch.equal(model(x), usual(x))
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        usual(x[:1])
    model(x[:1]).sum().backward()
    *_, last = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert last.weight.grad is not None
    assert last.weight.grad.isfinite().all()
    (name,) = (name for name, m in model.named_modules() if m is last)
    assert torch.equal(before[f"{name}.running_var"], last.running_var)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018), ("resnet34", 21_282_122)]
)
def test_parameter_counts(name: str, count: int) -> None:
    """CIFAR ResNets with option A shortcuts, 10 classes: 0.27, 0.46 and 0.85 million (He et al. 2016, table 6)."""
    model = build(Architecture(name, 16, "batch", "cifar", 3, 10), 0)
    assert sum(p.numel() for p in model.parameters()) == count


def test_penultimate_width_of_resnet34() -> None:
    head = build(Architecture("resnet34", 16, "batch", "cifar", 3, 10), 0)[-1]
    assert isinstance(head, nn.Linear)
    assert head.in_features == 512


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
def test_a_seed_decides_the_weights(name: str) -> None:
    def weights(seed: int) -> Tensor:
        model = build(Architecture(name, 4, "batch", "cifar", 1, 3), seed)
        return torch.cat([p.flatten() for p in model.parameters()])

    first = weights(1)
    torch.rand(5)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_shortcut_of_a_cifar_resnet_gets_channels_of_zeros_on_both_sides(width: int) -> None:
    block = BasicBlock(width, 2 * width, 2, "batch").eval()
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(2, width, 4, 4)
    found = block(x)
    before = width // 2
    assert torch.equal(found[:, before : before + width], x[:, :, ::2, ::2])
    assert not found[:, :before].any()
    assert not found[:, before + width :].any()


def test_lenet_takes_no_smaller_images_than_its_convolutions() -> None:
    spec = Spec((1, 15, 16), ("a", "b"))
    with pytest.raises(FedjetsError, match="model.name = 'lenet': takes images of 16 x 16 or more"):
        configured_architecture(Config.from_flat({"model.name": "lenet"}), spec)
    assert build(Architecture("lenet", 4, "batch", "cifar", 3, 10), 1)(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_lenet_is_the_papers_and_drops_units_in_training_alone() -> None:
    model = build(Architecture("lenet", 4, "batch", "cifar", 3, 10), 1)
    assert sum(p.numel() for p in model.parameters()) == 62_006
    assert model[:-1](torch.rand(2, 3, 32, 32)).shape == (2, 84)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    torch.manual_seed(5)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(5)
    assert torch.equal(model(x), first)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(4)
    torch.manual_seed(0)
    build(Architecture("resnet8", 4, "group", "cifar", 1, 3), 9)
    build_gate(4, 3, 2, 9)
    assert torch.equal(torch.rand(4), wanted)


def test_the_gate_is_a_two_layer_mlp() -> None:
    gate = build_gate(12, 6, 4, 1)
    linear = [m for m in gate.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(12, 6), (6, 4)]
    assert gate(torch.rand(3, 12)).shape == (3, 4)
    assert torch.equal(linear[0].weight, build_gate(12, 6, 4, 1).get_parameter("hidden.weight"))
    assert not torch.equal(linear[0].weight, build_gate(12, 6, 4, 2).get_parameter("hidden.weight"))


@pytest.mark.parametrize(("embedding", "inputs"), [("penultimate", 8), ("logits", 10)])
def test_the_gate_reads_the_configured_embedding(embedding: str, inputs: int) -> None:
    config = Config.from_flat({"common-expert.embedding": embedding, "gate.hidden": 6})
    gate = build_configured_gate(config, common_expert(), 5)
    assert gate(torch.rand(2, inputs)).shape == (2, 5)


@pytest.mark.parametrize("trainable", ["all", "stage", "head"])
def test_experts_that_start_from_the_common_expert(tmp_path: Path, trainable: str) -> None:
    config = Config.from_flat({"moe.trainable": trainable, "moe.init": "common"})
    common = common_expert()
    expert = build_expert(config, common, common.architecture, 2, "common")
    x = images(TINY, 8)
    start = tail_start(common.model, trainable)
    assert torch.equal(expert.eval()(common.model[:start](x)), common.model(x))
    assert all(p.requires_grad for p in expert.parameters())
    with torch.no_grad():
        next(expert.parameters()).fill_(9)
    assert not any(p.requires_grad for p in common.model.parameters())
    assert not any(bool((p == 9).any()) for p in common.model.parameters())


def test_random_experts_differ_and_take_their_own_architecture(tmp_path: Path) -> None:
    dataset, common = load_dataset("digits", tmp_path, False), common_expert()
    config = Config.from_flat({"model.name": "resnet8", "model.width": 4})
    own = expert_architecture(config, common, dataset.spec, "random")
    experts = [build_expert(config, common, own, m, "random") for m in (0, 1)]
    states = [torch.cat([p.flatten() for p in expert.parameters()]) for expert in experts]
    assert not torch.equal(*states)
    assert "layer3" in dict(experts[0].named_children())
    heads = config.model_copy(update={"moe": Config.from_flat({"moe.trainable": "head"}).moe})
    tail = build_expert(heads, common, expert_architecture(heads, common, dataset.spec, "random"), 0, "random")
    assert [tuple(p.shape) for p in tail.parameters()] == [(10, 8), (10,)]


@pytest.mark.parametrize("accuracy", [0.73125, 1.0, 0.0])
@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_save_and_load(tmp_path: Path, name: str, accuracy: float) -> None:
    expert = common_expert(Architecture(name, 4, "group", "cifar", 3, 10), accuracy=accuracy)
    path = tmp_path / "expert.safetensors"
    path.write_bytes(expert.as_bytes)
    found = load_common_expert(path)
    assert found.digest == expert.digest
    assert (found.architecture, found.mean, found.std) == (expert.architecture, expert.mean, expert.std)
    assert found.dataset == "digits"
    assert found.accuracy == pytest.approx(accuracy, abs=1e-6)
    x = images(expert.architecture)
    assert torch.equal(found.model(x), expert.model(x))
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())


def test_the_digest_survives_a_mean_of_many_digits(tmp_path: Path) -> None:
    expert = common_expert(mean=0.49139967861519607)
    path = tmp_path / "expert.safetensors"
    path.write_bytes(expert.as_bytes)
    assert load_common_expert(path).digest == expert.digest


def test_the_digest_sees_weights_and_preprocessing() -> None:
    expert = common_expert()
    changed = copy.deepcopy(expert.model)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    others = [
        common_expert(mean=0.32),
        CommonExpert(changed, expert.architecture, expert.mean, expert.std, "digits", 0.5),
    ]
    assert common_expert().digest == expert.digest
    assert expert.digest not in {other.digest for other in others}


def foreign_file(path: Path, **changes: str) -> nn.Sequential:
    """Write a ResNet-20 as ``pytorch_resnet_cifar10`` names it; return the model."""
    model = build(Architecture("resnet20", 16, "batch", "cifar", 3, 10), 4).eval()
    tensors = {
        name.removeprefix("stem.").replace("head.", "linear."): tensor for name, tensor in model.state_dict().items()
    }
    metadata = {"arch": "resnet20", "mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "dataset": "cifar10"}
    safetensors.torch.save_file(tensors, path, metadata | {"test_accuracy": "92.6"} | changes)
    return model


def test_a_file_in_the_other_naming_loads(tmp_path: Path) -> None:
    path = tmp_path / "resnet20.safetensors"
    model = foreign_file(path)
    found = load_common_expert(path)
    assert found.architecture == Architecture("resnet20", 16, "batch", "cifar", 3, 10)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert found.dataset == "cifar10"
    assert found.accuracy == pytest.approx(0.926)
    x = images(found.architecture)
    assert torch.equal(found.model(x), model(x))


def wrong_shape(path: Path) -> None:
    expert = common_expert()
    tensors = expert.model.state_dict() | {"head.weight": torch.zeros(11, 8)}
    metadata = {"name": "cnn", "width": "4", "norm": "batch", "stem": "cifar", "channels": "1", "num_classes": "10"}
    metadata |= {"mean": "0.3", "std": "0.4", "dataset": "digits", "test_accuracy": "0.5"}
    safetensors.torch.save_file(tensors, path, metadata)


def missing_tensor(path: Path) -> None:
    wrong_shape(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    del tensors["head.weight"]
    safetensors.torch.save_file(tensors, path, metadata)


def without_dimensions(path: Path) -> None:
    told = {"arch": "resnet20", "dataset": "cifar10", "mean": "0,0,0", "std": "1,1,1", "test_accuracy": "0.5"}
    safetensors.torch.save_file({"linear.weight": torch.tensor(1.0), "conv1.weight": torch.tensor(1.0)}, path, told)


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "without dimensions": without_dimensions,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x80\x04not safetensors" * 50),
    "truncated": lambda path: path.write_bytes(common_expert().as_bytes[:-10]),
    "no metadata": lambda path: safetensors.torch.save_file({"a": torch.zeros(2)}, path),
    "wrong shape": wrong_shape,
    "missing tensor": missing_tensor,
    "unknown architecture": lambda path: foreign_file(path, arch="vgg"),
    "accuracy is text": lambda path: foreign_file(path, test_accuracy="good"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_the_setting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "expert.safetensors"
    BAD_FILES[kind](path)
    with pytest.raises(FedjetsError) as caught:
        load_common_expert(path)
    assert str(caught.value).startswith("common-expert.path = ")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_accuracy_of_counts_every_batch() -> None:
    expert = common_expert()
    pixels = torch.randint(0, 256, (23, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = expert.model(expert.normalise(pixels)).argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    assert accuracy_of(expert, pixels, labels) == pytest.approx(18 / 23)
    torch.testing.assert_close(logits_of(expert, pixels, batch_size=4), logits_of(expert, pixels))
