# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
import mmcv.ops
import pytest
import torch


def overlap_by_counting(first, second, mode):
    """Boxes of whole pixels, both corners included, as sets of pixels."""
    sets = [{(x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1)} for x1, y1, x2, y2 in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1] if mode == 'iou' else sets[0])


@pytest.mark.parametrize('mode', ['iou', 'iof'])
def test_overlaps_are_those_of_sets_of_pixels(mode):
    corners = torch.randint(0, 6, (2, 7, 2))
    boxes = torch.cat([corners, corners + torch.randint(0, 5, (2, 7, 2))], 2)
    expected = torch.tensor([[overlap_by_counting(first, second, mode) for second in boxes[1].tolist()]
                             for first in boxes[0].tolist()])
    first, second = boxes.float()
    torch.testing.assert_close(mmcv.ops.bbox_overlaps(first, second, mode, offset=1), expected)
    torch.testing.assert_close(mmcv.ops.bbox_overlaps(first, second, mode, aligned=True, offset=1), expected.diagonal())
    # Without the offset a box ends at its far corner.
    second, first = second + torch.tensor([0, 0, 1, 1]), first + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(mmcv.ops.bbox_overlaps(first, second, mode), expected)


def test_areas_beyond_half_precision_are_computed_in_single():
    boxes = torch.tensor([[0., 0, 300, 300], [0, 0, 300, 600]])  # of 90,000 and 180,000 pixels; float16 ends at 65,504
    for dtype in (torch.float16, torch.bfloat16):
        overlaps = mmcv.ops.bbox_overlaps(boxes.to(dtype), boxes.to(dtype))
        assert overlaps.dtype == dtype and overlaps.tolist() == [[1, 0.5], [0.5, 1]]
