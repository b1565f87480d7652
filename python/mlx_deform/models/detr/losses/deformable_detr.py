"""Deformable DETR's criterion."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..outputs import DenoisingQueries, DetectorOutputs, Target
from .classification import sigmoid_focal_loss
from .criterion import Criterion, box_losses, layer, one_hot
from .matching import MatchingCosts, Pairs, Prediction, match, pairs_of


class DeformableDETRCriterion(Criterion):
    """Of Deformable DETR (Zhu et al., arXiv:2010.04159), as its authors' code has it.

    Focal loss of the classes, L1 and GIoU of the boxes, of the last layer and, with
    ``config.auxiliary_loss``, of all. In two stages the encoder's proposals, all of them, are
    held to the objects too, whatever their class: the first class stands for any; ``_enc``
    marks these losses.

    Args:
        config: Deformable DETR's configuration.
        as_transformers (bool): Without the proposals' loss, as in ``transformers``, where
            nothing teaches the first stage.
    """

    def __init__(self, config, as_transformers: bool = False):
        super().__init__(
            config.num_labels,
            MatchingCosts(config.class_cost, config.bbox_cost, config.giou_cost),
            {
                "ce": 1.0,
                "bbox": config.bbox_loss_coefficient,
                "giou": config.giou_loss_coefficient,
            },
            config.auxiliary_loss,
        )
        self.alpha = config.focal_alpha
        self.as_transformers = as_transformers

    def matched(self, outputs: DetectorOutputs) -> dict[str, Prediction]:
        last = outputs.layers.logits.shape[1] - 1
        predictions = {"": layer(outputs.layers, last)}
        if self.auxiliary_loss:
            predictions |= {f"_{i}": layer(outputs.layers, i) for i in range(last)}
        return predictions

    def supervised(
        self,
        outputs: DetectorOutputs,
        targets: list[Target],
        denoising: DenoisingQueries | None,
    ) -> Iterator[tuple[str, Prediction, Pairs, Pairs]]:
        yield from super().supervised(outputs, targets, denoising)
        if outputs.encoder is None or self.as_transformers:
            return
        proposals = Prediction(*outputs.encoder)
        anything = [Target(np.zeros_like(labels), boxes) for labels, boxes in targets]
        matches = match({"_enc": proposals}, anything, self.costs)["_enc"]
        count = sum(len(target.labels) for target in targets)
        pairs = pairs_of(matches, anything, proposals.logits.shape[1], count)
        yield "_enc", proposals, pairs, pairs

    def losses(self, prediction: Prediction, pairs: Pairs, box_pairs: Pairs) -> dict[str, mx.array]:
        loss = sigmoid_focal_loss(
            prediction.logits.astype(mx.float32), one_hot(prediction, pairs), self.alpha
        )
        return {"ce": loss.sum() / pairs.count} | box_losses(prediction, box_pairs)
