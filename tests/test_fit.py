"""`ppvae.fit`: one loop, a function of its seeds; and `History`, what it saw."""

import csv
import functools
import math
import sys
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning_fabric import loggers
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets
from ppvae.check.nonfinite import NonFiniteError
from ppvae.processes import Processes
from ppvae.program import data_plate
from ppvae.train.fit import mean_bound
from ppvae.train.run import Progress
from ppvae.train.sources import source

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
X = torch.bernoulli(torch.full((50, 4), 0.5), generator=torch.Generator().manual_seed(1))
Y = torch.arange(50) % 3
GREY = torch.rand(50, 4, generator=torch.Generator().manual_seed(2))


def vae(seed=0, dim=4, loss=None, optim=ADAM, **options):
    torch.manual_seed(seed)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, dim, **options)), latent_dim=2)
    guide = guides.Normal(nets.mlp(dim, 8, 2 * 2, **options))
    return ppvae.SVI(model, guide, optim, loss)


def cvae(classes=3):
    torch.manual_seed(0)
    likelihood = conditionals.Bernoulli(nets.mlp(2 + classes, 8, 4))
    model = models.CVAE(likelihood, latent_dim=2, condition=nets.OneHot(classes))
    guide = guides.Normal(nets.mlp(4 + classes, 8, 4), condition=nets.OneHot(classes))
    return ppvae.SVI(model, guide, ADAM)


def fit(svi, train, **options):
    options = {"epochs": 2, "batch_size": 16, "progress": False, **options}
    return ppvae.fit(svi, train, **options)


def numbers(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}


class Spy(ppvae.SVI):
    """An SVI that keeps the batches it is given, by epoch."""

    def __init__(self, svi):
        super().__init__(svi.model, svi.guide, svi.optim, svi.elbo)
        self.batches = []

    def update(self, *args, **kwargs):
        self.batches.append(args)
        return super().update(*args, **kwargs)


# -- a function of the seeds -------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_seed_same_history_bit_for_bit(seed, dtype):
    runs = []
    for _ in range(2):
        svi = vae()
        svi.objective.to(dtype)
        runs.append(numbers(fit(svi, X.to(dtype), valid=X[:10].to(dtype), seed=seed)))
    assert runs[0] == runs[1]
    assert [row["step"] for row in runs[0]] == [4, 8]  # 50 rows in batches of 16


def test_another_seed_another_history():
    assert numbers(fit(vae(), X, seed=0)) != numbers(fit(vae(), X, seed=1))


def test_shuffling_by_seed_and_epoch():
    rows = torch.arange(50.0)[:, None].repeat(1, 4)

    def order(seed):
        torch.manual_seed(0)
        model = models.VAE(conditionals.Normal(nets.mlp(2, 8, 4), scale=100.0), latent_dim=2)
        spy = Spy(ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4)), ADAM))
        torch.manual_seed(seed + 10)  # the order must not follow the global stream
        fit(spy, rows, seed=seed)
        assert [len(x) for (x,) in spy.batches] == [16, 16, 16, 2] * 2
        seen = torch.cat([x[:, 0] for (x,) in spy.batches]).long()
        return seen[:50].tolist(), seen[50:].tolist()

    first, second = order(0)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))
    assert order(0) == (first, second)
    assert order(1)[0] != first
    assert order(1)[0] != second  # the seeds' epochs do not overlap


def test_rows_of_x_and_y_stay_together():
    spy = Spy(cvae())
    y = (X[:, 0] + X[:, 1]).long()
    fit(spy, (X, y))
    for a, b in spy.batches:
        assert torch.equal((a[:, 0] + a[:, 1]).long(), b)


def test_binarisation_is_redrawn_each_epoch():
    split = data.Split(torch.full((40, 4), 0.5), binarize="dynamic", seed=2)
    spy = Spy(vae())
    fit(spy, split, batch_size=100, epochs=3)
    seen = [x for (x,) in spy.batches]
    assert len(seen) == 3
    for epoch, x in enumerate(seen, start=1):
        assert sorted(x.tolist()) == sorted(split.draw(epoch).tolist())
    assert sorted(seen[0].tolist()) != sorted(seen[1].tolist())
    static = data.Split(torch.full((40, 4), 0.5), binarize="static", seed=2)
    spy = Spy(vae())
    fit(spy, static, batch_size=100)
    assert sorted(spy.batches[0][0].tolist()) == sorted(spy.batches[1][0].tolist())


@pytest.mark.parametrize("as_loader", [False, True])
def test_validation_and_checks_leave_the_random_stream(as_loader):
    def train(valid):
        loader = DataLoader(TensorDataset(X), batch_size=16, shuffle=True)
        svi = vae(dropout=0.3)
        history = fit(svi, loader if as_loader else X, valid=valid)
        return history.column("train_objective"), torch.rand(1).item()

    valid = DataLoader(X, batch_size=7, shuffle=True) if as_loader else X[:20]
    assert train(None) == train(valid)


def test_seeded_validation_repeats_its_draws():
    svi = vae(optim=functools.partial(torch.optim.SGD, lr=0.0))
    assert len(set(fit(svi, X, valid=X[:20], epochs=3).column("valid_bound"))) == 1
    other = fit(svi, X, valid=X[:20], epochs=1, seed=1).column("valid_bound")
    assert other[0] != fit(svi, X, valid=X[:20], epochs=1).column("valid_bound")[0]


# -- inputs ------------------------------------------------------------------------------------


def test_every_kind_of_data_trains_the_same():
    split = data.Split(X)
    expected = numbers(fit(vae(), X))
    for same in ((X,), [X], split):
        assert numbers(fit(vae(), same)) == expected
    assert len(expected) == 2
    loader = DataLoader(TensorDataset(X), batch_size=10)
    assert fit(vae(), loader).rows[-1]["step"] == 10
    assert fit(vae(), DataLoader(X, batch_size=10)).rows[-1]["step"] == 10


def test_a_dataset_brings_its_validation_part():
    digits = data.load("digits")
    svi = vae(dim=64)
    history = fit(svi, digits, batch_size=500, epochs=1)
    row = history.rows[0]
    assert row["step"] == 3
    assert row["valid_bound"] == mean_bound(svi, iter([digits.valid.args]), 0)
    given = fit(vae(dim=64), digits, batch_size=500, epochs=1, valid=digits.test)
    assert given.rows[0]["train_objective"] == row["train_objective"]
    assert given.rows[0]["valid_bound"] != row["valid_bound"]
    of_dataset = fit(vae(dim=64), digits.train, batch_size=500, epochs=1, valid=digits)
    assert numbers(of_dataset) == numbers(history)


def test_supervised_data():
    gaussian = data.load("gaussian_mixture").supervised()
    torch.manual_seed(0)
    likelihood = conditionals.Normal(nets.mlp(2 + 5, 16, 2), scale=0.5)
    model = models.CVAE(likelihood, latent_dim=2, condition=nets.OneHot(5))
    guide = guides.Normal(nets.mlp(2 + 5, 16, 4), condition=nets.OneHot(5))
    history = fit(ppvae.SVI(model, guide, ADAM), gaussian, epochs=3, batch_size=200)
    assert history.rows[-1]["valid_bound"] > history.rows[0]["valid_bound"] + 0.3
    halves = data.quadrants(data.load("digits"), missing=2)
    likelihood = conditionals.Bernoulli(nets.mlp(2 + 32, 8, 32))
    model = models.CVAE(likelihood, latent_dim=2)
    svi = ppvae.SVI(model, guides.Normal(nets.mlp(64, 8, 4)), ADAM)
    assert math.isfinite(fit(svi, halves, batch_size=500, epochs=1).rows[0]["valid_bound"])


def test_one_datapoint():
    history = fit(vae(), X[:1], valid=X[:1], batch_size=1)
    assert [row["step"] for row in history.rows] == [1, 2]


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [elbo.ELBO(beta=0.25), elbo.IWELBO(num_particles=5), pyro.infer.Trace_ELBO()]
)
def test_validation_bound_is_the_estimators(loss):
    svi = vae(loss=loss)
    history = fit(svi, X, valid=X[:20], epochs=1, seed=4, batch_size=20)
    torch.manual_seed(4)
    estimator = elbo.ELBO() if isinstance(loss, pyro.infer.Trace_ELBO) else loss
    expected = estimator.evaluate(svi.model, svi.guide, X[:20]).mean().item()
    assert history.rows[0]["valid_bound"] == pytest.approx(expected, rel=1e-6)


