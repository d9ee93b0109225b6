"""fit_many: each member of a stack is its lone run, to rounding; what cannot be stacked says so."""

import functools
import itertools
import math
import shutil
import warnings
from types import SimpleNamespace

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets
from ppvae.compile import passes
from ppvae.compile.graph import Graph

X = torch.bernoulli(
    torch.full((38, 5), 0.4, dtype=torch.float64), generator=torch.Generator().manual_seed(0)
)
VALID = X[:12].flip(1)
adam = functools.partial(torch.optim.Adam, lr=0.02)
SEEDS = [4, 0]


def pair(hidden=6, decoder=None, likelihood=conditionals.Bernoulli):
    net = decoder if decoder is not None else nets.mlp(2, hidden, 5)
    model = models.VAE(likelihood(net), latent_dim=2).double()
    return model, guides.Normal(nets.mlp(5, hidden, 2 * 2)).double()


def maker(loss=None, optim=adam, build=pair, **settings):
    return lambda: ppvae.SVI(*build(), optim, loss, **settings)


def lone(make, seed, **arguments):
    torch.manual_seed(seed)
    svi = make()
    return svi, ppvae.fit(svi, seed=seed, progress=False, **arguments)


def numbers(svi):
    """All tensors of a run: parameters, buffers, and what the optimiser and the estimator keep."""
    found = dict(svi.objective.state_dict())
    for i, state in enumerate(svi.optimizer.state_dict()["state"].values()):
        found |= {f"{i}.{key}": value for key, value in state.items()}
    return found


def require_same(one, other, exactly=False):
    one, other = numbers(one), numbers(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not torch.is_tensor(value):
            assert value == other[name], name
        elif exactly:
            assert torch.equal(value, other[name]), name
        else:
            torch.testing.assert_close(
                value, other[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )


def require_same_rows(one, other):
    assert len(one.rows) == len(other.rows)
    for row, expected in zip(one.rows, other.rows, strict=True):
        assert row.keys() - {"build_seconds"} == expected.keys() - {"build_seconds"}
        for name in expected.keys() - {"seconds", "build_seconds"}:
            tolerance = 1e-7 if name == "kl_weight" else 1e-9  # which is shown in float32
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-10), name


def require_lone_runs(make, stack=True, seeds=SEEDS, **arguments):
    """fit_many does what fit does for each seed; returns what it returned."""
    arguments = {"data": X, "valid": VALID, "epochs": 3, "batch_size": 16, **arguments}
    runs = ppvae.fit_many(make, seeds=seeds, stack=stack, progress=False, **arguments)
    for seed, svi, history in zip(seeds, runs.svis, runs.histories, strict=True):
        alone, expected = lone(make, seed, **arguments)
        require_same(svi, alone)
        require_same_rows(history, expected)
        assert (history.best_epoch, history.stopped_early) == (
            expected.best_epoch,
            expected.stopped_early,
        )
    return runs


def with_batch_norm():
    net = nn.Sequential(nn.Linear(2, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    return pair(decoder=net)


def with_dropout():
    return pair(decoder=nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 5)))


def with_frozen():
    model, guide = pair()
    next(iter(model.parameters())).requires_grad_(False)
    return model, guide


class Constant(ppvae.Program):
    """A tensor made in the program, and one in an attribute, which are not the same in all."""

    def __init__(self):
        super().__init__()
        self.net = nets.mlp(2, 4, 5)
        self.shift = torch.randn(5).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(x.new_zeros(2), 1.0).to_event(1))
            logits = self.net(z) + self.shift * torch.tensor([1.0, 2, 3, 4, 5]).to(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def with_constants():
    return Constant().double(), guides.Normal(nets.mlp(5, 4, 2 * 2)).double()


CASES = {
    "warm-up": maker(elbo.ELBO(beta=elbo.LinearWarmup(5))),
    "a constraint": maker(elbo.ELBO(beta=elbo.Constraint(max_distortion=2.0))),
    "dreg": maker(elbo.IWELBO(num_particles=3, gradient="dreg")),
    "vimco": maker(elbo.IWELBO(num_particles=3, gradient="vimco")),
    "clipped": maker(elbo.ELBO(), clip_norm=0.5),
    "AdamW": maker(optim=functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)),
    "momentum": maker(optim=functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)),
    "two groups": maker(
        optim=lambda ps: torch.optim.Adam([{"params": ps[:2], "lr": 0.1}, {"params": ps[2:]}])
    ),
    "batch norm": maker(build=with_batch_norm),
    "dropout": maker(build=with_dropout),
    "frozen": maker(build=with_frozen, clip_norm=0.5),
    "constants": maker(build=with_constants),
}


