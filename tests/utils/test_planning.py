# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The plan of a training's memory: against a real step of a narrow detector, and against arithmetic by hand."""
import copy
from functools import lru_cache
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmseg.datasets.transforms import RandomCrop

from revcol_mm.models import RevCol
from revcol_mm.utils import planning
from revcol_mm.utils.memory import StepBytes, count_step
from revcol_mm.utils.planning import Plan, Way, parse_bytes
from tests.common import live_bytes, load_config, narrow, run_tool

CONFIG = 'mask_rcnn_revcol_t'
SHAPE = (128, 192)


@lru_cache
def config(name: str = CONFIG) -> Config:
    cfg = narrow(load_config(name))
    if name == CONFIG:
        cfg.model.backbone.arch.depths = (1, 1, 2, 1)  # every block is counted in Python
        cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4))  # float32
    return cfg


@lru_cache
def plan(**kwargs) -> Plan:
    return Plan(config(), SHAPE, 2, **kwargs)


def changed(**options) -> Config:
    cfg = Config(config().to_dict())
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg


@pytest.fixture
def size_of_parameters():
    return sum(4 * parameter.numel() for parameter in plan().model.parameters())


class TestAgainstARealStep:

    @pytest.mark.slow
    @pytest.mark.parametrize('stored', [4, 1, 0])
    def test_the_whole_is_that_of_a_step_with_all_its_arithmetic(self, stored):
        """A step of the whole detector on the CPU, with random weights and on the same boxes.

        What lives between the passes is checked by the allocator's account. Its peak is 50 MB higher, because some kernels
        of the CPU use workspaces while boxes are matched, so the peak is that of the tensors.
        """
        cfg, way = config(), plan().way(stored)
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(dict(cfg.model, backbone=dict(cfg.model.backbone, init_cfg=None, drop_path_rate=0.))).train()
        for name, value in way.options.items():
            setattr(model.backbone, name, value)
        torch.manual_seed(0)
        images, samples = planning._made_up(model, SHAPE)

        def loss(images):
            return model.parse_losses(model.loss(images, samples))[0]

        kept, _ = live_bytes(lambda: loss(images), lambda loss: loss.backward())
        assert way.kept + plan().heads.kept == pytest.approx(kept, rel=1e-3)
        fixed = sum(size for part, size in plan().fixed.items() if part != 'gradients')
        assert way.total - fixed == pytest.approx(count_step(model, images, forward=loss).peak_with_gradients, rel=1e-3)

    @pytest.mark.slow
    def test_the_line_through_two_small_sizes_meets_a_larger_one(self):
        cfg, shape = config(), (320, 480)
        with mock.patch.object(planning, 'HEAD_AREAS', (192 * 288, 256 * 384)):
            estimate = planning.count_heads(cfg, plan()._features, shape, 2)
        measured = planning._count_heads(planning._build_heads(cfg), shape, plan()._features(shape, 2), None)
        assert estimate.kept == pytest.approx(measured.kept, rel=0.03)
        # Heads of an eighth of the width keep so little that the largest moment is the matching of 128 boxes.
        assert estimate.peak == pytest.approx(measured.peak, rel=0.2)

    def test_what_does_not_grow_with_the_batch_counts_once(self):
        cfg, shape = config('revcol_t_in1k'), (64, 64)
        whole = Plan(cfg, shape, 8)
        measured = planning._count_heads(planning._build_heads(cfg), shape, whole._features(shape, 8), whole.autocast)
        for name in ('kept', 'peak', 'peak_with_gradients'):
            assert getattr(whole.heads, name) == pytest.approx(getattr(measured, name), rel=0.02), name
        half = Plan(cfg, shape, 2).heads
        assert whole.heads.peak_with_gradients < 3.5 * half.peak_with_gradients  # four times as many images

    @pytest.mark.slow
    @pytest.mark.parametrize('name', [
        'cascade_rcnn_revcol_t', 'dino_revcol_b_in22k', 'upernet_revcol_t', 'mask2former_revcol_t', 'revcol_t_in1k',
        'revcol_vit_s_in1k'])
    def test_every_kind_of_model_is_planned(self, name):
        shape = (64, 64) if name.startswith('revcol') else SHAPE
        whole = Plan(config(name), shape, 2)
        assert whole.heads.kept > 0 and whole.way(0).total < whole.way(whole.trained_columns).total


