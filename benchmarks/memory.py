"""The memory that a call takes beside its arguments and results.

Measured in a process of its own: how far the resident memory rises above its level before
the first call, so that scratch which a library keeps counts too, and on a GPU what the
allocator's peak says. Results are subtracted.
"""

import contextlib
import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

from named_cases import select

STATUS = Path("/proc/self/status")
MB = 1e6


def _resident(field):
    """Bytes of VmRSS (now) or VmHWM (the highest so far), where /proc has them."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _return_free_memory():
    """So that a call cannot hide in memory that was freed but is still resident."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone has it


class ResidentPeak:
    """How far the resident memory of this process rises above `baseline`."""

    def __init__(self):
        _return_free_memory()
        self.baseline = _resident("VmRSS") if STATUS.exists() else self._highest()

    def reset(self):
        # The highest becomes the present. Where that may not be written, the highest holds
        # from the start of the process: an upper bound.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def _highest(self):
        if STATUS.exists():
            return _resident("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

    def rise(self):
        return max(0, self._highest() - self.baseline)


class MlxPeak:
    """How far MLX's allocator rises above what it holds now."""

    def __init__(self):
        import mlx.core as mx

        self.mx, self.baseline = mx, mx.get_active_memory()

    def reset(self):
        self.mx.reset_peak_memory()

    def rise(self):
        return max(0, self.mx.get_peak_memory() - self.baseline)


class CudaPeak:
    """The same of torch's allocator."""

    def __init__(self):
        import torch

        self.cuda, self.baseline = torch.cuda, torch.cuda.memory_allocated()

    def reset(self):
        self.cuda.reset_peak_memory_stats()

    def rise(self):
        return max(0, self.cuda.max_memory_allocated() - self.baseline)


def _worker(case, dtype, who, device, threads):
    import mlx.core as mx

    mx.set_default_device(mx.Device(getattr(mx, device), 0))
    from contenders import MlxDeform, device_kind
    from peers import Torchvision, build
    from problem import PASSES, make_problem

    def contender(name):
        problem = make_problem(name, select([name])[name])
        if who == "mlx_deform":
            return MlxDeform(problem, dtype, threads)
        return build(Torchvision, problem, dtype, threads, device_kind())

    small = contender("4to6-k3-5x5")  # loads what is loaded once
    for which in PASSES:
        small.run(which)
    subject = contender(case)
    mx.clear_cache()
    if device_kind() == "cpu":
        peak = ResidentPeak()
    else:
        peak = MlxPeak() if who == "mlx_deform" else CudaPeak()
    measured = {}
    for which in PASSES:
        peak.reset()
        results = subject.run(which)
        measured[which] = max(0, peak.rise() - sum(result.nbytes for result in results)) / MB
        del results
        mx.clear_cache()
    print(json.dumps(measured))


def extra_megabytes(case, dtype, who, device, threads):
    """{pass: MB} of one contender; empty where its process failed."""
    arguments = [case, dtype, who, device, str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    *texts, thread_count = sys.argv[1:]
    _worker(*texts, int(thread_count))
