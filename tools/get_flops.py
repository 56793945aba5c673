# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Parameters and FLOPs (multiply-adds) of a config's model, part by part, counted without memory for the weights.

    python tools/get_flops.py configs/cascade_rcnn_revcol_t.py
    python tools/get_flops.py configs/upernet_revcol_h.py --shape 640 640
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.config import add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import asking, plain_errors  # noqa: E402
from revcol_mm.utils.flops import count, default_shape  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Count the parameters and multiply-adds of a model, part by part')
    parser.add_argument('config', help='config file, or the name of one of this package')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='height and width of the image; default: '
                        '800 1280 for detection, 512 2048 or 640 2560 for segmentation, the test crop for classification')
    add_config_options(parser)
    return parser.parse_args(argv)


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with asking():
        cfg = load_config(args)
        height, width = args.shape or default_shape(cfg)
        parts = count(cfg, (height, width))
    rows = [(part, f'{cost.params / 1e6:,.2f}M', f'{cost.macs / 1e9:,.2f}G') for part, cost in parts.items()]
    size = max(len(part) for part in parts)
    print(f'{args.config}, one image of {height}×{width}')
    for part, params, macs in [('', 'parameters', 'FLOPs'), *rows]:
        print(f'  {part:{size}}  {params:>12}  {macs:>12}')
    print('FLOPs are multiply-adds of convolutions, linear layers, matrix products and attention.'
          + (' Two-stage heads: 1000 boxes and 100 masks per stage.' if any('roi_head' in part for part in parts) else ''))


if __name__ == '__main__':
    main()
