"""Calls from several threads and streams, and the same bits whatever the number of threads."""

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from cases import LARGE, Config, random_arrays
from numerics import (
    assert_all_close,
    forward_mx,
    mx_arguments,
    rounded,
    run_library,
    run_oracle,
    test_device,
    to_mx,
    tolerances,
    vjp_mx,
)

# What no number of threads may change. The sums over all pixels, grad_weight and grad_bias,
# may depend on how the pixels were divided, but not on the run.
SAME_FOR_ANY_COUNT = ("output", "input", "offset", "mask")

on_cpu = pytest.mark.skipif(
    test_device() != mx.cpu, reason="the determinism of the CPU backend is tested on the CPU"
)


def digest(results):
    return {
        name: hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()
        for name, result in results.items()
    }


def run_in_threads(count, work):
    """Call work(i) in `count` threads that start together; raises what they raised."""
    barrier = threading.Barrier(count)
    failures, results = [], [None] * count

    def target(i):
        try:
            barrier.wait()
            results[i] = work(i)
        except BaseException as error:  # a failure in a thread must fail the test
            failures.append(error)

    threads = [threading.Thread(target=target, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def test_the_same_call_from_eight_threads():
    """MLX's streams belong to their threads: each makes and evaluates its own arrays."""
    config = Config(H=23, W=29)
    arrays = rounded(random_arrays(config, 0), "float32")
    want = run_oracle(config, arrays)
    allowed = tolerances(config, arrays, "float32")

    def work(_):
        mx.set_default_device(test_device())
        for _ in range(5):
            results = run_library(config, arrays, "float32")
        return results

    for results in run_in_threads(8, work):
        assert_all_close(results, want, allowed)


@on_cpu
def test_different_calls_from_eight_threads():
    """Scratch memory of one call must not be seen by another: same bits as when alone."""
    configs = [Config(H=11 + i, W=17 + 2 * i, C=12 * (1 + i % 3)) for i in range(8)]
    arrays = [random_arrays(config, i) for i, config in enumerate(configs)]
    alone = [digest(run_library(c, a, "float32")) for c, a in zip(configs, arrays, strict=True)]

    def work(i):
        mx.set_default_device(test_device())
        return [digest(run_library(configs[i], arrays[i], "float32")) for _ in range(4)]

    for i, runs in enumerate(run_in_threads(8, work)):
        assert all(run == alone[i] for run in runs), configs[i]


def test_several_streams_share_the_pool():
    config = Config(H=19, W=23)
    device = test_device()
    streams = [mx.new_stream(device) for _ in range(6)]
    problems, pending = [], []
    for i, stream in enumerate(streams * 2):
        arrays = rounded(random_arrays(config, i), "float32")
        with mx.stream(stream):
            arguments = mx_arguments(arrays, "float32")
            cotangent = to_mx(arrays["cotangent"], "float32")
            output, gradients = vjp_mx(config, arguments, cotangent)
            mx.async_eval(output, gradients)
        problems.append(arrays)
        pending.append({"output": output, **gradients})
    for arrays, results in zip(problems, pending, strict=True):
        got = {name: np.array(result, np.float64) for name, result in results.items()}
        assert_all_close(got, run_oracle(config, arrays), tolerances(config, arrays, "float32"))


def test_a_result_crosses_streams():
    """The output of one stream is the input of the next."""
    config = Config(C=12, O=12, kH=3, kW=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1), G=2)
    arguments = mx_arguments(random_arrays(config, 0), "float32")
    want = arguments["input"]
    for _ in range(4):
        want = forward_mx(config, {**arguments, "input": want})
    mx.eval(want)
    got = arguments["input"]
    for _ in range(4):
        with mx.stream(mx.new_stream(test_device())):
            got = forward_mx(config, {**arguments, "input": got})
    assert mx.array_equal(got, want)


@on_cpu
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_same_bits_from_run_to_run(dtype):
    arrays = random_arrays(LARGE, 0, grid=None)
    first = digest(run_library(LARGE, arrays, dtype))
    for _ in range(4):
        assert digest(run_library(LARGE, arrays, dtype)) == first


SCRIPT = textwrap.dedent(
    """
    import sys
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    from cases import LARGE, MANY_CHANNELS, MANY_PIXELS, Config, random_arrays
    from numerics import run_library, run_library_im2col
    from test_threads import digest

    small = Config(N=1, H=4, W=5)  # fewer tiles than threads
    wide = LARGE.but(N=1, C=120, DG=5)  # every thread gets channels of its own
    configs = [LARGE, LARGE.but(G=1, DG=1), wide, MANY_CHANNELS, MANY_PIXELS, small]
    for number, config in enumerate(configs):
        arrays = random_arrays(config, 0, grid=None)
        for dtype in ("float32", "float64", "float16"):
            results = {
                "conv": run_library(config, arrays, dtype),
                "im2col": run_library_im2col(config, arrays, dtype),
            }
            for op, quantities in results.items():
                for name, value in digest(quantities).items():
                    print(op, number, dtype, name, value)
    """
)


def run_script(threads):
    environment = {
        **os.environ,
        "MLX_DEFORM_NUM_THREADS": str(threads),
        "MLX_DEFORM_TEST_DEVICE": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    return dict(lines)


@pytest.fixture(scope="module")
def one_thread():
    return run_script(1)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_the_same_bits_for_any_number_of_threads(one_thread, threads):
    results = run_script(threads)
    assert results.keys() == one_thread.keys()
    assert len(results) == 6 * 3 * (6 + 4)
    fixed = [key for key in results if key.split()[-1] in SAME_FOR_ANY_COUNT or "im2col" in key]
    assert len(fixed) == 6 * 3 * (4 + 4)
    assert [key for key in fixed if results[key] != one_thread[key]] == []


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_from_process_to_process(threads):
    assert run_script(threads) == run_script(threads)


@pytest.mark.parametrize("value", ["0", "-2", "many", "", "1e9", "100000"])
def test_a_wrong_thread_count_does_not_crash(value):
    """Nonsense in MLX_DEFORM_NUM_THREADS: the default, a bounded number, or a clear error."""
    script = textwrap.dedent(
        """
        import mlx.core as mx
        mx.set_default_device(mx.cpu)
        import mlx_deform
        try:
            y = mlx_deform.deform_conv2d(
                mx.ones((2, 9, 8, 3)), mx.zeros((2, 7, 6, 18)), mx.ones((5, 3, 3, 3))
            )
            print(y.min().item(), y.max().item())
        except ValueError as error:
            assert "MLX_DEFORM_NUM_THREADS" in str(error), error
            print("27.0 27.0")
        """
    )
    environment = {**os.environ, "MLX_DEFORM_NUM_THREADS": value}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["27.0", "27.0"]


def test_the_pool_does_not_keep_the_interpreter_alive():
    """Importing and calling once must not keep the interpreter from ending."""
    script = textwrap.dedent(
        """
        import threading
        import mlx.core as mx
        import mlx_deform

        def work():
            y = mlx_deform.deform_conv2d(
                mx.ones((2, 40, 40, 8)), mx.zeros((2, 38, 38, 18)), mx.ones((5, 3, 3, 8))
            )
            mx.eval(y)

        work()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print("done")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
