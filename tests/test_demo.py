"""The demo: what it prints, what it checks, and how it fails."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kda_cuda import demo, demo_report

SMALL = ["--device", "cpu", "--hidden-size", "32", "--heads", "2", "--head-dim", "16", "--repeats", "1"]
NAMES = (
    "one prefill: o",
    "one prefill: final state",
    "pieces: o",
    "pieces: final state",
    "continuity, pieces against one prefill: o",
    "continuity: final state",
    "continuity of the layer with its cache",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße, 世界 — ".encode() * 14 + bytes(range(256)))  # every byte value, not UTF-8
    return path


def test_default_text_is_prose_of_the_package() -> None:
    content = demo.read_text(None)
    assert 16_000 <= len(content) <= 30_000
    words = content.decode("utf-8").lower().split()
    assert len(set(words)) > 900  # prose, not filler
    lines = [line for line in content.decode("utf-8").splitlines() if line]
    assert len(set(lines)) == len(lines)


def test_demo_on_a_small_text(text: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main([*SMALL, "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    tokens = len(text.read_bytes())
    assert f"{tokens} tokens" in printed
    assert "composite" in printed and "does not use the CUDA kernels" in printed and "float32" in printed
    for word in ("one prefill", "in pieces", "GB/s", "of roofline", "error of o", "error of state", "half-lives"):
        assert word in printed, word
    for name in NAMES:
        assert name in printed, name
    assert "BROKEN" not in printed
    assert "within the accuracy contract" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lower-bound", "-5"],
        ["--value-heads", "4"],
        ["--expand-v", "1.5"],
        ["--max-tokens", "1"],
        ["--max-tokens", "64"],
        ["--max-tokens", "300", "--reference-tokens", "70"],
        ["--seed", "7"],
    ],
    ids=" ".join,
)
def test_options(arguments: list[str], text: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main([*SMALL, "--text", str(text), *arguments]) == 0
    printed = capsys.readouterr().out
    if "--reference-tokens" in arguments:
        assert "first 70 tokens" in printed
        assert f"the first 300 of {text.stat().st_size} bytes" in printed


@pytest.mark.parametrize("limits", [demo.Limits(o=0.0), demo.Limits(state=0.0)], ids=["o", "state"])
def test_broken_contract_fails_loudly(limits: demo.Limits, text: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main([*SMALL, "--text", str(text)], limits) == 1
    captured = capsys.readouterr()
    assert "FAILED, the accuracy contract is broken" in captured.err
    assert "BROKEN" in captured.out
    assert "within the accuracy contract" not in captured.out


FAULTS = {  # fault of the operator -> checks that must find it
    "o": NAMES[:1] + NAMES[2:3],
    "nan": NAMES[:1] + NAMES[2:3] + NAMES[4:5],
    "transposed state": NAMES[1:4],
    "state not carried": NAMES[2:6],
    "state of the prefill": (NAMES[1], NAMES[5]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("checked", [[], ["--reference-tokens", "100"]], ids=["all", "100"])
def test_faulty_operator_is_found(
    fault: str, checked: list[str], text: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = demo._Demo.operator

    def faulty(self, inputs, state=None):
        o, final_state = right(self, inputs, None if fault == "state not carried" else state)
        if fault == "transposed state":
            final_state = final_state.transpose(-1, -2).contiguous()  # K = V: no shape tells
        elif fault == "state of the prefill" and state is None:
            final_state = final_state * 1.02
        elif fault == "nan":
            o[:, -1] = torch.nan
        elif fault == "o":
            o[:, ::3] *= 1.02
        return o, final_state

    monkeypatch.setattr(demo._Demo, "operator", faulty)
    assert demo.main([*SMALL, "--text", str(text), *checked]) == 1
    message = capsys.readouterr().err
    assert "FAILED" in message
    if not checked:
        for name in FAULTS[fault]:
            assert f"{name}: " in message


def test_pieces_are_uneven_and_complete() -> None:
    borders = demo.piece_borders(10_000, 777)
    lengths = [end - begin for begin, end in zip(borders, borders[1:], strict=False)]
    assert sum(lengths) == 10_000 and min(lengths) >= 1
    assert 777 in borders
    assert {1, 63, 64, 65} <= set(lengths)
    assert demo.piece_borders(1, 1) == [0, 1]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_written(suffix: str, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"out{suffix}"
    assert demo.main([*SMALL, "--text", str(text), "--plot", str(picture)]) == 0
    head = picture.read_bytes()[:200]
    assert head.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_plot_without_matplotlib(text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert demo.main([*SMALL, "--text", str(text), "--plot", "out.png"]) == 2
    assert "--plot: needs matplotlib" in capsys.readouterr().err


def test_plain_output_without_rich(text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    find, real_import = importlib.util.find_spec, builtins.__import__

    def without_rich(name: str, *args, **kwargs):
        assert not name.startswith("rich")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert demo.main([*SMALL, "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


def test_plain_table_is_aligned() -> None:
    table = demo_report.plain_table("title", ("a", "number"), [("long name", "1"), ("b", "22")])
    rows = ["a          number", "---------  ------", "long name       1", "b              22"]
    assert table.splitlines() == ["title", *rows]


def test_progress_reaches_the_end(capsys: pytest.CaptureFixture) -> None:
    with demo_report.Report().progress("work", 7) as advance:
        for _ in range(7):
            advance(1)
    assert "work: 7 of 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--text", "no/such/file.txt"], "--text"),
        (["--text", "."], "--text"),
        (["--plot", "out.gif"], "--plot"),
        (["--plot", "no/such/folder/out.png"], "--plot"),
        (["--expand-v", "0.33"], "--expand-v"),
        (["--expand-v", "nan"], "--expand-v"),
        (["--expand-v", "inf"], "--expand-v"),
        (["--value-heads", "3"], "--value-heads"),
        (["--lower-bound", "-6"], "--lower-bound"),
        (["--lower-bound", "0"], "--lower-bound"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], name: str, capsys: pytest.CaptureFixture) -> None:
    assert demo.main([*SMALL, *arguments]) == 2
    message = capsys.readouterr().err
    assert f"argument {name}: " in message
    assert "Traceback" not in message


@pytest.mark.parametrize("name", ["--heads", "--head-dim", "--hidden-size", "--max-tokens", "--repeats"])
@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
def test_bad_numbers_are_named(name: str, value: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main([f"{name}={value}"])
    assert stop.value.code == 2
    assert f"argument {name}: " in capsys.readouterr().err


def test_empty_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert demo.main([*SMALL, "--text", str(empty)]) == 2
    assert "argument --text: expected a file with at least one byte" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said(text: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--device", "cuda", "--text", str(text)]) == 2
    assert "argument --device: " in capsys.readouterr().err


def test_arguments_fit_into_another_parser(text: Path) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser.add_subparsers().add_parser("demo"))
    assert demo.run(parser.parse_args(["demo", *SMALL, "--text", str(text)])) == 0


def test_exit_status_of_the_program(text: Path, tmp_path: Path) -> None:
    root = Path(demo.__file__).resolve().parents[1]
    command = [sys.executable, "-m", "kda_cuda.demo", *SMALL, "--text"]
    good = subprocess.run([*command, str(text)], cwd=root, capture_output=True, text=True, timeout=300)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([*command, str(tmp_path / "none")], cwd=root, capture_output=True, text=True, timeout=300)
    assert bad.returncode == 2 and "--text" in bad.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_demo_on_the_gpu(text: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["--device", "cuda", "--text", str(text), "--heads", "4", "--hidden-size", "256"]) == 0
    printed = capsys.readouterr().out
    assert "%" in printed and "bfloat16" in printed and "does not use the CUDA kernels" not in printed
