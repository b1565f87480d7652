"""The loss of a training step: predictions of all depths against the objects of a batch."""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..boxes import generalized_iou, iou, to_corners
from ..outputs import DenoisingQueries, DetectorOutputs, LayerOutputs, Target
from .classification import varifocal_loss
from .denoising import denoising_matches
from .matching import Match, MatchingCosts, Pairs, Prediction, check_targets, match, pairs_of


def at_places(x: mx.array, pairs: Pairs) -> mx.array:
    """Of an array (N, Q, ...), what stands at the pairs' places, (M, ...), in float32."""
    return x.reshape(-1, *x.shape[2:])[mx.array(pairs.places)].astype(mx.float32)


def ious(prediction: Prediction, pairs: Pairs) -> mx.array:
    """How well the boxes of the pairs fit: (M,), without gradient."""
    boxes = mx.stop_gradient(at_places(prediction.boxes, pairs))
    return iou(to_corners(boxes), to_corners(pairs.boxes))


def one_hot(prediction: Prediction, pairs: Pairs) -> mx.array:
    """(N, Q, classes): 1 where a query is held to an object of the class, else 0."""
    n, q, classes = prediction.logits.shape
    targets = mx.zeros((n * q, classes))
    targets[mx.array(pairs.places), mx.array(pairs.labels)] = 1.0
    return targets.reshape(n, q, classes)


def box_losses(prediction: Prediction, pairs: Pairs) -> dict[str, mx.array]:
    """L1 distance and 1 - GIoU of the paired boxes, summed, over the pairs' count.

    DETR, arXiv:2005.12872; GIoU, arXiv:1902.09630.
    """
    boxes = at_places(prediction.boxes, pairs)
    giou = generalized_iou(to_corners(boxes), to_corners(pairs.boxes))
    return {
        "bbox": mx.abs(boxes - pairs.boxes).sum() / pairs.count,
        "giou": (1 - giou).sum() / pairs.count,
    }


def layer(outputs: LayerOutputs, i: int) -> Prediction:
    """What the i-th decoder layer predicts."""
    return Prediction(
        *(
            None if x is None else x[:, i]
            for x in (outputs.logits, outputs.boxes, outputs.corners, outputs.references)
        )
    )


