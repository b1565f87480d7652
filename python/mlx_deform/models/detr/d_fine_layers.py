"""The parts of D-FINE that RT-DETR has otherwise: blocks of the encoder, edges as distributions.

"D-FINE: Redefine Regression Task of DETRs as Fine-grained Distribution Refinement",
arXiv:2410.13842; github.com/Peterande/D-FINE.
"""

import mlx.core as mx
import mlx.nn as nn

from .boxes import to_centres
from .config import HybridConfig
from .d_fine_config import DFINEConfig
from .hybrid_encoder import CSPRepLayer, HybridEncoder
from .layers import MLP, ConvNorm, chain


class RepNCSPELAN4(nn.Module):
    """Half of the channels go on through two CSP layers; every stage is kept and fused.

    The GELAN block of YOLOv9 (arXiv:2402.13616).
    """

    def __init__(self, config: DFINEConfig):
        super().__init__()
        C, act, eps = config.encoder_hidden_dim, "silu", config.batch_norm_eps
        hidden = round(config.hidden_expansion * C // 2)
        blocks = round(3 * config.depth_mult)
        inner = config.activation_function
        self.conv1 = ConvNorm(2 * C, 2 * C, 1, act=act, eps=eps)
        self.csp_rep1 = CSPRepLayer(C, hidden, hidden, blocks, inner, eps)
        self.conv2 = ConvNorm(hidden, hidden, 3, act=act, eps=eps)
        self.csp_rep2 = CSPRepLayer(hidden, hidden, hidden, blocks, inner, eps)
        self.conv3 = ConvNorm(hidden, hidden, 3, act=act, eps=eps)
        self.conv4 = ConvNorm(2 * C + 2 * hidden, C, 1, act=act, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv1(x)
        _, half = mx.split(x, 2, axis=-1)
        first = chain((self.csp_rep1, self.conv2), half)
        second = chain((self.csp_rep2, self.conv3), first)
        return self.conv4(mx.concatenate([x, first, second], axis=-1))


class SCDown(nn.Module):
    """Halves a map: channels first, then space ("YOLOv10", arXiv:2405.14458)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 1, eps=eps)
        self.conv2 = ConvNorm(channels, channels, 3, 2, groups=channels, eps=eps)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv2(self.conv1(x))


class DFineEncoder(HybridEncoder):
    """The hybrid encoder with D-FINE's blocks."""

    def lateral(self, config: HybridConfig) -> nn.Module:
        C = config.encoder_hidden_dim
        return ConvNorm(C, C, 1, eps=config.batch_norm_eps)

    def downsampling(self, config: HybridConfig) -> nn.Module:
        return SCDown(config.encoder_hidden_dim, config.batch_norm_eps)

    def fusion(self, config: DFINEConfig) -> nn.Module:
        return RepNCSPELAN4(config)


class Gate(nn.Module):
    """A weighted sum of queries and of what they sampled, instead of a residual."""

    def __init__(self, dims: int):
        super().__init__()
        self.gate = nn.Linear(2 * dims, 2 * dims)
        self.norm = nn.LayerNorm(dims)
        # Both halves to begin with.
        self.gate.weight = mx.zeros_like(self.gate.weight)
        self.gate.bias = mx.zeros_like(self.gate.bias)

    def __call__(self, queries: mx.array, sampled: mx.array) -> mx.array:
        gates = mx.sigmoid(self.gate(mx.concatenate([queries, sampled], axis=-1)))
        first, second = mx.split(gates, 2, axis=-1)
        return self.norm(first * queries + second * sampled)


class LocationQuality(nn.Module):
    """What a box's distributions, sharp or flat, say about its score (LQE).

    "Generalized Focal Loss V2", arXiv:2011.12885.
    """

    def __init__(self, config: DFINEConfig):
        super().__init__()
        self._count = config.top_prob_values
        hidden = [config.lqe_hidden_dim] * (config.lqe_layers - 1)
        self.reg_conf = MLP([4 * (self._count + 1), *hidden, 1])
        final = self.reg_conf.layers[-1]
        final.weight, final.bias = mx.zeros_like(final.weight), mx.zeros_like(final.bias)

    def __call__(self, distributions: mx.array, dtype: mx.Dtype) -> mx.array:
        """What to add to the logits, (N, Q, 1), for probabilities (N, Q, 4, bins)."""
        largest = mx.sort(distributions, axis=-1)[..., ::-1][..., : self._count]
        statistics = mx.concatenate([largest, largest.mean(axis=-1, keepdims=True)], axis=-1)
        return self.reg_conf(statistics.flatten(2).astype(dtype))


def bin_distances(max_num_bins: int, up: float | mx.array, reg_scale: float | mx.array) -> mx.array:
    """How far each bin of a distribution moves an edge, the paper's W(n), eq. 5.

    Args:
        max_num_bins (int): The number of bins less one, even.
        up (float or array): The two ends are at ``2 * up * reg_scale``, the next ones at
            ``up * reg_scale``, and from there they near zero geometrically.
        reg_scale (float or array): The curvature: the larger, the flatter in the middle.

    Returns:
        array: float32, of shape ``(max_num_bins + 1,)``, ascending, 0 in the middle.
    """
    bound = mx.abs(mx.array(up, mx.float32) * mx.array(reg_scale, mx.float32)).reshape(1)
    steps = (bound + 1) ** (2 / (max_num_bins - 2))
    right = mx.concatenate([steps ** mx.arange(1, max_num_bins // 2) - 1, 2 * bound])
    return mx.concatenate([-right[::-1], mx.zeros(1), right])


def move_edges(boxes: mx.array, distances: mx.array, reg_scale: mx.array) -> mx.array:
    """Boxes (cx, cy, w, h) with their left, upper, right and lower edge moved outwards.

    Args:
        boxes (array): Of shape ``(..., 4)``.
        distances (array): Of shape ``(..., 4)``, in units of width or height over ``reg_scale``.
        reg_scale (array): Of shape (1,).
    """
    scale = mx.abs(reg_scale.astype(mx.float32))
    centre, unit = boxes[..., :2], boxes[..., 2:] / scale
    low = centre - (scale / 2 + distances[..., :2]) * unit
    high = centre + (scale / 2 + distances[..., 2:]) * unit
    return to_centres(mx.concatenate([low, high], axis=-1))
