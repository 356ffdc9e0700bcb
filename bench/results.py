"""Files of runs, and what follows from one: ratios against peers, measured in the run or recorded earlier."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.environment import ROOT

__all__ = [
    "Comparison",
    "RESULTS",
    "comparisons",
    "file_name",
    "geometric_mean",
    "load",
    "median_us",
    "newest",
    "ratios_of_operators",
    "recorded_peers",
    "recorded_us",
    "save",
]

FORMAT = 1  # of the files; a reader refuses others
RESULTS = ROOT / "bench" / "results"
RECORDED = Path(__file__).with_name("peers_h200.json")

Json = dict[str, Any]


def file_name(kind: str, created: datetime, commit: str) -> str:
    """``board-20260131-120000-0123abcd.json``: names sort by date."""
    return f"{kind}-{created:%Y%m%d-%H%M%S}-{commit[:8]}.json"


def save(content: Json, folder: Path) -> Path:
    """Writes a run, one case a line. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(content["kind"], datetime.fromisoformat(content["created"]), content["commit"])
    head = {name: value for name, value in content.items() if name != "cases"}
    cases = ",\n".join("  " + json.dumps(case, separators=(",", ":")) for case in content["cases"])
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "cases": [\n' + cases + "\n ]\n}\n"
    json.loads(text)  # it is JSON
    path.write_text(text)
    return path


def load(path: Path | str) -> Json:
    """Reads a run.

    Raises:
        ValueError: the file is missing, no JSON, or of another format.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a file of a run: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of a run of format {FORMAT}")
    return content


def newest(kind: str, folder: Path = RESULTS, complete: bool = True) -> Path | None:
    """The newest file of a kind, by default only of a run over everything; None if there is none."""
    for path in sorted(folder.glob(f"{kind}-*.json"), reverse=True):
        if not complete or load(path).get("complete"):
            return path
    return None


def cases(result: Json, operator: str, family: str | None = None, group: str | None = None) -> Iterator[Json]:
    """The cases of an operator, of one family and group of shapes if given."""
    for case in result["cases"]:
        if case["operator"] == operator and family in (None, case["family"]) and group in (None, case["group"]):
            yield case


def median_us(case: Json, implementation: str) -> float | None:
    """GPU time of an implementation in a case; None if it was not or could not be timed."""
    measurement = case["measurements"].get(implementation, {})
    return measurement["gpu"]["us"]["median"] if "gpu" in measurement else None


def recorded_peers(result: Json, operator: str) -> dict[str, Json]:
    """Peers whose recorded times can stand beside a run, by name: none if it was made on another GPU."""
    recorded = json.loads(RECORDED.read_text())
    same_gpu = recorded["gpu"] == result["environment"].get("gpu")
    return recorded[operator]["peers"] if same_gpu and operator in recorded else {}


def recorded_us(operator: str, shape: str, peer: str, family: str) -> float | None:
    """Recorded time of a peer; None if there is none."""
    times = json.loads(RECORDED.read_text()).get(operator, {}).get("us", {}).get(shape, {}).get(peer)
    return times.get(family) if isinstance(times, dict) else times


def geometric_mean(ratios: Iterable[float]) -> float:
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


def ratios_of_operators(result: Json, operator: str, other: str) -> dict[tuple[str, str], float]:
    """Our time of an operator over that of another one for the same shapes and families, by (shape, family)."""
    others = {(case["shape"], case["family"]): median_us(case, "ours") for case in cases(result, other)}
    found = {}
    for case in cases(result, operator):
        key = case["shape"], case["family"]
        if (us := median_us(case, "ours")) and (other_us := others.get(key)):
            found[key] = us / other_us
    return found


@dataclass(frozen=True)
class Comparison:
    """Ours against one peer, for one family of gates: time of the peer over ours; above 1 we are faster."""

    operator: str
    peer: str
    label: str
    family: str
    recorded: bool  # the peer's times are recorded ones, not of this run
    ratios: dict[str, float]  # by shape

    @property
    def mean(self) -> float:
        """Geometric mean."""
        return geometric_mean(self.ratios.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The shape that comes out worst for us, and its ratio."""
        return min(self.ratios.items(), key=lambda item: item[1])


def comparisons(result: Json, operator: str) -> list[Comparison]:
    """Of ours with every peer that has times, over the board's shapes, measured peers first."""
    found = []
    families = list(dict.fromkeys(case["family"] for case in cases(result, operator)))
    measured = {
        name: about["label"] for name, about in result["implementations"][operator].items() if about["kind"] == "peer"
    }
    recorded = {name: about["label"] for name, about in recorded_peers(result, operator).items()}
    for is_recorded, peers in ((False, measured), (True, recorded)):
        for peer, label in peers.items():
            for family in families:
                ratios = {}
                for case in cases(result, operator, family, "board"):
                    ours = median_us(case, "ours")
                    theirs = median_us(case, peer)
                    if is_recorded:
                        theirs = recorded_us(operator, case["shape"], peer, family)
                    if ours and theirs:
                        ratios[case["shape"]] = theirs / ours
                if ratios:
                    found.append(Comparison(operator, peer, label, family, is_recorded, ratios))
    return found
