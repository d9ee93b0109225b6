"""What all evaluators share: the same data are refused by all, in the same words, before work."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppvae
from oracles import LinearGuide, LinearModel
from ppvae import conditionals, diagnostics, elbo, guides, models, nets
from ppvae.check.programs import PairError
from ppvae.diagnostics.rows import check_data

MODEL = LinearModel(2, 3)
GUIDE = LinearGuide(MODEL)
X = torch.zeros(4, 3)


def predictive(model, guide, *args):
    return diagnostics.predictive_check(
        model, guide, *args, statistics={"sum": lambda x: x.sum(-1)}
    )


EVALUATORS = {
    "ais": diagnostics.ais,
    "bdmc": diagnostics.bdmc,
    "compare": lambda model, guide, *args: ppvae.compare(model, guide, args, [elbo.ELBO()]),
    "diagnose": ppvae.diagnose,
    "gaps": diagnostics.gaps,
    "hmc": diagnostics.hmc,
    "log_evidence": diagnostics.log_evidence,
    "metropolis": diagnostics.metropolis,
    "nuts": lambda model, guide, *args: diagnostics.nuts(model, *args),
    "predictive_check": predictive,
    "quadrature": diagnostics.quadrature,
    "sbc": diagnostics.sbc,
    "to_arviz": diagnostics.to_arviz,
}
WRONG = {
    "none": ((), "^no data: pass tensors"),
    "scalar": ((torch.tensor(1.0),), "^argument 'x' is a single number"),
    "empty": ((X[:0],), "^argument 'x' is empty"),
    "nan": ((torch.where(X == 0, math.nan, X),), "^argument 'x' has 12 NaN or infinite values"),
    "lengths": ((X, X[:2]), "^the arguments differ in length"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_refuses_the_same_data(name, wrong):
    args, message = WRONG[wrong]
    stream = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        EVALUATORS[name](MODEL, GUIDE, *args)
    assert torch.equal(stream, torch.get_rng_state())


def test_what_is_no_data_is_left_alone():
    assert check_data(MODEL, (None, X, 3, [1, 2], X[:, 0])) == 4


# -- pairs that no evaluator takes ---------------------------------------------------------------

FURTHER = EVALUATORS | {
    "compare_posteriors": lambda model, guide, *args: diagnostics.compare_posteriors(
        model, guide, *args, reference=None
    ),
    "reverse_ais": lambda model, guide, *args: diagnostics.reverse_ais(
        model, guide, *args, draws=None
    ),
}
BOUNDS = {
    f"{type(e).__name__}.evaluate": e.evaluate
    for e in (
        elbo.ELBO(),
        elbo.IWELBO(4),
        elbo.RenyiELBO(4),
        elbo.CIWELBO(4),
        elbo.PIWELBO(4, num_groups=2),
    )
}
ROWS = torch.arange(12.0).reshape(4, 3)


def subsampled(plate):
    """A pair of which one plate, or none, takes two of its elements by itself."""
    some, few = (2 if plate == name else None for name in ("data", "inner"))

    def model(x):
        with pyro.plate("data", len(x), subsample_size=some, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("inner", 3, subsample_size=few, dim=-2) as i:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T[i][:, rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=some, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    return model, guide


# NUTS runs one row after the other, of which Pyro itself takes no two
@pytest.mark.parametrize(
    ("name", "plate"),
    [
        case
        for case in itertools.product(FURTHER | BOUNDS, ("data", "inner"))
        if case != ("nuts", "data")
    ],
)
def test_plates_that_subsample_themselves_are_refused(name, plate):
    """log p of some of the data is not log p(x), and not what posterior draws are of."""
    model, guide = subsampled(plate)
    with pytest.raises(ValueError, match=f"'{plate}' takes 2 of [34] by itself"):
        (FURTHER | BOUNDS)[name](model, guide, ROWS)
    whole_model, whole_guide = subsampled(None)
    found = diagnostics.log_evidence(whole_model, whole_guide, ROWS, num_particles=50)
    assert found.log_evidence.shape == (4,)


def test_fit_refuses_them_before_the_first_step():
    model, _ = subsampled("inner")

    class Guide(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    guide = Guide()
    with pytest.raises(PairError, match="'inner' takes 2 of 3 by itself"):
        ppvae.fit(ppvae.SVI(model, guide), ROWS, valid=ROWS, epochs=1, progress=False)
    assert guide.loc.item() == 0.0
    ppvae.fit(ppvae.SVI(model, guide), ROWS, epochs=1, progress=False)  # it trains
    assert guide.loc.item() != 0.0


def test_a_minibatch_of_a_larger_data_set_is_whole():
    """Its plate is given the rows; the factor N_total / N is no part of log p(x)."""
    W = torch.tensor([1.0, 2.0, 3.0])

    def model(x, size=None):
        with ppvae.program.data_plate(x, size=size):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * W, 1.0).to_event(1), obs=x)

    guide = guides.Prior(model)
    for call in (diagnostics.log_evidence, ppvae.diagnose):
        one, other = (call(model, guide, ROWS, seed=0, **size) for size in ({}, {"size": 100}))
        torch.testing.assert_close(one.log_evidence, other.log_evidence)


# -- tables --------------------------------------------------------------------------------------

TABLE = torch.linspace(-1, 1, 4)[:, None] * torch.tensor([1.0, 2.0]) + 1  # as many rows as data
DATA = torch.tensor([[0.5], [1.0], [-1.0], [2.0]])


def with_table(x, table):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + table.sum(), 1.0).to_event(1), obs=x)


def with_table_guide(x, table):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - table.sum()) / 2, 0.9).to_event(1))


SHORT = {"num_draws": 8, "num_warmup": 20, "num_chains": 2, "seed": 0}
COMPARED = {
    "ais": lambda r: r.log_w,
    "bdmc": lambda r: r.upper.log_w,
    "diagnose": lambda r: torch.cat([r.log_evidence, r.kl["z"]]),
    "hmc": lambda r: r.unconstrained,
    "log_evidence": lambda r: r.log_evidence,
    "metropolis": lambda r: r.unconstrained,
    "nuts": lambda r: r.unconstrained,
    "predictive_check": lambda r: r.replicated["sum"],
    "quadrature": lambda r: r.log_evidence,
    "sbc": lambda r: r.ranks["z"],
    "to_arviz": lambda r: torch.as_tensor(r.posterior["z"].values.copy()),
}
CALLS = {
    "ais": lambda *a, **t: diagnostics.ais(*a, num_temperatures=5, max_rows=4, seed=0, **t),
    "bdmc": lambda *a, **t: diagnostics.bdmc(*a, num_temperatures=5, max_rows=4, seed=0, **t),
    "diagnose": lambda *a, **t: ppvae.diagnose(*a, num_particles=50, max_rows=60, seed=0, **t),
    "hmc": lambda *a, **t: diagnostics.hmc(*a, max_rows=2, max_reruns=0, **SHORT, **t),
    "log_evidence": lambda *a, **t: diagnostics.log_evidence(
        *a, num_particles=50, max_rows=60, seed=0, **t
    ),
    "metropolis": lambda *a, **t: diagnostics.metropolis(*a, max_rows=2, **SHORT, **t),
    "nuts": lambda model, guide, x, **t: diagnostics.nuts(model, x[:1], **SHORT, **t),
    "predictive_check": lambda *a, **t: diagnostics.predictive_check(
        *a, statistics={"sum": lambda x: x.sum(-1)}, num_draws=20, max_rows=40, seed=0, **t
    ),
    "quadrature": diagnostics.quadrature,
    "sbc": lambda *a, **t: diagnostics.sbc(
        *a, num_simulations=100, num_draws=19, max_rows=100, seed=0, **t
    ),
    "to_arviz": lambda *a, **t: diagnostics.to_arviz(*a, num_draws=5, seed=0, **t),
}


@pytest.mark.parametrize("name", CALLS)
def test_tables_are_passed_by_keyword_and_never_cut(name):
    """The same numbers as of programs that hold the table, in pieces of a row or two."""
    inside = [lambda x, p=p: p(x, TABLE) for p in (with_table, with_table_guide)]
    bare, held = (
        COMPARED[name](CALLS[name](*pair, DATA, **table))
        for pair, table in (((with_table, with_table_guide), {"table": TABLE}), (inside, {}))
    )
    assert bare.numel() and torch.equal(bare, held)


def test_evidence_with_a_table_is_exact():
    exact = dist.Normal(TABLE.sum(), 2**0.5).log_prob(DATA[:, 0])
    pair = with_table, with_table_guide
    for max_rows in (10**6, 500):
        found = diagnostics.log_evidence(
            *pair, DATA, num_particles=500, max_rows=max_rows, seed=0, table=TABLE
        )
        assert ((found.log_evidence - exact).abs() < 5 * found.log_evidence_se).all()
    found = diagnostics.quadrature(*pair, DATA, table=TABLE)
    torch.testing.assert_close(found.log_evidence, exact.double(), atol=1e-4, rtol=0)
    found = ppvae.compare(
        *pair, DATA, [elbo.IWELBO(100)], repeats=20, evidence_particles=500, timing_rounds=0,
        table=TABLE
    )  # fmt: skip
    assert abs(found["bound"].iloc[0] - exact.mean()) < 0.05


@pytest.mark.parametrize("name", [n for n in FURTHER if n != "nuts"])
def test_a_table_by_position_is_refused_with_the_cure(name):
    with pytest.raises(PairError, match=r"'table' has 4 rows, and is not used row by row.*keyword"):
        FURTHER[name](with_table, with_table_guide, DATA, TABLE)


def test_an_autoguide_of_all_positions_is_evaluated_on_all_rows_at_once():
    """More of them than a pair is tried on; in pieces it is refused, with this cure."""
    x = torch.linspace(-1, 1, 150)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(model, init_scale=0.8)
    guide(x)
    guide.locs.z.data.copy_(x / 2)
    found = diagnostics.log_evidence(model, guide, x, num_particles=400, max_rows=10**6, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert abs(found.mean - exact.mean()) < 5 * found.mean_mc_se
    with pytest.raises(ValueError, match=r"150 positions.*max_rows >= num_particles"):
        diagnostics.log_evidence(model, guide, x, num_particles=400, max_rows=1000)


def test_every_row_is_looked_at():
    """Those beyond the first ones, on which the pair is tried, too."""
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    guide = guides.Normal(nets.mlp(4, 8, 4))
    x = torch.bernoulli(torch.full((150, 4), 0.5))
    x[140, 1] = 0.5
    with pytest.raises(PairError, match="1 of 600 values lie outside the likelihood's support"):
        diagnostics.log_evidence(model, guide, x, num_particles=2)


@pytest.mark.parametrize("name", sorted(EVALUATORS.keys() - {"nuts", "compare"}))
def test_particles_that_see_each_other_are_refused(name):
    """One particle at a time the pair is right, so rows alone do not show it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            others = z.mean(0) if z.dim() > 1 else 0.0
            pyro.sample("x", dist.Normal(z + others, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    call = {
        "predictive_check": lambda *pair: diagnostics.predictive_check(
            *pair, statistics={"x": lambda x: x}
        )
    }
    with pytest.raises(PairError, match="site 'x' of the model: 3 particles at once"):
        call.get(name, EVALUATORS[name])(model, guide, ROWS[:, 0])


@pytest.mark.parametrize("rows", [6, 130])
@pytest.mark.parametrize("name", ["log_evidence", "diagnose", "ais", "hmc"])
def test_a_pair_that_has_all_rows_of_its_own_is_told_so(name, rows):
    x = torch.randn(rows)

    def free(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    model = pyro.poutine.condition(free, data={"x": x})
    run = {
        "log_evidence": lambda: diagnostics.log_evidence(
            model, guide, x, num_particles=40, max_rows=100
        ),
        "diagnose": lambda: ppvae.diagnose(model, guide, x, num_particles=40, max_rows=100),
        "ais": lambda: diagnostics.ais(model, guide, x, num_chains=8, max_rows=24),
        "hmc": lambda: diagnostics.hmc(model, guide, x, num_chains=4, max_rows=12),
    }[name]
    with pytest.raises(PairError, match=f"the pair runs on all {rows} rows and not on a part"):
        run()
