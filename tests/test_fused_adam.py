"""The cheaper step of a fused Adam: torch's own to the bit, whatever is done between steps."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ppvae.train import fused_adam
from ppvae.train.optimizer import build_optimizer

OPTIMISERS = {
    "Adam": (Adam, {"lr": 0.1}),
    "AdamW": (AdamW, {"lr": 0.1}),
    "decay, eps, betas": (
        Adam,
        {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-4, "betas": (0.5, 0.9)},
    ),
    "maximise": (Adam, {"lr": 0.1, "maximize": True}),
    "amsgrad": (Adam, {"lr": 0.1, "amsgrad": True}),
    "a tensor as rate": (Adam, {"lr": torch.tensor(0.1)}),
}
LEAN = {Adam: fused_adam.Adam, AdamW: fused_adam.AdamW}


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (4,), ()]]


def both(name, groups=lambda params: params):
    """Equal parameters under torch's step and under the cheaper one."""
    made, options = OPTIMISERS[name]
    pairs = []
    for kind in (made, LEAN[made]):
        params = parameters()
        pairs.append((params, kind(groups(params), fused=True, **options)))
    return pairs


def step(pairs, missing=()):
    noise = [torch.randn(p.shape) for p in pairs[0][0]]
    for params, optimizer in pairs:
        for i, (p, grad) in enumerate(zip(params, noise, strict=True)):
            p.grad = None if i in missing else grad.clone()
        optimizer.step()


def assert_equal(pairs):
    (params, one), (others, other) = pairs
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    states = [optimizer.state_dict()["state"] for optimizer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


def count_torchs(monkeypatch):
    """Counts torch's own counting of steps, which the cheaper step is without."""
    counted, usual = [], torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda *args: (counted.append(1), usual(*args))[1])
    return counted


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_are_torchs(name, monkeypatch):
    pairs = both(name)
    for _ in range(5):
        step(pairs)
        assert_equal(pairs)
    counted = count_torchs(monkeypatch)
    step(pairs[1:])
    assert bool(counted) == (name in ("amsgrad", "a tensor as rate"))


def test_parameters_without_gradient_are_left_alone():
    pairs = both("Adam")
    for missing in [(1,), (), (0,), (0, 1, 2), (), ()]:
        step(pairs, missing)
        assert_equal(pairs)
    assert pairs[1][1].state[pairs[1][0][1]]["step"] == 4


def test_groups_have_their_own_numbers_and_may_change():
    def groups(params):
        return [{"params": params[:1], "lr": 0.5}, {"params": params[1:2], "weight_decay": 0.3}]

    pairs = both("Adam", groups)
    for i in range(8):
        step(pairs)
        assert_equal(pairs)
        for params, optimizer in pairs:
            optimizer.param_groups[1]["lr"] *= 0.5
            if i == 3:
                optimizer.add_param_group({"params": params[2:], "betas": (0.3, 0.5)})
            if i == 5:
                optimizer.param_groups[0]["amsgrad"] = False


def test_a_state_can_be_saved_loaded_and_put_back(tmp_path):
    pairs = both("AdamW")
    for _ in range(3):
        step(pairs)
    for _, optimizer in pairs:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        kept = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert kept["state"][0]["step"] == 3
    for _ in range(3):
        step(pairs)
        assert_equal(pairs)
    for _, optimizer in pairs:
        assert kept["state"][0]["step"] == 3  # not counted with the others
        optimizer.load_state_dict(copy.deepcopy(kept))
    step(pairs)
    assert_equal(pairs)
    assert pairs[1][1].state_dict()["state"][2]["step"] == 4


def test_a_copy_steps_alone():
    pairs = both("Adam")
    step(pairs)
    step(pairs)
    params, optimizer = copy.deepcopy(pairs[1])
    step(pairs)
    assert optimizer.state[params[0]]["step"] == 2
    step([(params, optimizer)])
    assert optimizer.state[params[0]]["step"] == 3
    assert pairs[1][1].state[pairs[1][0][0]]["step"] == 3


def test_hooks_and_schedules_see_every_step():
    pairs = both("Adam")
    seen = []
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _, optimizer in pairs
    ]  # it warns if it sees no step
    for _, optimizer in pairs:
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", *args)))
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", *args)))
    for _ in range(4):
        step(pairs)
        assert seen == [(when, optimizer) for _, optimizer in pairs for when in ("pre", "post")]
        seen.clear()
        for schedule in schedules:
            schedule.step()
        assert_equal(pairs)


def test_a_closure_is_torchs():
    (params, optimizer), *_ = both("Adam")[1:]

    def loss():
        optimizer.zero_grad()
        value = sum(p.square().sum() for p in params)
        value.backward()
        return value

    first = optimizer.step(loss)
    assert optimizer.step(loss) < first