@pytest.mark.parametrize("name", CASES)
def test_each_member_is_its_lone_run(name):
    """The last batch is smaller, so there are two graphs."""
    runs = require_lone_runs(CASES[name])
    assert runs.reason is None and not runs.errors
    weights = [next(iter(model.parameters())) for model, _ in runs.pairs]
    assert not torch.equal(weights[0], weights[1])


def test_compiled_members_are_lone_runs():
    require_lone_runs(maker(elbo.ELBO(beta=elbo.LinearWarmup(3)), compile=True), batch_size=38)


def test_members_take_turns_where_told_to():
    runs = require_lone_runs(maker(), stack=False)
    assert runs.reason is None


def test_schedules_and_splits():
    """A schedule for each; rows binarised anew in each epoch, by the split's own seed."""
    pixels = data.Split(torch.rand(30, 5, dtype=torch.float64), binarize="dynamic", seed=3)
    halve = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    require_lone_runs(maker(), data=pixels, valid=None, batch_size=10, lr_scheduler=halve)


def test_a_member_that_has_stopped_moves_no_more():
    """Patience ends the members after different epochs, and each has its best parameters."""
    make = maker(optim=functools.partial(torch.optim.Adam, lr=0.15))
    runs = require_lone_runs(make, epochs=14, patience=1, seeds=range(4))
    lengths = {len(history.rows) for history in runs.histories}
    assert len(lengths) > 1 and min(lengths) < 14
    counted = runs.summary()["valid_bound"]["seeds"].tolist()
    assert counted[0] == 4 and counted[-1] < 4


