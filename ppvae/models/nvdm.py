"""The neural variational document model: a Gaussian latent, one softmax over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.conditionals import BagOfWords, StandardNormal
from ppvae.program import Program, data_plate


class NVDM(Program):
    r"""Documents as bags of words, drawn one by one from a softmax that z bends.

    .. math:: z \sim N(0, I),\qquad
              p(w_i = v \mid z) = \frac{e^{-E_v}}{\sum_u e^{-E_u}},\qquad E_v = -z^\top R_v - b_v

    A document is its counts, ``(N, V)``. log p is that of its words in their order, which
    perplexities are defined by (:func:`ppvae.metrics.perplexity`); the probability of the counts
    is larger by a constant of the data. Topics need not be mixed in shares, as in LDA: z is free,
    and a word's vector :math:`R_v` may be negative.

    Args:
        num_words: V, the size of the vocabulary.
        latent_dim: the size of z; the paper: 50 or 200.
        length: words of a document drawn from the model; not needed to fit it.

    Source: Miao, Yu and Blunsom, Neural Variational Inference for Text Processing, 2016,
    arXiv:1511.06038.

    Example:
        >>> from ppvae import models
        >>> model = models.NVDM(num_words=2000, latent_dim=50, length=120)
        >>> documents = model(size=5)
        >>> documents.shape, documents.sum(1)
        (torch.Size([5, 2000]), tensor([120., 120., 120., 120., 120.]))
    """

    @takes_numbers(num_words=1, latent_dim=1, length=0)
    def __init__(self, num_words: int, latent_dim: int, length: int | None = None) -> None:
        super().__init__()
        self.prior = StandardNormal(latent_dim)
        self.likelihood = BagOfWords(nn.Linear(latent_dim, num_words), total_count=length)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Observe counts ``x``, ``(N, V)``; or draw ``size`` documents if x is None. Returns x.

        With both, x is a minibatch of a data set of ``size`` rows.
        """
        with data_plate(x, size=size):
            z = pyro.sample("z", self.prior())
            value: Tensor = pyro.sample("x", self.likelihood(z), obs=x)
        return value

    @property
    def word_vectors(self) -> Tensor:
        """R, ``(V, latent_dim)``: one vector for each word."""
        weight: Tensor = self.likelihood.net.weight  # type: ignore[assignment]
        return weight

    def nearest_words(
        self, words: Sequence[str], vocabulary: Sequence[str], num: int = 5
    ) -> dict[str, list[str]]:
        """The words whose vectors have the largest cosine with those of the given words.

        Args:
            words: of the vocabulary.
            vocabulary: V words, in the order of the counts.
            num: how many neighbours, themselves left out, >= 1; of a small vocabulary, all others.

        Raises:
            ValueError: the vocabulary has another length than V, or lacks a word; num is below 1.

        Example:
            >>> import torch
            >>> from ppvae import models
            >>> model = models.NVDM(num_words=3, latent_dim=2)
            >>> with torch.no_grad():
            ...     _ = model.word_vectors.copy_(torch.tensor([[1., 0.], [-1., 0.], [2., .5]]))
            >>> model.nearest_words(["cat"], ["cat", "tax", "dog"], num=1)
            {'cat': ['dog']}
        """
        self._check(vocabulary, num, words)
        index = [vocabulary.index(word) for word in words]
        with torch.no_grad():
            unit = nn.functional.normalize(self.word_vectors, dim=1)
            cosine = unit[index] @ unit.T
            cosine[torch.arange(len(index)), index] = -torch.inf
            nearest = cosine.topk(min(num, len(vocabulary) - 1)).indices.tolist()
        return {
            word: [vocabulary[i] for i in row] for word, row in zip(words, nearest, strict=True)
        }

    def topics(self, vocabulary: Sequence[str], num: int = 10) -> list[tuple[list[str], list[str]]]:
        """For each latent dimension, the words it makes most likely when it is large, and small.

        These are the largest and the smallest entries of a column of R.

        Args:
            vocabulary: V words, in the order of the counts.
            num: words on each side, >= 1; of a smaller vocabulary, all.

        Returns:
            ``latent_dim`` pairs (words at z_j -> +inf, words at z_j -> -inf).

        Raises:
            ValueError: the vocabulary has another length than V; num is below 1.

        Example:
            >>> import torch
            >>> from ppvae import models
            >>> model = models.NVDM(num_words=3, latent_dim=1)
            >>> with torch.no_grad():
            ...     _ = model.word_vectors.copy_(torch.tensor([[1.], [-1.], [2.]]))
            >>> model.topics(["cat", "tax", "dog"], num=1)
            [(['dog'], ['tax'])]
        """
        self._check(vocabulary, num)
        columns, num = self.word_vectors.detach().T, min(num, len(vocabulary))
        largest, smallest = (
            columns.topk(num, largest=largest).indices.tolist() for largest in (True, False)
        )
        return [
            ([vocabulary[i] for i in up], [vocabulary[i] for i in down])
            for up, down in zip(largest, smallest, strict=True)
        ]

    def _check(self, vocabulary: Sequence[str], num: int, words: Sequence[str] = ()) -> None:
        """Raise ``ValueError`` for another vocabulary, words that it lacks, or num < 1."""
        if num < 1:
            raise ValueError(f"num must be 1 or more words, got {num}")
        if len(vocabulary) != len(self.word_vectors):
            seen = (
                f"the vocabulary has {len(vocabulary)} words and the model {len(self.word_vectors)}"
            )
            raise ValueError(f"{seen}: give that of the counts it was trained on, in their order")
        for word in words:
            if word not in vocabulary:
                near = get_close_matches(word, vocabulary)
                hint = f"; near ones are {', '.join(near)}" if near else ""
                raise ValueError(f"the word {word!r} is not in the vocabulary{hint}")
