"""What all evaluators share: the same data are refused by all, in the same words, before work."""

import math

import pytest
import torch

import ppvae
from oracles import LinearGuide, LinearModel
from ppvae import diagnostics, elbo
from ppvae.diagnostics.rows import check_data

MODEL = LinearModel(2, 3)
GUIDE = LinearGuide(MODEL)
X = torch.zeros(4, 3)


def predictive(model, guide, *args):
    return diagnostics.predictive_check(
        model, guide, *args, statistics={"sum": lambda x: x.sum(-1)}
    )


EVALUATORS = {
    "ais": diagnostics.ais,
    "bdmc": diagnostics.bdmc,
    "compare": lambda model, guide, *args: ppvae.compare(model, guide, args, [elbo.ELBO()]),
    "diagnose": ppvae.diagnose,
    "gaps": diagnostics.gaps,
    "hmc": diagnostics.hmc,
    "log_evidence": diagnostics.log_evidence,
    "metropolis": diagnostics.metropolis,
    "nuts": lambda model, guide, *args: diagnostics.nuts(model, *args),
    "predictive_check": predictive,
    "quadrature": diagnostics.quadrature,
    "sbc": diagnostics.sbc,
    "to_arviz": diagnostics.to_arviz,
}
WRONG = {
    "none": ((), "^no data: pass tensors"),
    "array": ((X.numpy(),), "^argument 'x' must be a tensor, got ndarray"),
    "array beside": ((X, X.numpy()), "^argument 'size' must be a tensor, got ndarray"),
    "scalar": ((torch.tensor(1.0),), "^argument 'x' is a single number"),
    "empty": ((X[:0],), "^argument 'x' is empty"),
    "nan": ((torch.where(X == 0, math.nan, X),), "^argument 'x' has 12 NaN or infinite values"),
    "lengths": ((X, X[:2]), "^the arguments differ in length"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_refuses_the_same_data(name, wrong):
    args, message = WRONG[wrong]
    stream = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        EVALUATORS[name](MODEL, GUIDE, *args)
    assert torch.equal(stream, torch.get_rng_state())


def test_what_is_no_data_is_left_alone():
    assert check_data(MODEL, (None, X, 3, [1, 2], X[:, 0])) == 4
