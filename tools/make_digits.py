#!/usr/bin/env python
# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Makes the bundled data set: handwritten digits on textured backgrounds, with COCO, semantic and class labels."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.errors import LaunchError, plain_errors  # noqa: E402
from revcol_mm.datasets import make_digits  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', nargs='?', default='data/digits', help='folder to make')
    parser.add_argument('--num-train', type=int, default=1600, help='training images')
    parser.add_argument('--num-val', type=int, default=200, help='validation images')
    parser.add_argument('--size', type=int, default=128, help='width and height of the images, in pixels')
    parser.add_argument('--seed', type=int, default=0, help='the same seed gives the same files')
    parser.add_argument('--tuning', action='store_true', help='make training and validation images from the training '
                        'handwriting only, to choose settings on them; the usual validation images stay unseen')
    return parser.parse_args()


@plain_errors()
def main() -> None:
    args = parse_args()
    try:
        written = make_digits(args.root, args.num_train, args.num_val, args.size, args.seed, args.tuning)
    except (ValueError, OSError, ImportError) as error:
        raise LaunchError(str(error)) from error
    if written:
        print(f'{args.root}: {args.num_train} training and {args.num_val} validation images')
    else:
        print(f'{args.root} is already there')


if __name__ == '__main__':
    main()
