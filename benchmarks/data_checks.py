# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Measures what the checks of the data cost before a training on a data set of COCO's size.

    python benchmarks/data_checks.py

It makes an annotation file of 118,000 images and 860,000 annotations with random boxes and polygons, and builds mmdet's
CocoDataset of it with the checks, several times, each time in a process of its own. It prints the processor's seconds of the
whole build and of the checks in it, and how often the file was parsed.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed


def write_annotations(folder: Path, images: int, annotations: int, categories: int = 80) -> None:
    """Writes ``annotations.json``, and the one picture that all images share.

    Args:
        folder (Path): where to.
        images (int): number of images.
        annotations (int): number of annotations.
        categories (int): number of categories. Default: 80.
    """
    Image.new('RGB', (640, 480)).save(folder / 'picture.jpg')
    rng = np.random.default_rng(0)
    corners, sizes = rng.integers(0, 300, (annotations, 2)), rng.integers(2, 180, (annotations, 2))
    owners, kinds = rng.integers(0, images, annotations), rng.integers(1, categories + 1, annotations)
    with open(folder / 'annotations.json', 'w') as file:
        names = [dict(id=index, name=f'class {index}') for index in range(1, categories + 1)]
        file.write('{"categories": ' + json.dumps(names))
        file.write(', "images": ' + json.dumps([dict(id=index, file_name='picture.jpg', width=640, height=480)
                                                for index in range(images)]) + ', "annotations": [')
        for index, (corner, size, owner, kind) in enumerate(zip(corners, sizes, owners.tolist(), kinds.tolist())):
            (x, y), (width, height) = corner.tolist(), size.tolist()
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            file.write(', ' * bool(index) + json.dumps(dict(
                id=index, image_id=owner, category_id=kind, bbox=[x, y, width, height], area=width * height, iscrowd=0,
                segmentation=[polygon])))
        file.write(']}')


def build(folder: Path, categories: int = 80) -> dict[str, float]:
    """Builds the data set with the checks, and does what follows when it is built.

    The difference of two builds would tell less: reading the file takes 20 seconds, which vary by more than the checks take.

    Returns:
        dict: processor seconds of the ``build`` and of the ``checks`` in it, and how often a JSON file was ``parsed``.
    """
    from torch import nn
    from torch.utils.data import DataLoader

    from revcol_mm.apis.checks import run  # before mmdet, for which it provides mmcv's operators
    from mmdet.datasets import CocoDataset  # isort: skip
    from mmdet.datasets.transforms import LoadAnnotations  # isort: skip
    spent = []

    def timed(function: Callable) -> Callable:
        def call(*args):
            started = time.process_time()
            function(*args)
            spent.append(time.process_time() - started)
        return call

    run.check_annotations = timed(run.check_annotations)
    run.DataChecks.inspect, run.DataChecks.check = timed(run.DataChecks.inspect), timed(run.DataChecks.check)
    parse, parsed = json.load, []
    json.load = lambda file, **kwargs: parsed.append(file.name) or parse(file, **kwargs)
    started = time.process_time()
    checks = run.DataChecks()
    with checks.watching():
        dataset = CocoDataset(ann_file=str(folder / 'annotations.json'), data_prefix=dict(img=str(folder)),
                              metainfo=dict(classes=tuple(f'class {index}' for index in range(1, categories + 1))),
                              filter_cfg=dict(filter_empty_gt=True, min_size=32), pipeline=[LoadAnnotations(with_mask=True)])
    checks.check(dict(train=DataLoader(dataset)), nn.Identity(), {})
    return dict(build=time.process_time() - started, checks=sum(spent), parsed=len(parsed))


def main(argv: list[str] | None = None) -> float:
    """Returns the median of the checks' processor seconds."""
    parser = argparse.ArgumentParser(description='Cost of the checks of the data')
    parser.add_argument('--images', type=int, default=118_000)
    parser.add_argument('--annotations', type=int, default=860_000)
    parser.add_argument('--runs', type=int, default=3, help='number of builds. Default: 3')
    parser.add_argument('--build', metavar='DIR', help='for the processes that it starts')
    args = parser.parse_args(argv)
    if args.build:
        print(json.dumps(build(Path(args.build))))
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_annotations(Path(folder), args.images, args.annotations)
        size = (Path(folder) / 'annotations.json').stat().st_size / 1e6
        print(f'{args.images} images, {args.annotations} annotations, {size:.0f} MB')
        for _ in range(args.runs):
            output = subprocess.run([sys.executable, __file__, '--build', folder], check=True, stdout=subprocess.PIPE,
                                    text=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
            print('build with checks: {build:.2f} s, of which the checks take {checks:.2f} s; files parsed: {parsed}'.format(
                **results[-1]), flush=True)
    median = statistics.median(result['checks'] for result in results)
    print(f'the checks take {median:.2f} s (median)')
    return median


if __name__ == '__main__':
    main()
