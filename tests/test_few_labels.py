"""Few labels: classes known for some rows, M2 by hand, a term beside a bound."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from sklearn.metrics import accuracy_score
from torch import nn
from torch.distributions import kl_divergence

import ppvae
from oracles import assert_mean, trainable
from ppvae import conditionals, data, diagnostics, elbo, guides, metrics, models, nets
from ppvae.check.nonfinite import blame
from ppvae.distributions import partly_known
from ppvae.program import data_plate
from registry import ALL_ESTIMATORS, ENUMERATED, build, one_of_each

C, D, Z = 3, 5, 2
PI = (0.2, 0.5, 0.3)
LABELS = {
    "mixed": torch.tensor([0, -1, 2, -1, -1, 1]),
    "all": torch.tensor([0, 1, 2, 0, 1, 2]),
    "none": torch.full((6,), -1),
    "no argument": None,
}
SUMMED = {"enumerate": "parallel"}


def pair(draw=False):
    """M2 with unequal classes."""
    model, guide, (x, _) = build("m2")
    guide.draw = draw
    return model, guide, x


# ------------------------------------------------------------------------------ a mixture


class Mixture(ppvae.Program):
    """Unit normals of known means, and nothing else: log p(x) is a sum of three terms."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]))
        self.logits = nn.Parameter(torch.tensor(PI).log())

    def forward(self, x, y=None, size=None):
        with data_plate(x, size=size):
            classes = partly_known(dist.Categorical(logits=self.logits), y, prior=True)
            c = pyro.sample("y", classes, infer=SUMMED)
            pyro.sample("x", dist.Normal(self.mean[c], 1.0), obs=x)

    def log_joint(self, x):
        return self.logits.log_softmax(-1) + dist.Normal(self.mean, 1.0).log_prob(x.unsqueeze(-1))


class MixtureGuide(ppvae.Program):
    """p(y | x), or off by ``tilt``."""

    def __init__(self, model, tilt=(0.0, 0.0, 0.0)):
        super().__init__()
        self.model, self.tilt = [model], nn.Parameter(torch.tensor(tilt))

    def classes(self, x):
        return dist.Categorical(logits=self.model[0].log_joint(x).detach() + self.tilt)

    def forward(self, x, y=None, size=None):
        with data_plate(x, size=size):
            pyro.sample("y", partly_known(self.classes(x), y), infer=SUMMED)


