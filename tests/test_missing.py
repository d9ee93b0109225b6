"""Missing values: evidence and imputations against exact ones, masks everywhere, faults."""

import functools
import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from compiling import ADAM, assert_compiled_is_eager
from ppvae import conditionals, data, diagnostics, distributions, elbo, guides, models, nets
from registry import build

W = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
B = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
SIGMA, NAN = 0.5, math.nan
X = torch.tensor([[0.3, 1.2, NAN]], dtype=torch.float64)


class Line(nn.Module):
    def forward(self, z):
        return z @ W.T + B


class Posterior(nn.Module):
    """p(z | observed part), its covariance times a factor and its mean moved."""

    def __init__(self, factor=1.0, shift=0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x, observed):
        o = observed.to(W.dtype)
        precision = torch.eye(2) + torch.einsum("nd,di,dj->nij", o, W, W) / SIGMA**2
        rest = torch.where(observed, x - B, 0.0) / SIGMA**2
        cov = torch.linalg.inv(precision)
        mean = torch.einsum("nij,dj,...nd->...ni", cov, W, rest) + self.shift
        return dist.MultivariateNormal(mean, self.factor * cov)


def linear(**wrong):
    likelihood = conditionals.Normal(Line(), scale=SIGMA)
    model = models.Masked(models.VAE(likelihood, latent_dim=2))
    return model, guides.Amortized(Posterior(**wrong))


def joint():
    """Mean and covariance of x."""
    return B, W @ W.T + SIGMA**2 * torch.eye(3)


def exact(x, observed):
    """log p of the observed part, and mean and covariance of the missing one, of a single row."""
    mean, cov = joint()
    o, m = observed.nonzero()[:, 0], (~observed).nonzero()[:, 0]
    inside = cov[o][:, o]
    log_p = dist.MultivariateNormal(mean[o], inside).log_prob(x[o]) if len(o) else torch.zeros(())
    gain = cov[m][:, o] @ torch.linalg.inv(inside)
    return log_p, mean[m] + gain @ (x[o] - mean[o]), cov[m][:, m] - gain @ cov[o][:, m]


def some_rows(rows=7):
    torch.manual_seed(1)
    x = dist.MultivariateNormal(*joint()).sample((rows,))
    observed = torch.rand(rows, 3) < 0.5
    observed[0], observed[1] = False, True
    return x.masked_fill(~observed, NAN), observed


# ------------------------------------------------------------------------------ evidence


def test_the_evidence_is_of_the_observed_part(float64):
    """Also of a row of which nothing is observed: log p = 0."""
    x, observed = some_rows()
    log_w = ppvae.log_weights(*linear(), x, observed, num_particles=5).log_w
    expected = torch.stack([exact(*row)[0] for row in zip(x, observed, strict=True)])
    torch.testing.assert_close(log_w, expected.expand(5, -1), rtol=0, atol=1e-12)
    assert log_w[0, 0] == pytest.approx(0.0, abs=1e-14)
    spec = ppvae.log_weights(*linear(), X, ~X.isnan()).log_w.item()
    assert spec == pytest.approx(-2.171782344, abs=1e-9)


def test_what_a_mask_hides_changes_nothing(float64):
    """Values and gradients of a table with every head, hidden values being NaN, 0, or 1e6."""
    model, _, (x,) = build("vae_columns")
    observed = torch.rand(x.shape) < 0.5
    guide = guides.Normal(nets.Masked(nets.mlp(2 * x.shape[1], 8, 4)))
    found = []
    for hidden in (NAN, 0.0, 1e6):
        torch.manual_seed(3)
        given = torch.where(observed, x, hidden)
        weights = ppvae.log_weights(models.Masked(model), guide, given, observed, num_particles=3)
        parameters = [*model.parameters(), *guide.parameters()]
        slopes = torch.autograd.grad(weights.log_w.logsumexp(0).sum(), parameters)
        found.append((weights.log_w, *slopes))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(value.isfinite().all() for value in found[0])
    z = weights.guide_trace.nodes["z"]["value"]
    by_column = torch.stack(list(model.likelihood.by_column(x, z).values()), -1)
    summed = torch.where(observed, by_column, 0.0).sum(-1)
    torch.testing.assert_close(weights.log_p["x"], summed)


def test_iwelbo_is_the_bound_of_miwae(float64):
    """Equation 3 of the paper, by hand, at the draws of the guide; value and gradient."""
    dim, K = 4, 6
    likelihood = conditionals.Normal(nets.mlp(2, 5, 2 * dim))
    encoder = nets.mlp(dim, 5, 4)
    model = models.Masked(models.VAE(likelihood, latent_dim=2))
    guide = guides.Normal(nets.Masked(encoder, channel=False))
    x, observed = torch.randn(3, dim), torch.rand(3, dim) < 0.6
    parameters = [*likelihood.parameters(), *encoder.parameters()]
    torch.manual_seed(5)
    loss = elbo.IWELBO(K)(model, guide)(x, observed)
    found = torch.autograd.grad(loss, parameters)

    torch.manual_seed(5)
    loc, raw = encoder(torch.where(observed, x, 0.0)).chunk(2, -1)
    z = loc + raw.exp() * torch.randn(K, 3, 2)
    mean, scale = likelihood.net(z).chunk(2, -1)
    normal = torch.distributions.Normal
    log_r = (normal(mean, scale.exp()).log_prob(x) * observed).sum(-1)
    log_r = log_r + normal(0.0, 1.0).log_prob(z).sum(-1)
    log_r = log_r - normal(loc, raw.exp()).log_prob(z).sum(-1)
    bound = (log_r.logsumexp(0) - math.log(K)).sum()
    torch.testing.assert_close(-loss, bound)
    for one, two in zip(found, torch.autograd.grad(-bound, parameters), strict=True):
        torch.testing.assert_close(one, two)


