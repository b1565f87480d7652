"""The losses of the DETR family against transformers', in float64; values and gradients."""

import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from transformers import DeformableDetrConfig, DFineConfig, ResNetConfig, RTDetrConfig
from transformers.loss import loss_d_fine, loss_deformable_detr, loss_rt_detr
from transformers.loss.loss_for_object_detection import sigmoid_focal_loss as tf_focal
from transformers.models.d_fine import modeling_d_fine
from transformers.models.rt_detr import modeling_rt_detr

from detr_loss_cases import (
    BINS,
    CASES,
    CLASSES,
    GROUPS,
    LAYERS,
    copies_of,
    gradients_of,
    labels_of,
    leaves,
    meta_of,
    noise_for,
    outputs_of,
    patched_distances,
    patched_noise,
    random_arrays,
    random_boxes,
    run_criterion,
    targets_of,
)
from mlx_deform.models.detr.d_fine_layers import bin_distances
from mlx_deform.models.detr.losses import (
    criterion_of,
    denoising_layout,
    denoising_queries,
    sigmoid_focal_loss,
)
from mlx_deform.models.detr.losses.distribution import edge_distances, two_bins
from mlx_deform.models.detr.losses.matching import Prediction, match, union
from mlx_deform.models.detr.outputs import Target
from numerics import EPS

# Roundings of float32 in the longest chains: a GIoU's quotients, and sums over a batch.
ROUNDINGS = 64


