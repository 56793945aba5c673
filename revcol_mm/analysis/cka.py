# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""CKA: how similar the features of each level and column are to the images, to the labels, and to each other (figure 9).

Linear CKA (Kornblith et al., ICML 2019) of two sets of features of the same images compares their Gram matrices K = X·Xᵀ and
L = Y·Yᵀ. It is 1 for features that agree up to rotation and scale. In minibatches (Nguyen et al., ICLR 2021) it is::

    CKA = Σ_b HSIC(K_b, L_b) / √( Σ_b HSIC(K_b, K_b) · Σ_b HSIC(L_b, L_b) )

over blocks b of images, where HSIC is the unbiased estimator (Song et al., JMLR 2012). With K̃ and L̃, which are K and L with
zeros on the diagonal, and n images in a block::

    HSIC(K, L) = [ tr(K̃·L̃) + 1ᵀK̃1·1ᵀL̃1 / ((n-1)(n-2)) − 2/(n-2)·1ᵀK̃·L̃1 ] / (n(n-3))

This is also ⟨U(K), U(L)⟩ / (n(n-3)), where U centres a matrix (:func:`u_center`). So one matrix product gives all pairs of
features. U is a projection, so that a single class with the labels l, whose Gram matrix is l·lᵀ, needs only lᵀ·U(K)·l. Only
sums over blocks and the features of one block are kept, however many images there are.
"""
import copy
import math
import os.path as osp
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from ..apis.checks.common import name_of, settings_of_leaves
from ..apis.checks.settings import put_classes_right
from ..apis.errors import LaunchError
from ..apis.inference import with_test_set
from ..checkpoint.safe import first_names
from .features import record_features

#: Fewest images of a block for which the estimator exists.
MIN_BLOCK = 4
#: Numbers of an image's features that one matrix product reads; products are added up in float64.
CHUNK = 2**16


def gram(features: Tensor) -> Tensor:
    """X·Xᵀ of features (n, …), in float64. A constant added to all images, which CKA does not see, is taken off before."""
    x = features.flatten(1).float()
    x = x - x[0]  # so that what is the same in all images becomes exactly 0
    x -= x.mean(0)
    return sum((part @ part.T).double() for part in x.split(CHUNK, dim=1))


def u_center(gram: Tensor) -> Tensor:
    """U(K): zero diagonal, and all rows and columns sum to 0 (Székely and Rizzo, 2014); (n, n)."""
    n = len(gram)
    gram = gram - gram.diag().diag()
    rows = gram.sum(1)
    centred = gram - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred - centred.diag().diag()


def squares_alone(vectors: Tensor) -> Tensor:
    """⟨U(l·lᵀ), U(l·lᵀ)⟩ of each column l of (n, C), by the formula of HSIC, which is exactly 0 for one without variation."""
    n, squares = len(vectors), vectors.square()
    rows, fourths = vectors * (vectors.sum(0) - vectors), squares.square().sum(0)
    trace, total = squares.sum(0).square() - fourths, vectors.sum(0).square() - squares.sum(0)
    return trace + total.square() / ((n - 1) * (n - 2)) - 2 * rows.square().sum(0) / (n - 2)


class MinibatchCKA:
    """Gathers features batch by batch, whatever the size of the batches.

    Args:
        block (int): images of a block, the n of the estimator.
        alone (str | None): name of a set, (N, C), whose C numbers are also compared one by one. Default: None.

    Attributes:
        blocks (int): number of blocks so far.

    Raises:
        ValueError: if ``block`` is smaller than 4.
    """

    def __init__(self, block: int, alone: str | None = None) -> None:
        if not isinstance(block, int) or block < MIN_BLOCK:
            raise ValueError(f'block must be an integer of at least {MIN_BLOCK}, because the estimator of HSIC needs as many '
                             f'images, but got {block!r}')
        self.block, self.blocks, self.alone = block, 0, alone
        self._waiting: dict = {}
        # Sums of HSIC over the blocks, without its factor 1/(n(n-3)): of the sets with each other; of the numbers that stand
        # alone with each set, (sets, C), and with themselves, (C, ).
        self._products: Tensor | float = 0.
        self._products_alone: Tensor | float = 0.
        self._squares_alone: Tensor | float = 0.

    def add(self, batch: Mapping[object, Tensor]) -> None:
        """Takes a batch of every set of features: {name: (N, …)}, always with the same names.

        Features wait on the CPU until their block is complete. Those of an incomplete last block do not count.
        """
        for name, features in batch.items():
            self._waiting.setdefault(name, []).append(features.detach().to('cpu', torch.float32))
        while sum(map(len, next(iter(self._waiting.values())))) >= self.block:
            centred, vectors = [], None
            for name, parts in self._waiting.items():
                features = torch.cat(parts)
                centred.append(u_center(gram(features[:self.block].to(batch[name].device))).cpu())
                self._waiting[name] = [features[self.block:].clone()]
                if name == self.alone:
                    vectors = (features[:self.block] - features[0]).double()
            if vectors is not None:
                self._products_alone += torch.stack([(vectors * (matrix @ vectors)).sum(0) for matrix in centred])
                self._squares_alone += squares_alone(vectors)
            flat = torch.stack(centred).flatten(1)
            self._products += flat @ flat.T
            self.blocks += 1

    def similarities(self) -> dict[tuple, float]:
        """CKA of every pair of names. It is nan where a set has no variation.

        Raises:
            ValueError: if no block was complete.
        """
        self._check_blocks()
        scale = self._products.diag().clamp_min(0).sqrt()
        values = _divide(self._products, scale, scale)
        names = list(self._waiting)
        return {(a, b): value for a, row in zip(names, values.tolist()) for b, value in zip(names, row)}

    def similarities_alone(self) -> dict[object, Tensor]:
        """{name: CKA with each number of the set ``alone``, (C, )}, nan without variation, such as for a class without images.

        Raises:
            ValueError: if no block was complete.
        """
        self._check_blocks()
        values = _divide(self._products_alone, self._products.diag().clamp_min(0).sqrt(),
                         self._squares_alone.clamp_min(0).sqrt())
        return dict(zip(self._waiting, values))

    def _check_blocks(self) -> None:
        if not self.blocks:
            raise ValueError(f'there must be at least one block of {self.block} images, but there are fewer')


def _divide(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The products over both scales, nan where one of them is 0."""
    values = products / rows[:, None] / columns
    values[(rows == 0)[:, None] | (columns == 0)] = torch.nan
    return values


