# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Kills trainings, many times and in several ways, and counts what they survive.

    python benchmarks/drills.py                                # every kind, 20 kills each; about an hour on two cores
    python benchmarks/drills.py --kinds saving --kills 60
    python benchmarks/drills.py --kinds saving --mmengine      # mmengine's own runner, for comparison

- saving: one process, ``max_keep_ckpts=1``, a checkpoint of 30 MB after every iteration; SIGKILL at a random moment, most often
  while a checkpoint is written; then ``--resume auto``. Survived: the training goes on from the last checkpoint or a later one.
- workers: SIGKILL for a training with two data-loader workers. Survived: within five seconds no worker is left.
- ddp, fsdp: two 'nodes' of one process each on this machine, started by ``MAX_RESTARTS=3 tools/dist_train.sh … --resume auto``;
  SIGKILL for one of the two trainings at a random moment. Survived: all iterations are done.
- stop: two processes, one of which gets SIGSTOP. Survived: the run ends within the stated time, and names the process.

Bit-equal, where a training goes on: its last weights are those of a training that was never killed.
"""
import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import DATASETS, HOOKS, MODELS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from revcol_mm.apis.saving import find_newest_checkpoint  # noqa: E402
from revcol_mm.apis.train import train  # noqa: E402
from revcol_mm.checkpoint import CheckpointError, read_checkpoint  # noqa: E402
from revcol_mm.checkpoint.files import check_bytes  # noqa: E402
from revcol_mm.models import RevCol  # noqa: E402

CONFIG = """
custom_imports = dict(imports=['revcol_mm', 'benchmarks.drills'])
default_scope = 'mmengine'
model = dict(type='DrillModel')
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='DrillImages'),
                        sampler=dict(type='InfiniteSampler', shuffle=True))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
train_cfg = dict(by_epoch=False, max_iters=1000000)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1, max_keep_ckpts=1),
                     logger=dict(type='LoggerHook', interval=1))
custom_hooks = [dict(type='Ballast', megabytes=30)]
randomness = dict(seed=0)
log_processor = dict(by_epoch=False)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
"""


@MODELS.register_module(force=True)  # this file is a program as well as a module
class DrillModel(BaseModel):
    """A small RevCol that classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RevCol(dict(channels=(4, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=3), reversible=True,
                               layer_scale_init_value=1.0)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: list[Tensor], label: list[int] | None = None, more: Any = None, mode: str = 'tensor') -> Any:
        logits = self.head(self.backbone(torch.stack(inputs))[-1].mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, torch.tensor(label))) if mode == 'loss' else logits


@DATASETS.register_module(force=True)
class DrillImages(torch.utils.data.Dataset):
    """Noise, the same for the same index.

    Args:
        large (bool): samples too large for a pipe, on which a worker waits until they are read. Default: False.
    """

    def __init__(self, large: bool = False) -> None:
        self.large = large

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return dict(inputs=image, label=index % 2, **dict(more=bytes(1 << 20)) if self.large else {})


@HOOKS.register_module(force=True)
class Ballast(Hook):
    """Makes checkpoints as large as those of a real model, so that writing them takes time."""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['ballast'] = torch.zeros(self.megabytes << 18)


@dataclass
class Tally:
    """What came of one kind of drill.

    Attributes:
        kills, survived (int): how many.
        bit_equal (bool | None): whether the last weights are those of a training that was not killed; None: not compared.
        notes (list[str]): what was lost, a line each.
    """
    kills: int = 0
    survived: int = 0
    bit_equal: bool | None = None
    notes: list[str] = field(default_factory=list)

    def count(self, survived: bool, note: str) -> None:
        self.kills += 1
        self.survived += survived
        if not survived:
            self.notes.append(note)
        print(f'  {self.kills}: {"survived" if survived else "LOST"}: {note}', flush=True)


def write_config(folder: Path, **settings: Any) -> Path:
    """The config of a drill; ``settings`` by their keys, with '__' for '.'."""
    cfg = Config.fromstring(CONFIG, '.py')
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in settings.items()})
    cfg.dump(folder / 'drill.py')
    return folder / 'drill.py'


