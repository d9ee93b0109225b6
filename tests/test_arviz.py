"""`to_arviz`: named dimensions, the right draws, and a file ArviZ can read."""

import dataclasses
import itertools
import warnings

import matplotlib.pyplot
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
    "log_likelihood",
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


def groups(idata):
    """Their names, on ArviZ 0.x (InferenceData) and 1.x (DataTree)."""
    return sorted(idata.children) if hasattr(idata, "children") else sorted(idata.groups())


def test_groups_and_dimensions():
    idata = to_arviz(*vae(), X, num_draws=7)
    assert groups(idata) == sorted(GROUPS)  # no constant_data
    latent = {"chain": 1, "draw": 7, "datapoint": 5, "latent": 2}
    data = {"chain": 1, "draw": 7, "datapoint": 5, "x_dim": 4}
    for group, name, expected in [
        ("posterior", "z", latent),
        ("prior", "z", latent),
        ("posterior_predictive", "x", data),
        ("prior_predictive", "x", data),
        ("sample_stats", "log_weight", {"chain": 1, "draw": 7, "datapoint": 5}),
        ("sample_stats", "khat", {"datapoint": 5}),
        ("sample_stats", "ess", {"datapoint": 5}),
        ("log_likelihood", "x", {"datapoint": 5}),
        ("sample_stats", "log_evidence_se", {"datapoint": 5}),
        ("observed_data", "x", {"datapoint": 5, "x_dim": 4}),
    ]:
        assert name in idata[group].data_vars
        assert len(idata[group].data_vars) == {"sample_stats": 4}.get(group, 1)
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
    assert groups(idata) == sorted([*GROUPS, "constant_data"])


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
    assert groups(read) == groups(idata)
    for group in groups(idata):
        assert read[group].equals(idata[group])


@pytest.mark.filterwarnings("ignore:Variables x in")  # arviz 1.x: x is binary
def test_arviz_takes_it():
    from matplotlib import pyplot

    idata = to_arviz(*vae(), X, num_draws=50, seed=0)
    summary = arviz.summary(idata, var_names=["z"], kind="stats")
    assert len(summary) == 5 * 2
    assert summary["mean"].iloc[0] == pytest.approx(
        idata.posterior["z"].values[0, :, 0, 0].mean(), abs=6e-4
    )
    if arviz.__version__.startswith("0."):
        arviz.plot_posterior(idata, var_names=["z"], coords={"datapoint": 0})
        arviz.plot_ppc(idata, var_names=["x"], num_pp_samples=10)
        log_w = idata.sample_stats["log_weight"].values[0]
        assert np.isfinite(arviz.psislw(log_w.T)[1]).all()
    else:  # other names there
        arviz.plot_dist(idata, var_names=["z"], coords={"datapoint": 0}, backend="matplotlib")
        arviz.plot_ppc_dist(idata, var_names=["x"], num_samples=10, backend="matplotlib")
    arviz.plot_forest(idata, var_names=["z"], coords={"datapoint": [0, 1]})
    arviz.plot_pair(idata, var_names=["z"], coords={"datapoint": 0})
    pyplot.close("all")


# -- what is drawn otherwise -------------------------------------------------------------------


MEANS = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
MARK = {"enumerate": "parallel"}


def clusters(summed_in="model", one_hot=False):
    """z in one of three clusters c, which is summed out in the model or in the guide."""

    def draw(probs, infer):
        if one_hot:
            return pyro.sample("c", dist.OneHotCategorical(probs), infer=infer)
        return pyro.sample("c", dist.Categorical(probs), infer=infer)

    def model(x):
        with pyro.plate("data", len(x)):
            c = draw(torch.ones(3) / 3, MARK if summed_in == "model" else None)
            mean = c @ MEANS if one_hot else MEANS[c]
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if summed_in == "guide":
                draw(torch.tensor([0.2, 0.3, 0.5]), MARK)
            pyro.sample("z", dist.Normal(0.8 * x, 0.447).to_event(1))

    return model, guide


