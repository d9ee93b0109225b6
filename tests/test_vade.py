"""VaDE: the cluster summed out, drawn, or mean-field; against stock Pyro, quadrature, sklearn."""

import argparse

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.nn.functional import softplus

import oracles
import ppvae
from oracles import assert_mean, exact_gradient, trainable
from ppvae import conditionals, elbo, guides, models, nets
from ppvae.program import data_plate

D, Z, C, N = 5, 2, 3, 6


def pair(latent_dim=Z, likelihood=None):
    decoder = nets.mlp(latent_dim, 8, D, activation=nn.Tanh)
    prior = conditionals.Mixture(C, latent_dim, spread=1.5)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.3, -0.8, 0.5]))
        prior.log_scale.uniform_(-0.7, 0.2)
    model = models.VaDE((likelihood or conditionals.Bernoulli)(decoder), prior)
    guide = guides.Normal(nets.mlp(D, 8, 2 * latent_dim, activation=nn.Tanh))
    return model, guide, torch.bernoulli(torch.full((N, D), 0.4))


class ClusterGuide(ppvae.Program):
    """z ~ q(z | x), and then c: from p(c | z), or from the paper's q(c | x)."""

    def __init__(self, guide, model, mean_field=None):
        super().__init__()
        self.guide, self.model, self.mean_field = guide, model, mean_field

    def forward(self, x):
        summed = {"enumerate": "parallel"}
        with data_plate(x):
            z = pyro.sample("z", self.guide.posterior(x))
            if self.mean_field is None:
                probs = self.model.responsibilities(z)
            else:
                probs = self.mean_field
            pyro.sample("c", dist.Categorical(probs), infer=summed)


# ------------------------------------------------------------------------------ the two forms


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 50])
def test_the_cluster_summed_out_is_the_mixture_prior(K):
    model, guide, x = pair()
    marginal = models.VAE(model.likelihood, prior=model.prior)
    found = []
    for program in (model, marginal):
        torch.manual_seed(3)
        log_w = ppvae.log_weights(program, guide, x, num_particles=K).log_w
        assert log_w.shape == (K, N)
        found.append((log_w, exact_gradient(log_w.sum(), trainable(model, guide))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0][1].abs().max() > 0.1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 7])
@pytest.mark.parametrize("where", ["model", "guide"])
def test_stock_trace_enum_at_the_same_draws(where, K):
    """Summed out in the model; and with c drawn from p(c | z), which loses nothing."""
    model, guide, x = pair()
    stock_guide = guide if where == "model" else ClusterGuide(guide, model)
    stock = TraceEnum_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    losses, grads = [], []
    for loss, program in ((stock, stock_guide), (elbo.ELBO(K), guide)):
        torch.manual_seed(1)
        losses.append(loss.differentiable_loss(model, program, x))
        grads.append(exact_gradient(losses[-1], trainable(model, guide)))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)
    assert grads[0].abs().max() > 0.1


@pytest.mark.usefixtures("float64")
def test_the_evidence_by_quadrature():
    """One latent dimension: log p(x) from a grid over z with the cluster summed by hand."""
    model, guide, x = pair(latent_dim=1)
    z = torch.linspace(-12, 12, 4001)
    prior = model.prior
    log_pz = (
        prior.logits.log_softmax(0)
        + dist.Normal(prior.loc[:, 0], prior.log_scale[:, 0].exp()).log_prob(z[:, None])
    ).logsumexp(1)
    logits = model.likelihood.net(z[:, None])
    log_px = (x @ logits.T) - softplus(logits).sum(1)
    exact = (log_px + log_pz).logsumexp(1) + (z[1] - z[0]).log()
    log_w = ppvae.log_weights(model, guide, x, num_particles=20_000).log_w.detach()
    assert_mean((log_w - exact.detach()).exp(), 1.0)


