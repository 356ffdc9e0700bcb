"""The demo: a text goes byte by byte through a `KimiDeltaAttention` layer as initialised, and the result is checked.

    python -m kda_cuda demo [--text FILE] [--plot out.png] [--heads 16 --head-dim 128 --hidden-size 2048 ...]

The bytes are embedded (fixed seed) and projected by the layer. The operator then runs the text in one prefill and in
uneven pieces with carried state, and both results are compared with the fp64 token recurrence and with each other. A
table says what ran, where, how fast, and how exact; a broken accuracy contract ends the program with exit status 1, a
wrong argument with 2.

On a GPU the operator runs in bf16 and is timed by CUDA events after a warm-up; elsewhere it is the composite in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import cycle, pairwise
from pathlib import Path

import torch

from kda_cuda.accuracy import O_RELATIVE_RMSE, STATE_RELATIVE_RMSE, relative_rmse
from kda_cuda.demo_report import Report, check_plot, save_plot
from kda_cuda.layer import KDACache, KDAInputs, KimiDeltaAttention
from kda_cuda.reference import recurrent_kda

__all__ = ["Limits", "add_arguments", "main", "run"]

EXIT_GOOD, EXIT_CONTRACT, EXIT_USAGE = 0, 1, 2

# Uneven on purpose: single tokens, one below and one above the 64 tokens of a chunk, and long ones.
PIECE_LENGTHS = (1, 63, 64, 65, 200, 1, 1000, 77, 3000, 129)
ENOUGH_SECONDS = 2.5  # of repeating one measurement
CALLS_BETWEEN_EVENTS = 5  # so that the GPU, not the host, is what is measured
REFERENCE_PIECE = 256  # tokens between two steps of the progress bar
DEFAULT_TEXT = "demo.txt"
H200_BANDWIDTH = 4.3e12  # bytes/s, measured read bandwidth of an H200; other devices are measured by a copy
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


@dataclass(frozen=True)
class Limits:
    """Largest relative RMSE that passes."""

    o: float = O_RELATIVE_RMSE
    state: float = STATE_RELATIVE_RMSE


@dataclass(frozen=True)
class Defaults:
    """Sizes for one kind of device, such that the demo takes well under a minute there."""

    hidden_size: int
    heads: int
    max_tokens: int
    reference_tokens: int
    repeats: int
    longest_plotted: int


DEFAULTS = {
    "cuda": Defaults(2048, 16, max_tokens=65536, reference_tokens=32768, repeats=10, longest_plotted=65536),
    "cpu": Defaults(512, 4, max_tokens=32768, reference_tokens=32768, repeats=3, longest_plotted=8192),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's arguments to a parser (of ``python -m kda_cuda demo``)."""
    cpu, cuda = DEFAULTS["cpu"], DEFAULTS["cuda"]

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
        return value

    positive.__name__ = "positive integer"
    add = parser.add_argument
    add("--text", metavar="FILE", help="any file; its bytes are the tokens (default: the text of the package)")
    add("--plot", metavar="FILE", help="draw half-lives of the gates and time against the roofline (.png, .svg, .pdf)")
    add("--hidden-size", type=positive, help=f"of the layer (default {cuda.hidden_size}; {cpu.hidden_size} on CPU)")
    add("--heads", type=positive, help=f"heads of q and k (default {cuda.heads}; {cpu.heads} on CPU)")
    add("--value-heads", type=positive, help="heads of v, a multiple of --heads (default: the same number)")
    add("--head-dim", type=positive, default=128, help="K (default 128)")
    add("--expand-v", type=float, default=1.0, help="V / K (default 1)")
    add("--lower-bound", type=float, help="lower bound of the log-gate, in [-5, 0) (default: the unbounded gate)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda where there is one")
    add("--max-tokens", type=positive, help=f"cut the text (default {cuda.max_tokens}; {cpu.max_tokens} on CPU)")
    add(
        "--reference-tokens",
        type=positive,
        help=f"tokens compared with the reference (default {cuda.reference_tokens}; {cpu.reference_tokens} on CPU)",
    )
    add("--repeats", type=positive, help=f"timed runs, at most (default {cuda.repeats}; {cpu.repeats} on CPU)")
    add("--seed", type=int, default=0, help="of the embedding and the layer (default 0)")