X = torch.tensor([-1.5, 0.2, 2.0, 4.0], dtype=torch.float64)
Y = torch.tensor([0, -1, 2, -1])
EXACT = torch.tensor(
    [-2.6533764456, -1.6086209374, -2.6229113375, -2.6169183760], dtype=torch.float64
)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("label", sorted(one_of_each()))
def test_exact_guide_gives_log_p_of_x_or_of_x_and_y(label):
    estimator = ALL_ESTIMATORS[label]
    if label.startswith(("TCELBO", "DIPELBO", "FactorELBO")):
        return  # of vectors
    model = Mixture()
    bound = estimator.evaluate(model, MixtureGuide(model), X, Y)
    torch.testing.assert_close(bound, EXACT, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_a_wrong_classifier_costs_its_kl_where_the_class_is_not_known():
    model = Mixture()
    guide, x = MixtureGuide(model, (0.7, 0.0, -0.4)), X
    log_p = model.log_joint(x)
    kl = kl_divergence(guide.classes(x), dist.Categorical(logits=log_p))
    expected = torch.where(
        Y < 0, log_p.logsumexp(-1) - kl, log_p.gather(-1, Y.abs()[:, None])[:, 0]
    )
    torch.testing.assert_close(elbo.ELBO().evaluate(model, guide, x, Y), expected)
    # the same, value and gradient, by Pyro's own estimator
    ours = elbo.ELBO()(model, guide)(x, Y)
    stock = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x, Y)
    torch.testing.assert_close(stock, ours)
    parameters = trainable(model, guide)
    found, wanted = (torch.autograd.grad(v, parameters) for v in (ours, -expected.sum()))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    found = torch.autograd.grad(stock, parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------ M2 by hand


def by_hand(model, guide, x, y, noise, K):
    """ELBO and IWELBO, (N,) each, and log q(y | x): loops over classes and rows, nothing of Pyro.

    ``noise``: standard normal, ``(C, K, N, Z)``.
    """
    elbos, iwelbos = [], []
    log_pi, every = torch.tensor(PI, dtype=x.dtype).log(), torch.eye(C, dtype=x.dtype)
    log_q_y = guide.classifier(x).log_softmax(-1)
    for n in range(len(x)):
        label = -1 if y is None else int(y[n])
        classes = range(C) if label == -1 else [label]
        log_w = {}  # of each class, log p(x, y, z) - log q(z | x, y)
        for c in classes:
            loc, raw = guide.conditional.net(x[n], every[c]).chunk(2)
            z = loc + raw.exp() * noise[c, :, n]
            log_q = dist.Normal(loc, raw.exp()).log_prob(z).sum(-1)
            log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
            logits = model.likelihood.net(z, every[c].expand(K, C))
            log_x = dist.Bernoulli(logits=logits).log_prob(x[n]).sum(-1)
            log_w[c] = log_pi[c] + log_p + log_x - log_q
        together = torch.stack(list(log_w.values())).logsumexp(0)  # the sum over y, (K,)
        iwelbos.append(together.logsumexp(0) - math.log(K))
        if label == -1:
            of_class = [(log_w[c].mean() - log_q_y[n, c]) * log_q_y[n, c].exp() for c in classes]
            elbos.append(torch.stack(of_class).sum())
        else:
            elbos.append(log_w[label].mean())
    return torch.stack(elbos), torch.stack(iwelbos), log_q_y


def noise_of(guide, weights):
    site = weights.guide_trace.nodes["z"]
    fn = site["fn"].base_dist if hasattr(site["fn"], "base_dist") else site["fn"]
    noise = ((site["value"] - fn.loc) / fn.scale).detach()
    return noise if noise.dim() == 4 else noise.unsqueeze(1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("labels", LABELS)
def test_equals_enumeration_by_hand(labels, K):
    model, guide, x = pair()
    y = LABELS[labels]
    args = (x,) if y is None else (x, y)
    with pyro.poutine.block(), torch.random.fork_rng():
        torch.manual_seed(3)
        weights = ppvae.log_weights(model, guide, *args, num_particles=K)
    noise = noise_of(guide, weights)
    assert noise.shape == (C, K, len(x), Z)
    hand, hand_iw, log_q_y = by_hand(model, guide, x, y, noise, K)
    parameters = trainable(model, guide)

    def same(estimator, expected, trains=True):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            value = estimator.evaluate(model, guide, *args)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        if not trains:
            return
        with torch.random.fork_rng():
            torch.manual_seed(3)
            loss = estimator(model, guide)(*args)
        objective = expected.sum()
        if isinstance(estimator, elbo.Plus):
            known = torch.arange(len(x))[y >= 0]
            objective = objective + 7.0 * log_q_y[known, y[known]].sum()
        torch.testing.assert_close(-loss, objective, rtol=0, atol=1e-12)
        found = torch.autograd.grad(-loss, parameters)
        wanted = torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)
        for got, want in zip(found, wanted, strict=True):  # unused: q(y | x) of labelled rows
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    same(elbo.ELBO(K), hand)
    same(elbo.IWELBO(K), hand_iw, trains=False)
    if y is not None:
        same(elbo.Plus(elbo.ELBO(K), guides.log_q_of_labels, 7.0), hand)


@pytest.mark.usefixtures("float64")
def test_all_labelled_is_a_cvae_and_the_class():
    model, guide, x = pair(draw=True)
    y = LABELS["all"]
    cvae = models.CVAE(model.likelihood, Z, condition=nets.OneHot(C))
    cvae_guide = guides.Amortized(guide.conditional, condition=nets.OneHot(C))
    weights = ppvae.log_weights(model, guide, x, y, num_particles=4)
    assert torch.equal(weights.guide_trace.nodes["y"]["value"], y.expand(4, -1))
    drawn = {"z": weights.guide_trace.nodes["z"]["value"]}
    log_w = 0.0
    for program, sign in ((cvae, 1), (cvae_guide, -1)):
        trace = pyro.poutine.trace(pyro.poutine.condition(program, drawn)).get_trace(x, y)
        trace.compute_log_prob()
        log_w = log_w + sign * sum(
            trace.nodes[name]["log_prob"] for name in ("z", "x") if name in trace.nodes
        )
    torch.testing.assert_close(weights.log_w, log_w + torch.tensor(PI).log()[y])


def test_none_labelled_is_no_y():
    model, guide, x = pair()
    values = []
    for args in ((x,), (x, LABELS["none"])):
        torch.manual_seed(0)
        values.append(elbo.ELBO(2).evaluate(model, guide, *args))
    torch.testing.assert_close(*values)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gradient", ["score", "vimco"])
def test_drawn_classes_have_the_gradient_of_enumerated_ones(gradient):
    model, guide, x = pair(draw=True)
    many, y = x.repeat(500, 1), LABELS["mixed"].repeat(500)
    rows = torch.arange(len(many)) % len(x) == 1  # one without a label
    many, y = many[rows].repeat(20, 1), y[rows].repeat(20)
    estimator = elbo.ELBO(2, gradient="score") if gradient == "score" else None
    if estimator is None:
        estimator = elbo.IWELBO(2, gradient="vimco")
        wanted = None
    bias = guide.classifier.layers[-1].bias
    found = []
    for part in range(40):
        torch.manual_seed(part)
        loss = estimator(model, guide)(many[:500], y[:500]) / 500
        found.append(torch.autograd.grad(loss, bias)[0])
    found = torch.stack(found)
    guide.draw = False
    if gradient == "score":
        losses = [elbo.ELBO(2)(model, guide)(many, y) / len(many) for _ in range(4)]
        wanted = torch.stack([torch.autograd.grad(loss, bias)[0] for loss in losses]).mean(0)
        for i in range(C):
            assert_mean(found[:, i], wanted[i])
    else:  # it trains at all, and the sum over classes is 0, as of any softmax
        assert found.abs().sum() > 0
        torch.testing.assert_close(found.sum(1), torch.zeros(40), rtol=0, atol=1e-9)


def test_a_nonlinear_bound_refuses_to_train_a_classifier_that_cancels():
    model, guide, x = pair()
    loss = elbo.Plus(elbo.IWELBO(3), guides.log_q_of_labels)
    with pytest.raises(ValueError, match="latent 'y' is enumerated, so IWELBO sums it out exactly"):
        loss(model, guide)(x, LABELS["mixed"])
    assert loss.evaluate(model, guide, x, LABELS["mixed"]).shape == (len(x),)


# ------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("name", ENUMERATED)
def test_laws_of_pairs_that_enumerate(name, traced):
    model, guide, (x, y) = ENUMERATED[name]()
    report = str(ppvae.check_pair(model, guide, x, y))
    assert "enumerated values at once are weighed as one by one" in report
    assert "3 particles at once are weighed as one by one" in report
    other, other_guide, _ = ENUMERATED[name]()
    for program, copy in ((model, other), (guide, other_guide)):
        copy.load_state_dict(program.state_dict())
    values = []
    for programs in ((model, guide), (other, other_guide)):
        torch.manual_seed(0)
        values.append(ppvae.log_weights(*programs, x, y, num_particles=2).log_w)
    assert torch.equal(*values)
    # one graph for whatever labels there are, equal to eager steps
    steps = []
    for compiled in (False, True):
        model, guide, _ = build(name)
        loss = elbo.Plus(elbo.ELBO(2), guides.log_q_of_labels, elbo.LinearWarmup(4, end=5.0))
        svi = ppvae.SVI(model, guide, torch.optim.SGD, loss, compile=compiled)
        svi.prepare(x, y)
        torch.manual_seed(0)
        steps.append([svi.step(x, labels) for labels in LABELS.values() if labels is not None])
    assert len(svi._compiled._graphs) == 1
    torch.testing.assert_close(*map(torch.tensor, steps), rtol=1e-5, atol=1e-4)


@pytest.mark.slow  # a compiler runs
def test_compiled_equals_eager():
    values = []
    for compile in (False, True):
        model, guide, x = pair()
        known = LABELS["mixed"] >= 0
        term = guides.Labelled(x[known], LABELS["mixed"][known], size=2, draw=torch.bernoulli)
        svi = ppvae.SVI(
            model, guide, torch.optim.SGD, elbo.Plus(elbo.ELBO(), term, 3.0), compile=compile
        )
        svi.prepare(x, LABELS["mixed"])
        torch.manual_seed(1)
        values.append([svi.step(x, y) for y in LABELS.values() if y is not None])
    torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ Plus


def term_of(model, guide, x):
    return guide.posterior(x).mean.square().sum(-1)


@pytest.mark.parametrize("label", sorted(one_of_each()))
def test_plus_adds_its_term_to_every_estimator(label):
    estimator = ALL_ESTIMATORS[label]
    plus = elbo.Plus(estimator, term_of, weight=0.3)
    model, guide, (x,) = build("vae_bernoulli")
    parameters = trainable(model, guide)
    found, states = [], []
    for loss in (estimator(model, guide), plus(model, guide)):
        torch.manual_seed(0)
        value = loss(x)
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        found.append((value, [torch.zeros(()) if g is None else g for g in grads]))
        states.append(loss.state.state_dict())
        assert loss.step == 1
    torch.testing.assert_close(*states)  # what the estimator learns itself
    term = 0.3 * term_of(model, guide, x).sum()
    # both estimators are maximised, an upper bound is minimised: the term is always maximised
    torch.testing.assert_close(found[1][0], found[0][0] - term, rtol=1e-5, atol=1e-4)
    of_term = torch.autograd.grad(term, parameters, allow_unused=True)
    for plain, more, own in zip(found[0][1], found[1][1], of_term, strict=True):
        torch.testing.assert_close(
            more, plain - (0.0 if own is None else own), rtol=1e-4, atol=1e-4
        )
    for e in (estimator, plus):
        torch.manual_seed(0)
        found.append(e.evaluate(model, guide, x))
    assert torch.equal(*found[-2:])


@pytest.mark.usefixtures("float64")
def test_minibatches_and_data_sets_of_a_size():
    model = Mixture()
    guide, x = MixtureGuide(model), X
    weight = elbo.LinearWarmup(2, end=6.0)
    loss = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, weight=6.0)
    whole = loss(model, guide)(x, Y)
    halves = sum(loss(model, guide)(x[i : i + 2], Y[i : i + 2]) for i in (0, 2))
    torch.testing.assert_close(halves, whole)
    known = guide.classes(x).logits.gather(-1, Y.abs()[:, None])[:, 0][Y >= 0]
    torch.testing.assert_close(whole, -EXACT.sum() - 6.0 * known.sum())
    torch.testing.assert_close(loss(model, guide)(x, Y, size=40), 10 * whole)
    scheduled = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, weight)(model, guide)
    values = [scheduled(x, Y) for _ in range(3)]
    expected = [-EXACT.sum() - w * known.sum() for w in map(weight, range(3))]
    torch.testing.assert_close(torch.stack(values), torch.stack(expected))
    # rows of its own: the same expectation, with all rows the same value
    own = elbo.Plus(elbo.ELBO(), guides.Labelled(x[Y >= 0], Y[Y >= 0]), 6.0 * 2 / 4)
    torch.testing.assert_close(own(model, guide)(x, Y), whole)


