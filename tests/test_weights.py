"""Log-weights: shapes, masks, plates, scales, precision, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import oracles
import ppvae
from oracles import LinearGuide, LinearModel
from ppvae import elbo
from ppvae.distributions.supports import point_of
from ppvae.pairs import Leaves, signature, simulate, structure
from ppvae.terms import log_density
from ppvae.weights import dream_log_q, weigh
from registry import ALL_PAIRS, CODES, SOFT_CODES, build


def _nesting(*pair) -> int:
    return structure(*pair).nesting


def guide(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1], dim=-1):
        pyro.sample("z", dist.Normal(x.mean(0), 0.7))


def pixel_model(x: Tensor, mask: Tensor | bool = True) -> None:
    """Observe x of shape (P, N): a pixel plate around the data plate's dim."""
    with pyro.plate("data", x.shape[-1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[0], dim=-2), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_masked_flow_without_inverse_weighs_its_own_draw() -> None:
    """A hidden latent keeps its value: this flow has the density of no other tensor."""
    flow = dist.transforms.Planar(2)
    mask = torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    weights = ppvae.log_weights(model, guide, torch.zeros(3), num_particles=2)
    site = weights.guide_trace.nodes["z"]
    log_q = site["fn"].log_prob(site["value"])
    log_p = dist.Normal(0.0, 1.0).log_prob(site["value"]).sum(-1)
    log_p = log_p + dist.Normal(site["value"].sum(-1), 1.0).log_prob(torch.zeros(3))
    torch.testing.assert_close(weights.log_w, torch.where(mask, log_p - log_q, 0.0))


def test_a_whole_batch_of_one_weight_has_its_plates_size_at_its_sites() -> None:
    """A latent outside of the plate is not 10 / 4 times as much: the scale is the plate's own."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample=x):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.5, 1.0))

    weights = ppvae.log_weights(model, guide, torch.zeros(4), num_particles=3, joint=True)
    assert weights.scale == 1.0
    assert weights.site_scales == {("model", "x"): 2.5}
    torch.manual_seed(0)
    found = elbo.ELBO(3).loss(model, guide, torch.zeros(4), joint=True)
    torch.manual_seed(0)
    w = weights.guide_trace.nodes["w"]["fn"].sample()
    log_p = dist.Normal(0.0, 1.0).log_prob(w) + 2.5 * 4 * dist.Normal(w, 1.0).log_prob(
        torch.zeros(())
    )
    log_w = log_p - dist.Normal(0.5, 1.0).log_prob(w)
    assert found == pytest.approx(-log_w.mean().item(), rel=1e-5)


@pytest.mark.parametrize("event_dim", [1, 2])
def test_a_mask_inside_of_an_event_hides_its_numbers_from_the_sum(event_dim: int) -> None:
    value = torch.randn(4, 3, 5)
    mask = torch.rand(4, 3, 5) < 0.5
    fn = dist.Normal(torch.zeros(4, 3, 5), 2.0).mask(mask).to_event(event_dim)
    site = {"fn": fn, "value": torch.where(mask, value, math.nan), "mask": None, "name": "x",
            "is_observed": True, "args": (), "kwargs": {}}  # fmt: skip
    units = torch.where(mask, dist.Normal(0.0, 2.0).log_prob(value), 0.0)
    expected = units.flatten(-event_dim).sum(-1)
    torch.testing.assert_close(log_density(site), expected)


def test_what_a_list_holds_is_part_of_a_call() -> None:
    x = torch.zeros(2)
    calls = [([x, None],), ([x, x],), ([x, x[None]],), ((x,),), (x,), ([x, {"y": None}],),
             ([x, {"y": x}],), ([x, "a"],), ([x, "b"],)]  # fmt: skip
    found = [signature(args, {}) for args in calls]
    assert len(set(found)) == len(calls)
    assert signature(([x + 1, None],), {}) == found[0]


def test_a_hidden_value_is_filled_with_one_that_can_be() -> None:
    """Counts of a multinomial sum to their total, so that validation lets them pass."""
    x = torch.tensor([[1.0, 2.0, 4.0], [math.nan] * 3])
    for total in (7, 1):
        fn = dist.Multinomial(total, logits=torch.zeros(2, 3), validate_args=True)
        filled = point_of(fn.support, x[1])
        assert fn.support.check(filled)
        assert filled.sum() == total
    fn = dist.Multinomial(7, logits=torch.zeros(2, 3), validate_args=True)
    site = {"fn": fn, "value": x, "mask": torch.tensor([True, False]), "is_observed": True,
            "args": (), "kwargs": {}, "name": "x"}  # fmt: skip
    torch.testing.assert_close(log_density(site)[0], fn.log_prob(x[:1].expand(2, 3))[0])
    assert log_density(site)[1] == 0


@pytest.mark.parametrize("pair", [*ALL_PAIRS, *CODES, *SOFT_CODES])
@pytest.mark.parametrize("K", [1, 50])
@pytest.mark.parametrize("rows", [1, 6])
def test_shapes(pair: str, K: int, rows: int) -> None:
    model, guide, args = build(pair)
    for program in (model, guide):
        module = ppvae.program.module_of(program)
        module.eval()  # one row has no batch statistics
    args = [arg[:rows] for arg in args]
    if K > 1 and pair in CODES:
        with pytest.raises(ValueError, match="all draws are equal"):
            ppvae.log_weights(model, guide, *args, num_particles=K)
        return
    weights = ppvae.log_weights(model, guide, *args, num_particles=K)
    assert weights.log_w.shape == (K, rows)
    assert weights.num_particles == K
    assert weights.log_w.isfinite().all()
    total = sum(weights.log_p.values()) - sum(weights.log_q.values())
    torch.testing.assert_close(weights.log_w, total.expand(K, rows))
    assert weights.scale == 1.0 and not weights.site_scales and not weights.joint
    assert set(weights.log_q) == set(weights.latents)
    assert weights.observed == set(weights.log_p) - set(weights.latents)
    for term in [*weights.log_p.values(), *weights.log_q.values()]:
        assert term.shape == (K, rows)
    detached = weights.stop_guide()
    torch.testing.assert_close(detached.log_w, weights.log_w)
    assert not any(term.requires_grad for term in detached.log_q.values())


def test_particles_differ_and_datapoints_are_independent() -> None:
    """Permuting the rows permutes the columns: no datapoint enters another's weight."""
    model, guide, (x,) = build("vae_bernoulli")
    log_w = ppvae.log_weights(model, guide, x, num_particles=3).log_w
    assert (log_w[0] != log_w[1]).all()
    assert not torch.allclose(log_w[:, :1], log_w[:, 1:2])
    (z_grad,) = torch.autograd.grad(
        log_w[:, 2].sum(), model.likelihood.net.layers[-1].bias, retain_graph=True
    )
    x2 = x.clone()
    x2[torch.arange(6) != 2] = 0.0
    pyro.set_rng_seed(0)
    first = ppvae.log_weights(model, guide, x, num_particles=3).log_w
    pyro.set_rng_seed(0)
    second = ppvae.log_weights(model, guide, x2, num_particles=3).log_w
    torch.testing.assert_close(first[:, 2], second[:, 2])
    assert z_grad.abs().sum() > 0


# ------------------------------------------------------------------------------ masks


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 4])
def test_masking_pixels_equals_dropping_them(K: int) -> None:
    x = torch.randn(5, 3)
    mask = torch.tensor([True, False, True, True, False]).unsqueeze(-1)
    kept = x[mask.squeeze(-1)]

    def model(x: Tensor) -> None:
        pixel_model(x, mask)

    def mask_guide(full: Tensor) -> None:
        guide(kept)

    def kept_model(full: Tensor) -> None:
        pixel_model(kept)

    results = []
    for one in (model, kept_model):
        pyro.set_rng_seed(1)
        results.append(ppvae.log_weights(one, mask_guide, x, num_particles=K).log_w)
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("float64")
def test_masked_garbage_does_not_leak() -> None:
    x = torch.randn(4, 3)
    x[1, 2] = torch.nan
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    z_scale = torch.tensor(0.7, requires_grad=True)

    def masked_guide(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(0.0, z_scale))

    def model(x: Tensor) -> None:
        pixel_model(x, mask)

    with pyro.validation_enabled(False):
        log_w = ppvae.log_weights(model, masked_guide, x, num_particles=2).log_w
    assert log_w.isfinite().all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mask", [True, False, "per row"])
