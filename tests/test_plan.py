"""The host-side planner (csrc/kda/plan.cpp) through its Python module: paths, cuts, slots and the workspace."""

from __future__ import annotations

import importlib.util
import json
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

BUILD_SCRIPT = Path(__file__).resolve().parents[1] / "tools/build_planner.py"
H200 = {"compute_capability": 90, "sm_count": 132}
C = 64
STEP = 32
MOST_SEGMENTS = 64  # of a sequence, as their composition goes from one to the next
ALIGNMENT = 256
ROWS_OF_CTA = 64  # of the transposed state, in the fused kernel


def load_planner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_planner", BUILD_SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        return script.load()
    except RuntimeError as missing:  # no compiler or no pybind11; a failing compiler is another error
        pytest.skip(str(missing), allow_module_level=True)


planner = load_planner()
COMPOSITE, STAGED = planner.ChunkFwdPath.composite, planner.ChunkFwdPath.staged
FUSED, STEPWISE = planner.ChunkFwdPath.fused, planner.ChunkFwdPath.stepwise
FUSED_CUT = planner.ChunkFwdPath.fused_cut


def problem(**changes: Any):
    values = {"tokens": 8192, "heads": 96, **H200, **changes}
    values.setdefault("value_heads", values["heads"])
    return planner.ChunkFwdProblem(**values)


def problems(tokens: int, sequences: tuple[int, int] = (0, 300), **fixed: Any) -> st.SearchStrategy[Any]:
    """Any shape that kernels cover, of up to ``tokens`` tokens, on a device of any size."""

    def build(sequences: int, varlen: bool, **shape: int) -> Any:
        batch = 1 if varlen else sequences
        return problem(sequences=sequences, batch=batch, varlen=varlen, **{**shape, **fixed})

    return st.builds(
        build,
        tokens=st.integers(0, tokens),
        sequences=st.integers(*sequences),
        varlen=st.booleans(),
        heads=st.integers(1, 128),
        key_dim=st.sampled_from([64, 128]),
        value_dim=st.sampled_from([64, 128]),
        sm_count=st.integers(1, 200),
    )


