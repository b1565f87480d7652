"""multi_scale_deformable_attention beside PyTorch: grid_sample, and what transformers computes."""

import numpy as np
import pytest

from msda_cases import ARGUMENTS, Config, random_arrays, random_config, run_library
from numerics import relative_error, rounded

torch = pytest.importorskip("torch", reason="torch is not installed")


def grid_sample_attention(value, shapes, locations, weights, points):
    """The definition by grid_sample, level by level; locations (N, Q, M, K, 2)."""
    N, _, M, D = value.shape
    maps = value.split([h * w for h, w in shapes], dim=1)
    places = (2 * locations - 1).split(list(points), dim=3)
    shares = weights.split(list(points), dim=3)
    total = 0
    for (h, w), pixels, place, share in zip(shapes, maps, places, shares, strict=True):
        image = pixels.permute(0, 2, 3, 1).reshape(N * M, D, h, w)
        grid = place.transpose(1, 2).flatten(0, 1)  # (N * M, Q, P, 2)
        samples = torch.nn.functional.grid_sample(
            image, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        samples = samples.unflatten(0, (N, M))  # (N, M, D, Q, P)
        total = total + torch.einsum("nmdqp,nqmp->nqmd", samples, share)
    return total.flatten(2)


def run_torch(function, arrays):
    """Output and gradients of function(value, locations, weights) in float64."""
    torch.set_num_threads(1)  # the arrays are too small to share
    tensors = [torch.tensor(arrays[name], requires_grad=True) for name in ARGUMENTS]
    output = function(*tensors)
    output.backward(torch.tensor(arrays["cotangent"]))
    results = [output.detach()]
    for tensor in tensors:
        results.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    return {n: r.numpy() for n, r in zip(("output", *ARGUMENTS), results, strict=True)}


def check(config, want, arrays, dtype, bound):
    got = run_library(config, arrays, dtype)
    for name in want:
        error = relative_error(got[name], want[name])
        assert error <= bound, f"{name}: {error}"


@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(0, 300, 10)], ids=str)
def test_300_random_configurations(seeds):
    for seed in seeds:
        config = random_config(9000 + seed)
        config = config.but(N=max(config.N, 1), Q=max(config.Q, 1))  # grid_sample wants some
        arrays = random_arrays(config, seed, grid=None)
        want = run_torch(
            lambda v, p, w, c=config: grid_sample_attention(v, c.shapes, p, w, c.points), arrays
        )
        check(config, want, arrays, "float64", 1e-9)
        arrays = rounded(random_arrays(config, seed), "float32")
        want = run_torch(
            lambda v, p, w, c=config: grid_sample_attention(v, c.shapes, p, w, c.points), arrays
        )
        check(config, want, arrays, "float32", 1e-5)


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("seed", range(20))
def test_the_function_of_rt_detr_v2(seed, method):
    module = pytest.importorskip("transformers.models.rt_detr_v2.modeling_rt_detr_v2")
    function = module.multi_scale_deformable_attention_v2
    config = random_config(7000 + seed, ragged=True, N=2, Q=9)
    arrays = random_arrays(config, seed, grid=None)
    want = run_torch(
        lambda v, p, w: function(v, config.shapes, p, w, list(config.points), method), arrays
    )
    if method == "discrete":
        config = config.but(method="discrete")
    check(config, want, arrays, "float64", 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_the_module_of_deformable_detr(seed):
    name = "transformers.models.deformable_detr.modeling_deformable_detr"
    module = pytest.importorskip(name).MultiScaleDeformableAttention()
    config = random_config(8000 + seed, N=2, Q=9)
    levels = len(config.shapes)
    config = config.but(ragged=False, points=(config.points[0],) * levels)
    arrays = random_arrays(config, seed, grid=None)

    def function(value, locations, weights):
        P = config.points[0]
        shapes = torch.tensor(config.shapes)
        return module(
            value,
            shapes,
            list(config.shapes),
            None,
            locations.unflatten(3, (levels, P)),
            weights.unflatten(3, (levels, P)),
            64,
        )

    check(config, run_torch(function, arrays), arrays, "float64", 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_discrete_samples_halfway(dtype):
    """Where location * size + 0.5 is almost an integer, in the very arithmetic of PyTorch."""
    module = pytest.importorskip("transformers.models.rt_detr_v2.modeling_rt_detr_v2")
    config = Config(N=1, shapes=((7, 11), (13, 3)), Q=400, D=1, method="discrete", ragged=True)
    arrays = random_arrays(config, 1)
    sizes = np.repeat([(11, 7), (3, 13)], 4, 0)
    pixels = np.random.default_rng(2).integers(-2, sizes + 3, arrays["locations"].shape)
    arrays["locations"] = (pixels - 0.5) / sizes
    arrays = {n: a.astype(dtype) for n, a in arrays.items()}
    want = run_torch(
        lambda v, p, w: module.multi_scale_deformable_attention_v2(
            v, config.shapes, p, w, list(config.points), "discrete"
        ),
        arrays,
    )
    check(config, want, arrays, dtype, 1e-6)