def scaled(svi, factor):
    """The pair with a weight on all its terms, and the terms of its latent."""
    model, guide = (pyro.poutine.scale(program, scale=factor) for program in (svi.model, svi.guide))
    return ppvae.SVI(model, guide, svi.optim, svi.elbo)


STOCK = [
    pyro.infer.Trace_ELBO(num_particles=4),
    pyro.infer.Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    pyro.infer.TraceMeanField_ELBO(),
    pyro.infer.TraceEnum_ELBO(max_plate_nesting=1),
]


@pytest.mark.parametrize("loss", [elbo.ELBO(), *STOCK])
def test_no_scale_is_in_the_validation_bound(loss):
    """The parameters stand still, so the bound is that of the pair without the scale."""
    still = functools.partial(torch.optim.SGD, lr=0.0)
    rows = []
    for factor in (1.0, 100.0):
        svi = scaled(vae(loss=loss, optim=still), factor)
        rows.append(fit(svi, X, valid=X[:20], epochs=1, batch_size=50).rows[0])
    assert rows[1]["valid_bound"] == pytest.approx(rows[0]["valid_bound"], rel=1e-6)


class Sized(ppvae.Program):
    """A pair's program, in a data plate that may have a size, or take rows by itself."""

    def __init__(self, net, size=None, subsample_size=None, inner=None):
        super().__init__()
        self.net, self.size, self.subsample_size, self.inner = net, size, subsample_size, inner

    def plate(self, x):
        if self.subsample_size is not None:
            return pyro.plate("data", len(x), subsample_size=self.subsample_size, dim=-2)
        return pyro.plate("data", self.size or len(x), subsample=x, dim=-2)


class SizedModel(Sized):
    def forward(self, x):
        with self.plate(x) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            x = x if self.subsample_size is None else x[rows]
            with pyro.plate("pixels", 4, subsample_size=self.inner, dim=-1) as i:
                logits = self.net(z.squeeze(-2))[..., i]
                pyro.sample("x", dist.Bernoulli(logits=logits), obs=x[..., i])


class SizedGuide(Sized):
    def forward(self, x):
        with self.plate(x) as rows:
            x = x if self.subsample_size is None else x[rows]
            loc, raw = self.net(x).unsqueeze(-2).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def sized(loss=None, optim=ADAM, **plates):
    torch.manual_seed(0)
    model, guide = SizedModel(nn.Linear(2, 4), **plates), SizedGuide(nn.Linear(4, 4), **plates)
    return ppvae.SVI(model, guide, optim, loss)


@pytest.mark.parametrize(
    "loss",
    [
        elbo.ELBO(num_particles=2),
        elbo.IWELBO(num_particles=3),
        pyro.infer.Trace_ELBO(max_plate_nesting=2),
        pyro.infer.TraceEnum_ELBO(max_plate_nesting=2),
    ],
)
def test_the_size_of_a_data_plate_is_not_in_the_history(loss):
    """50 rows in batches of 16, so the last one is scaled by 25, the others by 3.125."""
    still = functools.partial(torch.optim.SGD, lr=0.0)
    histories = []
    for size in (None, 50):
        torch.manual_seed(1)
        svi = sized(loss, still, size=size)
        torch.manual_seed(1)
        histories.append(numbers(fit(svi, X, valid=X[:20])))
    for row, expected in zip(*reversed(histories), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_the_objective_of_a_plate_that_takes_rows_by_itself_is_per_datapoint():
    """All rows are alike and the draws too, so that any ten give the mean over all."""
    x, still = X[:1].repeat(40, 1), functools.partial(torch.optim.SGD, lr=0.0)
    found = []
    for part in (None, 10):
        svi = sized(optim=still, subsample_size=part)
        for module in (svi.model, svi.guide):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)  # a decoder without z, and q = p
        found.append(fit(svi, x, epochs=1, batch_size=40).rows[0]["train_objective"])
    assert found == pytest.approx([4 * math.log(0.5)] * 2)


@pytest.mark.parametrize("loss", [elbo.ELBO(), pyro.infer.Trace_ELBO(max_plate_nesting=2)])
@pytest.mark.parametrize("plates", [{"subsample_size": 10}, {"inner": 2}])
def test_validation_of_part_of_the_rows_is_refused_before_the_first_step(plates, loss):
    svi = sized(loss, **plates)
    before = tensors(svi.objective)
    with pytest.raises(ppvae.PairError, match=r"(?s)no validation bound: .*by itself.* valid="):
        fit(svi, X, valid=X[:20])
    assert svi.num_steps == 0
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())
    fit(svi, X, epochs=1, batch_size=50)  # without validation it trains


def test_train_objective_is_the_mean_over_datapoints():
    class Fixed(ppvae.SVI):
        def update(self, *args, **kwargs):
            super().update(*args, **kwargs)
            return args[0].sum()  # a loss known by row

    svi = vae()
    spy = Fixed(svi.model, svi.guide, ADAM)
    assert fit(spy, X).rows[0]["train_objective"] == pytest.approx(-X.sum(1).mean().item())


def test_training_raises_the_bound():
    history = fit(vae(), torch.ones(64, 4), epochs=20)
    column = history.column("train_objective")
    assert column[-1] > column[0] + 0.5
    assert column[-1] < 0


def test_modes_are_left_and_validation_runs_in_eval():
    svi = vae(dropout=0.5, batch_norm=True)
    svi.guide.eval()
    seen = []
    svi.model.likelihood.register_forward_hook(lambda module, *_: seen.append(module.training))
    fit(svi, X, valid=X[:20], epochs=1)
    assert svi.model.training
    assert not svi.guide.training
    assert seen[-2:] == [False, False]  # two batches of validation
    assert any(seen)
    buffers = tensors(svi.objective)
    mean_bound(svi, iter([(X,)]), 0)
    assert all(torch.equal(buffers[k], v) for k, v in tensors(svi.objective).items())


def test_nan_loss():
    class Explodes(nn.Module):
        calls = 0

        def forward(self, z):
            self.calls += 1
            return z.repeat(1, 2) * (math.nan if self.calls > 7 else 1.0)

    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(Explodes()), latent_dim=2)
    svi = ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4)), ADAM)
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is nan; site 'x'"):
        fit(svi, X, epochs=9)


def test_skipped_steps_are_counted_and_left_out_of_the_mean():
    class Spoils(ppvae.Callback):
        def on_step_end(self, svi, loss):
            svi.model.likelihood.net.spoilt = svi.num_steps in (1, 5, 6)

    class Net(nn.Module):
        spoilt = False

        def __init__(self):
            super().__init__()
            self.net = nets.mlp(2, 8, 4)

        def forward(self, z):
            return self.net(z) * (math.nan if self.spoilt else 1.0)

    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(Net()), latent_dim=2)
    guide = guides.Normal(nets.mlp(4, 8, 4))
    svi = ppvae.SVI(model, guide, ADAM, skip_nonfinite=True)
    history = fit(svi, X, callbacks=Spoils(), epochs=3)
    assert history.column("skipped") == [1, 2, 0]
    assert history.column("step") == [4, 8, 12]
    assert svi.num_skipped == 3
    assert all(-6 < value < -2 for value in history.column("train_objective"))


# -- schedules ---------------------------------------------------------------------------------


def test_beta_is_called_with_the_step_and_saved():
    class Recorder:
        steps = 3

        def __init__(self):
            self.seen = []

        def __call__(self, step):
            self.seen.append(step)
            return min(step / self.steps, 1.0)

    beta = Recorder()
    svi = vae(loss=elbo.ELBO(beta=beta))
    fit(svi, X, valid=X[:20], epochs=2)
    assert sorted(set(beta.seen)) == list(range(8))  # not advanced by checks or validation
    assert beta.seen == sorted(beta.seen)
    other = vae(loss=elbo.ELBO(beta=beta))
    other.load_state_dict(svi.state_dict())
    other.step(X)
    assert beta.seen[-1] == 8


