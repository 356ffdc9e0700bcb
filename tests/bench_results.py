"""A run of the board as it would be written, with made-up times: for the tests of what reads such files."""

from __future__ import annotations

import copy
from typing import Any

from bench.operators import FORWARD, Operator
from bench.shapes import Shape

BANDWIDTH_GBPS = 4300.0
KINDS = {"ours": "ours", "ours_composite": "forced", "fla": "peer"}

Json = dict[str, Any]


def measurement(us: float, spread: float = 0.01) -> Json:
    """A time of ``us`` whose 10th and 90th percentile are ``spread`` away."""
    low, high = us * (1 - spread), us * (1 + spread)
    clocks = {when: {"sm_mhz": 1980.0} for when in ("before", "after")}
    statistics = {"median": us, "p10": low, "p90": high, "min": low, "samples": [low, us, high]}
    return {
        "errors": {"o": 3e-3, "final_state": 3e-3},
        "peak_bytes": 3 << 20,
        "output_bytes": 1 << 20,
        "host_us": statistics | {"median": 11.0},
        "gpu": {"us": statistics, "method": "graph", "calls_per_sample": 4, "warmup_calls": 8, "clocks": clocks},
    }


def case(shape: Shape, family: str, operator: Operator = FORWARD, **times: float) -> Json:
    """times: of each implementation, in microseconds."""
    return {
        "operator": operator.name,
        "shape": shape.name,
        "group": shape.group,
        "family": family,
        "lengths": list(shape.lengths),
        "heads": shape.heads,
        "key_dim": shape.key_dim,
        "value_dim": shape.value_dim,
        "least_bytes": operator.least_bytes(shape),
        "flop": operator.flop(shape),
        "roofline_us": operator.least_bytes(shape) / (BANDWIDTH_GBPS * 1e3),
        "input_sets": 3,
        "input_bytes": 1 << 20,
        "plan": {"path": "stepwise"},
        "measurements": {name: measurement(us) for name, us in times.items()},
    }


def board(slower: float = 1.0, created: str = "2026-01-31T12:00:00+00:00", commit: str = "a" * 40) -> Json:
    """A complete run: ours takes ``slower`` times four rooflines, FLA twelve rooflines."""
    cases = []
    for shape in FORWARD.shapes:
        for family in FORWARD.families:
            roofline = FORWARD.least_bytes(shape) / (BANDWIDTH_GBPS * 1e3)
            cases.append(
                case(shape, family, ours=4 * slower * roofline, ours_composite=90 * roofline, fla=12 * roofline)
            )
    about = {"version": "1.0", "note": ""}
    methods = {"ours": "graph"}
    return copy.deepcopy(
        {
            "format": 1,
            "kind": "board",
            "created": created,
            "commit": commit,
            "dirty": False,
            "note": "",
            "complete": True,
            "seconds": 170.0,
            "environment": {
                "gpu": "NVIDIA H200",
                "driver": "580.1",
                "torch": "2.11.0",
                "cuda": "13.0",
                "triton": "3.6.0",
                "fla": "0.6.0",
                "kda_cuda": "0.1.0",
                "build": {"cuda_version": 13000},
                "compute_capability": "9.0",
                "sm_count": 132,
            },
            "clocks": {when: {"sm_mhz": 1980.0} for when in ("before", "after")},
            "bandwidth_gbps": {"median": BANDWIDTH_GBPS, "samples": [BANDWIDTH_GBPS]},
            "implementations": {
                "chunk_fwd": {
                    name: about | {"label": name.upper(), "kind": kind, "method": methods.get(name, "events")}
                    for name, kind in KINDS.items()
                }
            },
            "unavailable": {"chunk_fwd": {"flash_kda": "flash_kda is not installed"}},
            "preparation": [],
            "cases": cases,
        }
    )


def add_operator(run: Json, operator: Operator, times: dict[str, float]) -> None:
    """Adds all cases of another operator to a run. times: of each implementation, in rooflines of its forward."""
    for shape in operator.shapes:
        for family in operator.families:
            roofline = FORWARD.least_bytes(shape) / (BANDWIDTH_GBPS * 1e3)
            us = {name: factor * roofline for name, factor in times.items()}
            run["cases"].append(case(shape, family, operator, **us))
    run["implementations"][operator.name] = {
        name: {
            "version": "1.0",
            "note": "",
            "label": name.upper(),
            "kind": "peer" if name.startswith("fla") else "ours" if name == "ours" else "forced",
            "method": "graph" if name == "ours" else "events",
        }
        for name in times
    }
    run["unavailable"][operator.name] = {}