@pytest.mark.parametrize("num_draws", [1, 2000])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("summed_in", ["model", "guide"])
def test_a_latent_that_is_summed_out_is_drawn_from_its_conditional(summed_in, one_hot, num_draws):
    x = torch.tensor([[0.0, 1.0], [-3.0, 0.5], [1.0, 2.0], [0.2, 2.0]])
    idata = to_arviz(*clusters(summed_in, one_hot), x, num_draws=num_draws, seed=0)
    c, z = idata.posterior["c"], torch.tensor(idata.posterior["z"].values[0])
    assert c.dims == ("chain", "draw", "datapoint", *(["c_dim"] if one_hot else []))
    assert sizes(idata.prior["c"]) == sizes(c)
    assert idata.posterior_predictive["x"].shape == (1, num_draws, 4, 2)
    drawn = torch.tensor(c.values[0])
    classes = drawn if one_hot else torch.nn.functional.one_hot(drawn.long(), 3).float()
    log_p = torch.stack([dist.Normal(m, 1.0).log_prob(z).sum(-1) for m in MEANS], -1)
    exact = log_p.softmax(-1)  # p(c | z), of each draw
    error = (classes - exact).mean(0)
    se = ((exact * (1 - exact)).sum(0)).sqrt() / num_draws
    assert (error.abs() < 4.5 * se + 1e-4).all() or num_draws == 1


def test_latents_that_are_summed_out_in_an_inner_plate():
    """Nothing is drawn by the guide; c of a row and d of its pixels, against all 16 states."""
    states = list(itertools.product((0, 1), repeat=4))
    x = torch.tensor([[0.0, 1.0, 0.6], [2.0, 1.5, 3.0]])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])), infer=MARK)
            with pyro.plate("pixels", 3, dim=-2):
                d = pyro.sample("d", dist.Bernoulli(0.3 + 0.4 * c), infer=MARK)
                pyro.sample("x", dist.Normal(d + c, 1.0), obs=x.T)

    log_p = torch.stack([
        dist.Categorical(torch.tensor([0.4, 0.6])).log_prob(torch.tensor(c))
        + (dist.Bernoulli(0.3 + 0.4 * c).log_prob(torch.tensor(d).float())
           + dist.Normal(torch.tensor(d) + c, 1.0).log_prob(x)).sum(-1)
        for c, *d in states
    ])  # fmt: skip
    exact = log_p.softmax(0).T @ torch.tensor(states).float()  # (row, c and d of each pixel)
    draws = 4000
    idata = to_arviz(model, lambda x: None, x, num_draws=draws, seed=0)
    assert idata.posterior["d"].dims == ("chain", "draw", "pixels", "datapoint")
    c, d = (torch.tensor(idata.posterior[name].values[0]).float().mean(0) for name in "cd")
    found = torch.cat([c[:, None], d.T], 1)
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_chains_have_no_draws_of_latents_that_are_summed_out():
    x = torch.tensor([[0.0, 1.0], [-3.0, 0.5]])
    pair = clusters("model")
    draws = diagnostics.hmc(*pair, x, num_draws=20, num_warmup=20, max_reruns=0, seed=0)
    assert list(diagnostics.chains_to_arviz(draws).posterior.data_vars) == ["z"]


def test_a_draw_that_depends_on_a_latent_that_is_summed_out():
    model, _ = clusters("guide")

    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer=MARK)
            pyro.sample("z", dist.Normal(MEANS[c], 1.0).to_event(1))

    with pytest.raises(ValueError, match="depends on one that it enumerates; draw both"):
        to_arviz(model, guide, torch.zeros(4, 2))


