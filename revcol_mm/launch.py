# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, configs, runs without a GPU, and errors in plain words.

One pair of tools serves detection, segmentation and classification: the config's ``default_scope`` says which.
"""
import argparse
import contextlib
import copy
import gc
import importlib.util
import os
import os.path as osp
import subprocess
import sys
import traceback
import warnings
from typing import Dict, Iterator, List, Optional, Sequence

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.utils import import_modules_from_strings

from .checkpoint import CheckpointError, read_checkpoint
from .checkpoint.kernels import kernels_of
from .checkpoint.safe import some
from .checks import LaunchError, check_checkpoint, check_data, check_pretrained, place_of_backbones
from .configs import config_path

#: Import name and PyPI name of the packages that a config's ``default_scope`` can name.
PACKAGES = dict(mmdet='mmdet', mmseg='mmsegmentation', mmpretrain='mmpretrain')


# Arguments -------------------------------------------------------------------------------------------------------------------

class _Settings(DictAction):
    """mmengine's, with a sentence for what is no KEY=VALUE."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: List[str],
                 option_string: Optional[str] = None) -> None:
        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'argument {option_string}: {" ".join(wrong)} is no KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``, and the defaults of whatever else :func:`load_config` reads, for every tool that takes a config."""
    parser.set_defaults(launcher='none', work_dir=None, local_rank=0)
    parser.add_argument('--cfg-options', nargs='+', action=_Settings, metavar='KEY=VALUE',
                        help='settings that replace those of the config, e.g. train_dataloader.batch_size=4 '
                             'key="[a,b]" key="[(a,b),(c,d)]"')


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--work-dir', help='folder of logs, checkpoints and metrics; default: work_dirs/<name of the config>')
    add_config_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch')


def parse_train_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of ``tools/train.py``: those of mmdet's."""
    parser = argparse.ArgumentParser(description='Trains a detector, a segmentor or a classifier')
    parser.add_argument('config', help='config file')
    parser.add_argument('--amp', action='store_true', help='mixed precision (float32 where there is no GPU)')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or, with "auto" or nothing, from the last one in the work folder')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the real batch size over auto_scale_lr.base_batch_size')
    _add_common_arguments(parser)
    return parser.parse_args(argv)


def parse_test_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of ``tools/test.py``: those of mmdet's."""
    parser = argparse.ArgumentParser(description='Tests a detector, a segmentor or a classifier, and prints its metrics')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', help='file.pkl for the predictions; in segmentation also a folder for label maps')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder for images with drawn predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: several scales and flips, merged')
    _add_common_arguments(parser)
    return parser.parse_args(argv)


# Configs ---------------------------------------------------------------------------------------------------------------------

def load_config(args: argparse.Namespace) -> Config:
    """The config with the command line's settings, its packages imported, and the fallbacks of a machine without a GPU.

    Raises:
        LaunchError: if the config or a package that it needs is missing, or it cannot be read.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not osp.isfile(args.config):
        args.config = _find_own_config(args.config)
    try:
        cfg = Config.fromfile(args.config)
    except ImportError as error:
        raise LaunchError(_name_missing_package(error, args.config)) from error
    except FileNotFoundError as error:
        raise LaunchError(f'{args.config} inherits from a file that is not there: {error}') from error
    except (SyntaxError, TypeError, KeyError, AttributeError, NameError, ValueError, OSError) as error:  # OSError: no .py file
        raise LaunchError(f'{args.config} is not a valid config: {type(error).__name__}: {error}') from error
    if args.cfg_options is not None:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (TypeError, KeyError, IndexError) as error:
            raise LaunchError(f'--cfg-options do not fit {args.config}: {error}') from error
        _import_extras(cfg, args.config)  # --cfg-options may name further modules

    scope = cfg.get('default_scope') or 'mmengine'
    if scope in PACKAGES:
        if importlib.util.find_spec(scope) is None:
            raise LaunchError(f'{args.config} needs {scope}, which is not installed: pip install {PACKAGES[scope]}')
        _register(scope)
    if scope == 'mmpretrain':
        _set_mmpretrain_dataloaders(cfg)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return cfg


def _find_own_config(name: str) -> str:
    """The package's config of this name: from outside of the checkout, ``configs/x.py`` or ``x`` works too."""
    try:
        return config_path(name.removeprefix('configs/'))
    except FileNotFoundError as error:
        raise LaunchError(f'there is no config {name} (looked from {os.getcwd()}), and {error}') from error