def test_beta_zero_at_the_first_step_one_at_the_end():
    svi = vae(loss=elbo.ELBO(beta=elbo.LinearWarmup(2), kl="analytic"))
    losses = []  # the loss is -E log p(x|z) + beta KL
    for _ in range(3):
        q, p = svi.guide.posterior(X), svi.model.prior().expand((50,))
        kl = torch.distributions.kl_divergence(q, p).sum().item()
        torch.manual_seed(0)
        plain = elbo.ELBO(beta=0.0, kl="analytic")(svi.model, svi.guide)(X).item()
        torch.manual_seed(0)
        losses.append((svi.step(X) - plain) / kl)
    assert losses == pytest.approx([0.0, 0.5, 1.0], abs=1e-3)


def test_the_weight_of_each_epoch_is_told():
    warmup = elbo.LinearWarmup(10, start=0.2, end=0.8)
    history = fit(vae(loss=elbo.ELBO(beta=warmup)), X, epochs=3)  # of 4 steps: 0, 1, 2, 3
    assert history.column("kl_weight") == pytest.approx([warmup(3), warmup(7), warmup(11)])
    assert "kl_weight" not in fit(vae(loss=elbo.ELBO(beta=2.0)), X).rows[0]


def test_other_weights_of_the_estimator_are_told(tmp_path):
    gamma = elbo.LinearWarmup(10, end=0.5)
    svi = vae(loss=elbo.FactorELBO(gamma=gamma, ratio=torch.nn.Linear(2, 1)))
    history = fit(svi, X, epochs=2, checkpoint=tmp_path)
    assert history.column("gamma") == pytest.approx([gamma(3), gamma(7)])
    assert "kl_weight" not in history.rows[0]


def test_lr_scheduler_steps_once_per_epoch():
    step = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
    history = fit(vae(), X, epochs=5, lr_scheduler=step)
    assert history.column("lr") == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


def test_plateau_scheduler_sees_the_validation_bound(monkeypatch):
    bounds = iter([-3.0, -2.0, -2.0, -2.0, -1.0])
    monkeypatch.setattr("ppvae.train.fit.mean_bound", lambda *args: next(bounds))
    plateau = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau,
        mode="max",
        threshold_mode="abs",
        patience=0,
        factor=0.1,
    )
    history = fit(vae(), X, valid=X, epochs=5, lr_scheduler=plateau)
    assert history.column("lr") == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3, 1e-4])


# -- early stopping ----------------------------------------------------------------------------


def bounded(monkeypatch, values):
    """Make validation return these values, and keep the parameters it saw."""
    seen, bounds = [], iter(values)

    def bound(svi, *args):
        seen.append(tensors(svi.objective))
        return next(bounds)

    monkeypatch.setattr("ppvae.train.fit.mean_bound", bound)
    return seen


def test_early_stopping_restores_the_best(monkeypatch):
    seen = bounded(monkeypatch, [-5.0, -3.0, -4.0, -3.0, -1.0])
    svi = vae(batch_norm=True)
    history = fit(svi, X, valid=X, epochs=9, patience=2)
    assert history.stopped_early
    assert history.best_epoch == 2
    assert len(history.rows) == 4  # -3.0 again is no improvement
    after = tensors(svi.objective)
    assert len(after) > 8  # with the batch-norm statistics
    assert all(torch.equal(seen[1][k], after[k]) for k in after)
    assert any(not torch.equal(seen[3][k], after[k]) for k in after)
    assert svi.num_steps == svi.objective.step == history.rows[-1]["step"] == 16


def test_patience_counts_from_the_best(monkeypatch):
    bounded(monkeypatch, [-5.0, -6.0, -4.0, -6.0, -6.0, -6.0])
    history = fit(vae(), X, valid=X, epochs=6, patience=2)
    assert (history.best_epoch, len(history.rows)) == (3, 5)


def test_an_upper_bound_is_best_where_it_is_smallest(monkeypatch):
    seen = bounded(monkeypatch, [-1.0, -3.0, -2.0, -2.5, -9.0])
    svi = vae(loss=elbo.ChiUpperBound(num_particles=2))
    history = fit(svi, X, valid=X, epochs=5, patience=2)
    assert (history.best_epoch, len(history.rows)) == (2, 4)
    assert all(torch.equal(seen[1][k], v) for k, v in tensors(svi.objective).items())


def test_early_stopping_waits_for_warm_up(monkeypatch):
    bounds = [-1.0, -2.0, -3.0, -4.0, -3.5, -3.6, -3.7, -3.8]
    seen = bounded(monkeypatch, bounds)
    svi = vae(loss=elbo.ELBO(beta=elbo.LinearWarmup(16)))  # 4 epochs of 4 steps
    history = fit(svi, X, valid=X, epochs=8, patience=2)
    assert history.best_epoch == 5
    assert len(history.rows) == 7
    after = tensors(svi.objective)
    assert all(torch.equal(seen[4][k], after[k]) for k in after)


def test_the_best_is_restored_when_the_epochs_run_out(monkeypatch):
    seen = bounded(monkeypatch, [-1.0, -2.0])
    svi = vae()
    history = fit(svi, X, valid=X, patience=5)
    assert not history.stopped_early
    assert all(torch.equal(seen[0][k], v) for k, v in tensors(svi.objective).items())


def test_without_patience_the_last_parameters_stay(monkeypatch):
    seen = bounded(monkeypatch, [-1.0, -2.0])
    svi = vae()
    history = fit(svi, X, valid=X)
    assert history.best_epoch == 1
    assert all(torch.equal(seen[1][k], v) for k, v in tensors(svi.objective).items())


def test_training_again_goes_on():
    svi = vae()
    fit(svi, X)
    optimizer = svi.optimizer
    history = fit(svi, X)
    assert svi.optimizer is optimizer
    assert history.column("step") == [12, 16]


def test_on_epoch_end():
    calls = []

    def callback(svi, history):
        calls.append((svi.num_steps, len(history.rows)))
        if len(history.rows) == 1:
            history.rows[-1]["mine"] = 1.5
        return len(history.rows) == 3

    history = fit(vae(), X, epochs=9, on_epoch_end=callback)
    assert calls == [(4, 1), (8, 2), (12, 3)]
    assert not history.stopped_early
    assert history.column("mine")[0] == 1.5
    assert math.isnan(history.column("mine")[1])
    assert "mine" in history.table()
    assert "1.50" in history.table()


@pytest.mark.parametrize("batched", [False, True])
def test_a_sampler_is_told_the_epoch(batched):
    """As a DistributedSampler has to be, for another order in each."""

    class Sampler(torch.utils.data.DistributedSampler):
        def set_epoch(self, epoch):
            told.append(epoch)
            super().set_epoch(epoch)

    told = []
    dataset = TensorDataset(torch.arange(20.0)[:, None].repeat(1, 4) % 2)
    sampler = Sampler(dataset, num_replicas=1, rank=0)
    if batched:
        batches = torch.utils.data.BatchSampler(sampler, 10, drop_last=False)
        batches.set_epoch = sampler.set_epoch
        loader = DataLoader(dataset, batch_sampler=batches)
    else:
        loader = DataLoader(dataset, batch_size=10, sampler=sampler)
    fit(vae(), loader, epochs=3)
    assert [epoch for epoch in told if epoch] == [1, 2, 3]


@pytest.mark.parametrize(
    ("best", "shown"), [(1, [1, 3, 4]), (3, [3, 4]), (4, [3, 4]), (None, [3, 4])]
)
def test_the_best_epoch_is_in_the_table_once(best, shown):
    rows = [{"epoch": n, "step": 10 * n, "train_objective": -1.0} for n in range(1, 5)]
    lines = ppvae.History("ELBO", rows, best_epoch=best).table(last=2).splitlines()[2:]
    assert [int(line.split()[0]) for line in lines] == shown
    marked = [int(line.split()[0]) for line in lines if line.endswith("(best)")]
    assert marked == ([best] if best else [])


