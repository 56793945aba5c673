# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The backbone: what it computes, what it is called, and what it refuses."""
import copy
import re

import pytest
import torch
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revcol_mm.models import RevCol
from revcol_mm.reversible import MIN_GAMMA, keep_invertible
from tests.common import CHANNELS, mostly_slow, small_arch

NARROW = small_arch()
#: The least that has every kind of layer: compiling takes its time.
SHORT = small_arch(2, depths=(1, 1, 1, 1))
#: Float32 sums in another order than the reference's; features and gradients agree to a few 1e-6 of their largest value.
REFERENCE_TOLERANCE = 1e-5


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def reference_net(reference: dict, **kwargs) -> RevCol:
    config = reference['config']
    arch = dict(channels=config['channels'], depths=config['layers'], num_columns=config['num_subnet'],
                deep_to_shallow=config['huge'])
    net = RevCol(arch, kernel_size=config['kernel_size'], **kwargs)
    weights = {name: value for name, value in reference['state_dict'].items() if name.startswith(('stem', 'subnet'))}
    net.load_state_dict(weights)
    return net


@pytest.mark.parametrize('reversible', [False, True])
def test_features_loss_and_gradients_are_those_of_an_independent_implementation(reference, reversible):
    net = reference_net(reference, reversible=reversible).train()
    image = reference['input'].clone().requires_grad_()
    every = [(column, level) for column in range(net.num_columns) for level in range(4)]
    for (column, level), feature in zip(every, net(image, outputs=every)):
        assert relative_error(feature, reference['columns'][column][level]) < REFERENCE_TOLERANCE, (column, level)
    loss = sum((feature * weight).sum() for feature, weight in zip(net(image), reference['grad_weights']))
    assert relative_error(loss, reference['loss']) < REFERENCE_TOLERANCE
    loss.backward()
    assert relative_error(image.grad, reference['input_grad']) < REFERENCE_TOLERANCE
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert set(trained) == {name for name in reference['grads']
                            if name.startswith(('stem', 'subnet')) and not name.startswith('subnet0.alpha')}
    for name, parameter in trained.items():
        assert relative_error(parameter.grad, reference['grads'][name]) < REFERENCE_TOLERANCE, name


@pytest.mark.parametrize('arch', RevCol.ARCHS)
def test_names_and_shapes_are_those_of_the_released_checkpoints(arch, official_shapes):
    with torch.device('meta'):
        net = RevCol(arch)
    ours = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert ours == {name: shape for name, shape in official_shapes[arch].items() if not name.startswith('cls.')}


@pytest.mark.parametrize('arch, published', mostly_slow([
    ('tiny', {224: 4.5e9}), ('small', {224: 9.0e9}), ('base', {224: 16.6e9, 384: 48.9e9}), ('large', {224: 39.0e9, 384: 116e9}),
    ('xlarge', {384: 350e9}), ('huge', {640: 2537e9})], ['tiny']))
def test_multiply_adds_are_those_of_table_1(arch, published):
    with torch.device('meta'):
        net = RevCol(arch).eval()
    for size, flops in published.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, size, size, device='meta'))
        assert counter.get_total_flops() / 2 == pytest.approx(flops, rel=0.01), size


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (63, 65), (100, 32), (127, 97)])
def test_any_size_from_32_up_gives_strides_4_to_32(size):
    features = RevCol(NARROW).eval()(torch.randn(1, 3, *size))
    expected = [size[0] // 4, size[1] // 4]
    for channels, feature in zip(NARROW['channels'], features):
        assert list(feature.shape) == [1, channels, *expected]
        expected = [length // 2 for length in expected]


@pytest.mark.parametrize('mode', ['train', 'eval', 'reversible', 'autocast', 'checkpoint'])
def test_outputs_are_contiguous(mode):
    net = RevCol(NARROW, reversible=mode == 'reversible', with_cp=mode == 'checkpoint').train(mode != 'eval')
    with torch.autocast('cpu', torch.bfloat16, enabled=mode == 'autocast'):
        for size in (32, 64):  # at 32 the last level is 1×1, where every layout looks contiguous
            assert all(feature.is_contiguous() for feature in net(torch.randn(2, 3, size, size)))


def test_gamma_stays_invertible_without_being_written():
    gamma = torch.tensor([0.5, -0.5, 1e-4, -1e-4, 0., 2.], requires_grad=True)
    before = gamma.detach().clone()
    kept = keep_invertible(gamma)
    expected = torch.tensor([0.5, -0.5, MIN_GAMMA, -MIN_GAMMA, MIN_GAMMA, 2.])
    assert torch.equal(kept, expected)
    assert torch.equal(gamma, before)
    kept.sum().backward()
    assert torch.equal(gamma.grad, torch.ones(6)), 'a γ below the bound must still learn'


def test_a_saved_model_evaluates_exactly_as_it_trained():
    net = RevCol(NARROW).train()
    with torch.no_grad():
        net.subnet1.alpha0.fill_(1e-5)
        net.subnet2.alpha3.fill_(-1e-5)
    image = torch.randn(1, 3, 64, 64)
    trained = net(image)
    copied = RevCol(NARROW).eval()
    copied.load_state_dict(net.state_dict())
    saved = copy.deepcopy(copied.state_dict())
    for ours, theirs in zip(copied(image), trained):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(value, saved[name]) for name, value in copied.state_dict().items())


def test_gammas_of_the_first_column_are_loaded_and_counted_but_have_no_effect():
    net = RevCol(NARROW).eval()
    image = torch.randn(1, 3, 64, 64)
    before = net(image)
    net.subnet0.alpha0.fill_(7.)
    assert 'subnet0.alpha0' in net.state_dict() and not net.subnet0.alpha0.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(net(image), before))


