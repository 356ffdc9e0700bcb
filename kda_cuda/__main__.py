"""The command line: ``python -m kda_cuda {info,plan,demo}``.

info    versions, compiled architectures, devices, and whether the kernels can be used here (and if not, why)
plan    which path a call of a given shape takes, how its grid is cut and how large its workspace is
demo    the main job on a text; see kda_cuda.demo
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import __version__, build_info, demo

EXIT_GOOD, EXIT_USAGE = 0, 2

# What `plan` assumes where there is no GPU.
H200_SM_COUNT = 132
HOPPER_CAPABILITY = 90

MOST_TOKENS = 2**35  # above it, the bytes of a workspace could exceed 64 bits

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STAGE_NAMES = {
    "step_factors": "step factors",
    "segment_summary": "segment summary",
    "segment_compose": "segment composition",
    "state_scan": "state scan",
    "intra_chunk_solve": "intra-chunk solve",
    "state_recurrence": "state recurrence",
    "output_gemm": "output GEMM",
    "fused_scan": "fused scan",
}
STEP_TOKENS = 32  # kStepTokens in csrc/kda/types.h
TYPICAL_CALL = {"heads": 1, "value_heads": 1, "key_dim": 128, "value_dim": 128, "activation_dtype": "bfloat16"}


@dataclass(frozen=True)
class Device:
    """A CUDA device as torch sees it; `capability` is major * 10 + minor."""

    name: str
    capability: int
    sm_count: int
    memory_bytes: int


def cuda_devices() -> list[Device]:
    """All CUDA devices that this torch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Device(p.name, p.major * 10 + p.minor, p.multi_processor_count, p.total_memory) for p in found]


def planned(
    lengths: Sequence[int],
    batch: int,
    varlen: bool,
    capability: int,
    sm_count: int,
    sizes: dict[str, Any],
    bounded_gate: bool = True,
    contractive: bool = True,
) -> dict[str, Any]:
    """``torch.ops.kda.plan_chunk_fwd`` as a dict; `sizes` holds heads to activation_dtype by name."""
    order = ("heads", "value_heads", "key_dim", "value_dim", "activation_dtype")
    call = (list(lengths), batch, *(sizes[name] for name in order), varlen)
    return json.loads(torch.ops.kda.plan_chunk_fwd(*call, capability, sm_count, bounded_gate, contractive))


def cut_rows(plan: dict[str, Any], value_dim: int) -> list[tuple[str, str]]:
    """How a path of kernels cuts its work, for `plan` as text."""
    clusters: list[tuple[str, str]] = []
    if plan["path"] in ("fused", "fused_cut"):
        ctas = value_dim // plan["value_tile"]
        size = "of one CTA" if ctas == 1 else f"of {ctas} CTAs, with {plan['value_tile']} columns of V each"
        dealt = "the chains are dealt out to them"
        if plan["path"] == "fused_cut":
            dealt = "they take equal parts of the chains whose gates forget, and leave the others to segments"
        clusters = [("clusters", f"{plan['clusters']} {size}; {dealt}")]
    if plan["path"] == "fused":
        steps = f"of {STEP_TOKENS} tokens, one by one in the chain of a sequence and value head"
        return [("steps", steps), *clusters]
    if plan["path"] in ("stepwise", "fused_cut"):
        steps = f"of {STEP_TOKENS} tokens: their factors side by side, then one by one in a CTA for each value head"
        segments = "none: a sequence is scanned in one piece"
        if plan["segment_chunks"]:
            tokens = plan["segment_chunks"] * plan["chunk_tokens"]
            segments = f"of {plan['segment_chunks']} chunks ({tokens} tokens); {plan['segment_slots']} slots"
        return [*clusters, ("steps", steps), ("segments", segments)]
    chunks = f"{plan['chunk_slots']} slots of {plan['chunk_tokens']} tokens for each value head"
    tile = f"{plan['value_tile']} of {value_dim} columns for each CTA of the recurrence"
    return [("chunks", chunks), ("value tile", tile)]


