# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Training, for ``tools/train.py``."""
import argparse
import copy
import os.path as osp
from typing import Sequence

from mmengine.config import Config
from mmengine.dist import is_main_process

from ..checkpoint.zoo import find_address
from ..engine import CurvesHook
from .checks import check_checkpoint, check_class_folders, check_data, check_pretrained, check_run, check_settings, rehearse
from .config import add_run_arguments, check_present, load_config
from .errors import LaunchError, build_errors
from .lock import lock_work_dir
from .own_data import draw_samples, own_data_folder, use_own_data
from .processes import name_lost_processes
from .runner import build_runner, leave_process_group
from .saving import list_checkpoints


def parse_train_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of ``tools/train.py``, which are those of mmdet's tool."""
    parser = argparse.ArgumentParser(description='Trains a detector, a segmentor or a classifier')
    parser.add_argument('config', help='config file, or the name of one of this package')
    parser.add_argument('--amp', action='store_true',
                        help='train in mixed precision, if the config does not do so already; those of this package do, '
                             'except the demos. Without a GPU the training is in float32')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='FILE',
                        help='continue a training from one of its checkpoints; with "auto", or without FILE, from the '
                             'last one in the work folder')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the real batch size over auto_scale_lr.base_batch_size')
    parser.add_argument('--data', metavar='FOLDER',
                        help='train on this folder instead of the data of the config: COCO annotations, images with label '
                             'maps, or a folder for each class; sets the number of classes and scales the learning rate')
    parser.add_argument('--val-fraction', type=float, metavar='FRACTION',
                        help='with --data: take this part of the data, such as 0.2, for validation')
    parser.add_argument('--check-data', action='store_true',
                        help='open every image and label map before the training, and list those that are broken')
    parser.add_argument('--dry-run', action='store_true',
                        help='do all checks, build the optimizer, load the weights and a batch for training and one for '
                             'validation, and end; with --data, draw training samples, too')
    add_run_arguments(parser)
    return parser.parse_args(argv)


def train(argv: Sequence[str] | None = None) -> None:
    """Runs ``tools/train.py``.

    Raises:
        LaunchError: for what the user can remedy.
    """
    args = parse_train_args(argv)
    cfg = load_config(args)
    check_present(cfg, args.config, ('train_dataloader', 'train_cfg', 'optim_wrapper'))
    if args.data is not None:
        print('\n'.join(use_own_data(cfg, args.data, args.val_fraction, args.cfg_options)))
    elif args.val_fraction is not None:
        raise LaunchError('--val-fraction divides the folder that --data names, but there is no --data')
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        _set_auto_scale_lr(cfg, args.config)
    kept = None if args.dry_run else copy.deepcopy(cfg)
    _set_resume(cfg, args.resume)
    resume = cfg.get('resume', False)
    if cfg.get('load_from'):
        address = find_address(cfg.load_from, args.config)
        if resume and address != cfg.load_from:
            raise LaunchError(f'a training can be resumed only from a checkpoint of a training, but {cfg.load_from} names '
                              'published weights, which have no training state. To start a training from them: '
                              f'--cfg-options load_from={cfg.load_from}')
        cfg.load_from = address
    check_checkpoint(cfg.get('load_from'), '--resume' if resume else 'load_from', resume)
    check_settings(cfg, ('train', 'val'))
    check_data(cfg, ('train', 'val'))
    check_class_folders(cfg, ('train', 'val'))
    check_pretrained(cfg, args.config)
    with lock_work_dir(cfg.work_dir, cfg.launcher):
        _run(cfg, args, kept)
    leave_process_group()


def _run(cfg: Config, args: argparse.Namespace, kept: Config | None) -> None:
    runner = build_runner(cfg, loads_whole_model=bool(cfg.get('resume')), kept=kept)
    if not any(isinstance(hook, CurvesHook) for hook in runner.hooks):
        runner.register_hook(CurvesHook())
    try:
        with build_errors(cfg, runner), name_lost_processes():
            check_run(runner, ('train', 'val'), check_all=args.check_data)
            if args.dry_run:
                if args.data is not None and is_main_process():
                    pictures = draw_samples(runner, osp.join(own_data_folder(cfg), 'samples'))
                    print(f'{len(pictures)} training samples are drawn in {osp.dirname(pictures[0])}')
                rehearse(runner)
                print('All checks have passed, and one batch for training and one for validation were loaded. Nothing was '
                      'trained (--dry-run).')
                return
            runner.train()
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):  # torch.nn.functional.batch_norm's
            raise
        raise LaunchError('BatchNorm needs more than one value per channel, but got one (in UPerNet behind its 1×1 pooling), '
                          'so this model cannot train on one image at a time: raise train_dataloader.batch_size, or train on '
                          f'several GPUs with norm_cfg.type=SyncBN ({error})') from error


def _set_resume(cfg: Config, resume: str | None) -> None:
    if resume == 'auto' and not list_checkpoints(cfg):
        start = f'from the weights of {cfg.load_from}' if cfg.get('load_from') else 'from the beginning'
        print(f'--resume auto: there is no checkpoint in {cfg.work_dir}, so the training starts {start}')
    elif resume is not None:
        cfg.resume, cfg.load_from = True, None if resume == 'auto' else resume


def _set_auto_scale_lr(cfg: Config, path: str) -> None:
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise LaunchError(f'--auto-scale-lr needs the batch size that the learning rate of {path} is made for: add '
                          'auto_scale_lr=dict(base_batch_size=…)')
    cfg.auto_scale_lr.enable = True