class OneNormal(nn.Module):
    """The only component of a mixture, as a prior of its own."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self):
        return dist.Normal(self.mixture.loc[0], self.mixture.log_scale[0].exp()).to_event(1)


def one_cluster():
    _, guide, x = pair()
    prior = conditionals.Mixture(1, Z)
    with torch.no_grad():
        prior.log_scale.uniform_(-0.7, 0.2)
    decoder = nets.mlp(Z, 8, D, activation=nn.Tanh)
    return models.VaDE(conditionals.Bernoulli(decoder), prior), guide, x


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("estimator", "same"),
    [
        (elbo.ELBO(), elbo.ELBO()),
        (elbo.ELBO(4), elbo.ELBO(4)),
        (elbo.ELBO(2, beta=0.5), elbo.ELBO(2, beta=0.5)),
        (elbo.ELBO(2, beta=elbo.FreeBits(0.3)), elbo.ELBO(2, beta=elbo.FreeBits(0.3))),
        (elbo.ELBO(2, "stl"), elbo.ELBO(2, "stl")),
        (elbo.ELBO(2, "score"), elbo.ELBO(2, "score")),
        (elbo.ELBO(2, kl="mixed"), elbo.ELBO(2)),  # no closed form beside an enumerated latent
        (elbo.IWELBO(3), elbo.IWELBO(3)),
    ],
    ids=str,
)
def test_one_cluster_is_a_vae_with_one_normal(estimator, same):
    model, guide, x = one_cluster()
    plain = models.VAE(model.likelihood, prior=OneNormal(model.prior))
    parameters = [p for p in trainable(model, guide) if p is not model.prior.logits]
    found = []
    for program, loss in ((model, estimator), (plain, same)):
        torch.manual_seed(3)
        value = loss(program, guide)(x)
        found.append((value, exact_gradient(value, parameters)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0][1].abs().max() > 0.1


def test_one_cluster_trains_compiled_and_is_diagnosed(traced):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide, x = one_cluster()
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(2), compile=compiled)
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(3)])
    assert len(traced) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    report = ppvae.diagnose(model, guide, x, num_particles=50, seed=0)
    assert set(report.kl) == {"z"}  # one class: nothing is summed out


# ------------------------------------------------------------------------------ the paper's form


def paper_terms(model, guide, x, gamma):
    """The paper's equation 12 with given q(c | x) = gamma: closed forms, reconstruction left out.

    Written from the authors' formula, with log variances; N rows, in nats.
    """
    mu, log_var = guide.outputs(x).chunk(2, -1)
    log_var = 2 * log_var
    pi, mu_c, log_var_c = (
        model.prior.logits.softmax(0),
        model.prior.loc,
        2 * model.prior.log_scale,
    )
    spread = log_var.exp()[:, None] + (mu[:, None] - mu_c) ** 2
    log_p_z = -0.5 * (log_var_c + spread / log_var_c.exp()).sum(-1)  # without log 2 pi, twice
    return (
        (gamma * log_p_z).sum(-1)
        + 0.5 * (1 + log_var).sum(-1)
        + (gamma * (pi.log() - gamma.log())).sum(-1)
    )


@pytest.mark.usefixtures("float64")
def test_the_papers_bound_is_the_mean_field_elbo_and_lies_below():
    """q(z | x) q(c | x): equal to ELBO with c in the guide; below by E KL(q(c | x) || p(c | z))."""
    model, guide, x = pair(latent_dim=1)
    points, mass = oracles.hermite(80)
    posterior = guide.posterior(x)
    z = posterior.base_dist.loc + posterior.base_dist.scale * points[:, None, None]  # (G, N, 1)
    p_c = model.responsibilities(z)
    gamma = (mass[:, None, None] * p_c).sum(0)  # equation 16, by quadrature
    log_prior = model.prior().log_prob(z)
    kl_free = (mass[:, None] * (log_prior - posterior.log_prob(z))).sum(0)  # -KL(q(z|x) || p(z))
    mean_field = paper_terms(model, guide, x, gamma)
    lost = (mass[:, None, None] * gamma * (gamma.log() - p_c.log())).sum((0, 2))
    torch.testing.assert_close(kl_free - mean_field, lost, rtol=0, atol=1e-8)
    assert (lost > 1e-4).any() and (lost >= 0).all()
    # the exact optimum of q(c | x) is proportional to exp E log p(c | z), not to E p(c | z)
    best = (mass[:, None, None] * p_c.log()).sum(0).softmax(-1)
    assert (paper_terms(model, guide, x, best) > mean_field).all()

    with torch.no_grad():
        fit = (mass[:, None] * model.likelihood(z).log_prob(x)).sum(0)
        explicit = elbo.ELBO(20)(model, ClusterGuide(guide, model, gamma.detach()))
        drawn = torch.stack([-explicit(x) for _ in range(200)])
        assert_mean(drawn, (fit + mean_field).sum())
        log_w = ppvae.log_weights(model, guide, x, num_particles=4000).log_w
        assert_mean(log_w, fit + kl_free)


@pytest.mark.usefixtures("float64")
def test_cluster_probabilities():
    model, guide, x = pair()
    posterior = guide.posterior(x)
    joint = torch.stack(
        [
            model.prior.logits.log_softmax(0)[c]
            + dist.Normal(model.prior.loc[c], model.prior.log_scale[c].exp())
            .log_prob(posterior.mean)
            .sum(-1)
            for c in range(C)
        ],
        -1,
    )
    torch.testing.assert_close(model.responsibilities(posterior.mean), joint.softmax(-1))
    torch.manual_seed(4)
    found = model.clusters(posterior, 30)
    torch.manual_seed(4)
    torch.testing.assert_close(found, model.responsibilities(posterior.sample((30,))).mean(0))
    assert not model.clusters(posterior).requires_grad
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        model.clusters(posterior, 0)


@pytest.mark.usefixtures("float64")
def test_cluster_probabilities_by_quadrature():
    """q(c | x) is the expectation of p(c | z), with components wide enough to overlap."""
    model, guide, x = pair(latent_dim=1)
    with torch.no_grad():
        model.prior.log_scale.fill_(1.0)
    posterior = guide.posterior(x)
    points, mass = oracles.hermite(80)
    z = posterior.base_dist.loc + posterior.base_dist.scale * points[:, None, None]
    exact = (mass[:, None, None] * model.responsibilities(z)).sum(0).detach()
    assert_mean(torch.stack([model.clusters(posterior, 100) for _ in range(200)]), exact)


def test_generation_follows_the_cluster():
    prior = conditionals.Mixture(2, 1)
    prior.initialise(torch.ones(2), torch.tensor([[-9.0], [9.0]]), torch.full((2, 1), 0.1))
    model = models.VaDE(conditionals.Bernoulli(nn.Linear(1, 1)), prior)
    with torch.no_grad():
        model.likelihood.net.weight.fill_(5.0)
    c = torch.arange(40) % 2
    assert torch.equal(model(c=c)[:, 0], c.float())
    drawn = model(size=400)
    assert drawn.shape == (400, 1)
    assert_mean(drawn[:, 0], 0.5)


@pytest.mark.parametrize("c", [[-1], [0, C], [0.0, 1.0], [True]])
def test_clusters_that_do_not_exist_are_named(c):
    model, _, _ = pair()
    with pytest.raises(ValueError, match=rf"c must be integers in 0 \.\. {C - 1}, .*arange\({C}\)"):
        model(c=torch.tensor(c))
    assert model(c=torch.arange(C)).shape == (C, D)


def test_given_clusters_are_traced(traced):
    """Supervised steps, c observed: the check looks at values, and must not in a graph."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide, x = pair()
        guide.forward = lambda x, c, size=None, own=guide.forward: own(x, size=size)
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(), compile=compiled)
        torch.manual_seed(1)
        losses.append([svi.step(x, torch.arange(N) % C) for _ in range(3)])
    assert len(traced) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("prior", [conditionals.StandardNormal(Z), nets.mlp(2, 2)])
