"""Codes: exact values and gradients, averages by hand, probabilities that sum to 1, lengths."""

import copy
import functools
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import ppvae
from compiling import inductor
from ppvae import (
    Beside,
    conditionals,
    diagnostics,
    elbo,
    guides,
    metrics,
    models,
    nets,
    posteriors,
)
from ppvae.check.programs import PairError
from ppvae.conditionals.codes import CausalCodes, CodeMap
from ppvae.guides.quantized import PointCodes
from ppvae.processes import Processes

pytestmark = pytest.mark.forks

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=1e-2)
K, D, SIDE = 5, 2, 3
X = torch.bernoulli(torch.full((50, 1, 6, 6), 0.4), generator=torch.Generator().manual_seed(1))


def alone(tensors):
    """The sum over one process."""


def encoder(width=D):
    return nets.downsample(1, width, channels=(4,))


def decoder():
    return nets.upsample(D, 1, channels=(4,))


def pair(quantizer=None, net=None, **options):
    torch.manual_seed(0)
    book = nets.Codebook(K, D, **options) if quantizer is None else quantizer
    prior = conditionals.CodePrior(book, (SIDE, SIDE), net)
    model = models.VAE(conditionals.Bernoulli(decoder(), event_dim=3), prior=prior)
    return model, guides.Quantized(encoder(book.dim), book)


def svi_of(programs, optim=ADAM, loss=None, **options):
    return ppvae.SVI(*programs, optim, elbo.VQELBO() if loss is None else loss, **options)


def book_of(svi):
    return svi.guide.conditional.quantizer


def tensors(module):
    state = module.state_dict()
    return {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}


def numbers(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


def fit(svi, train=X, **options):
    torch.manual_seed(3)
    return ppvae.fit(svi, train, **{"epochs": 3, "batch_size": 16, "progress": False, **options})


# -- a codebook ----------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(7,), (2, 7), ()], ids=str)
def test_indices_are_those_of_brute_force(leading):
    book, raw = nets.Codebook(K, D), torch.randn(*leading, D, SIDE, SIDE)
    gaps = raw.unsqueeze(-4) - book.codes.reshape(K, D, 1, 1)
    distances = gaps.square().sum(-3)
    assert torch.equal(book.indices(raw), distances.argmin(-3))
    torch.testing.assert_close(book.squared_distances(raw), distances)


def test_of_equal_codes_the_lowest_is_taken():
    book = nets.Codebook(K, D)
    book.codes[3] = book.codes[1]
    assert torch.equal(book.indices(book.lookup(torch.full((1, 1), 3))), torch.full((1, 1), 1))


def test_distances_are_in_float32_under_bfloat16():
    book, raw = nets.Codebook(64, 8), torch.randn(20, 8, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.indices(raw), nets.Codebook.indices(book, raw.float()))
        under = book.squared_distances(raw)
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, book.squared_distances(raw), rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda: nets.Codebook(K, D), lambda: nets.FSQ([4, 3])])
def test_the_value_is_a_code_to_the_last_digit(make):
    quantizer, raw = make(), 3 * torch.randn(20, D, SIDE, SIDE, requires_grad=True)
    value = quantizer(raw)
    assert torch.equal(value, quantizer.lookup(quantizer.indices(value)))


def test_the_gradient_goes_straight_through():
    book = nets.Codebook(K, D)
    raw = torch.randn(4, D, SIDE, SIDE, requires_grad=True)
    slope = torch.randn_like(raw)
    (found,) = torch.autograd.grad((book(raw) * slope).sum(), raw)
    assert torch.equal(found, slope)
    assert not book.codes.requires_grad


def test_averages_by_hand():
    """Three steps of decay 1/2, whose weights are 1, 2/3 and 4/7."""
    book = nets.Codebook(2, 1, decay=0.5, restart=0)
    book.codes.copy_(torch.tensor([[0.0], [10.0]]))
    batches = [[1.0, 3.0, 8.0], [1.0, 9.0, 9.0], [0.0, 0.0, 2.0]]
    # counts and sums of what lies nearer to each code, by hand
    expected = [
        ([2.0, 1.0], [4.0, 8.0]),
        ([2 + 2 / 3 * (1 - 2), 1 + 2 / 3 * (2 - 1)], [4 + 2 / 3 * (1 - 4), 8 + 2 / 3 * (18 - 8)]),
    ]
    (n0, n1), (m0, m1) = expected[1]
    expected.append(
        ([n0 + 4 / 7 * (3 - n0), n1 - 4 / 7 * n1], [m0 + 4 / 7 * (2 - m0), m1 - 4 / 7 * m1])
    )
    for batch, (usage, moments) in zip(batches, expected, strict=True):
        book(torch.tensor(batch).reshape(-1, 1, 1, 1).requires_grad_())
        book.update(alone)
        torch.testing.assert_close(book.usage, torch.tensor(usage))
        torch.testing.assert_close(book.moments[:, 0], torch.tensor(moments))
        torch.testing.assert_close(book.codes[:, 0], torch.tensor(moments) / torch.tensor(usage))


def test_the_average_is_free_of_its_start():
    """With equal batches it is that batch from the first step on; an unused code stays."""
    book = nets.Codebook(3, 1, decay=0.99, restart=0)
    book.codes.copy_(torch.tensor([[0.0], [50.0], [100.0]]))
    raw = torch.tensor([-1.0, 3.0, 52.0]).reshape(-1, 1, 1, 1).requires_grad_()
    for _ in range(5):
        book(raw)
        book.update(alone)
        torch.testing.assert_close(book.codes[:, 0], torch.tensor([1.0, 52.0, 100.0]))
        torch.testing.assert_close(book.usage, torch.tensor([2.0, 1.0, 0.0]))


