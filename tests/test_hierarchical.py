"""Hierarchies: the linear-Gaussian chain, whose evidence and posterior are known, and the rest."""

import functools
import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from oracles import assert_below, assert_mean, exact_gradient, gradients, hermite
from ppvae import conditionals, elbo, guides, models, nets
from ppvae.guides.ladder import merge
from ppvae.models.hierarchical import softplus_variance
from registry import build

Normal = conditionals.Normal
D = 2  # chains of scalars, side by side


class Times(nn.Module):
    """x -> a x + b, unit by unit."""

    def __init__(self, a, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x):
        return self.a * x + self.b


class Chain:
    """z_L ~ N(0, 1), z_l ~ N(a_l z_{l+1}, s_l^2), x ~ N(a_0 z_1, s_0^2), in each of D units."""

    slopes = ([1.3, -0.7], [0.8, 1.1], [-0.6, 0.9])  # of x, z1, z2
    scales = (0.5, 0.6, 0.9)

    def __init__(self, levels):
        parts = [
            Normal(Times(self.slopes[i]), scale=self.scales[i]) for i in range(levels)
        ]  # p(x | z1), p(z1 | z2), ...
        self.model = models.Hierarchical(parts[0], parts[1:], latent_dim=D)
        a, s = torch.tensor(self.slopes[:levels]), torch.tensor(self.scales[:levels])
        # Joint of (x, z1, ..., zL), one covariance per unit, built from the top.
        self.variance = [torch.ones(D)]  # of zL, ..., z1, x
        for i in reversed(range(levels)):
            self.variance.append(a[i].square() * self.variance[-1] + s[i].square())
        self.variance.reverse()  # x, z1, ..., zL
        self.a, self.s, self.levels = a, s, levels

    def log_evidence(self, x):
        return dist.Normal(0.0, self.variance[0].sqrt()).log_prob(x).sum(-1)

    def bottom_up(self, scale=1.0, shift=0.0):
        """q(z1 | x), q(z2 | z1), ...: Bayes' rule at each link of a Markov chain."""
        found = []
        for i in range(self.levels):
            prior = self.variance[i + 1]
            slope = self.a[i] * prior / self.variance[i]
            variance = prior - slope * self.a[i] * prior
            net = Concatenated(Times(slope.tolist(), [shift] * D), (scale * variance.sqrt()).log())
            found.append(Normal(net))
        return guides.BottomUp(self.model, found)

    def ladder(self, scale=1.0, shift=0.0):
        """Heads N(mu, var) proportional to p(x | z_l) in z_l; at the top the posterior."""
        heads, slope, noise = [], torch.ones(D), torch.zeros(D)
        for i in range(self.levels):
            noise = noise + slope.square() * self.s[i].square()
            slope = slope * self.a[i]  # x | z_{i+1} ~ N(slope z, noise)
            mean, variance = 1 / slope, noise / slope.square()
            if i == self.levels - 1:  # nothing to merge with: the prior N(0, 1) is put in here
                variance = 1 / (1 + 1 / variance)
                mean = variance * slope / noise
            net = Concatenated(Times(mean.tolist(), [shift] * D), (scale * variance.sqrt()).log())
            heads.append(Normal(net))
        return guides.Ladder(self.model, [nn.Identity()] * self.levels, heads)

    def draw(self, rows, seed=1):
        random = torch.Generator().manual_seed(seed)
        return self.variance[0].sqrt() * torch.randn(rows, D, generator=random)


class Concatenated(nn.Module):
    """Means and a constant raw scale."""

    def __init__(self, loc, raw):
        super().__init__()
        self.loc, self.raw = loc, nn.Parameter(raw)

    def forward(self, x):
        loc = self.loc(x)
        return torch.cat([loc, self.raw.expand_as(loc)], -1)


kinds = pytest.mark.parametrize("kind", ["bottom_up", "ladder"])


# ------------------------------------------------------------------------------ the oracle


