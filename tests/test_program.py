"""Programs in stock Pyro engines and in our own path: who trains, and who touches the store."""

import copy
import itertools
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, elbo, guides, models, nets
from ppvae.program import data_plate, local_parameters, module_of
from registry import ALL_PAIRS, BESIDE, PyroGuide, PyroModel, build, owners

STOCK = {
    "Trace": lambda: Trace_ELBO(),
    "Trace K=3": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField": lambda: TraceMeanField_ELBO(),
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
}
# Pyro's own way with PyroModules needs a name per module: see test_pyro_modules_share_a_name.
PAIRS = [name for name in ALL_PAIRS if name not in {"pyro_modules"} | BESIDE]


def values(*programs) -> dict[str, Tensor]:
    found = {}
    for i, module in enumerate(owners(*programs)):
        for name, p in module.named_parameters():
            found[f"{i}.{name}"] = p.detach().clone()
    return found


def unmoved(before: dict[str, Tensor], *programs) -> list[str]:
    after = values(*programs)
    assert before and before.keys() == after.keys()
    return [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize(
    ("engine", "pair"),
    [
        pytest.param(engine, pair, marks=[] if fast else [pytest.mark.slow])
        for engine, pair in itertools.product(STOCK, PAIRS)
        for fast in [engine == "Trace K=3" or pair in ("vae_bernoulli", "hierarchical")]
    ],
)
def test_stock_engines_train_every_parameter(pair: str, engine: str) -> None:
    model, guide, args = build(pair)
    before = values(model, guide)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=STOCK[engine]())
    refuses = engine == "TraceMeanField" and pair == "hierarchical"  # a bottom-up guide
    with pytest.warns(match="mean field restriction") if refuses else nullcontext():
        for _ in range(2):
            svi.step(*args)
    assert unmoved(before, model, guide) == []


@pytest.mark.parametrize("engine", [name for name in STOCK if name != "Renyi"])
@pytest.mark.parametrize("pair", ["vae_vamp_prior", "cvae_quadrant", "pyro_modules"])
def test_stock_elbos_train_in_our_svi(pair: str, engine: str) -> None:
    model, guide, args = build(pair)
    before = values(model, guide)
    svi = ppvae.SVI(model, guide, torch.optim.Adam, STOCK[engine]())
    svi.step(*args)
    assert unmoved(before, model, guide) == []
    assert len(pyro.get_param_store()) == 0


def test_stock_value_equals_ours() -> None:
    model, guide, args = build("vae_bernoulli")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({}), loss=Trace_ELBO())
    pyro.set_rng_seed(4)
    stock = svi.evaluate_loss(*args)
    pyro.set_rng_seed(4)
    assert elbo.ELBO().loss(model, guide, *args) == pytest.approx(stock, rel=1e-6)


@pytest.mark.parametrize("engine", STOCK)
def test_two_equal_pairs_both_train(engine: str) -> None:
    pairs = [build("vae_conv", seed) for seed in (0, 1)]
    for model, guide, args in pairs:
        before = values(model, guide)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=STOCK[engine]())
        for _ in range(2):
            svi.step(*args)
        assert unmoved(before, model, guide) == []
    first, second = (values(*pair[:2]) for pair in pairs)
    assert all(not torch.equal(first[name], second[name]) for name in first if "weight" in name)


