"""Random programs with global and local latents, against densities written out by hand.

All are linear and Gaussian, with globals that are scalars, vectors, matrices or in a plate of their
own, and locals that are scalars, vectors or in an inner plate. The exact ELBO, and its gradient,
come from the Hessian of the log-joint in the guide's noise; other bounds from the recorded draws.
"""

import math
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import oracles
import ppvae
from oracles import assert_mean, trainable
from ppvae import elbo

pytestmark = pytest.mark.usefixtures("float64")
N = 4
OWN = {
    "scalar": (),
    "vector": (2,),
    "matrix": (2, 2),
    "plate": (3,),
    "far plate": (3,),
    "inner": (2,),
}
Values = dict[str, Tensor]  # globals of their own shape, locals with the rows first


class Spec:
    """What a random program consists of."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = ["scalar", "vector", "matrix", "plate", "far plate"]
        self.globals = {f"g{i}": rng.choice(kinds) for i in range(rng.randint(1, 3))}
        kinds = ["scalar", "vector", "inner"]
        self.locals = {f"z{i}": rng.choice(kinds) for i in range(rng.randint(0, 2))}
        self.kinds = self.globals | self.locals
        self.share = {name: rng.uniform(-1, 1) for name in self.kinds}
        self.sd = {name: rng.uniform(0.5, 1.5) for name in [*self.kinds, "x"]}
        self.masked, self.in_plate = rng.random() < 0.3, rng.random() < 0.5
        self.K = rng.choice([1, 3])
        ways = [("pathwise", "sampled"), ("stl", "sampled"), ("pathwise", "analytic")]
        self.gradient, self.kl = rng.choice(ways)
        self.nonlinear = rng.choice(
            [elbo.IWELBO(3), elbo.CIWELBO(2), elbo.MIWELBO(2, num_groups=2), elbo.RenyiELBO(2)]
        )

    def draw(self, name: str, loc: Tensor, sd) -> Tensor:
        """Sample a site of which each number has the mean of its row; the sum of the numbers."""
        kind, event = self.kinds[name], len(OWN[self.kinds[name]])
        if kind in ("plate", "far plate"):
            with pyro.plate(f"{name}_plate", 3, dim=-1 if kind == "plate" else -2):
                return pyro.sample(name, dist.Normal(loc, sd)).sum()
        if kind == "inner":
            with pyro.plate(f"{name}_plate", 2, dim=-2):
                return pyro.sample(name, dist.Normal(loc, sd)).sum(-2, keepdim=True)
        wide = loc[(..., *[None] * event)].expand((*loc.shape, *OWN[kind]))
        value = pyro.sample(name, dist.Normal(wide, sd).to_event(event))
        return value.flatten(-event).sum(-1) if event else value


class Model(nn.Module):
    def __init__(self, spec: Spec, size: int | None) -> None:
        super().__init__()
        self.spec, self.size, self.slope = spec, size, nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, known: Tensor) -> None:
        spec, total = self.spec, torch.zeros(())
        for name in spec.globals:
            total = total + spec.share[name] * spec.draw(name, self.slope * total, spec.sd[name])
        with rows(x, self.size):
            total = total.expand(len(x))
            for name in spec.locals:
                value = spec.draw(name, self.slope * total, spec.sd[name])
                total = total + spec.share[name] * value
            with poutine.mask(mask=known if spec.masked else True):
                pyro.sample("x", dist.Normal(total, spec.sd["x"]), obs=x)

    def by_hand(self, values: Values, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the globals, and of the rows given them, ``(N,)``."""
        spec, total, apart, of_rows = self.spec, torch.zeros(()), torch.zeros(()), 0.0 * x
        for name, value in values.items():
            terms = normal(value, self.slope * total, spec.sd[name])
            total = total + spec.share[name] * summed(value, name in spec.locals)
            if name in spec.globals:
                apart = apart + terms.sum()
            else:
                of_rows = of_rows + summed(terms, True)
        seen = known.double() if spec.masked else 1.0
        return apart, of_rows + seen * normal(x, total.expand(len(x)), spec.sd["x"])