def test_what_fit_reports_is_the_bound(float64):
    model = Mixture()
    guide, x = MixtureGuide(model, (0.7, 0.0, 0.0)), X
    loss = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, elbo.LinearWarmup(1, start=6.0, end=6.0))
    still = ppvae.SVI(model, guide, lambda parameters: torch.optim.SGD(parameters, lr=0.0), loss)
    (row,) = ppvae.fit(still, (x, Y), valid=(x, Y), epochs=1, progress=False).rows
    bound = elbo.ELBO().evaluate(model, guide, x, Y).mean().item()
    term = 6.0 * guides.log_q_of_labels(model, guide, x, Y).mean().item()
    assert row["valid_bound"] == pytest.approx(bound, abs=1e-12)
    assert row["train_objective"] == pytest.approx(bound + term, abs=1e-12)
    assert row["term_weight"] == 6.0
    evidence = diagnostics.log_evidence(model, guide, x, Y, num_particles=20)
    torch.testing.assert_close(evidence.log_evidence, EXACT, rtol=0, atol=1e-9)


def test_a_run_with_a_term_is_taken_up_where_it_ended(tmp_path):
    args, whole = (build("m2")[2][0], LABELS["mixed"]), None
    known = args[1] >= 0
    for epochs in ((4,), (2, 4)):
        model, guide, _ = build("m2")
        term = guides.Labelled(args[0][known], args[1][known], size=2, draw=torch.bernoulli)
        loss = elbo.Plus(elbo.ELBO(), term, elbo.LinearWarmup(20, end=3.0))
        torch.manual_seed(0)
        for end in epochs:
            svi = ppvae.SVI(model, guide, torch.optim.Adam, loss)
            folder = tmp_path / str(len(epochs))
            ppvae.fit(svi, args, epochs=end, batch_size=2, checkpoint=folder, resume=True)
        state = [p.detach().clone() for p in trainable(model, guide)]
        whole = whole or state
    assert all(map(torch.equal, whole, state))
    other = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, 3.0)
    svi = ppvae.SVI(model, guide, torch.optim.Adam, other)
    with pytest.raises(ppvae.CheckpointError, match="log_q_of_labels"):
        ppvae.fit(svi, args, epochs=5, batch_size=2, checkpoint=folder, resume=True)


