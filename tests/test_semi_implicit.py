"""Semi-implicit posteriors: true bounds without a density, and what they refuse."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppvae
from oracles import LinearModel, assert_mean, exact_gradient, gradients, hermite, trainable
from ppvae import conditionals, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.distributions import NoInverse
from ppvae.local import Indexed, fit_local
from ppvae.terms import NoInverse as FromTerms

OWN_DRAWS_ONLY = r"own draws, each by the psi that it came from"


class Affine(conditionals.Conditional):
    """N(A x + a, T T'), whose parameters are free."""

    def __init__(self, weight: Tensor, bias: Tensor, tril: Tensor) -> None:
        net = nn.Linear(*weight.T.shape)
        net.weight, net.bias = nn.Parameter(weight), nn.Parameter(bias)
        super().__init__(net)
        self.tril = nn.Parameter(tril)

    def forward(self, *inputs: Tensor) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.outputs(*inputs), scale_tril=self.tril)


class Seen(conditionals.Normal):
    """A head that notes what it is called with."""

    def forward(self, *inputs: Tensor) -> dist.TorchDistribution:
        self.psi = inputs[0]
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(*inputs)


def small(J: int = 4, head: type[conditionals.Normal] = conditionals.Normal):
    """A model, a semi-implicit posterior, its guide, and data of 5 numbers."""
    mixing = conditionals.Normal(nets.mlp(5, 8, 2 * 3))
    q = posteriors.SemiImplicit(mixing, head(nets.mlp(3, 8, 2 * 2)), J)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 5)), latent_dim=2)
    return model, q, guides.Amortized(q), torch.bernoulli(torch.full((6, 5), 0.4))


class LinearGaussian:
    """q(z | x) = int N(z; B psi + c, S) N(psi; A x + a, T T'), which is a normal itself.

    Each part of the mixture is wide enough for weights whose fourth moments exist.
    """

    def __init__(self) -> None:
        self.model = LinearModel(2, 4)
        A, a, _ = self.model.posterior()
        self.mixing = Affine(A.contiguous(), a + 0.1, torch.tensor([[0.5, 0.0], [0.2, 0.35]]))
        B = torch.tensor([[1.0, 0.2], [-0.1, 0.9]])
        self.head = Affine(B, torch.tensor([0.05, 0.0]), torch.diag(torch.tensor([0.7, 0.45])))

    def guide(self, J: int) -> guides.Amortized:
        return guides.Amortized(posteriors.SemiImplicit(self.mixing, self.head, J))

    def elbo(self, x: Tensor) -> Tensor:
        """The exact ELBO of the exact q."""
        with torch.no_grad():
            B, T, s = self.head.net.weight, self.mixing.tril, self.head.tril
            mean = self.head.net(self.mixing.net(x))
            covariance = B @ T @ T.T @ B.T + s @ s.T
            W, sigma = self.model.weight, self.model.log_sigma.exp()
            fit = dist.Normal(mean @ W.T + self.model.bias, sigma).log_prob(x).sum(-1)
            fit = fit - (W @ covariance @ W.T).trace() / (2 * sigma**2)
            q = dist.MultivariateNormal(mean, covariance)
            p = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
            return fit - torch.distributions.kl_divergence(q, p)


