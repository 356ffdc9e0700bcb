"""The benchmarks' hygiene: what is timed, on what, and what is left out of the times. On the CPU, with a device that
keeps its own time where times matter.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from bench import board, fla_tuning, implementations, inputs, measure, operators, results, shapes, tables, timing
from bench.devices import CLOCK_FIELDS, HostDevice
from bench.shapes import Shape

TINY = Shape("tiny", (70, 50), 1, 32, 32)


# ---- inputs ----


def test_board_is_complete_and_as_recorded() -> None:
    """The recorded times of the peers are of the board's shapes, and their roofline is ours at their bandwidth."""
    recorded = json.loads(results.RECORDED.read_text())["chunk_fwd"]
    assert list(recorded["us"]) == [shape.name for shape in shapes.BOARD] and len(shapes.BOARD) == 15
    for shape in shapes.BOARD:
        roofline_us = shapes.least_bytes(shape) / 4.3e6
        assert roofline_us == pytest.approx(recorded["us"][shape.name]["roofline"], rel=0.04), shape.name
        for peer in recorded["peers"]:
            for family in inputs.FAMILIES:
                assert results.recorded_us("chunk_fwd", shape.name, peer, family) > roofline_us
    assert len({shape.name for shape in shapes.FORWARD_SHAPES}) == len(shapes.FORWARD_SHAPES)
    assert shapes.least_bytes(Shape("", (1,), 1)) - 2 * 128 * 128 * 4 == 5 * 256 + 2


def test_shapes_by_name_and_lengths() -> None:
    assert shapes.parse_lengths("1300,2x64,7") == (1300, 64, 64, 7)
    assert [s.name for s in shapes.select(shapes.BOARD, ["h4_1024", "h96_8192"])] == ["h96_8192", "h4_1024"]
    with pytest.raises(ValueError, match="h1_1"):
        shapes.select(shapes.BOARD, ["h1_1"])
    for text in ("", "0", "3x", "-1", "0x5"):
        with pytest.raises(ValueError):
            shapes.parse_lengths(text)
    assert Shape("", (1024,) * 8, 1).lengths_text == "8 × 1024" and Shape("", (3, 4), 1).lengths_text == "3, 4"


def test_random_family_forgets_at_once() -> None:
    decays = [inputs.log_decay(inputs.make_inputs(Shape("", (256,), 96), "random", seed, "cpu")) for seed in range(4)]
    assert float(torch.stack(decays).mean()) == pytest.approx(-3.2, abs=0.1)


def test_long_family_has_half_lives_of_1_to_220_tokens() -> None:
    decay = inputs.log_decay(inputs.make_inputs(Shape("", (256,), 32), "long", 0, "cpu"))
    half_lives = (math.log(2) / -decay).flatten().double()[::4]
    low, median, high = half_lives.quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)).tolist()
    assert median == pytest.approx(14, abs=1)
    assert low == pytest.approx(1, abs=0.3) and high == pytest.approx(220, abs=30)


@pytest.mark.parametrize("family", inputs.FAMILIES)
def test_families_are_those_of_the_accuracy_tests(family: str) -> None:
    B, T, HV, K = 1, 40, 3, 16
    generator = torch.Generator().manual_seed(5)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    g, A_log, dt_bias = inputs.bounded_gate(family, (B, T, HV, K), randn, uniform)
    expected = cases._gates(family, B, T, HV, K, torch.Generator().manual_seed(5))
    assert torch.equal(g, expected["g"]) and torch.equal(A_log, expected["A_log"])
    assert torch.allclose(dt_bias, expected["dt_bias"]) and inputs.LOWER_BOUND == expected["lower_bound"]


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match="random, long"):
        inputs.make_inputs(TINY, "steep", 0, "cpu")


