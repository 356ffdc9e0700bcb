"""The board of the backward and of training steps: its shapes, inputs, columns, and what is made of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import bench_results
import pytest
import torch

from bench import backward_implementations, board, inputs, measure, operators, report, results, shapes, timing
from bench.devices import HostDevice
from bench.shapes import Shape

TINY = Shape("tiny", (70, 50), 1, 32, 32)
QUICK = timing.Budget(total_us=0, fewest=2, most=2)
BACKWARD_OPERATORS = (operators.BACKWARD, operators.RAW_BACKWARD, operators.TRAINING)
all_operators = pytest.mark.parametrize("operator", BACKWARD_OPERATORS, ids=lambda operator: operator.name)


def test_shapes_are_those_recorded() -> None:
    """The recorded rooflines are ours at their bandwidth, and a recorded step of training is the sum of its parts."""
    recorded = json.loads(results.RECORDED.read_text())
    backward, training = recorded["chunk_bwd"]["us"], recorded["training"]["us"]
    assert list(backward) == list(training) == [shape.name for shape in shapes.BACKWARD_BOARD]
    for shape in shapes.BACKWARD_BOARD:
        roofline_us = operators.BACKWARD.least_bytes(shape) / 4.3e6
        assert roofline_us == pytest.approx(backward[shape.name]["roofline"], rel=0.02), shape.name
        assert training[shape.name]["fla"] == training[shape.name]["fla_forward"] + backward[shape.name]["fla"]
        assert operators.TRAINING.least_bytes(shape) > operators.BACKWARD.least_bytes(shape)
        assert operators.TRAINING.flop(shape) > operators.BACKWARD.flop(shape) > shapes.flop(shape)
    states = 4 * 128 * 128 * 4
    one = Shape("", (1,), 1)
    assert operators.BACKWARD.least_bytes(one) - states == 3080
    assert operators.RAW_BACKWARD.least_bytes(one) - states == 3080 - 2 * 2 * 129


def test_processed_inputs_are_the_raw_ones_after_their_transforms() -> None:
    raw, processed = (make(TINY, "long", 3, "cpu") for make in (inputs.make_raw_inputs, inputs.make_processed_inputs))
    assert processed["g"].dtype == processed["beta"].dtype == torch.float32
    assert {processed[name].dtype for name in ("q", "k", "v", "do")} == {torch.bfloat16}
    assert processed["dfinal_state"].dtype == torch.float32
    assert processed["dfinal_state"].shape == processed["initial_state"].shape == (2, 1, 32, 32)
    assert not any(name.startswith("use_") or name in ("A_log", "dt_bias", "lower_bound") for name in processed)
    norms = processed["k"].float().norm(dim=-1)
    assert float((norms - 1).abs().max()) < 1e-2
    drawn = ("v", "initial_state", "cu_seqlens", "do", "dfinal_state")
    assert all(torch.equal(raw[name], processed[name]) for name in drawn)
    other = inputs.make_raw_inputs(TINY, "long", 4, "cpu")
    assert not torch.equal(raw["do"], other["do"]) and not torch.equal(raw["do"], raw["v"])


def test_processed_inputs_are_the_same_call() -> None:
    made = [make(TINY, "random", 0, "cpu") for make in (inputs.make_raw_inputs, inputs.make_processed_inputs)]
    raw, processed = (
        torch.ops.kda.chunk_fwd(**{name: x for name, x in given.items() if name not in inputs.OUTPUT_GRADIENTS})
        for given in made
    )
    for a, b in zip(raw[:2], processed[:2], strict=True):
        error = float((a.float() - b.float()).norm() / a.float().norm())
        assert error < measure.CHECK_LIMIT  # q and k are rounded once more


@all_operators
def test_columns(operator: operators.Operator) -> None:
    found = operator.implementations(True)
    assert found[0].name == "ours" and found[0].kind == "ours" and found[0].method == "graph"
    assert operator.reference in [i.name for i in found]
    assert [i.name for i in found if i.kind == "peer"] == ["fla", "fla_saved"][
        : 2 if operator.name == "training" else 1
    ]
    assert all(i.kind != "peer" for i in operator.implementations(False))
    assert all(i.unavailable() is None or "install" in i.unavailable() for i in found)


@all_operators
@pytest.mark.parametrize("family", inputs.FAMILIES)
def test_all_of_ours_are_measured_and_checked(operator: operators.Operator, family: str) -> None:
    columns = operator.implementations(False)
    with torch.no_grad():
        case = measure.measure_case(HostDevice(1), operator, TINY, family, columns, QUICK)
    expected = {"dq", "dk", "dv", "dg", "dbeta", "dinitial_state"}
    expected |= {"ddt_bias"} if operator is operators.RAW_BACKWARD else set()
    expected |= {"o", "final_state"} if operator is operators.TRAINING else set()
    for column in columns:
        found = case["measurements"][column.name]
        assert set(found["errors"]) == expected and found["gpu"]["us"]["median"] > 0, found
        assert set(found["reference_errors"]) == expected
        assert found["output_bytes"] > 0
    assert case["plan"]["path"] == "composite"
    json.dumps(case, allow_nan=False)


def test_a_wrong_gradient_is_not_timed() -> None:
    class Wrong(backward_implementations.OurBackward):
        def call(self, made: dict[str, Any]) -> Any:
            return super().call(made | {"dfinal_state": -made["dfinal_state"]})

    wrong = Wrong()
    wrong.name, wrong.kind = "stub", "peer"
    columns = [backward_implementations.OurBackward(), wrong]
    with torch.no_grad():
        case = measure.measure_case(HostDevice(1), operators.BACKWARD, TINY, "long", columns, QUICK)
    assert "wrong result" in case["measurements"]["stub"]["error"] and "gpu" not in case["measurements"]["stub"]


def test_shapes_by_name_choose_their_operators() -> None:
    def chosen(*arguments: str) -> dict[str, list[str]]:
        jobs = board._jobs(board.make_parser().parse_args(arguments))
        return {operator.name: [shape.name for shape in found] for operator, found, _ in jobs}

    assert chosen("--shapes", "h4_1024") == {"chunk_fwd": ["h4_1024"]}
    names = ("chunk_bwd", "chunk_bwd_raw", "training")
    assert chosen("--shapes", "b12_2048,h4_1024") == {
        "chunk_fwd": ["h4_1024"],
        **dict.fromkeys(names, ["b12_2048"]),
    }
    assert set(chosen()) == set(operators.OPERATORS) == {"chunk_fwd", *names}
    assert chosen("--operator", "training", "--quick") == {"training": list(shapes.BACKWARD_QUICK)}
    with pytest.raises(ValueError, match="b1_1"):
        chosen("--shapes", "b1_1,b12_2048")
    with pytest.raises(ValueError, match="b12_2048"):
        chosen("--operator", "chunk_fwd", "--shapes", "b12_2048")


def with_backward(raw: float = 1.05) -> dict[str, Any]:
    """A run in which the raw backward takes ``raw`` times the processed one."""
    run = bench_results.board()
    for operator in BACKWARD_OPERATORS:
        times = {"ours": 6 * (raw if operator is operators.RAW_BACKWARD else 1), "ours_composite": 90, "fla": 12}
        if operator is operators.TRAINING:
            times |= {"ours_saved": 5, "fla_saved": 11}
        bench_results.add_operator(run, operator, times)
    return run


def test_report_has_the_backward() -> None:
    run = with_backward()
    details, readme = report.details_section(run, "figures/"), report.readme_section(run, "docs/figures/")
    for operator in BACKWARD_OPERATORS:
        assert f"### The {operator.title}" in details
        assert f"| {operator.title} | FLA | random | 2.00× |" in readme or operator is operators.RAW_BACKWARD
    assert all(details.count(f"\n| {shape.name} |") == 3 * 2 + 1 for shape in shapes.BACKWARD_BOARD)
    assert "| b12_2048 | 2048 | 12 | 2.0 | 2.0 |" in details  # of memory: 3 MiB, one of them outputs
    price = "1.05× the time that it takes with processed inputs (geometric mean; worst 1.05×"
    assert price in readme and price in details
    assert "| backward | cuDNN † | random |" in readme and "| forward and backward | FLA † |" not in readme
    assert "3756" in details and "12425" in details and "fla_forward" not in details
    assert not any(shape.name in readme.partition("Of the backward")[0] for shape in shapes.BACKWARD_BOARD)


def test_report_without_the_backward_is_as_before() -> None:
    run = bench_results.board()
    for text in (report.details_section(run, ""), report.readme_section(run, "")):
        assert "ackward" not in text and "b12_2048" not in text


def test_pictures_of_the_backward() -> None:
    shown = report.all_figures(with_backward())
    assert {"chunk_bwd_time.png", "training_time.png"} <= set(shown)
    assert not any(name.startswith("chunk_bwd_raw") for name in shown)


def test_a_run_of_one_operator_is_not_complete(tmp_path: Any) -> None:
    arguments = ["--device", "cpu", "--operator", "chunk_bwd", "--lengths", "40", "--heads", "1"]
    assert board.main([*arguments, "--families", "long", "--results", str(tmp_path)]) == board.EXIT_GOOD
    (path,) = tmp_path.glob("board-*.json")
    assert not results.load(path)["complete"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_reference_of_the_binary_against_finite_differences(tmp_path: Path) -> None:
    """What bench_chunk_bwd checks the kernels with, bench/host_gradients.h."""
    root = results.ROOT
    command = ["g++", "-std=c++17", "-O1", "-I", root / "csrc", "-I", root / "bench"]
    program = tmp_path / "check"
    subprocess.run([*command, root / "tests/host_gradients_check.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
