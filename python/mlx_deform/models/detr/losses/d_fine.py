"""D-FINE's criterion: RT-DETR's, and losses of the distributions of the edges."""

import mlx.core as mx

from ..d_fine_layers import bin_distances
from ..outputs import DetectorOutputs, LayerOutputs
from .criterion import RTDETRCriterion, at_places, ious, layer
from .distribution import (
    decoupled_distillation_loss,
    edge_distances,
    fine_grained_localization_loss,
    two_bins,
)
from .matching import Match, Pairs, Prediction, union


def taught(layers: LayerOutputs, i: int) -> Prediction:
    """What the i-th layer predicts, beside what the last one does."""
    last = layers.logits.shape[1] - 1
    prediction = layer(layers, i)
    return prediction if i == last else prediction._replace(teacher=layer(layers, last))


class DFINECriterion(RTDETRCriterion):
    """Of D-FINE (Peng et al., arXiv:2410.13842), as its authors' code has it.

    Beside RT-DETR's losses, the fine-grained localisation loss of every decoder layer, and the
    distillation of the last layer into the others. Boxes and edges of all depths are held to the
    union of the matches of all depths. ``_pre`` marks the boxes before the first layer's
    distributions, ``_enc_0`` the encoder's proposals. Distillation weighs matched and other
    queries by the roots of their numbers; those of denoising queries are their own, as in
    ``transformers``.

    Args:
        config: D-FINE's configuration.
        as_transformers (bool): ``transformers`` counts the prediction before the first layer
            among the layers, so that from there on corners are paired with the logits and boxes
            of the layer before; matches every depth by itself for boxes too; and has no loss of
            the last layer's corners. True does the same, to compare.
    """

    def __init__(self, config, as_transformers: bool = False):
        super().__init__(config)
        self.weights |= {"fgl": config.weight_loss_fgl, "ddf": config.weight_loss_ddf}
        self.as_transformers = as_transformers
        self.reg_scale = config.reg_scale
        self.distances = bin_distances(config.max_num_bins, config.up, config.reg_scale)

    def matched(self, outputs: DetectorOutputs) -> dict[str, Prediction]:
        layers = outputs.layers
        last = layers.logits.shape[1] - 1
        if self.as_transformers:
            predictions = {"": Prediction(*layer(layers, last)[:2])}
            if self.auxiliary_loss:
                shifted = self._shifted(layers, outputs.initial)
                predictions |= {f"_aux_{i}": shifted[i] for i in range(last)}
                predictions[f"_aux_{last}"] = Prediction(*outputs.encoder)
        else:
            predictions = {"": taught(layers, last)}
            if self.auxiliary_loss:
                predictions |= {f"_aux_{i}": taught(layers, i) for i in range(last)}
                if outputs.initial is not None:
                    predictions["_pre"] = layer(outputs.initial, 0)
                if outputs.encoder is not None:
                    predictions["_enc_0"] = Prediction(*outputs.encoder)
        return self._clamped(predictions)

    def box_matches(self, matches: dict[str, list[Match]]) -> list[Match] | None:
        return None if self.as_transformers else union(list(matches.values()))

    def repaired(self, outputs: DetectorOutputs) -> dict[str, Prediction]:
        layers = outputs.denoising
        count = layers.logits.shape[1]
        if self.as_transformers:
            shifted = self._shifted(layers, outputs.initial_denoising)
            return self._clamped({f"_dn_{i}": shifted[i] for i in range(count)})
        predictions = {f"_dn_{i}": taught(layers, i) for i in range(count)}
        if outputs.initial_denoising is not None:
            predictions["_dn_pre"] = layer(outputs.initial_denoising, 0)
        return self._clamped(predictions)

    @staticmethod
    def _shifted(layers: LayerOutputs, initial: LayerOutputs) -> list[Prediction]:
        """Each layer's corners beside the logits and boxes of what came before it."""
        before = [layer(initial, 0), *(layer(layers, i) for i in range(layers.logits.shape[1]))]
        return [
            taught(layers, i)._replace(logits=before[i].logits, boxes=before[i].boxes)
            for i in range(layers.logits.shape[1])
        ]

    @staticmethod
    def _clamped(predictions: dict[str, Prediction]) -> dict[str, Prediction]:
        """With sizes that aren't negative, which distances of edges may give."""
        return {
            name: prediction._replace(boxes=mx.clip(prediction.boxes, 0, 1))
            for name, prediction in predictions.items()
        }

    def losses(self, prediction: Prediction, pairs: Pairs, box_pairs: Pairs) -> dict[str, mx.array]:
        losses = super().losses(prediction, pairs, box_pairs)
        if prediction.corners is None:
            return losses
        edges = (4, self.distances.size)
        fits = ious(prediction, box_pairs)
        references = mx.stop_gradient(at_places(prediction.references, box_pairs))
        distances = edge_distances(references, box_pairs.boxes, self.reg_scale)
        fgl = fine_grained_localization_loss(
            at_places(prediction.corners, box_pairs).reshape(-1, *edges),
            two_bins(distances, self.distances),
            fits,
        )
        losses["fgl"] = fgl.sum() / box_pairs.count

        if prediction.teacher is not None:
            n, q = prediction.logits.shape[:2]
            places = mx.array(box_pairs.places)
            teacher = prediction.teacher
            weights = mx.sigmoid(teacher.logits.astype(mx.float32)).max(-1).reshape(-1)
            weights[places] = fits
            matched = mx.zeros(n * q, mx.bool_)
            matched[places] = True
            losses["ddf"] = decoupled_distillation_loss(
                prediction.corners.astype(mx.float32).reshape(n, q, *edges),
                teacher.corners.astype(mx.float32).reshape(n, q, *edges),
                weights.reshape(n, q),
                matched.reshape(n, q),
            )
        return losses
