"""The network and its training: RT-DETRv2, small, with deformable or fixed sampling."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ....nn import MultiScaleDeformableAttention
from ....nn.ordinary import use_fast_products
from ..backbones.resnet import ResNetConfig
from ..losses import criterion_of, denoising_queries
from ..outputs import Target
from ..preprocessing import ImageProcessor
from ..rt_detr import RTDETR
from ..rt_detr_config import RTDETRv2Config
from .scenes import CLASSES, SIDE, Scenes, pixels_of

KINDS = ("deformable", "fixed")
CONFIG = RTDETRv2Config(
    backbone_config=ResNetConfig(
        embedding_size=16,
        hidden_sizes=(16, 32, 64),
        depths=(1, 1, 1),
        layer_type="basic",
        out_indices=(2, 3),
    ),
    freeze_backbone_batch_norms=False,
    id2label=dict(enumerate(CLASSES)),
    initializer_bias_prior_prob=0.05,
    num_feature_levels=2,
    feat_strides=(8, 16),
    encode_proj_layers=(1,),
    num_queries=10,
    num_denoising=40,
    d_model=64,
    encoder_in_channels=(32, 64),
    encoder_hidden_dim=48,
    encoder_ffn_dim=128,
    encoder_attention_heads=4,
    hidden_expansion=0.5,
    decoder_in_channels=(48, 48),
    decoder_layers=3,
    decoder_ffn_dim=128,
    decoder_attention_heads=4,
    # Names are learned later than boxes: they count for more than in the published recipes.
    matcher_class_cost=3.0,
    weight_loss_vfl=2.5,
)
CLIP = 1.0  # of the gradient's norm
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Recipe:
    """How long to train, and how."""

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 2e-3


def network(kind: str, seed: int) -> RTDETR:
    """A new network.

    kind: "deformable", or "fixed", which samples the centres of the boxes alone: its offsets are
    zero and stay so. The other weights of a seed are the same.
    """
    mx.random.seed(seed)
    model = RTDETR(CONFIG)
    model.processor = ImageProcessor(size={"height": SIDE, "width": SIDE})
    if kind == "fixed":
        for module in model.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                predictor = module.sampling_offsets
                predictor.update({k: mx.zeros_like(v) for k, v in predictor.parameters().items()})
                predictor.freeze()
    use_fast_products(model)
    mx.eval(model.parameters())
    return model


def count(model: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def make_optimizer(recipe: Recipe) -> optim.Optimizer:
    warm_up = max(1, recipe.steps // 20)
    rising = optim.linear_schedule(0, recipe.learning_rate, warm_up)
    falling = optim.cosine_decay(recipe.learning_rate, max(1, recipe.steps - warm_up))
    schedule = optim.join_schedules([rising, falling], [warm_up])
    return optim.AdamW(schedule, [0.9, 0.99], weight_decay=WEIGHT_DECAY, bias_correction=True)


class FlatOptimizer:
    """An optimizer of all trainable parameters joined to one vector, with gradients clipped.

    Hundreds of small arrays would cost more in calls than in arithmetic.
    """

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, clip: float):
        self.optimizer = optimizer
        self.clip = clip
        self.names, arrays = zip(*tree_flatten(model.trainable_parameters()), strict=True)
        self.shapes = [array.shape for array in arrays]
        self.ends = np.cumsum([array.size for array in arrays]).tolist()
        self.vector = self.join(arrays)

    @staticmethod
    def join(arrays: Iterable[mx.array]) -> mx.array:
        return mx.concatenate([array.flatten() for array in arrays])

    def update(self, model: nn.Module, gradients: dict) -> None:
        """A step, evaluated."""
        gradients = dict(tree_flatten(gradients))
        gradient = self.join(gradients[name] for name in self.names)
        scale = mx.minimum(self.clip / (mx.linalg.norm(gradient) + 1e-6), 1)
        self.vector = self.optimizer.apply_gradients(
            {"all": scale * gradient}, {"all": self.vector}
        )["all"]
        mx.eval(self.vector, self.optimizer.state)
        parts = mx.split(self.vector, self.ends[:-1])
        arrays = (part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))
        model.update(tree_unflatten(list(zip(self.names, arrays, strict=True))))


def batches(
    scenes: Scenes, recipe: Recipe, rng: np.random.Generator
) -> Iterator[tuple[mx.array, list[Target]]]:
    """Pixels (N, H, W, 3) in [0, 1] and targets of each step.

    Those of the next step are drawn while this one is computed.
    """

    def draw():
        return [scenes.scene(rng) for _ in range(recipe.batch_size)]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(draw)
        for step in range(recipe.steps):
            drawn = waiting.result()
            if step + 1 < recipe.steps:
                waiting = pool.submit(draw)
            yield pixels_of(drawn), [scene.target for scene in drawn]


def train(
    model: RTDETR,
    scenes: Scenes,
    recipe: Recipe,
    seed: int,
    progress: Callable[[float], None] = lambda loss: None,
) -> None:
    """Trains the model in place, and leaves it in evaluation mode.

    progress: called with the loss after every step.
    """
    rng, noise = np.random.default_rng(seed).spawn(2)
    criterion = criterion_of(model.config)
    optimizer = FlatOptimizer(model, make_optimizer(recipe), CLIP)

    def loss(pixels, targets, queries):
        return criterion(model(pixels, denoising=queries), targets, queries)

    step = nn.value_and_grad(model, loss)
    model.train()
    for pixels, targets in batches(scenes, recipe, rng):
        queries = denoising_queries(targets, model.config, rng=noise)
        (total, _), gradients = step(pixels, targets, queries)
        optimizer.update(model, gradients)
        mx.eval(total, model.parameters())
        progress(total.item())
    model.eval()