def _import_extras(cfg: Config, config: str) -> None:
    extras = cfg.get('custom_imports')
    try:
        if extras:
            import_modules_from_strings(**extras)
    except ImportError as error:
        raise LaunchError(_name_missing_package(error, config)) from error


def _name_missing_package(error: ImportError, config: str) -> str:
    """What to install. mmengine hides the missing module's name behind a new exception."""
    cause: Optional[BaseException] = error
    while cause is not None:
        name = getattr(cause, 'name', None)
        if isinstance(cause, ModuleNotFoundError) and name:
            package = name.partition('.')[0]
            if package == 'revcol_mm' and importlib.util.find_spec('revcol_mm') is not None:
                break
            return f'{config} needs the package {package}, which is not installed: pip install {PACKAGES.get(package, package)}'
        cause = cause.__cause__ or cause.__context__
    for package, pip_name in PACKAGES.items():
        if importlib.util.find_spec(package) is None and package in str(error):
            return f'{config} needs {package}, which is not installed: pip install {pip_name}'
    return f'{config} names a module that cannot be imported: {error}'


def _register(scope: str) -> None:
    """Registers all modules of mmdet, mmseg or mmpretrain, and makes it the default scope."""
    utils = importlib.import_module(f'{scope}.utils')
    utils.register_all_modules(init_default_scope=False)
    if scope == 'mmdet':
        utils.setup_cache_size_limit_of_dynamo()


