"""Annealed importance bounds: below log p(x), rising, and tighter than plain draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import oracles
import ppvae
from oracles import LinearGuide, LinearModel, assert_below, assert_mean, trainable
from ppvae import conditionals, elbo, guides, models, nets
from ppvae.program import data_plate
from registry import build

pytestmark = pytest.mark.usefixtures("float64")


def values(estimator, model, guide, x, repeats) -> torch.Tensor:
    """Sums over the rows, of independent bounds: ``(repeats,)``."""
    found = estimator.evaluate(model, guide, x.repeat(repeats, 1))
    return found.reshape(repeats, len(x)).sum(1)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("gradients", [True, False])
def test_without_a_step_it_is_iwelbo(K, gradients) -> None:
    model = LinearModel(2, 4)
    guide = LinearGuide(model, scale=0.6, shift=0.3)
    x, found = model.draw(5), []
    for estimator in (elbo.AnnealedELBO(K, step=0.0, num_temperatures=3), elbo.IWELBO(K)):
        torch.manual_seed(0)
        if gradients:
            loss = estimator(model, guide)(x)
            found.append(oracles.exact_gradient(loss, trainable(model, guide)))
        else:
            found.append(estimator.evaluate(model, guide, x))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("step", [0.5, 1.5, 4.0])
def test_it_is_a_bound_whatever_the_step(step) -> None:
    """E w = p(x) exactly, so the mean of exp is, too, where it has a small variance."""
    model = LinearModel(2, 4)
    guide = LinearGuide(model, scale=1.3, shift=0.3)
    x = model.draw(5)
    exact = model.log_evidence(x)
    estimator = elbo.AnnealedELBO(1, num_temperatures=3, step=step)
    assert_below(values(estimator, model, guide, x, 2000), exact.sum().item())
    many = estimator.evaluate(model, guide, x.repeat(20_000, 1)).reshape(-1, 5)
    if step == 0.5:
        assert_mean((many - exact).exp().detach(), 1.0)


def test_it_rises_with_the_temperatures_and_is_tighter_than_as_many_plain_draws() -> None:
    model = LinearModel(10, 12)
    guide = LinearGuide(model, scale=0.5, shift=0.6)
    x = model.draw(4)
    exact, means, errors = model.log_evidence(x).sum().item(), [], []
    counts = (1, 4, 16, 64)
    for T in counts:
        found = values(elbo.AnnealedELBO(1, num_temperatures=T, step=1.2), model, guide, x, 400)
        assert_below(found, exact)
        means.append(found.mean().item()), errors.append(found.std().item() / 20)
    for i in range(len(counts) - 1):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    plain = values(elbo.IWELBO(66), model, guide, x, 400)  # decoder rows of the last one
    difference = means[-1] - plain.mean().item()
    assert difference > 4 * math.hypot(errors[-1], plain.std().item() / 20)


def test_the_gradient_is_that_of_the_value() -> None:
    """At the same noise, by differences, in every parameter of model and guide."""
    model = oracles.TwoLevelModel()
    guide = oracles.TwoLevelGuide(model, bottom_up=True, shift=0.2, scale=1.2)
    x = torch.linspace(-1.0, 1.5, 4)
    for K in (1, 2):
        objective = elbo.AnnealedELBO(K, num_temperatures=3, step=0.4)(model, guide)

        def loss(o=objective):
            torch.manual_seed(3)
            return o(x)

        for parameter in trainable(model, guide):
            (grad,) = torch.autograd.grad(loss(), parameter)
            flat = parameter.data.view(-1)
            for i in range(flat.numel()):
                kept, ends = flat[i].item(), []
                for h in (1e-5, -1e-5):
                    flat[i] = kept + h
                    ends.append(loss().item())
                flat[i] = kept
                assert grad.reshape(-1)[i].item() == pytest.approx(
                    (ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6
                )


def decoder(activation, net=None):
    """A pair of two latents, and the bias that all its units share."""
    net = net or nets.mlp(2, 16, 8, activation=activation)
    for parameter in net.parameters():
        parameter.data *= 4
    return models.VAE(conditionals.Bernoulli(net), latent_dim=2), guides.Normal(nets.mlp(8, 4))


def test_its_gradient_is_that_of_the_mean_only_if_slopes_do_not_jump() -> None:
    """Differences of the mean in a bias, against the mean of gradients, at the same noise."""
    estimator, found = elbo.AnnealedELBO(num_temperatures=4, step=0.5), {}
    for activation in (torch.nn.Softplus, torch.nn.ReLU):
        torch.manual_seed(0)
        model, guide = decoder(activation)
        bias = next(p for p in model.parameters() if p.shape == (16,))
        rows, h, off = (torch.rand(1, 8) > 0.5).double().expand(5000, 8), 0.05, []
        for seed in range(8):
            ends = []
            for sign in (1, -1):
                bias.data += sign * h
                torch.manual_seed(seed)
                ends.append(-estimator.evaluate(model, guide, rows).mean())
                bias.data -= sign * h
            torch.manual_seed(seed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("ppvae.elbo.annealed._require_smooth", lambda *_: None)
                loss = estimator(model, guide)(rows) / len(rows)
            (slope,) = torch.autograd.grad(loss, bias)
            off.append(slope.sum() - (ends[0] - ends[1]) / (2 * h))
        found[activation] = torch.stack(off)
    assert found[torch.nn.Softplus].abs().max() < 1e-3
    off = found[torch.nn.ReLU]  # why it is refused
    assert off.mean().abs() > 6 * off.std() / 8**0.5


class Functional(torch.nn.Module):
    def forward(self, z):
        return 4 * torch.nn.functional.relu(z @ torch.ones(2, 8))


JUMPS = {
    "ReLU": lambda: decoder(torch.nn.ReLU),
    "LeakyReLU": lambda: decoder(torch.nn.LeakyReLU),
    "PReLU": lambda: decoder(torch.nn.PReLU),
    "a function": lambda: decoder(None, Functional()),
    "between latents": lambda: (oracles.TwoLevelModel(), between(torch.relu)),
}


def between(activation):
    """A guide of two latents, of which the second one sees the first."""

    def guide(x):
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("z2", dist.Normal(activation(z1), 1.0))

    return guide


@pytest.mark.parametrize("case", JUMPS)
@pytest.mark.parametrize("trained", ["both", "model"])
def test_slopes_that_jump_are_refused_in_training(case, trained) -> None:
    model, guide = JUMPS[case]()
    x = torch.linspace(0.0, 1.0, 4) if case == "between latents" else torch.ones(3, 8)
    if trained == "model" and isinstance(guide, torch.nn.Module):
        guide.requires_grad_(False)
    estimator = elbo.AnnealedELBO(num_temperatures=2)
    with pytest.raises(ValueError, match=r"slope of log p.*jumps.*activation=nn.Softplus"):
        estimator(model, guide)(x)
    assert estimator.evaluate(model, guide, x).isfinite().all()
    elbo.AnnealedELBO(step=0.0)(model, guide)(x)


def test_slopes_that_do_not_jump_are_not_refused() -> None:
    """An encoder may have kinks in x; a smooth activation in z has none."""
    for activation in (torch.nn.Softplus, torch.nn.Tanh, torch.nn.SiLU, torch.nn.GELU):
        net = nets.mlp(2, 16, 8, activation=activation)
        model = models.VAE(conditionals.Bernoulli(net), latent_dim=2)
        guide = guides.Normal(nets.mlp(8, 16, 4))
        assert elbo.AnnealedELBO(num_temperatures=2)(model, guide)(torch.ones(3, 8)).isfinite()
    assert elbo.AnnealedELBO()(oracles.TwoLevelModel(), between(torch.tanh))(torch.ones(3))

    def laplace(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Laplace(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    loc = torch.tensor(0.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"jumps \(Laplace\)"):
        elbo.AnnealedELBO()(laplace, guide)(torch.ones(3) + loc)


def test_training_by_it_fits_a_model_that_a_poor_guide_serves() -> None:
    """A guide that is the prior: the ELBO cannot follow the data, the annealed bound can."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x = torch.randn(100, 1) @ torch.tensor([[1.5, -1.0, 0.5]]) + 0.5 * torch.randn(100, 3)
    truth = dist.MultivariateNormal(torch.zeros(3), x.T @ x / 100).log_prob(x).mean().item()
    found = {}
    for name, loss in {
        "plain": elbo.ELBO(1),
        "annealed": elbo.AnnealedELBO(1, num_temperatures=6, step=0.5),
    }.items():
        torch.manual_seed(1)
        likelihood = conditionals.Normal(nets.mlp(1, 3), scale=0.5)
        model = models.VAE(likelihood, latent_dim=1)
        guide = guides.Normal(nets.mlp(3, 2))
        for parameter in guide.parameters():
            torch.nn.init.zeros_(parameter).requires_grad_(False)
        svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.05), loss)
        for _ in range(80):
            svi.step(x)
        evidence = ppvae.diagnostics.log_evidence(model, guide, x, num_particles=5000, seed=0)
        found[name] = evidence.log_evidence.mean().item()
    assert found["annealed"] > found["plain"] + 0.3
    assert found["annealed"] <= truth + 0.05


def test_what_is_refused() -> None:
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Gamma(2.0, 1.0).expand([len(x)]))

    with pytest.raises(ValueError, match="on the real line, and the values of 'z'"):
        elbo.AnnealedELBO()(model, guide)(torch.ones(3))
    with pytest.raises(ValueError, match="cannot differentiate"):
        elbo.AnnealedELBO()(oracles.BeliefNet(), oracles.BeliefGuide())(torch.zeros(2, 4))
    model, guide, args = build("semi_implicit")
    with pytest.raises(ValueError, match="needs densities at given"):
        elbo.AnnealedELBO()(model, guide)(*args)
    for options in ({"num_temperatures": 0}, {"step": -1.0}, {"keep": 1.0}):
        with pytest.raises(ValueError, match="AnnealedELBO"):
            elbo.AnnealedELBO(**options)
    with pytest.raises(TypeError, match="step must be a number"):
        elbo.AnnealedELBO(step="big")
