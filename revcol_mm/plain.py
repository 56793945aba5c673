# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol as a plain PyTorch module with the arguments and methods of timm's models, without mmdet, mmseg and mmpretrain."""
import fnmatch
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import CheckpointError, pad_on_load, read_checkpoint
from .checkpoint.download import download
from .checkpoint.loading import check_weights, find_differences, find_state_dict, strip_module
from .checkpoint.zoo import read_index
from .converters.importing import new_names
from .models import RevCol
from .models.layers import Classifier, init_weights

#: Model -> name of its training -> config of the model index with these weights. The first training is the default.
MODELS = dict(
    revcol_tiny=dict(in1k='revcol_t_in1k'),
    revcol_small=dict(in1k='revcol_s_in1k'),
    revcol_base=dict(in1k='revcol_b_in1k', in22k_ft_in1k='revcol_b_in1k_224_ft', in22k_ft_in1k_384='revcol_b_in1k_384_ft',
                     in22k='revcol_b_in22k'),
    revcol_large=dict(in22k_ft_in1k='revcol_l_in1k_224_ft', in22k_ft_in1k_384='revcol_l_in1k_384_ft', in22k='revcol_l_in22k'),
    revcol_xlarge={},
    revcol_huge=dict(megdata_ft_in1k_640='revcol_h_in1k_640_ft'))
STEM, CLASSIFIER = 'backbone.stem.0', 'head.cls.classifier.1'
REDUCTION = (4, 8, 16, 32)  # strides of the levels


def list_models(filter: str = '', pretrained: bool = False) -> list[str]:
    """Lists the models that :func:`create_model` knows.

    Args:
        filter (str): a pattern with ``*`` and ``?``. Default: '', all.
        pretrained (bool): whether to list the published weights instead, as ``model.training``. Default: False.
    """
    names = [f'{model}.{tag}' for model, tags in MODELS.items() for tag in tags] if pretrained else list(MODELS)
    return [name for name in names if not filter or fnmatch.fnmatch(name, filter)]


def create_model(model_name: str, pretrained: bool = False, features_only: bool = False,
                 out_indices: Sequence[int] | None = None, num_classes: int | None = None, in_chans: int = 3,
                 **kwargs) -> nn.Module:
    """Builds a RevCol, as timm's function of this name does.

    Args:
        model_name (str): one of :func:`list_models`, such as 'revcol_base', or with a training, 'revcol_base.in22k'.
        pretrained (bool): whether to load the authors' ImageNet weights, which are downloaded once. Default: False.
        features_only (bool): whether to build a :class:`RevColFeatures`, which returns feature maps. Default: False, a
            classifier, :class:`RevColClassifier`.
        out_indices (Sequence[int] | None): with ``features_only``, the levels to return, from 0 (stride 4) to 3 (stride 32);
            negative ones count from the end. Default: None, all four.
        num_classes (int | None): number of classes; 0 for none. Another number than that of the pre-trained weights starts a
            new classifier. Default: None, that of the training (1000, or 21841 for 22K).
        in_chans (int): channels of the image. Pre-trained weights of the first convolution are summed (1 channel) or repeated
            and scaled (more), as timm does. Default: 3.
        **kwargs: arguments of :class:`~revcol_mm.models.RevCol`: ``drop_path_rate``, ``kernel_size``, ``reversible``, …;
            without ``features_only`` also ``global_pool`` and ``drop_rate``.

    Raises:
        ValueError: if there is no such model, or if an argument has another value.
        CheckpointError: if there are no weights, or if they cannot be downloaded or read.
    """
    cfg = pretrained_cfg(model_name)
    if out_indices is not None and not features_only:
        raise ValueError(f'out_indices needs features_only=True, but got {out_indices!r} without it')
    if pretrained and not cfg['url']:
        raise CheckpointError(f'{model_name} has no public weights; those that have some are '
                              f'{", ".join(list_models(pretrained=True))}')
    if num_classes is None:
        num_classes = 0 if features_only else cfg['num_classes']
    model = RevColClassifier(cfg['architecture'].removeprefix('revcol_'), num_classes, in_chans, **kwargs)
    model.pretrained_cfg = cfg
    if pretrained:
        model.load_pretrained(download(cfg['url']))
    return RevColFeatures(model, range(len(REDUCTION)) if out_indices is None else out_indices) if features_only else model


def pretrained_cfg(model_name: str) -> dict[str, Any]:
    """Returns what timm calls the ``pretrained_cfg``: where the weights are, and how their evaluation prepared the images.

    Raises:
        ValueError: if there is no such model or training.
    """
    model, _, tag = model_name.partition('.')
    if model not in MODELS or tag and tag not in MODELS[model]:
        raise ValueError(f'model_name must be one of {", ".join(list_models())}, or, for a certain training, of '
                         f'{", ".join(list_models(pretrained=True))}, but got {model_name!r}')
    tag = tag or next(iter(MODELS[model]), '')
    last = tag.rpartition('_')[2]
    size = int(last) if last.isdigit() else 224
    return dict(
        architecture=model, tag=tag, url=read_index()[MODELS[model][tag]].url if tag else '',
        num_classes=21841 if tag == 'in22k' else 1000, input_size=(3, size, size), pool_size=(size // 32, size // 32),
        # At 224 the short side is resized to 256; larger images are resized to the square.
        crop_pct=0.875 if size == 224 else 1., crop_mode='center' if size == 224 else 'squash', interpolation='bicubic',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), first_conv=STEM, classifier=CLASSIFIER)