def test_inputs_are_raw_and_in_the_types_of_the_board() -> None:
    made = inputs.make_inputs(TINY, "long", 0, "cpu")
    assert {made[name].dtype for name in ("q", "k", "v", "g", "beta")} == {torch.bfloat16}
    assert {made[name].dtype for name in ("A_log", "dt_bias", "initial_state")} == {torch.float32}
    assert made["cu_seqlens"].dtype == torch.int32 and made["cu_seqlens"].tolist() == [0, 70, 120]
    assert "cu_seqlens" not in inputs.make_inputs(Shape("", (64,), 1), "long", 0, "cpu")
    norms = made["q"].float().norm(dim=-1)
    assert float(norms.min()) > 3  # not normalised: about sqrt(32)
    assert made["use_qk_l2norm"] and made["use_gate"] and made["use_beta_sigmoid"] and made["output_final_state"]
    assert made["lower_bound"] == -5.0
    again, other = (inputs.make_inputs(TINY, "long", seed, "cpu") for seed in (0, 1))
    assert torch.equal(made["q"], again["q"]) and not torch.equal(made["q"], other["q"])


# ---- hygiene ----


def _sets(count: int, make: Callable[..., dict[str, Any]] = inputs.make_inputs) -> list[dict[str, Any]]:
    return [make(TINY, "random", seed, "cpu") for seed in range(count)]


def test_rotation_exceeds_the_cache() -> None:
    assert inputs.rotation_sets(100, 0) == 1
    for size in (1, 99, 100, 101, 299, 300, 10**9):
        count = inputs.rotation_sets(size, 100)
        assert count * size >= inputs.L2_MULTIPLE * 100
        assert count == 1 or (count - 1) * size < inputs.L2_MULTIPLE * 100
    h200_l2 = 60 << 20
    for shape in shapes.FORWARD_SHAPES:
        size = shapes.least_bytes(shape) // 2  # about what is read
        assert inputs.rotation_sets(size, h200_l2) * size > h200_l2


