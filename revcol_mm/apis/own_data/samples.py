# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Pictures of training samples as the model will see them, after all transforms."""
import os
import os.path as osp
import shutil
import warnings
from typing import Any

import numpy as np

from ...checkpoint.files import put_in_place
from ..pictures import build_visualizer

COUNT = 16


def draw_samples(runner: Any, folder: str, count: int = COUNT) -> list[str]:
    """Draws samples of the training set with their boxes and masks, label map or class, by the package's own visualizer.

    Args:
        runner (Runner | FlexibleRunner): with a training loop that is built.
        folder (str): where to write the pictures; replaced when they are complete.
        count (int): how many, spread over the set. Default: 16.

    Returns:
        list[str]: the files.
    """
    dataset = runner.train_loop.dataloader.dataset
    draft = f'{folder.rstrip("/")}.drawing'
    shutil.rmtree(draft, ignore_errors=True)
    os.makedirs(draft)
    visualizer = build_visualizer(runner.cfg.default_scope, dataset.metainfo)
    for number, index in enumerate(sorted({round(place) for place in np.linspace(0, len(dataset) - 1, count)})):
        sample = dataset[index]
        name = osp.splitext(osp.basename(str(sample['data_samples'].get('img_path', index))))[0]
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*out of bounds')  # a box at the edge of a crop
            _draw(visualizer, sample, osp.join(draft, f'{number:02d}_{name}.png'))
    put_in_place(draft, folder)
    return [osp.join(folder, name) for name in sorted(os.listdir(folder))]


def _draw(visualizer: Any, sample: dict, path: str) -> None:
    image = np.ascontiguousarray(sample['inputs'].permute(1, 2, 0).numpy()[..., ::-1])  # (H, W, 3), RGB
    truth = sample['data_samples']
    if hasattr(visualizer, 'visualize_cls'):
        visualizer.visualize_cls(image, truth, draw_pred=False, out_file=path)
        return
    objects = getattr(truth, 'gt_instances', None)
    if objects is not None:
        boxes, masks = objects.get('bboxes'), objects.get('masks')
        objects.bboxes = getattr(boxes, 'tensor', boxes)
        if masks is not None:
            objects.masks = masks.to_ndarray().astype(bool)  # (objects, H, W)
    visualizer.add_datasample(osp.basename(path), image, truth, draw_pred=False, out_file=path)
