"""MultiScaleDeformableAttention: its definition, PyTorch's modules, how it starts and trains."""

import math
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_deform.nn import MultiScaleDeformableAttention, load_torch_weights
from numerics import device_for, relative_error, to_mx, to_numpy
from oracle.multi_scale_deformable_attention import (
    multi_scale_deformable_attention as oracle_forward,
)

SHAPES = ((6, 9), (5, 4), (2, 3))
N, Q, L, S, DIMS, HEADS = 2, 7, len(SHAPES), sum(h * w for h, w in SHAPES), 24, 4
SIZES = {"dims": DIMS, "num_heads": HEADS, "num_levels": L, "num_points": 2}
NAMES = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
KEYS = {f"{layer}.{name}" for layer in NAMES for name in ("weight", "bias")}
# MLX's softmax has float32's precision in float64 too.
TOLERANCE = {"float32": 1e-5, "float64": 1e-7}


def inputs(numbers, levels=L, value_dims=DIMS, batch=N):
    """Query, reference points or boxes, value and padding mask, as float64 and bool."""
    rng = np.random.default_rng(numbers)
    references = rng.uniform(0.1, 0.9, (batch, Q, levels, numbers))
    return {
        "query": rng.standard_normal((N, Q, DIMS)),
        "reference_points": references,
        "value": rng.standard_normal((N, S, value_dims)),
        "mask": rng.random((N, S)) < 0.3,
    }


def mx_inputs(arrays, dtype="float32"):
    return {n: mx.array(a) if n == "mask" else to_mx(a, dtype) for n, a in arrays.items()}


def randomized(layer, seed=0):
    """Every weight drawn such that offsets spread over several pixels."""
    rng = np.random.default_rng(seed)
    layer.load_weights(
        [
            (name, mx.array((rng.standard_normal(a.shape) * 0.3).astype(np.float32)))
            for name, a in tree_flatten(layer.parameters())
        ]
    )
    return layer


# ---------------------------------------------------------------------------
# The definition, in float64


def definition(layer, query, reference_points, value, mask=None):
    """Sample by sample, from the oracle of the op and the layer's weights."""

    def linear(name, x):
        if name not in layer:
            return x
        weight, bias = to_numpy(layer[name].weight), to_numpy(layer[name].get("bias"))
        return x @ weight.T + (0 if bias is None else bias)

    points, (n, q) = layer.num_points, query.shape[:2]
    offsets = linear("sampling_offsets", query).reshape(n, q, layer.num_heads, -1, 2)
    logits = linear("attention_weights", query).reshape(n, q, layer.num_heads, -1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    references = np.broadcast_to(reference_points, (n, q, len(points), reference_points.shape[-1]))
    locations, k = np.empty_like(offsets), 0
    for level, ((height, width), count) in enumerate(zip(SHAPES, points, strict=True)):
        for _ in range(count):
            reference = references[:, :, None, level]
            if references.shape[-1] == 2:
                reach = 1 / np.array([width, height])
            else:
                reach = reference[..., 2:] * layer.offset_scale / count
            locations[..., k, :] = reference[..., :2] + offsets[..., k, :] * reach
            k += 1
    value = linear("value_proj", value)
    if mask is not None:
        value = np.where(mask[..., None], 0, value)
    value = value.reshape(n, S, layer.num_heads, -1)
    output = oracle_forward(value, SHAPES, locations, weights, points, layer.method)
    return linear("output_proj", output)


LAYERS = {
    "Deformable DETR": {},
    "points per level": {"num_points": (3, 1, 4)},
    "scaled offsets": {"num_points": [1, 2, 3], "offset_scale": 0.8},
    "discrete": {"num_points": (3, 1, 2), "method": "discrete"},
    "D-FINE": {"num_points": (3, 6, 3), "value_proj": False, "output_proj": False},
    "narrow value": {"value_dims": 12, "bias": False},
    "value as it is": {"value_dims": 20, "value_proj": False},
}


@pytest.mark.parametrize("levels", [1, L])
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_against_the_definition(options, numbers, levels):
    layer = randomized(MultiScaleDeformableAttention(**{**SIZES, **options}))
    value_dims = layer.dims if "value_proj" in layer else layer.value_dims
    arrays = inputs(numbers, levels, value_dims, batch=1 if levels == 1 else N)
    for dtype in ("float64", "float32"):
        with mx.stream(device_for(dtype)):
            layer.set_dtype(getattr(mx, dtype))
            arguments = mx_inputs(arrays, dtype)
            got = layer(spatial_shapes=SHAPES, **arguments)
            assert got.dtype == getattr(mx, dtype)
            rounded = {name: to_numpy(array) for name, array in arguments.items()}
            rounded["mask"] = arrays["mask"]
            want = definition(layer, **rounded)
            assert got.shape == want.shape
            assert relative_error(to_numpy(got), want) <= TOLERANCE[dtype]
            del arguments["mask"], rounded["mask"]
            unmasked = definition(layer, **rounded)
            assert relative_error(unmasked, want) > 0.01
            got = layer(spatial_shapes=SHAPES, **arguments)
            assert relative_error(to_numpy(got), unmasked) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("n", "q"), [(0, Q), (N, 0)])