def test_hygiene_accepts_what_the_board_makes() -> None:
    sets = _sets(2)
    inputs.check_hygiene(sets, inputs.input_bytes(sets[0]) * 2 // inputs.L2_MULTIPLE)


@pytest.mark.parametrize("name", inputs.RANDOM_TENSORS)
@pytest.mark.parametrize(("spoil", "message"), [(0.0, "zeros"), (1.0, "degenerate"), (math.nan, "not finite")])
def test_hygiene_refuses_degenerate_inputs(name: str, spoil: float, message: str) -> None:
    sets = _sets(2, inputs.make_processed_inputs)
    sets[1][name].fill_(spoil)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        inputs.check_hygiene(sets, 1)


def test_hygiene_refuses_a_few_zeros_too_many() -> None:
    sets = _sets(1)
    sets[0]["v"][:, ::20] = 0
    with pytest.raises(ValueError, match="input v"):
        inputs.check_hygiene(sets, 1)


def test_hygiene_refuses_shared_and_too_few_inputs() -> None:
    sets = _sets(1)
    with pytest.raises(ValueError, match="share buffers"):
        inputs.check_hygiene([sets[0], dict(sets[0])], 1)
    with pytest.raises(ValueError, match="less than 3 L2 caches"):
        inputs.check_hygiene(sets, inputs.input_bytes(sets[0]))


# ---- timing ----


class FakeDevice:
    """A device whose time passes by its own count: a call costs what it says, and more before the device is warm."""

    torch_device = torch.device("cpu")
    l2_bytes = 1000
    asynchronous = True

    def __init__(self, cold_us: float = 0.0) -> None:
        self.us = 0.0  # of the device
        self.seconds = 0.0  # of the host
        self.cold_us = cold_us  # until then everything takes three times as long
        self.recording = False
        self.log: list[str] = []
        self.touched: list[int] = []

    def call(self, cost_us: float, host_us: float = 1.0, first_us: float = 0.0, number: int = 0) -> Callable[[], None]:
        """A call that costs first_us more when it is first run."""
        state = {"first": True}

        def run() -> None:
            self.seconds += host_us * 1e-6
            if self.recording:
                return
            self.us += (cost_us + (first_us if state["first"] else 0.0)) * (3 if self.us < self.cold_us else 1)
            state["first"] = False
            self.touched.append(number)

        return run

    def event(self) -> Any:
        device = self

        class Event:
            us = 0.0

            def record(self) -> None:
                self.us = device.us

            def us_since(self, start: Any) -> float:
                return self.us - start.us

        return Event()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        self.recording = True
        for call in calls:
            call()
        self.recording = False
        self.log.append("capture")

        def replay() -> None:
            self.log.append("replay")
            for call in calls:
                call()

        return replay

    def now(self) -> float:
        return self.seconds

    def clocks(self) -> dict[str, float | None]:
        self.log.append("clocks")
        return dict.fromkeys(CLOCK_FIELDS)


@pytest.mark.parametrize("take", [timing.time_graph, timing.time_events])
@pytest.mark.parametrize("cost_us", [2.0, 700.0, 90_000.0])
def test_warm_up_is_in_no_sample(take: Callable[..., timing.Timing], cost_us: float) -> None:
    device = FakeDevice(cold_us=min(20e3, 2 * cost_us) if take is timing.time_events else 20e3)
    calls = [device.call(cost_us, first_us=1e6, number=i) for i in range(4)]
    found = take(device, calls)
    assert found.us.samples == pytest.approx([cost_us] * len(found.us.samples))
    assert found.us.median == found.us.p10 == found.us.p90 == pytest.approx(cost_us)
    assert found.warmup_calls >= 2 * len(calls)


@pytest.mark.parametrize("take", [timing.time_graph, timing.time_events])
def test_clocks_are_read_right_before_and_after_the_samples(take: Callable[..., timing.Timing]) -> None:
    device = FakeDevice()
    found = take(device, [device.call(500.0)])
    assert set(found.clocks) == {"before", "after"}
    assert all(set(found.clocks[when]) == set(CLOCK_FIELDS) for when in ("before", "after"))
    before, after = (i for i, what in enumerate(device.log) if what == "clocks")
    between = device.log[before + 1 : after]
    assert between[-1] == "synchronize" and "capture" not in between
    assert between.count("synchronize") == 1  # nothing waits between two samples
    if take is timing.time_graph:
        assert device.log.index("capture") < before and "replay" in device.log[:before]
        assert between.count("replay") == len(found.us.samples)


def test_samples_are_long_and_neither_few_nor_many() -> None:
    budget = timing.Budget()
    for cost_us in (1.0, 40.0, 3000.0, 1e6):
        device = FakeDevice()
        found = timing.time_graph(device, [device.call(cost_us)] * 3, budget)
        assert found.calls_per_sample % 3 == 0
        assert found.calls_per_sample * cost_us >= timing.SHORTEST_SAMPLE_US
        assert budget.fewest <= len(found.us.samples) <= budget.most


def test_no_call_finds_its_inputs_in_the_cache() -> None:
    """The order of the graph's calls, run through a cache of least recently used inputs."""
    size = 300
    device = FakeDevice()
    count = inputs.rotation_sets(size, device.l2_bytes)
    timing.time_graph(device, [device.call(10.0, number=i) for i in range(count)])
    cached: OrderedDict[int, None] = OrderedDict()
    for number in device.touched:
        assert number not in cached
        cached[number] = None
        if len(cached) * size > device.l2_bytes:
            cached.popitem(last=False)
    assert set(device.touched) == set(range(count))


def test_host_time_is_of_the_host_alone() -> None:
    device = FakeDevice()
    found = timing.host_time(device, [device.call(5000.0, host_us=12.0), device.call(5000.0, host_us=12.0)])
    assert found.median == pytest.approx(12.0) and len(found.samples) == timing.HOST_REPEATS


def test_host_time_of_the_same_call_by_another_name() -> None:
    """The drop-in takes what the operator takes, returns the same, and its host time stands behind the operator's."""
    shape = Shape("h2_70", (40, 30), 2)
    given = inputs.make_inputs(shape, "long", 0, "cpu")
    call = implementations.OurForward().call(given)
    o, final_state = call.same["chunk_kda"]()
    expected = call.outputs(call.run())
    assert torch.equal(o, expected["o"]) and torch.equal(final_state, expected["final_state"])
    measurement = {"host_us": {"median": 15.12}}
    assert tables.host_text(measurement) == "15.1"
    assert tables.host_text(measurement | {"same_host_us": {"chunk_kda": {"median": 17.04}}}) == "15.1 / 17.0"
    assert tables.host_text({"host_us": None}) == tables.NOTHING


def test_statistics() -> None:
    found = timing.Statistics.of([5, 1, 2, 3, 4])
    assert (found.median, found.min) == (3, 1)
    assert (found.p10, found.p90) == pytest.approx((1.4, 4.6))
    assert timing.Statistics.of([7.0]).p90 == 7.0
    assert found.samples == [5, 1, 2, 3, 4]  # as they came


def test_copy_bandwidth_copies_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: (seen.append(source), copy(self, source))[1])
    samples = timing.copy_bandwidth(HostDevice(), 1 << 16)
    assert len(samples) == timing.COPY_REPEATS and min(samples) > 0
    assert all(float((source != 0).float().mean()) > 0.99 for source in seen) and seen


