"""Draws by purpose, and the generators of torch's own."""

import torch

from fedjets_flwr.seeds import seed_layers


def test_layers_draw_as_after_torchs_own_seed() -> None:
    torch.manual_seed(2**62 + 5)
    wanted = torch.nn.functional.dropout(torch.ones(50))
    seed_layers(2**62 + 5)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(50)), wanted)
    assert not torch.equal(torch.nn.functional.dropout(torch.ones(50)), wanted)
