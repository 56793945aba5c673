# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the training of a config needs in memory, before there is a GPU to try it on.

Backbone and neck run without memory and are counted to the byte (:mod:`.memory`). What comes behind them depends on values:
which boxes are proposed, sampled and matched. So the heads train a step on the CPU on made-up data of two small sizes, and the
straight line through the two gives the estimate. The optimizer's state is what its own step makes.
"""
import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Sequence

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..models.backbones.base import ColumnStack
from .configs import as_list, build_on_meta, kind_of, replace_sync_bn
from .memory import StepBytes, count_step, without_memory

#: The parts that are counted to the byte.
BODY = ('backbone', 'neck')
#: Training images of a detector whose config does not tell their size.
DETECTION_SHAPE = (800, 1344)
#: Areas in pixels at which the heads are measured. On smaller images, memory is highest at a different point of the step, so a
#: line through them would be wrong.
HEAD_AREAS = (384**2, 512**2)
#: Images of that measurement: two, because batch norms of pooled features need two. Boxes per image: so many that every stage
#: of a two-stage detector gets all the positive boxes that it samples, a quarter of 512, as in a crowded image.
HEAD_IMAGES, BOXES = 2, 128
MIXED = dict(fp16=torch.float16, float16=torch.float16, bf16=torch.bfloat16, bfloat16=torch.bfloat16)
_UNITS = dict(KB=10**3, MB=10**6, GB=10**9, TB=10**12, KIB=2**10, MIB=2**20, GIB=2**30, TIB=2**40)


@dataclass(frozen=True)
class Way:
    """A way to train the backbone, and what it costs.

    Attributes:
        name: what it is called in a table.
        options: the arguments of the backbone that choose it.
        kept, peak: bytes of the activations of backbone and neck; see :class:`~.memory.StepBytes`.
        total: bytes of the whole step at its largest moment.
        step: time of the backbone's step as a multiple of the plain one, by arithmetic: a forward pass is a third of a step,
            and rebuilding or recomputing a column is one more forward pass of it.
    """
    name: str
    options: dict[str, Any]
    kept: int
    peak: int
    total: int
    step: float


def parse_bytes(text: str) -> int:
    """Reads '24GB' (10^9 bytes each), '24GiB' (2^30) or '24576MB'; the number may have decimals.

    Raises:
        ValueError: for another text, or nothing at all.
    """
    number = text.strip().rstrip('BbIiKkMmGgTt')
    unit = text.strip()[len(number):].upper()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if unit not in _UNITS or not 0 < value < math.inf:
        raise ValueError(f'a budget must be a number above 0 with a unit, such as 24GB, 24GiB or 24576MiB, but got {text!r}')
    return int(value * _UNITS[unit])


def training_shape(cfg: Config) -> tuple[int, int]:
    """Height and width of the largest training image, as far as the config tells it.

    For detection it is the largest scale of the training pipeline, padded: 800×1344 for (1333, 800). Images of the format
    4:3 need less. Without a scale it is :data:`DETECTION_SHAPE`. For segmentation and classification it is the crop.

    Raises:
        ValueError: if the config does not tell the size.
    """
    scope, dataset = cfg.get('default_scope'), (cfg.get('train_dataloader') or {}).get('dataset') or {}
    if scope == 'mmdet':
        size, divisor = _largest_image(dataset), (cfg.model.get('data_preprocessor') or {}).get('pad_size_divisor', 1)
        return tuple(math.ceil(length / divisor) * divisor for length in reversed(size)) if size else DETECTION_SHAPE
    sizes = [step.get('crop_size') or step.get('scale') for step in dataset.get('pipeline', []) if 'Crop' in kind_of(step)]
    if not sizes or not sizes[-1]:
        raise ValueError(f'the training images of default_scope={scope!r} have no crop that tells their size: give --shape H W')
    return (sizes[-1], ) * 2 if isinstance(sizes[-1], int) else tuple(sizes[-1])


def _largest_image(dataset: dict) -> tuple[int, int] | None:
    """Width and height of the largest image of a data set of mmdet, with those that it wraps; None if no transform tells it."""
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    return _transformed(dataset.get('pipeline') or [], max((_largest_image(part) for part in inner if part), key=_area,
                                                           default=None))


def _transformed(steps: Sequence[dict], size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The largest size that the transforms make of an image of this size: the last one that resizes it decides."""
    for step in steps:
        kind = kind_of(step)
        if step.get('transforms'):  # RandomChoice holds pipelines, others hold one
            parts = step['transforms'] if isinstance(step['transforms'][0], (list, tuple)) else [step['transforms']]
            size = max((_transformed(part, size) for part in parts), key=_area)
        elif kind.endswith('Resize') and (step.get('scales') or step.get('scale')):
            size = _largest_scale(step)
        elif kind == 'RandomCrop' and step.get('crop_type', 'absolute') == 'absolute' and size:
            size = tuple(map(min, size, step['crop_size']))
    return size


