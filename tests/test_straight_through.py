"""Draws whose density belongs to the drawn tensor: straight-through ones, and caches."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppvae
from ppvae import check_pair, diagnostics, elbo
from ppvae.pairs import moved

HEAT = torch.tensor(0.7)
X = torch.tensor([0.3, 1.2, -0.7])


class Model(ppvae.Program):
    """z of three units from a prior, x normal around a linear function of it."""

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.net, self.prior = nn.Linear(3, 4), prior

    def forward(self, x: Tensor) -> None:
        with ppvae.program.data_plate(x):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Guide(ppvae.Program):
    def __init__(self, posterior: Any) -> None:
        super().__init__()
        self.net, self.posterior = nn.Linear(4, 3), posterior

    def forward(self, x: Tensor) -> None:
        with ppvae.program.data_plate(x):
            pyro.sample("z", self.posterior(self.net(x)))


def one_hot(logits: Tensor) -> Any:
    return dist.OneHotCategoricalStraightThrough(logits=logits)


def relaxed(logits: Tensor) -> Any:
    return dist.RelaxedOneHotCategoricalStraightThrough(HEAT, logits=logits)


def bernoulli(logits: Tensor) -> Any:
    return dist.RelaxedBernoulliStraightThrough(HEAT, logits=logits).to_event(1)


GOOD = {
    "one-hot": (lambda: dist.OneHotCategorical(logits=torch.zeros(3)), one_hot),
    "relaxed": (lambda: relaxed(torch.zeros(3)), relaxed),
    "relaxed Bernoulli": (lambda: bernoulli(torch.zeros(3)), bernoulli),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_pair_is_taken_everywhere(name) -> None:
    prior, posterior = GOOD[name]
    model, guide, x = Model(prior), Guide(posterior), torch.randn(12, 4)
    report = check_pair(model, guide, x)
    assert "no row's log-probability changes with the other rows" in report.holds
    assert "3 particles at once are weighed as one by one" in report.holds
    assert any("straight-through" in note and "biased" in note for note in report.notes)
    assert {name for name, why in report.gradients.items() if why} == {"dreg"}
    assert "'z'" in report.gradients["dreg"]
    assert diagnostics.log_evidence(model, guide, x, num_particles=50).log_evidence.isfinite().all()
    for estimator in (elbo.ELBO(2), elbo.ELBO(2, "stl"), elbo.IWELBO(3)):
        svi = ppvae.SVI(model, guide, torch.optim.Adam, estimator)
        assert svi.step(x) < 1e4


@pytest.mark.parametrize("name", GOOD)
def test_a_pair_that_mixes_rows_is_still_found(name) -> None:
    prior, posterior = GOOD[name]

    class Mixing(Guide):
        def forward(self, x: Tensor) -> None:
            super().forward(x - x.mean(0))

    with pytest.raises(ppvae.PairError, match="site 'z' of the guide: the log-probability of one"):
        check_pair(Model(prior), Mixing(posterior), torch.randn(12, 4))


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    "estimator",
    [elbo.IWELBO(3, "dreg"), elbo.ChiUpperBound(3, "dreg"), elbo.ReweightedWakeSleep(3, "dreg")],
    ids=str,
)
def test_doubly_reparameterised_gradients_name_the_site(name, estimator) -> None:
    prior, posterior = GOOD[name]
    with pytest.raises(ValueError, match=r"'z'.*StraightThrough.*\"pathwise\""):
        estimator.loss_and_grads(Model(prior), Guide(posterior), torch.randn(5, 4))


# ------------------------------------------------------------------------------ values, gradients


class OneUnit(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.RelaxedBernoulliStraightThrough(HEAT, probs=0.4 + 0 * HEAT))
            pyro.sample("x", dist.Normal(self.slope * z, 1.0), obs=x)


class OneLogit(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, -0.5, 0.9]))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedBernoulliStraightThrough(HEAT, logits=self.logits))


def by_quadrature(model: OneUnit, guide: OneLogit) -> tuple[Tensor, Tensor]:
    """The ELBO and its gradient in the logits, where the slope of rounding is taken to be 1."""
    u = ((torch.arange(100_000) + 0.5) / 100_000).double()
    logits = guide.logits.detach().double().requires_grad_()
    noise = torch.log(u) - torch.log1p(-u)
    soft = torch.sigmoid((logits[:, None] + noise) / HEAT)
    eps = torch.finfo(torch.float32).eps
    soft = soft.clamp(eps, 1 - eps)
    hard = soft.round().detach() + soft - soft.detach()
    q = dist.RelaxedBernoulli(HEAT, logits=logits[:, None]).log_prob(soft)
    p = dist.RelaxedBernoulli(HEAT, probs=torch.tensor(0.4)).log_prob(soft)
    log_x = dist.Normal(model.slope.detach() * hard, 1.0).log_prob(X[:, None])
    value = (log_x + p - q).mean(1).sum()
    return value.detach(), torch.autograd.grad(-value, logits)[0]


@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_relaxed_draws_against_quadrature(gradient) -> None:
    model, guide = OneUnit(), OneLogit()
    value, right = by_quadrature(model, guide)
    losses, slopes = [], []
    for _ in range(40):
        guide.zero_grad()
        losses.append(elbo.ELBO(3000, gradient).loss_and_grads(model, guide, X))
        slopes.append(guide.logits.grad.clone())
    found, loss = torch.stack(slopes), torch.tensor(losses)
    assert ((found.mean(0) - right).abs() < 4 * found.std(0) / 40**0.5).all()
    assert (loss.mean() + value).abs() < 4 * loss.std() / 40**0.5


def test_a_discrete_draw_has_the_evidence_of_enumeration() -> None:
    model, guide, x = Model(GOOD["one-hot"][0]), Guide(one_hot), torch.randn(6, 4)
    units = torch.eye(3)
    log_x = dist.Normal(model.net(units)[:, None], 1.0).to_event(1).log_prob(x)
    right = (log_x - torch.tensor(3.0).log()).logsumexp(0)
    found = diagnostics.log_evidence(model, guide, x, num_particles=4000, seed=0)
    errors = (found.log_evidence - right.detach()).abs()
    assert (errors < 4 * found.log_evidence_se + 1e-6).all()


def test_a_linear_likelihood_has_its_exact_gradient() -> None:
    """The slope through a one-hot draw is exact where what follows is linear in it."""
    table = torch.tensor([[0.3, -1.0, 0.5]])

    def model() -> None:
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3)))
            pyro.factor("x", (z * table).sum(-1))
            pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.zeros(1))

    class Logits(ppvae.Program):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([[0.2, 0.1, -0.4]]))

        def forward(self) -> None:
            with pyro.plate("data", 1):
                pyro.sample("z", dist.OneHotCategoricalStraightThrough(logits=self.logits))

    guide = Logits()
    probs = guide.logits.softmax(-1)
    kl = torch.distributions.kl_divergence(
        dist.OneHotCategorical(logits=guide.logits), dist.OneHotCategorical(logits=torch.zeros(3))
    )
    (right,) = torch.autograd.grad(-((probs * table).sum() - kl.sum()), guide.logits)
    slopes = []
    for _ in range(30):
        guide.zero_grad()
        elbo.ELBO(200, kl="analytic").loss_and_grads(model, guide)
        slopes.append(guide.logits.grad.clone())
    found = torch.stack(slopes)
    assert ((found.mean(0) - right).abs() < 4 * found.std(0) / 30**0.5 + 1e-5).all()


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("prior", "posterior", "match"),
    [
        (lambda: dist.OneHotCategorical(logits=torch.zeros(3)), relaxed, "a probability over a de"),
        (
            lambda: dist.RelaxedOneHotCategorical(HEAT, logits=torch.zeros(3)),
            relaxed,
            "before it is rounded.*RelaxedOneHotCategoricalStraightThrough in both",
        ),
        (
            lambda: dist.RelaxedBernoulli(HEAT, logits=torch.zeros(3)).to_event(1),
            bernoulli,
            "before it is rounded.*RelaxedBernoulliStraightThrough in both",
        ),
    ],
    ids=["one-hot prior", "relaxed prior", "relaxed Bernoulli prior"],
)
def test_densities_of_different_things_are_refused(prior, posterior, match) -> None:
    pair, x = (Model(prior), Guide(posterior)), torch.randn(8, 4)
    for use in (
        lambda: check_pair(*pair, x),
        lambda: ppvae.SVI(*pair).step(x),
        lambda: diagnostics.log_evidence(*pair, x, num_particles=30),
        lambda: ppvae.diagnose(*pair, x, num_particles=30),
    ):
        with pytest.raises(ppvae.PairError, match=match):
            use()


class Remembers(dist.Normal):
    """Gives the density of a draw that it knows, and of any other tensor something else."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        self.last = super().rsample(torch.Size(sample_shape))
        return self.last

    def log_prob(self, value: Tensor) -> Tensor:
        right = super().log_prob(value)
        return right if value is getattr(self, "last", None) else right + 5.0

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return Remembers(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Cached(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Remembers(self.slope * x, torch.ones(len(x))))


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    "estimator",
    [elbo.ELBO(2, "stl"), elbo.IWELBO(2, "dreg"), elbo.PIWELBO(2, num_groups=2)],
    ids=str,
)
def test_a_density_that_a_copy_has_not_is_refused_by_name(estimator) -> None:
    with pytest.raises(ValueError, match=r"site 'z': Remembers gives a copy.*\"pathwise\""):
        estimator.loss_and_grads(normal, Cached(), X)
    report = check_pair(normal, Cached(), X)
    assert "Remembers gives a copy" in report.gradients["stl"]
    assert report.gradients["pathwise"] == ""
    assert any("not checked" in note and "'z'" in note for note in report.notes)


def test_moved_takes_what_the_density_belongs_to_along() -> None:
    q = dist.RelaxedBernoulliStraightThrough(HEAT, logits=torch.tensor([0.3, -1.0, 2.0]))
    z = q.rsample()
    index = torch.tensor([2, 0, 0])
    other = moved(z, lambda tensor: tensor[index])
    right = dist.RelaxedBernoulliStraightThrough(HEAT, logits=q.logits[index]).log_prob(other)
    torch.testing.assert_close(right, q.log_prob(z)[index])
    plain = torch.randn(3)
    assert torch.equal(moved(plain, lambda tensor: tensor[index]), plain[index])
