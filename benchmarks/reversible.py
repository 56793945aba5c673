# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Memory, time and exactness of the ways to train a RevCol backbone, as ratios taken in one run.

    python benchmarks/reversible.py                      # the CPU set: half an hour on two cores
    python benchmarks/reversible.py --parts memory       # one part of it
    python benchmarks/reversible.py --device cuda        # T, S, B at 512² and 800×1344, float32 and autocast; RevCol-H at 640²

Ways: plain autograd; ``torch.utils.checkpoint`` around each column (``with_cp``); the naive inverse, whose stream is float32
and has no anchors; ours, with 0, 1, 2 and 4 stored columns. Writes JSON with the device's name, and a plot, to
``benchmarks/results/``.
"""
import argparse
import gc
import json
import math
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from revcol_mm.models import RevCol  # noqa: E402
from revcol_mm.utils.memory import count_step, without_memory  # noqa: E402

RESULTS = Path(__file__).parent / 'results'
BATCHES = (1, 8)  # of the timed steps
COUNTS = (4, 8, 16, 32)  # columns
STORED = {f'reversible, {count} stored': count for count in (1, 2, 4)}  # columns
WAYS = ('plain', 'checkpoint', 'naive', 'reversible', *STORED)
LABELS = dict(plain='plain autograd', checkpoint='checkpoint per column', naive='naive float32 inverse')


@contextmanager
def way_of(name):
    """The constructor arguments of a way, and for the naive inverse what it does without."""
    if name == 'naive':
        engine = 'revcol_mm.reversible.autograd'
        with mock.patch(f'{engine}.STREAM_DTYPE', torch.float32), mock.patch(f'{engine}.ANCHOR_BUDGET', float('inf')):
            yield dict(reversible=True, drift_threshold=float('inf'))
    else:
        yield dict(reversible=name.startswith('reversible'), with_cp=name == 'checkpoint', stored_columns=STORED.get(name, 0))


def memory(arch, columns, way, size):
    """(MiB kept between forward and backward, MiB at the peak), parameters and their gradients aside."""
    sizes = RevCol.ARCHS[arch]
    with way_of(way) as kwargs, torch.device('meta'):
        net = RevCol(dict(channels=sizes['channels'], depths=sizes['depths'], num_columns=columns), **kwargs).train()
    with way_of(way), without_memory(net) as copied:
        step = count_step(copied, torch.empty(1, 3, size, size))
    return step.kept / 2**20, step.peak / 2**20


def slope(points):
    """Least-squares slope of [(x, y)]."""
    return statistics.linear_regression(*zip(*points)).slope


def step_times(arch, size, ways, device, batch=1, autocast=None, repeats=7, compiled=False):
    """Seconds of the forward pass and of the whole step, round by round, the ways taking turns; levels compiled, if asked."""
    torch.manual_seed(0)
    net = RevCol(arch).to(device).train()
    if compiled:
        torch._dynamo.config.cache_size_limit = 64
        for level in [level for column in net.columns for level in column.levels]:
            level.compile(dynamic=False)
    image = torch.randn(batch, 3, *size, device=device)
    times = {way: [] for way in ways}
    for _ in track(range(repeats), f'step time, {batch} × {arch} at {size[0]}×{size[1]}', transient=True):
        for way in ways:
            with way_of(way) as kwargs:
                net.reversible, net.with_cp = kwargs['reversible'], kwargs.get('with_cp', False)
                net.stored_columns = kwargs.get('stored_columns', 0)
                net.monitor.threshold = kwargs.get('drift_threshold')
                for _ in range(2):  # the first one leaves the allocator as the way before it does not
                    net.zero_grad(set_to_none=True)
                    marks = [now(device)]
                    with torch.autocast(device, autocast, enabled=autocast is not None):
                        loss = sum(feature.float().square().mean() for feature in net(image))
                    marks.append(now(device))
                    loss.backward()
                    marks.append(now(device))
            times[way].append((marks[1] - marks[0], marks[2] - marks[0]))
    return times


def medians(rounds):
    return dict(zip(('forward', 'step'), map(statistics.median, zip(*rounds))))


def of_plain(times):
    """Median times relative to the plain way's."""
    plain = medians(times['plain'])
    return {way: {part: time / plain[part] for part, time in medians(rounds).items()} for way, rounds in times.items()}


def now(device):
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def gradient_error(columns, gamma, way):
    """Worst relative error of a parameter's gradient against plain float64 autograd, on a narrow net; None if not finite."""
    def grads(kwargs, dtype):
        torch.manual_seed(0)
        net = RevCol(dict(channels=(32, 48, 64, 96), depths=(1, 1, 1, 1), num_columns=columns), layer_scale_init_value=0.5,
                     **kwargs).to(dtype).train()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if 'alpha' in name:
                    parameter.fill_(gamma)
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        sum(feature.square().mean() for feature in net(image)).backward()
        return {name: parameter.grad.double() for name, parameter in net.named_parameters() if parameter.grad is not None}

    with way_of(way) as kwargs:
        ours = grads(kwargs, torch.float32)
    exact = grads({}, torch.float64)
    worst = torch.stack([(ours[name] - exact[name]).norm() / exact[name].norm() for name in exact]).max().item()
    return worst if math.isfinite(worst) else None