def _set_mmpretrain_dataloaders(cfg: Config) -> None:
    """mmpretrain's own tools add these to every data loader, and its configs rely on it."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(key)
        if loader:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def _set_resume(cfg: Config, resume: Optional[str]) -> None:
    if resume == 'auto' and find_latest_checkpoint(cfg.work_dir) is None:
        start = f'from the weights of {cfg.load_from}' if cfg.get('load_from') else 'from the beginning'
        print(f'--resume auto: no checkpoint of this run in {cfg.work_dir}, so the training starts {start}')
    elif resume is not None:
        cfg.resume, cfg.load_from = True, None if resume == 'auto' else resume


def _set_auto_scale_lr(cfg: Config, path: str) -> None:
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise LaunchError(f'--auto-scale-lr: {path} does not say for which batch size its learning rate is: add '
                          'auto_scale_lr=dict(base_batch_size=…)')
    cfg.auto_scale_lr.enable = True


# Without a GPU ---------------------------------------------------------------------------------------------------------------

def fit_to_cpu(cfg: Config) -> None:
    """Changes what a machine without a GPU cannot run, and warns of what changes the training.

    Mixed precision becomes float32 and SyncBN becomes BN; DDP gets no device ids, FSDP the CPU as its device; and processes
    talk through gloo, initialised here because mmengine calls CUDA whatever the backend.
    """
    wrapper = cfg.get('optim_wrapper')
    if wrapper and str(wrapper.get('type', '')).rpartition('.')[2] == 'AmpOptimWrapper':
        warnings.warn('no GPU: training in float32 instead of mixed precision')
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
    for key in ('val_cfg', 'test_cfg'):
        if (cfg.get(key) or {}).get('fp16'):
            warnings.warn(f'no GPU: {key} runs in float32 instead of mixed precision')
            cfg[key].fp16 = False
    if _replace_sync_bn(cfg.model) or cfg.get('sync_bn'):
        warnings.warn('no GPU: SyncBN becomes BN, whose statistics are those of one process')
        cfg.sync_bn = None
    logger = (cfg.get('default_hooks') or {}).get('logger')
    if logger:
        logger.interval = min(logger.get('interval', 10), 10)  # iterations take seconds here
    if cfg.launcher == 'none':
        return
    _init_gloo(cfg.launcher)
    if cfg.get('strategy'):
        strategy = str(cfg.strategy.get('type', '')).rpartition('.')[2]
        if strategy == 'FSDPStrategy':
            cfg.strategy.setdefault('model_wrapper', dict(type='MMFullyShardedDataParallel'))
            cfg.strategy.model_wrapper.device_id = 'cpu'
        elif strategy == 'DDPStrategy':
            cfg.strategy.setdefault('model_wrapper', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
            cfg.strategy.model_wrapper.device_ids = None
    else:
        default = dict(type='MMDistributedDataParallel', broadcast_buffers=False,
                       find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or default, device_ids=None)


def _replace_sync_bn(node) -> bool:
    found = False
    if isinstance(node, dict):
        if node.get('type') in ('SyncBN', 'MMSyncBN', 'naiveSyncBN'):
            node['type'] = 'BN'
            found = True
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return False
    return any([_replace_sync_bn(value) for value in node]) or found


def _init_gloo(launcher: str) -> None:
    if torch.distributed.is_initialized():
        return
    env = os.environ
    needed = dict(slurm=('SLURM_NODELIST', 'SLURM_PROCID', 'SLURM_NTASKS'),
                  mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE')).get(launcher, ())
    _check_environment(launcher, needed)
    if launcher == 'slurm':
        node = subprocess.run(['scontrol', 'show', 'hostname', env['SLURM_NODELIST']],
                              capture_output=True, text=True, check=True).stdout.split()[0]
        env.setdefault('MASTER_ADDR', node)
        env.update(RANK=env['SLURM_PROCID'], LOCAL_RANK=env.get('SLURM_LOCALID', '0'), WORLD_SIZE=env['SLURM_NTASKS'])
    elif launcher == 'mpi':
        env.update(RANK=env['OMPI_COMM_WORLD_RANK'], LOCAL_RANK=env['OMPI_COMM_WORLD_LOCAL_RANK'],
                   WORLD_SIZE=env['OMPI_COMM_WORLD_SIZE'])
        env.setdefault('MASTER_ADDR', '127.0.0.1')
    env.setdefault('MASTER_PORT', '29500')
    _check_environment(launcher, ('RANK', 'WORLD_SIZE', 'MASTER_ADDR'))
    torch.distributed.init_process_group('gloo')


def _check_environment(launcher: str, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise LaunchError(f'--launcher {launcher}: {", ".join(missing)} not set in the environment. Start the processes with '
                          'tools/dist_train.sh, torchrun or srun, or leave --launcher out for one process')


def _leave_process_group() -> None:
    """Ends a distributed run that went well: a process that exits with the group's threads alive can abort (gloo).

    What holds the group must be gone before: a sharded model does.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# Test-time augmentation ------------------------------------------------------------------------------------------------------

#: Scales of the default test-time augmentation, relative to the test pipeline's; the plain view comes first.
TTA_SCALES = dict(mmdet=(1.0, 0.75, 1.25), mmseg=(1.0, 0.5, 0.75, 1.25, 1.5, 1.75), mmpretrain=(1.0, ))


