"""examples/train_lm.py: it trains, writes, and says what is wrong with its arguments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
from examples import train_lm

SMALL = ["--device", "cpu", "--layers", "1", "--hidden-size", "32", "--heads", "2", "--head-dim", "16", "--batch", "4"]
SMALL += ["--tokens", "64", "--no-compile"]
SIZE = train_lm.Size(layers=2, hidden_size=32, heads=2, head_dim=16, batch=3, tokens=48, steps=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text that repeats itself: easy to learn."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    return path


def test_loss_falls_and_text_follows(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    arguments = [*SMALL, "--text", str(text), "--steps", "40", "--write", "20", "--plot", str(picture)]
    assert train_lm.main(arguments) == train_lm.EXIT_GOOD
    output = capsys.readouterr().out
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) nats", output).groups())
    assert last < 0.7 * first
    assert "goes on" in output and picture.stat().st_size > 0


def test_gradients_reach_every_parameter() -> None:
    """In all blocks, and finite: the operator's own gradients are among them."""
    torch.manual_seed(0)
    model = train_lm.ByteModel(SIZE)
    tokens = torch.randint(train_lm.BYTES, (SIZE.batch, SIZE.tokens + 1))
    model.loss(tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name == "embedding.weight", name


def test_bytes_one_by_one_are_those_of_one_run() -> None:
    """Logits from carried states, byte by byte, are those of a run over the whole."""
    torch.manual_seed(0)
    model = train_lm.ByteModel(SIZE).eval()
    tokens = torch.randint(train_lm.BYTES, (1, 40))
    with torch.no_grad():
        expected = model(tokens)
        cache = train_lm.KDACache()
        pieces = [model(tokens[:, :30], cache)] + [model(tokens[:, i : i + 1], cache) for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_same_seed_same_losses(text: Path) -> None:
    content = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    size = train_lm.Size(**{**vars(SIZE), "steps": 3})
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = train_lm.ByteModel(size)
        runs.append(train_lm.train(model, content, size, torch.device("cpu"), 1e-3, compiled=False, seed=2))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no such file"], "argument --text: cannot read"),
        (["--tokens", "100000"], "argument --text: expected more than --tokens = 100000 bytes"),
        (["--plot", "no/such/folder/x.png"], "argument --plot: no such folder"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments if "--text" in arguments else [*arguments, "--text", str(text)]
    assert train_lm.main([*SMALL, *given]) == train_lm.EXIT_USAGE
    assert message in capsys.readouterr().err


def test_steps_must_be_positive() -> None:
    with pytest.raises(SystemExit) as refused:
        train_lm.main([*SMALL, "--steps", "0"])
    assert refused.value.code == train_lm.EXIT_USAGE