class Criterion:
    """Sums the losses of every depth of a detector, each matched with the objects by itself.

    Made by :func:`criterion_of`; a family says what is supervised and by which losses.

    Args:
        num_labels (int): The number of classes.
        costs (MatchingCosts): The weights of the matching.
        weights (dict): The weights of the losses, by name.
        auxiliary_loss (bool): Whether other depths than the last layer are supervised.
    """

    def __init__(
        self,
        num_labels: int,
        costs: MatchingCosts,
        weights: dict[str, float],
        auxiliary_loss: bool = True,
    ):
        self.num_labels = num_labels
        self.costs = costs
        self.weights = weights
        self.auxiliary_loss = auxiliary_loss

    def __call__(
        self,
        outputs: DetectorOutputs,
        targets: Sequence[Target],
        denoising: DenoisingQueries | None = None,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss of a batch, and its parts.

        Works inside ``mx.value_and_grad``; the matching is evaluated there, once. It can't be
        part of an ``mx.compile``.

        Args:
            outputs (DetectorOutputs): What the model gave in training.
            targets (list(Target)): The objects of each of the N pictures; there may be none.
            denoising (DenoisingQueries, optional): What the model was given.

        Returns:
            tuple(array, dict): The total and its weighted parts, named as ``transformers`` names
            them: ``loss_bbox`` of the last layer, ``loss_bbox_aux_0`` of the first. All float32.

        Raises:
            ValueError: If predictions aren't finite, targets aren't as :class:`Target` says, or
                denoising queries are missing.

        Example:
            >>> def loss(pixels, targets, queries):
            ...     return criterion(model(pixels, denoising=queries), targets, queries)
            >>> step = nn.value_and_grad(model, loss)
            >>> (total, parts), gradients = step(pixels, targets, queries)
        """
        if len(targets) != outputs.logits.shape[0]:
            raise ValueError(
                f"[criterion] targets must be of the {outputs.logits.shape[0]} pictures of the "
                f"outputs; got {len(targets)}"
            )
        targets = check_targets(targets, self.num_labels)
        parts = {}
        for suffix, prediction, pairs, box_pairs in self.supervised(outputs, targets, denoising):
            for name, loss in self.losses(prediction, pairs, box_pairs).items():
                parts[f"loss_{name}{suffix}"] = self.weights[name] * loss
        return sum(parts.values()), parts

    def supervised(
        self,
        outputs: DetectorOutputs,
        targets: list[Target],
        denoising: DenoisingQueries | None,
    ) -> Iterator[tuple[str, Prediction, Pairs, Pairs]]:
        """Suffix, prediction, its pairs for the classes and its pairs for the boxes, in turn."""
        count = sum(len(target.labels) for target in targets)
        predictions = self.matched(outputs)
        matches = match(predictions, targets, self.costs)
        box_matches = self.box_matches(matches)
        for suffix, prediction in predictions.items():
            queries = prediction.logits.shape[1]
            pairs = pairs_of(matches[suffix], targets, queries, count)
            box_pairs = pairs
            if box_matches is not None:
                number = sum(len(taken) for _, taken in box_matches)
                box_pairs = pairs_of(box_matches, targets, queries, number)
            yield suffix, prediction, pairs, box_pairs

        if outputs.denoising is None or not self.auxiliary_loss:
            return
        if denoising is None:
            raise ValueError(
                "[criterion] outputs of denoising queries need the queries that the model was "
                "given; got None"
            )
        copied = denoising_matches(denoising, targets)
        for suffix, prediction in self.repaired(outputs).items():
            queries = prediction.logits.shape[1]
            pairs = pairs_of(copied, targets, queries, max(count, 1) * denoising.groups)
            yield suffix, prediction, pairs, pairs

    def matched(self, outputs: DetectorOutputs) -> dict[str, Prediction]:
        """What is matched with the objects, by the suffix of its losses."""
        last = outputs.layers.logits.shape[1] - 1
        predictions = {"": layer(outputs.layers, last)}
        if self.auxiliary_loss:
            predictions |= {f"_aux_{i}": layer(outputs.layers, i) for i in range(last)}
            if outputs.encoder is not None:
                predictions[f"_aux_{last}"] = Prediction(*outputs.encoder)
        return predictions

    def box_matches(self, matches: dict[str, list[Match]]) -> list[Match] | None:
        """The matches of the losses of boxes; None if they are those of the classes."""
        return None

    def repaired(self, outputs: DetectorOutputs) -> dict[str, Prediction]:
        """What was made of the denoising queries, by the suffix of its losses."""
        layers = outputs.denoising
        return {f"_dn_{i}": layer(layers, i) for i in range(layers.logits.shape[1])}

    def losses(self, prediction: Prediction, pairs: Pairs, box_pairs: Pairs) -> dict[str, mx.array]:
        """The losses of one prediction by name, without their weights."""
        raise NotImplementedError


class RTDETRCriterion(Criterion):
    """Of RT-DETR (Zhao et al., arXiv:2304.08069) and RT-DETRv2 (arXiv:2407.17140).

    Varifocal loss of the classes, L1 and GIoU of the boxes: of every decoder layer, of the
    encoder's proposals, and of the denoising queries.
    """

    def __init__(self, config):
        super().__init__(
            config.num_labels,
            MatchingCosts(
                config.matcher_class_cost,
                config.matcher_bbox_cost,
                config.matcher_giou_cost,
                config.matcher_alpha,
                config.matcher_gamma,
                config.use_focal_loss,
            ),
            {
                "vfl": config.weight_loss_vfl,
                "bbox": config.weight_loss_bbox,
                "giou": config.weight_loss_giou,
            },
            config.auxiliary_loss,
        )
        self.alpha = config.focal_loss_alpha
        self.gamma = config.focal_loss_gamma

    def losses(self, prediction, pairs, box_pairs):
        logits = prediction.logits.astype(mx.float32)
        targets = one_hot(prediction, pairs)
        fits = mx.zeros(logits.shape[0] * logits.shape[1])
        fits[mx.array(pairs.places)] = ious(prediction, pairs)
        scores = targets * fits.reshape(*logits.shape[:2], 1)
        loss = varifocal_loss(logits, scores, targets, self.alpha, self.gamma)
        return {"vfl": loss.sum() / pairs.count} | box_losses(prediction, box_pairs)
