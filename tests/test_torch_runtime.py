"""The bridge in a process: threads, memory, forks, imports, and waiting for MPS."""

# ruff: noqa: E402  (torch may not be installed)

import gc
import os
import subprocess
import sys
import textwrap
import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mlx_deform.torch as bridge
from mlx_deform.torch import _bridge
from test_threads import run_in_threads
from torch_cases import (
    CONFIG,
    DEVICE,
    DTYPE,
    SMALL,
    assert_same,
    convolve,
    given,
    results,
    tensors,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_threads_share_the_bridge():
    configs = [CONFIG.but(H=7 + i, W=11 + 2 * i) for i in range(6)]
    arguments = [tensors(config, i, requires_grad=True) for i, config in enumerate(configs)]
    alone = [results(bridge.deform_conv2d, *each) for each in zip(configs, arguments, strict=True)]

    def work(i):
        for _ in range(5):
            assert_same(results(bridge.deform_conv2d, configs[i], arguments[i]), alone[i], 0)

    run_in_threads(6, work)


def test_backward_in_another_thread():
    arguments = tensors(CONFIG, requires_grad=True)
    want = results(bridge.deform_conv2d, CONFIG, arguments)
    output = convolve(bridge.deform_conv2d, CONFIG, arguments)
    got = {}

    def backward():
        gradients = torch.autograd.grad(output, given(arguments), arguments["cotangent"])
        got.update(zip((name for name in want if name != "output"), gradients, strict=True))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert_same({**got, "output": output}, want, 0)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_nothing_leaks():
    config = SMALL.but(H=40, W=41)  # some 100 kB a call
    arguments = tensors(config, requires_grad=True)

    def step():
        return results(bridge.deform_conv2d, config, arguments)

    for _ in range(200):
        step()
    gc.collect()
    before, threads = resident_bytes(), len(os.listdir("/proc/self/task"))
    for _ in range(2000):
        step()
    gc.collect()
    size = sum(tensor.nbytes for tensor in step().values())
    # A leak of one result a call would be hundreds of times this.
    assert resident_bytes() - before < max(10 * size, 2**23) < 100 * size
    assert len(os.listdir("/proc/self/task")) == threads


@linux
def test_threads_leave_no_thread_behind():
    """MLX's own streams would leave one for each Python thread."""
    arguments = tensors(SMALL, requires_grad=True)

    def work(_):
        results(bridge.deform_conv2d, SMALL, arguments)

    run_in_threads(2, work)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(10):
        run_in_threads(4, work)
    # 40 would stay; one that is ending may still be listed.
    assert len(os.listdir("/proc/self/task")) < before + 10


def run(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_forked_process_is_told():
    done = run(
        """
        import os, torch, warnings
        from mlx_deform.torch import deform_conv2d
        warnings.simplefilter("ignore")

        def call():
            x = torch.randn(1, 3, 5, 6)
            return deform_conv2d(x, torch.zeros(1, 2, 5, 6), torch.randn(4, 3, 1, 1))

        call()
        if os.fork() == 0:
            try:
                call()
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
        """
    )
    assert done.returncode == 0, done.stderr
    assert "forked" in done.stdout
    assert "spawn" in done.stdout


def test_importing_the_package_does_not_import_torch():
    done = run(
        """
        import sys, mlx_deform, mlx_deform.nn
        before = "torch" in sys.modules
        import mlx_deform.torch
        print(before, "torch" in sys.modules, "torchvision" in sys.modules)
        """
    )
    assert done.stdout.split() == ["False", "True", "False"], done.stderr


def test_without_torch_there_is_an_import_error():
    done = run(
        """
        import sys
        sys.modules["torch"] = None
        try:
            import mlx_deform.torch
        except ImportError as error:
            print(error.name or error)
        """
    )
    assert "torch" in done.stdout, done.stderr


def test_both_runtimes_are_waited_for(monkeypatch):
    """The order of events on MPS. Elsewhere the branch runs on CPU tensors, its wait recorded."""
    events = []
    evaluate = _bridge.mx.eval
    monkeypatch.setattr(torch.mps, "synchronize", lambda: events.append("torch"))
    monkeypatch.setattr(
        _bridge.mx, "eval", lambda *arrays: (events.append("mlx"), evaluate(*arrays))
    )
    if DEVICE != "mps":
        runtime = _bridge._Runtime("cpu")
        runtime.on_gpu = True
        monkeypatch.setattr(_bridge, "_runtimes", {"cpu": runtime})
    arguments = tensors(CONFIG, requires_grad=True)
    output = convolve(bridge.deform_conv2d, CONFIG, arguments)
    assert events == ["torch", "mlx"]
    torch.autograd.grad(output, given(arguments), arguments["cotangent"])
    assert events == ["torch", "mlx"] * 2  # one crossing for all five gradients
    held = _bridge._runtimes[DEVICE].in_flight
    assert len(held) == 5  # until torch's queue has been waited for
    convolve(bridge.deform_conv2d, CONFIG, arguments)
    assert len(held) == 1


@pytest.mark.skipif(DEVICE != "mps", reason="needs a Mac: torch and MLX with a Metal device")
def test_memory_is_shared_on_mps():
    tensor = torch.randn(3, 4, device="mps")
    torch.mps.synchronize()
    runtime = _bridge._Runtime("mps")
    back = runtime.tensor(runtime.array(tensor), set())
    assert back.data_ptr() == tensor.data_ptr()


def test_availability():
    assert bridge.is_available() == (DEVICE == "mps")
    assert DTYPE in _bridge.DTYPES