def test_a_minibatch_with_masks_knows_its_data_set(float64):
    x, observed = some_rows()
    model, guide = linear(factor=1.5)
    torch.manual_seed(0)
    plain = elbo.IWELBO(4)(model, guide)(x, observed)
    torch.manual_seed(0)
    scaled = elbo.IWELBO(4)(model, guide)(x, observed, size=10 * len(x))
    assert scaled.item() == pytest.approx(10 * plain.item(), rel=1e-12)

    def program(x, observed):  # a plate that subsamples itself takes the mask of its rows
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            law = distributions.masked(model.model.likelihood(z), observed[index])
            pyro.sample("x", law, obs=x[index])

    drawn = pyro.poutine.trace(program).get_trace(x, observed)
    index, law = drawn.nodes["data"]["value"], drawn.nodes["x"]["fn"]
    z = drawn.nodes["z"]["value"]
    each = dist.Normal(z @ W.T + B, SIGMA).log_prob(x[index].nan_to_num(0.0))
    torch.testing.assert_close(law.log_prob(x[index]), (each * observed[index]).sum(-1))


# ------------------------------------------------------------------------------ imputation

WRONG = {"exact": {}, "wide": {"factor": 1.7}, "moved": {"factor": 1.4, "shift": 0.4}}


@pytest.mark.parametrize("wrong", WRONG)
def test_imputations_are_those_of_the_exact_posterior(float64, wrong):
    """Means, covariances and draws; in pieces too. The error is of the effective sample size."""
    x, observed = some_rows()
    found = ppvae.impute(
        *linear(**WRONG[wrong]), x, observed, num_particles=20_001, num_draws=4000, seed=0,
        max_rows=50_000 if wrong == "wide" else 8000,
    )  # fmt: skip
    assert torch.equal(found.observed, observed)
    for n in range(len(x)):
        _, mean, cov = exact(x[n], observed[n])
        hidden, sd = ~observed[n], cov.diagonal().sqrt()
        few = min(found.ess[n].item(), 4000)
        assert ((found.mean[n, hidden] - mean).abs() < 4.5 * sd / found.ess[n].sqrt()).all()
        assert ((found.sd[n, hidden] / sd - 1).abs() < 4.5 * (2 / found.ess[n]).sqrt()).all()
        draws = found.draws[:, n, hidden]
        assert ((draws.mean(0) - mean).abs() < 4.5 * sd * (2 / few) ** 0.5).all()
        spread = torch.cov(draws.T).reshape(len(mean), len(mean)) / torch.outer(sd, sd)
        apart = (spread - cov / torch.outer(sd, sd)).abs()
        assert (apart < 4.5 * (2 * 2 / few) ** 0.5).all()
        torch.testing.assert_close(found.mean[n, ~hidden], x[n, ~hidden])
        assert (found.sd[n, ~hidden] == 0).all()
        assert (found.draws[:, n, ~hidden] == x[n, ~hidden]).all()
    assert torch.equal(found.filled[observed], x[observed])
    assert found.num_missing == int((~observed).sum()) and "Imputation of" in repr(found)


def test_pieces_are_one_set_of_weights(float64):
    """Where one particle has all the weight, whichever piece it is in, it is what is imputed."""
    likelihood = conditionals.Normal(Line(), scale=1e-3)
    model = models.Masked(models.VAE(likelihood, latent_dim=2))
    guide = guides.Amortized(Posterior(factor=4.0))
    x = X.expand(8, 3) + 0.1 * torch.arange(8.0)[:, None]
    how = {"num_particles": 301, "max_rows": 100, "seed": 0}
    found = ppvae.impute(model, guide, x, ~x.isnan(), **how)
    torch.manual_seed(0)
    for n, row in enumerate(x[:, None]):
        sizes = (100, 100, 100, 1)
        parts = [ppvae.log_weights(model, guide, row, ~row.isnan(), num_particles=s) for s in sizes]
        w = torch.cat([part.log_w[:, 0] for part in parts]).softmax(0)
        z = torch.cat([p.guide_trace.nodes["z"]["value"].reshape(-1, 2) for p in parts])
        means = (z @ W.T + B)[:, 2]
        torch.testing.assert_close(found.mean[n, 2], (w * means).sum())
        variance = (w * (means - found.mean[n, 2]) ** 2).sum() + 1e-6
        torch.testing.assert_close(found.sd[n, 2], variance.sqrt())
    drawn = ppvae.impute(model, guide, x, ~x.isnan(), num_draws=9, **how)
    assert (drawn.ess < 1.5).sum() >= 6
    apart = (drawn.draws[..., 2] - drawn.mean[:, 2]).abs()
    assert (apart < 5 * drawn.sd[:, 2]).all()


def test_weights_matter_where_the_guide_is_wrong(float64):
    """Without them the third value would be off by far more than by the draws."""
    model, guide = linear(shift=0.8)
    mean = exact(X[0], ~X[0].isnan())[1]
    found = ppvae.impute(model, guide, X, ~X.isnan(), num_particles=20_000, seed=0)
    plain = model.model.likelihood(guide.posterior(X, ~X.isnan()).mean).mean[0, 2]
    assert (plain - mean).abs() > 1.0
    assert (found.mean[0, 2] - mean).abs() < 4.5 * found.sd[0, 2] / found.ess.sqrt()
    assert mean.item() == pytest.approx(-1.055172414, abs=1e-9)