# Images and labels -----------------------------------------------------------------------------------------------------------

class LabelledImages(Dataset):
    """A data set of mmdet, mmseg or mmpretrain with the label of each image as a vector of one number per class.

    A classification set gives 1 for the image's class (or classes) and 0 elsewhere, a detection set the number of boxes of each
    class, and a segmentation set the share of the image's labelled pixels that each class has.

    Args:
        dataset (BaseDataset): the data set.
        scope (str): the package.
    """

    def __init__(self, dataset, scope: str) -> None:
        self.dataset, self.scope = dataset, scope
        self.classes = tuple(dataset.metainfo.get('classes') or ())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """Returns ``inputs`` and ``data_samples`` of the pipeline, and ``labels``, (classes, )."""
        sample = self.dataset[index]
        labels = dict(mmdet=self._boxes, mmseg=self._pixels, mmpretrain=self._classes)[self.scope](index, sample)
        if labels is None or not self.classes:
            raise ValueError(f'{name_of(self.dataset)} must have labels for its images and names of its classes, but image '
                             f'{index} has none')
        return dict(inputs=sample['inputs'], data_samples=sample['data_samples'],
                    labels=torch.bincount(labels, minlength=len(self.classes)).float() / self._per(labels))

    def has_objects(self) -> bool:
        """Whether an image has a box; of classes and maps, always True."""
        return self.scope != 'mmdet' or any(self.dataset.get_data_info(index).get('instances') for index in range(len(self)))

    def _per(self, labels: Tensor) -> int:
        return max(len(labels), 1) if self.scope == 'mmseg' else 1

    def _boxes(self, index: int, sample: dict) -> Tensor | None:
        instances = self.dataset.get_data_info(index).get('instances')
        return None if instances is None else torch.tensor(
            [box['bbox_label'] for box in instances if not box.get('ignore_flag')], dtype=torch.long)

    def _pixels(self, index: int, sample: dict) -> Tensor | None:
        if 'gt_sem_seg' not in sample['data_samples']:
            return None
        labels = sample['data_samples'].gt_sem_seg.data.flatten().long()
        return labels[labels < len(self.classes)]  # the rest is ignored

    def _classes(self, index: int, sample: dict) -> Tensor | None:
        return sample['data_samples'].gt_label if 'gt_label' in sample['data_samples'] else None


