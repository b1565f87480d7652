"""The benchmark of multi_scale_deformable_attention runs, and stops at wrong results."""

import importlib.util
import sys
from pathlib import Path

import pytest

import mlx_deform

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

FEW = ["--cases", "d-fine-decoder", "--batch", "1", "--repeats", "2", "--seconds", "0.1"]


@pytest.fixture
def benchmark(monkeypatch):
    # By its path: the oracle has a module of this name.
    spec = importlib.util.spec_from_file_location(
        "msda_benchmark", BENCHMARKS / "multi_scale_deformable_attention.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("MLX_DEFORM_NUM_THREADS", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, "1")  # the run sets them; this restores them
    return module


def test_a_run_beside_its_peers(benchmark, capsys):
    assert benchmark.main(FEW) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("d-fine-decoder")]
    assert len(lines) == 2  # forward, and forward with backward
    for line in lines:
        assert "GB/s" in line
        assert "MLX primitives" in line


def test_wrong_results_end_it_before_anything_is_timed(benchmark, capsys, monkeypatch):
    right = mlx_deform.multi_scale_deformable_attention

    def wrong(*arguments, **settings):
        return 1.01 * right(*arguments, **settings)

    monkeypatch.setattr(mlx_deform, "multi_scale_deformable_attention", wrong)
    assert benchmark.main([*FEW, "--no-peers"]) == 1
    printed = capsys.readouterr().out
    assert "disagrees with the reference" in printed
    assert "GB/s" not in printed


def test_the_named_cases(benchmark):
    sizes = {name: (c.S, c.Q, c.K) for name, c in benchmark.named_cases().items()}
    assert sizes == {
        "rt-detr-decoder": (8400, 300, 12),
        "d-fine-decoder": (8400, 300, 12),
        "deformable-detr-encoder": (17821, 17821, 16),
        "mask2former-pixel-decoder": (21504, 21504, 12),
    }
