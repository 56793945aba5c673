# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Killed trainings go on: the drills, in short. ``python benchmarks/drills.py`` runs more of them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def drill(kind, kills):
    """The row of the table: kills, survived, lost, bit-equal."""
    result = subprocess.run([sys.executable, str(ROOT / 'benchmarks' / 'drills.py'), '--kinds', kind, '--kills', str(kills)],
                            env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=900)
    rows = [line.strip('| ').split(' | ') for line in result.stdout.splitlines() if line.startswith(f'| {kind} ')]
    assert rows, result.stdout + result.stderr
    return rows[0][1:]


@pytest.mark.slow
def test_a_training_that_is_killed_while_it_saves_goes_on_to_the_same_weights():
    assert drill('saving', 5) == ['5', '5', '0', 'yes']


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_two_nodes_start_again_and_come_to_the_same_weights(kind):
    assert drill(kind, 2) == ['2', '2', '0', 'yes']


@pytest.mark.slow
def test_a_stopped_process_ends_the_run_in_time_and_is_named():
    assert drill('stop', 1) == ['1', '1', '0', '–']