def assert_close(actual, expected, what="", roundings=ROUNDINGS):
    """Equal within so many roundings of float32 at the largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    bound = roundings * EPS["float32"] * max(np.abs(expected).max(initial=0), 1e-3)
    error = np.abs(actual - expected).max(initial=0)
    assert error <= bound, f"{what}: {error} > {bound}"


def rt_detr_config(**options):
    # Weights unlike each other and unlike the defaults, so that none can be mistaken for another.
    settings = {
        "num_labels": CLASSES,
        "matcher_alpha": 0.3,
        "matcher_gamma": 1.5,
        "matcher_class_cost": 2.1,
        "matcher_bbox_cost": 4.9,
        "matcher_giou_cost": 1.7,
        "focal_loss_alpha": 0.7,
        "focal_loss_gamma": 1.8,
        "weight_loss_vfl": 1.1,
        "weight_loss_bbox": 5.3,
        "weight_loss_giou": 2.3,
    }
    return RTDetrConfig(**settings | options)


def d_fine_config(**options):
    settings = {
        "num_labels": CLASSES,
        "max_num_bins": BINS,
        "reg_scale": 3.0,
        "up": 0.6,
        "weight_loss_fgl": 0.17,
        "weight_loss_ddf": 1.3,
    }
    return DFineConfig(**settings | options)


def deformable_detr_config(**options):
    settings = {
        "num_labels": CLASSES,
        "auxiliary_loss": True,
        "decoder_layers": LAYERS,
        "class_cost": 2,
        "bbox_cost": 5,
        "giou_cost": 3,
        "bbox_loss_coefficient": 7,
        "giou_loss_coefficient": 3,
        "focal_alpha": 0.3,
        "backbone_config": ResNetConfig(),
    }
    return DeformableDetrConfig(**settings | options)


@pytest.fixture
def distances_in_float32(monkeypatch):
    patched_distances(monkeypatch)


def check(actual, total, parts, gradients):
    """A criterion's results, `actual`, against transformers'."""
    assert_close(actual[0], total, "total")
    assert actual[1].keys() == parts.keys()
    for name, part in parts.items():
        assert_close(actual[1][name], part, name)
    for name, gradient in gradients.items():
        assert_close(actual[2][name], gradient, f"gradient of {name}")


# ---------------------------------------------------------------------------
# Whole criteria


@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary", "last"])
@pytest.mark.parametrize("denoising", [True, False], ids=["denoising", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_rt_detr_is_transformers(case, denoising, auxiliary):
    counts, queries = CASES[case]
    denoising = denoising and max(counts) > 0
    rng = np.random.default_rng(1)
    targets = targets_of(counts, rng)
    arrays, copies = random_arrays(counts, queries, rng, denoising=denoising)
    config = rt_detr_config(auxiliary_loss=auxiliary)
    noisy = copies_of(targets, copies) if denoising else None

    x = leaves(arrays)
    total, parts, _ = loss_rt_detr.RTDetrForObjectDetectionLoss(
        x["logits"][:, -1],
        labels_of(targets),
        "cpu",
        x["boxes"][:, -1],
        config,
        x["logits"],
        x["boxes"],
        enc_topk_logits=x["encoder_logits"],
        enc_topk_bboxes=x["encoder_boxes"],
        denoising_meta_values=meta_of(noisy, copies, queries) if denoising else None,
    )
    actual = run_criterion(criterion_of(config), arrays, copies, targets, noisy)
    check(actual, total.item(), {k: v.item() for k, v in parts.items()}, gradients_of(total, x))


def test_softmax_cost_is_transformers():
    counts, queries = CASES["unequal"]
    rng = np.random.default_rng(2)
    targets = targets_of(counts, rng)
    arrays, _ = random_arrays(counts, queries, rng, denoising=False)
    config = rt_detr_config(use_focal_loss=False)
    outputs = {
        "logits": torch.tensor(arrays["encoder_logits"], dtype=torch.float64),
        "pred_boxes": torch.tensor(arrays["encoder_boxes"], dtype=torch.float64),
    }
    expected = loss_rt_detr.RTDetrHungarianMatcher(config)(outputs, labels_of(targets))
    prediction = Prediction(mx.array(arrays["encoder_logits"]), mx.array(arrays["encoder_boxes"]))
    actual = match({"": prediction}, targets, criterion_of(config).costs)[""]
    for (queries, objects), (tf_queries, tf_objects) in zip(actual, expected, strict=True):
        assert queries.tolist() == tf_queries.tolist()
        assert objects.tolist() == tf_objects.tolist()


@pytest.mark.usefixtures("distances_in_float32")
@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary", "last"])
@pytest.mark.parametrize("denoising", [True, False], ids=["denoising", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_d_fine_is_transformers(case, denoising, auxiliary):
    counts, queries = CASES[case]
    denoising = denoising and max(counts) > 0
    rng = np.random.default_rng(3)
    targets = targets_of(counts, rng)
    arrays, copies = random_arrays(counts, queries, rng, corners=True, denoising=denoising)
    config = d_fine_config(auxiliary_loss=auxiliary)
    noisy = copies_of(targets, copies) if denoising else None

    x = leaves(arrays)
    logits = torch.cat([x["initial_logits"], x["logits"]], 1)
    boxes = torch.cat([x["initial_boxes"], x["boxes"]], 1)
    total, parts, _ = loss_d_fine.DFineForObjectDetectionLoss(
        logits[:, -1],
        labels_of(targets),
        "cpu",
        boxes[:, -1],
        config,
        logits,
        boxes,
        enc_topk_logits=x["encoder_logits"],
        enc_topk_bboxes=x["encoder_boxes"],
        denoising_meta_values=meta_of(noisy, copies, queries) if denoising else None,
        predicted_corners=x["corners"],
        initial_reference_points=x["references"],
    )
    parts = {name: part.item() for name, part in parts.items()}
    last = f"loss_ddf_dn_{LAYERS - 1}"  # of the teacher with itself
    assert parts.pop(last, 0) == 0
    criterion = criterion_of(config, as_transformers=True)
    actual = run_criterion(criterion, arrays, copies, targets, noisy)
    check(actual, total.item(), parts, gradients_of(total, x))


def united(matchings):
    """The union of matches, slowly: each query's most frequent object, by tensors' indices."""
    results = []
    for matches in zip(*matchings, strict=True):
        queries = torch.cat([queries for queries, _ in matches]).tolist()
        objects = torch.cat([objects for _, objects in matches]).tolist()
        pairs = list(zip(queries, objects, strict=True))
        chosen = {}
        for query in sorted(set(queries)):
            candidates = sorted(thing for q, thing in pairs if q == query)
            chosen[query] = max(candidates, key=lambda thing: pairs.count((query, thing)))
        results.append(
            (torch.tensor(list(chosen)).long(), torch.tensor(list(chosen.values())).long())
        )
    return results


@pytest.mark.usefixtures("distances_in_float32")
@pytest.mark.parametrize("case", CASES)
def test_d_fine_is_its_paper(case):
    """The published pairing, put together of the losses of transformers' criterion."""
    counts, queries = CASES[case]
    denoising = max(counts) > 0
    rng = np.random.default_rng(4)
    targets = targets_of(counts, rng)
    arrays, copies = random_arrays(counts, queries, rng, corners=True, denoising=denoising)
    config = d_fine_config()
    noisy = copies_of(targets, copies) if denoising else None
    labels, x = labels_of(targets), leaves(arrays)
    criterion = loss_d_fine.DFineLoss(config)

    def depth(i, part, prefix="", teacher=True):
        outputs = {
            "logits": x[f"{prefix}logits"][:, i, part],
            "pred_boxes": x[f"{prefix}boxes"][:, i, part].clamp(0, 1),
        }
        if not prefix:
            outputs |= {
                "pred_corners": x["corners"][:, i, part],
                "ref_points": x["references"][:, i, part],
                # A layer's own corners as its teacher's give no loss.
                "teacher_corners": x["corners"][:, -1 if teacher else i, part],
                "teacher_logits": x["logits"][:, -1, part],
            }
        return outputs

    proper, noisy_part = slice(copies, None), slice(0, copies)
    depths = {f"_aux_{i}": depth(i, proper) for i in range(LAYERS - 1)}
    depths[""] = depth(LAYERS - 1, proper, teacher=False)
    depths["_pre"] = depth(0, proper, "initial_")
    depths["_enc_0"] = {"logits": x["encoder_logits"], "pred_boxes": x["encoder_boxes"]}
    matches = {name: criterion.matcher(outputs, labels) for name, outputs in depths.items()}
    go = united(list(matches.values()))
    number, go_number = max(sum(counts), 1), max(sum(len(q) for q, _ in go), 1)
    work = {name: (o, matches[name], number, go, go_number) for name, o in depths.items()}
    if denoising:
        meta = meta_of(noisy, copies, queries)
        own = criterion.get_cdn_matched_indices(meta, labels)
        depths = {f"_dn_{i}": depth(i, noisy_part) for i in range(LAYERS)}
        depths["_dn_pre"] = depth(0, noisy_part, "initial_")
        all_copies = number * GROUPS
        work |= {name: (o, own, all_copies, own, all_copies) for name, o in depths.items()}

    total, parts = 0, {}
    for suffix, (outputs, indices, number, go, go_number) in work.items():
        losses = criterion.loss_labels_vfl(outputs, labels, indices, number)
        losses |= criterion.loss_boxes(outputs, labels, go, go_number)
        losses |= criterion.loss_local(outputs, labels, go, go_number)
        for name, loss in losses.items():
            total = total + criterion.weight_dict[name] * loss
            parts[name + suffix] = criterion.weight_dict[name] * loss.item()
    for teacher in ("loss_ddf", f"loss_ddf_dn_{LAYERS - 1}"):
        assert parts.pop(teacher, 0) == 0
    actual = run_criterion(criterion_of(config), arrays, copies, targets, noisy)
    check(actual, total.item(), parts, gradients_of(total, x))


