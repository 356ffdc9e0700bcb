"""KimiDeltaAttention: parameters as in the field, its result against its definition, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from layer_cases import LOPSIDED, make_copy, make_layer, plain_layer, tokens_of

from kda_cuda import KimiDeltaAttention, reference
from kda_cuda.layer import KDACache, RMSNormGated

# ---- parameters


def fla_parameters(hidden: int, heads: int, value_heads: int, key: int, value: int, width: int, bias: bool) -> dict:
    """Names and shapes of the parameters of fla.layers.KimiDeltaAttention 0.6.0."""
    table = {
        "A_log": (value_heads,),
        "dt_bias": (value_heads * key,),
        "q_proj.weight": (heads * key, hidden),
        "k_proj.weight": (heads * key, hidden),
        "v_proj.weight": (value_heads * value, hidden),
        "q_conv1d.weight": (heads * key, 1, width),
        "k_conv1d.weight": (heads * key, 1, width),
        "v_conv1d.weight": (value_heads * value, 1, width),
        "f_proj.0.weight": (value, hidden),
        "f_proj.1.weight": (value_heads * key, value),
        "b_proj.weight": (value_heads, hidden),
        "g_proj.0.weight": (value, hidden),
        "g_proj.1.weight": (value_heads * value, value),
        "g_proj.1.bias": (value_heads * value,),
        "o_norm.weight": (value,),
        "o_proj.weight": (hidden, value_heads * value),
    }
    if bias:
        table |= {f"{x}_conv1d.bias": table[f"{x}_conv1d.weight"][:1] for x in "qkv"}
    return table


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, (2048, 16, 16, 128, 128, 4, False)),
        (LOPSIDED, (40, 2, 4, 16, 24, 4, True)),
        ({"hidden_size": 32, "head_dim": 8, "num_heads": 3, "conv_size": 3, "safe_gate": True, "lower_bound": -5.0},
         (32, 3, 3, 8, 8, 3, False)),
    ],
)  # fmt: skip
def test_parameters_are_those_of_fla(arguments: dict, sizes: tuple) -> None:
    with torch.device("meta"):
        layer = KimiDeltaAttention(**arguments)
    expected = fla_parameters(*sizes)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]  # no buffers


def test_state_dict_of_the_field_loads_strictly() -> None:
    layer, expected = make_layer(), fla_parameters(40, 2, 4, 16, 24, 4, True)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator) for name, shape in expected.items()}
    layer.load_state_dict(state, strict=True)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_checkpoint_shapes_of_A_log_and_dt_bias_load() -> None:
    layer, other = make_layer(), make_layer(seed=1)
    state = dict(other.state_dict())
    state["A_log"] = state["A_log"].view(1, 1, 4, 1)
    state["dt_bias"] = state["dt_bias"].view(4, 16)
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer.A_log, other.A_log)
    assert torch.equal(layer.dt_bias, other.dt_bias)
    with pytest.raises(RuntimeError, match="A_log"):
        layer.load_state_dict({**state, "A_log": torch.zeros(5)})


def test_without_convolution_there_are_no_convolution_parameters() -> None:
    assert not [name for name in make_layer(use_short_conv=False).state_dict() if "conv" in name]


def test_initial_distributions() -> None:
    layer = make_layer(hidden_size=8, head_dim=64, expand_v=1, num_heads=64, num_v_heads=64)
    a = layer.A_log.exp()
    assert a.dtype == torch.float32
    assert 1 <= a.min() < 3 and 14 < a.max() <= 16.001
    dt = torch.nn.functional.softplus(layer.dt_bias.double())
    assert 0.00099 < dt.min() < 0.0011 and 0.09 < dt.max() < 0.1001
    # log-uniform: mean and spread of ln dt
    low, high = math.log(1e-3), math.log(1e-1)
    assert abs(dt.log().mean() - (low + high) / 2) < 0.1
    assert abs(dt.log().std() - (high - low) / math.sqrt(12)) < 0.1
    assert torch.equal(layer.o_norm.weight, torch.ones(64))
    assert layer.A_log._no_weight_decay and layer.dt_bias._no_weight_decay
    bound = 1 / math.sqrt(layer.conv_size)  # nn.Conv1d with one channel a group
    assert layer.q_conv1d.weight.abs().max() <= bound and layer.q_conv1d.weight.std() > 0.5 * bound
    assert torch.equal(make_layer(safe_gate=True, lower_bound=-5.0).A_log, torch.zeros(4))


def test_gate_parameters_stay_fp32() -> None:
    layer = make_layer()
    before = layer.A_log.detach().clone()
    for convert in (layer.bfloat16, layer.half, lambda: layer.to(torch.bfloat16)):
        convert()
        assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
        assert torch.equal(layer.A_log, before)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert layer.double().A_log.dtype == torch.float64


# ---- the result


@pytest.mark.parametrize(
    "changes",
    [{}, {"lower_bound": -5.0, "safe_gate": True}, {"lower_bound": -3.0}, {"allow_neg_eigval": True}, {"conv_size": 2}],
    ids=["softplus", "safe_gate", "lower_bound", "neg_eigval", "conv_size"],
)
def test_layer_computes_its_definition(changes: dict) -> None:
    layer = make_layer(**changes)
    torch.nn.init.uniform_(layer.o_norm.weight, 0.5, 1.5)
    x = tokens_of(layer, 2, 75)
    with torch.no_grad():
        o, attentions, cache = layer(x)
        expected = torch.stack([plain_layer(make_copy(layer, changes), row) for row in x]).float()
    assert attentions is None and cache is None
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


def test_modes_agree_and_bf16_is_near_fp32() -> None:
    layer, recurrent = make_layer(), make_layer(mode="fused_recurrent")
    x = tokens_of(layer, 1, 100)
    with torch.no_grad():
        o = layer(x)[0]
        assert torch.equal(recurrent(x)[0], o)
        low = layer.bfloat16()(x.bfloat16())[0]
    assert low.dtype == torch.bfloat16
    assert reference.relative_rmse(low, o) < 3e-2  # all projections rounded too, not only the operator


def test_autocast() -> None:
    layer = make_layer()
    x = tokens_of(layer, 2, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _, cache = layer(x, use_cache=True)
    assert o.dtype == torch.bfloat16 and cache[0]["recurrent_state"].dtype == torch.float32
    assert reference.relative_rmse(o, layer(x)[0]) < 3e-2
    o.float().square().sum().backward()
    assert layer.A_log.grad.dtype == torch.float32 and torch.isfinite(layer.A_log.grad).all()


def test_copies_and_late_placement() -> None:
    layer = make_layer()
    x = tokens_of(layer, 1, 20)
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
    with torch.device("meta"):
        late = make_layer()
    late.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(late(x)[0], layer(x)[0])
    assert layer.double()(x.double())[0].dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu() -> None:
    """bf16 on the kernels against fp32 on the CPU, whole, packed, padded and in pieces."""
    layer = make_layer(hidden_size=128, head_dim=128, expand_v=0.5)  # K = 128, V = 64
    x = tokens_of(layer, 2, 300)
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[0, :77] = 0
    cu_seqlens = torch.tensor([0, 1, 130, 600])
    with torch.no_grad():
        expected = [
            layer(x)[0],
            layer(x, attention_mask=mask)[0],
            layer(x.view(1, 600, -1), cu_seqlens=cu_seqlens)[0],
            layer(x)[0],
        ]
        layer = layer.to("cuda", torch.bfloat16)
        x, mask, cu_seqlens = x.to("cuda", torch.bfloat16), mask.cuda(), cu_seqlens.cuda()
        cache = KDACache()
        pieces = [layer(x[:, a:b], past_key_values=cache, use_cache=True)[0] for a, b in ((0, 1), (1, 130), (130, 300))]
        actual = [
            layer(x)[0],
            layer(x, attention_mask=mask)[0],
            layer(x.view(1, 600, -1), cu_seqlens=cu_seqlens)[0],
            torch.cat(pieces, 1),
        ]
    for low, full in zip(actual, expected, strict=True):
        assert reference.relative_rmse(low, full) < 3e-2  # bf16 weights and projections


def test_log_gate_is_the_one_of_the_operator() -> None:
    layer = make_layer()
    g = layer.project(tokens_of(layer, 1, 9))[0].g
    x = g + layer.dt_bias.view(4, 16)
    torch.testing.assert_close(layer.log_gate(g), -layer.A_log.exp()[:, None] * torch.log1p(x.exp()))


def test_norm_computes_in_fp32() -> None:
    norm = RMSNormGated(8)
    x = torch.full((2, 8), 300.0, dtype=torch.float16)  # squares overflow fp16
    assert torch.equal(norm(x, torch.zeros_like(x)), torch.full_like(x, 0.5))


# ---- errors


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"expand_v": 0.3}, "expand_v"),
        ({"expand_v": 0.0}, "expand_v"),
        ({"num_v_heads": 3}, "num_v_heads"),
        ({"num_v_heads": 1}, "num_v_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"head_dim": -1}, "head_dim"),
        ({"conv_size": 0}, "conv_size"),
        ({"mode": "parallel"}, "mode"),
        ({"safe_gate": True}, "lower_bound"),
        ({"lower_bound": -6.0}, "lower_bound"),
        ({"lower_bound": 0.0}, "lower_bound"),
        ({"lower_bound": math.nan}, "lower_bound"),
    ],
)
def test_constructor_refuses(changes: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"argument `{name}`: expected .* got "):
        make_layer(**changes)


CALLS = {
    "rank": ("hidden_states", lambda x: {"hidden_states": x[0]}),
    "width": ("hidden_states", lambda x: {"hidden_states": x[..., :39]}),
    "batch with cu_seqlens": ("hidden_states", lambda x: {"cu_seqlens": torch.tensor([0, 10])}),
    "start": ("cu_seqlens", lambda x: {"hidden_states": x[:1], "cu_seqlens": torch.tensor([1, 10])}),
    "order": ("cu_seqlens", lambda x: {"hidden_states": x[:1], "cu_seqlens": torch.tensor([0, 7, 5, 10])}),
    "end": ("cu_seqlens", lambda x: {"hidden_states": x[:1], "cu_seqlens": torch.tensor([0, 9])}),
    "type": ("cu_seqlens", lambda x: {"hidden_states": x[:1], "cu_seqlens": torch.tensor([0.0, 10.0])}),
    "mask rank": ("attention_mask", lambda x: {"attention_mask": torch.ones(2, 10, 10, dtype=torch.long)}),
    "mask length": ("attention_mask", lambda x: {"attention_mask": torch.ones(2, 9, dtype=torch.long)}),
    "additive mask": ("attention_mask", lambda x: {"attention_mask": torch.zeros(2, 10)}),
    "both": (
        "attention_mask",
        lambda x: {"attention_mask": torch.ones(2, 10).long(), "cu_seqlens": torch.tensor([0, 10])},
    ),
    "attentions": ("output_attentions", lambda x: {"output_attentions": True}),
    "misspelt": ("cu_seqlen", lambda x: {"cu_seqlen": torch.tensor([0, 10])}),
}


@pytest.mark.parametrize("call", CALLS)
def test_forward_refuses(call: str) -> None:
    layer = make_layer()
    name, arguments = CALLS[call]
    x = tokens_of(layer, 2, 10)
    with pytest.raises(ValueError, match=f"argument `{name}`: expected .* got "):
        layer(**{"hidden_states": x, **arguments(x)})


def test_decoder_keywords_without_meaning_are_accepted() -> None:
    layer = make_layer()
    x = tokens_of(layer, 1, 4)
    assert torch.equal(layer(x, position_ids=torch.arange(4)[None], max_seqlen=None)[0], layer(x)[0])


def test_cache_needs_an_index_and_fitting_states() -> None:
    layer, nameless = make_layer(), make_layer(layer_idx=None)
    x = tokens_of(layer, 2, 10)
    with pytest.raises(ValueError, match="layer_idx"):
        nameless(x, use_cache=True)
    _, _, cache = layer(x, use_cache=True)
    with pytest.raises(ValueError, match=r"cache.*\[3, 32, 4\], got \[2, 32, 4\]"):
        layer(tokens_of(layer, 3, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        make_layer(use_short_conv=False)(x, past_key_values=cache)
    transposed = KDACache()
    transposed.update(0, cache[0]["recurrent_state"].transpose(-1, -2), cache[0]["conv_state"], 10)
    with pytest.raises((ValueError, RuntimeError), match="initial_state"):
        layer(x, past_key_values=transposed)
    with pytest.raises(IndexError, match="layer_idx"):
        cache[1]
