"""The picture that `python -m mlx_deform` makes, and the checks and timings it prints."""

import os
import statistics
import time

import matplotlib
import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from . import deform_conv2d

KERNEL = 3
# A lens keeps a 3x3 kernel a rough 3x3 kernel; at this share of the picture its shape shows.
DILATION_SHARE = 1 / 18
# Closer to the border of a cell than this, float32 and float64 may pick different cells.
BORDER = 1e-3


def load_picture(path, size):
    """(H, W, 3), float32 between 0 and 1."""
    if path is None:
        from skimage import data

        picture = Image.fromarray(data.chelsea())
    else:
        try:
            picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or "not an image that can be read"
            raise OSError(f"{path}: {reason}") from None
    picture.thumbnail((size, size))
    if min(picture.size) < 8:
        raise OSError(f"{path}: {picture.width} x {picture.height} pixels are too few")
    return np.asarray(picture, dtype=np.float32) / 255


def lens(y, x, height, width, strength):
    """How far, (dy, dx), from position (y, x) a lens in the middle looks."""
    cy, cx, radius = (height - 1) / 2, (width - 1) / 2, 0.48 * min(height, width)
    t2 = np.minimum(((y - cy) ** 2 + (x - cx) ** 2) / radius**2, 1)
    pull = -strength * (1 - t2) ** 2
    return pull * (y - cy), pull * (x - cx)


def lens_offsets(height, width, dilation, strength):
    """(1, H, W, 2 * 3 * 3): every tap of every position looks through the lens."""
    y, x, i, j = np.ogrid[0:height, 0:width, -1:2, -1:2]
    y, x = np.broadcast_arrays(y + i * dilation, x + j * dilation)
    offsets = np.stack(lens(y, x, height, width, strength), axis=-1)
    return offsets.reshape(1, height, width, -1).astype(np.float32)


