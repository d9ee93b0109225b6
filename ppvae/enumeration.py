"""Latents that are summed out: sums and means over them, one dim of a term at a time.

Pyro gives every enumerated latent a dim, and under ``pyro.markov`` gives a dim to several in turn.
:mod:`ppvae.terms` has told them apart by letters, so nothing here counts dims.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

from ppvae.terms import DATAPOINT, PARTICLE, Term

_KEPT = frozenset({PARTICLE, DATAPOINT})
Packed = Any  # a tensor as Pyro packs it, whose ``_pyro_dims`` are the letters of its dims


class _LogRing(LogRing):
    """Pyro's algebra of plates, with sums by ``logsumexp``.

    Its own sums multiply exponentials that are shifted one by one: where two terms disagree by
    more than 88 nats, all classes underflow in float32.
    """

    def sumproduct(self, terms: Sequence[Packed], dims: Collection[str]) -> Packed:
        left = list(terms)
        pending = set(dims)
        while pending:
            dim = min(pending, key=lambda d: (_joint_size(left, d), d))
            pending.remove(dim)
            product = _add([term for term in left if dim in term._pyro_dims])
            summed = product.logsumexp(product._pyro_dims.index(dim))
            summed._pyro_dims = product._pyro_dims.replace(dim, "")
            left = [term for term in left if dim not in term._pyro_dims] + [summed]
        return _add(left)


def _joint_size(terms: Sequence[Packed], dim: str) -> int:
    """How many numbers the terms with a dim have together."""
    sizes: dict[str, int] = {}
    for term in terms:
        if dim in term._pyro_dims:
            sizes |= dict(zip(term._pyro_dims, term.shape, strict=True))
    return torch.Size(sizes.values()).numel()


def _add(terms: Sequence[Packed]) -> Packed:
    """The sum of packed terms, packed."""
    if len(terms) == 1:
        return terms[0]
    first, *others = packed.broadcast_all(*terms)
    added: Packed = sum_of([first, *others])
    added._pyro_dims = first._pyro_dims
    return added


def sum_out(terms: Iterable[Term], latents: Collection[str] | None = None) -> list[Term]:
    r"""log of the sum, over some latents, of the product of terms.

    .. math:: \log \sum_c \prod_t e^{t(c)}

    Terms that share no latent stay apart, and so do plates: a latent inside a plate is summed out
    for each of its elements, before these are multiplied.

    Args:
        terms: log-densities.
        latents: letters of the latents to sum out; None: all.

    Returns:
        Terms without those letters, whose sum it is.

    Raises:
        ValueError: the latents lie in plates that cross each other.
    """
    terms = list(terms)
    if latents is None:
        latents = set().union(*(t.letters for t in terms)) - set().union(*(t.plates for t in terms))
    done = [term for term in terms if not set(term.letters) & set(latents)]
    tree: OrderedDict[frozenset[str], list[Packed]] = OrderedDict()
    for term in terms:
        if set(term.letters) & set(latents):
            tree.setdefault(_KEPT | term.plates, []).append(_pack(term))
    if not tree:
        return done
    present = {dim for packs in tree.values() for pack in packs for dim in pack._pyro_dims}
    try:
        summed = contract_tensor_tree(tree, present & set(latents), ring=_LogRing())
    except NotImplementedError as error:
        raise ValueError(
            "latents that are summed out lie in plates that cross each other, which takes "
            f"exponentially many terms ({error}); make one of the plates a loop, or draw a latent"
        ) from error
    return done + [
        _unpack(pack, plates - _KEPT) for plates, packs in summed.items() for pack in packs
    ]


def total(terms: Iterable[Term]) -> Tensor:
    """The sum of terms without latents, inner plates summed too: ``(K or 1, N or 1)``."""
    return sum_of(
        [term.values.flatten(0, -3).sum(0) if term.letters else term.values for term in terms]
    )


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Their sum; ``sum()`` would begin with 0 + a tensor."""
    result = values[0]
    for other in values[1:]:
        result = result + other
    return result


def mean(term: Term, probabilities: Mapping[str, Term]) -> Tensor:
    r"""The mean of a term over latents of the guide, ``(K or 1, N or 1)``.

    .. math:: \sum_c q(c)\, t(c),\qquad q(c) = \sum_{\text{others}} \prod_j q_j

    Where q is 0 the term counts as 0, whatever its value.

    Args:
        term: without latents other than the guide's.
        probabilities: by letter, log q of each enumerated latent of the guide, unmasked.
    """
    if not set(term.letters) & probabilities.keys():
        return total([term])
    needed: dict[str, Term] = {}
    pending = [letter for letter in term.letters if letter in probabilities]
    while pending:  # what the latents of the term depend on, and so on
        letter = pending.pop()
        if letter not in needed:
            needed[letter] = probabilities[letter]
            pending += [other for other in needed[letter].letters if other in probabilities]
    factors = [_pack(factor) for factor in needed.values()]
    # no product over plates: each element of one has a mean of its own
    log_q = _LogRing().sumproduct(factors, needed.keys() - set(term.letters))
    log_q, values = packed.broadcast_all(log_q, _pack(term))
    q = log_q.exp()
    weighted: Packed = q * torch.where(q > 0, values, values.new_zeros(()))
    weighted._pyro_dims = values._pyro_dims
    return total([_unpack(weighted, term.plates)])