@kinds
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.usefixtures("float64")
def test_the_exact_guide_is_tight(kind, levels):
    chain = Chain(levels)
    guide, x = getattr(chain, kind)(), chain.draw(5)
    exact = chain.log_evidence(x)
    weights = ppvae.log_weights(chain.model, guide, x, num_particles=4)
    assert set(weights.latents) == {f"z{level}" for level in range(1, levels + 1)}
    torch.testing.assert_close(weights.log_w, exact.expand(4, 5), rtol=0, atol=1e-10)
    for estimator in (elbo.ELBO(3), elbo.IWELBO(3)):
        bound = estimator.evaluate(chain.model, guide, x)
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-10)


@kinds
@pytest.mark.usefixtures("float64")
def test_bounds_of_a_wrong_guide_lie_below_and_rise_with_k(kind):
    chain = Chain(2)
    guide, x = getattr(chain, kind)(scale=1.5, shift=0.2), chain.draw(5)
    exact, draws = chain.log_evidence(x).sum().item(), 2000
    log_w = ppvae.log_weights(chain.model, guide, x.repeat(draws, 1), num_particles=8).log_w
    values = [elbo.IWELBO(K).bound(log_w[:K]).detach().reshape(draws, 5).sum(1) for K in (1, 2, 8)]
    for value in values:
        assert_below(value, exact)
    for fewer, more in itertools.pairwise(values):
        gain = more - fewer
        assert gain.mean() > 4 * gain.std() / math.sqrt(draws)
    assert values[0].mean() < exact - 0.05


def exact_elbo(chain, guide, x, beta=1.0):
    """Of a two-level chain by quadrature, which is exact for a quadratic; differentiable."""
    nodes, mass = hermite(6)
    first_level, second_level = ("z1", "z2") if isinstance(guide, guides.BottomUp) else ("z2", "z1")
    total = 0.0
    for unit in range(D):  # the units are independent
        e = torch.zeros(36, 2, 1, D)
        e[:, :, 0, unit] = torch.cartesian_prod(nodes, nodes)
        weight = torch.outer(mass, mass).flatten().reshape(-1, 1)
        if first_level == "z1":
            q1 = guide.levels[0](x).base_dist
            first = q1.loc + q1.scale * e[:, 0]
            q2 = guide.levels[1](first).base_dist
            second = q2.loc + q2.scale * e[:, 1]
        else:
            up = guide.upward(x)
            q1 = up[1].base_dist
            first = q1.loc + q1.scale * e[:, 0]
            q2 = merge(up[0], chain.model.levels[0](first)).base_dist
            second = q2.loc + q2.scale * e[:, 1]
        z = {first_level: first, second_level: second}
        log_q = q1.log_prob(first) + q2.log_prob(second)
        prior = dist.Normal(0.0, 1.0).log_prob(z["z2"])
        prior = prior + chain.model.levels[0](z["z2"]).base_dist.log_prob(z["z1"])
        fit = chain.model.likelihood(z["z1"]).base_dist.log_prob(x)
        values = fit - beta * (log_q - prior)
        total = total + (weight * values[..., unit]).sum(0)
    return total


@kinds
@pytest.mark.parametrize("kl", ["sampled", "mixed", "analytic"])
@pytest.mark.usefixtures("float64")
def test_every_form_of_the_kl_has_the_exact_mean(kind, kl):
    chain = Chain(2)
    guide, x = getattr(chain, kind)(scale=1.4, shift=0.3), chain.draw(3)
    estimator = elbo.ELBO(kl=kl, beta=2.0)
    if (kind, kl) == ("bottom_up", "analytic"):
        with pytest.raises(ValueError, match="latent 'z1': in the model it depends on a latent"):
            estimator(chain.model, guide)(x)
        return
    weights = ppvae.log_weights(chain.model, guide, x.repeat(3000, 1))
    values = estimator.effective(weights, estimator.new_state())[0].detach()
    exact = exact_elbo(chain, guide, x, beta=2.0).sum().detach()
    assert_mean(values.reshape(3000, 3).sum(1), exact, kl)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_provenance_of_the_closed_form(levels):
    sizes = range(2, 2 + levels)
    head = functools.partial(Normal, positive=softplus_variance)
    downward = [head(nets.mlp(b, 2 * a)) for a, b in itertools.pairwise(sizes)]
    model = models.Hierarchical(Normal(nets.mlp(2, 5), scale=1.0), downward, latent_dim=sizes[-1])
    upward = [head(nets.mlp(a, 2 * b)) for a, b in itertools.pairwise([5, *sizes])]
    bottom_up = guides.BottomUp(model, upward)
    heads = [head(nets.mlp(5, 2 * size)) for size in sizes]
    ladder = guides.Ladder(model, [nn.Identity() for _ in sizes], heads)
    x = torch.randn(4, 5)
    everything = {f"z{level}" for level in range(1, levels + 1)}
    assert ppvae.log_weights(model, bottom_up, x).kl_valid() == {f"z{levels}"}
    assert ppvae.log_weights(model, ladder, x).kl_valid() == everything