@pytest.mark.parametrize('reversible', [False, True])
@pytest.mark.parametrize('stages', [0, 2, 3])
def test_frozen_stages_freeze_the_stem_and_columns(stages, reversible):
    net = RevCol(NARROW, drop_path_rate=0.5, frozen_stages=stages, reversible=reversible).train()
    features = net(torch.randn(2, 3, 64, 64))
    if stages < 3:
        sum(feature.sum() for feature in features).backward()
    else:
        assert not any(feature.requires_grad for feature in features)
    frozen = ('stem', *(f'subnet{index}.' for index in range(stages)))
    for name, parameter in net.named_parameters():
        trains = not name.startswith(frozen) and not name.startswith('subnet0.alpha')
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name
    for name, module in net.named_modules():
        if name:
            assert module.training != f'{name}.'.startswith(frozen), name


@pytest.mark.parametrize('kind', ['LN', nn.LayerNorm])
def test_out_norm_cfg_normalises_the_channels_of_every_output(kind):
    net = RevCol(NARROW, out_indices=(1, 3), out_norm_cfg=dict(type=kind)).eval()
    features = net(torch.randn(2, 3, 64, 64))
    assert [feature.shape[1] for feature in features] == [16, 32]
    for feature in features:
        assert feature.is_contiguous()
        assert feature.mean(1).abs().max() < 1e-5  # the mean of a few dozen float32 numbers of size 1
    assert 'norm1.weight' in net.state_dict() and 'norm0.weight' not in net.state_dict()


def test_runs_under_autocast_inference_mode_and_as_a_copy():
    net = RevCol(NARROW).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = net(image)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(net(image), expected))
    assert all(torch.equal(a, b) for a, b in zip(copy.deepcopy(net)(image), expected))
    with torch.autocast('cpu', torch.bfloat16):
        for a, b in zip(net(image), expected):
            assert relative_error(a, b) < 0.05  # bfloat16 has 8 bits


def test_is_found_in_the_root_registry():
    assert isinstance(MODELS.build(dict(type='RevCol', arch=NARROW)), RevCol)


@pytest.mark.parametrize('arguments, named', [
    (dict(arch='enormous'), 'enormous'),
    (dict(arch=4), 'arch must .* got 4 of type int'),
    (dict(arch=dict(channels=CHANNELS)), 'num_columns'),
    (dict(arch=dict(NARROW, channels=(8, 16))), 'channels'),
    (dict(arch=dict(NARROW, num_columns=0)), 'num_columns'),
    (dict(arch=NARROW, kernel_size=4), 'kernel_size must be an odd positive integer, but got 4'),
    (dict(arch=NARROW, drop_path_rate=1.5), 'drop_path_rate must .* got 1.5'),
    (dict(arch=NARROW, out_indices=(0, 4)), 'out_indices'),
    (dict(arch=NARROW, frozen_stages=4), 'frozen_stages must .* got 4'),
    (dict(arch=dict(NARROW, channels=8)), 'channels'),
    (dict(arch=NARROW, in_channels=0), 'in_channels must .* got 0'),
    (dict(arch=NARROW, drop_path_rate='0.1'), 'drop_path_rate'),
    (dict(arch=NARROW, out_indices=3), 'out_indices must .* got 3'),
    (dict(arch=NARROW, out_norm_cfg='LN'), 'out_norm_cfg'),
    (dict(arch=NARROW, drift_threshold='a'), 'drift_threshold'),
    (dict(arch=NARROW, reversible=True, with_cp=True), 'with_cp'),
    (dict(arch=NARROW, on_drift='ignore'), 'ignore'),
])
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises((TypeError, ValueError), match=named):
        RevCol(**arguments)