def set_tta(cfg: Config) -> None:
    """Turns the model into one with test-time augmentation: the config's ``tta_model`` and ``tta_pipeline``, or our defaults.

    The default views are the test pipeline at several scales, plain and flipped. Detections are merged by
    :class:`revcol_mm.detection.InstanceTTAModel` (which stands in for mmdet's ``DetTTAModel`` too, since that one refuses
    masks), segmentation maps and class scores by the means of mmseg and mmpretrain.

    Raises:
        LaunchError: if there is no default for this config.
    """
    scope = cfg.get('default_scope')
    if scope not in TTA_SCALES and not ('tta_model' in cfg and 'tta_pipeline' in cfg):
        raise LaunchError(f'--tta: no default for default_scope={scope!r}: add tta_model and tta_pipeline to the config')
    models = dict(mmdet=dict(type='InstanceTTAModel', tta_cfg=dict(nms=_detector_nms(cfg.model), max_per_img=100)),
                  mmseg=dict(type='SegTTAModel'), mmpretrain=dict(type='HeadScoreTTA'))
    model = ConfigDict(cfg.get('tta_model') or models[scope])
    extras = dict(mmdet='revcol_mm.detection', mmpretrain='revcol_mm.classification')
    if scope in extras:
        importlib.import_module(extras[scope])
    if scope == 'mmdet' and model.type in ('DetTTAModel', 'mmdet.DetTTAModel'):
        model.type = 'InstanceTTAModel'
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        raise LaunchError(f'--tta: {dataset.get("type")} in test_dataloader has no pipeline to augment')
    pipeline = cfg.get('tta_pipeline') or default_tta_pipeline(dataset.pipeline, TTA_SCALES[scope])
    cfg.model = ConfigDict(model, module=cfg.model)
    dataset.pipeline = pipeline


def _detector_nms(model: dict) -> dict:
    """The detector's own last NMS, which belongs to its scores; plain NMS at 0.5 for detectors without one."""
    test_cfg = model.get('test_cfg') or {}
    return (test_cfg.get('rcnn') or test_cfg).get('nms') or dict(type='nms', iou_threshold=0.5)


def default_tta_pipeline(pipeline: Sequence[dict], scales: Sequence[float]) -> List[dict]:
    """A test pipeline's views at several scales, plain and flipped.

    Args:
        pipeline: the test pipeline: loading, transforms, among them one that resizes, and packing at the end.
        scales: factors of the size that it resizes to. A pipeline without resizing is only flipped.
    """
    def kind(step: dict) -> str:
        return str(step['type']).rpartition('.')[2]

    steps = copy.deepcopy(list(pipeline))
    pack = steps.pop()
    if kind(pack) == 'PackDetInputs':
        keys = pack.get('meta_keys') or ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        pack['meta_keys'] = tuple(dict.fromkeys([*keys, 'flip', 'flip_direction']))
    # The annotations stay those of the image as it is: loaded behind the flip.
    annotations = [step for step in steps if kind(step) == 'LoadAnnotations']
    steps = [step for step in steps if kind(step) != 'LoadAnnotations']
    at = next((index for index, step in enumerate(steps) if 'Resize' in kind(step) and step.get('scale') is not None),
              None) if len(scales) > 1 else None
    flips = [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)]
    if kind(pack) != 'PackInputs':  # mmpretrain's flip has no such choice
        flips = [dict(flip, direction='horizontal') for flip in flips]
    if at is None:
        views, before, after = [flips], steps, []
    else:
        before, resize, after = steps[:at], steps[at], steps[at + 1:]
        views = [[dict(resize, scale=_scaled(resize['scale'], factor)) for factor in scales], flips]
    views += [[step] for step in (*after, *annotations, pack)]
    return [*before, dict(type='TestTimeAug', transforms=views)]


def _scaled(scale, factor: float):
    return int(scale * factor) if isinstance(scale, (int, float)) else tuple(int(side * factor) for side in scale)


# Runs ------------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def model_errors(cfg: Config) -> Iterator[None]:
    """While the config's model is built.

    Raises:
        LaunchError: for settings that the model refuses, an unknown ``type`` among them, and for a config without a model.
    """
    if not cfg.get('model'):
        raise LaunchError(f'{cfg.filename} has no model')
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = str(error.args[0] if error.args else type(error).__name__)
        raise LaunchError(f'the model of {cfg.filename} cannot be built: {reason}') from error