def test_steps_that_a_device_has_withheld_are_told_after_the_epoch():
    """There the step itself does not wait to see whether it is finite."""

    class Withholds(ppvae.SVI):
        def update(self, *args, **kwargs):
            loss = super().update(*args, **kwargs)
            self._skipped += self.num_steps == 3
            return loss

    pair = vae()
    svi = Withholds(pair.model, pair.guide, ADAM)
    with pytest.raises(NonFiniteError, match="1 of the steps 1 to 4 was NaN or infinite"):
        fit(svi, X)
    assert (svi.num_steps, svi.num_epochs) == (4, 0)


def test_what_a_callback_inherits_is_called():
    class Counts(ppvae.Callback):
        steps = 0

        def on_step_end(self, svi, loss):
            self.steps += 1

    class Named(Counts):
        name = "mine"

    named = Named()
    fit(vae(), X, epochs=1, callbacks=[named, ppvae.Callback()])
    assert named.steps == 4


def test_the_function_comes_before_the_callbacks():
    """What it adds to a row is there for them."""

    class Reads(ppvae.Callback):
        seen = None

        def on_epoch_end(self, svi, history):
            self.seen = history.rows[-1]["mine"]

    def function(svi, history):
        history.rows[-1]["mine"] = 1.5

    reads = Reads()
    fit(vae(), X, epochs=1, on_epoch_end=function, callbacks=[reads])
    assert reads.seen == 1.5


def test_each_epoch_has_the_seconds_of_its_own_graphs(monkeypatch):
    seconds = property(lambda svi: 2.0 * (svi.num_steps > 0) + 3.0 * (svi.num_steps > 4))
    monkeypatch.setattr(ppvae.SVI, "build_seconds", seconds)
    history = fit(vae(), X, epochs=3)  # of four steps each
    assert history.column("build_seconds")[:2] == [2.0, 3.0]
    assert "build_seconds" not in history.rows[2]


@pytest.mark.parametrize("skips", [True, False])
def test_only_rows_that_count_are_in_the_mean(skips):
    """A process without rows of its own takes the step on others' rows."""
    progress = Progress(ppvae.History("ELBO"), torch.zeros(()))
    for loss, rows in ((6.0, 2), (5.0, 0), (3.0, 1)):
        progress.add(torch.tensor(loss), rows, skips)
    assert (float(progress.total), int(progress.count), progress.batch) == (-9.0, 3, 3)
    progress.begin_epoch()
    assert (float(progress.total), int(progress.count), progress.batch) == (0.0, 0, 0)


# -- arguments ---------------------------------------------------------------------------------

SGD0 = torch.optim.SGD([torch.zeros(1)], lr=0.0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": True}, TypeError, "batch_size must be a whole number, got True"),
        ({"steps_per_epoch": 5}, ValueError, "steps_per_epoch=5 is for a DataLoader"),
        ({"epochs": math.nan}, TypeError, "epochs must be a whole number, got nan"),
        ({"batch_size": 2**63}, ValueError, "batch_size must be at least 1, and below"),
        ({"patience": 3}, ValueError, "patience needs a validation bound"),
        ({"patience": 1}, ValueError, "patience needs a validation bound"),
        ({"patience": 0, "valid": X}, ValueError, "patience must be at least 1"),
        ({"batch_size": 16.0}, TypeError, "batch_size must be a whole number, got 16.0"),
        ({"epochs": "3"}, TypeError, "epochs must be a whole number"),
        ({"lr_scheduler": StepLR(SGD0, 1)}, TypeError, r"got a StepLR: give lambda optimizer: Ste"),
        ({"device": "mps"}, ValueError, "device='mps', but this PyTorch sees no such device"),
        ({"valid": X.to_sparse()}, ppvae.PairError, "'x' is sparse"),
        ({"device": "gpu"}, ValueError, "device='gpu' is unknown: use \"auto\""),
        ({"valid": "x"}, TypeError, "valid must be .* got str"),
        ({"valid": torch.ones(5, 3)}, ppvae.PairError, r"\(5, 3\)"),
        ({"valid": torch.full((200, 4), 0.5)}, ppvae.PairError, "outside the likelihood's support"),
        (
            {"valid": torch.cat([torch.ones(60, 4), torch.full((1, 4), math.nan)])},
            ppvae.PairError,
            "first is row 60",
        ),
    ],
)
def test_bad_arguments(options, error, match):
    svi = vae()
    before = tensors(svi.objective)
    with pytest.raises(error, match=match):
        fit(svi, X, **options)
    assert svi.num_steps == 0
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())


FAR = torch.cat([X, X])  # longer than the batch that the pair is checked on


class Source(IterableDataset):
    """Rows from one iterator, however often it is asked for (``once``), or from the start."""

    def __init__(self, rows, once=False, hidden=False, length=None):
        self.rows, self.once, self.hidden, self.length = rows, once, hidden, length
        self.open = iter(rows)

    def __iter__(self):
        if self.hidden:  # a new generator each time, over the same file
            return (row for row in self.open)
        return self.open if self.once else iter(self.rows)

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length


def noise(seed=0):
    """Rows without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.bernoulli(torch.full((4,), 0.5), generator=generator)


class Endless(IterableDataset):
    def __iter__(self):
        return noise()


@pytest.mark.parametrize(
    ("later", "match"),
    [(None, "must yield a tensor"), (X[:0], "a batch without rows"), (X[0, 0], "without rows")],
)
@pytest.mark.parametrize("as_valid", [False, True])
def test_a_later_batch_that_is_none_or_has_no_rows_is_refused(later, match, as_valid):
    """None is what a collate_fn gives where every row was bad; it does not end the epoch."""
    loader = DataLoader(Source([X[:6], later, X[6:]]), batch_size=None)
    train, valid = (X, loader) if as_valid else (loader, None)
    with pytest.raises((TypeError, ValueError), match=match):
        fit(vae(), train, epochs=1, valid=valid)


def test_a_data_set_that_does_not_say_its_length_is_named():
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return X[i]

    with pytest.raises(TypeError, match="data: Rows does not say how many rows it has"):
        fit(vae(), Rows(), epochs=1)


def test_no_batch_of_a_stream_is_lost_to_the_check():
    stream, plain = vae(), vae()
    fit(stream, DataLoader(Source(X, once=True), batch_size=16), epochs=1)
    loader = DataLoader(X, batch_size=16)
    torch.manual_seed(3)
    ppvae.fit(plain, loader, epochs=1, progress=False)
    assert stream.num_steps == plain.num_steps == -(-len(X) // 16)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_stream_that_runs_out_raises_and_never_counts_empty_epochs(hidden):
    rows = Source(X, once=True, hidden=hidden)
    svi, steps = vae(), -(-len(X) // 16)
    with pytest.raises(ValueError, match=r"__iter__ begin anew.*steps_per_epoch="):
        fit(svi, DataLoader(rows, batch_size=16), epochs=3)
    assert svi.num_steps == (steps if hidden else 0)  # known before the first step, or not
    with pytest.raises(ValueError, match=r"^valid: .*__iter__ begin anew"):
        fit(vae(), X, valid=DataLoader(Source(X, once=True, hidden=hidden), 64), epochs=2)
    history = fit(vae(), X, valid=DataLoader(Source(X, once=True), 64), epochs=1)
    assert math.isfinite(history.rows[0]["valid_bound"])


def test_steps_per_epoch_go_on_through_the_loader_and_start_it_anew():
    endless = fit(vae(), DataLoader(Endless(), batch_size=16), epochs=3, steps_per_epoch=5)
    assert [row["step"] for row in endless.rows] == [5, 10, 15]
    seen = []

    class Noted(IterableDataset):
        def __iter__(self):
            for i, row in enumerate(X[:48]):
                seen.append(i)
                yield row

    fit(vae(), DataLoader(Noted(), batch_size=16), epochs=2, steps_per_epoch=4)
    assert seen[: 8 * 16] == [*range(48), *range(48), *range(32)]
    once = DataLoader(Source(X, once=True), batch_size=16)
    steps = -(-len(X) // 16)
    fit(vae(), once, epochs=steps, steps_per_epoch=1)  # it lasts exactly as long
    once = DataLoader(Source(X, once=True), batch_size=16)
    with pytest.raises(ValueError, match="gives no batch a second time"):
        fit(vae(), once, epochs=steps + 1, steps_per_epoch=1)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("every_steps", [None, 3])
def test_a_resumed_stream_goes_on_where_it_was(epochs, every_steps, tmp_path):
    def loader():
        return DataLoader(Endless(), batch_size=8)

    def run(number, **options):
        svi = vae()
        return svi, fit(svi, loader(), epochs=number, steps_per_epoch=4, **options)

    expected, history = run(3)
    files = ppvae.Checkpoints(tmp_path, every_steps=every_steps)
    run(epochs, checkpoint=files)
    resumed, again = run(3, checkpoint=files, resume=True)
    assert again.column("train_objective") == history.column("train_objective")
    for a, b in zip(resumed.objective.parameters(), expected.objective.parameters(), strict=True):
        assert torch.equal(a, b)

    class Live(IterableDataset):  # other rows each time
        def __iter__(self):
            return noise(id(self) % 7919 + 1)

    with pytest.raises(ppvae.CheckpointError, match="does not yield the batches again"):
        fit(vae(), DataLoader(Live(), batch_size=8), epochs=4, steps_per_epoch=4,
            checkpoint=tmp_path, resume=True)  # fmt: skip


class EpochOrder(torch.utils.data.Sampler):
    """An order that follows the epoch, as a DistributedSampler's does."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(X)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(len(X), generator=generator).tolist())


