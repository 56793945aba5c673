# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Defaults of test-time augmentation."""
import copy
import importlib
from typing import Sequence

from mmengine.config import Config, ConfigDict

from ..utils.configs import kind_of
from .checks.common import settings_of_leaves
from .errors import LaunchError

#: Scales of the default test-time augmentation, relative to the test pipeline's; the plain view comes first.
TTA_SCALES = dict(mmdet=(1.0, 0.75, 1.25), mmseg=(1.0, 0.5, 0.75, 1.25, 1.5, 1.75), mmpretrain=(1.0, ))

#: What stands in for a package's own way to merge views.
REPLACED = dict(DetTTAModel='InstanceTTAModel', SegTTAModel='SegmentorTTAModel', AverageClsScoreTTA='HeadScoreTTA')


def set_tta(cfg: Config) -> None:
    """Replaces the model by one with test-time augmentation: the config's ``tta_model`` and ``tta_pipeline``, or defaults.

    The default views are the test pipeline at several scales, plain and flipped. Detections are merged by
    :class:`revcol_mm.detection.InstanceTTAModel` (which stands in for mmdet's ``DetTTAModel`` too, since that one refuses
    masks), segmentation maps by :class:`revcol_mm.segmentation.SegmentorTTAModel` (for mmseg's ``SegTTAModel`` too, which is
    wrong for a single channel), and class scores by :class:`revcol_mm.classification.HeadScoreTTA` (for mmpretrain's
    ``AverageClsScoreTTA`` too, which keeps the label of the first view).

    Raises:
        LaunchError: if there is no default for this config.
    """
    scope = cfg.get('default_scope')
    if scope not in TTA_SCALES and not ('tta_model' in cfg and 'tta_pipeline' in cfg):
        raise LaunchError(f'--tta has no default for default_scope={scope!r}: add tta_model and tta_pipeline to the config')
    models = dict(mmdet=dict(type='InstanceTTAModel', tta_cfg=_detector_settings(cfg.model)),
                  mmseg=dict(type='SegmentorTTAModel'), mmpretrain=dict(type='HeadScoreTTA'))
    model = ConfigDict(cfg.get('tta_model') or models[scope])
    extras = dict(mmdet='revcol_mm.detection', mmseg='revcol_mm.segmentation', mmpretrain='revcol_mm.classification')
    if scope in extras:
        importlib.import_module(extras[scope])
    model.type = REPLACED.get(kind_of(model), model.type)
    for dataset in settings_of_leaves(cfg.test_dataloader.dataset):
        if 'pipeline' not in dataset:
            raise LaunchError(f'--tta needs a data set with a pipeline, but {dataset.get("type")} in test_dataloader has none')
        dataset.pipeline = cfg.get('tta_pipeline') or default_tta_pipeline(dataset.pipeline, TTA_SCALES[scope])
    cfg.model = ConfigDict(model, module=cfg.model)


def _detector_settings(model: dict) -> dict:
    """The detector's own last NMS, which fits its scores, and its number of boxes; 0.5 and 100 for detectors without them."""
    test_cfg = model.get('test_cfg') or {}
    last = test_cfg.get('rcnn') or test_cfg
    return dict(nms=last.get('nms') or dict(type='nms', iou_threshold=0.5), max_per_img=last.get('max_per_img') or 100)


def default_tta_pipeline(pipeline: Sequence[dict], scales: Sequence[float]) -> list[dict]:
    """The views of a test pipeline at several scales, plain and flipped.

    Args:
        pipeline (Sequence[dict]): the test pipeline: loading, transforms, among them one that resizes, and packing at the end.
        scales (Sequence[float]): factors of the size that it resizes to. A pipeline without resizing is only flipped.
    """
    steps = copy.deepcopy(list(pipeline))
    pack = steps.pop()
    if 'meta_keys' in pack:  # without the flip a prediction would not be flipped back; the defaults have it
        pack['meta_keys'] = tuple(dict.fromkeys([*pack['meta_keys'], 'flip', 'flip_direction']))
    # The annotations are those of the image as it is, so they are loaded after the flip.
    annotations = [step for step in steps if kind_of(step) == 'LoadAnnotations']
    steps = [step for step in steps if kind_of(step) != 'LoadAnnotations']
    at = next((index for index, step in enumerate(steps) if 'Resize' in kind_of(step) and step.get('scale') is not None),
              None) if len(scales) > 1 else None
    flips = [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)]
    if kind_of(pack) != 'PackInputs':  # mmpretrain's flip has no such choice
        flips = [dict(flip, direction='horizontal') for flip in flips]
    if at is None:
        views, before, after = [flips], steps, []
    else:
        before, resize, after = steps[:at], steps[at], steps[at + 1:]
        views = [[dict(resize, scale=_scaled(resize['scale'], factor)) for factor in scales], flips]
    views += [[step] for step in (*after, *annotations, pack)]
    return [*before, dict(type='TestTimeAug', transforms=views)]


def _scaled(scale, factor: float):
    return int(scale * factor) if isinstance(scale, (int, float)) else tuple(int(side * factor) for side in scale)
