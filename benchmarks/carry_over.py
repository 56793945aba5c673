# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What classification pre-training is worth to a detector, on the bundled digits.

Three detectors with the same budget: from scratch, from pre-training, and from pre-training without intermediate supervision.

    python tools/make_digits.py data/digits
    python benchmarks/carry_over.py              # three seeds; about an hour on two cores

Each run is done once: a second call goes on where the first one ended. Writes JSON and a table in markdown.
"""
import argparse
import json
import sys
from pathlib import Path

from trainings import DEMO, ROOT, describe, run, train

DETECTOR = DEMO / 'cascade_rcnn_revcol_nano_k7_digits.py'
KERNEL_SIZE = 7
#: Where the detector's backbone comes from: name of the row, and config of the pre-training.
ARMS: dict[str, Path | None] = {
    'scratch': None,
    'pre-training without intermediate supervision': DEMO / 'revcol_nano_digits_cls_no_supervision.py',
    'pre-training': DEMO / 'revcol_nano_digits_cls.py',
}
METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
TOP1 = 'accuracy/top1'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--iters', type=int, help="detector training iterations; default: the config's")
    parser.add_argument('--epochs', type=int, help="pre-training epochs; default: the config's")
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/carry_over'), help='default: work_dirs/carry_over')
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'carry_over.json',
                        help='JSON; the table lies beside it as .md. Default: benchmarks/results/carry_over.json')
    return parser.parse_args()


def pretrain(config: Path, folder: Path, seed: int, epochs: int | None) -> dict[str, float]:
    options = [f'randomness.seed={seed}']
    if epochs is not None:
        options += [f'train_cfg.max_epochs={epochs}', f'train_cfg.val_interval={epochs}', f'param_scheduler.1.end={epochs}',
                    f'param_scheduler.1.T_max={epochs - 1}', f'default_hooks.checkpoint.interval={epochs}']
    return train(config, folder, options, [TOP1])


def detect(folder: Path, weights: Path | None, seed: int, iters: int | None) -> dict[str, float]:
    options = [f'randomness.seed={seed}']
    if weights is not None:
        options += ['model.backbone.init_cfg._delete_=True', 'model.backbone.init_cfg.type=Pretrained',
                    f'model.backbone.init_cfg.checkpoint={weights}']
    if iters is not None:
        options += [f'train_cfg.max_iters={iters}', f'train_cfg.val_interval={iters}', f'param_scheduler.1.end={iters}',
                    f'default_hooks.checkpoint.interval={iters}']
    return train(DETECTOR, folder, options, list(METRICS))


def table(runs: list[dict], seeds: list[int]) -> str:
    lines = ['| backbone starts from | top-1 of the classifier | ' + ' | '.join(METRICS.values()) + ' |',
             '|---|---|' + '---|' * len(METRICS)]
    for arm in ARMS:
        own = [entry for entry in runs if entry['arm'] == arm]
        top1 = [entry[TOP1] for entry in own if TOP1 in entry]
        cells = [describe(top1, 1), *(describe([entry[name] for entry in own], 3) for name in METRICS)]
        lines.append(f'| {arm} | ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, '', f'Mean and standard deviation over the seeds {", ".join(map(str, seeds))}.', ''])


def main() -> None:
    args = parse_args()
    settings, known = dict(iters=args.iters, epochs=args.epochs), args.work_dir / 'settings.json'
    if known.is_file() and json.loads(known.read_text()) != settings:
        sys.exit(f'error: {args.work_dir} holds runs with {known.read_text()}; these settings need another --work-dir')
    args.work_dir.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(settings))
    runs = []
    for seed in args.seeds:
        for arm, config in ARMS.items():
            folder = args.work_dir / f'{arm.replace(" ", "_")}_seed{seed}'
            entry, weights = dict(arm=arm, seed=seed), None
            if config is not None:
                entry.update(pretrain(config, folder / 'classifier', seed, args.epochs))
                weights = folder / f'classifier_k{KERNEL_SIZE}.pth'
                checkpoint = (folder / 'classifier' / 'last_checkpoint').read_text()
                if not weights.is_file():
                    run([ROOT / 'tools' / 'pad_kernels.py', checkpoint, '--size', KERNEL_SIZE, '--out', weights])
            entry.update(detect(folder / 'detector', weights, seed, args.iters))
            runs.append(entry)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(**settings, runs=runs), indent=1) + '\n')
    text = table(runs, args.seeds)
    args.out.with_suffix('.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main()