class RevColClassifier(nn.Module):
    """RevCol with a classifier: global average pool, LayerNorm, Linear. Its parameters have the names of mmpretrain's model.

    Args:
        arch (str | dict): architecture of :class:`~revcol_mm.models.RevCol`.
        num_classes (int): number of classes; with 0 the output is the pooled feature, (N, num_features). Default: 1000.
        in_chans (int): channels of the image. Default: 3.
        global_pool (str): 'avg', or '' for no pooling, which needs ``num_classes=0``: the output is (N, num_features, H/32,
            W/32). Default: 'avg'.
        drop_rate (float): probability with which the Linear layer's inputs are dropped. Default: 0.
        **kwargs: further arguments of :class:`~revcol_mm.models.RevCol`.

    Attributes:
        num_features (int): channels of the last level.
        feature_info (list[dict]): ``num_chs``, ``reduction`` (stride) and ``module`` of every level.
        pretrained_cfg (dict): see :func:`pretrained_cfg`.
    """

    def __init__(self, arch: str | dict, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0., **kwargs) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.backbone = RevCol(arch, in_channels=in_chans, **kwargs)
        self.num_features = self.head_hidden_size = self.backbone.channels[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=stride, module=f'backbone.subnet{self.backbone.num_columns - 1}.level{level}')
            for level, (width, stride) in enumerate(zip(self.backbone.channels, REDUCTION))]
        self.pretrained_cfg: dict[str, Any] = {}
        self.head = nn.ModuleDict(dict(cls=Classifier(self.num_features, 1)))
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the Linear layer by a new one; pool and norm stay.

        Args:
            num_classes (int): number of classes, 0 for none.
            global_pool (str | None): 'avg' or ''. Default: None, as before.

        Raises:
            ValueError: if an argument has another value.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f'num_classes must be an integer, 0 or more, but got {num_classes!r}')
        if global_pool not in ('avg', '') or not global_pool and num_classes:
            raise ValueError(f"global_pool must be 'avg', or '' with num_classes=0, but got {global_pool!r} with "
                             f'num_classes={num_classes}')
        self.num_classes, self.global_pool = num_classes, global_pool
        weight = self.backbone.stem[0].weight
        self.head['cls'].classifier[1] = nn.Linear(
            self.num_features, num_classes, device=weight.device, dtype=weight.dtype) if num_classes else nn.Identity()
        self.head['cls'].classifier[1].apply(init_weights)

    def get_classifier(self) -> nn.Module:
        """Returns the Linear layer, without classes an Identity."""
        return self.head['cls'].classifier[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last level: (N, in_chans, H, W) -> (N, num_features, H/32, W/32)."""
        return self.forward_intermediates(x, [3], intermediates_only=True)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns the scores, (N, num_classes), or with ``pre_logits`` what the Linear layer reads, (N, num_features)."""
        if not self.global_pool:
            return x
        x = self.head['cls'].pool(x)
        return x if pre_logits else self.get_classifier()(F.dropout(x, self.drop_rate, self.training))

    def group_matcher(self, coarse: bool = False):
        """Returns the layer of a parameter, by its name, for timm's layer decay; ``coarse`` changes nothing."""
        return lambda name: self.backbone.get_layer_depth(name, 'backbone.')[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each column's activations in the backward pass.

        Raises:
            ValueError: if the network trains reversibly, which needs less memory still.
        """
        if enable and self.backbone.reversible:
            raise ValueError('set_grad_checkpointing must be left out if reversible=True, which stores less: build the model '
                             'with reversible=False')
        self.backbone.with_cp = enable

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False
                              ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns levels of the last column, as timm's models do; RevCol has no norm behind them, and its levels run together.

        Args:
            x (Tensor): images (N, in_chans, H, W).
            indices (int | Sequence[int] | None): levels, or how many of the last levels. Default: None, all.
            norm, stop_early: without effect.
            output_fmt (str): 'NCHW', the only one.
            intermediates_only (bool): whether to leave out the last level as a value of its own. Default: False.

        Returns:
            list[Tensor] | tuple[Tensor, list[Tensor]]: the levels, or the last level and the levels. Level l is
            (N, C_l, H/(4·2^l), W/(4·2^l)).

        Raises:
            ValueError: for another ``output_fmt``, and for levels that do not exist.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', but got {output_fmt!r}")
        levels = take_levels(indices)
        last = self.backbone.num_columns - 1
        features = list(self.backbone(x, outputs=[(last, level) for level in (*levels, *[3] * (not intermediates_only))]))
        return features if intermediates_only else (features.pop(), features)

    def prune_intermediate_layers(self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Removes the classifier, which these levels do not need, and returns the levels; the columns need all levels."""
        if prune_head:
            self.reset_classifier(0, '')
            self.head.requires_grad_(False)  # its norm. DistributedDataParallel would wait for the gradients of what is unused
        levels = take_levels(indices)
        highest = max(levels)
        for column in reversed(self.backbone.columns):
            for level in range(1 + highest, len(REDUCTION)):
                column.levels[level].requires_grad_(False)
                column.gammas[level].requires_grad_(False)
            highest = max([highest, *(above for level in range(1 + highest) for above in column.above[level])])
        return levels

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Loads a classifier of the authors' or of this package: of intermediate supervision, the last one.

        A classifier of another number of classes is left out.

        Args:
            checkpoint_path (str): path or URL.
            prefix (str): without effect; timm gives it.

        Raises:
            CheckpointError: if the file cannot be read, or does not fit. The model does not change then.
        """
        own = {key: value.shape for key, value in self.state_dict().items()}
        contents = read_checkpoint(checkpoint_path, logger='silent')
        found = strip_module(find_state_dict(contents, checkpoint_path)[0])
        names = new_names(found, checkpoint_path, {f'{CLASSIFIER}.weight'})
        weights = {new: found[old] for old, new in names.items() if new is not None}
        check_weights(weights, checkpoint_path)
        classes, stem = weights.get(f'{CLASSIFIER}.weight'), weights.get(f'{STEM}.weight')
        kept = {}
        if classes is not None and len(classes) != self.num_classes:
            for name in ('weight', 'bias'):
                weights.pop(f'{CLASSIFIER}.{name}', None)
                if self.num_classes:
                    kept[f'{CLASSIFIER}.{name}'] = self.state_dict()[f'{CLASSIFIER}.{name}']
        if stem is not None and stem.dim() == 4:
            weights[f'{STEM}.weight'] = adapt_channels(stem, self.backbone.in_channels)
        weights.update(kept)
        if self.backbone.pad_pretrained:
            pad_on_load(self.backbone, weights, 'backbone.')
        differences = find_differences(own, weights, checkpoint_path)
        if differences:
            raise CheckpointError(f'{checkpoint_path} does not fit this RevCol: {differences}. Give weights of the same '
                                  'architecture')
        self.load_state_dict(weights)


class RevColFeatures(nn.Module):
    """RevCol as a backbone: (N, in_chans, H, W) -> list of (N, C[l], H/4/2^l, W/4/2^l), the chosen levels of the last column.

    Args:
        model (RevColClassifier): the network. Its classifier is removed.
        out_indices (Sequence[int]): the levels.
    """

    def __init__(self, model: RevColClassifier, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.model, self.out_indices = model, model.prune_intermediate_layers(out_indices)
        self.feature_info = FeatureInfo(model.feature_info[level] for level in self.out_indices)
        self.pretrained_cfg = model.pretrained_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, self.out_indices, intermediates_only=True)


class FeatureInfo(tuple):
    """What the levels of a :class:`RevColFeatures` are, in their order."""

    def channels(self) -> list[int]:
        """Returns the channels of the levels."""
        return [info['num_chs'] for info in self]

    def reduction(self) -> list[int]:
        """Returns the strides of the levels."""
        return [info['reduction'] for info in self]

    def module_name(self) -> list[str]:
        """Returns the names of the modules that compute the levels."""
        return [info['module'] for info in self]


def take_levels(indices: int | Sequence[int] | None) -> list[int]:
    """Returns levels from 0 to 3, for timm's ways to name them.

    Args:
        indices (int | Sequence[int] | None): levels, where negative ones count from the end; how many of the last levels; or
            None, all.

    Raises:
        ValueError: if there is no such level.
    """
    count = len(REDUCTION)
    if indices is None or isinstance(indices, int):
        number = count if indices is None else indices
        indices = range(count - number, count) if 0 < number <= count else ()
    levels = [level + count if level < 0 else level for level in indices]
    if not levels or any(level not in range(count) for level in levels):
        raise ValueError(f'levels must be integers from {-count} to {count - 1}, but got {list(indices)}')
    return levels


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Adapts the first convolution to images with another number of channels, as timm does.

    Args:
        weight (Tensor): (C, 3, k, k).
        in_chans (int): number of channels.

    Returns:
        Tensor: (C, in_chans, k, k): for one channel the sum over the colours, which is the answer to a grey image; for others
        the colours in turn, scaled by 3 / in_chans.
    """
    colours = weight.shape[1]
    if in_chans == colours:
        return weight
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, -(-in_chans // colours), 1, 1)[:, :in_chans]
    return torch.mul(repeated, colours / in_chans).to(weight.dtype)