def test_the_old_codes_quantise():
    svi = svi_of(pair())
    svi.prepare(X)
    before = book_of(svi).codes.clone()
    value = ppvae.log_weights(svi.model, svi.guide, X).guide_trace.nodes["z"]["value"]
    svi.guide.train()
    svi.step(X)
    seen = {tuple(row) for row in value.detach().movedim(1, -1).reshape(-1, D).tolist()}
    assert seen <= {tuple(row) for row in before.tolist()}
    assert not torch.equal(before, book_of(svi).codes)


def test_a_code_that_is_not_used_is_put_on_an_output_with_its_averages():
    book = nets.Codebook(K, D, restart=2.0)
    book.codes[1:] = 1e3
    raw = torch.randn(30, D, 1, 1, requires_grad=True)
    book(raw)
    book.update(alone)
    rows = {tuple(row) for row in raw.detach().flatten(1).tolist()}
    assert {tuple(row) for row in book.codes[1:].tolist()} <= rows
    assert torch.equal(book.usage[1:], torch.full((K - 1,), 2.0))
    assert torch.equal(book.moments[1:], 2.0 * book.codes[1:])
    torch.testing.assert_close(book.codes[0], raw.detach().flatten(1).mean(0))
    moved = book.codes.clone()
    book(raw)
    book.update(alone)  # the second step moves no code again: they are used by now
    assert book.updates == 2 and (book.usage > 0).all()
    assert ((book.codes - moved).norm(dim=1) < 3).all()


def test_restarts_come_every_twenty_steps():
    book = nets.Codebook(2, 1, restart=1.0)
    steps = []
    for step in range(1, 45):
        book.codes[1] = 1e3
        book.usage[1] = book.moments[1] = 0.0
        book(torch.randn(6, 1, 1, 1, requires_grad=True))
        book.update(alone)
        steps += [step] if book.codes[1] < 100 else []
    assert steps == [1, 21, 41]


@pytest.mark.parametrize("why", ["evaluation", "no gradient", "frozen encoder"])
def test_codes_stay_where_nothing_is_learned(why):
    book = nets.Codebook(K, D)
    raw = torch.randn(6, D, SIDE, SIDE, requires_grad=why == "evaluation")
    if why == "evaluation":
        book.eval()
    before = tensors(book)
    book(raw)
    book.update(alone)
    for name, value in tensors(book).items():
        assert torch.equal(value, before[name]), name


def test_perplexity_is_the_exponential_of_the_entropy():
    book = nets.Codebook(4, 1)
    book.usage.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert book.report()["code_perplexity"] == pytest.approx(2.0)
    book.usage.fill_(3.0)
    assert book.report()["code_perplexity"] == pytest.approx(4.0)


def test_codes_by_gradient_have_the_gradient_of_the_distance():
    book = nets.Codebook(K, D, ema=False)
    raw = torch.randn(6, D, SIDE, SIDE, requires_grad=True)
    index = book.indices(raw)
    book(raw)
    exact = (raw.detach() - book.codes[index].movedim(-1, -3)).square().sum()
    loss = book.loss()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(
        torch.autograd.grad(loss, book.codes), torch.autograd.grad(exact, book.codes)
    )
    assert nets.Codebook(K, D).loss() is None


# -- the pair ------------------------------------------------------------------------------------


def test_minus_the_elbo_is_a_code_length():
    model, guide = pair()
    weights = ppvae.log_weights(model, guide, X)
    z = weights.guide_trace.nodes["z"]["value"]
    log_x = model.likelihood(z).log_prob(X)
    codes = SIDE**2 * math.log(K)
    torch.testing.assert_close(elbo.VQELBO().evaluate(model, guide, X), log_x.detach() - codes)
    assert (weights.log_q["z"] == 0).all()
    torch.testing.assert_close(model.prior.code_length(z), torch.full((len(X),), codes))


def test_training_is_that_of_the_paper_by_hand():
    model, guide = pair()
    book, net, likelihood = guide.conditional.quantizer, guide.conditional.net, model.likelihood
    elbo.VQELBO(commitment=0.7)(model, guide)(X).backward()
    named = {**dict(net.named_parameters("e")), **dict(likelihood.named_parameters("d"))}
    found = {name: p.grad.clone() for name, p in named.items()}
    raw = net(X)
    code = book.codes[book.indices(raw)].movedim(-1, -3)
    logits = likelihood.net(raw + (code - raw).detach())
    loss = nn.functional.binary_cross_entropy_with_logits(logits, X, reduction="sum")
    loss = loss + 0.7 * (raw - code).square().sum()
    expected = torch.autograd.grad(loss, list(named.values()))
    for (name, gradient), other in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5, msg=name)


def test_the_commitment_has_the_gradient_2c_times_the_distance():
    book, raw = nets.Codebook(K, D), torch.randn(6, D, SIDE, SIDE, requires_grad=True)
    q = PointCodes(book, book(raw), raw)
    (found,) = torch.autograd.grad(0.3 * q.distortion().sum(), raw)
    torch.testing.assert_close(found, 0.6 * (raw - book.lookup(book.indices(raw))).detach())


def test_no_gradient_and_no_optimiser_reaches_the_codes():
    svi = svi_of(pair(ema=False), beside=Beside(SGD))
    svi.prepare(X)
    svi.objective(X).backward()
    assert book_of(svi).codes.grad is None
    held = {id(p) for group in svi.optimizer.param_groups for p in group["params"]}
    assert id(book_of(svi).codes) not in held
    before = book_of(svi).codes.detach().clone()
    svi.step(X)
    assert not torch.equal(before, book_of(svi).codes)


