"""Top-down hierarchies: the exact pair of two groups, the shared walk, NVAE's networks."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import ppvae
from oracles import assert_below, assert_mean
from ppvae import conditionals, elbo, guides, models, nets
from registry import build

Exponential = functools.partial(conditionals.Normal, nn.Identity(), event_dim=3)


# ------------------------------------------------------------------------------ two groups, exactly


class Linear(nn.Module):
    """s = (a h, log s1), z1, then b z1 + c h: x depends on z2 beside z1."""

    def __init__(self, a, b, c, scale):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v)) for v in (a, b, c))
        self.scale = scale

    def forward(self, h, draw):
        raw = torch.full_like(h, math.log(self.scale))
        z = draw(torch.cat([self.a * h, raw], -3), h)
        return self.b * z + self.c * h


class Second(nn.Module):
    def forward(self, h, z):
        return z


class Both(nn.Module):
    """x for both groups."""

    def forward(self, x):
        return [x, x]


class Of(nn.Module):
    """An offset (u x + v h, w) of a group's parameters."""

    def __init__(self, u, v, w):
        super().__init__()
        self.u, self.v, self.w = (nn.Parameter(torch.tensor(float(t))) for t in (u, v, w))

    def forward(self, h, e):
        loc = self.u * e + self.v * h
        return torch.cat([loc, self.w.expand_as(loc)], -3)


class Exact:
    """z2 ~ N(0, 1), z1 ~ N(a z2, s1^2), x ~ N(b z1 + c z2, s0^2), twice side by side."""

    a, b, c, s1, s0 = 0.8, 1.3, -0.6, 0.7, 0.5

    def __init__(self, scale=1.0, shift=0.0, residual=True):
        a, b, c, s1, s0 = self.a, self.b, self.c, self.s1, self.s0
        path = nets.TopDown((2, 1, 1), [nets.Group(nets.Zeros(2), Second()), Linear(a, b, c, s1)])
        likelihood = conditionals.Normal(nn.Identity(), scale=s0, event_dim=3)
        self.model = models.TopDown(path, likelihood, normal=Exponential())
        slope, noise = a * b + c, (b * s1) ** 2 + s0**2  # of x given z2
        self.variance = slope**2 + noise
        v2 = noise / self.variance
        v1 = 1 / (1 / s1**2 + b**2 / s0**2)  # z1 ~ N(v1 (a z2 / s1^2 + b (x - c z2) / s0^2), v1)
        mean = [v1 * b / s0**2, v1 * (a / s1**2 - b * c / s0**2)]
        if residual:
            head1 = Of(mean[0], mean[1] - a, math.log(v1) / 2 - math.log(s1))
        else:
            head1 = Of(*mean, math.log(v1) / 2)
        head2 = Of(slope / self.variance, 0.0, math.log(v2) / 2 + math.log(scale))
        with torch.no_grad():
            head1.w += math.log(scale)
            head1.v += shift
        self.guide = guides.TopDown(self.model, Both(), [head2, head1], residual=residual)
        self.x = math.sqrt(self.variance) * torch.randn(5, 2, 1, 1)

    def log_evidence(self):
        return dist.Normal(0.0, math.sqrt(self.variance)).log_prob(self.x).sum((1, 2, 3))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("residual", [True, False])
def test_the_exact_guide_is_tight(residual):
    exact = Exact(residual=residual)
    weights = ppvae.log_weights(exact.model, exact.guide, exact.x, num_particles=4)
    assert weights.latents == ("z2", "z1")
    expected = exact.log_evidence()
    torch.testing.assert_close(weights.log_w, expected.expand(4, 5), rtol=0, atol=1e-10)
    assert weights.kl_valid() == {"z2", "z1"}
    for gradient in ("stl", "pathwise"):
        bound = elbo.ELBO(gradient=gradient).evaluate(exact.model, exact.guide, exact.x)
        torch.testing.assert_close(bound, expected, rtol=0, atol=1e-10)
    loss = elbo.ELBO(gradient="stl")(exact.model, exact.guide)(exact.x)
    slopes = torch.autograd.grad(loss, list(exact.guide.heads.parameters()))
    assert max(slope.abs().max() for slope in slopes) < 1e-10


