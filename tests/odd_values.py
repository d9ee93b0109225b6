"""What is odd, by the kind of an argument: its name and how it is made."""

import enum
import math

import numpy as np
import pandas
import pyro
import torch
from torch import nn

from ppvae import conditionals, data, guides, models, nets

X = torch.bernoulli(torch.full((12, 4), 0.5), generator=torch.Generator().manual_seed(1))


class Colour(enum.Enum):
    RED = 1


class Mine(torch.Tensor):
    pass


def pair():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    return {"model": model, "guide": guides.Normal(nets.mlp(4, 8, 4))}


def inference(x):
    with torch.inference_mode():
        return x.clone()


THINGS = {
    "None": lambda: None,
    "a word": lambda: "three",
    "an empty word": lambda: "",
    "bytes": lambda: b"3",
    "a list": lambda: [3],
    "an empty list": lambda: [],
    "a dictionary": lambda: {"a": 3},
    "an object": object,
    "a class": lambda: int,
    "an enum": lambda: Colour.RED,
    "a complex number": lambda: 2 + 1j,
    "a function": lambda: lambda *args: None,
    "a generator": lambda: (i for i in range(3)),
    "two numbers": lambda: np.array([3, 4]),
    "a tensor of two": lambda: torch.ones(2),
    "an empty tensor": lambda: torch.ones(0),
    "a network": lambda: nn.Linear(2, 2),
    "nan": lambda: math.nan,
    "True": lambda: True,
    "a missing value": lambda: pandas.NA,
    "a time": lambda: np.datetime64("2020-01-01"),
}
COUNTS = {
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "2 ** 63": lambda: 2**63,
    "2 ** 70": lambda: 2**70,
    "- 2 ** 63": lambda: -(2**63),
    "a half": lambda: 2.5,
    "a whole float": lambda: 3.0,
    "infinity": lambda: math.inf,
    "numpy's three": lambda: np.int64(3),
    "a tensor of three": lambda: torch.tensor(3),
    "an unsigned three": lambda: np.uint8(3),
}
NUMBERS = {
    "minus infinity": lambda: -math.inf,
    "infinity": lambda: math.inf,
    "minus one": lambda: -1.0,
    "zero": lambda: 0.0,
    "a large number": lambda: 1e308,
    "a whole number of 70 bits": lambda: 2**70,
    "numpy's half": lambda: np.float32(0.5),
    "a tensor of a half": lambda: torch.tensor(0.5),
}
ROWS = {
    "an array": lambda: X.numpy(),
    "lists": lambda: X.tolist(),
    "a frame": lambda: pandas.DataFrame(X.numpy()),
    "sparse": lambda: X.to_sparse(),
    "sparse rows": lambda: X.to_sparse_csr(),
    "meta": lambda: X.to("meta"),
    "quantised": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
    "complex": lambda: X.to(torch.complex64),
    "long": lambda: X.long(),
    "bool": lambda: X.bool(),
    "half": lambda: X.half(),
    "double": lambda: X.double(),
    "with a gradient": lambda: X.clone().requires_grad_(),
    "a function of one with a gradient": lambda: X.clone().requires_grad_() * 1.0,
    "in inference mode": lambda: inference(X),
    "a parameter": lambda: nn.Parameter(X.clone()),
    "of no rows": lambda: X[:0],
    "of no columns": lambda: X[:, :0],
    "one row": lambda: X[:1],
    "a vector": lambda: X[:, 0],
    "0-d": lambda: X[0, 0],
    "images": lambda: X.reshape(12, 1, 2, 2),
    "too wide": lambda: torch.cat([X, X], 1),
    "NaN": lambda: X * math.nan,
    "infinite": lambda: X / 0,
    "negative": lambda: -X - 1,
    "expanded": lambda: X[:1].expand(12, 4),
    "transposed": lambda: X.T.contiguous().T,
    "a subclass": lambda: X.as_subclass(Mine),
    "masked": lambda: np.ma.masked_equal(X.numpy(), 1.0),
    "words": lambda: np.array([["a"] * 4] * 12),
    "nested": lambda: torch.nested.nested_tensor([X[0], X[1]]),
    "a tuple": lambda: (X, X),
    "a loader": lambda: torch.utils.data.DataLoader(X, 4),
    "a data set": lambda: torch.utils.data.TensorDataset(X),
}
PROGRAMS = {
    "a class of programs": lambda: models.VAE,
    "a function of nothing": lambda: lambda: None,
    "a function without sites": lambda: lambda x: x,
    "a distribution": lambda: pyro.distributions.Normal(0.0, 1.0),
    "another width": lambda: models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 5)), latent_dim=2),
    "a conditional": lambda: conditionals.Bernoulli(nets.mlp(2, 8, 4)),
    "a double one": lambda: pair()["model"].double(),
    "on meta": lambda: pair()["model"].to("meta"),
}
FRAMES = {
    "an array": lambda: X.numpy(),
    "of no rows": lambda: pandas.DataFrame({"a": []}),
    "of no columns": lambda: pandas.DataFrame(index=range(12)),
    "a column twice": lambda: pandas.DataFrame(X[:, :2].numpy(), columns=["a", "a"]),
    "numbered columns": lambda: pandas.DataFrame(X.numpy()),
    "two levels of columns": lambda: pandas.DataFrame({("a", "b"): range(12)}),
    "NaN": lambda: pandas.DataFrame({"a": [math.nan] * 12}),
    "infinite": lambda: pandas.DataFrame({"a": [math.inf, 1.0] * 6}),
    "objects": lambda: pandas.DataFrame({"a": [object()] * 12}),
    "lists": lambda: pandas.DataFrame({"a": [[1], [2]] * 6}),
    "words and numbers": lambda: pandas.DataFrame({"a": ["a", 1] * 6}),
    "dates": lambda: pandas.DataFrame({"a": pandas.date_range("2020", periods=12)}),
    "complex": lambda: pandas.DataFrame({"a": [1j, 2j] * 6}),
    "nullable": lambda: pandas.DataFrame({"a": pandas.array([1, None] * 6, "Int64")}),
    "a series": lambda: pandas.Series([0.5, 1.5] * 6),
    "words": lambda: pandas.DataFrame({"a": ["b", "c"] * 6}),
}
SPLITS = {
    "a tensor": lambda: X,
    "a data set": lambda: data.from_arrays(X),
    "without labels": lambda: data.Split(X),
    "labels of two columns": lambda: data.Split(X, torch.zeros(12, 2).long()),
    "labels that are floats": lambda: data.Split(X, torch.zeros(12)),
    "of no rows": lambda: data.Split(X[:0], torch.zeros(0).long()),
    "negative labels": lambda: data.Split(X, torch.full((12,), -1)),
}
LABELS = {
    "a list": lambda: [0, 1] * 6,
    "numpy's": lambda: np.arange(12) % 2,
    "floats": lambda: torch.zeros(12),
    "bool": lambda: torch.zeros(12).bool(),
    "too few": lambda: torch.zeros(11).long(),
    "minus two": lambda: torch.full((12,), -2),
    "minus one": lambda: torch.full((12,), -1),
    "too large": lambda: torch.full((12,), 9),
    "2 ** 62": lambda: torch.full((12,), 2**62),
    "of two dims": lambda: torch.zeros(12, 1).long(),
    "bytes": lambda: torch.zeros(12).byte(),
    "meta": lambda: torch.zeros(12).long().to("meta"),
    "sparse": lambda: torch.zeros(12).long().to_sparse(),
    "words": lambda: np.array(["a", "b"] * 6),
}
MASKS = {
    "floats": lambda: X,
    "numpy's": lambda: X.numpy() > 0,
    "of the rows": lambda: X[:, 0].bool(),
    "too few": lambda: X[:3].bool(),
    "too wide": lambda: torch.cat([X, X], 1).bool(),
    "of a row": lambda: X[:1].bool(),
    "nowhere": lambda: torch.zeros(12, 4).bool(),
    "everywhere": lambda: torch.ones(12, 4).bool(),
    "meta": lambda: X.bool().to("meta"),
    "sparse": lambda: X.bool().to_sparse(),
}
SIZES = {
    "minus one": lambda: -1,
    "a negative size": lambda: (4, -1),
    "of zero": lambda: (4, 0),
    "words": lambda: ("a", 2),
    "halves": lambda: (2.5, 4),
    "numpy's": lambda: np.array([4, 4]),
    "of numpy's": lambda: (np.int64(4),),
    "of None": lambda: (4, None),
    "huge": lambda: (2**62, 2),
    "torch's": lambda: torch.Size([4]),
}
KINDS = {
    "frame": THINGS | FRAMES,
    "split": THINGS | SPLITS,
    "labels": THINGS | LABELS,
    "mask": THINGS | MASKS,
    "count": THINGS | COUNTS,
    "number": THINGS | NUMBERS,
    "sizes": THINGS | SIZES,
    "seed": THINGS | COUNTS,
    "rows": THINGS | ROWS,
    "program": THINGS | PROGRAMS,
    "thing": THINGS | {"minus one": lambda: -1, "infinity": lambda: math.inf},
}
