"""The benchmark runs, and stops at wrong results; what it times computes the right thing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_deform
from cases import random_arrays
from numerics import check_against_oracle

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import deform_conv2d as benchmark
import metal_roofline
import named_cases
import problem

TINY = "4to6-k3-5x5"
FEW_SAMPLES = ["--cases", TINY, "--dtype", "float32", "--no-peers", "--repeats", "2"]
CROPPED = dict.fromkeys(map(named_cases.cropped, named_cases.CASES.values()))


def test_a_quick_run(tmp_path):
    results, chart = tmp_path / "results.json", tmp_path / "chart.png"
    script = [sys.executable, benchmark.__file__, "--quick", *FEW_SAMPLES]
    done = subprocess.run(
        [*script, "--markdown", "--json", results, "--chart", chart],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith(TINY)]
    markdown = [line for line in done.stdout.splitlines() if line.startswith(f"| {TINY}")]
    assert len(table) == len(markdown) == 2  # forward, and forward with backward
    rows = json.loads(results.read_text())["rows"]
    assert [row["which"] for row in rows] == list(problem.PASSES)
    for row in rows:
        assert row["case"] == TINY
        assert row["gflops"] > 0
        assert set(row["timings"]) == {"mlx_deform", row["bound"]}
        for timing in row["timings"].values():
            assert 0 < timing["min_s"] <= timing["median_s"]
            assert timing["samples"] == 2
        assert row["extra_mb"]["mlx_deform"] >= 0
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_wrong_results_end_it_before_anything_is_timed(monkeypatch, capsys):
    for name in ("MLX_DEFORM_NUM_THREADS", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, "1")  # the run sets them; this restores them
    right = mlx_deform.deform_conv2d

    def wrong(*arguments, **settings):
        return 1.01 * right(*arguments, **settings)

    monkeypatch.setattr(mlx_deform, "deform_conv2d", wrong)
    assert benchmark.main([*FEW_SAMPLES, "--memory-of", "none"]) == 1
    printed = capsys.readouterr().out
    assert "disagrees with the reference" in printed
    assert not any(line.startswith(f"{TINY} ") for line in printed.splitlines())


@pytest.mark.parametrize("bad", [1.001, np.nan])
def test_a_mismatch_at_full_size_is_one(bad):
    want = {"output": np.arange(1.0, 5.0), "input": np.ones(3)}
    assert problem.check_against(want, want, "float32", tf32=False) == 0
    for name in want:
        with pytest.raises(problem.Mismatch, match=name):
            problem.check_against(want, {**want, name: bad * want[name]}, "float32", tf32=False)


@pytest.mark.parametrize("config", CROPPED, ids=lambda c: f"{c.C}to{c.O}-k{c.kH}-g{c.G}-dg{c.DG}")
def test_the_named_cases_on_small_maps(config):
    check_against_oracle(config, random_arrays(config, seed=0), "float32")


def test_cases_are_selected_by_name_pattern_and_set():
    assert list(named_cases.select([TINY])) == [TINY]
    assert named_cases.select(["candle"]) == named_cases.CANDLE
    assert len(named_cases.select(["64to256-*"])) == 12
    with pytest.raises(ValueError, match="no case or set is named nonsense"):
        named_cases.select(["nonsense"])


def test_products_are_cut_into_pieces_that_cover_them():
    product = problem.product_of(named_cases.CASES["64to256-k7-256x256"])
    rows = product.rows(bytes_at_once=10_000_000)
    assert sum(rows) == product.M == 256 * 256
    assert all(4 * product.K * piece <= 10_000_000 for piece in rows)
    assert product.flops == 2 * 256 * 256 * 49 * 64 * 256


def test_the_bridge_beside_torchvision(capsys, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    import torch_bridge

    for name in ("MLX_DEFORM_NUM_THREADS", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, "1")
    few = ["--cases", TINY, "--seconds", "0.01", "--repeats", "2", "--threads", "1"]
    assert torch_bridge.main(few) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(f"{TINY} ")]) == 4
    monkeypatch.setattr(problem, "check_against", _mismatch)
    assert torch_bridge.main(few) == 1
    assert "disagrees with torchvision" in capsys.readouterr().out


def _mismatch(*arguments, **settings):
    raise problem.Mismatch("output")


def test_the_metal_roofline_prints_every_kernel(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["metal_roofline.py", "--dtype", "float16"])
    metal_roofline.main()
    said = capsys.readouterr().out
    for kernel in ("im2col", "output_product", "column_product", "weight_product", "col2im"):
        assert f"  {kernel} " in said
    assert "direct_output" in said, "the depthwise case"
    assert said.count("forward and backward:") == len(metal_roofline.CASES)