def why_no_kernels(device: Device | None) -> str | None:
    """Why calls of a typical shape do not run on the kernels here, as a clause; None if they do."""
    if not build_info()["cuda_kernels"]:
        return "this build has no CUDA kernels (it was built without nvcc)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if device is None:
        return "torch finds no CUDA device"
    plan = planned([1], 1, False, device.capability, device.sm_count, TYPICAL_CALL)
    return plan["reason"] if plan["path"] == "composite" else None


def version_text(cuda_version: int) -> str:
    """13000 -> "13.0" """
    return f"{cuda_version // 1000}.{cuda_version % 1000 // 10}" if cuda_version else "none"


def bytes_text(count: int) -> str:
    """1717567488 -> "1.60 GiB" """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.2f} {units[0]}" if units[0] != "B" else f"{count} B"


def capability_text(capability: int) -> str:
    """90 -> "9.0" """
    return f"{capability // 10}.{capability % 10}"


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def run_info(args: argparse.Namespace) -> int:
    """Prints versions, devices and the path that calls take on this machine."""
    build, devices = build_info(), cuda_devices()
    reason = why_no_kernels(devices[0] if devices else None)
    if args.json:
        content = {
            "kda_cuda": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "build": build,
            "devices": [asdict(device) for device in devices],
            "kernels_usable": reason is None,
            "reason": reason,
        }
        print(json.dumps(content, indent=2))
        return EXIT_GOOD

    architectures = ", ".join(f"sm_{name}" for name in build["architectures"]) or "none"
    rows = [
        ("kda_cuda", f"{__version__} (built with torch {build['torch_built_with']})"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("CUDA of the kernels", version_text(build["cuda_version"])),
        ("architectures", architectures),
    ]
    for index, device in enumerate(devices):
        text = f"{device.name}, compute capability {capability_text(device.capability)}, {device.sm_count} SMs"
        rows.append((f"device cuda:{index}", f"{text}, {bytes_text(device.memory_bytes)}"))
    if not devices:
        rows.append(("devices", f"CPU only ({torch.get_num_threads()} threads)"))
    rows.append(("kernels", "usable" if reason is None else f"not usable: {reason}"))
    path = "the kernels (`plan` says it for a shape)" if reason is None else "the composite implementation"
    rows.append(("path on this machine", path if devices else f"{path}, on the CPU"))
    print_rows(rows)
    return EXIT_GOOD


def integer_in(minimum: int, maximum: int) -> Callable[[str], int]:
    """A parser of integers within limits, for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected an integer in [{minimum}, {maximum}], got {text!r}")
        return value

    return parse


def parse_lengths(text: str) -> list[int]:
    """``"1300,547,8x1024"`` -> the length of each sequence."""
    length, count = integer_in(0, 2**40), integer_in(1, 2**20)
    lengths: list[int] = []
    for item in text.split(","):
        repeat, times, tokens = item.rpartition("x")
        lengths += [length(tokens)] * (count(repeat) if times else 1)
    return lengths


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plan of one call."""
    value_heads = args.heads if args.value_heads is None else args.value_heads
    varlen = args.varlen or len(args.lengths) > 1
    if value_heads % args.heads != 0:
        args.parser.error(f"argument --value-heads: expected a multiple of --heads = {args.heads}, got {value_heads}")
    if varlen and args.batch != 1:
        args.parser.error(f"argument --batch: expected 1 with cu_seqlens (several lengths, --varlen), got {args.batch}")
    if (total := args.batch * sum(args.lengths)) > MOST_TOKENS:
        args.parser.error(f"argument --lengths: expected at most {MOST_TOKENS} tokens in all, got {total}")

    devices = cuda_devices()
    device = devices[0] if devices else Device("an H200", HOPPER_CAPABILITY, H200_SM_COUNT, 0)
    capability = device.capability if args.compute_capability is None else args.compute_capability
    sm_count = device.sm_count if args.device_sms is None else args.device_sms
    sizes = {
        "heads": args.heads,
        "value_heads": value_heads,
        "key_dim": args.key_dim,
        "value_dim": args.value_dim,
        "activation_dtype": DTYPES[args.dtype],
    }
    features = {"bounded_gate": not args.unbounded_gate, "contractive": not args.not_contractive}
    plan = planned(args.lengths, args.batch, varlen, capability, sm_count, sizes, **features)
    here = why_no_kernels(devices[0] if devices else None)
    if args.json:
        call = {"lengths": args.lengths, "batch": args.batch, "varlen": varlen, **sizes, **features}
        target = {"compute_capability": capability, "sm_count": sm_count, "assumed": not devices}
        print(json.dumps({"call": call, "device": target, "plan": plan, "kernels_usable_here": here is None}, indent=2))
        return EXIT_GOOD

    overridden = args.compute_capability is not None or args.device_sms is not None
    source = "as given" if overridden else device.name if devices else f"{device.name} is assumed, there is no GPU here"
    tokens = sum(args.lengths)
    layout = f"cu_seqlens, N = {len(args.lengths)}" if varlen else f"B = {args.batch}"
    rows = [
        ("tokens", f"T = {tokens}, {layout}"),
        ("sizes", f"H = {args.heads}, HV = {value_heads}, K = {args.key_dim}, V = {args.value_dim}, {args.dtype}"),
        ("gate", "bounded (use_gate with a lower_bound)" if features["bounded_gate"] else "not bounded"),
        ("states", "no tokens enlarge one" if features["contractive"] else "tokens may enlarge one"),
        ("device", f"{sm_count} SMs, compute capability {capability_text(capability)} ({source})"),
        ("path", f"{plan['path']}: {plan['reason']}"),
    ]
    if plan["path"] != "composite":
        rows += cut_rows(plan, args.value_dim)
        for stage, ctas in plan["stage_ctas"].items():
            name = STAGE_NAMES.get(stage, stage)
            rows.append((f"grid of {name}", f"{ctas} CTAs, {ctas / max(sm_count, 1):.1f} for each SM"))
        rows.append(("workspace", f"{bytes_text(plan['workspace_bytes'])} ({plan['workspace_bytes']} bytes)"))
        if here is not None:
            rows.append(("note", f"on this machine such a call takes the composite path: {here}"))
    print_rows(rows)
    return EXIT_GOOD


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = argparse.ArgumentParser(prog="python -m kda_cuda", description="Kimi Delta Attention in CUDA for PyTorch")
    parser.add_argument("--version", action="version", version=f"kda_cuda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,plan,demo}")

    info = commands.add_parser("info", help="versions, devices, and whether the kernels can be used here")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)

    plan = commands.add_parser("plan", help="which path a call takes and why")
    add, size = plan.add_argument, integer_in(1, 2**16)
    add("--lengths", type=parse_lengths, default=[8192], metavar="L[,L...]", help="8192, or 1300,547, or 8x1024")
    add("--batch", type=integer_in(0, 2**31 - 1), default=1, help="rows of that length, without cu_seqlens (default 1)")
    add("--varlen", action="store_true", help="with cu_seqlens, also for a single length")
    add("--heads", type=size, default=96, help="H, heads of q and k (default 96)")
    add("--value-heads", type=size, help="HV, heads of v, g, beta; a multiple of H (default H)")
    add("--key-dim", type=size, default=128, help="K (default 128)")
    add("--value-dim", type=size, default=128, help="V (default 128)")
    add("--dtype", choices=sorted(DTYPES), default="bf16", help="of q, k, v (default bf16)")
    add("--unbounded-gate", action="store_true", help="log-gates, or softplus without lower_bound; else a bounded gate")
    add(
        "--not-contractive",
        action="store_true",
        help="without use_qk_l2norm or use_beta_sigmoid, so that tokens may enlarge a state",
    )
    add("--device-sms", type=size, help=f"multiprocessors (default: this GPU's; {H200_SM_COUNT} without one)")
    add("--compute-capability", type=integer_in(0, 999), help="major * 10 + minor, 0: no GPU (default: this GPU's; 90)")
    add("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan, parser=plan)

    demo_parser = commands.add_parser("demo", help="the main job on a text, checked against the fp64 recurrence")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    args = make_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
