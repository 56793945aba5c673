# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol against ConvNeXt, and RevCol against itself with other columns, on the bundled digits.

Backbones of equal FLOPs under the heads, data and schedules of the demo: pre-training on single digits, then Cascade Mask
R-CNN and UPerNet. The learning rates of RevCol and of ConvNeXt are chosen for each among the same three, on a tuning set
whose handwriting takes no part in the validation; the variants of RevCol take RevCol's.

    python benchmarks/compare.py                 # some hours on two cores, two trainings at a time
    python benchmarks/compare.py --seeds 0 1     # a part of it

Every finished training is kept in the JSON file, and a second call goes on from there. Writes a table and a plot, too.
"""
import argparse
import copy
import functools
import itertools
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from trainings import DEMO, ROOT, describe, train

sys.path.insert(0, str(ROOT))
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.utils import import_modules_from_strings  # noqa: E402

from revcol_mm.checkpoint.files import open_whole  # noqa: E402
from revcol_mm.datasets import make_digits  # noqa: E402
from revcol_mm.utils.flops import count_model  # noqa: E402

FACTORS = (0.5, 1.0, 2.0)  # of the demo's learning rates
TUNING, REPORTED = 'tuning', 'reported'


@dataclass(frozen=True)
class Task:
    """A training of the demo: its config, and the metrics that its validation gives, the one to choose by first."""
    config: Path
    metrics: dict[str, str]


PRETRAINING = 'pre-training'
TASKS = {
    PRETRAINING: Task(DEMO / 'revcol_nano_digits_pretrain.py', {'accuracy/top1': 'top-1'}),
    'detection': Task(DEMO / 'cascade_rcnn_revcol_nano_digits.py', {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}),
    'segmentation': Task(DEMO / 'upernet_revcol_nano_digits.py', {'mIoU': 'mIoU'}),
}


@dataclass(frozen=True)
class Arm:
    """A backbone, and the arm whose learning rates it takes (None: those chosen for itself)."""
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    num_columns: int = 0  # 0: ConvNeXt
    type: str = 'RevCol'
    rates_of: str | None = None

    def backbone(self) -> dict:
        settings: dict[str, Any] = dict(
            type=self.type, arch=dict(channels=self.channels, depths=self.depths), layer_scale_init_value=1.0,
            init_cfg=dict(type='Kaiming', layer=['Conv2d', 'Linear']))
        if self.num_columns:
            settings['arch']['num_columns'] = self.num_columns
        else:
            settings.update(gap_before_final_norm=False, out_indices=(0, 1, 2, 3))
        return settings


#: Every variant of RevCol keeps the depths of a column; its widths are RevCol's times one factor, the one that comes nearest to
#: RevCol's FLOPs, rounded to even numbers. ConvNeXt has the depths of ConvNeXt-T, and the even widths nearest to a ratio of two
#: between levels that have RevCol's FLOPs and parameters to 1 %.
ARMS = {
    'RevCol': Arm((16, 32, 64, 128), (1, 1, 2, 1), 3),
    'ConvNeXt': Arm((14, 28, 58, 132), (3, 3, 9, 3), type='mmpretrain.ConvNeXt'),
    'RevCol, 1 column': Arm((28, 56, 112, 222), (1, 1, 2, 1), 1, rates_of='RevCol'),
    'RevCol, 2 columns': Arm((20, 40, 78, 156), (1, 1, 2, 1), 2, rates_of='RevCol'),
    'RevCol, 6 columns': Arm((12, 22, 44, 90), (1, 1, 2, 1), 6, rates_of='RevCol'),
    'without reversible connections': Arm((14, 30, 60, 120), (1, 1, 2, 1), 3, 'HRNetColumns', rates_of='RevCol'),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(5)), help='of RevCol and ConvNeXt; default: 0 … 4')
    parser.add_argument('--sweep-seeds', type=int, nargs='*', default=list(range(3)), help='of the variants; default: 0 … 2')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='trainings at a time, of one thread each; default: '
                        'one for every core')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare'), help='default: work_dirs/compare')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'compare.json',
                        help='JSON; the table and the plot lie beside it. Default: benchmarks/results/compare.json')
    return parser.parse_args(argv)


_read = functools.cache(Config.fromfile)
_reading = threading.Lock()  # reading a config imports modules, and two threads that import the same ones disturb each other


def config_of(arm: Arm, task: str) -> Config:
    """The demo's config with this arm's backbone in place of its own."""
    with _reading:
        cfg = copy.deepcopy(_read(TASKS[task].config))
    backbone, channels = arm.backbone(), list(arm.channels)
    cfg.custom_imports.imports = [*cfg.custom_imports.imports, 'mmpretrain.models']
    if task == PRETRAINING:
        backbone['out_indices'] = (3, )
        cfg.model.head.in_channels = channels[3]
        cfg.custom_hooks = []  # what watches rebuilt activations: nothing is rebuilt here, which changes time and memory alone
    elif task == 'detection':
        cfg.model.neck.in_channels = channels
    else:
        cfg.model.decode_head.in_channels = channels
        cfg.model.auxiliary_head.in_channels = channels[2]
    cfg.model.backbone = backbone
    return cfg


class Comparison:
    """The trainings of a comparison: which are done, and what they gave.

    Args:
        out (Path): JSON file of the finished trainings; those in it are not done again.
        work_dir (Path): folder of the data sets, configs and weights.
        done (Callable[[], None]): called after each training that was not done before.
    """

    def __init__(self, out: Path, work_dir: Path, done: Callable[[], None] = lambda: None) -> None:
        self.out, self.work_dir, self.done = out, work_dir, done
        self.lock = threading.Lock()
        self.runs: list[dict] = json.loads(out.read_text())['runs'] if out.is_file() else []

    def find(self, **which) -> dict[str, float] | None:
        """Metrics of a finished training."""
        return next((run['metrics'] for run in self.runs if all(run[key] == value for key, value in which.items())), None)

    def train(self, arm: str, task: str, data: str, seed: int, factor: float, weights: Path | None = None,
              again: bool = False) -> tuple[dict[str, float], Path]:
        """Metrics and checkpoint of a training, which is run if it was not, or if ``again`` and its weights are gone."""
        which = dict(arm=arm, task=task, data=data, seed=seed, factor=factor)
        folder = self.work_dir / data / '_'.join([arm.replace(', ', '_').replace(' ', '_'), task, str(seed), str(factor)])
        last, metrics = folder / 'last_checkpoint', self.find(**which)
        if metrics is None or (again and not last.is_file()):
            cfg = config_of(ARMS[arm], task)
            cfg.optim_wrapper.optimizer.lr *= factor
            if weights is not None:
                cfg.load_from = str(weights)
            folder.mkdir(parents=True, exist_ok=True)
            cfg.dump(folder / 'config.py')  # not JSON, which has no tuples
            metrics = train((folder / 'config.py').resolve(), folder.resolve(), [f'randomness.seed={seed}'],
                            list(TASKS[task].metrics), cwd=self.work_dir / data, log=folder / 'log.txt', threads=1)
            with self.lock:
                if self.find(**which) is None:
                    self.runs.append(dict(which, metrics=metrics))
                    self.write()
                    self.done()
        return metrics, Path(last.read_text()) if last.is_file() else last

    def write(self) -> None:
        """Writes the finished trainings, in an order that does not depend on which of them ended first."""
        order = {name: place for place, name in enumerate([*ARMS, *TASKS, TUNING, REPORTED])}
        runs = sorted(self.runs, key=lambda run: [order[run[key]] for key in ('data', 'arm', 'task')]
                      + [run['seed'], run['factor']])
        with open_whole(str(self.out), 'w') as file:
            file.write(json.dumps(dict(runs=runs), indent=1) + '\n')

    def chain(self, arm: str, data: str, seed: int, factors: dict[str, Iterable[float]]) -> None:
        """Pre-training, then detection and segmentation on its weights, each at the given factors of the learning rate.

        Of several pre-trainings the best is gone on with.
        """
        rates = {task: tuple(factors[task]) for task in TASKS}
        wanted = any(self.find(arm=arm, task=task, data=data, seed=seed, factor=factor) is None
                     for task in rates if task != PRETRAINING for factor in rates[task])
        for factor in rates[PRETRAINING]:
            self.train(arm, PRETRAINING, data, seed, factor)
        best = self.best(arm, PRETRAINING, data, seed, rates[PRETRAINING])
        weights = None
        if wanted:
            _, weights = self.train(arm, PRETRAINING, data, seed, best, again=True)
        for task in rates:
            if task != PRETRAINING:
                for factor in rates[task]:
                    self.train(arm, task, data, seed, factor, weights)

    def best(self, arm: str, task: str, data: str, seed: int, factors: Sequence[float]) -> float:
        metric = next(iter(TASKS[task].metrics))
        return max(factors, key=lambda factor: self.find(arm=arm, task=task, data=data, seed=seed, factor=factor)[metric])

    def chosen(self, arm: str) -> dict[str, float] | None:
        """The factor of the learning rate of every task, by the tuning set; None while its trainings are not all done."""
        arm = ARMS[arm].rates_of or arm
        done = [(run['task'], run['factor']) for run in self.runs if run['arm'] == arm and run['data'] == TUNING]
        if any(pair not in done for pair in itertools.product(TASKS, FACTORS)):
            return None
        return {task: self.best(arm, task, TUNING, 0, FACTORS) for task in TASKS}


def table(comparison: Comparison, costs: dict[str, tuple[int, int]]) -> str:
    """Mean and standard deviation of every arm's reported runs."""
    columns = {name: metric for task in TASKS.values() for name, metric in task.metrics.items()}
    lines = ['| backbone | parameters | FLOPs at 128² | seeds | ' + ' | '.join(columns.values()) + ' |',
             '|---|---|---|---|' + '---|' * len(columns)]
    for arm, (params, macs) in costs.items():
        runs = [run for run in comparison.runs if run['arm'] == arm and run['data'] == REPORTED]
        values = {name: [run['metrics'][name] for run in runs if name in run['metrics']] for name in columns}
        seeds = '/'.join(dict.fromkeys(str(len(of_metric)) for of_metric in values.values()))
        cells = [describe(values[name], 3 if name.startswith('coco') else 2) for name in columns]
        lines.append(f'| {arm} | {params / 1e3:.0f}k | {macs / 1e6:.1f}M | {seeds} | ' + ' | '.join(cells) + ' |')
    lines += ['', 'Mean and standard deviation over the seeds.', '']
    for arm in (arm for arm in ARMS if ARMS[arm].rates_of is None):
        chosen = comparison.chosen(arm)
        if chosen:
            rates = ', '.join(f'{task} {factor:g}' for task, factor in chosen.items())
            lines.append(f"Chosen for {arm} on the tuning set, as multiples of the demo's learning rates: {rates}.")
    return '\n'.join([*lines, ''])


