"""Numbers as NumPy and torch make them, and things that are none."""

import math
from collections.abc import Sequence

import numpy as np
import pyro
import pytest
import torch
from torch import nn

import ppvae
from ppvae import (
    conditionals,
    data,
    diagnostics,
    elbo,
    guides,
    metrics,
    models,
    nets,
    posteriors,
)
from ppvae.arguments import takes_numbers

X = torch.bernoulli(torch.full((12, 4), 0.5), generator=torch.Generator().manual_seed(1))


def pair():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 4))


@takes_numbers
def takes(whole: int, real: float = 1.0, maybe: int | None = None, other: int | str = 3, *, k=None):
    return whole, real, maybe, other, k


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_make_are_pythons(three):
    found = takes(three, three, maybe=three)
    assert found[:3] == (3, 3.0, 3) and [type(v) for v in found[:3]] == [int, float, int]


def test_what_is_left_alone():
    assert takes(1, maybe=None, other=np.int64(2), k="x")[3:] == (np.int64(2), "x")
    assert takes(1, np.float32(0.5))[1] == 0.5 and takes(1, math.inf)[1] == math.inf


@pytest.mark.parametrize("none", ["3", None, True, np.True_, [3], np.array([3]), 2.5, math.nan, 1j])
def test_what_is_no_whole_number_is_named(none):
    with pytest.raises(TypeError, match=r"^whole must be a whole number, got"):
        takes(none)
    with pytest.raises(TypeError, match=r"^whole must be"):
        takes(whole=none)


def test_a_float_that_is_whole_is_given_its_cure_and_a_long_one_its_size():
    with pytest.raises(TypeError, match=r"whole must be a whole number, got 16\.0: give whole=16"):
        takes(16.0)
    with pytest.raises(ValueError, match="whole takes more than 64 bits"):
        takes(2**64)


CALLS = {
    "batch_size": lambda m, g, v: ppvae.fit(
        ppvae.SVI(m, g), X, epochs=1, progress=False, batch_size=v
    ),
    "seed": lambda m, g, v: ppvae.fit(ppvae.SVI(m, g), X, epochs=1, progress=False, seed=v),
    "num_particles": lambda m, g, v: diagnostics.log_evidence(m, g, X, num_particles=v),
    "max_rows": lambda m, g, v: ppvae.diagnose(m, g, X, num_particles=30, max_rows=v),
    "num_draws": lambda m, g, v: diagnostics.to_arviz(m, g, X, num_draws=v),
}


@pytest.mark.parametrize("argument", CALLS)
def test_entry_points_take_numpys_numbers_and_name_what_is_none(argument):
    number = 30 if argument != "max_rows" else 7
    CALLS[argument](*pair(), np.int64(number))
    for value, error in (("16", TypeError), (16.5, TypeError), (2**70, ValueError)):
        with pytest.raises(error, match=f"^{argument} "):
            CALLS[argument](*pair(), value)


def test_numbers_behind_a_star_are_named_too():
    assert nets.mlp(np.int64(4), torch.tensor(8), 2)(torch.ones(3, 4)).shape == (3, 2)
    for wrong in ("4", 4.0, None):
        with pytest.raises(TypeError, match=r"^sizes must be a whole number"):
            nets.mlp(4, wrong, 2)
    with pytest.raises(ValueError, match="sizes must be at least 1, got 0"):
        nets.mlp(4, 0, 2)


@takes_numbers(size=1, share=0)
def says(
    size: int,
    shape: "int | tuple[int, ...]" = 2,
    pair: "tuple[int, int]" = (1, 2),
    share: float = 0.5,
    flag: bool = False,
    word: str = "a",
    net: "nn.Module | None" = None,
    levels: "Sequence[nn.Module]" = (),
):
    return size, shape, pair, share, flag, word, net, levels


def test_sizes_in_a_row_flags_words_and_modules():
    net = nn.Linear(2, 2)
    found = says(np.int64(3), np.array([4, 4]), torch.Size([1, 2]), np.float32(0.5), np.True_)
    assert found[:5] == (3, (4, 4), (1, 2), 0.5, True) and found[4] is True
    assert says(3, torch.tensor(4), net=net, levels=[net])[1::5] == (4, net)
    assert says(3, levels=nn.ModuleList([net]))[-1][0] is net


