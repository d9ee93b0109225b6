"""Latents as maps (C, H, W): every evaluator gives what it gives for the same latent as a vector.

A linear-Gaussian pair is written twice, with z as a vector of four and as a map (2, 1, 2) of the
same numbers; noise is drawn in the order of memory, so at one seed both give the same bits.
"""

import dataclasses
import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import conditionals, diagnostics, distributions, elbo, guides, models, nets, posteriors
from ppvae.local import Indexed, fit_local

SHAPE, Z, D = (2, 1, 2), 4, 3
pytestmark = pytest.mark.usefixtures("float64")


def laid_out(head, maps):
    return conditionals.Reshaped(head, SHAPE) if maps else head


def posterior(kind, maps):
    if kind == "diagonal":
        net = nn.Linear(D, 2 * Z)
        if not maps:
            return conditionals.Normal(net)
        return conditionals.Normal(nn.Sequential(net, nn.Unflatten(-1, (4, 1, 2))), event_dim=3)
    heads = {
        "full": lambda: posteriors.FullNormal(nn.Linear(D, Z * (Z + 3) // 2), Z),
        "low rank": lambda: posteriors.LowRankNormal(nn.Linear(D, 3 * Z), 1),
        "mixture": lambda: posteriors.Mixture(nn.Linear(D, 2 * (1 + 2 * Z)), 2),
        "coupling": lambda: flow(nn.Linear(D, 2 * Z + 3), posteriors.coupling, 3),
        "iaf": lambda: flow(nn.Linear(D, 2 * Z + 3), posteriors.iaf, 3),
    }
    return laid_out(heads[kind](), maps)


def flow(net, layers, context_dim):
    return posteriors.Flow(net, layers(Z, context_dim, hidden=(8,)), Z, context_dim)


def prior(kind, maps, q):
    if kind == "vamp":
        return conditionals.VampPrior(q, 3, D, support="real", mean=0.0, std=1.0)
    if kind == "flow":
        return laid_out(flow(nets.Constant(2 * Z + 1), posteriors.coupling, 1), maps)
    if kind == "mixture":
        return conditionals.Mixture(3, SHAPE if maps else Z)
    unit = conditionals.StandardNormal(SHAPE if maps else Z)
    if kind == "optimal":
        return conditionals.OptimalPrior(unit, nn.Sequential(nn.Flatten(), nn.Linear(Z, 1)))
    return unit


def pair(maps, q="diagonal", p="unit"):
    torch.manual_seed(0)
    decoder, q = nn.Linear(Z, D), posterior(q, maps)
    guide = guides.Amortized(q)
    net = nn.Sequential(nn.Flatten(-3), decoder) if maps else decoder
    model = models.VAE(conditionals.Normal(net, scale=0.7), prior=prior(p, maps, q))
    if p == "optimal":
        model.prior.normalize(guide, data(), num_draws=40)
    return model, guide


@functools.cache
def data():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def numbers(found):
    """All numbers of a result, flat, but for seconds."""
    if isinstance(found, np.ndarray) and found.dtype.kind in "fi":
        found = torch.as_tensor(found)
    if isinstance(found, torch.Tensor):
        return [found.detach().double().flatten()]
    if isinstance(found, (float, int)):
        return [torch.tensor([float(found)], dtype=torch.float64)]
    if dataclasses.is_dataclass(found):
        names = [f.name for f in dataclasses.fields(found) if not f.name.endswith("seconds")]
        found = [getattr(found, name) for name in names if not name.startswith("_")]
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [tensor for part in found for tensor in numbers(part)]
    return []


def chains(model, guide, run):
    return run(model, guide, data()[:2], num_chains=3, num_draws=20, seed=0, max_reruns=0)


def compared(model, guide):
    x, reference = data()[:2], chains(model, guide, short_hmc)
    return diagnostics.compare_posteriors(model, guide, x, reference=reference, seed=0)


short_hmc = functools.partial(diagnostics.hmc, num_warmup=20)


def objective(estimator):
    def evaluate(model, guide):
        pyro.set_rng_seed(0)
        loss = estimator(model, guide)(data())
        parameters = list({id(p): p for p in [*model.parameters(), *guide.parameters()]}.values())
        return [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    return evaluate


def arviz(model, guide):
    pytest.importorskip("arviz")
    found = diagnostics.to_arviz(model, guide, data(), num_draws=4, seed=0)
    sizes = dict(found.posterior["z"].sizes)
    names = [name for name in sizes if name.startswith("latent")]
    whole = [sizes.pop(name) for name in names]
    assert sizes == {"chain": 1, "draw": 4, "datapoint": 5}
    assert (names, whole) in ((["latent"], [4]), (["latent_0", "latent_1", "latent_2"], [2, 1, 2]))
    return [found.posterior["z"].values, found.posterior_predictive["x"].values]


def report(model, guide):
    found = ppvae.diagnose(model, guide, data(), num_particles=25, seed=0)
    assert found.posterior_mean["z"].shape == (5, Z)
    return [found, found.active_units, found.mutual_information, found.marginal_kl]


def table(frame):
    return frame.select_dtypes("number").to_numpy()


def local(model, guide):
    x, index = data(), torch.arange(5)
    own = guide.local(x)
    fit_local(Indexed(model), own, x, index, steps=3, seed=0)
    return [p.detach() for p in own.parameters()]


def matched(model, guide):
    near = guides.moment_match(model, guide, data(), num_draws=20)
    return elbo.ELBO(num_particles=3).evaluate(Indexed(model), near, data(), torch.arange(5))


EVALUATORS = {
    "log_evidence": lambda m, g: diagnostics.log_evidence(m, g, data(), num_particles=25, seed=0),
    "diagnose": report,
    "to_arviz": arviz,
    "ais": lambda m, g: diagnostics.ais(m, g, data(), num_temperatures=4, num_chains=3, seed=0),
    "bdmc": lambda m, g: diagnostics.bdmc(m, g, data(), num_temperatures=4, num_chains=3, seed=0),
    "hmc": lambda m, g: chains(m, g, short_hmc),
    "metropolis": lambda m, g: chains(m, g, diagnostics.metropolis),
    "compare_posteriors": compared,
    "sbc": lambda m, g: vars(
        diagnostics.sbc(m, g, data(), num_simulations=100, num_draws=19, seed=0)
    ),
    "gaps": lambda m, g: diagnostics.gaps(
        m, g, data(), seed=0, steps=3, num_particles=20, num_chains=3, num_temperatures=4
    ),
    "predictive_check": lambda m, g: diagnostics.predictive_check(
        m, g, data(), num_draws=20, seed=0, statistics={"mean": lambda x: x.mean(-1)}
    ),
    "fit_local": local,
    "moment_match": matched,
    "compare": lambda m, g: table(
        ppvae.compare(
            m, g, data(), [elbo.IWELBO(3)], repeats=2, timing_rounds=0, evidence_particles=20
        )
    ),
    "iwelbo": objective(elbo.IWELBO(3)),
    "dreg": objective(elbo.IWELBO(3, gradient="dreg")),
}  # fmt: skip
OF_UNITS = {  # only where guide and prior have independent units
    "free bits": objective(elbo.ELBO(kl="analytic", beta=elbo.FreeBits(0.1, per_dimension=True))),
    "free bits, drawn": objective(elbo.ELBO(beta=elbo.FreeBits(0.1, per_dimension=True))),
    "tc": objective(elbo.TCELBO(num_particles=2, beta=6.0, size=100)),
    "dip": objective(elbo.DIPELBO(diagonal=2.0, off_diagonal=1.0, kind="II")),
    "total_correlation": lambda m, g: diagnostics.total_correlation(g, data(), num_draws=50),
}


def check(evaluate, q="diagonal", p="unit"):
    of_vector, of_map = (numbers(evaluate(*pair(maps, q, p))) for maps in (False, True))
    assert of_vector and len(of_vector) == len(of_map)
    for one, other in zip(of_vector, of_map, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", [*EVALUATORS, *OF_UNITS])
def test_a_map_is_evaluated_as_its_vector(name):
    check({**EVALUATORS, **OF_UNITS}[name])


@pytest.mark.parametrize("q", ["full", "mixture", "coupling", "iaf", "low rank"])
@pytest.mark.parametrize("name", ["iwelbo", "dreg"])
def test_posteriors_with_dependent_units_take_maps(q, name):
    check(EVALUATORS[name], q)


@pytest.mark.parametrize("p", ["vamp", "flow", "mixture", "optimal"])
def test_priors_take_maps(p):
    check(EVALUATORS["log_evidence"] if p == "optimal" else EVALUATORS["iwelbo"], p=p)
    torch.manual_seed(3)
    model, _ = pair(True, p=p)
    assert model.prior().expand((6,)).sample().shape == (6, *SHAPE)


LAWS_OF_MAPS = [
    ("full", "mixture"), ("mixture", "vamp"), ("coupling", "flow"), ("iaf", "unit"),
    ("coupling", "vamp"), ("diagonal", "optimal"),
]  # fmt: skip
WEIGHS_THE_MODELS_DRAWS = {"bdmc", "sbc"}  # which iaf inverts number by number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "q", "p"),
    [
        (name, q, p)
        for name in EVALUATORS
        for q, p in LAWS_OF_MAPS
        if not (q == "iaf" and name in WEIGHS_THE_MODELS_DRAWS)
    ],
)
def test_posteriors_and_priors_of_maps_in_every_evaluator(name, q, p):
    check(EVALUATORS[name], q, p)


def test_the_exact_posterior_of_a_map_is_tight():
    torch.manual_seed(0)
    weight, bias, sigma = torch.linalg.qr(torch.randn(6, Z)).Q, torch.linspace(-1, 1, 6), 0.7
    decoder = nn.Linear(Z, 6)
    variance = 1 / (1 + 1 / sigma**2)
    encoder = nn.Linear(6, Z)
    with torch.no_grad():
        decoder.weight.copy_(weight), decoder.bias.copy_(bias)
        encoder.weight.copy_(variance / sigma**2 * weight.T)
        encoder.bias.copy_(-encoder.weight @ bias)
    net = nn.Sequential(encoder, nn.Unflatten(-1, SHAPE))
    model = models.VAE(
        conditionals.Normal(nn.Sequential(nn.Flatten(-3), decoder), scale=sigma),
        prior=conditionals.StandardNormal(SHAPE),
    )
    guide = guides.Amortized(conditionals.Normal(net, scale=variance**0.5, event_dim=3))
    x = torch.randn(5, 6)
    covariance = weight @ weight.T + sigma**2 * torch.eye(6)
    exact = dist.MultivariateNormal(bias, covariance).log_prob(x)
    weights = ppvae.log_weights(model, guide, x, num_particles=4)
    torch.testing.assert_close(weights.log_w, exact.expand(4, 5), rtol=0, atol=1e-10)
    found = diagnostics.ais(model, guide, x, num_temperatures=4, num_chains=3, seed=0)
    torch.testing.assert_close(found.log_evidence, exact, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------ laying out


def test_reshaped_is_its_vector():
    loc, tril = torch.randn(5, Z), torch.eye(Z) + 0.3 * torch.randn(5, Z, Z).tril(-1)
    base = dist.MultivariateNormal(loc, scale_tril=tril)
    fn = distributions.Reshaped(base, SHAPE)
    z = fn.expand((3, 5)).rsample()
    assert (z.shape, fn.event_shape, fn.support.event_dim) == ((3, 5, *SHAPE), SHAPE, 3)
    torch.testing.assert_close(fn.log_prob(z), base.log_prob(z.flatten(-3)))
    torch.testing.assert_close(fn.mean.flatten(-3), base.mean)
    torch.testing.assert_close(fn.variance.flatten(-3), base.variance)
    torch.testing.assert_close(fn.entropy(), base.entropy())
    other = dist.MultivariateNormal(loc.flip(0), scale_tril=tril)
    torch.testing.assert_close(
        torch.distributions.kl_divergence(fn, distributions.Reshaped(other, SHAPE)),
        torch.distributions.kl_divergence(base, other),
    )


def test_reshaped_refuses():
    base = dist.Normal(torch.zeros(5, Z), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"Reshaped\(\(2, 3\)\) lays out vectors of 6, and was"):
        distributions.Reshaped(base, (2, 3))


def test_a_semi_amortised_guide_refines_a_map():
    found = []
    for maps in (False, True):
        model, guide = pair(maps, "full")
        refined = guides.SemiAmortized(guide, model, steps=2, lr=0.1)
        pyro.set_rng_seed(0)
        found.append(ppvae.log_weights(model, refined, data()).log_w)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_factor_elbo_takes_the_units_of_a_map():
    found = []
    for maps in (False, True):
        model, guide = pair(maps)
        torch.manual_seed(2)
        loss = elbo.FactorELBO(gamma=3.0, ratio=nets.mlp(Z, 8, 1))
        svi = ppvae.SVI(model, guide, torch.optim.Adam, loss, beside=ppvae.Beside(steps=2))
        pyro.set_rng_seed(0)
        found.append(torch.tensor([svi.step(data()) for _ in range(3)]))
    torch.testing.assert_close(found[0], found[1])


def test_ex_post_priors_take_maps():
    model, guide = pair(True)
    prior = laid_out(flow(nets.Constant(2 * Z + 1), posteriors.coupling, 1), True)
    history = ppvae.fit_prior(prior, guide, data(), epochs=2, progress=False)
    assert len(history.rows) == 2
    assert models.VAE(model.likelihood, prior=prior)(size=3).shape == (3, D)


def test_the_pictures_of_a_map(tmp_path):
    model, guide = pair(True)
    found = ppvae.diagnose(model, guide, data(), num_particles=25, seed=0)
    assert len(found.table()) == 5
    found.plot()
    found.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "KL per dimension" not in " ".join(found.absent) and "z" in text