# -- the exact density -------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_weights_are_unbiased_and_the_two_sides_close_in_on_the_exact_elbo() -> None:
    pair = LinearGaussian()
    x = pair.model.draw(1)
    with torch.no_grad():
        log_p, exact = pair.model.log_evidence(x), pair.elbo(x)
        assert (exact < log_p).all()
        below, above, bound_of_5 = {}, {}, {}
        for J in (1, 5, 50):
            q = pair.guide(J)
            log_w = ppvae.log_weights(pair.model, q, x, num_particles=6000).log_w  # (K, 1)
            assert_mean((log_w - log_p).exp(), 1.0, f"E w at J={J}")
            below[J] = log_w[:, 0]
            bound_of_5[J] = log_w.reshape(-1, 5).logsumexp(1) - math.log(5)
            other = guides.Amortized(q.conditional.without_own())
            # one draw of psi_1..J each, so that the estimates are independent
            above[J] = elbo.ELBO().estimate(pair.model, other, x.expand(6000, -1))

    def gap(samples: Tensor) -> tuple[float, float]:
        return (samples.mean() - exact).item(), (samples.std() / len(samples) ** 0.5).item()

    order = [below[1], below[5], above[5], above[1]]
    for low, high in itertools.pairwise(order):
        assert gap(low)[0] < gap(high)[0] - 4 * math.hypot(gap(low)[1], gap(high)[1])
    assert gap(below[5])[0] < -4 * gap(below[5])[1] and gap(above[5])[0] > 4 * gap(above[5])[1]
    for side in (below, above):  # the bias falls as 1 / J: of ten times as many, a third at most
        bias, se = gap(side[50])
        assert abs(bias) < abs(gap(side[5])[0]) / 3 + 4 * se
    assert above[1].mean() > log_p  # an upper side may be above the evidence: no bound
    for J in (1, 5, 50):
        assert below[J].mean() < bound_of_5[J].mean() <= log_p + 4 * gap(bound_of_5[J])[1]
    evidence = diagnostics.log_evidence(pair.model, pair.guide(5), x, num_particles=20_000, seed=0)
    assert (evidence.log_evidence - log_p).abs() < 4 * evidence.log_evidence_se
    assert evidence.khat < 0.7


class OneDimension:
    """x | z ~ N(w z + v, r^2), psi | x ~ N(a x + b, t^2), z | psi ~ N(c psi + d, s^2), J = 1."""

    def __init__(self) -> None:
        self.model = LinearModel(1, 1, sigma=0.5)
        one = torch.ones(1, 1)
        self.mixing = Affine(0.5 * one, torch.tensor([0.2]), 0.4 * one)
        self.head = Affine(0.9 * one, torch.tensor([-0.1]), 0.35 * one)
        self.guide = guides.Amortized(posteriors.SemiImplicit(self.mixing, self.head, 1))

    def expected_bound(self, x: Tensor, K: int, nodes: int) -> Tensor:
        """E of IWELBO, (N,), by quadrature over the noise of psi_0, psi_1, z of K particles."""
        points, weights = hermite(nodes)
        grid = torch.cartesian_prod(*[points] * (3 * K)).reshape(-1, K, 3, 1)
        mass = torch.cartesian_prod(*[weights] * (3 * K)).reshape(len(grid), -1).prod(-1)
        psi = self.mixing.net(x)[:, 0] + self.mixing.tril[0, 0] * grid[:, :, :2]  # (G, K, 2, N)
        c, d, s = self.head.net.weight[0, 0], self.head.net.bias[0], self.head.tril[0, 0]
        z = c * psi[:, :, 0] + d + s * grid[:, :, 2]  # (G, K, N)
        log_q = dist.Normal(c * psi + d, s).log_prob(z.unsqueeze(2)).logsumexp(2) - math.log(2)
        mean = z * self.model.weight[0, 0] + self.model.bias[0]
        log_p = dist.Normal(mean, self.model.log_sigma.exp()).log_prob(x[:, 0])
        log_w = log_p + dist.Normal(0.0, 1.0).log_prob(z) - log_q
        return (mass[:, None] * (log_w.logsumexp(1) - math.log(K))).sum(0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("K", "nodes"), [(1, 24), (2, 8)])
def test_value_and_every_gradient_are_those_of_the_expected_bound(K, nodes) -> None:
    """``"stl"`` and ``"dreg"`` too: z is a draw of the mean over psi, so its score has mean 0."""
    pair = OneDimension()
    x, parameters = torch.tensor([[0.7]]), trainable(pair.model, pair.guide)
    with torch.no_grad():
        error = pair.expected_bound(x, K, nodes) - pair.expected_bound(x, K, nodes - 1)
        assert error.abs() < 1e-3
    expected = pair.expected_bound(x, K, nodes)
    exact = exact_gradient(-expected.sum(), parameters)
    many, rows = x.expand(4000, -1), 4000
    estimators = {
        1: (elbo.ELBO(), elbo.ELBO(1, "stl")),
        2: (elbo.IWELBO(2), elbo.IWELBO(2, "dreg")),
    }
    for estimator in estimators[K]:
        objective = estimator(pair.model, pair.guide)
        found = gradients(lambda: objective(many), parameters, draws=30, rows=rows)  # noqa: B023
        assert_mean(found, exact, f"gradient {estimator.gradient}")
    values = estimators[K][0].evaluate(pair.model, pair.guide, x.expand(20_000, -1))
    assert_mean(values, expected[0].detach(), "value")


