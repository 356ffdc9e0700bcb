"""The CUDA forward against the fp64 token recurrence: every instantiation, every feature, a sweep of all together."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import CHUNK_TOKENS, FAMILIES, make_inputs, run
from gpu_support import (
    DEVICE,
    DTYPES,
    FP32_RELATIVE_RMSE,
    HEAD_SIZES,
    ON_CUDA,
    all_dtypes,
    all_families,
    all_head_sizes,
    all_paths,  # noqa: F401  (a fixture)
    assert_all_same_bits,
    assert_contract,
    assert_same_bits,
    call,
    composite_fp32,
    gpu_tests,
    is_aligned,
    launch,
    odd_strides,
    only_sequence,
    reference,
    spread_last,
)

from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse
from kda_cuda.reference import log_gate

pytestmark = [*gpu_tests, pytest.mark.usefixtures("all_paths")]

GATE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Around the sizes of a row block, a tile and a chunk.
LENGTHS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 200)


def check(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Runs the kernels and checks them against the recurrence; returns their outputs."""
    outputs = call(inputs)
    assert_contract(inputs, outputs, reference(inputs))
    return outputs


# --- Every instantiation --------------------------------------------------------------------------------------------


@all_families
@all_head_sizes
@all_dtypes
def test_every_instantiation(family: str, K: int, V: int, dtype: torch.dtype) -> None:
    """Ten chunks and a partial one, four value heads for two of q and k, from a state; also against the composite."""
    inputs = make_inputs(family, T=650, H=2, HV=4, K=K, V=V, dtype=dtype, with_state=True, device=DEVICE)
    outputs, second = check(inputs), composite_fp32(inputs)
    assert_contract(inputs, outputs, second)
    for opinion, expected in zip(second, reference(inputs), strict=True):
        assert relative_rmse(opinion, expected) <= FP32_RELATIVE_RMSE


# What the grid of a path may be beside the planner's choice. The stepwise path has one.
GRIDS = {
    "staged": [{"value_tile": tile} for tile in (64, 128)],
    "fused": [{"clusters": count} for count in (1, 2, 3, 5)],
}


@all_families
@all_head_sizes
@all_dtypes
def test_grids(family: str, K: int, V: int, dtype: torch.dtype, all_paths: str) -> None:  # noqa: F811
    """A CTA of the staged recurrence takes all columns of V or some, the fused kernel has any number of clusters: the
    same bits.
    """
    if not ON_CUDA or all_paths not in GRIDS:
        pytest.skip("the stepwise path and the composite implementation have one grid")
    inputs = make_inputs(family, T=200, H=2, HV=4, K=K, V=V, dtype=dtype, with_state=True, device=DEVICE)
    expected = call(inputs)
    assert_contract(inputs, expected, reference(inputs))
    for grid in GRIDS[all_paths]:
        if grid.get("value_tile", 0) <= V:
            assert_all_same_bits(call(inputs, **grid), expected, str(grid))


@all_families
def test_thousands_of_tokens(family: str) -> None:
    """No drift over 130 chunks, in shapes that fill the GPU."""
    inputs = make_inputs(family, T=8300, H=2, HV=4, K=128, V=128, with_state=True, device=DEVICE)
    assert_contract(inputs, call(inputs), composite_fp32(inputs))


# --- All features together ------------------------------------------------------------------------------------------


