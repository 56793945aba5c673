# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Turns a file of the authors' release into one that the current mmdet, mmsegmentation or mmpretrain loads strictly.

    python tools/import_checkpoint.py revcol_tiny_1k.pth --config configs/revcol_t_in1k.py
    python tools/import_checkpoint.py my_classifier.pth --to-official
"""
import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.config import load_named_config  # noqa: E402
from revcol_mm.apis.errors import plain_errors  # noqa: E402
from revcol_mm.checkpoint import read_checkpoint  # noqa: E402
from revcol_mm.checkpoint.files import check_output, write_checkpoint, write_whole  # noqa: E402
from revcol_mm.checkpoint.safe import local_name  # noqa: E402
from revcol_mm.checkpoint.zoo import find_address  # noqa: E402
from revcol_mm.converters import export_official, import_checkpoint  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Import a checkpoint of the authors' release")
    parser.add_argument('checkpoint', help='path, URL or zoo:CONFIG_NAME of a classifier, a Cascade Mask R-CNN (mmdet 2) or '
                        'an UPerNet (mmseg 0.x)')
    parser.add_argument('--config', help='config, or the name of one of ours, of the model that will load it: names and shapes '
                        'are checked against it')
    parser.add_argument('--out', help='output, .pth or .safetensors. Default: NAME_mm.pth, or NAME_official.pth')
    parser.add_argument('--ema', action='store_true', help="take the averaged weights of the authors' training checkpoints")
    parser.add_argument('--to-official', action='store_true', help="export instead, with the authors' names and wrapping")
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    parser.add_argument('--dry-run', action='store_true', help='check and print the report, but write nothing')
    args = parser.parse_args(argv)
    if args.to_official and (args.config or args.ema):
        parser.error('--to-official cannot be combined with --config or --ema')
    return args


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = load_named_config(args.config) if args.config else None
    args.checkpoint = find_address(args.checkpoint, config and config.filename)
    stem, extension = os.path.splitext(local_name(args.checkpoint))
    out = args.out or f'{stem}_{"official" if args.to_official else "mm"}{extension}'
    check_output(out, args.checkpoint, args.force)
    checkpoint = read_checkpoint(args.checkpoint, logger='silent')
    if args.to_official:
        converted, report = export_official(checkpoint, args.checkpoint), f"the authors' names: {args.checkpoint}"
    else:
        converted, report = import_checkpoint(checkpoint, config, args.ema, args.checkpoint)
    if not args.dry_run:
        with write_whole(out, replace=args.force) as file:
            write_checkpoint(converted, file, out.endswith('.safetensors'))
    print(report)
    print(f'written:     {"nothing (dry run)" if args.dry_run else out}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    main()
