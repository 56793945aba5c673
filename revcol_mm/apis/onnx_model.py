# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""An ONNX file in the place of a model, so that ``tools/test.py`` measures what the file predicts."""
import torch
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData

from ..runtime import Model
from .errors import LaunchError

TASKS = dict(mmdet='detection', mmseg='segmentation', mmpretrain='classification')


class ONNXModel(BaseModel):
    """Predicts with :class:`revcol_mm.runtime.Model`, which reads the images of a batch by itself.

    Args:
        path (str): file of a whole model, from ``tools/export_onnx.py``.
        scope (str): the config's ``default_scope``, whose data samples are filled.
        provider (str): see :class:`revcol_mm.runtime.Model`. Default: 'cpu'.

    Raises:
        LaunchError: if the file cannot be used, or is one of another task.
    """

    def __init__(self, path: str, scope: str, provider: str = 'cpu') -> None:
        super().__init__()
        try:
            self.runtime = Model(path, provider)
        except (ImportError, ValueError, FileNotFoundError) as error:
            raise LaunchError(str(error)) from error
        if self.runtime.task != TASKS.get(scope):
            raise LaunchError(f'{path} must be a model of {TASKS.get(scope)}, as the config of {scope} needs, but is one of '
                              f'{self.runtime.task}')

    def __deepcopy__(self, memo: dict) -> 'ONNXModel':
        return self  # it has no weights; hooks such as EMAHook copy the model

    def forward(self, *args, **kwargs) -> None:
        raise NotImplementedError('an ONNX file only predicts')

    def test_step(self, data: dict) -> list:
        """Fills the data samples of a batch with predictions."""
        for sample in data['data_samples']:
            result = {name: torch.from_numpy(value) for name, value in self.runtime.predict(sample.img_path).items()}
            if self.runtime.task == 'detection':
                result['bboxes'] = result.pop('boxes')
                sample.pred_instances = InstanceData(**result)
            elif self.runtime.task == 'segmentation':
                sample.pred_sem_seg = PixelData(data=result['labels'][None])
            else:
                sample.set_pred_score(result['scores']).set_pred_label(result['scores'].argmax(0, keepdim=True))
        return data['data_samples']

    val_step = test_step