class Fragile(Constant):
    """Its loss is infinite where a draw is next to zero."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.net(z) / (z.abs().amin(-1, keepdim=True) > 0.04)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def fragile():
    return own_guide(Fragile())


def own_guide(model):
    return model.double(), guides.Normal(nets.mlp(5, 4, 2 * 2)).double()


def test_a_step_that_is_not_finite_is_withheld_for_its_member_alone():
    make = maker(build=fragile, skip_nonfinite=True)
    runs = require_lone_runs(make, valid=None, batch_size=10)
    skipped = [history.column("skipped") for history in runs.histories]
    assert skipped[0] != skipped[1]
    for svi in runs.svis:
        assert 0 < svi.num_skipped < svi.num_steps
        assert all(torch.isfinite(p).all() for p in svi.objective.parameters())


def test_a_member_that_is_not_finite_ends_alone():
    calls = itertools.count()

    def make():
        svi = maker()()
        if next(calls) == 1:
            svi.optim = functools.partial(torch.optim.Adam, lr=1e300)
        return svi

    with pytest.warns(RuntimeWarning, match="seed 0 has ended, and the others go on: step 2: the"):
        runs = ppvae.fit_many(make, X, seeds=[4, 0, 11], epochs=3, batch_size=19, progress=False)
    assert list(runs.errors) == [0] and isinstance(runs.errors[0], ppvae.NonFiniteError)
    assert [len(history.rows) for history in runs.histories] == [3, 0, 3]
    assert "seed 0 has ended" in repr(runs)
    for seed, svi in [(4, runs.svis[0]), (11, runs.svis[2])]:
        alone, _ = lone(maker(), seed, data=X, epochs=3, batch_size=19)
        require_same(svi, alone)
    labels = [text.get_text() for text in runs.plot().get_legend().get_texts()]
    assert labels == ["each seed", "quartiles", "mean of 2 seeds, training ELBO"]


def test_it_raises_when_no_member_is_left():
    make = maker(optim=functools.partial(torch.optim.Adam, lr=1e300))
    with pytest.warns(RuntimeWarning, match="has ended"), pytest.raises(ppvae.NonFiniteError):
        ppvae.fit_many(make, X, seeds=[0, 1], epochs=2, progress=False)


@pytest.mark.parametrize("name", ["warm-up", "batch norm"])
def test_a_resumed_run_is_the_run_to_the_bit(name, tmp_path):
    """Also where the process died between the checkpoints of two members, within an epoch."""
    make, run = CASES[name], functools.partial(ppvae.fit_many, data=X, valid=VALID, progress=False)
    often = ppvae.Checkpoints(tmp_path, every_steps=2, keep=100)
    seeds = [4, 0, 11]
    whole = run(make, seeds=seeds, epochs=4, batch_size=16)
    first = run(make, seeds=seeds, epochs=2, batch_size=16, checkpoint=often)
    assert first.histories[0].rows[-1]["step"] == 6
    for seed, last in [(4, 6), (0, 4), (11, 2)]:
        for path in (tmp_path / f"seed-{seed}").glob("step-*.pt"):
            if int(path.stem.removeprefix("step-")) > last:
                path.unlink()
    resumed = run(make, seeds=seeds, epochs=4, batch_size=16, checkpoint=often, resume=True)
    for one, other in zip(whole.svis, resumed.svis, strict=True):
        require_same(one, other, exactly=True)
    for one, other in zip(whole.histories, resumed.histories, strict=True):
        assert one.column("train_objective") == other.column("train_objective")
        assert one.column("valid_bound") == other.column("valid_bound")


def test_a_checkpoint_of_a_member_is_one_of_its_lone_run(tmp_path):
    ppvae.fit_many(maker(), X, seeds=SEEDS, epochs=2, progress=False, checkpoint=tmp_path / "many")
    lone(maker(), 0, data=X, epochs=2, checkpoint=tmp_path / "lone")
    paths = [tmp_path / folder / "step-00000002.pt" for folder in ("many/seed-0", "lone")]
    sizes = [path.stat().st_size for path in paths]
    assert abs(sizes[0] - sizes[1]) < 2000  # it holds the member's own memory, not that of all
    shutil.rmtree(tmp_path / "lone")
    (tmp_path / "many/seed-0").rename(tmp_path / "lone")
    svi, history = lone(maker(), 0, data=X, epochs=4, checkpoint=tmp_path / "lone", resume=True)
    require_same(svi, lone(maker(), 0, data=X, epochs=4)[0])
    assert len(history.rows) == 4


def test_pairs_are_ordinary_ones(tmp_path):
    state = torch.get_rng_state()
    runs = ppvae.fit_many(maker(), X, seeds=SEEDS, epochs=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)  # the process's own stream is left alone
    for svi in runs.svis:
        for parameter in svi.objective.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * 8
            assert parameter.is_leaf and parameter.grad is None
    model, guide = runs.pairs[1]
    diagnostics.diagnose(model, guide, X, num_particles=25)
    ppvae.save(tmp_path / "pair", model, guide)
    before = [p.detach().clone() for p in runs.svis[0].objective.parameters()]
    runs.svis[1].step(X)
    ppvae.fit(runs.svis[1], X, epochs=1, progress=False)
    assert all(map(torch.equal, before, runs.svis[0].objective.parameters()))


# -- what cannot be stacked ------------------------------------------------------------------------
class Looks(Constant):
    def forward(self, x):
        if self.shift.sum().item() > 1e9:
            raise ValueError
        super().forward(x)


class Counts(Constant):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        super().forward(x)


class Gamma(ppvae.Program):
    def __init__(self):
        super().__init__()
        self.net = nets.mlp(5, 4, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a, b = self.net(x).exp().unsqueeze(-1).unbind(-2)
            pyro.sample("z", dist.Gamma(a, b).to_event(1))


class GammaModel(ppvae.Program):
    def __init__(self):
        super().__init__()
        self.net = nets.mlp(1, 4, 5)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_ones(1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


def beside():
    loss = elbo.FactorELBO(gamma=2.0, ratio=nets.mlp(2, 4, 1))
    svi = ppvae.SVI(*pair(), adam, loss)
    svi.objective.double()
    return svi


UNSTACKED = {
    "looks at a tensor's value": maker(build=lambda: own_guide(Looks())),
    "depends on a value": maker(build=lambda: (GammaModel().double(), Gamma().double())),
    "changes its 'calls'": maker(build=lambda: own_guide(Counts())),
    "stands beside": beside,
    "of Pyro": maker(pyro.infer.Trace_ELBO()),
}


@pytest.mark.parametrize("reason", UNSTACKED)
def test_members_that_cannot_be_stacked_take_turns(reason):
    with pytest.warns(RuntimeWarning, match="so the members take turns") as caught:
        runs = require_lone_runs(UNSTACKED[reason], "auto", epochs=2, batch_size=20)
    assert reason in runs.reason
    assert len([w for w in caught if "turns" in str(w.message)]) == 1
    with pytest.raises(ppvae.NotCompiled, match="stack=True, but"):
        ppvae.fit_many(UNSTACKED[reason], X, seeds=[0, 1], epochs=1, stack=True, progress=False)


@pytest.mark.parametrize("differ", ["size", "number"])
def test_other_structures_are_seen(differ):
    calls = itertools.count()

    def make():
        number = next(calls) % 2
        if differ == "size":
            return ppvae.SVI(*pair(hidden=5 + number), adam)
        scale = 1.0 + number
        build = lambda net: conditionals.Normal(net, scale=scale)  # noqa: E731
        return ppvae.SVI(*pair(likelihood=build), adam)

    with pytest.warns(RuntimeWarning, match="not of one structure"):
        require_lone_runs(make, "auto", seeds=[0, 1], epochs=1)


# -- what is refused ------------------------------------------------------------------------------
def test_refusals():
    def seeded():
        torch.manual_seed(0)
        return maker()()

    shared = nets.mlp(2, 6, 5)
    fit_many = functools.partial(ppvae.fit_many, data=X, epochs=1, progress=False)
    with pytest.raises(ValueError, match="make sets a seed itself"):
        fit_many(seeded, seeds=[0, 1])
    with pytest.raises(ValueError, match=r"share the parameter 'model.*freeze it"):
        fit_many(maker(build=lambda: pair(decoder=shared)), seeds=[0, 1])
    with pytest.raises(ValueError, match=r"different whole numbers >= 0, got \[1, 1\]"):
        fit_many(maker(), seeds=[1, 1])
    with pytest.raises(ValueError, match="got \\[\\]"):
        fit_many(maker(), seeds=[])
    with pytest.raises(TypeError, match=r"seeds takes whole numbers, such as range\(8\), got 8"):
        fit_many(maker(), seeds=8)
    with pytest.raises(
        TypeError, match=r"make must be a function that builds a ppvae.SVI, got SVI"
    ):
        fit_many(maker()(), seeds=[0])
    with pytest.raises(TypeError, match=r"make must build a ppvae.SVI, and returned tuple"):
        fit_many(pair, seeds=[0])
    with pytest.raises(ValueError, match='stack must be True, False or "auto"'):
        fit_many(maker(), seeds=[0], stack="always")
    with pytest.raises(TypeError, match="resume must be True or False"):
        fit_many(maker(), seeds=[0], resume="step-00000001.pt", checkpoint="runs")
    with pytest.raises(ValueError, match=r"a DataLoader has one order"):
        ppvae.fit_many(maker(), torch.utils.data.DataLoader(X), seeds=[0], epochs=1)
    with pytest.raises(ValueError, match="resume needs the folder"):
        fit_many(maker(), seeds=[0], resume=True)


def test_a_frozen_network_may_be_shared():
    shared = nets.mlp(2, 6, 5).double().requires_grad_(False)
    require_lone_runs(maker(build=lambda: pair(decoder=shared)))


# -- tables and plots -----------------------------------------------------------------------------
def test_summary_and_plot():
    curves = [[-9.0, -8.0, -7.0], [-8.0, -6.0, -6.5], [-10.0, -7.0]]
    histories = [
        ppvae.History("ELBO", [{"epoch": i + 1, "valid_bound": b} for i, b in enumerate(curve)])
        for curve in curves
    ]
    runs = ppvae.Histories([3, 5, 7], [None] * 3, histories)
    summary = runs.summary()
    assert summary["valid_bound"]["mean"].tolist() == [-9.0, -7.0, -6.75]
    assert summary["valid_bound"]["quartile_1"].tolist() == [-9.5, -7.5, -6.875]
    assert summary["valid_bound"]["seeds"].tolist() == [3, 3, 2]
    assert runs.frame()["seed"].tolist() == [3, 3, 3, 5, 5, 5, 7, 7]
    assert isinstance(runs.frame(), pandas.DataFrame)
    ax = runs.plot()
    mean = ax.lines[-1].get_ydata()
    assert mean.tolist() == [-9.0, -7.0] and math.isclose(ax.lines[2].get_ydata()[1], -7.0)
    with pytest.raises(ValueError, match="curves is empty"):
        ppvae.plots.seed_curves([])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "no epoch yet" in repr(ppvae.Histories([0], [None], [ppvae.History("ELBO")]))


def test_what_is_measured_of_each_seed():
    """A table as compare makes, words in it; a member that an error has ended is left out."""
    programs = [SimpleNamespace(model=scale, guide=1.0) for scale in (1.0, 3.0, 5.0, 1e6)]
    histories = [ppvae.History("ELBO")] * 4
    runs = ppvae.Histories([0, 1, 2, 3], programs, histories, {3: FloatingPointError("nan")})

    def measure(model, guide):
        rows = pandas.Index(["second", "first"], name="estimator")
        return pandas.DataFrame(
            {"family": ["a", "b"], "bound": [model, model + guide], "n": [1, 2]}, rows
        )

    table = runs.over_seeds(measure)
    assert table.index.tolist() == ["second", "first"] and table.index.name == "estimator"
    assert table.columns.get_level_values(0).unique().tolist() == ["bound", "n"]
    assert table["bound"].loc["first"].tolist() == [3, 4.0, 3.0, 4.0, 5.0]
    assert table["bound"]["mean"].tolist() == [3.0, 4.0]
    one = runs.over_seeds(lambda model, guide: {"scale": model})
    assert one["scale"].loc[0].tolist() == [3, 3.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("turned", [False, True])
def test_batches_of_large_products_are_taken_apart(monkeypatch, turned):
    monkeypatch.setattr(passes, "onednn_is_faster", lambda differentiates: True)
    monkeypatch.setattr(passes, "MIN_PRODUCT", 1)
    monkeypatch.setattr(passes, "MIN_OF_BATCH", 40 * 30 * 20)
    seen = []

    def noting(traced):
        apart(traced)
        seen.extend(str(node.target) for node in traced.graph.nodes)

    apart = passes._take_batches_apart
    monkeypatch.setattr(passes, "_take_batches_apart", noting)
    x = torch.randn(3, 40, 30) if not turned else torch.randn(3, 30, 40).mT
    w, small = torch.randn(3, 20, 30), torch.randn(3, 20, 4)
    graph = Graph(lambda x, w, small: [h := x @ w.mT, h @ small], [x, w, small])
    torch.testing.assert_close(list(graph(x, w, small)), [x @ w.mT, x @ w.mT @ small])
    assert seen.count("aten.mm.default") == 3 and seen.count("aten.bmm.default") == 1
