# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""NMS beyond the reference cases: ties, thresholds met exactly, types; against loops over single boxes."""
import math

import mmcv.ops
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st


def iou(first, second, offset):
    first, second = np.float32(first), np.float32(second)

    def area(box):
        return (box[2] - box[0] + offset) * (box[3] - box[1] + offset)

    width = max(min(first[2], second[2]) - max(first[0], second[0]) + offset, np.float32(0))
    height = max(min(first[3], second[3]) - max(first[1], second[1]) + offset, np.float32(0))
    union = area(first) + area(second) - width * height
    return width * height / union if union > 0 else np.float32(0)


def plain_soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset):
    """mmcv's loop as its C++ has it, one box at a time."""
    rows = [[box, np.float32(score), index] for index, (box, score) in enumerate(zip(boxes, scores))]
    first = 0
    while first < len(rows):
        best = max(range(first, len(rows)), key=lambda place: (rows[place][1], -place))
        rows[first], rows[best] = rows[best], rows[first]
        place = first + 1
        while place < len(rows):
            overlap = iou(rows[first][0], rows[place][0], offset)
            if method == 'gaussian':
                rows[place][1] *= np.float32(math.exp(-overlap * overlap / np.float32(sigma)))
            elif overlap >= np.float32(iou_threshold):
                rows[place][1] *= np.float32(0) if method == 'naive' else 1 - overlap
            if rows[place][1] < np.float32(min_score):
                rows[place] = rows[-1]
                rows.pop()
            else:
                place += 1
        first += 1
    return [row[2] for row in rows], [row[1] for row in rows]


# Few distinct numbers: many equal scores, equal boxes, boxes without area, and IoUs that are exactly the threshold.
BOXES = st.lists(st.tuples(*[st.integers(0, 4)] * 4, st.integers(1, 4)), max_size=12)


def tensors(rows):
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1), rows[:, 4] / 4


@given(BOXES, st.sampled_from(['naive', 'linear', 'gaussian']), st.integers(0, 1))
@settings(max_examples=150, deadline=None)
def test_soft_nms_breaks_ties_as_the_loop_over_single_boxes_does(rows, method, offset):
    boxes, scores = tensors(rows)
    settings_ = dict(iou_threshold=0.5, sigma=0.5, min_score=0.1, method=method, offset=offset)
    dets, indices = mmcv.ops.soft_nms(boxes, scores, **settings_)
    expected, expected_scores = plain_soft_nms(boxes.tolist(), scores.tolist(), **settings_)
    assert indices.tolist() == expected
    torch.testing.assert_close(dets[:, 4], torch.tensor(np.array(expected_scores, np.float32)), rtol=1e-6, atol=0)
    torch.testing.assert_close(dets[:, :4], boxes[indices], rtol=0, atol=0)


@given(BOXES, st.integers(0, 1), st.sampled_from([0.2, 0.5, 0.6]))
@settings(max_examples=150, deadline=None)
def test_nms_keeps_a_box_whose_iou_is_the_threshold_itself(rows, offset, threshold):
    boxes, scores = tensors(rows)
    order = sorted(range(len(rows)), key=lambda index: (-scores[index], index))
    kept = []
    for index in order:
        if all(iou(boxes[other].tolist(), boxes[index].tolist(), offset) <= np.float32(threshold) for other in kept):
            kept.append(index)
    assert mmcv.ops.nms(boxes, scores, threshold, offset=offset)[1].tolist() == kept


@given(BOXES, st.sampled_from([0.2, 0.5, 0.6]))
@settings(max_examples=100, deadline=None)
def test_nms_match_puts_every_box_into_the_group_of_the_best_box_that_overlaps_it(rows, threshold):
    boxes, scores = tensors(rows)
    left = sorted(range(len(rows)), key=lambda index: (-scores[index], index))
    expected = []
    while left:
        best = left[0]
        group = [best] + [index for index in left[1:]
                          if iou(boxes[best].tolist(), boxes[index].tolist(), 0) >= np.float32(threshold)]
        expected.append(group)
        left = [index for index in left if index not in group]
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), threshold)
    assert [group.tolist() for group in groups] == expected


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_takes_other_types_than_float32(dtype):
    """Whole numbers up to 60, which every type holds exactly."""
    boxes = torch.randint(0, 30, (60, 2)).float()
    boxes = torch.cat([boxes, boxes + torch.randint(5, 30, (60, 2))], 1)
    scores = torch.randperm(60) / 64
    expected = mmcv.ops.nms(boxes, scores, 0.45)[1]
    assert mmcv.ops.nms(boxes.to(dtype), scores.to(dtype), 0.45)[1].tolist() == expected.tolist()
    assert mmcv.ops.nms(boxes, scores.to(dtype), 0.45)[1].tolist() == expected.tolist()


def test_soft_nms_takes_numpy_arrays_and_tensors_that_need_gradients():
    boxes, scores = torch.rand(20, 4).cumsum(1), torch.rand(20)
    dets, indices = mmcv.ops.soft_nms(boxes.requires_grad_(), scores.requires_grad_())
    array_dets, array_indices = mmcv.ops.soft_nms(boxes.detach().numpy(), scores.detach().numpy())
    assert indices.tolist() == array_indices.tolist()
    np.testing.assert_array_equal(dets.detach().numpy(), array_dets)


@pytest.mark.parametrize('number', [30, 3000])
def test_nms_takes_equal_scores_in_the_order_of_torchs_sort_as_the_compiled_operator_does(number):
    """mmcv sorts with ``scores.sort(0, true)``, which is not stable for many scores; torchvision's own sort is."""
    corners = torch.rand(number, 2) * 80
    boxes, scores = torch.cat([corners, corners + torch.rand(number, 2) * 40], 1), torch.randint(4, (number, )) / 4
    left, expected = scores.sort(0, descending=True).indices, []
    while len(left):
        expected.append(left[0].item())
        left = left[1:][torchvision.ops.box_iou(boxes[left[:1]], boxes[left[1:]])[0] <= 0.7]
    _, kept = mmcv.ops.nms(boxes, scores, 0.7)
    assert kept.tolist() == expected
    assert number < 100 or expected != torchvision.ops.nms(boxes, scores, 0.7).tolist()  # the sorts differ here


def test_batched_nms_keeps_boxes_of_different_classes_apart():
    boxes = torch.tensor([[0., 0, 10, 10]] * 4)
    dets, kept = mmcv.ops.batched_nms(boxes, torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0, 1, 0, 1]),
                                      dict(type='nms', iou_threshold=0.5))
    assert kept.tolist() == [0, 1]
    torch.testing.assert_close(dets[:, :4], boxes[:2])


@pytest.mark.parametrize('name', ['nms', 'soft_nms'])
def test_no_boxes_give_no_boxes(name):
    dets, indices = getattr(mmcv.ops, name)(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert (tuple(dets.shape), indices.tolist(), indices.dtype) == ((0, 5), [], torch.int64)