@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary", "last"])
@pytest.mark.parametrize("case", CASES)
def test_deformable_detr_is_transformers(case, auxiliary):
    counts, queries = CASES[case]
    rng = np.random.default_rng(5)
    targets = targets_of(counts, rng)
    arrays, _ = random_arrays(counts, queries, rng, denoising=False)
    config = deformable_detr_config(auxiliary_loss=auxiliary)

    x = leaves(arrays)
    logits, boxes = x["logits"].transpose(0, 1), x["boxes"].transpose(0, 1)
    total, parts, _ = loss_deformable_detr.DeformableDetrForObjectDetectionLoss(
        logits[-1], labels_of(targets), "cpu", boxes[-1], config, logits, boxes
    )
    criterion = criterion_of(config, as_transformers=True)
    # transformers' parts are without their weights, and some of them are no losses.
    parts = {
        name: criterion.weights[name.split("_")[1]] * part.item()
        for name, part in parts.items()
        if name.startswith("loss_")
    }
    actual = run_criterion(criterion, arrays, 0, targets)
    check(actual, total.item(), parts, gradients_of(total, x))


@pytest.mark.parametrize("case", CASES)
def test_deformable_detr_teaches_its_proposals(case):
    """Beside the rest: all proposals against the objects, as if there were one class."""
    counts, queries = CASES[case]
    rng = np.random.default_rng(6)
    targets = targets_of(counts, rng)
    arrays, _ = random_arrays(counts, queries, rng, denoising=False)
    config = deformable_detr_config()

    x = leaves(arrays)
    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(
        config.class_cost, config.bbox_cost, config.giou_cost
    )
    twin = loss_deformable_detr.DeformableDetrImageLoss(
        matcher, CLASSES, config.focal_alpha, ["labels", "boxes"]
    )
    labels = [
        {**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in labels_of(targets)
    ]
    parts = twin({"logits": x["encoder_logits"], "pred_boxes": x["encoder_boxes"]}, labels)
    criterion = criterion_of(config)
    expected = {name: criterion.weights[name[5:]] * part for name, part in parts.items()}
    gradients = gradients_of(sum(expected.values()), x)

    actual = run_criterion(criterion, arrays, 0, targets)
    without = run_criterion(criterion_of(config, as_transformers=True), arrays, 0, targets)
    for name, part in expected.items():
        assert_close(actual[1][f"{name}_enc"], part.item(), name)
    assert_close(actual[0], without[0] + sum(expected.values()).item(), "total")
    for name in ("encoder_logits", "encoder_boxes"):
        assert_close(actual[2][name], gradients[name], name)
        assert not without[2][name].any()


# ---------------------------------------------------------------------------
# Functions


def test_focal_loss_is_transformers():
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 3, (2, 5, 3)).astype(np.float32)
    targets = (rng.random((2, 5, 3)) < 0.4).astype(np.float32)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = tf_focal(x, torch.tensor(targets, dtype=torch.float64), 4.0, alpha=0.3, gamma=1.5)
    expected.backward()

    def loss(x):
        # transformers takes the mean over the second axis.
        return sigmoid_focal_loss(x, mx.array(targets), 0.3, 1.5).sum() / 5 / 4.0

    value, gradient = mx.value_and_grad(loss)(mx.array(logits))
    assert_close(value.item(), expected.item())
    assert_close(gradient, x.grad.numpy())


