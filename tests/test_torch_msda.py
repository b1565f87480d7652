"""mlx_deform.torch.multi_scale_deformable_attention beside grid_sample, and as a torch operator."""

import pytest

from msda_cases import ARGUMENTS, Config, random_arrays, random_config

torch = pytest.importorskip("torch", reason="torch is not installed")

import mlx_deform.torch as bridge  # noqa: E402
from test_multi_scale_deformable_attention_torch import grid_sample_attention  # noqa: E402
from torch_cases import DEVICE, DTYPE, one_thread  # noqa: E402, F401

CONFIG = Config()
operators = torch.ops.mlx_deform


def tensors(config, seed=0, requires_grad=False, dtype=DTYPE):
    arrays = random_arrays(config, seed)
    return [
        torch.tensor(arrays[name], dtype=dtype, device=DEVICE).requires_grad_(requires_grad)
        for name in ARGUMENTS
    ]


def attend(config):
    def function(value, locations, weights):
        return bridge.multi_scale_deformable_attention(
            value, config.shapes, locations, weights, points=config.points, method=config.method
        )

    return function


def flat(config):
    """The settings of the operators."""
    shapes = [size for shape in config.shapes for size in shape]
    return shapes, list(config.points), config.method == "discrete"


def gradients(function, arguments, cotangent):
    output = function(*arguments)
    return [output, *torch.autograd.grad(output, arguments, cotangent)]


@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients(seed):
    config = random_config(500 + seed)
    config = config.but(N=max(config.N, 1), Q=max(config.Q, 1), method="bilinear")
    arguments = tensors(config, seed, requires_grad=True)
    want_of = lambda v, p, w: grid_sample_attention(v, config.shapes, p, w, config.points)  # noqa: E731
    cotangent = torch.randn_like(want_of(*arguments))
    want = gradients(want_of, arguments, cotangent)
    got = gradients(attend(config), arguments, cotangent)
    bound = 1e-9 if torch.float64 == DTYPE else 1e-4
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        size = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(mine, theirs, atol=bound * size, rtol=0)


SMALL = Config().but(N=2, Q=3, M=2, D=3, shapes=((3, 4), (2, 2)), points=(2, 1))


@pytest.mark.skipif(torch.float64 != DTYPE, reason="finite differences need float64")
def test_gradcheck_twice():
    arguments = tensors(SMALL, 2, requires_grad=True)
    assert torch.autograd.gradcheck(attend(SMALL), arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend(SMALL), arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    arguments = tensors(SMALL, 3, requires_grad=requires_grad)
    settings = flat(SMALL)
    grad = torch.randn_like(attend(SMALL)(*arguments)).detach()
    tangents = [torch.randn_like(x) for x in arguments]
    calls = {
        "multi_scale_deformable_attention": (*arguments, *settings),
        "multi_scale_deformable_attention_backward": (grad, *arguments, *settings, [True] * 3),
        "multi_scale_deformable_attention_double_backward": (
            grad, *arguments, *tangents, *settings, [True] * 4,
        ),
    }  # fmt: skip
    for name, call in calls.items():
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not name.endswith("double_backward"):
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(operators, name).default, call, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    arguments = tensors(CONFIG, 4, requires_grad=True)
    compiled = torch.compile(attend(CONFIG), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    cotangent = torch.randn_like(attend(CONFIG)(*arguments))
    want = gradients(attend(CONFIG), arguments, cotangent)
    for mine, eager in zip(gradients(compiled, arguments, cotangent), want, strict=True):
        torch.testing.assert_close(mine, eager)


def test_functional_transforms():
    value, locations, weights = tensors(SMALL, 5)
    function = attend(SMALL)
    by_func = torch.func.grad(lambda v: function(v, locations, weights).sum())(value)
    value.requires_grad_()
    (by_autograd,) = torch.autograd.grad(function(value, locations, weights).sum(), value)
    torch.testing.assert_close(by_func, by_autograd)
    value = value.detach()

    values = torch.stack([value, 2 * value, value - 1])
    got = torch.func.vmap(function, in_dims=(0, None, None))(values, locations, weights)
    want = torch.stack([function(v, locations, weights) for v in values])
    torch.testing.assert_close(got, want)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda v, p: function(v, p, weights).square().sum()), in_dims=(0, None)
    )(values, locations)
    for mine, v in zip(per_sample, values, strict=True):
        v = v.clone().requires_grad_()
        (want,) = torch.autograd.grad(function(v, locations, weights).square().sum(), v)
        torch.testing.assert_close(mine, want)
    _, along = torch.func.jvp(lambda p: function(value, p, weights), (locations,), (locations,))
    assert along.shape == function(value, locations, weights).shape