def test_a_global_latent():
    def model(x):
        t = pyro.sample("t", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(t, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("t", dist.Normal(x.mean(0) * 5 / 6, 6**-0.5).to_event(1))  # the posterior

    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="joint=True"):
        to_arviz(model, guide, x)
    idata = to_arviz(model, guide, x, num_draws=30, joint=True, seed=0)
    assert idata.posterior["t"].dims == ("chain", "draw", "latent")
    assert idata.posterior_predictive["x"].shape == (1, 30, 5, 2)
    assert idata.sample_stats["log_weight"].dims == ("chain", "draw")
    covariance = torch.eye(5) + torch.ones(5, 5)
    exact = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(x.T).sum()
    assert float(idata.log_likelihood["x"]) == pytest.approx(exact.item(), abs=1e-4)
    assert idata.log_likelihood["x"].dims == ()


def test_a_likelihood_that_cannot_be_drawn():
    model = models.VAE(conditionals.BagOfWords(nets.mlp(2, 7)), latent_dim=2)
    guide = guides.Normal(nets.mlp(7, 4))
    x = torch.poisson(torch.ones(5, 7))
    with pytest.raises(ValueError, match=r"WordCounts needs total_count.*predictive=False exports"):
        to_arviz(model, guide, x, num_draws=5)
    idata = to_arviz(model, guide, x, num_draws=5, predictive=False)
    assert groups(idata) == sorted(set(GROUPS) - {"posterior_predictive", "prior_predictive"})
    assert sizes(idata.prior["z"]) == {"chain": 1, "draw": 5, "datapoint": 5, "latent": 2}


# -- numbers of a report, Markov chains --------------------------------------------------------


def test_the_log_likelihood_is_marginal():
    model, guide = vae()
    evidence = diagnostics.log_evidence(model, guide, X, num_particles=200, seed=3)
    idata = to_arviz(model, guide, X, num_draws=200, seed=3)
    assert np.allclose(idata.log_likelihood["x"].values, evidence.log_evidence.numpy())
    errors = idata.sample_stats["log_evidence_se"].values
    assert np.allclose(errors, evidence.log_evidence_se.numpy())
    assert np.array_equal(idata.sample_stats["khat"].values, evidence.khat.numpy())
    assert np.allclose(idata.sample_stats["ess"].values, evidence.ess.numpy())
    # There is no draw to leave one out of, so ArviZ's loo refuses instead of giving a number.
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        arviz.loo(idata)


def test_of_a_report():
    model, guide = vae()
    report = diagnostics.diagnose(model, guide, X, num_particles=50, seed=0)
    whole = report.to_arviz(num_draws=6, seed=1)
    assert sizes(whole.posterior["z"]) == {"chain": 1, "draw": 6, "datapoint": 5, "latent": 2}
    chosen = report.worst(2)
    some = report.to_arviz(chosen, num_draws=6, seed=1, dims={"z": ["factor"]})
    assert some.posterior["z"].dims == ("chain", "draw", "datapoint", "factor")
    assert some.posterior["datapoint"].values.tolist() == chosen.tolist()
    assert np.array_equal(some.observed_data["x"].values, X[chosen].numpy())
    for idata, index in ((whole, torch.arange(5)), (some, chosen)):
        assert np.array_equal(idata.log_likelihood["x"].values, report.log_evidence[index].numpy())
        assert np.array_equal(idata.sample_stats["khat"].values, report.khat[index].numpy())
    masked = report.to_arviz(report.khat > report.khat.median(), num_draws=6)
    assert masked.posterior["datapoint"].size == 2
    assert report.to_arviz([-1], num_draws=6).posterior["datapoint"].values.tolist() == [4]
    named = report.to_arviz([0, 1], num_draws=6, coords={"datapoint": ["a", "b"]})
    assert named.posterior["datapoint"].values.tolist() == ["a", "b"]


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # arviz 0.23 with pandas 3.1
def test_held_out_evidence_as_elpd():
    good, bad = (diagnostics.diagnose(*vae(), X, num_particles=60, seed=seed) for seed in (0, 1))
    bad = dataclasses.replace(bad, log_evidence=good.log_evidence - torch.tensor([1.0, 2, 3, 4, 5]))
    elpd = good.to_elpd()
    assert "5 observations" in repr(elpd)
    assert elpd["se"] == pytest.approx(5 * good.mean_se)  # of the sum over datapoints
    table = arviz.compare({"bad": bad.to_elpd(), "good": elpd})
    assert list(table.index) == ["good", "bad"]
    column = "elpd_loo" if "elpd_loo" in table else "elpd"
    assert float(table[column].iloc[0]) == pytest.approx(
        float(good.log_evidence.sum()),
        abs=0.5,  # 1.x rounds to what the error allows
    )
    assert abs(float(table["elpd_diff"].iloc[1])) == pytest.approx(15.0, abs=0.5)
    assert float(table["dse"].iloc[1]) == pytest.approx(5**0.5 * np.std([1, 2, 3, 4, 5]), rel=0.13)
    arviz.plot_khat(elpd)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    ("datapoints", "num_draws", "match"),
    [
        ([], 10, r"datapoints is empty: give indices, e.g. report.worst\(10\)"),
        ([5], 10, "must be indices of the report's 5 datapoints"),
        ([[0, 1]], 10, "must be indices"),
        ([0.5], 10, "must be indices"),
        (torch.ones(4, dtype=torch.bool), 10, "must be indices.*or a mask"),
        (torch.zeros(5, dtype=torch.bool), 10, "datapoints is empty"),
        (None, 10**7, "choose some"),
    ],
)
def test_bad_choices_of_a_report(datapoints, num_draws, match):
    report = diagnostics.diagnose(*vae(), X, num_particles=30, num_aggregate=0)
    with pytest.raises(ValueError, match=match):
        report.to_arviz(datapoints, num_draws=num_draws)


