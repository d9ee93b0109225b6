"""Law 6: the compiled step is the eager step at the same seed, and a graph keeps no values.

Tracing a step takes a tenth of a second, compiling it some: so most tests run the traced graph as
it is, in place of the compiled one, and a few build the real thing (``inductor``).
"""

import contextlib
import copy
import functools
import gc
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import ppvae
from ppvae import conditionals, diagnostics, elbo, graph, guides, models, nets
from ppvae.compiled import Compiled
from ppvae.elbo.penalties import Penalty, Tilt
from ppvae.pairs import NotCompiled
from registry import ALL_ESTIMATORS, ALL_PAIRS, build, cross

inductor = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
N, D, Z = 6, 5, 2
# Gradients of any size make a step of a known length, and rounding is not blown up as by Adam.
SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(N, D)


@pytest.fixture
def traced(monkeypatch):
    """Run the traced graph itself: what Python hands to the compiler, without the compiler."""
    import torch._inductor.compile_fx

    built = []

    def interpret(graph, inputs):
        built.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", interpret)
    monkeypatch.setattr(graph, "MIN_PRODUCT", 0)  # the networks here are small
    return built


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}


def run(svi, batches, seed=3, between=None, **kwargs):
    """Losses, what is left in the modules, which gradients are there, and the random stream."""
    torch.manual_seed(seed)
    losses = []
    for i, batch in enumerate(batches):
        if between is not None:
            between(i, svi)
        losses.append(svi.step(*batch, **kwargs))
    grads = {name: p.grad for name, p in svi.objective.named_parameters()}
    return losses, tensors(svi.objective), grads, torch.get_rng_state()


def assert_equal_runs(eager, compiled, rtol=1e-4, atol=1e-5):
    assert compiled[0] == pytest.approx(eager[0], rel=rtol, abs=atol)
    for name, value in eager[1].items():
        torch.testing.assert_close(
            compiled[1][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, grad in eager[2].items():
        assert (grad is None) == (compiled[2][name] is None), name
    assert torch.equal(eager[3], compiled[3]), "the random stream was moved"


def assert_compiled_is_eager(
    make, batches, loss=None, between=None, optim=SGD, clip_norm=1.0, rtol=1e-4, kwargs=None
):
    """``make() -> (model, guide)`` gives equal parameters each time; returns the compiled SVI."""
    runs = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), optim, loss, clip_norm=clip_norm, compile=compile)
        runs.append(run(svi, batches, between=between, **(kwargs or {})))
    assert_equal_runs(*runs, rtol=rtol)
    assert svi.build_seconds > 0
    assert all(graph is not None for graph in svi._compiled._graphs.values())
    assert not fakes(svi.objective)
    return svi


def fakes(root):
    """Where tensors without values, which only a tracer makes, are left in an object."""
    seen, pending, found = set(), [(root, "")], []
    while pending:
        thing, path = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found += [path] if isinstance(thing, FakeTensor) else []
        elif isinstance(thing, dict):
            pending += [(value, f"{path}[{key!r}]") for key, value in thing.items()]
        elif isinstance(thing, list | tuple | set):
            pending += [(value, f"{path}[{i}]") for i, value in enumerate(thing)]
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            pending += [(value, f"{path}.{key}") for key, value in vars(thing).items()]
    return found


# -- law 6 -------------------------------------------------------------------------------------


def law_cases():
    """Everything crossed; in `make test` each estimator once, and pairs that differ in kind."""
    pairs = ("pyro_modules", "tutorial", "vae_vamp_prior", "vae_conv", "cvae_quadrant")
    for case in cross():
        pair, estimator = case.values
        every = pair == "vae_bernoulli" or (
            pair in pairs and estimator is ALL_ESTIMATORS["IWELBO-dreg"]
        )
        yield pytest.param(*case.values, id=case.id, marks=[] if every else [pytest.mark.slow])


def law(pair, estimator):
    args = build(pair)[2]
    return assert_compiled_is_eager(lambda: build(pair)[:2], [args] * 3, estimator)


@pytest.mark.parametrize(("pair", "estimator"), list(law_cases()))
def test_three_steps_traced_equal_three_eager_steps(traced, pair, estimator):
    law(pair, estimator)
    assert len(traced) == 1


@inductor
@pytest.mark.parametrize(
    ("pair", "label"),
    [
        ("vae_bernoulli", "IWELBO-dreg"),
        pytest.param("cvae_learned_prior", "ELBO-kl=mixed-pathwise", marks=pytest.mark.slow),
        pytest.param("pyro_modules", "ReweightedWakeSleep-reweighted", marks=pytest.mark.slow),
        *(
            pytest.param(pair, "IWELBO-dreg", marks=pytest.mark.slow)
            for pair in ALL_PAIRS
            if pair != "vae_bernoulli"
        ),
        *(
            pytest.param("vae_bernoulli", label, marks=pytest.mark.slow)
            for label in ALL_ESTIMATORS
            if label != "IWELBO-dreg"
        ),
    ],
)
def test_three_compiled_steps_equal_three_eager_steps(pair, label):
    law(pair, ALL_ESTIMATORS[label])


# -- programs of a user's own ------------------------------------------------------------------


class Free(ppvae.Program):
    """A program from a function of itself and the data, with modules and tensors as attributes."""

    def __init__(self, body, **attributes):
        super().__init__()
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args):
        return self.body(self, *args)


def standard(x, name="z"):
    return pyro.sample(name, dist.Normal(x.new_zeros(Z), 1.0).to_event(1))


def observe(x, loc):
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def decode(self, x, *rest):
    with pyro.plate("data", len(x)):
        observe(x, self.net(standard(x)))


def encode(self, x, *rest):
    with pyro.plate("data", len(x)):
        loc, raw = self.net(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def plain():
    torch.manual_seed(0)
    return Free(decode, net=nn.Linear(Z, D)), Free(encode, net=nn.Linear(D, 2 * Z))


def vae():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Normal(nets.mlp(Z, 8, D), 0.7), latent_dim=Z)
    return model, guides.Normal(nets.mlp(D, 8, 2 * Z))


def with_model(body, **attributes):
    return Free(body, net=nn.Linear(Z, D), **attributes), Free(encode, net=nn.Linear(D, 2 * Z))


