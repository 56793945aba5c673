# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Predictions on your own images: one function for the inferencers of mmdet, mmseg and mmpretrain.

The config's ``default_scope`` selects the package. Results are JSON in COCO's format: ``images.json`` lists images and
categories, and ``predictions.json`` the results, so that ``COCO('images.json').loadRes('predictions.json')`` reads them.
"""
import copy
import glob
import json
import os
import os.path as osp
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping, Sequence
from unittest.mock import patch

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import TRANSFORMS, DefaultScope
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from ..checkpoint import CheckpointError, read_checkpoint
from ..checkpoint.files import check_folder, check_output, write_whole
from ..checkpoint.loading import check_weights, find_differences, find_meta, find_state_dict
from ..checkpoint.safe import first_names
from ..checkpoint.zoo import find_address
from ..converters import to_current_names
from ..runtime import EXTENSIONS, TOP, earlier_outputs, encode_map, encode_picture
from ..utils.configs import kind_of
from .checks import check_checkpoint, classes_of_meta, find_file_classes, read_annotations
from .checks.common import class_of, settings_of_leaves
from .checks.model import check_heads, check_sliding_window
from .checks.report import Record
from .checks.settings import put_classes_right
from .errors import PACKAGES, LaunchError, build_errors

# Models ----------------------------------------------------------------------------------------------------------------------

def load_weights(model: nn.Module, checkpoint: str) -> Mapping[str, Any]:
    """Loads all of a model's weights, or none. mmengine's own loading only warns of those that do not fit.

    Args:
        model (nn.Module): a whole detector, segmentor or classifier.
        checkpoint (str): path or URL, also of a file of the authors' code, which is converted.

    Returns:
        Mapping: the checkpoint's ``meta``, {} if it has none.

    Raises:
        LaunchError: if there is no such file, or if it does not hold a whole model.
        CheckpointError: if it cannot be read, holds unusable weights, or weights with other names or shapes.
    """
    check_checkpoint(checkpoint, 'the command line')
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    contents = to_current_names(read_checkpoint(checkpoint, logger=None), checkpoint, shapes, log=True)
    weights, meta = find_state_dict(contents, checkpoint)[0], find_meta(contents, checkpoint)
    differences = find_differences(shapes, weights, checkpoint)
    if differences:
        raise CheckpointError(f"{checkpoint} does not fit the config's {type(model).__name__}: {differences}")
    check_weights(weights, checkpoint)
    model.load_state_dict(weights, strict=False)
    return meta


def build_inferencer(cfg: Config, checkpoint: str | None, device: str | None = None, deploy: bool = False):
    """The inferencer of the config's package, with the checkpoint's weights.

    Args:
        cfg (Config): from :func:`revcol_mm.apis.load_config`.
        checkpoint (str | None): path or URL of a whole model, also a file of the authors' code; ``zoo``, what the model index
            names for the config; ``zoo:NAME``, for another config; or None, random weights.
        device (str | None): Default: None, a GPU if there is one.
        deploy (bool): fold the backbone (:meth:`RevCol.switch_to_deploy`). Default: False.

    Returns:
        DetInferencer | MMSegInferencer | ImageClassificationInferencer: its ``classes`` and their colours are the
        checkpoint's, and where it has none, those of the config's data set (by themselves the inferencers would take COCO's
        or Cityscapes').

    Raises:
        LaunchError, CheckpointError: as :func:`load_weights`; also for a config of another package, without a test pipeline,
            or of a model that cannot be built, and for a device that does not exist.
    """
    scope = cfg.get('default_scope')
    if scope not in PACKAGES:
        raise LaunchError(f'default_scope must be one of {", ".join(PACKAGES)} for inference, but got {scope!r}')
    if checkpoint is not None:
        checkpoint = find_address(checkpoint, cfg.filename)
        check_checkpoint(checkpoint, 'the command line')
    device = device or get_device()
    check_device(device)
    cfg = with_test_set(cfg)
    put_classes_right(cfg.test_dataloader, 'test_dataloader')
    with warnings.catch_warnings(), build_errors(cfg), \
            DefaultScope.overwrite_default_scope(scope):  # whatever ran in this process before
        warnings.simplefilter('ignore')  # of random weights and other data sets' classes, both replaced below
        if scope == 'mmdet':
            from mmdet.apis import DetInferencer
            inferencer = DetInferencer(model=cfg, device=device, show_progress=False)
        elif scope == 'mmseg':
            from mmseg.apis import MMSegInferencer
            inferencer = MMSegInferencer(model=cfg, device=device)
            inferencer.show_progress = False
        else:
            from mmpretrain import ImageClassificationInferencer
            inferencer = ImageClassificationInferencer(model=cfg, pretrained=False, device=device)
    meta = {} if checkpoint is None else load_weights(inferencer.model, checkpoint)
    classes, palette = _classes_and_palette(cfg, meta, scope)
    check_heads(inferencer.model, [Record(tuple(classes))] if classes else [], 'the checkpoint or the data set')
    check_sliding_window(inferencer.model)
    if scope == 'mmseg':  # which would take Cityscapes' for what is missing
        classes = classes or [str(label) for label in range(inferencer.model.num_classes)]
        palette = palette or np.random.default_rng(0).integers(256, size=(len(classes), 3)).tolist()
    inferencer.classes = classes
    inferencer.model.dataset_meta = dict(classes=classes, palette=palette or 'random')
    if inferencer.visualizer is not None:
        inferencer.visualizer.dataset_meta = inferencer.model.dataset_meta
    if scope == 'mmpretrain':
        _read_as_configured(inferencer, cfg)
    if deploy:
        backbone = getattr(inferencer.model, 'backbone', None)
        if not hasattr(backbone, 'switch_to_deploy'):
            raise LaunchError(f'only a RevCol can be folded for inference, but the backbone is a {type(backbone).__name__}: '
                              'leave deploy out')
        backbone.switch_to_deploy()
    return inferencer


def _read_as_configured(inferencer, cfg: Config) -> None:
    """mmpretrain's inferencer reads files with the defaults, whatever the LoadImageFromFile of the test pipeline says."""
    preprocess = inferencer.preprocess
    settings = next((step for step in cfg.test_dataloader.dataset.pipeline if kind_of(step) == 'LoadImageFromFile'), None)
    if settings is not None:
        load = TRANSFORMS.build(dict(settings))
        inferencer.preprocess = lambda inputs, *args, **kwargs: preprocess(
            (load(dict(img_path=image))['img'] if isinstance(image, str) else image for image in inputs), *args, **kwargs)


def read_test_settings(cfg: Config, meta: Mapping) -> tuple[Sequence[Mapping], Sequence[str] | None, list | None]:
    """How a config's test prepares images, and what the model's labels mean.

    Args:
        cfg (Config): from :func:`revcol_mm.apis.load_config`.
        meta (Mapping): the checkpoint's, from :func:`load_weights`.

    Returns:
        tuple: settings of the pipeline's steps; names of the classes, and their colours, of the checkpoint, and where it has
        none, of the config's data set.

    Raises:
        LaunchError: for a config of another package, or without a test pipeline.
    """
    scope = cfg.get('default_scope')
    if scope not in PACKAGES:
        raise LaunchError(f'default_scope must be one of {", ".join(PACKAGES)}, but got {scope!r}')
    cfg = with_test_set(cfg)
    put_classes_right(cfg.test_dataloader, 'test_dataloader')
    return cfg.test_dataloader.dataset.pipeline, *_classes_and_palette(cfg, meta, scope)


def check_device(device: str) -> None:
    """Raises LaunchError for a device that cannot be used."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without it
        raise LaunchError(f'device {device!r} cannot be used: {str(error).splitlines()[0]}') from error


def with_test_set(cfg: Config) -> Config:
    """A copy of a config in which ``test_dataloader.dataset`` is one data set, whose pipeline tells how images are prepared.

    Raises:
        LaunchError: if there is no such pipeline.
    """
    return _with_one_test_set(cfg) if cfg.get('test_dataloader') else _with_test_pipeline(cfg)


def _with_one_test_set(cfg: Config) -> Config:
    """A config whose test set is the first of those inside of its wrapper, because the inferencers read its pipeline."""
    dataset = next(settings_of_leaves(cfg.test_dataloader.dataset))
    if 'pipeline' not in dataset:
        raise LaunchError(f'{cfg.filename} must have a test data set with a pipeline, which tells how images are prepared, but '
                          f'{dataset.get("type")} has none')
    cfg = copy.deepcopy(cfg)
    cfg.test_dataloader.dataset = copy.deepcopy(dataset)
    return cfg


def _with_test_pipeline(cfg: Config) -> Config:
    """A config without a test (ImageNet-22K has no validation split), with a test data loader made of its ``test_pipeline``."""
    if not (cfg.get('test_pipeline') and cfg.get('train_dataloader')):
        raise LaunchError(f'{cfg.filename} must have a test_dataloader, or a test_pipeline beside its train_dataloader, which '
                          'tells how images are prepared')
    cfg = copy.deepcopy(cfg)
    cfg.test_dataloader = dict(dataset=dict(cfg.train_dataloader.dataset, pipeline=cfg.test_pipeline))
    return cfg


def _classes_and_palette(cfg: Config, meta: Mapping, scope: str) -> tuple[Sequence[str] | None, list | None]:
    """Those of the checkpoint, else those of the config's data set in the order of its file, else None."""
    dataset = cfg.test_dataloader.dataset
    kind = class_of(dataset, scope)
    defaults = getattr(kind, 'METAINFO', {})
    # OpenMMLab's checkpoints from before mmengine have CLASSES and PALETTE directly in their meta.
    for source in (meta.get('dataset_meta') or {}, meta):
        source = {str(key).lower(): value for key, value in source.items()}
        if source.get('classes'):
            return classes_of_meta(dict(dataset_meta=source)), source.get('palette')
    given = dict(dataset.get('metainfo') or {}, **({'classes': dataset['classes']} if dataset.get('classes') else {}))
    found = kind._load_metainfo(given) if hasattr(kind, '_load_metainfo') else {**defaults, **given}
    given, order = found.get('classes'), find_file_classes(cfg)
    palette = found.get('palette')
    classes = order or given
    if classes and isinstance(palette, (list, tuple)):
        named = dict(zip((given if len(palette) == len(given or ()) else defaults.get('classes')) or (), palette))
        palette = [named[name] for name in classes] if set(classes) <= set(named) else palette
        palette = palette if len(palette) == len(classes) else None  # mmseg refuses another number
    if classes:
        print('warning: the checkpoint names no classes, so that its labels are taken for those of the data'
             f'{", in the order of their file" * bool(order)}: ({first_names(classes, 10)})', file=sys.stderr)
    return classes, palette


# Images ----------------------------------------------------------------------------------------------------------------------

def find_images(patterns: Sequence[str], out: str | None = None) -> list[str]:
    """All images that the patterns name: files, folders (with all images below) and globs; in order, without repetition.

    Args:
        patterns (Sequence[str]): what the user named.
        out (str | None): folder of the outputs. Pictures and label maps of an earlier run in it are no images, unless they are
            named one by one. Default: None.

    Raises:
        FileNotFoundError: for a pattern that names no image.
    """
    earlier = earlier_outputs(out)
    unique: dict[str, str] = {}
    for pattern in patterns:
        pattern = osp.expanduser(pattern)
        found = [pattern] if osp.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        images = []
        for path in found:
            if osp.isdir(path):
                inside = glob.glob(osp.join(glob.escape(path), '**', '*'), recursive=True)
                images += sorted(file for file in inside if file.lower().endswith(EXTENSIONS) and osp.isfile(file))
            else:
                images.append(path)
        if images != [pattern]:
            images = [path for path in images if not osp.realpath(path).startswith(earlier)]
        if not images:
            raise FileNotFoundError(f'there is no image {pattern} (looked from {os.getcwd()})' if not found else
                                    f'there are no images ({", ".join(EXTENSIONS)}) in {pattern}')
        for path in images:
            unique.setdefault(osp.abspath(path), path)
    return list(unique.values())


def read_image(path: str) -> np.ndarray:
    """The image as the models' pipelines read it, (H, W, 3) BGR.

    Raises:
        ValueError: if it is damaged. OpenCV alone would fill the missing part of an image and go on.
    """
    try:
        with patch.object(Image, 'MAX_IMAGE_PIXELS', None), Image.open(path) as image:  # an image of one's own may be large
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'it cannot be read as an image ({error}): copy it again') from None
    pixels = mmcv.imread(path)
    if pixels is None:
        raise ValueError('OpenCV cannot read it as an image: save it as JPEG or PNG')
    return pixels


