# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A checkpoint to give away: the weights, what describes them, and nothing else."""
import hashlib
import json
import os
import tempfile
from typing import Any, Dict, Mapping, Optional, Tuple

import torch

from ..version import __version__
from .files import check_output, write_checkpoint, write_whole
from .importing import import_checkpoint
from .safe import CheckpointError, read_checkpoint


def strip_training_state(checkpoint: Any, filename: str = 'the checkpoint') -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Weights and metadata of a training checkpoint.

    Optimizer, schedulers, histories and second copies of the weights are left out. Of mmengine's two copies in a run with
    averaging, ``state_dict`` is the averaged one, and stays.

    Args:
        checkpoint: from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        filename: for messages.

    Returns:
        tuple[dict, dict]: the published checkpoint, and its description (task, size, kernel size, classes, parameters, …).

    Raises:
        CheckpointError: as :func:`~revcol_mm.checkpoint.import_checkpoint`.
    """
    published, report = import_checkpoint(checkpoint, filename=filename)
    meta = dict(checkpoint.get('meta') or {}) if isinstance(checkpoint, Mapping) else {}
    published['meta'] = {**{key: meta[key] for key in ('cfg', 'epoch', 'iter', 'seed') if key in meta}, **published['meta']}
    dataset = published['meta'].get('dataset_meta') or {}
    description = dict(
        task=report.task, arch=report.backbone.arch, kernel_size=report.backbone.kernel_size, num_classes=report.num_classes,
        classes=list(dataset['classes']) if dataset.get('classes') else None,
        backbone_parameters=sum(value.numel() for key, value in published['state_dict'].items() if key.startswith('backbone.')),
        weights=report.kept, dtypes=report.dtypes, trained={key: meta[key] for key in ('epoch', 'iter') if key in meta},
        revcol_mm=__version__, torch=torch.__version__)
    return published, description


def publish_checkpoint(source: str, out: Optional[str] = None, force: bool = False) -> Tuple[str, str, Dict[str, Any]]:
    """Writes ``{out}-{hash}.pth`` and ``{out}-{hash}.json``; the hash is the start of the file's SHA-256.

    Args:
        source: checkpoint.
        out: name without the hash; ending in ``.pth`` or ``.safetensors``. Default: None, that of ``source``.
        force: replace files that exist. Default: False.

    Returns:
        tuple[str, str, dict]: path of the checkpoint, path of its description, and the description.

    Raises:
        CheckpointError, FileNotFoundError: the source cannot be read or is no complete RevCol, or the output not written.
    """
    stem, extension = os.path.splitext(out or (os.path.basename(source) if '://' in source else source))
    extension = extension or '.pth'
    folder = os.path.dirname(os.path.abspath(stem))
    if not os.path.isdir(folder):
        raise CheckpointError(f'the output {out} has no folder: {folder} does not exist')
    published, description = strip_training_state(read_checkpoint(source, logger='silent'), source)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.publish-') as temporary:
        draft = os.path.join(temporary, 'draft' + extension)
        with write_whole(draft) as file:
            write_checkpoint(published, file, extension == '.safetensors')
        with open(draft, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        path, sidecar = f'{stem}-{digest[:8]}{extension}', f'{stem}-{digest[:8]}.json'
        for target in (path, sidecar):
            check_output(target, source, force)
        description.update(file=os.path.basename(path), sha256=digest)
        with write_whole(sidecar) as file:
            file.write((json.dumps(description, indent=2) + '\n').encode())
            os.replace(draft, path)
    return path, sidecar, description
