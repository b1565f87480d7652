"""The bridge as a torch operator: derivatives, torch.func, compile, export, autocast."""

# ruff: noqa: E402  (torch may not be installed)
import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

import mlx_deform.torch as bridge
from torch_cases import (
    CONFIG,
    DEVICE,
    DTYPE,
    SMALL,
    as_function,
    assert_same,
    convolve,
    given,
    one_thread,  # noqa: F401
    relative_error,
    results,
    tensors,
)

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
oracle = torchvision.ops.deform_conv2d
operators = torch.ops.mlx_deform
TOLERANCE = 1e-10 if torch.float64 == DTYPE else 1e-4
GEOMETRY = (SMALL.stride, SMALL.padding, SMALL.dilation)
ALL = [True] * 5
double_precision = pytest.mark.skipif(
    DEVICE == "mps", reason="finite differences need float64, which MPS lacks"
)


def values(seed=0, config=SMALL, **options):
    # Away from the borders of cells, where the derivative jumps.
    return given(tensors(config, seed, grid=None, **options))


function = as_function(SMALL)
reference = as_function(SMALL, oracle)


# ---------------------------------------------------------------------------
# Derivatives


@double_precision
@pytest.mark.parametrize("seed", [0, 1])
def test_first_derivatives(seed):
    arguments = values(seed, requires_grad=True)
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)


