# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the training of a config needs in memory, and how many columns to store; no GPU and little memory are needed to ask.

    python tools/plan_memory.py configs/cascade_rcnn_revcol_b.py --budget 24GB
    python tools/plan_memory.py configs/revcol_h_in1k_640_ft.py --batch 4 --amp bf16
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from revcol_mm.apis.config import add_config_options, load_config  # noqa: E402
from revcol_mm.apis.errors import asking, plain_errors  # noqa: E402
from revcol_mm.utils.planning import Plan, gib, parse_bytes  # noqa: E402


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Plan the memory of a training')
    parser.add_argument('config', help='config file, or the name of one of this package, with a network of columns')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='height and width of the training images after '
                        'padding; default: the largest scale of the config for detection, otherwise its crop')
    parser.add_argument('--batch', type=int, help='images per GPU; default: batch_size of the config')
    parser.add_argument('--amp', choices=['fp16', 'bf16'], help='mixed precision; default: as the config trains')
    parser.add_argument('--budget', metavar='SIZE', help='memory of a GPU, such as 24GB (10^9 bytes each), 24GiB or 24576MiB')
    parser.add_argument('--gpus', type=int, default=1, help='number of GPUs; a config with an FSDP strategy shards the model')
    add_config_options(parser)
    return parser.parse_args(argv)


@plain_errors()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with asking():
        budget = parse_bytes(args.budget) if args.budget else None
        report(args, Plan(load_config(args), args.shape, args.batch, args.amp, args.gpus), budget)


def report(args: argparse.Namespace, plan: Plan, budget: int | None) -> None:
    columns = plan.trained_columns
    counts = [columns, None, 0, *(2**power for power in range(columns.bit_length()) if 2**power < columns)]
    progress = track(counts, 'counting', transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty())
    ways = [plan.way(count) for count in progress]
    best = plan.fit(budget) if budget else None
    if best and best not in ways:
        ways.append(best)
    precision = {None: 'float32'}.get(plan.autocast, f'{str(plan.autocast).removeprefix("torch.")} autocast')
    print(f'{args.config}: {plan.batch} × {plan.shape[0]}×{plan.shape[1]}, {precision}, per GPU of {plan.gpus}')
    heads = {'neck': plan.neck} if plan.neck else {}
    heads['heads and losses, kept (estimate)'] = plan.heads.kept
    heads['heads and losses, peak (estimate)'] = plan.heads.peak
    for part, size in {**plan.fixed, **heads}.items():
        print(f'  {part:36}{gib(size):>12}')
    print(f'\n  {"backbone and neck":36}{"kept":>12}{"peak":>12}{"whole step":>13}{"time":>7}')
    for way in ways:
        print(f'  {way.name:36}{gib(way.kept):>12}{gib(way.peak):>12}{gib(way.total):>13}{way.step:7.2f}')
    print('Bytes of tensors; the CUDA context, workspaces and what the caching allocator holds unused come on top.\n'
          "Time: of the backbone's step, relative to a plain one, by arithmetic.")
    if best:
        options = ' '.join(f'model.backbone.{name}={value}' for name, value in best.options.items())
        print(f'With {gib(budget)}: --cfg-options {options}\nneeds {gib(best.total)}, and a step of the backbone takes '
              f'{best.step:.2f} times as long as a plain one.')


if __name__ == '__main__':
    main()
