"""What the timing needs of a device: events, graphs, memory and clocks. One class for CUDA, one for the host.

The host device runs the whole machinery where there is no GPU (tests, trying things out). Its numbers are of the
composite implementation on a CPU and are never published.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

__all__ = ["CudaDevice", "Device", "HostDevice"]

CLOCK_FIELDS = ("sm_mhz", "memory_mhz", "temperature_c", "power_w", "throttle_reasons")


class Event(Protocol):
    """A point in the device's stream of work."""

    def record(self) -> None:
        """Puts the point behind the work submitted so far."""

    def us_since(self, start: Event) -> float:
        """Microseconds of the device between two points that it has passed."""


class Device(Protocol):
    """A device and how to measure on it."""

    torch_device: torch.device
    l2_bytes: int
    asynchronous: bool  # a call returns before its work is done, so that the host's time is something of its own

    def event(self) -> Event: ...

    def synchronize(self) -> None: ...

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        """A function that replays the calls, in order, from a graph."""

    def now(self) -> float:
        """Seconds of the host's clock."""

    def clocks(self) -> dict[str, float | str | None]:
        """CLOCK_FIELDS now; None where the driver does not say."""

    def start_peak(self) -> None:
        """From here on the peak of allocated memory counts."""

    def peak_bytes(self) -> int | None:
        """Most bytes that were allocated since start_peak, beyond what was allocated then; None if unknown."""

    def release(self) -> None:
        """Gives cached memory back."""


class CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)

    def record(self) -> None:
        self._event.record()

    def us_since(self, start: CudaEvent) -> float:
        return start._event.elapsed_time(self._event) * 1e3


class CudaDevice:
    """The current CUDA device."""

    asynchronous = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = int(torch.cuda.get_device_properties(self.torch_device).L2_cache_size)
        self._nvml = _Nvml.open(torch.cuda.get_device_properties(self.torch_device))
        self._allocated = 0

    def event(self) -> CudaEvent:
        return CudaEvent()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with _no_garbage_collection(), torch.cuda.stream(stream):
            # Other threads (a progress bar) do nothing with CUDA, and must not be able to spoil a capture.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def now(self) -> float:
        return time.perf_counter()

    def clocks(self) -> dict[str, float | str | None]:
        return self._nvml.clocks() if self._nvml else _clocks_of_nvidia_smi(self.torch_device.index)

    def start_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._allocated = torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._allocated

    def release(self) -> None:
        torch.cuda.empty_cache()


class HostEvent:
    def __init__(self) -> None:
        self._time = 0.0

    def record(self) -> None:
        self._time = time.perf_counter()

    def us_since(self, start: HostEvent) -> float:
        return (self._time - start._time) * 1e6


class HostDevice:
    """The CPU: work is done when the call returns, a graph is a list of calls."""

    asynchronous = False

    def __init__(self, l2_bytes: int = 1 << 18) -> None:
        self.torch_device = torch.device("cpu")
        self.l2_bytes = l2_bytes

    def event(self) -> HostEvent:
        return HostEvent()

    def synchronize(self) -> None:
        pass

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        def replay() -> None:
            for call in calls:
                call()

        return replay

    def now(self) -> float:
        return time.perf_counter()

    def clocks(self) -> dict[str, float | str | None]:
        return dict.fromkeys(CLOCK_FIELDS)

    def start_peak(self) -> None:
        pass

    def peak_bytes(self) -> None:
        return None

    def release(self) -> None:
        pass


@contextmanager
def _no_garbage_collection():
    """A collection inside a capture could free another graph, which a capture forbids."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Nvml:
    """Clocks through NVML: well under a millisecond a reading."""

    def __init__(self, module: Any, handle: Any) -> None:
        self._module, self._handle = module, handle

    @classmethod
    def open(cls, properties: Any) -> _Nvml | None:
        """NVML for the device of these properties; None where there is no NVML."""
        try:
            import pynvml

            pynvml.nvmlInit()
            try:
                # NVML counts all devices of the machine, CUDA those that are visible to this process.
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            except (pynvml.NVMLError, AttributeError, TypeError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        except Exception:  # not installed, or no driver that answers: clocks are then read otherwise
            return None
        return cls(pynvml, handle)

    def clocks(self) -> dict[str, float | str | None]:
        n, handle = self._module, self._handle

        def ask(question: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return question(handle, *arguments)
            except n.NVMLError:
                return None

        power = ask(n.nvmlDeviceGetPowerUsage)
        # The name that newer bindings give, and the older one.
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        reasons = next((ask(getattr(n, name)) for name in names if hasattr(n, name)), None)
        values = (
            ask(n.nvmlDeviceGetClockInfo, n.NVML_CLOCK_SM),
            ask(n.nvmlDeviceGetClockInfo, n.NVML_CLOCK_MEM),
            ask(n.nvmlDeviceGetTemperature, n.NVML_TEMPERATURE_GPU),
            power / 1e3 if power is not None else None,
            f"{reasons:#x}" if reasons is not None else None,
        )
        return dict(zip(CLOCK_FIELDS, values, strict=True))


def _clocks_of_nvidia_smi(index: int) -> dict[str, float | str | None]:
    """The same through nvidia-smi, which takes a moment longer."""
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        *numbers, reasons = (part.strip() for part in answer.splitlines()[0].split(","))
        return dict(zip(CLOCK_FIELDS, [*map(float, numbers), reasons], strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return dict.fromkeys(CLOCK_FIELDS)
