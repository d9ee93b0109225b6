"""Latents that are summed out, masks and dims: values known from elsewhere."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

import ppvae
from ppvae import elbo
from ppvae.enumeration import draw, groups
from ppvae.program import data_plate
from ppvae.terms import Term

SUMMED = {"enumerate": "parallel"}
pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------------------ draws and zeros


def test_a_class_that_the_guide_rules_out_counts_nothing() -> None:
    """0 log 0 is 0, also where the class is impossible in the model: no NaN, nor in a gradient."""
    prior = torch.tensor([0.3, -0.2, -math.inf], requires_grad=True)
    loc, x = torch.tensor([-1.0, 2.0, 50.0]), torch.randn(4)
    slope = torch.tensor([0.4, -0.1, 0.0], requires_grad=True)
    possible = torch.tensor([0.0, 0.0, -math.inf])

    def pair(classes: int) -> tuple[Any, Any]:
        def model(x: Tensor) -> None:
            with data_plate(x):
                c = pyro.sample("c", dist.Categorical(logits=prior[:classes]), infer=SUMMED)
                pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with data_plate(x):
                logits = (x.unsqueeze(-1) * slope + possible)[:, :classes]
                pyro.sample("c", dist.Categorical(logits=logits), infer=SUMMED)

        return model, guide

    losses = [elbo.ELBO().differentiable_loss(*pair(classes), x) for classes in (2, 3)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, [prior, slope]) for loss in losses]
    torch.testing.assert_close(*gradients)


def test_latents_that_are_summed_out_are_drawn_together() -> None:
    """c, and beside it a d for each element of a plate, against the exact joint posterior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer=SUMMED)
            with pyro.plate("parts", 2, dim=-2):
                d = pyro.sample("d", dist.Bernoulli(0.1 + 0.8 * c), infer=SUMMED)
                pyro.sample("x", dist.Normal(d, 0.7), obs=x)

    rows, x = 20_000, torch.tensor([0.2, 0.9])
    weights = ppvae.log_weights(model, nothing, x.unsqueeze(-1).expand(2, rows))
    drawn = draw(weights.model_factors().values(), weights.enumerated.values())
    c, d = (drawn[weights.enumerated[name]].values for name in "cd")
    found = torch.stack([c.reshape(rows), *d.reshape(2, rows)])
    for state in itertools.product([0.0, 1.0], repeat=3):
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
        every_c, every_d = states[:, 0], states[:, 1:]
        joint = dist.Bernoulli(0.4).log_prob(every_c) + (
            dist.Bernoulli(0.1 + 0.8 * every_c.unsqueeze(-1)).log_prob(every_d)
            + dist.Normal(every_d, 0.7).log_prob(x)
        ).sum(-1)
        exact = joint.softmax(0)[(states == torch.tensor(state)).all(1)].item()
        share = (found == torch.tensor(state).unsqueeze(-1)).all(0).double().mean().item()
        assert abs(share - exact) < 4.5 * math.sqrt(exact * (1 - exact) / rows), state


# ------------------------------------------------------------------------------ Markov chains

START = torch.tensor([0.6, 0.4], dtype=torch.float64)
STEP = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
EMIT = torch.tensor([0.2, 0.8], dtype=torch.float64)


