"""Networks: leading dimensions, shapes, batch norm, errors."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae import nets

N, K, C = 4, 3, 2


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _image_autoencoder(**options):
    shape = (2, 7, 5)
    encoder = nets.conv_encoder(6, shape, (3, 4), hidden=(8,), **options)
    decoder = nets.conv_decoder(6, shape, (4, 3), hidden=(8,), **options)
    return encoder, decoder


# One builder per exported constructor (checked below): a network and its input's event shape.
BUILDERS = {
    "mlp": lambda bn: (nets.mlp(6, 8, 8, 5, batch_norm=bn, dropout=0.1), (6,)),
    "residual": lambda bn: (nets.residual(6, 8, 5, batch_norm=bn, dropout=0.1), (6,)),
    "conv_encoder": lambda bn: (
        _image_autoencoder(batch_norm=bn, residual_blocks=1)[0],
        (2, 7, 5),
    ),
    "conv_decoder": lambda bn: (_image_autoencoder(batch_norm=bn, residual_blocks=1)[1], (6,)),
    "downsample": lambda bn: (
        nets.downsample(2, 4, (3, 4), batch_norm=bn, residual_blocks=1),
        (2, 7, 5),
    ),
    "upsample": lambda bn: (
        nets.upsample(2, 1, (4, 3), batch_norm=bn, residual_blocks=1),
        (2, 3, 2),
    ),
    "flat_batch": lambda bn: (
        nets.flat_batch(nn.Sequential(nn.Linear(6, N), nn.BatchNorm1d(N) if bn else nn.Tanh())),
        (6,),
    ),
}
all_nets = pytest.mark.parametrize("name", BUILDERS)
both = pytest.mark.parametrize("batch_norm", [False, True])


def test_every_exported_constructor_is_tested():
    exported = {name for name in nets.__all__ if name.islower()}
    exported -= {"concatenate", "nvae", "encoder_cell", "decoder_cell"}  # test_top_down.py
    assert exported == set(BUILDERS)


def _warm_up(net, event):
    """Gives batch norm statistics that differ from 0 and 1."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


@all_nets
@both
@pytest.mark.parametrize("leading", [(N,), (K, N), (C, K, N), (C, 1, N), ()])
def test_leading_dimensions_equal_a_loop(name, batch_norm, leading):
    net, event = BUILDERS[name](batch_norm)
    _warm_up(net, event)
    x = torch.randn(leading + event)
    y = net(x)
    rows = torch.stack([net(row[None])[0] for row in x.reshape((-1, *event))])
    assert y.shape == leading + rows.shape[1:]
    torch.testing.assert_close(y, rows.reshape(y.shape), rtol=1e-12, atol=1e-12)


@all_nets
@both
def test_every_parameter_gets_a_gradient(name, batch_norm):
    net, event = BUILDERS[name](batch_norm)
    (net(torch.randn((K, N, *event))) ** 3).sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@all_nets
def test_batch_of_zero_rows(name):
    net, event = BUILDERS[name](False)
    assert net(torch.randn((K, 0, *event))).shape[:2] == (K, 0)


def test_mlp_is_the_textbook_formula():
    net = nets.mlp(3, 4, 2, activation=nn.Tanh)
    (w0, b0), (w1, b1) = [(m.weight, m.bias) for m in net.modules() if isinstance(m, nn.Linear)]
    x = torch.randn(K, N, 3)
    torch.testing.assert_close(net(x), torch.tanh(x @ w0.T + b0) @ w1.T + b1)


def test_residual_block_adds_its_input():
    net = nets.residual(3, 4, 2, blocks=2).eval()
    plain = nets.residual(3, 4, 2, blocks=0).eval()
    plain.layers[0].load_state_dict(net.layers[0].state_dict())
    plain.layers[-1].load_state_dict(net.layers[-1].state_dict())
    x = torch.randn(N, 3)
    assert not torch.allclose(net(x), plain(x))
    for block in net.layers[1:3]:
        nn.init.zeros_(block[-1].weight)
        nn.init.zeros_(block[-1].bias)
    torch.testing.assert_close(net(x), plain(x))


# ---------------------------------------------------------------- batch norm and particles


