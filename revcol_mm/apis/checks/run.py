# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The one pass over what a run has really built.

:class:`DataChecks` watches the data sets while they are built, because mmdet throws the annotation file away and mmengine packs
the list of images at the end of it. So the file is parsed once, and a list is relabelled before it is packed.
"""
import contextlib
import copy
import os.path as osp
from collections import Counter
from importlib import import_module
from itertools import chain
from operator import itemgetter
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence
from unittest.mock import patch
from weakref import WeakKeyDictionary

import numpy as np
import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.registry import HOOKS, MODELS
from rich.console import Console
from rich.progress import track
from torch import nn

from ...checkpoint.safe import first_names
from ..errors import LaunchError
from .annotations import check_annotations
from .classes import ClassOrder
from .common import leaves, name_of, say, steps_of, warn
from .evaluators import check_evaluator
from .files import no_annotations
from .images import (
    NamingPipeline,
    brightest_of,
    keeps_upper_bits,
    reads_local_images,
    size_of,
    turns_images,
    why_broken,
    why_other_shape,
    why_other_size,
)
from .label_maps import LabelMaps, check_number_of_classes
from .model import check_heads, check_semantic_maps, check_sliding_window
from .report import Record, spread, table

SAMPLE = 8  # files per data set that are opened before every run
SLACK = 2  # pixels by which a rounded box may end outside of its image


class DataChecks:
    """The checks of one run. :meth:`watch` before the data sets are built, :meth:`check` when they are.

    Args:
        classes (Sequence[str] | None): the order of the classes that the model was trained with. Default: None, that of the
            first data set that is built, which in a training is the training set.
        check_all (bool): open every image and label map instead of a sample. Default: False.
    """

    #: Those that watch now: one run at a time.
    active: 'DataChecks | None' = None

    def __init__(self, classes: Sequence[str] | None = None, check_all: bool = False) -> None:
        self.order = ClassOrder(classes)
        self.check_all = check_all
        # Keyed by the data set itself, whose id() the next one may get when it is gone.
        self.records: WeakKeyDictionary[BaseDataset, Record] = WeakKeyDictionary()
        self.categories: dict[str, list[dict]] = {}
        self.latest = ''  # the file that was read last
        self.annotated: dict[str, int] = {}  # numbers of annotations and of images in the files
        self.pictured: dict[str, int] = {}
        self._stack = contextlib.ExitStack()

    # While the data sets are built ---------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Looks at every annotation file and every list of images from now on, until :meth:`stop`, an error, or another run."""
        if DataChecks.active is not None:  # of a run that was built and never started
            DataChecks.active.stop()
        DataChecks.active = self
        serialize, checks = BaseDataset._serialize_data, self

        def serialize_checked(dataset: BaseDataset):
            with checks.stopping_on_errors():
                checks.inspect(dataset)
            return serialize(dataset)

        self._stack.enter_context(patch.object(BaseDataset, '_serialize_data', serialize_checked))
        try:
            coco = import_module('mmdet.datasets.api_wrappers').COCO
        except ImportError:
            return
        build = coco.__init__

        def build_checked(self, annotation_file: str | None = None) -> None:
            with checks.stopping_on_errors():
                checks.build_annotations(build, self, annotation_file)

        self._stack.enter_context(patch.object(coco, '__init__', build_checked))

    def stop(self) -> None:
        """Leaves mmengine's and mmdet's classes as they were."""
        self._stack.close()
        if DataChecks.active is self:
            DataChecks.active = None

    @contextlib.contextmanager
    def stopping_on_errors(self) -> Iterator[None]:
        """:meth:`stop` if the code raises an error, which ends the run."""
        try:
            yield
        except Exception:
            self.stop()
            raise

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """:meth:`watch` and :meth:`stop` around the code that builds the data sets."""
        self.watch()
        try:
            yield
        finally:
            self.stop()

    def build_annotations(self, build: Callable[..., None], coco: Any, annotation_file: str | None) -> None:
        """Reads an annotation file with ``build``, which is mmdet's ``COCO.__init__``, and checks its entries.

        Raises:
            LaunchError: the file has another format, or entries that mmdet cannot use.
        """
        try:
            build(coco, annotation_file)
        except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
            content = getattr(coco, 'dataset', None)
            if isinstance(content, dict) and content:
                check_annotations(content, str(annotation_file))  # which may know the reason
            raise LaunchError(no_annotations(str(annotation_file), error)) from error
        if annotation_file is not None and not type(coco).__name__.startswith('COCOPanoptic'):
            path = self.latest = osp.abspath(annotation_file)
            check_annotations(coco.dataset, annotation_file, coco)
            self.categories[path] = coco.dataset.get('categories', [])
            self.annotated[path] = len(coco.dataset.get('annotations', []))
            self.pictured[path] = len(coco.imgs)

    def inspect(self, dataset: BaseDataset) -> None:
        """Checks a data set's list of images before it is packed, and relabels it where its classes have another order.

        From then on its pipeline names the file of what fails, and checks every sample.

        Raises:
            LaunchError: nothing is left to train on, or the classes cannot be those of the file or of the training.
        """
        if dataset in self.records:
            return
        path = osp.abspath(dataset.ann_file) if dataset.ann_file else ''
        if hasattr(dataset, 'cat_ids') and path not in self.categories and self.latest in self.categories:
            # A remote file was read from a local copy.
            for known in (self.categories, self.annotated, self.pictured):
                known[path] = known[self.latest]
        self.latest = ''
        self.order.settle(dataset, path, self.categories.get(path) if hasattr(dataset, 'cat_ids') else None)
        first = next(iter(dataset.data_list), None)
        if first is None:
            raise LaunchError(f'{name_of(dataset)} must have at least one image, but none is left'
                              + (' that has an object of its classes' if hasattr(dataset, 'cat2label') else '')
                              + ': check its annotation file, its folders, its metainfo.classes and its filter_cfg')
        classes = dataset._metainfo.get('classes')
        palette = dataset._metainfo.get('palette')
        if classes and isinstance(palette, (list, tuple)) and 0 < len(palette) < len(classes):
            raise LaunchError(f'metainfo.palette of {name_of(dataset)} must have a color for each of the {len(classes)} '
                              f'classes, but has {len(palette)}: add colors, or leave palette out')
        if hasattr(dataset, 'label_map'):
            check_number_of_classes(dataset)
        if type(dataset.pipeline) is Compose:  # before the workers of a loop by iterations start, which is when it is built
            dataset.pipeline = NamingPipeline(dataset)
        record = Record(None if classes is None else tuple(classes), len(dataset.data_list))
        if hasattr(dataset, 'cat_ids') and dataset._indices is None:
            _say_of_filter(dataset, self.pictured.get(path, record.images))
        if first.get('img_path'):
            record.paths = np.array([hash(osp.normpath(str(info['img_path']))) for info in dataset.data_list], np.int64)
        if 'instances' in first:
            self._count_instances(dataset, record, path)
        elif 'gt_label' in first:
            _count_labels(dataset, record)
        self.records[dataset] = record

    def _count_instances(self, dataset: BaseDataset, record: Record, path: str) -> None:
        infos = dataset.data_list
        instances = [instance for info in infos for instance in info['instances']]
        ignored = any(map(itemgetter('ignore_flag'), instances))
        counted = [instance for instance in instances if not instance['ignore_flag']] if ignored else instances
        record.objects = Counter(map(itemgetter('bbox_label'), counted))
        counts = [sum(not instance['ignore_flag'] for instance in info['instances']) for info in infos]
        record.empty = counts.count(0)
        record.ignored = self.annotated.get(path, len(instances)) - len(counted)
        record.names = {info['img_id']: osp.basename(info['img_path']) for info in infos}
        sides = chain.from_iterable([instance['bbox'] for instance in counted])
        boxes = np.fromiter(sides, np.float64, 4 * len(counted)).reshape(-1, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        small, large = int((areas < 32 ** 2).sum()), int((areas >= 96 ** 2).sum())
        record.areas = (small, len(areas) - small - large, large)
        if 'width' in infos[0] and 'height' in infos[0]:
            record.sizes = spread([(info['width'], info['height']) for info in infos])
            _warn_of_far_corners(boxes, counts, infos, path or name_of(dataset))
        if any(getattr(step, 'with_mask', False) and 'Panoptic' not in type(step).__name__
               for step in steps_of(dataset.pipeline)):
            maskless = [info['img_id'] for info in infos for instance in info['instances'] if 'mask' not in instance]
            if maskless:
                raise LaunchError(f'every annotation in {path or name_of(dataset)} must have a segmentation that can be used, '
                                  f'because the pipeline loads masks (with_mask=True), but {len(maskless)} of '
                                  f'{len(instances)} have none (image id {first_names(list(dict.fromkeys(maskless)))}): add '
                                  'them, or train a detector of boxes')
        if not counted:
            reason = ('its file has no annotations' if self.annotated.get(path) == 0 else f'{record.ignored} annotations are '
                      'crowds (iscrowd=1) or ignored (ignore=1), of other categories, outside of their image or without area')
            text = (f'{name_of(dataset)} must have objects of its classes, but its {len(infos)} images have none that counts; '
                    f'{reason}')
            if not dataset.test_mode:
                raise LaunchError(f'{text}: correct {path or "the annotations"}')
            warn(text)
        elif not dataset.test_mode:
            _warn_of_missing(record, dataset, 'object')

    # When all is built ---------------------------------------------------------------------------------------------------

    def check(self, loaders: Mapping[str, Any], model: nn.Module, evaluators: Mapping[str, Any]) -> None:
        """Checks what was built against each other, opens a sample of the files, and prints the table.

        Args:
            loaders (Mapping[str, DataLoader]): the run's data loaders by name ('train', 'val' or 'test').
            model (nn.Module): the model.
            evaluators (Mapping[str, Evaluator]): mmengine's evaluators by the names of their loaders.

        Raises:
            LaunchError: for what does not go together.
        """
        self.stop()
        check_sliding_window(model)
        broken = []
        for name, loader in loaders.items():
            datasets = list(leaves(loader.dataset))
            for dataset in datasets:
                if isinstance(dataset, BaseDataset):
                    if not dataset.serialize_data:
                        self._inspect_late(dataset)
                    broken += self._check_files(dataset, name)
            records = [self.records[dataset] for dataset in datasets if dataset in self.records]
            check_heads(model, records, f'{name}_dataloader')
            if name == 'train':
                check_semantic_maps(model, datasets, 'train_dataloader')
            if name in evaluators:
                check_evaluator(evaluators[name], datasets, records, len(loader.dataset), name)
        if broken:
            for line in broken:
                print(line)
            raise LaunchError(f'every image and label map must be usable, but this is not so for {len(broken)} '
                              f'({first_names(broken, 2)}): correct, replace or remove them')
        if 'train' in loaders and 'val' in loaders:
            self._warn_of_common_images(loaders['train'].dataset, loaders['val'].dataset)
        say(table(loaders, self.records))

    def _warn_of_common_images(self, train: Any, val: Any) -> None:
        """Images that a model was trained on make its validation too good."""
        known = [self.records[dataset].paths for dataset in leaves(train) if dataset in self.records]
        for dataset in leaves(val) if known else ():
            common = np.isin(self.records[dataset].paths, np.concatenate(known)) if dataset in self.records else np.empty(0)
            if common.any():
                name = dataset.get_data_info(int(common.argmax()))['img_path']
                warn(f'{common.sum()} of the {len(common)} images of val_dataloader ({name_of(dataset)}) are in '
                     f'train_dataloader, too, such as {name}: the metrics of the validation will be too good')

    def _inspect_late(self, dataset: BaseDataset) -> None:
        before = dataset._metainfo.get('classes')
        self.inspect(dataset)
        if before is not None and tuple(before) != tuple(dataset._metainfo['classes']):
            raise LaunchError(f'the classes of {name_of(dataset)} must be in the order '
                              f'({first_names(self.order.classes, 10)}), but with serialize_data=False they stay '
                              f'({first_names(before, 10)}): remove serialize_data=False')

    def _check_files(self, dataset: BaseDataset, loader: str) -> list[str]:
        """Opens images and label maps. Returns a sentence for each that is broken."""
        if not reads_local_images(dataset):
            return []
        count = len(dataset)
        chosen: Iterable[int] = sorted({round(index) for index in np.linspace(0, count - 1, min(count, SAMPLE))})
        if self.check_all:
            chosen = track(range(count), f'Checking {loader} files', console=Console(stderr=True))
        broken, labels = [], LabelMaps(dataset, loader) if hasattr(dataset, 'label_map') else None
        sizes, turned, brightest = set(), turns_images(dataset), set()
        for index in chosen:
            info = dataset.get_data_info(index)
            path, label_map = info.get('img_path'), info.get('seg_map_path')
            reasons = [(file, why_broken(file)) for file in (path, label_map) if isinstance(file, str)]
            size = size_of(path, turned) if isinstance(path, str) and not reasons[0][1] else None
            if size:
                sizes.add(size)
                brightest.add(brightest_of(path) or 0)
                reasons.append((path, why_other_size(size, info)))
            if labels and isinstance(label_map, str) and '://' not in label_map and not any(reason for _, reason in reasons):
                reasons.append((label_map, why_other_shape(labels.add(index, label_map), size)))
            broken += [f'{file}: {reason}' for file, reason in reasons if reason]
        record = self.records.get(dataset)
        if record and sizes and not record.sizes:
            record.sizes = spread(sizes) + f' ({SAMPLE} opened)' * (count > SAMPLE and not self.check_all)
        if 0 < max(brightest, default=0) < 2 ** 15 and keeps_upper_bits(dataset):
            _warn_of_dark_images(max(brightest), dataset)
        if labels and labels.seen and not broken:
            labels.check()
        return broken


def _say_of_filter(dataset: BaseDataset, images: int) -> None:
    """mmdet leaves images out of a training without a word."""
    left_out, settings = images - len(dataset.data_list), dataset.filter_cfg or {}
    reasons = ['without objects of its classes'] * bool(settings.get('filter_empty_gt'))
    reasons += [f'with a side below {settings.get("min_size")} pixels'] * bool(settings.get('min_size'))
    if left_out > 0 and reasons and not dataset.test_mode:
        say(f'{name_of(dataset)}: {left_out} of {images} images are left out of the training (filter_cfg: those '
            f'{", or ".join(reasons)})')


def _warn_of_far_corners(boxes: np.ndarray, counts: Sequence[int], infos: Sequence[dict], name: str) -> None:
    """Boxes given by two corners, read as a corner and a size, end outside of their image; mmdet takes them as they are."""
    sizes = np.repeat([(info['width'], info['height']) for info in infos], counts, axis=0)
    outside = int((boxes[:, 2:] > sizes + SLACK).any(axis=1).sum())
    if outside:
        warn(f'{outside} of {len(boxes)} boxes of {name} end outside of their image; a bbox must be (x, y, width, height), not '
             'two corners')


def _warn_of_dark_images(brightest: int, dataset: BaseDataset) -> None:
    """Data of 10, 12 or 14 bits in images of 16 bits become almost black."""
    warn(f'{name_of(dataset)} has images of 16 bits, but in those that were opened no value is above {brightest}. Of the 16 '
         f'bits the upper 8 are loaded, so that none will be above {brightest // 256} of 255: write images of 8 bits, scaled '
         'to the range of the data')


def _count_labels(dataset: BaseDataset, record: Record) -> None:
    for info in dataset.data_list:
        record.objects.update(np.atleast_1d(info['gt_label']).tolist())
    count = len(record.classes) if record.classes else None
    wrong = sorted(label for label in record.objects if label < 0 or (count is not None and label >= count))
    if wrong:
        raise LaunchError(f'every label of {name_of(dataset)} must be from 0 to {(count or 1) - 1}, but '
                          f'{sum(record.objects[label] for label in wrong)} of {record.images} images have '
                          f'{first_names(wrong)}: correct {dataset.ann_file or "the classes"}')
    _warn_of_missing(record, dataset, 'image')


def _warn_of_missing(record: Record, dataset: BaseDataset, what: str) -> None:
    missing = [name for label, name in enumerate(record.classes or ()) if not record.objects[label]]
    if missing:
        warn(f'{len(missing)} of {len(record.classes)} classes have no {what} in {name_of(dataset)}: '
             f'{first_names(missing, 10)}')


def check_run(runner: Any, loops: Sequence[str], classes: Sequence[str] | None = None, check_all: bool = False) -> None:
    """Builds the data sets of a run, and checks them, before weights are downloaded or loaded.

    Args:
        runner (Runner | FlexibleRunner): built, and not started.
        loops (Sequence[str]): among 'train', 'val' and 'test'; those that the config does not have are left out.
        classes (Sequence[str] | None): see :class:`DataChecks`. Default: None.
        check_all (bool): see :class:`DataChecks`. Default: False.

    Raises:
        LaunchError: for what cannot be corrected.
    """
    checks = DataChecks(classes, check_all)
    for hook in runner.hooks:
        if isinstance(hook, HOOKS.get('DataCheckHook')):  # which the config names; the checks of the tool replace its own
            hook.checks.stop()
            hook.checks, hook.done = checks, True
            break
    else:  # it checks the checkpoint
        runner.register_hook(dict(type='DataCheckHook', checks=checks))
    with checks.watching():
        built = {name: loop for name in loops if (loop := getattr(runner, f'{name}_loop')) is not None}
    if built:
        check_loops(checks, runner, built)


def rehearse(runner: Any) -> None:
    """Does all that a training does before its first iteration, and loads one batch of the data loader of every loop.

    The optimizer and the schedules are built, and weights are loaded. Afterwards the runner cannot train.

    Raises:
        LaunchError: a batch cannot be loaded, or what any other step raises.
    """
    def load_one_batch_each() -> None:
        for loop in (runner.train_loop, runner.val_loop):
            if hasattr(loop, 'dataloader'):  # loops by iterations have an iterator, which their endless sampler gives once
                next(getattr(loop, 'dataloader_iterator', None) or iter(loop.dataloader))

    runner.train_loop.run = load_one_batch_each
    runner.train()


def check_loops(checks: DataChecks, runner: Any, loops: Mapping[str, Any]) -> None:
    """Checks the loops that a runner has built."""
    loops = {name: loop for name, loop in loops.items() if hasattr(loop, 'dataloader')}
    evaluators = {name: loop.evaluator for name, loop in loops.items() if hasattr(loop, 'evaluator')}
    model = runner.model
    if not isinstance(model, nn.Module):  # FlexibleRunner builds it later; without memory that takes a moment
        with torch.device('meta'):
            model = MODELS.build(copy.deepcopy(model))
    while hasattr(model, 'module') and isinstance(model.module, nn.Module):  # of DDP, and of test-time augmentation
        model = model.module
    checks.check({name: loop.dataloader for name, loop in loops.items()}, model, evaluators)
