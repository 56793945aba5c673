# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Which checkpoints a run loads, with both of mmengine's runners, on models of two weights."""
import re

import pytest
import torch
from mmengine._strategy import DDPStrategy, FSDPStrategy
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import DATASETS, HOOKS, MODELS
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from revcol_mm.apis import cpu
from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.runner import _add_exact_resume, build_runner
from revcol_mm.checkpoint import CheckpointError
from revcol_mm.engine import ExactResumeHook, RevColFSDPStrategy
from revcol_mm.models import RevCol

RUNNERS = pytest.mark.parametrize('runner_type', ['Runner', 'FlexibleRunner'])


class Net(BaseModel):
    """One linear layer."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.linear(x).sum())

    def train_step(self, data, optim_wrapper):
        loss = self(data[0])['loss']
        optim_wrapper.update_params(loss)
        return dict(loss=loss.detach())


class RenamingNet(Net):
    """Loads weights that are named ``fc`` too, as mmdet's teachers and students load those of a plain detector."""

    def _load_from_state_dict(self, state_dict, *args):
        for key in [key for key in state_dict if key.startswith('fc.')]:
            state_dict[key.replace('fc', 'linear')] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, *args)


class PaddingNet(Net):
    """A backbone that pads smaller kernels while it loads them."""

    def __init__(self) -> None:
        super().__init__()
        arch = dict(channels=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_columns=1)
        self.backbone = RevCol(arch, kernel_size=5, pad_pretrained=True)


class RenamingHook(Hook):
    """Changes the names in a checkpoint."""

    def after_load_checkpoint(self, runner, checkpoint):
        checkpoint['state_dict'] = {key.removeprefix('old_'): value for key, value in checkpoint['state_dict'].items()}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The names of these classes are known while a test runs."""
    for registry, kinds in ((MODELS, (Net, RenamingNet, PaddingNet)), (HOOKS, (RenamingHook, ))):
        for kind in kinds:
            monkeypatch.setitem(registry.module_dict, kind.__name__, kind)
    monkeypatch.setitem(DATASETS.module_dict, 'Ones', lambda: TensorDataset(torch.ones(4, 2)))


def build(folder, runner_type, model=None, whole=True, **settings):
    loader = dict(batch_size=1, num_workers=0, dataset=dict(type='Ones'), sampler=dict(type='DefaultSampler', shuffle=False),
                  collate_fn=dict(type='default_collate'))
    cfg = Config(dict(
        model=model or dict(type='Net'), work_dir=str(folder), env_cfg={}, train_dataloader=loader, experiment_name=folder.name,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=settings.pop('max_iters', 1)), launcher='none',
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)), runner_type=runner_type, param_scheduler=[],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)), **settings))
    return build_runner(cfg, whole)


def trained(folder, runner_type, **settings):
    """Path and contents of the checkpoint that a run of one iteration leaves."""
    build(folder / 'first', runner_type, **settings).train()
    path = folder / 'first' / 'iter_1.pth'
    return path, torch.load(path, weights_only=True)


def save(contents, weights, path):
    torch.save(dict(contents, state_dict=weights), path)
    return str(path)


@RUNNERS
@pytest.mark.parametrize('names', [{}, {'linear': 'module.linear'}, {'linear': 'fc'}, {'linear': 'old_linear'}])
def test_a_resumed_run_loads_the_weights_whatever_names_mmengine_knows_them_by(tmp_path, runner_type, names):
    path, contents = trained(tmp_path, runner_type)
    weights = contents['state_dict']
    renamed = weights
    for old, new in names.items():
        renamed = {key.replace(old, new): value for key, value in weights.items()}
    runner = build(tmp_path / 'second', runner_type, dict(type='RenamingNet'), resume=True, max_iters=1,
                   load_from=save(contents, renamed, tmp_path / 'renamed.pth'), custom_hooks=[dict(type='RenamingHook')])
    runner.train()  # all iterations are done: the weights stay
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, weights[key])


def test_flexible_runner_resumes_a_file_of_the_best_weights(tmp_path):
    path, contents = trained(tmp_path, 'FlexibleRunner')
    del contents['optimizer'], contents['param_schedulers']
    runner = build(tmp_path / 'second', 'FlexibleRunner', resume=True, max_iters=1,
                   load_from=save(contents, contents['state_dict'], tmp_path / 'best.pth'))
    runner.train()  # all iterations are done: the weights stay
    assert runner.iter == 1
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, contents['state_dict'][key])


@RUNNERS
def test_a_run_with_averaged_weights_resumes_both_sets_of_them(tmp_path, runner_type):
    average = dict(custom_hooks=[dict(type='EMAHook', momentum=0.5)])
    build(tmp_path / 'first', runner_type, max_iters=3, **average).train()
    path = tmp_path / 'first' / 'iter_3.pth'
    contents = torch.load(path, weights_only=True)
    runner = build(tmp_path / 'second', runner_type, resume=True, load_from=str(path), **average)
    runner.train()  # all iterations are done: the weights stay
    # mmengine saves the averaged weights as the model's, and the model's as the averaged ones.
    assert torch.equal(runner.model.linear.weight, contents['ema_state_dict']['module.linear.weight'])
    ema, = (hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    assert torch.equal(ema.ema_model.module.linear.weight, contents['state_dict']['linear.weight'])
    assert not torch.equal(runner.model.linear.weight, contents['state_dict']['linear.weight'])


@RUNNERS
@pytest.mark.parametrize('averaged', [False, True])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_training_starts_from_a_file_of_weights_alone(tmp_path, runner_type, suffix, averaged):
    weights = {'linear.weight': torch.tensor([[2., 3.]]), 'linear.bias': torch.tensor([4.])}
    path = tmp_path / f'weights{suffix}'
    save_file(weights, path) if suffix == '.safetensors' else torch.save(weights, path)
    hooks = [dict(type='EMAHook')] if averaged else []
    runner = build(tmp_path / 'run', runner_type, whole=False, load_from=str(path), max_iters=0, custom_hooks=hooks)
    runner.train()
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize('kind', ['FSDPStrategy', FSDPStrategy, 'RevColFSDPStrategy'])
def test_sharded_checkpoints_that_cannot_be_resumed_from_are_refused_before_the_training(tmp_path, kind):
    with pytest.raises(LaunchError, match="state_dict_cfg must be 'full', because a training cannot be resumed"):
        build(tmp_path, 'FlexibleRunner', strategy=dict(type=kind, state_dict_cfg='local'))


def test_classes_as_types_are_known_by_their_names(tmp_path, monkeypatch):
    """As in mmengine's configs in pure Python."""
    with pytest.raises(LaunchError, match='EMAHook copies the whole model'):
        build(tmp_path, 'FlexibleRunner', strategy=dict(type=RevColFSDPStrategy), custom_hooks=[dict(type=EMAHook)])
    cfg = Config(dict(custom_hooks=[dict(type=ExactResumeHook, priority=1)]))
    _add_exact_resume(cfg)
    assert not cfg.default_hooks
    monkeypatch.setattr(cpu, '_init_gloo', lambda *_: None)
    cfg = Config(dict(model=dict(norm_cfg=[dict(type=nn.SyncBatchNorm)]), launcher='pytorch', strategy=dict(type=DDPStrategy),
                      optim_wrapper=dict(type=AmpOptimWrapper, loss_scale='dynamic')))
    cpu.fit_to_cpu(cfg)
    assert cfg.optim_wrapper == dict(type='OptimWrapper') and cfg.model.norm_cfg[0].type == 'BN'
    assert cfg.strategy.model_wrapper.device_ids is None


