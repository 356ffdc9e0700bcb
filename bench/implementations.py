"""What is timed: our operator, our operator with each path forced, and the peers that can be imported.

An implementation turns the arguments of ``kda::chunk_fwd`` (bench.inputs) into a call without arguments. Conversions
that its interface asks for happen there, outside of the measured time. Its results are compared with ours before it
is timed (bench.board), so that a wrong call cannot win.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kda_cuda
from bench import fla_tuning
from bench.shapes import Shape

__all__ = ["Call", "Implementation", "device_facts", "forward_implementations", "forward_plan"]


@dataclass(frozen=True)
class Call:
    """A call that can be repeated."""

    run: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Tensor]]  # what it returned, by name and in our layouts
    same: dict[str, Callable[[], Any]] = field(default_factory=dict)  # by other names; only the host's time is taken


class Implementation:
    """One column of the board."""

    name: str  # in the JSON
    label: str  # in tables and pictures
    kind: str  # "ours", "forced" (ours on a path that the plan may not choose) or "peer"
    method = "graph"  # how its time is taken: "graph" or "events" (bench.timing)
    slow = False  # few samples, no host time: there for comparison and for checks only
    note = ""

    def unavailable(self) -> str | None:
        """Why it cannot be called here; None if it can."""
        return None

    def version(self) -> str:
        """What is measured, as its maker counts."""
        return ""

    def declines(self, shape: Shape) -> str | None:
        """Why it does not take a shape; None if it does."""
        return None

    def call(self, inputs: dict[str, Any]) -> Call:
        """The call for these inputs."""
        raise NotImplementedError


def forward_plan(shape: Shape, device: torch.device) -> dict[str, Any]:
    """What the planner says of a shape on a device; see ``kda::plan_chunk_fwd``."""
    sizes = (shape.heads, shape.heads, shape.key_dim, shape.value_dim)
    facts = device_facts(device)
    return json.loads(torch.ops.kda.plan_chunk_fwd(list(shape.lengths), 1, *sizes, "bfloat16", shape.varlen, *facts))


def device_facts(device: torch.device) -> tuple[int, int]:
    """Compute capability (major * 10 + minor) and multiprocessors, as the planner takes them; 0 without kernels."""
    if device.type != "cuda" or not json.loads(torch.ops.kda.build_info())["cuda_kernels"]:
        return 0, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


class OurForward(Implementation):
    """``torch.ops.kda.chunk_fwd``, or one of its paths by the name of its operator."""

    _PREFIX = "chunk_fwd"

    def __init__(self, path: str | None = None) -> None:
        """path: forced, as in the name of the operator ``kda::chunk_fwd_<path>``; None: what the plan chooses."""
        self.path = path
        self.name = "ours" if path is None else f"ours_{path}"
        self.label = "kda-cuda" if path is None else f"kda-cuda, {path}"
        self.kind = "ours" if path is None else "forced"
        self.slow = path == "composite"
        self.method = "events" if self.slow else "graph"
        self._operator = getattr(torch.ops.kda, self._PREFIX + (f"_{path}" if path else ""))
        self._arguments = self._operator.default._schema.arguments

    @classmethod
    def forced(cls) -> list[OurForward]:
        """One for each path that has an operator of its own, with the schema of the forward."""
        schema = str(torch.ops.kda.chunk_fwd.default._schema)
        prefix = f"kda::{cls._PREFIX}_"
        names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix))
        paths = [name.removeprefix(prefix) for name in names]
        same = [p for p in paths if _schema_of(p) == schema.replace(f"kda::{cls._PREFIX}(", f"{prefix}{p}(")]
        return [cls(path) for path in same]

    def version(self) -> str:
        return kda_cuda.__version__

    def call(self, inputs: dict[str, Any]) -> Call:
        # Arguments by position: what matching names costs is no property of the operator.
        arguments = [inputs.get(argument.name, argument.default_value) for argument in self._arguments]
        same = {} if self.path else {"chunk_kda": _drop_in(inputs)}
        return Call(
            lambda: self._operator(*arguments), lambda results: {"o": results[0], "final_state": results[1]}, same
        )


def _drop_in(inputs: dict[str, Any]) -> Callable[[], Any]:
    """The same call by ``kda_cuda.chunk_kda``."""
    renamed = {f"use_{name}": f"use_{name}_in_kernel" for name in ("qk_l2norm", "gate", "beta_sigmoid")}
    arguments = {renamed.get(name, name): x for name, x in inputs.items()}
    return lambda: kda_cuda.chunk_kda(**arguments)


def _schema_of(path: str) -> str:
    return str(getattr(torch.ops.kda, f"chunk_fwd_{path}").default._schema)


class FlaForward(Implementation):
    """``fla.ops.kda.chunk_kda`` of flash-linear-attention, in Triton."""

    name, label, kind = "fla", "FLA", "peer"
    method = "events"
    note = "cannot be captured as used: its autotuner and its index tables work on the host"

    def unavailable(self) -> str | None:
        return _missing("fla.ops.kda", "triton")

    def version(self) -> str:
        return _distribution_version("fla", "fla-core", "flash-linear-attention")

    def call(self, inputs: dict[str, Any]) -> Call:
        return Call(self.function(inputs), lambda results: {"o": results[0], "final_state": results[1]})

    @staticmethod
    def function(inputs: dict[str, Any], **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        """``chunk_kda`` for these inputs, with further options."""
        # Its other back ends have columns of their own, or none.
        os.environ.update(FLA_FLASH_KDA="0", FLA_TILELANG="0")
        fla_tuning.use_stored()
        from fla.ops.kda import chunk_kda

        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state")
        arguments = {name: inputs[name] for name in names if name in inputs}
        arguments |= {
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": inputs.get("use_qk_l2norm", False),
            "use_gate_in_kernel": inputs.get("use_gate", False),
            "use_beta_sigmoid_in_kernel": inputs.get("use_beta_sigmoid", False),
            "safe_gate": True,  # its faster kernels: all gates of the board are above -5, processed ones too
            **options,
        }
        if (cu_seqlens := inputs.get("cu_seqlens")) is not None:
            # The lengths on the host too: otherwise it waits for the device to read them.
            arguments |= {"cu_seqlens": cu_seqlens.long(), "cu_seqlens_cpu": cu_seqlens.long().cpu()}
        return lambda: chunk_kda(**arguments)


class FlashKdaForward(Implementation):
    """``flash_kda.fwd`` of FlashKDA: CUTLASS, forward only, states [N, H, V, K]."""

    name, label, kind = "flash_kda", "FlashKDA", "peer"

    def unavailable(self) -> str | None:
        return _missing("flash_kda")

    def version(self) -> str:
        return _distribution_version("flash_kda", "flash-kda")

    def declines(self, shape: Shape) -> str | None:
        return None if shape.key_dim == shape.value_dim == 128 else "K and V must be 128"

    def call(self, inputs: dict[str, Any]) -> Call:
        import flash_kda

        q, v = inputs["q"], inputs["v"]
        initial_state = inputs["initial_state"].transpose(-1, -2).contiguous()
        dt_bias = inputs["dt_bias"].view(v.shape[2], -1)
        cu_seqlens = inputs["cu_seqlens"].long() if "cu_seqlens" in inputs else None

        def run() -> tuple[Tensor, Tensor]:
            o, final_state = torch.empty_like(v), torch.empty_like(initial_state)
            flash_kda.fwd(
                q,
                inputs["k"],
                v,
                inputs["g"],
                inputs["beta"],
                q.shape[-1] ** -0.5,
                o,
                A_log=inputs["A_log"],
                dt_bias=dt_bias,
                lower_bound=inputs["lower_bound"],
                initial_state=initial_state,
                final_state=final_state,
                cu_seqlens=cu_seqlens,
            )
            return o, final_state

        return Call(run, lambda results: {"o": results[0], "final_state": results[1].transpose(-1, -2)})


class CudnnForward(Implementation):
    """``cudnn.linear_attention.kimi_delta_attention`` of the cuDNN frontend, its fused kernel for sm90."""

    name, label, kind = "cudnn", "cuDNN", "peer"
    note = "g and beta given in fp32, as its kernel takes them; packed tokens, states [N, H, V, K]"
    _PLAN = "kda_hopper_cuda"

    def unavailable(self) -> str | None:
        if reason := _missing("cudnn"):
            return reason
        try:
            importlib.import_module("cudnn.linear_attention").kimi_delta_attention  # noqa: B018
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return f"this cuDNN frontend has no linear attention ({_first_line(error)})"
        return None

    def version(self) -> str:
        return f"frontend {importlib.import_module('cudnn').__version__}"

    def declines(self, shape: Shape) -> str | None:
        return None if shape.key_dim == shape.value_dim == 128 else "K and V must be 128"

    def call(self, inputs: dict[str, Any]) -> Call:
        from cudnn.linear_attention import kimi_delta_attention

        tokens, heads = inputs["q"].shape[1:3]
        cu_seqlens = inputs.get("cu_seqlens")
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=inputs["q"].device)
        arguments = {
            **{name: inputs[name][0] for name in ("q", "k", "v")},
            **{name: inputs[name][0].float() for name in ("g", "beta")},
            "cu_seqlens": cu_seqlens,
            "initial_state": inputs["initial_state"].transpose(-1, -2).contiguous(),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "safe_gate": True,
            "gate_lower_bound": inputs["lower_bound"],
            "a_log": inputs["A_log"],
            "dt_bias": inputs["dt_bias"].view(heads, -1),
            "plan_name": self._PLAN,
        }
        return Call(
            lambda: kimi_delta_attention(**arguments),
            lambda results: {"o": results[0][None], "final_state": results[1].transpose(-1, -2)},
        )


def forward_implementations(peers: bool = True) -> list[Implementation]:
    """All columns of the forward's board, ours first; peers are listed whether or not they can be imported."""
    found: list[Implementation] = [OurForward(), *OurForward.forced()]
    return [*found, FlaForward(), FlashKdaForward(), CudnnForward()] if peers else found


def _missing(*modules: str) -> str | None:
    """The first of these modules that cannot be found, as a clause; None if all can."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module.partition(".")[0])
        except (ImportError, ValueError):
            found = None
        if found is None:
            return f"{module.partition('.')[0]} is not installed"
    return None


def _distribution_version(module: str, *distributions: str) -> str:
    from importlib import metadata

    for name in (*distributions, module):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return getattr(importlib.import_module(module), "__version__", "unknown")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
