"""log_evidence with a graph: the draws and the numbers of the eager run."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from compiling import D, X, inductor, looks_at_a_value, observe, standard
from ppvae import diagnostics, guides
from ppvae.compile import graph
from ppvae.pairs import NotCompiled
from registry import ALL_PAIRS, build


def evidence(pair, compile, rows=23, **options):
    """13 particles on pieces of 5 datapoints, or 9 and then 4 on one; a rest at the end."""
    model, guide, args = pair
    args = [torch.cat([arg] * 4)[:rows] for arg in args]
    torch.manual_seed(3)
    return diagnostics.log_evidence(
        model, guide, *args, **{"num_particles": 13, "max_rows": 65, "compile": compile} | options
    )


def assert_equal_evidence(make, **options):
    eager = evidence(make(), False, **options)
    expected = torch.get_rng_state()
    compiled = evidence(make(), True, **options)
    assert torch.equal(torch.get_rng_state(), expected), "the random stream was moved"
    for name in ("log_evidence", "log_evidence_se", "elbo", "ess"):
        one, other = getattr(compiled, name), getattr(eager, name)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_its_graph_is_known_to_have_no_gradients(traced, monkeypatch):
    """It then multiplies by oneDNN on every processor, a training graph on some."""
    seen, usual = [], graph.rewrite
    monkeypatch.setattr(graph, "rewrite", lambda *args: seen.append(args[1]) or usual(*args))
    evidence(build("vae_bernoulli"), True)
    assert set(seen) == {False}


@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_the_evidence_of_every_pair_traced(traced, pair):
    rows = len(build(pair)[2][0]) if pair == "per_datapoint" else 23
    assert_equal_evidence(lambda: build(pair), rows=rows, max_rows=26 if rows < 23 else 65)
    assert len(traced) == 1


@pytest.mark.parametrize(("max_rows", "graphs"), [(65, 1), (9, 2), (1, 1), (10**6, 0)])
def test_pieces_of_the_evidence(traced, max_rows, graphs):
    """A rest at the end, and what fits into one piece, is not worth a graph."""
    assert_equal_evidence(lambda: build("vae_bernoulli"), max_rows=max_rows)
    assert len(traced) == graphs


@pytest.mark.parametrize("what", ["network", "parameter"])
def test_what_is_replaced_is_seen(traced, what):
    """Graphs are kept from call to call, for the modules and parameters that they were made of."""
    model, guide, args = build("vae_bernoulli")
    other = build("vae_bernoulli")[1].eval()
    model.eval(), guide.eval()  # so that no mode tells the networks apart
    evidence((model, guide, args), True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    if what == "network":
        guide.conditional.net = other.conditional.net
    else:
        name, value = next(iter(other.conditional.net.named_parameters()))
        owner, _, name = name.rpartition(".")
        setattr(guide.conditional.net.get_submodule(owner), name, value)
    found, expected = (evidence((model, guide, args), compile) for compile in (True, False))
    torch.testing.assert_close(found.elbo, expected.elbo, rtol=1e-4, atol=1e-4)
    assert len(traced) == 2


def test_a_number_from_outside_is_seen(traced):
    scale = 1.0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / (1 + scale**2), 0.8))

    x = X[:, :1].flatten()
    for scale in (1.0, 0.3, 1.0):  # noqa: B007
        found, expected = (evidence((model, guide, (x,)), compile) for compile in (True, False))
        torch.testing.assert_close(found.elbo, expected.elbo, rtol=1e-4, atol=1e-4)
    assert len(traced) == 2


def test_a_graph_that_writes_something_else_on_a_buffer_is_refused(traced):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(3 if isinstance(x, FakeTensor) else 2)
            return x

    model, guide, args = build("vae_bernoulli")
    guide.conditional.net = nn.Sequential(Counts(), guide.conditional.net)
    with pytest.raises(NotCompiled, match="changes the tensor 'count'"):
        evidence((model, guide, args), True)


@inductor
@pytest.mark.slow
def test_compiled_evidence():
    assert_equal_evidence(lambda: build("vae_bernoulli"))


def test_the_evidence_of_plain_functions(traced):
    """Latents that are discrete, networks that no program owns."""

    def make():
        torch.manual_seed(0)
        net = nn.Linear(D, 3)

        def model(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(x.new_ones(3) / 3))
                observe(x, c.unsqueeze(-1) * x.new_ones(D))

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Categorical(logits=net(x)))

        return model, guide, (X,)

    assert_equal_evidence(make)
    assert len(traced) == 1


def test_a_weight_that_is_not_finite_is_named_by_compiled_evidence(traced):
    """It is drawn once in hundreds: the draws that name the site are those that showed it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            observe(x, z.where(z < 2.7, math.nan).sum(-1, keepdim=True) + x.new_zeros(D))

    pair = model, guides.Prior(model), (X,)
    seen = []
    for compile in (False, True):
        with pytest.raises(ValueError, match=r"log-weight of datapoint \d+ is NaN .*'x'") as caught:
            evidence(pair, compile, rows=24, max_rows=13)
        seen.append(str(caught.value))
    assert seen[0] == seen[1]


def test_evidence_that_cannot_be_compiled(traced):
    pair = (*looks_at_a_value(), (X,))
    with pytest.raises(NotCompiled, match=r"compile=True, but .*looks at a tensor's value"):
        evidence(pair, True)
    with pytest.warns(RuntimeWarning, match="looks at a tensor's value") as warned:
        found = evidence(pair, "auto")
    assert len(warned) == 1
    assert torch.equal(found.log_evidence, evidence(pair, False).log_evidence)
