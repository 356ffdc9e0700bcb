"""The pictures of a run: what is in them, as plain data, and how they are drawn.

The data decide whether a picture is up to date (bench.report --check); the bytes of a PNG depend on the version that
drew it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.results import cases, median_us, recorded_peers, recorded_us
from bench.shapes import CURVE_HEADS, CURVE_TOKENS
from bench.tables import label_of

__all__ = ["data_hash", "draw", "figure_data"]

Json = dict[str, Any]

OURS_COLOR = "tab:blue"
COLORS = {"fla": "tab:orange", "flash_kda": "tab:green", "cudnn": "tab:red", "ours_composite": "tab:gray"}
OTHER_COLOR = "tab:purple"
FEWEST_POINTS = 3  # of a curve
MARGIN = 1.6  # from the shortest and longest time to the border, as a factor


def figure_data(result: Json, operator: str) -> dict[str, Json]:
    """Everything that the pictures of an operator show, by file name."""
    about = result["implementations"][operator]
    peers = [name for name, what in about.items() if what["kind"] == "peer"]
    series = [{"name": name, "label": label_of(result, operator, name), "recorded": False} for name in ["ours", *peers]]
    for name, what in recorded_peers(result, operator).items():
        if name not in peers:  # measured in this run: nothing recorded is needed
            series.append({"name": name, "label": f"{what['label']} (recorded)", "recorded": True})

    def us(case: Json, one: Json) -> float | None:
        if one["recorded"]:
            return recorded_us(operator, case["shape"], one["name"], case["family"])
        return median_us(case, one["name"])

    families = list(dict.fromkeys(case["family"] for case in cases(result, operator)))
    figures: dict[str, Json] = {}
    time_panels = []
    for family in families:
        board = list(cases(result, operator, family, "board"))
        if board:
            time_panels.append(
                {
                    "title": f"gates: {family}",
                    "shapes": [case["shape"] for case in board],
                    "roofline_us": [case["roofline_us"] for case in board],
                    "series": [one | {"us": [us(case, one) for case in board]} for one in series],
                }
            )
    if time_panels:
        figures[f"{operator}_time.png"] = {"kind": "time", "panels": time_panels}

    def curve(x: Callable[[Json], int], belongs: Callable[[Json], bool]) -> list[Json]:
        panels = []
        for family in families:
            found = sorted((case for case in cases(result, operator, family) if belongs(case)), key=x)
            if len(found) < FEWEST_POINTS:
                continue
            work = [sum(case["lengths"]) * case["heads"] for case in found]
            times = [[us(case, one) for case in found] for one in series]
            panels.append(
                {
                    "title": f"gates: {family}",
                    "x": [x(case) for case in found],
                    "roofline": [w / case["roofline_us"] for w, case in zip(work, found, strict=True)],
                    "series": [
                        one | {"speed": [t and w / t for t, w in zip(ts, work, strict=True)]}
                        for one, ts in zip(series, times, strict=True)
                    ],
                }
            )
        return panels

    lengths = curve(lambda c: c["lengths"][0], lambda c: len(c["lengths"]) == 1 and c["heads"] == CURVE_HEADS)
    if lengths:
        label = f"tokens of one sequence (H = {CURVE_HEADS})"
        figures[f"{operator}_lengths.png"] = {"kind": "speed", "x_label": label, "panels": lengths}
    heads = curve(lambda c: c["heads"], lambda c: c["lengths"] == [CURVE_TOKENS])
    if heads:
        label = f"heads (one sequence of {CURVE_TOKENS} tokens)"
        figures[f"{operator}_heads.png"] = {"kind": "speed", "x_label": label, "panels": heads}
    return figures


def data_hash(figures: dict[str, Json]) -> str:
    """SHA-256 of the data, numbers to four significant digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, dict):
            return {name: plain(x) for name, x in value.items()}
        return [plain(x) for x in value] if isinstance(value, list) else value

    return hashlib.sha256(json.dumps(plain(figures), sort_keys=True).encode()).hexdigest()


def draw(figures: dict[str, Json], folder: Path, subtitle: str) -> None:
    """Writes the pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in figures.items():
        panels = data["panels"]
        lowest = min(_times(panels)) / MARGIN if data["kind"] == "time" else 0.0
        height = 1.9 + 0.36 * len(panels[0]["shapes"]) if data["kind"] == "time" else 4.7
        figure = Figure(figsize=(5.5 * len(panels), height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            if data["kind"] == "time":
                _draw_times(axis, panel, lowest)
            else:
                _draw_speeds(axis, panel)
            axis.set_title(panel["title"], fontsize="medium")
        if data["kind"] == "time":
            axes[0].set_xlim(lowest, MARGIN * max(_times(panels)))
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, fontsize="small", loc="outside lower center", ncols=len(labels))
        if data["kind"] == "speed":
            axes[0].set_ylabel("tokens × heads per µs")
            for axis in axes:
                axis.set_xlabel(data["x_label"])
        figure.suptitle(subtitle, fontsize="small", color="0.35")
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})


def _times(panels: list[Json]) -> list[float]:
    """All times of a picture, rooflines included."""
    times = [us for panel in panels for one in panel["series"] for us in one["us"] if us is not None]
    return times + [us for panel in panels for us in panel["roofline_us"]]


def _style(one: Json) -> dict[str, Any]:
    color = OURS_COLOR if one["name"] == "ours" else COLORS.get(one["name"], OTHER_COLOR)
    return {"color": color, "markerfacecolor": "none" if one["recorded"] else color, "label": one["label"]}


def _draw_times(axis: Any, panel: Json, lowest: float) -> None:
    """A line for each shape: the roofline as a bar from ``lowest`` on, implementations as marks, time to the right."""
    rows = range(len(panel["shapes"]))
    axis.barh(rows, [x - lowest for x in panel["roofline_us"]], left=lowest, color="0.85", label="roofline", zorder=0)
    for height, one in enumerate(panel["series"]):  # ours first, and on top
        points = [(us, row) for us, row in zip(one["us"], rows, strict=True) if us is not None]
        marker = "o" if one["name"] == "ours" else "D" if not one["recorded"] else "s"
        size = 8 if one["name"] == "ours" else 6
        style = _style(one) | {"markersize": size, "zorder": 9 - height}
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker, **style)
    axis.set_xscale("log")
    axis.set_yticks(list(rows), panel["shapes"])
    if not axis.yaxis_inverted():  # the panels share the axis
        axis.invert_yaxis()
    axis.grid(axis="x", which="both", color="0.92", zorder=-1)
    axis.set_axisbelow(True)
    axis.set_xlabel("time, µs")


def _draw_speeds(axis: Any, panel: Json) -> None:
    """A line for each implementation, over lengths or heads, both axes logarithmic."""
    axis.plot(panel["x"], panel["roofline"], "--", color="0.5", label="roofline")
    for one in panel["series"]:
        points = [(x, speed) for x, speed in zip(panel["x"], one["speed"], strict=True) if speed]
        line = "o-" if one["name"] == "ours" else "s:" if one["recorded"] else "D-"
        axis.plot(*zip(*points, strict=True) if points else ([], []), line, markersize=5, **_style(one))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(panel["x"], [str(x) for x in panel["x"]])
    axis.minorticks_off()
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
