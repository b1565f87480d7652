"""Data-parallel training of the demo, by MLX's own launcher: two processes over loopback."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_deform.demo import networks, training
from mlx_deform.demo.frames import BLOCK, SIDE, Batch
from numerics import relative_error

PROCESSES, BATCH = 2, 8
LAUNCHER = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))


def free_ports(count):
    """The first of `count` ports in a row that nothing listens on."""
    for first in range(20000 + os.getpid() % 20000, 60000, 7):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    pytest.skip(f"no {count} free ports in a row")


def launch(*command, cwd=None):
    """The command in two processes on the CPU, joined by the ring backend."""
    options = ["--backend", "ring", "-n", str(PROCESSES), "-p", str(free_ports(PROCESSES))]
    return subprocess.run(
        [LAUNCHER, *options, "--", *map(str, command)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MLX_DEFORM_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def launcher():
    """Skips where two processes that do nothing but add can't be launched."""
    if LAUNCHER is None:
        pytest.skip("there is no mlx.launch beside this Python")
    script = (
        "import mlx.core as mx; mx.set_default_device(mx.cpu); group = mx.distributed.init();"
        "print(mx.distributed.all_sum(mx.array(7), group=group).item(), group.size())"
    )
    try:
        done = launch(sys.executable, "-c", script)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"mlx.launch does not run here: {error}")
    if sorted(done.stdout.splitlines()) != ["14 2"] * PROCESSES:
        pytest.skip(f"mlx.launch does not run here: {done.stdout}{done.stderr}")


def gradients_of(group, rank, ranks):
    """Loss and gradients of the demo's network, its kernels bent at random, on a rank's share."""
    mx.random.seed(3)
    network = networks.Network("deformable")
    network.offset_conv.bias = mx.random.normal(network.offset_conv.bias.shape)
    network.restore[-1].weight = mx.random.normal(network.restore[-1].weight.shape)
    noisy, neighbour, truth = mx.random.uniform(shape=(3, BATCH, SIDE, SIDE, 3))
    vectors = mx.random.normal((BATCH, SIDE // BLOCK, SIDE // BLOCK, 2))
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    batch = Batch(noisy, neighbour, vectors, truth)[share]
    value, gradients = training.loss_and_gradients(network, batch, group)
    flat = {name: np.array(array) for name, array in tree_flatten(gradients)}
    return {"loss": np.array(value), **flat}


SCRIPT = textwrap.dedent(
    """
    import sys

    import mlx.core as mx
    import numpy as np

    mx.set_default_device(mx.cpu)
    sys.path.insert(0, sys.argv[1])
    import test_distributed as test

    group = mx.distributed.init(strict=True)
    rank, ranks = group.rank(), group.size()
    averaged = test.gradients_of(group, rank, ranks)
    alone = test.gradients_of(test.Alone(), rank, ranks)  # without the other's share
    for name, arrays in (("averaged", averaged), ("alone", alone)):
        np.savez(f"{sys.argv[2]}/{name}{rank}.npz", **arrays)
    """
)


class Alone:
    """A group of one process."""

    def size(self):
        return 1

    def rank(self):
        return 0


def test_averaged_gradients_are_those_of_the_whole_batch(launcher, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = Path(__file__).parent
    done = launch(sys.executable, tmp_path / "script.py", folder, tmp_path)
    files = {path.stem: np.load(path) for path in tmp_path.glob("*.npz")}
    assert len(files) == 2 * PROCESSES, done.stdout + done.stderr

    mx.set_default_device(mx.cpu)
    whole = gradients_of(Alone(), 0, 1)
    assert {"encode.weight", "offset_conv.weight", "restore.2.bias"} <= whole.keys()
    for name, want in whole.items():
        first, second = files["averaged0"][name], files["averaged1"][name]
        assert np.array_equal(first, second), name
        # A bias sums thousands of terms of either sign, in float32 and another order.
        assert relative_error(first, want) < 1e-4, name
        own = files["alone0"][name]
        assert relative_error(own, want) > 1e-3, f"{name}: nothing was averaged"


def test_the_demo_on_two_processes(launcher, tmp_path):
    pytest.importorskip("skimage")
    quick = ["--seeds", 1, "--steps", 2, "--batch-size", 4]
    done = launch(sys.executable, "-m", "mlx_deform.demo", *quick, cwd=tmp_path)
    assert (tmp_path / "mlx_deform_demo.png").is_file(), done.stdout + done.stderr
    assert "processes 2" in done.stdout
    for line in ("test PSNR, dB", "\nordinary ", "\ndeformable ", "\nsaved "):
        assert done.stdout.count(line) == 1, done.stdout


def test_a_batch_that_does_not_divide_is_refused():
    class Three(Alone):
        def size(self):
            return 3

    class Options:
        batch_size = 32

    with pytest.raises(ValueError, match="divisible by the number of processes; got 32 and 3"):
        training.train(None, None, Options, 0, Three(), print)