def test_batch_norm_does_not_take_particles_or_rows_for_channels():
    """BatchNorm1d(width) on (K, N, width) with N == width runs, and normalises the wrong axis."""
    layers = nn.Sequential(nn.BatchNorm1d(N, affine=False))
    x = torch.randn(K, N, N) * torch.arange(1.0, N + 1) + torch.arange(N)
    wrong, right = layers(x), nets.flat_batch(layers)(x)
    assert not torch.allclose(wrong, right)
    torch.testing.assert_close(right.mean((0, 1)), torch.zeros(N), atol=1e-12, rtol=0)
    torch.testing.assert_close(right.var((0, 1), correction=0), torch.ones(N), atol=1e-3, rtol=0)
    net = nets.mlp(N, N, N, batch_norm=True)
    torch.testing.assert_close(net(x).reshape(-1, N), net(x.reshape(-1, N)))


@pytest.mark.parametrize("name", ["mlp", "conv_encoder", "conv_decoder"])
def test_batch_norm_trains_on_the_statistics_of_the_folded_batch(name):
    """Documented: K particles at once share statistics, a loop over K does not."""
    net, event = BUILDERS[name](True)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn((K, N, *event)) * torch.arange(1.0, K + 1).reshape(
        (K,) + (1,) * len(event + event[:1])
    )
    y = net(x)
    torch.testing.assert_close(y.flatten(0, 1), net(x.reshape((-1, *event))))
    assert not torch.allclose(y, torch.stack([net(row) for row in x]))


# ---------------------------------------------------------------- several inputs


def test_inputs_broadcast_over_leading_dimensions():
    z, y = torch.randn(C, K, N, 3), torch.randn(N, 2)
    joined = nets.concatenate(z, y)
    assert joined.shape == (C, K, N, 5)
    torch.testing.assert_close(joined[1, 2], torch.cat([z[1, 2], y], -1))
    net = nets.mlp(5, 8, 4)
    torch.testing.assert_close(net(z, y), net(joined))


def test_concatenate_names_shapes_that_do_not_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 4, 2\), \(5, 2\).*do not broadcast"):
        nets.concatenate(torch.zeros(3, 4, 2), torch.zeros(5, 2))


def test_flat_batch_hands_inputs_over_separately_and_restores_tuples():
    class Two(nn.Module):
        def forward(self, image, y):
            assert (image.dim(), y.dim()) == (4, 2)
            return image * y[:, :1, None, None], y

    image, y = torch.randn(N, 1, 2, 2), torch.randn(K, N, 5)
    a, b = nets.flat_batch(Two(), event_dim=(3, 1))(image, y)
    torch.testing.assert_close(a, image * y[..., :1, None, None])
    torch.testing.assert_close(b, y)


def test_conv_encoder_context_meets_the_features_of_one_pass():
    net = nets.conv_encoder(3, (1, 8, 8), (4,), hidden=(6,), context_dim=2).eval()
    calls = []
    net.features.register_forward_hook(lambda *args: calls.append(args[2].shape))
    image, context = torch.randn(N, 1, 8, 8), torch.randn(K, N, 2)
    y = net(image, context)
    assert calls == [(N, 64)]
    torch.testing.assert_close(y, torch.stack([net(image, c) for c in context]))
    with pytest.raises(ValueError, match="width 66"):
        net(image)


# ---------------------------------------------------------------- image shapes


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (2, 28, 20), (3, 9, 7), (1, 1, 3)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_conv_shapes_are_exact(shape, layers):
    encoder = nets.conv_encoder(5, shape, (4,) * layers, hidden=())
    decoder = nets.conv_decoder(5, shape, (4,) * layers, hidden=())
    x = torch.randn(K, N, *shape, requires_grad=True)
    y = decoder(encoder(x))
    assert y.shape == x.shape
    y.square().sum().backward()
    assert (x.grad != 0).any(0).any(0).all()  # every pixel is read
    flat = y.detach().reshape(-1, y[0, 0].numel())
    assert (flat.std(0) > 0).all()  # every pixel is written


