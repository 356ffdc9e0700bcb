"""The command line `python -m kda_cuda`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import kda_cuda
from kda_cuda import __main__ as cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must succeed and returns what it printed."""
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must be refused and returns the message."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, sm_count: int) -> None:
    monkeypatch.setattr(cli, "cuda_devices", lambda: [cli.Device("a GPU", capability, sm_count, 80 * 2**30)])


def test_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "kda_cuda", "info"], capture_output=True, text=True, check=True)
    assert kda_cuda.__version__ in result.stdout and torch.__version__ in result.stdout


class TestInfo:
    def test_states_versions_and_architectures(self, capsys):
        text, build = run(capsys, "info"), kda_cuda.build_info()
        for part in (kda_cuda.__version__, torch.__version__, *(f"sm_{a}" for a in build["architectures"])):
            assert part in text

    def test_without_gpu_the_path_is_the_composite_on_the_cpu(self, capsys, monkeypatch):
        without_gpu(monkeypatch)
        text = run(capsys, "info")
        assert "not usable: " in text and "the composite implementation, on the CPU" in text

    def test_devices_are_listed(self, capsys, monkeypatch):
        with_gpu(monkeypatch, 90, 132)
        text = run(capsys, "info")
        assert "a GPU, compute capability 9.0, 132 SMs, 80.00 GiB" in text

    def test_json(self, capsys):
        content = json.loads(run(capsys, "info", "--json"))
        assert content["build"] == kda_cuda.build_info()
        assert content["kernels_usable"] == (content["reason"] is None)

    @pytest.mark.parametrize(
        ("kernels", "torch_cuda", "device", "clause"),
        [
            (False, "13.0", cli.Device("", 90, 132, 0), "built without nvcc"),
            (True, None, None, "is built without CUDA"),
            (True, "13.0", None, "no CUDA device"),
            (True, "13.0", cli.Device("", 80, 108, 0), "Hopper"),
            (True, "13.0", cli.Device("", 90, 132, 0), None),
        ],
    )
    def test_says_why_kernels_are_not_usable(self, monkeypatch, kernels, torch_cuda, device, clause):
        monkeypatch.setattr(cli, "build_info", lambda: {"cuda_kernels": kernels})
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        reason = cli.why_no_kernels(device)
        assert reason is None if clause is None else clause in reason


