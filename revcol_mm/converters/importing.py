# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Converts the authors' released files to files that the current mmdet, mmseg and mmpretrain load strictly, and back."""
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any, Collection, Mapping

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor

from ..checkpoint.kernels import kernels_of
from ..checkpoint.loading import WRAPPINGS, check_weights, find_differences, find_meta, find_state_dict, strip_module
from ..checkpoint.names import (
    LAST_CLASSIFIER,
    count_dtypes,
    current_names,
    find_dataset_meta,
    find_num_classes,
    find_task,
    official_names,
)
from ..checkpoint.safe import CheckpointError, first_names
from ..utils.configs import MODEL_ERRORS, build_on_meta
from .backbone import Backbone, find_backbone

CLASSIFIERS = ('cls.', 'cls_blocks.', 'decoder_blocks.')  # what the authors' classifiers hold beside the backbone


@dataclass
class ImportReport:
    """What :func:`import_checkpoint` found and did.

    Attributes:
        task (str): 'classification', 'detection', 'segmentation', 'backbone' (no heads) or 'other'.
        backbone (Backbone): its size, kernel size, and prefix in the new names.
        num_classes (int | None): None for a bare backbone, or if the heads do not show it.
        supervised (bool): whether the file holds the heads of intermediate supervision.
        dtypes (dict[str, int]): number of weights of each dtype.
        kept (int): number of weights in the new file.
        renamed (dict[str, str]): {old name: new name} of the weights whose name changes.
        dropped (list[str]): names of weights that the new file does not hold.
        others (list[str]): other entries that the new file does not hold: optimizer, averaged weights, …
        missing (list[str]): names of the config's model that the file does not hold (counters of batches).
    """
    task: str
    backbone: Backbone
    num_classes: int | None
    supervised: bool
    dtypes: dict[str, int]
    kept: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        arch = self.backbone.arch if isinstance(self.backbone.arch, str) else (
            'custom, ' + ', '.join(f'{key}={value}' for key, value in self.backbone.arch.items()))
        arrows = first_names((f'{old} → {new}' for old, new in self.renamed.items()), 2)
        return '\n'.join((
            f'task:        {self.task}' + (', with intermediate supervision' if self.supervised else ''),
            f'size:        {arch}',
            f'kernel size: {self.backbone.kernel_size}',
            f'classes:     {self.num_classes or "unknown"}',
            f'weights:     {self.kept} ({", ".join(f"{count} {name}" for name, count in self.dtypes.items())})',
            f'mapped:      {len(self.renamed)} new names' + (f' (such as {arrows})' if self.renamed else ''),
            f'dropped:     {"; ".join([f"{len(self.dropped)}{_by_part(self.dropped)}", *self.others])}',
            f'missing:     {len(self.missing)}{_by_part(self.missing)}'))


def import_checkpoint(checkpoint: Any, config: str | Config | None = None, ema: bool = False,
                      filename: str = 'the checkpoint') -> tuple[dict[str, Any], ImportReport]:
    """Converts a released file into ``{'state_dict': …, 'meta': …}`` with the current names.

    ImageNet classifiers (1K, 22K, fine-tuned, Huge) get the names of mmpretrain, ``backbone.…`` and ``head.…``. Cascade Mask
    R-CNN of mmdet 2 and UPerNet of mmseg 0.x keep their names. Weights and their dtypes do not change. Classes and palette are
    stored where the current inferencers look. If the file has intermediate supervision and the config has a single classifier,
    the last classifier is used, which is the one that predicts.

    Args:
        checkpoint (Any): from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        config (str | Config | None): config of the model that will load the file; names and shapes are checked against it.
            Default: None, only the backbone is checked.
        ema (bool): whether to use the averaged weights of the authors' checkpoints, ``state_dict_ema``. Default: False.
        filename (str): name of the file in messages. Default: 'the checkpoint'.

    Returns:
        tuple[dict, ImportReport]: the converted checkpoint, and the report.

    Raises:
        CheckpointError: if there is no complete RevCol, if weights are unusable (see
            :func:`~revcol_mm.checkpoint.loading.check_weights`), if the names or the 'meta' are of no known kind, or if the
            model of the config cannot be built or does not fit.
    """
    meta = find_dataset_meta(checkpoint, filename)
    if ema:
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get('state_dict_ema'), Mapping):
            raise CheckpointError(f"{filename} holds no averaged weights ('state_dict_ema'), which ema takes: leave ema out")
        weights, wrapping = find_state_dict(checkpoint['state_dict_ema'], filename)[0], 'state_dict_ema'
    else:
        weights, wrapping = find_state_dict(checkpoint, filename)
    plain = strip_module(weights)
    find_backbone(plain, filename)
    check_weights(plain, filename)
    if config is not None:
        config = Config.fromfile(config) if isinstance(config, str) else config
    expected = {} if config is None else model_shapes(config)
    names = new_names(plain, filename, expected)
    dropped = [old for old, new in names.items() if new is None]
    converted = OrderedDict((new, plain[old]) for old, new in names.items() if new is not None)
    missing = []
    if config is not None:
        differences = find_differences(expected, converted, filename)
        if differences:
            raise CheckpointError(f'{filename} does not fit {_name(config)}: {differences}. Give the config of its model')
        missing = [key for key in expected if key not in converted]

    backbone = find_backbone(converted, filename)
    others = [key for key in checkpoint if key not in (wrapping, 'meta')] if wrapping else [
        key for key in checkpoint if key not in weights]
    report = ImportReport(
        find_task(converted), backbone, find_num_classes(converted),
        any(key.startswith('head.cls_blocks.') for key in converted), count_dtypes(converted), len(converted),
        {old: names[old] for old in names if names[old] in converted and old != names[old]}, dropped,
        [f'{key} (averaged weights: ema takes them)' if key == 'state_dict_ema' else str(key) for key in others], missing)
    origin = dict(wrapping=wrapping, module=list(plain) != list(weights), dropped=bool(dropped), task=report.task)
    return dict(meta=dict(revcol_mm=origin, **meta), state_dict=converted), report


