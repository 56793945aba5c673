# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Parameters and multiply-adds of a config's model, part by part, counted on the meta device, which needs no memory.

One multiply-add is one FLOP here, as in the RevCol paper, in Swin's and ConvNeXt's, and in OpenMMLab's tables. Convolutions,
linear layers, matrix products, attention and deformable attention are counted; norms, activations, additions and
interpolation are not.

Two-stage detectors are counted as in those tables: the box head of every stage gets 1000 proposals and its mask head 100 boxes,
and RoIAlign counts nothing. Auxiliary heads take no part in a prediction: only their parameters are counted.
"""
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Callable, Iterator, Sequence

import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .configs import build_on_meta, kind_of

NUM_BOX_PROPOSALS = 1000
NUM_MASK_PROPOSALS = 100
DETECTION_SHAPE = (800, 1280)


@dataclass(frozen=True)
class Cost:
    """Number of parameters, and of multiply-adds for one image."""
    params: int
    macs: int


def default_shape(cfg: Config) -> tuple[int, int]:
    """Height and width at which papers state FLOPs.

    Detection: 800×1280. Segmentation: the crop's height and four times its width, as 512×2048 or 640×2560. Classification: the
    size of the test crop, or of the training crop in a config without a test.

    Raises:
        ValueError: if the config does not tell the size.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmdet':
        return DETECTION_SHAPE
    if scope == 'mmseg' and cfg.model.get('data_preprocessor', {}).get('size'):
        height, width = cfg.model.data_preprocessor.size
        return height, 4 * width
    if scope == 'mmpretrain':
        pipelines = [cfg[key].dataset.pipeline for key in ('test_dataloader', 'train_dataloader') if cfg.get(key)]
        for step in (step for pipeline in pipelines for step in reversed(pipeline)):
            size = step.get('crop_size') or step.get('scale')
            if kind_of(step) in ('CenterCrop', 'Resize', 'RandomResizedCrop') and size:
                return (size, size) if isinstance(size, int) else tuple(size)
    raise ValueError(f'the usual input size of default_scope={scope!r} is not known: give a shape, height and width')


def count(cfg: Config, shape: Sequence[int] | None = None) -> dict[str, Cost]:
    """Counts a config's model.

    Args:
        cfg (Config): config of mmdet, mmseg or mmpretrain.
        shape (Sequence[int] | None): height and width of the image. Default: None, :func:`default_shape`.

    Returns:
        dict[str, Cost]: the cost of every part, in the order backbone, neck, heads; 'total' comes last.

    Raises:
        ValueError: if the shape is not two positive integers, or too small for the model.
    """
    shape = tuple(shape) if shape is not None else default_shape(cfg)
    if len(shape) != 2 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f'shape must be two positive integers, height and width, but got {shape!r}')
    return count_model(build_on_meta(cfg), shape, (cfg.model.get('backbone') or {}).get('in_channels', 3))