def mixed():
    """A number, a class, a binary value and a count, all of one latent."""
    kinds = {
        "size": functools.partial(conditionals.Normal, scale=0.5),
        "job": functools.partial(conditionals.Categorical, num_classes=3),
        "smokes": conditionals.Bernoulli,
        "visits": conditionals.Poisson,
    }
    torch.manual_seed(2)
    net = nets.mlp(1, 8, conditionals.Columns.width(kinds), activation=nn.Tanh)
    return models.VAE(conditionals.Columns(net, kinds), latent_dim=1)


def test_columns_are_imputed_in_their_own_kind(float64):
    """Against quadrature over z: means, probabilities of classes, what is most probable."""
    model = mixed()
    x = torch.tensor([[0.4, NAN, NAN, NAN], [NAN, 2.0, 1.0, NAN], [NAN, NAN, 0.0, 9.0]])
    observed = ~x.isnan()
    guide = guides.Amortized(Wide())
    found = ppvae.impute(
        models.Masked(model), guide, x, observed, num_particles=20_000, num_draws=20_000, seed=0
    )
    z = torch.linspace(-9, 9, 4001)[:, None]
    law = model.likelihood(z)
    for n in range(3):
        each = law.base_dist.log_prob(torch.where(observed[n], x[n], 1.0))
        log_p = (each * observed[n]).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z[:, 0])
        p = log_p.softmax(0)[:, None]
        mean = (p * law.mean).sum(0)
        second = (p * (law.variance + law.mean**2)).sum(0)
        sd = (second - mean**2).sqrt()
        classes = (p * law.base_dist.parts[1].probs[:, 0]).sum(0)
        for d in (~observed[n]).nonzero()[:, 0].tolist():
            if d == 1:
                assert found.mean[n, d].isnan() and found.sd[n, d].isnan()
                assert found.filled[n, d] == classes.argmax()
                share = torch.bincount(found.draws[:, n, d].long(), minlength=3) / 20_000
                se = (classes * (1 - classes) * (1 / 20_000 + 1 / found.ess[n])).sqrt()
                assert ((share - classes).abs() < 4.5 * se).all()
                continue
            assert (found.mean[n, d] - mean[d]).abs() < 4.5 * sd[d] / found.ess[n].sqrt()
            assert found.sd[n, d].item() == pytest.approx(sd[d].item(), rel=0.1)
            rounded = found.mean[n, d] if d == 0 else found.mean[n, d].round()
            assert found.filled[n, d] == rounded


class Wide(nn.Module):
    def forward(self, x, observed):
        return dist.Normal(x.new_zeros(len(x), 1), 1.5).to_event(1)


# ------------------------------------------------------------------------------ not at random


class Probit(nn.Module):
    """P(missing) = Phi(a + b x) of each value."""

    def __init__(self, a=-0.3, b=1.1):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return dist.Bernoulli(torch.special.ndtr(self.a + self.b * x)).to_event(1)


def not_at_random(**wrong):
    likelihood = conditionals.Normal(Line(), scale=SIGMA)
    model = models.MissingNotAtRandom(likelihood, Probit(), latent_dim=2)
    return model, guides.WithMissing(guides.Amortized(Posterior(**wrong)), model)


def test_the_evidence_of_values_and_mask(float64):
    """Phi of a normal has a closed-form mean; and -6.413471682, computed elsewhere."""
    found = diagnostics.log_evidence(
        *not_at_random(factor=1.3), X, ~X.isnan(), num_particles=20_000, seed=0
    )
    log_p, mean, cov = exact(X[0], ~X[0].isnan())
    a, b = -0.3, 1.1
    seen = torch.special.log_ndtr(-(a + b * X[0, :2])).sum()
    hidden = torch.special.log_ndtr((a + b * mean) / (1 + b**2 * cov[0]).sqrt())
    total = (log_p + seen + hidden).item()
    assert total == pytest.approx(-6.413471682, abs=1e-9)
    assert abs(found.log_evidence.item() - total) < 4 * found.log_evidence_se.item()


def test_a_missing_value_is_imputed_by_why_it_is_missing(float64):
    """Against quadrature: large values are missing, so the mean is above that at random."""
    _, mean, cov = exact(X[0], ~X[0].isnan())
    grid = torch.linspace(-12, 12, 4001)
    p = dist.Normal(mean, cov[0].sqrt()).log_prob(grid) + torch.special.log_ndtr(-0.3 + 1.1 * grid)
    p = p.softmax(0)
    expected = (p * grid).sum()
    sd = ((p * grid**2).sum() - expected**2).sqrt()
    assert expected > mean + 0.5
    pair = not_at_random(factor=1.3)
    found = ppvae.impute(
        *pair, X, ~X.isnan(), num_particles=20_000, num_draws=5000, max_rows=7000, seed=0
    )
    assert abs(found.mean[0, 2] - expected) < 4.5 * sd / found.ess[0].sqrt()
    assert found.sd[0, 2].item() == pytest.approx(sd.item(), rel=0.1)
    error = sd * (1 / 5000 + 1 / found.ess[0]).sqrt()
    assert abs(found.draws[:, 0, 2].mean() - expected) < 4.5 * error
    assert "x_missing" not in " ".join(ppvae.diagnose(*pair, X, ~X.isnan()).verdict)