def test_float64_modules_and_comparison():
    model, guide, x = pair()
    model.double(), guide.double()
    y = LABELS["mixed"]
    loss = elbo.Plus(elbo.ELBO(2), guides.log_q_of_labels, 1e6)
    assert loss(model, guide)(x.double(), y).dtype == torch.float64
    both = {"plain": elbo.ELBO(2), "with a term": loss}
    table = ppvae.compare(model, guide, (x.double(), y), both, repeats=5, timing_rounds=1)
    assert (table["bound"] > -100).all()  # by a million times, the term would show


def test_stock_pyro_trains_it():
    model, guide, x = pair()
    loss = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, 2.0)
    before = [p.detach().clone() for p in trainable(model, guide)]
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    svi.step(x, LABELS["mixed"])
    assert all(not torch.equal(a, b) for a, b in zip(before, trainable(model, guide), strict=True))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: elbo.Plus(3.0, term_of), TypeError, "must be one of ppvae.elbo"),
        (lambda: elbo.Plus(elbo.ELBO(), 3.0), TypeError, "term must be a function"),
        (lambda: elbo.Plus(elbo.ELBO(), term_of, "all"), TypeError, "weight must be a number"),
        (lambda: elbo.Plus(elbo.ELBO(), term_of, math.nan), ValueError, "weight must be a finite"),
        (lambda: elbo.Plus(elbo.ELBO(), term_of, torch.ones(2)), ValueError, "must be one number"),
    ],
)
def test_plus_refuses(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_plus_refuses_a_term_that_is_not_of_rows():
    model, guide, (x,) = build("vae_bernoulli")
    for term in (lambda m, g, x: x.mean(), lambda m, g, x: 1.0, lambda m, g, x: x):
        with pytest.raises(ValueError, match=r"one number for each of the 6 rows, \(N,\)"):
            elbo.Plus(elbo.ELBO(), term)(model, guide)(x)
    net = nn.Linear(D, 1)  # of nobody: it would never be trained
    loss = elbo.Plus(elbo.ELBO(), lambda m, g, x: net(x)[:, 0])
    with pytest.raises(ValueError, match="param"):
        ppvae.SVI(model, guide, torch.optim.Adam, loss).step(x)


# ------------------------------------------------------------------------------ partly known


@pytest.mark.usefixtures("float64")
def test_partly_known_is_certain_where_it_is_known():
    logits = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.0, -1.0]], requires_grad=True)
    y = torch.tensor([2, -1])
    q, p = (partly_known(dist.Categorical(logits=logits), y, prior) for prior in (False, True))
    assert torch.equal(q.expand((4, 2)).sample()[:, 0], torch.full((4,), 2))
    log_pi = logits.log_softmax(-1)
    every = torch.arange(C).unsqueeze(-1)
    for fn, known in ((q, 0.0), (p, log_pi[0, 2].item())):
        for shown in (fn, fn.expand((2,))):
            log_prob = shown.log_prob(every).T
            assert log_prob[0].tolist() == pytest.approx([-math.inf, -math.inf, known], abs=1e-12)
            torch.testing.assert_close(log_prob[1], log_pi[1])
    torch.testing.assert_close(
        torch.autograd.grad(p.log_prob(torch.tensor([2, 0])).sum(), logits, retain_graph=True)[0],
        torch.autograd.grad(log_pi[0, 2] + log_pi[1, 0], logits, retain_graph=True)[0],
    )
    # closed forms are sums over the classes; a known one leaves -log p(y)
    prior = dist.Categorical(logits=torch.tensor([0.1, 0.2, 0.3]))
    for one, other in (
        (q, partly_known(prior, y, prior=True)),
        (q, prior),
        (partly_known(prior, y), p),
        (partly_known(prior, y, prior=True), p),  # neither sums to 1
    ):
        log_q, log_p = one.log_prob(every), other.log_prob(every)
        mass = log_q.logsumexp(0)  # 1, but for a form of the model, whose class is certain
        by_sum = torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0.0).sum(0)
        by_sum = by_sum / mass.exp()
        torch.testing.assert_close(kl_divergence(one, other).expand(2), by_sum.expand(2))
    assert partly_known(prior, None) is prior
    unchecked = dist.Categorical(logits=torch.zeros(3), validate_args=False)
    for label in (-2, 3):  # no class: impossible, and not unknown
        fn = partly_known(unchecked, torch.tensor([label]), prior=True)
        assert fn.log_prob(every).max() == -math.inf


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (
            torch.tensor([0.0, 1.0]),
            r"integers of shape \(N,\), -1 where unknown, got torch.float32",
        ),
        (torch.tensor([True, False]), "got torch.bool"),
        (torch.eye(3).long(), r"of shape \(3, 3\)"),
        (torch.tensor([0, 3]), r"0 .. 2, or be -1 where unknown, got 0 .. 3.*num_classes=4"),
        (torch.tensor([-2, 0]), "got -2 .. 0"),
    ],
)
def test_bad_labels_are_named(y, match):
    with pytest.raises(ValueError, match=match):
        partly_known(dist.Categorical(torch.ones(3)), y)
    model, guide, x = pair()
    x = x[: len(y)]
    svi = ppvae.SVI(model, guide, torch.optim.Adam)
    before = [p.detach().clone() for p in trainable(model, guide)]
    for entry in (
        lambda: ppvae.fit(svi, (x, y), epochs=1, progress=False),
        lambda: svi.step(x, y),
        lambda: ppvae.check_pair(model, guide, x, y),
        lambda: ppvae.diagnose(model, guide, x, y, num_particles=30),
    ):
        with pytest.raises(ppvae.PairError, match=f"(?s)'y'.*{match}|{match}"):
            entry()
    assert all(map(torch.equal, before, trainable(model, guide)))


