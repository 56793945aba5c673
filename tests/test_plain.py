# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol as a plain module: what timm's users expect, from a small RevCol-T with the authors' kinds of files."""
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

import revcol_mm
from revcol_mm.checkpoint import CheckpointError
from revcol_mm.checkpoint import download as downloads
from revcol_mm.models import RevCol
from revcol_mm.plain import MODELS, pretrained_cfg
from tests.common import CONFIGS, ROOT
from tests.converters.test_importing import official

WIDTHS = [4, 8, 16, 32]  # of official('tiny')


@pytest.fixture
def released(tmp_path, monkeypatch) -> dict:
    """The weights of a narrow RevCol-T, published in a folder, with intermediate supervision as in the release."""
    weights = official('tiny', heads='supervised')
    monkeypatch.setitem(RevCol.ARCHS, 'tiny', dict(RevCol.ARCHS['tiny'], channels=WIDTHS))
    monkeypatch.setenv(downloads.MIRROR, str(tmp_path))
    torch.save(dict(model=weights), tmp_path / 'revcol_tiny_1k.pth')
    return weights


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96)


def features(weights: dict, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    backbone = RevCol(dict(RevCol.ARCHS['tiny'], channels=WIDTHS), in_channels=x.shape[1])
    backbone.load_state_dict({key: value for key, value in weights.items() if key.startswith(('stem', 'subnet'))})
    return backbone(x)


def test_the_released_classifier_is_pool_norm_and_linear_of_the_last_supervision(released, images):
    model = revcol_mm.create_model('revcol_tiny', pretrained=True)
    weight, bias = (released[f'cls_blocks.3.classifier.0.{part}'] for part in ('weight', 'bias'))
    last = features(released, images)[-1]
    pooled = F.layer_norm(last.mean((2, 3)), (32, ), weight, bias, 1e-6)
    scores = F.linear(pooled, *(released[f'cls_blocks.3.classifier.1.{part}'] for part in ('weight', 'bias')))
    torch.testing.assert_close(model(images), scores)
    torch.testing.assert_close(model.forward_features(images), last)
    torch.testing.assert_close(model.forward_head(last, pre_logits=True), pooled)
    assert (model.num_features, model.num_classes, model.get_classifier().out_features) == (32, 1000, 1000)


@pytest.mark.parametrize('indices, levels', [(None, [0, 1, 2, 3]), ((1, 2, 3), [1, 2, 3]), ((-1, ), [3]), ([3, 0], [3, 0])])
def test_features_are_those_of_the_backbone(released, images, indices, levels):
    net = revcol_mm.create_model('revcol_tiny', pretrained=True, features_only=True, out_indices=indices)
    expected = features(released, images)
    for feature, level in zip(net(images), levels, strict=True):
        torch.testing.assert_close(feature, expected[level])
    assert net.feature_info.channels() == [WIDTHS[level] for level in levels]
    assert net.feature_info.reduction() == [64 // feature.shape[2] for feature in net(images)]
    assert all(name in dict(net.model.named_modules()) for name in net.feature_info.module_name())
    assert not any('classifier.1' in name for name, _ in net.named_parameters())
    assert not any(value.requires_grad for value in net.model.head.parameters())  # DistributedDataParallel waits for none


def test_a_checkpoint_trained_with_mmpretrain_gives_its_last_classifier(released, images, tmp_path):
    trained = {('backbone.' if name.startswith(('stem', 'subnet')) else 'head.') + name: weight
               for name, weight in released.items()}
    torch.save(dict(state_dict=trained, meta=dict(mmengine_version='0.10.7')), tmp_path / 'epoch_1.pth')
    model, same = (revcol_mm.create_model('revcol_tiny', pretrained=pretrained) for pretrained in (False, True))
    model.load_pretrained(str(tmp_path / 'epoch_1.pth'))
    assert torch.equal(model(images), same(images))


def test_one_channel_answers_a_grey_image_and_six_a_doubled_one_as_three_do(released, images):
    three = revcol_mm.create_model('revcol_tiny', pretrained=True)
    grey = images[:, :1]
    one = revcol_mm.create_model('revcol_tiny', pretrained=True, in_chans=1)
    torch.testing.assert_close(one(grey), three(grey.repeat(1, 3, 1, 1)))
    six = revcol_mm.create_model('revcol_tiny', pretrained=True, in_chans=6)
    torch.testing.assert_close(six(images.repeat(1, 2, 1, 1)), three(images))


def test_another_number_of_classes_starts_a_new_classifier_on_the_same_features(released, images):
    model = revcol_mm.create_model('revcol_tiny', pretrained=True, num_classes=7)
    assert model(images).shape == (2, 7)
    torch.testing.assert_close(model.forward_features(images), features(released, images)[-1])
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    model.reset_classifier(0, '')
    assert model(images).shape == (2, 32, 2, 3)
    model.reset_classifier(5, 'avg')
    assert model(images).shape == (2, 5) and model.num_classes == 5


def test_a_plain_model_trains_reversibly(released, images):
    gradients = []
    for reversible in (False, True):
        model = revcol_mm.create_model('revcol_tiny', pretrained=True, reversible=reversible)
        model(images).square().sum().backward()
        gradients.append(model.backbone.stem[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())  # of rebuilt features


@pytest.mark.parametrize('name', revcol_mm.list_models(pretrained=True))
def test_images_are_prepared_as_in_the_test_of_the_config(name):
    model, _, tag = name.partition('.')
    path = CONFIGS / f'{MODELS[model][tag]}.py'
    cfg, said = Config.fromfile(path, import_custom_modules=False), pretrained_cfg(name)
    preprocessor = cfg.data_preprocessor
    for key in ('mean', 'std'):
        assert [round(255 * value, 3) for value in said[key]] == preprocessor[key]
    assert said['num_classes'] == cfg.model.head.num_classes
    steps = {step.type: step for step in cfg.test_pipeline}
    size = said['input_size'][-1]
    if 'CenterCrop' in steps:
        assert (said['crop_mode'], steps['CenterCrop'].crop_size) == ('center', size)
        assert steps['ResizeEdge'].scale == size / said['crop_pct'] and steps['ResizeEdge'].interpolation == 'bicubic'
    else:
        assert (said['crop_mode'], said['crop_pct'], steps['Resize'].scale) == ('squash', 1, (size, size))
        assert steps['Resize'].interpolation == said['interpolation'] == 'bicubic'


def test_models_are_listed_by_pattern():
    assert revcol_mm.list_models() == [
        'revcol_tiny', 'revcol_small', 'revcol_base', 'revcol_large', 'revcol_xlarge', 'revcol_huge']
    assert revcol_mm.list_models('*_b*', pretrained=True) == [
        'revcol_base.in1k', 'revcol_base.in22k_ft_in1k', 'revcol_base.in22k_ft_in1k_384', 'revcol_base.in22k']


@pytest.mark.parametrize('arguments, kind, sentence', [
    (dict(model_name='revcol_q'), ValueError, 'must be one of revcol_tiny, .*, or, .* revcol_tiny.in1k, .*but got'),
    (dict(model_name='revcol_tiny.in22k'), ValueError, "but got 'revcol_tiny.in22k'"),
    (dict(model_name='revcol_xlarge', pretrained=True), CheckpointError, 'revcol_xlarge has no public weights; .*revcol_large'),
    (dict(out_indices=(1, )), ValueError, 'out_indices needs features_only=True'),
    (dict(features_only=True, out_indices=(4, )), ValueError, r'levels must be integers from -4 to 3, but got \[4\]'),
    (dict(num_classes=-1), ValueError, 'num_classes must be an integer, 0 or more, but got -1'),
    (dict(global_pool=''), ValueError, "global_pool must be 'avg', or '' with num_classes=0, but got ''"),
    (dict(pretrained=True, kernel_size=5), CheckpointError, 'revcol_tiny_1k.pth does not fit this RevCol: .*pad_kernels')])
def test_bad_arguments_are_named(released, arguments, kind, sentence):
    with pytest.raises(kind, match=sentence):
        revcol_mm.create_model(**dict(dict(model_name='revcol_tiny'), **arguments))


def test_kernels_are_padded_on_request(released, images):
    larger = revcol_mm.create_model('revcol_tiny', pretrained=True, kernel_size=5, pad_pretrained=True)
    plain = revcol_mm.create_model('revcol_tiny', pretrained=True)
    torch.testing.assert_close(larger(images), plain(images), rtol=1e-3, atol=1e-3)  # the border has values of 1e-7


@pytest.mark.slow
def test_the_example_of_torchvisions_faster_rcnn_trains_and_predicts(released):
    spec = importlib.util.spec_from_file_location('example', ROOT / 'examples' / 'torchvision_faster_rcnn.py')
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    detector = example.build_detector(num_classes=3, min_size=64, max_size=96)
    targets = [dict(boxes=torch.tensor([[8., 8., 40., 48.]]), labels=torch.tensor([1]))]
    losses = detector([torch.rand(3, 64, 96)], targets)
    sum(losses.values()).backward()
    assert set(losses) == {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'}
    assert detector.backbone.body.model.backbone.stem[0].weight.grad.abs().sum() > 0
    found, = detector.eval()([torch.rand(3, 64, 96)])
    assert set(found) == {'boxes', 'labels', 'scores'}


# timm

@pytest.fixture
def timm():
    import timm

    import revcol_mm.timm  # noqa: F401
    return timm


def test_timm_builds_the_same_models(timm, released, images):
    assert set(revcol_mm.list_models()) <= set(timm.list_models('revcol*'))
    assert set(revcol_mm.list_models(pretrained=True)) <= set(timm.list_models('revcol*', pretrained=True))
    for settings in (dict(), dict(in_chans=1), dict(num_classes=0)):
        x = images[:, :settings.get('in_chans', 3)]
        theirs = timm.create_model('revcol_tiny', pretrained=True, **settings)
        torch.testing.assert_close(theirs(x), revcol_mm.create_model('revcol_tiny', pretrained=True, **settings)(x))
    torch.testing.assert_close(timm.create_model('revcol_tiny', pretrained=True, num_classes=7).forward_features(images),
                               features(released, images)[-1])


def test_timm_extracts_the_same_features(timm, released, images):
    theirs = timm.create_model('revcol_tiny.in1k', pretrained=True, features_only=True, out_indices=(1, 3))
    ours = revcol_mm.create_model('revcol_tiny', pretrained=True, features_only=True, out_indices=(1, 3))
    torch.testing.assert_close(theirs(images), ours(images))
    assert theirs.feature_info.channels() == ours.feature_info.channels()
    assert theirs.feature_info.reduction() == ours.feature_info.reduction()


def test_timms_layer_decay_is_that_of_the_paper(timm):
    model = timm.create_model('revcol_tiny')
    layers = {id(value): model.backbone.get_layer_depth(name, 'backbone.') for name, value in model.named_parameters()}
    create = importlib.import_module('timm.optim').create_optimizer_v2
    optimizer = create(model, 'adamw', lr=1., weight_decay=0.05, layer_decay=0.9)
    for group in optimizer.param_groups:
        for parameter in group['params']:
            layer, number = layers[id(parameter)]
            assert group['lr_scale'] == pytest.approx(0.9**(number - 1 - layer))


def test_timms_further_arguments(timm, images):
    model = timm.create_model('revcol_tiny', drop_rate=0.5, num_classes=4).train()
    one, other = (model.forward_head(torch.ones(1, model.num_features, 1, 1) * torch.arange(model.num_features)[:, None, None])
                  for _ in range(2))
    assert not torch.equal(one, other)
    model.set_grad_checkpointing()
    model(images).sum().backward()
    checkpointed = model.backbone.stem[0].weight.grad
    assert model.backbone.with_cp and checkpointed.abs().sum() > 0
    with pytest.raises(ValueError, match='set_grad_checkpointing must be left out if reversible=True'):
        timm.create_model('revcol_tiny', reversible=True).set_grad_checkpointing()
    with pytest.raises(ValueError, match="feature_cls must be 'getter', .* but got 'hook'"):
        timm.create_model('revcol_tiny', features_only=True, feature_cls='hook')


@pytest.mark.parametrize('reversible', [False, True])
def test_every_trained_weight_of_features_has_a_gradient(released, images, reversible):
    """DistributedDataParallel waits for the gradients of all."""
    for indices in ((0, 1), (3, )):
        net = revcol_mm.create_model('revcol_tiny', features_only=True, out_indices=indices, reversible=reversible).train()
        sum(feature.sum() for feature in net(images)).backward()
        assert not [name for name, value in net.named_parameters() if value.requires_grad and value.grad is None]


def test_levels_that_the_shallow_ones_read_are_trained(monkeypatch):
    """In RevCol-H, level 0 reads level 3 of the column before."""
    monkeypatch.setitem(RevCol.ARCHS, 'huge', dict(RevCol.ARCHS['huge'], channels=WIDTHS, depths=(1, 1, 1, 1), num_columns=3))
    net = revcol_mm.create_model('revcol_huge', features_only=True, out_indices=(0, ))
    frozen = {name.partition('backbone.')[2].split('.')[1] for name, value in net.named_parameters()
              if not value.requires_grad and 'backbone.subnet' in name and 'subnet0' not in name}
    assert frozen == {f'{part}{level}' for part in ('level', 'alpha') for level in (1, 2, 3)}
    assert {name.partition('backbone.')[2].split('.')[0] for name, value in net.named_parameters()
            if not value.requires_grad and '.level' in name} == {'subnet2'}


def test_timm_knows_how_images_are_prepared(timm, released):
    config = timm.data.resolve_data_config(model=timm.create_model('revcol_tiny'))
    said = pretrained_cfg('revcol_tiny')
    assert {key: said[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')} == {
        key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}


@pytest.fixture
def own_weights(released, tmp_path) -> tuple[dict, str]:
    """Weights that are not the released ones, and their file, in the authors' format."""
    torch.save(dict(model={key: 2 * value for key, value in released.items()}), tmp_path / 'own.pth')
    model = revcol_mm.create_model('revcol_tiny')
    model.load_pretrained(str(tmp_path / 'own.pth'))
    return model.state_dict(), str(tmp_path / 'own.pth')


@pytest.mark.parametrize('source', ['file', 'url', 'state_dict'])
@pytest.mark.parametrize('setting', ['pretrained_cfg_overlay', 'pretrained_cfg'])
def test_timm_loads_the_weights_that_are_given_instead_of_the_public_ones(timm, own_weights, tmp_path, monkeypatch, source,
                                                                         setting):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv(downloads.MIRROR, str(tmp_path / 'none'))  # the public ones cannot be had
    weights, file = own_weights
    given = {source: dict(file=file, url=f'file://{file}', state_dict=weights)[source]}
    loaded = timm.create_model('revcol_tiny', pretrained=True, **{setting: given}).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())


def test_timm_reads_a_model_of_the_hub_by_itself(timm, released, monkeypatch):
    asked = []
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda model, pretrained_cfg, **_: asked.append(pretrained_cfg))
    timm.create_model('revcol_tiny', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='somebody/revcol'))
    assert asked[0]['hf_hub_id'] == 'somebody/revcol' and not asked[0].get('file')


def test_timm_names_a_model_without_public_weights_unless_others_are_given(timm, own_weights, monkeypatch):
    with pytest.raises(CheckpointError, match='revcol_xlarge has no public weights'):
        timm.create_model('revcol_xlarge', pretrained=True)
    monkeypatch.setitem(RevCol.ARCHS, 'xlarge', RevCol.ARCHS['tiny'])
    weights, file = own_weights
    model = timm.create_model('revcol_xlarge', pretrained=True, pretrained_cfg_overlay=dict(file=file))
    assert torch.equal(model.backbone.stem[0].weight, weights['backbone.stem.0.weight'])