@pytest.mark.parametrize("label", ["pathwise", "stl", "analytic", "bottom_up pathwise"])
@pytest.mark.usefixtures("float64")
def test_gradients_are_unbiased_where_model_and_guide_share_a_path(label):
    chain = Chain(2)
    kind = "bottom_up" if "bottom_up" in label else "ladder"
    guide, x = getattr(chain, kind)(scale=1.4, shift=0.3), chain.draw(2)
    estimator = {
        "pathwise": elbo.ELBO(),
        "stl": elbo.ELBO(gradient="stl"),
        "analytic": elbo.ELBO(kl="analytic"),
        "bottom_up pathwise": elbo.ELBO(),
    }[label]
    objective = estimator(chain.model, guide)
    parameters = list(objective.parameters())
    many = x.repeat(40, 1)
    found = gradients(lambda: objective(many), parameters, draws=120, rows=40)
    exact = exact_gradient(-exact_elbo(chain, guide, x).sum(), parameters)
    assert exact.abs().min() > 1e-4
    assert_mean(found, exact, label)


@pytest.mark.usefixtures("float64")
def test_dreg_has_the_mean_of_the_pathwise_gradient_on_a_ladder():
    chain = Chain(2)
    guide, x = chain.ladder(scale=1.4, shift=0.3), chain.draw(2).repeat(40, 1)
    found = {}
    for gradient in ("pathwise", "dreg"):
        objective = elbo.IWELBO(3, gradient)(chain.model, guide)
        parameters = list(objective.parameters())
        found[gradient] = gradients(lambda: objective(x), parameters, draws=120, rows=40)  # noqa: B023
    assert_mean(found["pathwise"] - found["dreg"], 0.0)


@pytest.mark.usefixtures("float64")
def test_stl_vanishes_for_what_only_the_exact_guide_has():
    for kind in ("bottom_up", "ladder"):
        chain = Chain(3)
        guide, x = getattr(chain, kind)(), chain.draw(5)
        shared = {id(p) for p in chain.model.parameters()}
        own = [p for p in guide.parameters() if id(p) not in shared]
        assert len(own) == 9
        for estimator in (elbo.ELBO(gradient="stl"), elbo.IWELBO(4, "dreg")):
            loss = estimator(chain.model, guide)(x)
            grads = torch.autograd.grad(loss, own)
            assert max(g.abs().max() for g in grads) < 1e-10


# ------------------------------------------------------------------------------ the merge


@pytest.mark.usefixtures("float64")
def test_merge_is_the_normalised_product():
    up = dist.Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.1).to_event(1)
    down = dist.Normal(torch.randn(5, 4, 3), torch.rand(5, 4, 3) + 0.1).to_event(1)
    q = merge(up, down)
    assert q.batch_shape == (5, 4)
    z = torch.randn(7, 5, 4, 3)
    difference = q.log_prob(z) - up.log_prob(z) - down.log_prob(z)
    torch.testing.assert_close(difference, difference[:1].expand(7, 5, 4))  # constant in z