class TestPlan:
    H200 = ("--device-sms", "132", "--compute-capability", "90")

    def test_assumes_an_h200_without_gpu_and_says_so(self, capsys, monkeypatch):
        without_gpu(monkeypatch)
        text = run(capsys, "plan", "--lengths", "8192", "--heads", "96")
        assert "132 SMs, compute capability 9.0 (an H200 is assumed, there is no GPU here)" in text
        assert "fused: " in text and "grid of fused scan" in text and "132 CTAs, 1.0 for each SM" in text

    def test_fused(self, capsys):
        text = run(capsys, "plan", *self.H200, "--lengths", "8x1024", "--heads", "96")
        assert "fused: " in text and "grid of fused scan" in text and "132 CTAs" in text
        assert "steps" in text and "of 32 tokens, one by one in the chain of a sequence and value head" in text
        assert "66 of 2 CTAs, with 64 columns of V each; the chains are dealt out to them" in text
        assert "4.13 MiB (4326144 bytes)" in text and "gate" in text and "bounded (use_gate" in text
        assert "slots" not in text and "recurrence" not in text and "value tile" not in text

    def test_fused_with_whole_chains(self, capsys):
        """One for each cluster: nothing is handed over, so no memory is taken for that."""
        text = run(capsys, "plan", *self.H200, "--lengths", "8192", "--heads", "132", "--value-dim", "64")
        assert "fused: " in text and "132 of one CTA; the chains are dealt out to them" in text
        assert "grid of fused scan" in text and "132 CTAs" in text and "0 B (0 bytes)" in text

    def test_stepwise(self, capsys):
        text = run(capsys, "plan", *self.H200, "--lengths", "8192", "--heads", "96", "--unbounded-gate")
        assert "stepwise: " in text and "MiB" in text and "not bounded" in text
        assert "of 32 tokens: their factors side by side" in text and "in one piece" in text
        assert "grid of step factors" in text and "grid of state scan" in text
        assert "value tile" not in text and "grid of segment" not in text

    def test_cut(self, capsys):
        arguments = ["--lengths", "65536", "--heads", "4"]
        plan = json.loads(run(capsys, "plan", *self.H200, *arguments, "--json"))["plan"]
        text = run(capsys, "plan", *self.H200, *arguments)
        chunks, slots = plan["segment_chunks"], plan["segment_slots"]
        assert chunks > 0 and f"of {chunks} chunks ({64 * chunks} tokens); {slots} slots" in text
        for stage in ("step factors", "segment summary", "segment composition", "state scan"):
            assert f"grid of {stage}" in text

    def test_fused_cut(self, capsys):
        arguments = ["--lengths", "8192", "--heads", "16"]
        text = run(capsys, "plan", *self.H200, *arguments)
        assert "fused_cut: " in text and "no tokens enlarge one" in text
        assert "66 of 2 CTAs" in text and "leave the others to segments" in text and "tokens); " in text
        for stage in ("fused scan", "step factors", "segment summary", "segment composition", "state scan"):
            assert f"grid of {stage}" in text
        text = run(capsys, "plan", *self.H200, *arguments, "--not-contractive")
        assert "stepwise: " in text and "tokens may enlarge one" in text and "clusters" not in text

    def test_staged(self):
        """No call of `plan` takes it, as that knows no strides."""
        plan = {"path": "staged", "chunk_slots": 128, "chunk_tokens": 64, "value_tile": 64, "segment_chunks": 0}
        rows = dict(cli.cut_rows(plan, 128))
        assert rows["chunks"] == "128 slots of 64 tokens for each value head"
        assert rows["value tile"] == "64 of 128 columns for each CTA of the recurrence"
        assert {"intra_chunk_solve", "state_recurrence", "output_gemm"} < set(cli.STAGE_NAMES)

    def test_uses_the_gpu_that_is_there(self, capsys, monkeypatch):
        with_gpu(monkeypatch, 90, 78)
        assert "78 SMs, compute capability 9.0 (a GPU)" in run(capsys, "plan")

    def test_given_device_wins(self, capsys):
        text = run(capsys, "plan", "--device-sms", "10", "--compute-capability", "80")
        assert "10 SMs, compute capability 8.0 (as given)" in text
        assert "composite: the kernels need a Hopper GPU" in text

    def test_several_lengths_mean_cu_seqlens(self, capsys):
        text = run(capsys, "plan", "--lengths", "1300,547,2x10", "--heads", "4", "--value-heads", "8")
        assert "T = 1867, cu_seqlens, N = 4" in text and "HV = 8" in text

    def test_json_is_the_operators_answer(self, capsys):
        arguments = "--lengths 100 --heads 2 --batch 3 --device-sms 132 --compute-capability 90 --json"
        content = json.loads(run(capsys, "plan", *arguments.split()))
        expected = torch.ops.kda.plan_chunk_fwd([100], 3, 2, 2, 128, 128, "bfloat16", False, 90, 132)
        assert content["plan"] == json.loads(expected)
        assert content["plan"]["chunk_slots"] == 6 and content["call"]["bounded_gate"] is True
        assert content["call"]["contractive"] is True
        unbounded = json.loads(run(capsys, "plan", *arguments.split(), "--unbounded-gate"))
        assert unbounded["call"]["bounded_gate"] is False and unbounded["plan"]["path"] == "stepwise"

    def test_odd_sizes_take_the_composite(self, capsys):
        hopper = ("--compute-capability", "90")
        assert "composite: the kernels cover K" in run(capsys, "plan", "--key-dim", "60", *hopper)
        assert "composite: the kernels take bf16" in run(capsys, "plan", "--dtype", "fp32", *hopper)

    @pytest.mark.parametrize(
        ("arguments", "argument"),
        [
            (["--lengths", "12,x"], "--lengths"),
            (["--lengths", ""], "--lengths"),
            (["--lengths", "-5"], "--lengths"),
            (["--lengths", str(2**40)], "--lengths"),
            (["--heads", "0"], "--heads"),
            (["--heads", "many"], "--heads"),
            (["--heads", "4", "--value-heads", "6"], "--value-heads"),
            (["--lengths", "5,6", "--batch", "2"], "--batch"),
            (["--dtype", "int8"], "--dtype"),
            (["--device-sms", "0"], "--device-sms"),
        ],
    )
    def test_wrong_arguments_are_named(self, capsys, arguments, argument):
        assert f"argument {argument}: " in refused(capsys, "plan", *arguments)


def test_no_command_and_unknown_command_are_refused(capsys):
    assert "required" in refused(capsys)
    assert "invalid choice" in refused(capsys, "fly")


def test_demo_takes_the_demos_arguments(capsys):
    assert cli.main(["demo", "--text", "no/such/file"]) == 2
    assert "no/such/file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1717567488, "1.60 GiB"), (2**60, "1024.00 PiB")],
)
def test_bytes_are_readable(count, text):
    assert cli.bytes_text(count) == text
