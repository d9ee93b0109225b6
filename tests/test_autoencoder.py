"""The autoencoder is a pair: the numbers of one written by hand, and of principal components."""

import functools

import pytest
import torch
from torch import nn

import ppvae
from oracles import LinearGuide, LinearModel, assert_mean, gradients, linear_elbo
from ppvae import conditionals, elbo, guides, models, nets

pytestmark = pytest.mark.usefixtures("float64")


def nets_of(pixels=12, code=3):
    torch.manual_seed(4)
    return nets.mlp(pixels, 8, code), nets.mlp(code, 8, pixels)


def cross_entropy(logits, x):
    return nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")


def squared_error(mean, x):
    return (mean - x).square().sum()


LOSSES = {
    "cross-entropy": (conditionals.Bernoulli, cross_entropy),
    # the squared error over 2 sigma^2 = 1, beside a constant
    "squared error": (functools.partial(conditionals.Normal, scale=0.5**0.5), squared_error),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl", ["sampled", "mixed"])
def test_it_trains_as_one_written_by_hand(name, kl):
    likelihood, loss = LOSSES[name]
    x = torch.bernoulli(torch.full((40, 12), 0.3))
    encoder, decoder = nets_of()
    model = models.Autoencoder(likelihood(decoder), latent_dim=3)
    guide = guides.PointMass(encoder)
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=0.01), elbo.ELBO(kl=kl))

    by_hand = nets_of()
    adam = torch.optim.Adam([p for net in by_hand for p in net.parameters()], lr=0.01)
    constant = svi.evaluate_loss(x) - loss(decoder(encoder(x)), x).item()
    if name == "cross-entropy":
        assert constant == pytest.approx(0.0, abs=1e-9)
    for _ in range(25):
        adam.zero_grad()
        value = loss(by_hand[1](by_hand[0](x)), x)
        value.backward()
        adam.step()
        assert svi.step(x) == pytest.approx(value.item() + constant, rel=1e-10)
    for ours, theirs in zip((encoder, decoder), by_hand, strict=True):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_a_linear_one_finds_the_principal_components():
    """Baldi & Hornik 1989: the least squared error is that of PCA."""
    from sklearn.decomposition import PCA

    torch.manual_seed(1)
    x = torch.randn(60, 5) @ torch.randn(5, 5) + torch.arange(5.0)
    encoder, decoder = nets.mlp(5, 2), nets.mlp(2, 5)
    model = models.Autoencoder(conditionals.Normal(decoder, scale=1.0), latent_dim=2)
    objective = elbo.ELBO()(model, guides.PointMass(encoder))
    optimiser = torch.optim.LBFGS(
        objective.parameters(), max_iter=800, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def closure():
        optimiser.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    optimiser.step(closure)
    pca = PCA(2).fit(x.numpy())
    best = torch.tensor(pca.inverse_transform(pca.transform(x.numpy())))
    with torch.no_grad():
        error = squared_error(decoder(encoder(x)), x)
    assert error.item() == pytest.approx(squared_error(best, x).item(), rel=1e-6)


def test_a_normal_prior_instead_penalises_the_square_of_the_code():
    x = torch.bernoulli(torch.full((40, 12), 0.3))
    encoder, decoder = nets_of()
    guide = guides.PointMass(encoder)
    plain = models.Autoencoder(conditionals.Bernoulli(decoder), latent_dim=3)
    mode = models.VAE(conditionals.Bernoulli(decoder), latent_dim=3)
    bounds = [elbo.ELBO().evaluate(model, guide, x) for model in (plain, mode)]
    with torch.no_grad():
        penalty = torch.distributions.Normal(0.0, 1.0).log_prob(encoder(x)).sum(-1)
    torch.testing.assert_close(bounds[1] - bounds[0], penalty)


def test_there_is_no_prior_to_draw_from_and_no_evidence():
    encoder, decoder = nets_of()
    model = models.Autoencoder(conditionals.Bernoulli(decoder), latent_dim=3)
    guide = guides.PointMass(encoder)
    x = torch.ones(5, 12)
    with pytest.raises(ValueError, match="no p\\(z\\) to draw from"):
        model(size=3)
    with pytest.raises(ValueError, match="a point mass has no density"):
        ppvae.diagnose(model, guide, x)
    ppvae.check_pair(model, guide, x)
    history = ppvae.fit(ppvae.SVI(model, guide), x, epochs=2, valid=x, progress=False)
    assert len(history.rows) == 2


def test_compiled_equals_eager(monkeypatch):
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs: lambda *a: graph(*a))
    torch.set_default_dtype(torch.float32)  # as it is used; the fixture sets it back
    x = torch.bernoulli(torch.full((40, 12), 0.3))
    losses = []
    for compiled in (False, True):
        encoder, decoder = nets_of()
        model = models.Autoencoder(conditionals.Bernoulli(decoder), latent_dim=3)
        guide = guides.PointMass(encoder)
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(), compile=compiled)
        losses.append([svi.step(x) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ------------------------------------------------------------------------------ sigma and beta


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_sigma_and_beta_are_one_knob(kl):
    """sigma^2 (|x - f|^2 / 2 sigma^2 + beta KL) = |x - f|^2 / 2 + sigma^2 beta KL."""
    x = torch.randn(20, 12)
    found = {}
    for sigma, beta in ((0.5, 1.0), (1.0, 0.25), (0.25, 4.0)):
        torch.manual_seed(0)
        likelihood = conditionals.Normal(nets.mlp(3, 8, 12), scale=sigma)
        model, guide = models.VAE(likelihood, latent_dim=3), guides.Normal(nets.mlp(12, 8, 6))
        objective = elbo.ELBO(beta=beta, kl=kl)(model, guide)
        loss = sigma**2 * objective(x)
        parameters = list(objective.parameters())
        found[sigma, beta] = torch.autograd.grad(loss, parameters)
    first, *others = found.values()
    for other in others:
        torch.testing.assert_close(other, first)


def test_the_best_linear_guide_of_each_beta_is_known():
    """It is the posterior under a noise of variance beta sigma^2, so its rate falls with both."""
    rates = []
    for sigma, beta in ((0.7, 0.25), (0.7, 1.0), (0.7, 4.0), (1.4, 4.0)):
        model = LinearModel(2, 4, sigma=sigma)
        x = model.draw(200)
        guide = LinearGuide(LinearModel(2, 4, sigma=beta**0.5 * sigma))
        own = list(guide.parameters())
        loss = linear_elbo(model, guide, x, beta).sum()
        assert max(g.abs().max() for g in torch.autograd.grad(loss, own)) < 1e-9
        analytic = elbo.ELBO(beta=beta, kl="analytic", gradient="pathwise")
        many = x.repeat(5, 1)
        found = gradients(lambda: analytic(model, guide)(many), own, 40, 5)  # noqa: B023
        assert_mean(found, 0.0, f"sigma {sigma}, beta {beta}")
        mean, variance = x @ guide.A.T + guide.a, guide.log_scale.mul(2).exp()
        rates.append(0.5 * (mean.square() + variance - 1 - variance.log()).sum(-1).mean().item())
    assert rates[0] > rates[1] > rates[2] > rates[3]