def find_images(cfg: Config, names: Sequence[str]) -> ConcatDataset:
    """The data sets of a config with its test pipeline.

    Args:
        cfg (Config): from :func:`revcol_mm.apis.config.load_config`.
        names (Sequence[str]): 'train', 'val' or 'test', which stand for the config's data sets, and folders, each of which
            takes the place of ``data_root`` in the test set. All must have the same classes.

    Returns:
        ConcatDataset: of :class:`LabelledImages`.

    Raises:
        FileNotFoundError: if a file of a data set is missing.
        LaunchError: for a name that is neither, for a data set without labels, and for different classes.
    """
    cfg = copy.deepcopy(cfg)
    for name in ('train', 'val', 'test'):
        put_classes_right(cfg.get(f'{name}_dataloader'), f'{name}_dataloader')
    test = with_test_set(cfg).test_dataloader.dataset
    sets: list[LabelledImages] = []
    for name in names:
        if name in ('train', 'val', 'test') and cfg.get(f'{name}_dataloader'):
            found = list(settings_of_leaves(cfg[f'{name}_dataloader'].dataset))
        elif osp.isdir(name):
            found = [dict(test, data_root=name)]
        else:
            raise LaunchError('DATA must be train, val or test, if the config has such a data set, or a folder, but got '
                              f'{name!r}')
        for settings in found:
            try:
                with DefaultScope.overwrite_default_scope(cfg.default_scope):
                    dataset = DATASETS.build(dict(settings, pipeline=test.pipeline, test_mode=True))
                sets.append(LabelledImages(dataset, cfg.default_scope))
                if len(sets[-1]):
                    sets[-1][0]  # raises if it has no labels
            except FileNotFoundError:
                raise
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise LaunchError(f'the labelled images of {name} cannot be read: {type(error).__name__}: {error}') from error
    if len({images.classes for images in sets}) > 1:
        raise LaunchError('all data sets must have the same classes, but got '
                          + ' and '.join(str(classes) for classes in {images.classes for images in sets}))
    if not any(images.has_objects() for images in sets):
        raise LaunchError(f'the images of {" and ".join(names)} must have boxes of the classes '
                          f'{first_names(sets[0].classes)}, but none has one')
    return ConcatDataset(sets)


@dataclass(frozen=True)
class Similarities:
    """CKA of the features of every level and column, each as (levels, columns), nan where there is none.

    Attributes:
        images: with the images as the network gets them.
        labels: with the labels of all classes.
        classes: with each class alone, by name; a name that several classes have is followed by the class's number.
        between: {((column, level), (column, level)): CKA of the two}.
        block, blocks, dropped: images in a block, number of blocks, and images of the incomplete last block.
    """
    images: np.ndarray
    labels: np.ndarray
    classes: dict[str, np.ndarray]
    between: dict[tuple, float]
    block: int
    blocks: int
    dropped: int

    @property
    def best_class(self) -> str | None:
        """The class with the highest similarity of all; None if no class varies."""
        highest = {name: np.nanmax(values) for name, values in self.classes.items() if not np.isnan(values).all()}
        return max(highest, key=highest.get) if highest else None

    def to_json(self) -> dict:
        def plain(values):
            return [[None if math.isnan(value) else value for value in row] for row in np.asarray(values).tolist()]

        places = list(dict.fromkeys(place for place, _ in self.between))
        return dict(images=plain(self.images), labels=plain(self.labels), best_class=self.best_class,
                    classes={name: plain(values) for name, values in self.classes.items()},
                    between=dict(column_and_level=places,
                                 cka=plain([[self.between[a, b] for b in places] for a in places])),
                    block=self.block, blocks=self.blocks, dropped_images=self.dropped)


