"""KimiDeltaAttention: parameters as in the field, sequences in pieces, packed and padded, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from kda_cuda import KimiDeltaAttention, reference
from kda_cuda.layer import KDACache, RMSNormGated, ShortConvolution

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


def make_copy(layer: KimiDeltaAttention, changes: dict) -> KimiDeltaAttention:
    other = make_layer(**changes)
    other.load_state_dict(layer.state_dict())
    return other


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


# ---- pieces and packing


@pytest.mark.parametrize("use_short_conv", [True, False])
@pytest.mark.parametrize("borders", [[1, 2, 3, 4, 70, 150], [64, 128], [65, 65, 149], [2, 149]])
def test_pieces_equal_the_whole(borders: list[int], use_short_conv: bool) -> None:
    layer = make_layer(use_short_conv=use_short_conv)
    x = tokens_of(layer, 2, 150)
    with torch.no_grad():
        whole, _, whole_cache = layer(x, use_cache=True)
        cache, outputs = KDACache(), []
        for begin, end in zip([0, *borders], [*borders, 150], strict=True):
            o, _, returned = layer(x[:, begin:end], past_key_values=cache, use_cache=True)
            assert returned is cache
            outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(cache[0]["recurrent_state"], whole_cache[0]["recurrent_state"])
    assert cache.get_seq_length(0) == 150
    if use_short_conv:
        for state, expected in zip(cache[0]["conv_state"], whole_cache[0]["conv_state"], strict=True):
            assert_close(state, expected)
    else:
        assert cache[0]["conv_state"] is None


def test_state_layouts() -> None:
    """[N, HV, V, K] for the recurrence (V != K here), [N, D, W] with the oldest input first for the convolutions."""
    layer = make_layer()
    x = tokens_of(layer, 3, 70)
    with torch.no_grad():
        inputs, _ = layer.project(x)
        _, _, cache = layer(x, use_cache=True)
        _, expected, _ = reference.recurrent_kda(
            *inputs, A_log=layer.A_log, dt_bias=layer.dt_bias, use_qk_l2norm=True, use_gate=True, use_beta_sigmoid=True
        )
        k = layer.k_proj(x)
    state = cache[0]["recurrent_state"]
    assert state.shape == (3, 4, 24, 16) and state.dtype == torch.float32
    assert_close(state, expected.transpose(-1, -2).float())
    assert cache[0]["conv_state"][1].shape == (3, 32, 4)
    assert_close(cache[0]["conv_state"][1], k[:, -4:].transpose(1, 2).contiguous())


def test_reading_a_cache_does_not_change_it() -> None:
    layer = make_layer()
    x = tokens_of(layer, 1, 20)
    with torch.no_grad():
        _, _, cache = layer(x[:, :10], use_cache=True)
        before = cache.copy()
        first = layer(x[:, 10:], past_key_values=cache)[0]
        again = layer(x[:, 10:], past_key_values=cache, use_cache=True)[0]
    assert torch.equal(first, again)
    assert cache.get_seq_length(0) == 20 and before.get_seq_length(0) == 10
    assert not torch.equal(cache[0]["recurrent_state"], before[0]["recurrent_state"])


def test_cache_of_another_class_and_of_many_layers() -> None:
    class FieldCache(list):
        """The part of flash-linear-attention's cache that a layer touches."""

        def update(self, layer_idx: int, recurrent_state=None, conv_state=None, offset=1, **rest) -> dict:
            assert not rest and offset == 5
            while len(self) <= layer_idx:
                self.append(None)
            self[layer_idx] = {"recurrent_state": recurrent_state, "conv_state": conv_state, "attn_state": None}
            return self[layer_idx]

    layers = [make_layer(seed=i, layer_idx=i) for i in range(3)]
    x = tokens_of(layers[0], 1, 10)
    with torch.no_grad():
        for cache in (FieldCache(), KDACache()):
            for layer in reversed(layers):
                layer(x[:, :5], past_key_values=cache, use_cache=True)
            for layer in layers:
                o = layer(x[:, 5:], past_key_values=cache, use_cache=True)[0]
                assert_close(o, layer(x)[0][:, 5:])