def test_a_mask_on_a_whole_row(mask: bool | str) -> None:
    x = torch.randn(4, 3)
    given = torch.tensor([True, False, True]) if mask == "per row" else mask

    def masked(program):
        def run(x: Tensor) -> None:
            with poutine.mask(mask=given):
                program(x)

        return run

    log_w = ppvae.log_weights(masked(pixel_model), masked(guide), x, num_particles=2).log_w
    dead = ~torch.as_tensor(given).expand(3)
    assert (log_w[:, dead] == 0).all() and (log_w[:, ~dead] != 0).all()


@pytest.mark.usefixtures("float64")
def test_a_masked_distribution_counts_as_masked() -> None:
    x = torch.randn(3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 10), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert (ppvae.log_weights(model, prior, x, num_particles=2).log_w == 0).all()


# ------------------------------------------------------------------------------ plates


def by_hand(x: Tensor, z: Tensor) -> Tensor:
    """log-weights of pixel_model and guide at z (K, N), x (P, N)."""
    log_p = dist.Normal(z.unsqueeze(-2), 1.0).log_prob(x).sum(-2)
    log_q = dist.Normal(x.mean(0), 0.7).log_prob(z)
    return log_p + dist.Normal(0.0, 1.0).log_prob(z) - log_q


def auto_dims(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", x.shape[0]):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def explicit_left(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("far", x.shape[0], dim=-4):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, None, None, :])


def event_dims(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x.T)


def sequential(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("pixels", x.shape[0]):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 4, 50])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("model", [pixel_model, auto_dims, explicit_left, event_dims, sequential])
def test_inner_plates_reduce_into_the_data_plate(model, rows: int, K: int) -> None:
    x = torch.randn(4, rows)
    weights = ppvae.log_weights(model, guide, x, num_particles=K)
    z = weights.guide_trace.nodes["z"]["value"].reshape(K, rows)
    torch.testing.assert_close(weights.log_w, by_hand(x, z))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("explicit", [True, False])
