# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Exports a model to ONNX, from the image to its predictions, with free height and width, and checks it in onnxruntime.

    python tools/export_onnx.py CONFIG CHECKPOINT --out detector.onnx
    python tools/export_onnx.py CONFIG CHECKPOINT --out backbone.onnx --part backbone
"""
import argparse
import signal
import sys
import warnings
from pathlib import Path

from mmengine.registry import MODELS, DefaultScope

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.checks import check_checkpoint  # noqa: E402
from revcol_mm.apis.checks.model import check_heads  # noqa: E402
from revcol_mm.apis.checks.report import Record  # noqa: E402
from revcol_mm.apis.config import CHECKPOINT, add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import LaunchError, build_errors, plain_errors  # noqa: E402
from revcol_mm.apis.inference import load_weights  # noqa: E402
from revcol_mm.checkpoint.zoo import find_address  # noqa: E402
from revcol_mm.export import backbone as backbones  # noqa: E402
from revcol_mm.export import export_backbone, export_model, exported_net  # noqa: E402
from revcol_mm.export import model as models  # noqa: E402
from revcol_mm.export.metadata import describe  # noqa: E402
from revcol_mm.models import RevCol  # noqa: E402

SIZES = dict(model=models.SIZES, backbone=backbones.SIZES)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Export a model, or its RevCol backbone, to ONNX')
    parser.add_argument('config', help='config file, or the name of one of this package')
    parser.add_argument('checkpoint', help=CHECKPOINT)
    parser.add_argument('--out', required=True, metavar='FILE', help='file.onnx')
    parser.add_argument('--part', choices=['model', 'backbone'], default='model', help='what to export; default: model')
    parser.add_argument('--opset', type=int, default=17, help='version of the operators, from 17; default: 17')
    defaults = '; '.join(f'{part} {", ".join(f"{h} {w}" for h, w in sizes)}' for part, sizes in SIZES.items())
    parser.add_argument('--check', type=int, nargs=2, action='append', metavar=('H', 'W'),
                        help=f'image size of the check; give it several times for several sizes. Default: {defaults}')
    parser.add_argument('--logits', action='store_true', help='a segmentor also returns its logits')
    parser.add_argument('--fp16', action='store_true',
                        help='convolutions and matrix products in float16, for GPUs; the check prints differences only')
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.part == 'backbone' and (args.fp16 or args.logits):
        parser.error('--fp16 and --logits need --part model')
    return args


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    args.checkpoint = find_address(args.checkpoint, args.config)
    check_checkpoint(args.checkpoint, 'the command line')
    with build_errors(cfg), DefaultScope.overwrite_default_scope(cfg.get('default_scope')), warnings.catch_warnings():
        if cfg.get('data_preprocessor') and 'data_preprocessor' not in cfg.model:  # as mmpretrain's runner does
            cfg.model.data_preprocessor = cfg.data_preprocessor
        warnings.simplefilter('ignore')  # what heads say about their losses matters for training
        model = MODELS.build(cfg.model)
    sizes = [tuple(size) for size in args.check or SIZES[args.part]]
    try:
        if args.part == 'backbone':
            backbone = getattr(model, 'backbone', None)
            if not isinstance(backbone, RevCol):
                raise LaunchError(f'{args.config} has the backbone {type(backbone).__name__}, but only RevCol can be exported')
            load_weights(model, args.checkpoint)
            differences = export_backbone(backbone, args.out, sizes, args.opset, args.force)
            differences = {size: f'{difference:.1e} of the largest value' for size, difference in differences.items()}
        else:
            exported_net(model, logits=args.logits)  # refuses before the weights are read
            metadata = describe(cfg, load_weights(model, args.checkpoint))
            classes = metadata['classes']
            check_heads(model, [Record(tuple(classes))] if classes else [], 'the checkpoint or the data set')
            deviations = export_model(model, args.out, sizes, args.opset, logits=args.logits, half=args.fp16, metadata=metadata,
                                      force=args.force)
            differences = {size: ', '.join(f'{value:.1e} ({name})' for name, value in deviation.items())
                           for size, deviation in deviations.items()}
    except (ValueError, RuntimeError) as error:
        raise LaunchError(str(error)) from error
    for (height, width), difference in differences.items():
        print(f'{height}×{width}: onnxruntime and torch differ by {difference}')
    print(f'written: {args.out}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    main()