class TestWhatLivesThroughout:

    def test_adamw_has_two_states_and_momentum_one(self, size_of_parameters):
        trained = sum(4 * parameter.numel() for parameter in plan().model.parameters() if parameter.requires_grad)
        fixed = plan().fixed
        assert fixed['gradients'] == trained < size_of_parameters  # the first column's γ
        assert fixed['optimizer state (AdamW)'] == 2 * trained
        sgd = Plan(changed(optim_wrapper=dict(_delete_=True, type='OptimWrapper', optimizer=dict(
            type='SGD', lr=0.1, momentum=0.9))), SHAPE, 2)
        assert sgd.fixed['optimizer state (SGD)'] == trained
        fused = Plan(changed(optim_wrapper__optimizer__fused=True), SHAPE, 2)
        assert fused.fixed['optimizer state (AdamW)'] == 2 * trained and fused.cfg.optim_wrapper.optimizer.fused

    def test_an_ema_copy_counts(self, size_of_parameters):
        assert 'EMA copy' not in plan().fixed
        cfg = changed(custom_hooks=[dict(type='EMAHook')])
        assert Plan(cfg, SHAPE, 2).fixed['EMA copy'] >= size_of_parameters

    def test_ddp_adds_its_buckets_and_divides_nothing(self):
        fixed = plan(gpus=8).fixed
        assert fixed.pop("DDP's buckets") == fixed['gradients'] and fixed == plan().fixed

    def test_fsdp_divides_parameters_gradients_and_optimizer_state(self):
        fixed, whole = Plan(changed(strategy=dict(type='RevColFSDPStrategy')), SHAPE, 2, gpus=8).fixed, plan().fixed
        for part in ('gradients', 'optimizer state (AdamW)'):
            assert fixed[part] == whole[part] // 8
        assert fixed['parameters and buffers'] < whole['parameters and buffers'] / 4


class TestWays:

    @pytest.mark.slow
    def test_more_stored_columns_need_more_and_take_less_time(self):
        ways = [plan().way(stored) for stored in range(5)]
        assert [way.step for way in ways] == pytest.approx([1 + rebuilt / 12 for rebuilt in (4, 3, 2, 1, 0)])
        assert all(less.kept < more.kept and less.total <= more.total for less, more in zip(ways, ways[1:]))

    @pytest.mark.slow
    def test_frozen_columns_are_not_rebuilt(self):
        frozen = Plan(changed(model__backbone__frozen_stages=3), SHAPE, 2)
        assert frozen.way(0).step == pytest.approx(1 + 1 / 12) and frozen.way(1).step == 1

    def test_the_fastest_way_that_fits_is_chosen(self, monkeypatch):
        ways = [Way(f'{stored} stored', {}, 0, 0, 100 * (stored + 1), 1 + (4 - stored) / 12) for stored in range(5)]
        monkeypatch.setattr(Plan, 'way', lambda self, stored, batch=None: ways[stored])
        monkeypatch.setattr(Plan, 'trained_columns', 4)
        counted = object.__new__(Plan)
        for stored, way in enumerate(ways):
            assert counted.fit(way.total) == way
            if stored:
                assert counted.fit(way.total - 1) == ways[stored - 1]

    def test_the_options_turn_off_what_the_config_has_turned_on(self, monkeypatch):
        nothing = StepBytes(0, 0, 0)
        for name, value in dict(_count=lambda *_: nothing, heads=nothing, fixed=dict(gradients=0)).items():
            monkeypatch.setattr(Plan, name, value)
        checkpointed = copy.copy(plan())
        checkpointed._ways = {}
        assert 'with_cp' not in checkpointed.way(1).options
        checkpointed.cfg, checkpointed._ways = changed(model__backbone__with_cp=True), {}
        for stored, with_cp in ((4, False), (1, False), (None, True)):
            assert checkpointed.way(stored).options['with_cp'] is with_cp

    def test_a_budget_that_is_too_small_is_answered_with_the_nearest_and_what_to_change(self):
        with pytest.raises(ValueError, match=r'at least \d\.\d\d GiB, which is what reversible training.*got 0\.01 GiB: lower '
                                             r'--batch \(one image needs \d\.\d\d GiB\), lower --shape'):
            plan().fit(parse_bytes('10MiB'))