LENGTHS = [1, 64, 0, 2, 65, 3, 130]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_separate_ones(dtype: torch.dtype) -> None:
    layer = make_layer()
    x = tokens_of(layer, 1, sum(LENGTHS))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(dtype)
    with torch.no_grad():
        o, _, cache = layer(x, cu_seqlens=cu_seqlens, use_cache=True)
        for n, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            expected, _, alone = layer(x[:, begin:end], use_cache=True)
            assert_close(o[:, begin:end], expected)
            assert_close(cache[0]["recurrent_state"][n : n + 1], alone[0]["recurrent_state"])
            for state, expected_state in zip(cache[0]["conv_state"], alone[0]["conv_state"], strict=True):
                assert_close(state[n : n + 1], expected_state)


def test_packed_sequences_in_pieces() -> None:
    """Two packed runs with carried states equal one run of each sequence; an empty piece leaves its state as it is."""
    layer = make_layer()
    first, second = [3, 0, 70, 1], [1, 66, 0, 2]
    wholes = [tokens_of(layer, 1, a + b, seed=i) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    cache = KDACache()
    outputs = []
    with torch.no_grad():
        for lengths, parts in (
            (first, [x[:, :a] for x, a in zip(wholes, first, strict=True)]),
            (second, [x[:, a:] for x, a in zip(wholes, first, strict=True)]),
        ):
            before = cache.copy()
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
            o, _, _ = layer(torch.cat(parts, 1), cu_seqlens=cu_seqlens, past_key_values=cache, use_cache=True)
            outputs.append(o.split(lengths, dim=1))
        for n, x in enumerate(wholes):
            assert_close(torch.cat([outputs[0][n], outputs[1][n]], 1), layer(x)[0])
    assert torch.equal(cache[0]["recurrent_state"][2], before[0]["recurrent_state"][2])
    for state, state_before in zip(cache[0]["conv_state"], before[0]["conv_state"], strict=True):
        assert torch.equal(state[2], state_before[2])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
def test_padding_is_as_if_absent(mask_dtype: torch.dtype) -> None:
    layer = make_layer()
    x = tokens_of(layer, 4, 90)
    mask = torch.ones(4, 90, dtype=mask_dtype)
    mask[0, :33] = 0  # left
    mask[1, 50:] = 0  # right
    mask[3, :] = 0  # nothing but padding
    spans = [(33, 90), (0, 50), (0, 90)]
    x[mask == 0] = math.nan  # whatever is in there
    with torch.no_grad():
        o, _, cache = layer(x, attention_mask=mask, use_cache=True)
        assert torch.equal(o[mask == 0], torch.zeros_like(o[mask == 0]))
        for n, (begin, end) in enumerate(spans):
            expected, _, alone = layer(x[n : n + 1, begin:end], use_cache=True)
            assert_close(o[n : n + 1, begin:end], expected)
            assert_close(cache[0]["recurrent_state"][n : n + 1], alone[0]["recurrent_state"])
            assert_close(cache[0]["conv_state"][2][n : n + 1], alone[0]["conv_state"][2])
        assert cache[0]["recurrent_state"].shape[0] == 4
        assert not cache[0]["recurrent_state"][3].any()
        # generation goes on from there, with a mask over all tokens so far or none at all
        more = tokens_of(layer, 4, 1, seed=5)
        longer = torch.cat([mask, torch.ones(4, 1, dtype=mask_dtype)], 1)
        step = layer(more, attention_mask=longer, past_key_values=cache.copy(), use_cache=True)[0]
        assert_close(layer(more, past_key_values=cache, use_cache=True)[0], step)
        expected = layer(torch.cat([x[1:2, :50], more[1:2]], 1))[0][:, -1:]
        assert_close(step[1:2], expected)


def test_empty_runs() -> None:
    layer = make_layer()
    x = tokens_of(layer, 2, 10)
    with torch.no_grad():
        assert layer(x[:, :0])[0].shape == (2, 0, 40)
        assert layer(x[:0])[0].shape == (0, 10, 40)
        _, _, cache = layer(x, use_cache=True)
        before = cache.copy()
        layer(x[:, :0], past_key_values=cache, use_cache=True)
    assert torch.equal(cache[0]["recurrent_state"], before[0]["recurrent_state"])
    assert torch.equal(cache[0]["conv_state"][0], before[0]["conv_state"][0])


def test_short_convolution_ignores_rows_past_the_last_border() -> None:
    """A captured graph is padded: rows past the last border belong to no sequence."""
    torch.manual_seed(0)
    convolution = ShortConvolution(6, 4)
    x, cu_seqlens = torch.randn(1, 12, 6), torch.tensor([0, 3, 7, 7])
    y, state = convolution(x, output_final_state=True, cu_seqlens=cu_seqlens)
    x[:, 7:] = 1e9
    y_other, state_other = convolution(x, output_final_state=True, cu_seqlens=cu_seqlens)
    assert torch.equal(y[:, :7], y_other[:, :7])
    assert torch.equal(state, state_other)


# ---- autograd and compile


def test_gradients_flow_and_agree_between_packed_and_separate() -> None:
    layer = make_layer()
    x = tokens_of(layer, 2, 70).requires_grad_()
    weight = torch.randn(2, 70, 40, generator=torch.Generator().manual_seed(9))
    (layer(x)[0] * weight).sum().backward()
    separate = {name: p.grad.clone() for name, p in layer.named_parameters()}
    for name, grad in separate.items():
        assert torch.isfinite(grad).all() and grad.abs().max() > 0, name
    separate_x = x.grad.clone()
    layer.zero_grad()
    x.grad = None
    o, _, _ = layer(x.reshape(1, 140, 40), cu_seqlens=torch.tensor([0, 70, 140]))
    (o.view(2, 70, 40) * weight).sum().backward()
    torch.testing.assert_close(x.grad, separate_x, rtol=1e-3, atol=1e-4)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, separate[name], rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_agree_with_the_definition() -> None:
    layer = make_layer()
    x = tokens_of(layer, 1, 40)
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(9))
    (layer(x)[0][0] * weight).sum().backward()
    exact = make_copy(layer, {})
    (plain_layer(exact, x[0]) * weight.double()).sum().backward()
    gradients = dict(exact.named_parameters())
    for name, parameter in layer.named_parameters():
        error = reference.relative_rmse(parameter.grad, gradients[name].grad)
        assert error < 1e-3, f"{name}: {error}"