@pytest.mark.parametrize(
    ("odd", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 2**40}, ValueError, r"size must be below 2 \*\* 31"),
        ({"share": math.nan}, ValueError, "share must be at least 0, got nan"),
        ({"share": math.inf}, ValueError, "share must be at least 0, got inf"),
        ({"shape": -1}, ValueError, "shape must be at least 1, got -1"),
        ({"shape": (4, 0)}, ValueError, "shape must be at least 1, got 0"),
        ({"shape": "44"}, TypeError, "shape must be a whole number, got '44'"),
        ({"shape": (4, None)}, TypeError, "shape must be a whole number, got None"),
        ({"pair": (1, 2, 3)}, ValueError, "pair must have 2 values"),
        ({"pair": 3}, TypeError, "pair must be several whole numbers, as a tuple, got 3"),
        ({"flag": 1}, TypeError, "flag must be True or False, got 1"),
        ({"word": 3}, TypeError, "word must be a word, got 3"),
        ({"net": 3}, TypeError, "net must be a module, as nets.mlp"),
        ({"net": nn.Linear}, TypeError, "net is the class Linear"),
        ({"levels": [3]}, TypeError, "levels must be a module"),
        ({"levels": nn.Linear(2, 2)}, TypeError, "levels must be several modules"),
    ],
)
def test_what_is_none_of_these_is_named(odd, error, message):
    with pytest.raises(error, match=message):
        says(**{"size": 3, **odd})


@pytest.mark.parametrize("three", [np.int64(3), np.array(3), torch.tensor(3), np.uint8(3)])
def test_constructors_take_sizes_as_numpy_and_torch_make_them(three):
    assert conditionals.StandardNormal(three)().event_shape == (3,)
    assert nets.CodeTable(three, dim=three).num_codes == 3
    assert posteriors.FullNormal(nn.Linear(2, 9), dim=three)(X[:, :2]).event_shape == (3,)


@pytest.mark.parametrize("role", ["model", "guide"])
@pytest.mark.parametrize("what", [3, None, models.VAE, "meta"])
def test_what_is_no_program_is_named_by_every_entry_point(role, what):
    model, guide = pair()
    given = {"model": model, "guide": guide}
    given[role] = given[role].to("meta") if what == "meta" else what
    match = f"^{role} (must be a Pyro program|is the class VAE|has parameters on the device 'meta')"
    for call in (
        ppvae.check_pair,
        diagnostics.log_evidence,
        diagnostics.ais,
        diagnostics.hmc,
        diagnostics.quadrature,
        diagnostics.sbc,
        diagnostics.to_arviz,
    ):
        with pytest.raises(TypeError, match=match):
            call(given["model"], given["guide"], X)
    with pytest.raises(TypeError, match=match):
        ppvae.compare(given["model"], given["guide"], X, [])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*prototype stage")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: X.to_sparse(), "is sparse"),
        (lambda: X.to("meta"), "is on the device 'meta'"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "is quantised"),
        (lambda: X.to(torch.complex64), "is complex"),
        (lambda: torch.nested.nested_tensor([X[0], X[1]]), "is a nested tensor"),
    ],
)
def test_tensors_without_numbers_are_named_by_every_entry_point(make, match):
    svi = ppvae.SVI(*pair())
    for call in (
        svi.step,
        lambda x: ppvae.fit(svi, x, epochs=1, progress=False),
        lambda x: ppvae.compare(svi.model, svi.guide, x, [ppvae.elbo.ELBO()]),
        *(
            lambda x, evaluate=evaluate: evaluate(svi.model, svi.guide, x)
            for evaluate in (diagnostics.ais, diagnostics.hmc, diagnostics.quadrature)
        ),
        *(
            lambda x, evaluate=evaluate: evaluate(svi.model, svi.guide, x)
            for evaluate in (diagnostics.sbc, diagnostics.to_arviz, ppvae.check_pair)
        ),
    ):
        with pytest.raises(ppvae.PairError, match=f"argument 'x' {match}"):
            call(make())
    assert svi.num_steps == 0