def test_a_mechanism_that_does_not_look_is_at_random(float64):
    """With slopes of 0 the mask is independent: evidence is the product, imputations the same."""
    model, guide = not_at_random()
    model.missing = conditionals.Bernoulli(nets.SelfMasking(3))
    x, observed = some_rows()
    log_w = ppvae.log_weights(model, guide, x, observed, num_particles=3).log_w
    at_random = ppvae.log_weights(*linear(), x, observed, num_particles=3).log_w
    torch.testing.assert_close(log_w, at_random - 3 * math.log(2.0))
    assert model(size=4).shape == (4, 3)


def test_classes_that_the_model_draws_are_counted(float64):
    """Where the mask does not depend on them, they are as probable as at random."""
    model = mixed()
    x = torch.tensor([[0.4, NAN, NAN, 2.0]])
    observed, guide = ~x.isnan(), guides.Amortized(Wide())
    mechanism = conditionals.Bernoulli(nets.SelfMasking(4))
    drawing = models.MissingNotAtRandom(model.likelihood, mechanism, latent_dim=1)
    how = {"num_particles": 20_000, "num_draws": 4000, "seed": 0}
    found = ppvae.impute(drawing, guides.WithMissing(guide, drawing), x, observed, **how)
    other = ppvae.impute(models.Masked(model), guide, x, observed, **how)
    assert found.mean[0, 1].isnan() and found.filled[0, 1] == other.filled[0, 1]
    shares = [torch.bincount(f.draws[:, 0, 1].long(), minlength=3) / 4000 for f in (found, other)]
    few = min(4000, found.ess.item(), other.ess.item())
    assert (shares[0] - shares[1]).abs().max() < 4.5 * (4 * 0.25 / few) ** 0.5
    assert found.mean[0, 2].item() == pytest.approx(other.mean[0, 2].item(), abs=0.03)


def test_self_masking_keeps_a_known_sign():
    x = torch.linspace(-2, 2, 5)[:, None].expand(5, 2)
    for sign in (-1, 1):
        assert (sign * nets.SelfMasking(2, sign)(x).diff(dim=0) > 0).all()
    with pytest.raises(ValueError, match="sign must be 1, -1 or 0"):
        nets.SelfMasking(2, 2)


# ------------------------------------------------------------------------------ training


