"""A penalty beside the loss: singular values by power iterations, and what SVI does with one."""

import copy
import functools

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import ppvae
from oracles import LinearGuide, LinearModel
from ppvae import elbo, nets
from registry import build

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, groups=5), nn.Conv2d(3, 5, 3)
    )


def kernels(net):
    return [part.weight.flatten(1) for part in net if isinstance(part, nn.Conv2d)]


@pytest.mark.usefixtures("float64")
def test_singular_values_are_those_of_the_decomposition():
    net = network()
    with torch.no_grad():
        net[1].weight.uniform_(-3, 1)
    spectral = nets.Spectral(net, weight=0.5, iterations=200)
    exact = [torch.linalg.svdvals(kernel)[0] for kernel in kernels(net)]
    expected = 0.5 * (sum(exact) + net[1].weight.abs().max())
    torch.testing.assert_close(spectral(), expected)
    first, depthwise, last = exact
    found = spectral.singular_values()
    torch.testing.assert_close(found[0], torch.stack([first, last]))  # of one shape, together
    torch.testing.assert_close(found[1], depthwise[None])


@pytest.mark.usefixtures("float64")
def test_the_gradient_of_a_singular_value_is_u_v():
    net = network()
    with torch.no_grad():
        net[1].weight.uniform_(0, 1)
    spectral = nets.Spectral(net, weight=1.0, iterations=200)
    found = torch.autograd.grad(spectral(), [part.weight for part in net])
    for gradient, kernel in zip((found[0], *found[2:]), kernels(net), strict=True):
        u, _, v = torch.linalg.svd(kernel, full_matrices=False)
        torch.testing.assert_close(gradient.flatten(1), torch.outer(u[:, 0], v[0]))
    assert found[1].count_nonzero() == 1


@pytest.mark.usefixtures("float64")
def test_kernels_of_all_sizes_and_of_zeros():
    net = nn.Sequential(nn.Conv2d(3, 70, 1), nn.Conv2d(70, 70, 1), nn.Conv2d(40, 2, 1))
    with torch.no_grad():
        net[1].weight.zero_()
    spectral = nets.Spectral(net, weight=1.0, iterations=400)
    exact = [torch.linalg.svdvals(kernel)[0] for kernel in kernels(net)]
    torch.testing.assert_close(torch.cat(spectral.singular_values()), torch.stack(exact))
    spectral().backward()
    assert not net[1].weight.grad.any()
    with torch.no_grad():
        net[1].weight.normal_()  # it has left 0: the iterations see it
    exact = torch.linalg.svdvals(kernels(net)[1])[0]
    spectral()
    torch.testing.assert_close(spectral.singular_values()[1][0], exact, rtol=1e-3, atol=0)


def test_iterations_follow_the_weights_in_training_only():
    net = network()
    spectral = nets.Spectral(net, iterations=30)
    with torch.no_grad():
        net[0].weight.normal_()
    spectral.eval()
    before = spectral.u0.clone()
    behind = spectral.singular_values()[0][0]
    spectral()
    assert torch.equal(spectral.u0, before)
    spectral.train()
    for _ in range(5):
        spectral()
    exact = torch.linalg.svdvals(kernels(net)[0])[0]
    torch.testing.assert_close(spectral.singular_values()[0][0], exact)
    assert behind < 0.9 * exact


def test_it_owns_nothing_and_is_copied_with_its_module():
    holder = nn.ModuleDict({"net": network()})
    holder["spectral"] = nets.Spectral(holder["net"])
    assert not list(holder["spectral"].parameters())
    other = copy.deepcopy(holder)
    with torch.no_grad():
        other["net"][1].weight.mul_(10)
    assert other["spectral"].eval()() > holder["spectral"].eval()()


def test_it_sees_weights_as_the_layer_uses_them():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    spectral = nets.Spectral(conv, weight=1.0, iterations=100)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(3.0)
    exact = torch.linalg.svdvals(conv.weight.flatten(1))[0]
    torch.testing.assert_close(spectral(), exact)
    spectral().backward()
    assert conv.parametrizations.weight.original0.grad is not None


def test_spectral_refuses():
    with pytest.raises(ValueError, match="no convolution and no batch norm"):
        nets.Spectral(nn.Linear(2, 2))
    for options in ({"weight": -1.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match=r"(weight|iterations) must be at least"):
            nets.Spectral(network(), **options)
    net = network()
    spectral = nets.Spectral(net)
    net.append(nn.Conv2d(5, 5, 1))
    with pytest.raises(RuntimeError, match="other convolutions than when this was made"):
        spectral()


# ------------------------------------------------------------------------------ in SVI


class Squares(nn.Module):
    """Half the sum of squares of a parameter, which is the pair's."""

    def __init__(self, parameter):
        super().__init__()
        self.held = [parameter]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self):
        self.calls.add_(1)
        return self.held[0].square().sum() / 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("size", [None, 100])
def test_a_penalty_is_per_datapoint(K, size):
    losses, gradients = [], []
    for regularized in (False, True):
        torch.manual_seed(0)
        model = LinearModel(2, 4)
        penalty = Squares(model.bias) if regularized else None
        svi = ppvae.SVI(model, LinearGuide(model), SGD, elbo.IWELBO(K), regularizer=penalty)
        losses.append(svi.step(model.draw(7), size=size))
        gradients.append(model.bias.grad.clone())
        bias = torch.linspace(-0.5, 0.5, 4)  # before the step
    rows = 7 if size is None else 100
    svi.objective(model.draw(7))  # by hand
    assert not pyro.get_param_store().keys()
    assert losses[1] - losses[0] == pytest.approx(rows * bias.square().sum().item() / 2)
    torch.testing.assert_close(gradients[1] - gradients[0], rows * bias)
    assert penalty.calls == 2


def test_a_penalty_is_for_training_only():
    model = LinearModel(2, 4)
    penalty = Squares(model.bias)
    svi = ppvae.SVI(model, LinearGuide(model), SGD, regularizer=penalty)
    x = model.draw(7)
    torch.manual_seed(0)
    loss = svi.evaluate_loss(x)
    torch.manual_seed(0)
    plain = -elbo.ELBO().evaluate(svi.model, svi.guide, x).sum().item()
    assert loss == pytest.approx(plain)
    ppvae.fit(svi, x, valid=x, epochs=1, batch_size=7, progress=False)
    assert penalty.calls == 1


def test_a_penalty_is_compiled_with_the_step(traced):
    found = []
    for compile in (False, True):
        model, guide, (x,) = build("vae_conv")
        torch.manual_seed(0)
        spectral = nets.Spectral(nn.ModuleList([model, guide]))
        svi = ppvae.SVI(model, guide, SGD, regularizer=spectral, compile=compile)
        losses = torch.tensor([svi.step(x) for _ in range(3)])
        found.append([losses, *(b.clone() for b in spectral.buffers())])
    assert len(traced) == 1
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-4)


def test_svi_refuses_what_is_no_penalty():
    model = LinearModel(2, 4)
    guide = LinearGuide(model)
    with pytest.raises(TypeError, match="regularizer must be a module"):
        ppvae.SVI(model, guide, regularizer=lambda: 0.0)
    with pytest.raises(TypeError, match="regularizer needs an estimator"):
        ppvae.SVI(model, guide, loss=Trace_ELBO(), regularizer=Squares(model.bias))
    stranger = Squares(nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="parameter"):
        ppvae.SVI(model, guide, regularizer=stranger).step(model.draw(3))
