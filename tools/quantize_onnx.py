# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Makes an exported file smaller and faster on CPUs: its convolutions and matrix products compute with 8-bit integers.

    python tools/quantize_onnx.py detector.onnx CONFIG --out detector_int8.onnx
    python tools/test.py CONFIG detector_int8.onnx                                  # what it costs
"""
import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Iterator

import numpy as np
from mmengine.registry import DATASETS, DefaultScope
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.checks.common import leaves  # noqa: E402
from revcol_mm.apis.config import add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import LaunchError, build_errors, plain_errors  # noqa: E402
from revcol_mm.apis.onnx_model import ONNXModel  # noqa: E402
from revcol_mm.export.quantization import quantize_onnx  # noqa: E402
from revcol_mm.runtime import Model, read_image  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Make an exported file compute with 8-bit integers')
    parser.add_argument('file', help='file.onnx of a whole model, from tools/export_onnx.py')
    parser.add_argument('config', help='its config, whose training images show the range of the activations')
    parser.add_argument('--out', required=True, metavar='FILE', help='file_int8.onnx')
    parser.add_argument('--images', type=int, default=64, help='number of training images, evenly spread; default: 64')
    parser.add_argument('--weight-bits', type=int, choices=[7, 8], help='bits of the weights. 8 is more exact; 7 is for CPUs '
                        'without VNNI or a similar instruction, where sums of 8-bit products overflow. Default: what this CPU '
                        'needs; name it if the file will run on another one')
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f'--images must be at least 1, but got {args.images}')
    return args


def training_images(cfg, number: int) -> list[str]:
    """The files of some training images, evenly spread over the data sets."""
    if not cfg.get('train_dataloader'):
        raise LaunchError(f'{cfg.filename} must have a train_dataloader, whose images show the range of the activations')
    with build_errors(cfg), DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        datasets = list(leaves(DATASETS.build(cfg.train_dataloader.dataset)))
    places = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
    chosen = np.linspace(0, len(places) - 1, min(number, len(places))).round().astype(int).tolist() if places else []
    return [dataset.get_data_info(index)['img_path'] for dataset, index in map(places.__getitem__, chosen)]


def inputs_of(model: Model, images: list[str]) -> Iterator[dict[str, np.ndarray]]:
    for path in track(images, 'Calibration', console=Console(stderr=True)):
        for _, values in model.inputs(read_image(path)):
            yield values


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    model = ONNXModel(args.file, cfg.get('default_scope')).runtime
    images = training_images(cfg, args.images)
    try:
        quantize_onnx(args.file, args.out, inputs_of(model, images), {None: None, 7: True, 8: False}[args.weight_bits],
                      args.force)
    except (ValueError, RuntimeError) as error:
        raise LaunchError(str(error)) from error
    before, after = (os.path.getsize(path) / 2**20 for path in (args.file, args.out))
    print(f'written: {args.out} ({after:.1f} MiB, before {before:.1f} MiB). Measure what it predicts: '
          f'python tools/test.py {args.config} {args.out}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    main()