def gaps(rows=40, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    return x.masked_fill(torch.rand(rows, dim, generator=generator) < 0.3, NAN)


def pair(dim=3):
    torch.manual_seed(0)
    likelihood = conditionals.Normal(nets.mlp(2, 8, dim), scale=conditionals.Scale(0.5))
    guide = guides.Normal(nets.Masked(nets.mlp(2 * dim, 8, 4)))
    return models.Masked(models.VAE(likelihood, latent_dim=2)), guide


def test_ragged_masks_are_one_graph(traced):
    """Masks are inputs of a graph: another pattern, or another share, builds no other."""
    batches = [(x := gaps(6, seed=seed), ~x.isnan()) for seed in range(4)]
    batches.append((batches[0][0].nan_to_num(0.0), torch.ones(6, 3).bool()))
    assert_compiled_is_eager(pair, batches, elbo.IWELBO(3))
    assert len(traced) == 1


def test_a_run_with_masks_resumes_bit_for_bit(tmp_path):
    x = gaps()
    rows = data.from_arrays(x[~x.isnan().all(1)], missing="mask")

    def fit(epochs, folder=None):
        model, guide = pair()
        svi = ppvae.SVI(model, guide, ADAM, elbo.IWELBO(4))
        history = ppvae.fit(
            svi, rows.train, valid=rows.valid, epochs=epochs, batch_size=8, seed=0,
            checkpoint=folder, resume=folder is not None, progress=False,
        )  # fmt: skip
        return history, {**model.state_dict(), **guide.state_dict()}

    history, whole = fit(4)
    fit(2, tmp_path)
    resumed, parts = fit(4, tmp_path)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [r["valid_bound"] for r in resumed.rows] == [r["valid_bound"] for r in history.rows]
    assert math.isfinite(history.rows[-1]["valid_bound"])
    other = ppvae.data.split.Split(rows.train.values, observed=~rows.train.observed)
    svi = ppvae.SVI(*pair(), ADAM, elbo.IWELBO(4))
    with pytest.raises(ppvae.CheckpointError, match="data"):
        ppvae.fit(svi, other, epochs=5, batch_size=8, checkpoint=tmp_path, resume=True)


def test_a_report_by_how_much_is_missing(float64):
    x, observed = some_rows(60)
    report = ppvae.diagnose(*linear(factor=1.3), x, observed, num_particles=50, seed=0)
    table = report.by_missingness((0.0, 0.1, 0.5, 1.0))
    assert table["rows"].sum() == 60
    full = observed.all(1)
    first = table.iloc[0]
    assert table.index[0] == "0% to 0%" and first["rows"] == int(full.sum())
    expected = report.log_evidence[full].sum() / (3 * full.sum())
    assert first["nats per observed value"] == pytest.approx(expected.item())
    assert first["k-hat"] == pytest.approx(report.khat[full].median().item())
    some = (~full) & (observed.sum(1) == 2)
    expected = report.log_evidence[some].sum() / (2 * some.sum())
    assert table.iloc[1]["nats per observed value"] == pytest.approx(expected.item())
    assert first["KL"] == pytest.approx(report.rate[full].mean().item())
    assert 1 <= len(report.by_missingness(2)) <= 2
    with pytest.raises(ValueError, match="ascending order"):
        report.by_missingness((1.0, 0.5))


def test_a_predictive_check_is_as_incomplete_as_the_data(float64):
    """With the exact guide the number of values that exceed 1 is drawn as it is."""
    x, observed = some_rows(200)
    large = {"above 1": lambda x: (x > 1).double().sum(1), "seen": lambda x: (~x.isnan()).sum(1)}
    found = diagnostics.predictive_check(
        *linear(), x, observed, statistics=large, num_draws=50, seed=0
    )
    assert (found.replicated["seen"] == observed.sum(1)).all()
    assert 0.01 < found.p_value["above 1"] < 0.99
    with pytest.raises(ValueError, match="a mask hides are NaN"):
        diagnostics.predictive_check(*linear(), x, observed, statistics={"sum": lambda x: x.sum(1)})


# ------------------------------------------------------------------------------ networks, data


def test_a_masked_network_sees_values_and_mask():
    x, observed = torch.tensor([[1.0, NAN, 3.0]]), torch.tensor([[True, False, True]])
    net = nets.Masked(nn.Identity(), torch.tensor([7.0, 8.0, 9.0]))
    assert net(x, observed).tolist() == [[1.0, 8.0, 3.0, 1.0, 0.0, 1.0]]
    assert net(torch.ones(1, 3)).tolist() == [[1.0] * 6]
    assert nets.Masked(nn.Identity(), 5.0, channel=False)(x, observed).tolist() == [[1.0, 5.0, 3.0]]
    images = torch.ones(2, 1, 4, 4)
    assert nets.Masked(nn.Conv2d(2, 3, 1), event_dim=3)(images, images > 0).shape == (2, 3, 4, 4)
    learned = nets.Masked(nn.Identity(), nn.Parameter(torch.zeros(3)))
    learned(x, observed).sum().backward()
    assert learned.fill.grad.tolist() == [0.0, 1.0, 0.0]
    conditioned = nets.Masked(nets.mlp(6 + 2, 4))
    assert conditioned(x, torch.zeros(1, 2), observed).shape == (1, 4)
    with pytest.raises(TypeError, match=r"observed is torch\.float32"):
        net(x, observed.float())
    with pytest.raises(ValueError, match="one bool for each value"):
        net(x, observed[:, :2])


def test_arrays_with_gaps(recwarn):
    x = np.random.default_rng(0).gamma(2.0, size=(60, 3))
    x[np.random.default_rng(1).random(x.shape) < 0.3] = np.nan
    x[:, 0] = 1.0 + np.arange(60) % 5  # whole, and nothing missing
    made = data.from_arrays(x, np.arange(60) % 2, missing="mask")
    values, y, observed = made.supervised().train.args
    assert values.isfinite().all() and (values[~observed] == 0).all()
    assert observed.dtype == torch.bool and observed.shape == values.shape and len(y) == len(values)
    assert "(x, observed)" in repr(made) and "% of the values missing" in made.source
    assert made.support == "real" and len(made.train.args) == 2
    rest = torch.cat([split.observed for split in (made.train, made.valid, made.test)])
    assert int((~rest).sum()) == int(np.isnan(x).sum())
    whole = pd.array([1, None, 3] * 20, dtype="Int64")
    frame = pd.DataFrame({"n": whole, "f": [0.5, np.nan, 2.0] * 20, "g": [1.0, 2.0, 3.0] * 20})
    parts = data.from_arrays(frame, missing="mask")
    assert parts.train.observed[:, 2].all() and not parts.train.observed[:, 0].all()
    suggested = conditionals.suggest(made.train)
    assert [s.kind for s in suggested] == ["counts", "positive numbers", "positive numbers"]
    assert str(conditionals.suggest(made)) == str(suggested)
    seen = np.where(made.train.observed, made.train.x, np.nan)
    for container in (seen, torch.from_numpy(seen), pd.DataFrame(seen)):
        assert str(conditionals.suggest(container)) == str(suggested)
    counts = np.where(np.isnan(x), np.nan, np.floor(np.nan_to_num(x)))
    assert data.from_arrays(counts, missing="mask").support == "counts"
    images = np.where(np.random.default_rng(2).random((30, 2, 2)) < 0.9, 0.5, np.nan)
    flat = data.from_arrays(images, missing="mask", flatten=True, binarize="dynamic")
    assert [t.shape for t in flat.train.batch(3)] == [(24, 4), (24, 4)]
    assert torch.equal(flat.train.batch(3)[1], flat.train.observed)


def named(x):
    return pd.DataFrame(x, columns=list("abc"))


def without_masks():
    model = linear()[0].model
    return model, guides.Prior(model)


def images_with_a_gap():
    images = np.zeros((20, 4, 4))
    images[3, 1, 1] = np.nan
    return images


def hole(row=None, column=None):
    x = np.random.default_rng(0).normal(size=(30, 3))
    if row is not None:
        x[row] = np.nan
    if column is not None:
        x[:, column] = np.nan
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.from_arrays(hole(row=4)), "in row 4: drop those rows.*missing='mask'"),
        (lambda: data.from_arrays(hole(row=4), missing="mask"), "1 rows without any value.*row 4"),
        (lambda: data.from_arrays(hole(column=1), missing="mask"), "no value at all in column 1"),
        (
            lambda: data.from_arrays(named(hole(column=1)), missing="mask"),
            "no value at all in column 'b'",
        ),
        (lambda: data.from_arrays(hole(), missing="drop"), "missing='drop' is unknown"),
        (
            lambda: data.quadrants(data.from_arrays(images_with_a_gap(), missing="mask"), 1),
            "missing values of their own",
        ),
        (lambda: data.split.Split(torch.ones(3, 2), observed=torch.ones(3, 2)), "give bool"),
        (
            lambda: data.split.Split(torch.ones(3, 2), observed=torch.ones(3, 1).bool()),
            "one bool for each value",
        ),
        (lambda: linear()[0](X), "last argument of models.Masked"),
        (lambda: linear()[0](X, torch.ones(1, 3)), "and is torch.float64"),
        (lambda: linear()[0](X, torch.ones(1, 2).bool()), r"shape \(1, 2\), and site 'x'"),
        (lambda: not_at_random()[0](X), "observed must be bool, and is None"),
        (lambda: not_at_random()[0](X, torch.ones(1, 4).bool()), r"shape \(1, 4\)"),
        (
            lambda: models.Masked(linear()[0].model, site="y")(X, ~X.isnan()),
            "of the observed site 'y', and the model has none",
        ),
        (
            lambda: models.Masked(
                models.VAE(conditionals.Multinomial(nets.mlp(2, 3), total_count=4), latent_dim=2)
            )(torch.ones(1, 3), torch.ones(1, 3).bool()),
            "no log-probability of single values",
        ),
        (lambda: linear()[0].model(X, ~X.isnan()), r"models.Masked\(model\)"),
        (lambda: guides.WithMissing(linear()[1], linear()[0]), "got Amortized, Masked"),
        (
            lambda: ppvae.impute(*without_masks(), torch.ones(2, 3)),
            r"sites \[\]: name one of them",
        ),
        (lambda: ppvae.impute(*linear(), X, ~X.isnan(), num_particles=1), "num_particles must be"),
        (lambda: ppvae.impute(*linear(), X, ~X.isnan(), site="y"), "site='y'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(float64, make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_offsets_beside_masks(float64):
    """A log exposure stands between values and mask; one of another length is named."""
    model = models.Masked(models.VAE(conditionals.Poisson(nets.mlp(2, 8, 3)), latent_dim=2))
    guide = guides.Normal(nets.Masked(nets.mlp(3 + 3 + 1, 8, 4)))
    x, offset = torch.poisson(torch.ones(5, 3)), torch.randn(5)
    observed = torch.rand(5, 3) < 0.7
    weights = ppvae.log_weights(model, guide, x, offset, observed)
    z = weights.guide_trace.nodes["z"]["value"]
    rate = (model.model.likelihood.net(z) + offset[:, None]).exp()
    expected = (dist.Poisson(rate).log_prob(x) * observed).sum(-1)
    torch.testing.assert_close(weights.log_p["x"][0], expected)
    svi = ppvae.SVI(model, guide, ADAM, elbo.IWELBO(2))
    with pytest.raises(ppvae.PairError, match="differ in length"):
        ppvae.fit(svi, (x, offset[:4], observed), epochs=1, progress=False)


SUMMED = {"enumerate": "parallel"}
FIRST = torch.tensor([0.3, 0.7], dtype=torch.float64)
SECOND = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
RATE = torch.tensor(
    [
        [[0.1, 0.8, 0.3], [0.9, 0.4, 0.2], [0.5, 0.5, 0.9]],
        [[0.7, 0.1, 0.6], [0.2, 0.3, 0.4], [0.8, 0.9, 0.1]],
    ],
    dtype=torch.float64,
)


class Chain(ppvae.Program):
    """c1, then c2 given it; three pixels given both; nothing is drawn."""

    def forward(self, x, observed):
        with pyro.plate("data", len(x)):
            c1 = pyro.sample("c1", dist.Categorical(FIRST), infer=SUMMED)
            c2 = pyro.sample("c2", dist.Categorical(SECOND[c1]), infer=SUMMED)
            law = dist.Bernoulli(RATE[c1, c2].expand(*torch.broadcast_shapes(
                c1.shape, c2.shape, (len(x),)), 3)).to_event(1)  # fmt: skip
            pyro.sample("x", distributions.masked(law, observed), obs=x)


def no_guide(*args):
    pass


def test_a_latent_that_is_summed_out_is_so_in_imputations(float64):
    """By hand, to rounding: of several latents, of which one depends on the other."""
    x = torch.tensor([[1.0, NAN, NAN], [NAN, 0.0, 1.0], [NAN, NAN, NAN], [0.0, 1.0, 1.0]])
    observed = ~x.isnan()
    found = ppvae.impute(Chain(), no_guide, x, observed, num_particles=30, num_draws=8000, seed=0)
    prior = FIRST[:, None] * SECOND
    for n, row in enumerate(x):
        each = torch.where(row == 1, RATE, 1 - RATE).where(observed[n], torch.ones(()))
        posterior = prior * each.prod(-1)
        posterior = posterior / posterior.sum()
        mean = (posterior[..., None] * RATE).sum((0, 1))
        hidden = ~observed[n]
        torch.testing.assert_close(found.mean[n, hidden], mean[hidden], rtol=0, atol=1e-12)
        sd = (mean * (1 - mean)).sqrt()
        torch.testing.assert_close(found.sd[n, hidden], sd[hidden], rtol=0, atol=1e-12)
        # the draws of a row are joint: how often two pixels are 1 together
        both = (posterior * RATE[..., 1] * RATE[..., 2]).sum()
        if hidden[1:].all():
            often = (found.draws[:, n, 1:] == 1).all(-1).double().mean()
            assert abs(often - both) < 4.5 * (both * (1 - both) / 8000) ** 0.5
            assert abs(both - mean[1] * mean[2]) > 4.5 * (both * (1 - both) / 8000) ** 0.5
    assert torch.equal(found.draws[:, observed], x[observed].expand(8000, -1))


class Mixed(nn.Module):
    """Three values given z, and a class as a vector of ones and zeros that moves them."""

    MOVES = torch.tensor([[0.0, 0.0, 0.0], [1.5, -1.0, 2.0]], dtype=torch.float64)

    def forward(self, z, y):
        return z @ W.T + B + y @ self.MOVES


class MixedPosterior(nn.Module):
    """q(z | observed part, class): the exact one, but wider."""

    def forward(self, x, y, observed):
        return Posterior(1.5)(x - y @ Mixed.MOVES, observed)


class MixedClasses(nn.Module):
    """Other logits than those of the exact posterior."""

    def forward(self, x, observed):
        return torch.stack([0.2 * x.nan_to_num().sum(-1), torch.zeros(len(x))], -1)


def test_m2_imputes_with_its_classes_summed_out(float64):
    """A mixture of two normals; two rows whose class is known."""
    model = models.Masked(
        models.M2(conditionals.Normal(Mixed(), scale=SIGMA), 2, num_classes=2, probs=[0.4, 0.6])
    )
    guide = guides.M2(MixedClasses(), MixedPosterior())
    x, observed = some_rows()
    y = torch.tensor([-1, -1, 1, -1, -1, 0, -1])
    how = {"num_particles": 20_001, "num_draws": 2000, "seed": 0}
    found = ppvae.impute(model, guide, x, y, observed, max_rows=50_000, **how)
    drawn = guides.M2(guide.classifier, guide.conditional, draw=True)
    other = ppvae.impute(model, drawn, x, y, observed, **how)
    for n in range(len(x)):
        parts = [exact(x[n] - move, observed[n]) for move in Mixed.MOVES]
        hidden = ~observed[n]
        log_p = torch.stack([p for p, _, _ in parts]) + torch.tensor([0.4, 0.6]).log()
        if y[n] >= 0:
            log_p[1 - y[n]] = -math.inf
        share = log_p.softmax(0)
        means = torch.stack([m + Mixed.MOVES[c][hidden] for c, (_, m, _) in enumerate(parts)])
        mean = share @ means
        second = torch.stack([cov.diagonal() for _, _, cov in parts]) + means.square()
        sd = (share @ second - mean.square()).sqrt()
        assert abs(found.evidence.log_evidence[n] - log_p.logsumexp(0)) < 0.05
        assert ((found.mean[n, hidden] - mean).abs() < 4.5 * sd / found.ess[n].sqrt()).all()
        assert ((found.sd[n, hidden] / sd - 1).abs() < 4.5 * (2 / found.ess[n]).sqrt()).all()
        draws = found.draws[:, n, hidden]
        few = min(found.ess[n].item(), 2000)
        assert ((draws.mean(0) - mean).abs() < 4.5 * sd * (2 / few) ** 0.5).all()
        assert ((other.mean[n, hidden] - mean).abs() < 4.5 * sd / other.ess[n].sqrt()).all()
    assert torch.equal(found.draws[:, observed], x[observed].expand(2000, -1))


def test_a_class_of_each_value_is_not_imputed():
    """Their joint posterior is a product over the plate, which nothing here sums."""

    def model(x, observed):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("columns", 3, dim=-2):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer=SUMMED)
            law = dist.Normal(c.to(x.dtype), 1.0).expand(torch.broadcast_shapes(c.shape, (3, 1)))
            law = law.expand([*law.batch_shape[:-1], len(x)])
            pyro.sample("x", distributions.masked(law, observed.T), obs=x.T)

    x = gaps(4)
    with pytest.raises(ValueError, match="summed out in plates inside of a datapoint"):
        ppvae.impute(model, no_guide, x, ~x.isnan())