def test_tensors_with_a_gradient_or_of_inference_mode():
    with torch.inference_mode():
        frozen = X.clone()
    with pytest.raises(ppvae.PairError, match=r"'x' was made in inference mode.*x\.clone\(\)"):
        ppvae.SVI(*pair()).step(frozen)
    diagnostics.log_evidence(*pair(), frozen, num_particles=5)
    assert ppvae.SVI(*pair()).step(X.clone().requires_grad_()) > 0
    with pytest.raises(ppvae.PairError, match=r"'x' was computed of what takes a.*x\.detach\(\)"):
        ppvae.SVI(*pair()).step(X.clone().requires_grad_() * 1)
    with pytest.raises(ppvae.PairError, match=r"'x' is torch.float8"):
        ppvae.SVI(*pair()).step(X.to(torch.float8_e4m3fn))


NO_NUMBERS = [
    torch.tensor(3, device="meta"),
    torch.tensor(3.0).to_sparse(),
    np.ma.array(3, mask=True),
    np.timedelta64(3),
]


@pytest.mark.parametrize("odd", NO_NUMBERS, ids=lambda odd: type(odd).__name__)
def test_what_looks_like_a_number_and_holds_none_is_named(odd):
    for name, make in {
        "steps": elbo.LinearWarmup,
        "beta": lambda beta: elbo.ELBO(beta=beta),
        "alpha": lambda alpha: elbo.RenyiELBO(2, alpha=alpha),
        "num_components": lambda n: conditionals.Mixture(n, 2),
        "seed": lambda seed: data.Split(X, seed=seed),
    }.items():
        with pytest.raises((TypeError, ValueError), match=name):
            make(odd)


def test_numbers_of_estimators_become_pythons():
    three = torch.tensor(3)
    assert type(elbo.LinearWarmup(three).steps) is int
    assert type(elbo.FreeBits(np.float32(0.5)).nats) is float
    assert type(elbo.RenyiELBO(2, alpha=np.float32(0.5)).alpha) is float
    assert elbo.RenyiELBO(2, alpha=2**64).bound(torch.zeros(2, 3)).tolist() == [0.0] * 3
    weight = torch.tensor(0.5)
    assert elbo.ELBO(beta=weight).beta is weight  # it may be changed in place
    with pytest.raises(ValueError, match="alpha is too large"):
        elbo.RenyiELBO(2, alpha=2**2000)


def test_a_split_and_a_score_take_what_holds_all_its_values():
    for odd in (X.numpy(), X.to_sparse(), None, [[1.0]]):
        with pytest.raises(TypeError, match=r"^values (must be a tensor|is a tensor without)"):
            data.Split(odd)
    with pytest.raises(TypeError, match=r"^y must be a tensor"):
        data.Split(X, [0] * len(X))
    hidden = np.ma.array([0, 1], mask=[0, 1])
    with pytest.raises(ValueError, match="labels is a masked array"):
        metrics.clustering_accuracy([0, 1], hidden)


def test_a_distribution_is_no_program():
    normal = pyro.distributions.Normal(0.0, 1.0)
    with pytest.raises(TypeError, match="model must be a Pyro program, got the distribution"):
        diagnostics.log_evidence(normal, pair()[1], X)


@pytest.mark.parametrize("seed", [0, 2**40 + 1, 2**63 - 1, 2**64 - 1])
def test_any_seed_of_64_bits(seed):
    first, second = (
        ppvae.fit(ppvae.SVI(*pair()), X, epochs=1, batch_size=5, progress=False, seed=seed)
        for _ in range(2)
    )
    assert first.column("train_objective") == second.column("train_objective")
    diagnostics.log_evidence(*pair(), X, num_particles=5, seed=seed)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"callbacks": 3}, "callbacks takes one of them or a list, got 3"),
        ({"on_epoch_end": "x"}, "on_epoch_end takes a function"),
        ({"loggers": 3.5}, "loggers takes one of them or a list"),
        ({"fabric": 5}, r"fabric takes a lightning_fabric\.Fabric"),
        ({"checkpoint": 5}, "checkpoint takes a folder"),
        ({"checkpoint": "x", "resume": 5}, "resume takes True, False or the path"),
    ],
)
def test_what_fit_is_given_is_named_before_a_step(options, match):
    svi = ppvae.SVI(*pair())
    with pytest.raises(TypeError, match=match):
        ppvae.fit(svi, X, epochs=1, progress=False, **options)
    assert svi.num_steps == 0