class TestArguments:

    @pytest.mark.parametrize('text,size', [('24GB', 24 * 10**9), ('24GiB', 24 * 2**30), ('24576MB', 24576 * 10**6),
                                           ('24576 MiB', 24 * 2**30), ('1.5tb', 1_500_000_000_000)])
    def test_budgets(self, text, size):
        assert parse_bytes(text) == size

    @pytest.mark.parametrize('text', ['24', 'GB', '', '-1GB', '0GB', '24 apples', 'nanGB', 'infGB', '2 4GB', '24GBGB'])
    def test_what_is_no_budget_is_refused(self, text):
        with pytest.raises(ValueError, match='24GB, 24GiB or 24576MiB, but got'):
            parse_bytes(text)

    @pytest.mark.parametrize('arguments,sentence', [
        (dict(batch=0), 'batch must be a positive integer, but got 0'), (dict(gpus=-1), 'gpus must be a positive integer'),
        (dict(amp='fp8'), 'amp must be one of'), (dict(shape=(0, 64)), 'two positive integers')])
    def test_what_cannot_be_is_refused(self, arguments, sentence):
        with pytest.raises(ValueError, match=sentence):
            Plan(config(), **arguments)

    @pytest.mark.parametrize('options', [dict(model__neck__in_channels=[2, 4, 6, 8]),
                                         dict(model__backbone__out_indices=(1, 2, 3))])
    def test_a_neck_for_another_backbone_is_named_and_the_images_are_not_blamed(self, options):
        with pytest.raises(ValueError, match=r'model.neck.in_channels must be the channels of the outputs of the backbone, \['):
            Plan(changed(**options), SHAPE, 1).way(0)

    @pytest.mark.parametrize('head, fits', [
        (dict(in_channels=[8, 16], in_index=[1, 2]), True), (dict(in_channels=16, in_index=2), True),
        (dict(in_channels=[8, 16], in_index=[0, 1]), False), (dict(in_channels=[4, 8, 16, 32], in_index=[0, 1, 2, 3]), False),
        (dict(in_channels=32, in_index=3), False), (dict(in_channels=[4, 8, 16]), True)])
    def test_a_decode_head_that_fails_is_named_if_it_does_not_fit_the_outputs_that_it_reads(self, head, fits):
        plan = mock.Mock(_count_heads=mock.Mock(side_effect=IndexError),
                         cfg=Config(dict(model=dict(neck=None, decode_head=head))),
                         backbone=mock.Mock(channels=(4, 8, 16, 32), out_indices=(0, 1, 2)))
        with pytest.raises(IndexError if fits else ValueError, match='' if fits else 'model.decode_head.in_channels must be'):
            Plan.heads.func(plan)

    def test_the_shape_and_the_precision_are_those_of_the_config(self):
        assert planning.training_shape(load_config('upernet_revcol_t')) == (512, 512)
        assert planning.training_shape(load_config('revcol_t_in1k')) == (224, 224)
        assert planning.training_shape(load_config('htc_revcol_h')) == (1408, 1600)  # short sides of up to 1400
        assert planning.training_shape(config()) == (800, 1344)
        pipeline = [dict(type=RandomCrop, crop_size=(8, 9))]  # as in a config in pure Python
        assert planning.training_shape(Config(dict(train_dataloader=dict(dataset=dict(pipeline=pipeline))))) == (8, 9)
        assert Plan(config('upernet_revcol_t')).autocast is torch.float16
        assert Plan(config('upernet_revcol_t'), amp='bf16').autocast is torch.bfloat16

    @pytest.mark.parametrize('steps,shape', [
        ([], (800, 1344)),
        ([dict(type='Resize', scale=(300, 500), keep_ratio=True)], (320, 512)),
        ([dict(type='Resize', scale=(300, 500))], (512, 320)),  # exactly this width and height
        ([dict(type='mmdet.RandomResize', scale=[(1600, 400), (900, 1000)], keep_ratio=True)], (1024, 1600)),
        ([dict(type='RandomResize', scale=(200, 100), ratio_range=(0.5, 2.0), keep_ratio=True)], (224, 416)),
        ([dict(type='RandomChoiceResize', scales=[(480, 640), (800, 320)], keep_ratio=True)], (480, 640)),
        ([dict(type='RandomChoice', transforms=[
            [dict(type='RandomChoiceResize', scales=[320, 640])],
            [dict(type='Resize', scale=(4200, 600)), dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600)),
             dict(type='Resize', scale=(640, 960))]])], (960, 640)),
        ([dict(type='RandomResize', scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
          dict(type='RandomCrop', crop_size=(1024, 768))], (768, 1024))])
    def test_the_largest_image_of_a_detectors_pipeline_counts(self, steps, shape):
        dataset = dict(type='RepeatDataset', dataset=dict(pipeline=[dict(type='LoadImageFromFile'), *steps]))
        cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset),
                          model=dict(data_preprocessor=dict(pad_size_divisor=32))))
        assert planning.training_shape(cfg) == shape


