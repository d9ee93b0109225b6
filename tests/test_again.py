"""Steps of fit that look nothing up are the steps that look everything up, to the bit."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, elbo, guides, models, nets
from ppvae.compile.fixed import Fixed
from ppvae.processes import Processes
from ppvae.train import sources
from ppvae.train.sources import Kept

pytestmark = pytest.mark.usefixtures("traced")

X = torch.bernoulli(torch.full((44, 6), 0.4), generator=torch.Generator().manual_seed(0))


def mlp(*sizes: int) -> nn.Module:
    return nets.mlp(*sizes)


def normed(*sizes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(sizes[0], 8), nn.BatchNorm1d(8), nn.Linear(8, sizes[-1]))


def make(
    net: Callable[..., nn.Module] = mlp,
    optim: Any = None,
    estimator: elbo.Estimator | None = None,
    **settings: Any,
) -> ppvae.SVI:
    torch.manual_seed(3)
    model = models.VAE(conditionals.Bernoulli(net(2, 8, 6)), latent_dim=2)
    guide = guides.Normal(net(6, 8, 4))
    optim = optim or functools.partial(torch.optim.Adam, lr=1e-2)
    settings = {"compile": True} | settings
    return ppvae.SVI(model, guide, optim, estimator or elbo.ELBO(), **settings)


def fitted(svi: ppvae.SVI, x: Tensor = X, **settings: Any) -> tuple[list[Tensor], list[dict]]:
    torch.manual_seed(7)
    settings = {"epochs": 3, "batch_size": 8} | settings
    history = ppvae.fit(svi, x, progress=False, **settings)
    assert svi.optimizer is not None
    states = [v for state in svi.optimizer.state.values() for v in state.values()]
    tensors = [*svi.objective.parameters(), *svi.objective.buffers(), *states]
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]
    return [t.clone() for t in tensors if isinstance(t, Tensor)], rows


def groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    first, rest = parameters[:2], parameters[2:]
    return torch.optim.AdamW([{"params": first, "lr": 1e-3}, {"params": rest}], lr=1e-2, fused=True)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.5},
    "particles": {"estimator": elbo.IWELBO(num_particles=4)},
    "batch norm": {"net": normed},
    "a schedule": {"estimator": elbo.ELBO(beta=elbo.LinearWarmup(10))},
    "two groups": {"optim": groups},
    "SGD": {"optim": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)},
    "amsgrad": {"optim": functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True)},
    "skipping": {"skip_nonfinite": True},
}


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the pair is looked at."""
    count = [0]
    key = Fixed.key

    def counted(self: Fixed) -> Any:
        count[0] += 1
        return key(self)

    monkeypatch.setattr(Fixed, "key", counted)
    return count