@pytest.mark.usefixtures("float64")
def test_a_wrong_guide_lies_below_and_both_kls_agree():
    exact = Exact(scale=1.4, shift=0.2)
    x = exact.x.repeat(2000, 1, 1, 1)
    sampled, closed = (elbo.ELBO(kl=kl) for kl in ("sampled", "analytic"))
    weights = ppvae.log_weights(exact.model, exact.guide, x)
    values = [e.effective(weights, elbo.State())[0].detach() for e in (sampled, closed)]
    values = [value.reshape(2000, 5).sum(1) for value in values]
    assert_mean(values[0] - values[1], 0.0)
    assert_below(values[1], exact.log_evidence().sum().item() - 0.05)


@pytest.mark.usefixtures("float64")
def test_the_kl_of_a_residual_normal():
    mean, raw, shift, change = torch.randn(4, 3, 2, 2, 2)
    normal = Exponential()
    p = normal(torch.cat([mean, raw], -3))
    q = normal(torch.cat([mean + shift, raw + change], -3))
    ds = change.exp()
    by_hand = 0.5 * ((shift / raw.exp()).square() + ds.square() - ds.square().log() - 1)
    closed = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(closed, by_hand.sum((1, 2, 3)))
    z = q.sample((20_000,))
    assert_mean(q.log_prob(z) - p.log_prob(z), closed)


def test_soft_normals_are_clamped():
    raw = torch.tensor([0.3, -400.0, -0.2, 400.0])
    q = conditionals.SoftNormal(event_dim=1)(raw)
    mean = 5 * torch.tanh(torch.tensor([0.06, -80.0]))
    scale = torch.exp(5 * torch.tanh(torch.tensor([-0.04, 80.0]))) + 0.01
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.stddev, scale)


@pytest.mark.usefixtures("float64")
def test_the_elbo_is_that_of_a_loop_written_by_hand():
    model, guide, (x,) = build("top_down")
    model, guide = model.double().eval(), guide.double().eval()
    x = x.double()
    pyro.set_rng_seed(3)
    value = elbo.ELBO(kl="analytic").effective(ppvae.log_weights(model, guide, x), elbo.State())
    pyro.set_rng_seed(3)
    h, total = model.path.start, 0.0
    for group, head, e in zip(model.path.groups, guide.heads, guide.encoder(x), strict=True):
        s = group.prior(h)
        p, q = (5 * torch.tanh(t / 5) for t in (s, s + head(h, e)))
        (mp, sp), (mq, sq) = p.chunk(2, -3), q.chunk(2, -3)
        sp, sq = sp.exp() + 0.01, sq.exp() + 0.01
        kl = sp.log() - sq.log() + (sq**2 + (mq - mp) ** 2) / (2 * sp**2) - 0.5
        total = total - kl.sum((1, 2, 3))
        h = group.absorb(h, mq + sq * torch.randn_like(mq))
    total = total + dist.Bernoulli(logits=model.likelihood.net(h)).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(value[0], total)


# ------------------------------------------------------------------------------ one walk for both