@pytest.mark.parametrize("bins", [4, 8, 32])
def test_bins_are_transformers(bins):
    expected = loss_d_fine.weighting_function(bins, torch.tensor([0.6]), 3.0)
    assert_close(bin_distances(bins, 0.6, 3.0), expected.numpy(), roundings=8)


def test_distributions_are_transformers():
    """Of distances inside the bins, on them, and beyond both ends."""
    up, scale = torch.tensor([0.6]), 3.0
    values = loss_d_fine.weighting_function(BINS, up, scale)
    distances = torch.cat([torch.linspace(-5, 5, 41), values, torch.tensor([-1e4, 1e4])])
    left, right_weight, left_weight = loss_d_fine.translate_gt(distances, BINS, scale, up)
    left = left.long().numpy()
    expected = np.zeros((len(left), BINS + 1))
    expected[np.arange(len(left)), left] += left_weight.numpy()
    expected[np.arange(len(left)), left + 1] += right_weight.numpy()
    actual = two_bins(mx.array(distances.numpy()), mx.array(values.numpy()))
    assert_close(actual, expected)
    assert actual.sum(-1).min().item() == pytest.approx(1)


def test_distributions_lead_back_to_the_box():
    """The mean of the distribution, as an edge's distance, gives the edge."""
    rng = np.random.default_rng(8)
    references = random_boxes(rng, 20)
    boxes = references * rng.uniform(0.9, 1.1, references.shape).astype(np.float32)
    values = bin_distances(32, 0.5, 4.0)
    distances = edge_distances(mx.array(references), mx.array(boxes), 4.0)
    mean = (two_bins(distances, values) * values).sum(-1)
    assert_close(mean, distances)
    decoded = modeling_d_fine.distance2bbox(
        torch.tensor(references), torch.tensor(np.array(mean)), 4.0
    )
    assert_close(decoded.numpy(), boxes)


