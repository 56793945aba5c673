# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Weights by name: ``zoo:CONFIG_NAME`` stands for the file that the model index names for a config of this package."""
import filecmp
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..utils.configs import config_folder
from .safe import CheckpointError, without_query

NAME, PREFIX = 'zoo', 'zoo:'
SIZES = ('t', 's', 'b', 'l', 'xl', 'h')  # of RevCol, in the order of their parameters


@dataclass(frozen=True)
class Entry:
    """What the model index says of a config.

    Attributes:
        name (str): of the config, without ``.py``.
        head (tuple[str]): its architecture without the backbone, empty for a classifier.
        task (str): of its first result.
        data (str): what its backbone was trained on first.
        url (str | None): the published weights; None if there are none.
        size (int | None): bytes of this file; None if the index does not know.
        sha256 (str | None): its SHA-256, in hexadecimal digits; None if the index does not know.
    """
    name: str
    head: tuple[str, ...]
    task: str
    data: str
    url: str | None = None
    size: int | None = None
    sha256: str | None = None

    @property
    def arch(self) -> str | None:
        """Size of the backbone: one of :data:`SIZES`, None if it is no published size of RevCol."""
        found = re.search(rf'(?:^|_)revcol_({"|".join(SIZES)})(?:_|$)', self.name)
        return found and found[1]


@functools.cache
def read_index() -> dict[str, Entry]:
    """Returns what ``model-index.yml`` says, by the name of the config. It is read once."""
    root, entries = config_folder().parent, {}
    for file in yaml.safe_load((root / 'model-index.yml').read_text(encoding='utf-8'))['Import']:
        for model in yaml.safe_load((root / file).read_text(encoding='utf-8'))['Models']:
            metadata = model['Metadata']
            entries[model['Name']] = Entry(
                model['Name'], tuple(metadata['Architecture'][1:]), model['Results'][0]['Task'],
                metadata.get('Pre-training Data', metadata['Training Data']), model.get('Weights'),
                metadata.get('Weights Size'), metadata.get('Weights SHA256'))
    return entries


def find_published(url: str) -> Entry | None:
    """Returns the config whose published weights have this address; None for an address that the model index does not have."""
    return next((entry for entry in read_index().values() if entry.url == without_query(url)), None)


def find_address(checkpoint: str, config: str | None = None) -> str:
    """Returns the address that ``zoo:NAME``, or ``zoo`` beside a config, stands for. Other names of checkpoints do not change.

    Args:
        checkpoint (str): ``zoo``, ``zoo:NAME``, a path or a URL.
        config (str | None): path of the config that ``zoo`` refers to. Default: None, there is none.

    Raises:
        CheckpointError: if there is no such config, or if it has no public weights; the message names the nearest one with
            weights (see :func:`find_nearest`).
    """
    if checkpoint == NAME:
        name = _name_of(config)
    elif checkpoint.startswith(PREFIX):
        name = checkpoint.removeprefix(PREFIX).removeprefix('configs/').removesuffix('.py')
    else:
        return checkpoint
    index = read_index()
    if name not in index:
        raise CheckpointError(f'{checkpoint} must name a config of the model index, but there is no {name!r}; with public '
                              f'weights there are {", ".join(entry.name for entry in index.values() if entry.url)}')
    if index[name].url is None:
        nearest = find_nearest(index[name])
        raise CheckpointError(f'{name} has no public weights. '
                              + (f'The nearest config with some (the closest size of the backbone, then the same head, task '
                                 f'and data) is {nearest.name}: give that config, and zoo:{nearest.name}' if nearest else
                                 'There are none of its kind of backbone, which has to be trained'))
    return index[name].url


def find_nearest(entry: Entry) -> Entry | None:
    """Returns the config with public weights that is most like another one; None if its backbone has no published size.

    The closest size of the backbone counts first, then the same head, the same task, and the same data of its first training;
    among equals the first of the index is taken.
    """
    if entry.arch is None:
        return None

    def distance(other: Entry) -> tuple:
        return (abs(SIZES.index(entry.arch) - SIZES.index(other.arch)), entry.head != other.head, entry.task != other.task,
                entry.data != other.data)

    return min((other for other in read_index().values() if other.url and other.arch), key=distance)


def _name_of(config: str | None) -> str:
    path = Path(config or '')
    own = config_folder() / path.name
    if config and path.suffix == '.py' and own.is_file() and filecmp.cmp(path, own, shallow=False):  # another checkout's, too
        return path.stem
    raise CheckpointError(f'the checkpoint {NAME!r} stands for the weights of a config that the model index lists, but '
                          + (f'{config} is not one of them' if config else 'no config is given')
                          + f': name the config whose weights you want, for example {PREFIX}cascade_rcnn_revcol_t')