def test_a_latent_that_is_summed_out_above_z_is_in_the_weights():
    """VaDE is a VAE with its mixture as prior, so what is imputed is the same."""
    prior, likelihood = conditionals.Mixture(3, 2), conditionals.Bernoulli(nets.mlp(2, 8, 4))
    guide = guides.Normal(nets.Masked(nets.mlp(2 * 4, 8, 2 * 2)))
    x = torch.bernoulli(torch.full((9, 4), 0.5))
    observed = torch.rand(9, 4) > 0.4
    summed, plain = (
        ppvae.impute(models.Masked(m), guide, x, observed, num_particles=30, num_draws=2, seed=0)
        for m in (models.VaDE(likelihood, prior), models.VAE(likelihood, prior=prior))
    )
    torch.testing.assert_close(summed.mean, plain.mean)
    torch.testing.assert_close(summed.sd, plain.sd)
    assert summed.draws.shape == (2, 9, 4)


def masked_pairs():
    """A pair of each guide that a mask is passed to, and what stands between data and mask."""
    wide, head = nets.mlp(2 * 4, 8, 4), conditionals.Bernoulli(nets.mlp(2, 8, 4))
    chain = models.Hierarchical(head, levels=[conditionals.Normal(nets.mlp(2, 4))], latent_dim=2)
    levels = [conditionals.Normal(net) for net in (nets.Masked(wide), nets.mlp(2, 4))]
    yield chain, guides.BottomUp(chain, levels), {}
    blocks, heads = [nets.Masked(wide), nets.mlp(4, 4)], [conditionals.Normal(nets.mlp(4, 4))] * 2
    yield chain, guides.Ladder(chain, blocks, heads), {}
    m2 = models.M2(conditionals.Bernoulli(nets.mlp(2 + 3, 8, 4)), 2, num_classes=3)
    q_z = conditionals.Normal(nets.Masked(nets.mlp(2 * 4 + 3, 4)))
    labels = {"y": torch.tensor([0, -1, 2, -1, 1])}
    yield m2, guides.M2(nets.Masked(nets.mlp(2 * 4, 3)), q_z, draw=True), labels
    of_counts = models.CVAE(
        conditionals.Poisson(nets.mlp(2 + 3, 8, 4)), latent_dim=2, condition=nets.OneHot(3)
    )
    encoder = guides.Normal(nets.Masked(nets.mlp(2 * 4 + 3 + 1, 4)), condition=nets.OneHot(3))
    yield of_counts, encoder, {"y": torch.tensor([0, 1, 2, 0, 1]), "offset": torch.zeros(5)}
    parts, seen = (nets.nvae((c, 4, 4), groups=(1, 1), channels=4, blocks=1) for c in (1, 2))
    deep = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
    encoder = nets.Masked(seen.encoder, event_dim=3)
    yield deep, guides.TopDown(deep, encoder, parts.heads), {}
    fine, coarse, labels = nets.Codebook(4, 2), nets.Codebook(3, 3), nets.OneHot(3)
    net = nets.CausalConv(3, 4, 1, context_dim=3)
    levels = models.CodeHierarchy(
        conditionals.Bernoulli(nets.MergeMaps(nets.upsample(2 + 3, 1, channels=(4,))), event_dim=3),
        conditionals.CodePrior(fine, (2, 2), nets.CausalConv(4, 4, 1, context_dim=3 + 3)),
        conditionals.CodePrior(coarse, (1, 1), net),
        labels,
    )
    codes = guides.QuantizedLevels(
        nets.Masked(nets.downsample(2, 4, channels=(4,)), event_dim=3),
        nets.downsample(4, 3, channels=(4,)),
        nets.MergeMaps(nets.flat_batch(nn.Conv2d(4 + 3, 2, 1), event_dim=3)),
        (fine, coarse),
    )
    yield levels, codes.soften(0.5), {"y": torch.tensor([0, 1, 2, 0, 1])}