def costs_of_arms() -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of every backbone, at the digits' size."""
    import_modules_from_strings(['revcol_mm.classification', 'mmpretrain.models'])
    costs = {}
    for name, arm in ARMS.items():
        cfg = config_of(arm, PRETRAINING)
        cfg.model.backbone = arm.backbone()  # with all four outputs
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = MODELS.build(cfg.model)
        cost = count_model(model.to('meta').eval(), (128, 128))['backbone']
        costs[name] = (cost.params, cost.macs)
    return costs


def plot(comparison: Comparison, path: Path) -> None:
    """A point for every reported run, a bar at each arm's mean."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    metrics = {name: label for task in TASKS.values() for name, label in task.metrics.items() if task is not TASKS[PRETRAINING]}
    figure, axes = plt.subplots(1, len(metrics), figsize=(10, 3), sharey=True)
    for axis, (name, label) in zip(axes, metrics.items()):
        for place, arm in enumerate(reversed(ARMS)):
            values = [run['metrics'][name] for run in comparison.runs
                      if run['arm'] == arm and run['data'] == REPORTED and name in run['metrics']]
            if values:
                axis.plot(values, [place] * len(values), 'o', alpha=0.6, color='C0')
                axis.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color='black')
        axis.set(yticks=range(len(ARMS)), yticklabels=list(reversed(ARMS)), xlabel=label)
        axis.grid(alpha=0.3, axis='x')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    for data in (TUNING, REPORTED):
        make_digits(args.work_dir / data / 'data' / 'digits', tuning=data == TUNING)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    own = [arm for arm in ARMS if ARMS[arm].rates_of is None]
    reported = [(arm, seed) for seed in args.seeds for arm in own]
    reported += [(arm, seed) for seed in args.sweep_seeds for arm in ARMS if arm not in own]
    total = len(TASKS) * (len(own) * len(FACTORS) + len(reported))
    with progress, ThreadPoolExecutor(args.jobs) as pool:
        bar = progress.add_task('trainings', total=total)
        comparison = Comparison(args.out, args.work_dir, lambda: progress.advance(bar))
        progress.advance(bar, len(comparison.runs))

        def run(chains: Iterable[tuple]) -> None:
            waiting = [pool.submit(comparison.chain, *chain) for chain in chains]
            try:
                for future in waiting:
                    future.result()
            finally:
                for future in waiting:
                    future.cancel()

        run((arm, TUNING, 0, dict.fromkeys(TASKS, FACTORS)) for arm in own)
        rates = {arm: {task: (factor, ) for task, factor in comparison.chosen(arm).items()} for arm in ARMS}
        run((arm, REPORTED, seed, rates[arm]) for arm, seed in reported)
    report(comparison)


def report(comparison: Comparison) -> None:
    text = table(comparison, costs_of_arms())
    comparison.out.with_suffix('.md').write_text(text)
    plot(comparison, comparison.out.with_suffix('.png'))
    print(text)


if __name__ == '__main__':
    main()