def _largest_scale(step: dict) -> tuple[int, int]:
    """Width and height of the largest image that a Resize, RandomResize or RandomChoiceResize gives."""
    choice = isinstance(step.get('scales'), list)
    scales = step.get('scales') or step['scale']
    if isinstance(scales, int) or not choice and isinstance(scales[0], int):
        scales = [scales]
    elif not choice:  # width and height are drawn separately, each from its range
        scales = [tuple(map(max, *scales))]
    pairs = [(scale, scale) if isinstance(scale, int) else tuple(scale) for scale in scales]
    if step.get('keep_ratio'):  # limits of the longer and of the shorter side, in any order
        pairs = [tuple(sorted(pair, reverse=True)) for pair in pairs]
    ratio = (step.get('ratio_range') or [1])[-1]
    return tuple(int(length * ratio) for length in max(pairs, key=_area))


def _area(size: tuple[int, int] | None) -> int:
    return math.prod(size) if size else 0


def column_network(cfg: Config) -> type[ColumnStack]:
    """The class of a config's backbone.

    Raises:
        ValueError: if it is no network of columns.
    """
    backbone = (cfg.get('model') or {}).get('backbone') or {}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        kind = MODELS.get(backbone['type']) if isinstance(backbone.get('type'), str) else backbone.get('type')
    if not (isinstance(kind, type) and issubclass(kind, ColumnStack)):
        raise ValueError(f'{cfg.filename} must have a network of columns as its backbone (RevCol, RevColViT, RevColC2f), '
                         f'but has {kind_of(backbone)}')
    return kind