def draw_call(seed: int) -> tuple[dict[str, Any], str]:
    """Arguments of the operator with features drawn at random, and a line that names them."""
    rng = random.Random(seed)
    family, (K, V), dtype = rng.choice(FAMILIES), rng.choice(HEAD_SIZES), rng.choice(DTYPES)
    H, groups = rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 4))
    shape: dict[str, Any] = {"B": rng.choice((1, 2, 3)), "T": rng.choice((*LENGTHS, rng.randrange(1, 300)))}
    if rng.random() < 0.6:
        shape = {
            "lengths": [rng.choice(LENGTHS) for _ in range(rng.randrange(1, 7))],
            "index_dtype": rng.choice((torch.int32, torch.int64)),
        }
    options = {
        "with_state": rng.random() < 0.6,
        "state_dtype": rng.choice((torch.float32, torch.bfloat16)),
        "state_v_first": rng.random() < 0.5,
        "output_final_state": rng.random() < 0.8,
        "output_chunk_states": rng.random() < 0.8,
        "scale": rng.choice((None, None, 1.0, -0.3, 0.02)),
    }
    inputs = make_inputs(
        family, H=H, HV=H * groups, K=K, V=V, dtype=dtype, seed=seed, device=DEVICE, **shape, **options
    )
    said = [family, f"K{K} V{V} H{H} HV{H * groups}", str(dtype), str(shape), str(options)]

    def apply(feature: str) -> None:
        said.append(feature)

    if "A_log" in inputs and rng.random() < 0.3:  # as a log-gate that came from elsewhere
        gate = {name: inputs.pop(name, None) for name in ("A_log", "dt_bias", "lower_bound")}
        inputs.pop("use_gate")
        inputs["g"] = log_gate(inputs["g"].float(), gate["A_log"], gate["dt_bias"], gate["lower_bound"])
        apply("precomputed gate")
    else:
        if inputs.get("lower_bound") is not None:
            inputs["lower_bound"] = rng.choice((-5.0, -5.0, -2.5, -0.5))
            if rng.random() < 0.3:
                inputs.pop("A_log")
                apply("no A_log")
        if "A_log" in inputs and rng.random() < 0.3:
            inputs["A_log"] = inputs["A_log"].view(1, 1, -1, 1)
            apply("A_log of a checkpoint")
        if "dt_bias" in inputs and rng.random() < 0.5:
            inputs["dt_bias"] = inputs["dt_bias"].view(-1, K)
            apply("dt_bias [HV, K]")
        elif "dt_bias" in inputs and family != "long" and rng.random() < 0.3:
            inputs.pop("dt_bias")
            apply("no dt_bias")

    beta = rng.choice(("sigmoid", "sigmoid", "negative eigenvalues", "given"))
    if beta == "negative eigenvalues":
        inputs["allow_neg_eigval"] = True
    elif beta == "given":
        inputs["use_beta_sigmoid"] = False
        inputs["beta"] = inputs["beta"].float().sigmoid()
    if rng.random() < 0.3:
        inputs["use_qk_l2norm"] = False
        for name in ("q", "k"):
            inputs[name] = torch.nn.functional.normalize(inputs[name].float(), dim=-1).to(dtype)
        apply("q and k normalised before")
    g_dtype, beta_dtype = rng.choice(GATE_DTYPES), rng.choice(GATE_DTYPES)
    inputs["g"], inputs["beta"] = inputs["g"].to(g_dtype), inputs["beta"].to(beta_dtype)
    for name in ("q", "k", "v", "g", "beta"):
        layout = rng.choice((None, None, "head_major", "odd", "expanded"))
        if inputs[name].numel() == 0 or layout is None:
            continue
        if layout == "head_major":
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "odd":
            inputs[name] = odd_strides(inputs[name])
        else:
            inputs[name] = inputs[name][:, :, :1].expand_as(inputs[name])  # all heads the same: stride 0
        apply(f"{name} {layout}")
    apply(f"beta {beta} {beta_dtype}, g {g_dtype}")
    return inputs, "; ".join(said)


@pytest.mark.parametrize("seed", range(160))
def test_sweep(seed: int) -> None:
    """Features drawn at random, all at once: against the recurrence, and the composite on the same device."""
    inputs, description = draw_call(seed)
    print(description)  # shown by pytest if the test fails
    expected, outputs = reference(inputs), call(inputs)
    assert_contract(inputs, outputs, expected)
    if seed % 4 == 0:
        second = composite_fp32(inputs)
        assert_contract(inputs, outputs, second)
        for opinion, e in zip(second, expected, strict=True):
            assert opinion.numel() == 0 or relative_rmse(opinion, e) <= FP32_RELATIVE_RMSE


