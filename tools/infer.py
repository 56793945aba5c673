# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Predicts on images, and writes pictures with the predictions, and JSON in COCO's format.

    python tools/infer.py CONFIG CHECKPOINT photo.jpg folder 'more/**/*.png' --out predictions
    python tools/infer.py model.onnx photo.jpg folder 'more/**/*.png' --out predictions     # without PyTorch

Exit status: 0 when all images were predicted; 3 when some were left out, with the reason for each; 1 when none was predicted.
"""
import argparse
import importlib.util
import runpy
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

if __name__ == '__main__' and any(argument.endswith('.onnx') for argument in sys.argv[1:]):  # before PyTorch is imported
    folder, = importlib.util.find_spec('revcol_mm').submodule_search_locations
    runpy.run_path(str(Path(folder) / 'runtime.py'), run_name='__main__')

from revcol_mm.apis.config import CHECKPOINT, add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import plain_errors  # noqa: E402
from revcol_mm.apis.inference import Numbering, build_inferencer, find_images, predict  # noqa: E402
from revcol_mm.checkpoint.files import check_folder  # noqa: E402

SOME_LEFT_OUT = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Predict on images with a detector, a segmentor or a classifier. An ONNX '
                                     'file takes the place of config and checkpoint: tools/infer.py FILE.onnx IMAGES --out DIR '
                                     '(tools/infer.py FILE.onnx --help lists its options)')
    parser.add_argument('config', help='config file, or the name of one of this package')
    parser.add_argument('checkpoint', help=CHECKPOINT)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders (with all images below), or quoted globs')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for images.json, predictions.json, pictures (vis/) '
                        'and, in segmentation, label maps (maps/)')
    parser.add_argument('--ann-file', metavar='FILE', help='COCO annotations whose ids of images and categories are used; '
                        'default: images are counted from 1, and a category is the number of its class, from 0')
    parser.add_argument('--score-thr', type=float, default=0.3, help="lowest score in a detector's pictures; "
                        'the JSON holds all scores. Default: 0.3')
    parser.add_argument('--no-pictures', action='store_true', help='write no pictures')
    parser.add_argument('--deploy', action='store_true', help='fold the backbone before predicting (RevCol.switch_to_deploy)')
    parser.add_argument('--device', help='default: a GPU if there is one')
    parser.add_argument('--force', action='store_true', help='replace the files of an earlier run')
    add_config_options(parser)
    return parser.parse_args(argv)


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    paths = find_images(args.images, args.out)
    check_folder(args.out, make=True)
    numbering = Numbering.from_annotations(args.ann_file) if args.ann_file else None
    inferencer = build_inferencer(cfg, args.checkpoint, args.device, args.deploy)
    if numbering:
        numbering.set_classes(inferencer.classes)
    console = Console(stderr=True)
    summary = predict(inferencer, paths, args.out, not args.no_pictures, args.score_thr, numbering, args.force,
                      lambda images: track(images, 'Inference', console=console))
    for path, reason in summary.skipped.items():
        print(f'left out: {path}: {reason}', file=sys.stderr)
    print(f'{summary.images} of {len(paths)} images, {summary.results} results: {args.out}')
    if summary.skipped:
        sys.exit(SOME_LEFT_OUT if summary.images else 1)


if __name__ == '__main__':
    main()
