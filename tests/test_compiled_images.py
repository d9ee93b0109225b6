"""What a graph computes in the place of batch norm and of a depthwise kernel's gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import ppvae
from ppvae import conditionals, guides, models, nets
from ppvae.compile import images
from ppvae.compile.graph import Graph
from ppvae.compile.passes import DECOMPOSITIONS

aten = torch.ops.aten
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2), (3, 2, 2, 3, 2)])
@pytest.mark.parametrize(("affine", "running"), [*itertools.product((True, False), repeat=2)])
def test_batch_norm_is_torchs(shape, affine, running):
    x, g = 3 + 2 * torch.randn(2, *shape)
    weight, bias = torch.randn(2, shape[1]) if affine else (None, None)
    kept = [(torch.zeros(shape[1]), torch.ones(shape[1])) if running else (None, None)] * 2
    kept = [tuple(t if t is None else t.clone() for t in pair) for pair in kept]
    expected = aten.native_batch_norm(x, weight, bias, *kept[0], True, 0.05, 1e-5)
    found = images._batch_norm(x, weight, bias, *kept[1], True, 0.05, 1e-5)
    torch.testing.assert_close(found, expected)
    if running:
        torch.testing.assert_close(kept[1], kept[0])
    rest = (g, x, weight, *kept[0], *expected[1:], True, 1e-5, [True, affine, affine])
    backward = images._batch_norm_backward(*rest)
    for one, other in zip(backward, aten.native_batch_norm_backward(*rest), strict=True):
        torch.testing.assert_close(one, other) if one is not None else None
    assert (backward[1] is None) == (not affine)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kernel", [(5, 5), (3, 1), (1, 4)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_depthwise_kernels_gradient_is_torchs(kernel, padding, layout):
    C = 3
    x = torch.randn(4, C, 7, 6).contiguous(memory_format=layout)
    w = torch.randn(C, 1, *kernel)
    g = torch.randn_like(F.conv2d(x, w, padding=padding, groups=C))
    rest = (g, x, w, [C], [1, 1], list(padding), [1, 1], False, [0, 0], C)
    for wanted in ([True, True, True], [False, True, False]):
        found = images._convolution_backward(*rest, wanted)
        expected = aten.convolution_backward(*rest, wanted)
        for one, other, asked in zip(found, expected, wanted, strict=True):
            assert (one is None) == (not asked)
            torch.testing.assert_close(one, other) if asked else None
    assert images._convolution_backward(*rest, [True, False, True]) is NotImplemented


def test_what_is_left_to_torch():
    x = torch.randn(4, 6, 5, 5)
    norm = (None, None, torch.zeros(6), torch.ones(6))
    for half in (x.bfloat16(), x.half()):
        assert images._batch_norm(half, *norm, True, 0.1, 1e-5) is NotImplemented
    assert images._batch_norm(x, *norm, False, 0.1, 1e-5) is NotImplemented
    ones, twos = [1, 1], [2, 2]
    for groups, stride, dilation in ((2, ones, ones), (6, twos, ones), (6, ones, twos)):
        w = torch.randn(6, 6 // groups, 3, 3)
        g = torch.randn_like(F.conv2d(x, w, None, stride, 0, dilation, groups))
        rest = (g, x, w, [6], stride, [0, 0], dilation, False, [0, 0], groups, [True] * 3)
        assert images._convolution_backward(*rest) is NotImplemented


def block(channels=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 1),
        nn.BatchNorm2d(channels, momentum=0.05),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
        nn.BatchNorm2d(channels, affine=False),
    )


def function(module):
    """Output and gradients, as a function of parameters, buffers and x."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def run(*tensors):
        given = dict(zip([*parameters, *buffers], tensors, strict=False))
        with torch.enable_grad():
            leaves = {n: given[n].detach().requires_grad_() for n in parameters}
            y = torch.func.functional_call(module, {**given, **leaves}, (tensors[-1],))
            return [y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    return run, [*parameters.values(), *buffers.values()]


def test_a_traced_graph_has_the_sums():
    run, tensors = function(block())
    trace = make_fx(run, decomposition_table=DECOMPOSITIONS, tracing_mode="fake")
    traced = trace(*(t.detach() for t in tensors), torch.randn(4, 1, 6, 6))
    targets = [node.target for node in traced.graph.nodes]
    assert not {aten.native_batch_norm.default, aten.native_batch_norm_backward.default} & {
        *targets
    }
    wanted = [
        n.args[-1] for n in traced.graph.nodes if n.target is aten.convolution_backward.default
    ]
    assert sorted(wanted) == [[False, True, True], [True, False, False]]  # of the first; dx


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_of_both_computes_what_torch_does(layout):
    module = block().to(memory_format=layout)
    run, tensors = function(module)
    tensors, x = [t.detach() for t in tensors], torch.randn(4, 1, 9, 6)
    eager, compiled = ([t.clone() for t in tensors] for _ in range(2))
    graph = Graph(run, [*tensors, x])
    for _ in range(2):  # running statistics move on
        for one, other in zip(graph(*compiled, x), run(*eager, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_step_of_cells_is_the_eager_one(traced):
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        parts = nets.nvae((1, 8, 8), groups=(1, 1), channels=4, blocks=1)
        model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
        guide = guides.TopDown(model, parts.encoder, parts.heads)
        x = torch.bernoulli(torch.full((5, 1, 8, 8), 0.4))
        svi = ppvae.SVI(model, guide, compile=compile)
        losses.append([svi.step(x) for _ in range(3)])
    assert len(traced) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
