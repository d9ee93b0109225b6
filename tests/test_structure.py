"""What a program is made of, found by running it, and drawn."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro import poutine

from ppvae import plots
from ppvae.check import structure
from registry import build


def branching(x, weights, deep=True, noise=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        b = pyro.sample("b", dist.Normal(a, 1.0)) if deep else 0.0
        with pyro.plate("columns", 3, dim=-2):
            c = pyro.sample("c", dist.Gamma(torch.ones(3, 1), 1.0).mask(torch.tensor(True)))
        pyro.sample("x", dist.Normal(b + c.sum(0) + (x @ weights) * 0, 1.0), obs=x[:, 0])
    pyro.sample("y", dist.Normal(a if noise is None else noise.sum(), 1.0))


def test_a_program_of_ones_own() -> None:
    """Global and local sites, nested plates, a mask, an input that is no site."""
    x, weights = torch.ones(4, 2), torch.ones(2)
    found = structure(branching, x, weights)
    assert found.parents == {
        "a": (),
        "b": ("a",),
        "c": (),
        "x": ("b", "c", "weights"),
        "y": ("a",),
    }
    assert found.inputs == ("weights",)
    assert found.observed == ("x",)
    assert found.plates == {"rows": ("b", "c", "x"), "columns": ("c",)}
    assert found.distributions["c"] == "Gamma"
    assert "b" not in structure(branching, x, weights, deep=False).parents
    other = structure(partial(branching, x), weights, noise=torch.zeros(3))
    assert other.parents["y"] == ("noise",)
    wrapped = structure(poutine.condition(branching, {"b": torch.zeros(4)}), x, weights)
    assert set(wrapped.observed) == {"b", "x"}


@pytest.mark.parametrize(
    ("name", "guide"),
    [
        ("hierarchical", {"z1": ("x",), "z2": ("z1",), "z3": ("z2",)}),
        ("ladder", {"z3": ("x",), "z2": ("z3", "x"), "z1": ("z2", "x")}),
        ("cvae_learned_prior", {"z": ("x", "y")}),
    ],
)
def test_a_guide_says_what_its_posterior_sees(name: str, guide: dict) -> None:
    model, program, args = build(name)
    state = torch.get_rng_state()
    assert structure(program, *args).parents == guide
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.get_param_store().keys()
    ax = plots.plates(structure(model, *args), structure(program, *args), ax=Figure().subplots())
    arrows = [patch for patch in ax.patches if type(patch).__name__ == "FancyArrowPatch"]
    above = structure(model, *args).parents
    assert len(arrows) == sum(map(len, above.values())) + sum(map(len, guide.values()))


def test_a_guide_of_another_model_is_refused() -> None:
    (model, _, args), (_, guide, other) = build("vae_bernoulli"), build("hierarchical")
    with pytest.raises(ValueError, match="z1"):
        plots.plates(structure(model, *args), structure(guide, *other), ax=Figure().subplots())
