"""Alternating updates: the parameters of one program at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.train.optimizer import check_optim, require_optimizer


@takes_numbers(steps=1)
def alternate(
    optim: Callable[..., torch.optim.Optimizer],
    *turns: nn.Module | Iterable[Tensor],
    steps: int,
) -> torch.optim.Optimizer:
    """An optimiser that updates one part at a time: ``steps`` steps each, in turn, for ever.

    For ``ppvae.SVI``, whatever then calls its steps. NVDM is trained so, with ten passes over the
    data for the decoder and then ten for the encoder; for a data set of N rows that is
    ``steps=10 * math.ceil(N / batch_size)``. A part that rests keeps its moments and its own count
    of steps. Whose turn it is is in ``state_dict``, so a resumed run goes on within the turn.

    The loss and the gradient of both parts are still computed at each step, and ``clip_norm``
    counts both. On CUDA the steps are compiled but not captured.

    Args:
        optim: a ``torch.optim`` class or a factory ``groups -> optimiser``, such as
            ``functools.partial(torch.optim.Adam, lr=5e-5)``.
        *turns: two or more parts, in their order: programs, or lists of parameters.
        steps: of each turn, >= 1.

    Raises:
        ValueError: fewer than two parts, one without parameters, a parameter in two parts, or
            ``steps`` below 1.

    Example:
        >>> import functools, torch, ppvae
        >>> from ppvae import guides, models, nets
        >>> model, guide = models.NVDM(20, 2), guides.Normal(nets.mlp(20, 8, 2 * 2))
        >>> adam = functools.partial(torch.optim.Adam, lr=1e-2)
        >>> svi = ppvae.SVI(model, guide, ppvae.alternate(adam, model, guide, steps=3))
        >>> counts = torch.poisson(torch.ones(10, 20))
        >>> words, codes = model.word_vectors.clone(), guide.outputs(counts)
        >>> for _ in range(3):
        ...     _ = svi.step(counts)
        >>> torch.equal(model.word_vectors, words), torch.equal(guide.outputs(counts), codes)
        (False, True)
    """
    check_optim(optim)
    if len(turns) < 2:
        raise ValueError(f"turns: give two or more parts to alternate between, got {len(turns)}")
    groups: list[dict[str, Any]] = []
    owner: dict[int, int] = {}
    for turn, part in enumerate(turns):
        parameters = part.parameters() if isinstance(part, nn.Module) else part
        own = [p for p in parameters if p.requires_grad]
        if not own:
            raise ValueError(f"part {turn} has no trainable parameters: leave it out")
        for p in own:
            if owner.setdefault(id(p), turn) != turn:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is in parts {owner[id(p)]} and {turn}: "
                    "give lists of parameters, each in one part"
                )
        groups.append({"params": own, "taken": 0})
    optimizer = require_optimizer(optim(groups))
    if any(group.get("fused") for group in optimizer.param_groups):
        raise ValueError("a fused optimiser cannot be asked whose turn it is: leave out fused=True")

    def rest(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        taken = optimizer.param_groups[0]["taken"]
        for turn, group in enumerate(optimizer.param_groups):
            group["taken"] = taken + 1
            if turn != taken // steps % len(groups):
                for p in group["params"]:
                    p.grad = None  # which every torch optimiser passes over

    optimizer.register_step_pre_hook(rest)
    return optimizer