def test_the_data_plate_need_not_be_rightmost(K: int, explicit: bool) -> None:
    dims = (-1, -2) if explicit else (None, None)

    def model(x: Tensor) -> None:
        with pyro.plate("pixels", x.shape[1], dim=dims[0]):
            with pyro.plate("data", len(x), dim=dims[1]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def left_guide(x: Tensor) -> None:
        with pyro.plate("pixels", x.shape[1], dim=dims[0]):
            with pyro.plate("data", len(x), dim=dims[1]):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(3, 4)  # a latent per pixel; the guide is exact
    log_w = ppvae.log_weights(model, left_guide, x, num_particles=K).log_w
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    torch.testing.assert_close(log_w, exact.expand(K, 3))


@pytest.mark.usefixtures("float64")
def test_a_pair_that_nests_deeper_later_is_right() -> None:
    def model(x: Tensor) -> None:
        (event_dims if len(x) == 1 else pixel_model)(x)  # by its rows, which no one can foresee

    def again(x: Tensor) -> None:
        guide(x)

    ppvae.log_weights(model, again, torch.randn(1, 3), num_particles=2)
    x = torch.randn(4, 3)
    later = ppvae.log_weights(model, again, x, num_particles=2)
    z = later.guide_trace.nodes["z"]["value"].reshape(2, 3)
    right = dist.Normal(z.unsqueeze(1), 1.0).log_prob(x).sum(1) + dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(later.log_w, right - dist.Normal(x.mean(0), 0.7).log_prob(z))


def test_probing_the_nesting_leaves_no_trace() -> None:
    model, guide, args = build("vae_conv")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.get_rng_state()
    assert _nesting(model, guide, args, {}) == 1
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert model.training and all(m.training for m in guide.modules())
    assert all(p.grad is None for p in model.parameters())
    calls = []

    def watched(*a: Tensor) -> None:
        calls.append(1)
        model(*a)

    for _ in range(3):
        ppvae.log_weights(watched, guide, *args, num_particles=2)
    assert len(calls) == 4  # one probe


def test_the_first_and_second_call_draw_alike() -> None:
    results = []
    for probed in (False, True):
        model, guide, args = build("vae_residual")
        if probed:
            _nesting(model, guide, args, {})
        pyro.set_rng_seed(0)
        results.append(ppvae.log_weights(model, guide, *args, num_particles=2).log_w)
    assert torch.equal(*results)


# ------------------------------------------------------------------------------ scales


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 3])
def test_the_data_plates_scale_stays_outside_the_weights(K: int) -> None:
    model = LinearModel(2, 4)
    guide = LinearGuide(model)
    x = model.draw(5)
    weights = ppvae.log_weights(model, guide, x, size=50, num_particles=K)
    assert weights.scale == 10.0 and not weights.site_scales
    torch.testing.assert_close(weights.log_w, model.log_evidence(x).expand(K, 5))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("value", [0.1, torch.tensor(3.0)])
