"""mlx_deform.torch.multi_scale_deformable_attention: values, derivatives, and as an operator."""

# ruff: noqa: E402  (torch may not be installed)
import itertools
import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mlx_deform.torch as bridge
from msda_cases import ARGUMENTS, Config, random_arrays, random_config
from test_multi_scale_deformable_attention_torch import grid_sample_attention
from torch_cases import (
    DEVICE,
    DTYPE,
    one_thread,  # noqa: F401
    relative_error,
)

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
operators = torch.ops.mlx_deform
TOLERANCE = 1e-9 if torch.float64 == DTYPE else 1e-4
NAME = "multi_scale_deformable_attention"

# No two sizes alike.
SMALL = Config(N=2, shapes=((3, 5), (4, 2)), Q=7, M=3, D=6, points=(4, 4))
RAGGED = SMALL.but(points=(1, 4), ragged=True)
DISCRETE = RAGGED.but(method="discrete")
CONFIGS = {"by level": SMALL, "ragged": RAGGED, "discrete": DISCRETE}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
double_precision = pytest.mark.skipif(
    DEVICE == "mps", reason="finite differences need float64, which MPS lacks"
)


def values(config=SMALL, seed=0, dtype=DTYPE, device=DEVICE, requires_grad=False, grid=None):
    """Value, locations and weights as the function takes them."""
    arrays = random_arrays(config, seed, grid)
    value, locations, weights = (
        torch.tensor(arrays[name], dtype=dtype, device=device) for name in ARGUMENTS
    )
    if not config.ragged:
        levels = (len(config.shapes), config.points[0])
        locations, weights = locations.unflatten(3, levels), weights.unflatten(3, levels)
    return [tensor.requires_grad_(requires_grad) for tensor in (value, locations, weights)]


def cotangent_of(config, seed=0, dtype=DTYPE, device=DEVICE):
    return torch.tensor(random_arrays(config, seed)["cotangent"], dtype=dtype, device=device)


def as_function(config):
    def attention(value, locations, weights):
        return bridge.multi_scale_deformable_attention(
            value,
            config.shapes,
            locations,
            weights,
            points=config.points if config.ragged else None,
            method=config.method,
        )

    return attention


def by_corners(config):
    """In plain torch, by indexing: differentiable twice, which grid_sample is not."""

    def corners(place, H, W):
        """Rows, columns, and their shares of the sample."""
        if config.method == "discrete":
            x, y = (place * torch.tensor([W, H]).to(place) + 0.5).long().unbind(-1)
            return [(y.clamp(0, H - 1), x.clamp(0, W - 1), 1)]
        x, y = (place * torch.tensor([W, H]).to(place) - 0.5).unbind(-1)
        found = []
        for row, column in itertools.product(
            (y.floor(), y.floor() + 1), (x.floor(), x.floor() + 1)
        ):
            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            share = (1 - (y - row).abs()) * (1 - (x - column).abs()) * inside
            found.append((row.long().clamp(0, H - 1), column.long().clamp(0, W - 1), share))
        return found

    def attention(value, locations, weights):
        if not config.ragged:
            locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
        total, start = 0, 0
        heads = torch.arange(config.M, device=value.device)[:, None]
        images = torch.arange(value.shape[0], device=value.device)[:, None, None, None]
        places, weights = locations.split(config.points, 3), weights.split(config.points, 3)
        for (H, W), place, weight in zip(config.shapes, places, weights, strict=True):
            for row, column, share in corners(place, H, W):
                samples = value[images, start + row * W + column, heads]  # (N, Q, M, P, D)
                total = total + (samples * (weight * share)[..., None]).sum(3)
            start += H * W
        return total.flatten(2)

    return attention


def reference(config):
    """In plain torch, by grid_sample where it can."""
    if config.method == "discrete":
        return by_corners(config)

    def attention(value, locations, weights):
        if not config.ragged:
            locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
        return grid_sample_attention(value, config.shapes, locations, weights, config.points)

    return attention


def results(function, config, arguments, seed=0):
    """Output and gradients; the arguments require them."""
    output = function(*arguments)
    cotangent = cotangent_of(config, seed, output.dtype, output.device)
    gradients = torch.autograd.grad(output, arguments, cotangent, materialize_grads=True)
    return [output.detach(), *gradients]


def assert_same(got, want, tolerance=TOLERANCE):
    for name, one, other in zip(("output", *ARGUMENTS), got, want, strict=False):
        error = relative_error(one, other)
        assert error <= tolerance, f"{name}: {error}"