def test_union_keeps_the_most_frequent_object():
    first = [(np.array([0, 1]), np.array([0, 1])), (np.array([], int), np.array([], int))]
    second = [(np.array([0, 2]), np.array([1, 0])), (np.array([3]), np.array([0]))]
    third = [(np.array([0, 1]), np.array([1, 0])), (np.array([3]), np.array([0]))]
    (queries, objects), (queries_2, objects_2) = union([first, second, third])
    assert queries.tolist() == [0, 1, 2]
    assert objects.tolist() == [1, 0, 0]  # of equals the first
    assert (queries_2.tolist(), objects_2.tolist()) == ([3], [0])


# ---------------------------------------------------------------------------
# Denoising queries


@pytest.mark.parametrize("module", [modeling_rt_detr, modeling_d_fine], ids=["rt_detr", "d_fine"])
@pytest.mark.parametrize("number", [3, 20])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_denoising_queries_are_transformers(module, number, scale, monkeypatch):
    targets = targets_of((2, 0, 5), np.random.default_rng(9))
    config = SimpleNamespace(
        num_labels=CLASSES,
        num_queries=13,
        num_denoising=number,
        label_noise_ratio=0.6,
        box_noise_scale=scale,
    )
    groups, places = denoising_layout(targets, number)
    noise = noise_for(targets, places, 10)
    patched_noise(monkeypatch, noise)
    labels, boxes, mask, meta = module.get_contrastive_denoising_training_group(
        [{"class_labels": torch.tensor(t.labels), "boxes": torch.tensor(t.boxes)} for t in targets],
        config.num_labels,
        config.num_queries,
        lambda labels: labels,
        number,
        config.label_noise_ratio,
        scale,
    )
    queries = denoising_queries(targets, config, noise=noise)
    assert np.array_equal(queries.labels, labels.numpy())
    assert (np.array(queries.labels) != CLASSES).any()
    assert_close(queries.boxes, boxes.numpy(), roundings=256)  # logits near the ends
    assert np.array_equal(queries.blocked, mask.numpy() == -np.inf)
    assert queries.groups == meta["dn_num_group"] == groups
    assert meta["dn_num_split"] == [places, config.num_queries]
    for ours, theirs in zip(queries.positives, meta["dn_positive_idx"], strict=True):
        assert ours.tolist() == theirs.tolist()


def test_denoising_queries_are_seeded():
    targets = targets_of((2, 3), np.random.default_rng(11))
    config = rt_detr_config(num_denoising=12)
    one, same, other = (denoising_queries(targets, config, rng=seed) for seed in (1, 1, 2))
    assert mx.array_equal(one.boxes, same.boxes)
    assert mx.array_equal(one.labels, same.labels)
    assert not mx.allclose(one.boxes, other.boxes)


def test_denoising_queries_without_noise_are_the_objects():
    targets = targets_of((2, 3), np.random.default_rng(12))
    config = rt_detr_config(num_denoising=6, label_noise_ratio=0.0, box_noise_scale=0.0)
    queries = denoising_queries(targets, config)
    boxes = np.array(mx.sigmoid(queries.boxes))
    for i, target in enumerate(targets):
        places = queries.positives[i]
        assert np.array(queries.labels)[i, places].tolist() == target.labels.tolist() * 2
        assert_close(boxes[i, places], np.tile(target.boxes, (2, 1)))


@pytest.mark.parametrize(("counts", "number"), [((0, 0), 10), ((2, 1), 0)])
def test_no_denoising_queries(counts, number):
    targets = targets_of(counts, np.random.default_rng(13))
    assert denoising_queries(targets, rt_detr_config(num_denoising=number)) is None


def test_noise_of_another_size_is_refused():
    targets = targets_of((2, 1), np.random.default_rng(14))
    with pytest.raises(
        ValueError, match=r"noise must be of 2 pictures and 8 queries; got \(2, 6\)"
    ):
        denoising_queries(targets, rt_detr_config(num_denoising=4), noise=noise_for(targets, 6, 1))


# ---------------------------------------------------------------------------
# Use


def case_outputs(seed=15, config=None):
    counts, queries = CASES["unequal"]
    rng = np.random.default_rng(seed)
    targets = targets_of(counts, rng)
    arrays, _ = random_arrays(counts, queries, rng, corners=True, denoising=False)
    return {name: mx.array(x) for name, x in arrays.items()}, targets