def test_nothing_to_compute(n, q):
    layer = MultiScaleDeformableAttention(**SIZES)
    shapes = ((n, q, DIMS), (n, q, L, 4), (n, S, DIMS))
    assert layer(*map(mx.zeros, shapes), SHAPES).shape == (n, q, DIMS)


def test_what_the_layer_predicts():
    """Offsets are (x, y), pixels of the level from a point, shares of a box."""
    layer = MultiScaleDeformableAttention(**{**SIZES, "num_points": (1, 3, 2)}, offset_scale=0.6)
    bias = np.zeros((HEADS, 6, 2))
    bias[1, 2] = (3, -1)  # head 1, level 1, whose size is (5, 4)
    layer.sampling_offsets.bias = mx.array(bias.flatten().astype(np.float32))
    query = mx.zeros((N, Q, DIMS))
    point, box = [0.5, 0.25], [0.5, 0.25, 0.2, 0.4]
    for reference, moved in (
        (point, [0.5 + 3 / 4, 0.25 - 1 / 5]),
        (box, [0.5 + 3 / 3 * 0.2 * 0.6, 0.25 - 1 / 3 * 0.4 * 0.6]),
    ):
        references = mx.broadcast_to(mx.array(reference), (N, Q, 1, len(reference)))
        locations, weights = layer.locations_and_weights(query, references, SHAPES)
        want = np.broadcast_to(np.array(point), (HEADS, 6, 2)).copy()
        want[1, 2] = moved
        want = np.broadcast_to(want, (N, Q, HEADS, 6, 2))
        assert locations.shape == want.shape
        assert relative_error(to_numpy(locations), want) < 1e-6
        assert relative_error(to_numpy(weights), np.full((N, Q, HEADS, 6), 1 / 6)) < 1e-6


def test_padding_is_not_seen():
    """NaN there neither reaches the output nor a gradient."""
    layer = randomized(MultiScaleDeformableAttention(**SIZES))
    arrays = inputs(2)
    arguments = mx_inputs(arrays)
    want = layer(spatial_shapes=SHAPES, **arguments)
    spoilt = {**arrays, "value": np.where(arrays["mask"][..., None], np.nan, arrays["value"])}
    assert mx.array_equal(layer(spatial_shapes=SHAPES, **mx_inputs(spoilt)), want)
    gradient = mx.grad(lambda v: layer(spatial_shapes=SHAPES, **{**arguments, "value": v}).sum())
    gradient = to_numpy(gradient(arguments["value"]))
    assert not gradient[arrays["mask"]].any()
    assert gradient[~arrays["mask"]].any()


