"""Other libraries' deformable convolutions, and torch's ordinary one.

The backward of torch is timed for the gradients of every floating-point argument, as ours
is. A peer that is not installed, or raises, is left out with its reason.
"""

import importlib
import os

import numpy as np

from contenders import Contender, MlxConv2d, Unavailable
from numerics import ARGUMENTS
from problem import FORWARD, product_of

TORCH_DEVICES = {"cpu": "cpu", "metal": "mps", "cuda": "cuda"}


def imported(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        installed = error.name != name.split(".")[0]
        reason = f"cannot be imported: {error}" if installed else "is not installed"
        raise Unavailable(f"{name} {reason}") from None


def imported_torch(device, threads):
    torch = imported("torch")
    backends = {"mps": torch.backends.mps.is_available, "cuda": torch.cuda.is_available}
    if device != "cpu" and not backends[device]():
        raise Unavailable(f"torch has no {device} device here")
    torch.set_num_threads(threads)
    tf32 = os.environ.get("MLX_ENABLE_TF32") == "1"  # for everyone or for nobody
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return torch


def torch_instruction_set(library):
    """Of torch's own loops, for it doesn't tell that of the library which does the products."""
    return f"{imported('torch').backends.cpu.get_cpu_capability()}, {library}'s own choice"


def channels_first(array):
    return array if array.ndim == 1 else np.ascontiguousarray(np.moveaxis(array, -1, 1))


class Torch(Contender):
    """A function of torch tensors, and its backward to all of them."""

    names = ARGUMENTS

    @staticmethod
    def instruction_set():
        return torch_instruction_set("oneDNN")

    def __init__(self, problem, dtype, threads, device):
        self.torch = torch = imported_torch(device, threads)
        self.device, self.config = device, problem.config
        self.type = getattr(torch, dtype)
        self.tensors = [
            self.tensor(self.layout(name, problem.arrays[name])).requires_grad_()
            for name in self.names
        ]
        self.cotangent = self.tensor(self.layout("output", problem.arrays["cotangent"]))

    def tensor(self, array):
        array = np.ascontiguousarray(array)
        return self.torch.from_numpy(array.copy()).to(device=self.device, dtype=self.type)

    def layout(self, name, array):
        return channels_first(array)

    def from_layout(self, name, array):
        return array if array.ndim == 1 else np.moveaxis(array, 1, -1)

    def function(self, *tensors):
        raise NotImplementedError

    def launch(self, which):
        if which == FORWARD:
            with self.torch.no_grad():
                return [self.function(*self.tensors)]
        output = self.function(*self.tensors)
        return [output, *self.torch.autograd.grad(output, self.tensors, self.cotangent)]

    def wait(self):
        if self.device != "cpu":
            getattr(self.torch, self.device).synchronize()

    def as_numpy(self, results):
        named = {}
        for name, result in zip(("output", *self.names), results, strict=False):
            array = result.detach().to("cpu", self.torch.float32).numpy().astype(np.float64)
            named[name] = self.from_layout(name, array)
        return named


class Torchvision(Torch):
    name = "torchvision"

    @staticmethod
    def instruction_set():
        return "sampling in the compiler's default, " + torch_instruction_set("MKL")

    def __init__(self, problem, dtype, threads, device):
        super().__init__(problem, dtype, threads, device)
        self.op = imported("torchvision").ops.deform_conv2d

    def function(self, input, offset, weight, bias, mask):
        return self.op(input, offset, weight, bias, mask=mask, **self.config.settings)


class MpsDeformConv(Torchvision):
    name = "mps-deform-conv"

    def __init__(self, problem, dtype, threads, device):
        super().__init__(problem, dtype, threads, device)
        self.op = imported("mps_deform_conv").deform_conv2d


class DeformOps(Torch):
    """Triton kernels, channels last but for the weight."""

    name = "deformops"

    def __init__(self, problem, dtype, threads, device):
        super().__init__(problem, dtype, threads, device)
        self.op = imported("deformops.registry").conv

    def layout(self, name, array):
        config = self.config
        samples = (*array.shape[:3], config.DG, config.kH * config.kW)
        if name == "offset":
            return array.reshape(*samples, 2)
        if name == "mask":
            return array.reshape(samples)
        return channels_first(array) if name == "weight" else array

    def from_layout(self, name, array):
        if name in ("offset", "mask"):
            return array.reshape(*array.shape[:3], -1)
        return np.moveaxis(array, 1, -1) if name == "weight" else array

    def function(self, input, offset, weight, bias, mask):
        groups = {"groups": self.config.G, "offset_groups": self.config.DG}
        return self.op(
            input, offset, weight, bias=bias, mask=mask, **self.config.settings, **groups
        )


class TorchConv2d(Torch):
    """torch's ordinary convolution of the same shape."""

    name = "torch conv2d"
    names = ("input", "weight", "bias")

    def function(self, input, weight, bias):
        conv2d = self.torch.nn.functional.conv2d
        return conv2d(input, weight, bias, **self.config.settings, groups=self.config.G)


class TorchConv2dChannelsLast(TorchConv2d):
    """The same in the memory layout that it is fastest in."""

    name = "torch conv2d channels_last"

    def tensor(self, array):
        tensor = super().tensor(array)
        if tensor.ndim != 4:
            return tensor
        return tensor.contiguous(memory_format=self.torch.channels_last)


class TorchMm(Contender):
    """The bare matrix products once more, by torch."""

    name = "torch.mm"

    @staticmethod
    def instruction_set():
        return torch_instruction_set("MKL")

    def __init__(self, problem, dtype, threads, device):
        self.torch = torch = imported_torch(device, threads)
        product, dtype = product_of(problem.config), getattr(torch, dtype)
        self.weight = torch.randn(product.G, product.O, product.K, dtype=dtype)
        self.pieces = product.rows()
        self.columns = torch.randn(product.G, max(self.pieces), product.K, dtype=dtype)
        self.output = torch.randn(product.G, max(self.pieces), product.O, dtype=dtype)
        self.grad_columns = torch.zeros_like(self.columns)
        self.grad_weight = torch.zeros_like(self.weight)

    def launch(self, which):
        mm = self.torch.mm
        for rows in self.pieces:
            for g, weight in enumerate(self.weight):
                columns, output = self.columns[g, :rows], self.output[g, :rows]
                mm(columns, weight.T, out=output)
                if which != FORWARD:
                    mm(output, weight, out=self.grad_columns[g, :rows])
                    mm(output.T, columns, out=self.grad_weight[g])


class OnnxRuntime(Contender):
    """DeformConv of opset 19 in onnxruntime's CPU provider; it has no backward."""

    name = "onnxruntime"

    def __init__(self, problem, dtype, threads, device):
        if dtype != "float32":
            raise Unavailable("onnxruntime computes DeformConv in float32 and float64 alone")
        onnx, ort = imported("onnx"), imported("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        arrays = {name: channels_first(problem.arrays[name]) for name in ARGUMENTS}
        model = self.model(onnx, problem.config, arrays)
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.feeds = {name: arrays[name] for name in ("input", "offset", "mask")}

    def model(self, onnx, config, arrays):
        helper, real = onnx.helper, onnx.TensorProto.FLOAT
        node = helper.make_node(
            "DeformConv",
            ["input", "weight", "offset", "bias", "mask"],
            ["output"],
            kernel_shape=config.kernel,
            strides=config.stride,
            pads=config.padding * 2,
            dilations=config.dilation,
            group=config.G,
            offset_group=config.DG,
        )
        constants = [onnx.numpy_helper.from_array(arrays[n], n) for n in ("weight", "bias")]
        inputs = [
            helper.make_tensor_value_info(name, real, arrays[name].shape)
            for name in ("input", "offset", "mask")
        ]
        output = helper.make_tensor_value_info("output", real, None)
        graph = helper.make_graph([node], "deform_conv2d", inputs, [output], constants)
        opset = [helper.make_opsetid("", 19)]
        return helper.make_model(graph, opset_imports=opset, ir_version=9)

    def launch(self, which):
        if which != FORWARD:
            raise Unavailable("onnxruntime has no backward")
        return self.session.run(None, self.feeds)

    def as_numpy(self, results):
        return {"output": np.moveaxis(results[0], 1, -1).astype(np.float64)}


PEERS = {
    "cpu": (TorchMm, TorchConv2d, TorchConv2dChannelsLast, OnnxRuntime, Torchvision),
    "metal": (MlxConv2d, TorchConv2d, MpsDeformConv, Torchvision),
    "cuda": (MlxConv2d, TorchConv2d, TorchConv2dChannelsLast, DeformOps, Torchvision),
}


def build(peer, problem, dtype, threads, kind):
    """A peer for this case, or Unavailable."""
    if issubclass(peer, MlxConv2d):
        return peer(problem, dtype, threads)
    return peer(problem, dtype, threads, TORCH_DEVICES[kind])