def build_runner(cfg: Config):
    """mmengine's Runner, or the one that the config's ``runner_type`` names.

    Raises:
        LaunchError: for settings that the model, a hook or another part refuses, and for parts that do not go together.
    """
    sharded = str((cfg.get('strategy') or {}).get('type')).endswith('FSDPStrategy')
    if sharded and any(str(hook.get('type')).endswith('EMAHook') for hook in cfg.get('custom_hooks') or []):
        raise LaunchError('EMAHook copies the whole model, which a sharded one does not allow. Without any custom hook: '
                          '--cfg-options custom_hooks="[]"; or leave this one out in a config of your own')
    if get_device() == 'cpu':
        fit_to_cpu(cfg)
    with _build_errors(cfg):
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


class _Begun(Hook):
    """Tells the errors of a run from those of its parts, most of which a runner builds when the run is asked for."""

    value = False

    def before_train(self, runner) -> None:
        self.value = True

    before_test = before_train


@contextlib.contextmanager
def _build_errors(cfg: Config, runner=None) -> Iterator[None]:
    """While the parts of a run are built; with a ``runner``, while it runs.

    Raises:
        LaunchError: for settings that a part refuses, with its place.
    """
    begun = _Begun()
    if runner is not None:
        runner.register_hook(begun, priority='VERY_HIGH')
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        if begun.value:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = error.args[0] if error.args else 'no reason given'
        raise LaunchError(f'{cfg.filename} cannot be built: {type(error).__name__}: {reason} ({where.filename}, line '
                          f'{where.lineno})') from error


def train(argv: Optional[Sequence[str]] = None) -> None:
    """``tools/train.py``.

    Raises:
        LaunchError: for what the user can remedy.
    """
    args = parse_train_args(argv)
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        _set_auto_scale_lr(cfg, args.config)
    _set_resume(cfg, args.resume)
    resume = cfg.get('resume', False)
    start = cfg.get('load_from') or (find_latest_checkpoint(cfg.work_dir) if resume else None)
    check_checkpoint(start, '--resume' if resume else 'load_from', resume)
    check_data(cfg, ('train', 'val'))
    check_pretrained(cfg, args.config)
    runner = build_runner(cfg)
    if resume:
        _load_strictly(runner)
    elif isinstance(getattr(runner, 'model', None), torch.nn.Module):  # a FlexibleRunner builds it later
        _load_what_fits(runner)
    try:
        with _build_errors(cfg, runner):
            runner.train()
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):  # torch.nn.functional.batch_norm's
            raise
        raise LaunchError('a BatchNorm has met a single value per channel (in UPerNet behind its 1×1 pooling), so this model '
                          'cannot train on one image at a time: raise train_dataloader.batch_size, or train on several GPUs '
                          f'with norm_cfg.type=SyncBN ({error})') from error
    del runner
    _leave_process_group()


def test(argv: Optional[Sequence[str]] = None) -> Dict[str, float]:
    """``tools/test.py``.

    Returns:
        dict: the metrics.

    Raises:
        LaunchError: for what the user can remedy.
        CheckpointError: the checkpoint cannot be read, or does not fit the model.
    """
    args = parse_test_args(argv)
    cfg = load_config(args)
    scope = cfg.get('default_scope')
    missing = [key for key in ('test_dataloader', 'test_evaluator') if not cfg.get(key)]
    if missing:
        raise LaunchError(f'{args.config} has no {" and no ".join(missing)}, so there is nothing to test on')
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.init_weights_for_test_or_val = False  # FlexibleRunner would look for pre-trained weights, which are replaced
    check_checkpoint(args.checkpoint, 'the command line')
    check_data(cfg, ('test', ))
    if args.show or args.show_dir:
        _set_visualization(cfg, args)
    if args.tta:
        set_tta(cfg)
    dump = args.out is not None and args.out.endswith(('.pkl', '.pickle'))
    if args.out is not None and not dump:
        if scope != 'mmseg':
            raise LaunchError(f'--out {args.out}: a file that ends in .pkl or .pickle')
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
        for evaluator in evaluators:
            evaluator.update(output_dir=args.out, keep_results=True)
    runner = build_runner(cfg)
    _load_strictly(runner)
    if dump:
        runner.test_evaluator.metrics.append(_build_dump(scope, args.out))
    with _build_errors(cfg, runner):
        metrics = runner.test()
    del runner
    _leave_process_group()
    return metrics