@pytest.mark.parametrize("tiny", [1e-20, 1e-30])
def test_merge_of_extreme_scales_in_float32(tiny):
    one, sharp = (
        dist.Normal(torch.tensor([loc]), scale, validate_args=False).to_event(1)
        for loc, scale in ((3.0, 1.0), (-2.0, tiny))
    )
    for q in (merge(one, sharp), merge(sharp, one)):
        assert q.mean.item() == pytest.approx(-2.0)
        assert q.base_dist.scale.item() == pytest.approx(tiny)


def test_only_diagonal_normals_merge():
    likelihood = conditionals.Bernoulli(nets.mlp(2, 4))
    full = ppvae.posteriors.FullNormal(nets.mlp(3, 5), 2)
    heads = [Normal(nets.mlp(4, 4)), Normal(nets.mlp(4, 6))]
    blocks = [nn.Identity(), nn.Identity()]
    model = models.Hierarchical(likelihood, [full], latent_dim=3)
    with pytest.raises(TypeError, match=r"p\(z1 \| z2\) gives a MultivariateNormal"):
        guides.Ladder(model, blocks, heads)
    model = models.Hierarchical(likelihood, [conditionals.Mixture(3, 2)], latent_dim=3)
    with pytest.raises(TypeError, match=r"p\(z1 \| z2\) gives a MixtureSameFamily"):
        guides.Ladder(model, blocks, heads)
    model = models.Hierarchical(likelihood, [Normal(nets.mlp(3, 4))], latent_dim=3)
    with pytest.raises(TypeError, match="head 1 gives a MultivariateNormal"):
        guides.Ladder(model, blocks, [ppvae.posteriors.FullNormal(nets.mlp(4, 5), 2), heads[1]])


def test_softplus_variance_has_a_gradient_everywhere():
    raw = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    scale = softplus_variance(raw)
    scale.sum().backward()
    assert raw.grad.isfinite().all() and (scale > 0).all()
    assert scale[1].item() ** 2 == pytest.approx(math.log(2) + 1e-5)
    assert scale[2].item() ** 2 == pytest.approx(200)


# ------------------------------------------------------------------------------ widths


def test_levels_that_do_not_chain_are_named_with_their_widths():
    likelihood = conditionals.Bernoulli(nets.mlp(16, 64))

    def hierarchy(*levels, top=4):
        return models.Hierarchical(likelihood, [Normal(net) for net in levels], latent_dim=top)

    with pytest.raises(ValueError, match=r"p\(z1 \| z2\) fails for z2 of shape \(8,\); so far "
                       r"z3 \(4,\), z2 \(8,\)\. .* width 9"):  # fmt: skip
        hierarchy(nets.mlp(9, 32), nets.mlp(4, 16))
    with pytest.raises(ValueError, match=r"p\(x \| z1\) fails for z1 of shape \(8,\)"):
        hierarchy(nets.mlp(4, 16))
    with pytest.raises(ValueError, match=r"p\(z1 \| z2\) fails .*splits dimension -1"):
        hierarchy(nets.mlp(4, 33))
    plain = nn.Linear(5, 32)  # its own message names no variable
    with pytest.raises(ValueError, match=r"p\(z1 \| z2\) fails for z2 of shape \(4,\)"):
        hierarchy(plain)

    model = hierarchy(nets.mlp(8, 32), nets.mlp(4, 16))
    assert model.shapes == {"z3": (4,), "z2": (8,), "z1": (16,), "x": (64,)}

    def bottom_up(*nets):
        return guides.BottomUp(model, [Normal(net) for net in nets])

    up = nets.mlp(64, 32), nets.mlp(16, 16), nets.mlp(8, 8)
    bottom_up(*up)
    with pytest.raises(ValueError, match=r"2 entries, but the model has 3 latents"):
        bottom_up(*up[:2])
    with pytest.raises(ValueError, match=r"q\(z2 \| z1\) fails for z1 of shape \(16,\)"):
        bottom_up(up[0], nets.mlp(15, 16), up[2])
    with pytest.raises(ValueError, match=r"q\(z2 \| z1\) gives z2 of shape \(7,\), but it has "
                       r"shape \(8,\) in the model; so far x \(64,\), z1 \(16,\)"):  # fmt: skip
        bottom_up(up[0], nets.mlp(16, 14), up[2])
    with pytest.raises(ValueError, match=r"q\(z1 \| x\) fails for x of shape \(64,\)"):
        bottom_up(nets.mlp(63, 32), *up[1:])

    blocks = [nets.mlp(64, 20), nets.mlp(20, 10), nets.mlp(10, 5)]
    heads = [Normal(nets.mlp(20, 32)), Normal(nets.mlp(10, 16)), Normal(nets.mlp(5, 8))]
    guides.Ladder(model, blocks, heads)
    with pytest.raises(ValueError, match=r"Ladder\(blocks\) has 2 entries"):
        guides.Ladder(model, blocks[:2], heads)
    with pytest.raises(ValueError, match=r"Ladder\(heads\) has 4 entries"):
        guides.Ladder(model, blocks, [*heads, heads[0]])
    with pytest.raises(ValueError, match=r"block 2 fails for d1 of shape \(20,\)"):
        guides.Ladder(model, [blocks[0], nets.mlp(21, 10), blocks[2]], heads)
    with pytest.raises(ValueError, match=r"head 3 gives z3 of shape \(5,\), but .* \(4,\)"):
        guides.Ladder(model, blocks, [*heads[:2], Normal(nets.mlp(5, 10))])