def main(argv: Sequence[str] | None = None, limits: Limits = Limits()) -> int:  # noqa: B008 (frozen)
    """Parses the command line and runs the demo. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kda_cuda demo", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv), limits)


def run(args: argparse.Namespace, limits: Limits = Limits()) -> int:  # noqa: B008 (frozen)
    """Runs the demo with the arguments of :func:`add_arguments`. Returns the exit status: 0, 1 or 2 as told above."""
    try:
        demo = _Demo(args)
    except ValueError as error:
        print(f"kda_cuda demo: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    with torch.no_grad():
        return demo.run(limits)


def read_text(path: str | None) -> bytes:
    """The bytes of a file, or of the text that comes with the package.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    if path is None:
        return resources.files("kda_cuda").joinpath(DEFAULT_TEXT).read_bytes()
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"argument --text: cannot read {path}: {error.strerror}") from error
    if not content:
        raise ValueError(f"argument --text: expected a file with at least one byte, {path} is empty")
    return content


def piece_borders(tokens: int, also: int) -> list[int]:
    """Borders of uneven pieces from 0 to `tokens`, one of them at `also`."""
    borders, lengths = {0, tokens, also}, cycle(PIECE_LENGTHS)
    position = 0
    while (position := position + next(lengths)) < tokens:
        borders.add(position)
    return sorted(borders)


