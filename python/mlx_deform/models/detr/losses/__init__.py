"""What detectors of the DETR family are trained with: matching, losses, denoising queries.

criterion = criterion_of(model.config)
queries = denoising_queries(targets, model.config)
loss, parts = criterion(model(pixels, denoising=queries), targets, queries)
"""

from .classification import sigmoid_focal_loss, varifocal_loss
from .criterion import Criterion, RTDETRCriterion
from .d_fine import DFINECriterion
from .deformable_detr import DeformableDETRCriterion
from .denoising import Noise, denoising_layout, denoising_queries, draw_noise
from .distribution import decoupled_distillation_loss, fine_grained_localization_loss

__all__ = [
    "Criterion",
    "DFINECriterion",
    "DeformableDETRCriterion",
    "Noise",
    "RTDETRCriterion",
    "criterion_of",
    "decoupled_distillation_loss",
    "denoising_layout",
    "denoising_queries",
    "draw_noise",
    "fine_grained_localization_loss",
    "sigmoid_focal_loss",
    "varifocal_loss",
]


def criterion_of(config, *, as_transformers: bool = False) -> Criterion:
    """The criterion that a configuration's family is trained with.

    Args:
        config: A model's configuration: its model_type, num_labels, costs and weights.
        as_transformers (bool): Leave out and pair what ``transformers`` does, where it differs
            from the authors' code: see :class:`DFINECriterion`, :class:`DeformableDETRCriterion`.

    Returns:
        Criterion: ``criterion(outputs, targets, denoising) -> (total, parts)``.

    Raises:
        ValueError: If there is no such family.
    """
    if config.model_type in ("rt_detr", "rt_detr_v2"):
        return RTDETRCriterion(config)
    if config.model_type == "d_fine":
        return DFINECriterion(config, as_transformers)
    if config.model_type == "deformable_detr":
        return DeformableDETRCriterion(config, as_transformers)
    raise ValueError(
        "[criterion_of] model_type must be rt_detr, rt_detr_v2, d_fine or deformable_detr; got "
        f"{config.model_type}"
    )