@double_precision
def test_second_derivatives():
    arguments = values(2, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        function, arguments, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@double_precision
@pytest.mark.parametrize("wanted", [("weight",), ("bias", "offset"), ("input", "mask")])
def test_second_derivatives_of_some(wanted):
    arguments = tensors(SMALL, 3, grid=None)
    for name in wanted:
        arguments[name].requires_grad_()
    chosen = [arguments[name] for name in wanted]

    def partial(*some):
        return convolve(
            bridge.deform_conv2d, SMALL, {**arguments, **dict(zip(wanted, some, strict=True))}
        ).square()

    assert torch.autograd.gradgradcheck(partial, chosen, fast_mode=True)


@double_precision
def test_second_derivatives_without_mask_and_bias():
    config = SMALL.but(has_mask=False, has_bias=False)
    arguments = given(tensors(config, 4, grid=None, requires_grad=True))

    def partial(input, offset, weight):
        return bridge.deform_conv2d(input, offset, weight, **config.settings)

    assert torch.autograd.gradcheck(partial, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(partial, arguments, fast_mode=True)


def test_second_derivatives_of_an_empty_batch():
    config = SMALL.but(N=0)
    arguments = tensors(config, 0, requires_grad=True)
    output = convolve(bridge.deform_conv2d, config, arguments)
    (gradient,) = torch.autograd.grad(output.sum(), arguments["weight"], create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), arguments["input"])
    assert second.shape == arguments["input"].shape


def test_there_are_no_third_derivatives():
    x, *rest = values(5)
    x.requires_grad_()
    derivative = function(x, *rest).square().sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(derivative, x, create_graph=True)
        derivative = gradient.square().sum()
    with pytest.raises(NotImplementedError, match="first and second derivatives alone"):
        torch.autograd.grad(derivative, x)


# ---------------------------------------------------------------------------
# torch.func


def loss(convolution):
    return lambda *arguments: convolution(*arguments).sin().sum()


def test_func_grad():
    arguments = values(6)
    everything = tuple(range(5))
    got = torch.func.grad(loss(function), everything)(*arguments)
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    want = torch.autograd.grad(loss(reference)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= TOLERANCE


def test_func_jvp_and_second_order():
    """Forward over reverse, reverse over reverse and reverse over forward agree."""
    x, *rest = values(7)
    direction = torch.randn_like(x)

    def along(x):
        return torch.func.jvp(lambda x: loss(function)(x, *rest), (x,), (direction,))[1]

    gradient = torch.func.grad(lambda x: loss(function)(x, *rest))
    assert relative_error(along(x), (gradient(x) * direction).sum()) <= TOLERANCE
    forward_reverse = torch.func.jvp(gradient, (x,), (direction,))[1]
    reverse_reverse = torch.func.grad(lambda x: (gradient(x) * direction).sum())(x)
    reverse_forward = torch.func.grad(along)(x)
    assert reverse_reverse.abs().max() > 0.01
    assert relative_error(forward_reverse, reverse_reverse) <= TOLERANCE
    assert relative_error(reverse_forward, reverse_reverse) <= TOLERANCE


# Which of input, offset, weight, bias and mask are mapped, and along which axis.
MAPPED = [
    (0, 0, None, None, 0),
    (2, None, None, None, None),
    (None, 1, None, None, 4),
    (0, 0, 0, 0, 0),
    (None, None, 1, None, None),
    (None, None, None, 1, None),
    (3, None, 2, None, 0),
]


@pytest.mark.parametrize("dims", MAPPED)
def test_vmap(dims):
    B = 3
    samples = [values(10 + i) for i in range(B)]
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

    every = torch.func.grad(loss(function), tuple(range(5)))
    got = torch.func.vmap(every, dims)(*arguments)
    each = [every(*sample(i)) for i in range(B)]
    for a, b in zip(got, map(torch.stack, zip(*each, strict=True)), strict=True):
        assert relative_error(a, b) <= TOLERANCE


def test_vmap_inside_grad():
    arguments = [torch.stack([a, b]) for a, b in zip(values(20), values(21), strict=True)]
    mapped = torch.func.vmap(function)
    got = torch.func.grad(lambda *a: mapped(*a).sin().sum(), (0, 1, 2))(*arguments)
    for i in range(2):
        want = torch.func.grad(loss(function), (0, 1, 2))(*(a[i] for a in arguments))
        for a, b in zip(got, want, strict=True):
            assert relative_error(a[i], b) <= TOLERANCE


# ---------------------------------------------------------------------------
# Registration


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(last, requires_grad):
    format = torch.channels_last if last else torch.contiguous_format
    arguments = [
        tensor.contiguous(memory_format=format) if tensor.dim() == 4 else tensor
        for tensor in values(30)
    ]
    for tensor in arguments:
        tensor.requires_grad_(requires_grad)
    input, offset, weight, bias, mask = arguments
    grad = torch.randn_like(function(*arguments)).contiguous(memory_format=format)
    calls = {
        operators.deform_conv2d: (input, offset, weight, bias, mask, *GEOMETRY),
        operators.deform_conv2d_backward: (grad, input, offset, weight, mask, *GEOMETRY, ALL),
        operators.deform_conv2d_double_backward: (
            *(grad, input, offset, weight, mask),
            *(torch.randn_like(tensor) for tensor in arguments),
            *GEOMETRY,
            ALL,
        ),
    }
    for operator, call in calls.items():
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if operator is not operators.deform_conv2d_double_backward:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator.default, call, test_utils=tests)


def test_fake_and_meta_tensors_are_checked_but_not_computed():
    arguments = {
        name: tensor if tensor is None else tensor.to("meta")
        for name, tensor in tensors(CONFIG).items()
    }
    output = convolve(bridge.deform_conv2d, CONFIG, arguments)
    assert output.is_meta
    assert output.shape == (CONFIG.N, CONFIG.O, CONFIG.Ho, CONFIG.Wo)
    with pytest.raises(bridge.InvalidArgument, match="mask must have shape"):
        convolve(bridge.deform_conv2d, CONFIG, {**arguments, "mask": arguments["offset"]})


# Without a C++ compiler inductor cannot generate code; aot_eager traces and runs the same graph.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            pytest.skip("no C++ compiler for inductor")
    torch.compiler.reset()

    def model(input, offset, weight, bias, mask):
        settings = SMALL.settings
        return bridge.deform_conv2d(input * 2, offset, weight, bias, mask=mask, **settings).relu()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seed, config in enumerate((SMALL, SMALL.but(N=3, H=6, W=11))):
        arguments = values(seed, config, requires_grad=True)
        got, want = compiled(*arguments), model(*arguments)
        cotangent = torch.randn_like(want)
        assert relative_error(got, want) <= TOLERANCE
        for a, b in zip(
            torch.autograd.grad(got, arguments, cotangent),
            torch.autograd.grad(want, arguments, cotangent),
            strict=True,
        ):
            assert relative_error(a, b) <= TOLERANCE


def test_export():
    layer = bridge.ModulatedDeformConv2d(4, 6, 3, padding=1).to(DEVICE, DTYPE)
    torch.nn.init.normal_(layer.offset_conv.weight, std=0.1)
    x = torch.randn(2, 4, 7, 9, dtype=DTYPE, device=DEVICE)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert "mlx_deform.deform_conv2d" in program.graph_module.code
    exported = program.module()
    y = torch.randn(5, 4, 7, 9, dtype=DTYPE, device=DEVICE, requires_grad=True)
    assert relative_error(exported(y), layer(y)) <= TOLERANCE
    (got,) = torch.autograd.grad(exported(y).sin().sum(), y)
    (want,) = torch.autograd.grad(layer(y).sin().sum(), y)
    assert relative_error(got, want) <= TOLERANCE


# ---------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(input_dtype):
    """The result has the type of the input, as torchvision's has; so have the gradients."""
    arguments = tensors(CONFIG, 40, torch.float32)
    arguments["input"] = arguments["input"].to(input_dtype)
    arguments["cotangent"] = arguments["cotangent"].to(input_dtype)
    for name, tensor in arguments.items():
        tensor.requires_grad_(name != "cotangent")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(bridge.deform_conv2d, CONFIG, arguments)
    assert got["output"].dtype == input_dtype
    for name, tensor in arguments.items():
        if name != "cotangent":
            assert got[name].dtype == tensor.dtype
    wide = {
        name: tensor.detach().cpu().double().requires_grad_(name != "cotangent")
        for name, tensor in arguments.items()
    }
    tolerance = 1e-5 if input_dtype == torch.float32 else 2.0**-6
    assert_same(got, results(oracle, CONFIG, wide), tolerance)


def test_autocast_after_a_convolution_that_it_casts():
    layer = bridge.ModulatedDeformConv2d(4, 6, 3, padding=1).to(DEVICE)
    x = torch.randn(2, 4, 7, 9, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).dtype == torch.float32  # offsets and mask are bfloat16
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_the_operators_of_derivatives_check_their_arguments():
    input, offset, weight, _, mask = values(31)
    primals, geometry = (input, offset, weight, mask), GEOMETRY
    grad = torch.zeros_like(function(*values(31)))
    backward, double_backward = (
        operators.deform_conv2d_backward,
        operators.deform_conv2d_double_backward,
    )
    none = (None,) * 5
    calls = {
        "grad must have shape": (backward, grad[1:], *primals, *geometry, ALL),
        "grad must have type": (backward, grad.half(), *primals, *geometry, ALL),
        "mask must be given where its gradient": (
            *(backward, grad, *primals[:3], None),
            *(*geometry, ALL),
        ),
        "one tangent": (double_backward, grad, *primals, *none, *geometry, ALL),
        "t_offset must have shape": (
            *(double_backward, grad, *primals),
            *(None, mask, None, None, None, *geometry, ALL),
        ),
        "grad must be given": (
            *(double_backward, None, *primals),
            *(input, None, None, None, None, *geometry, ALL),
        ),
    }
    for message, (operator, *arguments) in calls.items():
        with pytest.raises(bridge.InvalidArgument, match=message):
            operator(*arguments)