def test_a_prior_without_clusters_is_refused(prior):
    likelihood = conditionals.Bernoulli(nets.mlp(Z, D))
    with pytest.raises(TypeError, match=r"VaDE\(prior\) must be a mixture .*got a .*models\.VAE"):
        models.VaDE(likelihood, prior)


@pytest.mark.parametrize(
    "estimator",
    [elbo.ELBO(2), elbo.ELBO(2, beta=0.5), elbo.IWELBO(5, "dreg"), elbo.RenyiELBO(3, alpha=0.5)],
    ids=str,
)
def test_it_trains(estimator):
    model, guide, x = pair()
    svi = ppvae.SVI(model, guide, torch.optim.Adam, estimator)
    before = [p.clone() for p in trainable(model, guide)]
    svi.step(x)
    for old, new in zip(before, trainable(model, guide), strict=True):
        assert not torch.equal(old, new)


def test_the_pair_is_checked_saved_and_diagnosed():
    """Laws of every pair in the registry, where each is trained by stock engines too."""
    model, guide, x = pair()
    assert "gradients reach all" in repr(ppvae.check_pair(model, guide, x))
    again = pair()[:2]
    for new, old in zip(again, (model, guide), strict=True):
        new.load_state_dict(old.state_dict())
    found = []
    for programs in ((model, guide), again):
        torch.manual_seed(5)
        found.append(ppvae.log_weights(*programs, x, num_particles=3).log_w)
    assert torch.equal(*found)
    report = ppvae.diagnose(model, guide, x, num_particles=200, seed=0)
    assert (report.log_evidence >= report.elbo).all()


@pytest.mark.slow  # a compiler runs
def test_compiled_equals_eager():
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        model, guide, x = pair()
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(2), compile=compile)
        svi.prepare(x)
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ------------------------------------------------------------------------------ initialisation