def start(config: Path, work_dir: Path, *options: str, mmengine: bool = False) -> int:
    """Starts a training in a process of its own, which has everything imported, and returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        output = os.open(work_dir.parent / 'output.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if mmengine:
            cfg = Config.fromfile(config)
            cfg.merge_from_dict(dict(work_dir=str(work_dir), resume=True, **dict(option.split('=') for option in options)))
            Runner.from_cfg(cfg).train()
        else:
            settings = ['--cfg-options', *options] if options else []
            train([str(config), '--work-dir', str(work_dir), '--resume', 'auto', *settings])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def last_iteration(work_dir: Path, mmengine: bool = False) -> int:
    """Of the checkpoint that a training would go on from; -1 if there is none."""
    if mmengine:
        try:
            path = (work_dir / 'last_checkpoint').read_text()
            read_checkpoint(path, 'meta', logger='silent')
            check_bytes(path)
        except (OSError, CheckpointError):
            return -1
    else:
        cfg = Config.fromfile(work_dir.parent / 'drill.py')
        cfg.work_dir = str(work_dir)
        try:
            with contextlib.redirect_stdout(None):
                path = find_newest_checkpoint(cfg, logging.getLogger('drills'))
        except CheckpointError:
            return -1
    return int(Path(path).stem.rpartition('_')[2]) if path else -1


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def equal_weights(one: Path, other: Path) -> bool:
    first, second = (torch.load(path, weights_only=True)['state_dict'] for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def drill_saving(folder: Path, kills: int, mmengine: bool = False) -> Tally:
    tally, config, work = Tally(), write_config(folder), folder / 'work'
    while tally.kills < kills:
        reached = max(last_iteration(work, mmengine), 0)
        pid = start(config, work, mmengine=mmengine)
        if not wait(lambda: last_name(work) > reached or os.waitpid(pid, os.WNOHANG)[0], 300) or last_name(work) <= reached:
            raise RuntimeError(f'no training: see {folder / "output.txt"}')
        time.sleep(random.uniform(0, 1))
        seen = last_name(work)
        kill(pid)
        after = last_iteration(work, mmengine)
        tally.count(after >= seen, f'killed after iteration {seen}, goes on from {after}')
        if after < seen:
            shutil.rmtree(work)
    if not mmengine:
        tally.bit_equal = ends_bit_equal(folder, config, work)
    return tally


def last_name(work: Path) -> int:
    """Iteration that last_checkpoint names; 0 if it does not."""
    try:
        return int((work / 'last_checkpoint').read_text().rpartition('_')[2].partition('.')[0] or 0)
    except (FileNotFoundError, ValueError):
        return 0


def ends_bit_equal(folder: Path, config: Path, work: Path) -> bool:
    """Whether a killed training comes to the weights of one that is not."""
    end = last_iteration(work) + 2
    for target in (work, folder / 'whole'):
        os.waitpid(start(config, target, f'train_cfg.max_iters={end}'), 0)
    return equal_weights(work / f'iter_{end}.pth', folder / 'whole' / f'iter_{end}.pth')


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def drill_workers(folder: Path, kills: int, mmengine: bool = False) -> Tally:
    tally = Tally()
    config = write_config(folder, train_dataloader__num_workers=2, train_dataloader__dataset__large=True,
                          default_hooks__checkpoint=None)
    while tally.kills < kills:
        pid = start(config, folder / 'work', mmengine=mmengine)
        if not wait(lambda: len(children(pid)) >= 2, 60):
            raise RuntimeError(f'no training: see {folder / "output.txt"}')
        time.sleep(random.uniform(0.5, 1.5))
        workers = children(pid)
        kill(pid)
        gone = wait(lambda: not any(map(alive, workers)), 5)
        tally.count(gone, f'{sum(map(alive, workers))} of {len(workers)} workers left')
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)
    return tally


def free_port() -> int:
    """A free port below those that systems give to whoever asks for any, so that nobody takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(('127.0.0.1', port))
            return port