@pytest.mark.parametrize("kind", ["endless", "sampler"])
def test_a_stream_that_dies_at_every_checkpoint_comes_to_its_end(kind, tmp_path):
    class Dies(ppvae.Callback):  # that of an epoch's end is of the same step as its last one
        def on_checkpoint(self, svi, path):
            raise KeyboardInterrupt

    def run(**options):
        svi = vae()
        rows = DataLoader(Endless(), 8) if kind == "endless" else DataLoader(X, 8, sampler=order)
        return svi, fit(svi, rows, epochs=2, steps_per_epoch=2, **options)

    order = EpochOrder()
    expected, _ = run()
    files, deaths = ppvae.Checkpoints(tmp_path, every_steps=1), 0
    for _ in range(7):
        try:
            resumed, _ = run(checkpoint=files, resume=True, callbacks=Dies())
        except KeyboardInterrupt:
            deaths, order = deaths + 1, EpochOrder()
    assert deaths == 6
    for a, b in zip(resumed.objective.parameters(), expected.objective.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_may_be_dictionaries_nested_tuples_and_have_a_length():
    class TwoArguments(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                at = self.weight * z + 10 * y
                pyro.sample("x", dist.Normal(at, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    y = torch.arange(40.0)
    x = 10 * y
    ways = {
        "tuple": [(a, b) for a, b in zip(x, y, strict=True)],
        "dictionary": [{"y": b, "x": a} for a, b in zip(x, y, strict=True)],  # in another order
        "nested": [((a,), [b]) for a, b in zip(x, y, strict=True)],
    }
    found = {}
    for name, rows in ways.items():
        for given in (rows, Source(rows, length=len(rows))):
            torch.manual_seed(0)
            svi = ppvae.SVI(TwoArguments(), guide, torch.optim.Adam)
            history = fit(svi, DataLoader(given, batch_size=10), valid=DataLoader(given, 40))
            found[name, type(given)] = history.column("train_objective")
    for kind in (list, Source):
        assert found["tuple", kind] == found["dictionary", kind] == found["nested", kind]


def far(row, value):
    x = FAR.clone()
    x[row] = value
    return x


@pytest.mark.parametrize(
    ("train", "error", "match"),
    [
        ((), TypeError, "data must be"),
        ((X, "y"), TypeError, "data must be .*, got str"),
        (X[:0], ppvae.PairError, r"'x' is empty: shape \(0, 4\)"),
        (far(90, math.nan), ppvae.PairError, "4 NaN or infinite values in 1 rows.*row 90"),
        (far(90, -math.inf), ppvae.PairError, "NaN or infinite"),
        (far(90, 0.5), ppvae.PairError, r"'x' in data: 4 of 400 .*\{0, 1\}, e\.g\. \[0\.5\]"),
        (far(90, 255.0), ppvae.PairError, r"\[255\.0\]"),
        (DataLoader(X[:3], batch_size=5, drop_last=True), ValueError, "yields no batch"),
        (
            DataLoader([{"z": x} for x in X]),
            TypeError,
            "mapping of 'z', and the model takes 'x'",
        ),
        (DataLoader([{"x": x, "w": x} for x in X]), TypeError, "mapping of 'x', 'w'"),
        (DataLoader([{"x": "a"} for x in X]), TypeError, "got dict of 'x'; give it a collate_fn"),
        (DataLoader([x.to_sparse() for x in X], collate_fn=torch.stack), ppvae.PairError, "sparse"),
        (X.to_sparse(), ppvae.PairError, r"'x' is sparse .*x\.to_dense\(\)"),
        (torch.tensor(2.0), ppvae.PairError, "'x' is a single number"),
        (DataLoader([(x, "a") for x in X]), TypeError, "tuple of tensors"),
    ],
)
def test_bad_data(train, error, match):
    svi = vae()
    with pytest.raises(error, match=match) as caught:
        fit(svi, train)
    assert svi.num_steps == 0
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda y: y.index_fill(0, torch.tensor([49]), 7), r"'y' in data: labels .* 0 \.\. 7"),
        (lambda y: y.index_fill(0, torch.tensor([49]), -1), r"'y' in data: labels .* -1 \.\. 2"),
        (lambda y: y + 1, r"'y': labels must lie in 0 \.\. 2, got 1 \.\. 3"),
        (lambda y: y.float(), r"'y': labels must be integers.*y\.long\(\)"),
        (lambda y: y[:, None], r"'y': labels must be integers of shape \(N,\)"),
        (lambda y: y[0], "'y' is a single number.*Python number"),
        (lambda y: y[:20], r"differ in length \(x: \(50, 4\), y: \(20,\)\)"),
    ],
)
def test_bad_labels(change, match):
    svi = cvae()
    with pytest.raises(ppvae.PairError, match=match) as caught:
        fit(svi, (X, change(Y)))
    assert "Trace Shapes" not in str(caught.value)
    assert svi.num_steps == 0
    assert fit(svi, (X, Y)).rows[0]["step"] == 4


def test_bad_labels_in_validation():
    svi = cvae()
    with pytest.raises(ppvae.PairError, match="'y' in valid: labels must lie"):
        fit(svi, (X, Y), valid=(FAR, torch.arange(100) // 20))


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (far(90, math.nan), FAR[:, 0].long(), "'x' in data has 4 NaN"),
        (far(90, 3.0), FAR[:, 0].long(), "'x' in data: 4 of 64 values lie outside"),
        (FAR, torch.arange(100) // 30, "'y' in data: labels must lie in 0 .. 2, got 2 .. 3"),
    ],
)
def test_batches_of_a_loader_are_checked_before_their_step(x, y, match):
    svi = cvae()
    with pytest.raises(ppvae.PairError, match=match):
        fit(svi, DataLoader(TensorDataset(x, y), batch_size=16))
    assert svi.num_steps == 5  # rows 80 .. 95 are the sixth batch


def test_a_conditional_guide_without_y():
    dataset = data.from_arrays(X, Y)
    with pytest.raises(ppvae.PairError, match=r"call it with x and y: .* dataset\.supervised\(\)"):
        fit(cvae(), dataset)
    assert len(fit(cvae(), dataset.supervised()).rows) == 2


def test_support_that_differs_by_row_is_checked_on_the_batch_only():
    class Counts(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.decoder = nets.mlp(2, 8, 4)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                total = x.amax(1, keepdim=True) + 1
                fn = dist.Binomial(total, logits=self.decoder(z)).to_event(1)
                pyro.sample("x", fn, obs=x)

    x = torch.poisson(torch.full((50, 4), 3.0), generator=torch.Generator().manual_seed(0))
    guide = guides.Normal(nets.mlp(4, 8, 4))
    for batch_size in (1, 16, 50):
        assert len(fit(ppvae.SVI(Counts(), guide, ADAM), x, batch_size=batch_size, epochs=1).rows)


def normed(where, layer=nn.BatchNorm1d, loss=None):
    """A VAE with a normalised hidden layer in the guide or in the model."""
    torch.manual_seed(0)

    def net(a, b, norm):
        layers = [nn.Linear(a, 8), *[layer(8)] * norm, nn.Tanh(), nn.Linear(8, b)]
        return nets.flat_batch(nn.Sequential(*layers))

    model = models.VAE(conditionals.Bernoulli(net(2, 4, where == "model")), latent_dim=2)
    return ppvae.SVI(model, guides.Normal(net(4, 4, where == "guide")), ADAM, loss)


def loader(rows, size, **options):
    return DataLoader(TensorDataset(X[:rows]), batch_size=size, **options)


@pytest.mark.parametrize("where", ["guide", "model"])
@pytest.mark.parametrize(
    ("train", "size", "cure"),
    [
        (X[:33], 16, "batch_size=17, or leave a row out"),
        (X[:7], 2, "batch_size=4"),  # three leave one, too
        (X[:4], 1, "batch_size=2"),
        (X[:1], 16, "more rows, or normalise by nn.LayerNorm"),
        (loader(33, 16), 5, r"batch_size=17, .* \(drop_last=True\)"),
    ],
)
def test_a_last_batch_of_one_row_is_refused_with_batch_norm(where, train, size, cure):
    svi = normed(where)
    before = tensors(svi.objective)
    message = rf"batch_size=\d+ leaves one row .* batch-norm layer '.*{where}.*1'.*{cure}"
    with pytest.raises(ValueError, match=message):
        fit(svi, train, batch_size=size)
    assert svi.num_steps == 0
    assert all(torch.equal(before[k], v) for k, v in tensors(svi.objective).items())
    assert svi.objective.training
    if isinstance(train, torch.Tensor) and len(train) > 1:  # the cure is one
        fit(svi, train, batch_size=int(cure.partition("=")[2].partition(",")[0]), epochs=1)


def test_a_last_batch_of_one_row_where_batch_norm_has_enough_values():
    fit(vae(), X[:33])  # there is none
    fit(normed("guide", nn.LayerNorm), X[:33])
    fit(normed("model", loss=elbo.IWELBO(num_particles=3)), X[:33])  # three values of z
    with pytest.raises(ValueError, match="leaves one row"):
        fit(normed("guide", loss=elbo.IWELBO(num_particles=3)), X[:33])
    frozen = normed("guide")
    frozen.guide.eval()
    fit(frozen, X[:33])
    fit(normed("guide"), loader(33, 16, drop_last=True))
    pooled = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1), nn.Flatten())
    guide = guides.Normal(nn.Sequential(nets.flat_batch(pooled), nn.Linear(4, 4)))
    fit(ppvae.SVI(vae().model, guide, ADAM), X[:33])  # four pixels


class Holes(ppvae.Program):
    """A model that leaves out missing values: those that are NaN, or those of a second argument."""

    def __init__(self, how="mask"):
        super().__init__()
        self.net, self.how = nn.Linear(2, 4), how

    def forward(self, x, seen=None):
        seen = ~x.isnan() if seen is None else seen
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            fn = dist.Normal(self.net(z), 1.0)
            if self.how == "mask":
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x)
            elif self.how == "rows":
                with pyro.poutine.mask(mask=seen.all(-1)):
                    pyro.sample("x", fn.to_event(1), obs=x)
            elif self.how == "where":  # whose gradient is NaN all the same
                terms = torch.where(seen, fn.log_prob(x), torch.zeros(()))
                pyro.factor("x", terms.sum(-1))
            else:
                pyro.sample("x", fn.to_event(1), obs=x)