@pytest.mark.slow
def test_the_tool_names_what_to_set(tmp_path):
    path = tmp_path / 'narrow.py'
    config().dump(path)
    done = run_tool('plan_memory', str(path), '--shape', '64', '96', '--batch', '1', '--budget', '1GiB')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split('  ')[1] for line in lines if ' stored' in line] == [f'reversible, {k} stored' for k in (0, 1, 2)]
    assert 'With 1.00 GiB: --cfg-options model.backbone.reversible=False' in lines


@pytest.mark.parametrize('args,sentence', [
    ((f'configs/{CONFIG}.py', '--shape', '16', '16'), 'at least 32 pixels'),
    ((f'configs/{CONFIG}.py', '--budget', '24'), 'a budget must be a number above 0 with a unit'),
    (('configs/none.py', ), 'no config configs/none.py')])
def test_the_tool_says_what_is_wrong_in_one_line(args, sentence):
    done = run_tool('plan_memory', *args)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_backbone_whose_type_is_a_class_is_known():
    for type_, scope in ((RevCol, None), (RevCol, 'mmdet'), ('RevCol', 'mmdet'), ('revcol_mm.RevCol', 'mmdet')):
        assert planning.column_network(Config(dict(default_scope=scope, model=dict(backbone=dict(type=type_))))) is RevCol
    with pytest.raises(ValueError, match='must have a network of columns as its backbone .* but has Conv2d'):
        planning.column_network(Config(dict(model=dict(backbone=dict(type=torch.nn.Conv2d)))))


def test_another_backbone_is_refused(tmp_path):
    path = tmp_path / 'resnet.py'
    path.write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\ncustom_imports = dict(imports=['revcol_mm'])\n")
    done = run_tool('plan_memory', str(path))
    assert done.returncode == 1
    assert done.stderr.startswith('error: ') and 'must have a network of columns as its backbone' in done.stderr
    assert 'but has ResNet' in done.stderr