@pytest.mark.parametrize("name", CASES)
def test_bits(name: str, looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """44 rows in batches of 8: six steps an epoch, the last on 4 rows."""
    found = fitted(make(**CASES[name]))
    spared, looks[0] = looks[0], 0
    monkeypatch.setattr(Kept, "only_cuts", False)
    expected = fitted(make(**CASES[name]))
    assert found[1] == expected[1]
    assert len(found[0]) == len(expected[0])
    assert all(map(torch.equal, *(found[0], expected[0])))
    assert looks[0] - spared == 12  # of 18 steps: not the first and the last of an epoch


def unfused(svi: ppvae.SVI, history: ppvae.History) -> None:
    """From the second epoch on the update is another function's, which rounds otherwise."""
    svi.optimizer.param_groups[0].update(fused=False, foreach=False)


def freeze_a_part(svi: ppvae.SVI, history: ppvae.History) -> None:
    for parameter in svi.guide.parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize("change", [unfused, freeze_a_part])
def test_what_changes_after_an_epoch(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fitted(make(), on_epoch_end=change)
    monkeypatch.setattr(Kept, "only_cuts", False)
    expected = fitted(make(), on_epoch_end=change)
    assert all(map(torch.equal, *(found[0], expected[0])))
    assert not all(map(torch.equal, *(found[0], fitted(make())[0])))


@pytest.mark.filterwarnings("ignore:the optimiser does not hold")
def test_an_optimiser_of_a_part(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's norm is of all gradients, and what is clipped is that of the part."""
    half = {"optim": lambda ps: torch.optim.Adam(ps[:4], lr=1e-2, fused=True), "clip_norm": 0.5}
    found = fitted(make(**half))
    assert looks[0] == 18
    monkeypatch.setattr(Kept, "only_cuts", False)
    assert all(map(torch.equal, *(found[0], fitted(make(**half))[0])))


class Changes(ppvae.Callback):
    """After the third step of all, does something."""

    def __init__(self, change: Callable[[ppvae.SVI], Any]) -> None:
        self.change = change

    def on_step_end(self, svi: ppvae.SVI, loss: Tensor) -> None:
        if svi.num_steps == 3:
            self.change(svi)


def freeze(svi: ppvae.SVI) -> None:
    for parameter in svi.guide.parameters():
        parameter.requires_grad_(False)


def halve(svi: ppvae.SVI) -> None:
    svi.optimizer.param_groups[0]["lr"] /= 2


def clip(svi: ppvae.SVI) -> None:
    svi.clip_norm = 1e-3


def forget(svi: ppvae.SVI) -> None:
    svi.optimizer.state.clear()


@pytest.mark.parametrize("change", [freeze, halve, clip, forget])
def test_what_a_callback_changes_counts(change: Callable[[ppvae.SVI], Any]) -> None:
    """Against the same steps by hand."""
    svi = make()
    fitted(svi, epochs=1, callbacks=[Changes(change)])
    by_hand = make()
    torch.manual_seed(7)
    whole = sources.source("data", X, 8, None, Processes(), False)
    for (batch,), _ in whole.epoch(0, 1):
        by_hand.update(batch)
        if by_hand.num_steps == 3:
            change(by_hand)
    pairs = zip(svi.objective.parameters(), by_hand.objective.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    unchanged = make()
    fitted(unchanged, epochs=1)
    assert not all(map(torch.equal, svi.objective.parameters(), unchanged.objective.parameters()))


class Curious(ppvae.SVI):
    """Runs code of its own between two steps."""

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = self.undisturbed
        return super().update(*args, **kwargs)


def test_code_of_users_between_steps() -> None:
    """A class with an update of its own, an update put on the object, hooks of the optimiser."""
    svi = make()
    svi.__class__ = Curious
    fitted(svi, epochs=1)
    assert svi.seen is False
    svi, seen = make(), []
    usual = svi.update
    svi.update = lambda *args: (seen.append(svi.undisturbed), usual(*args))[1]  # type: ignore[method-assign]
    fitted(svi, epochs=1)
    assert seen == [False] * 6


@pytest.mark.parametrize("compile", [False, True])
def test_a_first_step_looks(compile: bool) -> None:
    """Whatever it is told."""
    svi, usual = make(compile=compile), make(compile=compile)
    svi.undisturbed = True
    torch.manual_seed(0)
    loss = svi.update(X[:8])
    torch.manual_seed(0)
    assert torch.equal(loss, usual.update(X[:8]))


def test_hooks_of_an_optimiser(looks: list[int]) -> None:
    svi = make()
    svi.prepare(X[:8])
    called = []
    svi.optimizer.register_step_post_hook(lambda *_: called.append(1))
    fitted(svi, epochs=1)
    assert (len(called), looks[0]) == (6, 6)


def test_data_that_run_code_of_users(looks: list[int]) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=8)
    ppvae.fit(make(), loader, epochs=1, progress=False)
    assert looks[0] == 6


@pytest.mark.parametrize("ends", ["whole", "interrupted"])
def test_after_fit_a_step_looks_again(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    svi = make()
    if ends == "interrupted":
        cut, calls = sources._rows, itertools.count(1)

        def rows(*args: Any) -> Any:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return cut(*args)

        monkeypatch.setattr(sources, "_rows", rows)
        with pytest.raises(KeyboardInterrupt):
            fitted(svi)
    else:
        fitted(svi)
    assert svi.undisturbed is False
    new = mlp(6, 8, 4)
    before = [p.detach().clone() for p in new.parameters()]
    svi.guide.conditional.net = new
    svi.update(X[:8])
    assert not any(map(torch.equal, before, new.parameters()))


@pytest.mark.parametrize("skips", [False, True])
def test_a_step_that_is_not_finite(skips: bool) -> None:
    """In the midst of an epoch: the site is named, and nothing is updated; or it is counted."""
    svi = make(skip_nonfinite=skips)
    for batch in X[:24].split(8):
        svi.update(batch)
        svi.undisturbed = True
    before = [p.detach().clone() for p in svi.objective.parameters()]
    with contextlib.nullcontext() if skips else pytest.raises(ppvae.NonFiniteError) as raised:
        svi.update(X[:8] * torch.nan)
    if not skips:
        assert "step 4: the loss is nan; site 'z' of the guide" in str(raised.value)
    assert svi.num_skipped == skips
    assert all(map(torch.equal, before, svi.objective.parameters()))
    svi.update(X[:8])
    assert not any(map(torch.equal, before, svi.objective.parameters()))