def count_model(model: nn.Module, shape: Sequence[int], channels: int = 3) -> dict[str, Cost]:
    """:func:`count` for a model that is already built, on the meta device and in eval mode, and images of so many channels."""
    params: Counter = Counter()
    for name, parameter in model.named_parameters():
        params[_part(name)] += parameter.numel()
    image = torch.empty(1, channels, *shape, device='meta')
    with torch.no_grad(), _meta_transformers(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter, \
            _by_part(model, counter.get_total_flops) as flops:
        _forward(model, image)
    names = sorted(dict.fromkeys([*params, *flops]), key=lambda part: (part != 'backbone', part != 'neck'))  # then as defined
    parts = {part: Cost(params[part], flops[part] // 2) for part in names}
    return {**parts, 'total': Cost(sum(params.values()), sum(flops.values()) // 2)}


def _part(name: str) -> str:
    """The part that a module or parameter belongs to: 'backbone', 'roi_head.mask_head', …"""
    pieces = name.split('.')
    return '.'.join(pieces[:2 if pieces[0] == 'roi_head' else 1])


def _forward(model: nn.Module, image: Tensor) -> None:
    """Runs the networks of a prediction, without the steps that depend on values (proposals, NMS, RoIAlign)."""
    if hasattr(model, 'roi_head'):
        features = model.extract_feat(image)
        model.rpn_head(features)
        _forward_roi_head(model.roi_head, features)
    elif hasattr(model, 'forward_transformer'):  # DETR and its kin read the image's size from the data sample
        size = tuple(image.shape[-2:])
        model(image, [BaseDataElement(metainfo=dict(img_shape=size, batch_input_shape=size))], mode='tensor')
    elif hasattr(model, 'decode_head'):
        # Not mode='tensor': Mask2Former's head wants data samples, which EncoderDecoder does not hand on.
        samples = [[BaseDataElement()]] if hasattr(model.decode_head, 'pixel_decoder') else []
        model.decode_head(model.extract_feat(image), *samples)
    else:
        model(image, mode='tensor')


def _forward_roi_head(roi_head: nn.Module, features: Sequence[Tensor]) -> None:
    def regions(extractor: nn.Module, number: int) -> Tensor:
        return torch.empty(number, extractor.out_channels, *extractor.roi_layers[0].output_size, device='meta')

    def stages(module: nn.Module) -> Sequence[nn.Module]:
        return module if isinstance(module, nn.ModuleList) else [module]

    if getattr(roi_head, 'with_semantic', False):
        roi_head.semantic_head(features)
    for extractor, head in zip(stages(roi_head.bbox_roi_extractor), stages(roi_head.bbox_head)):
        head(regions(extractor, NUM_BOX_PROPOSALS))
    if not roi_head.with_mask:
        return
    previous = None
    for extractor, head in zip(stages(roi_head.mask_roi_extractor), stages(roi_head.mask_head)):
        x = regions(extractor, NUM_MASK_PROPOSALS)
        if getattr(roi_head, 'mask_info_flow', False):  # HTC: every stage also reads the features of the one before
            _, previous = head(x, previous)
        else:
            head(x)


@contextmanager
def _by_part(model: nn.Module, total: Callable[[], int]) -> Iterator[Counter]:
    """Books every increase of ``total`` on the part of the model whose module is running.

    It wraps ``forward`` of every module instead of using hooks, because OpenMMLab sometimes calls ``head.forward(…)``.
    """
    booked: Counter = Counter()
    running, seen = ['other'], 0

    def book() -> None:
        nonlocal seen
        now = total()
        if now > seen:
            booked[running[-1]] += now - seen
            seen = now

    def wrap(module: nn.Module, part: str) -> None:
        forward = module.forward

        def booked_forward(*args, **kwargs):
            book()
            running.append(part)
            try:
                return forward(*args, **kwargs)
            finally:
                book()
                running.pop()

        module.forward = booked_forward

    modules = [(name, module) for name, module in model.named_modules() if name]
    for name, module in modules:
        wrap(module, _part(name))
    try:
        yield booked
        book()
    finally:
        for _, module in modules:
            del module.forward


class _Sizes(Tensor):
    """Heights and widths of feature maps, kept on the CPU.

    Deformable transformers put them into a tensor and read their values back, which a meta tensor does not have. Where they are
    used together with meta tensors, single numbers become Python's numbers, and tensors become meta tensors.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.to:
            return args[0]

        def join(leaf):
            if not isinstance(leaf, cls):
                return leaf
            return leaf.as_subclass(Tensor).to('meta') if leaf.dim() else leaf.item()

        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # the attributes of tensors are functions too
            if 'device' in kwargs or any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
                args, kwargs = tree_map(join, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def _meta_transformers() -> Iterator[None]:
    """Lets transformers run on the meta device, through operators that the counter knows."""
    shape_as_tensor, fastpath = torch._shape_as_tensor, torch.backends.mha.get_fastpath_enabled()
    torch._shape_as_tensor = lambda x: torch.tensor(tuple(x.shape), device='cpu').as_subclass(_Sizes)
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator otherwise
    try:
        yield
    finally:
        torch._shape_as_tensor = shape_as_tensor
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _sampling_flops(input_shape, grid_shape, *args, out_shape, **kwargs) -> int:
    """Deformable attention samples its values bilinearly (4 multiply-adds for a sample) and sums them with a weight each (1):
    the 5·N·K·C of the Deformable DETR paper's complexity, appendix A.1."""
    return 2 * 5 * prod(out_shape)


_FORMULAS = {torch.ops.aten.grid_sampler_2d: _sampling_flops}
