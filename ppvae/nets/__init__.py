r"""Networks: tensor in, tensor out, for any number of leading dimensions.

Particles ``K``, enumeration ``C`` and plates only ever add *leading* dimensions. Every network here
folds them into one batch dimension before a layer sees them, and restores them afterwards, so an
input ``(N, D)``, ``(K, N, D)`` or ``(C, K, N, D)`` gives the same rows. Put :func:`flat_batch`
around your own module to get the same.

Several inputs are broadcast over their leading dimensions and concatenated, so a decoder of
``z (K, N, Z)`` and a condition ``y (N, Y)`` is called as ``net(z, y)``.

**Batch norm** in training mode takes its statistics over the *folded* batch: over all ``K * N``
rows when there are ``K`` particles. So ``K`` particles at once differ from a loop over ``K``
(each with its own statistics). In ``eval`` mode the two agree.
"""

from ppvae.nets.causal import CausalConv, CausalGRU, Unigram
from ppvae.nets.codes import FSQ, Codebook, CodeTable
from ppvae.nets.columns import Columns
from ppvae.nets.conv import (
    ConvDecoder,
    ConvEncoder,
    MergeMaps,
    PositionEmbedding,
    conv_decoder,
    conv_encoder,
    downsample,
    upsample,
)
from ppvae.nets.dense import (
    MLP,
    Constant,
    FlatBatch,
    OneHot,
    concatenate,
    flat_batch,
    mlp,
    residual,
)
from ppvae.nets.missing import Masked, SelfMasking
from ppvae.nets.nvae_cells import (
    NVAE,
    Cell,
    Combine,
    SqueezeExcitation,
    Tower,
    decoder_cell,
    encoder_cell,
    nvae,
)
from ppvae.nets.spectral import Spectral
from ppvae.nets.top_down import Group, Joined, TopDown, Zeros

__all__ = [
    "FSQ",
    "MLP",
    "NVAE",
    "CausalConv",
    "CausalGRU",
    "Cell",
    "CodeTable",
    "Codebook",
    "Columns",
    "Combine",
    "Constant",
    "ConvDecoder",
    "ConvEncoder",
    "FlatBatch",
    "Group",
    "Joined",
    "Masked",
    "MergeMaps",
    "OneHot",
    "PositionEmbedding",
    "SelfMasking",
    "Spectral",
    "SqueezeExcitation",
    "TopDown",
    "Tower",
    "Unigram",
    "Zeros",
    "concatenate",
    "conv_decoder",
    "conv_encoder",
    "decoder_cell",
    "downsample",
    "encoder_cell",
    "flat_batch",
    "mlp",
    "nvae",
    "residual",
    "upsample",
]