def output_names(paths: Sequence[str]) -> list[str]:
    """A different name for the outputs of each image, as short as possible: from the bare name to the path with extension."""
    absolute = [osp.abspath(path) for path in paths]
    root = osp.commonpath([osp.dirname(path) for path in absolute])
    files, below = [osp.basename(path) for path in absolute], [osp.relpath(path, root) for path in absolute]
    choices = [[osp.splitext(name)[0] for name in files], files, [osp.splitext(name)[0] for name in below], below]
    return next(names for names in choices if len(set(names)) == len(names))


# Predictions -----------------------------------------------------------------------------------------------------------------

def predict_sample(inferencer, image: str | np.ndarray):
    """Predicts on one image, given by its file or its pixels, (H, W, 3) BGR, and returns the package's data sample."""
    batch, = inferencer.preprocess([image])
    sample, = inferencer.forward(batch[1] if type(inferencer).__name__ == 'DetInferencer' else batch)  # mmdet's has images, too
    return sample.cpu()


def predict_image(inferencer, path: str, image: np.ndarray, draw: bool = True, score_thr: float = 0.3
                  ) -> tuple[list[dict], np.ndarray | None, np.ndarray | None]:
    """Predicts on one image.

    Args:
        inferencer (BaseInferencer): from :func:`build_inferencer`.
        path (str): the image's file.
        image (np.ndarray): its pixels, from :func:`read_image`.
        draw (bool): whether to make a picture. Default: True.
        score_thr (float): lowest score that a detector's picture shows. Default: 0.3.

    Returns:
        tuple: COCO's results without ``image_id``, ``category_id`` being the model's label from 0; the label map (H, W), in
        segmentation only; and the picture, (H, W, 3) BGR.
    """
    kind = type(inferencer).__name__
    sample = predict_sample(inferencer, path)
    if kind == 'ImageClassificationInferencer':
        picture = _draw_class(inferencer, image, sample) if draw else None
        return _class_results(sample), None, picture
    threshold = dict(pred_score_thr=score_thr) if kind == 'DetInferencer' else {}
    picture = inferencer.visualize([path], [sample], return_vis=True, **threshold)[0][..., ::-1] if draw else None
    if kind == 'DetInferencer':
        return _instance_results(sample.pred_instances), None, picture
    labels = sample.pred_sem_seg.data[0].numpy().astype(np.int64)  # of a single channel they are float32
    return _map_results(labels), labels, picture


