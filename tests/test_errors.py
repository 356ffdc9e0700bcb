"""Every wrong argument is refused with an error that names it, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_inputs import ARGUMENTS, make_inputs

import kda_cuda

B, T, H, HV, K, V = 2, 70, 2, 4, 16, 24


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


PLAIN: dict[str, Any] = {}
SOFTPLUS: dict[str, Any] = {"gate": "softplus"}
SIGMOID: dict[str, Any] = {"gate": "sigmoid"}
VARLEN: dict[str, Any] = {"lengths": [30, 40]}
STATE: dict[str, Any] = {"with_state": True}
VARLEN_STATE: dict[str, Any] = {"lengths": [30, 40], "with_state": True}
FP64: dict[str, Any] = {"dtype": torch.float64}

# (case, features of the right call, what is changed, argument that the message names, expected, got)
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, str, str]] = [
    # Rank
    ("q_rank", PLAIN, {"q": tensor(B, T, K)}, "q", "4 dimensions [B, T, H, K]", "[2, 70, 16]"),
    ("v_rank", PLAIN, {"v": tensor(T, HV, V)}, "v", "4 dimensions [B, T, HV, V]", "[70, 4, 24]"),
    ("k_rank", PLAIN, {"k": tensor(B, T, H)}, "k", "[B, T, H, K] = [2, 70, 2, 16]", "[2, 70, 2]"),
    ("g_rank", PLAIN, {"g": tensor(B, T, HV)}, "g", "[B, T, HV, K] = [2, 70, 4, 16]", "[2, 70, 4]"),
    ("beta_rank", PLAIN, {"beta": tensor(B, T, HV, 1)}, "beta", "[B, T, HV] = [2, 70, 4]", "[2, 70, 4, 1]"),
    ("state_rank", STATE, {"initial_state": tensor(HV, K, V)}, "initial_state", "[2, 4, 16, 24]", "[4, 16, 24]"),
    ("scalar_q", PLAIN, {"q": tensor()}, "q", "4 dimensions", "[]"),
    # Shape
    ("k_shape", PLAIN, {"k": tensor(B, T, H, K + 1)}, "k", "[2, 70, 2, 16]", "[2, 70, 2, 17]"),
    ("k_tokens", PLAIN, {"k": tensor(B, T - 1, H, K)}, "k", "[2, 70, 2, 16]", "[2, 69, 2, 16]"),
    ("v_tokens", PLAIN, {"v": tensor(B, T + 1, HV, V)}, "v", "[2, 70, HV, V]", "[2, 71, 4, 24]"),
    ("v_batch", PLAIN, {"v": tensor(1, T, HV, V)}, "v", "[2, 70, HV, V]", "[1, 70, 4, 24]"),
    ("g_heads", PLAIN, {"g": tensor(B, T, H, K)}, "g", "[2, 70, 4, 16]", "[2, 70, 2, 16]"),
    ("g_value_size", PLAIN, {"g": tensor(B, T, HV, V)}, "g", "[2, 70, 4, 16]", "[2, 70, 4, 24]"),
    ("beta_heads", PLAIN, {"beta": tensor(B, T, HV * 2)}, "beta", "[2, 70, 4]", "[2, 70, 8]"),
    ("A_log_shape", SOFTPLUS, {"A_log": tensor(HV + 1)}, "A_log", "[HV] = [4]", "[5]"),
    ("A_log_matrix", SOFTPLUS, {"A_log": tensor(2, 2)}, "A_log", "[HV] = [4]", "[2, 2]"),
    ("A_log_scalar", SOFTPLUS, {"A_log": tensor()}, "A_log", "[HV] = [4]", "[]"),
    ("dt_bias_shape", SOFTPLUS, {"dt_bias": tensor(K)}, "dt_bias", "[HV * K] = [64]", "[16]"),
    ("dt_bias_transposed", SOFTPLUS, {"dt_bias": tensor(K, HV)}, "dt_bias", "[HV, K] = [4, 16]", "[16, 4]"),
    ("no_heads", PLAIN, {"q": tensor(B, T, 0, K)}, "q", "at least one head", "[2, 70, 0, 16]"),
    ("no_key_size", PLAIN, {"q": tensor(B, T, H, 0)}, "q", "at least 1 (K >= 1)", "[2, 70, 2, 0]"),
    ("no_value_size", PLAIN, {"v": tensor(B, T, HV, 0)}, "v", "at least 1 (V >= 1)", "[2, 70, 4, 0]"),
    # Head grouping
    ("heads", PLAIN, {"v": tensor(B, T, 3, V)}, "v", "a multiple of H = 2", "HV = 3"),
    ("fewer_value_heads", PLAIN, {"v": tensor(B, T, 1, V)}, "v", "a multiple of H = 2", "HV = 1"),
    ("no_value_heads", PLAIN, {"v": tensor(B, T, 0, V)}, "v", "a multiple of H = 2", "HV = 0"),
    # State shape and layout
    ("state_layout", STATE, {"state_v_first": True}, "initial_state", "[N, HV, V, K] (state_v_first) = [2, 4, 24, 16]", "16, 24]"),
    ("state_layout_k", STATE, {"initial_state": tensor(B, HV, V, K)}, "initial_state", "[N, HV, K, V] = [2, 4, 16, 24]", "24, 16]"),
    ("state_heads", STATE, {"initial_state": tensor(B, H, K, V)}, "initial_state", "[2, 4, 16, 24]", "[2, 2, 16, 24]"),
    ("state_count", STATE, {"initial_state": tensor(3, HV, K, V)}, "initial_state", "[2, 4, 16, 24]", "[3, 4, 16, 24]"),
    ("state_count_varlen", VARLEN_STATE, {"initial_state": tensor(1, HV, K, V)}, "initial_state", "[2, 4, 16, 24]", "[1, 4,"),
    # Types
    ("q_int", PLAIN, {"q": tensor(B, T, H, K, dtype=torch.int32)}, "q", "bfloat16, float16, float32 or float64", "int32"),
    ("q_fp8", PLAIN, {"q": tensor(B, T, H, K, dtype=torch.float8_e4m3fn)}, "q", "bfloat16, float16", "Float8_e4m3fn"),
    ("q_complex", PLAIN, {"q": tensor(B, T, H, K, dtype=torch.complex64)}, "q", "bfloat16, float16", "Complex"),
    ("k_type", PLAIN, {"k": tensor(B, T, H, K, dtype=torch.bfloat16)}, "k", "float32 as `q` has", "bfloat16"),
    ("v_type", PLAIN, {"v": tensor(B, T, HV, V, dtype=torch.float16)}, "v", "float32 as `q` has", "float16"),
    ("g_type", PLAIN, {"g": tensor(B, T, HV, K, dtype=torch.int64)}, "g", "bfloat16, float16 or float32", "int64"),
    ("g_wide", PLAIN, {"g": tensor(B, T, HV, K, dtype=torch.float64)}, "g", "bfloat16, float16 or float32", "float64"),
    ("beta_type", PLAIN, {"beta": tensor(B, T, HV, dtype=torch.bool)}, "beta", "bfloat16, float16 or float32", "Bool"),
    ("A_log_type", SOFTPLUS, {"A_log": tensor(HV, dtype=torch.bfloat16)}, "A_log", "float32", "bfloat16"),
    ("dt_bias_type", SOFTPLUS, {"dt_bias": tensor(HV * K, dtype=torch.float16)}, "dt_bias", "float32", "float16"),
    ("state_type", STATE, {"initial_state": tensor(B, HV, K, V, dtype=torch.float16)}, "initial_state", "float32 or bfloat16", "float16"),
    ("state_wide", STATE, {"initial_state": tensor(B, HV, K, V, dtype=torch.float64)}, "initial_state", "float32 or bfloat16", "float64"),
    ("fp64_k", FP64, {"k": tensor(B, T, H, K)}, "k", "float64 as `q` has", "float32"),
    ("cu_type", VARLEN, {"cu_seqlens": torch.tensor([0.0, 70.0])}, "cu_seqlens", "int32 or int64", "float32"),
    ("cu_short", VARLEN, {"cu_seqlens": torch.tensor([0, 70], dtype=torch.int16)}, "cu_seqlens", "int32 or int64", "Short"),
    # Devices and layouts of memory
    ("k_device", PLAIN, {"k": tensor(B, T, H, K).to("meta")}, "k", "cpu as `q` is", "meta"),
    ("v_device", PLAIN, {"v": tensor(B, T, HV, V).to("meta")}, "v", "cpu as `q` is", "meta"),
    ("g_device", PLAIN, {"g": tensor(B, T, HV, K).to("meta")}, "g", "cpu as `q` is", "meta"),
    ("beta_device", PLAIN, {"beta": tensor(B, T, HV).to("meta")}, "beta", "cpu as `q` is", "meta"),
    ("A_log_device", SOFTPLUS, {"A_log": tensor(HV).to("meta")}, "A_log", "cpu as `q` is", "meta"),
    ("dt_bias_device", SOFTPLUS, {"dt_bias": tensor(HV * K).to("meta")}, "dt_bias", "cpu as `q` is", "meta"),
    ("state_device", STATE, {"initial_state": tensor(B, HV, K, V).to("meta")}, "initial_state", "cpu as `q` is", "meta"),
    ("cu_device", VARLEN, {"cu_seqlens": torch.tensor([0, 70]).to("meta")}, "cu_seqlens", "cpu as `q` is", "meta"),
    # cu_seqlens
    ("cu_start", VARLEN, {"cu_seqlens": torch.tensor([1, 30, 70])}, "cu_seqlens", "start at 0", "1"),
    ("cu_decreasing", VARLEN, {"cu_seqlens": torch.tensor([0, 40, 30, 70])}, "cu_seqlens", "never decrease", "40 at index 1 and 30 at index 2"),
    ("cu_negative", VARLEN, {"cu_seqlens": torch.tensor([0, -1, 70])}, "cu_seqlens", "never decrease", "-1 at index 1"),
    ("cu_end", VARLEN, {"cu_seqlens": torch.tensor([0, 30, 69])}, "cu_seqlens", "end at T = 70", "69"),
    ("cu_beyond", VARLEN, {"cu_seqlens": torch.tensor([0, 30, 71], dtype=torch.int32)}, "cu_seqlens", "end at T = 70", "71"),
    ("cu_no_sequence", VARLEN, {"cu_seqlens": torch.tensor([0])}, "cu_seqlens", "end at T = 70", "0"),
    ("cu_empty", VARLEN, {"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "cu_seqlens", "at least 1 element", "[0]"),
    ("cu_rank", VARLEN, {"cu_seqlens": torch.tensor([[0, 70]])}, "cu_seqlens", "1 dimension [N + 1]", "[1, 2]"),
    ("cu_batch", PLAIN, {"cu_seqlens": torch.tensor([0, 70])}, "q", "B = 1 with `cu_seqlens`", "2"),
    ("cu_strided", VARLEN, {"cu_seqlens": torch.tensor([0, 9, 30, 9, 60, 9])[::2]}, "cu_seqlens", "end at T = 70", "60"),
    # Gate, beta, scale
    ("lower_bound_low", SIGMOID, {"lower_bound": -5.5}, "lower_bound", "[-5, 0)", "-5.5"),
    ("lower_bound_zero", SIGMOID, {"lower_bound": 0.0}, "lower_bound", "[-5, 0)", "0"),
    ("lower_bound_positive", SIGMOID, {"lower_bound": 3.0}, "lower_bound", "[-5, 0)", "3"),
    ("lower_bound_nan", SIGMOID, {"lower_bound": float("nan")}, "lower_bound", "[-5, 0)", "nan"),
    ("missing_A_log", SOFTPLUS, {"A_log": None}, "A_log", "[HV] = [4]", "None"),
    ("A_log_unused", SOFTPLUS, {"use_gate": False}, "A_log", "None without use_gate", "a tensor"),
    ("dt_bias_unused", PLAIN, {"dt_bias": tensor(HV * K)}, "dt_bias", "None without use_gate", "a tensor"),
    ("lower_bound_unused", PLAIN, {"lower_bound": -5.0}, "lower_bound", "None without use_gate", "-5"),
    ("neg_eigval", PLAIN, {"allow_neg_eigval": True}, "allow_neg_eigval", "False without use_beta_sigmoid", "True"),
    ("scale_nan", PLAIN, {"scale": float("nan")}, "scale", "finite", "nan"),
    ("scale_inf", PLAIN, {"scale": float("inf")}, "scale", "finite", "inf"),
]  # fmt: skip


OPERATORS = (torch.ops.kda.chunk_fwd, torch.ops.kda.check_chunk_fwd, torch.ops.kda.chunk_fwd_composite)


@pytest.mark.parametrize(
    ("features", "wrong", "argument", "expected", "got"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_wrong_argument(
    features: dict[str, Any], wrong: dict[str, Any], argument: str, expected: str, got: str
) -> None:
    inputs = make_inputs(B, T, H, HV, K, V, **features)
    torch.ops.kda.check_chunk_fwd(**inputs)  # right as it stands
    for operator in OPERATORS:
        with pytest.raises(RuntimeError) as error:
            operator(**{**inputs, **wrong})
        message = str(error.value)
        assert message.startswith(f"kda::chunk_fwd: argument `{argument}`: expected "), message
        assert expected in message.split(", got ")[0] + ", got ", message
        assert got in message.split(", got ", 1)[1], message


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_sparse_tensor(name: str) -> None:
    inputs = make_inputs(B, T, H, HV, K, V)
    inputs[name] = inputs[name].to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        torch.ops.kda.check_chunk_fwd(**inputs)
    assert f"argument `{name}`: expected a dense (strided) tensor" in str(error.value) or "Sparse" in str(error.value)


def test_wrong_argument_under_autograd_and_compile() -> None:
    """The same error wherever the call comes from."""
    inputs = make_inputs(B, T, H, HV, K, V, requires_grad=True)
    inputs["beta"] = tensor(B, T, HV + 1)
    message = r"argument `beta`: expected shape \[B, T, HV\] = \[2, 70, 4\], got \[2, 70, 5\]"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kda.chunk_fwd(**inputs)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(torch.ops.kda.chunk_fwd, backend="aot_eager", fullgraph=True)(**inputs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"do": tensor(B, T, HV, V + 1)},
            r"`do`: expected shape \[B, T, HV, V\] = \[2, 70, 4, 24\], got \[2, 70, 4, 25\]",
        ),
        ({"do": tensor(B, T, HV, V, dtype=torch.int32)}, "`do`: expected dtype bfloat16, .* or float64, got int32"),
        (
            {"dfinal_state": tensor(B, HV, V, K)},
            r"`dfinal_state`: expected shape \[N, HV, K, V\] = \[2, 4, 16, 24\], got",
        ),
    ],
)
def test_wrong_gradient(wrong: dict[str, Any], message: str) -> None:
    inputs = make_inputs(B, T, H, HV, K, V)
    right = {"do": tensor(B, T, HV, V), "dfinal_state": tensor(B, HV, K, V)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kda.chunk_bwd(**{**right, **wrong}, **inputs)


def test_wrong_argument_of_the_backward() -> None:
    inputs = make_inputs(B, T, H, HV, K, V)
    inputs["g"] = tensor(B, T, H, K)
    with pytest.raises(RuntimeError, match="argument `g`"):
        torch.ops.kda.chunk_bwd(tensor(B, T, HV, V), None, **inputs)


def test_not_a_tensor() -> None:
    inputs = make_inputs(B, T, H, HV, K, V)
    for name in ARGUMENTS[:5]:
        with pytest.raises(RuntimeError, match=f"argument `{name}`: expected a tensor, got None"):
            torch.ops.kda.chunk_fwd(**{**inputs, name: None})


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [([1, 70], "start at 0"), ([0, 9, 8, 70], "never decrease"), ([0, 69], "end at T = 70, got 69")],
)
def test_host_copy_of_cu_seqlens(cu_seqlens: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kda.check_cu_seqlens(torch.tensor(cu_seqlens), 70)


def test_cu_seqlens_op_refuses_what_is_no_cu_seqlens() -> None:
    with pytest.raises(RuntimeError, match="dtype int32 or int64"):
        torch.ops.kda.check_cu_seqlens(torch.tensor([0.0, 70.0]), 70)
    with pytest.raises(RuntimeError, match="1 dimension"):
        torch.ops.kda.check_cu_seqlens(torch.tensor(0), 70)
    with pytest.raises(RuntimeError, match="at least 1 element"):
        torch.ops.kda.check_cu_seqlens(torch.tensor([], dtype=torch.int32), 70)


def test_missing_library(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kda_cuda._extension, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="pip install"):
        kda_cuda._extension._load()
    (tmp_path / kda_cuda._extension.LIBRARY_NAME).write_text("not a library")
    with pytest.raises(ImportError, match="cannot load"):
        kda_cuda._extension._load()