def parameter(*shape):
    return nn.Parameter(torch.zeros(*shape))


PROGRAMS = {}


def program(loss=None):
    def add(make):
        def seeded():
            torch.manual_seed(0)
            return make()

        PROGRAMS[make.__name__] = (seeded, loss)
        return make

    return add


@program()
def masked():
    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            with poutine.mask(mask=torch.arange(N) % 2 == 0):
                observe(x, self.net(z))

    return with_model(body)


@program()
def scaled():
    def body(self, x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = standard(x)
            observe(x, self.net(z))

    return with_model(body)


@program(elbo.IWELBO(num_particles=3))
def subsampled():
    def body(self, x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            observe(x[rows], self.net(standard(x)))

    def guide(self, x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            loc, raw = self.net(x[rows]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Free(body, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 2 * Z))


@program(elbo.ELBO(num_particles=2))
def minibatch_of_a_known_size():
    def body(self, x):
        with pyro.plate("data", 100, subsample=x):
            observe(x, self.net(standard(x)))

    def guide(self, x):
        with pyro.plate("data", 100, subsample=x):
            loc, raw = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Free(body, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 2 * Z))


@program(elbo.IWELBO(num_particles=3))
def pixels():
    def body(self, x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1, Z), 1.0).to_event(1))
            with pyro.plate("pixels", D, dim=-1):
                pyro.sample("x", dist.Normal(self.net(z).squeeze(-2), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            loc, raw = self.net(x).unsqueeze(-2).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Free(body, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 2 * Z))


@program()
def pixels_one_by_one():
    def body(self, x):
        with pyro.plate("data", len(x)):
            loc = self.net(standard(x))
            for j in range(D):
                pyro.sample(f"x_{j}", dist.Normal(loc[..., j], 1.0), obs=x[:, j])

    return with_model(body)


def clusters(in_guide):
    def body(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample(
                "k", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
            )
            observe(x, self.net(standard(x)) + self.means[k])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            if in_guide:
                q = dist.Categorical(logits=self.clusters(x))
                pyro.sample("k", q, infer={"enumerate": "parallel"})
            loc, raw = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    own = {"clusters": nn.Linear(D, 3)} if in_guide else {}
    means = nn.Parameter(normal(3, D))
    model = Free(body, net=nn.Linear(Z, D), logits=parameter(3), means=means)
    return model, Free(guide, net=nn.Linear(D, 2 * Z), **own)


@program(elbo.IWELBO(num_particles=3))
def enumerated_in_the_model():
    return clusters(in_guide=False)


@program(elbo.ELBO(num_particles=2))
def enumerated_in_the_guide():
    return clusters(in_guide=True)


def coins():
    def body(self, x):
        with pyro.plate("data", len(x)):
            observe(x, self.net(pyro.sample("b", dist.Bernoulli(self.p.sigmoid()).to_event(1))))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=self.net(x)).to_event(1))

    return Free(body, net=nn.Linear(Z, D), p=parameter(Z)), Free(guide, net=nn.Linear(D, Z))


for label, estimator in {
    "score": elbo.ELBO(gradient="score"),
    "score_of_four": elbo.ELBO(num_particles=4, gradient="score"),
    "vimco": elbo.IWELBO(num_particles=4, gradient="vimco"),
    "thermodynamic": elbo.ThermodynamicELBO(num_particles=4),
    "wake_sleep": elbo.ReweightedWakeSleep(num_particles=4, insomnia=0.5),
}.items():
    PROGRAMS[f"coins_{label}"] = (lambda: torch.manual_seed(0) and coins(), estimator)


def categories(prior, posterior):
    def body(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", prior(self.logits))
            observe(x, k @ self.means if k.dtype.is_floating_point else self.means[k])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", posterior(self.net(x)))

    model = Free(body, logits=parameter(3), means=nn.Parameter(normal(3, D)))
    return model, Free(guide, net=nn.Linear(D, 3))


@program(elbo.IWELBO(num_particles=4, gradient="vimco"))
def categorical():
    return categories(*2 * [lambda logits: dist.Categorical(logits=logits)])


@program(elbo.ELBO(num_particles=3, gradient="score"))
def one_hot():
    return categories(*2 * [lambda logits: dist.OneHotCategorical(logits=logits)])


@program(elbo.ELBO(num_particles=3))
def straight_through():
    return categories(
        lambda logits: dist.OneHotCategorical(logits=logits),
        lambda logits: dist.OneHotCategoricalStraightThrough(logits=logits),
    )


@program(elbo.ELBO(num_particles=3))
def relaxed():
    half = torch.tensor(0.5)
    return categories(*2 * [lambda logits: dist.RelaxedOneHotCategorical(half, logits=logits)])


def constrained(prior, posterior, sizes):
    def body(self, x):
        with pyro.plate("data", len(x)):
            observe(x, self.net(pyro.sample("z", prior)))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(nn.functional.softplus(self.net(x)) + 0.1))

    return Free(body, net=nn.Linear(sizes[0], D)), Free(guide, net=nn.Linear(D, sizes[1]))


@program(elbo.IWELBO(num_particles=3))
def gamma():
    prior = dist.Gamma(torch.full((Z,), 2.0), 1.0).to_event(1)
    return constrained(prior, lambda h: dist.Gamma(h[..., :Z], h[..., Z:]).to_event(1), (Z, 2 * Z))


@program(elbo.IWELBO(num_particles=3))
def beta():
    prior = dist.Beta(torch.full((Z,), 2.0), 1.0).to_event(1)
    return constrained(prior, lambda h: dist.Beta(h[..., :Z], h[..., Z:]).to_event(1), (Z, 2 * Z))


@program(elbo.IWELBO(num_particles=3))
def dirichlet():
    return constrained(dist.Dirichlet(torch.ones(3)), dist.Dirichlet, (3, 3))


@program(elbo.ELBO(num_particles=3))
def mixture_of_normals():
    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw, logits = self.net(x).split([2 * Z, 2 * Z, 2], -1)
            shape = (len(x), 2, Z)
            q = dist.MixtureOfDiagNormals(loc.reshape(shape), raw.reshape(shape).exp(), logits)
            pyro.sample("z", q)

    return Free(decode, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 4 * Z + 2))