class Plan:
    """The memory of one process that trains a config.

    Args:
        cfg (Config): a config of mmdet, mmseg or mmpretrain whose backbone is a network of columns. It is not changed.
        shape (Sequence[int] | None): height and width of the images after padding. Default: None, :func:`training_shape`.
        batch (int | None): images of a process. Default: None, that of the config's ``train_dataloader``.
        amp (str | None): 'fp16' or 'bf16' for mixed precision. Default: None, what the config's ``optim_wrapper`` says.
        gpus (int): processes. With several, the model is sharded if the config's ``strategy`` is an FSDP one, and otherwise
            every process has all of it and DDP's buckets, which are one more copy of the gradients. Default: 1.

    Raises:
        ValueError: if the backbone is no network of columns, or for a shape, batch, ``amp`` or number of GPUs that cannot be.
    """

    def __init__(self, cfg: Config, shape: Sequence[int] | None = None, batch: int | None = None, amp: str | None = None,
                 gpus: int = 1) -> None:
        self.cfg = cfg = copy.deepcopy(cfg)
        wrapper = cfg.get('optim_wrapper')
        if not wrapper:
            raise ValueError(f'{cfg.filename} must have an optim_wrapper, which says how the model is trained, but has none')
        if amp is None and kind_of(wrapper) == 'AmpOptimWrapper':
            amp = wrapper.get('dtype') or 'fp16'
        if amp is not None and amp not in MIXED:
            raise ValueError(f'amp must be one of {", ".join(MIXED)}, but got {amp!r}')
        batch = (cfg.get('train_dataloader') or {}).get('batch_size') if batch is None else batch
        for name, value in dict(batch=batch, gpus=gpus).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive integer, but got {value!r}')
        self.autocast, self.batch, self.gpus = MIXED.get(amp), batch, gpus
        self.shape = tuple(shape or training_shape(cfg))
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f'shape must be two positive integers, height and width, but got {self.shape!r}')
        self.sharded = gpus > 1 and kind_of(cfg.get('strategy')).endswith('FSDPStrategy')
        kind = column_network(cfg)
        if not kind.INVERTIBLE:
            raise ValueError(f'{cfg.filename} must have a backbone that can be trained reversibly, but has {kind.__name__}, '
                             'whose columns have no inverse')
        replace_sync_bn(cfg.model)
        self.model = build_on_meta(cfg).train()
        self.backbone: ColumnStack = self.model.backbone
        self._ways: dict[tuple[int | None, int], Way] = {}
        self._body = copy.copy(self.model)  # what extract_feat runs; heads hold tensors that cannot be copied
        self._body._modules = {name: part for name, part in self.model._modules.items() if name in BODY}

    # What lives throughout, and gradients

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes of a process that do not depend on the way the backbone is trained, by what they are for."""
        model, wrapper = self.model, self.cfg.optim_wrapper
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parameters, gradients = _size(model.parameters()), _size(trained)
        share = self.gpus if self.sharded else 1
        parts = {'parameters and buffers': parameters // share + _size(model.buffers()),
                 'gradients': gradients // share,
                 f'optimizer state ({kind_of(wrapper.optimizer)})': self._optimizer_state() // share}
        if any(kind_of(hook).endswith('EMAHook') for hook in self.cfg.get('custom_hooks') or []):
            parts['EMA copy'] = parameters + _size(model.buffers())
        if self.sharded:
            columns = sorted(_size(column.parameters()) for column in self.backbone.columns)
            rest = parameters - sum(columns)
            parts['gathered: two columns, one with gradients, and the rest'] = rest + sum(columns[-2:]) + columns[-1]
        elif self.gpus > 1 and not (self.cfg.get('model_wrapper_cfg') or {}).get('gradient_as_bucket_view'):
            parts["DDP's buckets"] = gradients
        parts['images'] = 4 * self.batch * self.backbone.in_channels * math.prod(self.shape)
        return parts

    def _optimizer_state(self) -> int:
        """Runs a step of the optimizer, whose parameters have no values, and returns the bytes that it leaves."""
        model, config = copy.deepcopy(self.model), copy.deepcopy(self.cfg.optim_wrapper)
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            config.pop(key, None)
        config.optimizer.pop('fused', None)  # which needs values; the state is the same without
        config.type = 'OptimWrapper'
        with DefaultScope.overwrite_default_scope(self.cfg.get('default_scope')):
            optimizer = build_optim_wrapper(model, config).optimizer
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        return _size(value for state in optimizer.state.values() for value in state.values()
                     if isinstance(value, Tensor) and value.is_meta)  # step counters stay on the CPU

    # Activations

    @cached_property
    def neck(self) -> int:
        """Bytes that the neck keeps besides the backbone's features, to the byte."""
        if getattr(self.model, 'neck', None) is None:
            return 0
        self._set(reversible=False, stored_columns=0, with_cp=False)
        whole = self._count(self.shape, self.batch)
        with without_memory(self.model.backbone) as backbone:
            alone = count_step(backbone, self._images(self.shape, self.batch), autocast=self.autocast)
        return whole.kept - alone.kept

    @cached_property
    def heads(self) -> StepBytes:
        """Bytes of what comes behind backbone and neck: an estimate; see :func:`count_heads`."""
        try:
            return self._count_heads(self.batch)
        except (AssertionError, IndexError, RuntimeError):
            _check_widths(self.cfg, self.backbone)
            raise

    def _count_heads(self, batch: int) -> StepBytes:
        return count_heads(self.cfg, self._features, self.shape, batch, self.autocast)

    @property
    def trained_columns(self) -> int:
        """Number of columns that are not frozen; with as many stored ones the training is a plain one."""
        return self.backbone.num_columns - max(self.backbone.frozen_stages, 0)

    def way(self, stored: int | None, batch: int | None = None) -> Way:
        """Counts a way to train the backbone.

        Args:
            stored (int | None): stored columns of reversible training; with :attr:`trained_columns` or more it is plain
                training, and None stands for ``with_cp=True``.
            batch (int | None): images. Default: None, those of the plan.
        """
        key = stored if stored is None else min(stored, self.trained_columns), batch or self.batch
        if key not in self._ways:
            self._ways[key] = self._count_way(*key)
        return self._ways[key]

    def _count_way(self, stored: int | None, batch: int) -> Way:
        if stored is None:
            name, options, rebuilt = 'checkpointed', dict(reversible=False, with_cp=True), self.trained_columns
        elif stored == self.trained_columns:
            name, options, rebuilt = 'plain', dict(reversible=False), 0
        else:
            name, options = f'reversible, {stored} stored', dict(reversible=True, stored_columns=stored)
            rebuilt = self.trained_columns - stored
        self._set(**{**dict(reversible=False, stored_columns=0, with_cp=False), **options})
        if self.cfg.model.backbone.get('with_cp'):  # what the config sets stays set unless an option replaces it
            options = {**options, 'with_cp': stored is None}
        step = self._count(self.shape, batch)
        heads = self.heads if batch == self.batch else self._count_heads(batch)
        fixed = sum(size for part, size in self.fixed.items() if part != 'gradients')
        gradients = self.fixed['gradients']
        behind = _size(parameter for name, parameter in self.model.named_parameters()
                       if parameter.requires_grad and name.partition('.')[0] not in BODY)
        if self.sharded:
            largest = gradients + max(step.kept + heads.peak, step.peak)
        else:  # at the heads' largest moment, when that of the backbone comes, and when the optimizer steps
            largest = max(step.kept + heads.peak_with_gradients, step.peak_with_gradients + behind, gradients)
        return Way(name, options, step.kept, step.peak, fixed + largest, 1 + rebuilt / self.backbone.num_columns / 3)

    def fit(self, budget: int) -> Way:
        """Returns the fastest way that fits into so many bytes.

        Raises:
            ValueError: if none does; the message names the nearest one, and what to change.
        """
        if self.way(self.trained_columns).total <= budget:
            return self.way(self.trained_columns)
        fits, not_ = -1, self.trained_columns  # the largest number of stored columns that fits lies in between
        while not_ - fits > 1:
            middle = 0 if fits < 0 else (fits + not_) // 2  # the least first: if this does not fit, nothing does
            if self.way(middle).total <= budget:
                fits = middle
            elif middle == 0:
                break
            else:
                not_ = middle
        if fits >= 0:
            return self.way(fits)
        changes = ['lower --shape']
        if self.batch > 1:
            changes.insert(0, f'lower --batch (one image needs {gib(self.way(0, 1).total)})')
        if self.autocast is None:
            changes.append('train with --amp')
        if not self.sharded:
            changes.append('shard the model over several GPUs (docs/training.md)')
        raise ValueError(f'the budget must be at least {gib(self.way(0).total)}, which is what reversible training without '
                         f'stored columns needs, but got {gib(budget)}: {", ".join(changes[:-1])} or {changes[-1]}')

    def _set(self, **options: Any) -> None:
        for name, value in options.items():
            setattr(self.model.backbone, name, value)

    def _count(self, shape: Sequence[int], batch: int) -> StepBytes:
        with without_memory(self._body) as model:
            try:
                return count_step(model, self._images(shape, batch), forward=model.extract_feat, autocast=self.autocast)
            except (AssertionError, RuntimeError) as error:
                _check_widths(self.cfg, self.backbone)
                raise ValueError(f'backbone and neck cannot run on images of {shape[0]}×{shape[1]}: {error}') from error

    def _images(self, shape: Sequence[int], batch: int) -> Tensor:
        return torch.empty(batch, self.backbone.in_channels, *shape)

    def _features(self, shape: Sequence[int], batch: int) -> list[torch.Size]:
        """Shapes of what the heads read."""
        with without_memory(self._body) as model, torch.no_grad():
            return [feature.shape for feature in model.extract_feat(self._images(shape, batch))]