def blobs(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % C
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    return centres[y] + 0.5 * torch.randn(count, Z, generator=generator), y


def test_initialise_takes_over_scikit_learns_mixture():
    model, _, _ = pair()
    codes, _ = blobs()
    mixture = model.initialise(codes, seed=4)
    torch.testing.assert_close(model.prior.loc.double(), torch.tensor(mixture.means_), rtol=1e-5,
                               atol=1e-5)  # fmt: skip
    variances = (2 * model.prior.log_scale).exp().double()
    torch.testing.assert_close(variances, torch.tensor(mixture.covariances_), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.prior.logits, torch.zeros(C))  # equal weights
    found = model.responsibilities(codes).argmax(1)
    assert found.tolist() == mixture.predict(codes.numpy()).tolist()
    assert model.prior.loc.requires_grad


def test_initialise_finds_correlated_clusters():
    """Full covariances in EM; the prior has the variances. By diagonal ones the clusters mix."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(600) % C
    long, thin = torch.randn(2, 600, generator=generator)
    codes = torch.stack([1.5 * long + 0.15 * thin + 2.5 * y, 1.5 * long - 0.15 * thin], 1)
    found = {}
    for covariance in ("diag", "full"):
        model, _, _ = pair()
        mixture = model.initialise(codes, covariance=covariance)
        found[covariance] = ppvae.metrics.clustering_accuracy(mixture.predict(codes.numpy()), y)
    assert found["full"] == 1.0 and found["diag"] < 0.8
    order = model.prior.loc[:, 0].sub(model.prior.loc[:, 1]).argsort()
    for cluster, c in enumerate(order):
        own = codes[y == cluster].double()
        torch.testing.assert_close(model.prior.loc[c].double(), own.mean(0), rtol=0, atol=1e-3)
        variances = (2 * model.prior.log_scale[c]).exp().double()
        torch.testing.assert_close(variances, own.var(0, correction=0), rtol=1e-3, atol=0)


class Fitted:
    """A mixture of scikit-learn that has found a component on one code, however wide."""

    def __init__(self, count, **options):
        self.options = options
        self.weights_ = np.array([0.66, 0.32, 0.02])  # of 60 codes: 1.2
        self.means_, self.covariances_ = np.zeros((count, Z)), np.ones((count, Z))

    def fit(self, codes):
        self.codes = codes


def test_what_is_asked_of_scikit_learns_mixture(monkeypatch):
    made = []

    def spy(count, **options):
        made.append(Fitted(count, **options))
        return made[-1]

    monkeypatch.setattr("sklearn.mixture.GaussianMixture", spy)
    model, codes = pair()[0], blobs()[0]
    with pytest.raises(ValueError, match=r"components \[2\] of 3 collapsed"):
        model.initialise(codes, seed=4, num_starts=7)
    options = made[0].options
    assert (options["n_init"], options["random_state"], options["covariance_type"]) == (
        7,
        4,
        "diag",
    )
    assert np.array_equal(made[0].codes, codes.numpy())


@pytest.mark.parametrize(
    ("option", "message"),
    [({"num_starts": 0}, "num_starts must be at least 1"), ({"covariance": "tied"}, '"full", got')],
)
def test_what_initialise_refuses(option, message):
    with pytest.raises(ValueError, match=message):
        pair()[0].initialise(blobs()[0], **option)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.randn(2, Z), r"2 codes are fewer than the 3 clusters"),
        (torch.randn(9, Z + 1), r"give \(N, 2\)"),
        (torch.full((9, Z), torch.nan), "diverged in pretraining"),
        (torch.randn(9, 1) * torch.tensor([[1.0, 0.0]]), r"dimensions \[1\] .* constant"),
        (torch.cat([torch.randn(9, Z), torch.full((1, Z), 1e3)]), "collapsed .* another seed"),
        (torch.cat([torch.randn(9, Z), torch.full((9, Z), 50.0)]), "collapsed .* duplicates"),
    ],
)
def test_codes_that_cannot_start_a_mixture(codes, message):
    model, _, _ = pair()
    before = model.prior.loc.clone()
    with pytest.raises(ValueError, match=message):
        model.initialise(codes)
    assert torch.equal(model.prior.loc, before)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda x: x[:2], "2 points are fewer than the 3 components"),
        (lambda x: x[:2].repeat(5, 1), r"2 different points \(10 rows\) are fewer than the 3"),
    ],
)
def test_fit_refuses_fewer_rows_than_clusters(rows, message):
    model, guide, _ = pair()
    x = torch.eye(D)
    svi = ppvae.SVI(model, guide)
    with pytest.raises(ValueError, match=message):
        ppvae.fit(svi, rows(x), epochs=1, progress=False)
    assert svi.num_steps == 0
    ppvae.fit(svi, x, epochs=1, batch_size=2, progress=False)  # a batch may have fewer
    assert svi.num_steps == 3


# ------------------------------------------------------------------------------ the example


@pytest.fixture
def example(monkeypatch):
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    threads = torch.get_num_threads()
    yield importlib.import_module("vade")
    torch.set_num_threads(threads)


def test_images_are_distorted_in_training_alone(example, monkeypatch):
    x = torch.rand(4, 28 * 28)
    distorted = example.Distorted(nn.Identity(), (1, 28, 28))
    seen = distorted(x)
    assert seen.shape == x.shape and seen.min() >= 0 and seen.max() <= 1 + 1e-6
    assert (seen - x).abs().mean(1).min() > 0.05
    assert not torch.allclose(*distorted(x[:1].expand(2, -1)))  # each row in its own way
    for same in (distorted.eval(), example.Distorted(nn.Identity(), (1, 28, 28), strength=0.0)):
        assert torch.equal(same(x), x)
    # The largest move to the left and up, and nothing else: three pixels.
    drawn = torch.tensor([[1, 1, 0.5, 0.5, 0.5, 0.5]])
    monkeypatch.setattr(torch, "rand", lambda rows, count, device: drawn)
    images, moved = x[:1].view(28, 28), distorted.distort(x[:1]).view(28, 28)
    torch.testing.assert_close(moved[:25, :25], images[3:, 3:], rtol=0, atol=1e-4)
    assert moved[25:].abs().max() < 1e-4


def test_the_example_starts_at_the_most_typical_mixture(example):
    from sklearn.metrics import adjusted_rand_score

    generator, count = torch.Generator().manual_seed(1), 9
    centres = (20 * torch.rand(count, Z, generator=generator)).repeat(30, 1)
    x = centres + 0.5 * torch.randn(30 * count, Z, generator=generator)
    encoder = nn.Linear(Z, 2 * Z)  # whose means are x itself
    encoder.weight.data.copy_(torch.eye(Z).repeat(2, 1))
    encoder.bias.data.zero_()
    model = models.VaDE(conditionals.Bernoulli(nn.Linear(Z, D)), conditionals.Mixture(count, Z))
    for seed in range(5, 25):  # until it is not the first of six
        fits = [model.initialise(x, 1_000 * seed + number, 1, "full") for number in range(6)]
        found = [fit.predict(x.numpy()) for fit in fits]
        agreement = [sum(adjusted_rand_score(a, b) for b in found) for a in found]
        best = agreement.index(max(agreement))
        if best > 0:
            break
    assert best > 0 and agreement[best] > agreement[0] + 0.01

    args = argparse.Namespace(num_starts=6, covariance="full", latent_dim=Z)
    clusters = example.start(model, guides.Normal(encoder), x, args, seed)
    assert clusters.tolist() == found[best].tolist()
    torch.testing.assert_close(model.prior.loc.detach(), torch.tensor(fits[best].means_).float())
    assert torch.equal(encoder(x)[:, :Z], x) and (encoder(x)[:, Z:] == -2).all()


def test_an_example_evaluates_without_distortion(example):
    encoder = example.Distorted(nets.mlp(64, 8, 2 * Z), (1, 8, 8))
    guide, x = guides.Normal(encoder), torch.rand(30, 64)
    codes = example.means(guide, x)
    assert torch.equal(codes, encoder.net(x)[:, :Z]) and encoder.training
    assert not torch.allclose(guide.posterior(x).mean, codes)


@pytest.mark.filterwarnings("ignore::ppvae.metrics.UnusedClusterWarning")  # 4 epochs are few
@pytest.mark.slow
def test_the_example(example, tmp_path, capsys):
    import json

    options = ["--quick", "--device", "cpu", "--num-seeds", "1", "--pretrain-epochs", "4"]
    options += ["--num-starts", "3"]
    example.main([*options, "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    for method in example.METHODS:
        assert f"\n  {method} " in shown
    assert {path.name for path in tmp_path.iterdir()} == set(example.FILES)
    scores = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(scores) == 1 + len(example.METHODS)
    accuracy = json.loads((tmp_path / "results.json").read_text())["accuracy"]
    assert all(0.1 <= a <= 1 for row in accuracy.values() for a in row)
    with pytest.raises(ValueError, match="already holds"):
        example.main([*options, "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="800 rows are fewer than 900 clusters"):
        example.main([*options, "--clusters", "900", "--out", str(tmp_path), "--overwrite"])
