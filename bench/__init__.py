"""Benchmarks: what is measured (shapes, inputs), how (timing), of whom (implementations), and what becomes of it.

    python -m bench.board      time our operators and the peers that can be imported, one JSON a run
    python -m bench.compare    what changed between two runs
    python -m bench.sweep      time the planner's choices over a grid
    python -m bench.report     README table, docs/benchmarks.md and the pictures from the newest run

From the root of the repository. The package is not part of the wheel. The C++ benchmark binaries for Nsight lie
beside it.
"""
