"""The README's table, docs/benchmarks.md and the pictures, from the file of a run.

    python -m bench.report                   from the newest complete run in bench/results/
    python -m bench.report FILE              from this one
    python -m bench.report --check           change nothing; exit status 1 if any of it does not match

Generated text stands between <!-- board:begin --> and <!-- board:end -->; the rest of a document is not touched.
Beside the pictures, docs/figures/board.json names the run and a hash of what they show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import figures, tables
from bench.environment import ROOT
from bench.operators import BACKWARD, OPERATORS, RAW_BACKWARD, TRAINING, Operator
from bench.results import (
    RESULTS,
    cases,
    comparisons,
    geometric_mean,
    load,
    median_us,
    newest,
    ratios_of_operators,
    recorded_peers,
    recorded_us,
)
from bench.tables import NOTHING, RECORDED_MARK, time_text

__all__ = ["PLACEHOLDER", "Site", "main"]

EXIT_GOOD, EXIT_STALE, EXIT_USAGE = 0, 1, 2
BEGIN, END = "<!-- board:begin -->", "<!-- board:end -->"
PLACEHOLDER = "Not measured yet."  # what stands between the markers before the first run
STAMP = "board.json"

Json = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """Where documents and results lie."""

    root: Path = ROOT
    results: Path = RESULTS

    @property
    def readme(self) -> Path:
        return self.root / "README.md"

    @property
    def details(self) -> Path:
        return self.root / "docs" / "benchmarks.md"

    @property
    def figures(self) -> Path:
        return self.root / "docs" / "figures"


def main(argv: Sequence[str] | None = None, site: Site = Site()) -> int:  # noqa: B008 (frozen)
    """Writes or checks the documents. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="of a run (default: the newest complete one)")
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    args = parser.parse_args(argv)
    try:
        path = args.file or newest("board", site.results)
        result = load(path) if path else None
        texts = expected_texts(result, site)
    except ValueError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return EXIT_USAGE
    if result is None and not args.check:
        print(f"bench.report: no complete run in {site.results} yet: python -m bench.board makes one")
        return EXIT_GOOD

    shown = all_figures(result)
    stamp = {"results": path.name, "figures": sorted(shown), "sha256": figures.data_hash(shown)} if path else None
    if args.check:
        return _check(texts, shown, stamp, site)
    for document, text in texts.items():
        document.write_text(text, encoding="utf-8")
    figures.draw(shown, site.figures, tables.headline(result))
    for old in site.figures.glob("*.png"):
        if old.name not in shown and any(old.name.startswith(f"{name}_") for name in OPERATORS):
            old.unlink()
    (site.figures / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    written = ", ".join(str(document.relative_to(site.root)) for document in texts)
    print(f"bench.report: {written} and {len(shown)} pictures from {path.name}")
    return EXIT_GOOD


def _check(texts: dict[Path, str], shown: dict[str, Json], stamp: Json | None, site: Site) -> int:
    stale = [
        str(document.relative_to(site.root))
        for document, text in texts.items()
        if document.read_text(encoding="utf-8") != text
    ]
    stamp_file = site.figures / STAMP
    current = json.loads(stamp_file.read_text()) if stamp_file.exists() else None
    if current != stamp or not all((site.figures / name).exists() for name in shown):
        stale.append("docs/figures")
    if stale:
        source = stamp["results"] if stamp else "the lack of any complete run"
        print(f"bench.report: {', '.join(stale)} does not match {source}: run python -m bench.report", file=sys.stderr)
        return EXIT_STALE
    print(f"bench.report: all matches {stamp['results']}" if stamp else "bench.report: nothing was measured yet")
    return EXIT_GOOD


def expected_texts(result: Json | None, site: Site) -> dict[Path, str]:
    """What the documents ought to contain, by path.

    Raises:
        ValueError: a document is missing, or its markers are.
    """
    prefix = f"{site.figures.relative_to(site.root)}/"
    generated = {
        site.readme: PLACEHOLDER if result is None else readme_section(result, prefix),
        site.details: PLACEHOLDER if result is None else details_section(result, "figures/"),
    }
    return {document: replaced(document, text) for document, text in generated.items()}


def replaced(document: Path, text: str) -> str:
    """The document with ``text`` between the markers."""
    try:
        content = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {document}: {error.strerror}") from error
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{document} does not have {BEGIN} and after it {END}, each once")
    before, _, rest = content.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def all_figures(result: Json | None) -> dict[str, Json]:
    """Data of all pictures, by file name."""
    if result is None:
        return {}
    shown: dict[str, Json] = {}
    for operator in result["implementations"]:
        shown |= _pictures(result, operator)
    return shown


def _pictures(result: Json, operator: str) -> dict[str, Json]:
    return figures.figure_data(result, operator) if OPERATORS[operator].pictures else {}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text, the rest numbers."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *rows))


def _pair(values: Sequence[float | None]) -> str:
    """One number if all families have the same, else all of them."""
    texts = [time_text(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _families(result: Json, operator: str) -> list[str]:
    return list(dict.fromkeys(case["family"] for case in cases(result, operator)))


def _comparison_rows(result: Json, operator: str, without: Collection[str] = ()) -> list[list[str]]:
    """A row for each peer and family. without: peers whose recorded times are left out."""
    rows = []
    for comparison in comparisons(result, operator):
        if comparison.recorded and comparison.peer in without:
            continue
        label = f"{comparison.label} {RECORDED_MARK}" if comparison.recorded else comparison.label
        shape, ratio = comparison.worst
        rows.append([label, comparison.family, f"{comparison.mean:.2f}×", f"{ratio:.2f}×", shape])
    return rows


def readme_section(result: Json, figure_prefix: str) -> str:
    """For the forward a table, the means against the peers and a picture; for other operators the means alone."""
    parts = [f"{tables.headline(result)}."]
    measured = [OPERATORS[name] for name in result["implementations"]]
    for operator in measured:
        if operator.in_full:
            parts += _readme_parts(result, operator, figure_prefix)
    if brief := [operator for operator in measured if not operator.in_full]:
        parts += _brief_parts(result, brief)
    return "\n\n".join(parts)


def _readme_parts(result: Json, operator: Operator, figure_prefix: str) -> list[str]:
    name = operator.name
    families = _families(result, name)
    about = result["implementations"][name]
    peers = [peer for peer, what in about.items() if what["kind"] == "peer"]
    recorded = {peer: what for peer, what in recorded_peers(result, name).items() if peer not in peers}
    columns = ["shape", "lengths", "H", "roofline", *(f"ours, {family}" for family in families)]
    columns += [about[peer]["label"] for peer in peers]
    columns += [f"{what['label']} {RECORDED_MARK}" for what in recorded.values()]
    rows = []
    for case in cases(result, name, families[0], "board"):
        same = [c for f in families for c in cases(result, name, f, "board") if c["shape"] == case["shape"]]
        row = [case["shape"], tables.shape_of(case).lengths_text, str(case["heads"])]
        row += [time_text(case["roofline_us"])]
        row += [f"**{time_text(median_us(c, 'ours'))}**" for c in same]
        row += [_pair([median_us(c, peer) for c in same]) for peer in peers]
        row += [_pair([recorded_us(name, c["shape"], peer, c["family"]) for c in same]) for peer in recorded]
        rows.append(row)
    parts = [
        f"GPU time of the {operator.title} in µs, K = V = 128, bf16, {operator.conditions}; "
        f"gates {' / '.join(families)} where a column has two numbers:",
        markdown_table(columns, rows, left=2),
    ]
    if summary := _comparison_rows(result, name, without=peers):
        parts.append("Time of the peer over ours, geometric mean over these shapes, and the worst one:")
        parts.append(markdown_table(["peer", "gates", "mean", "worst", "at"], summary, left=2))
    if recorded:
        parts.append(f"{RECORDED_MARK} recorded earlier on such a GPU, not measured in this run.")
    if (picture := f"{name}_time.png") in figures.figure_data(result, name):
        parts.append(f"![time against the roofline]({figure_prefix}{picture})")
    return parts


def _brief_parts(result: Json, operators: Sequence[Operator]) -> list[str]:
    """The means of several operators in one table."""
    rows = []
    for operator in operators:
        about = result["implementations"][operator.name]
        peers = [peer for peer, what in about.items() if what["kind"] == "peer"]
        rows += [[operator.title, *row] for row in _comparison_rows(result, operator.name, without=peers)]
    parts = []
    if rows:
        parts.append(
            "Of the backward and of training, time of the peer over ours ([docs](docs/benchmarks.md) has all of it):"
        )
        parts.append(markdown_table(["", "peer", "gates", "mean", "worst", "at"], rows, left=3))
        if any(RECORDED_MARK in cell for row in rows for cell in row):
            parts.append(f"{RECORDED_MARK} recorded earlier on such a GPU, not measured in this run.")
    return [*parts, *_price_of_transforms(result)]


def _price_of_transforms(result: Json) -> list[str]:
    """What the transforms and their gradients cost inside the backward, as a sentence."""
    ratios = ratios_of_operators(result, RAW_BACKWARD.name, BACKWARD.name)
    if not ratios:
        return []
    shape, family = max(ratios, key=lambda key: ratios[key])
    return [
        f"With its transforms fused (raw gate and β logits, q and k not normalised) the backward takes "
        f"{geometric_mean(ratios.values()):.2f}× the time that it takes with processed inputs (geometric mean; worst "
        f"{ratios[shape, family]:.2f}×, {shape} with gates {family})."
    ]


def _accuracy_parts(result: Json, operator: str) -> list[str]:
    """How far ours and the peers are from the composite implementation, which computes in fp32: the largest relative
    RMSE over all cases. Nothing of a run that has not compared them so.
    """
    about, names, rows = result["implementations"][operator], {}, []
    for implementation, what in about.items():
        worst: dict[str, float] = {}
        for family in _families(result, operator) if what["kind"] != "forced" else ():
            for case in cases(result, operator, family):
                found = case["measurements"].get(implementation, {}).get("reference_errors", {})
                worst |= {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
        names |= dict.fromkeys(worst)
        if worst:
            rows.append((what["label"], worst))
    if not rows:
        return []
    cells = [[label, *(f"{worst[name]:.1e}" if name in worst else NOTHING for name in names)] for label, worst in rows]
    return [
        "Relative RMSE against the composite implementation in fp32, the largest over shapes and gates; the outputs of "
        "both are rounded to their type:",
        markdown_table(["", *names], cells),
    ]


def _memory_parts(result: Json) -> list[str]:
    """What a training step takes beyond its inputs, outputs and gradients: a table of all implementations."""
    about = result["implementations"][TRAINING.name]
    rows = []
    for case in cases(result, TRAINING.name, _families(result, TRAINING.name)[0]):
        beyond = []
        for name in about:
            found = case["measurements"].get(name, {})
            known = found.get("peak_bytes") is not None and found.get("output_bytes") is not None
            beyond.append(found["peak_bytes"] - found["output_bytes"] if known else None)
        if any(count is not None for count in beyond):
            lengths = tables.shape_of(case).lengths_text
            rows.append([case["shape"], lengths, str(case["heads"]), *map(tables.bytes_text, beyond)])
    if not rows:
        return []
    columns = ["shape", "lengths", "H", *(what["label"] for what in about.values())]
    return [
        "Peak memory of a step beyond inputs, outputs and gradients, MiB (*saved*: with `disable_recompute`):",
        markdown_table(columns, rows, left=2),
    ]


def details_section(result: Json, figure_prefix: str) -> str:
    """Everything: spread, host time, memory, every implementation, for each family; and all pictures."""
    environment, build = result["environment"], result["environment"]["build"]
    clocks = " → ".join(f"{result['clocks'][when].get('sm_mhz') or 0:.0f}" for when in ("before", "after"))
    kernels_cuda = f"{build['cuda_version'] // 1000}.{build['cuda_version'] % 1000 // 10}"
    facts = [
        ["GPU", f"{environment['gpu']}, driver {environment['driver']}"],
        ["SM clock before → after the run", f"{clocks} MHz"],
        ["memory bandwidth", f"{result['bandwidth_gbps']['median']:.0f} GB/s, a large copy in the run"],
        ["torch, CUDA of torch, Triton", f"{environment['torch']}, {environment['cuda']}, {environment['triton']}"],
        ["kda-cuda, its CUDA", f"{environment['kda_cuda']}, {kernels_cuda}"],
        ["commit", result["commit"] + (" with changes" if result["dirty"] else "")],
        ["run", f"{result['created']}, {result['seconds']:.0f} s"],
    ]
    parts = [markdown_table(["", ""], facts, left=2)]
    for operator in result["implementations"]:
        about, recorded = result["implementations"][operator], recorded_peers(result, operator)
        parts.append(f"### The {OPERATORS[operator].title}")
        if not OPERATORS[operator].in_full:
            parts.append(f"K = V = 128, bf16, {OPERATORS[operator].conditions}.")
        if operator == RAW_BACKWARD.name:
            parts += _price_of_transforms(result)
        if summary := _comparison_rows(result, operator):
            parts.append("Time of the peer over ours, geometric mean over the board's shapes, and the worst one:")
            parts.append(markdown_table(["peer", "gates", "mean", "worst", "at"], summary, left=2))
        parts += _accuracy_parts(result, operator)
        for family in _families(result, operator):
            others = [name for name in about if name != "ours"]
            columns = ["shape", "lengths", "H", "path", "roofline", "ours", "p10–p90", "of roofline", "host", "MiB"]
            columns += [about[name]["label"] for name in others]
            columns += [f"{what['label']} {RECORDED_MARK}" for what in recorded.values()]
            rows = []
            for case in cases(result, operator, family):
                ours, us = case["measurements"]["ours"], median_us(case, "ours")
                row = [case["shape"], tables.shape_of(case).lengths_text, str(case["heads"]), case["plan"]["path"]]
                row += [time_text(case["roofline_us"]), f"**{time_text(us)}**"]
                if us is None:
                    row += [NOTHING] * 4
                else:
                    spread = ours["gpu"]["us"]
                    row += [f"{time_text(spread['p10'])}–{time_text(spread['p90'])}", f"{case['roofline_us'] / us:.1%}"]
                    row += [tables.host_text(ours), tables.bytes_text(ours["peak_bytes"])]
                row += [time_text(median_us(case, name)) for name in others]
                row += [time_text(recorded_us(operator, case["shape"], name, family)) for name in recorded]
                rows.append(row)
            parts += [f"Gates **{family}**, µs of GPU time:", markdown_table(columns, rows, left=2)]
        if operator == TRAINING.name:
            parts += _memory_parts(result)
        for what in about.values():
            method = "CUDA-graph replays" if what["method"] == "graph" else "events over calls back to back"
            note = f"; {what['note']}" if what["note"] else ""
            parts.append(f"- {what['label']} {what['version']}: {method}{note}".replace("  ", " "))
        for name, reason in result["unavailable"][operator].items():
            parts.append(f"- {name}: not measured, {reason}")
        if recorded:
            kept = ", ".join(f"{what['label']} {what['version']}" for what in recorded.values())
            parts.append(f"- {RECORDED_MARK} recorded earlier on such a GPU (`bench/peers_h200.json`): {kept}")
        for name in _pictures(result, operator):
            parts.append(f"![{name.removesuffix('.png').replace('_', ' ')}]({figure_prefix}{name})")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