def flow(*transforms):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.net(x).chunk(2, -1)
            base = dist.Normal(loc, raw.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, list(self.flow)))

    guide = Free(guide, net=nn.Linear(D, 2 * Z), flow=nn.ModuleList(transforms))
    return Free(decode, net=nn.Linear(Z, D)), guide


@program(elbo.ELBO(num_particles=3))
def inverse_autoregressive():
    return flow(*(flows.affine_autoregressive(Z, [8]) for _ in range(2)))


@program(elbo.IWELBO(num_particles=3, gradient="dreg"))
def coupling():
    return flow(flows.affine_coupling(Z, [8]))


@program(elbo.ELBO(num_particles=3))
def planar():
    return flow(flows.planar(Z), flows.radial(Z))


@program(elbo.ELBO(num_particles=2))
def spline():
    return flow(flows.spline(Z))


@program()
def zuko_spline():
    import zuko  # here: it switches validation off, for all distributions
    from pyro.contrib.zuko import ZukoToPyro

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(self.flow(x)))

    nsf = zuko.flows.NSF(Z, D, transforms=1, hidden_features=(8,))
    return Free(decode, net=nn.Linear(Z, D)), Free(guide, flow=nsf)


@program(elbo.IWELBO(num_particles=3))
def tied_parameters():
    def body(self, x):
        with pyro.plate("data", len(x)):
            observe(x, torch.tanh(self.first(standard(x))) @ self.tied)

    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 2 * Z))
    model = Free(body, first=nn.Linear(Z, 8), tied=encoder[0].weight)
    return model, Free(encode, net=encoder)


@program()
def gradients_that_are_constants_or_one_tensor():
    """They come without memory of their own: a view of a number, or another's, or the data."""

    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            pyro.factor("linear", self.sums.sum() + self.square.sum() + (self.slope * x).sum(-1))
            observe(x, self.net(z) + self.one + self.other)

    shapes = {"sums": (3,), "square": (4, 4), "slope": (N, D), "one": (N, D), "other": (N, D)}
    return with_model(body, **{name: parameter(*shape) for name, shape in shapes.items()})


@program()
def parameter_that_is_not_contiguous():
    net = nn.Linear(Z, D)
    net.weight = nn.Parameter(normal(Z, D).t())
    return Free(decode, net=net), Free(encode, net=nn.Linear(D, 2 * Z))


@program()
def draws_that_are_not_used():
    def body(self, x):
        with pyro.plate("data", len(x)):
            torch.randn(3)
            z = standard(x)
            torch.rand(7)
            observe(x, self.net(z) + 0.1 * torch.randn(D))

    return with_model(body)


@program()
def recurrent():
    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            steps = z.reshape(-1, 1, Z).expand(-1, D, Z)
            observe(x, self.out(self.net(steps)[0]).reshape(*z.shape[:-1], D))

    model = Free(body, net=nn.GRU(Z, 4, batch_first=True), out=nn.Linear(4, 1))
    return model, Free(encode, net=nn.Linear(D, 2 * Z))


@program()
def reparametrised_weights():
    from torch.nn.utils import parametrizations

    model = Free(decode, net=parametrizations.spectral_norm(nn.Linear(Z, D)))
    return model, Free(encode, net=parametrizations.weight_norm(nn.Linear(D, 2 * Z)))


@program()
def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    encoder = nn.Sequential(
        nn.Unflatten(-1, (D, 1)), nn.Linear(1, 4), layer, nn.Flatten(-2), nn.Linear(4 * D, 2 * Z)
    )
    return Free(decode, net=nn.Linear(Z, D)), Free(encode, net=encoder)


@program(elbo.IWELBO(num_particles=5))
def batch_norm_and_dropout():
    options = {"batch_norm": True, "dropout": 0.3}
    model = models.VAE(conditionals.Normal(nets.mlp(Z, 8, D, **options), 0.7), latent_dim=Z)
    return model, guides.Normal(nets.mlp(D, 8, 2 * Z, **options))


@program(elbo.IWELBO(num_particles=5))
def convolutions_with_particles():
    shape = (1, 6, 5)
    decoder = nets.conv_decoder(Z, shape, channels=(3,), hidden=(8,), batch_norm=True)
    model = models.VAE(conditionals.Bernoulli(decoder, event_dim=3), latent_dim=Z)
    encoder = nets.conv_encoder(2 * Z, shape, channels=(3,), hidden=(8,), batch_norm=True)
    return model, guides.Normal(encoder)


@program()
def automatic_guide():
    model = Free(decode, net=nn.Linear(Z, D))
    return model, AutoNormal(model)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_a_users_own(traced, name):
    make, loss = PROGRAMS[name]
    x = X if name != "convolutions_with_particles" else (normal(N, 1, 6, 5) > 0).float()
    before = x.clone()
    svi = assert_compiled_is_eager(make, [(x,)] * 3, loss)
    assert torch.equal(x, before)
    grads = [p.grad for p in svi.objective.parameters() if p.grad is not None]
    storages = [grad.untyped_storage().data_ptr() for grad in grads]
    assert len(set(storages)) == len(storages), "two gradients in one piece of memory"


@inductor
@pytest.mark.parametrize(
    "name",
    [
        "gradients_that_are_constants_or_one_tensor",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in PROGRAMS
            if name != "gradients_that_are_constants_or_one_tensor"
        ),
    ],
)
def test_programs_of_a_users_own_compiled(name):
    make, loss = PROGRAMS[name]
    x = X if name != "convolutions_with_particles" else (normal(N, 1, 6, 5) > 0).float()
    svi = assert_compiled_is_eager(make, [(x,)] * 3, loss)
    grads = [p.grad for p in svi.objective.parameters() if p.grad is not None]
    storages = [grad.untyped_storage().data_ptr() for grad in grads]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("particles", [1, 50])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_and_dtypes(traced, particles, rows, dtype):
    loss = elbo.IWELBO(num_particles=particles)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    assert_compiled_is_eager(
        lambda: [program.to(dtype) for program in plain()],
        [(X[:rows].to(dtype),)] * 3,
        loss,
        rtol=rtol,
    )


