# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Testing, for ``tools/test.py``."""
import argparse
import contextlib
import os
import os.path as osp
from typing import Sequence

from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import dump
from mmengine.registry import METRICS

from ..checkpoint.files import check_folder, check_output, write_whole
from ..checkpoint.zoo import find_address
from ..utils.configs import as_list, kind_of
from .checks import (
    check_checkpoint,
    check_class_folders,
    check_data,
    check_run,
    check_settings,
    find_file_classes,
    find_model_classes,
)
from .checks.common import say
from .config import CHECKPOINT, add_run_arguments, check_present, load_config
from .errors import LaunchError, build_errors
from .onnx_model import ONNXModel
from .pictures import PACKAGES, check_label_maps, name_pictures_apart
from .runner import build_runner, leave_process_group
from .tta import set_tta


def parse_test_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of ``tools/test.py``, which are those of mmdet's tool."""
    parser = argparse.ArgumentParser(description='Tests a detector, a segmentor or a classifier, and prints its metrics')
    parser.add_argument('config', help='config file, or the name of one of this package')
    parser.add_argument('checkpoint', help=f'{CHECKPOINT}, or an ONNX file')
    parser.add_argument('--out', help='file.pkl for the predictions; in segmentation also a folder for label maps')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder for images with drawn predictions')
    parser.add_argument('--report', metavar='FILE.html',
                        help='write a page with the results of every class, confusions, and the best and worst images')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: several scales and flips, merged')
    parser.add_argument('--provider', default='cpu', help='where an ONNX file is computed: cpu, cuda or openvino. Default: cpu')
    parser.add_argument('--check-data', action='store_true',
                        help='open every image and label map before the test, and list those that are broken')
    add_run_arguments(parser)
    return parser.parse_args(argv)


def test(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs ``tools/test.py``.

    Returns:
        dict: the metrics.

    Raises:
        LaunchError: for what the user can remedy.
        CheckpointError: if the checkpoint cannot be read, or does not fit the model.
    """
    args = parse_test_args(argv)
    cfg = load_config(args)
    scope = cfg.get('default_scope')
    check_present(cfg, args.config, ('test_dataloader', 'test_evaluator'))
    args.checkpoint = find_address(args.checkpoint, args.config)
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.init_weights_for_test_or_val = False  # FlexibleRunner would look for pre-trained weights, which are replaced
    reporter = None
    if args.report is not None:
        from .report import Reporter  # it needs matplotlib
        reporter = Reporter(args.report, cfg, args.checkpoint)
    exported = args.checkpoint.endswith('.onnx')
    if exported:
        model = _take_file(cfg, args)
    else:
        check_checkpoint(args.checkpoint, 'the command line')
    check_settings(cfg, ('test', ))
    check_data(cfg, ('test', ))
    check_class_folders(cfg, ('test', ))
    classes = (model.runtime.classes or find_file_classes(cfg)) if exported else find_model_classes(args.checkpoint, cfg)
    if args.show or args.show_dir:
        _set_visualization(cfg, args)
    if args.tta:
        set_tta(cfg)
    dumps = args.out is not None and args.out.endswith(('.pkl', '.pickle'))
    if dumps:
        check_folder(osp.dirname(args.out), make=True)
        os.makedirs(osp.dirname(osp.abspath(args.out)), exist_ok=True)
        check_output(args.out, '', force=True)
    elif args.out is not None:
        if scope != 'mmseg':
            raise LaunchError(f'--out must be a file that ends in .pkl or .pickle, but got {args.out}')
        for evaluator in as_list(cfg.test_evaluator):
            evaluator.update(output_dir=args.out, keep_results=True)
    # It would build the training data.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if kind_of(hook) != 'EarlyStoppingHook']
    cfg.default_hooks = {name: hook for name, hook in (cfg.get('default_hooks') or {}).items()
                         if kind_of(hook) != 'EarlyStoppingHook'}
    runner = build_runner(cfg, loads_whole_model=True)
    if exported:
        runner.model = model
    with build_errors(cfg, runner):
        check_run(runner, ('test', ), classes, args.check_data)
        if dumps:  # not earlier, because it builds the data set
            runner.test_evaluator.metrics.append(_dumping(scope, args.out))
        elif args.out is not None:
            check_label_maps(runner, args.out)
        if args.show_dir:
            name_pictures_apart(runner, args.show_dir, scope)
        with reporter.watching(runner) if reporter else contextlib.nullcontext():
            metrics = runner.test()
        if reporter:
            reporter.write(metrics)
            print(f'the report is {args.report}')
    del runner, reporter
    leave_process_group()
    return metrics


def _take_file(cfg: Config, args: argparse.Namespace) -> ONNXModel:
    """The model in an ONNX file, which takes the place of the config's.

    Raises:
        LaunchError: it cannot be used, augmentation is asked for, or HeadAccuracy is the only metric.
    """
    if args.tta:
        raise LaunchError('--tta needs a checkpoint, because an ONNX file predicts on the image as it is: leave it out')
    model = ONNXModel(args.checkpoint, cfg.get('default_scope'), args.provider)
    cfg.load_from = None
    evaluators = as_list(cfg.test_evaluator)
    kept = [evaluator for evaluator in evaluators if kind_of(evaluator) != 'HeadAccuracy']
    if not kept:
        raise LaunchError('test_evaluator must have another metric than HeadAccuracy for an ONNX file, which has the scores of '
                          "the last head alone, but has none: add dict(type='Accuracy')")
    if len(kept) < len(evaluators):
        print('HeadAccuracy is left out: a file has the scores of the last head alone')
        cfg.test_evaluator = kept
    return model


def _dumping(scope: str | None, path: str) -> BaseMetric:
    """The package's metric that collects the predictions. It writes the whole file or none, unlike mmengine."""
    def write(results: list) -> dict[str, float]:
        with write_whole(path) as file:
            dump(results, file, file_format='pkl')
        say(f'the predictions are in {path}')
        return {}

    kind = 'mmdet.DumpDetResults' if scope == 'mmdet' else 'DumpResults'
    metric = METRICS.build(dict(type=kind, out_file_path=path))
    metric.compute_metrics = write
    return metric


def _set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Sets the visualization hook, whose arguments have other names in every package.

    Raises:
        LaunchError: there is none, or it cannot draw several views.
    """
    scope, hook = cfg.get('default_scope'), (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise LaunchError(f'--show and --show-dir need a visualization hook in default_hooks, but {args.config} has none')
    if args.tta and scope == 'mmpretrain':
        raise LaunchError("--show and --show-dir draw a classifier's predictions on the one image that it got, but with --tta "
                          'it got several views: leave --tta out, or the pictures')
    hook.update(show=args.show, wait_time=args.wait_time)
    if scope in ('mmpretrain', 'mmseg') and 'default_hooks.visualization.interval' not in (args.cfg_options or {}):
        hook.interval = 1  # by default they draw every 5000th image, and every 50th batch; mmdet's draws all images of a test
    if scope == 'mmpretrain':
        hook.update(enable=True, out_dir=args.show_dir)
        return
    hook.draw = True
    if args.show_dir and scope == 'mmseg':
        drawing = dict(type=PACKAGES[scope], vis_backends=[dict(type='LocalVisBackend')])  # where the config names none
        cfg.visualizer = {**drawing, **(cfg.get('visualizer') or {}), 'save_dir': args.show_dir}
    elif args.show_dir:
        hook.test_out_dir = osp.abspath(args.show_dir)  # a relative one would lie in the work folder
