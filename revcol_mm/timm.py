# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""``import revcol_mm.timm`` registers the models of :mod:`revcol_mm.plain` with timm: ``timm.create_model('revcol_tiny')``."""
from typing import Any, Callable

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .checkpoint import CheckpointError
from .checkpoint.download import download
from .plain import MODELS, RevColClassifier, list_models, pretrained_cfg

# timm looks for them here; custom_load: the model's load_pretrained() reads the file.
default_cfgs = generate_default_cfgs({
    f'{model}.{tag}' if tag else model: {**{key: value for key, value in pretrained_cfg(
        f'{model}.{tag}' if tag else model).items() if key not in ('architecture', 'tag')}, 'custom_load': True}
    for model, tags in MODELS.items() for tag in (*tags, *[''] * (not tags))})


def _entry_point(model: str) -> Callable[..., RevColClassifier]:
    def build(pretrained: bool = False, **kwargs: Any) -> RevColClassifier:
        cfg = kwargs.get('pretrained_cfg')
        if pretrained and (cfg is None or isinstance(cfg, str)):
            published = pretrained_cfg(f'{model}.{cfg}' if cfg else model)
            if not published['url']:
                raise CheckpointError(f'{model} has no public weights; those that have some are '
                                      f'{", ".join(list_models(pretrained=True))}')
            # Downloaded by us: checked, from a mirror if there is one, and never unpickled without the check.
            kwargs['pretrained_cfg_overlay'] = dict(kwargs.get('pretrained_cfg_overlay') or {}, custom_load=True,
                                                    file=download(published['url']))
        return build_model_with_cfg(RevColClassifier, model, pretrained, arch=model.removeprefix('revcol_'),
                                    feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'), **kwargs)

    build.__name__ = build.__qualname__ = model
    build.__doc__ = f'{model}: see :class:`revcol_mm.plain.RevColClassifier`.'
    return build


for _name in MODELS:
    globals()[_name] = register_model(_entry_point(_name))
