"""`to_arviz`: named dimensions, the right draws, and a file ArviZ can read."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ppvae
from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.diagnostics import to_arviz

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

X = torch.bernoulli(torch.full((5, 4), 0.5), generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1])
GROUPS = [
    "posterior",
    "posterior_predictive",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
]


def vae(**options):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4, **options)), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 2 * 2, **options))


def cvae():
    torch.manual_seed(0)
    likelihood = conditionals.Bernoulli(nets.mlp(2 + 3, 8, 4))
    prior = conditionals.Normal(nets.mlp(3, 8, 2 * 2))
    with torch.no_grad():  # priors of classes 0, 1, 2 far from each other
        for parameter in prior.parameters():
            parameter.mul_(5)
    model = models.CVAE(likelihood, prior=prior, condition=nets.OneHot(3))
    return model, guides.Normal(nets.mlp(4 + 3, 8, 4), condition=nets.OneHot(3))


class Deep(ppvae.Program):
    """Two latents: w of no event dimension, z of two; with `observe`, a model."""

    def __init__(self, observe):
        super().__init__()
        self.observe = observe

    def forward(self, x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            loc = w[..., None, None].expand(*w.shape, 2, 3)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(2))
            if self.observe:
                total = z.sum((-2, -1))[..., None].expand(*w.shape, 4)
                pyro.sample("x", dist.Bernoulli(logits=total).to_event(1), obs=x)


def sizes(variable):
    return dict(variable.sizes)


def test_groups_and_dimensions():
    idata = to_arviz(*vae(), X, num_draws=7)
    assert sorted(idata.groups()) == sorted(GROUPS)  # no log_likelihood, no constant_data
    latent = {"chain": 1, "draw": 7, "datapoint": 5, "latent": 2}
    data = {"chain": 1, "draw": 7, "datapoint": 5, "x_dim": 4}
    for group, name, expected in [
        ("posterior", "z", latent),
        ("prior", "z", latent),
        ("posterior_predictive", "x", data),
        ("prior_predictive", "x", data),
        ("sample_stats", "log_weight", {"chain": 1, "draw": 7, "datapoint": 5}),
        ("observed_data", "x", {"datapoint": 5, "x_dim": 4}),
    ]:
        assert list(idata[group]) == [name]
        assert sizes(idata[group][name]) == expected
        assert idata[group][name].dims == tuple(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_draws", [1, 6])
def test_values_are_the_guides_draws_and_their_weights(num_draws, dtype):
    model, guide = (program.to(dtype) for program in vae())
    x = X.to(dtype)
    torch.manual_seed(8)
    weights = ppvae.log_weights(model, guide, x, num_particles=num_draws)
    random = torch.get_rng_state()
    idata = to_arviz(model, guide, x, num_draws=num_draws, seed=8)
    assert torch.equal(torch.get_rng_state(), random)
    z = weights.guide_trace.nodes["z"]["value"].detach().numpy().reshape(num_draws, 5, 2)
    assert np.array_equal(idata.posterior["z"].values[0], z)
    log_w = weights.log_w.detach().numpy()
    assert np.array_equal(idata.sample_stats["log_weight"].values[0], log_w)
    assert np.array_equal(idata.observed_data["x"].values, x.numpy())


def test_seed():
    a, b, c = (to_arviz(*vae(), X, num_draws=5, seed=seed) for seed in (1, 1, 2))
    for group in GROUPS:
        assert a[group].equals(b[group])
    assert not a.posterior.equals(c.posterior)
    assert not a.prior.equals(c.prior)


def test_predictive_is_drawn_at_the_posterior_and_prior():
    class Sharp(ppvae.Program):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1e-4).to_event(1), obs=x)

    class Elsewhere(ppvae.Program):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(10 * x, 0.1).to_event(1))

    idata = to_arviz(Sharp(), Elsewhere(), X, num_draws=50)
    z, x = idata.posterior["z"].values, idata.posterior_predictive["x"].values
    assert np.abs(z - x).max() < 1e-3
    assert np.abs(z - 10 * X.numpy()).max() < 1
    z, x = idata.prior["z"].values, idata.prior_predictive["x"].values
    assert np.abs(z - x).max() < 1e-3
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * z.size)


def test_conditional_pair():
    model, guide = cvae()
    idata = to_arviz(model, guide, X, Y, num_draws=400, seed=0)
    assert np.array_equal(idata.constant_data["y"].values, Y.numpy())
    assert idata.constant_data["y"].dims == ("datapoint",)
    prior = model.prior(model.condition(Y))
    z = idata.prior["z"].values[0]
    loc, scale = prior.mean.detach().numpy(), prior.variance.sqrt().detach().numpy()
    assert (np.abs(z.mean(0) - loc) < 5 * scale / np.sqrt(400)).all()
    assert np.abs(loc[0] - loc[1]).max() > 5 * scale.max() / np.sqrt(400)
    assert sorted(idata.groups()) == sorted([*GROUPS, "constant_data"])


def test_conditions_of_several_dimensions():
    model = models.CVAE(conditionals.Bernoulli(nets.mlp(2 + 3, 8, 4)), latent_dim=2)
    guide = guides.Normal(nets.mlp(4 + 3, 8, 4))
    idata = to_arviz(model, guide, X, torch.randn(5, 3), num_draws=3)
    assert idata.constant_data["y"].dims == ("datapoint", "y_dim_0")


def test_several_latents():
    idata = to_arviz(Deep(True), Deep(False), X, num_draws=7)
    for group in ("posterior", "prior"):
        assert sizes(idata[group]["w"]) == {"chain": 1, "draw": 7, "datapoint": 5}
        assert idata[group]["z"].dims == ("chain", "draw", "datapoint", "z_dim_0", "z_dim_1")
        assert idata[group]["z"].shape == (1, 7, 5, 2, 3)
    assert np.ptp(idata.prior["w"].values) > 0


def test_a_latent_named_latent():  # as in Pyro's tutorial; a dimension may not have its name too
    class Tutorial(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.likelihood = conditionals.Bernoulli(nets.mlp(2, 8, 4))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", self.likelihood(z), obs=x)

    guide = guides.Normal(nets.mlp(4, 4), latent="latent")
    posterior = to_arviz(Tutorial(), guide, X, num_draws=3).posterior
    assert posterior["latent"].dims == ("chain", "draw", "datapoint", "latent_dim")


def test_images():
    model = models.VAE(
        conditionals.Bernoulli(nets.conv_decoder(2, shape=(1, 4, 4), channels=(4,)), event_dim=3),
        latent_dim=2,
    )
    guide = guides.Normal(nets.conv_encoder(4, shape=(1, 4, 4), channels=(4,)))
    x = torch.ones(3, 1, 4, 4)
    names = ["channel", "row", "column"]
    idata = to_arviz(model, guide, x, num_draws=6)
    dims = ("chain", "draw", "datapoint", "x_dim_0", "x_dim_1", "x_dim_2")
    assert idata.posterior_predictive["x"].dims == dims
    named = to_arviz(model, guide, x, num_draws=6, dims={"x": names})
    assert named.observed_data["x"].dims == ("datapoint", *names)
    assert named.prior_predictive["x"].shape == (1, 6, 3, 1, 4, 4)


def test_names_and_coordinates():
    people = ["ann", "bob", "cy", "dee", "eve"]
    idata = to_arviz(
        *vae(),
        X,
        num_draws=4,
        coords={"datapoint": people, "factor": ["size", "slant"]},
        dims={"z": ["factor"], "x": ["pixel"]},
    )
    assert idata.posterior["z"].dims == ("chain", "draw", "datapoint", "factor")
    assert idata.posterior["z"].sel(datapoint="cy", factor="slant").shape == (1, 4)
    assert idata.observed_data["x"].dims == ("datapoint", "pixel")
    assert list(idata.sample_stats["datapoint"].values) == people


def test_evaluation_mode_and_store():
    model, guide = vae(batch_norm=True, dropout=0.5)
    guide.eval()
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    model.likelihood.register_forward_hook(lambda module, *_: seen.append(module.training))
    to_arviz(model, guide, X, num_draws=3)
    assert seen
    assert not any(seen)
    assert model.training
    assert not guide.training
    assert all(torch.equal(buffers[k], v) for k, v in model.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_one_datapoint():
    assert sizes(to_arviz(*vae(), X[:1], num_draws=3).posterior["z"])["datapoint"] == 1


def test_file_and_back(tmp_path):
    idata = to_arviz(*cvae(), X, Y, num_draws=4)
    path = tmp_path / "posterior.nc"
    idata.to_netcdf(path)
    read = arviz.from_netcdf(path)
    assert sorted(read.groups()) == sorted(idata.groups())
    for group in idata.groups():
        assert read[group].equals(idata[group])


def test_arviz_takes_it():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    idata = to_arviz(*vae(), X, num_draws=50, seed=0)
    summary = arviz.summary(idata, var_names=["z"], kind="stats")
    assert len(summary) == 5 * 2
    assert summary["mean"].iloc[0] == pytest.approx(
        idata.posterior["z"].values[0, :, 0, 0].mean(), abs=6e-4
    )
    arviz.plot_posterior(idata, var_names=["z"], coords={"datapoint": 0})
    arviz.plot_ppc(idata, var_names=["x"], num_pp_samples=10)
    pyplot.close("all")
    log_w = idata.sample_stats["log_weight"].values[0]
    assert np.isfinite(arviz.psislw(log_w.T)[1]).all()


@pytest.mark.parametrize("num_draws", [0, -3])
def test_bad_number_of_draws(num_draws):
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        to_arviz(*vae(), X, num_draws=num_draws)


def test_bad_data():
    with pytest.raises(ValueError, match="'x' is empty"):
        diagnostics.to_arviz(*vae(), X[:0])


@pytest.mark.cuda
def test_from_cuda():
    model, guide = (program.cuda() for program in cvae())
    idata = to_arviz(model, guide, X.cuda(), Y.cuda(), num_draws=4, seed=0)
    assert idata.posterior["z"].shape == (1, 4, 5, 2)
    assert np.array_equal(idata.constant_data["y"].values, Y.numpy())