# --- Sequences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@all_families
def test_each_of_many_sequences(family: str, index_dtype: torch.dtype) -> None:
    """All lengths around the tile sizes in one call: each sequence has the bits that it has alone."""
    inputs = make_inputs(
        family, lengths=[*LENGTHS, 1, 1, 0], HV=4, K=64, V=128, with_state=True, index_dtype=index_dtype, device=DEVICE
    )
    o, final_state, chunk_states = check(inputs)
    offsets = inputs["cu_seqlens"].tolist()
    for n, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if begin == end:
            assert_same_bits(final_state[n], inputs["initial_state"][n])
            continue
        alone = call(only_sequence(inputs, n))
        first = begin // CHUNK_TOKENS + n
        states = chunk_states[:, first : first + alone[2].shape[1]]
        assert_all_same_bits((o[:, begin:end], final_state[n : n + 1], states), alone, f"sequence {n} of {end - begin}")


def test_hundreds_of_short_sequences() -> None:
    """More sequences than a warp probes at once when it looks for the sequence of a chunk: 32, and 32 times 32."""
    generator = random.Random(0)
    for count in (33, 1100):
        lengths = [generator.choice((0, 0, 1, 2, 3)) for _ in range(count)]
        inputs = make_inputs("long", lengths=lengths, H=1, HV=1, with_state=True, device=DEVICE)
        assert_contract(inputs, call(inputs), composite_fp32(inputs))


def test_equal_lengths_as_a_batch_and_packed() -> None:
    """B sequences of T tokens, and the same with cu_seqlens: the same bits of o and of the final states."""
    B, T = 5, 130
    batch = make_inputs("long", B=B, T=T, with_state=True, output_chunk_states=False, device=DEVICE)
    packed = dict(batch, cu_seqlens=torch.arange(0, B * T + 1, T, device=DEVICE))
    for name in ("q", "k", "v", "g", "beta"):
        packed[name] = batch[name].flatten(0, 1).unsqueeze(0)
    o, final_state, _ = check(batch)
    o_packed, state_packed, _ = call(packed)
    assert_same_bits(o_packed.view_as(o), o)
    assert_same_bits(state_packed, final_state)


# --- States ---------------------------------------------------------------------------------------------------------


@all_head_sizes
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_both_state_layouts(packed: bool, K: int, V: int) -> None:
    """A state has the same bits in either layout, whichever way it came in. The data are asymmetric."""
    shape: dict[str, Any] = {"lengths": [100, 0, 64, 1]} if packed else {"B": 2, "T": 150}
    k_first = make_inputs("long", K=K, V=V, HV=4, with_state=True, device=DEVICE, **shape)
    state = k_first["initial_state"].transpose(-1, -2).contiguous()
    o, final_state, chunk_states = check(k_first)
    v_first = check({**k_first, "initial_state": state, "state_v_first": True})
    assert_same_bits(v_first[0], o)
    assert_same_bits(v_first[1].transpose(-1, -2), final_state)
    assert_same_bits(v_first[2].transpose(-1, -2), chunk_states)
    if K == V:  # no shape shows it: the layouts must be told apart by the numbers
        confused = call({**k_first, "initial_state": state})
        assert relative_rmse(confused[0], o) > 0.1


def test_initial_state_of_a_cache() -> None:
    """bf16 states, and states inside a larger cache, have the bits of an fp32 copy."""
    inputs = make_inputs("long", B=3, T=100, K=64, V=128, with_state=True, state_dtype=torch.bfloat16, device=DEVICE)
    state = inputs["initial_state"]
    expected = check({**inputs, "initial_state": state.float()})
    assert_all_same_bits(call(inputs), expected, "bf16")
    for dtype in (torch.bfloat16, torch.float32):
        cache = torch.full((7, 5, 64, 128), torch.nan, dtype=dtype, device=DEVICE)
        view = cache[1:7:2, 2:4]
        view.copy_(state)
        assert_all_same_bits(call({**inputs, "initial_state": view}), expected, f"view of {dtype}")


