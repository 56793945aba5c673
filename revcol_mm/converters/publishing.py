# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Publishing a checkpoint: the weights and their description, without the training state."""
import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from typing import Any

import torch

from ..checkpoint.files import check_folder, check_output, put_in_place, write_checkpoint, write_whole
from ..checkpoint.kernels import kernels_of
from ..checkpoint.loading import COUNTERS, check_weights, find_meta, find_state_dict, strip_module
from ..checkpoint.names import count_dtypes, find_dataset_meta, find_num_classes, find_task
from ..checkpoint.safe import CheckpointError, local_name, read_checkpoint
from ..version import __version__
from .backbone import HRNET_PATH, check_unfolded
from .importing import import_checkpoint

EXTENSIONS = ('.pth', '.safetensors')
BUFFERS = ('.running_mean', '.running_var', *COUNTERS)  # endings of names that are not parameters
COLUMN = re.compile(r'backbone\.subnet\d+\.')  # a column of any backbone of this package, in a whole model


def strip_training_state(checkpoint: Any, filename: str = 'the checkpoint') -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the weights and metadata of a training checkpoint.

    Optimizer, schedulers, histories and second copies of the weights are left out. In a run with weight averaging, mmengine
    stores two copies; ``state_dict`` is the averaged one, and is kept. Models with other columns than RevCol's, such as
    RevColViT, are stripped too, but their description has no size and no kernel size.

    Args:
        checkpoint (Any): from :func:`~revcol_mm.checkpoint.read_checkpoint`. It is not changed.
        filename (str): name of the file in messages. Default: 'the checkpoint'.

    Returns:
        tuple[dict, dict]: the published checkpoint, and its description (task, size, kernel size, classes, parameters, …).

    Raises:
        CheckpointError: for the reasons of :func:`~revcol_mm.converters.import_checkpoint`.
    """
    weights, meta = strip_module(find_state_dict(checkpoint, filename)[0]), find_meta(checkpoint, filename)
    others = not kernels_of(weights) or any(map(HRNET_PATH.search, weights))
    if others and any(map(COLUMN.match, weights)):
        check_unfolded(weights, filename, 'backbone.')
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
    """Writes ``{out}-{hash}.pth`` and ``{out}-{hash}.json``. The hash is the first 8 digits of the file's SHA-256.

    Args:
        source (str): path or URL of the checkpoint.
        out (str | None): path without the hash, ending in ``.pth`` or ``.safetensors``, or without an ending; or a folder, for
            the name of ``source`` in it. Default: None, the path of ``source``.
        force (bool): whether to replace existing files. Default: False.

    Returns:
        tuple[str, str, dict]: path of the checkpoint, path of its description, and the description.

    Raises:
        CheckpointError: if the source cannot be read or is not a complete RevCol, or if the output has another ending or cannot
            be written.
        FileNotFoundError: if there is no source.
    """
    name = local_name(source)
    if out and (os.path.isdir(out) or not os.path.basename(out)):
        name, out = os.path.join(out, os.path.basename(name)), None
    stem, extension = os.path.splitext(out or name)
    if extension not in EXTENSIONS:
        if out and extension:
            raise CheckpointError(f'the output {out} must end in .pth or .safetensors, but ends in {extension}')
        extension = '.pth'
    check_folder(os.path.dirname(stem))
    published, description = strip_training_state(read_checkpoint(source, logger='silent'), source)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(stem)), prefix='.publish-') as temporary:
        draft = os.path.join(temporary, 'draft' + extension)
        with write_whole(draft) as file:
            write_checkpoint(published, file, extension == '.safetensors')
        with open(draft, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        path, sidecar = f'{stem}-{digest[:8]}{extension}', f'{stem}-{digest[:8]}.json'
        for target in (path, sidecar):
            check_output(target, source, force)
        description.update(file=os.path.basename(path), sha256=digest)
        with write_whole(sidecar, replace=force) as file:
            file.write((json.dumps(description, indent=2, default=str) + '\n').encode())
            put_in_place(draft, path, replace=force)
    return path, sidecar, description
