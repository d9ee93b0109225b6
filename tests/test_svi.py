"""`ppvae.SVI`: the optimisers it takes, and that one step is what it says."""

import copy
import functools
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

import ppvae
from ppvae import conditionals, elbo, guides, models, nets
from registry import build

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
X = torch.bernoulli(torch.full((20, 4), 0.5), generator=torch.Generator().manual_seed(1))


def vae(seed=0, **options):
    torch.manual_seed(seed)
    net = nets.mlp(2, 8, 4, **options)
    model = models.VAE(conditionals.Bernoulli(net), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 2 * 2, **options))


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}


class Pca(pyro.nn.PyroModule):
    """A PyroModule with an nn parameter and a constrained one."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.scale = pyro.nn.PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


# -- the step is the loop one would write ------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [5])
@pytest.mark.parametrize(
    "loss", [elbo.ELBO(), elbo.IWELBO(num_particles=3), elbo.ELBO(beta=elbo.LinearWarmup(10))]
)
def test_steps_equal_the_handwritten_loop_bit_for_bit(loss, seed, dtype):
    torch.set_default_dtype(dtype)
    try:
        model, guide = vae(seed)
        by_hand = copy.deepcopy((model, guide))
        x = X.to(dtype)
        svi = ppvae.SVI(model, guide, ADAM, loss)
        torch.manual_seed(seed)
        losses = [svi.step(x) for _ in range(4)]

        objective = loss(*by_hand)
        opt = torch.optim.Adam(objective.parameters(), lr=1e-2, fused=True)
        torch.manual_seed(seed)
        expected = []
        for _ in range(4):
            opt.zero_grad()
            value = objective(x)
            value.backward()
            opt.step()
            expected.append(value.item())
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses == expected
    for a, b in zip(svi.objective.parameters(), objective.parameters(), strict=True):
        assert torch.equal(a, b)


def test_step_is_pyros_interface():
    svi = ppvae.SVI(*vae(), ADAM)
    assert isinstance(svi, pyro.infer.SVI)
    loss = svi.step(X)
    assert type(loss) is float
    assert 20 < loss < 200  # summed over the 20 rows, as in Pyro
    assert type(svi.evaluate_loss(X)) is float
    update = svi.update(X)
    assert update.shape == ()
    assert not update.requires_grad
    assert svi.num_steps == 2
    assert len(pyro.get_param_store()) == 0


def test_evaluate_loss_changes_nothing():
    svi = ppvae.SVI(*vae(), ADAM, elbo.ELBO(beta=elbo.LinearWarmup(10)))
    svi.step(X)
    before, step = tensors(svi.objective), svi.objective.step
    svi.evaluate_loss(X)
    assert svi.objective.step == step == svi.num_steps
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())


def test_keywords_reach_both_programs():
    svi = ppvae.SVI(*vae(), ADAM)
    torch.manual_seed(1)
    a = svi.step(x=X)
    svi = ppvae.SVI(*vae(), ADAM)
    torch.manual_seed(1)
    assert svi.step(X) == a


def test_a_batch_of_one_and_changing_batches():
    svi = ppvae.SVI(*vae(), ADAM, elbo.IWELBO(num_particles=4))
    for rows in (1, 20, 3):
        assert 0 < svi.step(X[:rows]) < 10 * rows


# -- optimisers --------------------------------------------------------------------------------


def clipped_adam(parameters):
    return pyro.optim.clipped_adam.ClippedAdam(parameters, lr=1e-2)


@pytest.mark.parametrize(
    ("optim", "kind", "fused"),
    [
        (torch.optim.Adam, torch.optim.Adam, True),
        (torch.optim.SGD, torch.optim.SGD, True),
        (torch.optim.RMSprop, torch.optim.RMSprop, None),
        (ADAM, torch.optim.Adam, True),
        (functools.partial(torch.optim.AdamW, fused=False), torch.optim.AdamW, False),
        (functools.partial(torch.optim.Adam, foreach=True), torch.optim.Adam, None),
        (lambda p: torch.optim.Adam(p, lr=1e-2), torch.optim.Adam, None),
        (pyro.optim.Adam({"lr": 1e-2}), torch.optim.Adam, True),
        (pyro.optim.ClippedAdam({"lr": 1e-2}), pyro.optim.clipped_adam.ClippedAdam, None),
        (clipped_adam, pyro.optim.clipped_adam.ClippedAdam, None),
    ],
)
def test_optimisers(optim, kind, fused):
    svi = ppvae.SVI(*vae(), optim)
    before = tensors(svi.objective)
    svi.step(X)
    assert isinstance(svi.optimizer, kind)
    assert type(svi.optimizer).__name__ == kind.__name__
    assert svi.optimizer.defaults.get("fused") is fused
    moved = [name for name, v in tensors(svi.objective).items() if not torch.equal(v, before[name])]
    assert len(moved) == len(before) == 8  # two networks, two layers, weight and bias


def test_an_optimiser_instance_is_used_as_it_is():
    model, guide = vae()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=1e-2)
    svi = ppvae.SVI(model, guide, optimizer)
    svi.step(X)
    assert svi.optimizer is optimizer
    assert len(optimizer.state) == 8


def test_arguments_of_a_pyro_optim_arrive():
    svi = ppvae.SVI(*vae(), pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.9}))
    svi.step(X)
    assert svi.optimizer.defaults["lr"] == 0.03
    assert svi.optimizer.param_groups[0]["lr"] == pytest.approx(0.027)


def test_optimisers_that_cannot_work():
    model, guide = vae()
    scheduler = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    )
    with pytest.raises(TypeError, match="lr_scheduler"):
        ppvae.SVI(model, guide, scheduler).step(X)
    with pytest.raises(TypeError, match="clip_norm"):
        ppvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})).step(X)
    with pytest.raises(TypeError, match="clip_norm"):
        ppvae.SVI(model, guide, pyro.optim.Adam(lambda name: {"lr": 0.1})).step(X)
    with pytest.raises(TypeError, match="'adam'"):
        ppvae.SVI(model, guide, "adam").step(X)
    with pytest.raises(ValueError, match="none of the pair's parameters"):
        ppvae.SVI(model, guide, torch.optim.Adam(nn.Linear(1, 1).parameters())).step(X)


def test_no_parameters():
    model, guide = vae()
    for program in (model, guide):
        program.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        ppvae.SVI(model, guide).step(X)


def test_frozen_parameters_are_left_out():
    model, guide = vae()
    model.requires_grad_(False)
    svi = ppvae.SVI(model, guide, ADAM)
    before = tensors(model)
    svi.step(X)
    assert all(torch.equal(before[k], v) for k, v in tensors(model).items())
    assert all(not svi.optimizer.state.get(p) for p in model.parameters())


def freeze_and_thaw(i, model, guide):
    """Before step i of eight: the guide is frozen, then not, then the model is."""
    guide.requires_grad_(i >= 2)
    model.requires_grad_(not 4 <= i < 6)


@pytest.mark.parametrize(
    "optim",
    [
        torch.optim.Adam,
        functools.partial(torch.optim.AdamW, weight_decay=0.5),  # would move what it should not
        functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        functools.partial(torch.optim.Adagrad, lr=1e-2),  # has a state before its first step
    ],
)
def test_freezing_and_thawing_is_that_of_torch(optim):
    """The oracle is a loop written by hand, over an optimiser of all parameters."""
    model, guide = vae()
    by_hand = copy.deepcopy((model, guide))
    svi = ppvae.SVI(model, guide, optim, clip_norm=5.0)
    torch.manual_seed(3)
    moved = []
    for i in range(8):
        freeze_and_thaw(i, model, guide)
        before = [next(program.parameters()).clone() for program in (model, guide)]
        svi.step(X)
        after = [next(program.parameters()) for program in (model, guide)]
        moved.append(tuple(not torch.equal(*pair) for pair in zip(before, after, strict=True)))
    assert moved == 2 * [(True, False)] + 2 * [(True, True)] + 2 * [(False, True)] + 2 * [
        (True, True)
    ]

    parameters = [p for program in by_hand for p in program.parameters()]
    optimizer, loss = optim(parameters), elbo.ELBO()(*by_hand)
    torch.manual_seed(3)
    for i in range(8):
        freeze_and_thaw(i, *by_hand)
        optimizer.zero_grad()
        loss(X).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
    for one, other in zip((model, guide), by_hand, strict=True):
        for (name, value), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("optim", [torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("loss", [elbo.ELBO(), pyro.infer.Trace_ELBO()])
def test_what_is_replaced_or_added_is_trained_from_the_next_step_on(loss, optim):
    model, guide = vae()
    svi = ppvae.SVI(model, guide, optim, loss)
    for _ in range(3):
        svi.step(X)
    model.likelihood.net = nn.Linear(2, 4)
    first = guide.conditional.net.layers[0]
    first.weight = nn.Parameter(torch.randn(8, 4))
    new = [*model.likelihood.net.parameters(), first.weight]
    before = [p.detach().clone() for p in new]
    svi.step(X)
    assert not any(map(torch.equal, before, new))
    state = svi.optimizer.state
    assert all(state[p]["step"] == 1 for p in new)
    kept = [p for p in guide.parameters() if p is not first.weight]
    assert all(state[p]["step"] == 4 for p in kept)
    assert set(map(id, state)) == set(map(id, svi.objective.parameters()))
    other = ppvae.SVI(copy.deepcopy(model), copy.deepcopy(guide), optim, loss)
    other.load_state_dict(svi.state_dict())  # it has the groups of a new one


def test_a_copy_follows_its_own_pair():
    svi = ppvae.SVI(*vae(), ADAM)
    svi.step(X)
    other = copy.deepcopy(svi)
    for each in (svi, other):
        each.model.likelihood.net = nn.Linear(2, 4)
        before = each.model.likelihood.net.weight.detach().clone()
        each.step(X)
        assert not torch.equal(each.model.likelihood.net.weight, before)


def test_a_network_that_a_function_takes_from_outside_may_be_replaced():
    torch.manual_seed(0)
    net = nn.Linear(2, 4)

    def model(x):
        decoder = pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    svi = ppvae.SVI(model, vae()[1], ADAM)
    svi.step(X)
    net = nn.Linear(2, 4)
    before = net.weight.detach().clone()
    svi.step(X)
    assert not torch.equal(net.weight, before)


def test_a_parameter_from_outside_is_refused_at_a_later_step_too():
    model, guide = vae()
    other = nn.Linear(2, 4)
    svi = ppvae.SVI(model, guide, ADAM)
    svi.step(X)
    model.likelihood.net = nn.Identity()
    model.likelihood.net.forward = lambda z: other(z)
    with pytest.raises(ValueError, match="neither model nor guide owns"):
        svi.step(X)


def test_parameters_that_an_optimiser_does_not_hold_are_named_once():
    model, guide = vae()
    guide.requires_grad_(False)
    svi = ppvae.SVI(model, guide, torch.optim.Adam(model.parameters()))
    svi.step(X)  # frozen ones are left out on purpose
    guide.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"does not hold guide\.cond.* and 1 more"):
        svi.step(X)
    svi.step(X)  # and a second warning would be an error


def test_shared_parameters_are_counted_once():
    torch.manual_seed(0)
    shared = nets.mlp(3, 8, 5)
    likelihood = conditionals.Bernoulli(nets.mlp(2 + 5, 8, 4))
    model = models.CVAE(likelihood, latent_dim=2, condition=shared)
    guide = guides.Normal(nets.mlp(4 + 5, 8, 4), condition=shared)
    svi = ppvae.SVI(model, guide, ADAM)
    svi.step(X, torch.randn(20, 3))
    optimised = [p for group in svi.optimizer.param_groups for p in group["params"]]
    assert len(optimised) == len({id(p) for p in optimised}) == 12  # three networks


@pytest.mark.parametrize("loss", [elbo.ELBO(), pyro.infer.Trace_ELBO()])
def test_two_methods_of_one_module(loss):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = nets.mlp(2, 8, 4), nets.mlp(4, 8, 2)

        def model(self, x):
            pyro.module("anything", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    both = Both()
    svi = ppvae.SVI(both.model, both.guide, ADAM, loss)
    before = tensors(both)
    svi.step(X)
    assert all(not torch.equal(before[k], v) for k, v in tensors(both).items())
    assert len(pyro.get_param_store()) == 0


# -- lazy parameters ---------------------------------------------------------------------------


def test_lazily_made_parameters_are_optimised():
    torch.manual_seed(0)
    model = Pca()
    guide = AutoNormal(model)
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=0.05))
    assert not list(guide.parameters())  # made at the first run
    x = torch.randn(20, 4)
    svi.prepare(x)
    before = tensors(svi.objective)
    assert len(before) == 5  # decoder weight and bias, scale, the guide's locs and scales
    losses = [svi.step(x) for _ in range(60)]
    after = tensors(svi.objective)
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert len(pyro.get_param_store()) == 0


# -- clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clip_norm_is_the_global_norm(clip_norm):
    model, guide = vae()
    by_hand = elbo.ELBO()(*copy.deepcopy((model, guide)))
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.SGD, lr=1e-3), clip_norm=clip_norm)
    torch.manual_seed(3)
    svi.step(X)

    torch.manual_seed(3)
    by_hand(X).backward()
    parameters = list(by_hand.parameters())
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert norm > 10
    factor = min(1.0, clip_norm / norm.item())
    for p, q in zip(svi.objective.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q - 1e-3 * factor * q.grad, rtol=1e-5, atol=1e-8)


def test_clip_norm_ignores_what_the_optimiser_does_not_hold():
    moves = []
    for steps in (1, 20):  # gradients of the model, never set to zero, must not add up
        model, guide = vae()
        svi = ppvae.SVI(model, guide, torch.optim.SGD(guide.parameters(), 1e-3), clip_norm=0.1)
        with pytest.warns(UserWarning, match="does not hold model"):
            svi.prepare(X)
        for _ in range(steps):
            before = tensors(guide)
            svi.step(X)
        change = torch.cat([(before[k] - v).flatten() for k, v in tensors(guide).items()])
        moves.append(change.norm().item())
    assert moves == pytest.approx([1e-4, 1e-4], rel=1e-3)


def test_a_word_is_no_optimiser():
    with pytest.raises(TypeError, match=r"optim takes a torch\.optim class.* got 'adam'"):
        ppvae.SVI(*vae(), "adam")


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_clip_norm_must_be_positive(clip_norm):
    with pytest.raises(ValueError, match="clip_norm must be positive"):
        ppvae.SVI(*vae(), clip_norm=clip_norm)


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO(), pyro.infer.TraceEnum_ELBO()],
    ids=lambda loss: type(loss).__name__,
)
def test_stock_losses_train(loss):
    svi = ppvae.SVI(*vae(), ADAM, loss)
    losses = [svi.step(X) for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert svi.num_steps == 30
    assert len(pyro.get_param_store()) == 0


def test_enumeration():
    class Mixture(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(self.loc[k.long()], 1.0), obs=x)

    class Posterior(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample(
                    "k", dist.Bernoulli(logits=self.slope * x), infer={"enumerate": "parallel"}
                )

    model, guide, x = Mixture(), Posterior(), torch.tensor([-1.0, 0.5, 2.0])
    fast = functools.partial(torch.optim.Adam, lr=0.1)
    svi = ppvae.SVI(model, guide, fast, pyro.infer.TraceEnum_ELBO(max_plate_nesting=1))
    q = 0.5  # at slope 0
    expected = sum(
        q * (torch.log(torch.tensor(0.5 / q)) + dist.Normal(loc, 1.0).log_prob(x))
        for loc in (-1.0, 1.0)
    ).sum()
    assert svi.step(x) == pytest.approx(-expected.item(), rel=1e-5)
    for _ in range(60):
        svi.step(x)
    assert guide.slope.item() > 0.5  # the exact posterior has slope loc[1] - loc[0]


@pytest.mark.parametrize("loss", [pyro.infer.RenyiELBO(), elbo.ELBO, "elbo", lambda *args: 0.0])
def test_losses_that_cannot_work(loss):
    with pytest.raises(TypeError, match=r"loss must be an estimator.*use elbo\.RenyiELBO"):
        ppvae.SVI(*vae(), loss=loss)


# -- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [elbo.ELBO(beta=elbo.LinearWarmup(20)), pyro.infer.Trace_ELBO()])
def test_state_continues_bit_for_bit(loss):
    batch_norm = {"batch_norm": True, "dropout": 0.2}
    svi = ppvae.SVI(*vae(**batch_norm), ADAM, loss)
    for _ in range(7):
        svi.step(X)
    file = io.BytesIO()
    torch.save(svi.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    torch.manual_seed(9)
    expected = [svi.step(X) for _ in range(5)]
    other = ppvae.SVI(*vae(seed=1, **batch_norm), ADAM, loss)
    other.load_state_dict(state)
    assert other.num_steps == 7
    torch.manual_seed(9)
    assert [other.step(X) for _ in range(5)] == expected
    assert other.num_steps == svi.num_steps == 12
    mine, others = tensors(svi.objective), tensors(other.objective)
    assert len(mine) > 8  # batch-norm statistics too
    assert all(torch.equal(mine[k], others[k]) for k in mine)


def test_state_before_the_first_step():
    state = ppvae.SVI(*vae(), ADAM).state_dict()
    assert state["optimizer"] is None
    svi = ppvae.SVI(*vae(seed=1), ADAM)
    svi.load_state_dict(state)
    assert svi.num_steps == 0
    assert 0 < svi.step(X) < 200


# -- before any update -------------------------------------------------------------------------


def test_a_bad_batch_is_refused_before_any_update():
    svi = ppvae.SVI(*vae(), ADAM)
    before = tensors(svi.objective)
    with pytest.raises(ppvae.PairError, match="NaN"):
        svi.step(X * float("nan"))
    assert svi.optimizer is None
    assert svi.num_steps == 0
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())
    svi.step(X)
    assert svi.num_steps == 1


@pytest.mark.cuda
def test_fused_on_cuda():
    model, guide = (program.cuda() for program in vae())
    svi = ppvae.SVI(model, guide, ADAM, elbo.IWELBO(num_particles=4), clip_norm=100.0)
    losses = [svi.step(X.cuda()) for _ in range(100)]
    assert svi.optimizer.defaults["fused"]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_default_arguments_on_cuda(kind):
    model, guide = (program.cuda() for program in vae())
    ppvae.SVI(model, guide, kind).step(X.cuda())


def test_an_optimiser_that_evaluates_the_loss_itself_is_refused() -> None:
    model, guide, args = build("vae_bernoulli")
    with pytest.raises(TypeError, match=r"LBFGS evaluates the loss several times.*Adam"):
        ppvae.SVI(model, guide, torch.optim.LBFGS).step(*args)


def test_a_step_inside_no_grad_is_a_step() -> None:
    model, guide, args = build("vae_bernoulli")
    svi = ppvae.SVI(model, guide)
    with torch.no_grad():
        first = svi.step(*args)
    assert svi.num_steps == 1 and first > 0


@pytest.mark.parametrize("vectorised", [True, False])
def test_an_elbo_of_pyros_is_evaluated_with_its_own_particles(vectorised):
    loss = pyro.infer.Trace_ELBO(num_particles=7, vectorize_particles=vectorised)
    svi = ppvae.SVI(*vae(), loss=loss)
    assert svi.evaluator.num_particles == 7
    assert svi.particles_at_once == (7 if vectorised else 1)


def test_steps_that_were_skipped_before_a_load_are_no_news():
    skipping = ppvae.SVI(*vae(), skip_nonfinite=True)
    skipping.step(torch.ones(4, 4))
    state = {**skipping.state_dict(), "num_skipped": 3}
    svi = ppvae.SVI(*vae())
    svi.load_state_dict(state)
    svi.check_finite()
    assert svi.num_skipped == 3


def test_asking_for_the_size_moves_no_statistics():
    svi = ppvae.SVI(*vae(batch_norm=True))
    svi.step(X)
    before, random = tensors(svi.objective), torch.get_rng_state()
    assert svi.full_size(X) == len(X)
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())
    assert torch.equal(random, torch.get_rng_state())
