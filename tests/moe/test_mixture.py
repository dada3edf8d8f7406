import torch
from torch import nn

from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.mixture import gate_scores, predict

EXPERTS, SAMPLES, EMBEDDING = 4, 6, 3


def test_scores_are_the_gates_softmax_or_those_that_all_samples_share() -> None:
    h = torch.randn(SAMPLES, EMBEDDING, generator=torch.Generator().manual_seed(1))
    gate = FlatModel(nn.Linear(EMBEDDING, EXPERTS))
    found = gate_scores(gate.module, h, torch.device("cpu"))
    torch.testing.assert_close(found, gate.module(h).softmax(dim=1).detach())
    assert not found.requires_grad
    shared = torch.tensor([0.1, 0.2, 0.7])
    assert torch.equal(gate_scores(shared, h, torch.device("cpu")), torch.stack([shared] * SAMPLES))


def test_predict_is_the_softmax_in_eval_mode() -> None:
    x = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    models = [FlatModel(build(Architecture("cnn", 4, "batch", "cifar", 1, 10), seed).train()) for seed in (0, 1)]
    before = [model.vector.clone() for model in models]
    found = predict(models, lambda rows: x[rows], 11, batch_size=4)
    assert found.shape == (2, 11, 10)
    for model, old, probs in zip(models, before, found, strict=True):
        assert torch.equal(model.vector, old)
        torch.testing.assert_close(probs, model.module.eval()(x).softmax(1).detach())
