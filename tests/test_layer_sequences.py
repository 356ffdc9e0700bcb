"""KimiDeltaAttention over sequences in pieces, packed and padded; its gradients; torch.compile."""

from __future__ import annotations

import math

import pytest
import torch
from layer_cases import assert_close, make_copy, make_layer, plain_layer, tokens_of

from kda_cuda import reference
from kda_cuda.layer import KDACache, ShortConvolution

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