def test_a_joint_latent(traced):
    def body(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            observe(x, self.net(standard(x)) + w)

    def guide(self, x):
        pyro.sample("w", dist.Normal(self.w, 1.0).to_event(1))
        encode(self, x)

    def make():
        torch.manual_seed(0)
        return with_model(body)[0], Free(guide, net=nn.Linear(D, 2 * Z), w=parameter(D))

    assert_compiled_is_eager(make, [(X,)] * 3, kwargs={"joint": True})


def test_arguments_that_are_no_tensors(traced):
    def make():
        torch.manual_seed(0)

        def body(self, x, width, shift=0.0):
            with pyro.plate("data", len(x)):
                observe(x, width * self.net(standard(x)))

        return with_model(body)

    batches = [(X, width) for width in (1.0, 0.5, 1.0, 2.0, 0.5)]
    svi = assert_compiled_is_eager(make, batches)
    assert len(traced) == len(svi._compiled._graphs) == 3


# -- values are not kept -----------------------------------------------------------------------


class Triangle(Penalty):
    """A user's own penalty, whose weight follows the step as it should."""

    def tilt(self, rates, log_likelihood, state):
        weight = state.at_step(lambda step: 1.0 - abs(step - 4) / 5)
        return Tilt(1.0, dict.fromkeys(rates, weight), 0.0)


class Method(Penalty):
    """One whose schedule is a method: a new object each time it is asked for."""

    def weight(self, step):
        return 0.1 * step

    def tilt(self, rates, log_likelihood, state):
        return Tilt(1.0, dict.fromkeys(rates, state.at_step(self.weight)), 0.0)


class Stepper(Penalty):
    """One that a graph cannot follow."""

    def tilt(self, rates, log_likelihood, state):
        return Tilt(1.0, dict.fromkeys(rates, min(1.0, state.step / 5)), 0.0)


@pytest.mark.parametrize(
    "weight",
    [
        elbo.LinearWarmup(8),
        elbo.LinearWarmup(8, 0.5, 3.0),
        elbo.CyclicalWarmup(period=4, cycles=2),
        lambda step: 0.1 * step,
        lambda step: np.float64(0.1 * step),
        lambda step: torch.tensor(0.1 * step),
        elbo.Capacity(elbo.LinearWarmup(8, 0.0, 6.0), gamma=3.0),
        elbo.Constraint(max_rate=0.5, speed=0.1),
        elbo.Constraint(max_distortion=5.0, speed=0.1),
        Triangle(),
        Method(),
        elbo.FreeBits(0.3, per_dimension=True),
        torch.tensor(0.3),
    ],
    ids=lambda weight: type(weight).__name__,
)
def test_weights_that_change_are_followed_for_many_steps(traced, weight):
    svi = assert_compiled_is_eager(plain, [(X,)] * 12, elbo.ELBO(2, beta=weight))
    assert svi.objective.state.step == 12
    assert len(traced) == 1


def test_a_weight_is_followed_from_the_middle_of_a_schedule(traced):
    loss = elbo.ELBO(beta=elbo.LinearWarmup(8))
    eager = ppvae.SVI(*plain(), SGD, loss, clip_norm=1.0)
    run(eager, [(X,)] * 3)
    state = copy.deepcopy(eager.state_dict())
    compiled = ppvae.SVI(*plain(), SGD, loss, clip_norm=1.0, compile=True)
    compiled.load_state_dict(state)  # the graph is built at step 3
    assert_equal_runs(run(eager, [(X,)] * 6), run(compiled, [(X,)] * 6))


def test_a_tensor_weight_changed_in_place_is_seen(traced):
    weight = torch.tensor(0.0)

    def between(step, svi):
        weight.fill_(step / 5)

    assert_compiled_is_eager(plain, [(X,)] * 6, elbo.ELBO(beta=weight), between)
    assert len(traced) == 1


def test_the_weight_on_the_kl_is_reported(traced):
    loss = elbo.ELBO(beta=elbo.Constraint(max_rate=0.5, speed=0.1))
    weights = []
    for compile in (False, True):
        svi = ppvae.SVI(*plain(), SGD, loss, clip_norm=1.0, compile=compile)
        torch.manual_seed(0)
        seen = []
        for _ in range(5):
            svi.step(X)
            seen.append(float(svi.objective.state.weight))
        weights.append(seen)
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)
    assert len(set(weights[1])) > 3


def changing(self, x):
    with pyro.plate("data", len(x)):
        observe(x, self.temperature * self.net(standard(x)))


@pytest.mark.parametrize("as_buffer", [True, False])
def test_tensors_of_a_module_changed_in_place_are_seen(traced, as_buffer):
    def make():
        torch.manual_seed(0)
        model, guide = with_model(changing)
        if as_buffer:
            model.register_buffer("temperature", torch.tensor(1.0))
        else:
            model.temperature = torch.tensor(1.0)
        return model, guide

    def between(step, svi):
        svi.model.temperature.mul_(0.5)

    assert_compiled_is_eager(make, [(X,)] * 5, between=between)
    assert len(traced) == 1


@pytest.mark.parametrize("kind", ["number", "tensor", "buffer"])
def test_attributes_that_are_replaced_are_seen(traced, kind):
    """Annealing by hand, ``model.temperature *= 0.5`` between steps."""

    def make():
        torch.manual_seed(0)
        model, guide = with_model(changing)
        start = 1.0 if kind == "number" else torch.tensor(1.0)
        if kind == "buffer":
            model.register_buffer("temperature", start)
        else:
            model.temperature = start
        return model, guide

    def between(step, svi):
        svi.model.temperature = 0.5 * svi.model.temperature

    assert_compiled_is_eager(make, [(X,)] * 4, between=between)


def test_dropout_that_is_switched_off_is_seen(traced):
    def between(step, svi):
        if step == 2:
            for module in svi.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    assert_compiled_is_eager(PROGRAMS["batch_norm_and_dropout"][0], [(X,)] * 4, between=between)


