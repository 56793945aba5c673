# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Exports a model's RevCol backbone to ONNX, with free batch size, height and width, and checks it in onnxruntime.

    python tools/export_onnx.py CONFIG CHECKPOINT --out backbone.onnx
"""
import argparse
import signal
import sys
import warnings
from pathlib import Path

from mmengine.registry import MODELS, DefaultScope

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.checks import check_checkpoint  # noqa: E402
from revcol_mm.apis.config import add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import LaunchError, build_errors, plain_errors  # noqa: E402
from revcol_mm.apis.inference import load_weights  # noqa: E402
from revcol_mm.models import RevCol  # noqa: E402
from revcol_mm.utils.export import SIZES, export_onnx  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Export the RevCol backbone of a model to ONNX')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL, of the whole model')
    parser.add_argument('--out', required=True, metavar='FILE', help='file.onnx')
    parser.add_argument('--opset', type=int, default=17, help='version of the operators, from 17; default: 17')
    parser.add_argument('--check', type=int, nargs=2, action='append', metavar=('H', 'W'), help='image size of the check; '
                        f'give it several times for several sizes. Default: {", ".join(f"{h} {w}" for h, w in SIZES)}')
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    add_config_options(parser)
    return parser.parse_args(argv)


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    check_checkpoint(args.checkpoint, 'the command line')
    with build_errors(cfg), DefaultScope.overwrite_default_scope(cfg.get('default_scope')), warnings.catch_warnings():
        if cfg.get('data_preprocessor') and 'data_preprocessor' not in cfg.model:  # as mmpretrain's runner does
            cfg.model.data_preprocessor = cfg.data_preprocessor
        warnings.simplefilter('ignore')  # what heads say about their losses matters for training
        model = MODELS.build(cfg.model)
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, RevCol):
        raise LaunchError(f'{args.config} has the backbone {type(backbone).__name__}, but only RevCol can be exported')
    load_weights(model, args.checkpoint)
    try:
        differences = export_onnx(backbone, args.out, args.check or SIZES, args.opset, args.force)
    except (ValueError, RuntimeError) as error:
        raise LaunchError(str(error)) from error
    for (height, width), difference in differences.items():
        print(f'{height}×{width}: onnxruntime and torch differ by {difference:.1e} of the largest value')
    print(f'written: {args.out}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    main()