def _check_widths(cfg: Config, backbone: ColumnStack) -> None:
    """Tells of a model that cannot run whether its neck, or else its decode head, expects other features than it gets.

    Raises:
        ValueError: it does.
    """
    name = next((name for name in ('neck', 'decode_head') if (cfg.model.get(name) or {}).get('in_channels')), None)
    if name is None:
        return
    outputs = [backbone.channels[level] for level in backbone.out_indices]
    expected, indices = as_list(cfg.model[name].in_channels), cfg.model[name].get('in_index', list(range(len(outputs))))
    got = [outputs[index] for index in as_list(indices) if index < len(outputs)]
    if expected != got and not (len(expected) == 1 and expected[0] in got):
        raise ValueError(f'model.{name}.in_channels must be the channels of the outputs of the backbone, {outputs}, but is '
                         f"{cfg.model[name].in_channels}: change it, or the backbone's arch and out_indices")


def count_heads(cfg: Config, features: Callable, shape: Sequence[int], batch: int,
                autocast: torch.dtype | None = None) -> StepBytes:
    """Estimates the bytes of all that comes behind backbone and neck: the heads, their losses, and what these keep.

    It trains a step on the CPU on :data:`HEAD_IMAGES` images of about :data:`HEAD_AREAS` pixels, with :data:`BOXES` random
    boxes each, and follows the straight line through the two results to the area of ``shape``. Small images are not scaled. A
    step of twice as many images tells what does not grow with them: gradients and half-precision copies of the heads' weights.

    Args:
        cfg (Config): the config.
        features (Callable): ``features(shape, batch)`` returns the shapes of the features for images of this shape.
        shape (Sequence[int]): height and width of the images.
        batch (int): number of images.
        autocast (torch.dtype | None): as in :func:`~.memory.count_step`. Default: None.

    Returns:
        StepBytes: the estimate.
    """
    area = math.prod(shape)
    shapes = [shape] if area <= HEAD_AREAS[-1] else [_similar(shape, size) for size in HEAD_AREAS]
    model = _build_heads(cfg)
    steps = [_count_heads(model, size, features(size, HEAD_IMAGES), autocast) for size in shapes]
    more = _count_heads(model, shapes[0], features(shapes[0], 2 * HEAD_IMAGES), autocast) if batch != HEAD_IMAGES else None
    areas = [math.prod(size) for size in shapes]

    def estimate(name: str) -> int:
        values = [getattr(step, name) for step in steps]
        slope = (values[-1] - values[0]) / (areas[-1] - areas[0]) if len(areas) > 1 else 0
        whole = values[-1] + max(slope, 0) * (area - areas[-1])
        constant = max(2 * values[0] - getattr(more, name), 0) if more else 0
        return int(constant + (whole - constant) * batch / HEAD_IMAGES)

    return StepBytes(*map(estimate, ('kept', 'peak', 'peak_with_gradients')))