@pytest.mark.parametrize("which", range(6))
def test_a_mask_passes_through_every_guide(which):
    """By name too; and what is hidden is seen by nothing."""
    model, guide, between = list(masked_pairs())[which]
    images = isinstance(guide, (guides.TopDown, guides.QuantizedLevels))
    x = torch.ones(5, 1, 4, 4) if images else torch.ones(5, 4)
    model, observed = models.Masked(model), torch.rand_like(x) > 0.4
    held = {"x": x.masked_fill(~observed, NAN), **between, "observed": observed}
    named = dict(reversed(held.items()))
    bounds = []
    for filled in (NAN, 0.0, 1.0):
        pyro.set_rng_seed(0)
        args = (x.masked_fill(~observed, filled), *between.values(), observed)
        bounds.append(elbo.ELBO().evaluate(model, guide, *args))
    assert bounds[0].isfinite().all()
    assert torch.equal(bounds[0], bounds[1])
    assert torch.equal(bounds[0], bounds[2])
    found = ppvae.impute(model, guide, named, num_particles=30, num_draws=2, seed=0)
    again = ppvae.impute(model, guide, *held.values(), num_particles=30, num_draws=2, seed=0)
    assert torch.equal(found.draws, again.draws)
    history = ppvae.fit(
        ppvae.SVI(model, guide, ADAM, elbo.ELBO(gradient="score")),
        torch.utils.data.TensorDataset(*held.values()),
        valid=named,
        epochs=1,
        progress=False,
    )
    assert math.isfinite(history.rows[-1]["valid_bound"])