def hidden_markov(steps: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h = None
            for t in steps():
                probs = START if h is None else STEP[h]
                h = pyro.sample(f"h{t}", dist.Categorical(probs), infer=SUMMED)
                pyro.sample(f"x{t}", dist.Bernoulli(EMIT[h]), obs=x[:, t])

    return model


def nothing(x: Tensor) -> None:
    pass


def forward_algorithm(x: Tensor) -> Tensor:
    alpha = START.log()
    for t in range(x.shape[1]):
        alpha = (alpha.unsqueeze(-1) + STEP.log()).logsumexp(-2) if t else alpha.expand(len(x), 2)
        alpha = alpha + dist.Bernoulli(EMIT).log_prob(x[:, t : t + 1])
    return alpha.logsumexp(-1)


@pytest.mark.parametrize("steps", [1, 5, 45])  # 45: too many dims for one each
@pytest.mark.parametrize("K", [1, 3])
def test_a_hidden_markov_model(steps: int, K: int) -> None:
    x = torch.bernoulli(torch.full((4, steps), 0.5))
    weights = ppvae.log_weights(
        hidden_markov(lambda: pyro.markov(range(steps))), nothing, x, num_particles=K
    )
    torch.testing.assert_close(weights.log_w, forward_algorithm(x).expand(K, 4))


def test_a_plain_loop_is_the_same_chain_in_model_and_guide() -> None:
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    flat = {name: hidden_markov(steps) for name, steps in CHAINS.items()}
    for of_model, of_guide in itertools.product(CHAINS, CHAINS):

        def guide(x: Tensor, steps: Any = CHAINS[of_guide]) -> None:
            with pyro.plate("data", len(x)):
                h = None
                for t in steps():
                    probs = START if h is None else STEP[h].flip(-1)
                    h = pyro.sample(f"h{t}", dist.Categorical(probs), infer=SUMMED)

        def logs(classes: tuple[int, ...], step: Tensor) -> Tensor:
            pairs = itertools.pairwise(classes)
            return START[classes[0]].log() + sum(step[a, b].log() for a, b in pairs)

        right = torch.zeros(2)
        for h in itertools.product(range(2), repeat=3):
            q = logs(h, STEP.flip(-1))
            data = dist.Bernoulli(EMIT[list(h)]).log_prob(x).sum(-1)
            right = right + q.exp() * (logs(h, STEP) + data - q)
        found = elbo.ELBO().evaluate(flat[of_model], guide, x)
        torch.testing.assert_close(found, right)


CHAINS = {"loop": lambda: range(3), "markov": lambda: pyro.markov(range(3))}


def test_a_model_that_remembers_more_than_it_says() -> None:
    second = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.4, 0.6]]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h: list[Any] = [0, 0]
            for t in pyro.markov(range(4)):  # it says that one step is remembered
                h.append(pyro.sample(f"h{t}", dist.Categorical(second[h[-2], h[-1]]), infer=SUMMED))
                pyro.sample(f"x{t}", dist.Bernoulli(EMIT[h[-1]]), obs=x[:, t])

    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    total = torch.zeros(())
    for h in itertools.product(range(2), repeat=4):
        past = (0, 0, *h)
        p = math.prod(float(second[past[t], past[t + 1], past[t + 2]]) for t in range(4))
        total = total + p * dist.Bernoulli(EMIT[list(h)]).log_prob(x[0]).sum().exp()
    found = ppvae.log_weights(model, nothing, x).log_w
    torch.testing.assert_close(found, total.log().reshape(1, 1))


