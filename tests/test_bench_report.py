"""What is made of the files of runs: tables, pictures, comparisons, and the judgement of the planner."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import bench_results
import pytest
from rich.console import Console

from bench import compare, figures, report, results, sweep, tables
from bench.shapes import BOARD, FORWARD_SHAPES, Shape

matplotlib = pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")

MARKED = f"# Title\n\n{report.BEGIN}\n{report.PLACEHOLDER}\n{report.END}\n\nend\n"


@pytest.fixture
def site(tmp_path: Path) -> report.Site:
    """A project whose documents have markers, and no results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for document in ("README.md", "docs/benchmarks.md"):
        (tmp_path / document).write_text(MARKED)
    return report.Site(tmp_path, tmp_path / "results")


# ---- files and ratios ----


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = bench_results.board()
    path = results.save(run, tmp_path / "deep" / "folder")
    assert path.name == "board-20260131-120000-aaaaaaaa.json"
    assert results.load(path) == run
    assert len(path.read_text().splitlines()) < 100 + len(run["cases"])  # a line for each case: readable as a diff


def test_newest_complete_run(tmp_path: Path) -> None:
    assert results.newest("board", tmp_path) is None
    first = results.save(bench_results.board(), tmp_path)
    partial = bench_results.board(created="2026-03-01T00:00:00+00:00") | {"complete": False}
    second = results.save(partial, tmp_path)
    results.save(bench_results.board(created="2025-12-31T23:00:00+00:00"), tmp_path)
    assert results.newest("board", tmp_path) == first
    assert results.newest("board", tmp_path, complete=False) == second
    assert results.newest("sweep", tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json"):
        results.load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="cannot read"):
        results.load(tmp_path / "none.json")


def test_ratios_mean_and_worst() -> None:
    run = bench_results.board()
    for case in results.cases(run, "chunk_fwd", "long"):
        if case["shape"] == "h16_8192":
            case["measurements"]["ours"] = bench_results.measurement(24 * case["roofline_us"])
        if case["shape"] == "h4_1024":
            case["measurements"]["fla"] = {"error": "failed"}
        if case["group"] == "curve":  # not in the means
            case["measurements"]["ours"] = bench_results.measurement(1e9)
    found = {(c.peer, c.family, c.recorded): c for c in results.comparisons(run, "chunk_fwd")}
    random, long = found["fla", "random", False], found["fla", "long", False]
    assert random.mean == pytest.approx(3) and len(random.ratios) == len(BOARD)
    assert long.worst == ("h16_8192", pytest.approx(0.5)) and "h4_1024" not in long.ratios
    assert long.mean == pytest.approx((3 ** (len(BOARD) - 2) * 0.5) ** (1 / (len(BOARD) - 1)))
    recorded = found["cudnn", "long", True]
    ours = next(c for c in results.cases(run, "chunk_fwd", "long") if c["shape"] == "h8_65536")
    assert recorded.ratios["h8_65536"] == pytest.approx(17768 / ours["measurements"]["ours"]["gpu"]["us"]["median"])
    assert {peer for peer, _, is_recorded in found if is_recorded} == {"flash_kda", "cudnn", "fla"}


def test_recorded_times_do_not_stand_beside_another_gpu() -> None:
    run = bench_results.board()
    run["environment"]["gpu"] = "NVIDIA H100"
    assert results.recorded_peers(run, "chunk_fwd") == {}
    assert not any(c.recorded for c in results.comparisons(run, "chunk_fwd"))
    assert report.RECORDED_MARK not in report.readme_section(run, "")


@pytest.mark.parametrize("width", [80, 200])
def test_terminal_tables_have_all_shapes_and_say_what_failed(width: int) -> None:
    run = bench_results.board()
    run["cases"][0]["measurements"]["ours"] = {"error": "wrong result, not timed"}
    run["cases"][2]["measurements"]["fla"]["gpu"]["clocks"]["after"]["sm_mhz"] = 1400.0
    console = Console(width=width, file=io.StringIO())
    tables.print_board(run, console)
    text = console.file.getvalue()
    assert all(text.count(f" {shape.name} ") >= 2 for shape in FORWARD_SHAPES)
    assert "chunk_fwd h96_8192 random ours: wrong result, not timed" in text and ("failed" in text or width == 80)
    assert "chunk_fwd h96_mixed random fla: SM clock 1980 -> 1400 MHz" in text
    assert "3.00×" in text and "flash_kda not measured: flash_kda is not installed" in text
    assert ("p10 to p90" in text) == (width == 200)