def test_moving_averages_kept_by_a_program(traced):
    """State in a buffer or an attribute, changed in place by the program itself."""

    def body(self, x):
        if self.training:  # as batch norm does: it mixes rows
            for average in (self.buffer, self.attribute):
                average.mul_(0.9).add_(0.1 * x.mean(0))
        with pyro.plate("data", len(x)):
            observe(x, self.net(standard(x)) + self.buffer + self.attribute)

    def make():
        torch.manual_seed(0)
        model, guide = with_model(body, attribute=torch.zeros(D))
        model.register_buffer("buffer", torch.zeros(D))
        return model, guide

    runs = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), SGD, clip_norm=1.0, compile=compile)
        runs.append((run(svi, [(X + i,) for i in range(5)]), svi.model.attribute.clone()))
    assert_equal_runs(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[1][1], runs[0][1])
    assert runs[0][1].abs().min() > 0


@pytest.mark.parametrize("as_buffer", [True, False])
def test_a_program_that_assigns_its_state_anew_is_refused(traced, as_buffer):
    def body(self, x):
        self.seen = self.seen + 1.0
        with pyro.plate("data", len(x)):
            observe(x, self.net(standard(x)) + self.seen)

    model, guide = with_model(body)
    if as_buffer:
        model.register_buffer("seen", torch.zeros(()))
    else:
        model.seen = torch.zeros(())
    svi = ppvae.SVI(model, guide, SGD, compile=True)
    svi.optimizer = ppvae.svi.build_optimizer(SGD, svi.objective)
    with pytest.raises(NotCompiled, match=r"'seen' anew.*in place"):
        svi.step(X)


# -- which graphs there are --------------------------------------------------------------------


def test_a_ragged_last_batch_costs_one_more_graph(traced):
    data = normal(20, D)
    epoch = [(data[i : i + 6],) for i in range(0, 20, 6)]  # views: offsets into one tensor
    svi = assert_compiled_is_eager(plain, 3 * epoch)
    assert len(traced) == 2
    spent = svi.build_seconds
    run(svi, epoch)
    assert svi.build_seconds == spent


def test_more_shapes_than_graphs(traced, monkeypatch):
    assert Compiled.max_graphs == 8
    monkeypatch.setattr(Compiled, "max_graphs", 2)
    batches = [(normal(rows, D),) for rows in range(1, 5)]
    eager = run(ppvae.SVI(*plain(), SGD, clip_norm=1.0), 2 * batches)
    svi = ppvae.SVI(*plain(), SGD, clip_norm=1.0, compile="auto")
    with pytest.warns(RuntimeWarning, match="runs eagerly.*2 graphs.*one size") as seen:
        compiled = run(svi, 2 * batches)
    assert len(seen) == 1
    assert_equal_runs(eager, compiled)
    assert len(traced) == 2
    with pytest.raises(NotCompiled, match="one size"):
        run(ppvae.SVI(*plain(), SGD, clip_norm=1.0, compile=True), batches)


def test_training_and_evaluation_mode(traced):
    make, loss = PROGRAMS["batch_norm_and_dropout"]

    def between(step, svi):
        svi.objective.train(step not in (2, 3))

    assert_compiled_is_eager(make, [(X,)] * 6, loss, between)
    assert len(traced) == 2


def test_freezing_in_the_middle(traced):
    def between(step, svi):
        svi.model.requires_grad_(not 2 <= step < 4)

    decay = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
    assert_compiled_is_eager(plain, [(X,)] * 6, between=between, optim=decay, rtol=1e-3)
    assert len(traced) == 2


def test_unused_parameters_have_no_gradient_and_do_not_decay(traced):
    def make():
        model, guide = plain()
        model.spare = nn.Linear(3, 3)
        return model, guide

    decay = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)
    ends = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), decay, compile=compile)
        svi.optimizer = ppvae.svi.build_optimizer(decay, svi.objective)  # the check refuses them
        before = svi.model.spare.weight.clone()
        ends.append(run(svi, [(X,)] * 3))
        assert svi.model.spare.weight.grad is None
        assert torch.equal(svi.model.spare.weight, before)
    assert_equal_runs(*ends, rtol=1e-3)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_an_optimiser_of_some_parameters(traced, clip_norm):
    ends = []
    for compile in (False, True):
        model, guide = plain()
        optimizer = torch.optim.SGD(guide.parameters(), lr=1e-3)
        svi = ppvae.SVI(model, guide, optimizer, clip_norm=clip_norm, compile=compile)
        before = tensors(model)
        ends.append(run(svi, [(X,)] * 4))
        assert all(torch.equal(before[k], v) for k, v in tensors(model).items())
    assert_equal_runs(*ends)


def test_two_steps_of_one_process_do_not_meet(traced):
    eager = [run(ppvae.SVI(*plain(), SGD, clip_norm=1.0), [(x,)] * 3) for x in (X, 2 * X)]
    both = [ppvae.SVI(*plain(), SGD, clip_norm=1.0, compile=True) for _ in range(2)]
    losses = [[], []]
    for step in range(3):
        for i, x in enumerate((X, 2 * X)):
            with torch.random.fork_rng():
                torch.manual_seed(3)
                for _ in range(step + 1):  # as many draws as this one's own stream has made
                    state = torch.get_rng_state()
                    standard_normal_of_a_step()
                torch.set_rng_state(state)
                losses[i].append(both[i].step(x))
    for i in range(2):
        assert losses[i] == pytest.approx(eager[i][0], rel=1e-4)


def standard_normal_of_a_step():
    """The draws of one step of the plain pair, as eager code makes them."""
    elbo.ELBO()(*plain_pair())(X)


