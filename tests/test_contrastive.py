"""SoftCVI beside wake-phi: enumeration of all tuples of draws."""

import itertools

import pytest
import torch

import oracles
from oracles import BeliefGuide, BeliefNet, LinearGuide, LinearModel, exact_gradient, trainable
from ppvae import elbo

X = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.float64)
pytestmark = pytest.mark.usefixtures("float64")


def expected(estimator, row, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean gradients of model and guide, over all 8^K tuples of states."""
    model, guide = BeliefNet(), BeliefGuide()
    objective, K = estimator(model, guide), estimator.num_particles
    mass, totals = guide.log_q(row).exp().detach()[:, 0], [0.0, 0.0]
    for choice in itertools.product(range(8), repeat=K):
        draws = oracles.states()[list(choice)].unsqueeze(1)
        monkeypatch.setattr(
            torch.distributions.Bernoulli,
            "sample",
            lambda self, shape=(), d=draws: (
                d.reshape(self._extended_shape(shape))
                if len(self._extended_shape(shape)) == 3
                else d[0].reshape(self._extended_shape(shape))
            ),
        )
        loss = objective(row)
        for i, part in enumerate((model, guide)):
            totals[i] = totals[i] + mass[list(choice)].prod() * exact_gradient(
                loss, trainable(part)
            )
    return totals[0], totals[1]


def test_with_all_of_q_as_the_others_it_has_the_mean_of_wake_phi(monkeypatch) -> None:
    for row in X.split(1):
        soft = expected(elbo.SoftCVI(2, negative=1.0), row, monkeypatch)
        wake = expected(elbo.ReweightedWakeSleep(2), row, monkeypatch)
        for one, other in zip(soft, wake, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            assert other.abs().max() > 1e-2


@pytest.mark.parametrize("negative", [0.0, 0.75])
def test_its_mean_is_that_of_its_formula(negative, monkeypatch) -> None:
    row, model, guide = X[:1], BeliefNet(), BeliefGuide()
    found = expected(elbo.SoftCVI(2, negative=negative), row, monkeypatch)[1]
    log_q, log_p = guide.log_q(row)[:, 0], model.log_joint(row)[:, 0].detach()
    total = 0.0
    for pair in itertools.product(range(8), repeat=2):
        q = log_q[list(pair)]
        labels = torch.softmax(log_p[list(pair)] - negative * q.detach(), 0)
        cross_entropy = -(labels * torch.log_softmax(q - negative * q.detach(), 0)).sum()
        total = total + q.sum().exp().detach() * cross_entropy
    torch.testing.assert_close(found, exact_gradient(total, trainable(guide)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("negative", [0.0, 0.5, 1.0])
def test_it_vanishes_at_the_exact_posterior_where_wake_phi_does_not(negative) -> None:
    model = LinearModel(2, 4)
    guide = LinearGuide(model)
    x = model.draw(5)

    def largest(estimator):
        grads = torch.autograd.grad(estimator(model, guide)(x), trainable(guide))
        return max(g.abs().max() for g in grads)

    assert largest(elbo.SoftCVI(6, negative=negative)) < 1e-10
    assert largest(elbo.ReweightedWakeSleep(6)) > 0.1


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="needs num_particles >= 2"):
        elbo.SoftCVI(1)
    with pytest.raises(ValueError, match=r"a power of q in \[0, 1\], got 1.5"):
        elbo.SoftCVI(negative=1.5)
    with pytest.raises(TypeError, match="negative must be a number"):
        elbo.SoftCVI(negative="half")