def test_scales_on_sites_are_listed_and_refused_by_nonlinear_bounds(value) -> None:
    model, guide = LinearModel(2, 4), None
    guide = LinearGuide(model, scale=1.3)
    x = model.draw(5)
    scaled = poutine.scale(model, scale=value)
    weights = ppvae.log_weights(scaled, guide, x, size=50)
    assert {k: float(v) for k, v in weights.site_scales.items()} == pytest.approx(
        {("model", "z"): float(value), ("model", "x"): float(value)}
    )
    assert weights.scale == 10.0
    for estimator in (elbo.IWELBO(2), elbo.IWELBO(2, "dreg"), elbo.RenyiELBO(2)):
        with pytest.raises(ValueError, match=r"site '[xz]' of the model.*elbo.ELBO\(beta"):
            estimator(scaled, guide)(x)


@pytest.mark.usefixtures("float64")
def test_an_inner_subsampled_plate_is_a_site_scale() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 8, subsample=x, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4, 3)
    assert ppvae.log_weights(model, guide, x).site_scales == {("model", "x"): 2.0}
    torch.manual_seed(0)
    loss = elbo.ELBO()(model, guide)(x)
    torch.manual_seed(0)
    stock = pyro.infer.Trace_ELBO()(model, guide)(x)
    torch.testing.assert_close(loss, stock)
    with pytest.raises(ValueError, match="inner subsampled plates"):
        elbo.IWELBO(2)(model, guide)(x)


def test_data_plates_that_differ_are_refused() -> None:
    model, guide, (x,) = build("vae_bernoulli")

    def forgetful(x: Tensor, size: int | None = None) -> None:
        guide(x)

    with pytest.raises(ValueError, match=r"6 of 60 rows in the model, 6 of 6 rows in the guide"):
        ppvae.log_weights(model, forgetful, x, size=60)


