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


def _with_file(model: str, cfg: Any, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """The overlay of a ``pretrained_cfg``, with the file that :meth:`RevColClassifier.load_pretrained` is to read.

    It is the ``file`` that the caller names, what is at the ``url`` that the caller names, or else the published weights. What
    timm reads by itself stays as it is: a ``state_dict``, a model of Hugging Face's hub, and timm's folder of a model.

    Args:
        model (str): the name without a training.
        cfg (str | dict | PretrainedCfg | None): the training, or the caller's settings; None for the first training.
        overlay (dict | None): settings that go before those of ``cfg``; it is copied.

    Raises:
        ValueError: if there is no such training.
        CheckpointError: if there are no public weights, or if a file cannot be downloaded.
    """
    given = {} if cfg is None or isinstance(cfg, str) else cfg if isinstance(cfg, dict) else vars(cfg)
    overlay = dict(overlay or {})
    given = {**given, **overlay}
    file = given.get('file')
    if given.get('source') in ('hf-hub', 'local-dir') or given.get('state_dict') or given.get('hf_hub_id') and not file:
        return overlay
    if not file:
        url = given.get('url') or pretrained_cfg(f'{model}.{cfg}' if isinstance(cfg, str) else model)['url']
        if not url:
            raise CheckpointError(f'{model} has no public weights; those that have some are '
                                  f'{", ".join(list_models(pretrained=True))}')
        file = download(url)  # by us: checked, from a mirror if there is one, and never unpickled without the check
    return dict(overlay, custom_load=True, file=file)


def _entry_point(model: str) -> Callable[..., RevColClassifier]:
    def build(pretrained: bool = False, **kwargs: Any) -> RevColClassifier:
        if kwargs.get('feature_cls', 'getter') != 'getter':  # hooks on modules would see features before the shortcut
            raise ValueError(f"feature_cls must be 'getter', timm's default for RevCol, but got {kwargs['feature_cls']!r}")
        if pretrained:
            kwargs['pretrained_cfg_overlay'] = _with_file(model, kwargs.get('pretrained_cfg'),
                                                          kwargs.get('pretrained_cfg_overlay'))
        return build_model_with_cfg(RevColClassifier, model, pretrained, arch=model.removeprefix('revcol_'),
                                    feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'), **kwargs)

    build.__name__ = build.__qualname__ = model
    build.__doc__ = f'{model}: see :class:`revcol_mm.plain.RevColClassifier`.'
    return build


for _name in MODELS:
    globals()[_name] = register_model(_entry_point(_name))