@pytest.mark.parametrize(
    ("datapoints", "found"),
    [
        (slice(1, 3), [1, 2]),
        (3, [3]),
        (range(2), [0, 1]),
        ([-1, 0], [4, 0]),
        (torch.tensor([True, False, True, False, False]), [0, 2]),
        (np.array([4, 2]), [4, 2]),
        (None, [0, 1, 2, 3, 4]),
    ],
)
def test_choices_of_a_report(datapoints, found):
    report = diagnostics.diagnose(*vae(), X, num_particles=30, num_aggregate=0)
    idata = report.to_arviz(datapoints, num_draws=2)
    assert idata.posterior["datapoint"].values.tolist() == found
    np.testing.assert_array_equal(idata.observed_data["x"], X[found])


class Scaled(ppvae.Program):
    """A latent, and twice it as `pyro.deterministic`: with its event dims said, and not."""

    def __init__(self, observe, event_dim=None):
        super().__init__()
        self.observe, self.event_dim = observe, event_dim

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if self.observe:
                twice = pyro.deterministic("twice", 2 * z, event_dim=self.event_dim)
                loc = torch.cat([z, twice], -1)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("event_dim", [None, 1])
@pytest.mark.parametrize("predictive", [True, False])
@pytest.mark.parametrize("num_draws", [1, 6])
def test_deterministic_sites(event_dim, predictive, num_draws):
    pair = Scaled(True, event_dim), Scaled(False)
    idata = to_arviz(*pair, X, num_draws=num_draws, predictive=predictive, seed=0)
    for group in (idata.posterior, idata.prior):
        assert group["twice"].dims == ("chain", "draw", "datapoint", "twice_dim")
        assert np.array_equal(group["twice"].values, 2 * group["z"].values)
    assert "twice" not in idata.observed_data
    assert np.ptp(idata.prior["z"].values) > 0


def test_ranks_stand_where_plot_ecdf_pit_reads_them():
    ranks = {"z": torch.tensor([[0, 9], [4, 5], [9, 0]]), "log p(x, z)": torch.ones(3, 1).int()}
    idata = diagnostics.Calibration(ranks, 9, {}).to_arviz()
    assert groups(idata) == ["prior_sbc"]
    z = idata.prior_sbc["z"]
    assert z.dims == ("chain", "draw", "z_dim")
    assert z["z_dim"].values.tolist() == [0, 1]
    np.testing.assert_allclose(z.values[0], [[0.05, 0.95], [0.45, 0.55], [0.95, 0.05]])
    assert sizes(idata.prior_sbc["log p(x, z)"]) == {"chain": 1, "draw": 3}
    if hasattr(arviz, "plot_ecdf_pit"):
        arviz.plot_ecdf_pit(idata, backend="none")


class Chains:
    """What the exporter needs of Markov chains."""

    def __init__(self):
        self.draws = {"z": torch.randn(4, 200, 3, 2), "s": torch.randn(4, 200, 3)}
        self.log_joint = torch.randn(4, 200, 3)


def test_markov_chains():
    chains = Chains()
    idata = diagnostics.chains_to_arviz(chains, coords={"datapoint": ["a", "b", "c"]})
    assert groups(idata) == ["posterior", "sample_stats"]
    assert idata.posterior["z"].dims == ("chain", "draw", "datapoint", "z_dim")
    assert idata.posterior["s"].dims == ("chain", "draw", "datapoint")
    assert np.array_equal(idata.posterior["z"].values, chains.draws["z"].numpy())
    assert idata.sample_stats["lp"].shape == (4, 200, 3)
    summary = arviz.summary(idata, var_names=["z"])
    assert len(summary) == 6
    assert (summary["r_hat"].astype(float) < 1.05).all()


def test_arviz_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        to_arviz(*vae(), X)


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