class FillsHoles(ppvae.Program):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x, seen=None):
        known = x.nan_to_num(0.0) if seen is None else torch.where(seen, x, 0.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(known), 1.0).to_event(1))


def holes(how="mask"):
    torch.manual_seed(0)
    return Holes(how), FillsHoles()


WITH_HOLES = torch.where(
    torch.rand(50, 4, generator=torch.Generator().manual_seed(9)) < 0.1, math.nan, GREY
)
AT_THE_END = torch.cat([GREY, torch.full((1, 4), math.nan)])


@pytest.mark.parametrize("how", ["mask", "rows"])
def test_missing_values_as_nan_are_those_that_a_mask_hides(how):
    """The oracle is the same pair, given numbers in their place and which are missing."""
    rows, evidence, reports = [], [], []
    for args in ((WITH_HOLES,), (WITH_HOLES.nan_to_num(0.0), ~WITH_HOLES.isnan())):
        svi = ppvae.SVI(*holes(how), ADAM)
        torch.manual_seed(1)
        valid = tuple(t[:20] for t in args)
        rows.append(numbers(fit(svi, args, valid=valid)))
        found = ppvae.diagnostics.log_evidence(
            svi.model, svi.guide, *args, num_particles=20, seed=1, max_rows=200
        )
        evidence.append(found.log_evidence)
        report = ppvae.diagnose(svi.model, svi.guide, *args, num_particles=30, seed=1)
        reports.append(repr(report))
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(*evidence)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("x", [WITH_HOLES, AT_THE_END])
@pytest.mark.parametrize(
    ("how", "why"), [("not", "'x' of the model"), ("where", "gradient that is not")]
)
def test_missing_values_without_a_mask_are_refused_before_the_first_step(how, why, x):
    svi = ppvae.SVI(*holes(how), ADAM)
    with pytest.raises(ppvae.PairError, match=f"NaN or infinite values in .*{why}"):
        fit(svi, x)
    assert svi.num_steps == 0
    if how == "not":
        with pytest.raises(ppvae.PairError, match=r"NaN or infinite values in .*mask them"):
            ppvae.diagnostics.log_evidence(svi.model, svi.guide, x)


@pytest.mark.parametrize(
    "loss",
    [
        elbo.IWELBO(num_particles=4),
        pyro.infer.Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    ],
)
@pytest.mark.parametrize("channels", [16, 8])  # as many as rows, which runs, and others
def test_batch_norm_over_the_rows_is_refused_by_name_before_the_first_step(channels, loss):
    def pair(wrap):
        net = nn.Sequential(
            nn.Linear(2, channels), nn.BatchNorm1d(channels), nn.Linear(channels, 4)
        )
        svi = vae(loss=loss)
        svi.model.likelihood.net = wrap(net)
        return svi

    svi = pair(nn.Identity().forward)
    with pytest.raises(ppvae.PairError, match=r"Layer 'model\.likelihood\.net\.1' .*flat_batch"):
        fit(svi, X)
    assert svi.num_steps == 0
    assert math.isfinite(fit(pair(nets.flat_batch), X).rows[-1]["train_objective"])


def test_whole_numbers_where_floats_are_needed():
    with pytest.raises(ppvae.PairError, match=r"'x' holds torch.int64, .* give x.float\(\)"):
        fit(vae(), X.long())
    with pytest.raises(ppvae.PairError, match=r"^(?!.*float)"):  # that alone is no cure
        fit(vae(), 3 * X.long())


class Asked(models.VAE):
    """It says what `fit` told it, and stops after an epoch."""

    def before_fit(self, rows, *data):
        self.told = (rows, *(len(t) for t in data))
        return self.look

    def look(self):
        self.looks = getattr(self, "looks", 0) + 1
        if self.looks == 2:
            raise ArithmeticError("after two epochs")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (X, (50, 50)),
        (data.Split(X), (50, 50)),
        (DataLoader(X, batch_size=16), (50, 16)),
        (DataLoader(Stream(), batch_size=16), (None, 16)),
        (data.from_counts(X + 1, valid=1, test=1).train, (48, 16)),
    ],
)
def test_a_model_looks_at_the_data_and_after_each_epoch(train, told, tmp_path):
    net = nets.mlp(2, 8, 4)
    likelihood = conditionals.BagOfWords(net) if told[0] == 48 else conditionals.Bernoulli(net)
    svi = ppvae.SVI(Asked(likelihood, latent_dim=2), guides.Normal(nets.mlp(4, 8, 4)), ADAM)
    with pytest.raises(ArithmeticError, match="after two epochs"):
        fit(svi, train, epochs=9, checkpoint=tmp_path)
    assert svi.model.told == told
    assert svi.num_steps == 8 - 2 * (told[0] == 48)
    saved = [path.name for path in ppvae.Checkpoints(tmp_path).paths()]
    assert saved == [f"step-{svi.num_steps // 2:08d}.pt"]  # of the first epoch