def test_outputs_that_are_not_requested_change_nothing() -> None:
    inputs = make_inputs("long", lengths=[70, 0, 130], HV=4, with_state=True, device=DEVICE)
    full = check(inputs)
    for name, index in (("output_final_state", 1), ("output_chunk_states", 2)):
        less = call({**inputs, name: False})
        assert less[index].shape == (0,)
        for i in {0, 1, 2} - {index}:
            assert_same_bits(less[i], full[i])


# --- Gates, beta, keys, scale ---------------------------------------------------------------------------------------

GATES = {
    "zero": lambda g: torch.zeros_like(g),
    "reset_always": lambda g: torch.full_like(g, -torch.inf),
    "reset_first": lambda g: g.index_fill(1, torch.tensor([0, 64, 128], device=g.device), -torch.inf),
    "reset_last": lambda g: g.index_fill(1, torch.tensor([63, 127, 199], device=g.device), -torch.inf),
    "reset_some_channels": lambda g: g.index_fill(3, torch.arange(0, 64, 3, device=g.device), -torch.inf),
    "reset_or_keep": lambda g: torch.where(g < g.median(), -torch.inf, 0.0),
    "hardly_any": lambda g: 1e-5 * g,
    "below_fp32": lambda g: 1e-30 * g,
    "denormal_alpha": lambda g: g.clamp(-1, 0) - 87.5,
    "enormous": lambda g: 1e30 * g,
    "negative_zero": lambda g: -torch.zeros_like(g),
}