class Guide(nn.Module):
    floor = 0.2  # of its sds: narrow, so that gradients have no heavy tails

    def __init__(self, spec: Spec, size: int | None) -> None:
        super().__init__()
        self.spec, self.size = spec, size
        for name in spec.kinds:
            setattr(self, name, nn.Parameter(torch.rand(3)))

    def moments(self, name: str, before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        tie, slope, sd = getattr(self, name)
        loc = (tie - 0.5) * before + slope * (x if name in self.spec.locals else 1.0)
        return loc, self.floor + 0.3 * sd

    def forward(self, x: Tensor, known: Tensor) -> None:
        before = torch.zeros(())
        for name in self.spec.globals:
            before = before + self.spec.draw(name, *self.moments(name, before, x))
        with rows(x, self.size):
            before = before.expand(len(x))
            for name in self.spec.locals:
                before = before + self.spec.draw(name, *self.moments(name, before, x))

    def by_hand(self, values: Values, x: Tensor) -> tuple[Tensor, Tensor]:
        """log q of the globals, and of the locals given them, ``(N,)``."""
        before, apart, of_rows = torch.zeros(()), torch.zeros(()), 0.0 * x
        for name, value in values.items():
            terms = normal(value, *self.moments(name, before, x))
            before = before + summed(value, name in self.spec.locals)
            if name in self.spec.globals:
                apart = apart + terms.sum()
            else:
                of_rows = of_rows + summed(terms, True)
        return apart, of_rows

    def at(self, noise: Tensor, x: Tensor) -> Values:
        """The latents as functions of all noise in one vector."""
        before, values, left = torch.zeros(()), {}, noise
        for name, kind in self.spec.kinds.items():
            local = name in self.spec.locals
            shape = (len(x), *OWN[kind]) if local else OWN[kind]
            count = math.prod(shape)
            loc, sd = self.moments(name, before, x)
            values[name] = aligned(loc, len(shape)) + sd * left[:count].reshape(shape)
            left, before = left[count:], before + summed(values[name], local)
        assert not len(left)
        return values


def rows(x: Tensor, size: int | None) -> pyro.plate:
    return pyro.plate("data", size or len(x), subsample=None if size is None else x, dim=-1)


def aligned(loc: Tensor, dims: int) -> Tensor:
    return loc[(..., *[None] * (dims - loc.dim()))]


def summed(value: Tensor, by_row: bool) -> Tensor:
    return (
        value.flatten(1).sum(1) if by_row and value.dim() > 1 else value if by_row else value.sum()
    )


def normal(value: Tensor, loc: Tensor, sd) -> Tensor:
    z = (value - aligned(loc, value.dim())) / sd
    return -0.5 * z.square() - torch.as_tensor(sd).log() - 0.5 * math.log(2 * math.pi)


def pair(spec: Spec, seed: int, size: int | None = None) -> tuple[Model, Guide]:
    torch.manual_seed(seed)
    return Model(spec, size), Guide(spec, size)


def exact_elbo(model: Model, guide: Guide, x: Tensor, known: Tensor) -> Tensor:
    """E log p of a quadratic log-joint, by its Hessian in the noise, and the guide's entropy."""
    spec = guide.spec
    counts = {
        n: math.prod(OWN[k]) * (len(x) if n in spec.locals else 1) for n, k in spec.kinds.items()
    }

    def joint(noise: Tensor) -> Tensor:
        apart, of_rows = model.by_hand(guide.at(noise, x), x, known)
        return apart + of_rows.sum()

    centre = torch.zeros(sum(counts.values()))
    curvature = torch.autograd.functional.hessian(joint, centre, create_graph=True)
    sds = [count * guide.moments(name, x[0], x)[1].log() for name, count in counts.items()]
    entropy = sum(sds) + len(centre) * 0.5 * (1 + math.log(2 * math.pi))
    return joint(centre) + curvature.trace() / 2 + entropy


def drawn_values(weights: ppvae.LogWeights, spec: Spec, k: int, K: int) -> Values:
    """The k-th particle of a run, laid out as by hand."""
    found = {}
    for name, kind in spec.kinds.items():
        value = weights.guide_trace.nodes[name]["value"]
        if name in spec.globals:
            found[name] = value.reshape(OWN[kind])
        else:
            value = value[k] if K > 1 else value
            found[name] = value.T if kind == "inner" else value.reshape(-1, *OWN[kind])
    return found


SEEDS = [*range(20), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20, 200))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program(seed: int) -> None:
    spec = Spec(seed)
    model, guide = pair(spec, seed)
    x, known = torch.randn(N), torch.tensor([True, False, True, True])

    # single values of a nonlinear bound, and of its parts
    K = spec.nonlinear.num_draws
    torch.manual_seed(seed)
    loss = spec.nonlinear(model, guide)(x, known)
    torch.manual_seed(seed)
    weights = ppvae.log_weights(model, guide, x, known, num_particles=K)
    log_w = []
    for k in range(K):
        values = drawn_values(weights, spec, k, K)
        p, q = model.by_hand(values, x, known), guide.by_hand(values, x)
        log_w.append(p[1] - q[1])
        torch.testing.assert_close(weights.log_global, p[0] - q[0])
    torch.testing.assert_close(weights.log_w, torch.stack(log_w))
    value = spec.nonlinear.bound(torch.stack(log_w)).sum() + p[0] - q[0]
    torch.testing.assert_close(-loss, value)

    # the mean of the ELBO over draws and minibatches, and of its gradient
    size = N if spec.in_plate else None
    model, guide = pair(spec, seed, size)
    parameters = trainable(model, guide)
    exact = exact_elbo(model, guide, x, known)
    objective = elbo.ELBO(spec.K, spec.gradient, kl=spec.kl)(model, guide)
    objective.num_rows = None if spec.in_plate else N
    found = []
    for _ in range(100):
        batch = torch.randperm(N)[:2]
        value = -objective(x[batch], known[batch]) * (1 if spec.in_plate else 2)
        found.append(torch.cat([value.detach()[None], oracles.exact_gradient(value, parameters)]))
    expected = torch.cat([exact.detach()[None], oracles.exact_gradient(exact, parameters)])
    assert_mean(torch.stack(found), expected, repr(vars(spec)))


def test_the_exact_value_is_that_of_the_densities() -> None:
    """The oracle by the Hessian against draws of the noise, without any program."""
    spec = Spec(3)
    model, guide = pair(spec, 3)
    x, known = torch.randn(N), torch.ones(N, dtype=torch.bool)
    counts = sum(math.prod(OWN[k]) * (N if n in spec.locals else 1) for n, k in spec.kinds.items())
    found = []
    with torch.no_grad():
        for _ in range(2000):
            values = guide.at(torch.randn(counts), x)
            p, q = model.by_hand(values, x, known), guide.by_hand(values, x)
            found.append(p[0] + p[1].sum() - q[0] - q[1].sum())
    assert_mean(torch.stack(found), exact_elbo(model, guide, x, known).detach())
