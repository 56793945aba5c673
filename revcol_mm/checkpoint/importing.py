# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""From the files that the authors released to files that today's mmdet, mmseg and mmpretrain load strictly, and back."""
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from .backbone import Backbone, find_backbone
from .loading import check_weights, find_meta, find_state_dict, strip_module
from .safe import CheckpointError, some

# The authors' classification code has no 'backbone' and 'head' around its parts; mmpretrain has. Detectors (mmdet 2) and
# segmentors (mmseg 0.x) have kept their names to this day.
CLASSIFIER_PARTS = dict(stem='backbone', subnet='backbone', cls='head', cls_blocks='head', decoder_blocks='head')
TASKS = (('detection', {'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'panoptic_head'}),
         ('segmentation', {'decode_head'}), ('classification', {'head'}))
# The weight whose first dimension tells the number of classes, and what to take off it: mmdet's boxes have a background.
CLASSES = (('head.cls.classifier.1.weight', 0), ('head.cls_blocks.3.classifier.1.weight', 0),
           ('roi_head.bbox_head.0.fc_cls.weight', 1), ('roi_head.bbox_head.fc_cls.weight', 1),
           ('decode_head.conv_seg.weight', 0))
LAST_CLASSIFIER = 'head.cls_blocks.3.'


@dataclass
class ImportReport:
    """What :func:`import_checkpoint` found and did.

    Attributes:
        task: 'classification', 'detection', 'segmentation', 'backbone' (no heads) or 'other'.
        backbone: its size, kernel size, and its place in the new names.
        num_classes: None for a bare backbone, or heads that do not tell.
        supervised: whether the file holds the heads of intermediate supervision.
        dtypes: number of weights of every dtype.
        renamed: {old name: new name} where they differ.
        dropped: names of weights that the new file does not hold.
        others: what else of the file it does not hold: optimizer, averaged weights, …
        missing: names of the config's model that the file does not hold (buffers that count batches).
    """
    task: str
    backbone: Backbone
    num_classes: Optional[int]
    supervised: bool
    dtypes: Dict[str, int]
    kept: int = 0
    renamed: Dict[str, str] = field(default_factory=dict)
    dropped: List[str] = field(default_factory=list)
    others: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        arch = self.backbone.arch if isinstance(self.backbone.arch, str) else (
            'custom, ' + ', '.join(f'{key}={value}' for key, value in self.backbone.arch.items()))
        return '\n'.join((
            f'task:        {self.task}' + (', with intermediate supervision' if self.supervised else ''),
            f'size:        {arch}',
            f'kernel size: {self.backbone.kernel_size}',
            f'classes:     {self.num_classes or "unknown"}',
            f'weights:     {self.kept} ({", ".join(f"{count} {name}" for name, count in self.dtypes.items())})',
            f'mapped:      {len(self.renamed)} new names' + (f' (such as {_arrows(self.renamed)})' if self.renamed else ''),
            f'dropped:     {"; ".join([f"{len(self.dropped)}{_by_part(self.dropped)}", *self.others])}',
            f'missing:     {len(self.missing)}{_by_part(self.missing)}'))


def import_checkpoint(checkpoint: Any, config: Optional[Union[str, Config]] = None, ema: bool = False,
                      filename: str = 'the checkpoint') -> Tuple[Dict[str, Any], ImportReport]:
    """Turns a released file into ``{'state_dict': …, 'meta': …}`` with today's names.

    ImageNet classifiers (1K, 22K, fine-tuned, Huge) become mmpretrain's, ``backbone.…`` and ``head.…``; Cascade Mask R-CNN of
    mmdet 2 and UPerNet of mmseg 0.x keep their names. Weights and their dtypes stay as they are. Classes and palette go where
    today's inferencers look. A classifier with intermediate supervision fits a config with a single classifier, too: its last
    classifier is taken then, which is the one that predicts.

    Args:
        checkpoint: from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        config: of the model that will load the file: names and shapes are checked against it. Default: None, only the
            backbone is checked.
        ema: take the averaged weights of the authors' training checkpoints, ``state_dict_ema``. Default: False.
        filename: for messages.

    Raises:
        CheckpointError: no RevCol, an incomplete one, unusable weights (see
            :func:`~revcol_mm.checkpoint.loading.check_weights`), names of no known kind, a 'meta' of no known form, or a config
            without a model that can be built, or whose model does not fit.
    """
    meta = find_dataset_meta(checkpoint, filename)
    if ema:
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get('state_dict_ema'), Mapping):
            raise CheckpointError(f"{filename} holds no averaged weights ('state_dict_ema')")
        weights, wrapping = find_state_dict(checkpoint['state_dict_ema'], filename)[0], 'state_dict_ema'
    else:
        weights, wrapping = find_state_dict(checkpoint, filename)
    plain = strip_module(weights)
    find_backbone(plain, filename)
    check_weights(plain, filename)
    names = _new_names(plain, filename)
    dropped = [old for old, new in names.items() if new is None]
    converted = OrderedDict((new, plain[old]) for old, new in names.items() if new is not None)
    missing = []
    if config is not None:
        expected = model_shapes(config)
        if LAST_CLASSIFIER + 'classifier.1.weight' in converted and 'head.cls.classifier.1.weight' in expected:
            single = OrderedDict((key.replace(LAST_CLASSIFIER, 'head.cls.'), value) for key, value in converted.items()
                                 if key.startswith(('backbone.', LAST_CLASSIFIER)))
            names = {old: new and new.replace(LAST_CLASSIFIER, 'head.cls.') for old, new in names.items()}
            dropped += [old for old, new in names.items() if new is not None and new not in single]
            converted = single
        missing = _compare(converted, expected, filename, config)

    backbone = find_backbone(converted, filename)
    others = [key for key in checkpoint if key not in (wrapping, 'meta')] if wrapping else [
        key for key in checkpoint if key not in weights]
    report = ImportReport(
        find_task(converted), backbone, find_num_classes(converted),
        any(key.startswith('head.cls_blocks.') for key in converted), count_dtypes(converted), len(converted),
        {old: names[old] for old in names if names[old] in converted and old != names[old]}, dropped,
        [f'{key} (averaged weights: --ema takes them)' if key == 'state_dict_ema' else str(key) for key in others], missing)
    origin = dict(wrapping=wrapping, module=list(plain) != list(weights), dropped=bool(dropped), task=report.task)
    return dict(meta=dict(revcol_mm=origin, **meta), state_dict=converted), report


def export_official(checkpoint: Mapping[str, Any], filename: str = 'the checkpoint') -> Dict[str, Any]:
    """Back to the authors' names and wrapping: the exact inverse of :func:`import_checkpoint` for the weights.

    Also for classifiers trained here: ``{'model': …}`` with the names of the authors' classification code.

    Raises:
        CheckpointError: no RevCol, an incomplete one, unusable weights, a 'meta' of no known form, or names that are the
            authors' already.
    """
    weights = strip_module(find_state_dict(checkpoint, filename)[0])
    find_backbone(weights, filename)
    check_weights(weights, filename)
    if not any(key.startswith('backbone.') for key in weights):
        raise CheckpointError(f"{filename} holds nothing under 'backbone.': its names are the authors' already, or of no known "
                              f'kind ({some(weights)})')
    origin = find_meta(checkpoint, filename).get('revcol_mm') or {}
    if not isinstance(origin, Mapping) or not isinstance(origin.get('wrapping'), (str, type(None))):
        raise CheckpointError(f"{filename}: 'revcol_mm' of its 'meta' is not what an import writes: {origin!r:.100}")
    if find_task(weights) in ('classification', 'backbone'):
        names = {key: key.partition('.')[2] for key in weights}
        unknown = [key for key, name in names.items() if CLASSIFIER_PARTS.get(_root(name)) != key.split('.')[0]]
        if unknown:
            raise CheckpointError(f"{filename}: no place in the authors' classification code for {some(unknown)}")
        wrapping = origin.get('wrapping', 'model')
    else:
        names, wrapping = {key: key for key in weights}, origin.get('wrapping', 'state_dict')
    module = 'module.' if origin.get('module') is True else ''
    official = OrderedDict((module + names[key], value) for key, value in weights.items())
    return {wrapping: official} if wrapping else official


def model_shapes(config: Union[str, Config]) -> Dict[str, torch.Size]:
    """Names and shapes of the weights of a config's model, built on the meta device.

    Raises:
        CheckpointError: there is no model, or it cannot be built.
    """
    config = Config.fromfile(config) if isinstance(config, str) else config
    if config.get('model') is None:
        raise CheckpointError(f"{_name(config)} is no config of a model: there is no 'model' in it")
    try:
        with DefaultScope.overwrite_default_scope(config.get('default_scope')), torch.device('meta'):
            return {key: value.shape for key, value in MODELS.build(config.model).state_dict().items()}
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        reason = (str(error).strip('"') or 'no reason given').splitlines()[0]
        raise CheckpointError(f'the model of {_name(config)} cannot be built: {type(error).__name__}: {reason}') from error


def _name(config: Union[str, Config]) -> str:
    return config if isinstance(config, str) else config.filename or 'the config'


def _new_names(weights: Mapping[str, Tensor], filename: str) -> Dict[str, Optional[str]]:
    """{name in the file: name in today's models, or None for what they have no place for}."""
    if any(key.startswith('backbone.') for key in weights):
        # mmcv 1's EMA hook keeps its copies as buffers of the model, with other dots
        averages = {f'ema_{key.replace(".", "_")}' for key in weights}
        return {key: None if key in averages else key for key in weights}
    unknown = [key for key in weights if _root(key) not in CLASSIFIER_PARTS]
    if unknown:
        raise CheckpointError(f"{filename} is of no known kind: the parts of the authors' classification code are "
                              f'{", ".join(CLASSIFIER_PARTS)}, and there is {some(unknown)}')
    return {key: f'{CLASSIFIER_PARTS[_root(key)]}.{key}' for key in weights}


def _root(name: str) -> str:
    root = name.split('.')[0]
    return 'subnet' if root.rstrip('0123456789') == 'subnet' else root


def find_task(weights: Mapping[str, Tensor]) -> str:
    """As in :class:`ImportReport`, from today's names."""
    roots = {key.split('.')[0] for key in weights}
    return next((task for task, heads in TASKS if roots & heads), 'backbone' if roots == {'backbone'} else 'other')


def find_num_classes(weights: Mapping[str, Tensor]) -> Optional[int]:
    """As in :class:`ImportReport`, from today's names."""
    return next((weights[key].shape[0] - less for key, less in CLASSES if key in weights and weights[key].dim()), None)


def count_dtypes(weights: Mapping[str, Tensor]) -> Dict[str, int]:
    """As in :class:`ImportReport`."""
    return dict(Counter(str(value.dtype).replace('torch.', '') for value in weights.values()))


def find_dataset_meta(checkpoint: Any, filename: str) -> Dict[str, Any]:
    """Classes and palette: mmdet 2 and mmseg 0.x keep them in capitals, today's inferencers look for ``dataset_meta``.

    Raises:
        CheckpointError: the checkpoint's 'meta', or 'dataset_meta' in it, is no dict.
    """
    meta = find_meta(checkpoint, filename)
    if meta.get('dataset_meta') is not None:
        if not isinstance(meta['dataset_meta'], Mapping):
            kind = type(meta['dataset_meta']).__name__
            raise CheckpointError(f"{filename}: 'dataset_meta' of its 'meta' is a {kind} where a dict is expected")
        return dict(dataset_meta=meta['dataset_meta'])
    found = {key.lower(): meta[key] for key in ('CLASSES', 'PALETTE') if meta.get(key) is not None}
    return dict(dataset_meta=found) if found else {}


def _compare(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size], filename: str, config: Any) -> List[str]:
    """Refuses what strict loading would refuse. Returns the missing counters of batches, which it does not need."""
    counters = [key for key in expected if key not in weights and key.endswith('num_batches_tracked')]
    missing = [key for key in expected if key not in weights and key not in counters]
    surplus = [key for key in weights if key not in expected]
    shapes = [f'{key} {tuple(weights[key].shape)} instead of {tuple(shape)}' for key, shape in expected.items()
              if key in weights and weights[key].shape != shape]
    if missing or surplus or shapes:
        raise CheckpointError(f'{filename} does not fit {_name(config)}: ' + '; '.join(
            f'{len(names)} {word}: {some(names)}' for names, word in (
                (missing, 'missing in the file'), (surplus, 'unknown to the config'), (shapes, 'of another shape')) if names))
    return counters


def _arrows(renamed: Mapping[str, str]) -> str:
    return some((f'{old} → {new}' for old, new in renamed.items()), 2)


def _by_part(names: List[str]) -> str:
    counts = Counter(name.split('.')[0] for name in names)
    return f' ({some((f"{count} of {part}" for part, count in counts.items()), 8)})' if names else ''