# -- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_asked_for_but_absent(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    svi = vae()
    with pytest.raises(ValueError, match=r"'cuda.*sees no CUDA device"):
        fit(svi, X, device=device)
    assert svi.num_steps == 0


def test_auto_without_cuda_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ppvae.train.fit.resolve_device("auto") == torch.device("cpu")
    expected = numbers(fit(vae(), X, valid=X))
    assert numbers(fit(vae(), X, valid=X, device="auto")) == expected
    loader = DataLoader(X, batch_size=16)
    assert len(fit(vae(), loader, device="cpu").rows) == 2
    assert len(fit(vae(), data.Split(X), device="cpu").rows) == 2


@pytest.mark.cuda
def test_fit_on_cuda_and_back():
    svi = vae(batch_norm=True)
    fit(svi, X)  # on the CPU first: the optimiser's state must move too
    history = fit(svi, X, valid=X, device="auto", epochs=10)
    assert next(svi.model.parameters()).is_cuda
    assert all(
        v.is_cuda for state in svi.optimizer.state.values() for k, v in state.items() if k != "step"
    )
    assert history.rows[-1]["step"] == 8 + 40
    assert math.isfinite(history.rows[-1]["valid_bound"])
    assert numbers(fit(svi, X, valid=X, device="cpu"))[-1]["step"] == 56
    split = data.Split(torch.full((40, 4), 0.5), binarize="dynamic")
    fit(svi, split, valid=split, device="cuda")
    fit(svi, DataLoader(X, batch_size=16), valid=X, device="cuda")


@pytest.mark.cuda
def test_same_seed_same_history_on_cuda():
    runs = [numbers(fit(vae(), X, valid=X, device="cuda")) for _ in range(2)]
    assert runs[0] == runs[1]


# -- data that stay on the disk ----------------------------------------------------------------


def mapped(tmp_path, array, name="x.npy"):
    np.save(tmp_path / name, array)
    return np.load(tmp_path / name, mmap_mode="r")


def on_disk(array, values):
    """Whether a tensor's memory is that of a mapped array."""
    first = array.__array_interface__["data"][0]
    return first <= values.data_ptr() < first + array.nbytes


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.uint8])
def test_a_mapped_file_trains_as_its_copy_in_memory(dtype, tmp_path):
    array = mapped(tmp_path, X.numpy().astype(dtype))
    streamed, resident = data.from_arrays(array, Y), data.from_arrays(X, Y)
    assert on_disk(array, streamed.train.values)
    assert repr(streamed) == repr(resident)
    assert torch.equal(streamed.train.x, resident.train.x)
    assert torch.equal(streamed.valid.x, resident.valid.x)
    assert torch.equal(streamed.train.y, resident.train.y)
    one, other = vae(), vae()
    torch.manual_seed(0)
    expected = numbers(fit(one, resident))
    torch.manual_seed(0)
    assert numbers(fit(other, streamed, device="cpu")) == expected  # whatever its dtype, in float32
    assert on_disk(array, streamed.to("cpu").train.values)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("ppvae reader")
    ]


def test_validation_of_a_file_has_draws_of_its_own(tmp_path):
    """Each row as epoch 0 draws it, whatever its batch; training draws are others."""
    split = data.Split(
        torch.full((40, 200), 0.5), binarize="dynamic", rows=torch.arange(40), seed=3
    )
    streamed = source("valid", split, 16, None, Processes(), False)
    found = [batch for (batch,) in streamed.evaluation()]
    assert list(map(len, found)) == [16, 16, 8]
    for first, batch in zip((0, 16, 32), found, strict=True):
        index = torch.arange(first, first + len(batch))
        assert torch.equal(batch, split.present(*split.read(index), 0, first)[0])
        assert not torch.equal(batch, split.present(*split.read(index), 1, first)[0])


def test_the_reader_leaves_the_cores_to_the_step(tmp_path, monkeypatch):
    """Threads of its own would wait spinning: a step took three times as long beside them."""
    seen, read = [], data.Split.read
    monkeypatch.setattr(
        data.Split,
        "read",
        lambda split, index: (
            time.sleep(0.01),  # long enough for the main thread to go on
            read(split, index),
            seen.append(torch.get_num_threads()),
        )[1],
    )
    before = torch.get_num_threads()
    later = []
    torch.set_num_threads(2)
    try:
        fit(vae(), data.from_arrays(mapped(tmp_path, X.numpy())), device="cpu")
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start(), thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_supervised_rows_of_a_mapped_file_stay_together(tmp_path):
    y = (X[:, 0] + X[:, 1]).long()
    spy = Spy(cvae())
    fit(spy, data.from_arrays(mapped(tmp_path, X.numpy()), y).supervised())
    assert spy.batches
    for a, b in spy.batches:
        assert torch.equal((a[:, 0] + a[:, 1]).long(), b)


def test_a_mapped_file_is_binarised_batch_by_batch(tmp_path):
    grey = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (3000, 1))
    train = data.from_arrays(mapped(tmp_path, grey), binarize="dynamic", seed=4).train
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        spy = Spy(vae(dim=64))
        fit(spy, train, batch_size=500)
        seen.append(torch.stack([x for (x,) in spy.batches if len(x) == 500]))
    assert torch.equal(*seen)
    batches = seen[0]
    assert set(batches.unique().tolist()) == {0.0, 1.0}
    means = batches.mean((0, 1))
    error = (means - torch.from_numpy(grey[0])) / (0.25 / batches[..., 0].numel()) ** 0.5
    assert error.abs().max() < 4.5  # of 64, each at most standard normal: below 1e-3 in all
    flat = batches[:, :, 32].reshape(len(batches), -1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 5 / 500**0.5  # fresh each time
    with pytest.raises(ValueError, match="binarised batch by batch"):
        train.draw(1)
    assert torch.equal(train.x, train.draw(0))
    with pytest.raises(ValueError, match="binarize='static' keeps one draw"):
        data.from_arrays(mapped(tmp_path, grey), binarize="static")


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({1999: math.nan}, r"x \(rows .*\) has 4 NaN"),
        ({1999: 2.0}, "x ranges from .* rescale x or give support"),
    ],
)
def test_a_mapped_file_is_looked_through_in_pieces(bad, match, tmp_path, monkeypatch):
    monkeypatch.setattr(data.arrays, "PIECE", 400)
    x = X.repeat(40, 1).numpy()
    assert data.from_arrays(mapped(tmp_path, x)).support == "binary"
    for row, value in bad.items():
        x[row] = value
    with pytest.raises(ValueError, match=match):
        data.from_arrays(mapped(tmp_path, x, "bad.npy"), support="binary")


@pytest.mark.parametrize(
    ("pieces", "support"),
    [
        ([0, 1], "binary"),
        ([0.5, 1], "unit_interval"),
        ([1, 3], "counts"),
        ([-1, 3], "integer"),
        ([0.5, 3], "real"),
        ([0.5, -1], "real"),
        ([1.5, 1], "real"),
    ],
)
def test_the_support_of_pieces_is_that_of_the_whole(pieces, support, tmp_path, monkeypatch):
    monkeypatch.setattr(data.arrays, "PIECE", 10)
    x = np.repeat(np.asarray(pieces, np.float32), 10)[:, None]
    assert data.from_arrays(mapped(tmp_path, x)).support == data.from_arrays(x).support == support


