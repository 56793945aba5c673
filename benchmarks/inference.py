# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Throughput of RevCol-T, S, B beside mmpretrain's ConvNeXt-T, S, B, backbones with all four outputs, at equal input.

    python benchmarks/inference.py                                              # everything; minutes on a GPU
    python benchmarks/inference.py --sizes t --modes eager deploy bf16 --batch 1 --rounds 10      # for a small CPU

A mode is a word, or several joined by ``+``: eager; deploy (switch_to_deploy, RevCol only: the ConvNeXt beside it runs
without); compiled (torch.compile); bf16 (autocast); contiguous (RevCol only: its features forced into the contiguous layout,
for comparison with the channels-last one that it uses). All nets and modes take turns within every round, so that whatever else
the machine does meets all of them; what counts is the ratios of their median times. Weights are random. Writes JSON and a plot.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Callable

import torch
from rich.progress import track
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout works without being installed

from revcol_mm.models import RevCol  # noqa: E402
from revcol_mm.models.backbones.revcol import UpPath  # noqa: E402
from revcol_mm.models.layers import ConvNeXtBlock, LayerNorm2d  # noqa: E402

SIZES = dict(t='tiny', s='small', b='base')
WORDS = ('eager', 'deploy', 'compiled', 'bf16', 'contiguous')
REVCOL_ONLY = ('deploy', 'contiguous')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES), help='default: t s b')
    parser.add_argument('--modes', nargs='+', metavar='MODE', default=['eager', 'deploy', 'bf16', 'compiled', 'compiled+bf16',
                        'deploy+compiled+bf16'], help='default: eager deploy bf16 compiled compiled+bf16 deploy+compiled+bf16')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), default=[224, 224], help='default: 224 224')
    parser.add_argument('--batch', type=int, default=32, help='images per batch; default: 32')
    parser.add_argument('--rounds', type=int, default=20, help='measured rounds, after two that are not; default: 20')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: a GPU if there is one')
    parser.add_argument('--threads', type=int, help="CPU threads; default: torch's")
    parser.add_argument('--out', type=Path, help='JSON; the plot lies beside it as .png. Default: '
                        'benchmarks/results/inference_<cpu or cuda>.json')
    args = parser.parse_args()
    for mode in args.modes:
        if set(mode.split('+')) - set(WORDS):
            parser.error(f'--modes {mode}: words among {", ".join(WORDS)}, joined by +')
    return args


def build(family: str, size: str) -> nn.Module:
    if family == 'RevCol':
        return RevCol(size)
    from mmpretrain.models import ConvNeXt
    return ConvNeXt(SIZES[size], out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def prepare(net: nn.Module, mode: str, images: Tensor) -> Callable[[], object]:
    """A call that runs the net once in this mode."""
    words = mode.split('+')
    net = net.to(images.device)
    net.eval()  # whose result is None in mmpretrain's ConvNeXt
    if isinstance(net, RevCol):
        if 'deploy' in words:
            net.switch_to_deploy()
        if 'contiguous' in words:
            for module in net.modules():
                if isinstance(module, (ConvNeXtBlock, LayerNorm2d, UpPath)):
                    module.register_forward_hook(lambda module, inputs, output: output.contiguous())
    if 'compiled' in words:
        torch._dynamo.config.cache_size_limit = 64  # all RevCols share their code
        net = torch.compile(net)
    device = images.device.type

    def call() -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16) if 'bf16' in words else nullcontext():
            net(images)
        if device == 'cuda':
            torch.cuda.synchronize()
    return call


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round; the calls take turns, forwards and backwards."""
    names, seconds = list(calls), {name: [] for name in calls}
    turns = [(index, name) for index in range(rounds + 2) for name in (names if index % 2 else reversed(names))]
    for index, name in track(turns, 'measuring (first calls compile)', transient=True):
        start = time.perf_counter()
        calls[name]()
        if index >= 2:
            seconds[name].append(time.perf_counter() - start)
    return seconds


def device_name(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), platform.processor())


def plot(results: dict, path: Path) -> None:
    from matplotlib import pyplot
    sizes, modes = results['sizes'], results['modes']
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout='constrained')
    panels = (('RevCol over ConvNeXt', results['revcol_over_convnext']), ('RevCol over RevCol, eager', results['over_eager']))
    for axis, (title, ratios) in zip(axes, panels):
        for index, mode in enumerate(modes):
            values = [ratios[size].get(mode, float('nan')) for size in sizes]
            places = [place + (index - (len(modes) - 1) / 2) * 0.8 / len(modes) for place in range(len(sizes))]
            axis.bar_label(axis.bar(places, values, 0.8 / len(modes), label=mode), fmt='%.2f', fontsize=7)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set(title=f'Throughput, {title}', xticks=range(len(sizes)), xticklabels=[size.upper() for size in sizes])
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=len(modes), fontsize=8)
    height, width = results['shape']
    figure.suptitle(f'{results["device"]}, batch {results["batch"]}, {height}×{width}', fontsize=10)
    figure.savefig(path, dpi=110)


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, *args.shape, device=args.device)
    calls = {}
    for size in args.sizes:
        for mode in args.modes:
            calls[f'RevCol-{size} {mode}'] = prepare(build('RevCol', size), mode, images)
        for mode in dict.fromkeys(map(partner, args.modes)):
            calls[f'ConvNeXt-{size} {mode}'] = prepare(build('ConvNeXt', size), mode, images)
    load = os.getloadavg()[0]
    medians = {name: statistics.median(times) for name, times in measure(calls, args.rounds).items()}

    def ratio(first: str, second: str) -> float | None:
        return round(medians[second] / medians[first], 3) if second in medians else None

    results = dict(
        device=device_name(args.device), torch=torch.__version__, threads=torch.get_num_threads(), load_average_before=load,
        batch=args.batch, shape=args.shape, rounds=args.rounds, sizes=args.sizes, modes=args.modes,
        milliseconds={name: round(1e3 * value, 3) for name, value in medians.items()},
        images_per_second={name: round(args.batch / value, 2) for name, value in medians.items()},
        revcol_over_convnext={size: {mode: ratio(f'RevCol-{size} {mode}', f'ConvNeXt-{size} {partner(mode)}')
                                     for mode in args.modes} for size in args.sizes},
        over_eager={size: {mode: ratio(f'RevCol-{size} {mode}', f'RevCol-{size} eager') for mode in args.modes
                           if 'eager' in args.modes} for size in args.sizes})
    out = args.out or ROOT / 'benchmarks' / 'results' / f'inference_{torch.device(args.device).type}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + '\n')
    plot(results, out.with_suffix('.png'))
    print(json.dumps(results, indent=2))


def partner(mode: str) -> str:
    """The mode of the ConvNeXt that a RevCol in this mode is compared with."""
    return '+'.join(word for word in mode.split('+') if word not in REVCOL_ONLY) or 'eager'


if __name__ == '__main__':
    main(parse_args())