CONFIGS = pytest.mark.parametrize(
    "config",
    [rt_detr_config(), d_fine_config(), deformable_detr_config()],
    ids=["rt_detr", "d_fine", "deformable_detr"],
)


@CONFIGS
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_types_are_computed_in_float32(config, dtype):
    arrays, targets = case_outputs()
    halves = {name: x.astype(dtype) for name, x in arrays.items()}
    same = {name: x.astype(mx.float32) for name, x in halves.items()}
    criterion = criterion_of(config)
    total, _ = criterion(outputs_of(halves, 0), targets)
    expected, _ = criterion(outputs_of(same, 0), targets)
    assert total.dtype == mx.float32
    assert_close(total.item(), expected.item())


@CONFIGS
def test_learns_inside_a_module(config):
    """nn.value_and_grad with the matching inside: the loss falls by descent."""

    class Free(nn.Module):
        """Predictions that are themselves the parameters."""

        def __init__(self, arrays):
            super().__init__()
            self.arrays = arrays

        def __call__(self):
            return outputs_of(self.arrays, 0)

    arrays, targets = case_outputs()
    model = Free(arrays)
    criterion = criterion_of(config)
    step = nn.value_and_grad(model, lambda: criterion(model(), targets))
    losses = []
    for _ in range(6):
        (total, _), gradients = step()
        losses.append(total.item())
        model.update(
            {"arrays": {k: x - 2e-3 * gradients["arrays"][k] for k, x in model.arrays.items()}}
        )
    assert losses == sorted(losses, reverse=True)


@CONFIGS
@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_predictions_that_are_not_finite_are_refused(config, part, value):
    arrays, targets = case_outputs()
    arrays[part][1, 0, 2] = value  # of the first layer, of the picture without objects
    name = "_0" if config.model_type == "deformable_detr" else "_aux_0"
    if config.model_type == "d_fine" and part == "boxes" and np.isinf(value):
        return  # clamped
    with pytest.raises(
        ValueError, match=f"must be finite; got NaN or infinity in the {part}.*{name}"
    ):
        criterion_of(config)(outputs_of(arrays, 0), targets)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target([7], [[0.5, 0.5, 0.1, 0.1]]), r"labels must be in \[0, 7\); got 7 in targets\[0\]"),
        (Target([-1], [[0.5, 0.5, 0.1, 0.1]]), "got -1"),
        (Target([0.5], [[0.5, 0.5, 0.1, 0.1]]), "labels must be integers.*got float64"),
        (Target([1, 2], [[0.5, 0.5, 0.1, 0.1]]), r"number of labels, 2; got \(1, 4\)"),
        (Target([1], [[0.5, 0.5, 0.0, 0.1]]), "w, h > 0; got"),
        (Target([1], [[0.5, np.nan, 0.1, 0.1]]), "boxes must be finite"),
    ],
)
def test_wrong_targets_are_refused(target, message):
    arrays, targets = case_outputs()
    with pytest.raises(ValueError, match=message):
        criterion_of(rt_detr_config())(outputs_of(arrays, 0), [target, *targets[1:]])


def test_wrong_calls_are_refused():
    arrays, targets = case_outputs()
    with pytest.raises(ValueError, match="of the 3 pictures of the outputs; got 2"):
        criterion_of(rt_detr_config())(outputs_of(arrays, 0), targets[:2])
    with pytest.raises(ValueError, match="queries that the model was given; got None"):
        criterion_of(rt_detr_config())(outputs_of(arrays, 4), targets)
    with pytest.raises(ValueError, match=r"model_type must be .*; got yolo"):
        criterion_of(SimpleNamespace(model_type="yolo"))


def test_scipy_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    arrays, targets = case_outputs()
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'mlx-deform\[detr\]'"):
        criterion_of(rt_detr_config())(outputs_of(arrays, 0), targets)


def test_targets_may_be_lists_or_arrays():
    arrays, targets = case_outputs()
    criterion = criterion_of(rt_detr_config())
    expected, _ = criterion(outputs_of(arrays, 0), targets)
    lists = [Target(t.labels.tolist(), t.boxes.tolist()) for t in targets]
    mlx = [Target(mx.array(t.labels), mx.array(t.boxes)) for t in targets]
    for other in (lists, mlx):
        assert criterion(outputs_of(arrays, 0), other)[0].item() == expected.item()
