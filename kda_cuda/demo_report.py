"""What the demo prints and draws. rich and matplotlib are optional: without rich the tables are plain text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Report", "check_plot", "save_plot"]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
PLAIN_PROGRESS_STEPS = 4  # lines that a progress bar prints where there is no terminal
HISTOGRAM_BINS = 40


class Report:
    """Lines, tables and progress bars on stdout (bars on stderr)."""

    def __init__(self) -> None:
        self._console = None
        self._terminal = sys.stderr.isatty()
        if importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            width = None if sys.stdout.isatty() else 120
            self._console = Console(width=width, highlight=False)

    def line(self, text: str) -> None:
        """One line of text, as it stands."""
        print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts; all columns but the first are numbers and stand to the right."""
        if self._console is None:
            print(plain_table(title, columns, rows), flush=True)
            return
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._console.print(table)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Gives a function that is told how many of the `total` steps are newly done."""
        if self._console is not None and self._terminal:
            from rich.console import Console
            from rich.progress import Progress

            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(description, total=total)
                yield lambda steps: bar.advance(task, steps)
            return
        done, shown = 0, 0

        def advance(steps: int) -> None:
            nonlocal done, shown
            done += steps
            if done * PLAIN_PROGRESS_STEPS // total > shown:
                shown = done * PLAIN_PROGRESS_STEPS // total
                print(f"{description}: {done} of {total}", file=sys.stderr, flush=True)

        yield advance


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def laid_out(line: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([title, laid_out(lines[0]), "  ".join("-" * width for width in widths), *map(laid_out, lines[1:])])


def check_plot(path: str) -> None:
    """Finds out before the work whether the picture can be written.

    Raises:
        ValueError: it cannot; the message names ``--plot``.
    """
    target = Path(path)
    if target.suffix.lower() not in PLOT_SUFFIXES:
        raise ValueError(f"argument --plot: expected a file name that ends in {', '.join(PLOT_SUFFIXES)}, got {path}")
    if not target.parent.is_dir():
        raise ValueError(f"argument --plot: expected an existing folder, {target.parent} is none")
    if target.is_dir():
        raise ValueError(f"argument --plot: expected a file name, {path} is a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("argument --plot: needs matplotlib, which is not installed (pip install matplotlib)")


def save_plot(
    path: str,
    half_lives: Sequence[float],
    lengths: Sequence[int],
    seconds: Sequence[float],
    roofline_seconds: Sequence[float],
    bandwidth: float,
    title: str,
) -> None:
    """Draws the half-lives (tokens) of all channels, and time and roofline (s) over sequence lengths (tokens)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    gates, times = figure.subplots(1, 2)

    low, high = max(min(half_lives), 1e-3), max(half_lives)
    ratio = max(high / low, 1.01)
    edges = [low * ratio ** (i / HISTOGRAM_BINS) for i in range(HISTOGRAM_BINS)] + [high * 1.0001]
    gates.hist(half_lives, bins=edges, color="tab:blue")
    gates.set_xscale("log")
    gates.set_xlabel("half-life of a channel, tokens (at its mean log-gate on the text)")
    gates.set_ylabel(f"channels (of {len(half_lives)})")
    gates.set_title("memory of the layer as initialised")

    times.loglog(lengths, [value * 1e3 for value in seconds], "o-", label="measured")
    label = f"roofline: least traffic at {bandwidth / 1e9:.0f} GB/s"
    times.loglog(lengths, [value * 1e3 for value in roofline_seconds], "--", color="gray", label=label)
    times.set_xlabel("tokens of one sequence")
    times.set_ylabel("time of kda::chunk_fwd, ms")
    times.set_title(title, fontsize="medium")
    times.legend()
    figure.savefig(path, dpi=120)
