"""Trains a small byte-level language model of KimiDeltaAttention layers on a text, and lets it write.

    python -m examples.train_lm                        a tiny model on a CPU (about a minute), a useful one on a GPU
    python -m examples.train_lm --text FILE            any file; its bytes are the tokens
    python -m examples.train_lm --plot loss.png        also draws the loss

From the root of the source tree, or anywhere with the package installed and this file at hand. Forward and backward run
under ``torch.compile``; ``--no-compile`` leaves them eager. Exit status: 0; 1 if the loss did not fall; 2 for wrong
arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from kda_cuda import KimiDeltaAttention
from kda_cuda.demo import read_text
from kda_cuda.layer import KDACache

EXIT_GOOD, EXIT_BAD, EXIT_USAGE = 0, 1, 2
BYTES = 256  # the vocabulary
LAST_SHARE = 0.1  # of the steps, whose mean loss is reported
PLAIN_REPORTS = 10  # lines of progress where there is no terminal


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of a step."""

    layers: int
    hidden_size: int
    heads: int
    head_dim: int
    batch: int
    tokens: int
    steps: int


SIZES = {
    "cpu": Size(layers=2, hidden_size=128, heads=2, head_dim=32, batch=4, tokens=256, steps=120),
    "cuda": Size(layers=8, hidden_size=1024, heads=8, head_dim=128, batch=8, tokens=2048, steps=500),
}


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, size: Size, layer_idx: int) -> None:
        super().__init__()
        D = size.hidden_size
        self.attention_norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attention = KimiDeltaAttention(
            hidden_size=D, head_dim=size.head_dim, num_heads=size.heads, lower_bound=-5.0, layer_idx=layer_idx
        )
        self.gate_up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor, cache: KDACache | None = None) -> Tensor:
        """x and the result: [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), past_key_values=cache, use_cache=cache is not None)[0]
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class ByteModel(nn.Module):
    """Next-byte prediction: bytes [B, T] -> logits [B, T, 256]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.hidden_size)
        self.blocks = nn.ModuleList(Block(size, i) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden_size)
        nn.init.normal_(self.embedding.weight, std=size.hidden_size**-0.5)

    def forward(self, tokens: Tensor, cache: KDACache | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of bytes [B, T + 1], each but the first."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def draw_batch(text: Tensor, size: Size, generator: torch.Generator) -> Tensor:
    """Pieces [B, T + 1] of the text [n] at random places."""
    starts = torch.randint(len(text) - size.tokens, (size.batch, 1), generator=generator)
    return text[starts + torch.arange(size.tokens + 1)]


def train(
    model: ByteModel, text: Tensor, size: Size, device: torch.device, learning_rate: float, compiled: bool, seed: int
) -> list[float]:
    """Trains in place with AdamW, a short warm-up and a cosine decay. Returns the loss of each step, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(size.steps // 20, 1)

    def schedule(step: int) -> float:
        progress = max(step - warm_up, 0) / max(size.steps - warm_up, 1)
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    loss_of = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
    generator = torch.Generator().manual_seed(seed)
    console, losses = Console(stderr=True), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    report_every = max(size.steps // PLAIN_REPORTS, 1)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling" if compiled else "training", total=size.steps)
        for step in range(size.steps):
            batch = draw_batch(text, size, generator).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            bar.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
            if not console.is_terminal and (step + 1) % report_every == 0:
                console.print(f"step {step + 1} of {size.steps}: loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def write(model: ByteModel, prompt: bytes, count: int, device: torch.device, temperature: float, seed: int) -> bytes:
    """`count` bytes that the model puts after the prompt: one prefill, then byte by byte from the carried states."""
    generator = torch.Generator().manual_seed(seed)
    cache, written = KDACache(), bytearray()
    tokens = torch.tensor([list(prompt)], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for _ in range(count):
            logits = model(tokens, cache)[0, -1].float().cpu()
            byte = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            written.append(int(byte))
            tokens = byte.view(1, 1).to(device)
    return bytes(written)


def save_plot(path: str, losses: Sequence[float]) -> None:
    """The loss of each step, in bits a byte, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([loss / math.log(2) for loss in losses], linewidth=1)
    axes.set(xlabel="step", ylabel="loss (bits a byte)", title="Byte-level model of KimiDeltaAttention layers")
    axes.grid(alpha=0.3)
    figure.savefig(path)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
        return value

    positive.__name__ = "positive integer"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--text", metavar="FILE", help="any file (default: the text of the package)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda where there is one")
    for name in Size.__dataclass_fields__:
        default = ", ".join(f"{getattr(size, name)} on {device}" for device, size in SIZES.items())
        add(f"--{name.replace('_', '-')}", type=positive, help=f"default: {default}")
    add("--learning-rate", type=float, default=3e-3, help="default 3e-3")
    add("--no-compile", action="store_true", help="without torch.compile")
    add("--write", type=int, default=200, metavar="N", help="bytes to generate (default 200)")
    add("--temperature", type=float, default=0.8, help="of what is generated (default 0.8)")
    add("--plot", metavar="FILE", help="draw the loss (.png, .svg, .pdf)")
    add("--seed", type=int, default=0, help="default 0")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example. Returns the exit status."""
    args = parse(argv)
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    given = {name: getattr(args, name) for name in Size.__dataclass_fields__ if getattr(args, name) is not None}
    size = Size(**{**vars(SIZES[kind]), **given})
    try:
        content = read_text(args.text)
        if len(content) <= size.tokens:
            raise ValueError(f"argument --text: expected more than --tokens = {size.tokens} bytes, got {len(content)}")
        if args.plot is not None and not Path(args.plot).resolve().parent.is_dir():
            raise ValueError(f"argument --plot: no such folder: {Path(args.plot).parent}")
    except ValueError as error:
        print(f"train_lm: error: {error}", file=sys.stderr)
        return EXIT_USAGE

    torch.manual_seed(args.seed)
    model = ByteModel(size).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {size.layers} layers, on {device}; {len(content)} bytes of text")
    print(
        f"{size.steps} steps of {size.batch} x {size.tokens} bytes, {'eager' if args.no_compile else 'torch.compile'}"
    )
    begin = time.perf_counter()
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    losses = train(model, text, size, device, args.learning_rate, not args.no_compile, args.seed)
    seconds = time.perf_counter() - begin

    last = losses[-max(round(LAST_SHARE * len(losses)), 1) :]
    final = sum(last) / len(last)
    print(f"loss {losses[0]:.3f} -> {final:.3f} nats a byte ({final / math.log(2):.2f} bits), {seconds:.1f} s")
    if args.plot is not None:
        save_plot(args.plot, losses)
        print(f"picture: {args.plot}")
    if args.write > 0:
        prompt = content[:32]
        written = write(model, prompt, args.write, device, args.temperature, args.seed)
        print(f"--- {prompt.decode(errors='replace')!r} goes on ---\n{written.decode(errors='replace')}")
    return EXIT_GOOD if len(losses) == 1 or final < losses[0] else EXIT_BAD


if __name__ == "__main__":
    sys.exit(main())
