# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The comparison with ConvNeXt: its arms are of one size, it chooses on the tuning set, and it goes on where it ended."""
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mmengine.config import Config

from tests.common import ROOT


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import compare
    yield compare
    for name in ('compare', 'trainings'):
        sys.modules.pop(name)


def test_the_arms_have_equal_flops_and_about_equal_parameters(compare):
    costs = compare.costs_of_arms()
    params, macs = costs['RevCol']
    for name, (own_params, own_macs) in costs.items():
        assert own_macs == pytest.approx(macs, rel=0.01), name
        assert own_params == pytest.approx(params, rel=0.08), name


def test_the_table_of_the_documentation_is_that_of_the_finished_trainings(compare, tmp_path):
    costs = {name: (0, 0) for name in compare.ARMS}
    text = compare.table(compare.Comparison(ROOT / 'benchmarks/results/compare.json', tmp_path), costs)
    page = (ROOT / 'docs/comparison.md').read_text()
    rows = [line.split(' | ') for line in text.splitlines() if line.startswith('| ')]
    shown = [line.split(' | ') for line in page.splitlines() if line.startswith('| ')]
    assert [row[:1] + row[3:] for row in shown] == [row[:1] + row[3:] for row in rows]  # all but parameters and FLOPs
    for line in text.splitlines():
        assert not line.startswith('Chosen') or line in page


def test_configs_are_read_one_at_a_time(compare, monkeypatch):
    read, entered, together = compare._read, [], []

    def slowly(path):
        entered.append(path)
        time.sleep(0.05)
        together.append(len(entered))
        entered.remove(path)
        return read(path)

    monkeypatch.setattr(compare, '_read', slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compare.config_of, [compare.ARMS['RevCol'], compare.ARMS['ConvNeXt']], ['detection', 'segmentation']))
    assert together == [1, 1]


@pytest.fixture
def trainings(compare, monkeypatch):
    """Trainings that take no time: (arm, task, data, factor, load_from) of each, with metrics that name the best factor."""
    best = {('RevCol', 'pre-training'): 2.0, ('RevCol', 'detection'): 0.5, ('RevCol', 'segmentation'): 1.0,
            ('ConvNeXt', 'pre-training'): 0.5, ('ConvNeXt', 'detection'): 2.0, ('ConvNeXt', 'segmentation'): 1.0}
    done = []

    def train(config, folder, options, names, cwd, **how):
        arm, task, _, factor = folder.name.rsplit('_', 3)
        cfg = Config.fromfile(config)
        assert [type(step.scale) for step in cfg.test_dataloader.dataset.pipeline if 'scale' in step] in ([], [tuple])
        done.append((arm, task, cwd.name, float(factor), cfg.get('load_from'), cfg['optim_wrapper']['optimizer']['lr']))
        (folder / 'last_checkpoint').write_text(str(folder / 'weights.pth'))
        return dict.fromkeys(names, 1.0 if best.get((arm, task)) == float(factor) else 0.5)

    monkeypatch.setattr(compare, 'train', train)
    monkeypatch.setattr(compare, 'make_digits', lambda *args, **kwargs: True)
    monkeypatch.setattr(compare, 'costs_of_arms', lambda: {arm: (785_000, 38_900_000) for arm in compare.ARMS})
    return done


def test_rates_are_chosen_on_the_tuning_set_and_a_second_call_trains_nothing(compare, trainings, tmp_path):
    command = ['--seeds', '0', '1', '--sweep-seeds', '--jobs', '1', '--work-dir', str(tmp_path / 'work'),
               '--out', str(tmp_path / 'compare.json')]
    compare.main(command)
    tuned = [run for run in trainings if run[2] == 'tuning']
    assert len(tuned) == 2 * 3 * 3 and {run[0] for run in tuned} == {'RevCol', 'ConvNeXt'}
    assert len(trainings) == len(tuned) + 3 * 2 * 2
    for arm, task, data, factor, weights, lr in trainings:
        if data == 'reported':
            rates = {'pre-training': 0.5, 'detection': 2.0} if arm == 'ConvNeXt' else {'pre-training': 2.0, 'detection': 0.5}
            assert factor == rates.get(task, 1.0), (arm, task)
        if task == 'detection':
            assert lr == 2e-3 * factor
            assert weights.endswith(f'/{data}/{arm}_pre-training_{weights.split("_")[-2]}_'
                                    f'{0.5 if arm == "ConvNeXt" else 2.0}/weights.pth')
    number = len(trainings)
    compare.main(command)
    assert len(trainings) == number
    runs = json.loads((tmp_path / 'compare.json').read_text())['runs']
    assert len(runs) == number
    assert '| ConvNeXt | 785k | 38.9M | 2 | 1.00 ± 0.00 | 1.000 ± 0.000 |' in (tmp_path / 'compare.md').read_text()


def test_a_pre_training_whose_weights_are_gone_is_repeated_for_what_still_needs_it(compare, trainings, tmp_path):
    comparison = compare.Comparison(tmp_path / 'compare.json', tmp_path / 'work')
    one = dict.fromkeys(compare.TASKS, (1.0, ))
    comparison.train('RevCol', 'pre-training', 'reported', 0, 1.0)
    shutil.rmtree(tmp_path / 'work')
    resumed = compare.Comparison(tmp_path / 'compare.json', tmp_path / 'work')
    resumed.chain('RevCol', 'reported', 0, one)
    assert [run[1] for run in trainings] == ['pre-training', 'pre-training', 'detection', 'segmentation']
    assert len(resumed.runs) == 3


@pytest.mark.parametrize('arm', ['RevCol', 'ConvNeXt', 'without reversible connections'])
def test_the_weights_of_the_pre_training_are_those_of_the_detector_s_backbone(compare, arm):
    from mmengine.registry import MODELS, DefaultScope

    import revcol_mm.classification  # noqa: F401
    import revcol_mm.detection  # noqa: F401
    weights = {}
    for task, scope in (('pre-training', 'mmpretrain'), ('detection', 'mmdet')):
        cfg = compare.config_of(compare.ARMS[arm], task)
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(cfg.model)
        shapes = {name: value.shape for name, value in model.backbone.state_dict().items()}
        weights[task] = {name: shape for name, shape in shapes.items() if not name.startswith('norm')}
    assert weights['pre-training'] == weights['detection']