@functools.cache
def plain_pair():
    with torch.random.fork_rng():
        return plain()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_large_products_are_onednns(traced, monkeypatch):
    """Values and gradients are those of torch, transposed operands and the bias included."""
    monkeypatch.setattr(graph, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(graph, "MIN_PRODUCT", 40 * 30 * 20)
    taken = []
    linear = torch.ops.mkldnn._linear_pointwise.default

    def counted(x, w, *rest):
        taken.append((tuple(x.shape), tuple(w.shape), x.is_contiguous()))
        return linear(x, w, *rest)

    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", counted)

    def loss_and_gradients(x, w, b, small):
        with torch.enable_grad():
            wanted = [tensor.detach().requires_grad_() for tensor in (x, w, b, small)]
            hidden = torch.nn.functional.linear(wanted[0], *wanted[1:3])
            loss = torch.nn.functional.softplus(hidden @ wanted[3]).square().sum()
            return [loss, *torch.autograd.grad(loss, wanted)]

    tensors = [normal(40, 20), normal(30, 20, seed=2), normal(30, seed=3), normal(30, 2, seed=4)]
    compiled = graph.Graph(loss_and_gradients, tensors)(*tensors)
    for one, other in zip(compiled, loss_and_gradients(*tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-4)
    # forward, and the gradients of x and w; those with ``small`` are torch's
    shapes = {(40, 20, 30), (40, 30, 20), (30, 40, 20)}
    assert {(*x, w[0]) for x, w, _ in taken} == shapes
    assert all(contiguous for _, _, contiguous in taken)


def test_state_continues_as_if_uninterrupted(traced):
    make, loss = PROGRAMS["batch_norm_and_dropout"]
    first = ppvae.SVI(*make(), ADAM, loss, compile=True)
    run(first, [(X,)] * 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = run(first, [(X,)] * 4, seed=8)
    second = ppvae.SVI(*make(), ADAM, loss, compile=True)
    second.load_state_dict(state)
    found = run(second, [(X,)] * 4, seed=8)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
    file.seek(0)
    first.load_state_dict(torch.load(file, weights_only=True))  # its graphs are there already
    assert run(first, [(X,)] * 4, seed=8)[0] == expected[0]


# -- nothing is left behind --------------------------------------------------------------------


def test_settings_are_as_before(traced):
    from torch._inductor import config

    before = copy.deepcopy(config.get_config_copy())
    for compile in (True, "auto"):
        svi = ppvae.SVI(*plain(), SGD, compile=compile)
        for validate in (True, False):
            with pyro.validation_enabled(validate):
                svi.step(X)
                assert pyro.infer.util.is_validation_enabled() == validate
                assert torch.distributions.Distribution._validate_args == validate
    assert torch.is_grad_enabled()
    assert config.get_config_copy() == before
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    "name", ["batch_norm_and_dropout", "recurrent", "automatic_guide", "inverse_autoregressive"]
)
def test_modules_can_be_copied_and_evaluated_afterwards(traced, name):
    make, loss = PROGRAMS[name]
    values = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), SGD, loss, clip_norm=1.0, compile=compile)
        run(svi, [(X,)] * 2)
        torch.manual_seed(2)
        value = svi.evaluate_loss(X)
        with contextlib.suppress(RuntimeError) if not compile else contextlib.nullcontext():
            copied = copy.deepcopy(svi.objective)  # some of Pyro's flows refuse after any step
            torch.manual_seed(2)
            with torch.no_grad():
                assert copied(X).item() == pytest.approx(value, rel=1e-5)
        values.append(value)
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_modules_can_be_pickled_afterwards(traced):
    model, guide, args = build("vae_conv")
    svi = ppvae.SVI(model, guide, SGD, elbo.ELBO(beta=elbo.LinearWarmup(5)), compile=True)
    run(svi, [args] * 2)
    copied = pickle.loads(pickle.dumps(svi.objective))
    assert all(torch.equal(v, tensors(svi.objective)[k]) for k, v in tensors(copied).items())


def test_a_batch_is_not_kept(traced):
    svi = ppvae.SVI(*plain(), SGD, compile=True)
    x = X.clone()
    alive = weakref.ref(x)
    svi.step(x)
    svi.step(X)
    del x
    gc.collect()
    assert alive() is None


# -- what cannot be compiled -------------------------------------------------------------------


def looks_at_a_value():
    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            if float(self.log_scale) < 100.0:
                observe(x, self.net(z))

    torch.manual_seed(0)
    model, guide = with_model(body)
    model.register_buffer("log_scale", torch.zeros(()))
    return model, guide


def loops_over_a_plate():
    def body(self, x):
        with pyro.plate("data", len(x)):
            loc = self.net(standard(x))
            for j in pyro.plate("pixels", D):
                pyro.sample(f"x_{j}", dist.Normal(loc[..., j], 1.0), obs=x[:, j])

    torch.manual_seed(0)
    return with_model(body)


def moves_by_itself():
    calls = []

    def body(self, x):
        calls.append(1)
        with pyro.plate("data", len(x)):
            observe(x, self.net(standard(x)) + len(calls))

    return with_model(body)


@pytest.mark.parametrize(
    ("make", "loss", "cure"),
    [
        (looks_at_a_value, None, r"looks at a tensor's value \(.item\(\).*use torch.where"),
        (loops_over_a_plate, None, r"loop over range\(n\), or vectorise"),
        (plain, elbo.ELBO(beta=Stepper()), r"state\.at_step\(schedule\)"),
    ],
    ids=["item", "loop", "step"],
)
def test_what_cannot_be_traced_says_why(traced, make, loss, cure):
    with pytest.raises(NotCompiled, match=f"compile=True, but .*{cure}"):
        ppvae.SVI(*make(), SGD, loss, compile=True).step(X)
    svi = ppvae.SVI(*make(), SGD, loss, clip_norm=1.0, compile="auto")
    with pytest.warns(RuntimeWarning, match=cure) as seen:
        found = run(svi, [(X,)] * 4)
    assert len(seen) == 1
    eager = ppvae.SVI(*make(), SGD, loss, clip_norm=1.0)
    assert_equal_runs(run(eager, [(X,)] * 4), found)
    assert svi._compiled.reason
    assert not fakes(svi.objective)


def test_pyros_own_losses_run_eagerly(traced):
    with pytest.raises(ValueError, match=r"Trace_ELBO of Pyro looks at its value"):
        ppvae.SVI(*plain(), SGD, pyro.infer.Trace_ELBO(), compile=True)
    svi = ppvae.SVI(*plain(), SGD, pyro.infer.Trace_ELBO(), clip_norm=1.0, compile="auto")
    eager = ppvae.SVI(*plain(), SGD, pyro.infer.Trace_ELBO(), clip_norm=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = run(svi, [(X,)] * 3)
    assert_equal_runs(run(eager, [(X,)] * 3), found)


def test_a_program_that_changes_from_call_to_call_is_refused(traced):
    with pytest.raises(NotCompiled, match="changes from call to call"):
        ppvae.SVI(*moves_by_itself(), SGD, compile=True).step(X)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_graph_with_other_numbers_is_refused(monkeypatch, factor):
    import torch._inductor.compile_fx

    def wrong(graph, inputs):
        return lambda *args: [out * factor for out in graph(*args)]

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", wrong)
    svi = ppvae.SVI(*plain(), SGD, compile=True)
    before = tensors(svi.objective)
    with pytest.raises(NotCompiled, match="at the same draws"):
        svi.step(X)
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())
    assert all(p.grad is None for p in svi.objective.parameters())


