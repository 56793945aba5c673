# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Reads from the names of files and folders which split they belong to, and which are a program's own."""
import os
import os.path as osp
import re
from collections import Counter
from typing import Sequence

from ...checkpoint.safe import first_names
from ...runtime import EXTENSIONS
from ..errors import LaunchError

#: Words in the names of files and folders that tell what a part of the data is for.
WORDS = dict(train=('train', 'training'), val=('val', 'valid', 'validation'), test=('test', 'testing'))


def words_of(name: str) -> set[str]:
    return set(re.findall('[a-z]+', name.lower()))


def part_of(name: str) -> str | None:
    """What the name of a file or folder says of its purpose: 'train', 'val', 'test', or None."""
    found = [part for part, words in WORDS.items() if words_of(name) & set(words)]
    return found[0] if len(found) == 1 else None


def is_hidden(name: str) -> bool:
    """Whether a program made the file or folder for itself, as Jupyter's .ipynb_checkpoints and macOS's __MACOSX."""
    return name.startswith('.') or name == '__MACOSX'


def folders_of(path: str) -> list[str]:
    if not osp.isdir(path):
        return []
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not is_hidden(entry.name))


def hidden_folders(path: str) -> list[str]:
    """The hidden folders below a folder, as paths from it."""
    return [osp.relpath(osp.join(place, name), path) for place, folders, _ in os.walk(path, followlinks=True)
            for name in sorted(folders) if is_hidden(name)]


def part_folders(path: str, part: str) -> list[str]:
    """The folders in ``path`` whose names say that they are for 'train', 'val' or 'test'."""
    return [osp.join(path, name, '') for name in folders_of(path) if part_of(name) == part]


def only(candidates: Sequence[str], root: str, what: str) -> str | None:
    """The one candidate, or None if there is none.

    Raises:
        LaunchError: there are several.
    """
    if len(candidates) > 1:
        raise LaunchError(f'{root} must have one {what}, but has {len(candidates)}: {first_names(candidates)}. Move the others '
                          'to another folder')
    return candidates[0] if candidates else None


def _files_below(folder: str) -> list[str]:
    """The files in a folder and those below it, as paths from it, without hidden ones."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [osp.relpath(osp.join(place, name), folder) for name in sorted(names) if not is_hidden(name)]
    return found


def images_below(folder: str) -> list[str]:
    """The image files in a folder and those below it, as paths from it."""
    return [name for name in _files_below(folder) if name.lower().endswith(EXTENSIONS)]


def others_below(folder: str) -> str:
    """How the other files in a folder and those below it end, with their numbers: '300 .heic, 1 .txt'; '' without any."""
    endings = Counter(osp.splitext(name)[1].lower() or osp.basename(name) for name in _files_below(folder)
                      if not name.lower().endswith(EXTENSIONS))
    return first_names([f'{count} {ending}' for ending, count in endings.most_common()]) if endings else ''
