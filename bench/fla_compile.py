"""Compiles FLA's kernels for one shape and launches none: a process of ``bench.fla_tuning.compile_ahead``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench import fla_tuning
from bench.operators import OPERATORS
from bench.shapes import Shape, parse_lengths

__all__ = ["main"]


def _compile_only() -> None:
    """From here on Triton compiles what is called and launches nothing."""
    from fla.ops.utils.cache import AutotuneKey
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.runtime.jit import JITFunction

    def compile_all(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        key = AutotuneKey.build(tuner.arg_names, tuner.keys, args, kwargs).autotune_key
        configs = [tuner.cache[key]] if key in tuner.cache else tuner.prune_configs(kwargs)
        for config in configs:
            try:
                tuner.fn.run(*args, **kwargs, **config.all_kwargs())
            except (OutOfResources, PTXASError):
                continue  # a configuration that does not fit this GPU; the autotuner passes over it too
        tuner.nargs = None

    launch = JITFunction.run

    def compile_one(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return launch(function, *args, **(kwargs | {"warmup": True}))

    Autotuner.run = compile_all
    JITFunction.run = compile_one


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles the kernels of one shape."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fla_compile", description="Compile FLA's kernels for a shape"
    )
    parser.add_argument("--lengths", type=parse_lengths, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--operator", default="chunk_fwd")
    args = parser.parse_args(argv)

    operator = OPERATORS[args.operator]
    implementation = next(found for found in operator.implementations(True) if found.name == "fla")
    inputs = operator.make_inputs(Shape("", args.lengths, args.heads), "long", 0, "cuda")
    fla_tuning.use_stored()  # before FLA is imported
    _compile_only()  # before the call is made: that of a backward runs its forward
    with torch.no_grad():
        implementation.call(inputs).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