def slots_of(cu_seqlens: list[int], tokens: int) -> list[int]:
    """The slots of the chunks or steps of all sequences, as the kernels compute them from cu_seqlens."""
    return [
        begin // tokens + n + c
        for n, (begin, end) in enumerate(pairwise(cu_seqlens))
        for c in range(-(-(end - begin) // tokens))
    ]


def segments_of(cu_seqlens: list[int], segment_chunks: int) -> list[int]:
    """The slots of the segments of all sequences, as the kernels compute them from cu_seqlens."""
    tokens = segment_chunks * C
    return [
        begin // tokens + n + s
        for n, (begin, end) in enumerate(pairwise(cu_seqlens))
        for s in range(max(1, -(-(end - begin) // tokens)))
    ]


lengths_of_sequences = st.lists(
    st.one_of(st.just(0), st.integers(1, 3), st.sampled_from([63, 64, 65, 127, 128, 129]), st.integers(0, 2000)),
    max_size=40,
)


def chains_of(p: Any) -> int:
    """Chains of the fused kernel: one for each sequence and value head."""
    return p.sequences * p.value_heads


def handoff_regions(p: Any, clusters: int) -> dict[str, int]:
    """Bytes of what clusters of the fused kernel hand over, none where each takes whole chains for certain: a state in
    fp32 for each of them, and a word for each of its CTAs.
    """
    if chains_of(p) <= clusters or not (p.varlen or chains_of(p) % clusters):
        return {"handoff_states": 0, "handoff_flags": 0}
    ctas = clusters * p.value_dim // ROWS_OF_CTA
    return {"handoff_states": clusters * p.value_dim * p.key_dim * 4, "handoff_flags": 4 * ctas}


def handoff_bytes(p: Any, clusters: int) -> int:
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in handoff_regions(p, clusters).values())


def input_bytes(p: Any) -> int:
    """Of q, k, v, g and beta."""
    of_token = 2 * p.heads * p.key_dim + p.value_heads * (p.value_dim + p.key_dim + 1)
    return 2 * p.batch * p.tokens * of_token


SLOTS = {"chunks": (planner.chunk_slots, C), "steps": (planner.step_slots, STEP)}
all_slots = pytest.mark.parametrize(("slots", "slot_tokens"), SLOTS.values(), ids=SLOTS)


class TestSlots:
    @all_slots
    @settings(deadline=None, max_examples=300)
    @given(lengths_of_sequences, st.integers(0, 500))
    def test_slots_of_sequences_never_meet_and_fit(self, slots, slot_tokens, lengths, padding):
        """Of chunks and of steps, also if rows follow the last sequence."""
        cu_seqlens = list(accumulate(lengths, initial=0))
        p = problem(tokens=cu_seqlens[-1] + padding, sequences=len(lengths), varlen=True)
        used = slots_of(cu_seqlens, slot_tokens)
        assert len(used) == len(set(used))
        assert all(0 <= slot < slots(p) for slot in used)

    @pytest.mark.parametrize(
        ("batch", "tokens", "chunks", "steps"),
        [(1, 0, 0, 0), (1, 1, 1, 1), (1, 64, 1, 2), (1, 65, 2, 3), (3, 130, 9, 15), (0, 100, 0, 0)]
        + [(2, 2**31, 2**26, 2**27)],
    )
    def test_equal_lengths(self, batch, tokens, chunks, steps):
        p = problem(batch=batch, sequences=batch, tokens=tokens)
        assert (planner.chunk_slots(p), planner.step_slots(p)) == (chunks, steps)

    @pytest.mark.parametrize(
        ("sequences", "tokens", "chunks", "steps"),
        [(0, 0, 0, 0), (5, 0, 5, 5), (1, 8192, 129, 257), (6, 8192, 134, 262), (1, 2**33, 2**27 + 1, 2**28 + 1)],
    )
    def test_cu_seqlens(self, sequences, tokens, chunks, steps):
        p = problem(sequences=sequences, tokens=tokens, varlen=True)
        assert (planner.chunk_slots(p), planner.step_slots(p)) == (chunks, steps)

    @settings(deadline=None, max_examples=300)
    @given(lengths_of_sequences, st.integers(1, 40), st.integers(0, 500))
    def test_segments_never_meet_and_fit(self, lengths, segment_chunks, padding):
        """Every sequence has its slots, an empty one too."""
        cu_seqlens = list(accumulate(lengths, initial=0))
        p = problem(tokens=cu_seqlens[-1] + padding, sequences=len(lengths), varlen=True)
        used = segments_of(cu_seqlens, segment_chunks)
        assert len(used) == len(set(used))
        assert all(0 <= slot < planner.segment_slots(p, segment_chunks) for slot in used)

    @pytest.mark.parametrize(
        ("change", "segment_chunks", "expected"),
        [
            ({"tokens": 640}, 0, 1),
            ({"tokens": 640}, 5, 2),
            ({"tokens": 641}, 5, 3),
            ({"tokens": 0}, 5, 1),
            ({"tokens": 641, "batch": 3, "sequences": 3}, 5, 9),
            ({"tokens": 641, "varlen": True, "sequences": 3}, 5, 5),
            ({"tokens": 641, "varlen": True, "sequences": 3}, 0, 3),
            ({"tokens": 641, "varlen": True, "sequences": 0}, 5, 0),
            ({"tokens": 2**36, "varlen": True}, 1, 2**30 + 1),
        ],
    )
    def test_segment_slots(self, change, segment_chunks, expected):
        assert planner.segment_slots(problem(**change), segment_chunks) == expected

    def test_sizes_are_those_of_the_kernels(self):
        assert (planner.CHUNK_TOKENS, planner.STEP_TOKENS) == (C, STEP)


def packed(sequences: int, tokens: int) -> dict[str, Any]:
    """So many sequences, of as many tokens each on average."""
    return {"sequences": sequences, "tokens": sequences * tokens, "varlen": True}


def rows(sequences: int, tokens: int) -> dict[str, Any]:
    return {"sequences": sequences, "batch": sequences, "tokens": tokens}


PACKED, ROWS = packed(8, 1024), rows(8, 1024)


class TestPath:
    """Which path a call takes, and that the plan says why."""

    @pytest.mark.parametrize("key_dim", [64, 128])
    @pytest.mark.parametrize("value_dim", [64, 128])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("bounded_gate", [False, True])
    def test_kernels_cover(self, key_dim, value_dim, dtype, bounded_gate):
        """Eight sequences of 96 heads: enough for the fused kernel, where the gate allows it."""
        sizes = {"key_dim": key_dim, "value_dim": value_dim, "activation_type": getattr(planner.DataType, dtype)}
        plan = planner.plan_chunk_fwd(problem(**ROWS, **sizes, bounded_gate=bounded_gate))
        assert plan.path == (FUSED if bounded_gate else STEPWISE)

    @pytest.mark.parametrize(
        ("change", "clause"),
        [
            ({"compute_capability": 0}, "no CUDA device"),
            ({"compute_capability": 80}, "Hopper"),
            ({"compute_capability": 100}, "Hopper"),
            ({"activation_type": planner.DataType.float32}, "fp32"),
            ({"key_dim": 60}, "K in {64, 128}"),
            ({"key_dim": 256}, "K in {64, 128}"),
            ({"value_dim": 96}, "V in {64, 128}"),
            ({"value_dim": 1}, "V in {64, 128}"),
        ],
    )
    def test_composite_says_why(self, change, clause):
        plan = planner.plan_chunk_fwd(problem(**change))
        assert plan.path == COMPOSITE
        assert clause in plan.reason
        assert plan.workspace.total_bytes == 0
        for path in (STAGED, FUSED, STEPWISE, FUSED_CUT):
            forced = planner.plan_chunk_fwd(problem(**change), path=path)
            assert (forced.path, forced.reason) == (COMPOSITE, plan.reason)

    @pytest.mark.parametrize(
        ("change", "clause"), [({"aligned_inputs": False}, "16 bytes"), ({"tokens": 2**31}, "more tokens")]
    )
    @pytest.mark.parametrize("bounded_gate", [False, True])
    def test_what_the_copy_engine_cannot_read_is_staged(self, change, clause, bounded_gate):
        """It alone: no gate, and no wish for another path."""
        p = problem(**change, bounded_gate=bounded_gate)
        for path in (None, STAGED, FUSED, STEPWISE, FUSED_CUT):
            plan = planner.plan_chunk_fwd(p, path=path)
            assert plan.path == STAGED and clause in plan.reason
            assert plan.workspace.total_bytes > 0
            assert plan.step_slots == plan.segment_chunks == 0

    @pytest.mark.parametrize("shape", [{}, {"heads": 1, "tokens": 64}, ROWS, PACKED, {"heads": 256}, {"value_dim": 64}])
    def test_unbounded_gates_are_stepwise(self, shape):
        plan = planner.plan_chunk_fwd(problem(**shape, bounded_gate=False))
        assert plan.path == STEPWISE and "below that of the fused" in plan.reason

    @pytest.mark.parametrize("path", [STAGED, FUSED, STEPWISE, FUSED_CUT], ids=str)
    @pytest.mark.parametrize("change", [{"heads": 1, "tokens": 64}, {"bounded_gate": False}, {"heads": 16}, ROWS])
    def test_a_path_can_be_fixed(self, path, change):
        p = problem(**{"bounded_gate": True, "contractive": True, **change})
        plan = planner.plan_chunk_fwd(p, path=path)
        assert plan.path == path and plan.reason == "asked for"
        assert (plan.clusters > 0) == (path in (FUSED, FUSED_CUT))
        if path == FUSED:
            assert plan.workspace.total_bytes == handoff_bytes(p, plan.clusters)
        else:
            assert plan.workspace.total_bytes > 0

    @pytest.mark.parametrize("change", [{"tokens": 0}, {"tokens": 0, "sequences": 0}, {"batch": 0, "sequences": 0}])
    @pytest.mark.parametrize("path", [None, STAGED, FUSED, STEPWISE], ids=str)
    def test_empty_calls_have_a_plan(self, change, path):
        p = problem(**change)
        plan = planner.plan_chunk_fwd(p, path=path)
        assert plan.path == (path or STEPWISE)
        assert plan.chunk_slots == plan.step_slots == plan.segment_chunks == 0
        assert plan.workspace.total_bytes == (handoff_bytes(p, plan.clusters) if path == FUSED else 0)


class TestFused:
    """Where gates are bounded, the one kernel is for calls whose chains of steps, dealt out in equal shares, keep the
    device busy: a cluster of CTAs for each share, one CTA on a multiprocessor.
    """

    @staticmethod
    def plan(options: dict[str, Any] | None = None, **changes: Any):
        return planner.plan_chunk_fwd(problem(**{"bounded_gate": True, **changes}), **(options or {}))

    @pytest.mark.parametrize(
        ("change", "clusters"),
        [
            ({"heads": 64}, 64),  # no more than there are chains
            ({"heads": 96}, 66),  # two CTAs each, on 132 multiprocessors
            ({"heads": 132}, 66),
            ({"heads": 48, "value_heads": 96}, 66),
            (PACKED, 66),
            ({"heads": 64, **PACKED}, 66),
            (ROWS, 66),
            ({"heads": 48, "value_heads": 96, **ROWS}, 66),
            ({"heads": 96, "tokens": 8192, "sequences": 6, "varlen": True}, 66),  # any lengths
            ({"heads": 64, "tokens": 8192, "sequences": 6, "varlen": True}, 66),
            ({"heads": 16, **rows(8, 2048)}, 66),
            ({"heads": 12, **rows(4, 2048)}, 48),
            ({"heads": 16, **packed(8, 2048)}, 66),
            ({"heads": 12, **packed(4, 2048)}, 48),
            ({"key_dim": 64, **ROWS}, 66),
            ({"value_dim": 64}, 96),  # one CTA each
            ({"value_dim": 64, **ROWS}, 132),
            ({"activation_type": planner.DataType.float16, **ROWS}, 66),
        ],
    )
    def test_many_chains_are_fused(self, change, clusters):
        p = problem(bounded_gate=True, **change)
        plan = planner.plan_chunk_fwd(p)
        assert plan.path == FUSED and "below that of the stepwise" in plan.reason
        assert plan.clusters == clusters
        assert plan.value_tile == ROWS_OF_CTA
        assert plan.workspace.total_bytes == handoff_bytes(p, clusters)
        assert plan.segment_chunks == plan.step_slots == 0

    @pytest.mark.parametrize(
        "change",
        [{"heads": 16}, {"heads": 8, "tokens": 65536}, {"heads": 4, "tokens": 32768}, {"heads": 8}, {"heads": 32}]
        + [{"heads": 1, "tokens": 64}, {"heads": 2, **PACKED}],
    )
    def test_few_chains_are_stepwise(self, change):
        plan = self.plan(**change)
        assert plan.path == STEPWISE and "below that of the fused" in plan.reason
        assert plan.workspace.total_bytes > 0
        assert plan.clusters == 0

    @pytest.mark.parametrize("clusters", [1, 2, 5, 64, 66, 10**6, 2**62])
    @pytest.mark.parametrize("heads", [1, 64, 96])
    @pytest.mark.parametrize("value_dim", [64, 128])
    def test_clusters_can_be_forced(self, clusters, heads, value_dim):
        """At most so many: no more than run side by side, and no more than there are chains."""
        p = problem(heads=heads, value_dim=value_dim, bounded_gate=True)
        plan = planner.plan_chunk_fwd(p, path=FUSED, clusters=clusters)
        assert plan.path == FUSED and plan.value_tile == ROWS_OF_CTA
        assert plan.clusters == min(clusters, heads, 132 * ROWS_OF_CTA // value_dim)
        assert plan.workspace.total_bytes == handoff_bytes(p, plan.clusters)

    @pytest.mark.parametrize("path", [STAGED, STEPWISE], ids=str)
    def test_other_paths_have_no_clusters(self, path):
        for change in ({}, PACKED):
            p = problem(bounded_gate=True, **change)
            plan = planner.plan_chunk_fwd(p, path=path, clusters=3)
            assert plan.path == path and plan.clusters == 0
            assert plan.workspace.total_bytes == planner.plan_chunk_fwd(p, path=path).workspace.total_bytes

    @pytest.mark.parametrize("value_tile", [64, 128])
    def test_value_tiles_are_not_its_own(self, value_tile):
        assert self.plan({"path": FUSED, "value_tile": value_tile}).value_tile == ROWS_OF_CTA

    @settings(deadline=None)
    @given(problems(tokens=2**20, bounded_gate=True), st.sampled_from([None, 1, 2, 3, 7, 66, 132]))
    def test_any_choice_is_sound(self, p, clusters):
        plan = planner.plan_chunk_fwd(p, path=FUSED, clusters=clusters)
        ctas_of_cluster = p.value_dim // ROWS_OF_CTA
        side_by_side = max(p.sm_count // ctas_of_cluster, 1)
        assert plan.clusters == max(min(side_by_side, chains_of(p), clusters or side_by_side), 1)
        assert plan.value_tile == ROWS_OF_CTA
        assert plan.workspace.total_bytes == handoff_bytes(p, plan.clusters)
        ctas = json.loads(planner.to_json(p, plan))["stage_ctas"]
        assert ctas == {"fused_scan": plan.clusters * ctas_of_cluster}


class TestFusedCut:
    """Few chains of many steps, gates that are bounded, and keys and beta with which no tokens enlarge a state: the
    fused kernel takes equal stretches of all chains, and the stages of the stepwise path what its cuts may not divide.
    """

    LONG = {"heads": 16, "tokens": 8192}

    def plan(self, **changes: Any) -> Any:
        options = {name: changes.pop(name) for name in ("path", "clusters", "segment_chunks") if name in changes}
        p = problem(**{"bounded_gate": True, "contractive": True, **self.LONG, **changes})
        return planner.plan_chunk_fwd(p, **options)

    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"heads": 24},
            {"heads": 32},
            {"heads": 8, "tokens": 65536},
            {"heads": 4, "tokens": 32768},
            {"heads": 1, "tokens": 131072},
            {"varlen": True},
        ],
        ids=str,
    )
    def test_few_long_chains(self, change):
        plan = self.plan(**change)
        assert plan.path == FUSED_CUT and "below those of the fused and of the stepwise path" in plan.reason
        assert plan.clusters == 66 and plan.value_tile == ROWS_OF_CTA
        p = problem(**{**self.LONG, **change})
        assert plan.step_slots == planner.step_slots(p)
        # What is left is cut as the stepwise path would cut it.
        stepwise = self.plan(**change, path=STEPWISE)
        assert plan.segment_chunks == stepwise.segment_chunks > 0
        assert plan.segment_slots == planner.segment_slots(p, plan.segment_chunks)

    @pytest.mark.parametrize(
        ("change", "path"),
        [
            ({"contractive": False}, STEPWISE),
            ({"key_dim": 64, "heads": 32}, STEPWISE),
            ({"bounded_gate": False}, STEPWISE),
            ({"heads": 4, "tokens": 1024}, STEPWISE),
            ({"heads": 12, "tokens": 2048}, STEPWISE),
            ({"heads": 1, "tokens": 64}, STEPWISE),
            ({"heads": 64}, FUSED),
            ({"heads": 96}, FUSED),
            (PACKED, FUSED),
        ],
        ids=str,
    )
    def test_others_take_another_path(self, change, path):
        assert self.plan(**change).path == path

    @pytest.mark.parametrize(("value_dim", "ctas"), [(64, 1), (128, 2)])
    @pytest.mark.parametrize("clusters", [1, 2, 5, 66, 2**62])
    def test_clusters_can_be_forced(self, value_dim, ctas, clusters):
        """More than there are chains, but no more than run side by side."""
        plan = self.plan(heads=1, value_dim=value_dim, path=FUSED_CUT, clusters=clusters)
        assert plan.path == FUSED_CUT and plan.clusters == min(clusters, 132 // ctas)

    @pytest.mark.parametrize("segment_chunks", [0, 1, 7])
    def test_segments_can_be_forced(self, segment_chunks):
        plan = self.plan(path=FUSED_CUT, segment_chunks=segment_chunks)
        assert plan.path == FUSED_CUT and plan.segment_chunks == segment_chunks

    def test_states_that_may_grow_are_never_cut(self):
        plan = self.plan(contractive=False, path=FUSED_CUT)
        assert plan.path == STEPWISE and "q and k are not normalised, or beta" in plan.reason

    def test_json(self):
        p = problem(bounded_gate=True, contractive=True, **self.LONG)
        plan = self.plan()
        content = json.loads(planner.to_json(p, plan))
        assert content["path"] == "fused_cut" and content["clusters"] == 66
        assert content["stage_ctas"] == {
            "fused_scan": 132,
            "step_factors": 256 * 16,
            "segment_summary": plan.segment_slots * 16 * 4,
            "segment_compose": 16 * 8,
            "state_scan": plan.segment_slots * 16,
        }


class TestHandOver:
    """A chain that two clusters share leaves its state in the workspace: where that may be, and there alone."""

    @pytest.mark.parametrize(
        ("change", "clusters"),
        [
            ({"heads": 1}, None),  # one chain is taken by one cluster
            ({"heads": 1, "varlen": True}, None),
            ({"heads": 64}, None),  # a chain each
            ({"heads": 2, "varlen": True}, None),  # of whatever lengths
            ({"heads": 12, **packed(4, 2048)}, None),
            ({"heads": 132}, None),  # two each
            ({"heads": 96}, 48),
            ({"heads": 96, "value_dim": 64}, None),
            ({"heads": 16, **rows(4, 1000)}, 1),
            ({"heads": 1, "sequences": 0, "varlen": True}, None),
        ],
    )
    def test_whole_chains_need_none(self, change, clusters):
        plan = planner.plan_chunk_fwd(problem(**change), path=FUSED, clusters=clusters)
        w = plan.workspace
        assert w.total_bytes == w.handoff_states == w.handoff_flags == 0

    @pytest.mark.parametrize(
        ("change", "clusters", "expected"),
        [
            ({"heads": 96}, None, 66),
            ({"heads": 64}, 63, 63),
            ({"heads": 64, **PACKED}, None, 66),
            ({"heads": 3, "sequences": 2, "varlen": True}, 1, 1),
            ({"heads": 96, "key_dim": 64, "value_dim": 64}, 36, 36),
        ],
    )
    def test_shared_chains_have_a_state_for_each_cluster(self, change, clusters, expected):
        p = problem(**change)
        plan = planner.plan_chunk_fwd(p, path=FUSED, clusters=clusters)
        assert plan.clusters == expected
        w, states = plan.workspace, expected * p.key_dim * p.value_dim * 4
        assert w.handoff_states == 0 and w.handoff_flags == -(-states // ALIGNMENT) * ALIGNMENT
        flags = 4 * expected * p.value_dim // ROWS_OF_CTA
        assert w.handoff_flags + flags <= w.total_bytes < w.handoff_flags + flags + ALIGNMENT

    @pytest.mark.parametrize("heads", [64, 65, 96, 128, 256])
    @pytest.mark.parametrize("sequences", [1, 6, 300])
    @pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (64, 128), (128, 64), (128, 128)])
    def test_it_is_small_beside_the_inputs(self, heads, sequences, key_dim, value_dim):
        """At most a tenth of them, and it does not grow with the tokens."""
        sizes = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim, "sequences": sequences, "varlen": True}
        p = problem(**sizes)
        plan = planner.plan_chunk_fwd(p, path=FUSED)
        used = plan.workspace.total_bytes
        assert (used > 0) == (chains_of(p) > plan.clusters) and used <= 0.1 * input_bytes(p)
        assert planner.plan_chunk_fwd(problem(**sizes, tokens=2**24), path=FUSED).workspace.total_bytes == used


class TestValueTile:
    """Of the staged path, and of the recurrences of the backward. The stepwise path has none: V is one tile."""

    @settings(deadline=None)
    @given(st.integers(1, 64), st.integers(1, 128), st.sampled_from([64, 128]), st.integers(1, 200))
    def test_cut_if_every_tile_has_a_multiprocessor(self, sequences, heads, value_dim, sm_count):
        p = problem(sequences=sequences, batch=sequences, heads=heads, value_dim=value_dim, sm_count=sm_count)
        tile = planner.plan_chunk_fwd(p, path=STAGED).value_tile
        assert tile == planner.plan_chunk_bwd(p, True).value_tile
        assert tile == (64 if sequences * heads * (value_dim // 64) <= sm_count else value_dim)

    @pytest.mark.parametrize("value_tile", [64, 128])
    def test_can_be_forced(self, value_tile):
        plan = planner.plan_chunk_fwd(problem(), path=STAGED, value_tile=value_tile)
        assert plan.path == STAGED and plan.value_tile == value_tile

    @pytest.mark.parametrize("value_dim", [64, 128])
    @pytest.mark.parametrize("heads", [1, 96])
    def test_stepwise_has_all_of_V(self, value_dim, heads):
        plan = planner.plan_chunk_fwd(problem(heads=heads, value_dim=value_dim))
        assert plan.path == STEPWISE and plan.value_tile == value_dim


class TestCut:
    """The cut of sequences into segments, of the stepwise path alone."""

    @staticmethod
    def shape(sequences: int, tokens: int, varlen: bool) -> dict[str, Any]:
        """Sequences of so many tokens each, packed or as rows."""
        layout = {"tokens": tokens * sequences, "varlen": True} if varlen else {"tokens": tokens, "batch": sequences}
        return {"sequences": sequences, **layout}

    @pytest.mark.parametrize(
        ("heads", "tokens"), [(8, 65536), (4, 32768), (16, 8192), (8, 4096), (12, 2048), (32, 8192), (1, 2**20)]
    )
    @pytest.mark.parametrize("varlen", [False, True])
    def test_few_heads_and_long_sequences_are_cut(self, heads, tokens, varlen):
        """Into as many segments as give most multiprocessors a CTA of the scan, or as many as the others have."""
        plan = planner.plan_chunk_fwd(problem(heads=heads, **self.shape(1, tokens, varlen)))
        assert plan.path == STEPWISE and plan.segment_chunks > 0
        segments = -(-tokens // C // plan.segment_chunks)
        turns = -(-segments * heads // 132)
        assert turns <= 2 and segments * heads > turns * 66 or segments == MOST_SEGMENTS
        # With cu_seqlens a slot for the remainder of a segment that the last sequence may have.
        assert plan.segment_slots == (tokens // (plan.segment_chunks * C) + 1 if varlen else segments)

    @pytest.mark.parametrize(
        ("heads", "sequences", "tokens"),
        [(96, 1, 8192), (96, 8, 1024), (1, 1, 64), (1, 1, 0), (64, 0, 0), (96, 256, 8192), (128, 2, 1024)],
    )
    @pytest.mark.parametrize("varlen", [False, True])
    def test_a_full_device_and_short_sequences_are_not(self, heads, sequences, tokens, varlen):
        plan = planner.plan_chunk_fwd(problem(heads=heads, **self.shape(sequences, tokens, varlen)))
        assert plan.path == STEPWISE and plan.segment_chunks == 0
        assert plan.segment_slots == sequences
        assert plan.workspace.segment_map == plan.workspace.segment_state == plan.workspace.segment_faded == 0

    @pytest.mark.parametrize(("heads", "sequences", "tokens"), [(8, 64, 1024), (2, 64, 1024), (4, 64, 500)])
    def test_a_packed_batch_may_be_one_long_sequence(self, heads, sequences, tokens):
        """The host does not know the lengths. Rows of a batch are equally long, and fill the device without a cut; the
        same sequences packed may be one that has nearly all tokens: it gets several segments.
        """
        assert planner.plan_chunk_fwd(problem(heads=heads, **self.shape(sequences, tokens, False))).segment_chunks == 0
        plan = planner.plan_chunk_fwd(problem(heads=heads, **self.shape(sequences, tokens, True)))
        assert plan.segment_chunks > 0
        assert -(-sequences * tokens // (plan.segment_chunks * C)) >= 8

    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_a_packed_batch_may_be_equally_long_sequences(self, heads):
        """Each of the eight gets several segments where all of them together leave multiprocessors idle."""
        plan = planner.plan_chunk_fwd(problem(heads=heads, **PACKED))
        assert 0 < plan.segment_chunks <= 1024 // C // 2

    @settings(deadline=None, max_examples=300)
    @given(problems(tokens=2**22))
    def test_any_choice_is_sound(self, p):
        """Some sequence may have two segments, else a cut has no use; no equally long one has more than are good."""
        plan = planner.plan_chunk_fwd(p, path=STEPWISE)
        assert plan.value_tile == p.value_dim
        assert plan.step_slots == planner.step_slots(p)
        assert plan.segment_slots == planner.segment_slots(p, plan.segment_chunks)
        if plan.segment_chunks:
            longest = -(-p.tokens // C)
            equal = -(-(-(-p.tokens // p.sequences) if p.varlen else p.tokens) // C)
            assert -(-longest // plan.segment_chunks) >= 2
            assert -(-equal // plan.segment_chunks) <= MOST_SEGMENTS

    @pytest.mark.parametrize("segment_chunks", [0, 1, 7, 10**6])
    def test_a_cut_can_be_fixed(self, segment_chunks):
        plan = planner.plan_chunk_fwd(problem(), segment_chunks=segment_chunks)
        assert plan.segment_chunks == segment_chunks
        assert plan.segment_slots == (-(-128 // segment_chunks) if segment_chunks else 1)

    @pytest.mark.parametrize("path", [STAGED, FUSED], ids=str)
    @pytest.mark.parametrize("heads", [4, 96])
    def test_other_paths_do_not_cut(self, path, heads):
        plan = planner.plan_chunk_fwd(problem(heads=heads, tokens=65536), path=path, segment_chunks=4)
        assert plan.path == path and plan.segment_chunks == 0


class TestWorkspace:
    # Bytes of each region of the staged path, for each (chunk slot, value head).
    STAGED_REGIONS = {
        "W": lambda K, V: C * K * 2,
        "K_decayed": lambda K, V: C * K * 2,
        "Q_gated": lambda K, V: C * K * 2,
        "Aqk": lambda K, V: C * C * 2,
        "U": lambda K, V: V * C * 4,
        "state": lambda K, V: V * K * 2,
        "chunk_decay": lambda K, V: K * 4,
    }
    # Of the fused path, if chains are shared, for each cluster.
    HANDOFF_REGIONS = {
        "handoff_states": lambda K, V: V * K * 4,
        "handoff_flags": lambda K, V: V // ROWS_OF_CTA * 4,
    }
    # Of the fused kernel where it cuts chains, for each cluster.
    CUT_REGIONS = {"left_chains": lambda K, V: 2 * 4}
    # Of the stepwise path and of that kernel's, for each (step slot, value head).
    STEP_REGIONS = {"step_images": lambda K, V: planner.step_image_bytes(K)}
    # Of a cut, for each (segment slot, value head).
    SEGMENT_REGIONS = {
        "segment_map": lambda K, V: K * K * 4,
        "segment_state": lambda K, V: V * K * 4,
        "segment_faded": lambda K, V: 4,
    }

    def regions(self, p: Any, plan: Any) -> list[tuple[int, int]]:
        """Where each region of a plan begins, and its size."""
        kinds = [(plan.chunk_slots * p.heads, self.STAGED_REGIONS)]
        if plan.path == FUSED:
            kinds = [(plan.clusters, self.HANDOFF_REGIONS)] if handoff_bytes(p, plan.clusters) else []
        if plan.path in (STEPWISE, FUSED_CUT):
            kinds = [(plan.step_slots * p.heads, self.STEP_REGIONS)]
        if plan.path == FUSED_CUT:
            kinds.append((plan.clusters, self.CUT_REGIONS))
        if plan.segment_chunks:
            kinds.append((plan.segment_slots * p.heads, self.SEGMENT_REGIONS))
        return [
            (getattr(plan.workspace, name), count * size(p.key_dim, p.value_dim))
            for count, sizes in kinds
            for name, size in sizes.items()
        ]

    @settings(deadline=None, max_examples=200)
    @given(
        problems(tokens=2**34, sequences=(1, 300), contractive=True),
        st.sampled_from([None, STAGED, FUSED, STEPWISE, FUSED_CUT]),
        st.sampled_from([None, 0, 1, 50]),
        st.sampled_from([None, 1, 2, 5]),
    )
    def test_regions_are_aligned_and_disjoint(self, p, path, segment_chunks, clusters):
        plan = planner.plan_chunk_fwd(p, path=path, segment_chunks=segment_chunks, clusters=clusters)
        spans = sorted(self.regions(p, plan))
        if not spans:
            assert plan.path == FUSED and plan.workspace.total_bytes == 0
            return
        assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
        assert all(offset + size <= following for (offset, size), (following, _) in pairwise(spans))
        assert spans[-1][0] + spans[-1][1] <= plan.workspace.total_bytes
        used = sum(size for _, size in spans)
        assert plan.workspace.total_bytes < used + ALIGNMENT * len(spans)

    def test_every_region_is_tested(self):
        assert {n for n in dir(planner.ChunkFwdWorkspace) if not n.startswith("_")} == {
            *self.STAGED_REGIONS,
            *self.HANDOFF_REGIONS,
            *self.CUT_REGIONS,
            *self.STEP_REGIONS,
            *self.SEGMENT_REGIONS,
            "total_bytes",
        }

    @pytest.mark.parametrize("key_dim", [64, 128])
    def test_image_of_a_step(self, key_dim):
        """Three operands [tokens, K] and pairs [tokens, 4 tokens] in bf16; in fp32 the decay of each channel and two
        numbers for each token.
        """
        size = 3 * 2 * STEP * key_dim + 2 * STEP * (4 * STEP) + 4 * (key_dim + 2 * STEP)
        assert planner.step_image_bytes(key_dim) == size
        assert size % 16 == 0  # as the copy engine needs it

    @pytest.mark.parametrize("path", [STAGED, STEPWISE], ids=str)
    def test_sizes_are_64_bit(self, path):
        p = problem(tokens=2**24, heads=64)
        plan = planner.plan_chunk_fwd(p, path=path, segment_chunks=0)
        assert plan.workspace.total_bytes == sum(size for _, size in self.regions(p, plan)) > 2**40

    def test_sizes_of_a_cut_are_64_bit(self):
        p = problem(tokens=2**24, heads=64)
        plan = planner.plan_chunk_fwd(p, path=STEPWISE, segment_chunks=1)
        assert plan.segment_slots == 2**18
        assert plan.workspace.segment_faded > plan.workspace.segment_state > plan.workspace.segment_map > 2**40
        assert plan.workspace.total_bytes == sum(size for _, size in self.regions(p, plan))


class TestJson:
    @staticmethod
    def content(p: Any, **options: Any) -> dict[str, Any]:
        return json.loads(planner.to_json(p, planner.plan_chunk_fwd(p, **options)))

    def test_states_the_plan(self):
        p = problem(heads=8, value_heads=16, tokens=1000)
        plan, content = planner.plan_chunk_fwd(p), self.content(p)
        assert content["path"] == "stepwise" and content["reason"] == plan.reason
        assert content["chunk_slots"] == 16
        assert content["value_tile"] == 128 and content["clusters"] == 0
        assert content["segment_chunks"] == plan.segment_chunks
        assert content["segment_slots"] == plan.segment_slots
        assert content["workspace_bytes"] == plan.workspace.total_bytes

    def test_ctas_of_each_stage_with_cu_seqlens(self):
        p = problem(heads=4, tokens=1000, sequences=3, varlen=True)
        ctas = self.content(p, path=STEPWISE, segment_chunks=0)["stage_ctas"]
        assert ctas == {"step_factors": (1000 // 32 + 3) * 4, "state_scan": 3 * 4}
        ctas = self.content(p, path=STAGED)["stage_ctas"]
        assert ctas == {"intra_chunk_solve": 18 * 4, "state_recurrence": 3 * 4 * 2, "output_gemm": 19 * 4}

    def test_ctas_of_a_cut(self):
        """Of the summary one for 64 rows of the map and one for 64 of the state; of the composition one for 16."""
        p = problem(heads=4, tokens=1000, key_dim=64)
        content = self.content(p, path=STEPWISE, segment_chunks=5)
        assert content["segment_chunks"] == 5 and content["segment_slots"] == 4
        assert content["stage_ctas"] == {
            "step_factors": 32 * 4,
            "segment_summary": 4 * 4 * (64 + 128) // 64,
            "segment_compose": 4 * 128 // 16,
            "state_scan": 4 * 4,
        }

    def test_fused(self):
        p = problem(bounded_gate=True, **ROWS)
        content = self.content(p)
        assert content["path"] == "fused" and content["value_tile"] == 64 and content["clusters"] == 66
        assert content["stage_ctas"] == {"fused_scan": 132}
        assert content["workspace_bytes"] == handoff_bytes(p, 66) > 0
        content = self.content(problem(bounded_gate=True, value_dim=64, **ROWS), path=FUSED, clusters=12)
        assert content["clusters"] == content["stage_ctas"]["fused_scan"] == 12 and content["workspace_bytes"] == 0

    def test_composite(self):
        p = problem(key_dim=7)
        content = json.loads(planner.to_json(p, planner.plan_chunk_fwd(p)))
        assert content["path"] == "composite" and content["stage_ctas"] == {} and content["reason"]
        assert content["clusters"] == 0


class TestBackward:
    REUSED = ("W", "K_decayed", "Q_gated", "Aqk")  # read by the reverse recurrence last

    @pytest.mark.parametrize("saved", [False, True])
    @pytest.mark.parametrize("activated_gate", [False, True])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"heads": 4, "value_heads": 12},
            {"heads": 1, "value_heads": 2, "value_dim": 64},
            {"key_dim": 64, "tokens": 100},
            {"heads": 16},
            {"heads": 3, "value_dim": 64, "tokens": 20000},
            {"heads": 2, "key_dim": 64, "varlen": True, "sequences": 7},
        ],
    )
    def test_workspace(self, changes: dict[str, Any], activated_gate: bool, saved: bool) -> None:
        """Every region has its size and starts aligned. None meets another that is in use at the same time: the sums of
        the last stages may lie over what the reverse recurrence was the last to read, unless that is saved.
        """
        p = problem(**changes)
        plan = planner.plan_chunk_bwd(p, activated_gate, saved)
        K, V, tiles = p.key_dim, p.value_dim, plan.chunk_slots * p.value_heads
        chains = p.sequences * p.value_heads
        kept = dict.fromkeys(("W", "K_decayed", "Q_gated"), 2 * C * K) | dict.fromkeys(("Aqk", "inverse"), 2 * C * C)
        kept |= {"U": 2 * V * C, "state": 2 * V * K, "chunk_decay": 4 * K}
        kept = {name: tiles * size for name, size in kept.items()}
        kept |= {"U_low": chains * 2 * V * C, "Q_gated_low": chains * 2 * C * K}
        own, sums = {"dU": tiles * 2 * V * C, "dstate": tiles * 2 * V * K}, {"by_levels": tiles * 4}
        own |= {"dU_low": chains * 2 * V * C, "dstate_low": chains * 2 * V * K}
        maps = ("transposed_map", "dstate") if saved else ("map", "transposed_map", "state", "dstate")
        if activated_gate:
            sums |= dict.fromkeys(("dA_log", "ddt_bias"), tiles * 4 * K)
        if p.value_heads > p.heads:
            sums |= dict.fromkeys(("dq", "dk"), 4 * p.tokens * p.value_heads * K)

        intermediates = [(getattr(plan.intermediates, name), name, size) for name, size in kept.items()]
        self.check_apart(intermediates, plan.intermediates.total_bytes)
        assert plan.intermediates.total_bytes == planner.intermediate_bytes(p)
        early = [(getattr(plan.workspace, name), name, size) for name, size in own.items()]
        if not saved:
            early += [(plan.workspace.intermediates + begin, name, size) for begin, name, size in intermediates]
        late = [(getattr(plan.workspace, name), name, size) for name, size in sums.items()]
        late += [region for region in early if region[1] not in self.REUSED]
        if plan.segment_chunks:
            early += self.segment_regions(p, plan, plan.workspace.segments, maps)
        made_of = ("beta", tiles * 4 * C) if plan.makes_values else ("U0", tiles * 4 * V * C)
        assert plan.makes_values == (plan.state_tile > 64)
        first = [made_of, *kept.items()] if not saved else []
        saving = [(plan.saving_workspace.U0, "U0", tiles * 4 * V * C)]
        if plan.makes_values:
            saving.append((plan.saving_workspace.beta, *made_of))
        if plan.segment_chunks:
            saving += self.segment_regions(p, plan, plan.saving_workspace.segments, ("map", "state"))
        self.check_apart(saving, plan.saving_workspace.total_bytes)
        first = [
            (getattr(plan.workspace, name), name, size)
            if name == made_of[0]
            else (plan.workspace.intermediates + getattr(plan.intermediates, name), name, size)
            for name, size in first
        ]
        if plan.side_by_side and not saved:
            early, first = early + first[:1], []
        if plan.gradients_beside:  # the sums are written while the recurrences go on
            assert plan.side_by_side and not saved and not plan.segment_chunks and p.value_heads == p.heads
            early += [(getattr(plan.workspace, name), name, size) for name, size in sums.items()]
            early += [(plan.workspace.progress, "progress", 4 * (tiles + 2 + plan.followed_ctas))]
            late = early
        for regions in (first, early, late):
            self.check_apart(regions, plan.workspace.total_bytes)
        lasting = sum(size for begin, _, size in early if begin >= plan.workspace.dstate)
        late_bytes = sum(size for begin, _, size in late if begin < plan.workspace.dstate) + lasting
        used = sum(size for _, _, size in early), late_bytes
        assert max(used) <= plan.workspace.total_bytes < max(used) + ALIGNMENT * (len(early) + len(late))

    @staticmethod
    def segment_regions(p: Any, plan: Any, at: Any, names: tuple[str, ...]) -> list[tuple[int, str, int]]:
        rows = {"map": p.key_dim, "transposed_map": p.key_dim, "state": p.value_dim, "dstate": p.value_dim}
        segments = plan.segment_slots * p.value_heads
        return [(getattr(at, name), f"segments.{name}", segments * rows[name] * p.key_dim * 4) for name in names]

    @settings(deadline=None)
    @given(problems(tokens=2**17))
    def test_cut(self, p: Any) -> None:
        """Sequences are cut where few CTAs would go through many chunks, alike whatever is saved, and never where the
        uncut recurrences fill the device."""
        plan, saved = planner.plan_chunk_bwd(p, False), planner.plan_chunk_bwd(p, False, True)
        assert plan.segment_chunks == saved.segment_chunks
        assert plan.segment_slots == planner.segment_slots(p, plan.segment_chunks)
        if plan.segment_chunks:
            assert plan.value_tile == 64 and plan.side_by_side
            assert 2 * p.value_heads * (p.value_dim // 64) < p.sm_count
        for segment_chunks in (0, 1, 3):
            forced = planner.plan_chunk_bwd(p, False, segment_chunks=segment_chunks)
            assert forced.segment_chunks == segment_chunks

    @pytest.mark.parametrize(
        ("heads", "tokens", "is_cut"),
        [(12, 2048, False), (16, 8192, False), (96, 8192, False), (4, 32768, True), (2, 8192, True), (1, 1024, True)],
    )
    def test_which_shapes_are_cut(self, heads: int, tokens: int, is_cut: bool) -> None:
        assert (planner.plan_chunk_bwd(problem(heads=heads, tokens=tokens), False).segment_chunks > 0) == is_cut

    @pytest.mark.parametrize(("heads", "side_by_side"), [(12, True), (33, True), (49, True), (50, False), (96, False)])
    def test_recurrences_side_by_side(self, heads: int, side_by_side: bool) -> None:
        """Where both find a multiprocessor for each of their CTAs; then U0, or beta for it, has its own place."""
        plan = planner.plan_chunk_bwd(problem(heads=heads), False)
        assert plan.side_by_side == side_by_side
        made_of = plan.workspace.beta if plan.makes_values else plan.workspace.U0
        assert (made_of != plan.workspace.dstate) == side_by_side

    @pytest.mark.parametrize(
        ("changes", "is_beside"),
        [
            ({"heads": 12, "tokens": 2048}, True),
            ({"heads": 24}, True),
            ({"heads": 25}, True),  # not 100 of 132 multiprocessors with half of V each, but 50 with all of it
            ({"heads": 49}, True),
            ({"heads": 50}, False),  # 100
            ({"heads": 96}, False),
            ({"heads": 8, "value_heads": 16}, False),  # parts of dq and dk would need room of their own
            ({"heads": 2}, False),  # cut
            ({"heads": 12, "tokens": 2048, "varlen": True}, False),  # what cu_seqlens holds is not known
        ],
    )
    def test_gradients_beside_the_recurrences(self, changes: dict[str, Any], is_beside: bool) -> None:
        """Where the recurrences leave multiprocessors idle, and compute the state."""
        p = problem(**({"tokens": 8192} | changes))
        plan, saved = planner.plan_chunk_bwd(p, False), planner.plan_chunk_bwd(p, False, True)
        assert plan.gradients_beside == is_beside
        assert plan.early_gradients == (p.sm_count - 2 * p.heads * (p.value_dim // plan.value_tile)) * is_beside
        assert not saved.gradients_beside and saved.early_gradients == 0

    @pytest.mark.parametrize(
        ("heads", "tokens", "followed"),
        [
            (12, 2048, 264),  # 384 tiles: 120 in the last turn, on 60 multiprocessors; the recurrences have 48
            (16, 8192, 0),  # 200 on 100, where they have 64
            (32, 8192, 264),  # 136 on 68, and they have 64
            (16, 1024, 0),  # 256, on 128
            (12, 512, 96),  # 96, in the only turn
            (33, 4096, 0),  # 2112 = 8 * 264: the last turn takes all multiprocessors
            (96, 8192, 0),  # stage 4 does not work beside the recurrences
        ],
    )
    def test_recurrences_follow_the_last_turn_of_stage_1(self, heads: int, tokens: int, followed: int) -> None:
        """Where it leaves a multiprocessor to each of their CTAs."""
        p = problem(heads=heads, tokens=tokens)
        plan = planner.plan_chunk_bwd(p, False)
        assert plan.followed_ctas == followed
        tiles = plan.chunk_slots * heads
        if followed:
            in_last = tiles - (tiles - 1) // followed * followed
            assert in_last <= 2 * plan.early_gradients
        assert planner.plan_chunk_bwd(p, False, True).followed_ctas == 0

    @pytest.mark.parametrize(
        ("heads", "saved", "tile"),
        [(24, False, 64), (25, False, 128), (49, False, 128), (50, False, 64), (67, False, 128), (32, True, 64)],
    )
    def test_value_tile(self, heads: int, saved: bool, tile: int) -> None:
        """Half of V a CTA where all of those find a multiprocessor, unless whole rows leave room for stage 4."""
        p = problem(heads=heads, tokens=8192)
        plan, computed = planner.plan_chunk_bwd(p, False, saved), planner.plan_chunk_bwd(p, False)
        assert plan.value_tile == tile
        # What is saved has the bits of what is computed again.
        assert (plan.state_tile, plan.makes_values) == (computed.value_tile, computed.makes_values)

    def test_memory_of_recurrences_side_by_side(self) -> None:
        """U0 has a place of its own; the chunks are counted as slots."""
        p = problem(heads=32, varlen=True)
        plan = planner.plan_chunk_bwd(p, False)
        assert plan.side_by_side and not plan.gradients_beside
        of_tokens = (2568 + 512) * C * plan.chunk_slots * p.value_heads
        assert plan.workspace.total_bytes == of_tokens + sum(self.bytes_of_ends(p))

    def test_memory_of_gradients_beside_the_recurrences(self) -> None:
        """Flags and counts, and sums of an activated gate, have places of their own."""
        p = problem(heads=16)
        for activated_gate in (False, True):
            plan = planner.plan_chunk_bwd(p, activated_gate)
            assert plan.gradients_beside and plan.followed_ctas == 0
            own = 4 * (2 + 2 * p.key_dim * activated_gate) * plan.chunk_slots * p.value_heads
            own += sum(self.bytes_of_ends(p))
            rest = plan.workspace.total_bytes - (2568 + 512) * p.tokens * p.value_heads - own
            assert 0 < rest <= 4 * ALIGNMENT

    @staticmethod
    def bytes_of_ends(p: Any) -> tuple[int, int]:
        """Of what bf16 leaves out at the ends of sequences: among the intermediates, and beside them."""
        K, V, chains = p.key_dim, p.value_dim, p.sequences * p.value_heads
        return chains * 2 * C * (K + V), chains * 2 * V * (K + C)

    @staticmethod
    def check_apart(regions: list[tuple[int, str, int]], total_bytes: int) -> None:
        regions = sorted(regions)
        assert all(begin % ALIGNMENT == 0 for begin, _, _ in regions)
        for (begin, name, size), (following, other, _) in pairwise([*regions, (total_bytes, "the end", 0)]):
            assert begin + size <= following, f"{name} meets {other}"

    @pytest.mark.parametrize(
        ("changes", "activated_gate", "expected", "expected_saved", "intermediates"),
        [
            ({}, False, 2568, 768 + 4 / C, 1800),
            ({}, True, 2568, 784 + 4 / C, 1800),
            ({"heads": 12, "value_heads": 36}, True, 2712 + 4 / C, 1808 + 4 / C, 1800),
            ({"key_dim": 64, "value_dim": 64}, True, 1156, 264 + 4 / C, 900),
        ],
    )
    def test_memory_of_a_token(
        self, changes: dict[str, Any], activated_gate: bool, expected: float, expected_saved: float, intermediates: int
    ) -> None:
        """As documented, in bytes for each token and value head, K = V = 128 if nothing else is said."""
        p = problem(**changes)
        token_heads = p.tokens * p.value_heads
        for saved, bytes_of_token in ((False, expected), (True, expected_saved)):
            plan = planner.plan_chunk_bwd(p, activated_gate, saved)
            kept_ends, own_ends = self.bytes_of_ends(p)
            ends = own_ends + (0 if saved else kept_ends)
            assert plan.workspace.total_bytes == bytes_of_token * token_heads + ends
            assert plan.intermediates.total_bytes == intermediates * token_heads + kept_ends
            content = json.loads(planner.to_json(plan))
            assert content["workspace_bytes"] == plan.workspace.total_bytes
            assert content["intermediate_bytes"] == plan.intermediates.total_bytes

    def test_paths(self) -> None:
        """The backward takes the kernels where the forward does."""
        for changes in ({}, {"key_dim": 96}, {"compute_capability": 80}, {"tokens": 0}):
            p = problem(**changes)
            forward, backward = planner.plan_chunk_fwd(p), planner.plan_chunk_bwd(p, True)
            if forward.path == COMPOSITE:
                assert (backward.path, backward.reason) == (forward.path, forward.reason)
            else:  # in stages, whatever the forward takes
                assert backward.path == STAGED and backward.value_tile in (64, 128)