# ---------------------------------------------------------------------------
# PyTorch's modules, and their checkpoints


def official_and_mmcv():
    """The modules of Deformable DETR's code and of mmcv, from their published definitions."""
    torch = pytest.importorskip("torch")
    from test_multi_scale_deformable_attention_torch import grid_sample_attention

    class MSDeformAttn(torch.nn.Module):
        def __init__(self, d_model, n_levels, n_heads, n_points, value_proj_ratio=1.0):
            super().__init__()
            self.n_heads, self.n_levels, self.n_points = n_heads, n_levels, n_points
            samples = n_heads * n_levels * n_points
            value_dims = int(d_model * value_proj_ratio)
            self.sampling_offsets = torch.nn.Linear(d_model, samples * 2)
            self.attention_weights = torch.nn.Linear(d_model, samples)
            self.value_proj = torch.nn.Linear(d_model, value_dims)
            self.output_proj = torch.nn.Linear(value_dims, d_model)

        def forward(self, query, reference_points, value, mask):
            shape = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
            value = self.value_proj(value).masked_fill(mask[..., None], 0.0)
            offsets = self.sampling_offsets(query).view(*shape, 2)
            weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1)
            references = reference_points[:, :, None, :, None]
            if references.shape[-1] == 2:
                sizes = torch.tensor(SHAPES).flip(1)[:, None]
                locations = references + offsets / sizes
            else:
                reach = references[..., 2:] * 0.5
                locations = references[..., :2] + offsets / self.n_points * reach
            points = [self.n_points] * self.n_levels
            value = value.unflatten(-1, (self.n_heads, -1))
            locations = locations.flatten(3, 4)
            return self.output_proj(
                grid_sample_attention(value, SHAPES, locations, weights, points)
            )

    return {
        "official": (MSDeformAttn(DIMS, L, HEADS, 2), {}),
        "mmcv": (MSDeformAttn(DIMS, L, HEADS, 2, 0.5), {"value_dims": DIMS // 2}),
    }


def transformers_module(name):
    """A module of transformers, and the settings of its twin."""
    attention = "MultiscaleDeformableAttention"
    detr = SimpleNamespace(d_model=DIMS, num_feature_levels=L, disable_custom_kernels=True)
    decoder = {"d_model": DIMS, "decoder_attention_heads": HEADS, "num_feature_levels": L}
    v2 = SimpleNamespace(
        **decoder,
        decoder_n_levels=L,
        decoder_n_points=3,
        decoder_offset_scale=0.7,
        decoder_method="discrete" if "discrete" in name else "default",
    )
    fine = SimpleNamespace(**{**vars(v2), "decoder_n_points": [3, 1, 4]})
    method = "discrete" if "discrete" in name else "bilinear"
    options = {"num_points": 3, "offset_scale": 0.7, "method": method}
    bare = {"num_points": (3, 1, 4), "value_proj": False, "output_proj": False}
    path, class_name, arguments, options = {
        "deformable_detr": ("deformable_detr", "DeformableDetr", (detr, HEADS, 2), {}),
        "grounding_dino": ("grounding_dino", "GroundingDino", (detr, HEADS, 2), {}),
        "mask2former": (
            "mask2former",
            "Mask2FormerPixelDecoderEncoder",
            (DIMS, HEADS, L, 2),
            {},
        ),
        "rt_detr_v2": ("rt_detr_v2", "RTDetrV2", (v2,), options),
        "rt_detr_v2 discrete": ("rt_detr_v2", "RTDetrV2", (v2,), options),
        "d_fine": ("d_fine", "DFine", (fine,), {**options, **bare}),
    }[name]
    module = pytest.importorskip(f"transformers.models.{path}.modeling_{path}")
    return getattr(module, class_name + attention)(*arguments), options


def randomized_torch(module, seed=0):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in module.parameters():
            values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
    return module


def assert_same_output_and_gradients(layer, module, arrays, call):
    """Of a random cotangent: the gradients of the parameters and of the three arguments."""
    torch = pytest.importorskip("torch")
    names = ("query", "reference_points", "value")
    tensors = {name: torch.tensor(arrays[name], dtype=torch.float32) for name in names}
    for tensor in tensors.values():
        tensor.requires_grad_()
    output = call(*tensors.values(), torch.tensor(arrays["mask"]))
    cotangent = np.random.default_rng(3).standard_normal(output.shape).astype(np.float32)
    output.backward(torch.tensor(cotangent))
    wanted = {name: tensor.grad for name, tensor in tensors.items()}
    wanted.update({name: parameter.grad for name, parameter in module.named_parameters()})

    arguments = mx_inputs(arrays)

    def loss(parameters, differentiable):
        layer.update(parameters)
        return (layer(spatial_shapes=SHAPES, **{**arguments, **differentiable}) * cotangent).sum()

    got = layer(spatial_shapes=SHAPES, **arguments)
    assert output.std() > 0.1
    assert relative_error(to_numpy(got), output.detach().numpy()) <= TOLERANCE["float32"]
    parameters = layer.trainable_parameters()
    gradients = mx.grad(loss, argnums=(0, 1))(parameters, {n: arguments[n] for n in names})
    gradients = dict(tree_flatten(gradients[0])) | gradients[1]
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        want = 0 * to_numpy(gradient) if wanted[name] is None else wanted[name].numpy()
        blind = layer.method == "discrete" and name.startswith(("reference", "sampling"))
        assert want.any() != blind, name
        if blind:
            assert not mx.any(gradient), name
        else:
            assert relative_error(to_numpy(gradient), want) <= 2e-5, name


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("source", ["official", "mmcv"])
def test_the_official_code_and_mmcv(source, numbers):
    module, options = official_and_mmcv()[source]
    randomized_torch(module)
    assert module.state_dict().keys() == KEYS
    layer = MultiScaleDeformableAttention(**SIZES, **options)
    assert load_torch_weights(layer, module.state_dict()) is layer
    assert_same_output_and_gradients(layer, module, inputs(numbers), module)


TRANSFORMERS = [
    *((name, n) for name in ("deformable_detr", "grounding_dino", "mask2former") for n in (2, 4)),
    ("rt_detr_v2", 4),  # of 2 numbers these two make an error
    ("rt_detr_v2 discrete", 4),
    ("d_fine", 4),
]


@pytest.mark.filterwarnings("ignore:You'd better set embed_dim")  # for the speed of its kernel
@pytest.mark.parametrize(("name", "numbers"), TRANSFORMERS)
def test_transformers(name, numbers, tmp_path):
    torch = pytest.importorskip("torch")
    module, options = transformers_module(name)
    randomized_torch(module).eval()
    layer = MultiScaleDeformableAttention(**{**SIZES, **options})
    state = {f"decoder.layers.1.cross_attn.{n}": a for n, a in module.state_dict().items()}
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {n: mx.array(a.numpy()) for n, a in state.items()}
    )
    load_torch_weights(layer, tmp_path / "model.safetensors", "decoder.layers.1.cross_attn")
    arrays = inputs(numbers, levels=1 if "num_points" in options else L)
    if name == "d_fine":  # its mask has an axis too few
        arrays["mask"] = np.zeros_like(arrays["mask"])

    def call(query, reference_points, value, mask):
        sizes = {} if name == "mask2former" else {"spatial_shapes": torch.tensor(SHAPES)}
        seen = mask if name == "mask2former" else None if name == "d_fine" else ~mask
        return module(
            hidden_states=query,
            attention_mask=seen,
            encoder_hidden_states=value,
            reference_points=reference_points,
            spatial_shapes_list=list(SHAPES),
            **sizes,
        )[0]

    assert_same_output_and_gradients(layer, module, arrays, call)


def test_checkpoints_that_do_not_fit():
    layer = MultiScaleDeformableAttention(**SIZES)
    state = {name: np.array(a) for name, a in tree_flatten(layer.parameters())}
    assert state.keys() == KEYS
    state["n_points_scale"] = state["num_points_scale"] = np.ones(6)  # buffers without weights
    load_torch_weights(layer, state)
    bare = MultiScaleDeformableAttention(**SIZES, value_proj=False, output_proj=False)
    with pytest.raises(ValueError, match=r"unexpected: .*'value_proj.weight'"):
        load_torch_weights(bare, state)
    more = MultiScaleDeformableAttention(**{**SIZES, "num_points": 3})
    with pytest.raises(ValueError, match=r"'sampling_offsets.weight' must have shape \(72, 24\)"):
        load_torch_weights(more, state)


# ---------------------------------------------------------------------------
# Initialisation


def test_heads_start_in_directions_of_their_own():
    layer = MultiScaleDeformableAttention(16, 8, 2, (3, 2))
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    want = [[(p * x, p * y) for p in (1, 2, 3, 1, 2)] for x, y in directions]
    bias = to_numpy(layer.sampling_offsets.bias).reshape(8, 5, 2)
    assert np.allclose(bias, want, atol=1e-5)
    for zero in (layer.sampling_offsets.weight, *layer.attention_weights.parameters().values()):
        assert not mx.any(zero)


def test_projections_start_xavier_uniform():
    mx.random.seed(1)
    layer = MultiScaleDeformableAttention(96, 4, value_dims=64)
    for projection, shape in ((layer.value_proj, (64, 96)), (layer.output_proj, (96, 64))):
        assert projection.weight.shape == shape
        values = to_numpy(projection.weight) * math.sqrt((96 + 64) / 6)
        assert 0.98 < np.abs(values).max() <= 1 + 1e-6
        assert abs(values.mean()) < 0.03
        assert abs(values.std() * math.sqrt(3) - 1) < 0.03
        assert not mx.any(projection.bias)
    mx.random.seed(1)
    other = MultiScaleDeformableAttention(96, 4, value_dims=64)
    assert mx.array_equal(layer.value_proj.weight, other.value_proj.weight)


def test_parameters():
    projections = {f"{n}.{p}" for n in NAMES[2:] for p in ("weight", "bias")}
    for options, want in (
        ({}, KEYS),
        ({"bias": False}, KEYS - {"value_proj.bias", "output_proj.bias"}),
        ({"value_proj": False, "output_proj": False}, KEYS - projections),
    ):
        layer = MultiScaleDeformableAttention(**SIZES, **options)
        assert set(dict(tree_flatten(layer.trainable_parameters()))) == want


def test_repr():
    first = repr(MultiScaleDeformableAttention(24, 4, 3)).splitlines()[0]
    assert first == (
        "MultiScaleDeformableAttention(24, num_heads=4, num_levels=3, num_points=4, "
        "value_dims=24, method='bilinear', offset_scale=0.5"
    )
    assert "num_points=(1, 2)," in repr(MultiScaleDeformableAttention(24, 4, 2, [1, 2]))


# ---------------------------------------------------------------------------
# Training and types


def test_training_lowers_the_loss():
    """Every parameter moves, and the layer learns what another one computes."""
    mx.random.seed(0)
    arguments = mx_inputs(inputs(4))
    target = randomized(MultiScaleDeformableAttention(**SIZES))(spatial_shapes=SHAPES, **arguments)
    layer = MultiScaleDeformableAttention(**SIZES)
    before = dict(tree_flatten(layer.parameters()))
    optimizer = optim.Adam(0.01)
    step = nn.value_and_grad(
        layer, lambda: mx.square(layer(spatial_shapes=SHAPES, **arguments) - target).mean()
    )
    losses = []
    for _ in range(40):
        value, gradients = step()
        optimizer.update(layer, gradients)
        mx.eval(layer.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.3 * losses[0]
    for name, values in tree_flatten(layer.parameters()):
        assert not mx.array_equal(values, before[name]), name


@pytest.mark.parametrize("numbers", [2, 4])
def test_a_compiled_training_step_is_the_same(numbers):
    layer = randomized(MultiScaleDeformableAttention(**{**SIZES, "num_points": (1, 2, 3)}))
    arguments = mx_inputs(inputs(numbers))
    step = nn.value_and_grad(
        layer, lambda arrays: mx.mean(layer(spatial_shapes=SHAPES, **arrays) ** 2)
    )
    value, gradients = step(arguments)
    compiled_value, compiled_gradients = mx.compile(step, inputs=layer.state)(arguments)
    assert mx.allclose(value, compiled_value, rtol=1e-5)
    for (name, got), (_, want) in zip(
        tree_flatten(compiled_gradients), tree_flatten(gradients), strict=True
    ):
        assert mx.any(want != 0), name
        assert relative_error(to_numpy(got), to_numpy(want)) < 1e-4, name


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype, numbers):
    layer = randomized(MultiScaleDeformableAttention(**SIZES))
    layer.sampling_offsets.weight = 0.1 * layer.sampling_offsets.weight
    arguments = mx_inputs(inputs(numbers))
    want = to_numpy(layer(spatial_shapes=SHAPES, **arguments))
    half = getattr(mx, dtype)
    layer.set_dtype(half)
    halves = {n: a.astype(half) if n in ("query", "value") else a for n, a in arguments.items()}
    for references in (halves["reference_points"], halves["reference_points"].astype(half)):
        halves["reference_points"] = references
        output = layer(spatial_shapes=SHAPES, **halves)
        assert output.dtype == half
        assert relative_error(to_numpy(output), want) < {"float16": 0.01, "bfloat16": 0.08}[dtype]
        locations, weights = layer.locations_and_weights(halves["query"], references, SHAPES)
        assert locations.dtype == mx.float32
        assert weights.dtype == half


def test_weights_survive_a_file(tmp_path):
    layer = randomized(MultiScaleDeformableAttention(**SIZES))
    layer.save_weights(str(tmp_path / "layer.safetensors"))
    other = MultiScaleDeformableAttention(**SIZES)
    other.load_weights(str(tmp_path / "layer.safetensors"))
    arguments = {"spatial_shapes": SHAPES, **mx_inputs(inputs(2))}
    assert mx.array_equal(layer(**arguments), other(**arguments))


# ---------------------------------------------------------------------------
# Errors

POINTS = (
    r"num_points must be an integer of at least 1, or one for each of the num_levels = 3 levels"
)
WRONG_ARGUMENTS = [
    ({"dims": 0}, r"dims must be an integer of at least 1; got 0"),
    ({"num_heads": 2.0}, r"num_heads must be an integer of at least 1; got 2.0"),
    ({"num_levels": -1}, r"num_levels must be an integer of at least 1; got -1"),
    ({"num_points": 0}, rf"{POINTS}; got \(0, 0, 0\)"),
    ({"num_points": (4, 4)}, rf"{POINTS}; got \(4, 4\)"),
    ({"num_points": (4, 4, 0)}, rf"{POINTS}; got \(4, 4, 0\)"),
    ({"num_points": "444"}, rf"{POINTS}; got '444'"),
    ({"num_points": 1.5}, rf"{POINTS}; got \(1.5, 1.5, 1.5\)"),
    ({"num_heads": 5}, r"dims must be divisible by num_heads; got dims=24 and num_heads=5"),
    (
        {"value_dims": 10},
        r"value_dims must be divisible by num_heads; got value_dims=10 and num_heads=4",
    ),
    ({"value_dims": 0}, r"value_dims must be an integer of at least 1; got 0"),
    ({"method": "default"}, r"method must be 'bilinear' or 'discrete'; got 'default'"),
    ({"offset_scale": 0}, r"offset_scale must be a positive number; got 0"),
    ({"offset_scale": math.nan}, r"offset_scale must be a positive number; got nan"),
    ({"offset_scale": None}, r"offset_scale must be a positive number; got None"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=rf"^\[MultiScaleDeformableAttention\] {message}$"):
        MultiScaleDeformableAttention(**{**SIZES, **arguments})


LEVELS = r"spatial_shapes must be num_levels = 3 pairs \(H, W\) of integers of at least 1"
REFERENCES = r"reference_points must have shape \(2 or 1, 7, 3 or 1, 2 or 4\)"
WRONG_CALLS = [
    ("query", mx.zeros((N, DIMS)), r"query must have 3 axes, \(N, Q, dims\), with 24 channels; .*"),
    ("query", mx.zeros((N, Q, 23)), r"query must .* 24 channels; got shape \(2, 7, 23\)"),
    ("reference_points", mx.zeros((N, Q, 2)), rf"{REFERENCES}; got shape \(2, 7, 2\)"),
    ("reference_points", mx.zeros((3, Q, 1, 2)), rf"{REFERENCES}; got .*\(3, 7, 1, 2\)"),
    ("reference_points", mx.zeros((N, 1, 1, 2)), rf"{REFERENCES}; got .*\(2, 1, 1, 2\)"),
    ("reference_points", mx.zeros((N, Q, 2, 2)), rf"{REFERENCES}; got .*\(2, 7, 2, 2\)"),
    ("reference_points", mx.zeros((N, Q, 3, 3)), rf"{REFERENCES}; got .*\(2, 7, 3, 3\)"),
    ("value", mx.zeros((N, S, 4, 6)), r"value must have 3 axes, \(N, S, dims\), with 24 .*"),
    ("value", mx.zeros((N, S, 12)), r"value must .* 24 channels; got shape \(2, 80, 12\)"),
    (
        "value",
        mx.zeros((N, S + 1, DIMS)),
        r"value must have the query's batch 2 and the sum of H \* W, 80 pixels; got shape .*81.*",
    ),
    ("value", mx.zeros((1, S, DIMS)), r"value must have the query's batch 2 .*\(1, 80, 24\)"),
    ("mask", mx.zeros((N, S)), r"mask must be boolean; got mlx.core.float32"),
    ("mask", mx.zeros((S,), mx.bool_), r"mask must have shape \(2, 80\); got .*\(80,\)"),
    ("spatial_shapes", SHAPES[:2], rf"{LEVELS}; got \(\(6, 9\), \(5, 4\)\)"),
    ("spatial_shapes", [(6, 9), (5, 4), (2, 0)], rf"{LEVELS}; got .*"),
    ("spatial_shapes", [(6, 9), (5, 4), (2, 3, 1)], rf"{LEVELS}; got .*"),
    ("spatial_shapes", [(6, 9), (5, 4), (2, 3.0)], rf"{LEVELS}; got .*"),
    ("spatial_shapes", 5, rf"{LEVELS}; got 5"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG_CALLS)
def test_wrong_calls(name, wrong, message):
    layer = MultiScaleDeformableAttention(**SIZES)
    arguments = {"spatial_shapes": SHAPES, **mx_inputs(inputs(2))}
    assert layer(**arguments).shape == (N, Q, DIMS)
    with pytest.raises(ValueError, match=rf"^\[MultiScaleDeformableAttention\] {message}$"):
        layer(**{**arguments, name: wrong})


def test_sizes_of_numpy_are_taken():
    layer = randomized(MultiScaleDeformableAttention(**SIZES))
    arguments = mx_inputs(inputs(2))
    want = layer(spatial_shapes=SHAPES, **arguments)
    assert mx.array_equal(layer(spatial_shapes=np.array(SHAPES), **arguments), want)