def conditional(terms: Iterable[Term], latents: Collection[str], kept: str) -> Tensor:
    r"""The probabilities of some latents, given what is drawn and observed.

    .. math:: p(c) = \frac{\sum_{\text{others}} \prod_t e^{t(c)}}{\sum_{c'} \sum_{\text{others}}
              \prod_t e^{t(c')}}

    Args:
        terms: log-densities.
        latents: letters of all latents that are summed out; none of those kept is inside a plate.
        kept: letters of those that are asked for.

    Returns:
        ``(K or 1, N or 1, *values of those kept)``; NaN where all are impossible.
    """
    about = [t for t in sum_out(terms, set(latents) - set(kept)) if set(t.letters) & set(kept)]
    logits = _add([_product(_pack(t), t.plates) for t in about])
    found = _unpack(logits, frozenset())
    order = [found.letters.index(letter) for letter in kept]
    first = found.values.permute(-2, -1, *order)
    return first.flatten(2).softmax(2).reshape(first.shape)


def draw(terms: Iterable[Term], latents: Collection[str]) -> dict[str, Term]:
    r"""A joint draw of latents from their exact conditional, :math:`\propto \prod_t e^{t(c)}`.

    Returns:
        By letter, which of its values each latent has: ``(*plates, K or 1, N or 1)``; a latent on
        which nothing depends has none.
    """
    terms = list(terms)
    packs = [_pack(term) for term in terms]
    plates = [term.plates for term in terms]
    drawn: dict[str, Term] = {}
    inside = {
        letter: frozenset.intersection(*found)
        for letter in latents
        if (
            found := [p for p, pack in zip(plates, packs, strict=True) if letter in pack._pyro_dims]
        )
    }
    for letter in sorted(inside, key=lambda known: (len(inside[known]), known)):  # outermost first
        left = [_unpack(pack, p) for pack, p in zip(packs, plates, strict=True)]
        conditional = sum_out(left, inside.keys() - drawn.keys() - {letter})
        about = [term for term in conditional if letter in term.letters]
        logits = _add([_product(_pack(term), term.plates - inside[letter]) for term in about])
        dims = logits._pyro_dims
        choice: Packed = torch.distributions.Categorical(
            logits=logits.movedim(dims.index(letter), -1)
        ).sample()
        choice._pyro_dims = dims.replace(letter, "")
        drawn[letter] = _unpack(choice, inside[letter])
        packs = [
            packed.gather(pack, choice, letter) if letter in pack._pyro_dims else pack
            for pack in packs
        ]
    return drawn


def groups(terms: Mapping[str, Term], latents: Collection[str]) -> list[list[str]]:
    """Names of the terms that hang together by some latents, a list for each group."""
    found: list[tuple[set[str], list[str]]] = []
    for name, term in terms.items():
        letters, names = set(term.letters) & set(latents), [name]
        if not letters:
            continue
        apart = []
        for other_letters, other_names in found:
            if letters & other_letters:
                letters, names = letters | other_letters, other_names + names
            else:
                apart.append((other_letters, other_names))
        found = [*apart, (letters, names)]
    return [names for _, names in found]


def _pack(term: Term) -> Packed:
    """A term as Pyro packs it: a letter for each dim larger than 1."""
    letters = term.letters + PARTICLE + DATAPOINT
    kept = [(d, size) for d, size in zip(letters, term.values.shape, strict=True) if size > 1]
    pack: Packed = term.values.reshape([size for _, size in kept])
    pack._pyro_dims = "".join(letter for letter, _ in kept)
    return pack


def _product(pack: Packed, plates: frozenset[str]) -> Packed:
    """The product over plates of what a packed log-density is of."""
    for plate in plates & set(pack._pyro_dims):
        dims = pack._pyro_dims
        pack = pack.sum(dims.index(plate))
        pack._pyro_dims = dims.replace(plate, "")
    return pack


def _unpack(pack: Packed, plates: frozenset[str]) -> Term:
    """A term of what Pyro packed."""
    dims: str = pack._pyro_dims
    letters = "".join(dim for dim in dims if dim not in _KEPT)
    order = [dim for dim in letters + PARTICLE + DATAPOINT if dim in dims]
    values = pack.permute([dims.index(dim) for dim in order])
    sizes = dict(zip(order, values.shape, strict=True))
    shape = [sizes.get(dim, 1) for dim in letters + PARTICLE + DATAPOINT]
    return Term(values.reshape(shape), letters, plates)