def test_labels_that_a_later_batch_gets_wrong_are_named():
    model, guide, x = pair()
    y = LABELS["mixed"].clone()
    y[-1] = 7
    svi = ppvae.SVI(model, guide, torch.optim.Adam)
    with pytest.raises(ppvae.PairError, match=r"argument 'y' in data: labels must lie in 0 .. 2"):
        ppvae.fit(svi, (x, y), epochs=1, batch_size=2, progress=False)
    with pytest.raises(ppvae.PairError, match="differ in length"):
        ppvae.fit(svi, (x, y[:4]), epochs=1, progress=False)


def test_no_label_at_all_is_refused_and_a_class_without_one_is_warned_of():
    model, guide, x = pair()
    svi = ppvae.SVI(model, guide, torch.optim.Adam)
    with pytest.raises(ValueError, match="'y' has no label in 6 rows, all are -1"):
        ppvae.fit(svi, (x, LABELS["none"]), epochs=1, progress=False)
    y = torch.tensor([0, -1, 0, -1, -1, 1])
    with pytest.warns(models.NoLabelWarning, match=r"no row is labelled with classes \[2\] of 3"):
        ppvae.fit(svi, (x, y), epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppvae.fit(svi, x, epochs=1, progress=False)  # without labels: clusters
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, LABELS["mixed"]), batch_size=2
        )
        ppvae.fit(svi, loader, epochs=1, progress=False)  # a batch may have none


