"""Priors that are fitted to codes: maximum likelihood, in closed form where there is one."""

import functools

import pytest
import torch
from torch import nn

import ppvae
from ppvae import conditionals, diagnostics, elbo, guides, models, nets, posteriors

ADAM = functools.partial(torch.optim.Adam, lr=0.05)


def fitted(prior, guide, x, **options):
    options = {"epochs": 60, "optim": ADAM, "batch_size": 500, "progress": False, **options}
    return ppvae.fit_prior(prior, guide, x, **options)


def points():
    """An autoencoder's guide whose codes are the data, of a correlated normal."""
    torch.manual_seed(0)
    z = torch.randn(500, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]) + torch.tensor([3.0, -1.0])
    return guides.PointMass(nn.Identity()), z


def test_a_normal_has_the_moments_of_the_codes():
    guide, z = points()
    prior = conditionals.Mixture(1, 2)
    fitted(prior, guide, z, epochs=400)
    torch.testing.assert_close(prior.loc[0].detach(), z.mean(0), rtol=0, atol=0.02)
    scale = prior.log_scale[0].exp().detach()
    torch.testing.assert_close(scale, z.std(0, correction=0), rtol=0.02, atol=0)


def test_a_flow_fits_what_a_diagonal_normal_cannot():
    guide, z = points()
    diagonal = conditionals.Mixture(1, 2)
    layers = posteriors.coupling(2, context_dim=1, num_layers=2, hidden=[16])
    flow = posteriors.Flow(nets.Constant(2 * 2 + 1), layers, 2, context_dim=1)
    first = fitted(diagonal, guide, z, epochs=300).rows[-1]["train_objective"]
    second = fitted(flow, guide, z, epochs=300).rows[-1]["train_objective"]
    correlation = torch.corrcoef(z.T)[0, 1]
    gain = -0.5 * (1 - correlation**2).log()  # of the exact covariance
    assert second - first == pytest.approx(float(gain), abs=0.1)
    assert flow().sample((5,)).shape == (5, 2)


def test_frequencies_of_codes():
    torch.manual_seed(0)
    book = nets.Codebook(4, 2)
    guide = guides.Quantized(nn.Unflatten(-1, (2, 1, 1)), book)
    x = torch.randn(500, 2)
    prior = conditionals.CodePrior(book, (1, 1), nets.Unigram(4))
    fitted(prior, guide, x, epochs=200)
    share = torch.bincount(guide.indices(x).flatten(), minlength=4) / 500
    found = prior.net.logits.softmax(0).detach()
    torch.testing.assert_close(found, share, rtol=0, atol=0.01)


def test_the_guide_stays_and_the_model_gains():
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((200, 6), 0.4))
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 6)), latent_dim=2)
    guide = guides.Normal(nets.mlp(6, 8, 4))
    with torch.no_grad():
        guide.conditional.net.layers[2].bias[:2] = 4.0  # codes far from the prior
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    prior = conditionals.Mixture(3, 2)
    fitted(prior, guide, x, epochs=100)
    other = models.VAE(model.likelihood, prior=prior)
    gain = elbo.ELBO().evaluate(other, guide, x) - elbo.ELBO().evaluate(model, guide, x)
    assert gain.mean() > 10
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())


def test_a_guide_without_the_latent():
    guide, z = points()
    with pytest.raises(ValueError, match=r"latent='w'.*no such site, but \['z'\]"):
        fitted(conditionals.Mixture(1, 2), guide, z, latent="w")


def test_priors_and_codes_that_do_not_fit():
    guide, z = points()
    with pytest.raises(ValueError, match=r"values of shape \(3,\), and the guide's 'z' has \(2,\)"):
        fitted(conditionals.Mixture(1, 3), guide, z)
    z[7, 1] = torch.nan
    with pytest.raises(ValueError, match="draws NaN or infinity in 'z' for 1 of 500 rows"):
        fitted(conditionals.Mixture(1, 2), guide, z)
    book = nets.Codebook(4, 2)
    broken = guides.Quantized(nn.Unflatten(-1, (2, 1, 1)), book)
    with pytest.raises(ValueError, match="draws NaN or infinity in 'z' for 1 of 500 rows"):
        fitted(conditionals.CodePrior(book, (1, 1), nets.Unigram(4)), broken, z)


def test_maps_as_latents_from_training_to_the_report():
    """A latent of shape (C, h, w): prior, guide, mixture after training, diagnosis, ArviZ."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((60, 1, 4, 4), 0.4))
    decoder = nets.upsample(2, 1, channels=(4,))
    model = models.VAE(
        conditionals.Bernoulli(decoder, event_dim=3), prior=conditionals.StandardNormal((2, 2, 2))
    )
    guide = guides.Amortized(conditionals.Normal(nets.downsample(1, 4, channels=(4,)), event_dim=3))
    ppvae.fit(ppvae.SVI(model, guide), x, epochs=1, progress=False)
    prior = conditionals.Mixture(3, (2, 2, 2))
    fitted(prior, guide, x, epochs=1)
    other = models.VAE(model.likelihood, prior=prior)
    assert other(size=3).shape == (3, 1, 4, 4)
    report = diagnostics.diagnose(other, guide, x, num_particles=50)
    assert report.posterior_mean["z"].shape[0] == 60
    draws = diagnostics.to_arviz(other, guide, x[:3], num_draws=10)
    assert draws.posterior["z"].shape[-3:] == (2, 2, 2)