# ---------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("seeds", [range(i, i + 20) for i in range(0, 60, 20)], ids=str)
def test_values_and_gradients(seeds, method):
    for seed in seeds:
        config = random_config(seed, method=method)
        config = config.but(N=max(config.N, 1), Q=max(config.Q, 1))  # grid_sample wants some
        arguments = values(config, seed, requires_grad=True)
        got = results(as_function(config), config, arguments, seed)
        assert_same(got, results(reference(config), config, arguments, seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plan", ["same", torch.float32, torch.float64])
def test_types(dtype, plan):
    """The result has the type of value, each gradient that of its argument."""
    if DEVICE == "mps" and plan is torch.float64:
        pytest.skip("MPS has no float64")
    plan = dtype if plan == "same" else plan
    arguments = [
        tensor.to(DEVICE, dtype if i == 0 else plan).requires_grad_()
        for i, tensor in enumerate(values(dtype=torch.float32, device="cpu", grid=2.0**-4))
    ]
    got = results(as_function(SMALL), SMALL, arguments)
    assert got[0].dtype == dtype
    assert [each.dtype for each in got[1:]] == [tensor.dtype for tensor in arguments]
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in arguments]
    want = results(reference(SMALL), SMALL, wide)
    assert_same(got, want, 4 * torch.finfo(dtype).eps)


def test_memory_formats_and_views():
    """Transposed, expanded and offset tensors are what they say, not what lies in memory."""
    value, locations, weights = values()
    views = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([locations, locations])[1],
        weights.flip(1).flip(1),
    ]
    function = as_function(SMALL)
    want = function(value, locations, weights)
    assert torch.equal(function(*views), want)
    (gradient,) = torch.autograd.grad(function(value.requires_grad_(), *views[1:]).sum(), value)
    ones = torch.ones_like(want)
    (other,) = torch.autograd.grad(function(value, locations, weights), value, ones)
    assert torch.equal(gradient, other)


@pytest.mark.parametrize("empty", ["N", "Q"])
def test_nothing_to_do(empty):
    config = SMALL.but(**{empty: 0})
    arguments = values(config, requires_grad=True)
    output = as_function(config)(*arguments)
    assert output.shape == config.output_shape
    gradients = torch.autograd.grad(output.sum(), arguments, create_graph=True)
    for gradient, argument in zip(gradients, arguments, strict=True):
        assert gradient.shape == argument.shape
        assert not gradient.any()
    (second,) = torch.autograd.grad(gradients[0].sum(), arguments[2])
    assert second.shape == arguments[2].shape


def test_a_level_of_one_sample_and_one_head():
    config = Config(N=1, shapes=((1, 1),), Q=1, M=1, D=1, points=(1,))
    arguments = values(config, 3, requires_grad=True)
    got = results(as_function(config), config, arguments, 3)
    assert_same(got, results(reference(config), config, arguments, 3))


# ---------------------------------------------------------------------------
# Derivatives


