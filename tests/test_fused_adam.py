"""The cheaper step of a fused Adam: torch's own to the bit, whatever is done between steps."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from ppvae.fused_adam import keep_lists

OPTIMISERS = {
    "Adam": functools.partial(Adam, lr=0.1),
    "AdamW": functools.partial(AdamW, lr=0.1),
    "decay, eps, betas": functools.partial(
        Adam, lr=0.1, weight_decay=0.1, eps=1e-4, betas=(0.5, 0.9)
    ),
    "maximise": functools.partial(Adam, lr=0.1, maximize=True),
    "amsgrad": functools.partial(Adam, lr=0.1, amsgrad=True),
    "a tensor as rate": functools.partial(Adam, lr=torch.tensor(0.1)),
}


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (4,), ()]]


def both(make, groups=lambda params: params):
    """Equal parameters under torch's step and under the cheaper one."""
    pairs = []
    for lean in (False, True):
        params = parameters()
        optimizer = make(groups(params), fused=True)
        if lean:
            keep_lists(optimizer)
        pairs.append((params, optimizer))
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
    pairs = both(OPTIMISERS[name])
    for _ in range(5):
        step(pairs)
        assert_equal(pairs)
    counted = count_torchs(monkeypatch)
    step(pairs[1:])
    assert bool(counted) == (name in ("amsgrad", "a tensor as rate"))


def test_parameters_without_gradient_are_left_alone():
    pairs = both(OPTIMISERS["Adam"])
    for missing in [(1,), (), (0,), (0, 1, 2), (), ()]:
        step(pairs, missing)
        assert_equal(pairs)
    assert pairs[1][1].state[pairs[1][0][1]]["step"] == 4


def test_groups_have_their_own_numbers_and_may_change():
    def groups(params):
        return [{"params": params[:1], "lr": 0.5}, {"params": params[1:2], "weight_decay": 0.3}]

    pairs = both(OPTIMISERS["Adam"], groups)
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
    pairs = both(OPTIMISERS["AdamW"])
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
    pairs = both(OPTIMISERS["Adam"])
    step(pairs)
    step(pairs)
    params, optimizer = copy.deepcopy(pairs[1])
    step(pairs)
    assert optimizer.state[params[0]]["step"] == 2
    step([(params, optimizer)])
    assert optimizer.state[params[0]]["step"] == 3
    assert pairs[1][1].state[pairs[1][0][0]]["step"] == 3


def test_hooks_and_schedules_see_every_step():
    pairs = both(OPTIMISERS["Adam"])
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
    (params, optimizer), *_ = both(OPTIMISERS["Adam"])[1:]

    def loss():
        optimizer.zero_grad()
        value = sum(p.square().sum() for p in params)
        value.backward()
        return value

    first = optimizer.step(loss)
    assert optimizer.step(loss) < first


@pytest.mark.parametrize(
    "make",
    [functools.partial(torch.optim.SGD, lr=0.1), functools.partial(Adam, lr=0.1, foreach=True)],
)
def test_others_are_left_as_they_are(make):
    params = parameters()
    optimizer = make(params)
    keep_lists(optimizer)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert "step" not in vars(optimizer) or type(optimizer) is Adam


def test_dtypes_may_differ():
    pairs = both(OPTIMISERS["Adam"])
    for params, _ in pairs:
        params[1].data = params[1].data.double()
    for _ in range(4):
        noise = [torch.randn(p.shape).to(p.dtype) for p in pairs[0][0]]
        for params, optimizer in pairs:
            for p, grad in zip(params, noise, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    assert_equal(pairs)