def counted(model):
    calls = []
    model.path.groups[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("K", [1, 3])
def test_a_step_walks_the_path_once_and_counts_one_batch(K):
    model, guide, (x,) = build("top_down")
    calls, loss = counted(model), elbo.IWELBO(K)(model, guide)
    norms = [m for m in nn.ModuleList([model, guide]).modules() if isinstance(m, nn.BatchNorm2d)]
    loss(x)
    calls.clear()  # the structure of the pair has been found
    before = [int(norm.num_batches_tracked) for norm in norms]
    loss(x).backward()
    assert len(calls) == 1 and len(norms) > 4
    assert [int(norm.num_batches_tracked) for norm in norms] == [count + 1 for count in before]


ESTIMATORS = {
    "pathwise": elbo.ELBO(2),
    "analytic": elbo.ELBO(kl="analytic"),
    "stl": elbo.ELBO(2, gradient="stl"),
    "dreg": elbo.IWELBO(3, gradient="dreg"),
    "wake-sleep": elbo.ReweightedWakeSleep(3),
    "balanced": elbo.ELBO(kl="analytic", beta=elbo.Balanced(0.5)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_shared_walk_changes_no_number(kind, monkeypatch):
    model, guide, (x,) = build("top_down")
    model, guide, x = model.double().eval(), guide.double().eval(), x.double()
    parameters = list({id(p): p for p in [*model.parameters(), *guide.parameters()]}.values())

    def step():
        pyro.set_rng_seed(0)
        loss = ESTIMATORS[kind](model, guide)(x)
        return [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    step()
    calls = counted(model)
    shared = step()
    walks = len(calls)
    monkeypatch.setattr(model.path, "recall", lambda: None)
    calls.clear()
    alone = step()
    assert walks < len(calls)
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_latents_of_another_origin_are_walked_again():
    model, guide, (x,) = build("top_down")
    model.eval(), guide.eval()
    drawn = guide(x)

    def terms(latents):
        trace = poutine.trace(poutine.condition(model, latents)).get_trace(x)
        trace.compute_log_prob()
        return torch.stack([trace.nodes[n]["log_prob"] for n in (*latents, "x")])

    expected = terms({name: z.clone() for name, z in drawn.items()})
    for replaced in drawn:
        drawn = {n: z.detach() if n == replaced else z for n, z in guide(x).items()}
        copies = {n: z.clone() for n, z in drawn.items()}
        torch.testing.assert_close(terms(drawn), terms(copies))
    assert expected.isfinite().all()


@pytest.mark.parametrize(
    "change", ["parameter", "buffer", "mode", "gradient", "replaced", "copied"]
)
def test_a_walk_of_another_path_is_not_taken_over(change):
    model, guide, (x,) = build("top_down")
    model.eval(), guide.eval()
    with torch.set_grad_enabled(change != "gradient"):
        latents = guide(x)
    conv = model.path.groups[1].prior.net[1]
    with torch.no_grad():
        if change == "parameter":
            conv.weight.mul_(2.0)
        elif change == "buffer":
            next(iter(model.path.buffers())).add_(1.0)
        elif change == "mode":
            model.train()
        elif change == "replaced":
            conv.weight = nn.Parameter(2.0 * conv.weight)
        elif change == "copied":
            model = copy.deepcopy(model)
    calls = counted(model)
    poutine.condition(model, latents)(x)
    assert len(calls) == 1
    if change != "copied":
        latents = guide(x)
        poutine.condition(model, latents)(x)
        assert len(calls) == 2  # the guide's walk alone
        poutine.condition(model, latents)(x)
        assert len(calls) == 3  # it is kept for one run


# ------------------------------------------------------------------------------ temperatures


@pytest.mark.usefixtures("float64")
def test_temperature_scales_deviations_and_given_latents_stay():
    model = Exact().model
    # x = (a b + c) z2 + b s1 e: at temperature t both deviations are t times as large
    for t in (0.0, 0.5, 1.0):
        mean = model.decode(20_000, temperature=t).mean[..., 0, 0]
        variance = t**2 * (Exact().variance - Exact.s0**2)
        assert_mean(mean.square(), variance)
    z2 = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    mean = model.decode(4, temperature=0.0, given={"z2": z2}).mean[..., 0, 0]
    slope = Exact.a * Exact.b + Exact.c
    torch.testing.assert_close(mean, slope * torch.tensor([1.0, 2.0]).expand(4, 2))
    with pytest.raises(ValueError, match=r"given has 'z3' of shape \(1, 2, 1, 1\)"):
        model.decode(given={"z3": z2})
    with pytest.raises(ValueError, match=r"given has 'z2' of shape \(2, 1\)"):
        model.decode(given={"z2": z2[0, :, :, 0]})
    with pytest.raises(TypeError, match="temperature must be a number"):
        model.decode(temperature="cold")
    with pytest.raises(ValueError, match="temperature scales standard deviations"):
        model.decode(temperature=-1.0)


# ------------------------------------------------------------------------------ balanced KLs


def tilt(penalty, rates, steps=0):
    state = penalty and elbo.State()
    for _ in range(steps):
        state.count()
    found = penalty.tilt(rates, torch.zeros(3), state)
    assert found.likelihood == 1 and found.constant == 0
    return found.kl, state


def test_balanced_weights_by_hand():
    rates = {n: torch.tensor([[v, -v, 3 * v]]) for n, v in (("z3", 1.0), ("z2", 2.0), ("z1", 0.1))}
    alpha = {"z3": 1.0, "z2": 2.0, "z1": 2.0}
    kl, state = tilt(elbo.Balanced(elbo.LinearWarmup(10), alpha), rates, steps=4)
    sizes = {"z3": 5 / 3 + 0.01, "z2": (10 / 3 + 0.01) / 2, "z1": (0.5 / 3 + 0.01) / 2}
    mean = sum(sizes.values()) / 3
    for name, size in sizes.items():
        assert kl[name].item() == pytest.approx(0.4 * size / mean, rel=1e-6)
    assert sum(kl.values()).item() == pytest.approx(0.4 * 3)
    assert state.shown["kl_weight"].item() == pytest.approx(0.4)
    done, _ = tilt(elbo.Balanced(elbo.LinearWarmup(10), alpha), rates, steps=10)
    assert all(weight == 1 for weight in done.values())


def test_balanced_after_the_warm_up_is_the_elbo():
    model, guide, (x,) = build("top_down")
    pyro.set_rng_seed(1)
    plain = elbo.ELBO(kl="analytic")(model.eval(), guide.eval())(x)
    pyro.set_rng_seed(1)
    assert elbo.ELBO(kl="analytic", beta=elbo.Balanced(1.0))(model, guide)(x) == plain


def test_balanced_refuses():
    with pytest.raises(ValueError, match="alpha must be positive, and of 'z1'"):
        elbo.Balanced(1.0, {"z1": 0.0})
    with pytest.raises(ValueError, match=r"alpha is of \['z1'\], and the latents are \['z2'\]"):
        tilt(elbo.Balanced(1.0, {"z1": 1.0}), {"z2": torch.ones(1, 2)})


def test_a_model_says_how_groups_are_balanced():
    parts = nets.nvae((1, 16, 16), groups=(1, 2, 4), channels=2, blocks=0)
    model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
    assert list(model.balance.values()) == [1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]


# ------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 7), (1, 1, 5)])
def test_networks_for_images_of_any_size(shape):
    parts = nets.nvae(shape, groups=(1, 2), channels=2, latent_channels=3, blocks=1, block_cells=2)
    model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
    half = [-(-n // 2) for n in shape[1:]]
    quarter = [-(-n // 2) for n in half]
    sizes = [tuple(s) for s in ((3, *quarter), (3, *half), (3, *half), shape)]
    assert list(model.shapes.values()) == sizes
    guide = guides.TopDown(model, parts.encoder, parts.heads)
    assert ppvae.check_pair(model, guide, torch.ones(4, *shape))


def test_a_cell_keeps_to_its_skip():
    cell = nets.encoder_cell(4)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(cell(x), x + 0.1 * cell.branch(x))
    gates = nets.SqueezeExcitation(4).gates(x.mean((2, 3)))
    assert ((gates > 0) & (gates < 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (28, 28)}, r"shape is \(C, H, W\) of an image, got \(28, 28\)"),
        ({"groups": ()}, "each scale needs a group"),
        ({"groups": (1, 0)}, "groups must be at least 1, got 0"),
        ({"cells": 0}, "cells must be at least 1, got 0"),
        (
            {"shape": (1, 4, 4), "groups": (1, 2), "blocks": 2},
            "2 blocks and 2 scales halve an image of 4 x 4 3 times, and after 2 it is 1 x 1",
        ),
    ],
)
def test_networks_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        nets.nvae(**arguments)


def test_numbers_of_groups_are_whole():
    with pytest.raises(TypeError, match=r"groups must be a whole number, got 1.5"):
        nets.nvae((1, 8, 8), groups=(1, 1.5))
    with pytest.raises(TypeError, match="blocks must be a whole number"):
        nets.nvae((1, 8, 8), groups=(1, 1), blocks="2")


def parts_of(**changes):
    parts = nets.nvae((1, 8, 8), groups=(1, 1), channels=2, blocks=1)
    return parts._replace(**changes)


def make(parts, **options):
    model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3), **options)
    return guides.TopDown(model, parts.encoder, parts.heads)


def test_parts_that_do_not_fit_are_named():
    parts = parts_of()
    wider, taller = (
        nets.nvae((1, 8, 8), groups=(1, 1), channels=c, blocks=blocks)
        for c, blocks in ((3, 1), (4, 0))
    )
    path = nets.TopDown((8, 2, 2), [parts.path.groups[0], wider.path.groups[1]])
    with pytest.raises(ValueError, match=r"the group of z1 fails for h of shape \(4, 4, 4\)"):
        make(parts._replace(path=path))
    with pytest.raises(ValueError, match=r"p\(x \| z\) fails for h"):
        make(parts._replace(out=wider.out))
    with pytest.raises(ValueError, match=r"head of z2 does not fit e of shape .12, 2, 2. and h of"):
        make(parts._replace(encoder=wider.encoder))
    with pytest.raises(ValueError, match=r"head of z2 does not fit e of shape .8, 4, 4. and h of"):
        make(parts._replace(encoder=taller.encoder))
    with pytest.raises(ValueError, match="1 entries, but the model has 2 latents"):
        make(parts._replace(heads=parts.heads[:1]))
    with pytest.raises(ValueError, match="encoder gives 1 features, and the path has 2 groups"):
        make(parts._replace(encoder=nets.Tower(parts.encoder.stages[:1])))
    heads = [nets.Combine(8, 8), nets.Combine(4, 6)]
    with pytest.raises(ValueError, match="the head of z1"):
        make(parts._replace(heads=heads))
    with pytest.raises(TypeError, match="encoder gives a Tensor, and must give a list"):
        make(parts._replace(encoder=parts.encoder.stages[0]))
    with pytest.raises(ValueError, match="one for each latent"):
        nets.TopDown((2, 1, 1), [])
    with pytest.raises(TypeError, match=r"TopDown\(model\) must be"):
        guides.TopDown(
            models.VAE(conditionals.Bernoulli(nets.mlp(2, 3)), 2), parts.encoder, parts.heads
        )
    with pytest.raises(TypeError, match="normal gives a"):
        make(parts, normal=nn.Identity())
    with pytest.raises(ValueError, match="the group of z1 draws 0 latents"):
        models.TopDown(
            nets.TopDown((1, 2, 2), [Silent()]), conditionals.Bernoulli(nn.Identity(), event_dim=3)
        )


class Silent(nn.Module):
    def forward(self, h, draw):
        return h


def test_images_of_another_size_are_refused_before_a_step():
    model, guide, _ = build("top_down")
    with pytest.raises(ppvae.PairError, match=r"the likelihood generates .6, 1, 6, 5."):
        ppvae.SVI(model, guide).step(torch.ones(6, 1, 9, 9))


# ------------------------------------------------------------------------------ training


def adamax_svi(**options):
    model, guide, (x,) = build("top_down")
    both = nn.ModuleList([model, guide])
    adamax = functools.partial(torch.optim.Adamax, lr=5e-3, eps=1e-3)
    bound = elbo.ELBO(kl="analytic", beta=elbo.Balanced(elbo.LinearWarmup(8, 1e-4), model.balance))
    svi = ppvae.SVI(model, guide, adamax, bound, regularizer=nets.Spectral(both), **options)
    return svi, x


def test_adamax_with_a_regulariser_goes_on_to_the_bit(tmp_path):
    torch.manual_seed(0)
    svi, x = adamax_svi()
    ppvae.fit(svi, x, epochs=2, batch_size=3, progress=False)
    torch.manual_seed(0)
    half, _ = adamax_svi()
    ppvae.fit(half, x, epochs=1, batch_size=3, progress=False, checkpoint=tmp_path)
    torch.manual_seed(5)
    resumed, _ = adamax_svi()
    options = {"epochs": 2, "batch_size": 3, "progress": False, "checkpoint": tmp_path}
    ppvae.fit(resumed, x, resume=True, **options)
    state, other = svi.objective.state_dict(), resumed.objective.state_dict()
    assert state.keys() == other.keys() and any("regularizer.u0" in key for key in state)
    tensors = [name for name, value in state.items() if torch.is_tensor(value)]
    assert all(torch.equal(state[name], other[name]) for name in tensors)
    plain = ppvae.SVI(resumed.model, resumed.guide, resumed.optim, resumed.elbo)
    with pytest.raises(ppvae.CheckpointError, match="regularizer"):
        ppvae.fit(plain, x, resume=True, **options)


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one(traced):
    losses, buffers = [], []
    for compile in (False, True):
        torch.manual_seed(0)
        svi, x = adamax_svi(compile=compile)
        losses.append([svi.step(x) for _ in range(3)])
        buffers.append([b.clone() for b in svi.objective.buffers()])
    assert len(traced) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffers[0], buffers[1], rtol=1e-3, atol=1e-3)


def test_channels_last_is_the_same_pair():
    model, guide, (x,) = build("top_down")
    torch.manual_seed(0)
    before = ppvae.log_weights(model.eval(), guide.eval(), x, num_particles=2).log_w
    for program in (model, guide):
        program.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    after = ppvae.log_weights(model, guide, x, num_particles=2).log_w
    torch.testing.assert_close(before, after)
    history = ppvae.fit(ppvae.SVI(model, guide), x, valid=x, epochs=1, progress=False)
    assert history.rows[-1]["valid_bound"] < 0
    assert not pyro.get_param_store().keys()  # it would copy what is not contiguous