@pytest.mark.parametrize(
    ("value", "binarize", "match"),
    [
        (0.5, None, r"argument 'x' in data: 4 of 64 values lie outside"),
        (math.nan, None, "'x' in data has 4 NaN"),
        (255.0, "dynamic", r"data \(binarize='dynamic'\) must lie in \[0, 1\], and range from"),
    ],
)
def test_rows_of_a_file_are_checked_before_their_step(value, binarize, match):
    svi = vae()
    split = data.Split(far(90, value), rows=torch.arange(100), binarize=binarize)
    with pytest.raises(ValueError, match=match):
        fit(svi, split)
    assert svi.num_steps < 7
    good = data.Split(far(90, 1.0), rows=torch.arange(100), binarize=binarize)
    assert len(fit(svi, good, valid=good).rows) == 2
    with pytest.raises(ValueError, match=match.replace("data", "valid")):
        fit(svi, good, valid=split)


def test_an_error_while_reading_ahead_is_raised():
    split = data.Split(X, rows=torch.arange(50))
    svi, reads = vae(), []

    def read(index):
        reads.append(index)
        if len(reads) > 6:
            raise OSError("the disk is gone")
        return data.Split.read(split, index)

    object.__setattr__(split, "read", read)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(svi, split)
    assert svi.num_steps == 5  # the pair was checked on the first of six reads
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("ppvae reader")
    ]


@pytest.mark.cuda
def test_a_mapped_file_on_cuda(tmp_path):
    array = mapped(tmp_path, GREY.numpy())
    svi = vae()
    history = fit(svi, data.from_arrays(array, binarize="dynamic"), device="cuda")
    assert next(svi.model.parameters()).is_cuda
    assert math.isfinite(history.rows[-1]["valid_bound"])


# -- callbacks and loggers ---------------------------------------------------------------------


def test_callbacks_are_called_after_steps_and_epochs():
    calls = []

    class Notes(ppvae.Callback):
        def on_step_end(self, svi, loss):
            calls.append(svi.num_steps)
            assert loss.shape == ()

        def on_epoch_end(self, svi, history):
            calls.append(f"epoch {len(history.rows)}")
            return len(history.rows) == 2

    history = fit(vae(), X, epochs=9, callbacks=[Notes(), ppvae.Callback()])
    assert calls == [1, 2, 3, 4, "epoch 1", 5, 6, 7, 8, "epoch 2"]
    assert not history.stopped_early


def test_a_csv_logger_gets_every_row(tmp_path):
    logger = loggers.CSVLogger(tmp_path, name="run")
    history = fit(vae(), X, valid=X, epochs=3, loggers=logger)
    (path,) = tmp_path.rglob("metrics.csv")
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == history.rows


def test_the_log_of_a_resumed_run_has_all_of_it(tmp_path):
    class Log:
        def __init__(self):
            self.rows = []

        def log_metrics(self, metrics, step):
            self.rows.append((step, metrics["epoch"]))

    fit(vae(), X, checkpoint=tmp_path)
    log = Log()
    fit(vae(), X, epochs=4, checkpoint=tmp_path, resume=True, loggers=[log])
    assert log.rows == [(4, 1), (8, 2), (12, 3), (16, 4)]


def test_a_tensorboard_logger(tmp_path):
    logger = loggers.TensorBoardLogger(tmp_path, name="run")
    fit(vae(), X, valid=X, loggers=[logger])
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    written = path.read_bytes()
    assert b"valid_bound" in written
    assert b"train_objective" in written


# -- history -----------------------------------------------------------------------------------


def test_history_shows_itself():
    svi = vae(loss=elbo.IWELBO(num_particles=3))
    history = fit(svi, X, valid=X, epochs=12)
    assert history.name == "IWELBO-3"
    assert fit(vae(), X).name == "ELBO"
    lines = repr(history).splitlines()
    assert lines[0] == "IWELBO-3 [nats per datapoint]"
    assert lines[1].split() == ["epoch", "step", "train_objective", "valid_bound", "lr", "seconds"]
    assert sum("(best)" in line for line in lines) == 1
    assert lines[-1].split()[:2] == ["12", "48"]
    assert len(history.table(last=3).splitlines()) in (5, 6)
    assert [row["epoch"] for row in history.rows] == history.column("epoch")
    assert len({tuple(row) for row in history.rows}) == 1


def test_the_best_row_is_shown_though_long_gone():
    rows = [{"epoch": e, "step": e, "valid_bound": -float(e)} for e in range(1, 30)]
    text = ppvae.History("ELBO", rows, best_epoch=1).table(last=2)
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["1", "28", "29"]
    assert text.splitlines()[2].endswith("(best)")


def test_empty_history():
    assert repr(ppvae.History("ELBO")) == "ELBO: no epoch yet"


def test_history_plots_both_curves():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    with_valid = fit(vae(), X, valid=X, epochs=3).plot()
    without = fit(vae(), X, epochs=3).plot(ax=pyplot.figure().gca())
    assert len(with_valid.lines) > len(without.lines) > 0
    assert any("ELBO" in text.get_text() for text in with_valid.get_legend().get_texts())
    pyplot.close("all")


def test_progress_bar(capsys, monkeypatch):
    fit(vae(), X, valid=X, progress=True)
    assert capsys.readouterr().err == ""  # no terminal: a log is not flooded
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(vae(), X, valid=X, progress=True)
    shown = capsys.readouterr().err
    assert "ELBO" in shown
    assert "valid_bound" in shown
    assert "nats" in shown
    fit(vae(), X)
    assert capsys.readouterr().err == ""


def test_a_second_call_goes_on_with_new_draws():
    digits = data.load("digits")
    seen = []
    svi = make_svi_for(digits)
    svi.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].sum().item()))
    for epoch in (1, 2):
        seen.clear()
        history = ppvae.fit(svi, digits.train, epochs=1, batch_size=2000, progress=False)
        assert history.rows[0]["epoch"] == epoch == svi.num_epochs
        assert seen[-1] == digits.train.draw(epoch).sum().item()
    assert digits.train.draw(1).sum() != digits.train.draw(2).sum()


def make_svi_for(dataset):
    width = dataset.train.x.shape[1]
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, width)), latent_dim=2)
    return ppvae.SVI(model, guides.Normal(nets.mlp(width, 8, 4)), ADAM)


def test_what_stops_one_process_stops_all(monkeypatch):
    alone = Processes()

    def fails():
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        alone.together(fails)
    alone.together(lambda: None)
    monkeypatch.setattr(alone, "gather", lambda value: [value, "ValueError: there"])
    with pytest.raises(RuntimeError, match="rank 1 has ended the run: ValueError: there"):
        alone.together(lambda: None)


# ------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("how", ["parameters", "autoguide", "condition"])
def test_all_rows_at_once_stay_in_their_order(how):
    """What belongs to the n-th row of the data meets that row, in every epoch."""
    x = torch.tensor([-8.0, -4.0, 0.0, 4.0, 8.0, 12.0])

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=None if how == "condition" else x)

    class MeanField(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(x / 2 + 1.0)

        def forward(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(self.loc, 0.5**0.5))

    guide = MeanField()
    if how == "autoguide":
        guide = pyro.infer.autoguide.AutoNormal(model, init_scale=0.5**0.5)
        guide(x)
    if how == "condition":
        model = pyro.poutine.condition(model, data={"x": x})
    svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.1), elbo.ELBO(gradient="stl"))
    ppvae.fit(svi, x, epochs=300, progress=False)
    loc = guide.locs.z if how == "autoguide" else guide.loc
    assert (loc - x / 2).abs().max() < 0.1  # the posterior's mean; without noise there


@pytest.mark.parametrize("how", ["loader", "batches"])
def test_positions_are_refused_where_rows_come_in_another_order(how):
    """Of 8 rows, 4 at a time, each would meet the parameters of some other one."""
    x = torch.linspace(-4.0, 4.0, 8)

    class MeanField(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 8 if how == "loader" else 4))

        def forward(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = MeanField()
    given = DataLoader(TensorDataset(x), 8, shuffle=True) if how == "loader" else x
    with pytest.raises(ppvae.PairError, match=r"site 'z' of the guide: .* positions in the batch"):
        ppvae.fit(ppvae.SVI(model, guide), given, epochs=1, batch_size=4, progress=False)