def test_padding_gets_no_gradient() -> None:
    layer = make_layer()
    x = tokens_of(layer, 2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    x[1, 20:] = math.nan
    x.requires_grad_()
    layer(x, attention_mask=mask)[0].square().sum().backward()
    assert not x.grad[1, 20:].any()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", ["plain", "packed", "masked", "cached"])
def test_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for run, tokens in enumerate((70, 133, 41, 90)):
            x = tokens_of(layer, 2, tokens)
            arguments, cache, compiled_cache = {}, None, None
            if kind == "packed":
                x = x.view(1, 2 * tokens, -1)
                arguments["cu_seqlens"] = torch.tensor([0, 7, tokens, 2 * tokens])
            elif kind == "masked":
                arguments["attention_mask"] = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 9]])).long()
            elif kind == "cached":
                _, _, cache = layer(x, use_cache=True)
                compiled_cache = cache.copy()
                arguments["use_cache"] = True
            expected = layer(x, past_key_values=cache, **arguments)[0]
            with torch._dynamo.config.patch(error_on_recompile=run > 0):
                assert_close(compiled(x, past_key_values=compiled_cache, **arguments)[0], expected)
            if kind == "cached":
                assert_close(compiled_cache[0]["recurrent_state"], cache[0]["recurrent_state"])


@pytest.mark.slow
def test_compiled_training_steps() -> None:
    """With the default backend: forward and backward, one compilation for all lengths."""
    torch._dynamo.reset()
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for run, tokens in enumerate((66, 40, 129)):
        x = tokens_of(layer, 2, tokens)
        layer.zero_grad()
        layer(x)[0].square().mean().backward()
        expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=run > 0):
            compiled(x)[0].square().mean().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


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
