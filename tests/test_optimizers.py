"""Muon against the singular value decomposition and AdamW."""

import copy
import math

import pytest
import torch
from torch import nn

from flowsr.training.optimizers import Muon, make_optimizer, orthogonalised


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = {
        "conv_in": nn.Conv2d(3, 8, 3), "body": nn.Conv2d(8, 6, 3), "wide": nn.Conv2d(6, 80, 1),
        "film": nn.Linear(4, 4), "conv_out": nn.Conv2d(80, 3, 3),
    }  # fmt: skip
    return nn.ModuleDict(parts)


def give_gradients(net: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(8, 72), (64, 8), (32, 32)])
def test_orthogonalised_is_close_to_the_polar_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    singular = torch.linalg.svdvals(found)
    assert 0.6 < singular.median() < 1.3
    assert singular.max() < 1.3
    cosine = (found * (u @ vt)).sum() / found.norm() / (u @ vt).norm()
    assert cosine > 0.95


def test_the_update_has_the_rms_of_adamw():
    net = network()
    optimizer = Muon(net, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    before = copy.deepcopy(net)
    give_gradients(net)
    optimizer.step()
    for name in ("body", "wide"):
        change = (net[name].weight - before[name].weight).detach()
        assert float(change.square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.3), name


def test_first_and_last_layers_biases_and_linear_layers_are_adamws():
    net, twin = network(), network()
    muon = Muon(net, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    for seed in range(3):
        for each, optimizer in ((net, muon), (twin, adamw)):
            give_gradients(each, seed)
            optimizer.step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7) == (name not in ("body.weight", "wide.weight")), name


def test_momentum_looks_ahead_as_nesterov_does():
    """Against the formulas of the reference, written out for one weight and three steps."""
    net = network()
    weight, rate = net["body"].weight, 0.01
    optimizer = Muon(net, lr=rate, momentum=0.9, weight_decay=0.0)
    expected, average = weight.detach().clone(), torch.zeros_like(weight)
    for seed in range(3):
        give_gradients(net, seed)
        gradient = weight.grad.clone()
        average = 0.9 * average + 0.1 * gradient
        update = orthogonalised((0.1 * gradient + 0.9 * average).flatten(1)).view_as(weight)
        expected -= rate * 0.2 * math.sqrt(72) * update
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_a_saved_state_goes_on_to_the_bit():
    net = network()
    optimizer = Muon(net, lr=0.01)
    give_gradients(net, 0)
    optimizer.step()
    other = copy.deepcopy(net)
    resumed = Muon(other, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((net, optimizer), (other, resumed)):
        give_gradients(each, 1)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_frozen_weights_stay():
    net = network()
    net["body"].requires_grad_(False)
    optimizer = make_optimizer("muon", net, 0.01)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8