def test_a_deep_copy_gets_names_of_its_own() -> None:
    model, guide, args = build("vae_bernoulli")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(*args)
    names = set(pyro.get_param_store().keys())
    model2, guide2 = copy.deepcopy((model, guide))
    before, other = values(model, guide), values(model2, guide2)
    svi = pyro.infer.SVI(model2, guide2, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(*args)
    assert unmoved(before, model, guide) == list(before)  # the original stays
    assert unmoved(other, model2, guide2) == []
    assert len(set(pyro.get_param_store().keys())) == 2 * len(names)


def test_the_store_may_be_cleared_midway() -> None:
    model, guide, args = build("vae_bernoulli")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(*args)
    pyro.clear_param_store()
    before = values(model, guide)
    svi.step(*args)
    assert unmoved(before, model, guide) == []
    assert len(pyro.get_param_store()) == len(before)


def test_a_replaced_parameter_is_followed() -> None:
    model, guide, args = build("vae_normal_fixed_scale")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(*args)
    last = model.likelihood.net.layers[-1]
    last.bias = nn.Parameter(torch.full_like(last.bias, 5.0))
    svi.step(*args)
    assert torch.allclose(last.bias, torch.tensor(5.0), atol=0.1)
    assert (last.bias != 5.0).all()


def test_a_frozen_parameter_stays_and_is_not_announced() -> None:
    model, guide, args = build("vae_bernoulli")
    frozen = model.likelihood.net.layers[0].weight.requires_grad_(False)
    before = frozen.clone()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(*args)
    assert torch.equal(frozen, before)
    assert len(pyro.get_param_store()) == len(values(model, guide)) - 1
    ppvae.SVI(model, guide, torch.optim.Adam).step(*args)
    assert torch.equal(frozen, before)


def test_a_parameter_that_is_not_contiguous_is_refused_with_the_cure() -> None:
    model, guide, args = build("vae_bernoulli")
    layer = model.likelihood.net.layers[0]
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not layer.weight.is_contiguous()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"not contiguous.*weight.data.contiguous\(\)"):
        svi.step(*args)
    ppvae.SVI(model, guide, torch.optim.Adam).step(*args)  # no trouble in our path


def test_calling_a_program_alone_touches_nothing() -> None:
    model, guide, args = build("vae_bernoulli")
    assert guide(*args).shape == (6, 2)
    assert model(size=3).shape == (3, 5)
    assert len(pyro.get_param_store()) == 0


# ------------------------------------------------------------------------------ our own path


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("pair", ["vae_bernoulli", "tutorial", "pyro_modules"])
def test_our_path_leaves_the_store_empty(pair: str, K: int) -> None:
    model, guide, args = build(pair)
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.IWELBO(K))
    before = values(model, guide)
    for _ in range(2):
        svi.step(*args)
    svi.evaluate_loss(*args)
    ppvae.check_pair(model, guide, *args)
    elbo.IWELBO(2).evaluate(model, guide, *args)
    assert unmoved(before, model, guide) == []
    assert len(pyro.get_param_store()) == 0


def test_two_equal_pyro_module_pairs_share_nothing() -> None:
    """Both are named "" by Pyro, so in its store they would be one."""
    first, second = (build("pyro_modules", seed) for seed in (0, 1))
    for model, guide, args in (first, second):
        before = values(model, guide)
        ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(2)).step(*args)
        assert unmoved(before, model, guide) == []


def test_a_pyro_module_made_or_run_elsewhere_works_in_our_path() -> None:
    model, guide = PyroModel(), PyroGuide()
    x = torch.randn(4, 5)
    pyro.poutine.trace(guide).get_trace(x)  # global mode, stores parameters
    stored = len(pyro.get_param_store())
    assert stored > 0
    weights = ppvae.log_weights(model, guide, x, num_particles=2)
    assert weights.log_w.shape == (2, 4)
    assert len(pyro.get_param_store()) == stored
    with local_parameters():
        inside = PyroGuide()
    assert ppvae.log_weights(model, inside, x).log_w.shape == (1, 4)
    assert not pyro.settings.get("module_local_params")


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("family", [AutoNormal, AutoDelta])
def test_automatic_guides(family: type, K: int) -> None:
    model, _, args = build("vae_bernoulli")
    guide = family(model)
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(K))
    svi.prepare(*args)
    before = values(guide)
    svi.step(*args)
    assert unmoved(before, guide) == []
    assert len(pyro.get_param_store()) == 0
    assert ppvae.log_weights(model, guide, *args, num_particles=K).log_w.shape == (K, 6)


def test_an_automatic_guide_outside_the_plate_needs_joint() -> None:
    model, _, args = build("vae_bernoulli")
    guide = AutoMultivariateNormal(model)
    with pytest.raises(ValueError, match="joint=True"):
        ppvae.log_weights(model, guide, *args)
    assert ppvae.log_weights(model, guide, *args, num_particles=3, joint=True).log_w.shape == (3, 1)
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.IWELBO(3))
    svi.prepare(*args, joint=True)
    before = values(guide)
    svi.step(*args, joint=True)
    assert unmoved(before, guide) == []


