"""Global and local latents together: one draw of what lies outside the plate "data", K of the rest.

The oracle is a hierarchical normal, g ~ N(0, 2), z_n ~ N(g, 1), x_n ~ N(z_n, 0.5).
"""

import functools
import inspect
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import oracles
import ppvae
from oracles import assert_below, assert_mean, trainable
from ppvae import diagnostics, elbo, guides
from ppvae.processes import Processes
from registry import ALL_ESTIMATORS, GLOBAL, build

pytestmark = pytest.mark.usefixtures("float64")
X = torch.tensor([-1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
EVIDENCE = -9.256114662  # log p(X)
MEAN, SD = 1.2 / 1.15, 0.538381903  # of g given X
WIDE = -9.338750398  # the bound with that sd times 1.3, for every K: the locals are exact


class Model(nn.Module):
    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(0.0, self.scale))
        with plate(x, self.size):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Guide(nn.Module):
    """The exact posterior, but for factors on the sds, and a weaker tie of z to g."""

    def __init__(
        self, wide: float = 1.0, local: float = 1.0, tie: float = 0.2, size: int | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.loc, self.sd = nn.Parameter(torch.tensor(MEAN)), nn.Parameter(torch.tensor(SD * wide))
        self.tie, self.slope = nn.Parameter(torch.tensor(tie)), nn.Parameter(torch.tensor(0.8))
        self.local = nn.Parameter(torch.tensor(0.2**0.5 * local))

    def forward(self, x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(self.loc, self.sd))
        with plate(x, self.size):
            pyro.sample("z", dist.Normal(self.tie * g + self.slope * x, self.local))


def plate(x: Tensor, size: int | None) -> pyro.plate:
    return pyro.plate("data", size or len(x), subsample=None if size is None else x)


def losses(estimator, model, guide, x: Tensor, draws: int, num_rows: int | None = None) -> Tensor:
    """Minus independent losses, ``(draws,)``."""
    objective = estimator(model, guide)
    objective.num_rows = num_rows
    with torch.no_grad():
        return torch.stack([-objective(x) for _ in range(draws)])


OF_ROWS = ("gdreg", "vargrad", "disarm", "straight_through", "gumbel")
ESTIMATORS = [
    elbo.ELBO(),
    elbo.ELBO(3),
    elbo.ELBO(3, "stl"),
    elbo.IWELBO(3),
    elbo.IWELBO(3, "dreg"),
    elbo.MIWELBO(2, num_groups=2),
    elbo.CIWELBO(3),
    elbo.RenyiELBO(3),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_with_the_exact_posterior_each_bound_is_the_evidence(estimator: elbo.Estimator) -> None:
    found = losses(estimator, Model(), Guide(), X, 5)
    torch.testing.assert_close(found, torch.full((5,), EVIDENCE), rtol=0, atol=2e-6)
    if estimator.gradient in ("stl", "dreg"):
        guide = Guide()
        estimator(Model(), guide)(X).backward()
        assert all(p.grad.abs() < 3e-5 for p in guide.parameters())  # SD has nine digits


@pytest.mark.parametrize(
    "estimator",
    [elbo.IWELBO(2, g) for g in elbo.IWELBO.gradients]
    + [elbo.ELBO(2, g) for g in elbo.ELBO.gradients],
    ids=repr,
)
def test_a_gradient_is_that_of_globals_too_or_says_that_it_is_none(estimator) -> None:
    objective = estimator(Model(), Guide(1.3))
    if estimator.gradient in OF_ROWS:
        match = f"gradient=.{estimator.gradient}. is defined for latents of rows, and .'g'. are"
        with pytest.raises(ValueError, match=f'{match}.*"pathwise", or "score"'):
            objective(X)
    else:
        assert objective(X).isfinite()


@pytest.mark.parametrize("K", [1, 5])
def test_too_wide_a_global_costs_the_same_for_each_k(K: int) -> None:
    assert_mean(losses(elbo.IWELBO(K), Model(), Guide(1.3), X, 400), WIDE)


def test_the_bound_rises_with_k_up_to_that_of_exact_locals() -> None:
    one, many = (losses(elbo.IWELBO(K), Model(), Guide(1.3, 1.8, 0.0), X, 300) for K in (1, 30))
    assert one.mean() + 4 * one.std() / 300**0.5 < many.mean()
    assert_below(many, WIDE)


@pytest.mark.parametrize("draws", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_value_and_gradient_of_the_elbo(K: int, gradient: str, draws: int) -> None:
    """Against the closed form, off the optimum."""
    model, guide = Model(), Guide(1.3, 1.5, 0.1)

    def exact() -> Tensor:
        g2 = guide.sd.square() + guide.loc.square()
        prior = -model.scale.log() - g2 / (2 * model.scale.square())
        entropy = guide.sd.log() + 0.5 + len(X) * (guide.local.log() + 0.5)
        mean = guide.tie * guide.loc + guide.slope * X
        var = (guide.tie * guide.sd).square() + guide.local.square()
        away = (mean - guide.loc).square() + ((guide.tie - 1) * guide.sd).square()
        away = away + guide.local.square()
        fit = (X - mean).square() + var
        constant = -0.5 * math.log(2 * math.pi)
        rows = constant - away / 2 + constant - math.log(0.5) - 2 * fit
        return prior + entropy + rows.sum() + len(X) * -constant

    parameters = trainable(model, guide)
    value = exact()
    assert_mean(losses(elbo.ELBO(K), model, guide, X, draws), value.detach())
    objective = elbo.ELBO(K, gradient)(model, guide)
    found = oracles.gradients(lambda: -objective(X), parameters, draws)
    assert_mean(found, oracles.exact_gradient(value, parameters), gradient)


@pytest.mark.parametrize("kl", ["analytic", "mixed"])
def test_the_closed_form_covers_globals(kl: str) -> None:
    """Given the draws, the globals' part of the loss is their KL, and beta weighs the locals'."""
    model, guide = Model(), Guide(1.3, 1.5, 0.1)
    q, p = dist.Normal(guide.loc, guide.sd), dist.Normal(0.0, model.scale)
    exact = torch.distributions.kl_divergence(q, p)
    torch.manual_seed(1)
    whole = elbo.ELBO(3, kl=kl, beta=2.0)(model, guide)(X)
    torch.manual_seed(1)
    weights = ppvae.log_weights(model, guide, X, num_particles=3)
    likelihood = weights.log_p["x"].mean(0)
    g = weights.guide_trace.nodes["g"]["value"]
    of_rows = dist.Normal(guide.tie * g + guide.slope * X, guide.local), dist.Normal(g, 1.0)
    local = torch.distributions.kl_divergence(*of_rows)
    torch.testing.assert_close(whole, -(likelihood - 2 * local).sum() + exact)


def test_the_jacobian_of_an_automatic_guide_counts_in_a_mixed_kl() -> None:
    """Its Delta has a density, which Pyro's closed form of KL(Delta || p) leaves out."""

    def model(x: Tensor) -> None:
        sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(rate, sd), obs=x)

    guide, found = AutoNormal(model), []
    for kl in ("sampled", "mixed"):
        torch.manual_seed(0)
        found.append(elbo.ELBO(2, kl=kl)(model, guide)(X))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("draws", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", [(1.3, 1.5, 0.1), (1.2, 1.5, 0.0)])
def test_dreg_has_the_mean_of_the_pathwise_gradient(pair, draws: int) -> None:
    """With locals that depend on g and without: g's own slope keeps the plain coefficients."""
    model, guide = Model(), Guide(*pair)
    parameters = trainable(model, guide)
    both = [
        oracles.gradients(lambda e=e: e(model, guide)(X), parameters, draws)
        for e in (elbo.IWELBO(4), elbo.IWELBO(4, "dreg"))
    ]
    assert_mean(both[0] - both[1], torch.zeros(len(parameters)))


# ------------------------------------------------------------------------------ minibatches


@pytest.mark.parametrize("draws", [80, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["num_rows", "plate"])
@pytest.mark.parametrize("estimator", [elbo.ELBO(2), elbo.ELBO(2, "stl"), elbo.IWELBO(2)], ids=repr)
def test_minibatches_have_the_mean_of_all_data(way: str, estimator, draws: int) -> None:
    size = 4 if way == "plate" else None
    model, guide = Model(size), Guide(1.3, 1.5, 0.1, size)
    parameters = trainable(model, guide)
    objective = estimator(model, guide)
    objective.num_rows = None if way == "plate" else 4
    share = 1.0 if way == "plate" else 2.0  # a batch by hand is a sum over its rows

    def of(rows: Tensor) -> Tensor:
        values = share ** (len(rows) < 4) * objective(X[rows])
        grads = torch.autograd.grad(values, parameters)
        return torch.stack([values.detach(), *(grad for grad in grads)])

    full = torch.stack([of(torch.arange(4)) for _ in range(draws)])
    few = torch.stack([of(torch.randperm(4)[:2]) for _ in range(draws)])
    assert_mean(full - few, torch.zeros(1 + len(parameters)))


def test_a_batch_by_hand_is_a_sum_over_its_rows() -> None:
    """The globals' terms are shared out over the rows of the data set."""
    model, guide = Model(), Guide()
    torch.manual_seed(3)
    loss = elbo.ELBO()(model, guide)
    loss.num_rows = 40
    found = loss(X)
    torch.manual_seed(3)
    weights = ppvae.log_weights(model, guide, X)
    torch.testing.assert_close(-found, weights.log_w.sum() + weights.log_global / 10)


def test_a_plate_and_num_rows_that_differ_are_refused() -> None:
    objective = elbo.ELBO()(Model(8), Guide(size=8))
    objective.num_rows = 40
    with pytest.raises(ValueError, match="plate 'data' has 8 rows, and there are num_rows=40"):
        objective(X)


def test_steps_by_hand_ask_for_the_number_of_rows() -> None:
    with pytest.raises(ppvae.PairError, match=r"global latents \(g\).*SVI\(num_rows=len\(x\)\)"):
        ppvae.SVI(Model(), Guide()).step(X)
    ppvae.SVI(Model(), Guide(), num_rows=4).step(X)
    ppvae.SVI(Model(8), Guide(size=8)).step(X)  # the plate says it
    with pytest.raises(ValueError, match="num_rows must be at least 1"):
        ppvae.SVI(Model(), Guide(), num_rows=0)


def test_fit_finds_the_posterior_from_minibatches() -> None:
    """Forgetting how many rows there are would double the sd of the global latent."""
    model, guide = Model(), Guide(1.5, 1.5, 0.0)
    model.requires_grad_(False)
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(8, "stl"))
    slower = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.98)
    history = ppvae.fit(svi, X, epochs=200, batch_size=2, progress=False, lr_scheduler=slower)
    assert svi.num_rows == 4
    assert abs(guide.sd / SD - 1) < 0.05 and abs(guide.loc - MEAN) < 0.03
    assert abs(guide.tie - 0.2) < 0.01 and abs(guide.slope - 0.8) < 0.01
    objective = [4 * row["train_objective"] for row in history.rows[-50:]]  # with the globals'
    assert_mean(torch.tensor(objective), EVIDENCE)


# ------------------------------------------------------------------------------ programs


def in_plates(x: Tensor, draw=lambda name, fn: pyro.sample(name, fn)) -> tuple[Tensor, Tensor]:
    """A scalar, an event, and a plate of its own."""
    scale = draw("scale", dist.LogNormal(torch.zeros(()), 0.3))
    shift = draw("shift", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("features", 3):
        slope = draw("slope", dist.Normal(torch.zeros(()), 1.0))
    return scale, shift + slope


@pytest.mark.parametrize("K", [1, 3])
def test_scalars_events_and_plates_are_summed_whole(K: int) -> None:
    def model(x: Tensor) -> None:
        scale, shift = in_plates(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        in_plates(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = torch.randn(5, 3)
    weights = ppvae.log_weights(model, guide, x, num_particles=K)
    nodes = weights.guide_trace.nodes
    drawn = {name: nodes[name]["value"] for name in ("scale", "shift", "slope", "z")}
    assert [drawn[n].shape for n in ("scale", "shift", "slope")] == [(), (3,), (3,)]
    assert drawn["z"].shape == ((K, 5, 3) if K > 1 else (5, 3))
    standard = dist.Normal(0.0, 1.0)
    exact = standard.log_prob(drawn["slope"]).sum().item()
    assert weights.global_p["slope"].item() == pytest.approx(exact)
    assert weights.log_global == pytest.approx(0.0, abs=1e-12)
    z = drawn["z"]
    ratio = standard.log_prob(z) - dist.Normal(x / 2, 1.0).log_prob(z)
    mean = z + drawn["shift"] + drawn["slope"]
    by_hand = (ratio + dist.Normal(mean, drawn["scale"]).log_prob(x)).sum(-1)
    torch.testing.assert_close(weights.log_w, by_hand.reshape(K, 5))
    assert ppvae.check_pair(model, guide, x).gradients["pathwise"] == ""


def test_a_local_class_is_summed_out_given_the_globals() -> None:
    """log w_n is that of the mixture at the drawn means; no particle of them."""
    logits = torch.tensor([0.2, -0.1, 0.4])

    def means() -> Tensor:
        return pyro.sample("means", dist.Normal(torch.zeros(3), 2.0).to_event(1))

    def model(x: Tensor) -> None:
        found = means()
        with pyro.plate("data", len(x)):
            how = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Categorical(logits=logits), infer=how)
            pyro.sample("x", dist.Normal(found[c], 0.5), obs=x)

    weights = ppvae.log_weights(model, lambda x: means(), X, num_particles=4)
    drawn = weights.guide_trace.nodes["means"]["value"]
    exact = logits.log_softmax(0) + dist.Normal(drawn, 0.5).log_prob(X[:, None])
    torch.testing.assert_close(weights.log_w, exact.logsumexp(1).expand(4, 4))


@pytest.mark.parametrize("draws", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_discrete_local_is_scored_beside_a_global(draws: int) -> None:
    """score and vimco: means against enumeration, with a class whose law depends on g."""

    class Program(nn.Module):
        def __init__(self, observes: bool, enumerate: str | None) -> None:
            super().__init__()
            self.observes, self.infer = observes, {"enumerate": enumerate}
            self.loc, self.slope = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> None:
            g = pyro.sample("g", dist.Normal(self.loc, 0.5))
            with pyro.plate("data", len(x)):
                logits = self.slope * g + (0.0 if self.observes else x)
                c = pyro.sample("c", dist.Bernoulli(logits=logits), infer=self.infer)
                if self.observes:
                    pyro.sample("x", dist.Normal(c + g, 1.0), obs=x)

    pairs = [(Program(True, how), Program(False, how)) for how in (None, "parallel")]
    found = [
        oracles.gradients(lambda p=pair, e=e: e(*p)(X), trainable(*pair), draws)
        for pair, e in zip(pairs, (elbo.ELBO(4, "score"), elbo.ELBO(4)), strict=True)
    ]
    assert_mean(found[0] - found[1], torch.zeros(4))


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_of_globals_alone(make) -> None:
    """Bayesian regression has no local latents; a guide in coordinates of the real line, too."""

    def model(x: Tensor) -> None:
        sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_ones(len(x), 2) @ slope, sd), obs=x)

    guide = make(model)
    for estimator in (elbo.ELBO(), elbo.IWELBO(3), elbo.ELBO(2, "stl")):
        torch.manual_seed(0)
        ours = estimator(model, guide)(X).item()
        torch.manual_seed(0)
        assert ours == pytest.approx(Trace_ELBO().loss(model, guide, X), rel=1e-10)


# ------------------------------------------------------------------------------ runs

ADAM = functools.partial(torch.optim.Adam, lr=0.02)


def run(estimator: elbo.Estimator, compile: bool = False, **options) -> tuple[list[float], list]:
    """The parameters and the history of a short run."""
    pyro.set_rng_seed(0)
    svi = ppvae.SVI(Model(), Guide(1.3, 1.5, 0.1), ADAM, estimator, compile=compile)
    options = {"epochs": 3, "batch_size": 2, "valid": X, "progress": False, **options}
    history = ppvae.fit(svi, X, **options)
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]
    return [p.item() for p in svi.objective.parameters()], rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [elbo.IWELBO(3), elbo.IWELBO(3, "dreg"), elbo.ELBO(3, "stl"), elbo.ELBO(2, kl="analytic")],
    ids=repr,
)
def test_compiled_steps_are_the_eager_ones(estimator: elbo.Estimator) -> None:
    eager, compiled = run(estimator), run(estimator, compile=True)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-12)


@pytest.mark.slow
def test_a_graph_is_of_one_number_of_rows() -> None:
    svi = ppvae.SVI(Model(), Guide(), ADAM, compile=True, num_rows=4)
    svi.step(X[:2])
    ppvae.fit(svi, X.repeat(2), epochs=1, batch_size=2, progress=False)
    guide = Guide()
    again = ppvae.SVI(Model(), guide, ADAM, num_rows=8)
    again.load_state_dict(svi.state_dict())
    losses = []
    for one in (svi, again):
        torch.manual_seed(0)
        losses.append(one.step(X[:2]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


class Crash(ppvae.Callback):
    def on_step_end(self, svi: ppvae.SVI, loss: Tensor) -> None:
        if svi.num_steps == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_is_the_run(tmp_path) -> None:
    estimator = elbo.IWELBO(3, "dreg")
    expected = run(estimator, checkpoint=tmp_path / "whole")
    files = ppvae.Checkpoints(tmp_path / "crashed", every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run(estimator, checkpoint=files, callbacks=[Crash()])
    assert run(estimator, checkpoint=files, resume=True) == expected


class Points(nn.Module):
    """A point for g, and no other latent, so that a step is a function of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> None:
        pyro.sample("g", dist.Delta(self.g))


def at_points(fabric=None) -> list[float]:
    model, _ = pair_with(lambda x: pyro.sample("g", dist.Normal(0.0, 2.0)))
    guide = Points()
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.SGD, lr=0.1))
    x = torch.linspace(-1, 3, 10)
    history = ppvae.fit(svi, x, epochs=2, batch_size=5, progress=False, fabric=fabric)
    return [guide.g.item(), *(row["train_objective"] for row in history.rows)]


def on_each_rank(fabric) -> bytes:
    torch.set_default_dtype(torch.float64)
    return pickle.dumps(Processes(fabric).gather(at_points(fabric)))


@pytest.mark.forks
def test_two_processes_share_the_globals_terms_out() -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(
        accelerator="cpu", devices=2, strategy="ddp_fork"
    )
    for found in pickle.loads(fabric.launch(on_each_rank)):
        assert found == pytest.approx(at_points(), rel=1e-6)


# ------------------------------------------------------------------------------ evaluation


def exact_predictive(new: Tensor) -> Tensor:
    return dist.Normal(MEAN, math.sqrt(SD**2 + 1.25)).log_prob(new)


def test_the_predictive_density_of_new_rows() -> None:
    new = torch.tensor([1.7, -2.0, 0.0])
    assert exact_predictive(new)[0].item() == pytest.approx(-1.274737672, abs=1e-8)
    found = diagnostics.log_predictive(
        Model(), Guide(), new, num_globals=250, num_particles=1, seed=0
    )
    assert ((found.log_density - exact_predictive(new)).abs() < 4.5 * found.se).all()
    assert (found.se < 0.15).all() and found.mean == found.log_density.mean().item()
    pieces = diagnostics.log_predictive(
        Model(), Guide(), new, num_globals=100, num_particles=3, max_rows=2, seed=0
    )  # of one draw of g for all of a row's pieces: the locals are exact, so pieces change nothing
    assert ((pieces.log_density - exact_predictive(new)).abs() < 4.5 * pieces.se).all()


def test_the_evidence_of_all_rows() -> None:
    exact = diagnostics.joint_evidence(Model(), Guide(), X, num_globals=30, num_particles=2, seed=0)
    assert exact.log_evidence == pytest.approx(EVIDENCE, abs=2e-6) and exact.se < 1e-6
    guide = Guide(1.4, 1.3, 0.1)
    found = diagnostics.joint_evidence(Model(), guide, X, num_globals=500, num_particles=20, seed=1)
    assert abs(found.log_evidence - EVIDENCE) < 4.5 * found.se < 0.3
    assert found.elbo < EVIDENCE and found.khat < 0.7 and 1 < found.ess < 500
    q, p = dist.Normal(MEAN, 1.4 * SD), dist.Normal(0.0, 2.0)
    assert found.kl["g"] == pytest.approx(dist.kl.kl_divergence(q, p).item(), abs=0.15)
    row = found.table.loc["g"]
    assert row["sd"] == pytest.approx(1.4 * SD, rel=0.15)
    assert row["weighted_sd"] == pytest.approx(SD, rel=0.15)
    assert row["weighted_mean"] == pytest.approx(MEAN, abs=4 * SD / found.ess**0.5)
    assert "log p(X)" in repr(found)


def test_the_inner_estimates_are_unbiased() -> None:
    """The mean of p^(X) is p(X) with one particle, too."""
    found = diagnostics.joint_evidence(
        Model(), Guide(1.3, 1.2, 0.1), X, num_globals=800, num_particles=1, seed=2
    )
    assert_mean((found.log_weights - EVIDENCE).exp(), 1.0)


def test_every_piece_of_the_rows_is_at_the_same_draw() -> None:
    """Pieces at draws of their own would estimate the product of the rows' evidences."""
    whole, cut = (
        diagnostics.joint_evidence(
            Model(), Guide(), X, num_globals=25, num_particles=2, max_rows=rows, seed=0
        )
        for rows in (100, 1)
    )
    torch.testing.assert_close(cut.log_weights, whole.log_weights, rtol=0, atol=1e-5)


def positive(x: Tensor) -> None:
    sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
    with pyro.plate("features", 2):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(slope.sum(), sd), obs=x)


def test_an_automatic_guide_is_evaluated_by_its_noise() -> None:
    guide = AutoMultivariateNormal(positive, init_scale=0.6)
    assert ppvae.check_pair(positive, guide, X).notes == ()
    guide.loc.data = torch.tensor([0.4, 0.5, 0.5])
    sd = torch.linspace(-3, 4, 4001).exp()
    of_sum = [dist.MultivariateNormal(X * 0, 2.0 + torch.eye(4) * s**2).log_prob(X) for s in sd]
    heights = torch.stack(of_sum) + dist.Normal(0.0, 0.5).log_prob(sd.log())
    exact = torch.trapezoid(heights.exp(), sd.log()).log().item()
    found = diagnostics.joint_evidence(positive, guide, X, num_globals=600, num_particles=1, seed=3)
    assert abs(found.log_evidence - exact) < 4.5 * found.se < 0.5
    assert list(found.table.index) == ["sd", "slope[0]", "slope[1]"] and list(found.kl) == [
        "sd+slope"
    ]
    model, local = diagnostics.given_globals(positive, guide, X, seed=0)
    assert ppvae.log_weights(model, local, X).log_global is None


def test_a_report_is_of_the_rows_given_draws_and_has_the_globals_beside() -> None:
    """With exact locals each column is a closed form at the draws that the report shows."""
    report = ppvae.diagnose(Model(), Guide(1.3), X, num_particles=50, num_globals=40, seed=0)
    joint, g = report.joint, report.joint.draws["g"][:, None]
    exact = dist.Normal(g, math.sqrt(1.25)).log_prob(X)
    q = dist.Normal((g + 4 * X) / 5, 0.2**0.5)
    kl = dist.kl.kl_divergence(q, dist.Normal(g, 1.0))
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    close(report.log_evidence, exact.mean(0)), close(report.elbo, exact.mean(0))
    close(report.log_evidence_se, exact.std(0) / 40**0.5), close(report.kl["z"], kl.mean(0))
    assert report.mean_mc_se == pytest.approx(exact.mean(1).std().item() / 40**0.5, abs=1e-6)
    close(report.posterior_mean["z"][:, 0], q.mean.mean(0))
    close(report.activity["z"][0], 0.64 * X.var())
    second = (q.mean.square() + 0.2).mean()
    close(report.marginal_sd["z"][0], (second - q.mean.mean().square()).sqrt())
    ratio = dist.Normal(0.0, 2.0).log_prob(g) - dist.Normal(MEAN, 1.3 * SD).log_prob(g)
    close(joint.log_global, ratio[:, 0]), close(joint.log_weights, ratio[:, 0] + exact.sum(1))
    assert abs(joint.log_evidence - EVIDENCE) < 4.5 * joint.se < 0.5
    assert set(report.absent) >= {"mutual information", "divergence over simulations"}
    shown = repr(report)
    row = f"\ng {joint.table.loc['g', 'mean']:.3f} {joint.table.loc['g', 'sd']:.3f} "
    for said in ("40 draws of the globals", "log p(X) of all rows", "KL of global 'g'", row):
        assert said in shown
    assert report.verdict[0].startswith("k-hat <= 0.7 of the globals: log p(X)")
    for refused in (report.to_arviz, report.to_elpd):
        with pytest.raises(ValueError, match=r"diagnostics\.to_arviz"):
            refused()


def test_a_report_has_means_over_the_draws_and_the_worst_khat(tmp_path) -> None:
    """Against the pair at one draw after the other, with locals that miss for some draws."""
    model, guide = Model(), Guide(1.4, 0.5, 0.0)
    report = ppvae.diagnose(model, guide, X, num_particles=60, num_globals=4, seed=1)
    torch.manual_seed(1)
    each = []
    for _ in range(4):
        pair = diagnostics.given_globals(model, guide, X)
        each.append(diagnostics.log_evidence(*pair, X, num_particles=60))
    by_draw = {n: torch.stack([getattr(e, n) for e in each]) for n in ("khat", "gap", "ess")}
    assert (by_draw["khat"].amax(0) - by_draw["khat"].mean(0) > 0.05).all()  # they differ
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    close(report.khat, by_draw["khat"].amax(0)), close(report.ess, by_draw["ess"].mean(0))
    close(report.gap, by_draw["gap"].mean(0)), close(report.gap_se, by_draw["gap"].std(0) / 2)
    assert "4 draws of the globals are too few for their k-hat" in report.verdict[0]
    page = report.to_html(tmp_path / "page.html").read_text()
    assert '<table id="globals">' in page and "log p(x | g)" in page
    assert f'data-value="{report.joint.table.loc["g", "weighted_sd"]}"' in page


def test_a_point_mass_has_no_evidence() -> None:
    """Its log q is 0, so that the density of data and point would be called log p(X)."""
    model, _ = pair_with(lambda x: pyro.sample("g", dist.Normal(0.0, 1.0)))
    for evaluate in (diagnostics.joint_evidence, ppvae.diagnose, diagnostics.to_arviz):
        with pytest.raises(ValueError, match="'g' is a point mass in the guide"):
            evaluate(model, AutoDelta(model), X)
    diagnostics.log_predictive(model, AutoDelta(model), X)  # p(x | the point)

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    for make in (AutoNormal, AutoMultivariateNormal):
        guide = guides.Global(make, Model(), X, local=local)
        with pytest.raises(ValueError, match="'z' is a point mass in the guide"):
            diagnostics.log_predictive(Model(), guide, X)


def test_a_pair_at_one_draw_is_an_ordinary_one() -> None:
    pair = diagnostics.given_globals(Model(), Guide(1.3), X, seed=0)
    report = ppvae.diagnose(*pair, X, num_particles=50, seed=0)
    assert (report.khat <= 0).all() and set(report.kl) == {"z"}
    torch.manual_seed(0)
    weights = ppvae.log_weights(Model(), Guide(1.3), X)
    g = weights.guide_trace.nodes["g"]["value"]
    exact = dist.Normal(g, math.sqrt(1.25)).log_prob(X)
    torch.testing.assert_close(report.log_evidence, exact.detach(), rtol=0, atol=1e-6)


def test_samplers_of_a_pair_at_one_draw_leave_its_globals_alone() -> None:
    """Pyro's NUTS looks at sites of the model itself; z given g and x is a normal."""
    model, guide = diagnostics.given_globals(Model(), Guide(1.3), X, seed=0)
    torch.manual_seed(0)
    g = ppvae.log_weights(Model(), Guide(1.3), X).guide_trace.nodes["g"]["value"].detach()
    for found in (
        diagnostics.nuts(model, X, num_chains=2, num_warmup=150, num_draws=300, seed=0),
        diagnostics.hmc(model, guide, X, num_draws=300, seed=0),
    ):
        off = found.draws["z"].mean((0, 1)) - (g + 4 * X) / 5
        assert (off.abs() < 5 * (0.2 / found.ess) ** 0.5).all()


def test_pairs_without_globals_are_sent_back() -> None:
    pair = diagnostics.given_globals(Model(), Guide(), X, seed=0)
    for evaluate in (diagnostics.log_predictive, diagnostics.joint_evidence):
        with pytest.raises(ValueError, match=r"no latents outside the plate 'data'.*log_evidence"):
            evaluate(*pair, X)
    with pytest.raises(ValueError, match="num_globals must be at least 2"):
        diagnostics.log_predictive(Model(), Guide(), X, num_globals=1)


def test_the_validation_bound_is_that_of_new_rows() -> None:
    """A mean over q(g) of log p(x | g), below the log of the mean."""
    found = torch.stack([elbo.IWELBO(2).evaluate(Model(), Guide(), X) for _ in range(150)])
    mean = dist.Normal(MEAN, math.sqrt(1.25)).log_prob(X) - SD**2 / 2.5
    assert_mean(found, mean)
    assert (mean < exact_predictive(X)).all()


@pytest.mark.parametrize("draws", [150, pytest.param(2500, marks=pytest.mark.slow)])
def test_leave_one_out_by_arviz_is_right(draws: int) -> None:
    """With the locals integrated; of log p(x | z, g) it would be far off."""
    import arviz

    x = torch.linspace(-2.0, 4.0, 25)
    precision = 1 / 4 + len(x) / 1.25
    guide = Guide()
    guide.loc.data, guide.sd.data = x.sum() / 1.25 / precision, torch.tensor(precision**-0.5)
    idata = diagnostics.to_arviz(Model(), guide, x, num_draws=draws, num_particles=2, seed=0)
    log_p = idata.log_likelihood["x"]
    assert log_p.dims == ("chain", "draw", "datapoint") and log_p.shape == (1, draws, 25)
    assert idata.posterior["g"].dims == ("chain", "draw")
    assert idata.posterior["z"].dims == idata.posterior_predictive["x"].dims == log_p.dims
    assert idata.sample_stats["log_weight"].dims == ("chain", "draw")
    assert float(idata.sample_stats["log_weight"].std()) < 1e-5
    g = torch.from_numpy(idata.posterior["g"].values)[0]
    exact_rows = dist.Normal(g[:, None], math.sqrt(1.25)).log_prob(x)
    torch.testing.assert_close(torch.from_numpy(log_p.values)[0], exact_rows, rtol=0, atol=1e-6)
    left = precision - 1 / 1.25
    mean = (x.sum() - x) / 1.25 / left
    exact = dist.Normal(mean, (1 / left + 1.25) ** 0.5).log_prob(x).sum().item()
    ratios = (-exact_rows).exp()
    se = (ratios / ratios.mean(0)).sum(1).std().item() / draws**0.5  # the rows share their draws
    found = arviz.loo(idata)
    elpd = float(getattr(found, "elpd_loo", getattr(found, "elpd", None)))
    assert elpd == pytest.approx(exact, abs=4.5 * se) and se < 3 / draws**0.5


def test_leave_one_out_of_a_regression_is_exact_with_locals_integrated_only() -> None:
    """Slopes are global, a row's mean is its own; of log p(x | z) every row explains itself."""
    import arviz

    a = torch.stack([torch.ones(30), torch.linspace(-1.5, 1.5, 30)], 1)
    torch.manual_seed(4)
    x = a @ torch.tensor([0.5, -1.0]) + 1.25**0.5 * torch.randn(30)
    precision = (4 * a @ a.T + 1.25 * torch.eye(30)).inverse()
    exact = dist.Normal(x - precision @ x / precision.diagonal(), precision.diagonal() ** -0.5)
    exact = exact.log_prob(x)  # of each row given all others
    of_slopes = (torch.eye(2) / 4 + a.T @ a / 1.25).inverse()
    q = dist.MultivariateNormal(of_slopes @ a.T @ x / 1.25, of_slopes)

    def model(x: Tensor, a: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(a @ w, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor, a: Tensor) -> None:
        w = pyro.sample("w", q)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((a @ w + 4 * x) / 5, 0.2**0.5))

    idata = diagnostics.to_arviz(model, guide, x, a, num_draws=400, num_particles=2, seed=0)
    w = torch.from_numpy(idata.posterior["w"].values)[0]
    ratios = (-dist.Normal(w @ a.T, math.sqrt(1.25)).log_prob(x)).exp()
    se = (ratios / ratios.mean(0)).std(0) / 400**0.5

    def loo(source) -> tuple[Tensor, Tensor]:
        found = arviz.loo(source, pointwise=True)
        points = next(getattr(found, n) for n in ("loo_i", "elpd_i") if hasattr(found, n))
        return torch.from_numpy(points.values), torch.from_numpy(found.pareto_k.values)

    by_row, k = loo(idata)
    assert ((by_row - exact).abs() < 4.5 * se + 0.01).all() and k.max() < 0.5  # it smooths
    assert abs(by_row.sum() - exact.sum()) < 0.5
    z = torch.from_numpy(idata.posterior["z"].values)
    wrong = {"x": (["chain", "draw", "datapoint"], dist.Normal(z, 0.5).log_prob(x).numpy())}
    posterior = {"z": (["chain", "draw", "datapoint"], z.numpy())}
    groups = {"posterior": posterior, "log_likelihood": wrong}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that k is large
        by_row, k = loo(diagnostics.arviz_bridge.bundle(groups))
    assert by_row.sum() > exact.sum() + 5 and k.max() > 0.7


def test_plates_of_globals_are_named_in_an_export() -> None:
    guide = AutoNormal(positive)
    idata = diagnostics.to_arviz(positive, guide, X, num_draws=6, num_particles=1, seed=0)
    assert idata.posterior["slope"].dims == ("chain", "draw", "features")
    assert idata.posterior["sd"].shape == (1, 6) and len(set(idata.posterior["sd"].values[0])) == 6
    assert idata.prior["slope"].shape == (1, 6, 2)
    assert set(idata.posterior.data_vars) == {"sd", "slope"}


# ------------------------------------------------------------------------------ guides.Global


class Local(nn.Module):
    """q(z | x, g), or with the globals left out q(z | x)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.sd = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.6))
        self.tie = nn.Parameter(torch.tensor(0.0))

    def forward(self, *args) -> None:
        *drawn, x = args
        g = drawn[0]["g"] if drawn else 0.0
        assert not torch.is_tensor(g) or g.dim() == 0  # no particles, no rows
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.tie * g + self.slope * x, self.sd))


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_an_automatic_guide_of_globals_beside_an_encoder(make, sees: bool) -> None:
    model = Model()
    guide = guides.Global(
        functools.partial(make, init_scale=0.3), model, X, local=Local(), sees_globals=sees
    )
    report = ppvae.check_pair(model, guide, X) if sees else None
    assert report is None or not any(report.gradients.values())
    model.requires_grad_(False)
    svi = ppvae.SVI(
        model, guide, functools.partial(torch.optim.Adam, lr=0.05), elbo.ELBO(4, "stl"), num_rows=4
    )
    for _ in range(250 if sees else 2):
        svi.step(X)
    found = diagnostics.joint_evidence(model, guide, X, num_globals=50, num_particles=5, seed=0)
    if sees:
        assert abs(found.log_evidence - EVIDENCE) < 0.05 and found.se < 0.05
        assert found.table.loc["g", "mean"] == pytest.approx(MEAN, abs=0.5)
    fresh = guides.Global(make, model, X, local=Local(), sees_globals=sees)
    fresh.load_state_dict(guide.state_dict())
    log_w = []
    for each in (guide, fresh):
        torch.manual_seed(0)
        log_w.append(ppvae.log_weights(model, each, X, num_particles=3).log_w)
    assert torch.equal(*log_w)


def test_a_guide_of_globals_refuses_what_it_is_not_for() -> None:
    local, _ = diagnostics.given_globals(Model(), Guide(), X)
    with pytest.raises(ValueError, match=r"nothing outside the plate 'data', but \['z'\] in it"):
        guides.Global(AutoNormal, local, X)
    with pytest.raises(ValueError, match=r"local is None, and the model draws \['z'\]"):
        guides.Global(AutoNormal, Model(), X)
    with pytest.raises(TypeError, match="local must be a guide, a program, got int"):
        guides.Global(AutoNormal, Model(), X, local=3)
    only = guides.Global(AutoNormal, positive, X)
    assert ppvae.log_weights(positive, only, X).global_q.keys() >= {"sd", "slope"}


def test_groups_of_rows_share_a_latent() -> None:
    """theta[group]: an index into a plate of its own; minibatches of both, and an export."""

    def model(x: Tensor, group: Tensor) -> None:
        spread = pyro.deterministic("spread", pyro.sample("tau", dist.HalfNormal(2.0)))
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, spread))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta[group], 0.5), obs=x)

    group = torch.tensor([0, 1, 1, 2])
    guide = guides.Global(AutoNormal, model, X, group)
    ppvae.check_pair(model, guide, X, group)
    weights = ppvae.log_weights(model, guide, X, group, num_particles=2)
    theta = weights.guide_trace.nodes["theta"]["value"]
    torch.testing.assert_close(weights.log_w[1], dist.Normal(theta[group], 0.5).log_prob(X))
    svi = ppvae.SVI(model, guide, ADAM, elbo.ELBO(gradient="stl"))
    history = ppvae.fit(svi, (X, group), epochs=2, batch_size=3, progress=False)
    assert math.isfinite(history.rows[-1]["train_objective"])
    idata = diagnostics.to_arviz(model, guide, X, group, num_draws=3, num_particles=1, seed=0)
    assert idata.posterior["theta"].dims == ("chain", "draw", "groups")
    assert (idata.posterior["spread"].values == idata.posterior["tau"].values).all()
    assert (idata.constant_data["group"].values == group.numpy()).all()


# ------------------------------------------------------------------------------ laws

TAKES = [
    label
    for label, estimator in ALL_ESTIMATORS.items()
    if type(estimator).__name__ in ("ELBO", "IWELBO", "MIWELBO", "CIWELBO", "RenyiELBO")
    and estimator.gradient not in OF_ROWS
    and "FreeBits" not in label  # a rate below its floor has no gradient, by design
]


@pytest.mark.parametrize("label", TAKES)
@pytest.mark.parametrize("name", GLOBAL)
def test_every_parameter_has_a_gradient_under_every_estimator(name: str, label: str) -> None:
    model, guide, (x,) = build(name)
    ALL_ESTIMATORS[label](model, guide)(x.double()).backward()
    for program in (model, guide):
        for parameter_name, parameter in program.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", GLOBAL)
def test_a_saved_pair_weighs_alike_and_stock_svi_trains_it(name: str) -> None:
    model, guide, (x,) = build(name)
    stock = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo.ELBO(2))
    before = guide.auto.locs.W.clone()
    assert math.isfinite(stock.step(x))
    assert not torch.equal(before, guide.auto.locs.W)
    other, again, _ = build(name, seed=1)
    other.load_state_dict(model.state_dict()), again.load_state_dict(guide.state_dict())
    found = []
    for pair in ((model, guide), (other, again)):
        torch.manual_seed(0)
        weights = ppvae.log_weights(*pair, x, num_particles=3)
        found.append(torch.cat([weights.log_w.flatten(), weights.log_global[None]]))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------ what is refused


def hidden_batch(x: Tensor) -> None:
    pyro.sample("g", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))


def pair_with(draw, **plates):
    """A model and a guide that call ``draw`` for the latent g, and observe x."""

    def model(x: Tensor) -> None:
        g = draw(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0 if g is None else g, 1.0), obs=x)

    return model, draw


def scaled(x: Tensor) -> Tensor:
    with poutine.scale(scale=0.5):
        return pyro.sample("g", dist.Normal(0.0, 1.0))


def enumerated(x: Tensor) -> Tensor:
    return pyro.sample("g", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})


REFUSED = {
    "undeclared": (lambda x: pyro.sample("g", dist.Normal(torch.zeros(4), 1.0)), "shape"),
    "scaled": (scaled, "global latent with the scale 0.5"),
    "enumerated": (enumerated, "summed out of all rows at once"),
    "discrete": (lambda x: pyro.sample("g", dist.Bernoulli(0.5)), "no reparameterised sampler"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_by_name(case: str) -> None:
    draw, message = REFUSED[case]
    for estimator in (elbo.ELBO(), elbo.IWELBO(2, "vimco")):
        with pytest.raises(ValueError, match=f"'g'.*{message}"):
            estimator(*pair_with(draw))(X)


def test_a_latent_that_is_global_in_one_program_alone_is_refused() -> None:
    model, _ = pair_with(lambda x: pyro.sample("g", dist.Normal(0.0, 1.0)))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("g", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="'g' lies in the plate 'data' in the guide, and outside"):
        elbo.ELBO()(model, guide)(X)
    with pytest.raises(ppvae.PairError, match="'g' of the model lies outside the plate 'data'"):
        ppvae.check_pair(model, guide, X)


def test_a_forgotten_plate_is_seen_at_another_number_of_rows() -> None:
    with pytest.raises(ppvae.PairError, match=r"'g' lies outside.*\(2,\) for 2, \(4,\) for 4"):
        ppvae.check_pair(*pair_with(hidden_batch), X)


def test_a_global_that_depends_on_the_batch_is_refused() -> None:
    model, _ = pair_with(lambda x: pyro.sample("g", dist.Normal(0.0, 1.0)))

    def guide(x: Tensor) -> None:
        pyro.sample("g", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ppvae.PairError, match="'g' of the guide: the density of a global latent"):
        ppvae.check_pair(model, guide, X)


OTHERS = [
    elbo.ChiUpperBound(3),
    elbo.ThermodynamicELBO(3),
    elbo.PIWELBO(2, num_groups=2),
    elbo.ReweightedWakeSleep(3),
    elbo.SoftCVI(3),
    elbo.AnnealedELBO(),
    elbo.RELAX(2),
]


@pytest.mark.parametrize("estimator", OTHERS, ids=repr)
def test_other_objectives_refuse_globals(estimator: elbo.Estimator) -> None:
    with pytest.raises(ValueError, match="'g' lies outside the plate 'data': it is global"):
        estimator(Model(), Guide())(X)


def test_losses_of_pyro_refuse_globals_unless_joint() -> None:
    with pytest.raises(ppvae.PairError, match="Pyro's losses are not done"):
        ppvae.SVI(Model(), Guide(), loss=Trace_ELBO(), num_rows=4).step(X)
    ppvae.SVI(Model(), Guide(), loss=Trace_ELBO()).prepare(X, joint=True)


# ------------------------------------------------------------------------------ every verb

RIGHT = {  # and the test that says so
    "check_pair": "test_scalars_events_and_plates_are_summed_whole",
    "diagnose": "test_a_report_is_of_the_rows_given_draws_and_has_the_globals_beside",
    "fit": "test_fit_finds_the_posterior_from_minibatches",
    "fit_many": "test_members_of_many_seeds_have_globals_of_their_own",
    "given_globals": "test_a_pair_at_one_draw_is_an_ordinary_one",
    "joint_evidence": "test_the_evidence_of_all_rows",
    "load": "test_a_pair_is_saved_with_its_globals",
    "log_predictive": "test_the_predictive_density_of_new_rows",
    "log_weights": "test_scalars_events_and_plates_are_summed_whole",
    "save": "test_a_pair_is_saved_with_its_globals",
    "to_arviz": "test_leave_one_out_by_arviz_is_right",
}
NO_WEIGHT = r"site 'g' lies outside.*log_predictive and joint_evidence.*given_globals"
NO_ROW = r"latent 'g' lies outside.*given_globals"
REFUSES = {  # by name, and with a cure
    "ais": (lambda m, g: diagnostics.ais(m, g, X), NO_ROW),
    "bdmc": (lambda m, g: diagnostics.bdmc(m, g, X), NO_WEIGHT),
    "compare": (lambda m, g: ppvae.compare(m, g, X, {"a": elbo.ELBO()}), NO_WEIGHT),
    "compare_posteriors": (
        lambda m, g: diagnostics.compare_posteriors(m, g, X, reference=None),
        NO_ROW,
    ),
    "encode": (lambda m, g: ppvae.encode(g, X), NO_ROW),
    "fit_prior": (
        lambda m, g: ppvae.fit_prior(ppvae.conditionals.StandardNormal(1), g, X, epochs=1),
        NO_ROW,
    ),
    "gaps": (lambda m, g: diagnostics.gaps(m, g, X), NO_WEIGHT),
    "generate": (lambda m, g: ppvae.generate(m, 3, like=X), f"{NO_ROW[:-13]}prior.*given_globals"),
    "hmc": (lambda m, g: diagnostics.hmc(m, g, X), NO_ROW),
    "impute": (lambda m, g: ppvae.impute(m, g, X), NO_WEIGHT),
    "local_c2st": (lambda m, g: diagnostics.local_c2st(m, g, X), NO_WEIGHT),
    "log_evidence": (lambda m, g: diagnostics.log_evidence(m, g, X), NO_WEIGHT),
    "log_prob": (lambda m, g: ppvae.log_prob(m, g, X), NO_WEIGHT),
    "metropolis": (lambda m, g: diagnostics.metropolis(m, g, X), NO_ROW),
    "moment_match": (lambda m, g: guides.moment_match(m, g, X), "one latent.*'g'"),
    "nuts": (lambda m, g: diagnostics.nuts(m, X), NO_ROW),
    "predictive_check": (
        lambda m, g: diagnostics.predictive_check(m, g, X, statistics={"x": lambda x: x}),
        NO_WEIGHT,
    ),
    "quadrature": (lambda m, g: diagnostics.quadrature(m, g, X), NO_ROW),
    "reconstruct": (lambda m, g: ppvae.reconstruct(m, g, X), NO_WEIGHT),
    "reverse_ais": (
        lambda m, g: diagnostics.reverse_ais(m, g, X, draws=torch.zeros(1, 4, 1)),
        NO_ROW,
    ),
    "sbc": (lambda m, g: diagnostics.sbc(m, g, X), NO_WEIGHT),
    "simulated_divergence": (lambda m, g: diagnostics.simulated_divergence(m, g, X), NO_WEIGHT),
    "total_correlation": (lambda m, g: diagnostics.total_correlation(g, X), "'g'.*one latent"),
}
OF_OTHERS = {"log_q_of_labels", "plates"}  # of M2; of a structure


def verbs() -> set[str]:
    """The public functions that take a program, or what trains one."""
    parts = (ppvae, diagnostics, guides, ppvae.plots, ppvae.verbs)
    functions = [(name, getattr(part, name)) for part in parts for name in part.__all__]
    asked = {"model", "guide", "svi", "make"}
    return {
        name
        for name, function in functions
        if inspect.isfunction(function) and asked & set(inspect.signature(function).parameters)
    }


def test_each_verb_takes_globals_or_refuses_them() -> None:
    assert verbs() == RIGHT.keys() | REFUSES.keys() | OF_OTHERS
    assert set(RIGHT.values()) <= globals().keys()


@pytest.mark.parametrize("name", REFUSES)
def test_what_a_verb_refuses_is_named_with_a_cure(name: str) -> None:
    call, message = REFUSES[name]
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        call(Model(), Guide(1.3))
    if name not in ("generate", "fit_prior"):
        assert torch.equal(before, torch.get_rng_state())  # before work is spent


def test_members_of_many_seeds_have_globals_of_their_own() -> None:
    """Each is its lone run."""

    def make() -> ppvae.SVI:
        return ppvae.SVI(Model(), Guide(1.3, 1.5, 0.1), ADAM, elbo.ELBO(2))

    options = {"epochs": 2, "batch_size": 2, "progress": False}
    both = ppvae.fit_many(make, X, seeds=[0, 1], **options)
    pyro.set_rng_seed(1)
    alone = make()
    ppvae.fit(alone, X, seed=1, **options)
    member = both.svis[1]
    pairs = zip(alone.objective.parameters(), member.objective.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_pair_is_saved_with_its_globals(tmp_path) -> None:
    ppvae.save(tmp_path, Model(), Guide(1.3))
    model, guide = Model(), Guide()
    saved = ppvae.load(tmp_path, make=lambda: (model, guide))
    assert saved.guide.sd.item() == pytest.approx(1.3 * SD)
