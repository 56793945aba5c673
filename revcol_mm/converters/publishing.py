# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""A checkpoint to give away: the weights, what describes them, and nothing else."""
import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from typing import Any

import torch

from ..checkpoint.files import check_output, write_checkpoint, write_whole
from ..checkpoint.kernels import kernels_of
from ..checkpoint.loading import COUNTERS, check_weights, find_meta, find_state_dict, strip_module
from ..checkpoint.names import count_dtypes, find_dataset_meta, find_num_classes, find_task
from ..checkpoint.safe import CheckpointError, read_checkpoint
from ..version import __version__
from .importing import import_checkpoint

EXTENSIONS = ('.pth', '.safetensors')
BUFFERS = ('.running_mean', '.running_var', *COUNTERS)  # are no parameters
COLUMN = re.compile(r'backbone\.subnet\d+\.')  # of any of our backbones, in a whole model


def strip_training_state(checkpoint: Any, filename: str = 'the checkpoint') -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and metadata of a training checkpoint.

    Optimizer, schedulers, histories and second copies of the weights are left out. Of mmengine's two copies in a run with
    averaging, ``state_dict`` is the averaged one, and stays. Models with another backbone of ours (RevColViT, RevColC2f) are
    stripped too; their description tells neither size nor kernel size.

    Args:
        checkpoint: from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        filename: for messages.

    Returns:
        tuple[dict, dict]: the published checkpoint, and its description (task, size, kernel size, classes, parameters, …).

    Raises:
        CheckpointError: as :func:`~revcol_mm.checkpoint.import_checkpoint`.
    """
    weights, meta = strip_module(find_state_dict(checkpoint, filename)[0]), find_meta(checkpoint, filename)
    if not kernels_of(weights) and any(COLUMN.match(key) for key in weights):
        check_weights(weights, filename)
        published, size = dict(meta=find_dataset_meta(checkpoint, filename), state_dict=OrderedDict(weights)), {}
    else:
        published, report = import_checkpoint(checkpoint, filename=filename)
        size = dict(arch=report.backbone.arch, kernel_size=report.backbone.kernel_size)
    published['meta'] = {**{key: meta[key] for key in ('cfg', 'epoch', 'iter', 'seed') if key in meta}, **published['meta']}
    weights, classes = published['state_dict'], published['meta'].get('dataset_meta', {}).get('classes')
    description = dict(
        task=find_task(weights), **size, num_classes=find_num_classes(weights),
        classes=list(classes) if isinstance(classes, (list, tuple)) else None,
        backbone_parameters=sum(value.numel() for key, value in weights.items()
                                if key.startswith('backbone.') and not key.endswith(BUFFERS)),
        weights=len(weights), dtypes=count_dtypes(weights),
        trained={key: meta[key] for key in ('epoch', 'iter') if key in meta}, revcol_mm=__version__, torch=torch.__version__)
    return published, description


def publish_checkpoint(source: str, out: str | None = None, force: bool = False) -> tuple[str, str, dict[str, Any]]:
    """Writes ``{out}-{hash}.pth`` and ``{out}-{hash}.json``; the hash is the start of the file's SHA-256.

    Args:
        source: checkpoint.
        out: name without the hash; ending in ``.pth`` or ``.safetensors``, or without an ending. Default: None, that of
            ``source``.
        force: replace files that exist. Default: False.

    Returns:
        tuple[str, str, dict]: path of the checkpoint, path of its description, and the description.

    Raises:
        CheckpointError, FileNotFoundError: the source cannot be read or is no complete RevCol, or the output has another
            ending, or cannot be written.
    """
    stem, extension = os.path.splitext(out or (os.path.basename(source) if '://' in source else source))
    if extension not in EXTENSIONS:
        if out and extension:
            raise CheckpointError(f'the output {out} ends in {extension}, where .pth or .safetensors is expected')
        extension = '.pth'
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
            file.write((json.dumps(description, indent=2, default=str) + '\n').encode())
            os.replace(draft, path)
    return path, sidecar, description
