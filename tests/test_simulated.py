"""The divergence over simulations, beside exact ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppvae
from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.local import Indexed
from ppvae.program import data_plate


def line(x, y=None):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z if y is None else z + y, 1.0), obs=x)


def normal(shift, scale):
    def guide(x, y=None):
        with data_plate(x):
            pyro.sample("z", dist.Normal((x if y is None else x - y) / 2 + shift, scale))

    return guide


def exact(shift, scale, variance=0.5):
    """Symmetric KL of N(0, variance) and N(shift, scale^2)."""
    ratio = scale**2 / variance
    return (ratio + 1 / ratio - 2 + shift**2 * (1 / variance + 1 / scale**2)) / 2


@pytest.mark.parametrize(
    ("shift", "scale", "value"),
    [(0.0, math.sqrt(0.5), 0.0), (1.5 * math.sqrt(0.5), math.sqrt(0.5), 2.25), (0.3, 0.4, None)],
)
@pytest.mark.parametrize("conditional", [False, True])
def test_normals(shift, scale, value, conditional, float64):
    assert value is None or math.isclose(exact(shift, scale), value)
    args = (torch.zeros(3), torch.tensor([-1.0, 0.0, 2.0]))[: 1 + conditional]
    found = diagnostics.simulated_divergence(
        line, normal(shift, scale), *args, num_simulations=4000, num_draws=5, seed=1
    )
    assert found.values.shape == (4000,)
    assert abs(found.mean - exact(shift, scale)) <= 4 * found.mean_se + 1e-12
    if value == 0.0:  # every log-weight is log p(x)
        assert found.values.abs().max() < 1e-12
        assert "No sign" in found.verdict[0]


def test_a_missed_mode_that_no_weight_shows(float64):
    """x = z^2 + noise has posterior modes at both signs; the guide knows the positive one."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

    def guide(x):
        root = x.clamp(min=0.05).sqrt()
        with data_plate(x):
            pyro.sample("z", dist.Normal(root, 0.1 / (2 * root)))

    found = diagnostics.simulated_divergence(model, guide, torch.zeros(1), seed=0)
    assert found.mean > 100
    assert "misses a part" in found.verdict[0]
    evidence = diagnostics.log_evidence(model, guide, torch.full((20,), 2.0), seed=0)
    assert (evidence.khat < 0.7).all()


def test_what_is_summed_out_is_summed_at_the_truth_too(float64):
    """A mixture prior, its component enumerated in the model only: the exact posterior has none."""
    places, noise = torch.tensor([-3.0, 3.0]), 0.5

    def model(x):
        with data_plate(x):
            sides = dist.Categorical(torch.tensor([0.3, 0.7]))
            c = pyro.sample("c", sides, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(places[c], 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def posterior(x):
        precision = 1 + noise**-2
        loc = (places + x[:, None] / noise**2) / precision
        sides = torch.tensor([0.3, 0.7]).log()
        sides = sides + dist.Normal(places, math.sqrt(1 + noise**2)).log_prob(x[:, None])
        parts = dist.Normal(loc, torch.full_like(loc, precision**-0.5))
        with data_plate(x):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=sides), parts))

    found = diagnostics.simulated_divergence(model, posterior, torch.zeros(2), seed=0)
    assert found.values.abs().max() < 1e-9


def test_the_packages_own_pair_and_bad_use():
    torch.manual_seed(0)
    model = models.CVAE(
        conditionals.Bernoulli(nets.mlp(2 + 3, 4)), latent_dim=2, condition=nets.OneHot(3)
    )
    guide = guides.Normal(nets.mlp(4 + 3, 4), condition=model.condition)
    x, y = torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1])
    state = torch.get_rng_state()
    whole = diagnostics.simulated_divergence(model, guide, x, y, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.mean > 0
    assert str(whole).startswith("Divergence over 1000 simulations")
    with pytest.raises(ValueError, match="num_simulations"):
        diagnostics.simulated_divergence(model, guide, x, y, num_simulations=5)
    with pytest.raises(ValueError, match="none of the arguments"):
        diagnostics.simulated_divergence(lambda x: line(2 * x), normal(0.0, 1.0), torch.zeros(2))


def test_diagnose_asks_the_model_too(float64):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

    def one_root(x):
        root = x.clamp(min=0.05).sqrt()
        with data_plate(x):
            pyro.sample("z", dist.Normal(root, 0.1 / (2 * root)))

    twos, options = torch.full((20,), 2.0), {"num_particles": 100, "seed": 0}
    report = ppvae.diagnose(model, one_root, twos, **options)
    assert report.unreliable == 0
    assert report.divergence.mean > 100
    alone = diagnostics.simulated_divergence(model, one_root, twos, seed=0)
    assert torch.equal(report.divergence.values, alone.values)
    assert "may miss a mode, which k-hat cannot see" in report.verdict[-1]
    assert "KL(p || q) + KL(q || p)" in str(report)
    # nothing else in the report moves, and it can be left out
    without = ppvae.diagnose(model, one_root, twos, num_simulations=0, **options)
    assert without.divergence is None
    assert torch.equal(without.log_evidence, report.log_evidence)
    exact = ppvae.diagnose(line, normal(0.0, math.sqrt(0.5)), torch.randn(20), **options)
    assert exact.divergence.values.abs().max() < 1e-12
    assert not any("own draws" in sentence for sentence in exact.verdict)
    with pytest.raises(ValueError, match="num_simulations must be at least 100"):
        ppvae.diagnose(line, normal(0.0, 1.0), torch.randn(20), num_simulations=5)


def test_a_guide_of_rows_has_no_divergence():
    """Its parameters say nothing of rows that the model draws."""
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 4)), latent_dim=2)
    local = guides.Normal(nets.mlp(4, 4)).local(torch.zeros(5, 4))
    args = torch.zeros(5, 4), torch.arange(5)
    report = ppvae.diagnose(Indexed(model), local, *args, num_particles=50)
    assert report.divergence is None
    assert "parameters belong to the rows" in report.absent["divergence over simulations"]
    with pytest.raises(ValueError, match="amortised"):
        diagnostics.simulated_divergence(Indexed(model), local, *args)
    unseen = ppvae.diagnose(lambda x: line(2 * x), normal(0.0, 1.0), torch.zeros(5))
    assert "none of the arguments" in unseen.absent["divergence over simulations"]