@pytest.mark.parametrize("gate_dtype", GATE_DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_precomputed_gates(gates: Any, gate_dtype: torch.dtype) -> None:
    inputs = make_inputs("unbounded_log", T=200, with_state=True, gate_dtype=torch.float32, device=DEVICE)
    inputs["g"] = gates(-inputs["g"].nan_to_num(neginf=-3.0).abs()).to(gate_dtype)
    check(inputs)


@pytest.mark.parametrize("lower_bound", [-5.0, -1.0, -1e-3])
@pytest.mark.parametrize("with_A_log", [False, True])
@pytest.mark.parametrize("with_dt_bias", [False, True])
def test_bounded_gate(lower_bound: float, with_A_log: bool, with_dt_bias: bool) -> None:
    inputs = make_inputs(
        "random", T=200, with_state=True, gate_dtype=torch.float32, device=DEVICE, lower_bound=lower_bound
    )
    inputs["g"][:, ::7] *= 100.0  # saturated both ways
    if not with_A_log:
        inputs.pop("A_log")
    if not with_dt_bias:
        inputs.pop("dt_bias")
    check(inputs)


@pytest.mark.parametrize("A_log", [-10.0, 0.0, 5.3033])
@pytest.mark.parametrize("with_dt_bias", [False, True])
def test_softplus_gate(A_log: float, with_dt_bias: bool) -> None:
    """From hardly any decay through exp(A_log) = 201; logits from -90, where softplus is e^x, to 300, where it is x."""
    inputs = make_inputs("unbounded", T=200, with_state=True, gate_dtype=torch.float32, device=DEVICE)
    inputs["A_log"][:] = A_log
    inputs["g"][:, 1::5] -= 20.0
    inputs["g"][:, 2::5] -= 90.0
    inputs["g"][:, 3::50] += 300.0
    if not with_dt_bias:
        inputs.pop("dt_bias")
    check(inputs)


@pytest.mark.parametrize("logit", [-30.0, -3.0, 3.0, 30.0])
def test_saturated_beta(logit: float) -> None:
    inputs = make_inputs("random", T=200, with_state=True, gate_dtype=torch.float32, device=DEVICE)
    inputs["beta"] += logit
    check(inputs)


def test_beta_of_zero_writes_nothing() -> None:
    """Without writes the state only decays, and o is that of the initial state."""
    inputs = make_inputs(
        "long", T=200, with_state=True, use_beta_sigmoid=False, gate_dtype=torch.float32, device=DEVICE
    )
    inputs["beta"].zero_()
    _, final_state, _ = check(inputs)
    gates = log_gate(inputs["g"].double(), inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"])
    decayed = inputs["initial_state"] * gates.sum(1).exp().unsqueeze(-1)
    assert relative_rmse(final_state, decayed) <= FP32_RELATIVE_RMSE  # no product is rounded to bf16 on this way


@pytest.mark.parametrize("scale", [None, 1.0, -0.3, 1e-4, 0.0])
def test_scale(scale: float | None) -> None:
    inputs = make_inputs("long", T=100, with_state=True, scale=scale, device=DEVICE)
    outputs = check(inputs)
    unscaled = call({**inputs, "scale": 1.0})
    assert_same_bits(outputs[1], unscaled[1])
    assert_same_bits(outputs[2], unscaled[2])
    if scale == 0.0:
        assert not outputs[0].any()


def test_queries_of_any_size() -> None:
    """o is linear in q: large and small queries that are not normalised keep the relative error."""
    for size in (1e-3, 1.0, 100.0):
        inputs = make_inputs("long", T=200, with_state=True, use_qk_l2norm=False, device=DEVICE)
        inputs["k"] = torch.nn.functional.normalize(inputs["k"].float(), dim=-1).bfloat16()
        inputs["q"] = (inputs["q"].float() * size).bfloat16()
        check(inputs)


@all_families
@all_dtypes
def test_large_keys(family: str, dtype: torch.dtype) -> None:
    """Keys of norm 1 to 4 with beta up to 1.5 / |k|^2: stable, but entries of Akk reach 6, and Tinv is far from I.

    What an error of the operands costs then is a property of the inputs. It is measured: the recurrence once more, in
    fp32 by the composite implementation, with q, k, v scattered by the rounding of one bf16 operand. The kernels round
    about six operands on the way of a term (level factors, Tinv, W or U, state), independently: sqrt(6), and as much
    again for their spread.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=DEVICE)

    inputs = make_inputs(
        family,
        T=300,
        K=64,
        V=128,
        dtype=dtype,
        use_qk_l2norm=False,
        use_beta_sigmoid=False,
        with_state=True,
        device=DEVICE,
    )
    k = torch.nn.functional.normalize(inputs["k"].float(), dim=-1)
    inputs["k"] = (k * uniform(k[..., :1].shape, 1.0, 4.0)).to(dtype)
    norms = inputs["k"].float().square().sum(-1)
    inputs["beta"] = uniform(norms.shape, 0.0, 1.5) / norms
    expected = composite_fp32(inputs)
    rounding = 2.0**-8 * 0.29  # RMS of a uniform error of one unit in the last of 8 bits
    scattered = dict(inputs)
    for name in ("q", "k", "v"):
        noise = torch.randn(inputs[name].shape, generator=generator, device=DEVICE)
        scattered[name] = inputs[name].float() * (1.0 + rounding * noise)
    sensitivity = [relative_rmse(a, e) for a, e in zip(composite_fp32(scattered), expected, strict=True)]
    outputs = call(inputs)
    for name, actual, e, cost, contract in zip(
        ("o", "final_state", "chunk_states"),
        outputs,
        expected,
        sensitivity,
        (O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, STATE_RELATIVE_RMSE),
        strict=True,
    ):
        error, limit = relative_rmse(actual, e), max(contract, 2 * 6**0.5 * cost)
        assert error <= limit, f"{name}: relative RMSE {error:.2e} > {limit:.1e}, one rounding costs {cost:.1e}"


# --- Memory layouts -------------------------------------------------------------------------------------------------


@all_head_sizes
@all_dtypes
def test_inputs_that_are_not_aligned(K: int, V: int, dtype: torch.dtype) -> None:
    """Odd offsets and odd strides, NaN around: the kernels that load single elements."""
    inputs = make_inputs("long", B=2, T=150, HV=4, K=K, V=V, dtype=dtype, with_state=True, device=DEVICE)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name] = odd_strides(inputs[name])
        assert inputs[name].data_ptr() % 16 != 0
    check(inputs)


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
@pytest.mark.parametrize("gate_dtype", GATE_DTYPES, ids=["bf16", "fp16", "fp32"])
def test_one_input_that_is_not_aligned(name: str, gate_dtype: torch.dtype) -> None:
    inputs = make_inputs("random", T=150, with_state=True, gate_dtype=gate_dtype, device=DEVICE)
    check({**inputs, name: odd_strides(inputs[name])})


def test_one_fused_projection() -> None:
    """q, k, v, g and beta as slices of one row of a projection: the bits of packed copies."""
    H, D, T = 2, 64, 200
    inputs = make_inputs("long", T=T, H=H, K=D, V=D, with_state=True, device=DEVICE)
    packed = check(inputs)
    widths = [H * D] * 4 + [8]
    projection = torch.full((1, T, sum(widths)), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    for name, part in zip(("q", "k", "v", "g"), projection.split(widths, -1), strict=False):
        inputs[name] = part.unflatten(-1, (H, D)).copy_(inputs[name])
    inputs["beta"] = projection[:, :, -8 : -8 + 2 * H : 2].copy_(inputs["beta"])
    assert_all_same_bits(call(inputs), packed)


def test_heads_outside_and_expanded(all_paths: str) -> None:  # noqa: F811
    """[B, H, T, D] tensors seen as [B, T, H, D], and one q and k for all rows of a batch: the bits of packed copies."""
    inputs = make_inputs("long", B=3, T=150, HV=4, with_state=True, strided="head_major", device=DEVICE)
    for name in ("q", "k"):
        inputs[name] = inputs[name][:1].expand_as(inputs[name])
    packed = check({name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    if is_aligned(inputs) or all_paths == "staged":
        assert_all_same_bits(call(inputs), packed)
    else:  # a stride of zero goes by the staged path, whose sums have another order
        check(inputs)


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_neighbours_do_not_leak(odd: bool) -> None:
    """NaN in all other heads, rows of the batch, and tokens of other sequences changes no bit."""
    inputs = make_inputs("long", lengths=[65, 100, 3, 1], H=2, HV=4, with_state=True, device=DEVICE)
    if odd:
        inputs |= {name: odd_strides(inputs[name]) for name in ("q", "k", "v", "g", "beta")}
    o, final_state, chunk_states = check(inputs)
    begin, end, head = 65, 165, 2  # the second sequence, a value head of the second head
    poisoned = dict(inputs)
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        x = poisoned[name] = inputs[name].clone() if not odd or name == "initial_state" else odd_strides(inputs[name])
        heads = slice(1, 2) if name in ("q", "k") else slice(head, head + 1)
        keep = (slice(1, 2), heads) if name == "initial_state" else (slice(None), slice(begin, end), heads)
        kept = x[keep].clone()
        x.fill_(torch.nan)
        x[keep] = kept
    o_alone, final_alone, states_alone = launch(poisoned)
    assert_same_bits(o_alone[:, begin:end, head], o[:, begin:end, head])
    assert_same_bits(final_alone[1, head], final_state[1, head])
    assert_same_bits(states_alone[:, 2:4, head], chunk_states[:, 2:4, head])
    assert o_alone[:, :begin].isnan().all()


# --- What the kernels do not cover ----------------------------------------------------------------------------------


@all_families
def test_uncovered_inputs_agree_with_the_recurrence(family: str) -> None:
    """fp32 and fp64 activations, other head sizes, a last dimension that is not contiguous: computed all the same (in
    test_forward_contract.py: with one warning)."""
    shape: dict[str, Any] = dict(lengths=[70, 0, 1, 64], H=2, HV=4, with_state=True, device=DEVICE)
    for dtype, limit in ((torch.float32, FP32_RELATIVE_RMSE), (torch.float64, 1e-12)):
        inputs = make_inputs(family, K=64, V=64, dtype=dtype, **shape)
        for actual, expected in zip(run(inputs), reference(inputs), strict=True):
            assert actual.dtype == dtype
            assert relative_rmse(actual, expected) <= limit
    for K, V in ((96, 64), (64, 80), (33, 7), (256, 256)):
        inputs = make_inputs(family, K=K, V=V, **shape)
        assert_contract(inputs, run(inputs), reference(inputs))
    for name in ("q", "k", "v", "g"):
        inputs = make_inputs(family, **shape)
        expected = reference(inputs)
        assert_contract(inputs, run({**inputs, name: spread_last(inputs[name])}), expected)