# ------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 3])
def test_low_precision_accumulates_in_float32(dtype: torch.dtype, K: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            with pyro.plate("pixels", len(x), dim=-2):
                pyro.sample("x", dist.Normal(0 * z, x.new_ones(())), obs=x)

    def low_guide(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))

    x = torch.zeros(5000, 2, dtype=dtype)  # bfloat16 has 8 bits: a sum of 5000 is lost
    log_w = ppvae.log_weights(model, low_guide, x, num_particles=K).log_w
    assert log_w.dtype == torch.float32
    each = dist.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    torch.testing.assert_close(log_w, (5000 * each).expand(K, 2), rtol=1e-5, atol=0.02)
    assert elbo.IWELBO(K)(model, low_guide)(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_low_precision_accumulate_in_float32(dtype: torch.dtype) -> None:
    def latents(x: Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.plate("many", 5000, dim=-2):
            pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))

    def model(x: Tensor) -> None:
        latents(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    weights = ppvae.log_weights(model, latents, torch.zeros(2, dtype=dtype), joint=True)
    z = weights.guide_trace.nodes["z"]["value"]
    assert z.dtype == dtype and weights.log_q["z"].dtype == torch.float32
    exact = dist.Normal(0.0, 1.0).log_prob(z.float()).sum()
    torch.testing.assert_close(weights.log_q["z"].squeeze(), exact, rtol=1e-3, atol=0.0)


def test_a_bfloat16_pair_gives_float32_weights_near_the_float32_ones() -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, guide, (x,) = build("vae_bernoulli")
        model.to(dtype), guide.to(dtype)
        pyro.set_rng_seed(0)
        results.append(_in(dtype, model, guide, x))
    assert all(r.dtype == torch.float32 for r in results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.1)


def _in(dtype: torch.dtype, model, guide, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return ppvae.log_weights(model, guide, x, num_particles=3).log_w.detach()


def test_float64_stays_float64() -> None:
    model, guide, (x,) = build("vae_bernoulli")
    model.double(), guide.double()
    assert ppvae.log_weights(model, guide, x.double(), num_particles=2).log_w.dtype == torch.float64


# ------------------------------------------------------------------------------ joint


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 4])
def test_joint_weights_of_a_global_latent(K: int) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def exact(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1.0) ** -0.5))

    x = torch.randn(5)
    weights = ppvae.log_weights(model, exact, x, num_particles=K)
    assert weights.log_w.shape == (K, 5) and set(weights.global_p) == {"mu"} == set(
        weights.global_q
    )
    weights = ppvae.log_weights(model, exact, x, num_particles=K, joint=True)
    covariance = torch.eye(5) + torch.ones(5, 5)
    evidence = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(x)
    assert weights.joint
    torch.testing.assert_close(weights.log_w, evidence.expand(K, 1))
    loss = elbo.IWELBO(K)(model, exact)(x, joint=True)
    torch.testing.assert_close(loss, -evidence)


# ------------------------------------------------------------------------------ closed forms


def two_latents(first: str, second: str):
    def program(x: Tensor, observe: bool = False) -> None:
        with pyro.plate("data", len(x)):
            head = pyro.sample(first, dist.Normal(x.new_zeros(()), 1.0))
            hidden = pyro.deterministic("h", 2 * head)
            last = pyro.sample(second, dist.Normal(0.5 * hidden, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(last, 1.0), obs=x)

    return program


def independent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Normal(x, 1.0))
        pyro.sample("a", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    ("model_order", "guide", "valid"),
    [
        ("ab", two_latents("a", "b"), {"a", "b"}),  # top-down in both
        ("ab", two_latents("b", "a"), {"a"}),  # bottom-up: b's model parent a is drawn from it
        ("ab", independent, {"a", "b"}),  # whatever the order of its sites
    ],
)
def test_kl_valid_follows_dependence_not_order(model_order: str, guide, valid: set) -> None:
    program = two_latents(*model_order)

    def model(x: Tensor) -> None:
        program(x, observe=True)

    weights = ppvae.log_weights(model, guide, torch.randn(3))
    assert weights.kl_valid() == valid