@pytest.mark.parametrize(
    ("seen", "cure"),
    [((N, 28, 20, 1), "movedim"), ((N, 560), "unflatten"), ((N, 28, 20), "unsqueeze")],
)
def test_conv_encoder_names_wrong_shapes(seen, cure):
    net = nets.conv_encoder(5, (1, 28, 20))
    with pytest.raises(ValueError, match=cure) as error:
        net(torch.zeros(seen))
    assert str(seen) in str(error.value)
    assert "(..., 1, 28, 20)" in str(error.value)


def test_width_errors_name_shapes():
    with pytest.raises(ValueError, match=r"width 5.*\(4, 3\), \(4, 1\).*width 4"):
        nets.mlp(5, 2)(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="width 6"):
        nets.conv_decoder(6)(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="needs two sizes, input and output"):
        nets.mlp(5)
    with pytest.raises(ValueError, match="channel"):
        nets.conv_decoder(5, channels=())


# ---------------------------------------------------------------- one-hot labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_one_hot(dtype):
    y = torch.tensor([[0, 2, 1], [1, 1, 0]])
    onehot = nets.OneHot(3)(y.to(dtype))
    assert onehot.dtype == torch.float64
    torch.testing.assert_close(onehot, nn.functional.one_hot(y, 3).double())


def test_one_hot_keeps_large_labels_apart_in_low_precision():
    module = nets.OneHot(1000).bfloat16()
    assert module(torch.tensor([257])).argmax() == 257
    assert module(torch.tensor([257])).sum() == 1


def test_one_hot_traces():
    module, y = nets.OneHot(3), torch.tensor([0, 2, 1])
    buffers = dict(module.named_buffers())

    def call(buffers, y):
        return torch.func.functional_call(module, buffers, (y,))

    graph = make_fx(call, tracing_mode="symbolic")(buffers, y)
    other = torch.tensor([1, 1, 0, 2, 2])
    torch.testing.assert_close(graph(buffers, other), nn.functional.one_hot(other, 3).double())


@pytest.mark.parametrize(
    ("y", "cure"),
    [
        (torch.tensor([0, 3]), "num_classes=4"),
        (torch.tensor([-1, 0]), "renumber"),
        (torch.tensor([[0], [1]]), "squeeze"),
        (torch.tensor([0.0, 1.0]), "long"),
    ],
)
def test_one_hot_check(y, cure):
    with pytest.raises(ValueError, match=cure):
        nets.OneHot(3).check(y)


def test_one_hot_forward_refuses_floats():
    with pytest.raises(ValueError, match="one-hot already"):
        nets.OneHot(3)(torch.eye(3))


def test_layers_by_their_formulas():
    """Of an MLP and a residual network: every matrix, bias and activation by hand."""
    x = torch.randn(7, 3)
    net = nets.mlp(3, 5, 4, 2, activation=nn.Tanh)
    (w0, b0), (w1, b1), (w2, b2) = [(m.weight, m.bias) for m in net.modules() if hasattr(m, "bias")]
    h = torch.tanh(torch.tanh(x @ w0.T + b0) @ w1.T + b1)
    torch.testing.assert_close(net(x), h @ w2.T + b2)
    net = nets.residual(3, 5, 2, blocks=2, activation=nn.Tanh)
    layers = [(m.weight, m.bias) for m in net.modules() if hasattr(m, "bias")]
    (w, b), *inner, (w_out, b_out) = layers
    h = x @ w.T + b
    for (wa, ba), (wb, bb) in zip(inner[::2], inner[1::2], strict=True):
        h = h + torch.tanh(torch.tanh(h) @ wa.T + ba) @ wb.T + bb
    torch.testing.assert_close(net(x), torch.tanh(h) @ w_out.T + b_out)


@pytest.mark.parametrize("make", [nets.mlp, nets.residual])
def test_units_are_normalised_before_they_are_activated(make):
    net = make(3, 5, 2, batch_norm=True, dropout=0.1)
    kinds = [type(m) for m in net.modules() if not list(m.children())]
    for i, kind in enumerate(kinds):
        if kind is nn.ReLU:
            assert kinds[i - 1] is nn.BatchNorm1d and kinds[i + 1] is nn.Dropout
    assert nn.ReLU in kinds