@RUNNERS
@pytest.mark.parametrize('change, found', [
    (lambda weights: weights.pop('linear.bias'), '1 weights are missing: linear.bias'),
    (lambda weights: weights.update(other=torch.ones(1)), '1 weights have no place in the model: other'),
    (lambda weights: weights.update({'linear.weight': torch.ones(1, 3)}),
     '1 weights have another shape: linear.weight (1, 3) instead of (1, 2)')])
def test_a_checkpoint_with_other_weights_is_neither_resumed_nor_loaded_whole(tmp_path, runner_type, change, found):
    path, contents = trained(tmp_path, runner_type)
    weights = dict(contents['state_dict'])
    change(weights)
    other = save(contents, weights, tmp_path / 'other.pth')
    for settings in (dict(resume=True), {}):
        with pytest.raises(CheckpointError, match=re.escape(f"other.pth does not fit the config's model: {found}")):
            build(tmp_path / 'second', runner_type, load_from=other, **settings).train()


@RUNNERS
def test_other_errors_of_a_resumed_run_keep_their_words(tmp_path, runner_type):
    path, contents = trained(tmp_path, runner_type)
    contents['meta']['cfg'] = None
    contents['meta']['config'] = 'gpu_ids = [0, 1]\n'  # mmengine raises a RuntimeError for another number of GPUs
    other = save(contents, contents['state_dict'], tmp_path / 'gpus.pth')
    with pytest.raises(RuntimeError, match='auto_scale_lr') as error:
        build(tmp_path / 'second', runner_type, resume=True, load_from=other).train()
    assert not isinstance(error.value, CheckpointError)


@RUNNERS
def test_a_model_that_pads_loads_smaller_kernels_whole_or_not(tmp_path, runner_type):
    weights = PaddingNet().state_dict()
    weights = {key: value[..., 1:4, 1:4] if key.endswith('dwconv.weight') else value for key, value in weights.items()}
    small = save({}, weights, tmp_path / 'small.pth')
    for whole in (True, False):
        runner = build(tmp_path / 'second', runner_type, dict(type='PaddingNet'), whole, load_from=small)
        runner.train()
        for key, value in runner.model.state_dict().items():
            if key.endswith('dwconv.weight'):
                assert torch.equal(value[..., 1:4, 1:4], weights[key])


@RUNNERS
def test_a_training_starts_from_weights_of_which_some_fit_and_from_no_others(tmp_path, runner_type):
    path, contents = trained(tmp_path, runner_type)
    weights = dict(contents['state_dict'], **{'linear.bias': torch.ones(7)})
    runner = build(tmp_path / 'second', runner_type, whole=False, load_from=save(contents, weights, tmp_path / 'some.pth'))
    runner.train()
    del weights['linear.weight']
    with pytest.raises(CheckpointError, match=r'none of the weights of .*nothing\.pth'):
        build(tmp_path / 'third', runner_type, whole=False, load_from=save(contents, weights, tmp_path / 'nothing.pth')).train()


def test_an_unknown_runner_is_named(tmp_path):
    with pytest.raises(LaunchError, match="runner_type must be .*, but got 'Jogger'"):
        build(tmp_path, 'Jogger')
