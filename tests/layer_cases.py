"""Layers and tokens for the tests of KimiDeltaAttention, and the layer from its definition."""

from __future__ import annotations

import torch

from kda_cuda import KimiDeltaAttention, reference

TOLERANCE = 2e-5  # fp32 in another order of summation
# K != V, grouped value heads and a bias: a mix-up of dimensions fails by shape.
LOPSIDED = {"hidden_size": 40, "head_dim": 16, "expand_v": 1.5, "num_heads": 2, "num_v_heads": 4, "conv_bias": True}


def make_layer(seed: int = 0, **changes: object) -> KimiDeltaAttention:
    torch.manual_seed(seed)
    return KimiDeltaAttention(**{**LOPSIDED, "layer_idx": 0, **changes})


def tokens_of(layer: KimiDeltaAttention, batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2.0, layer.hidden_size)  # no two channels alike
    return torch.randn(batch, tokens, layer.hidden_size, generator=generator) * scale + 0.1


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def plain_layer(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence [T, hidden_size] through the layer, in fp64, token by token, from the definition."""
    layer = layer.double()
    x = x.double()

    def convolved(projection: torch.nn.Linear, convolution: torch.nn.Conv1d) -> torch.Tensor:
        y, width = projection(x), layer.conv_size
        out = torch.zeros_like(y)
        for t in range(len(y)):
            for tap in range(width):
                if (source := t - (width - 1) + tap) >= 0:
                    out[t] += convolution.weight[:, 0, tap] * y[source]
        if convolution.bias is not None:
            out += convolution.bias
        return out * torch.sigmoid(out)

    heads, value_heads, value_dim = layer.num_heads, layer.num_v_heads, layer.head_v_dim
    o, _, _ = reference.recurrent_kda(
        convolved(layer.q_proj, layer.q_conv1d).view(1, len(x), heads, -1),
        convolved(layer.k_proj, layer.k_conv1d).view(1, len(x), heads, -1),
        convolved(layer.v_proj, layer.v_conv1d).view(1, len(x), value_heads, -1),
        layer.f_proj(x).view(1, len(x), value_heads, -1),
        layer.b_proj(x)[None],
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        lower_bound=layer.lower_bound,
        use_qk_l2norm=True,
        use_gate=True,
        use_beta_sigmoid=True,
        allow_neg_eigval=layer.allow_neg_eigval,
    )
    normed = o[0] / (o[0].square().mean(-1, keepdim=True) + layer.o_norm.eps).sqrt() * layer.o_norm.weight
    gated = normed * torch.sigmoid(layer.g_proj(x).view(len(x), value_heads, value_dim))
    return layer.o_proj(gated.flatten(1))


def make_copy(layer: KimiDeltaAttention, changes: dict) -> KimiDeltaAttention:
    other = make_layer(**changes)
    other.load_state_dict(layer.state_dict())
    return other