# -- draws and their densities -----------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_a_draw_has_the_mean_density_over_its_own_and_other_psi(shape) -> None:
    _, q, _, x = small(head=Seen)
    fn = q(x)
    z = fn.rsample(shape)
    psi = q.head.psi
    assert psi.shape == (5, *shape, 6, 3) and z.shape == (*shape, 6, 2) and q.head.calls == 1
    loc, raw = q.head.net(psi).chunk(2, -1)
    by_hand = dist.Normal(loc, raw.exp()).log_prob(z).sum(-1).exp().mean(0).log()
    torch.testing.assert_close(fn.log_prob(z), by_hand)
    assert fn.event_shape == (2,) and fn.batch_shape == (6,) and q.head.calls == 1
    leaf = z.detach().requires_grad_()
    leaf._cut_from = z  # what cuts draws from parameters says where they come from
    torch.testing.assert_close(fn.log_prob(leaf), by_hand)
    for other in (z.clone(), z + 0, fn.rsample(shape) * 0 + z):
        with pytest.raises(NoInverse, match=OWN_DRAWS_ONLY):
            fn.log_prob(other)
    with pytest.raises(NoInverse):
        fn.log_prob(z)  # another draw has been made since, of other psi
    assert NoInverse is FromTerms and issubclass(NoInverse, ValueError)


def test_no_particle_row_or_draw_shares_a_psi() -> None:
    _, q, guide, x = small(head=Seen)
    x = x[:1].expand(6, -1)  # rows that are equal, too
    ppvae.log_weights(small_model, guide, x, num_particles=3)
    first = q.head.psi
    assert first.shape == (5, 3, 6, 3)
    fn = q(x)
    fn.rsample(), fn.rsample()
    second = q.head.psi
    assert torch.cat([first.flatten(), second.flatten()]).unique().numel() == 5 * 4 * 6 * 3


def small_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "x", dist.Bernoulli(logits=z.sum(-1, True).expand(*z.shape[:-1], 5)).to_event(1), obs=x
        )


@pytest.mark.usefixtures("float64")
def test_weights_of_particles_are_independent() -> None:
    """Else standard errors of K particles, and what they converge to, would be wrong."""
    pair = LinearGaussian()
    x = pair.model.draw(1).expand(4000, -1)
    with torch.no_grad():
        w = ppvae.log_weights(pair.model, pair.guide(1), x, num_particles=2).log_w.exp()
    w = (w - w.mean()) / w.std()
    assert_mean(w[0] * w[1], 0.0, "correlation of two particles")
    assert_mean(w[0, ::2] * w[0, 1::2], 0.0, "correlation of two rows")


def test_expanded_declared_and_masked_distributions_weigh_their_draws() -> None:
    _, q, _, x = small()
    fn = q(x)
    assert fn.event_shape == (2,)  # before any draw
    expanded = fn.expand([3, 6])
    z = expanded.rsample()
    assert z.shape == (3, 6, 2) and expanded.log_prob(z).shape == (3, 6)
    with pytest.raises(NoInverse):
        fn.log_prob(z)
    event = q(x).to_event(1)
    z = event.rsample()
    assert event.event_shape == (6, 2) and event.log_prob(z).shape == ()
    assert torch.equal(event.log_prob(z), event.base_dist.log_prob(z).sum())


@pytest.mark.parametrize("inside", [True, False])
def test_a_mask_hides_a_row_in_training_and_evaluation(inside) -> None:
    model, q, _, x = small()
    mask = torch.arange(6) < 5

    def guide(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=True if inside else mask):
            pyro.sample("z", q(x).mask(mask) if inside else q(x))

    log_q = ppvae.log_weights(model, guide, x, num_particles=2).log_q["z"]
    assert (log_q[:, :5] != 0).all() and (log_q[:, 5] == 0).all()
    torch.manual_seed(0)
    loss = elbo.ELBO(num_particles=2).differentiable_loss(model, guide, x)
    torch.manual_seed(0)
    value = elbo.ELBO(num_particles=2).evaluate(model, guide, x).sum()
    torch.testing.assert_close(-loss.detach(), value)