def test_init_cfg_may_be_a_list_and_needs_a_checkpoint_to_load():
    net = RevCol(NARROW, init_cfg=[dict(type='Constant', layer='Conv2d', val=3.)])
    net.init_weights()
    assert (net.stem[0].weight == 3).all()
    for kind in ('Pretrained', PretrainedInit):
        with pytest.raises(ValueError, match='checkpoint'):
            RevCol(NARROW, init_cfg=dict(type=kind)).init_weights()


@pytest.mark.parametrize('shape', [(1, 3, 31, 64), (1, 4, 64, 64), (3, 64, 64)])
def test_bad_images_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        RevCol(NARROW)(torch.randn(shape))


def test_a_detector_put_into_channels_last_is_stopped():
    net = RevCol(NARROW).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match='contiguous_format'):
        net(torch.randn(1, 3, 64, 64))
    net.to(memory_format=torch.contiguous_format)(torch.randn(1, 3, 64, 64))


class _Wrapped(torch.nn.Module):
    """A backbone under autocast, or whose outputs are fresh contiguous copies, as an operator that ignores strides wants them.

    Autocast ends at the backbone: mmcv's NMS on the CPU takes no bfloat16.
    """

    def __init__(self, backbone: torch.nn.Module, autocast: bool, copied: bool) -> None:
        super().__init__()
        self.backbone, self.autocast, self.copied = backbone, autocast, copied

    def forward(self, x):
        with torch.autocast('cpu', torch.bfloat16, enabled=self.autocast):
            features = self.backbone(x)
        if self.copied:
            features = tuple(torch.empty(feature.shape, dtype=feature.dtype).copy_(feature) for feature in features)
        return features


@pytest.fixture(scope='module')
def detector():
    from mmengine.hub import get_config
    from mmengine.registry import DefaultScope
    cfg = get_config('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py')
    cfg.model.backbone = dict(type='RevCol', arch=SHORT, layer_scale_init_value=1.)
    cfg.model.neck.update(in_channels=list(SHORT['channels']), out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.roi_head.bbox_roi_extractor.out_channels = cfg.model.roi_head.mask_roi_extractor.out_channels = 16
    for head in cfg.model.roi_head.bbox_head:
        head.update(in_channels=16, fc_out_channels=32)
    cfg.model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    cfg.model.test_cfg.rpn.max_per_img = 100
    from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        return MODELS.build(cfg.model).eval()


@pytest.fixture(scope='module')
def compiled_backbone(detector):
    torch._dynamo.reset()
    return torch.compile(detector.backbone, fullgraph=True)


@pytest.mark.parametrize('mode', [
    'eager', pytest.param('compiled', marks=[pytest.mark.compiler, pytest.mark.slow]), 'autocast'])
def test_roi_align_and_detector_read_the_outputs_right(detector, mode, request):
    from mmcv.ops import roi_align
    from mmdet.structures import DetDataSample
    backbone = detector.backbone
    image = torch.randn(1, 3, 96, 128)
    sample = DetDataSample(metainfo=dict(img_shape=(96, 128), ori_shape=(96, 128), pad_shape=(96, 128),
                                         batch_input_shape=(96, 128), scale_factor=(1., 1.)))
    rois = torch.tensor([[0., 4., 4., 60., 90.], [0., 20., 30., 120., 70.]])

    def run(copied):
        net = request.getfixturevalue('compiled_backbone') if mode == 'compiled' else backbone
        module = _Wrapped(net, mode == 'autocast', copied)
        with torch.no_grad():
            aligned = [roi_align(feature, rois, (7, 7), 1 / stride) for feature, stride in zip(module(image), (4, 8, 16, 32))]
            detector.backbone = module
            predictions = detector.predict(image, [copy.deepcopy(sample)])[0].pred_instances
        detector.backbone = backbone
        return aligned, predictions

    aligned, predictions = run(copied=False)
    copies_aligned, copies_predictions = run(copied=True)
    assert all(torch.equal(a, b) for a, b in zip(aligned, copies_aligned))
    assert len(predictions) > 0
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        assert torch.equal(predictions[key], copies_predictions[key]), key


@pytest.mark.compiler
def test_compiled_evaluation_gives_the_eager_features(detector, compiled_backbone):
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for compiled, eager in zip(compiled_backbone(image), detector.backbone(image)):
            assert compiled.is_contiguous()
            assert relative_error(compiled, eager) < 1e-5  # fused kernels round in another order