# ---- implementations and the board ----


def test_forced_paths_come_from_the_operators_that_exist() -> None:
    found = {i.name: i for i in implementations.OurForward.forced()}
    assert "ours_composite" in found and "ours" not in found
    assert all(hasattr(torch.ops.kda, f"chunk_fwd_{i.path}") for i in found.values())
    assert all(i.kind == "forced" for i in found.values())
    assert operators.FORWARD.reference in found


def test_peers_that_are_not_installed_say_so() -> None:
    for implementation in implementations.forward_implementations():
        reason = implementation.unavailable()
        assert reason is None or "install" in reason or "no linear attention" in reason
    assert [i.kind for i in implementations.forward_implementations(peers=False)][0] == "ours"
    assert all(i.kind != "peer" for i in implementations.forward_implementations(peers=False))


class Stub(implementations.Implementation):
    """Ours with a mistake of choice."""

    kind, label = "peer", "stub"

    def __init__(self, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.name, self.runs = name, 0
        self._change = change

    def call(self, made: dict[str, Any]) -> implementations.Call:
        inner = implementations.OurForward().call(made)

        def run() -> Any:
            self.runs += 1
            return inner.run()

        return implementations.Call(run, lambda out: self._change(inner.outputs(out)))


def _raise(_: dict[str, Tensor]) -> dict[str, Tensor]:
    raise RuntimeError("of its own making\nsecond line")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out | {"o": out["o"] * 1.05}, "wrong result.* o "),
        (lambda out: out | {"final_state": out["final_state"].transpose(-1, -2)}, "wrong result.*final_state"),
        (lambda out: out | {"o": out["o"] * math.nan}, "wrong result.* o "),
        (lambda out: out | {"o": out["o"][:, :-1]}, "wrong result.* o "),
        (_raise, "RuntimeError: of its own making$"),
    ],
    ids=["scaled", "transposed state", "nan", "short", "raises"],
)
def test_a_wrong_call_is_not_timed(change: Callable[[Any], Any], message: str) -> None:
    stub = Stub("stub", change)
    ours, quick = implementations.OurForward(), timing.Budget(total_us=0, fewest=2, most=2)
    with torch.no_grad():
        case = measure.measure_case(HostDevice(1), operators.FORWARD, TINY, "long", [ours, stub], quick)
    found = case["measurements"]["stub"]
    assert "gpu" not in found and stub.runs == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found["error"])
    assert "gpu" in case["measurements"]["ours"]
    json.dumps(case, allow_nan=False)


def test_wrong_ours_is_found_by_the_reference() -> None:
    wrong = Stub("ours", lambda out: out | {"o": -out["o"]})
    reference = implementations.OurForward("composite")
    quick = timing.Budget(total_us=0, fewest=2, most=2)
    with torch.no_grad():
        case = measure.measure_case(HostDevice(1), operators.FORWARD, TINY, "random", [wrong, reference], quick)
    assert "wrong result" in case["measurements"]["ours"]["error"]
    assert "gpu" in case["measurements"]["ours_composite"]