def test_terms_that_disagree_by_hundreds_of_nats() -> None:
    """Class 0 is ruled out by one observation, class 2 by the other; class 1 is what is left."""

    def model(x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer=SUMMED)
            loc = torch.tensor([0.0, 30.0, 60.0])[c]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("y", dist.Normal(60.0 - loc, 1.0), obs=x)

    x = torch.zeros(2)
    found = ppvae.log_weights(lambda x: model(x.float()), nothing, x).log_w
    right = 2 * dist.Normal(30.0, 1.0).log_prob(torch.tensor(0.0)) - math.log(3)
    torch.testing.assert_close(found.double(), right.expand(1, 2), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------ what is remembered


class Labelled(ppvae.Program):
    """y is given in some calls; z | x is not affected."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.randn(3))
        self.with_labels = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3), obs=y, infer=SUMMED)
            pyro.sample("x", dist.Normal(self.loc[y] + z, 1.0), obs=x)


def zed(x: Tensor, y: Tensor | None = None) -> None:
    with data_plate(x):
        pyro.sample("z", dist.Normal(0.3 * x, 0.9))


X, Y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64), torch.tensor([0, 2, 1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((X, Y), {}), ((X,), {})),
        (((X,), {"y": Y}), ((X,), {"y": None})),
        (((X, Y), {}), ((X, None), {})),
        (((X, None), {}), ((X, Y), {})),
    ],
)
def test_labels_in_one_call_and_not_in_the_next(first: Any, second: Any) -> None:
    used, fresh = Labelled(), Labelled()
    fresh.load_state_dict(used.state_dict())
    ppvae.log_weights(used, zed, *first[0], **first[1])
    results = []
    for model in (used, fresh):
        torch.manual_seed(0)
        results.append(ppvae.log_weights(model, zed, *second[0], **second[1]).log_w)
    assert torch.equal(*results)


def test_a_setting_that_no_argument_shows() -> None:
    """What the signature of a call does not say is seen after the run, which is then repeated."""
    hidden = {"labels": True}

    class Model(Labelled):
        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            super().forward(x, Y if hidden["labels"] else None)

    model = Model()
    ppvae.log_weights(model, zed, X, num_particles=2)
    hidden["labels"] = False
    weights = ppvae.log_weights(model, zed, X, num_particles=2)
    z = weights.guide_trace.nodes["z"]["value"]
    each = dist.Normal(model.loc.unsqueeze(-1).unsqueeze(-1) + z, 1.0).log_prob(X) - math.log(3)
    right = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.3 * X, 0.9).log_prob(z)
    torch.testing.assert_close(weights.log_w, right + each.logsumexp(0))


def test_a_mask_that_another_latent_decides_is_a_parent() -> None:
    """The guide draws b before a, and in the model a decides whether b counts."""

    def model(x: Tensor) -> None:
        with data_plate(x):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with pyro.poutine.mask(mask=a > 0):
                pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with data_plate(x):
            b = pyro.sample("b", dist.Normal(0.5 * torch.ones(()), 1.0))
            pyro.sample("a", dist.Normal(2 * b, 0.3))

    assert ppvae.log_weights(model, guide, X).kl_valid() == {"a"}
    with pytest.raises(ValueError, match=r"'b'.* depends on a latent"):
        elbo.ELBO(kl="analytic")(model, guide)(X)


@pytest.mark.parametrize("how", ["argument", "attribute", "global", "closure"])
def test_where_a_closed_form_is_valid_is_asked_anew(how: str, monkeypatch: Any) -> None:
    up = [False]

    class Guide(ppvae.Program):
        upwards = False

        def forward(self, x: Tensor, given: bool = False) -> None:
            upwards = {"argument": given, "attribute": self.upwards, "closure": up[0]}.get(how, UP)
            with data_plate(x):
                if upwards:
                    a = pyro.sample("a", dist.Normal(x, 0.5))
                    pyro.sample("b", dist.Normal(0.9 * a, 0.5))
                else:
                    b = pyro.sample("b", dist.Normal(x, 0.5))
                    pyro.sample("a", dist.Normal(b, 0.5))

    def model(x: Tensor, given: bool = False) -> None:
        with data_plate(x):
            b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
            a = pyro.sample("a", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    guide = Guide()
    assert ppvae.log_weights(model, guide, X, False).kl_valid() == {"a", "b"}
    guide.upwards = how == "attribute"
    up[0] = how == "closure"
    monkeypatch.setitem(globals(), "UP", how == "global")
    weights = ppvae.log_weights(model, guide, X, how == "argument")
    assert weights.kl_valid() == {"b"}


UP = False


# ------------------------------------------------------------------------------ infer=


@pytest.mark.parametrize("site_infer", [{"enumerate": "sequential"}, {"enumerate": True}])
def test_enumeration_that_is_not_done_here_is_refused(site_infer: dict) -> None:
    def model(x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer=site_infer)
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer=site_infer)

    with pytest.raises(ValueError, match=r"'c': infer=.*is not done here.*parallel"):
        ppvae.log_weights(model, guide, X)


@pytest.mark.parametrize("few", [1, 5])
def test_a_few_drawn_values_are_no_sum(few: int) -> None:
    def model(x: Tensor) -> None:
        with data_plate(x):
            infer = {"enumerate": "parallel", "num_samples": few}
            c = pyro.sample("c", dist.Normal(0.0, 1.0), infer=infer)
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'c': with infer=.*num_samples"):
        ppvae.log_weights(model, nothing, X)


def test_a_continuous_latent_cannot_be_enumerated() -> None:
    def model(x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", dist.Normal(0.0, 1.0), infer=SUMMED)
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'c' is marked to be enumerated.*no finite support"):
        ppvae.log_weights(model, nothing, X)


# ------------------------------------------------------------------------------ dims


def test_a_dim_to_the_left_of_the_particles_is_refused() -> None:
    W = torch.randn(2, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("dims", 4, dim=-2):
                pyro.sample("x", dist.Normal((z @ W).transpose(-1, -2), 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 * x[:, :2], 1.0).to_event(1))

    x = torch.randn(5, 4)
    assert ppvae.log_weights(model, guide, x).log_w.shape == (1, 5)
    message = r"site 'x' has log-probabilities of shape \(3, 3, 4, .\).*to_event"
    with pytest.raises(ValueError, match=message):
        ppvae.log_weights(model, guide, x, num_particles=3)
    with pytest.raises(ppvae.PairError, match=message):
        ppvae.check_pair(model, guide, x)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(
    "estimator",
    [elbo.ELBO, elbo.IWELBO, elbo.ReweightedWakeSleep, elbo.ThermodynamicELBO],
)
def test_a_column_against_a_row(estimator: Any, K: int) -> None:
    def model(x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0), obs=x)  # (N, 1) against (N,)

    K = K if estimator in (elbo.ELBO, elbo.IWELBO) else 3
    with pytest.raises(ValueError, match="site 'x' has log-probabilities of shape"):
        estimator(num_particles=K)(model, zed)(X)


@pytest.mark.parametrize("K", [1, 3])
def test_rows_in_a_plate_of_one_are_refused(K: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site 'x' has log-probabilities of shape .*3.*\(-1, 1\)"):
        ppvae.log_weights(model, guide, X, num_particles=K)


def test_a_term_that_is_one_number_for_a_plate_counts_for_each_of_it() -> None:
    class Shared(dist.Normal):
        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return self  # says nothing of the plate

    def model(x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("four", 4, dim=-2):
                pyro.sample("s", Shared(1.0, 2.0), obs=torch.tensor(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    weights = ppvae.log_weights(model, zed, X)
    one = dist.Normal(1.0, 2.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(weights.log_p["s"].expand(1, 3), (4 * one).expand(1, 3))


# ------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("kind", ["site", "distribution", "elements"])
def test_nan_under_a_mask_has_no_gradient(kind: str) -> None:
    x = torch.randn(4, 3)
    seen = torch.tensor([True, False, True, True])
    elements = seen.unsqueeze(-1).expand(4, 3).clone()
    elements[0, 1] = False
    hidden = elements if kind == "elements" else seen.unsqueeze(-1).expand(4, 3)
    coded = torch.where(hidden, x, math.nan)
    weight = torch.nn.Parameter(torch.randn(3))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z.unsqueeze(-1) * weight, weight.exp())
            if kind == "elements":
                pyro.sample("x", fn.mask(elements).to_event(1), obs=x)
            elif kind == "distribution":
                pyro.sample("x", fn.to_event(1).mask(seen), obs=x)
            else:
                with poutine.mask(mask=seen):
                    pyro.sample("x", fn.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    results = []
    for data in (coded, x):
        torch.manual_seed(0)
        value = ppvae.log_weights(model, guide, data, num_particles=2).log_w.sum()
        results.append((value, *torch.autograd.grad(value, weight)))
    assert results[0][1].isfinite().all()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("fn", "bad"),
    [
        (dist.Bernoulli(torch.full((3,), 0.3)), -7.0),
        (dist.Poisson(torch.full((3,), 2.0)), -7.0),
        (dist.Gamma(torch.full((3,), 2.0), 1.0), -7.0),
        (dist.Beta(torch.full((3,), 2.0), 1.0), math.nan),
        (dist.Categorical(torch.ones(3, 4) / 4), 11.0),
        (dist.OneHotCategorical(torch.ones(3, 4) / 4), 7.0),
        (dist.Dirichlet(torch.ones(3, 4)), math.nan),
        (dist.Multinomial(5, torch.ones(3, 4) / 4), 7.0),
        (dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)), math.nan),
        (dist.VonMises(torch.zeros(3), 1.0), math.nan),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_mask_hides_may_lie_outside_of_the_support(fn: Any, bad: float) -> None:
    good, seen = fn.sample(), torch.tensor([True, False, True])
    values = good.clone()
    values[1] = bad

    def model(x: Tensor) -> None:
        with data_plate(x), poutine.mask(mask=seen):
            pyro.sample("x", fn, obs=x)

    found = ppvae.log_weights(model, nothing, values).log_w[0]
    torch.testing.assert_close(found, torch.where(seen, fn.log_prob(good), 0.0))


def masked_pair(q_mask: Any, p_mask: Any, where: str, event: bool = True) -> tuple[Any, Any]:
    def hide(fn: Any, mask: Any) -> Any:
        fn = fn.to_event(1) if event else fn
        return fn.mask(mask) if where == "distribution" and mask is not None else fn

    def site_mask(mask: Any) -> Any:
        return poutine.mask(mask=True if mask is None or where == "distribution" else mask)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with site_mask(p_mask):
                z = pyro.sample("z", hide(dist.Normal(torch.zeros(2), 1.0), p_mask))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), site_mask(q_mask):
            pyro.sample("z", hide(dist.Normal(x, 0.4), q_mask))

    return model, guide


ROWS = torch.tensor([True, False, True])


@pytest.mark.parametrize("where", ["site", "distribution"])
@pytest.mark.parametrize(
    ("q_mask", "p_mask"),
    [(ROWS, None), (None, ROWS), (ROWS, ROWS), (ROWS, ROWS.clone()), (ROWS, ~ROWS)],
    ids=["q", "p", "same", "equal", "opposite"],
)
def test_a_closed_form_under_masks(q_mask: Any, p_mask: Any, where: str) -> None:
    x = torch.randn(3, 2)
    model, guide = masked_pair(q_mask, p_mask, where)
    q, p = dist.Normal(x, 0.4), dist.Normal(torch.zeros(2), 1.0)
    everything = torch.ones(3, dtype=torch.bool)
    q_seen, p_seen = (everything if m is None else m for m in (q_mask, p_mask))
    entropy, cross = q.entropy().sum(-1), (q.entropy() + kl_divergence(q, p)).sum(-1)
    right = torch.where(p_seen, cross, 0.0) - torch.where(q_seen, entropy, 0.0)
    for kl in ("analytic", "mixed"):
        weights = ppvae.log_weights(model, guide, x)
        _, rates = elbo.ELBO(kl=kl).terms(weights)
        torch.testing.assert_close(rates["z"], right.expand(1, 3))
        free = elbo.ELBO(kl=kl, beta=elbo.FreeBits(0.0, per_dimension=True))
        _, units = free.terms(weights)
        torch.testing.assert_close(units["z"].sum(0), right.expand(1, 3))


@pytest.mark.parametrize("where", ["site", "distribution"])
@pytest.mark.parametrize("scale", [1.0, 3.0, torch.tensor([1.0, 2.0, 5.0])])
@pytest.mark.parametrize(("q_mask", "p_mask"), [(None, None), (ROWS, None), (None, ROWS)])
def test_free_bits_of_zero_are_the_elbo(q_mask: Any, p_mask: Any, scale: Any, where: str) -> None:
    x = torch.randn(3, 2)
    model, guide = masked_pair(q_mask, p_mask, where)

    def scaled(program: Any) -> Any:
        def weighed(x: Tensor) -> None:
            with poutine.scale(scale=scale):
                program(x)

        return weighed

    losses = []
    for beta in (1.0, elbo.FreeBits(0.0), elbo.FreeBits(0.0, per_dimension=True)):
        torch.manual_seed(0)
        losses.append(elbo.ELBO(300, beta=beta).loss(scaled(model), scaled(guide), x))
    assert losses[1:] == pytest.approx(losses[:2], rel=1e-9)


@pytest.mark.parametrize("kl", ["sampled", "mixed"])
def test_free_bits_know_every_mask_of_a_distribution(kl: str) -> None:
    rows, others = torch.tensor([[True, True, False], [True, False, True]])
    hidden = [
        lambda fn: fn.to_event(1).mask(rows & others),
        lambda fn: fn.to_event(1).mask(rows).mask(others),
        lambda fn: fn.mask(rows.unsqueeze(-1)).to_event(1).mask(others),
    ]
    x, losses = torch.randn(3, 2), []
    for hide in hidden:

        def model(x: Tensor, hide: Any = hide) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", hide(dist.Normal(torch.zeros(3, 2), 1.0)))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x: Tensor, hide: Any = hide) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", hide(dist.Normal(x, 0.4)))

        torch.manual_seed(0)
        beta = elbo.FreeBits(0.0, per_dimension=True)
        losses.append(elbo.ELBO(50, beta=beta, kl=kl).loss(model, guide, x))
    assert losses[1:] == pytest.approx(losses[:1] * 2)


@pytest.mark.parametrize("K", [1, 3])
def test_a_mask_inside_of_an_enumerated_latent(K: int) -> None:
    """A hidden latent is still summed out with its probabilities, wherever the mask is."""
    found = []
    for hide in (lambda fn: fn.mask(ROWS), lambda fn: dist.Independent(fn.mask(ROWS), 0)):

        def model(x: Tensor, hide: Any = hide) -> None:
            with pyro.plate("data", len(x)):
                fn = hide(dist.Bernoulli(torch.full((3,), 0.3)))
                c = pyro.sample("c", fn, infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(3 * c, 1.0), obs=x)

        found.append(ppvae.log_weights(model, lambda x: None, X, num_particles=K).log_w)
    sums = [dist.Bernoulli(0.3).log_prob(c) + dist.Normal(3 * c, 1.0).log_prob(X)
            for c in torch.tensor([0.0, 1.0])]  # fmt: skip
    for log_w in found:
        torch.testing.assert_close(log_w, torch.stack(sums).logsumexp(0).expand(K, 3))


def test_a_mask_that_both_programs_compute() -> None:
    x, lengths = torch.randn(5, 4), torch.tensor([1, 4, 2, 3, 4])

    def steps(lengths: Tensor) -> Any:
        return poutine.mask(mask=torch.arange(4)[:, None] < lengths)

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("time", 4, dim=-2), steps(lengths):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("time", 4, dim=-2), steps(lengths):
            pyro.sample("z", dist.Normal(x.T / 2, 0.5))

    weights = ppvae.log_weights(model, guide, x, lengths)
    _, rates = elbo.ELBO(kl="analytic").terms(weights)
    kl = kl_divergence(dist.Normal(x.T / 2, 0.5), dist.Normal(0.0, 1.0))
    right = (kl * (torch.arange(4)[:, None] < lengths)).sum(0)
    torch.testing.assert_close(rates["z"], right.expand(1, 5))


# ------------------------------------------------------------------------------ bounds


def subsampled(outer: bool) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2 if outer else None, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("pixels", 4, subsample_size=None if outer else 2, dim=-2) as i:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows].T[i])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2 if outer else None, dim=-1) as rows:
            pyro.sample("z", dist.Normal(x[rows].mean(1), 0.5))

    return model, guide


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("estimator", [elbo.ELBO(3), elbo.IWELBO(3), elbo.RenyiELBO(3)])
def test_a_bound_is_of_whole_rows(estimator: Any, outer: bool) -> None:
    model, guide = subsampled(outer)
    plate = "'data' takes 2 of 5" if outer else "'pixels' takes 2 of 4"
    with pytest.raises(ValueError, match=f"plate {plate} by itself"):
        estimator.evaluate(model, guide, torch.randn(5, 4))
    if not outer:  # two rows, and two pixels of four: still not whole
        with pytest.raises(ValueError, match=f"plate {plate} by itself"):
            estimator.evaluate(model, guide, torch.randn(2, 4))


def test_a_minibatch_of_a_larger_data_set_is_whole() -> None:
    def model(x: Tensor) -> None:
        with data_plate(x, size=100):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with data_plate(x, size=100):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    exact = dist.Normal(0.0, 2**0.5).log_prob(X)
    torch.testing.assert_close(elbo.ELBO().evaluate(model, guide, X), exact)


def test_a_reported_bound_has_weight_one() -> None:
    x = torch.randn(3, 2)
    plain = masked_pair(None, None, "site")
    weighed = [poutine.scale(program, scale=0.01) for program in plain]
    bounds = []
    for pair in (plain, weighed):
        torch.manual_seed(0)
        bounds.append(elbo.ELBO(5).evaluate(*pair, x))
    assert torch.equal(*bounds)


def test_plates_that_cross_are_refused() -> None:
    def model(x: Tensor) -> None:
        with data_plate(x):
            rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-3)
            with rows:
                a = pyro.sample("a", dist.Categorical(torch.ones(2) / 2), infer=SUMMED)
            with columns:
                b = pyro.sample("b", dist.Categorical(torch.ones(2) / 2), infer=SUMMED)
            with rows, columns:
                pyro.sample("x", dist.Normal(1.0 * a + b, 1.0), obs=x.expand(2, 2, -1))

    with pytest.raises(ValueError, match="plates that cross each other"):
        ppvae.log_weights(model, nothing, X)


@pytest.mark.parametrize("K", [1, 4])
def test_latents_in_an_inner_plate_against_stock_pyro(K: int) -> None:
    probs = torch.nn.Parameter(torch.tensor([0.2, 0.3, 0.5]))
    loc = torch.nn.Parameter(torch.randn(3))

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", x.shape[0], dim=-2):
                c = pyro.sample("c", dist.Categorical(probs), infer=SUMMED)
                pyro.sample("x", dist.Normal(loc[c] + z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 0.5))

    x, found = torch.randn(4, 3), []
    stock = TraceEnum_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=2)
    for loss in (stock.differentiable_loss, elbo.ELBO(K).differentiable_loss):
        torch.manual_seed(0)
        value = loss(model, guide, x)
        found.append((value, *torch.autograd.grad(value, (probs, loc))))
    torch.testing.assert_close(*found)


class Chain(ppvae.Program):
    """A hidden Markov model whose emissions share a continuous latent."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.move = torch.nn.Parameter(torch.randn(2, 2))
        self.emit = torch.nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            h: Any = 0
            for t in pyro.markov(range(self.steps)):
                h = pyro.sample(f"h{t}", dist.Categorical(logits=self.move[h]), infer=SUMMED)
                pyro.sample(f"x{t}", dist.Normal(self.emit[h] + z, 1.0), obs=x[:, t])


class ChainGuide(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 2)

    def forward(self, x: Tensor) -> None:
        loc, raw = self.net(x.mean(1, keepdim=True)).unbind(-1)
        with data_plate(x):
            pyro.sample("z", dist.Normal(loc, raw.exp()))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [elbo.ELBO(3), elbo.IWELBO(3), elbo.IWELBO(3, "dreg")])