def _load_strictly(runner) -> None:
    """Makes a runner refuse a checkpoint of another model, of which it would load what fits.

    mmengine's own comparison, since it knows the wrappers (DDP, FSDP, test-time augmentation), and weights that a model renames
    or pads while it loads them.
    """
    owner = getattr(runner, 'strategy', runner)  # a FlexibleRunner's; it resumes by itself
    load = owner.load_checkpoint

    def load_strictly(filename: str, **kwargs):
        try:
            return load(filename, **dict(kwargs, strict=True))
        except CheckpointError:
            raise
        except RuntimeError as error:
            differences = []
            for line in filter(None, map(str.strip, str(error).splitlines()[1:] or [str(error)])):
                what, colon, names = line.partition(': ')
                differences.append(f'{what}{colon}{some(names.split(", ")) if " key" in what else names}')
            kernels = any('size mismatch' in line and '.dwconv.weight' in line for line in differences)
            padding = '. Kernels grow by tools/pad_kernels.py' * kernels
            raise CheckpointError(f"{filename} does not fit the config's model: {'; '.join(differences[:4])}"
                                  + '; …' * (len(differences) > 4) + padding) from error

    owner.load_checkpoint = load_strictly


def _load_what_fits(runner) -> None:
    """Makes a runner refuse a ``load_from`` of which nothing fits its model, or whose kernels have another size.

    Heads for other classes and the like may differ: that is fine-tuning, and mmengine's log says what was left out.
    """
    load = runner.load_checkpoint

    def load_what_fits(filename: str, **kwargs):
        content = read_checkpoint(filename, map_location='meta', logger=None)
        weights = content.get('state_dict', content)
        weights = {key.removeprefix('module.'): value for key, value in weights.items()}
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        own = model.state_dict()
        # Some models rename weights while they load them, as mmdet's teachers and students do. No weight is here to be copied.
        model._load_from_state_dict(weights, '', {}, False, [], [], [])
        if not any(key in own and value.shape == own[key].shape for key, value in weights.items()):
            raise CheckpointError(f"none of the weights of {filename} ({some(weights, 2)}) fits the config's model "
                                  f'({some(own, 2)}). {place_of_backbones(filename)}')
        sizes = [(value.shape[-1], own[key].shape[-1]) for key, value in kernels_of(weights).items()
                 if key in own and value.dim() == 4 and value.shape != own[key].shape and value.shape[:2] == own[key].shape[:2]]
        size, wanted = sizes[0] if sizes else (0, 0)
        padded = size < wanted and any(getattr(module, 'pad_pretrained', False) for module in model.modules())
        if sizes and not padded:
            remedy = f': python tools/pad_kernels.py {filename} --size {wanted}' if size < wanted else ''
            raise CheckpointError(f'{filename} has kernels of {size}×{size}, and the model of {wanted}×{wanted}{remedy}')
        return load(filename, **kwargs)

    runner.load_checkpoint = load_what_fits


def _set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Each package's visualization hook has its own words for the same."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise LaunchError(f'--show and --show-dir need a visualization hook in default_hooks, which {args.config} lacks')
    hook.update(show=args.show, wait_time=args.wait_time)
    if cfg.default_scope == 'mmpretrain':
        hook.update(enable=True, out_dir=args.show_dir)
        return
    hook.draw = True
    if args.show_dir and cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook.test_out_dir = osp.abspath(args.show_dir)  # a relative one would lie in the work folder


def _build_dump(scope: str, path: str):
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        from mmengine.evaluator import DumpResults as Dump
    return Dump(out_file_path=path)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with one sentence and exit status 1 for errors that its user can remedy; others keep their traceback."""
    try:
        yield
    except (LaunchError, CheckpointError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        sys.exit(f'error: {error}: pip install {PACKAGES.get(package, package)}')