class Pair(nn.Module):
    """An encoder in plain PyTorch: mean and scale."""

    def forward(self, x):
        return x, x.exp()


class OfTorch(nn.Module):
    """A distribution that Pyro cannot sample."""

    def forward(self, x):
        return torch.distributions.Independent(torch.distributions.Normal(x, 1.0), 1)


class Own(nn.Module):
    """A user's own conditional, of no class of ppvae's."""

    def forward(self, x):
        return dist.Laplace(x, 1.0).to_event(1)


@pytest.mark.parametrize(
    ("bare", "kind"),
    [(nets.mlp(4, 4), "torch.Tensor"), (Pair(), "builtins.tuple"), (OfTorch(), "Independent")],
)
def test_a_level_that_gives_no_distribution_is_refused_at_once(bare, kind):
    good = Normal(nets.mlp(4, 8))
    message = rf" gives a .*{kind}, but must give one of pyro.distributions"
    with pytest.raises(TypeError, match=r"levels\[1\]" + message):
        models.Hierarchical(good, [good, bare], latent_dim=4)
    with pytest.raises(TypeError, match="likelihood" + message):
        models.Hierarchical(bare, [good], latent_dim=4)
    model = models.Hierarchical(good, [good], latent_dim=4)
    with pytest.raises(TypeError, match=r"levels\[0\]" + message):
        guides.BottomUp(model, [bare, good])
    flat = [nn.Identity(), nn.Identity()]
    for heads in ([bare, good], [good, bare]):
        with pytest.raises(TypeError, match=r"heads\[[01]\]" + message):
            guides.Ladder(model, flat, heads)
    with pytest.raises(TypeError, match="block 1 gives a DiagonalNormal, but must give a tensor"):
        guides.Ladder(model, [good, nn.Identity()], [good, good])
    with pytest.raises(TypeError, match="prior, a Normal, fails when called without arg"):
        models.Hierarchical(good, [good], prior=good)
    model = models.Hierarchical(good, [Own()], latent_dim=4)
    assert guides.BottomUp(model, [Own(), Own()])(torch.zeros(5, 4)).shape == (5, 4)


def test_a_guide_of_a_hierarchy_names_another_model():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 4)), latent_dim=2)
    head = [Normal(nets.mlp(4, 4))]
    with pytest.raises(TypeError, match=r"Ladder\(model\) must be .* got a VAE.*guides.Normal"):
        guides.Ladder(model, [nn.Identity()], head)
    with pytest.raises(TypeError, match=r"BottomUp\(model\) must be .* got a VAE.*guides.Normal"):
        guides.BottomUp(model, head)