def test_autocast_keeps_the_values_type():
    value, locations, weights = tensors(CONFIG, 6, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attend(CONFIG)(value.bfloat16(), locations, weights.half())
    assert out.dtype == torch.bfloat16
    want = attend(CONFIG)(value, locations, weights)
    torch.testing.assert_close(out.float(), want, atol=0.05, rtol=0.05)


def test_nothing_to_do():
    for changes in ({"N": 0}, {"Q": 0}):
        config = CONFIG.but(**changes)
        arguments = tensors(config, requires_grad=True)
        out = attend(config)(*arguments)
        assert out.shape == (config.N, config.Q, config.M * config.D)
        for argument, gradient in zip(
            arguments, torch.autograd.grad(out.sum(), arguments), strict=True
        ):
            assert gradient.shape == argument.shape
            assert not gradient.any()


def test_the_calls_of_mmcv_and_transformers():
    config = CONFIG.but(points=(2,) * len(CONFIG.shapes))
    value, locations, weights = tensors(config, 7)
    levels = len(config.shapes)
    locations, weights = (x.unflatten(3, (levels, 2)) for x in (locations, weights))
    shapes = torch.tensor(config.shapes)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    want = attend(config)(value, locations.flatten(3, 4), weights.flatten(3, 4))
    by_list = bridge.multi_scale_deformable_attention(value, config.shapes, locations, weights)
    torch.testing.assert_close(by_list, want)
    mmcv = bridge.MultiScaleDeformableAttnFunction.apply
    torch.testing.assert_close(mmcv(value, shapes, starts, locations, weights, 64), want)
    layer = bridge.MultiScaleDeformableAttention()
    got = layer(value, shapes, list(config.shapes), starts, locations, weights, 64)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_layer_of_mmcv(numbers, batch_first):
    """Beside the layer in mlx_deform.nn with the same weights."""
    import mlx.core as mx
    import numpy as np

    from mlx_deform.nn import MultiScaleDeformableAttention, load_torch_weights

    shapes, N, Q, C = [(4, 5), (2, 3)], 2, 7, 12
    torch.manual_seed(8)
    settings = {"num_heads": 3, "num_levels": 2, "num_points": 2}
    theirs = bridge.MMCVMultiScaleDeformableAttention(C, **settings, batch_first=batch_first)
    ours = MultiScaleDeformableAttention(C, **settings)
    initial = theirs.sampling_offsets.bias.detach().numpy()
    np.testing.assert_allclose(np.array(ours.sampling_offsets.bias), initial, atol=1e-6)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    load_torch_weights(ours, theirs.state_dict())
    query, position, value = torch.randn(N, Q, C), torch.randn(N, Q, C), torch.randn(N, 26, C)
    points, mask = torch.rand(N, Q, 2, numbers), torch.rand(N, 26) < 0.3

    def order(x):
        return x if batch_first else x.transpose(0, 1)

    got = theirs.eval().to(DEVICE)(
        *(order(x).to(DEVICE) for x in (query,)),
        value=order(value).to(DEVICE),
        query_pos=order(position).to(DEVICE),
        key_padding_mask=mask.to(DEVICE),
        reference_points=points.to(DEVICE),
        spatial_shapes=torch.tensor(shapes),
    )
    arrays = [mx.array(x.numpy()) for x in (query + position, points, value)]
    want = np.array(ours(*arrays, shapes, mx.array(mask.numpy()))) + query.numpy()
    np.testing.assert_allclose(order(got).detach().cpu().numpy(), want, atol=1e-5)
    with pytest.raises(ValueError, match="reference_points must be given"):
        theirs(order(query).to(DEVICE))
    with pytest.raises(ValueError, match="num_heads must divide"):
        bridge.MMCVMultiScaleDeformableAttention(10, num_heads=3)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v, p, w: (v[0], p, w), r"value must have 4 axes, \(N, S, M, D\); got shape"),
        (lambda v, p, w: (v[:, 1:], p, w), "value must have a row for each of the"),
        (lambda v, p, w: (v, p[..., :1], w), "sampling_locations must have shape"),
        (lambda v, p, w: (v, p, w[..., 1:]), "attention_weights must have shape"),
        (lambda v, p, w: (v.long(), p, w), "value must be float16.* got torch.int64"),
        (lambda v, p, w: (v.half(), p.bfloat16(), w.float()), "must have the type of value"),
    ],
)
def test_bad_arguments_are_refused(change, complaint):
    with pytest.raises(bridge.InvalidArgument, match=complaint) as error:
        attend(CONFIG)(*change(*tensors(CONFIG)))
    assert str(error.value).startswith("[multi_scale_deformable_attention] ")
    assert isinstance(error.value, ValueError)


def test_bad_settings_are_refused():
    value, locations, weights = tensors(CONFIG)
    function = bridge.multi_scale_deformable_attention
    with pytest.raises(ValueError, match=r"method must be .* got 'nearest'"):
        function(value, CONFIG.shapes, locations, weights, points=CONFIG.points, method="nearest")
    with pytest.raises(ValueError, match=r"must have a pair \(H, W\)"):
        function(value, [(1, 2, 3)], locations, weights, points=[1])
    with pytest.raises(ValueError, match=r"sampling_locations must have 6 axes"):
        function(value, CONFIG.shapes, locations, weights)
    with pytest.raises(TypeError, match="value must be a tensor; got list"):
        function([1.0], CONFIG.shapes, locations, weights)
    fake = value.to("meta")
    out = attend(CONFIG)(fake, locations.to("meta"), weights.to("meta"))
    assert out.is_meta
