# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The model against the data: numbers of classes, semantic maps, ranks of accuracies, and sliding windows."""
from typing import Any, Iterator, Sequence

from torch import nn

from ...checkpoint.safe import first_names
from ...patches import mend_sliding_window
from ..errors import LaunchError
from .common import name_of, steps_of
from .report import Record

NO_HEADS = ('rpn_head', 'semantic_head', 'teacher')  # object or not; those of the semantic maps; another model's


def heads_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The heads that tell classes apart, with their names in the config."""
    if hasattr(model, 'language_model'):  # whose classes are words
        return
    for name, module in model.named_modules():
        parts = [part for part in name.split('.') if part not in ('module', '_fsdp_wrapped_module')]
        own = [part for part in parts if not part.isdigit()]
        if own and 'head' in own[-1] and not any(part in NO_HEADS for part in parts) and isinstance(
                getattr(module, 'num_classes', None), int) and not getattr(module, 'class_agnostic', False) \
                and type(module).__name__ != 'STDCHead':  # it tells boundaries from the rest
            yield '.'.join(['model', *parts]), module


def check_heads(model: nn.Module, records: Sequence[Record], loader: str) -> None:
    """The number of classes of every head must be that of the data sets.

    Args:
        model (nn.Module): the model.
        records (Sequence[Record]): of the data sets of one loader.
        loader (str): its name in the config.

    Raises:
        LaunchError: one differs; the message names the setting.
    """
    counts = {len(record.classes) for record in records if record.classes}
    labels = max((label for record in records for label, count in record.objects.items() if count), default=-1) + 1
    if len(counts) > 1:
        return
    heads = list(heads_of(model))
    wrong = {name: head for name, head in heads if head.num_classes != next(iter(counts), max(labels, head.num_classes))}
    if wrong:
        wanted = next(iter(counts), labels)
        named = ', '.join(f'that of {name} ({type(head).__name__}) is {head.num_classes}' for name, head in wrong.items())
        raise LaunchError(f'the num_classes of the heads must be the {wanted} classes of {loader}, but {named}: set '
                          f'num_classes={wanted}')
    for name, head in heads:
        wanted = head.num_classes
        ranks = getattr(head, 'topk', None)
        if getattr(head, 'cal_acc', False) and isinstance(ranks, (tuple, list)) and max(ranks) > wanted:
            raise LaunchError(f'the topk of {name} must be at most the {wanted} classes of {loader}, but is {tuple(ranks)}: '
                              f'set topk={tuple(rank for rank in ranks if rank <= wanted) or (1, )!r}')
    preprocessor = getattr(model, 'data_preprocessor', None)
    own = getattr(preprocessor, 'num_classes', None)
    if counts and isinstance(own, int) and own not in counts and getattr(preprocessor, 'batch_augments', None) is not None:
        raise LaunchError(f'model.data_preprocessor.num_classes must be the {next(iter(counts))} classes of {loader}, because '
                          f'batches are mixed, but is {own}: set num_classes={next(iter(counts))}')


def check_semantic_maps(model: nn.Module, datasets: Sequence[Any], loader: str) -> None:
    """A detector with a branch for semantic maps (HTC) needs them in training.

    Raises:
        LaunchError: the pipeline does not load them, or the data set does not say where they are.
    """
    if not any(name.endswith('semantic_head') and module is not None for name, module in model.named_modules()):
        return
    without = 'for a training without them: model.roi_head.semantic_head=None and model.roi_head.semantic_roi_extractor=None'
    for dataset in datasets:
        loads = any(getattr(step, 'with_seg', False) for step in steps_of(getattr(dataset, 'pipeline', None)))
        if not loads:
            raise LaunchError(f'the pipeline of {loader} must load semantic maps for model.roi_head.semantic_head, but its '
                              f'LoadAnnotations does not: set with_seg=True and data_prefix.seg in the data set; {without}')
        if not (getattr(dataset, 'data_prefix', None) or {}).get('seg'):
            raise LaunchError(f'{name_of(dataset)} must say where the semantic maps for model.roi_head.semantic_head are, but '
                              f'its data_prefix names only {first_names(dataset.data_prefix)}: set data_prefix.seg; {without}')


def check_sliding_window(model: nn.Module) -> None:
    """Mends mmseg's mask classifiers for ``test_cfg.mode='slide'``, which fails in validation."""
    for module in model.modules():
        if getattr(getattr(module, 'test_cfg', None), 'mode', None) == 'slide' and hasattr(module, 'decode_head'):
            mend_sliding_window(module.decode_head)
