"""Natural-gradient local fits: the information, the optimum, the evaluations it takes."""

import math

import pytest
import torch
from torch import Tensor, nn

import ppvae
from oracles import LinearModel
from ppvae import conditionals, diagnostics, guides, models, nets, posteriors
from ppvae.local import Indexed, _root_of_fisher, fit_local

pytestmark = pytest.mark.usefixtures("float64")
ROWS = 6


def diagonal(rows: int = ROWS, dim: int = 2, positive=None):
    head = conditionals.Normal(nn.Identity(), **({"positive": positive} if positive else {}))
    return guides.PerDatapoint(head, 0.5 * torch.randn(rows, 2 * dim))


def full(rows: int = ROWS, dim: int = 2):
    head = posteriors.FullNormal(nn.Identity(), dim)
    return guides.PerDatapoint(head, 0.5 * torch.randn(rows, dim * (dim + 3) // 2))


class Counted(nn.Module):
    """A decoder that counts the rows it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, z: Tensor) -> Tensor:
        self.rows += z[..., 0].numel()
        return self.net(z)


@pytest.mark.parametrize("make", [diagonal, full, lambda: diagonal(positive=nn.Softplus())])
def test_the_information_is_the_curvature_of_the_divergence(make) -> None:
    guide = make()
    table, index = guide.table.rows, torch.arange(ROWS)
    fn = guide.posterior(index).expand([4, ROWS])
    roots = _root_of_fisher(ppvae.pairs.law(fn), table)
    found = torch.einsum("inp,inq->npq", roots, roots)
    for n in range(ROWS):
        fixed = guide.head(table[n : n + 1].detach())

        def divergence(row: Tensor, fixed=fixed) -> Tensor:
            return torch.distributions.kl_divergence(fixed, guide.head(row[None])).sum()

        exact = torch.autograd.functional.hessian(divergence, table[n].detach())
        torch.testing.assert_close(found[n], exact, rtol=1e-8, atol=1e-8)


def test_a_normal_posterior_is_found_exactly_and_its_diagonal_optimum(float64) -> None:
    model = LinearModel(2, 4)
    x, index = model.draw(ROWS), torch.arange(ROWS)
    A, a, S = model.posterior()
    guide = full()
    fit_local(Indexed(model), guide, x, index, natural=True)
    exact = model.log_evidence(x)
    bound = ppvae.elbo.ELBO(4).evaluate(Indexed(model), guide, x, index)
    torch.testing.assert_close(bound, exact, rtol=0, atol=1e-6)  # every weight is log p(x)
    torch.testing.assert_close(guide.posterior(index).mean, x @ A.T + a, rtol=0, atol=1e-3)
    # of independent units the best have the posterior's means and conditional precisions
    for make in (diagonal, lambda: diagonal(positive=nn.Softplus())):
        guide = make()
        fit_local(Indexed(model), guide, x, index, natural=True, steps=200, num_particles=32)
        q = guide.posterior(index)
        torch.testing.assert_close(q.mean, x @ A.T + a, rtol=0, atol=1e-2)
        scale = torch.linalg.inv(S).diagonal().rsqrt().expand(ROWS, -1)
        torch.testing.assert_close(q.variance.sqrt(), scale, rtol=2e-2, atol=0)


def test_a_fifth_of_the_evaluations_is_as_good() -> None:
    torch.manual_seed(0)
    decoder = Counted(nets.mlp(4, 16, 12))
    for parameter in decoder.parameters():
        parameter.data.mul_(2.0)
    model = models.VAE(conditionals.Bernoulli(decoder), latent_dim=4)
    x, index = torch.bernoulli(torch.full((100, 12), 0.5)), torch.arange(100)
    found, rows = {}, {}
    for name, options in {"adam": {"steps": 300}, "natural": {"natural": True}}.items():
        torch.manual_seed(1)
        guide, decoder.rows = diagonal(100, 4), 0
        fit_local(Indexed(model), guide, x, index, **options)
        rows[name] = decoder.rows
        estimate = diagnostics.log_evidence(Indexed(model), guide, x, index, num_particles=4000)
        found[name] = estimate.elbo.mean().item()
    assert rows["natural"] <= rows["adam"] / 5
    assert found["natural"] > found["adam"] - 0.01


def test_gaps_takes_natural_steps() -> None:
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
    x = torch.bernoulli(torch.full((20, 4), 0.5))
    options = {"log_evidence": torch.zeros(20), "num_particles": 4000, "seed": 0}
    slow = diagnostics.gaps(model, guide, x, **options)
    fast = diagnostics.gaps(model, guide, x, natural=True, **options)
    difference = fast.local["own family"] - slow.local["own family"]
    se = math.hypot(*(g.local_se["own family"].mean().item() for g in (slow, fast)))
    assert abs(difference.mean().item()) < 0.01 + 4 * se / math.sqrt(20)


def test_what_is_refused() -> None:
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    x, index = torch.ones(ROWS, 4), torch.arange(ROWS)
    flow = posteriors.Flow(nn.Identity(), posteriors.iaf(2, 3, hidden=[4]), 2, context_dim=3)
    local = guides.PerDatapoint(flow, torch.zeros(ROWS, 7))
    with pytest.raises(ValueError, match="natural=True takes a guide of one normal latent"):
        fit_local(Indexed(model), local, x, index, natural=True)
    with pytest.raises(ValueError, match="natural=True takes a guide of one normal latent"):
        fit_local(model, guides.Normal(nets.mlp(4, 8, 4)), x, natural=True)
    with pytest.raises(ValueError, match="num_particles is even, got 3"):
        fit_local(Indexed(model), diagonal(), x, index, natural=True, num_particles=3)