# ---- report ----


def test_report_without_results(site: report.Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([], site) == report.EXIT_GOOD
    assert "no complete run" in capsys.readouterr().out
    assert site.readme.read_text() == MARKED
    assert report.main(["--check"], site) == report.EXIT_GOOD
    site.readme.write_text(MARKED.replace(report.PLACEHOLDER, "2× faster than light"))
    assert report.main(["--check"], site) == report.EXIT_STALE
    assert "README.md" in capsys.readouterr().err


def test_report_writes_what_it_then_finds_right(site: report.Site) -> None:
    results.save(bench_results.board(), site.results)
    assert report.main(["--check"], site) == report.EXIT_STALE
    assert report.main([], site) == report.EXIT_GOOD
    assert report.main(["--check"], site) == report.EXIT_GOOD
    first = {path: path.read_text() for path in (site.readme, site.details)}
    assert report.main([], site) == report.EXIT_GOOD
    assert first == {path: path.read_text() for path in first}

    readme = site.readme.read_text()
    assert readme.startswith("# Title\n\n") and readme.endswith("\n\nend\n") and report.PLACEHOLDER not in readme
    rows = [line for line in readme.splitlines() if line.startswith("| h")]
    assert len(rows) == len(BOARD)
    ours = 4 * 1020887040 / bench_results.BANDWIDTH_GBPS / 1e3
    assert f"| h96_8192 | 8192 | 96 | {ours / 4:.0f} | **{ours:.0f}** | **{ours:.0f}** |" in readme
    assert "| 1084 / 2369 |" in readme  # cuDNN's recorded times of both families
    assert "| FLA | random | 3.00× | 3.00× |" in readme and "| FLA † |" not in readme
    assert readme.count("2685") == 0  # FLA was measured in the run
    details = site.details.read_text()
    assert all(f"| {shape.name} |" in details for shape in FORWARD_SHAPES)
    assert "a" * 40 in details and "flash_kda is not installed" in details and "2685" in details

    pictures = {"chunk_fwd_time.png", "chunk_fwd_lengths.png", "chunk_fwd_heads.png"}
    assert {path.name for path in site.figures.glob("*.png")} == pictures
    for document, prefix in ((readme, site.root), (details, site.root / "docs")):
        links = [part.partition(")")[0] for part in document.split("](")[1:]]
        assert links and all((prefix / link).exists() for link in links)


@pytest.mark.parametrize("spoil", ["readme", "details", "picture", "stamp", "newer run"])
def test_check_finds_what_does_not_match(site: report.Site, spoil: str, capsys: pytest.CaptureFixture[str]) -> None:
    results.save(bench_results.board(), site.results)
    assert report.main([], site) == report.EXIT_GOOD
    if spoil == "readme":
        site.readme.write_text(site.readme.read_text().replace("3.00×", "4.00×", 1))
    elif spoil == "details":
        site.details.write_text(site.details.read_text().replace("| 1980 ", "| 1980.5 ", 1))
    elif spoil == "picture":
        (site.figures / "chunk_fwd_heads.png").unlink()
    elif spoil == "stamp":
        stamp = json.loads((site.figures / report.STAMP).read_text())
        (site.figures / report.STAMP).write_text(json.dumps(stamp | {"sha256": "0" * 64}))
    else:
        results.save(bench_results.board(1.001, "2026-02-01T00:00:00+00:00"), site.results)
    capsys.readouterr()
    assert report.main(["--check"], site) == report.EXIT_STALE
    assert "python -m bench.report" in capsys.readouterr().err


def test_pictures_are_compared_by_their_data(site: report.Site) -> None:
    results.save(bench_results.board(), site.results)
    report.main([], site)
    for picture in site.figures.glob("*.png"):
        picture.write_bytes(b"drawn by another version")
    assert report.main(["--check"], site) == report.EXIT_GOOD


def test_a_named_run_and_missing_markers(site: report.Site, capsys: pytest.CaptureFixture[str]) -> None:
    old = results.save(bench_results.board(), site.results)
    results.save(bench_results.board(2.0, "2026-02-01T00:00:00+00:00"), site.results)
    assert report.main([str(old)], site) == report.EXIT_GOOD
    assert "3.00×" in site.readme.read_text()
    assert report.main(["none.json"], site) == report.EXIT_USAGE
    site.readme.write_text("no markers")
    assert report.main([], site) == report.EXIT_USAGE
    assert "README.md" in capsys.readouterr().err


def test_figure_data() -> None:
    data = figures.figure_data(bench_results.board(), "chunk_fwd")
    lengths = data["chunk_fwd_lengths.png"]["panels"][0]
    assert lengths["x"] == [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    ours = next(one for one in lengths["series"] if one["name"] == "ours")
    assert ours["speed"] == pytest.approx([r / 4 for r in lengths["roofline"]])
    assert data["chunk_fwd_heads.png"]["panels"][1]["x"] == [4, 8, 16, 24, 32, 64, 96]
    times = data["chunk_fwd_time.png"]["panels"]
    assert [panel["title"] for panel in times] == ["gates: random", "gates: long"]
    assert times[0]["shapes"] == [shape.name for shape in BOARD]
    names = {one["name"]: one["recorded"] for one in times[0]["series"]}
    assert names == {"ours": False, "fla": False, "flash_kda": True, "cudnn": True}
    changed = bench_results.board(1.01)
    assert figures.data_hash(data) == figures.data_hash(figures.figure_data(bench_results.board(), "chunk_fwd"))
    assert figures.data_hash(data) != figures.data_hash(figures.figure_data(changed, "chunk_fwd"))


def test_failed_and_missing_measurements_are_reported_as_such(site: report.Site) -> None:
    run = bench_results.board()
    run["cases"] = [c for c in run["cases"] if c["group"] == "board"]
    run["cases"][0]["measurements"]["ours"] = {"error": "wrong result"}
    del run["cases"][3]["measurements"]["fla"]
    results.save(run, site.results)
    assert report.main([], site) == report.EXIT_GOOD
    assert "| h96_8192 | 8192 | 96 | 237 | **–** |" in site.readme.read_text()
    assert {path.name for path in site.figures.glob("*.png")} == {"chunk_fwd_time.png", "chunk_fwd_heads.png"}


def test_distance_from_the_reference(site: report.Site) -> None:
    """The largest of ours and of peers; of a run that has not taken it nothing is said."""
    run = bench_results.board()
    results.save(run, site.results)
    assert report.main([], site) == report.EXIT_GOOD
    assert "Relative RMSE against" not in site.details.read_text()
    run["created"] = "2026-02-01T12:00:00+00:00"
    for case in run["cases"]:
        case["measurements"]["ours"]["reference_errors"] = {"o": 1e-3, "final_state": 2e-3}
        case["measurements"]["ours_composite"]["reference_errors"] = {"o": 0.0}
    run["cases"][3]["measurements"]["ours"]["reference_errors"] = {"o": 1.5e-3, "final_state": 1e-3}
    run["cases"][4]["measurements"]["fla"]["reference_errors"] = {"o": 3e-3}
    results.save(run, site.results)
    assert report.main([], site) == report.EXIT_GOOD
    details = site.details.read_text()
    assert "|  | o | final_state |" in details
    assert "| OURS | 1.5e-03 | 2.0e-03 |" in details and "| FLA | 3.0e-03 | – |" in details
    assert "composite | 0.0" not in details


def test_documents_of_the_project_match_the_newest_run() -> None:
    """What CI checks: README, docs/benchmarks.md and the pictures are those of the newest complete run."""
    assert report.main(["--check"]) == report.EXIT_GOOD


# ---- compare ----


def verdicts(old: dict[str, Any], new: dict[str, Any], implementation: str = "ours") -> dict[str, str]:
    found = compare.changes(old, new)
    return {f"{c.shape} {c.family}": c.verdict for c in found if c.implementation == implementation}


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.015, "same"), (1.05, "slower"), (2.0, "slower"), (0.95, "faster")]
)
def test_changes_beyond_the_spread(factor: float, verdict: str) -> None:
    found = verdicts(bench_results.board(), bench_results.board(factor))
    assert set(found.values()) == {verdict} and len(found) == 2 * len(FORWARD_SHAPES)