def test_any_other_use_is_torchs():
    params = parameters()
    optimizer = fused_adam.Adam(params, lr=0.1, foreach=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not optimizer._kept


def test_dtypes_may_differ():
    pairs = both("Adam")
    for params, _ in pairs:
        params[1].data = params[1].data.double()
    for _ in range(4):
        noise = [torch.randn(p.shape).to(p.dtype) for p in pairs[0][0]]
        for params, optimizer in pairs:
            for p, grad in zip(params, noise, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    assert_equal(pairs)


def _restart(optimizer, params):
    optimizer.state.clear()


def _restart_one(optimizer, params):
    optimizer.state[params[0]] = {}


def _forget(optimizer, params):
    optimizer.state[params[0]].clear()


def _replace_moments(optimizer, params):
    state = optimizer.state[params[0]]
    if not state:
        return
    state["exp_avg"], state["step"] = torch.zeros_like(params[0]), torch.tensor(1.0)


def _swap_groups(optimizer, params):
    optimizer.param_groups.reverse()


def _train_others(optimizer, params):
    params[2].data = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    optimizer.param_groups[0]["params"] = params[2:3]
    optimizer.state.pop(params[0], None)


def _empty_group(optimizer, params):
    optimizer.add_param_group({"params": []})


def _look(optimizer, params):
    assert all(optimizer.state[p] is not None for p in params[:2])  # makes states, as a defaultdict


INTERVENTIONS = (
    _restart,
    _restart_one,
    _forget,
    _replace_moments,
    _swap_groups,
    _train_others,
    _empty_group,
    _look,
)


@pytest.mark.parametrize("intervene", INTERVENTIONS)
@pytest.mark.parametrize("when", ["between steps", "in a hook"])
@pytest.mark.parametrize("first", [0, 3])
def test_what_is_done_to_a_state_counts(intervene, when, first):
    pairs = both(
        "Adam", lambda params: [{"params": params[:1], "lr": 0.5}, {"params": params[1:2]}]
    )
    for params, _ in pairs:  # the third is trained by nobody, unless it takes another's place
        params[2].data = torch.ones(3, 4)
    for i in range(6):
        if i == first:
            for params, optimizer in pairs:
                if when == "between steps":
                    intervene(optimizer, params)
                else:
                    hook = optimizer.register_step_pre_hook(
                        lambda o, *_, params=params: intervene(o, params)
                    )
                    params.append(hook)
        grads = [torch.randn(p.shape) for p in pairs[0][0][:3]]
        for params, optimizer in pairs:
            for p, grad in zip(params[:3], grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
            if len(params) > 3:
                params.pop().remove()
    assert_equal(pairs)


def test_a_hook_may_freeze_a_parameter():
    pairs = both("Adam")
    for i in range(4):
        if i == 2:
            for params, optimizer in pairs:
                optimizer.register_step_pre_hook(lambda *_, p=params[0]: setattr(p, "grad", None))
        step(pairs)
        assert_equal(pairs)


def test_a_sparse_gradient_is_refused_as_by_torch():
    (params, optimizer), *_ = both("Adam")[1:]
    for _ in range(2):
        step([(params, optimizer)])
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_nothing_keeps_an_optimiser_alive():
    params, optimizer = both("Adam")[1]
    for _ in range(2):
        step([(params, optimizer)])
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


def test_a_pickle_steps_on_with_its_hooks():
    pairs = both("AdamW")
    for _ in range(3):
        step(pairs)
    pairs = [pickle.loads(pickle.dumps(pair)) for pair in pairs]
    seen = []
    for _, optimizer in pairs:
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for _ in range(3):
        step(pairs)
        assert_equal(pairs)
    assert len(seen) == 6


@pytest.mark.parametrize("made", [Adam, AdamW, functools.partial(AdamW, lr=0.1)])
def test_svi_makes_the_cheaper_one(made):
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(made, module)
    kind = made.func if isinstance(made, functools.partial) else made
    assert type(optimizer) is LEAN[kind]
    assert isinstance(optimizer, kind)
    assert optimizer.defaults["lr"] == (0.1 if kind is not made else 1e-3)
    assert (
        optimizer.defaults["weight_decay"]
        == kind([nn.Parameter(torch.ones(1))]).defaults["weight_decay"]
    )


def test_hooks_of_all_optimisers_and_profiles_see_the_steps():
    _, optimizer = pair = both("Adam")[1]
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    for _ in range(3):
        step([pair])
    for handle in handles:
        handle.remove()
    step([pair])
    assert seen == 3 * ["pre", "post"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [e.name for e in profile.events()].count("Optimizer.step#Adam.step") == 1