def one_hot_kernel(channels):
    """(C, 3, 3, C): the identity at the middle tap, which makes the op a warp."""
    weight = np.zeros((channels, KERNEL, KERNEL, channels), np.float32)
    weight[:, KERNEL // 2, KERNEL // 2, :] = np.eye(channels)
    return weight


def reference_warp(picture, offset):
    """The warp and its slopes along y and x in float64, from padding and indexing alone.

    picture: (H, W, C); offset: (H, W, 2). The zeros around the picture are real ones here.
    """
    height, width, _ = picture.shape
    padded = np.pad(picture.astype(np.float64), ((1, 2), (1, 2), (0, 0)))
    rows, columns = np.ogrid[0:height, 0:width]
    y = np.clip(rows + offset[..., 0].astype(np.float64), -1, height) + 1
    x = np.clip(columns + offset[..., 1].astype(np.float64), -1, width) + 1
    i, j = y.astype(int), x.astype(int)
    v, u = (y - i)[..., None], (x - j)[..., None]
    a, b, c, d = padded[i, j], padded[i, j + 1], padded[i + 1, j], padded[i + 1, j + 1]
    top, bottom = a + u * (b - a), c + u * (d - c)
    return top + v * (bottom - top), bottom - top, (b - a) + v * (d - c - (b - a))


class Warp:
    """deform_conv2d with the lens offsets and a one-hot kernel, on one picture."""

    def __init__(self, picture, strength):
        self.picture = picture
        height, width, channels = picture.shape
        self.dilation = max(1, round(DILATION_SHARE * min(height, width)))
        self.offset = lens_offsets(height, width, self.dilation, strength)
        self.weight = one_hot_kernel(channels)

    def __call__(self, picture, offset=None):
        output = deform_conv2d(
            mx.array(picture)[None],
            mx.array(self.offset) if offset is None else offset,
            mx.array(self.weight),
            padding=self.dilation,
            dilation=self.dilation,
        )
        return output[0]

    def check(self):
        """Prints the worst errors against the reference; True when within tolerance."""
        middle = self.offset[0].reshape(*self.picture.shape[:2], KERNEL * KERNEL, 2)
        middle = middle[:, :, KERNEL * KERNEL // 2]
        value, slope_y, slope_x = reference_warp(self.picture, middle)
        # A coordinate in float32 is off by half a spacing; a pixel's slope is at most 1.
        tolerance = 2 * np.finfo(np.float32).eps * max(self.picture.shape)
        output = np.array(self(self.picture))
        agrees = report("the lens warp", output - value, tolerance)

        cotangent = np.cos(np.arange(output.size, dtype=np.float32)).reshape(output.shape)
        loss = lambda offset: (mx.array(cotangent) * self(self.picture, offset)).sum()  # noqa: E731
        gradient = np.array(mx.grad(loss)(mx.array(self.offset)))
        gradient = gradient.reshape(*self.picture.shape[:2], KERNEL * KERNEL, 2)
        expected = np.zeros(gradient.shape)
        for axis, slope in enumerate((slope_y, slope_x)):
            expected[:, :, KERNEL * KERNEL // 2, axis] = (cotangent * slope).sum(-1)
        # On a border both sides agree only if the coordinate is exact, which offset 0 is.
        distance = np.abs(middle - np.round(middle))
        sure = ((distance > BORDER) | (middle == 0)).all(-1)
        error = (gradient - expected)[sure]
        return report("its offset gradient", error, 4 * tolerance) and agrees


def report(what, error, tolerance):
    worst = np.abs(error).max()
    agrees = bool(worst <= tolerance)  # a NaN does not
    relation, verdict = ("<=", "ok") if agrees else (">", "MISMATCH")
    print(
        f"checked  {what} against a NumPy float64 reference, {error.size} values: "
        f"worst error {worst:.1e} {relation} {tolerance:.1e}, {verdict}"
    )
    return agrees


def median_ms(call, repeats):
    """The median time of a call in milliseconds, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def time_mlx(arrays, options, repeats):
    """Forward, and forward with all gradients, in milliseconds."""
    arrays = [mx.array(array) for array in arrays]
    mx.eval(arrays)
    loss = lambda *arrays: deform_conv2d(*arrays, **options).sum()  # noqa: E731
    both = mx.value_and_grad(loss, argnums=(0, 1, 2))
    return (
        median_ms(lambda: mx.eval(deform_conv2d(*arrays, **options)), repeats),
        median_ms(lambda: mx.eval(both(*arrays)), repeats),
    )


def time_torchvision(arrays, options, repeats):
    """The same on torchvision, with its layouts: channels first."""
    import torch
    from torchvision.ops import deform_conv2d as peer

    cuda = torch.cuda.is_available() and mx.default_device() == mx.gpu
    device = "cuda" if cuda else "cpu"
    wait = torch.cuda.synchronize if cuda else lambda: None
    tensors = [
        torch.from_numpy(np.moveaxis(array, -1, 1).copy()).to(device).requires_grad_()
        for array in arrays
    ]

    def forward():
        with torch.no_grad():
            peer(*tensors, **options)
        wait()

    def both():
        torch.autograd.grad(peer(*tensors, **options).sum(), tensors)
        wait()

    name = torch.cuda.get_device_name() if cuda else f"the CPU, {torch.get_num_threads()} threads"
    return name, median_ms(forward, repeats), median_ms(both, repeats)


def print_timings(picture, warp, repeats):
    device = mx.default_device()
    name = mx.device_info(device).get("device_name", "unknown")
    print(f"device   {device.type.name}: {name}")
    channels = 64
    height, width = picture.shape[0] // 4, picture.shape[1] // 4
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, height, width, channels), np.float32)
    weight = rng.standard_normal((channels, KERNEL, KERNEL, channels), np.float32)
    offset = lens_offsets(height, width, 1, 0.5)
    cases = {
        "photograph": ((picture[None], warp.offset, warp.weight), warp.dilation),
        "feature map": ((features, offset, weight), 1),
    }
    for title, (arrays, dilation) in cases.items():
        options = {"padding": dilation, "dilation": dilation}
        forward, both = time_mlx(arrays, options, repeats)
        _, height, width, inputs = arrays[0].shape
        what = f"{title}, {height} x {width} x {inputs}, 3x3 to {arrays[2].shape[0]} channels"
        print(f"timed    {what}, median of {repeats}:")
        print(f"         mlx_deform   {forward:8.2f} ms forward {both:8.2f} ms with gradients")
        try:
            where, peer_forward, peer_both = time_torchvision(arrays, options, repeats)
        except ImportError:
            print("         torchvision  not installed")
            continue
        print(
            f"         torchvision  {peer_forward:8.2f} ms forward {peer_both:8.2f} ms with "
            f"gradients ({where})\n         ratio        {peer_forward / forward:8.1f} x"
            f"          {peer_both / both:8.1f} x"
        )


def with_grid(picture, lines=12):
    """The picture with thin white lines over it, so that a warp shows."""
    step = max(4, max(picture.shape) // lines)
    lined = picture.copy()
    for line in range(step // 2, picture.shape[0], step):
        lined[line] = 0.35 * lined[line] + 0.65
    for line in range(step // 2, picture.shape[1], step):
        lined[:, line] = 0.35 * lined[:, line] + 0.65
    return lined


def draw_samples(axes, picture, dilation, offset, positions):
    """The points that the kernel samples at some output positions, over the picture."""
    axes.imshow(0.55 + 0.45 * picture)
    colors = matplotlib.colormaps["Dark2"].colors
    for (y, x), color in zip(positions, colors, strict=False):
        i, j = np.divmod(np.arange(KERNEL * KERNEL), KERNEL)
        base_y, base_x = y + (i - 1) * dilation, x + (j - 1) * dilation
        dy, dx = offset[0, y, x].reshape(-1, 2).T
        for k in np.flatnonzero(np.hypot(dy, dx) > 0.5):
            ends = [base_x[k], base_x[k] + dx[k]], [base_y[k], base_y[k] + dy[k]]
            axes.plot(*ends, color=color, linewidth=1)
            axes.plot(base_x[k], base_y[k], ".", color=color, markersize=3)
        axes.plot(base_x + dx, base_y + dy, "o", color=color, markeredgecolor="white", markersize=6)
        axes.plot(x, y, "s", color="none", markeredgecolor="black", markersize=11)


def draw(picture, warp, out):
    height, width, _ = picture.shape
    lined = with_grid(picture)
    warped = np.clip(np.array(warp(lined)), 0, 1)
    shares = [(0.26, 0.24), (0.3, 0.76), (0.52, 0.47), (0.78, 0.26), (0.74, 0.74)]
    positions = [(int(y * height), int(x * width)) for y, x in shares]

    figure = Figure(figsize=(11, 11 * height / width + 0.7), layout="constrained", dpi=110)
    (ordinary, deformable), (before, after) = figure.subplots(2, 2)
    still = np.zeros_like(warp.offset)
    draw_samples(ordinary, picture, warp.dilation, still, positions)
    draw_samples(deformable, picture, warp.dilation, warp.offset, positions)
    before.imshow(lined)
    after.imshow(warped)
    ordinary.set_title(f"An ordinary 3x3 kernel (dilation {warp.dilation}) samples a fixed grid")
    deformable.set_title("A deformable one moves each sample by its offset")
    before.set_title("Input")
    after.set_title("deform_conv2d: lens offsets, one-hot kernel")
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    figure.savefig(out, format="png")


def run(picture, out, size, strength, repeats):
    """Returns whether the op agrees with the reference."""
    if not out.parent.is_dir():
        raise OSError(f"{out}: there is no folder {out.parent}")
    # The check is for float32; MLX's products on a GPU default to TF32.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    picture = load_picture(picture, size)
    warp = Warp(picture, strength)
    agrees = warp.check()
    print_timings(picture, warp, repeats)
    draw(picture, warp, out)
    print(f"saved    {out}")
    return agrees