def test_a_copy_of_a_guide_draws_alike_and_shares_nothing() -> None:
    model, _, guide, x = small()
    guide(x)
    twin = copy.deepcopy(guide)
    losses = []
    for one in (guide, twin):
        torch.manual_seed(0)
        losses.append(elbo.IWELBO(num_particles=3)(model, one)(x).item())
    assert losses[0] == losses[1]
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in twin.parameters()}


# -- without the own psi -----------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_without_its_own_psi_the_mean_is_a_function_of_the_value_and_an_estimate() -> None:
    model, q, _, x = small()
    without = q.without_own()
    assert [id(p) for p in without.parameters()] == [id(p) for p in q.parameters()]
    assert q.own and not without.own and "own=False" in repr(without)
    fn = without(x)
    value = torch.randn(7, 6, 2)
    fn.log_prob(value)
    loc, raw = q.head.net(fn._psi).chunk(2, -1)
    by_hand = dist.Normal(loc[:, None], raw.exp()[:, None]).log_prob(value).sum(-1)
    torch.testing.assert_close(fn.log_prob(value), by_hand.exp().mean(0).log())
    assert torch.equal(fn.log_prob(value), fn.log_prob(value.clone()))
    assert fn.expand([3, 6]).log_prob(fn.expand([3, 6]).rsample()).shape == (3, 6)

    guide = guides.Amortized(without)
    weights = ppvae.log_weights(model, guide, x, num_particles=3)
    assert "4 draws of psi" in weights.estimated["z"]
    for evaluate in (elbo.ELBO().evaluate, diagnostics.log_evidence, ppvae.diagnose):
        with pytest.raises(ValueError, match=r"site 'z' has no log-density.*without_own\(\)"):
            evaluate(model, guide, x)
    with pytest.raises(ValueError, match="not linear"):
        elbo.IWELBO(num_particles=2).loss(model, guide, x)
    assert elbo.ELBO().estimate(model, guide, x).isfinite().all()


# -- what needs a density elsewhere ------------------------------------------------------------


def test_other_answers_say_what_is_missing() -> None:
    model, q, guide, x = small()
    assert "draws cannot be weighed again" in repr(ppvae.check_pair(model, guide, x))
    with pytest.raises(ValueError, match=f"site 'z'.*{OWN_DRAWS_ONLY}.*gradient=.pathwise"):
        elbo.ReweightedWakeSleep(insomnia=0.5)(model, guide)(x)  # the model's dreams
    with pytest.raises(ValueError, match=f'{OWN_DRAWS_ONLY}; use start="prior"'):
        diagnostics.ais(model, guide, x, num_temperatures=2)
    diagnostics.ais(model, guide, x, num_temperatures=2, num_chains=5, start="prior")
    report = ppvae.diagnose(model, guide, x, num_particles=30)
    assert OWN_DRAWS_ONLY in report.absent["mutual information"]
    ranks = diagnostics.sbc(model, guide, x, num_simulations=100, num_draws=19, seed=0)
    assert OWN_DRAWS_ONLY in ranks.absent["log q(z | x)"] and "log p(x, z)" in ranks.ranks
    with pytest.raises(TypeError, match="ContinuousMixture is not made of normals"):
        guides.SemiAmortized(guide, model)(x)

    def as_prior(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", q(x))
            pyro.sample("x", model.likelihood(z), obs=x)

    with pytest.raises(ValueError, match="in a model only a distribution with a density"):
        elbo.ELBO().loss(as_prior, guide, x)


def test_a_closed_form_kl_is_not_taken() -> None:
    model, _, guide, x = small()
    losses = []
    for kl in ("sampled", "mixed"):
        torch.manual_seed(0)
        losses.append(elbo.ELBO(num_particles=3, kl=kl)(model, guide)(x))
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match=r"latent 'z'.*KL\(ContinuousMixture \|\| Normal\)"):
        elbo.ELBO(kl="analytic")(model, guide)(x)