def test_an_encoder_of_classes_is_shown_integers():
    embed = nn.Sequential(nn.Embedding(4, 5), nn.Flatten(-2), nn.Linear(15, 2 * 2))
    likelihood = conditionals.Categorical(nets.mlp(2, 3 * 4), num_classes=4)
    model = models.Hierarchical(likelihood, [Normal(nets.mlp(2, 4))], latent_dim=2)
    guide = guides.BottomUp(model, [Normal(embed), Normal(nets.mlp(2, 4))])
    weights = ppvae.log_weights(model, guide, torch.randint(4, (6, 3)), num_particles=5)
    assert weights.log_w.shape == (5, 6)


def test_looking_at_shapes_moves_nothing():
    block = nets.flat_batch(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    state = torch.random.get_rng_state()
    models.Hierarchical(Normal(block, scale=1.0), latent_dim=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(dict(block.state_dict()), before, rtol=0, atol=0)
    assert all(module.training for module in block.modules())


# ------------------------------------------------------------------------------ training


def test_model_and_ladder_share_the_levels():
    model, guide, (x,) = build("ladder")
    assert guide.levels is model.levels
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(beta=elbo.LinearWarmup(10)))
    before = [p.clone() for p in model.levels.parameters()]
    svi.step(x)
    assert svi.objective.step == 1
    for old, new in zip(before, model.levels.parameters(), strict=True):
        assert not torch.equal(old, new)
    names = [id(p) for group in svi.optimizer.param_groups for p in group["params"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("pair", ["hierarchical", "ladder", "ladder_conv"])
def test_fine_tuning_goes_on_with_the_same_pair(pair):
    model, guide, (x,) = build(pair)
    warm = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(beta=elbo.LinearWarmup(4)))
    ppvae.fit(warm, x, epochs=3, batch_size=3, progress=False)
    fine = ppvae.SVI(
        model, guide, functools.partial(torch.optim.Adam, lr=1e-4), elbo.IWELBO(num_particles=10)
    )
    history = ppvae.fit(fine, x, epochs=2, batch_size=3, valid=x, progress=False)
    assert history.name == "IWELBO-10"
    assert all(math.isfinite(value) for value in history.column("valid_bound"))


@pytest.mark.parametrize(
    ("pair", "estimator"),
    [
        ("hierarchical", elbo.ELBO(beta=elbo.LinearWarmup(4))),
        ("ladder", elbo.IWELBO(5)),
        ("ladder_conv", elbo.ELBO(beta=elbo.LinearWarmup(4))),
        pytest.param("hierarchical", elbo.IWELBO(5), marks=pytest.mark.slow),
        pytest.param("ladder", elbo.ELBO(beta=elbo.LinearWarmup(4)), marks=pytest.mark.slow),
        pytest.param("ladder_conv", elbo.IWELBO(5), marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(pair, estimator, monkeypatch):
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs: lambda *a: graph(*a))
    losses, buffers = [], []
    for compiled in (False, True):
        model, guide, args = build(pair)
        # Adam would make a step of the rounding in the gradient of a bias before batch norm.
        sgd = functools.partial(torch.optim.SGD, lr=1e-2)
        svi = ppvae.SVI(model, guide, sgd, estimator, compile=compiled)
        torch.manual_seed(3)
        losses.append([svi.step(*args) for _ in range(3)])
        buffers.append({k: v.clone() for k, v in svi.objective.named_buffers()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(buffers[0], buffers[1], rtol=1e-3, atol=1e-4)


def test_levels_draw_from_the_top_down():
    for name in ("ladder", "ladder_conv"):
        model, guide, (x,) = build(name)
        assert model(size=3).shape == (3, *x.shape[1:])
        z1 = guide(x)
        assert tuple(z1.shape[1:]) == model.shapes["z1"]
        report = ppvae.diagnose(model, guide, x, num_particles=30)
        assert set(report.kl) == {"z1", "z2", "z3"} == set(report.activity)
