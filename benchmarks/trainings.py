# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the benchmarks that train have in common: a training in a process of its own, done once, and its last metrics."""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Sequence

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'configs' / 'demo'


def run(command: Sequence, cwd: Path | None = None, log: Path | None = None, threads: int | None = None) -> None:
    """Runs a Python script; its output goes to the terminal, or to ``log``. Ends this process if it fails."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
    if threads is not None:
        environment['OMP_NUM_THREADS'] = str(threads)
    command = [str(part) for part in command]
    if log is None:
        done = subprocess.run([sys.executable, *command], env=environment, cwd=cwd)
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open('w') as file:
            done = subprocess.run([sys.executable, *command], env=environment, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f'error: {" ".join(command)} ended with status {done.returncode}' + (f': see {log}' if log else ''))


def train(config: Path, folder: Path, options: Sequence[str], names: Sequence[str], **how) -> dict[str, float]:
    """Trains unless that was done in ``folder``, and returns the last validation's metrics. ``how``: as :func:`run`."""
    results = folder / 'results.json'
    if not results.is_file():
        run([ROOT / 'tools' / 'train.py', config, '--work-dir', folder, '--cfg-options', *options], **how)
        scalars = max(folder.glob('*/vis_data/scalars.json'))
        lines = [json.loads(line) for line in scalars.read_text().splitlines()]
        metrics = {name: line[name] for line in lines for name in names if name in line}
        if set(metrics) != set(names):
            raise SystemExit(f'error: {scalars} has no {", ".join(set(names) - set(metrics))}: the run was not validated')
        results.write_text(json.dumps(metrics))
    return json.loads(results.read_text())


def describe(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation where there are several values; a dash where there is none."""
    if not values:
        return '–'
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'