def test_a_mapping_without_the_mask_is_refused_by_name():
    model, _ = linear()
    with pytest.raises(TypeError, match=r"of 'x', 'mask', and the model takes 'x', .*'observed'"):
        ppvae.impute(model, None, {"x": X, "mask": ~X.isnan()})


def test_a_frame_comes_back_complete():
    frame = pd.DataFrame(
        {
            "age": [20.5, None, 41.0, 33.25, 28.0],
            "visits": pd.array([0, 3, None, 1, 7], dtype="Int64"),
            "job": ["smith", None, "nurse", "clerk", "nurse"],
        },
        index=list("abcde"),
    )
    table = data.Table.fit(frame)
    kinds = conditionals.heads_for(table)
    head = conditionals.Columns(nets.mlp(2, conditionals.Columns.width(kinds)), kinds)
    model = models.Masked(models.VAE(head, latent_dim=2))
    features = nets.Columns(table)
    net = nn.Sequential(features, nets.mlp(features.out_features, 8, 4))
    guide = guides.Normal(nets.Masked(net, channel=False))
    options = {"table": table, "num_particles": 30, "seed": 0}
    found = ppvae.impute(model, guide, frame, frame.notna(), **options)
    whole = found.completed
    assert whole.dtypes.equals(frame.dtypes)
    assert whole.index.equals(frame.index)
    assert whole.notna().all(axis=None)
    assert (whole == frame)[frame.notna()].fillna(True).all(axis=None)
    named = ppvae.impute(model, guide, {"observed": frame.notna(), "x": frame}, **options)
    pd.testing.assert_frame_equal(named.completed, whole)
    numbers = table.to_tensor(frame).numpy()
    plain = ppvae.impute(model, guide, numbers, ~np.isnan(numbers), num_particles=30, seed=0)
    assert isinstance(plain.completed, np.ndarray)
    assert np.array_equal(plain.completed, plain.filled.numpy())
    codes = ppvae.encode(guide, frame, frame.notna(), table=table)
    assert codes.index.equals(frame.index)