def launch(config: Path, work_dir: Path, processes: int, *options: str, output: Path, **variables: Any) -> subprocess.Popen:
    """Starts tools/dist_train.sh."""
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable, **{key: str(value) for key, value in variables.items()})
    command = [ROOT / 'tools' / 'dist_train.sh', config, processes, '--work-dir', work_dir, '--resume', 'auto', '--cfg-options',
               'custom_hooks.0.megabytes=1', *options]
    with open(output, 'a') as file:
        return subprocess.Popen(list(map(str, command)), env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def end(processes: list[subprocess.Popen]) -> None:
    """Kills the launchers and whatever they have started."""
    for process in processes:
        for pid in [*children(process.pid), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def drill_restarts(folder: Path, kills: int, *options: str) -> Tally:
    tally, config, work, iterations = Tally(), write_config(folder), folder / 'work', 15 * (kills + 1)
    options = (*options, f'train_cfg.max_iters={iterations}')
    port = free_port()
    nodes = [launch(config, work, 1, *options, output=folder / f'node{rank}.txt', NNODES=2, NODE_RANK=rank, PORT=port,
                    MAX_RESTARTS=2 * kills) for rank in range(2)]
    try:
        while tally.kills < kills:
            reached = last_name(work)
            if not wait(lambda: last_name(work) > reached + 1, 180):
                tally.count(False, f'no progress after iteration {reached}')
                break
            time.sleep(random.uniform(0, 1))
            launcher = random.choice(nodes).pid
            if not wait(lambda: len(children(launcher)) == 1, 60):  # it may just be starting its process again
                tally.count(False, f'no process of its own after iteration {reached}')
                break
            victim, = children(launcher)
            before = last_name(work)
            os.kill(victim, signal.SIGKILL)
            survived = wait(lambda: last_name(work) > before + 1 or last_name(work) == iterations, 180)
            tally.count(survived, f'killed after iteration {before}, now at {last_name(work)}')
        done = wait(lambda: all(node.poll() is not None for node in nodes), 180)
        if not done or last_name(work) != iterations or any(node.returncode for node in nodes):
            tally.notes.append(f'the run ended at iteration {last_name(work)} of {iterations}: see {folder}')
            return tally
    finally:
        end(nodes)
    whole = launch(config, folder / 'whole', 2, *options, output=folder / 'whole.txt', PORT=free_port())
    try:
        whole.wait(300)
    finally:
        end([whole])
    tally.bit_equal = equal_weights(work / f'iter_{iterations}.pth', folder / 'whole' / f'iter_{iterations}.pth')
    return tally


def drill_stop(folder: Path, kills: int, seconds: int = 15) -> Tally:
    tally, config = Tally(), write_config(folder)
    while tally.kills < kills:
        work, output = folder / f'work{tally.kills}', folder / f'output{tally.kills}.txt'
        run = launch(config, work, 2, f'env_cfg.dist_cfg.timeout={seconds}', output=output, PORT=free_port())
        try:
            if not wait(lambda: last_name(work) > 1, 180):
                raise RuntimeError(f'no training: see {output}')
            rank = random.randrange(2)
            ranks = {int(dict(entry.split('=', 1) for entry in Path(f'/proc/{pid}/environ').read_text().split('\0')
                              if '=' in entry)['RANK']): pid for pid in children(run.pid)}
            os.kill(ranks[rank], signal.SIGSTOP)
            began = time.monotonic()
            ended = wait(lambda: run.poll() is not None, seconds + 90)
            named = f'no answer from rank {rank}:' in output.read_text()
            tally.count(ended and named, f'rank {rank} {"named" if named else "not named"}, ended after '
                                         f'{time.monotonic() - began:.0f} s with a timeout of {seconds} s')
        finally:
            end([run])
    return tally


FSDP = ('runner_type=FlexibleRunner', 'strategy.type=RevColFSDPStrategy')
DRILLS = dict(saving=drill_saving, workers=drill_workers, ddp=drill_restarts,
              fsdp=lambda folder, kills: drill_restarts(folder, kills, *FSDP), stop=drill_stop)


def main(argv: list[str] | None = None) -> dict[str, Tally]:
    parser = argparse.ArgumentParser(description='Kill trainings and count what they survive')
    parser.add_argument('--kinds', nargs='+', choices=DRILLS, default=list(DRILLS))
    parser.add_argument('--kills', type=int, default=20, help='of every kind (default: 20)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    parser.add_argument('--mmengine', action='store_true', help="mmengine's own runner, in the kinds saving and workers")
    args = parser.parse_args(argv)
    random.seed(args.seed)
    tallies = {}
    for kind in args.kinds:
        print(f'{kind}:', flush=True)
        folder = Path(tempfile.mkdtemp(prefix=f'drill-{kind}-'))
        own = dict(mmengine=True) if args.mmengine and kind in ('saving', 'workers') else {}
        tally = tallies[kind] = DRILLS[kind](folder, args.kills, **own)
        if not tally.notes:
            shutil.rmtree(folder)
    print('\n| kind | kills | survived | lost | bit-equal |\n|---|---|---|---|---|')
    for kind, tally in tallies.items():
        equal = {None: '–', True: 'yes', False: 'no'}[tally.bit_equal]
        print(f'| {kind} | {tally.kills} | {tally.survived} | {tally.kills - tally.survived} | {equal} |')
        for note in tally.notes:
            print(f'  {kind}: {note}')
    return tallies


if __name__ == '__main__':
    lost = any(tally.notes or tally.bit_equal is False for tally in main().values())
    sys.exit(1 if lost else 0)
