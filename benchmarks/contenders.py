"""What is timed: the library, the bare matrix products, ordinary convolutions, peers.

A contender launches one pass (which returns the results, perhaps before they are
computed) and waits for everything launched. `as_numpy` gives the results of those that
compute a deformable convolution, in the library's layouts.
"""

import ctypes
import os
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_deform
import mlx_deform._ext
from numerics import ARGUMENTS, to_mx, to_numpy
from problem import FORWARD, product_of


class Unavailable(Exception):
    """A peer that is not installed, or does not do this case."""


def device_kind():
    """cpu, metal or cuda: what MLX's default device is."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


class Contender:
    name = None

    @staticmethod
    def instruction_set():
        """Of the CPU's that it runs, as far as it tells."""
        return "its own choice"

    def launch(self, which):
        raise NotImplementedError

    def wait(self):
        pass

    def run(self, which, count=1):
        for _ in range(count):
            results = self.launch(which)
        self.wait()
        return results


class _Mlx(Contender):
    """A function of MLX arrays, and its vector-Jacobian product by all of them."""

    def __init__(self, problem, dtype, threads, names):
        self.names = names
        self.config = problem.config
        self.values = [to_mx(problem.arrays[name], dtype) for name in names]
        self.cotangent = to_mx(problem.arrays["cotangent"], dtype)
        self.on_gpu = device_kind() != "cpu"
        mx.eval(self.values, self.cotangent)

    def function(self, *values):
        raise NotImplementedError

    def launch(self, which):
        if which == FORWARD:
            results = [self.function(*self.values)]
        else:
            outputs, gradients = mx.vjp(self.function, self.values, [self.cotangent])
            results = [*outputs, *gradients]
        (mx.async_eval if self.on_gpu else mx.eval)(results)
        return results

    def wait(self):
        if self.on_gpu:
            mx.synchronize()

    def as_numpy(self, results):
        named = zip(("output", *self.names), results, strict=False)
        return {name: to_numpy(result) for name, result in named}


class MlxDeform(_Mlx):
    name = "mlx_deform"

    @staticmethod
    def instruction_set():
        return mlx_deform._ext._isa

    def __init__(self, problem, dtype, threads):
        super().__init__(problem, dtype, threads, ARGUMENTS)

    def function(self, input, offset, weight, bias, mask):
        return mlx_deform.deform_conv2d(
            input, offset, weight, bias, mask=mask, **self.config.settings
        )


class MlxConv2d(_Mlx):
    """MLX's ordinary convolution of the same shape."""

    name = "mlx conv2d"

    def __init__(self, problem, dtype, threads):
        super().__init__(problem, dtype, threads, ("input", "weight", "bias"))

    def function(self, input, weight, bias):
        config = self.config
        return mx.conv2d(input, weight, **config.settings, groups=config.G) + bias


class MlxMatmul(Contender):
    """The bound on a GPU and on macOS, by MLX's own product."""

    name = "mlx matmul"

    def __init__(self, problem, dtype, threads):
        self.on_gpu = device_kind() != "cpu"
        product, dtype = product_of(problem.config), getattr(mx, dtype)
        self.weight = mx.random.normal((product.G, product.O, product.K)).astype(dtype)
        self.pieces = product.rows()
        largest = max(self.pieces)
        self.columns = mx.random.normal((product.G, largest, product.K)).astype(dtype)
        self.cotangent = mx.random.normal((product.G, largest, product.O)).astype(dtype)
        mx.eval(self.weight, self.columns, self.cotangent)

    def launch(self, which):
        for rows in self.pieces:
            columns, cotangent = self.columns[:, :rows], self.cotangent[:, :rows]
            results = [columns @ self.weight.swapaxes(1, 2)]
            if which != FORWARD:
                results += [cotangent @ self.weight, cotangent.swapaxes(1, 2) @ columns]
            (mx.async_eval if self.on_gpu else mx.eval)(results)

    def wait(self):
        if self.on_gpu:
            mx.synchronize()


class OpenBlas(Contender):
    """The bound on Linux: sgemm by the BLAS that the library uses, on all the threads.

    Half types are computed in float32 there, so this is their bound too.
    """

    name = "OpenBLAS sgemm"

    @staticmethod
    def library():
        try:
            import scipy_openblas32
        except ImportError:
            raise Unavailable("scipy-openblas32 is not installed") from None
        path = Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"
        return ctypes.CDLL(str(path))  # the copy that mlx_deform has loaded

    @staticmethod
    def instruction_set():
        core = OpenBlas.library().scipy_openblas_get_corename
        core.restype = ctypes.c_char_p
        return f"kernels for {core().decode()}"

    def __init__(self, problem, dtype, threads):
        self.blas = self.library()
        self.threads = threads
        self.product = product = product_of(problem.config)
        self.pieces = product.rows()
        rng, largest = np.random.default_rng(0), max(self.pieces)

        def normal(*shape):
            return rng.standard_normal((product.G, *shape), dtype=np.float32)

        self.weight = normal(product.O, product.K)
        self.columns = normal(largest, product.K)
        self.output = normal(largest, product.O)
        self.grad_columns = np.zeros_like(self.columns)
        self.grad_weight = np.zeros_like(self.weight)

    def _gemm(self, m, n, k, a, transpose_a, b, transpose_b, c, beta=0.0):
        """c (m, n) = a (m, k) times b (k, n) plus beta c, each perhaps stored transposed."""
        row_major, plain, transposed = 101, 111, 112
        pointer = ctypes.POINTER(ctypes.c_float)
        self.blas.scipy_cblas_sgemm(
            ctypes.c_int(row_major),
            ctypes.c_int(transposed if transpose_a else plain),
            ctypes.c_int(transposed if transpose_b else plain),
            *(ctypes.c_int(size) for size in (m, n, k)),
            ctypes.c_float(1.0),
            a.ctypes.data_as(pointer),
            ctypes.c_int(a.shape[1]),
            b.ctypes.data_as(pointer),
            ctypes.c_int(b.shape[1]),
            ctypes.c_float(beta),
            c.ctypes.data_as(pointer),
            ctypes.c_int(c.shape[1]),
        )

    def launch(self, which):
        # mlx_deform keeps this library at one thread, for it has threads of its own.
        before = self.blas.scipy_openblas_get_num_threads()
        self.blas.scipy_openblas_set_num_threads(ctypes.c_int(self.threads))
        try:
            for rows in self.pieces:
                for g in range(self.product.G):
                    self._products(which, rows, g)
        finally:
            self.blas.scipy_openblas_set_num_threads(ctypes.c_int(before))

    def _products(self, which, rows, g):
        K, O = self.product.K, self.product.O  # noqa: E741
        columns, weight, output = self.columns[g], self.weight[g], self.output[g]
        self._gemm(rows, O, K, columns, False, weight, True, output)
        if which != FORWARD:
            self._gemm(rows, K, O, output, False, weight, False, self.grad_columns[g])
            self._gemm(O, K, rows, output, True, columns, False, self.grad_weight[g], 1.0)


def bound_for(kind):
    """The contender that everything is measured by."""
    has_openblas = kind == "cpu" and os.uname().sysname == "Linux"
    return OpenBlas if has_openblas else MlxMatmul