@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_network_that_no_program_owns(traced, compile):
    net = nn.Linear(Z, D)

    def model(x):
        with pyro.plate("data", len(x)):
            observe(x, net(standard(x)))

    with pytest.raises(ValueError, match="neither model nor guide owns"):
        ppvae.SVI(model, plain()[1], SGD, compile=compile).step(X)


def test_tensors_passed_by_keyword_or_in_a_tuple(traced):
    with pytest.raises(NotCompiled, match="by position"):
        ppvae.SVI(*vae(), SGD, compile=True).step(x=X)

    def first(body):
        return lambda self, pair: body(self, *pair)

    torch.manual_seed(0)
    model = Free(first(decode), net=nn.Linear(Z, D))
    guide = Free(first(encode), net=nn.Linear(D, 2 * Z))
    svi = ppvae.SVI(model, guide, SGD, compile="auto")
    with pytest.warns(RuntimeWarning, match="by position"):
        svi.step((X, X))
    x = X.clone()
    alive = weakref.ref(x)
    svi.step((x, x))
    del x
    gc.collect()
    assert alive() is None
    assert not traced


def test_compile_is_checked():
    with pytest.raises(ValueError, match="compile must be True, False or \"auto\", got 'yes'"):
        ppvae.SVI(*plain(), SGD, compile="yes")


def test_an_error_of_the_estimator_is_the_users_to_see(traced):
    make, _ = PROGRAMS["scaled"]
    svi = ppvae.SVI(*make(), SGD, elbo.IWELBO(2), compile="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ValueError, match="not linear in the log-weights"):
            svi.step(X)


def test_no_compiler(tmp_path):
    """In a process of its own: what is compiled, and where the compiler is, is cached."""
    script = """
        import torch, warnings
        from torch._inductor import config
        config.cpp.cxx = ("/nowhere/g++",)
        import ppvae
        from ppvae import conditionals, guides, models, nets
        from ppvae.pairs import NotCompiled
        from ppvae.compiled import Compiled

        def svi(compile):
            torch.manual_seed(0)
            model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
            return ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4)), compile=compile)

        x = torch.ones(5, 4)
        try:
            svi(True).step(x)
        except NotCompiled as error:
            print(error)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step = svi("auto")
            losses = [step.step(x) for _ in range(3)]
        told = [str(w.message) for w in seen if issubclass(w.category, RuntimeWarning)]
        print(len(told), *told)
        eager = svi(False)
        print([eager.step(x) for _ in range(3)] == losses)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, told, same = done.stdout.splitlines()
    assert refused.startswith("compile=True, but no graph can be built: no working C++ compiler")
    assert "install g++ or clang" in refused
    assert told.startswith("1 ") and "no working C++ compiler" in told
    assert same == "True"


# -- evidence -----------------------------------------------------------------------------------


def evidence(pair, compile, rows=23, **options):
    """13 particles on pieces of 5 datapoints, or 9 and then 4 on one; a rest at the end."""
    model, guide, args = pair
    args = [torch.cat([arg] * 4)[:rows] for arg in args]
    torch.manual_seed(3)
    return diagnostics.log_evidence(
        model, guide, *args, **{"num_particles": 13, "max_rows": 65, "compile": compile} | options
    )


def assert_equal_evidence(make, **options):
    eager = evidence(make(), False, **options)
    expected = torch.get_rng_state()
    compiled = evidence(make(), True, **options)
    assert torch.equal(torch.get_rng_state(), expected), "the random stream was moved"
    for name in ("log_evidence", "log_evidence_se", "elbo", "ess"):
        one, other = getattr(compiled, name), getattr(eager, name)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_the_evidence_of_every_pair_traced(traced, pair):
    rows = len(build(pair)[2][0]) if pair == "per_datapoint" else 23
    assert_equal_evidence(lambda: build(pair), rows=rows, max_rows=26 if rows < 23 else 65)
    assert len(traced) == 1


@pytest.mark.parametrize(("max_rows", "graphs"), [(65, 1), (9, 2), (1, 1), (10**6, 0)])
def test_pieces_of_the_evidence(traced, max_rows, graphs):
    """A rest at the end, and what fits into one piece, is not worth a graph."""
    assert_equal_evidence(lambda: build("vae_bernoulli"), max_rows=max_rows)
    assert len(traced) == graphs


@inductor
@pytest.mark.slow
def test_compiled_evidence():
    assert_equal_evidence(lambda: build("vae_bernoulli"))


def test_the_evidence_of_plain_functions(traced):
    """Latents that are discrete, networks that no program owns."""

    def make():
        torch.manual_seed(0)
        net = nn.Linear(D, 3)

        def model(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(x.new_ones(3) / 3))
                observe(x, c.unsqueeze(-1) * x.new_ones(D))

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Categorical(logits=net(x)))

        return model, guide, (X,)

    assert_equal_evidence(make)
    assert len(traced) == 1


def test_a_weight_that_is_not_finite_is_named_by_compiled_evidence(traced):
    """It is drawn once in hundreds: the draws that name the site are those that showed it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            observe(x, z.where(z < 2.7, math.nan).sum(-1, keepdim=True) + x.new_zeros(D))

    pair = model, guides.Prior(model), (X,)
    seen = []
    for compile in (False, True):
        with pytest.raises(ValueError, match=r"log-weight of datapoint \d+ is NaN .*'x'") as caught:
            evidence(pair, compile, rows=24, max_rows=13)
        seen.append(str(caught.value))
    assert seen[0] == seen[1]


def test_evidence_that_cannot_be_compiled(traced):
    pair = (*looks_at_a_value(), (X,))
    with pytest.raises(NotCompiled, match=r"compile=True, but .*looks at a tensor's value"):
        evidence(pair, True)
    with pytest.warns(RuntimeWarning, match="looks at a tensor's value") as warned:
        found = evidence(pair, "auto")
    assert len(warned) == 1
    assert torch.equal(found.log_evidence, evidence(pair, False).log_evidence)


# -- the compiled thing itself -----------------------------------------------------------------


@inductor
def test_draws_are_new_at_each_call_follow_the_seed_and_average_to_the_same():
    """On another batch than the one the graph was built for; 1000 draws each, 4.9 s.e. allowed.

    25 numbers are compared, at 1e-6 each: a false alarm in 4e-5 of all runs.
    """
    still = functools.partial(torch.optim.SGD, lr=0.0)
    x = 2 * normal(N, D, seed=7)
    samples = []
    for compile in (False, True):
        svi = ppvae.SVI(*plain(), still, compile=compile)
        svi.step(X)  # a graph is built here
        torch.manual_seed(compile)
        rows = []
        for _ in range(1000):
            loss = svi.update(x)
            grads = [p.grad.flatten() for p in svi.objective.parameters()]
            rows.append(torch.cat([loss.reshape(1), *grads])[:25])
        samples.append(torch.stack(rows).double())
        assert len(samples[-1][:, 0].unique()) > 990
        torch.manual_seed(11)
        first = [svi.step(x) for _ in range(3)]
        torch.manual_seed(11)
        assert [svi.step(x) for _ in range(3)] == first
        torch.manual_seed(12)
        assert svi.step(x) != first[0]
    error = sum(s.var(0) / len(s) for s in samples).sqrt()
    z = (samples[0].mean(0) - samples[1].mean(0)) / error
    assert z.abs().max() < 4.9


@inductor
def test_schedules_offsets_and_ragged_batches_compiled():
    data = normal(20, D)
    epoch = [(data[i : i + 6],) for i in range(0, 20, 6)]
    loss = elbo.ELBO(2, beta=elbo.Capacity(elbo.LinearWarmup(8, 0.0, 6.0), gamma=3.0))
    svi = assert_compiled_is_eager(plain, 3 * epoch, loss)
    assert len(svi._compiled._graphs) == 2


# -- on a GPU ----------------------------------------------------------------------------------


def on_cuda(make):
    return lambda: [program.cuda() for program in make()]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "label", ["ELBO-pathwise", "IWELBO-dreg", "ReweightedWakeSleep-reweighted"]
)
@pytest.mark.parametrize("pair", ["vae_bernoulli", "vae_conv", "cvae_learned_prior"])
def test_compiled_equals_eager_on_cuda(pair, label):
    """Draws are those of the eager step only up to the capture, so nothing is drawn after it."""
    args = tuple(arg.cuda() for arg in build(pair)[2])
    ends = []
    for compile in (False, True):
        programs = [program.cuda() for program in build(pair)[:2]]
        svi = ppvae.SVI(*programs, SGD, ALL_ESTIMATORS[label], clip_norm=1.0, compile=compile)
        torch.manual_seed(3)
        ends.append(([svi.step(*args) for _ in range(6)], tensors(svi.objective)))
    assert ends[1][0][:1] == pytest.approx(ends[0][0][:1], rel=1e-3)
    assert ends[1][0] == pytest.approx(ends[0][0], rel=0.5)
    assert svi.num_steps == svi.objective.step == 6