def test_a_change_within_a_wide_spread_is_none() -> None:
    shape = BOARD[0]
    old, new = bench_results.board(), bench_results.board()
    for run, us in ((old, 100.0), (new, 108.0)):
        run["cases"] = [bench_results.case(shape, "long", ours=us)]
        run["cases"][0]["measurements"]["ours"] = bench_results.measurement(us, spread=0.06)
    assert verdicts(old, new) == {f"{shape.name} long": "same"}


def test_broken_repaired_new_and_gone() -> None:
    old, new = bench_results.board(), bench_results.board()
    old["cases"][0]["measurements"]["ours"] = {"error": "wrong result"}
    new["cases"][1]["measurements"]["ours"] = {"error": "wrong result"}
    del old["cases"][2], new["cases"][-1]
    found = verdicts(old, new)
    assert sorted(v for v in found.values() if v != "same") == ["broken", "gone", "new", "repaired"]


def test_compare_exits_by_our_kernels_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results.save(bench_results.board(), tmp_path / "old")
    peers_slower = bench_results.board()
    for case in peers_slower["cases"]:
        for name in ("fla", "ours_composite"):
            case["measurements"][name] = bench_results.measurement(1e6)
    same = results.save(peers_slower, tmp_path / "same")
    slower = bench_results.board(commit="b" * 40)
    slower["cases"][4]["measurements"]["ours"] = bench_results.measurement(1e6)
    slower["environment"]["driver"] = "590.1"
    worse = results.save(slower, tmp_path / "worse")
    assert compare.main([str(old), str(old)]) == compare.EXIT_GOOD
    assert compare.main([str(old), str(same)]) == compare.EXIT_GOOD
    capsys.readouterr()
    assert compare.main([str(old), str(worse)]) == compare.EXIT_SLOWER
    printed = capsys.readouterr().out
    assert slower["cases"][4]["shape"] in printed and "slower" in printed and "driver: 580.1 -> 590.1" in printed
    assert printed.count("long") + printed.count("random") == 1  # only what changed
    assert compare.main([str(worse), str(old)]) == compare.EXIT_GOOD
    assert compare.main([str(old), str(tmp_path / "none.json")]) == compare.EXIT_USAGE