def _draw_class(inferencer, image: np.ndarray, sample) -> np.ndarray:
    from mmpretrain.visualization import UniversalVisualizer
    inferencer.visualizer = inferencer.visualizer or UniversalVisualizer()
    return inferencer.visualizer.visualize_cls(
        image[..., ::-1], sample, classes=inferencer.classes, draw_gt=False, resize=max(256, min(image.shape[:2])))[..., ::-1]


def _class_results(sample) -> list[dict]:
    scores, labels = sample.pred_score.topk(min(TOP, len(sample.pred_score)))
    return [dict(category_id=label, score=score) for label, score in zip(labels.tolist(), scores.tolist())]


def _instance_results(instances) -> list[dict]:
    boxes = instances.bboxes.clone()
    boxes[:, 2:] -= boxes[:, :2]  # x1, y1, x2, y2 -> x, y, width, height
    results = [dict(category_id=label, bbox=box, score=score) for label, box, score in
               zip(instances.labels.tolist(), boxes.tolist(), instances.scores.tolist())]
    for result, mask in zip(results, instances.get('masks', ())):
        result['segmentation'] = encode_mask(np.asarray(mask))
    return results


def _map_results(labels: np.ndarray) -> list[dict]:
    results = []
    for label in np.unique(labels).tolist():
        segmentation = encode_mask(labels == label)
        results.append(dict(category_id=label, segmentation=segmentation, area=int(coco_mask.area(segmentation)),
                            bbox=coco_mask.toBbox(segmentation).tolist(), score=1.0))
    return results