def is_official(checkpoint: Any) -> bool:
    """Whether a file is one of the authors' code: a RevCol as their classification code, mmdet 2 or mmseg 0.x saves it.

    A backbone alone has the same names in their code and in this package; without the wrapping ``{'model': …}`` it does not
    count.
    """
    if not isinstance(checkpoint, Mapping):
        return False
    for wrapping in (*WRAPPINGS, None):
        weights = checkpoint.get(wrapping) if wrapping else checkpoint
        if isinstance(weights, Mapping) and kernels_of(weights):
            break
    else:
        return False
    names, meta = set(map(str, strip_module(weights))), checkpoint.get('meta')
    if not any(name.startswith('backbone.') for name in names):
        return wrapping == 'model' or any(name.startswith(CLASSIFIERS) for name in names)
    return isinstance(meta, Mapping) and 'mmengine_version' not in meta and any(
        key in meta for key in ('CLASSES', 'mmdet_version', 'mmseg_version', 'mmcv_version'))


def to_current_names(checkpoint: Any, filename: str, names: Collection[str] = (), log: bool = False) -> Any:
    """Returns a checkpoint under the current names: a file of the authors' code is converted, any other is returned as it is.

    Values are not looked at, so that the weights may be on the meta device.

    Args:
        checkpoint (Any): from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        filename (str): name of the file in messages.
        names (Collection[str]): names of the weights of the model that will load it. If it has a single classifier, that is
            the last one of intermediate supervision. Default: ().
        log (bool): whether to log that the file is converted. Default: False.

    Raises:
        CheckpointError: if the file is one of the authors' code, but holds weights of no known kind.
    """
    if not is_official(checkpoint):
        return checkpoint
    weights = strip_module(find_state_dict(checkpoint, filename)[0])
    converted = {new: weights[old] for old, new in new_names(weights, filename, names).items() if new is not None}
    if log:
        print_log(f"{filename} is a file of the authors' code: its {len(converted)} weights were converted to the current "
                  'names (mmdet 3, mmseg 1, mmpretrain 1)', logger='current')
    return dict(meta=find_dataset_meta(checkpoint, filename), state_dict=OrderedDict(converted))


def new_names(weights: Mapping[str, Tensor], filename: str, expected: Collection[str]) -> dict[str, str | None]:
    """Returns {name in the file: name in a model that has the expected names, None for a weight that it does not have}."""
    names = current_names(weights, filename)
    if LAST_CLASSIFIER + 'classifier.1.weight' in names.values() and 'head.cls.classifier.1.weight' in expected:
        for old, new in names.items():
            if new is not None and not new.startswith('backbone.'):
                names[old] = new.replace(LAST_CLASSIFIER, 'head.cls.') if new.startswith(LAST_CLASSIFIER) else None
    return names


def export_official(checkpoint: Mapping[str, Any], filename: str = 'the checkpoint') -> dict[str, Any]:
    """Converts back to the authors' names and wrapping: the exact inverse of :func:`import_checkpoint` for the weights.

    A classifier that was trained with this package becomes ``{'model': …}`` with the names of the authors' code.

    Args:
        checkpoint (Mapping): from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        filename (str): name of the file in messages. Default: 'the checkpoint'.

    Raises:
        CheckpointError: if there is no complete RevCol, if weights are unusable, if the 'meta' is of no known kind, or if the
            names are already those of the authors.
    """
    weights = strip_module(find_state_dict(checkpoint, filename)[0])
    find_backbone(weights, filename)
    check_weights(weights, filename)
    if not any(key.startswith('backbone.') for key in weights):
        raise CheckpointError(f"{filename} must hold names with 'backbone.', but its names are the authors' already, or of no "
                              f'known kind ({first_names(weights)})')
    origin = find_meta(checkpoint, filename).get('revcol_mm') or {}
    if not isinstance(origin, Mapping) or not isinstance(origin.get('wrapping'), (str, type(None))):
        raise CheckpointError(f"{filename}: 'revcol_mm' of its 'meta' must be what an import writes, but is {origin!r:.100}: "
                              'delete this entry')
    names = official_names(weights, filename)
    wrapping = origin.get('wrapping', 'model' if find_task(weights) in ('classification', 'backbone') else 'state_dict')
    module = 'module.' if origin.get('module') is True else ''
    official = OrderedDict((module + names[key], value) for key, value in weights.items())
    return {wrapping: official} if wrapping else official


def model_shapes(config: Config) -> dict[str, torch.Size]:
    """Returns names and shapes of the weights of a config's model.

    Raises:
        CheckpointError: if the config has no model, or if it cannot be built.
    """
    if config.get('model') is None:
        raise CheckpointError(f'{_name(config)} must define a model, but has none: give the config of a model')
    try:
        return {key: value.shape for key, value in build_on_meta(config).state_dict().items()}
    except MODEL_ERRORS as error:
        reason = (str(error).strip('"') or 'no reason given').splitlines()[0]
        raise CheckpointError(f'the model of {_name(config)} cannot be built: {type(error).__name__}: {reason}') from error


def _name(config: Config) -> str:
    return config.filename or 'the config'


def _by_part(names: list[str]) -> str:
    counts = Counter(name.split('.')[0] for name in names)
    return f' ({first_names((f"{count} of {part}" for part, count in counts.items()), 8)})' if names else ''