def _similar(shape: Sequence[int], area: int) -> tuple[int, int]:
    """The shape of about this area, in multiples of 32."""
    scale = math.sqrt(area / math.prod(shape))
    return tuple(32 * max(1, round(length * scale / 32)) for length in shape)


def _build_heads(cfg: Config) -> nn.Module:
    """The model with values, without the backbone."""
    cfg = copy.deepcopy(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        with torch.device('meta'):
            backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None)).to('meta')
        cfg.model.backbone = dict(type=lambda: backbone)
        cfg.model.pop('init_cfg', None)
        model = MODELS.build(cfg.model).train()
        model.backbone = nn.Identity()
        model.init_weights()
    return model


class _NoArithmetic(TorchDispatchMode):
    """Convolutions, matrix products and RoIAlign give zeros of the right shape, layout and dtype, at once.

    Because of them the heads take minutes on a CPU. With zeros the RPN returns its anchors as proposals, and the later
    steps run as usual.
    """

    SKIPPED = {'aten::convolution', 'aten::convolution_backward', 'aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm',
               'torchvision::roi_align', 'torchvision::_roi_align_backward'}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() not in self.SKIPPED:
            return function(*args, **(kwargs or {}))
        shapes = tree_map(lambda leaf: leaf.to('meta') if isinstance(leaf, Tensor) else leaf, (args, kwargs or {}))
        return tree_map(lambda leaf: torch.zeros_like(leaf, device='cpu') if isinstance(leaf, Tensor) else leaf,
                        function(*shapes[0], **shapes[1]))


