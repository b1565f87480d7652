"""Attention among tokens, and where the tokens of a map are."""

import functools

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import activation


class SelfAttention(nn.Module):
    """Attention of every token to every other; positions tell queries and keys apart.

    "Attention Is All You Need", arXiv:1706.03762, section 3.2.2, with positions as in DETR.
    """

    def __init__(self, dims: int, num_heads: int):
        super().__init__()
        if dims % num_heads:
            raise ValueError(
                f"[SelfAttention] dims must be divisible by num_heads; got {dims} and {num_heads}"
            )
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims)
        self.v_proj = nn.Linear(dims, dims)
        self.out_proj = nn.Linear(dims, dims)
        self._num_heads = num_heads

    def __call__(
        self,
        x: mx.array,
        positions: mx.array | None = None,
        blocked: mx.array | None = None,
    ) -> mx.array:
        """x: (N, Q, dims). positions: added to queries and keys, broadcast to x. blocked: boolean,
        (Q, Q) or broadcast to (N, heads, Q, Q), True where a query (row) may not see a key."""
        placed = x if positions is None else x + positions
        q, k, v = (
            self._split(project(source))
            for project, source in (
                (self.q_proj, placed),
                (self.k_proj, placed),
                (self.v_proj, x),
            )
        )
        visible = None if blocked is None else mx.logical_not(blocked)
        scale = q.shape[-1] ** -0.5
        heads = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible)
        return self.out_proj(heads.swapaxes(1, 2).reshape(x.shape))

    def _split(self, x: mx.array) -> mx.array:
        """(N, Q, dims) to (N, heads, Q, dims / heads)."""
        N, Q, _ = x.shape
        return x.reshape(N, Q, self._num_heads, -1).swapaxes(1, 2)


class PostNormLayer(nn.Module):
    """What layers of encoder and decoder share: two linear layers with a residual around them.

    Args:
        dims (int): Channels of a token.
        hidden_dims (int): Channels between the two layers.
        act (str): The activation between them.
        dropout (float): Of what a residual is added to, in training.
        activation_dropout (float): Of the channels between, in training.
        eps (float): Of the layer normalisation.
    """

    def __init__(
        self,
        dims: int,
        hidden_dims: int,
        act: str,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self.final_layer_norm = nn.LayerNorm(dims, eps)
        self._activation = activation(act)
        self.dropout = nn.Dropout(dropout)
        self.activation_dropout = nn.Dropout(activation_dropout)

    def feed_forward(self, x: mx.array) -> mx.array:
        hidden = self.activation_dropout(self._activation(self.fc1(x)))
        return self.final_layer_norm(x + self.dropout(self.fc2(hidden)))


class EncoderLayer(PostNormLayer):
    """Self-attention and a feed-forward network, each normalised after its residual."""

    def __init__(self, dims: int, num_heads: int, hidden_dims: int, act: str, **settings):
        super().__init__(dims, hidden_dims, act, **settings)
        self.self_attn = SelfAttention(dims, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(dims, settings.get("eps", 1e-5))

    def __call__(self, x: mx.array, positions: mx.array | None = None) -> mx.array:
        attended = self.dropout(self.self_attn(x, positions))
        return self.feed_forward(self.self_attn_layer_norm(x + attended))


@functools.lru_cache(maxsize=32)
def _sine_positions(height: int, width: int, dims: int, temperature: float) -> np.ndarray:
    if dims % 4:
        raise ValueError(f"[sine_positions] dims must be divisible by 4; got {dims}")
    frequencies = temperature ** -(np.arange(dims // 4) / (dims // 4))
    rows, columns = np.indices((height, width)).reshape(2, -1, 1) * frequencies
    parts = [np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def sine_positions(height: int, width: int, dims: int, temperature: float = 10000.0) -> mx.array:
    """Where the pixels of a map are, as sines and cosines of their row and column.

    Returns:
        array: Of shape ``(height * width, dims)``: a quarter of the channels each for the sine
        and cosine of the row and of the column, with frequencies ``temperature ** -(i / n)``.
    """
    return mx.array(_sine_positions(height, width, dims, temperature))