def test_beside_it_the_other_latents_keep_their_closed_forms() -> None:
    _, q, _, x = small()
    up = conditionals.Normal(nets.mlp(2, 6, 4))
    levels = [conditionals.Normal(nets.mlp(2, 6, 4))]
    model = models.Hierarchical(conditionals.Bernoulli(nets.mlp(2, 8, 5)), levels, latent_dim=2)
    planar = posteriors.Flow(nn.Linear(5, 4), [dist.transforms.planar(2)], 2)
    valid = []
    for first in (conditionals.Normal(nn.Linear(5, 4)), q, planar):
        guide = guides.BottomUp(model, [first, up])
        valid.append(ppvae.log_weights(model, guide, x).kl_valid())
        elbo.ELBO(kl="mixed")(model, guide)(x)
    assert valid[0] == valid[1] == valid[2]


# -- training ----------------------------------------------------------------------------------


def test_parameters_of_its_own_for_each_row_improve_on_the_encoder() -> None:
    model, _, guide, x = small()
    index = torch.arange(6)
    local = guide.local(x)
    assert local.table.rows.shape == (6, 6) and not any(
        p.requires_grad for p in local.head.parameters()
    )
    before = elbo.ELBO(num_particles=500).evaluate(Indexed(model), local, x, index)
    fit_local(Indexed(model), local, x, index, steps=60)
    after = elbo.ELBO(num_particles=500).evaluate(Indexed(model), local, x, index)
    assert after.mean() > before.mean()


def test_a_run_taken_up_again_is_the_uninterrupted_run_bit_for_bit(tmp_path) -> None:
    def run(epochs: int, name: str, **options):
        torch.manual_seed(0)
        model, _, guide, x = small()
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.IWELBO(num_particles=2))
        ppvae.fit(
            svi, x, valid=x, epochs=epochs, batch_size=3, progress=False, seed=0,
            checkpoint=tmp_path / name, **options,
        )  # fmt: skip
        return [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]

    whole = run(3, "whole")
    run(1, "parts")
    again = run(3, "parts", resume=True)
    assert all(map(torch.equal, whole, again))


# -- arguments ---------------------------------------------------------------------------------


class Returns(conditionals.Conditional):
    """A conditional of any distribution, made of what it is given."""

    def __init__(self, make) -> None:
        super().__init__(nn.Identity())
        self.make = make

    def forward(self, *inputs: Tensor):
        return self.make(*inputs)


NORMAL = Returns(lambda u: dist.Normal(u, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("mixing", "head", "J", "error", "message"),
    [
        (nn.Linear(5, 6), NORMAL, 4, TypeError, r"SemiImplicit\(mixing\) .*conditional.*Linear"),
        (NORMAL, nn.Linear(3, 4), 4, TypeError, r"SemiImplicit\(head\) .*conditional.*Linear"),
        (NORMAL, lambda psi: psi, 4, TypeError, r"SemiImplicit\(head\) .*function"),
        (NORMAL, NORMAL, 0, ValueError, r"num_mixing\) must be at least 1, got 0"),
        (Returns(lambda x: dist.OneHotCategorical(logits=x)), NORMAL, 4, ValueError,
         r"mixing\): OneHotCategorical has no reparameterised.*posteriors\.Mixture"),
        (NORMAL, Returns(lambda u: dist.Poisson(u.exp()).to_event(1)), 4, ValueError,
         r"head\): Independent has no reparameterised sampler"),
        (Returns(lambda x: dist.Normal(x, 1.0)), NORMAL, 4, ValueError,
         r"mixing\) gives batch shape \(6, 5\) and no event.*to_event\(1\)"),
        (NORMAL, Returns(lambda u: dist.Normal(u, 1.0)), 4, ValueError,
         r"head\) gives batch shape \(5, 6, 5\) and no event.*to_event\(1\)"),
        (NORMAL, Returns(lambda u: dist.Normal(u[..., None], 1.0).to_event(1)), 4, ValueError,
         r"head\) gives batch shape \(5, 6, 5\) for psi of shape \(5, 6, 5\), in the place of"),
    ],
    ids=["mixing", "head", "function", "J", "discrete psi", "discrete z", "psi", "z", "batch"],
)  # fmt: skip
def test_what_cannot_be_a_semi_implicit_posterior_is_refused(mixing, head, J, error, message):
    with pytest.raises(error, match=message) as raised:
        posteriors.SemiImplicit(mixing, head, J)(torch.zeros(6, 5)).rsample()
    assert len(str(raised.value)) < 300