def cuda_steps(progress):
    """Peak memory and time of T, S and B at detection sizes; and the step of RevCol-H at 640², plain and reversible."""
    rows = []
    for arch in ('tiny', 'small', 'base'):
        for size in ((512, 512), (800, 1344)):
            for name, autocast in (('float32', None), ('bfloat16', torch.bfloat16), ('float16', torch.float16)):
                progress(f'{arch} {size} {name}')
                row = dict(arch=arch, size=size, batch=2, precision=name, peak_mib={}, seconds={})
                for way in ('plain', 'checkpoint', 'reversible'):
                    row['peak_mib'][way] = cuda_peak(arch, size, 2, way, autocast)
                ways = [way for way, peak in row['peak_mib'].items() if peak is not None]
                times = step_times(arch, size, ways, 'cuda', 2, autocast, 3)
                row['seconds'] = {way: medians(rounds) for way, rounds in times.items()}
                rows.append(row)
    for way in ('plain', 'reversible'):
        for batch in (64, 32, 16, 8, 4, 2, 1):
            progress(f'huge, batch {batch}, {way}')
            peak = cuda_peak('huge', (640, 640), batch, way, torch.bfloat16)
            if peak is not None:
                break
        rows.append(dict(arch='huge', size=(640, 640), precision='bfloat16', way=way, largest_batch=batch if peak else 0,
                         peak_mib=peak))
    return rows


def cuda_peak(arch, size, batch, way, autocast):
    """MiB allocated at most in a step, or None if it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        with way_of(way) as kwargs:
            net = RevCol(arch, **kwargs).cuda().train()
            with torch.autocast('cuda', autocast, enabled=autocast is not None):
                loss = sum(feature.float().mean() for feature in net(torch.randn(batch, 3, *size, device='cuda')))
            loss.backward()
        return torch.cuda.max_memory_allocated() / 2**20
    except torch.cuda.OutOfMemoryError:
        return None


def plot(results, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for way, points in results['memory']['tiny'].items():
        left.plot([columns for columns, _, _ in points], [peak for _, _, peak in points], 'o-', label=LABELS.get(way, way))
    left.set(xlabel='columns', ylabel='peak of a step, MiB', title="Activation memory, RevCol-T's widths", ylim=0)
    for way, points in results['gradient_error'].items():
        points = [(columns, error) for gamma, columns, error in points if gamma == 0.5 and error is not None]
        right.semilogy(*zip(*points), 'o-', label=LABELS.get(way, way))
    right.set(xlabel='columns', ylabel='worst relative error', title='Gradients against float64, γ = 0.5')
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure_memory(results, args):
    results['memory'], results['slope_of_plain'], results['image_size'] = {}, {}, args.size
    for arch in ('tiny', 'base'):  # S has T's widths and depths
        results['memory'][arch] = {
            way: [(count, *memory(arch, count, way, args.size)) for count in COUNTS]
            for way in track(WAYS, f'memory, {arch}', transient=True)}
        for what, index in (('kept', 1), ('peak', 2)):
            slopes = {way: slope([(row[0], row[index]) for row in rows]) for way, rows in results['memory'][arch].items()}
            results['slope_of_plain'][f'{arch}, {what}'] = {way: value / slopes['plain'] for way, value in slopes.items()}


def measure_time(results, args):
    size = (256, 256) if args.device == 'cpu' else (512, 512)
    results['seconds_small'], results['time_of_plain'] = {}, {}
    for batch in BATCHES:
        times = step_times('small', size, WAYS, args.device, batch, None, args.repeats)
        if args.compiled:
            compiled = step_times('small', size, ('plain', 'reversible'), args.device, batch, None, args.repeats, compiled=True)
            times.update({f'{way}, levels compiled': rounds for way, rounds in compiled.items()})
        results['seconds_small'][f'batch {batch}'] = {way: medians(rounds) for way, rounds in times.items()}
        results['time_of_plain'][f'batch {batch}'] = of_plain(times)


def measure_gradients(results, args):
    results['gradient_error'] = {
        way: [(gamma, count, gradient_error(count, gamma, way)) for gamma in (0.5, 0.1) for count in COUNTS]
        for way in track([way for way in WAYS if way not in STORED], 'gradient error', transient=True)}


def measure_gpu(results, args):
    results['cuda'] = cuda_steps(print)


PARTS = dict(memory=measure_memory, time=measure_time, gradients=measure_gradients, gpu=measure_gpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--parts', nargs='+', choices=PARTS, help='what to measure; the rest of an existing JSON file stays. '
                        'Default: everything that the device can do')
    parser.add_argument('--size', type=int, default=160, help='image size of the memory measurement (default: 160)')
    parser.add_argument('--repeats', type=int, default=7, help='rounds of the time measurement (default: 7)')
    parser.add_argument('--compiled', action='store_true', help='also time them with torch.compile on every level')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('error: --device cuda: torch sees no GPU here')
    parts = args.parts or [part for part in PARTS if part != 'gpu' or args.device == 'cuda']
    if 'gpu' in parts and args.device != 'cuda':
        sys.exit('error: the part gpu needs --device cuda')
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f'reversible_{args.device}'
    path = stem.with_suffix('.json')
    results = json.loads(path.read_text()) if args.parts and path.is_file() else {}
    cpu = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    device = torch.cuda.get_device_name() if args.device == 'cuda' else cpu
    for part in parts:
        PARTS[part](results, args)
        where = device if part in ('time', 'gpu') else cpu
        results.setdefault('measured_on', {})[part] = f'{where}, torch {torch.__version__}'
        path.write_text(json.dumps(results, indent=1) + '\n')
    if {'memory', 'gradient_error'} <= set(results):
        plot(results, stem.with_suffix('.png'))
    shown = [key for key in ('measured_on', 'slope_of_plain', 'time_of_plain') if key in results]
    print(json.dumps({key: results[key] for key in shown}, indent=1))
    print(f'written: {path}')


if __name__ == '__main__':
    main()