def test_a_compiled_step_sums_out_as_an_eager_one(estimator: Any) -> None:
    x, found = torch.randn(6, 5), []
    for compiled in (True, False):
        torch.manual_seed(0)
        model, guide = Chain(5), ChainGuide()
        svi = ppvae.SVI(model, guide, torch.optim.SGD, estimator, compile=compiled)
        torch.manual_seed(1)
        losses = [svi.step(x), svi.step(-x)]
        found.append((torch.tensor(losses), *model.parameters(), *guide.parameters()))
    torch.testing.assert_close(*found)


def test_a_global_latent_is_summed_out_of_the_whole_batch() -> None:
    loc = torch.tensor([-1.0, 0.5, 2.0])

    def model(x: Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer=SUMMED)
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)

    found = ppvae.log_weights(model, nothing, X, joint=True, num_particles=2).log_w
    right = dist.Normal(loc.unsqueeze(-1), 1.0).log_prob(X).sum(-1).logsumexp(0) - math.log(3)
    torch.testing.assert_close(found, right.expand(2, 1))


@pytest.mark.parametrize(
    "fn",
    [
        dist.Poisson(torch.full((1,), 200.0)),
        dist.Geometric(torch.full((1,), 0.05)),
        dist.Binomial(255, torch.full((1,), 0.5)),
        dist.NegativeBinomial(10.0, torch.full((1,), 0.9)),
        dist.Normal(torch.full((1,), 100.0), 30.0),
    ],
    ids=lambda fn: type(fn).__name__,
)
@pytest.mark.parametrize("value", [0, 3, 200, 255])
def test_bytes_under_pyros_own_distributions(fn: Any, value: int) -> None:
    def model(x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("x", fn, obs=x)

    x = torch.tensor([value], dtype=torch.uint8)
    found = ppvae.log_weights(model, nothing, x).log_w[0]
    torch.testing.assert_close(found, fn.log_prob(x.double()), rtol=1e-6, atol=1e-6)


def test_a_rate_of_weight_zero_counts_nothing_even_if_infinite() -> None:
    class Never(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return torch.full(value.shape, -math.inf)

    def model(x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", Never(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    loss = elbo.ELBO(beta=0.0).loss(model, zed, X)
    assert loss == pytest.approx(-dist.Normal(0.0, 1.0).log_prob(X).sum().item())


@pytest.mark.parametrize("shape", [(), (3,)])
def test_equal_tensors_scale_a_sum_over_a_latent(shape):
    """Each site makes its own product of the scale, so it is the numbers that are compared."""
    weight = torch.rand(shape) + 0.5

    def model(x, other=None):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=weight):
                logits = torch.tensor([0.3, -0.2])
                c = pyro.sample("c", dist.Categorical(logits=logits), infer=SUMMED)
            with poutine.scale(scale=weight if other is None else other):
                pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=x)

    def guide(x, other=None):
        pass

    x = torch.tensor([0.5, -1.0, 2.0])
    found = elbo.ELBO().effective(ppvae.log_weights(model, guide, x), elbo.State())
    prior = torch.tensor([0.3, -0.2]).log_softmax(-1)
    fit = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])
    torch.testing.assert_close(found[0], weight * (prior + fit).logsumexp(-1))
    unequal = ppvae.log_weights(model, guide, x, 2 * weight)
    with pytest.raises(ValueError, match="a scale inside that sum has no meaning"):
        elbo.ELBO().effective(unequal, elbo.State())


def test_terms_hang_together_by_any_chain_of_latents() -> None:
    def of(letters: str) -> Term:
        return Term(torch.zeros((2,) * len(letters) + (1, 1)), letters)

    chain = {"a": of("cd"), "b": of("d"), "x": of("e"), "c": of("c"), "none": of("")}
    found = [sorted(names) for names in groups(chain, "cde")]
    assert sorted(found) == [["a", "b", "c"], ["x"]]
    bridge = {"a": of("c"), "b": of("d"), "both": of("cd"), "d": of("d")}
    assert [sorted(names) for names in groups(bridge, "cd")] == [["a", "b", "both", "d"]]
    assert sorted(map(sorted, groups(bridge, "c"))) == [["a", "both"]]