def test_declined_shapes_are_not_called() -> None:
    stub = Stub("stub", _raise)
    stub.declines = lambda shape: "K and V must be 128"  # type: ignore[method-assign]
    quick = timing.Budget(total_us=0, fewest=2, most=2)
    with torch.no_grad():
        case = measure.measure_case(
            HostDevice(1), operators.FORWARD, TINY, "long", [implementations.OurForward(), stub], quick
        )
    assert case["measurements"]["stub"] == {"error": "declined: K and V must be 128"} and stub.runs == 0


def test_board_runs_and_writes_everything(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole machinery on the CPU: its numbers say nothing, its file has all there is to have."""
    arguments = ["--device", "cpu", "--operator", "chunk_fwd", "--lengths", "70,50", "--heads", "1"]
    arguments += [
        "--families",
        "long",
        "--results",
        str(tmp_path),
        "--commit",
        "0123456789abcdef-dirty",
        "--note",
        "trial",
    ]
    assert board.main(arguments) == board.EXIT_GOOD
    (path,) = tmp_path.glob("board-*-01234567.json")
    result = results.load(path)
    assert result["commit"] == "0123456789abcdef" and result["dirty"] and result["note"] == "trial"
    assert not result["complete"]
    assert {"torch", "cuda", "triton", "fla", "gpu", "driver", "build"} <= set(result["environment"])
    assert set(result["clocks"]) == {"before", "after"} and set(result["clocks"]["before"]) == set(CLOCK_FIELDS)
    assert len(result["bandwidth_gbps"]["samples"]) == 2 * timing.COPY_REPEATS
    (case,) = result["cases"]
    assert case["lengths"] == [70, 50] and case["plan"]["path"] == "composite"
    bandwidth = result["bandwidth_gbps"]["median"]
    assert case["roofline_us"] == pytest.approx(case["least_bytes"] / bandwidth / 1e3, rel=1e-3)
    assert case["input_sets"] * case["input_bytes"] >= inputs.L2_MULTIPLE * HostDevice().l2_bytes
    for name in ("ours", "ours_composite"):
        found = case["measurements"][name]
        assert max(found["errors"].values()) < measure.CHECK_LIMIT and set(found["errors"]) == {"o", "final_state"}
        assert found["gpu"]["us"]["median"] > 0 and set(found["gpu"]["clocks"]) == {"before", "after"}
        assert len(found["gpu"]["us"]["samples"]) >= 3
    assert case["measurements"]["ours"]["host_us"] is None  # a CPU's call does not return before its work is done
    assert set(result["unavailable"]["chunk_fwd"]) <= {"fla", "flash_kda", "cudnn"}
    output = capsys.readouterr().out
    assert "roofline" in output and str(path.name) in output.replace("\n", "")


@pytest.mark.parametrize(
    "arguments", [["--shapes", "h1_1"], ["--families", "steep"], ["--lengths", "x"], ["--lengths", "5", "--heads", "0"]]
)
def test_board_refuses_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        board.main(["--device", "cpu", *arguments])
    assert stopped.value.code == board.EXIT_USAGE


def test_what_was_measured_is_kept_when_the_device_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure.measure_case

    def fails_late(device: Any, operator: Any, shape: Shape, family: str, *rest: Any) -> dict[str, Any]:
        if family == "long":
            raise RuntimeError("unspecified launch failure")
        return measured(device, operator, shape, family, *rest)

    monkeypatch.setattr(board, "measure_case", fails_late)
    arguments = ["--device", "cpu", "--operator", "chunk_fwd", "--lengths", "40", "--heads", "1"]
    arguments += ["--results", str(tmp_path)]
    assert board.main(arguments) == board.EXIT_WRONG
    result = results.load(results.newest("board", tmp_path, complete=False))
    assert "unspecified launch failure" in result["aborted"] and not result["complete"]
    assert [case["family"] for case in result["cases"]] == ["random"]


def test_choice_of_shapes() -> None:
    def chosen(*arguments: str) -> tuple[list[str], list[str]]:
        _, found, families = board._job(operators.FORWARD, board.make_parser().parse_args(arguments))
        return [shape.name for shape in found], families

    assert chosen() == ([shape.name for shape in shapes.FORWARD_SHAPES], ["random", "long"])
    assert set(chosen("--quick")[0]) == set(shapes.QUICK)
    assert chosen("--only", "h16_65536,h4_1024", "--families", "long") == (["h4_1024", "h16_65536"], ["long"])
    assert chosen("--lengths", "2x7", "--heads", "3")[0] == ["h3_2x7"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_board_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert board.main([]) == board.EXIT_USAGE
    assert "no CUDA device" in capsys.readouterr().err


def test_failures_of_ours_decide_the_exit_status() -> None:
    def result(**measurements: dict[str, Any]) -> dict[str, Any]:
        kinds = {"ours": "ours", "ours_composite": "forced", "fla": "peer"}
        case = {"operator": "chunk_fwd", "shape": "s", "family": "long", "measurements": measurements}
        return {"implementations": {"chunk_fwd": {n: {"kind": k} for n, k in kinds.items()}}, "cases": [case]}

    assert not board._failures_of_ours(result(ours={}, fla={"error": "RuntimeError"}))
    assert not board._failures_of_ours(result(ours={}, ours_composite={"error": "OutOfMemoryError: 1 GiB"}))
    assert board._failures_of_ours(result(ours={}, ours_composite={"error": "wrong result"}))
    assert board._failures_of_ours(result(ours={"error": "OutOfMemoryError"}))


def test_fla_is_compiled_once_for_each_kind_of_kernel() -> None:
    found = fla_tuning.distinct([("chunk_fwd", shape) for shape in shapes.BOARD])
    assert len({(s.heads, s.varlen) for s in shapes.BOARD}) == len(found) == 12
    assert found[0][1].name == "h96_8192" and "h8_4096" in {s.name for _, s in found}
    both = [(name, shape) for name in ("chunk_bwd", "training") for shape in shapes.BACKWARD_BOARD]
    assert fla_tuning.distinct(both) == both


def test_compiling_ahead_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done: list[int] = []
    text = fla_tuning.compile_ahead([("chunk_fwd", TINY)], lambda: done.append(1))
    assert done == [1] and "1 of 1 processes failed" in text and "tiny" in text


def test_stored_fla_configurations_are_used_only_where_they_belong(tmp_path: Any, monkeypatch: Any) -> None:
    for name in ("FLA_CONFIG_DIR", "FLA_CACHE_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fla_tuning, "_identity", lambda: {"gpu": "A", "fla": "1", "triton": "2"})
    use = fla_tuning.use_stored.__wrapped__
    assert "tunes by itself" in use(tmp_path / "none.json")
    file = tmp_path / "fla_tuned.json"
    file.write_text(json.dumps({"identity": {"gpu": "B"}, "kernels": {}}))
    assert "tunes by itself" in use(file) and "FLA_CACHE_MODE" not in fla_tuning.os.environ
    entries = {"kernel_x": {"hash": {"autotune_key": [1], "config": {"kwargs": {}}}}}
    file.write_text(json.dumps({"identity": {"gpu": "A", "fla": "1", "triton": "2"}, "kernels": entries}))
    monkeypatch.setenv("FLA_CONFIG_DIR", "")  # so that what is set here is undone
    monkeypatch.setenv("FLA_CACHE_MODE", "")
    assert use(file) == "stored configurations of fla_tuned.json"
    folder = fla_tuning.Path(fla_tuning.os.environ["FLA_CONFIG_DIR"])
    assert json.loads((folder / "kernel_x.json").read_text())["autotune_entries"] == entries["kernel_x"]
    assert fla_tuning.os.environ["FLA_CACHE_MODE"] == "strict"
