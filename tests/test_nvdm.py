"""NVDM by hand and by quadrature; alternating updates; sparse counts and their bad input."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch

import oracles
import ppvae
from oracles import assert_mean, trainable
from ppvae import data, guides, metrics, models, nets
from ppvae.data.sparse import EmptyDocumentWarning, SparseRows

V, Z, N = 7, 2, 5
WORDS = ["gun", "car", "god", "team", "disk", "space", "law"]
adam = functools.partial(torch.optim.Adam, lr=0.01)


def pair(latent_dim=Z, width=V):
    model = models.NVDM(width, latent_dim)
    guide = guides.Normal(nets.mlp(width, 8, 2 * latent_dim, activation=torch.nn.Tanh))
    return model, guide, 1 + torch.poisson(torch.ones(N, width))


# ------------------------------------------------------------------------------ the model


@pytest.mark.usefixtures("float64")
def test_log_weights_by_the_papers_formula():
    model, guide, x = pair()
    weights = ppvae.log_weights(model, guide, x, num_particles=3)
    z = weights.guide_trace.nodes["z"]["value"]
    R, b = model.word_vectors, model.likelihood.net.bias
    log_q = guide.posterior(x).log_prob(z)
    for k, n in itertools.product(range(3), range(N)):
        energy = torch.stack([-(z[k, n] @ R[v]) - b[v] for v in range(V)])
        words = [v for v in range(V) for _ in range(int(x[n, v]))]
        log_p = sum(-energy[v] - (-energy).logsumexp(0) for v in words)
        prior = -0.5 * (z[k, n] ** 2).sum() - Z / 2 * math.log(2 * math.pi)
        torch.testing.assert_close(weights.log_w[k, n], log_p + prior - log_q[k, n])


@pytest.mark.usefixtures("float64")
def test_documents_of_two_words_have_probability_one_together():
    """log p is that of the words in their order, so counts come as often as they have orders."""
    model, _, _ = pair(latent_dim=1, width=4)
    points, mass = oracles.hermite(60)
    total = 0.0
    for words in itertools.product(range(4), repeat=2):
        x = torch.bincount(torch.tensor(words), minlength=4).double()
        total += (mass * model.likelihood(points[:, None]).log_prob(x).exp()).sum()
    assert total.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.usefixtures("float64")
def test_perplexity_from_importance_samples_is_that_by_quadrature():
    model, guide, x = pair(latent_dim=1)
    points, mass = oracles.hermite(150)
    log_p = (mass[:, None].log() + model.likelihood(points[:, None, None]).log_prob(x)).logsumexp(0)
    exact = metrics.perplexity(log_p, x.sum(1))
    log_w = ppvae.log_weights(model, guide, x, num_particles=20_000).log_w.detach()
    assert_mean((log_w - log_p.detach()).exp(), 1.0)
    bounds = metrics.perplexity(log_w.mean(0), x.sum(1))  # from the ELBO: larger
    assert bounds.per_document > exact.per_document
    assert bounds.corpus > exact.corpus


def test_words_and_topics():
    model, _, _ = pair()
    R = torch.zeros(V, Z)
    R[0], R[6], R[2] = torch.tensor([3.0, 0.1]), torch.tensor([0.5, 0.0]), torch.tensor([-1.0, 0.0])
    R[5] = torch.tensor([0.0, -2.0])
    with torch.no_grad():
        model.word_vectors.copy_(R)
    assert model.nearest_words(["gun"], WORDS, num=1) == {"gun": ["law"]}
    assert model.nearest_words(["law"], WORDS, num=1) == {"law": ["gun"]}  # cosine, not length
    with torch.no_grad():
        model.word_vectors[3] = torch.tensor([9.0, 9.0])  # the largest product with "law"
    assert model.nearest_words(["law"], WORDS, num=1) == {"law": ["gun"]}
    with torch.no_grad():
        model.word_vectors.copy_(R)
    up, down = model.topics(WORDS, num=1)[0]
    assert (up, down) == (["gun"], ["god"])
    assert model.topics(WORDS, num=1)[1][1] == ["space"]
    with pytest.raises(ValueError, match="the vocabulary has 6 words and the model 7"):
        model.topics(WORDS[:6])
    with pytest.raises(ValueError, match=r"the word 'cars' is not in the vocabulary; near .* car"):
        model.nearest_words(["cars"], WORDS)
    up, down = model.topics(WORDS)[0]  # ten of seven words
    assert sorted(up) == sorted(down) == sorted(WORDS)
    for ask in (model.topics, functools.partial(model.nearest_words, ["gun"])):
        with pytest.raises(ValueError, match="num must be 1 or more words, got -1"):
            ask(WORDS, num=-1)


# ------------------------------------------------------------------------------ in turn


def run(optimizer_of, steps):
    torch.manual_seed(0)
    model, guide, x = pair()
    update = optimizer_of(model, guide)
    torch.manual_seed(1)
    update(model, guide, x, steps)
    return [p.detach().clone() for p in trainable(model, guide)]


@pytest.mark.filterwarnings("ignore:the optimiser does not hold")
def test_alternating_equals_two_optimisers_used_in_turn():
    def ours(model, guide):
        svi = ppvae.SVI(model, guide, ppvae.alternate(adam, model, guide, steps=3))
        return lambda model, guide, x, steps: [svi.step(x) for _ in range(steps)]

    def two(model, guide):
        each = [ppvae.SVI(model, guide, adam(part.parameters())) for part in (model, guide)]
        return lambda model, guide, x, steps: [each[i // 3 % 2].step(x) for i in range(steps)]

    for steps in (2, 3, 4, 6, 11):
        for found, expected in zip(run(ours, steps), run(two, steps), strict=True):
            assert torch.equal(found, expected)


def test_who_rests_does_not_move_and_the_turn_survives_a_checkpoint(tmp_path):
    def svi():
        torch.manual_seed(0)
        model, guide, _ = pair()
        optimizer = ppvae.alternate(adam, model, guide, steps=5)
        return ppvae.SVI(model, guide, optimizer, clip_norm=1.0)

    x = pair()[2].repeat(4, 1)  # 20 rows: 3 steps in an epoch, so turns end within epochs
    fit = functools.partial(ppvae.fit, data=x, batch_size=8, progress=False)
    whole, parted = svi(), svi()
    torch.manual_seed(2)
    fit(whole, epochs=4)
    torch.manual_seed(2)
    fit(parted, epochs=2, checkpoint=tmp_path)
    again = svi()
    fit(again, epochs=4, checkpoint=tmp_path, resume=True)
    assert again.optimizer.param_groups[0]["taken"] == 12
    for one, other in zip(whole.objective.parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(one, other)
    before = [p.clone() for p in again.guide.parameters()]
    moved = again.model.word_vectors.clone()
    for _ in range(3):  # steps 13 to 15: the third turn, the model's
        again.step(x)
    assert not torch.equal(moved, again.model.word_vectors)
    for old, new in zip(before, again.guide.parameters(), strict=True):
        assert torch.equal(old, new)
    again.step(x)
    assert not torch.equal(before[0], next(again.guide.parameters()))


def test_what_cannot_alternate():
    model, guide, _ = pair()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        ppvae.alternate(adam, model, guide, steps=0)
    with pytest.raises(ValueError, match="two or more parts"):
        ppvae.alternate(adam, model, steps=1)
    with pytest.raises(ValueError, match="part 1 has no trainable parameters"):
        ppvae.alternate(adam, model, torch.nn.Tanh(), steps=1)
    with pytest.raises(ValueError, match="parts 0 and 1"):
        ppvae.alternate(adam, model, [model.word_vectors], steps=1)
    with pytest.raises(ValueError, match="leave out fused"):
        ppvae.alternate(functools.partial(adam, fused=True), model, guide, steps=1)


# ------------------------------------------------------------------------------ sparse counts


def corpus(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5, (rows, V))
    counts[:, 0] += 1  # nobody is empty
    return counts


def test_sparse_rows_answer_as_the_dense_tensor_does():
    dense = torch.tensor(corpus(), dtype=torch.float32)
    rows = SparseRows(scipy.sparse.csr_array(corpus()))
    index = torch.tensor([7, 0, 3, 3])
    assert rows.shape == dense.shape and len(rows) == 40 and rows.dtype == torch.float32
    assert torch.equal(rows.index_select(0, index), dense[index])
    assert torch.equal(rows[index], dense[index]) and torch.equal(rows[5], dense[5])


def test_training_on_sparse_counts_equals_training_on_dense_ones(tmp_path):
    sparse = data.from_counts(scipy.sparse.csr_matrix(corpus()), WORDS, valid=8, test=8, seed=3)
    assert (len(sparse.train), len(sparse.valid), len(sparse.test)) == (24, 8, 8)
    assert sparse.support == "counts" and sparse.vocabulary == tuple(WORDS)
    assert sparse.to("cpu").train.values is sparse.train.values
    dense = sparse.map_splits(lambda part: data.Split(part.x))
    histories = []
    for dataset in (dense, sparse):
        torch.manual_seed(0)
        model, guide, _ = pair()
        svi = ppvae.SVI(model, guide, adam)
        folder = tmp_path / str(len(histories))
        histories.append(
            ppvae.fit(svi, dataset, epochs=3, batch_size=7, checkpoint=folder, progress=False)
        )
    for column in ("train_objective", "valid_bound"):
        assert histories[0].column(column) == pytest.approx(histories[1].column(column))


def test_empty_documents_are_counted_and_dropped():
    counts = corpus()
    counts[[3, 11]] = 0
    y = np.arange(40) % 4
    with pytest.warns(EmptyDocumentWarning, match="2 of 40 documents have no word .* dropped"):
        dataset = data.from_counts(counts, WORDS, y, valid=6, test=6)
    assert len(dataset.train) == 26
    assert "2 empty documents dropped" in dataset.source
    rows = torch.cat([part.x for part in (dataset.train, dataset.valid, dataset.test)])
    labels = torch.cat([part.y for part in (dataset.train, dataset.valid, dataset.test)])
    kept = np.delete(np.arange(40), [3, 11])
    as_pairs = {(*r, k) for r, k in zip(rows.int().tolist(), labels.tolist(), strict=True)
                for r in [tuple(r)]}  # fmt: skip
    assert as_pairs == {(*counts[i].tolist(), y[i]) for i in kept}


def test_parts_that_are_given():
    dataset = data.from_counts(corpus(), WORDS, test=corpus(9, seed=1), valid=10)
    assert torch.equal(dataset.test.x, torch.tensor(corpus(9, seed=1), dtype=torch.float32))
    assert (len(dataset.train), len(dataset.valid)) == (30, 10)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (corpus(), {"vocabulary": WORDS[:5]}, "vocabulary has 5 words and counts 7 columns"),
        (corpus(), {"vocabulary": [*WORDS[:6], "gun"]}, "'gun' .* twice"),
        (corpus() + 0.5, {}, r"not whole, such as \d\.5"),
        (corpus() - 2, {}, "negative .*, such as -"),
        (corpus(), {"test": corpus(9)[:, :4]}, "test has 4 columns and counts 7"),
        (corpus(), {"y": np.zeros(3)}, "one label per document"),
        (corpus(), {"y": np.arange(40) - 1}, "y has 1 labels .* row 0: -1. Number the classes"),
        (corpus(), {"y": np.arange(40) + 0.9}, "y has 40 labels that are not whole"),
        (corpus(), {"y": np.zeros(40), "test": corpus(9), "test_y": -np.ones(9)}, "test_y has 9"),
        (np.zeros((4, V)), {}, "no document has a word"),
        (corpus()[0], {}, r"\(N, V\)"),
        (corpus() * np.nan, {}, "280 values that are NaN.*, such as nan"),
    ],
)
def test_bad_counts(counts, options, message):
    options = {"vocabulary": WORDS} | options
    with pytest.raises(ValueError, match=message):
        data.from_counts(counts, **options)


def test_a_model_for_another_vocabulary_is_refused_before_any_step():
    dataset = data.from_counts(corpus(), WORDS, valid=6, test=6)
    model, other, _ = pair(width=V - 1)
    message = (
        r"^site 'x': argument 'x' counts 7 words, and the model's vocabulary has 6: .*"
        r"its vocabulary .*data\.from_counts, or make model and guide for 7 words"
    )
    before = model.word_vectors.clone()
    for guide in (other, pair()[1]):
        with pytest.raises(ppvae.PairError, match=message) as caught:
            ppvae.fit(ppvae.SVI(model, guide, adam), dataset, epochs=1, progress=False)
        first, *others = str(caught.value).splitlines()
        assert "images" not in first and len(others) == (guide is other)  # which fails, too
    assert torch.equal(model.word_vectors, before)


# ------------------------------------------------------------------------------ the example


@pytest.fixture
def example(monkeypatch):
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("nvdm")


def test_the_encoder_starts_at_unit_scale_whatever_the_document(example):
    _, guide = example.pair(V, Z, 8)
    q = guide.posterior(torch.tensor(corpus(), dtype=torch.float32))
    assert torch.equal(q.stddev, torch.ones(40, Z)) and q.mean.std(0).min() > 0


def test_topics_of_lda_are_found_again(example):
    """Documents of one of two topics without a common word; the rest of each row is the prior."""
    rng = np.random.default_rng(0)
    topics = np.array([[0.5, 0.3, 0.2, 0, 0, 0, 0], [0, 0, 0, 0.4, 0.3, 0.2, 0.1]])
    counts = rng.multinomial(50, topics[np.arange(200) % 2])
    found, alpha = example.fit_lda(
        scipy.sparse.csr_array(counts), 2, passes=10, doc_topic_prior=0.1
    )
    found = found[np.argsort(-found[:, 0])]
    assert alpha == 0.1 and np.allclose(found.sum(1), 1)
    # 5,000 words of each topic: a share is within five standard errors, and the prior's 0.5 / 5000
    assert np.abs(found - topics).max() < 5 * np.sqrt(0.25 / 5_000) + 1e-3


def test_the_bound_of_lda(example):
    """One topic: exact. Two: below log p by quadrature over the share of the first, and near."""
    counts = scipy.sparse.csr_array(corpus(6))
    rng = np.random.default_rng(0)
    topics = rng.dirichlet(np.ones(V), size=2)
    found = example.lda_bound(counts, topics[:1], alpha=0.5)
    np.testing.assert_allclose(found, corpus(6) @ np.log(topics[0]), rtol=1e-10)
    alpha = 1.5
    share = (np.arange(20_000) + 0.5) / 20_000
    log_density = (alpha - 1) * np.log(share * (1 - share)) + math.lgamma(2 * alpha)
    log_density -= 2 * math.lgamma(alpha)
    mixed = np.log(share[:, None] * topics[0] + (1 - share[:, None]) * topics[1])
    exact = np.log(np.exp(mixed @ corpus(6).T + log_density[:, None]).mean(0))
    bound = example.lda_bound(counts, topics, alpha)
    assert (bound < exact).all() and (exact - bound < 0.5).all()


def test_the_example_runs(example, tmp_path, monkeypatch, capsys):
    import hashlib
    import json

    from ppvae.data import fetch

    rng = np.random.default_rng(0)
    words = [f"word{v}" for v in range(40)]
    files = {"vocab.new": "".join(f"{w} 0\n" for w in words)}
    for part, rows in (("train", 90), ("test", 60)):
        lines = [
            "1 " + " ".join(f"{v + 1}:{c}" for v, c in enumerate(row) if c)
            for row in rng.poisson(0.7, (rows, 40))
        ]
        files[f"{part}.feat"] = "\n".join([*lines, "1 "]) + "\n"
    for name, content in files.items():
        (tmp_path / "20news").mkdir(exist_ok=True)
        (tmp_path / "20news" / name).write_text(content)
        digest = hashlib.sha256(content.encode()).hexdigest()
        monkeypatch.setitem(fetch.SHA256, f"20news/{name}", digest)
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    out = tmp_path / "out"
    options = ["--quick", "--device", "cpu", "--num-valid", "20", "--out", str(out)]
    example.main([*options, "--words", "word3", "word7"])
    shown = capsys.readouterr().out
    assert "2 empty documents dropped" in shown and "word3      " in shown
    assert {path.name for path in out.iterdir()} == set(example.FILES)
    found = json.loads((out / "results.json").read_text())["perplexity"]
    assert len(found) == 4
    bound, weighted = found["NVDM, ELBO"], found["NVDM, log p by 20 importance samples"]
    for definition in ("per_document", "corpus"):
        assert bound[definition] > weighted[definition] > 1  # the tighter bound, by Jensen
    # uniform words: nobody can do better than 40 but by chance
    assert found["one unigram for all"]["corpus"] == pytest.approx(40, rel=0.1)
    with pytest.raises(ValueError, match="already holds"):
        example.main(options)
    monkeypatch.setattr(ppvae, "fit", None)  # before any training
    with pytest.raises(ValueError, match="'word99' is not in the vocabulary"):
        example.main([*options, "--overwrite", "--words", "word99"])