@pytest.mark.parametrize("ema", [True, False], ids=["averages", "gradient"])
def test_training_lowers_the_code_length_and_uses_the_codes(ema):
    x = torch.zeros(64, 1, 6, 6)
    for row in range(64):
        x[row, 0, row % 6, :] = 1.0
        x[row, 0, :, row // 6 % 6] = 1.0
    svi = svi_of(pair(ema=ema), beside=Beside(ADAM))
    rows = fit(svi, x, epochs=40).rows
    assert rows[-1]["train_objective"] > rows[0]["train_objective"] + 5
    assert rows[-1]["code_perplexity"] > 0.6 * K


def test_stage_two_trains_the_prior_and_nothing_else():
    model, guide = pair(net=nets.CausalGRU(K, (SIDE, SIDE), hidden=8))
    fit(svi_of((model, guide)), epochs=1)
    model.likelihood.requires_grad_(False)
    guide.requires_grad_(False)
    svi = svi_of((model, guide), loss=elbo.ELBO())
    before = tensors(svi.objective)
    rows = fit(svi, epochs=20).rows
    moved = {n for n, v in tensors(svi.objective).items() if not torch.equal(v, before[n])}
    assert moved and all(".prior.net." in f".{name}" for name in moved), moved
    assert rows[-1]["train_objective"] > rows[0]["train_objective"]
    # maximum likelihood of the codes: the objective is log p(x | z) + log p(c), without noise
    bound = elbo.ELBO().evaluate(model, guide, X)
    z = model.prior.quantizer.lookup(guide.indices(X))
    by_hand = model.likelihood(z).log_prob(X) - model.prior.code_length(z)
    torch.testing.assert_close(bound, by_hand.detach())


def test_soft_codes_have_weights_and_end_at_the_nearest():
    model, guide = pair()
    soft = guide.soften(1.0)
    weights = ppvae.log_weights(model, soft, X, num_particles=5)
    raw = guide.conditional.net(X)
    distances = guide.conditional.quantizer.squared_distances(raw)
    number = guide.conditional.quantizer.indices(weights.guide_trace.nodes["z"]["value"])
    by_hand = (-distances).log_softmax(1).expand(5, -1, -1, -1, -1)
    by_hand = by_hand.gather(2, number.unsqueeze(2)).sum((-3, -2, -1))
    torch.testing.assert_close(weights.log_q["z"], by_hand)
    assert weights.log_w.std(0).min() > 0
    hard = elbo.ELBO().evaluate(model, guide, X)
    torch.testing.assert_close(elbo.ELBO().evaluate(model, guide.soften(1e-6), X), hard)
    evidence = diagnostics.log_evidence(model, soft, X[:5], num_particles=100)
    assert evidence.log_evidence.shape == (5,)
    assert guide.conditional.tau is None and soft.conditional.net is guide.conditional.net


def test_soft_codes_estimate_the_evidence():
    """Summed over all codes of a map of 1 x 2."""
    torch.manual_seed(0)
    book = nets.Codebook(3, D)
    net = nn.Sequential(nn.Flatten(-3), nn.Linear(4, 2 * D), nn.Unflatten(-1, (D, 1, 2)))
    head = nn.Sequential(nn.Flatten(-3), nn.Linear(2 * D, 4), nn.Unflatten(-1, (1, 2, 2)))
    prior = conditionals.CodePrior(book, (1, 2), nets.CausalGRU(3, (1, 2), hidden=4))
    model = models.VAE(conditionals.Bernoulli(head, event_dim=3), prior=prior)
    guide = guides.Quantized(net, book).soften(2.0)
    x = X[:4, :, :2, :2]
    every = torch.cartesian_prod(*[torch.arange(3)] * 2).reshape(-1, 1, 2)
    z = book.lookup(every).unsqueeze(1)
    joint = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
    exact = joint.logsumexp(0)
    found = diagnostics.log_evidence(model, guide, x, num_particles=20_000)
    error = (found.log_evidence - exact.double()).abs() / found.log_evidence_se
    assert error.max() < 4.5


# -- priors --------------------------------------------------------------------------------------

PRIORS = {
    "uniform": lambda k, shape, context: None,
    "unigram": lambda k, shape, context: nets.Unigram(k),
    "gru": lambda k, shape, context: nets.CausalGRU(k, shape, 8, context_dim=context),
    "conv": lambda k, shape, context: nets.CausalConv(k, 6, 2, context_dim=context),
}


def scattered(net):
    """Weights of size 1, so that no distribution is nearly uniform."""
    for parameter in net.parameters() if net is not None else ():
        nn.init.normal_(parameter)
    return net


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", PRIORS)
def test_the_probabilities_of_all_81_codes_sum_to_one(kind):
    book = nets.Codebook(3, D)
    prior = conditionals.CodePrior(book, (2, 2), scattered(PRIORS[kind](3, (2, 2), 0)))
    every = torch.cartesian_prod(*[torch.arange(3)] * 4).reshape(81, 2, 2)
    probability = prior().log_prob(book.lookup(every)).detach().exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    if kind != "uniform":
        assert probability.max() > 2 / 81


@pytest.mark.parametrize("kind", ["gru", "conv"])
@pytest.mark.parametrize("shape", [(4, 5), (1, 6), (6, 1)], ids=str)
def test_a_place_sees_those_before_it_and_all_of_them_that_are_near(kind, shape):
    torch.manual_seed(0)
    net = scattered(PRIORS[kind](K, shape, 0))
    numbers = torch.randint(K, (1, *shape))
    logits = net(numbers)
    near = 0
    for place in range(math.prod(shape)):
        row, column = divmod(place, shape[1])
        other = numbers.clone()
        other[0, row, column] = (other[0, row, column] + 1) % K
        changed = (net(other) != logits).any(1)[0].flatten()
        assert not changed[: place + 1].any(), place
        near += bool(column + 1 < shape[1] and changed[place + 1])
    assert near == shape[0] * (shape[1] - 1)  # each is seen from the place to its right


def test_the_convolution_has_no_blind_spot():
    net = scattered(nets.CausalConv(K, 4, layers=4))
    numbers = torch.randint(K, (1, 5, 7))
    last = net(numbers)[0, :, 4, 3]
    for row, column in itertools.product(range(4), range(7)):
        if abs(column - 3) <= 4 - row:  # a row up is a column more to each side
            other = numbers.clone()
            other[0, row, column] = (other[0, row, column] + 1) % K
            assert not torch.equal(net(other)[0, :, 4, 3], last), (row, column)


@pytest.mark.parametrize("kind", PRIORS)
def test_draws_have_the_frequencies_of_the_probabilities(kind):
    torch.manual_seed(0)
    book, size = nets.Codebook(2, D), 20_000
    prior = conditionals.CodePrior(book, (1, 3), scattered(PRIORS[kind](2, (1, 3), 0)))
    every = torch.cartesian_prod(*[torch.arange(2)] * 3).reshape(8, 1, 3)
    p = prior().log_prob(book.lookup(every)).detach().exp()
    drawn = book.indices(prior().expand((size,)).sample()).flatten(1)
    counts = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    error = (counts / size - p) / (p * (1 - p) / size).sqrt()
    assert error.abs().max() < 4.5


@pytest.mark.parametrize("kind", PRIORS)
def test_log_p_is_float32_under_bfloat16(kind):
    book = nets.Codebook(K, D)
    prior = conditionals.CodePrior(book, (SIDE, SIDE), PRIORS[kind](K, (SIDE, SIDE), 0))
    z = prior().expand((4,)).sample()
    exact = prior().log_prob(z).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = prior().log_prob(z).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", PRIORS)
def test_particles_at_once_are_weighed_as_one_by_one(kind):
    book = nets.Codebook(K, D)
    prior = conditionals.CodePrior(book, (SIDE, SIDE), scattered(PRIORS[kind](K, (SIDE, SIDE), 0)))
    z = prior().expand((3, 4)).sample()
    together = prior().log_prob(z)
    assert z.shape == (3, 4, D, SIDE, SIDE) and together.shape == (3, 4)
    torch.testing.assert_close(together, torch.stack([prior().log_prob(row) for row in z]))


def test_a_unigram_starts_at_the_frequencies():
    net = nets.Unigram(3)
    numbers = torch.tensor([[[0, 0], [0, 2]]])
    net.initialise(numbers)
    torch.testing.assert_close(net.logits.exp().detach(), torch.tensor([3.5, 0.5, 1.5]) / 5.5)


@pytest.mark.parametrize("kind", ["gru", "conv"])
def test_a_prior_given_maps_belongs_to_their_rows(kind):
    torch.manual_seed(0)
    book = nets.Codebook(K, D)
    net = scattered(PRIORS[kind](K, (SIDE, SIDE), 3 + 2))
    prior = conditionals.CodePrior(book, (SIDE, SIDE), net)
    z = book.lookup(torch.randint(K, (4, SIDE, SIDE)))
    maps, labels = torch.randn(4, 3, 2, 2), torch.randn(4, 2, 1, 1)
    together = prior(maps, labels).log_prob(z)
    one_by_one = [
        prior(maps[i : i + 1], labels[i : i + 1]).log_prob(z[i : i + 1]) for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(one_by_one))
    assert prior(maps, labels).batch_shape == (4,)
    assert prior(maps.expand(2, 4, 3, 2, 2), labels).log_prob(z).shape == (2, 4)
    assert prior(maps, labels).sample().shape == z.shape
    with pytest.raises(ValueError, match="context_dim=5 was called with feature maps of"):
        prior(maps).log_prob(z)
    with pytest.raises(ValueError, match="was called without feature maps"):
        prior().log_prob(z)
    with pytest.raises(ValueError, match="give features of rows as features"):
        prior(maps[..., 0, 0], labels).log_prob(z)


# -- runs that end and go on, graphs, processes --------------------------------------------------


class Crash(Exception):
    pass


class CrashAt(ppvae.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            raise Crash


@pytest.mark.parametrize("ema", [True, False], ids=["averages", "gradient"])
@pytest.mark.parametrize("step", [2, 6])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, step, ema):
    def make():
        return svi_of(pair(ema=ema), beside=Beside(SGD))

    whole = make()
    expected = numbers(fit(whole, valid=X[:20]))
    files = ppvae.Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(Crash):
        fit(make(), valid=X[:20], checkpoint=files, callbacks=[CrashAt(step)])
    resumed = make()
    assert numbers(fit(resumed, valid=X[:20], checkpoint=files, resume=True)) == expected
    other = tensors(resumed.objective)
    for name, value in tensors(whole.objective).items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("ema", [True, False], ids=["averages", "gradient"])
def test_the_traced_step_is_the_eager_one(ema, traced):
    compiled_is_eager(ema)
    assert len(traced) >= (1 if ema else 2)  # the pair's, and that of the codes' own loss


@inductor
@pytest.mark.slow
@pytest.mark.parametrize("ema", [True, False], ids=["averages", "gradient"])
def test_compiled_is_eager_buffers_included(ema):
    compiled_is_eager(ema)


def compiled_is_eager(ema):
    """Losses, parameters, and all that a codebook remembers."""
    runs = []
    for compile in (False, True):
        svi = svi_of(pair(ema=ema), SGD, compile=compile, beside=Beside(SGD))
        svi.prepare(X)
        torch.manual_seed(3)
        runs.append([svi.step(X) for _ in range(4)])
        runs.append(tensors(svi.objective))
        assert svi._compiled is None or svi._compiled.latest is not None
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[3][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert runs[1]["guide.conditional.quantizer.updates"] == 4


@inductor
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "conv"])
def test_compiled_is_eager_with_a_learned_prior(kind):
    runs = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = PRIORS[kind](K, (SIDE, SIDE), 0)
        optim = functools.partial(torch.optim.SGD, lr=1e-4)
        svi = svi_of(pair(net=net), optim, compile=compile)
        svi.prepare(X)
        torch.manual_seed(3)
        runs.append([svi.step(X) for _ in range(4)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def launch(function, *args):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    return pickle.loads(fabric.launch(function, *args))


def in_processes(fabric, ema):
    svi = svi_of(pair(ema=ema), SGD, beside=Beside(SGD))
    history = fit(svi, X[:48], epochs=4, fabric=fabric)
    found = tensors(svi.objective), numbers(history)
    return pickle.dumps(Processes(fabric).gather(found))


@pytest.mark.parametrize("ema", [True, False], ids=["averages", "gradient"])
def test_processes_hold_codes_that_are_equal_to_the_bit(ema):
    (first, rows), (second, others) = launch(in_processes, ema)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert rows == others


def train_without_restarts(fabric):
    model, guide = pair(restart=0.0)
    svi = svi_of((model, guide), SGD)
    fit(svi, X[:48], epochs=3, **({} if fabric is None else {"fabric": fabric}))
    return tensors(svi.objective)


def without_restarts(fabric):
    return pickle.dumps(Processes(fabric).gather(train_without_restarts(fabric)))


def test_two_processes_train_as_one():
    """Where no code is put on an output at random, which are others there."""
    (two, _), one = launch(without_restarts), train_without_restarts(None)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_each_process_offers_outputs_for_codes_of_its_own(monkeypatch):
    """Rank 1 of 2, beside which rank 0 offers 7 for codes 0, 2 and 4."""
    from ppvae.nets import codes

    monkeypatch.setattr(codes, "_this_process", lambda: (1, 2))
    book = nets.Codebook(K, 1)
    book.codes.fill_(1e3)
    book(torch.full((6, 1, 1, 1), 5.0, requires_grad=True))

    def total(tensors):
        assert tensors[2].flatten().tolist() == [0.0, 5.0, 0.0, 5.0, 0.0]
        tensors[2][::2] += 7.0
        tensors[3][::2] += 1.0
        tensors[0][0] += 1e-3  # so that code 0 has a mean, hardly used

    book.update(total)
    assert book.codes.flatten().tolist()[1:] == [5.0, 7.0, 5.0, 7.0]


def test_a_deep_copy_shares_nothing():
    svi = svi_of(pair())
    svi.step(X)
    other, before = copy.deepcopy(svi), tensors(svi.objective)
    other.step(X)
    for name, value in tensors(svi.objective).items():
        assert torch.equal(value, before[name]), name


# -- other quantisers ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[3, 4], [2], [5, 3, 2], [8, 8]], ids=str)
def test_fsq_numbers_its_codes_one_to_one(levels):
    fsq = nets.FSQ(levels)
    every = torch.arange(fsq.num_codes).reshape(-1, 1, 1)
    codes = fsq.lookup(every)
    assert torch.equal(fsq.indices(codes), every)
    assert len(codes.flatten(1).unique(dim=0)) == fsq.num_codes == math.prod(levels)


def test_fsq_reaches_all_codes_and_no_others():
    fsq = nets.FSQ([3, 4])
    fsq(torch.randn(1000, 2, 1, 1, requires_grad=True))
    assert fsq.norm.running_mean.abs().max() > 0
    raw = torch.cartesian_prod(*[torch.linspace(-9, 9, 41)] * 2).reshape(-1, 2, 1, 1)
    numbers = fsq.eval().indices(fsq(raw))
    assert numbers.unique().tolist() == list(range(12))


def test_fsq_has_the_gradient_of_the_bounded_value():
    fsq = nets.FSQ([3, 4]).eval()
    raw = torch.randn(5, 2, SIDE, SIDE, requires_grad=True)
    slope = torch.randn_like(raw)
    (found,) = torch.autograd.grad((fsq(raw) * slope).sum(), raw)
    smooth = fsq._bounded(raw) / fsq.divisor
    (expected,) = torch.autograd.grad((smooth * slope).sum(), raw)
    torch.testing.assert_close(found, expected)


def test_fsq_trains_by_the_plain_elbo():
    svi = svi_of(pair(nets.FSQ([3, 3])), loss=elbo.ELBO())
    rows = fit(svi, epochs=10).rows
    assert rows[-1]["train_objective"] > rows[0]["train_objective"]
    assert len(svi.guide.eval().indices(X).unique()) > 4
    with pytest.raises(ValueError, match=r"no latent has a distance.*FSQ"):
        elbo.VQELBO()(svi.model, svi.guide)(X)


def small_gumbel(temperature, codes=3):
    """Codes of 1 x 2 places, whose ELBO can be summed over all of them."""
    torch.manual_seed(0)
    table = nets.CodeTable(codes, D)
    net = nn.Sequential(nn.Flatten(-3), nn.Linear(4, 2 * codes), nn.Unflatten(-1, (codes, 1, 2)))
    head = nn.Sequential(nn.Flatten(-3), nn.Linear(2 * D, 4), nn.Unflatten(-1, (1, 2, 2)))
    prior = conditionals.CodePrior(table, (1, 2))
    model = models.VAE(conditionals.Bernoulli(head, event_dim=3), prior=prior)
    q = posteriors.GumbelCodes(net, table, temperature)
    return model.double(), guides.Amortized(q).double(), X[:4, :, :2, :2].double()


def exact_elbo(model, guide, x):
    """Summed over the codes, ``(N,)``."""
    table = model.prior.quantizer
    size = table.num_codes
    every = torch.cartesian_prod(*[torch.arange(size)] * 2).reshape(-1, 1, 2)
    z = table.lookup(every).unsqueeze(1)
    log_q = guide.posterior(x).log_prob(z)
    terms = model.likelihood(z).log_prob(x) - 2 * math.log(size) - log_q
    return (log_q.exp() * terms).sum(0)


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_gumbel_codes_have_the_elbo_of_enumeration(kl):
    model, guide, x = small_gumbel(1.0)
    exact = exact_elbo(model, guide, x).detach()
    many = x.repeat(4000, 1, 1, 1)
    weights = ppvae.log_weights(model, guide, many)
    values = elbo.ELBO(kl=kl).effective(weights, elbo.State())[0].detach().reshape(4000, 4)
    error = (values.mean(0) - exact) / (values.std(0) / 4000**0.5)
    assert error.abs().max() < 4.5


def test_the_closed_form_is_log_k_less_the_entropy():
    model, guide, x = small_gumbel(1.0)
    q, p = guide.posterior(x), model.prior()
    found = torch.distributions.kl_divergence(q, p)
    probability = q.log_probs().exp()
    entropy = torch.special.entr(probability).sum((-3, -2, -1))
    torch.testing.assert_close(found, 2 * math.log(3) - entropy)
    with pytest.raises(NotImplementedError, match="two quantisers"):
        torch.distributions.kl_divergence(q, CodeMap(nets.CodeTable(3, D), p.logits))


def exact_iwelbo(model, guide, x):
    """Of two particles, summed over all pairs of them, ``(N,)``."""
    table = model.prior.quantizer
    every = torch.cartesian_prod(*[torch.arange(table.num_codes)] * 2).reshape(-1, 1, 2)
    z = table.lookup(every).unsqueeze(1)
    log_q = guide.posterior(x).log_prob(z)
    log_w = model.likelihood(z).log_prob(x) - 2 * math.log(table.num_codes) - log_q
    both = torch.logaddexp(log_w.unsqueeze(0), log_w.unsqueeze(1)) - math.log(2)
    return ((log_q.unsqueeze(0) + log_q.unsqueeze(1)).exp() * both).sum((0, 1))


def gradient_of(estimator, exact, repeats, temperature):
    """Mean and standard error of the gradient in the encoder, and the exact one."""
    model, guide, x = small_gumbel(temperature)
    parameters = list(guide.conditional.net.parameters())
    expected = torch.autograd.grad(-exact(model, guide, x).sum(), parameters)
    many, found = x.repeat(50, 1, 1, 1), []
    objective = estimator(model, guide)
    for _ in range(repeats):
        gradients = torch.autograd.grad(objective(many) / 50, parameters)
        found.append(torch.cat([g.flatten() for g in gradients]))
    draws, expected = torch.stack(found), torch.cat([g.flatten() for g in expected])
    moving = expected != 0  # of pixels that are always 0 there is none
    assert not draws[:, ~moving].any()
    draws = draws[:, moving]
    return draws.mean(0), draws.std(0) / repeats**0.5, expected[moving]


def test_vimco_of_the_same_codes_is_unbiased():
    estimator = elbo.IWELBO(2, gradient="vimco")
    mean, error, exact = gradient_of(estimator, exact_iwelbo, 100, None)
    assert ((mean - exact) / error).abs().max() < 5


def test_gumbel_is_near_the_exact_gradient():
    """Straight-through: another function's, so biased, but of nearly the same direction."""
    mean, error, exact = gradient_of(elbo.ELBO(kl="analytic"), exact_elbo, 100, 0.5)
    assert torch.nn.functional.cosine_similarity(mean, exact, 0) > 0.95
    assert (mean - exact).norm() < 0.5 * exact.norm()
    assert error.norm() < 0.2 * exact.norm()  # so that this is no accident


def test_the_gradient_of_the_kl_is_exact():
    """With a likelihood that does not look at z all of it is the KL's."""
    model, guide, x = small_gumbel(1.0)
    nn.init.zeros_(model.likelihood.net[1].weight)
    parameters = list(guide.conditional.net.parameters())
    exact = torch.autograd.grad(-exact_elbo(model, guide, x).sum(), parameters)
    found = torch.autograd.grad(elbo.ELBO(kl="analytic")(model, guide)(x), parameters)
    torch.testing.assert_close(found, exact)


def test_a_sampled_kl_has_a_gradient_along_the_path():
    model, guide, x = small_gumbel(1.0)
    nn.init.zeros_(model.likelihood.net[1].weight)
    weight = guide.conditional.net[1].weight
    (exact,) = torch.autograd.grad(-exact_elbo(model, guide, x).sum(), weight)
    loss = elbo.ELBO()(model, guide)(x.repeat(5000, 1, 1, 1)) / 5000
    (found,) = torch.autograd.grad(loss, weight)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0)
    assert cosine > 0.95


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradients_that_need_a_density_of_the_draw_are_refused(gradient):
    model, guide, x = small_gumbel(1.0)
    estimator = elbo.IWELBO(2, gradient) if gradient == "dreg" else elbo.ELBO(2, gradient)
    with pytest.raises(ValueError, match=r"density|straight-through"):
        estimator(model, guide)(x)


def test_codes_of_a_table_are_trained_with_the_pair():
    model, guide, x = small_gumbel(1.0)
    table = model.prior.quantizer
    elbo.ELBO(kl="analytic")(model, guide)(x).backward()
    assert table.codes.grad.abs().sum() > 0
    assert not isinstance(table, ppvae.Auxiliary)


# -- two levels ----------------------------------------------------------------------------------


def two_levels(condition=None, kind="conv"):
    torch.manual_seed(0)
    fine, coarse, labels = nets.Codebook(4, D), nets.Codebook(3, 3), 0 if condition is None else 2
    bottom = conditionals.CodePrior(fine, (4, 4), PRIORS[kind](4, (4, 4), 3 + labels))
    top = conditionals.CodePrior(coarse, (2, 2), PRIORS[kind](3, (2, 2), labels))
    image = nets.MergeMaps(nets.upsample(D + 3, 1, channels=(4,)))
    likelihood = conditionals.Bernoulli(image, event_dim=3)
    model = models.CodeHierarchy(likelihood, bottom, top, condition)
    lower = nets.downsample(1, 4, channels=(4,))
    upper = nets.downsample(4, 3, channels=(4,))
    merge = nets.MergeMaps(nets.flat_batch(nn.Conv2d(4 + 3, D, 1), event_dim=3))
    return model, guides.QuantizedLevels(lower, upper, merge, (fine, coarse))


X8 = torch.bernoulli(torch.full((20, 1, 8, 8), 0.4), generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 2


def test_two_levels_have_the_code_length_of_both():
    model, guide = two_levels()
    weights = ppvae.log_weights(model, guide, X8)
    z1, z2 = (weights.guide_trace.nodes[name]["value"] for name in ("z1", "z2"))
    assert z1.shape[1:] == (D, 4, 4) and z2.shape[1:] == (3, 2, 2)
    by_hand = (
        model.likelihood(z1, z2).log_prob(X8)
        - model.top.code_length(z2)
        - model.bottom.code_length(z1, z2)
    )
    torch.testing.assert_close(elbo.VQELBO().evaluate(model, guide, X8), by_hand.detach())
    numbers = guide.indices(X8)
    assert torch.equal(model.bottom.quantizer.lookup(numbers[0]), z1)
    assert torch.equal(model.top.quantizer.lookup(numbers[1]), z2)


@pytest.mark.parametrize("labels", [False, True])
def test_two_levels_train_and_draw(labels):
    model, guide = two_levels(nets.OneHot(2) if labels else None)
    train = (X8, Y) if labels else X8
    svi = svi_of((model, guide))
    rows = fit(svi, train, epochs=10).rows
    assert rows[-1]["train_objective"] > rows[0]["train_objective"]
    columns = {name for name in rows[0] if "code_perplexity" in name}
    assert columns == {f"model.{level}.quantizer.code_perplexity" for level in ("top", "bottom")}
    drawn = model(y=Y) if labels else model(size=20)
    assert drawn.shape == X8.shape
    soft = guide.soften(1.0)
    args = (X8, Y) if labels else (X8,)
    assert ppvae.log_weights(model, soft, *args, num_particles=3).log_w.std(0).min() > 0


def test_a_label_moves_the_codes_of_both_levels():
    model, _ = two_levels(nets.OneHot(2))
    scattered(model.top.net), scattered(model.bottom.net)
    z2 = model.top.quantizer.lookup(torch.randint(3, (1, 2, 2)))
    z1 = model.bottom.quantizer.lookup(torch.randint(4, (1, 4, 4)))
    a, b = (nets.OneHot(2)(torch.tensor([y]))[..., None, None] for y in (0, 1))
    assert model.top.code_length(z2, a) != model.top.code_length(z2, b)
    assert model.bottom.code_length(z1, z2, a) != model.bottom.code_length(z1, z2, b)


def test_every_parameter_of_two_levels_gets_a_gradient():
    model, guide = two_levels(nets.OneHot(2))
    objective = elbo.VQELBO()(model, guide)
    objective(X8, Y).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# -- places that differ --------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (7,), (2, 7)], ids=str)
def test_a_position_embedding_adds_a_vector_to_each_place(leading):
    net = nets.PositionEmbedding(D, (SIDE, SIDE), scale=0.5)
    x = torch.randn(*leading, D, SIDE, SIDE)
    assert torch.equal(net(x), x + net.vectors)
    (net(x) * x).sum().backward()
    torch.testing.assert_close(net.vectors.grad, x.reshape(-1, D, SIDE, SIDE).sum(0))


def test_its_first_vectors_are_of_the_given_size():
    torch.manual_seed(0)
    vectors = nets.PositionEmbedding(64, (8, 8), scale=0.3).vectors.detach()  # 4,096
    assert abs(float(vectors.mean())) < 4.5 * 0.3 / 64
    assert abs(float(vectors.std()) - 0.3) < 4.5 * 0.3 / (2 * 4096) ** 0.5
    assert not nets.PositionEmbedding(2, (3, 3), scale=0.0).vectors.any()


def test_places_that_look_alike_have_codes_of_their_own_that_cost_nothing():
    """All-black images: nine codes in equal use, which a prior that knows the place foretells."""
    torch.manual_seed(0)
    book = nets.Codebook(SIDE**2, D)
    net = nn.Sequential(encoder(), nets.PositionEmbedding(D, (SIDE, SIDE), 1.0))
    guide, black = guides.Quantized(net, book), torch.zeros(40, 1, 6, 6)
    with torch.no_grad():
        book.codes.copy_(guide.conditional.net(black[:1])[0].flatten(1).T)
    numbers = guide.indices(black)
    assert metrics.code_perplexity(numbers, book.num_codes) == pytest.approx(9)
    prior = conditionals.CodePrior(book, (SIDE, SIDE), nets.CausalGRU(9, (SIDE, SIDE), hidden=16))
    optim = functools.partial(torch.optim.Adam, lr=0.1)
    ppvae.fit_prior(prior, guide, black, optim=optim, epochs=40, progress=False)
    assert prior.code_length(book.lookup(numbers)).max() < 0.1  # a unigram takes 9 log 9 = 19.8


# -- laws that hold for every pair ---------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [pair, lambda: pair(net=nets.Unigram(K))], ids=["uniform", "unigram"]
)
def test_check_pair_finds_no_fault(make):
    report = str(ppvae.check_pair(*make(), X))
    assert "log q = 0 is a probability, and the ELBO a bound" in report
    assert "no bound on log p(x)" not in report
    assert ppvae.log_weights(*make(), X, size=500).scale == 10.0


def test_evaluating_changes_nothing():
    model, guide = pair()
    svi = svi_of((model, guide))
    svi.step(X)
    before = tensors(svi.objective)
    elbo.VQELBO().evaluate(model, guide, X)
    ppvae.check_pair(model, guide, X)
    for name, value in tensors(svi.objective).items():
        assert torch.equal(value, before[name]), name


def test_the_uniform_prior_is_drawn_at_any_size():
    model, _ = pair()
    assert model(size=7).shape == (7, 1, 6, 6)


# -- what is refused -----------------------------------------------------------------------------


def test_more_than_one_particle():
    model, guide = pair()
    with pytest.raises(ValueError, match=r"all draws are equal.*soften"):
        ppvae.log_weights(model, guide, X, num_particles=3)
    with pytest.raises((ValueError, PairError), match=r"all draws are equal.*soften"):
        diagnostics.log_evidence(model, guide, X)
    with pytest.raises((ValueError, PairError), match=r"all draws are equal.*soften"):
        svi_of((model, guide), loss=elbo.IWELBO(5)).step(X)


def other_channels():
    model, guide = pair()
    guide.conditional.net = encoder(D + 1)
    return model, guide


def other_shape():
    model, guide = pair()
    model.prior.shape = (2, 2)
    return model, guide


def other_shape_of_a_network():
    return pair(net=nets.CausalGRU(K, (2, 2)))


def other_codes():
    model, guide = pair()
    model.prior.quantizer = nets.Codebook(K, D)
    return model, guide


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = encoder()

    def forward(self, x):
        return self.net(x) * math.nan


def not_finite():
    model, guide = pair()
    guide.conditional.net = Broken()
    return model, guide


def other_places():
    model, guide = pair()
    guide.conditional.net = nn.Sequential(encoder(), nets.PositionEmbedding(D, (2, 2)))
    return model, guide


class Logits(nn.Module):
    """A network of one's own with a logit too many."""

    def __init__(self):
        super().__init__()
        self.of_places = nn.Parameter(torch.zeros(K + 1, SIDE, SIDE))

    def forward(self, numbers, *context):
        return self.of_places.expand(len(numbers), -1, -1, -1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pair(net=Logits()), r"have shape \(B, 5, 3, 3\), and .* gave \(50, 6, 3, 3\)"),
        (other_places, r"maps of shape \(2, 2, 2\), and saw \(2, 3, 3\)"),
        (other_channels, r"codes of 2 numbers.*\(\.\.\., 2, h, w\).*\(50, 3, 3, 3\)"),
        (other_shape, r"latent 'z': event shape|\(2, 2, 2\)"),
        (other_shape_of_a_network, r"code maps of shape \(2, 2\)"),
        (other_codes, r"latent 'z': the guide draws values outside the model's support"),
        (not_finite, r"latent 'z': the guide draws .* NaN"),
    ],
)
def test_pairs_that_do_not_fit_are_named_before_the_first_step(make, match):
    svi = svi_of(make())
    with pytest.raises((ValueError, PairError), match=match):
        svi.step(X)
    assert svi.num_steps == 0


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: nets.Codebook(1, 4), ValueError, "num_codes >= 2"),
        (lambda: nets.CodeTable(4, 0), ValueError, "dim must be at least 1"),
        (lambda: nets.Codebook(4, 4, decay=1.0), ValueError, "decay must lie in"),
        (lambda: nets.Codebook(4, 4, restart=-1), ValueError, "restart counts uses"),
        (lambda: nets.FSQ([3, 1]), ValueError, "levels are numbers >= 2"),
        (lambda: nets.FSQ([]), ValueError, "levels are numbers >= 2"),
        (lambda: nets.FSQ([3, 2.5]), TypeError, "levels must be a whole number, got 2.5"),
        (lambda: nets.Codebook(4.5, 2), TypeError, "num_codes must be a whole number"),
        (lambda: nets.Codebook(4, 2, decay="slow"), TypeError, "decay must be a number"),
        (lambda: nets.CausalConv(4, layers=0), ValueError, "layers must be at least 1"),
        (lambda: nets.upsample(4, 1, channels=()), ValueError, "at least one channel"),
        (lambda: nets.PositionEmbedding(4, (2, 2), -1.0), ValueError, "scale must be at least 0"),
        (lambda: conditionals.CodePrior(nets.FSQ([3]), (3,)), ValueError, "shape must have 2"),
        (lambda: conditionals.CodePrior(nets.FSQ([3]), (3, 3), nets.CausalConv(4)), ValueError,
         "a network of 4 codes beside a quantiser of 3"),
        (lambda: conditionals.CodePrior(nets.FSQ([3]), (3, 3), nets.CausalGRU(4, (3, 3))),
         ValueError, "give CausalGRU the quantiser's num_codes"),
        (lambda: conditionals.CodePrior(nets.FSQ([3]), (3, 3), nets.Unigram(2)), ValueError,
         "give Unigram"),
        (lambda: elbo.VQELBO(commitment=-1.0), ValueError, "must be >= 0"),
        (lambda: elbo.VQELBO(commitment="much"), TypeError, "commitment must be a number"),
        (lambda: pair()[1].soften(0.0), ValueError, "tau must be positive"),
        (lambda: pair()[1].soften(math.inf), ValueError, "tau must be positive and finite"),
        (lambda: pair()[1].soften("warm"), TypeError, "tau must be a number"),
        (lambda: posteriors.GumbelCodes(nn.Identity(), nets.CodeTable(3, 2), 0.0), ValueError,
         "temperature must be positive"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_other_refusals():
    _, guide, x = small_gumbel(1.0)
    guide.conditional.quantizer = nets.CodeTable(4, D)
    with pytest.raises(ValueError, match=r"has 4 codes.*gave \(4, 3, 1, 2\)"):
        guide.posterior(x)
    book = nets.Codebook(4, D)
    with pytest.raises(ValueError, match="each level its own"):
        guides.QuantizedLevels(encoder(), encoder(), encoder(), (book, book))
    with pytest.raises(ValueError, match="no condition, and was given labels"):
        two_levels()[0](X8, Y)
    with pytest.raises(ValueError, match="has a condition, so call it with labels"):
        two_levels(nets.OneHot(2))[0](X8)
    plain = models.VAE(conditionals.Bernoulli(nets.mlp(2, 4)), latent_dim=2)
    with pytest.raises(ValueError, match=r"no latent has a distance.*'z' \(Normal\)"):
        elbo.VQELBO()(plain, guides.Normal(nets.mlp(4, 4)))(torch.ones(3, 4))


def test_a_stock_engine_raises():
    svi = pyro.infer.SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), elbo.VQELBO())
    with pytest.raises(RuntimeError, match=r"Codebook has a loss of its own.*use ppvae.SVI"):
        svi.step(X)


def test_a_distribution_of_codes_says_its_support():
    book = nets.Codebook(K, D)
    prior = conditionals.CodePrior(book, (SIDE, SIDE))()
    assert prior.support.is_discrete and isinstance(prior, dist.TorchDistribution)
    assert prior.support.check(prior.sample()).all()
    assert not prior.support.check(prior.sample() + 0.1).any()
    assert isinstance(conditionals.CodePrior(book, (2, 2), nets.Unigram(K))(), CausalCodes)
