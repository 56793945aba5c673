# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Pads the depthwise kernels of a RevCol checkpoint: old weights in the centre, a border of small noise (appendix D.3.1).

    python tools/pad_kernels.py ckpt.pth --size 7        # writes ckpt_k7.pth
"""
import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from revcol_mm.apis.errors import plain_errors  # noqa: E402
from revcol_mm.checkpoint import CheckpointError, read_checkpoint  # noqa: E402
from revcol_mm.checkpoint.files import check_output, write_checkpoint, write_whole  # noqa: E402
from revcol_mm.checkpoint.safe import local_name  # noqa: E402
from revcol_mm.checkpoint.zoo import find_address  # noqa: E402
from revcol_mm.converters import PaddingReport, pad_checkpoint  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Pad the depthwise kernels of a RevCol checkpoint')
    parser.add_argument('checkpoint', nargs='?',
                        help='.pth or .safetensors (path, URL or zoo:CONFIG_NAME): a backbone, a classifier, a detector, '
                        'a segmentor, with averaged weights and optimizer state if it has them')
    parser.add_argument('--size', type=_size_or_name, nargs='+', required=True, metavar='K',
                        help='new kernel sizes, odd; one file each')
    parser.add_argument('--out', help="output; '{size}' in it stands for the kernel size. Default: NAME_kK.pth beside NAME.pth")
    parser.add_argument('--std', type=float, default=1e-7, help='standard deviation of the border (default: 1e-7)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the border (default: 0)')
    parser.add_argument('--force', action='store_true', help='replace an output that exists')
    parser.add_argument('--dry-run', action='store_true', help='check and print; write nothing but --report')
    parser.add_argument('--report', metavar='FILE', help='also write what was done as JSON')
    args = parser.parse_intermixed_args(argv)
    if args.checkpoint is None and isinstance(args.size[-1], str):  # --size 7 ckpt.pth
        args.checkpoint = args.size.pop()
    names = [size for size in args.size if isinstance(size, str)]
    if names:
        parser.error(f'argument --size: a kernel size must be an integer, but got {names[0]}')
    if args.checkpoint is None or not args.size:
        parser.error('a checkpoint and at least one kernel size are required')
    return args


def _size_or_name(argument: str) -> int | str:
    try:
        return int(argument)
    except ValueError:
        return argument


def output_name(args: argparse.Namespace, size: int) -> str:
    if args.out is None:
        stem, extension = os.path.splitext(local_name(args.checkpoint))
        return f'{stem}_k{size}{extension}'
    if len(set(args.size)) > 1 and '{size}' not in args.out:
        raise CheckpointError(f"--out must contain '{{size}}' when there are several sizes, but got {args.out}")
    return args.out.replace('{size}', str(size))


def describe(report: PaddingReport, output: str) -> str:
    lines = [f'{report.size_before}×{report.size_before} → {report.size}×{report.size}: {output}']
    lines += [f'  {len(names)} kernels padded' + (f' in {where!r}' if where else '') for where, names in report.kernels.items()]
    lines += [f'  {report.moments} optimizer moments padded with zeros'] if report.moments else []
    lines += [f'  {note}' for note in report.notes]
    return '\n'.join(lines + [f'  load it with kernel_size={report.size} in the backbone'])


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.checkpoint = find_address(args.checkpoint)
    outputs = {size: output_name(args, size) for size in args.size}
    paths = [*outputs.values(), *([args.report] if args.report else [])]
    targets = set()
    for path in paths:
        check_output(path, args.checkpoint, args.force)
        target = os.path.realpath(path)
        if target in targets:
            raise CheckpointError(f'all outputs and --report must be different files, but {path} is named twice')
        targets.add(target)
    checkpoint = read_checkpoint(args.checkpoint, logger='silent')
    reports = {}
    with ExitStack() as files:  # all outputs appear together, or none
        for size, path in outputs.items():
            padded, report = pad_checkpoint(checkpoint, size, args.std, args.seed, args.checkpoint)
            reports[path] = report
            if not args.dry_run:
                file = files.enter_context(write_whole(path, replace=args.force))
                write_checkpoint(padded, file, path.endswith('.safetensors'))
        if args.report:
            text = json.dumps({path: asdict(report) for path, report in reports.items()}, indent=2)
            files.enter_context(write_whole(args.report, replace=args.force)).write(text.encode())
    for path, report in reports.items():
        print(describe(report, path + (' (dry run, not written)' if args.dry_run else '')))


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    main()
