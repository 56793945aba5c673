# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Shows what the columns of a trained network have learnt, and what they need in memory.

    python tools/analyze.py layercam CONFIG CHECKPOINT photo.jpg folder --out maps
    python tools/analyze.py cka CONFIG CHECKPOINT test --out similarities
    python tools/analyze.py memory CONFIG --shape 224 224 --batch 64 --out memory

Exit status: 0 when all is done; 3 when images of layercam were left out, with the reason for each; 1 when there is no result.
"""
import argparse
import json
import os
import os.path as osp
import sys
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.analysis import cka, layercam, memory  # noqa: E402
from revcol_mm.analysis.features import build_analysed  # noqa: E402
from revcol_mm.apis.config import CHECKPOINT, add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import LaunchError, asking, plain_errors  # noqa: E402
from revcol_mm.apis.inference import find_images, output_names, read_image  # noqa: E402
from revcol_mm.checkpoint.files import check_folder, check_output, write_whole  # noqa: E402

SOME_LEFT_OUT = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Show what the columns of a network have learnt')
    commands = parser.add_subparsers(dest='command', required=True)
    maps = commands.add_parser('layercam', help='heat maps of every level and column')
    similarity = commands.add_parser('cka', help='similarity of every level and column to the images and the labels')
    growth = commands.add_parser('memory', help='memory of training against the number of columns')
    for command in (maps, similarity, growth):
        command.add_argument('config', help='config file, or the name of one of this package, with a network of columns')
    for command in (maps, similarity):
        command.add_argument('checkpoint', help=CHECKPOINT)

    maps.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders (with all images below), or quoted globs')
    maps.add_argument('--class', dest='label', metavar='CLASS', help='name or number of the class; default: the predicted one')
    maps.add_argument('--target', choices=['box', 'mask', 'pixel'], help='what is explained: box, the score of a detection; '
                      "mask, the mean logit of its mask; pixel, a segmentor's mean logit of the class. Default: box or pixel")
    maps.add_argument('--box', type=float, nargs=4, metavar=('X1', 'Y1', 'X2', 'Y2'),
                      help='explain the detection that overlaps this box most; default: that with the highest score')

    similarity.add_argument('data', nargs='+', metavar='DATA', help='train, val or test, the data sets of the config, or a '
                            "folder that takes the place of the test set's data_root")
    similarity.add_argument('--between', action='store_true', help='also a picture of all features against each other')
    similarity.add_argument('--block', type=int, default=256, help='images of a block of the estimator; default: 256')
    similarity.add_argument('--batch', type=int, default=32, help='images that run at once; default: 32')
    similarity.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='scale the images to this size; needed if '
                            'the pipeline gives images of different sizes')

    growth.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='height and width of the training images; '
                        'default: the largest scale of the config for detection, otherwise its crop')
    growth.add_argument('--batch', type=int, help='images per GPU; default: batch_size of the config')
    growth.add_argument('--columns', type=int, nargs='+', default=[4, 8, 16, 32], help='default: 4 8 16 32')
    for command in (maps, similarity, growth):
        command.add_argument('--out', required=command is not growth, metavar='DIR',
                             help='folder of the results' + '; default: only the table' * (command is growth))
        command.add_argument('--force', action='store_true', help='replace the files of an earlier run')
        add_config_options(command)
    for command in (maps, similarity):
        command.add_argument('--device', help='default: a GPU if there is one')
    return parser.parse_args(argv)


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with asking():
        cfg = load_config(args)
        if args.out:
            check_folder(args.out, make=True)
        dict(layercam=run_layercam, cka=run_cka, memory=run_memory)[args.command](args, cfg)


def run_layercam(args: argparse.Namespace, cfg) -> None:
    from revcol_mm.analysis.plots import draw_heat_maps
    paths = find_images(args.images)
    outputs = {path: osp.join(args.out, f'{name}.png') for path, name in zip(paths, output_names(paths))}
    for output in outputs.values():
        for path in paths:
            if osp.realpath(output) == osp.realpath(path):
                raise LaunchError(f'the output {output} is one of the images, which are never changed: choose another folder')
    os.makedirs(args.out, exist_ok=True)
    for output in outputs.values():
        if osp.exists(output):
            check_output(output, '', args.force)
    inferencer = build_analysed(cfg, args.checkpoint, args.device)
    layercam.check_target(inferencer, args.target, args.box)
    classes = inferencer.classes
    label = layercam.find_class(args.label, classes)
    left_out = 0
    for path, output in track(outputs.items(), 'LayerCAM', console=Console(stderr=True)):
        try:
            read_image(path)
            result = layercam.explain(inferencer, path, label, args.box, args.target)
            name = classes[result.label] if classes else result.label
            os.makedirs(osp.dirname(output), exist_ok=True)
            draw_heat_maps(output, result, f'{osp.basename(path)}: class {name}, score {result.score:.3g}')
        except (ValueError, RuntimeError, OSError, ArithmeticError, cv2.error) as error:  # this image's fault, or memory's
            print(f'left out: {path}: {(str(error).strip() or type(error).__name__).splitlines()[0]}', file=sys.stderr)
            left_out += 1
            continue
        print(f'{path}: class {name}, score {result.score:.3g}: {output}')
    if left_out:
        sys.exit(SOME_LEFT_OUT if left_out < len(paths) else 1)


def run_cka(args: argparse.Namespace, cfg) -> None:
    from revcol_mm.analysis.plots import draw_between, draw_grids
    files = {name: osp.join(args.out, name) for name in ('cka.json', 'cka.png', *['between.png'] * args.between)}
    os.makedirs(args.out, exist_ok=True)
    for file in files.values():
        check_output(file, '', args.force)
    if args.block < cka.MIN_BLOCK or args.batch < 1:
        raise LaunchError(f'--block must be at least {cka.MIN_BLOCK} and --batch at least 1, but got {args.block} and '
                          f'{args.batch}')
    inferencer = build_analysed(cfg, args.checkpoint, args.device)
    images = cka.find_images(cfg, args.data)
    workers = (cfg.get('test_dataloader') or {}).get('num_workers', 0)
    result = cka.measure(inferencer, images, args.block, args.batch, workers, args.shape,
                         lambda batches: track(batches, 'CKA', console=Console(stderr=True)))
    if result.block < args.block:
        print(f'there are fewer images than --block {args.block}: all {result.block} of them are one block')
    grids = {'images': result.images, 'labels of all classes': result.labels}
    if result.best_class is not None:
        grids[f'label of class {result.best_class}'] = result.classes[result.best_class]
    images_used = f'{result.block * result.blocks} images'
    with write_whole(files['cka.json']) as file:
        file.write(json.dumps(result.to_json(), indent=1).encode())
    draw_grids(files['cka.png'], grids, f'CKA of the features with …   ({images_used})')
    if args.between:
        draw_between(files['between.png'], result.between, f'CKA of the features with each other ({images_used})')
    print(f'{images_used} in {result.blocks} blocks of {result.block}, {result.dropped} left over: {", ".join(files.values())}')


def run_memory(args: argparse.Namespace, cfg) -> None:
    if min(args.columns) < 1:
        raise LaunchError(f'--columns must be positive integers, but got {" ".join(map(str, args.columns))}')
    files = {name: osp.join(args.out, name) for name in ('memory.json', 'memory.png')} if args.out else {}
    if files:
        os.makedirs(args.out, exist_ok=True)
    for file in files.values():
        check_output(file, '', args.force)
    counted, plan = memory.count_columns(cfg, sorted(set(args.columns)), args.shape, args.batch, lambda columns: track(
        columns, 'counting', transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty()))
    precision = f'{str(plan.autocast).removeprefix("torch.")} autocast' if plan.autocast else 'float32'
    setting = f'{plan.batch} × {plan.shape[0]}×{plan.shape[1]}, {precision}'
    print(f'{args.config}: backbone, {setting}, MiB\n'
          f'{"columns":>8}{"parameters":>12}{"plain, kept":>14}{"peak":>10}{"reversible, kept":>19}{"peak":>10}')
    for row in counted:
        sizes = [size / 2**20 for size in (row.parameters, row.plain, row.plain_peak, row.reversible, row.reversible_peak)]
        print('{:8}{:12.1f}{:14.1f}{:10.1f}{:19.1f}{:10.1f}'.format(row.columns, *sizes))
    if files:
        from revcol_mm.analysis.plots import draw_memory
        with write_whole(files['memory.json']) as file:
            file.write(json.dumps(dict(shape=plan.shape, batch=plan.batch, precision=precision,
                                       bytes=[vars(row) for row in counted]), indent=1).encode())
        draw_memory(files['memory.png'], counted, f'{Path(args.config).stem}, {setting}')


if __name__ == '__main__':
    main()