def test_m2_and_its_terms_refuse():
    likelihood = conditionals.Bernoulli(nets.mlp(Z + C, D))
    for arguments, match in (
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": 3, "probs": [0.5, 0.5]}, "3 positive numbers"),
        ({"num_classes": 2, "probs": [1.0, 0.0]}, "2 positive numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            models.M2(likelihood, Z, **arguments)
    with pytest.raises(TypeError, match=r"likelihood gives a .*Tensor"):
        models.M2(nets.mlp(Z + C, D), Z, C)
    _, guide, x = pair()
    with pytest.raises(ValueError, match=r"train on \(x, y\)"):
        guides.log_q_of_labels(None, guide, x)
    with pytest.raises(TypeError, match=r"q\(y \| x\), and Normal has no method classes"):
        guides.log_q_of_labels(None, guides.Normal(nets.mlp(D, 2 * Z)), x, LABELS["mixed"])
    with pytest.raises(TypeError, match=r"partly_known is of a pyro\.distributions\.Categorical"):
        partly_known(dist.Bernoulli(0.5), LABELS["mixed"])
    for rows, labels, match in (
        (x[:0], LABELS["all"][:0], "give labelled rows"),
        (x, LABELS["mixed"], "leave out rows with y = -1"),
        (x, torch.ones(6), "must be integers"),
    ):
        with pytest.raises(ValueError, match=match):
            guides.Labelled(rows, labels)
    with pytest.raises(ValueError, match="1 or more: 0"):
        guides.Labelled(x, LABELS["all"], size=0)


# ------------------------------------------------------------------------------ data, metrics


def test_with_labels_keeps_some_of_each_class():
    train = data.load("digits").train
    random = torch.get_rng_state()
    few = data.with_labels(train, per_class=3, seed=5)
    assert torch.equal(torch.get_rng_state(), random)
    known = few.y >= 0
    assert torch.equal(few.y[known], train.y[known])
    assert torch.equal(few.y[known].bincount(), torch.full((10,), 3))
    assert torch.equal(few.y, data.with_labels(train, 3, seed=5).y)
    assert not torch.equal(few.y, data.with_labels(train, 3, seed=6).y)
    assert [len(t) for t in few.batch(4)] == [1297, 1297]
    fewer = data.with_labels(few, 2)
    assert int((fewer.y >= 0).sum()) == 20 and bool((few.y[fewer.y >= 0] >= 0).all())
    with pytest.raises(ValueError, match="per_class=500, and class 0 has"):
        data.with_labels(train, 500)
    with pytest.raises(ValueError, match=r"integers of shape .* y is None"):
        data.with_labels(data.Split(torch.zeros(3, 2)), 1)
    with pytest.raises(ValueError, match="give 1 or more"):
        data.with_labels(train, 0)


def test_error_rate_is_that_of_sklearn():
    scores, labels = torch.randn(50, 4), torch.randint(4, (50,))
    expected = 1 - accuracy_score(labels, scores.argmax(1))
    assert metrics.error_rate(scores, labels) == pytest.approx(expected)
    for wrong, given, match in (
        (scores, labels[:3], "one label for each row"),
        (scores[:, 0], labels, r"give \(N, C\) scores"),
        (scores, labels - 1, "0 to 3, not"),
        (scores * math.nan, labels, "NaN in 50 of 50"),
    ):
        with pytest.raises(ValueError, match=match):
            metrics.error_rate(wrong, given)


def test_features_of_a_vae_are_the_input_of_m2():
    """M1 + M2, of the package's own pieces."""
    digits = data.load("digits")
    m1 = guides.Normal(nets.mlp(64, 16, 2 * 4))
    m1_model = models.VAE(conditionals.Bernoulli(nets.mlp(4, 16, 64)), latent_dim=4)
    ppvae.fit(ppvae.SVI(m1_model, m1), digits, epochs=1, progress=False)
    with torch.no_grad():
        z = m1.posterior(digits.train.x).mean
    train = data.with_labels(data.Split(z, digits.train.y), per_class=3)
    model = models.M2(conditionals.Normal(nets.mlp(2 + 10, 16, 2 * 4)), 2, num_classes=10)
    guide = guides.M2(nets.mlp(4, 16, 10), conditionals.Normal(nets.mlp(4 + 10, 16, 2 * 2)))
    loss = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, 10.0)
    history = ppvae.fit(ppvae.SVI(model, guide, loss=loss), train, epochs=2, progress=False)
    assert history.rows[1]["train_objective"] > history.rows[0]["train_objective"]


def test_a_class_that_is_not_possible_is_not_to_blame():
    """Labels make classes of probability 0, which say nothing of what is wrong elsewhere."""
    model, guide, x = pair()
    svi = ppvae.SVI(model, guide, torch.optim.SGD, elbo.IWELBO(num_particles=3))
    with pytest.raises(ValueError, match=r"latent 'y' is enumerated.*never be trained"):
        svi.step(x, LABELS["mixed"])
    with torch.no_grad():
        next(model.likelihood.parameters()).fill_(math.nan)
    assert blame(model, guide, x, LABELS["mixed"]).startswith("site 'x' of the model: logits")