def test_kl_valid_follows_dependence_over_a_link() -> None:
    """z1 depends on z3 in the model, and the guide draws z3 from z1 by way of z2."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z3 = pyro.sample("z3", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(0.9 * z3, 1.0))
            pyro.sample("x", dist.Normal(z1 + 0.5 * z2, 1.0), obs=x)

    def upwards(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x, 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.8 * z1, 1.0))
            pyro.sample("z3", dist.Normal(0.8 * z2, 1.0))

    x = torch.linspace(-2.0, 2.0, 5).repeat(2000)
    assert ppvae.log_weights(model, upwards, x).kl_valid() == {"z2", "z3"}
    sampled, mixed = (
        estimator.effective(ppvae.log_weights(model, upwards, x), estimator.new_state())[0]
        for estimator in (elbo.ELBO(), elbo.ELBO(kl="mixed"))
    )
    oracles.assert_mean(mixed - sampled, 0.0)


def test_what_is_known_of_a_model_is_known_beside_one_guide() -> None:
    program = two_latents("a", "b")

    def model(x: Tensor) -> None:
        program(x, observe=True)

    def apart(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(x, 1.0))
            pyro.sample("a", dist.Normal(x, 1.0))

    def upwards(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x, 1.0))
            pyro.sample("a", dist.Normal(b, 1.0))

    x = torch.randn(3)
    for guide, valid in ((apart, {"a", "b"}), (upwards, {"a"}), (apart, {"a", "b"})):
        assert ppvae.log_weights(model, guide, x).kl_valid() == valid


def test_kl_valid_follows_an_order_that_nothing_shows() -> None:
    """Neither the arguments nor a flag of the guide say which way it goes."""
    first = ["a"]
    ways = {"a": two_latents("a", "b"), "b": two_latents("b", "a")}
    program = two_latents("a", "b")

    def model(x: Tensor) -> None:
        program(x, observe=True)

    def guide(x: Tensor) -> None:
        ways[first[0]](x)

    x = torch.randn(3)
    for name, valid in (("a", {"a", "b"}), ("b", {"a"}), ("a", {"a", "b"})):
        first[0] = name
        assert ppvae.log_weights(model, guide, x).kl_valid() == valid


# ------------------------------------------------------------------------------ simulated data


def test_simulated_data_stand_in_the_place_of_every_observed_argument() -> None:
    def model(x: Tensor, y: Tensor, w: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("w", dist.Normal(-z, 1.0), obs=w)

    def guide(x: Tensor, y: Tensor, w: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y - w) / 3, 0.6))

    given = tuple(torch.full((4,), 100.0 * i) for i in (1, 2, 3))
    dreamt, dream = simulate(model, given, {})
    assert dreamt[1] is given[1]
    for value, name in ((dreamt[0], "x"), (dreamt[2], "w")):
        assert torch.equal(value, dream.nodes[name]["value"])
        assert not torch.equal(value, given[0]) and not torch.equal(value, given[2])
    torch.manual_seed(3)
    log_q = dream_log_q(model, guide, *given)
    torch.manual_seed(3)
    (x, y, w), dream = simulate(model, given, {})
    exact = dist.Normal((x + y - w) / 3, 0.6).log_prob(dream.nodes["z"]["value"])
    torch.testing.assert_close(log_q, exact.unsqueeze(0))


# ------------------------------------------------------------------------------ refusals


def no_plate_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.expand(4, 3), 1.0).to_event(2), obs=x)


def no_plate_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x.mean(0), 1.0).to_event(1))


def unobserved(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1]):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def empty_guide(x: Tensor) -> None:
    pass


def wordy_guide(x: Tensor) -> None:
    with pyro.plate("data", x.shape[-1], dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "names", "cure"),
    [
        (pixel_model, empty_guide, r"latent \['z'\]", "Sample every latent of the model"),
        (pixel_model, wordy_guide, r"samples \['extra'\]", r"r\(a \| z\)"),
        (unobserved, guide, "no observed site", "obs=x"),
        (no_plate_model, no_plate_guide, "site '[xz]'.* lies outside", 'with pyro.plate\\("data"'),
    ],
)
@pytest.mark.parametrize("K", [1, 3])
def test_refusals_name_the_site_and_the_cure(model, guide, names: str, cure: str, K: int) -> None:
    x = torch.randn(4, 3)
    for match in (names, cure):
        with pytest.raises(ValueError, match=match):
            ppvae.log_weights(model, guide, x, num_particles=1 if model is no_plate_model else K)
        with pytest.raises(ppvae.PairError, match=match):
            ppvae.check_pair(model, guide, x)


def test_an_auxiliary_site_with_a_density_of_its_own_is_refused() -> None:
    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))

    with pytest.raises(ValueError, match=r"draws \['u'\] beside .* integral"):
        ppvae.log_weights(pixel_model, auxiliary, torch.randn(4, 3), num_particles=2)


def test_an_auxiliary_site_that_is_the_noise_of_a_latent_enters_log_q() -> None:
    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2.0 * u, log_density=-math.log(2.0)))

    weights = ppvae.log_weights(pixel_model, auxiliary, torch.randn(4, 3), num_particles=2)
    z = weights.guide_trace.nodes["z"]["value"].reshape(2, 3)
    log_q = weights.log_q["u"] + weights.log_q["z"]
    torch.testing.assert_close(log_q, dist.Normal(0.0, 2.0).log_prob(z))


def test_more_noise_than_the_latents_have_coordinates_is_refused() -> None:
    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            noise = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
            u = pyro.sample("u", noise, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.sum(-1), log_density=-math.log(2.0)))

    with pytest.raises(ValueError, match=r"draws \['u'\] beside .* integral"):
        ppvae.log_weights(pixel_model, auxiliary, torch.randn(4, 3), num_particles=2)


def test_num_particles_is_checked() -> None:
    with pytest.raises(ValueError, match=r"at least 1, .*got 0"):
        ppvae.log_weights(pixel_model, guide, torch.randn(4, 3), num_particles=0)


@pytest.mark.usefixtures("float64")
def test_at_leaves_the_weights_are_the_same() -> None:
    model = oracles.TwoLevelModel()
    guide = oracles.TwoLevelGuide(model, bottom_up=True, shift=0.3)
    x = torch.randn(4)
    torch.manual_seed(0)
    plain = ppvae.log_weights(model, guide, x, num_particles=3)
    torch.manual_seed(0)
    leaves = Leaves()
    weights = weigh(model, guide, (x,), {}, 3, leaves=leaves)
    torch.testing.assert_close(weights.log_w, plain.log_w)
    assert len(leaves.pairs) == 2
    for z, leaf in leaves.pairs:
        assert leaf.is_leaf and leaf.requires_grad and not z.is_leaf
        assert torch.equal(z, leaf)


@pytest.mark.parametrize("scale", [0.95, 1.05, torch.tensor(1.0)])
def test_a_scale_near_one_is_a_scale(scale) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.arange(3.0)
    weights = ppvae.log_weights(model, guide, x, num_particles=2)
    assert weights.site_scales.keys() == {("model", "x")}
    found = elbo.ELBO(2).effective(weights, elbo.State())
    torch.testing.assert_close(found, weights.log_p["x"] * scale)
    with pytest.raises(ValueError, match="the scale on site 'x' of the model"):
        elbo.IWELBO(2).effective(weights, elbo.State())


# the two that are written as in Pyro's own tutorials take no size
@pytest.mark.parametrize("name", sorted((ALL_PAIRS | CODES).keys() - {"tutorial", "pyro_modules"}))
def test_a_minibatch_of_a_larger_data_set_is_scaled(name: str) -> None:
    model, guide, args = build(name)
    weights = ppvae.log_weights(model, guide, *args, size=60)
    rows = len(args[0])
    assert weights.scale == 60 / rows and weights.full_size == 60 and not weights.site_scales


class TwoGuides(ppvae.Program):
    """A model of two levels and two guides, with one order of sites."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = False

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)
            if self.wide:
                with pyro.plate("inner", 2, dim=-2):
                    pyro.sample("v", dist.Normal(z1, 1.0), obs=x.expand(2, -1))

    def apart(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(x / 2, 1.0))
            pyro.sample("z2", dist.Normal(x / 3, 1.0))

    def bottom_up(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 2, 1.0))
            pyro.sample("z2", dist.Normal(z1 / 2, 1.0))


def test_what_is_known_of_one_method_is_not_of_another() -> None:
    pair, x = TwoGuides(), torch.arange(3.0)
    valid = [
        ppvae.log_weights(pair, guide, x).kl_valid()
        for guide in (pair.apart, pair.bottom_up, pair.apart)
    ]
    assert valid[0] == valid[2] == {"z1", "z2"} and "z1" not in valid[1]


class Shifted(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 2 + self.shift, 1.0))
            pyro.sample("z2", dist.Normal(z1 / 2, 1.0))


def test_an_inner_plate_of_a_later_call_has_its_own_draws_only() -> None:
    """A run that fails, since it was prepared for fewer plates, leaves no draws behind."""
    model, guide, x = TwoGuides(), Shifted(), torch.arange(3.0)
    loss = elbo.IWELBO(3, "dreg")(model, guide)
    loss(x)
    model.wide = True
    assert torch.autograd.grad(loss(x), guide.shift)[0].isfinite()