def _count_heads(model: nn.Module, shape: Sequence[int], sizes: Sequence[torch.Size],
                 autocast: torch.dtype | None) -> StepBytes:
    torch.manual_seed(0)
    images, samples = _made_up(model, shape, sizes[0][0])
    features = [torch.randn(size).requires_grad_() for size in sizes]

    def forward(images: Tensor, features: Sequence[Tensor]) -> Tensor:
        model.extract_feat = lambda *args, **kwargs: tuple(features)
        return model.parse_losses(model.loss(images, samples))[0]

    with _NoArithmetic():
        return count_step(model, images, features, forward=forward, autocast=autocast)


def _made_up(model: nn.Module, shape: Sequence[int], number: int = HEAD_IMAGES) -> tuple[Tensor, list]:
    """Images of noise, and boxes, masks or labels, whichever the model learns from."""
    package = next(kind.__module__.partition('.')[0] for kind in type(model).__mro__
                   if kind.__module__.partition('.')[0] in ('mmdet', 'mmseg', 'mmpretrain'))
    if package == 'mmdet':
        from mmdet.structures.mask import BitmapMasks
        from mmdet.testing import demo_mm_inputs
        heads = [module for module in model.modules() if 'Mask' in type(module).__name__]
        semantic = getattr(getattr(model, 'roi_head', None), 'with_semantic', False)  # HTC, at stride 8
        data = demo_mm_inputs(number, (3, *shape), [BOXES] * number, num_classes=2, sem_seg_output_strides=8,
                              with_mask=bool(heads), with_semantic=semantic)
        data = model.data_preprocessor(data, training=True)
        for sample in data['data_samples']:
            boxes = sample.gt_instances
            boxes.labels.zero_()  # the one class that every head has
            if heads:
                boxes.masks = BitmapMasks(boxes.masks.masks.astype('uint8'), *shape)  # the dtype of those of a data set
        return data['inputs'], data['data_samples']
    images = torch.randn(number, 3, *shape)
    if package == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        info = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
        labels = [PixelData(data=torch.randint(2, (1, *shape))) for _ in images]
        return images, [SegDataSample(metainfo=info, gt_sem_seg=label) for label in labels]
    from mmpretrain.structures import DataSample
    return images, [DataSample().set_gt_label(0) for _ in images]


def _size(tensors: Any) -> int:
    """Bytes of tensors; each once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def gib(size: int) -> str:
    """Bytes for people: '11.25 GiB'."""
    return f'{size / 2**30:.2f} GiB'
