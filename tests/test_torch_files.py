"""Files of torch.save, read without PyTorch and without running what they hold."""

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_deform.nn import DeformConv2d, load_torch_weights
from mlx_deform.nn.torch_files import read_torch_file

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
DTYPES += ["uint8", "bool"]


def saved(content, path):
    torch.save(content, path)
    return path


def assert_equal(got, want):
    assert tuple(got.shape) == tuple(want.shape)
    if want.dtype == torch.bfloat16:
        assert got.dtype == mx.bfloat16
        got, want = got.astype(mx.float32), want.float()
    else:
        assert got.dtype == want.detach().numpy().dtype
    assert np.array_equal(np.array(got), want.detach().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, tmp_path):
    tensor = (10 * torch.randn(3, 4, 5)).to(getattr(torch, dtype))
    state = read_torch_file(saved({"a": tensor, "empty": tensor[:0]}, tmp_path / "a.pth"))
    assert_equal(state["a"], tensor)
    assert_equal(state["empty"], tensor[:0])


def test_views_parameters_and_scalars(tmp_path):
    whole = torch.randn(6, 7, 8)
    tensors = {
        "transposed": whole.permute(2, 0, 1),
        "strided": whole[1::2, :, 3::3],
        "parameter": torch.nn.Parameter(whole[2]),
        "scalar": torch.tensor(3.5),
        "whole": whole,  # all of one storage
    }
    state = read_torch_file(saved(tensors, tmp_path / "views.pth"))
    assert list(state) == list(tensors)
    for name, tensor in tensors.items():
        assert_equal(state[name], tensor)


def test_a_state_dict_among_other_things(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    content = {"epoch": 3, "name": "net", "lr": [0.1, None], "model": module.state_dict()}
    for path in (saved(content, tmp_path / "a.pt"), saved(module.state_dict(), tmp_path / "b.bin")):
        state = read_torch_file(path)
        assert set(state) == set(module.state_dict())
        for name, tensor in module.state_dict().items():
            assert_equal(state[name], tensor)


def test_averaged_weights_come_first(tmp_path):
    """What a training program saves of itself."""
    last, averaged = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(last.parameters())
    last(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "model": last.state_dict(),
        "criterion": {},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "scaler": {"scale": 2.0, "growth_interval": 2000},
    }
    for ema in ({"module": averaged.state_dict(), "updates": 9}, averaged.state_dict()):
        state = read_torch_file(saved({**content, "ema": ema}, tmp_path / "a.pth"))
        assert_equal(state["weight"], averaged.weight)
    for ema in ({}, {"ema": None}, {"ema": {"updates": 0}}):
        state = read_torch_file(saved({**content, **ema}, tmp_path / "a.pth"))
        assert_equal(state["weight"], last.weight)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_load_torch_weights_reads_it(suffix, tmp_path):
    state = {"net.weight": torch.randn(6, 4, 3, 2), "net.bias": torch.randn(6)}
    path = saved(state, tmp_path / f"model.{suffix}")
    layer = load_torch_weights(DeformConv2d(4, 6, (3, 2)), path, prefix="net")
    assert np.array_equal(layer.weight, state["net.weight"].permute(0, 2, 3, 1))


def test_it_does_not_import_torch(tmp_path):
    path = saved({"a": torch.ones(2)}, tmp_path / "a.pth")
    script = (
        "import sys; from mlx_deform.nn.torch_files import read_torch_file as r; "
        f"print(r({str(path)!r})['a'].sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["2.0", "False"], done.stderr


# ---------------------------------------------------------------------------
# What is refused


def with_pickle(data, path, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in storages:
            archive.writestr(f"archive/data/{name}", content)
    return path


class Bomb:
    def __init__(self, function, *arguments):
        self.made_by = function, arguments

    def __reduce__(self):
        return self.made_by


BOMBS = [
    (os.system, "touch {}"),
    (eval, "open({!r}, 'w')"),
    (subprocess.check_call, ["touch", "{}"]),
    (open, "{}", "w"),
]


@pytest.mark.parametrize("bomb", BOMBS, ids=[f[0].__name__ for f in BOMBS])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_executed(bomb, protocol, tmp_path):
    fuse = tmp_path / "fuse"
    function, *arguments = bomb
    arguments = [
        [part.format(str(fuse)) for part in a] if isinstance(a, list) else a.format(str(fuse))
        for a in arguments
    ]
    data = pickle.dumps({"weight": Bomb(function, *arguments)}, protocol)
    pickle.loads(data)
    assert fuse.exists()  # it is a bomb
    fuse.unlink()
    path = with_pickle(data, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"it names \w+\.\w+, which a state dict has no use for"):
        read_torch_file(path)
    with pytest.raises(ValueError, match=r"^\[load_torch_weights\] .*bomb\.pth': it names"):
        load_torch_weights(DeformConv2d(4, 6, 3), path)
    assert not fuse.exists()


def test_a_whole_module_is_refused(tmp_path):
    path = saved(torch.nn.Linear(2, 3), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        read_torch_file(path)


class Rebuilt:
    """Pickled as a call of torch._utils._rebuild_tensor_v2 with any arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Storage:
    def __init__(self, count, name="0"):
        self.key = ("storage", torch.FloatStorage, name, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.key if isinstance(value, Storage) else None


def tensor_file(path, storage, *arguments):
    buffer = io.BytesIO()
    rebuilt = Rebuilt(storage, *arguments, False, collections.OrderedDict())
    Pickler(buffer, 2).dump({"weight": rebuilt})
    return with_pickle(buffer.getvalue(), path, [("0", np.arange(6, dtype="<f4").tobytes())])


def test_a_tensor_made_by_hand(tmp_path):
    state = read_torch_file(tensor_file(tmp_path / "a.pth", Storage(6), 1, (2, 2), (3, 1)))
    assert np.array_equal(state["weight"], [[1, 2], [4, 5]])


@pytest.mark.parametrize(
    "arguments",
    [
        (Storage(6), 1, (2, 3), (3, 1)),  # one beyond the end
        (Storage(6), -1, (2,), (1,)),
        (Storage(6), 0, (2,), (-1,)),
        (Storage(6), 0, (10**12,), (0,)),
        (Storage(6), 0, (2, 3), (1,)),
        (Storage(6), 0.5, (2,), (1,)),
        (Storage(7), 0, (2,), (1,)),
        (Storage(6, "1"), 0, (2,), (1,)),
        ("no storage", 0, (2,), (1,)),
    ],
)
def test_tensors_that_reach_beyond_the_file(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"malformed|beyond its storage"):
        read_torch_file(tensor_file(tmp_path / "a.pth", *arguments))


def test_other_files(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError):
        read_torch_file(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"no archive of torch\.save .* before 1\.6"):
        read_torch_file(path)
    for content in ({"a": 1}, [torch.ones(2)], {}, {"a": torch.ones(2), "b": "text"}):
        with pytest.raises(ValueError, match="holds no state dict"):
            read_torch_file(saved(content, path))
    saved({"a": torch.ones(100)}, path)
    data = path.read_bytes()
    for cut in (10, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="no archive"):
            read_torch_file(path)
    with pytest.raises(ValueError, match="damaged"):
        read_torch_file(with_pickle(b"\x80\x02}q\x00U", path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.txt", "x")
    with pytest.raises(ValueError, match=r"one data\.pkl"):
        read_torch_file(path)