@double_precision
@every_config
def test_first_derivatives(config):
    arguments = values(config, 1, requires_grad=True)
    assert torch.autograd.gradcheck(
        as_function(config), arguments, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradcheck(as_function(config), arguments)


@double_precision
@every_config
def test_second_derivatives(config):
    assert torch.autograd.gradgradcheck(
        as_function(config),
        values(config, 2, requires_grad=True),
        fast_mode=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@double_precision
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_second_derivatives_of_some(wanted):
    arguments = values(seed=3)
    chosen = [arguments[i].requires_grad_() for i in wanted]

    def partial(*some):
        replaced = list(arguments)
        for i, tensor in zip(wanted, some, strict=True):
            replaced[i] = tensor
        return as_function(SMALL)(*replaced).square()

    assert torch.autograd.gradgradcheck(partial, chosen, fast_mode=True)


@every_config
def test_second_derivatives_beside_plain_torch(config):
    """Closer than finite differences come."""
    arguments = values(config, 7, requires_grad=True)
    torch.manual_seed(7)
    directions = [torch.randn_like(tensor) for tensor in arguments]

    def second(function):
        output = function(*arguments).sin().sum()
        gradients = torch.autograd.grad(
            output, arguments, create_graph=True, materialize_grads=True
        )
        along = sum((g * t).sum() for g, t in zip(gradients, directions, strict=True))
        return torch.autograd.grad(along, arguments, materialize_grads=True)

    got, want = second(as_function(config)), second(by_corners(config))
    for name, one, other in zip(ARGUMENTS, got, want, strict=True):
        assert relative_error(one, other) <= TOLERANCE, name
        assert other.any() or (name, config.method) == ("locations", "discrete")


def test_there_are_no_third_derivatives():
    value, *rest = values(seed=4)
    value.requires_grad_()
    derivative = as_function(SMALL)(value, *rest).square().sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(derivative, value, create_graph=True)
        derivative = gradient.square().sum()
    with pytest.raises(NotImplementedError, match=rf"\[{NAME}\] has first and second"):
        torch.autograd.grad(derivative, value)


# ---------------------------------------------------------------------------
# torch.func


def loss(function):
    return lambda *arguments: function(*arguments).sin().sum()


def test_func_grad():
    arguments = values(seed=5)
    got = torch.func.grad(loss(as_function(SMALL)), (0, 1, 2))(*arguments)
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    want = torch.autograd.grad(loss(reference(SMALL))(*leaves), leaves)
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= TOLERANCE


@pytest.mark.parametrize("i", range(3))
def test_func_jvp_and_second_order(i):
    """Forward over reverse, reverse over reverse and reverse over forward agree."""
    arguments = values(seed=6)
    direction = torch.randn_like(arguments[i])

    def of_one(x):
        return loss(as_function(SMALL))(*arguments[:i], x, *arguments[i + 1 :])

    def along(x):
        return torch.func.jvp(of_one, (x,), (direction,))[1]

    x, gradient = arguments[i], torch.func.grad(of_one)
    assert relative_error(along(x), (gradient(x) * direction).sum()) <= TOLERANCE
    forward_reverse = torch.func.jvp(gradient, (x,), (direction,))[1]
    reverse_reverse = torch.func.grad(lambda x: (gradient(x) * direction).sum())(x)
    reverse_forward = torch.func.grad(along)(x)
    assert reverse_reverse.abs().max() > 0.01
    assert relative_error(forward_reverse, reverse_reverse) <= TOLERANCE
    assert relative_error(reverse_forward, reverse_reverse) <= TOLERANCE


@every_config
@pytest.mark.parametrize("dims", [(0, 0, 0), (2, None, None), (None, 1, 3), (None, None, 0)])
def test_vmap(dims, config):
    B, function = 4, as_function(config)
    samples = [values(config, 10 + i) for i in range(B)]
    arguments = [
        each[0] if dim is None else torch.stack(each, dim)
        for each, dim in zip(zip(*samples, strict=True), dims, strict=True)
    ]

    def sample(i):
        return [
            tensor if dim is None else tensor.select(dim, i)
            for tensor, dim in zip(arguments, dims, strict=True)
        ]

    got = torch.func.vmap(function, dims)(*arguments)
    want = torch.stack([function(*sample(i)) for i in range(B)])
    assert relative_error(got, want) <= TOLERANCE

    every = torch.func.grad(loss(function), (0, 1, 2))
    got = torch.func.vmap(every, dims)(*arguments)
    each = [every(*sample(i)) for i in range(B)]
    for one, other in zip(got, map(torch.stack, zip(*each, strict=True)), strict=True):
        assert relative_error(one, other) <= TOLERANCE


def test_vmap_inside_and_around_transforms():
    function = as_function(SMALL)
    pairs = [torch.stack(pair) for pair in zip(values(seed=20), values(seed=21), strict=True)]
    mapped = torch.func.vmap(function)
    got = torch.func.grad(lambda *a: mapped(*a).sin().sum(), (0, 1, 2))(*pairs)
    for i in range(2):
        want = torch.func.grad(loss(function), (0, 1, 2))(*(tensor[i] for tensor in pairs))
        for one, other in zip(got, want, strict=True):
            assert relative_error(one[i], other) <= TOLERANCE
    # A Hessian is vmap over forward over reverse.
    value, locations, weights = values(SMALL.but(N=1, Q=1, M=1, D=2), 22)
    small = as_function(SMALL)

    def of_weights(weights):
        return small(value, locations, weights).square().sum()

    jacobian = torch.func.jacrev(lambda w: small(value, locations, w))(weights).flatten(0, 2)
    jacobian = jacobian.flatten(1)
    hessian = torch.func.hessian(of_weights)(weights).reshape(jacobian.shape[1], -1)
    assert relative_error(hessian, 2 * jacobian.T @ jacobian) <= TOLERANCE


# ---------------------------------------------------------------------------
# Registration


def settings(config):
    sizes = [size for shape in config.shapes for size in shape]
    return sizes, list(config.points) if config.ragged else None, config.method


@every_config
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(config, requires_grad):
    arguments = values(config, 30, requires_grad=requires_grad)
    grad = cotangent_of(config)
    tangents = [torch.randn_like(tensor) for tensor in arguments]
    calls = {
        NAME: (*arguments, *settings(config)),
        f"{NAME}_backward": (grad, *arguments, *settings(config), [True] * 3),
        f"{NAME}_double_backward": (
            *(grad, *arguments, *tangents),
            *(*settings(config), [True] * 4),
        ),
    }
    for name, call in calls.items():
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if "double" not in name:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(operators, name).default, call, test_utils=tests)


def test_meta_tensors_are_checked_but_not_computed():
    value, locations, weights = values(device="meta")
    function = as_function(SMALL)
    output = function(value, locations, weights)
    assert output.is_meta
    assert output.shape == SMALL.output_shape
    with pytest.raises(bridge.InvalidArgument, match="attention_weights must have shape"):
        function(value, locations, weights[:1])


# Without a C++ compiler inductor cannot generate code; aot_eager traces and runs the same graph.
@pytest.mark.parametrize(
    ("config", "backend"),
    [(SMALL, "aot_eager"), (DISCRETE, "aot_eager"), (RAGGED, "aot_eager"), (RAGGED, "inductor")],
    ids=["by level", "discrete", "ragged", "inductor"],
)
def test_compile(config, backend):
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            pytest.skip("no C++ compiler for inductor")
    torch.compiler.reset()
    points = list(config.points) if config.ragged else None

    def model(value, shapes, locations, weights):
        return bridge.multi_scale_deformable_attention(
            value * 2, shapes, locations, weights, points=points, method=config.method
        ).relu()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seed, case in enumerate((config, config.but(N=3, Q=5, shapes=((6, 2), (7, 9))))):
        arguments = values(case, seed, requires_grad=True)
        shapes = [tuple(shape) for shape in case.shapes]
        got = compiled(arguments[0], shapes, *arguments[1:])
        want = model(arguments[0], shapes, *arguments[1:])
        assert relative_error(got, want) <= TOLERANCE
        cotangent = cotangent_of(case, seed)
        for one, other in zip(
            torch.autograd.grad(got, arguments, cotangent),
            torch.autograd.grad(want, arguments, cotangent),
            strict=True,
        ):
            assert relative_error(one, other) <= TOLERANCE
    torch.compiler.reset()


def test_export():
    class Model(torch.nn.Module):
        def forward(self, value, locations, weights):
            return as_function(SMALL)(value, locations, weights.softmax(-1))

    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        Model(), tuple(values()), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    assert f"mlx_deform.{NAME}" in program.graph_module.code
    arguments = values(SMALL.but(N=5), 1)
    assert relative_error(program.module()(*arguments), Model()(*arguments)) <= TOLERANCE


# ---------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Nothing is cast: halves are sampled in float32 as they are."""
    arguments = values(seed=40, dtype=torch.float32, grid=2.0**-6)
    arguments[0] = arguments[0].to(dtype)
    arguments = [tensor.requires_grad_() for tensor in arguments]
    want = results(as_function(SMALL), SMALL, arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(as_function(SMALL), SMALL, arguments)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert got[0].dtype == dtype


def test_autocast_after_layers_that_it_casts():
    """As models have it: values and offsets by linear layers, references in float32."""
    torch.manual_seed(0)
    project = torch.nn.Linear(6, 6).to(DEVICE)
    value, locations, weights = values(seed=41, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        projected = project(value)
        assert projected.dtype == torch.bfloat16
        output = as_function(SMALL)(projected, locations, weights)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert project.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------
# Ways to call


def test_spatial_shapes_as_a_tensor_or_a_list():
    arguments = values(seed=50)
    want = as_function(SMALL)(*arguments)
    value, *rest = arguments
    attention = bridge.multi_scale_deformable_attention
    for shapes in (
        list(SMALL.shapes),
        [list(shape) for shape in SMALL.shapes],
        torch.tensor(SMALL.shapes, device=DEVICE),
        torch.tensor(SMALL.shapes, dtype=torch.int32),
        [torch.Size(shape) for shape in SMALL.shapes],
    ):
        assert torch.equal(attention(value, shapes, *rest), want)


def test_the_convention_of_mmcv():
    arguments = values(seed=51, requires_grad=True)
    value, *rest = arguments
    shapes = torch.tensor(SMALL.shapes, device=DEVICE)
    starts = torch.tensor([0, 15], device=DEVICE)
    apply = bridge.MultiScaleDeformableAttnFunction.apply

    def function(value, *rest):
        return apply(value, shapes, starts, *rest, 64)

    got = results(function, SMALL, arguments)
    assert_same(got, results(reference(SMALL), SMALL, arguments))
    with pytest.raises(
        bridge.InvalidArgument, match=r"value_level_start_index must be \(0, 15\); got \(0, 14\)"
    ):
        apply(value, shapes, starts - torch.tensor([0, 1], device=DEVICE), *rest, 64)


def test_the_convention_of_transformers():
    arguments = values(seed=52, requires_grad=True)
    layer = bridge.MultiScaleDeformableAttention()
    assert not layer.state_dict()
    shapes = torch.tensor(SMALL.shapes, device=DEVICE)
    want = results(reference(SMALL), SMALL, arguments)
    for tensor, pairs in ((shapes, list(SMALL.shapes)), (None, SMALL.shapes), (shapes, None)):

        def function(value, locations, weights, tensor=tensor, pairs=pairs):
            return layer(value, tensor, pairs, None, locations, weights, 64)

        assert_same(results(function, SMALL, arguments), want)


# ---------------------------------------------------------------------------
# Errors


def test_errors():
    value, locations, weights = values()
    flat = locations.flatten(3, 4), weights.flatten(3, 4)
    shapes = SMALL.shapes
    calls = {
        "value must have 4 axes": (value[0], shapes, locations, weights),
        "value must have no empty axis": (value[..., :0], shapes, locations, weights),
        "value must be float16": (value.long(), shapes, locations, weights),
        "sampling_locations must be float16": (value, shapes, locations.long(), weights),
        "a pair .* for at least one level": (value, [], locations, weights),
        r"pairs \(H, W\) of at least 1; got \(3,\)": (value, [(3,), (4, 2)], locations, weights),
        r"pairs \(H, W\) of at least 1; got \(0, 5\)": (
            *(value, [(0, 5), (4, 2)]),
            *(locations, weights),
        ),
        "must hold integers and have 2 axes": (value, torch.rand(2, 2), locations, weights),
        "pixels of all levels, 22 by": (value, [(3, 5), (7, 1)], locations, weights),
        "must have 6 axes": (value, shapes, *flat),
        r"\(2, Q, 3, 2, P, 2\) with P": (value, shapes, locations[:, :, :2], weights),
        r"attention_weights must have shape \(2, 7, 3, 2, 4\)": (
            *(value, shapes),
            *(locations, weights[:, 1:]),
        ),
    }
    attention = bridge.multi_scale_deformable_attention
    for message, call in calls.items():
        with pytest.raises(bridge.InvalidArgument, match=rf"^\[{NAME}\] .*{message}"):
            attention(*call)
        with pytest.raises(ValueError, match=message):
            attention(*call)
    for message, keywords in {
        "points must have an entry for each of the 2 levels": {"points": [8]},
        "points must be at least 1": {"points": [8, 0]},
        r"\(N, Q, M, sum of points, 2\), \(2, Q, 3, 7, 2\)": {"points": [3, 4]},
        r'method must be "bilinear" or "discrete"; got \'nearest\'': {"method": "nearest"},
    }.items():
        with pytest.raises(bridge.InvalidArgument, match=message):
            attention(value, shapes, *flat, **{"points": [4, 4], **keywords})
    with pytest.raises(TypeError, match="attention_weights must be a tensor; got NoneType"):
        attention(value, shapes, locations, None)


def test_devices_must_agree():
    value, locations, weights = values(device="meta")
    with pytest.raises(bridge.InvalidArgument, match="on the device of value"):
        as_function(SMALL)(value, locations, torch.ones(weights.shape))


def test_the_operators_of_derivatives_check_their_arguments():
    arguments, rest = values(), settings(SMALL)
    grad = cotangent_of(SMALL)
    backward = getattr(operators, f"{NAME}_backward")
    double_backward = getattr(operators, f"{NAME}_double_backward")
    none = (None,) * 3
    calls = {
        "grad must have shape": (backward, grad[1:], *arguments, *rest, [True] * 3),
        "grad must have type": (backward, grad.half(), *arguments, *rest, [True] * 3),
        "one tangent": (double_backward, grad, *arguments, *none, *rest, [True] * 4),
        "t_sampling_locations must have shape": (
            *(double_backward, grad, *arguments),
            *(None, arguments[0], None, *rest, [True] * 4),
        ),
        "grad must be given": (
            *(double_backward, None, *arguments),
            *(arguments[0], None, None, *rest, [True] * 4),
        ),
    }
    for message, (operator, *call) in calls.items():
        with pytest.raises(bridge.InvalidArgument, match=message):
            operator(*call)