@pytest.mark.parametrize("K", [1, 2])
def test_a_bare_param_is_refused_with_the_cure(K: int) -> None:
    def model(x: Tensor) -> None:
        theta = pyro.param("theta", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(), 1.0))

    x = torch.randn(3)
    runs = [
        lambda: ppvae.log_weights(model, guide, x, num_particles=K),
        lambda: ppvae.check_pair(model, guide, x),
        lambda: elbo.ELBO(K).evaluate(model, guide, x),
    ]
    for run in runs:
        with pytest.raises(ValueError, match=r"pyro.param\('theta'\).*torch.nn.Parameter"):
            run()
        assert len(pyro.get_param_store()) == 0
    # in stock SVI it is the user's right
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo.IWELBO(K))
    svi.step(x)
    assert pyro.param("theta").item() != 0


def test_a_pyro_param_of_a_pyro_module_keeps_its_constraint() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.01), dist.constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_zeros(()), self.scale))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Guide()
    svi = ppvae.SVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.01))
    for _ in range(5):
        svi.step(torch.zeros(4))
    assert 0.01 < guide.scale.item() < 1.0


def test_parameters_stay_local_only_inside() -> None:
    model, _, args = build("vae_bernoulli")
    with local_parameters():
        pyro.poutine.trace(model).get_trace(*args)
        assert len(pyro.get_param_store()) == 0
    with pytest.raises(RuntimeError, match="stop"), local_parameters():
        raise RuntimeError("stop")
    pyro.poutine.trace(model).get_trace(*args)
    assert len(pyro.get_param_store()) == len(list(model.parameters()))


def test_a_program_inside_a_program() -> None:
    """guides.Prior holds the model: its parameters have two names and train once per step."""
    model, _, args = build("vae_mixture_prior")
    guide = guides.Prior(model)
    with pytest.raises(ValueError, match="has no reparameterised"):
        elbo.ELBO()(model, guide)(*args)  # a mixture cannot be differentiated through
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=Trace_ELBO())
    before = values(model)
    svi.step(*args)
    assert [n for n in unmoved(before, model) if "likelihood" in n] == []
    parameters = list(elbo.ELBO()(model, guide).parameters())
    assert len(parameters) == len(before)


def test_module_of_and_the_objectives_parameters() -> None:
    model, guide, _ = build("tutorial")
    vae = guide.__self__
    assert module_of(model) is module_of(guide) is vae
    assert module_of(lambda x: x) is None
    objective = elbo.ELBO()(model, guide)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in vae.parameters()}
    assert len(list(objective.parameters())) == 4
    state = objective.state_dict()
    objective.load_state_dict(state)


def test_data_plate() -> None:
    x = torch.zeros(4, 2)
    assert (data_plate(None, x).size, data_plate(None, x).dim) == (4, -1)
    assert data_plate(None, size=9).size == 9
    with pytest.raises(ValueError, match="size=100"):
        data_plate(None)


def test_keyword_arguments_reach_the_pair() -> None:
    model, guide, (x, y) = build("cvae_labels")
    losses = []
    for args, kwargs in (((x, y), {}), ((x,), {"y": y})):
        model, guide, _ = build("cvae_labels")
        pyro.set_rng_seed(0)
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.IWELBO(3))
        losses.append([svi.step(*args, **kwargs) for _ in range(2)])
    assert losses[0] == losses[1]


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 4)), latent_dim=2)
        guide = guides.Normal(nets.mlp(4, 4))
        ppvae.SVI(model, guide, torch.optim.Adam, elbo.IWELBO(2)).step(torch.ones(3, 4))


def test_the_rows_of_a_plate_are_those_of_the_first_tensor() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(5)
    for data, rows in (((x, y), 3), ((None, y, x), 5), ((y,), 5)):
        assert ppvae.program.data_plate(*data).size == rows
        assert ppvae.program.data_plate(*data, size=30).subsample_size == rows