class _Demo:
    """One run: what was asked for, checked; then the steps in order."""

    def __init__(self, args: argparse.Namespace) -> None:
        has_gpu = torch.cuda.is_available()
        if args.device == "cuda" and not has_gpu:
            raise ValueError("argument --device: expected a device that is there, got cuda, and torch sees no GPU")
        self.device = torch.device("cuda" if has_gpu and args.device != "cpu" else "cpu")
        self.defaults = DEFAULTS[self.device.type]
        if args.plot is not None:
            check_plot(args.plot)
        self.plot: str | None = args.plot

        self.text = read_text(args.text)
        self.text_name = "the package's text" if args.text is None else args.text
        self.tokens = min(len(self.text), args.max_tokens or self.defaults.max_tokens)
        self.checked = min(self.tokens, args.reference_tokens or self.defaults.reference_tokens)
        self.repeats = args.repeats or self.defaults.repeats
        heads = args.heads or self.defaults.heads
        hidden_size = args.hidden_size or self.defaults.hidden_size
        if not math.isfinite(args.expand_v):
            raise ValueError(f"argument --expand-v: expected a finite number, got {args.expand_v}")

        self.generator = torch.Generator().manual_seed(args.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            try:
                layer = KimiDeltaAttention(
                    hidden_size=hidden_size,
                    expand_v=args.expand_v,
                    head_dim=args.head_dim,
                    num_heads=heads,
                    num_v_heads=args.value_heads,
                    safe_gate=args.lower_bound is not None,
                    lower_bound=args.lower_bound,
                    layer_idx=0,
                )
            except ValueError as error:
                raise ValueError(_in_options(str(error))) from error
        self.plan = self._plan(layer, "bfloat16")
        on_kernels = self.plan["path"] != "composite"
        self.dtype = torch.bfloat16 if on_kernels else torch.float32
        self.layer = layer.to(self.device, self.dtype).eval()

    def _plan(self, layer: KimiDeltaAttention, dtype: str) -> dict:
        capability, sm_count = 0, 0
        if self.device.type == "cuda" and json.loads(torch.ops.kda.build_info())["cuda_kernels"]:
            properties = torch.cuda.get_device_properties(self.device)
            capability, sm_count = properties.major * 10 + properties.minor, properties.multi_processor_count
        sizes = (layer.num_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
        return json.loads(torch.ops.kda.plan_chunk_fwd([self.tokens], 1, *sizes, dtype, False, capability, sm_count))

    # ---- the runs ----

    def hidden_states(self) -> torch.Tensor:
        """The text as embedded bytes, [1, T, hidden_size]."""
        table = torch.randn(256, self.layer.hidden_size, generator=self.generator)  # one row for each byte
        codes = torch.frombuffer(bytearray(self.text[: self.tokens]), dtype=torch.uint8).long()
        return table.to(self.device, self.dtype)[codes.to(self.device)][None]

    def operator_flags(self) -> dict:
        """How this layer calls the operator, in the names of ``torch.ops.kda.chunk_fwd`` and of the reference."""
        return {
            "A_log": self.layer.A_log,
            "dt_bias": self.layer.dt_bias,
            "lower_bound": self.layer.lower_bound,
            "use_qk_l2norm": True,
            "use_gate": True,
            "use_beta_sigmoid": True,
            "state_v_first": True,
        }

    def operator(self, inputs: KDAInputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """o and final state of some tokens."""
        o, final_state, _ = torch.ops.kda.chunk_fwd(
            **inputs._asdict(), **self.operator_flags(), initial_state=state, output_final_state=True
        )
        return o, final_state

    def in_pieces(self, inputs: KDAInputs, borders: list[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """o of all tokens, and the state at each border."""
        state, outputs, states = None, [], {}
        for begin, end in pairwise(borders):
            o, state = self.operator(_slice(inputs, begin, end), state)
            outputs.append(o)
            states[end] = state
        return torch.cat(outputs, dim=1), states

    def reference(self, inputs: KDAInputs, report: Report) -> tuple[torch.Tensor, torch.Tensor]:
        """o and state of the fp64 recurrence over the first `self.checked` tokens."""
        borders = [*range(0, self.checked, REFERENCE_PIECE), self.checked]
        state, outputs = None, []
        with report.progress("fp64 token recurrence", self.checked) as advance, _one_thread():
            for begin, end in pairwise(borders):
                o, state, _ = recurrent_kda(
                    **_slice(inputs, begin, end)._asdict(), **self.operator_flags(), initial_state=state
                )
                outputs.append(o)
                advance(end - begin)
        return torch.cat(outputs, dim=1), state

    def layer_continuity(self, hidden_states: torch.Tensor, borders: list[int]) -> float:
        """Relative RMSE of the whole layer in pieces with its cache against one run."""
        whole, _, _ = self.layer(hidden_states)
        cache = KDACache()
        pieces = [
            self.layer(hidden_states[:, begin:end], past_key_values=cache, use_cache=True)[0]
            for begin, end in pairwise(borders)
        ]
        return relative_rmse(torch.cat(pieces, dim=1), whole)

    def seconds(self, call: Callable[[], object], advance: Callable[[int], None] | None = None) -> float:
        """Median time of `call`: by CUDA events over calls back to back on a GPU, by the clock elsewhere.

        Fewer repeats than asked for if they would take long. `advance` is told about `self.repeats` steps.
        """
        on_gpu = self.device.type == "cuda"
        calls = CALLS_BETWEEN_EVENTS if on_gpu else 1
        for _ in range(calls):
            call()
        times = []
        for _ in range(self.repeats):
            if on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(calls):
                    call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3 / calls)
            else:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            late = sum(times) * calls > ENOUGH_SECONDS
            if advance is not None:
                advance(self.repeats - len(times) + 1 if late else 1)
            if late:
                break
        return statistics.median(times)

    def least_bytes(self, tokens: int, pieces: int = 1) -> int:
        """Bytes that any implementation moves: q, k, v, g, beta in, o out, and the state in and out of every piece."""
        layer, element = self.layer, self.dtype.itemsize
        per_value_head = layer.head_k_dim + 2 * layer.head_v_dim + 1
        per_token = 2 * layer.num_heads * layer.head_k_dim + layer.num_v_heads * per_value_head
        state_bytes = layer.num_v_heads * layer.head_k_dim * layer.head_v_dim * torch.float32.itemsize
        return tokens * per_token * element + (2 * pieces - 1) * state_bytes  # the first piece reads no state

    def bandwidth(self) -> float:
        """Bytes/s of the roofline: the recorded figure of an H200, else a copy measured now."""
        if self.device.type == "cuda" and "H200" in torch.cuda.get_device_name(self.device):
            return H200_BANDWIDTH
        source = torch.zeros(COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))

    def half_lives(self, g: torch.Tensor) -> torch.Tensor:
        """Tokens in which each channel [HV * K] forgets half, at its mean log-gate over the text."""
        return (math.log(2) / -self.layer.log_gate(g).mean(dim=(0, 1))).flatten().cpu()

    # ---- the whole ----

    def run(self, limits: Limits) -> int:
        report = Report()
        on_gpu = self.device.type == "cuda"
        self._describe(report)
        hidden_states = self.hidden_states()
        inputs, _ = self.layer.project(hidden_states)
        borders = piece_borders(self.tokens, self.checked)

        o, whole_state = self.operator(inputs)
        state = whole_state
        if self.checked < self.tokens:
            state = self.operator(_slice(inputs, 0, self.checked))[1]
        o_pieces, states = self.in_pieces(inputs, borders)
        with report.progress("timing", 2 * self.repeats) as advance:
            prefill_seconds = self.seconds(lambda: self.operator(inputs), advance)
            pieces_seconds = self.seconds(lambda: self.in_pieces(inputs, borders), advance)
        o_reference, state_reference = self.reference(inputs, report)

        # Two runs that each keep the contract differ by at most the sum of their errors.
        checks = [
            ("one prefill: o", relative_rmse(o[:, : self.checked], o_reference), limits.o),
            ("one prefill: final state", relative_rmse(state, state_reference), limits.state),
            ("pieces: o", relative_rmse(o_pieces[:, : self.checked], o_reference), limits.o),
            ("pieces: final state", relative_rmse(states[self.checked], state_reference), limits.state),
            ("continuity, pieces against one prefill: o", relative_rmse(o_pieces, o), 2 * limits.o),
            ("continuity: final state", relative_rmse(states[self.tokens], whole_state), 2 * limits.state),
            ("continuity of the layer with its cache", self.layer_continuity(hidden_states, borders), 2 * limits.o),
        ]
        bandwidth = self.bandwidth() if on_gpu or self.plot is not None else None
        rows = []
        for name, pieces, seconds, o_error, state_error in (
            ("one prefill", 1, prefill_seconds, checks[0][1], checks[1][1]),
            ("in pieces", len(borders) - 1, pieces_seconds, checks[2][1], checks[3][1]),
        ):
            rate = self.least_bytes(self.tokens, pieces) / seconds
            share = f"{rate / bandwidth:.1%}" if on_gpu else "-"
            time_text = f"{seconds * 1e3:.3f} ms" if on_gpu else f"{seconds * 1e3:.0f} ms"
            errors = (f"{o_error:.2e}", f"{state_error:.2e}")
            rows.append((name, str(pieces), str(self.tokens), time_text, f"{rate / 1e9:.1f}", share, *errors))
        columns = ("run", "calls", "tokens", "time", "GB/s", "of roofline", "error of o", "error of state")
        report.table(f"{self.plan['path']} path on {self.device_name()}", columns, rows)
        verdicts = [
            (name, f"{error:.2e}", f"{limit:.1e}", "ok" if error <= limit else "BROKEN")
            for name, error, limit in checks
        ]
        report.table(
            f"relative RMSE (reference: fp64 recurrence, first {self.checked} tokens)",
            ("what", "error", "limit", ""),
            verdicts,
        )
        self._report_gates(report, inputs, bandwidth)

        broken = [f"{name}: {error:.2e} > {limit:.1e}" for name, error, limit in checks if not error <= limit]
        if broken:
            print("kda_cuda demo: FAILED, the accuracy contract is broken: " + "; ".join(broken), file=sys.stderr)
            return EXIT_CONTRACT
        report.line("All errors are within the accuracy contract.")
        return EXIT_GOOD

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    def _describe(self, report: Report) -> None:
        layer = self.layer
        cut = "" if self.tokens == len(self.text) else f", the first {self.tokens} of {len(self.text)} bytes"
        report.line(f"text: {self.text_name}{cut}, {self.tokens} tokens (one byte each)")
        report.line(
            f"layer: hidden size {layer.hidden_size}, {layer.num_heads} heads of q and k, {layer.num_v_heads} of v, "
            f"K = {layer.head_k_dim}, V = {layer.head_v_dim}, "
            + (f"gate bounded by {layer.lower_bound}" if layer.lower_bound is not None else "unbounded gate")
        )
        report.line(f"device: {self.device_name()}; path: {self.plan['path']} ({self.plan['reason']}); {self.dtype}")
        if self.dtype is torch.float32:
            report.line("note: this run does not use the CUDA kernels; it is the composite implementation, in fp32")

    def _report_gates(self, report: Report, inputs: KDAInputs, bandwidth: float | None) -> None:
        half_lives = self.half_lives(inputs.g)
        low, middle, high = (float(half_lives.quantile(x)) for x in (0.05, 0.5, 0.95))
        report.line(f"half-lives of the gates in tokens: median {middle:.3g}, 90 % from {low:.3g} to {high:.3g}")
        if self.plot is None:
            return
        lengths = list(_plotted_lengths(min(self.tokens, self.defaults.longest_plotted)))
        seconds = []
        with report.progress("timing over lengths", len(lengths)) as advance:
            for length in lengths:
                piece = _slice(inputs, 0, length)
                seconds.append(self.seconds(lambda piece=piece: self.operator(piece)))
                advance(1)
        roofline = [self.least_bytes(length) / bandwidth for length in lengths]
        title = f"{self.plan['path']} path, {self.device_name()}, {self.layer.num_v_heads} heads"
        save_plot(self.plot, half_lives.tolist(), lengths, seconds, roofline, bandwidth, title)
        report.line(f"picture: {self.plot}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """For small operations one after the other: on a CPU a second thread only adds waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _slice(inputs: KDAInputs, begin: int, end: int) -> KDAInputs:
    return KDAInputs(*(x[:, begin:end] for x in inputs))


def _plotted_lengths(longest: int) -> Iterator[int]:
    """Powers of two from 64, and the longest itself."""
    length = 64
    while length < longest:
        yield length
        length *= 2
    yield longest


def _in_options(message: str) -> str:
    """An error of the layer's constructor in the words of the command line."""
    options = {"num_heads": "--heads", "num_v_heads": "--value-heads"}
    _, _, rest = message.partition("argument `")
    name, _, detail = rest.partition("`: ")
    return f"argument {options.get(name, '--' + name.replace('_', '-'))}: {detail}"


if __name__ == "__main__":
    sys.exit(main())
