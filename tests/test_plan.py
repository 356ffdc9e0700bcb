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
ALIGNMENT = 256


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


def slots_of(cu_seqlens: list[int]) -> list[list[int]]:
    """The slots of the chunks of each sequence, as the kernels compute them from cu_seqlens."""
    return [
        [begin // C + n + c for c in range(-(-(end - begin) // C))]
        for n, (begin, end) in enumerate(pairwise(cu_seqlens))
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


class TestSlots:
    @settings(deadline=None, max_examples=300)
    @given(lengths_of_sequences)
    def test_slots_of_sequences_never_meet_and_fit(self, lengths):
        cu_seqlens = list(accumulate(lengths, initial=0))
        used = [slot for slots in slots_of(cu_seqlens) for slot in slots]
        p = problem(tokens=cu_seqlens[-1], sequences=len(lengths), varlen=True)
        assert len(used) == len(set(used))
        assert all(0 <= slot < planner.chunk_slots(p) for slot in used)

    @settings(deadline=None)
    @given(lengths_of_sequences, st.integers(0, 500))
    def test_slots_fit_if_rows_follow_the_last_sequence(self, lengths, padding):
        cu_seqlens = list(accumulate(lengths, initial=0))
        p = problem(tokens=cu_seqlens[-1] + padding, sequences=len(lengths), varlen=True)
        assert all(slot < planner.chunk_slots(p) for slots in slots_of(cu_seqlens) for slot in slots)

    @pytest.mark.parametrize(
        ("batch", "tokens", "expected"),
        [(1, 0, 0), (1, 1, 1), (1, 64, 1), (1, 65, 2), (3, 130, 9), (0, 100, 0), (2, 2**31, 2**26)],
    )
    def test_equal_lengths(self, batch, tokens, expected):
        assert planner.chunk_slots(problem(batch=batch, sequences=batch, tokens=tokens)) == expected

    @pytest.mark.parametrize(
        ("sequences", "tokens", "expected"),
        [(0, 0, 0), (5, 0, 5), (1, 8192, 129), (6, 8192, 134), (1, 2**33, 2**27 + 1)],
    )
    def test_cu_seqlens(self, sequences, tokens, expected):
        assert planner.chunk_slots(problem(sequences=sequences, tokens=tokens, varlen=True)) == expected

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

    def test_chunk_size_is_the_one_of_the_kernels(self):
        assert planner.CHUNK_TOKENS == C


class TestPath:
    @pytest.mark.parametrize("key_dim", [64, 128])
    @pytest.mark.parametrize("value_dim", [64, 128])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_kernels_cover(self, key_dim, value_dim, dtype):
        p = problem(key_dim=key_dim, value_dim=value_dim, activation_type=getattr(planner.DataType, dtype))
        assert planner.plan_chunk_fwd(p).path == planner.ChunkFwdPath.staged

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
        assert plan.path == planner.ChunkFwdPath.composite
        assert clause in plan.reason
        assert plan.workspace.total_bytes == 0

    def test_a_path_can_be_fixed(self):
        plan = planner.plan_chunk_fwd(problem(), path=planner.ChunkFwdPath.fused)
        assert plan.path == planner.ChunkFwdPath.fused and plan.reason
        refused = planner.plan_chunk_fwd(problem(key_dim=7), path=planner.ChunkFwdPath.fused)
        assert refused.path == planner.ChunkFwdPath.composite

    @pytest.mark.parametrize("change", [{"tokens": 0}, {"tokens": 0, "sequences": 0}, {"batch": 0, "sequences": 0}])
    def test_empty_calls_have_a_plan(self, change):
        plan = planner.plan_chunk_fwd(problem(**change))
        assert plan.path == planner.ChunkFwdPath.staged
        assert plan.chunk_slots == 0
        assert plan.workspace.total_bytes == 0


class TestValueTile:
    @settings(deadline=None)
    @given(st.integers(1, 64), st.integers(1, 128), st.sampled_from([64, 128]), st.integers(1, 200))
    def test_cut_is_the_least_that_fills_the_device(self, sequences, heads, value_dim, sm_count):
        p = problem(sequences=sequences, batch=sequences, heads=heads, value_dim=value_dim, sm_count=sm_count)
        tile = planner.plan_chunk_fwd(p, segment_chunks=0).value_tile
        assert value_dim % tile == 0 and 32 <= tile <= value_dim

        def ctas(tile: int) -> int:
            return sequences * heads * (value_dim // tile)

        assert ctas(tile) >= sm_count or tile == 32
        assert tile == value_dim or ctas(2 * tile) < sm_count


class TestCut:
    """The cut of sequences into segments."""

    @pytest.mark.parametrize(
        ("heads", "lengths"),
        [(8, [65536]), (4, [32768]), (16, [8192]), (8, [4096]), (12, [2048]), (1, [2**20]), (2, [16384] * 2)],
        ids=str,
    )
    @pytest.mark.parametrize("varlen", [False, True])
    def test_few_heads_and_long_sequences_are_cut(self, heads, lengths, varlen):
        N, T = len(lengths), lengths[0]
        shape = {"tokens": T * N, "varlen": True} if varlen else {"tokens": T, "batch": N}
        plan = planner.plan_chunk_fwd(problem(heads=heads, sequences=N, **shape))
        segments = -(-T // C // plan.segment_chunks)
        assert 3 <= segments <= 64
        assert plan.segment_slots == N * segments + (N if varlen and T % (plan.segment_chunks * C) == 0 else 0)
        assert plan.segment_tile == plan.value_tile == 64

    @pytest.mark.parametrize(
        ("heads", "sequences", "tokens"),
        [(96, 1, 8192), (96, 8, 1024), (64, 1, 8192), (32, 1, 8192), (16, 8, 2048), (4, 1, 1024), (1, 1, 64), (1, 1, 0)]
        + [(64, 0, 0), (96, 256, 8192), (4, 64, 500)],
    )
    @pytest.mark.parametrize("varlen", [False, True])
    def test_a_full_device_and_short_sequences_are_not(self, heads, sequences, tokens, varlen):
        shape = {"tokens": tokens * sequences, "varlen": True} if varlen else {"tokens": tokens, "batch": sequences}
        plan = planner.plan_chunk_fwd(problem(heads=heads, sequences=sequences, **shape))
        assert plan.segment_chunks == 0 and plan.segment_tile == 0
        assert plan.segment_slots == sequences
        assert plan.workspace.segment_map == plan.workspace.segment_state == 0

    def test_a_packed_batch_counts_as_equally_long_sequences(self):
        """The host does not know the lengths: eight sequences of 1024 tokens, or one of 8000 and seven short ones."""
        assert planner.plan_chunk_fwd(problem(heads=2, tokens=8192, varlen=True)).segment_chunks > 0
        assert planner.plan_chunk_fwd(problem(heads=2, tokens=8192, sequences=8, varlen=True)).segment_chunks == 0

    @settings(deadline=None)
    @given(problems(tokens=2**22))
    def test_any_choice_is_sound(self, p):
        plan = planner.plan_chunk_fwd(p)
        assert plan.segment_slots == planner.segment_slots(p, plan.segment_chunks)
        if plan.segment_chunks:
            longest = -(-(-(-p.tokens // p.sequences) if p.varlen else p.tokens) // C)
            assert 3 <= -(-longest // plan.segment_chunks) <= 64

    @pytest.mark.parametrize("segment_chunks", [0, 1, 7, 10**6])
    def test_a_cut_can_be_fixed(self, segment_chunks):
        plan = planner.plan_chunk_fwd(problem(), segment_chunks=segment_chunks)
        assert plan.segment_chunks == segment_chunks
        assert plan.segment_slots == (-(-128 // segment_chunks) if segment_chunks else 1)


class TestWorkspace:
    # Bytes of each region, for each (slot, value head).
    REGIONS = {
        "W": lambda K, V: C * K * 2,
        "K_decayed": lambda K, V: C * K * 2,
        "Q_gated": lambda K, V: C * K * 2,
        "Aqk": lambda K, V: C * C * 2,
        "U": lambda K, V: V * C * 4,
        "state": lambda K, V: V * K * 2,
        "chunk_decay": lambda K, V: K * 4,
    }
    # Of each region of a cut, for each (segment slot, value head).
    SEGMENT_REGIONS = {"segment_map": lambda K, V: K * K * 4, "segment_state": lambda K, V: V * K * 4}

    @settings(deadline=None)
    @given(problems(tokens=2**34, sequences=(1, 300)), st.sampled_from([None, 0, 1, 50]))
    def test_regions_are_aligned_and_disjoint(self, p, segment_chunks):
        plan = planner.plan_chunk_fwd(p, segment_chunks=segment_chunks)
        K, V = p.key_dim, p.value_dim
        tiles = plan.chunk_slots * p.heads
        regions = [(name, tiles * size(K, V)) for name, size in self.REGIONS.items()]
        if plan.segment_chunks:
            tiles = plan.segment_slots * p.heads
            regions += [(name, tiles * size(K, V)) for name, size in self.SEGMENT_REGIONS.items()]
        spans = sorted((getattr(plan.workspace, name), size) for name, size in regions)
        assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
        assert all(offset + size <= following for (offset, size), (following, _) in pairwise(spans))
        assert spans[-1][0] + spans[-1][1] <= plan.workspace.total_bytes

    def test_every_region_is_tested(self):
        assert {n for n in dir(planner.ChunkFwdWorkspace) if not n.startswith("_")} == {
            *self.REGIONS,
            *self.SEGMENT_REGIONS,
            "total_bytes",
        }

    def test_sizes_are_64_bit(self):
        plan = planner.plan_chunk_fwd(problem(tokens=2**24, heads=64), segment_chunks=0)
        tiles = 2**18 * 64
        assert plan.workspace.total_bytes == tiles * sum(size(128, 128) for size in self.REGIONS.values()) > 2**40


class TestFused:
    """The choice between the fused and the staged path, for calls that kernels cover. Elsewhere gates have no bound."""

    @staticmethod
    def plan(options: dict[str, Any] | None = None, **changes: Any):
        return planner.plan_chunk_fwd(problem(**{"bounded_gate": True, **changes}), **(options or {}))

    PACKED = {"tokens": 8192, "sequences": 8, "varlen": True}  # 8 x 1024
    ROWS = {"tokens": 1024, "batch": 8, "sequences": 8}

    @pytest.mark.parametrize(
        ("change", "value_tile"),
        [
            ({"heads": 96}, 128),
            ({"heads": 64}, 64),  # 128 CTAs, a turn on 132 multiprocessors
            ({"heads": 96, **PACKED}, 128),
            ({"heads": 96, **ROWS}, 128),
            ({"heads": 96, "key_dim": 64}, 128),
            ({"heads": 96, "value_dim": 64}, 64),
            ({"heads": 48, "value_heads": 96}, 128),
            ({"heads": 96, "activation_type": planner.DataType.float16}, 128),
        ],
    )
    def test_many_chains_are_fused(self, change, value_tile):
        plan = self.plan(**change)
        assert plan.path == planner.ChunkFwdPath.fused and plan.reason
        assert plan.value_tile == value_tile
        assert plan.workspace.total_bytes == 0
        assert plan.segment_chunks == 0

    @pytest.mark.parametrize(
        "change", [{"heads": 16}, {"heads": 8, "tokens": 65536}, {"heads": 4, "tokens": 32768}, {"heads": 8}]
    )
    def test_few_chains_are_staged(self, change):
        plan = self.plan(**change)
        assert plan.path == planner.ChunkFwdPath.staged and "too few chains" in plan.reason
        assert plan.workspace.total_bytes > 0

    @pytest.mark.parametrize(
        ("change", "clause"),
        [
            ({"aligned_inputs": False}, "16 bytes"),
            ({"bounded_gate": False}, "no bound"),
            ({"tokens": 2**31, "heads": 96}, "more tokens"),
        ],
    )
    def test_staged_says_why(self, change, clause):
        plan = self.plan(**change)
        assert plan.path == planner.ChunkFwdPath.staged and clause in plan.reason

    @pytest.mark.parametrize("change", [{"heads": 1, "tokens": 64}, {"bounded_gate": False}, {"heads": 16}])
    def test_forced(self, change):
        plan = self.plan({"path": planner.ChunkFwdPath.fused}, **change)
        assert plan.path == planner.ChunkFwdPath.fused and plan.workspace.total_bytes == 0

    def test_staged_can_be_forced(self):
        plan = self.plan({"path": planner.ChunkFwdPath.staged})
        assert plan.path == planner.ChunkFwdPath.staged and plan.reason == "asked for"
        assert plan.workspace.total_bytes > 0

    def test_what_it_does_not_cover_cannot_be_forced(self):
        forced = {"path": planner.ChunkFwdPath.fused}
        plan = self.plan(forced, aligned_inputs=False)
        assert plan.path == planner.ChunkFwdPath.staged and "16 bytes" in plan.reason
        plan = self.plan(forced, key_dim=60)
        assert plan.path == planner.ChunkFwdPath.composite and "K in" in plan.reason

    @pytest.mark.parametrize("value_tile", [64, 128])
    @pytest.mark.parametrize("heads", [1, 64, 96])
    def test_value_tile_can_be_forced(self, value_tile, heads):
        plan = self.plan({"path": planner.ChunkFwdPath.fused, "value_tile": value_tile}, heads=heads)
        assert plan.path == planner.ChunkFwdPath.fused and plan.value_tile == value_tile

    @settings(deadline=None)
    @given(problems(tokens=2**20, bounded_gate=True))
    def test_any_choice_is_sound(self, p):
        plan = planner.plan_chunk_fwd(p)
        if plan.path == planner.ChunkFwdPath.fused:
            assert plan.value_tile in (64, 128) and plan.value_tile <= p.value_dim
            assert plan.workspace.total_bytes == 0
            ctas = json.loads(planner.to_json(p, plan))["stage_ctas"]
            assert ctas == {"fused_scan": p.sequences * p.heads * (p.value_dim // plan.value_tile)}


class TestJson:
    def test_states_the_plan(self):
        p = problem(heads=8, value_heads=16, tokens=1000)
        content = json.loads(planner.to_json(p, planner.plan_chunk_fwd(p)))
        assert content["path"] == "staged"
        assert content["chunk_slots"] == 16
        assert content["value_tile"] == 32
        assert content["stage_ctas"]["state_recurrence"] == 16 * 4
        assert content["workspace_bytes"] == planner.plan_chunk_fwd(p).workspace.total_bytes

    def test_ctas_of_each_stage_with_cu_seqlens(self):
        p = problem(heads=4, tokens=1000, sequences=3, varlen=True)
        ctas = json.loads(planner.to_json(p, planner.plan_chunk_fwd(p)))["stage_ctas"]
        assert ctas == {"intra_chunk_solve": 18 * 4, "state_recurrence": 3 * 4 * 4, "output_gemm": 19 * 4}

    def test_ctas_of_a_cut(self):
        p = problem(heads=4, tokens=1000, key_dim=64)
        content = json.loads(planner.to_json(p, planner.plan_chunk_fwd(p, segment_chunks=5)))
        assert content["segment_chunks"] == 5 and content["segment_slots"] == 4 and content["segment_tile"] == 64
        assert content["stage_ctas"] == {
            "intra_chunk_solve": 16 * 4,
            "segment_summary": 4 * 4 * 3,
            "segment_compose": 4 * 8,
            "state_recurrence": 4 * 4 * 2,
            "output_gemm": 16 * 4,
        }

    def test_fused(self):
        p = problem(bounded_gate=True)
        content = json.loads(planner.to_json(p, planner.plan_chunk_fwd(p)))
        assert content["path"] == "fused" and content["value_tile"] == 128
        assert content["stage_ctas"] == {"fused_scan": 96} and content["workspace_bytes"] == 0

    def test_composite(self):
        p = problem(key_dim=7)
        content = json.loads(planner.to_json(p, planner.plan_chunk_fwd(p)))
        assert content["path"] == "composite" and content["stage_ctas"] == {} and content["reason"]


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
        ],
    )
    def test_workspace(self, changes: dict[str, Any], activated_gate: bool, saved: bool) -> None:
        """Every region has its size and starts aligned. None meets another that is in use at the same time: the sums of
        the last stages may lie over what the reverse recurrence was the last to read, unless that is saved.
        """
        p = problem(**changes)
        plan = planner.plan_chunk_bwd(p, activated_gate, saved)
        K, V, tiles = p.key_dim, p.value_dim, plan.chunk_slots * p.value_heads
        kept = dict.fromkeys(("W", "K_decayed", "Q_gated"), 2 * C * K) | dict.fromkeys(("Aqk", "inverse"), 2 * C * C)
        kept |= {"U": 4 * V * C, "state": 2 * V * K, "chunk_decay": 4 * K}
        own, sums = {"dU": 4 * V * C, "dstate": 2 * V * K}, {}
        if activated_gate:
            sums = dict.fromkeys(("dA_log", "ddt_bias"), tiles * 4 * K)
        if p.value_heads > p.heads:
            sums |= dict.fromkeys(("dq", "dk"), 4 * p.tokens * p.value_heads * K)

        intermediates = [(getattr(plan.intermediates, name), name, tiles * size) for name, size in kept.items()]
        self.check_apart(intermediates, plan.intermediates.total_bytes)
        assert plan.intermediates.total_bytes == planner.intermediate_bytes(p)
        early = [(getattr(plan.workspace, name), name, tiles * size) for name, size in own.items()]
        if not saved:
            early += [(plan.workspace.intermediates + begin, name, size) for begin, name, size in intermediates]
        late = [(getattr(plan.workspace, name), name, size) for name, size in sums.items()]
        late += [region for region in early if region[1] not in self.REUSED]
        for regions in (early, late):
            self.check_apart(regions, plan.workspace.total_bytes)
        used = sum(size for _, _, size in early), sum(size for _, _, size in late)
        assert max(used) <= plan.workspace.total_bytes < max(used) + ALIGNMENT * (len(early) + len(late))

    @staticmethod
    def check_apart(regions: list[tuple[int, str, int]], total_bytes: int) -> None:
        regions = sorted(regions)
        assert all(begin % ALIGNMENT == 0 for begin, _, _ in regions)
        for (begin, name, size), (following, other, _) in pairwise([*regions, (total_bytes, "the end", 0)]):
            assert begin + size <= following, f"{name} meets {other}"

    @pytest.mark.parametrize(
        ("changes", "activated_gate", "expected", "expected_saved", "intermediates"),
        [
            ({}, False, 3080, 1024, 2056),
            ({}, True, 3080, 1040, 2056),
            ({"heads": 4, "value_heads": 12}, True, 3224, 2064, 2056),
            ({"key_dim": 64, "value_dim": 64}, True, 1412, 392, 1028),
        ],
    )
    def test_memory_of_a_token(
        self, changes: dict[str, Any], activated_gate: bool, expected: int, expected_saved: int, intermediates: int
    ) -> None:
        """As documented, in bytes for each token and value head, K = V = 128 if nothing else is said."""
        p = problem(**changes)
        token_heads = p.tokens * p.value_heads
        for saved, bytes_of_token in ((False, expected), (True, expected_saved)):
            plan = planner.plan_chunk_bwd(p, activated_gate, saved)
            assert plan.workspace.total_bytes == bytes_of_token * token_heads
            assert plan.intermediates.total_bytes == intermediates * token_heads
            content = json.loads(planner.to_json(plan))
            assert content["workspace_bytes"] == plan.workspace.total_bytes
            assert content["intermediate_bytes"] == plan.intermediates.total_bytes

    def test_paths(self) -> None:
        """The backward takes the kernels where the forward does."""
        for changes in ({}, {"key_dim": 96}, {"compute_capability": 80}, {"tokens": 0}):
            p = problem(**changes)
            forward, backward = planner.plan_chunk_fwd(p), planner.plan_chunk_bwd(p, True)
            if forward.path == planner.ChunkFwdPath.composite:
                assert (backward.path, backward.reason) == (forward.path, forward.reason)
            else:  # in stages, whatever the forward takes
                assert backward.path == planner.ChunkFwdPath.staged and backward.value_tile in (32, 64, 128)