# ---- sweep ----


def swept(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A sweep at points ``NxT_hH`` with the time of each choice."""
    cases = []
    for name, measured in times.items():
        N, T, H = map(int, name.replace("x", " ").replace("_h", " ").split())
        measurements = {choice: {"median_us": us} for choice, us in measured.items()}
        cases.append(bench_results.case(Shape(name, (T,) * N, H), "long") | {"measurements": measurements})
    return {"environment": bench_results.board()["environment"], "cases": cases}


CUTS = {n: f"stepwise, segments of {n} chunks" for n in (4, 16, 64)}
PAST_CHOICES = ("staged, value tile 32", "staged, value tile 64", "staged, value tile 128")


def set_plans(monkeypatch: pytest.MonkeyPatch, **plans: dict[str, Any]) -> None:
    """What the planner now says of points, whatever it really says."""
    monkeypatch.setattr(sweep, "_plan", lambda case, *device: plans[case["shape"]])


def test_planner_is_judged_by_the_best_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    short, middle, long = CUTS.values()
    assert {*CUTS.values()} < {choice.name for choice in sweep.CHOICES}
    plan = {"path": "stepwise", "value_tile": 128}
    set_plans(monkeypatch, **{"1x1024_h4": plan | {"segment_chunks": 4}, "4x1024_h96": plan | {"segment_chunks": 64}})
    good = {short: 100.0, middle: 104.0, long: 200.0}
    found = sweep.quality(swept({"1x1024_h4": good}))
    assert found.good_share == 1 and found.points == 1 and not found.poor
    found = sweep.quality(swept({"4x1024_h96": {short: 50.0, middle: 90.0, long: 100.0}, "1x1024_h4": good}))
    assert found.poor == {"4x1024_h96": 2.0} and found.good_share == 0.5
    found = sweep.quality(swept({"4x1024_h96": {short: 96.0, middle: 98.0, long: 100.0}}))
    assert found.good_share == 1  # within 5 %
    found = sweep.quality(swept({"4x1024_h96": {short: 96.0}, "1x1024_h4": {}}))
    assert found.unknown == ["4x1024_h96"] and found.points == 1


def test_paths_and_cuts_are_judged_by_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut of any length is judged by the plan's own measurement, as long as the plan is still that."""
    fused = {"path": "fused", "value_tile": 64, "clusters": 64}
    cut = {"path": "stepwise", "value_tile": 128, "segment_chunks": 9}
    run = swept({"1x8192_h64": {"stepwise, no cut": 300.0}, "1x8192_h4": {}})
    run["cases"][0]["measurements"]["fused"] = {"median_us": 100.0, "plan": fused}
    run["cases"][1]["measurements"] = {
        "the plan's": {"median_us": 40.0, "plan": cut},
        CUTS[4]: {"median_us": 30.0, "plan": cut | {"segment_chunks": 4}},
        CUTS[16]: {"error": "it broke"},
    }
    set_plans(monkeypatch, **{"1x8192_h64": fused | {"segment_chunks": 0}, "1x8192_h4": cut})
    found = sweep.quality(run)
    assert found.points == 2 and found.poor == {"1x8192_h4": pytest.approx(4 / 3)} and not found.unknown
    set_plans(monkeypatch, **{"1x8192_h64": fused | {"clusters": 66}, "1x8192_h4": cut | {"segment_chunks": 8}})
    assert sweep.quality(run).unknown == ["1x8192_h64", "1x8192_h4"]


def test_kernels_that_were_not_swept_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep from before there was a path or a cut judges what it measured."""
    times = {"stepwise, no cut": 100.0}
    run = swept({"1x8192_h64": times, "1x8192_h4": times, "1x1024_h4": times})
    plan = {"path": "stepwise", "value_tile": 128, "segment_chunks": 0}
    cut = plan | {"segment_chunks": 4}
    fused = {"path": "fused", "value_tile": 64, "clusters": 64}
    set_plans(monkeypatch, **{"1x8192_h64": fused, "1x8192_h4": cut, "1x1024_h4": plan})
    # The fused kernel of a time when it had no clusters is another one.
    run["cases"][0]["measurements"]["fused"] = {"median_us": 80.0, "plan": {"path": "fused", "value_tile": 64}}
    found = sweep.quality(run)
    assert found.points == 1 and found.good_share == 1 and found.not_swept == ["1x8192_h64", "1x8192_h4"]
    path = results.save(bench_results.board() | run | {"kind": "sweep"}, tmp_path)
    assert sweep.main(["--check", str(path)]) == sweep.EXIT_GOOD
    assert "not counted: 2 points" in capsys.readouterr().out


def test_a_sweep_of_paths_that_are_no_longer_chosen_judges_nothing() -> None:
    """It is understood by the names of its choices, and says of each point that it does not count."""
    found = sweep.quality(swept({"1x8192_h64": dict.fromkeys(PAST_CHOICES, 100.0), "1x8192_h4": {}}))
    assert found.points == 0 and found.not_swept == ["1x8192_h64"] and not found.unknown


def test_grid_is_wide_enough() -> None:
    points = sweep.grid_points(sweep.GRID)
    assert len({p.name for p in points}) == len(points) >= 24
    assert {p.heads for p in points} >= {2, 16, 96} and {p.sequences for p in points} >= {1, 4}
    assert all(p.tokens * p.heads <= sweep.MOST_TOKEN_HEADS for p in sweep.grid_points(sweep.FULL_GRID))


def test_every_plan_without_a_cut_is_swept() -> None:
    """Forced, that is: by one choice. A cut has any length, and is measured as the plan's own choice."""
    plans = [sweep._plan(bench_results.case(p, "long"), 90, 132) for p in sweep.grid_points(sweep.FULL_GRID)]
    forced = [choice for choice in sweep.CHOICES if choice != sweep.PLANNED]
    chosen = [[c.name for c in forced if c.is_choice_of(plan)] for plan in plans if plan["segment_chunks"] == 0]
    assert chosen and all(len(names) == 1 for names in chosen)
    assert {"stepwise, no cut", "fused"} <= {name for names in chosen for name in names}
    assert not any(choice.is_choice_of({"path": "staged"}) for choice in forced)
    assert sweep.CHOICES[-1] == sweep.PLANNED and all(sweep.PLANNED.is_choice_of(plan) for plan in plans)


FAKE_BINARY = """#!{python}
import json, sys
if "--help" in sys.argv: print("  --lengths --heads --gate --json --iterations {flags} N"); sys.exit()
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if value.get("--segment-chunks") == "4": sys.exit("it broke")
plan = {{"path": "stepwise", "value_tile": 128, "segment_chunks": int(value.get("--segment-chunks", 7)), "reason": ""}}
if value.get("--segment-chunks") == "8": plan["segment_chunks"] = 9
json.dump({{"plan": plan, "median_us": 5.0, "min_us": 4.0, "p90_us": 6.0, "error_o": 1e-3}}, open(value["--json"], "w"))
"""


def fake_binary(tmp_path: Path, flags: str) -> Path:
    path = tmp_path / "bench"
    path.write_text(FAKE_BINARY.format(flags=flags, python=sys.executable))
    path.chmod(0o755)
    return path


def test_sweep_calls_the_binary_and_believes_only_what_it_forced(tmp_path: Path) -> None:
    point = Shape("1x64_h1", (64,), 1)
    binary = fake_binary(tmp_path, "--path --segment-chunks")
    assert sweep.lacking_flags(binary) == []
    taken = {choice.name: sweep.time_point(binary, point, choice, tmp_path) for choice in sweep.CHOICES}
    plan = {"path": "stepwise", "value_tile": 128, "clusters": 0, "segment_chunks": 0}
    assert taken["stepwise, no cut"]["median_us"] == 5.0 and taken["stepwise, no cut"]["plan"] == plan
    assert taken["stepwise, segments of 4 chunks"] == {"error": "it broke"}
    assert "another plan" in taken["fused"]["error"]
    assert "another plan" in taken["stepwise, segments of 8 chunks"]["error"]
    assert taken["stepwise, segments of 16 chunks"]["plan"] == plan | {"segment_chunks": 16}
    assert taken["the plan's"]["plan"] == plan | {"segment_chunks": 7}
    assert sweep.lacking_flags(fake_binary(tmp_path, "--other")) == ["--path", "--segment-chunks"]
    with pytest.raises(ValueError, match="make cmake"):
        sweep.lacking_flags(tmp_path / "none")


def test_sweep_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--check", "--results", str(tmp_path)]) == sweep.EXIT_GOOD
    assert "no sweep" in capsys.readouterr().out


def test_plan_is_near_the_best_on_the_recorded_sweep() -> None:
    """The plan's choice is within 5 % of the best measured one on 95 % of the grid."""
    path = results.newest("sweep", complete=False)
    if path is None:
        pytest.skip("no sweep in bench/results yet: python -m bench.sweep makes one on a GPU")
    found = sweep.quality(results.load(path))
    assert found.points + len(found.not_swept) >= len(sweep.grid_points(sweep.GRID)) * 0.9
    if not found.points:
        pytest.skip(f"{path.name} measured none of the kernels that the plan takes now: python -m bench.sweep does")
    assert found.good_share >= sweep.GOOD_SHARE, f"{path.name}: {found.poor} {found.unknown}"


def test_benchmark_documents_name_files_that_exist() -> None:
    root = results.ROOT
    for document in ("docs/benchmarks.md", "docs/profiling.md"):
        text = (root / document).read_text()
        for part in text.split("`")[1::2]:
            if part.startswith("bench/") and "*" not in part and part not in ("bench/fla_tuned.json", "bench/results/"):
                assert (root / part).exists(), f"{document}: {part}"