def encode_mask(mask: np.ndarray) -> dict:
    """COCO's run-length encoding of a (H, W) mask, which JSON can hold."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=[int(side) for side in encoded['size']], counts=encoded['counts'].decode())


# Whole runs ------------------------------------------------------------------------------------------------------------------

@dataclass
class Numbering:
    """Ids of images and categories: counted, or found by name in the COCO annotation file ``source``."""
    images: dict[str, int] = field(default_factory=dict)
    categories: dict[int, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    source: str = ''

    @classmethod
    def from_annotations(cls, path: str) -> 'Numbering':
        """Reads the ids of images by file name, and of categories by name; call :meth:`set_classes` afterwards.

        Raises:
            LaunchError: if the file is missing, or does not hold COCO annotations.
        """
        found, names = read_annotations(path)
        images = {osp.basename(name): number for name, number in found}
        if len(images) < len(found):
            raise LaunchError(f'the images of {path} must have different file names, because their ids are found by name, but '
                              'some in different folders have the same')
        return cls(images, names=names, source=path)

    def set_classes(self, classes: Sequence[str] | None) -> None:
        """Finds the categories of the model's classes.

        Raises:
            LaunchError: if the annotations lack one of the classes, or if the classes are not known.
        """
        if not classes:
            raise LaunchError(f'the categories of {self.source} are found by name, but neither the checkpoint nor the data set '
                              "of test_dataloader has the names of the model's classes: add metainfo=dict(classes=(…)) to it")
        missing = [name for name in classes if name not in self.names]
        if missing:
            raise LaunchError(f'{self.source} must have all categories that the model predicts, but has no '
                              f'{first_names(missing)}')
        self.categories = {label: self.names[name] for label, name in enumerate(classes)}

    def image(self, path: str, index: int) -> int:
        """The id of an image. Raises ValueError for an image that the annotations do not contain."""
        if not self.source:
            return index + 1
        if osp.basename(path) not in self.images:
            raise ValueError(f'{self.source} has no image of this name: add it there, or leave it out here')
        return self.images[osp.basename(path)]

    def category(self, label: int) -> int:
        return self.categories.get(label, label)


@dataclass
class Summary:
    """Result of a run: number of images and of results, and the reason for every image that was skipped, by path."""
    images: int = 0
    results: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def predict(inferencer, paths: Sequence[str], out: str, draw: bool = True, score_thr: float = 0.3,
            numbering: Numbering | None = None, force: bool = False,
            progress: Callable[[Sequence], Iterator] = iter) -> Summary:
    """Predicts on images, and writes ``images.json``, ``predictions.json``, and pictures and label maps into folders.

    An image that cannot be read, or that the model refuses, is skipped. The JSON files appear at the end.

    Args:
        inferencer (BaseInferencer): from :func:`build_inferencer`.
        paths (Sequence[str]): from :func:`find_images`.
        out (str): the folder; made if it does not exist.
        draw (bool): whether to write pictures to ``vis``. Default: True.
        score_thr (float): lowest score that a detector's picture shows; the JSON holds all. Default: 0.3.
        numbering (Numbering | None): ids. Default: None, images from 1 and categories from 0.
        force (bool): whether to replace the files of an earlier run. Default: False.
        progress (Callable): wraps the sequence of images, for example in a progress bar. Default: iter.

    Returns:
        Summary: of the run.

    Raises:
        CheckpointError: if an output exists, or is an input, or if ``out`` cannot be made.
    """
    check_folder(out, make=True)
    numbering = numbering or Numbering()
    names = output_names(paths)
    inputs = {osp.realpath(path) for path in paths}
    vis = {path: osp.join(out, 'vis', f'{name}.jpg') for path, name in zip(paths, names)}
    maps = {path: osp.join(out, 'maps', f'{name}.png') for path, name in zip(paths, names)}
    for path in (*vis.values(), *maps.values()):
        if osp.realpath(path) in inputs:
            raise CheckpointError(f'the output {path} is one of the images, which are never changed: choose another folder')
    os.makedirs(out, exist_ok=True)
    files = {name: osp.join(out, f'{name}.json') for name in ('images', 'predictions')}
    pictures = vis.values() if draw else ()
    label_maps = maps.values() if type(inferencer).__name__ == 'MMSegInferencer' else ()
    for path in (*files.values(), *filter(osp.lexists, (*pictures, *label_maps))):
        check_output(path, '', force)

    summary, images, predictions, taken = Summary(), [], [], set()
    for index, path in enumerate(progress(paths)):
        try:
            image_id = numbering.image(path, index)
            if image_id in taken:
                raise ValueError(f'another image of the same name has its id, {image_id}, already: predict on only one of them')
            image = read_image(path)
            results, labels, picture = predict_image(inferencer, path, image, draw, score_thr)
            contents = {}
            if picture is not None:
                contents[vis[path]] = encode_picture(np.ascontiguousarray(picture[..., ::-1]))
            if labels is not None:
                contents[maps[path]] = encode_map(labels)
        except Exception as error:  # of this image, or of memory, in any part of three packages
            summary.skipped[path] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        height, width = image.shape[:2]
        taken.add(image_id)
        images.append(dict(id=image_id, file_name=path, width=width, height=height))
        predictions += [dict(result, image_id=image_id, category_id=numbering.category(result['category_id']))
                        for result in results]
        for file_name, content in contents.items():
            os.makedirs(osp.dirname(file_name), exist_ok=True)
            with write_whole(file_name) as file:
                file.write(content)
    classes = inferencer.classes or [str(label) for label in range(1 + max(
        (result['category_id'] for result in predictions), default=-1))]
    categories = [dict(id=numbering.category(label), name=name) for label, name in enumerate(classes)]
    with ExitStack() as stack:  # both appear, or none
        for name, contents in dict(images=dict(images=images, annotations=[], categories=categories),
                                   predictions=predictions).items():
            stack.enter_context(write_whole(files[name])).write(json.dumps(contents).encode())
    summary.images, summary.results = len(images), len(predictions)
    return summary