def measure(inferencer, images: ConcatDataset, block: int = 256, batch: int = 32, workers: int = 0,
            shape: Sequence[int] | None = None, progress: Callable[[Iterable], Iterable] = iter) -> Similarities:
    """Runs the backbone on all images, in an order drawn with a fixed seed, because many sets are sorted by class.

    Args:
        inferencer: from :func:`~.features.build_analysed`.
        images (ConcatDataset): from :func:`find_images`.
        block (int): images of a block; with fewer images, all are one block. Default: 256.
        batch (int): images that run at once; it does not change the result. Default: 32.
        workers (int): processes that read images. Default: 0.
        shape (Sequence[int] | None): height and width to which the images are scaled after the pipeline. Default: None.
        progress (Callable): wraps the batches, for example in a progress bar. Default: iter.

    Returns:
        Similarities: of all complete blocks.

    Raises:
        ValueError: for fewer than 4 images, a smaller block, images of different sizes, or labels that are the same everywhere.
    """
    model, number = inferencer.model, len(images)
    if number < MIN_BLOCK:
        raise ValueError(f'there must be at least {MIN_BLOCK} images, but there are {number}')
    block = min(block, number)
    cka, classes, size = MinibatchCKA(block, alone='labels'), images.datasets[0].classes, None
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(Subset(images, order[:number // block * block]), batch, num_workers=workers, collate_fn=pseudo_collate)
    for data in progress(loader):
        labels = torch.stack(data.pop('labels'))
        if shape is not None:
            data['inputs'] = [F.interpolate(image[None].float(), size=tuple(shape), mode='bilinear', antialias=True)[0]
                              for image in data['inputs']]
        sizes = {tuple(image.shape[-2:]) for image in data['inputs']} | {size or tuple(data['inputs'][0].shape[-2:])}
        if len(sizes) > 1:
            raise ValueError('all images must have one size after the pipeline, but there are '
                             f'{" and ".join(f"{h}×{w}" for h, w in sorted(sizes)[:2])}: scale them with --shape H W')
        size, = sizes
        inputs = model.data_preprocessor(data, False)['inputs']
        with torch.no_grad(), record_features(model.backbone) as features:
            model.backbone(inputs)
        cka.add({**features, 'images': inputs, 'labels': labels})
    values, alone = cka.similarities(), cka.similarities_alone()
    if math.isnan(values['labels', 'labels']):
        raise ValueError(f'the labels must differ between the images, but all {block * cka.blocks} images have the same ones: '
                         'check the classes and the annotations of the data set')
    columns, levels = range(model.backbone.num_columns), range(len(model.backbone.depths))

    def grid(value_of: Callable) -> np.ndarray:
        return np.array([[value_of((column, level)) for column in columns] for level in levels])

    of_classes, seen = grid(lambda place: alone[place].tolist()), Counter(classes)
    names = [f'{name} ({label})' if seen[name] > 1 else name for label, name in enumerate(classes)]
    places = [(column, level) for column in columns for level in levels]
    return Similarities(grid(lambda place: values[place, 'images']), grid(lambda place: values[place, 'labels']),
                        {name: of_classes[..., label] for label, name in enumerate(names)},
                        {(a, b): values[a, b] for a in places for b in places}, block, cka.blocks, number - block * cka.blocks)
