"""The tools of the GPU round, as far as no GPU is needed: what the sanitizer set covers, and how a round is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if not TOOLS.is_dir():
    pytest.skip("the tools are in the source tree only", allow_module_level=True)
sys.path.append(str(TOOLS))

import gpu_round  # noqa: E402
import sanitizer_cases  # noqa: E402

SM_COUNT = 132


# --- The sanitizer set ----------------------------------------------------------------------------------------------


def staged_value_tile(inputs: dict[str, Any]) -> int:
    """V columns of a CTA of the recurrences: of the staged path and of the backward, which are planned alike."""
    (B, T, H, K), (HV, V) = inputs["q"].shape, inputs["v"].shape[2:]
    packed = "cu_seqlens" in inputs
    lengths = inputs["cu_seqlens"].diff().tolist() if packed else [T]
    dtype = str(inputs["q"].dtype).removeprefix("torch.")
    plan = json.loads(torch.ops.kda.plan_chunk_bwd(lengths, B, H, HV, K, V, dtype, packed, 90, SM_COUNT, False, False))
    assert plan["path"] == "staged"
    return plan["value_tile"]


def longest_sequence(inputs: dict[str, Any]) -> int:
    return int(inputs["cu_seqlens"].diff().max()) if "cu_seqlens" in inputs else inputs["q"].shape[1]


def covering_cases(path: str) -> list[tuple[sanitizer_cases.Case, dict[str, Any]]]:
    """Cases of a path whose results are checked and that have tokens, with their inputs."""
    chosen = [case for case in sanitizer_cases.cases() if case.path == path and not case.is_wrong]
    calls = [(case, sanitizer_cases.make_call(case)) for case in chosen]
    return [(case, inputs) for case, inputs in calls if inputs["q"].numel()]


def kind_of_gate(inputs: dict[str, Any]) -> str:
    return "log" if not inputs.get("use_gate") else "softplus" if "lower_bound" not in inputs else "sigmoid"


def test_cases_cover_every_instantiation() -> None:
    solve, recurrence = set(), set()
    names = [case.name for case in sanitizer_cases.cases()]
    assert len(names) == len(set(names))
    for case, inputs in covering_cases("staged"):
        K, V = inputs["q"].shape[3], inputs["v"].shape[3]
        solve.add((K, V, inputs["q"].dtype, case.odd))
        if longest_sequence(inputs) > 4 * 64:  # the ring has four stages at most
            recurrence.add((K, staged_value_tile(inputs)))
    head_sizes, dtypes = (64, 128), (torch.bfloat16, torch.float16)
    assert solve == {(K, V, d, odd) for K in head_sizes for V in head_sizes for d in dtypes for odd in (False, True)}
    assert recurrence == {(K, tile) for K in head_sizes for tile in (64, 128)}


def test_cases_cover_every_instantiation_of_the_fused_kernel() -> None:
    """Each goes round its ring of four stages twice, hands a chain over and ends with a step that is not full."""
    step_tokens, stages = 32, 4
    scan, gates, levels, counts = set(), set(), set(), set()
    for case, inputs in covering_cases("fused"):
        (B, T, _, K), (HV, V) = inputs["q"].shape, inputs["v"].shape[2:]
        assert case.segment_chunks is None, case.name
        counts.add(case.clusters)
        if case.clusters and "cu_seqlens" not in inputs:
            steps_of_cluster = B * HV * -(-T // step_tokens) // case.clusters
            if steps_of_cluster > 2 * stages and B * HV % case.clusters and T % step_tokens:
                scan.add((K, V, inputs["q"].dtype))
        kind = kind_of_gate(inputs)
        gates.add((kind, K, inputs["g"].dtype == torch.float32))
        if kind != "sigmoid":  # steps that decay too far for one reference
            levels.add((K, inputs["use_qk_l2norm"]))
    head_sizes, dtypes = (64, 128), (torch.bfloat16, torch.float16)
    assert scan == {(K, V, dtype) for K in head_sizes for V in head_sizes for dtype in dtypes}
    assert counts >= {None, 1, 2, 3, 5}
    kinds = ("log", "softplus", "sigmoid")
    assert gates == {(kind, K, is_fp32) for kind in kinds for K in head_sizes for is_fp32 in (False, True)}
    assert levels == {(K, normalised) for K in head_sizes for normalised in (False, True)}


def test_cases_cover_every_instantiation_of_the_stepwise_kernels() -> None:
    """A scan that is not cut goes round its ring and ends with a step that is not full; a cut has four segments."""
    step_tokens, stages = 32, 7  # of the deepest ring
    factors, rings, cuts, gates, levels, faded = set(), set(), set(), set(), set(), set()
    for case, inputs in covering_cases("stepwise"):
        K, V, dtype, longest = inputs["q"].shape[3], inputs["v"].shape[3], inputs["q"].dtype, longest_sequence(inputs)
        kind = kind_of_gate(inputs)
        assert case.segment_chunks is not None and case.clusters is None, case.name
        factors.add((K, dtype))
        gates |= {(kind, K), (kind, inputs["g"].dtype)}
        if kind != "sigmoid":
            levels.add((K, inputs["use_qk_l2norm"]))
        if case.segment_chunks == 0 and longest > stages * step_tokens and longest % step_tokens:
            rings.add((K, V))
        if case.segment_chunks and longest > 3 * 64 * case.segment_chunks:
            cuts.add((K, V, dtype))
        if case.segment_chunks and case.features.get("family") == "random":
            faded.add((inputs["use_qk_l2norm"], inputs["use_beta_sigmoid"]))
    head_sizes, dtypes = (64, 128), (torch.bfloat16, torch.float16)
    assert factors == {(K, dtype) for K in head_sizes for dtype in dtypes}
    assert rings == {(K, V) for K in head_sizes for V in head_sizes}
    assert cuts == {(K, V, dtype) for K in head_sizes for V in head_sizes for dtype in dtypes}
    kinds, gate_dtypes = ("log", "softplus", "sigmoid"), (torch.float32, torch.bfloat16, torch.float16)
    assert {(kind, K) for kind in kinds for K in head_sizes} <= gates
    assert {("sigmoid", dtype) for dtype in gate_dtypes} <= gates
    assert {(kind, torch.float32) for kind in kinds} <= gates
    assert levels == {(K, normalised) for K in head_sizes for normalised in (False, True)}
    assert faded == {(True, True), (False, True), (True, False)}  # assumed where keys and beta allow it, else not


def test_cases_cover_every_instantiation_of_the_fused_kernel_that_cuts() -> None:
    """Stretches of at least five steps, more clusters than chains; gates that forget and gates that do not."""
    cuts, families = set(), set()
    for case, inputs in covering_cases("fused_cut"):
        (B, T, _, K), (HV, V) = inputs["q"].shape, inputs["v"].shape[2:]
        assert inputs["use_qk_l2norm"] and inputs["use_beta_sigmoid"], case.name
        families.add((case.features.get("family", "long"), "cu_seqlens" in inputs))
        if "cu_seqlens" not in inputs and B * HV < case.clusters and B * HV * -(-T // 32) // case.clusters >= 5:
            cuts.add((K, V, inputs["q"].dtype))
    assert cuts == {(K, V, d) for K in (64, 128) for V in (64, 128) for d in (torch.bfloat16, torch.float16)}
    assert families == {(family, packed) for family in ("random", "long") for packed in (False, True)}


def test_fused_cases_hand_over_sequences_of_any_length() -> None:
    """Packed calls with empty sequences and with more sequences than a CTA has threads, on several clusters."""
    threads = 384
    lengths = [inputs["cu_seqlens"].diff() for case, inputs in covering_cases("fused") if "cu_seqlens" in inputs]
    assert any(x.numel() > threads for x in lengths)
    assert sum(bool((x == 0).any()) for x in lengths) >= 4


def test_the_number_of_cases_is_moderate() -> None:
    """racecheck takes the better part of a second for each."""
    assert len(sanitizer_cases.cases()) <= 200


def test_cases_cover_every_instantiation_of_the_forward_that_saves() -> None:
    calls = [inputs for _, inputs in covering_cases("saving")]
    covered = {(inputs["q"].shape[3], inputs["v"].shape[3], inputs["q"].dtype) for inputs in calls}
    assert covered == {(K, V, d) for K in (64, 128) for V in (64, 128) for d in (torch.bfloat16, torch.float16)}
    assert any("cu_seqlens" in inputs for inputs in calls)


@pytest.mark.parametrize("path", ["fused", "fused_cut", "stepwise"])
def test_cases_of_the_copy_engine_are_aligned(path: str) -> None:
    """Others these paths do not take: rows of q, k, v and g start at multiples of 16 bytes."""
    for case, inputs in covering_cases(path):
        for name in ("q", "k", "v", "g"):
            x = inputs[name]
            places = (x.storage_offset(), *x.stride()[:-1])
            assert all(place * x.element_size() % 16 == 0 for place in places), f"{case.name}: {name}"


def test_copies_keep_strides_and_own_their_storage() -> None:
    x = sanitizer_cases.odd_layout(torch.randn(2, 5, 3, 4))
    copy = sanitizer_cases.to_device(x, "cpu")
    assert copy.stride() == x.stride() and copy.storage_offset() == x.storage_offset() == 1
    assert torch.equal(copy, x)
    for shape in ((0,), (2, 0, 3)):
        assert sanitizer_cases.to_device(torch.empty(shape), "cpu").shape == shape


def test_cases_run_on_the_cpu() -> None:
    names = "K64_V128_float16_odd,packed_int32,no_tokens,gate_unbounded,wrong_beyond,fused_not_normalised_unbounded_K64"
    names += ",saving_packed,stepwise_packed_cut,stepwise_wrong_cut_beyond"
    command = [sys.executable, TOOLS / "sanitizer_cases.py", "--device", "cpu", "--only", names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "9 of 9 cases right" in result.stdout


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in sanitizer_cases.cases() if case.name == "packed_int32")
    real = sanitizer_cases.kda_cuda.chunk_fwd

    def off(**inputs: Any) -> tuple[torch.Tensor, ...]:
        o, final_state, chunk_states = real(**inputs)
        o[0, 70, 0, 3] += 1.0
        return o, final_state, chunk_states

    assert sanitizer_cases.run_case(case, "cpu") == ""
    monkeypatch.setattr(sanitizer_cases.kda_cuda, "chunk_fwd", off)
    assert sanitizer_cases.run_case(case, "cpu").startswith("o misses by ")


# --- The round ------------------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n 0.1 s  a  right\n12 of 12 cases right\n========= ERROR SUMMARY: 0 errors\n"
RACE_CLEAN = "12 of 12 cases right\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("status", "log", "ok", "said"),
    [
        (0, CLEAN, True, "0 errors; 12 of 12 results right"),
        (0, RACE_CLEAN, True, "0 hazards displayed (0 errors, 0 warnings); 12 of 12 results right"),
        (86, CLEAN.replace("0 errors", "3 errors"), False, "3 errors; 12 of 12 results right"),
        (0, CLEAN.replace("0 errors", "3 errors"), False, "3 errors; 12 of 12 results right"),
        (0, RACE_CLEAN.replace("0 hazards", "1 hazards"), False, "1 hazards displayed"),
        (1, CLEAN.replace("12 of 12", "11 of 12"), False, "0 errors; 11 of 12 results right"),
        (1, CLEAN, False, "0 errors"),
        (0, "12 of 12 cases right\n", False, "did not run to its end, exit status 0"),
        (255, "========= Error: Device not supported\n", False, "exit status 255: Error: Device not supported"),
    ],
)
def test_judgement_of_a_sanitizer(status: int, log: str, ok: bool, said: str) -> None:
    outcome = gpu_round.judge_sanitizer(status, log)
    assert outcome.ok == ok
    assert said in outcome.said


@pytest.mark.parametrize(
    ("status", "counts", "ok", "said"),
    [
        (0, 'tests="9" failures="0" errors="0" skipped="2"', True, "7 passed, 0 failed, 2 skipped"),
        (1, 'tests="9" failures="1" errors="1" skipped="2"', False, "5 passed, 2 failed, 2 skipped"),
        (0, 'tests="2" failures="0" errors="0" skipped="2"', False, "there is nothing that ran"),
        (139, 'tests="2" failures="0" errors="0" skipped="0"', False, "exit status 139"),
    ],
)
def test_judgement_of_the_tests(tmp_path: Path, status: int, counts: str, ok: bool, said: str) -> None:
    junit = tmp_path / "tests.xml"
    judge = gpu_round.judge_tests(junit)
    assert not judge(0, "").ok  # no file
    junit.write_text(f"<testsuites><testsuite {counts}></testsuite></testsuites>")
    outcome = judge(status, "")
    assert outcome.ok == ok and said in outcome.said


def fake_part(name: str, code: str, folder: Path, judge: Any = gpu_round.judge_status, timeout: float = 60.0) -> Any:
    return gpu_round.Part(name, [sys.executable, "-c", code], folder / f"{name}.log", timeout, judge)


def run_fake_round(monkeypatch: pytest.MonkeyPatch, codes: dict[str, str], *arguments: str) -> int:
    """A round whose parts are small programs."""
    monkeypatch.setattr(gpu_round, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_round, "tests_part", lambda args: fake_part("tests", codes["tests"], args.output))
    monkeypatch.setattr(
        gpu_round,
        "sanitizer_part",
        lambda tool, _, args: fake_part(tool, codes.get(tool, "print('quiet')"), args.output),
    )
    monkeypatch.setattr(gpu_round, "board_part", lambda args, quick: fake_part("board", codes["board"], args.output))
    return gpu_round.main(list(arguments))


GOOD = {"tests": "print('tests')", "board": "print('board')"}


def test_a_good_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run_fake_round(monkeypatch, GOOD, "--output", str(tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"] and set(summary["parts"]) == set(gpu_round.PARTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "board.log",
        "sanitizer.log",
        "summary.json",
        "tests.log",
    ]
    assert (tmp_path / "sanitizer.log").read_text().count("quiet") == 8  # in the command and in its output
    assert "FAILED" not in capsys.readouterr().out


def test_a_bad_part_fails_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    codes = GOOD | {"initcheck": "print('the reason'); raise SystemExit(3)"}
    assert run_fake_round(monkeypatch, codes, "--output", str(tmp_path), "--one-by-one") == 1
    text = capsys.readouterr().out
    assert "the end of initcheck.log" in text and "the reason" in text
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [name for name, part in parts.items() if not part["ok"]] == ["initcheck"]


def test_a_part_that_hangs_is_ended(tmp_path: Path) -> None:
    this = gpu_round.Round(gpu_round.parse_arguments(["--output", str(tmp_path)]))
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    part = fake_part("tests", code, tmp_path, timeout=1.5)
    this.run([part])
    assert not part.outcome.ok and "ended after" in part.outcome.said
    assert part.seconds < 20


def test_parts_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    output = ("--output", str(tmp_path))
    assert run_fake_round(monkeypatch, GOOD, *output, "--only", "sanitizer", "--skip", "racecheck") == 0
    assert list(json.loads((tmp_path / "summary.json").read_text())["parts"]) == ["memcheck", "initcheck", "synccheck"]
    with pytest.raises(SystemExit):
        gpu_round.main([*output, "--only", "nonsense"])
    assert "unknown part 'nonsense'" in capsys.readouterr().err


def test_a_missing_sanitizer_fails_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_round, "find_sanitizer", lambda: None)
    assert gpu_round.main(["--output", str(tmp_path), "--only", "memcheck"]) == 2
    assert "not found" in (tmp_path / "sanitizer.log").read_text()