@pytest.mark.cuda
def test_a_replayed_step_draws_anew_and_follows_schedules_and_batches():
    def deterministic(self, x):  # nothing random reaches the loss: equal to the last digit or so
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.net(x), event_dim=1))

    def make():
        torch.manual_seed(0)
        model = Free(decode, net=nn.Linear(Z, D))
        return [p.cuda() for p in (model, Free(deterministic, net=nn.Linear(D, Z)))]

    batches = [(normal(N, D, seed=i).cuda(),) for i in range(8)]
    loss = elbo.ELBO(beta=elbo.LinearWarmup(6))
    ends = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), ADAM, loss, clip_norm=1.0, compile=compile)
        ends.append(([svi.step(*b) for b in batches], tensors(svi.objective)))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-3, atol=1e-5)
    svi = ppvae.SVI(*on_cuda(plain)(), functools.partial(ADAM, lr=0.0), compile=True)
    x = X.cuda()
    assert len({svi.step(x) for _ in range(20)}) > 15
    torch.manual_seed(4)
    first = [svi.step(x) for _ in range(3)]
    torch.manual_seed(4)
    assert [svi.step(x) for _ in range(3)] == first


@pytest.mark.cuda
def test_a_learning_rate_that_changes_reaches_a_replayed_step():
    moves = []
    for compile in (False, True):
        svi = ppvae.SVI(*on_cuda(plain)(), ADAM, compile=compile)
        scheduler = None
        for step in range(6):
            svi.step(X.cuda())
            scheduler = scheduler or torch.optim.lr_scheduler.StepLR(svi.optimizer, 1, gamma=0.1)
            if step < 5:
                scheduler.step()
            before = tensors(svi.objective)
        svi.step(X.cuda())
        after = tensors(svi.objective)
        moves.append(max((after[k] - before[k]).abs().max().item() for k in before))
    assert max(moves) < 1e-6  # the rate is 1e-7 by now, from 1e-2


class _Warm(ppvae.Program):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)
        self._t, self.options = 1.0, {"t": 1.0}

    def forward(self, x):
        with pyro.plate("data", len(x)):
            scale = self._t * self.options["t"]
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


@pytest.mark.parametrize("place", ["private", "dictionary", "copy"])
def test_numbers_are_read_wherever_a_program_keeps_them(place, traced):
    x = torch.bernoulli(torch.full((10, 4), 0.5))
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        model, guide = _Warm(), guides.Normal(nets.mlp(4, 4))
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(), compile=compile)
        svi.step(x)
        if place == "copy":
            svi = copy.deepcopy(svi)
        if place == "dictionary":
            svi.model.options["t"] = 3.0
        else:
            svi.model._t = 3.0
        losses.append([svi.step(x) for _ in range(2)])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
