# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The mean IoU of the digits, without the background."""
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from revcol_mm.evaluation.foreground_iou import ForegroundIoUMetric


def test_foreground_iou_is_the_plain_one_without_the_background():
    """Against a count by hand: the background's own IoU is left out, digits seen in it are not forgiven."""
    truth = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2]])
    guess = torch.tensor([[0, 2, 1, 1, 1, 2, 2, 2]])
    sample = SegDataSample(gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=guess))
    metric = ForegroundIoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=('0', '1', 'background'))
    metric.process({}, [sample.to_dict()])
    measured = metric.evaluate(size=1)
    assert measured['mIoU'] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2, abs=0.01)  # rounded to two digits
    assert metric.dataset_meta['classes'] == ('0', '1', 'background')


def test_a_single_name_is_one_class():
    metric = ForegroundIoUMetric(background='bg')
    metric.dataset_meta = dict(classes=('b', 'g', 'bg'))
    assert metric.background == ('bg', )


@pytest.mark.parametrize('background, classes', [(('backgruond', ), ('0', 'background')), ((), ()),
                                                 (('background', '0'), ('0', 'background'))])
def test_what_is_left_out_must_be_some_of_the_classes(background, classes):
    with pytest.raises(ValueError, match='background of ForegroundIoUMetric must be some of the classes .*, and not all'):
        ForegroundIoUMetric(background=background).dataset_meta = dict(classes=classes)
