# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Intermediate supervision: classifiers, decoders and the compound loss, against an independent implementation."""
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import revcol_mm.classification  # noqa: F401
from tests.common import CHANNELS, DATA, gradients_of, live_bytes


@pytest.fixture(scope='module')
def reference():
    return torch.load(DATA / 'revcol_small_reference.pt', weights_only=True)


def build(reversible=False, num_classes=10, num_columns=4, channels=CHANNELS, head=None, preprocessor=None, **kwargs):
    """A small classifier; its preprocessor's normalisation is a division by 255."""
    torch.manual_seed(0)
    return MODELS.build(dict(
        type='IntermediateSupervisionClassifier',
        backbone=dict(type='RevCol', arch=dict(channels=channels, depths=(1, 2, 2, 1), num_columns=num_columns),
                      reversible=reversible),
        head=dict(dict(type='IntermediateSupervisionHead', num_classes=num_classes, in_channels=channels), **(head or {})),
        data_preprocessor=dict(dict(num_classes=num_classes, mean=[0.] * 3, std=[255.] * 3), **(preprocessor or {})),
        **kwargs))


def build_reference(reference, reversible, **kwargs):
    model = build(reversible, **kwargs)
    heads = ('cls_blocks', 'decoder_blocks')
    model.load_state_dict({('head.' if name.startswith(heads) else 'backbone.') + name: value
                           for name, value in reference['state_dict'].items()})  # strict: the names are the release's
    return model.train()


def samples_of(labels):
    return [DataSample().set_gt_label(int(label)) for label in labels]


def randomize(model):
    """Weights that let every part of the network count, LayerScale included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('.gamma'):
                parameter.uniform_(0.5, 1.)
            elif parameter.dim() > 1 and 'alpha' not in name:
                parameter.normal_(0, 0.5 / math.sqrt(parameter[0].numel()))
    return model.train()


def close(actual, expected):
    """Within 1e-5 of the largest value: float32 sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def check_modes(test):
    return pytest.mark.parametrize('reversible', [False, True], ids=['plain', 'reversible'])(test)


@check_modes
def test_classifier_scores_are_the_reference_s(reference, reversible):
    model, data = build_reference(reference, reversible), reference['intermediate']
    for actual, expected in zip(model.head.scores(model.extract_feat(data['image'])), data['cls_scores'], strict=True):
        close(actual, expected)


@check_modes
def test_reconstructions_are_the_reference_s(reference, reversible):
    model, data = build_reference(reference, reversible), reference['intermediate']
    reconstructions = model.head.reconstruct(model.extract_feat(data['image']))
    for actual, expected in zip(reconstructions, data['reconstructions'], strict=True):
        close(actual, expected)


@check_modes
def test_loss_terms_and_their_sum_are_the_reference_s(reference, reversible):
    model, data = build_reference(reference, reversible), reference['intermediate']
    losses = model.loss(data['image'], samples_of(data['label']))
    terms = [losses[f'loss_reconstruction{i}'] + losses[f'loss_cls{i}'] for i in range(3)] + [losses['loss_cls']]
    torch.testing.assert_close(torch.stack(terms), data['losses'], rtol=1e-5, atol=0)
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total, data['loss'], rtol=1e-5, atol=0)


def test_reversible_gradients_of_the_whole_loss_are_those_of_plain_autograd():
    images, labels = torch.rand(2, 3, 64, 96), [3, 7]
    gradients = []
    for reversible in (False, True):
        model = randomize(build(reversible))
        total, _ = model.parse_losses(model.loss(images, samples_of(labels)))
        total.backward()
        gradients.append(gradients_of(model))
    plain, rebuilt = gradients
    assert plain.keys() == rebuilt.keys()
    assert all(any(name.startswith(part) for name in plain) for part in
               ('backbone.stem', 'backbone.subnet0', 'backbone.subnet3.alpha0', 'head.cls_blocks.0', 'head.decoder_blocks.2'))
    for name, expected in plain.items():
        assert expected.abs().max() > 1e-6, f'{name}: below that, the 1e-9 for rounding could hide that it has no gradient'
        # 1e-4 of the largest entry: float32, through four columns and in another order of summation.
        torch.testing.assert_close(rebuilt[name], expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-9, msg=name)


def test_supervised_inner_columns_are_not_stored():
    def stored(num_columns, reversible):
        model, images = randomize(build(reversible, num_columns=num_columns)), torch.rand(2, 3, 64, 64)
        return live_bytes(lambda: model.loss(images, samples_of([1, 2])), lambda losses: None)[0]

    four, eight = stored(4, True), stored(8, True)
    # What the heads and the last column need is the same; a small scalar per column may differ.
    assert abs(eight - four) < 0.01 * four
    assert stored(8, False) - stored(4, False) > 0.5 * four  # the account sees what plain autograd stores


def test_predictions_come_from_the_last_classifier_alone(reference):
    model, data = build_reference(reference, reversible=True), reference['intermediate']
    model.eval()
    expected = F.softmax(data['cls_scores'][-1], 1)
    with torch.no_grad():
        predictions = model.predict(data['image'])
        assert all('head_scores' not in prediction for prediction in predictions)
        close(torch.stack([prediction.pred_score for prediction in predictions]), expected)
        close(model(data['image'], mode='tensor'), data['cls_scores'][-1])
        for part in (*model.head.cls_blocks[:3], *model.head.decoder_blocks):
            for parameter in part.parameters():
                parameter.fill_(math.nan)
        close(torch.stack([prediction.pred_score for prediction in model.predict(data['image'])]), expected)


def test_images_to_rebuild_are_what_the_network_saw():
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    mixup = dict(augments=[dict(type='Mixup', alpha=1.)])
    model = build(preprocessor=dict(mean=mean, std=std, to_rgb=True, batch_augments=mixup))
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    seen = model.data_preprocessor(dict(inputs=pictures, data_samples=samples_of([0, 1, 2, 3])), training=True)
    restored = model.restore_images(seen['inputs'])
    rgb = pictures.flip(1).double() / 255
    for image, sample in zip(restored, seen['data_samples']):
        mixed = torch.einsum('n,nchw->chw', sample.gt_score[:4].double(), rgb)  # the labels tell the shares
        torch.testing.assert_close(image.double(), mixed, rtol=0, atol=1e-5)  # of values up to 1


def test_reconstruction_loss_compares_with_the_clamped_image():
    model = build()
    for decoder in model.head.decoder_blocks:
        torch.nn.init.zeros_(decoder.projback[0].weight)
        torch.nn.init.constant_(decoder.projback[0].bias, 2.)
    losses = model.loss(torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)]), samples_of([0, 1]))
    # Half of the pixels are 0.01, half 0.99, all predictions sigmoid(2).
    p = 1 / (1 + math.exp(-2))
    bce = sum(-(t * math.log(p) + (1 - t) * math.log(1 - p)) for t in (0.01, 0.99)) / 2
    for i, weight in enumerate((3., 2., 1.)):
        assert losses[f'loss_reconstruction{i}'].item() == pytest.approx(weight * bce, rel=1e-5)


def test_every_classification_term_follows_label_smoothing_and_mixed_labels():
    smoothing = 0.1
    model = build(head=dict(loss=dict(type='LabelSmoothLoss', label_smooth_val=smoothing, mode='original')))
    images, score = torch.rand(1, 3, 32, 32), torch.zeros(10)
    score[2], score[5] = 0.3, 0.7
    losses = model.loss(images, [DataSample().set_gt_score(score)])
    target = score * (1 - smoothing) + smoothing / 10
    expected = [-(target * F.log_softmax(s[0], 0)).sum() for s in model.head.scores(model.extract_feat(images))]
    for i, weight in enumerate((0.175, 0.35, 0.525)):
        assert losses[f'loss_cls{i}'].item() == pytest.approx(weight * expected[i].item(), rel=1e-5)
    assert losses['loss_cls'].item() == pytest.approx(expected[3].item(), rel=1e-5)


def test_more_than_1000_classes_take_the_projection_decoder():
    model = build(num_classes=1001, reversible=True)
    names = {name for name, _ in model.head.decoder_blocks[0].named_parameters()}
    assert names == {f'projback.{index}.{kind}' for index in (0, 1) for kind in ('weight', 'bias')}
    assert model.head.decoder_blocks[0].projback[1].weight.shape == (3 * 32**2, 32, 1, 1)
    images = torch.rand(2, 3, 64, 96)
    assert [x.shape for x in model.head.reconstruct(model.extract_feat(images))] == [images.shape] * 3
    total, _ = model.parse_losses(model.loss(images, samples_of([0, 1000])))
    total.backward()
    assert math.isfinite(total.item())


def test_bfloat16_autocast_trains_close_to_float32():
    images = torch.rand(2, 3, 64, 64)
    model = randomize(build(reversible=True))
    exact, _ = model.parse_losses(model.loss(images, samples_of([0, 1])))
    with torch.autocast('cpu', torch.bfloat16):
        half, _ = model.parse_losses(model.loss(images, samples_of([0, 1])))
    half.backward()
    assert half.item() == pytest.approx(exact.item(), rel=0.02)  # bfloat16 has 8 bits
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_average_weights_predict_like_a_model_with_these_weights():
    model = randomize(build(reversible=True))
    average = ExponentialMovingAverage(model, momentum=0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average.update_parameters(model)  # the first update copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update_parameters(model)
    other = build()
    other.load_state_dict({name: 0.75 * before[name] + 0.25 * value for name, value in model.state_dict().items()})
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        close(average.eval()(images), other.eval()(images))


def test_layer_decay_scales_rates_and_decays_gamma():
    model = build(num_columns=4)
    wrapper = build_optim_wrapper(model, dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=1., weight_decay=0.05),
        constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.5, decay_gamma=True)))
    settings = {name: (group['lr'], group['weight_decay'])
                for group in wrapper.optimizer.param_groups for name in group['param_names']}
    # Layers: the stem, 1 + 2 + 2 + 1 blocks down and 4 columns to the right, the heads: 0 … 10.
    assert settings['backbone.stem.0.weight'] == (0.5**10, 0.05)
    assert settings['backbone.subnet3.alpha0'] == (0.5**6, 0.05)
    assert settings['backbone.subnet3.level3.blocks.0.gamma'] == (0.5**1, 0.)
    assert settings['head.cls_blocks.0.classifier.1.weight'] == (1., 0.05)
    assert settings['head.decoder_blocks.1.projback.0.bias'] == (1., 0.)


def test_accuracy_of_each_head_can_be_logged_in_training():
    model = build(head=dict(cal_acc=True, topk=(1, 5)))
    losses = model.loss(torch.rand(4, 3, 32, 32), samples_of([0, 1, 2, 3]))
    scores = model.head.scores(model.extract_feat(torch.rand(4, 3, 32, 32)))
    assert len(scores) == 4
    assert {name for name in losses if 'accuracy' in name} == {f'head{i}_accuracy_top-{k}' for i in range(4) for k in (1, 5)}
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total, sum(value for name, value in losses.items() if name.startswith('loss')))


def test_predictions_hold_every_head_s_scores_when_asked(reference):
    model, data = build_reference(reference, False, head=dict(score_every_head=True)), reference['intermediate']
    with torch.no_grad():
        predictions = model.eval().predict(data['image'])
    for index, prediction in enumerate(predictions):
        close(prediction.head_scores, F.softmax(torch.stack([scores[index] for scores in data['cls_scores']]), 1))
        torch.testing.assert_close(prediction.pred_score, prediction.head_scores[3])


def test_init_scale_shrinks_the_new_classifier():
    torch.manual_seed(0)
    plain = MODELS.build(dict(type='RevColClsHead', num_classes=10, in_channels=32))
    torch.manual_seed(0)
    scaled = MODELS.build(dict(type='RevColClsHead', num_classes=10, in_channels=32, init_scale=0.001))
    assert set(plain.state_dict()) == {f'cls.classifier.{index}.{kind}' for index in (0, 1) for kind in ('weight', 'bias')}
    torch.testing.assert_close(scaled.cls.classifier[1].weight, 0.001 * plain.cls.classifier[1].weight)
    torch.testing.assert_close(scaled.cls.classifier[0].weight, plain.cls.classifier[0].weight)
    features = (torch.randn(2, 32, 3, 2), )
    expected = F.linear(F.layer_norm(features[0].mean((2, 3)), (32, ), eps=1e-6), plain.cls.classifier[1].weight)
    torch.testing.assert_close(plain(features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('change, message', [
    (dict(num_columns=3), 'multiple of 4.*num_columns=3'),
    (dict(head=dict(in_channels=(8, 16, 24, 48))), r'in_channels of the head must .* got \(8, 16, 24, 48\)'),
    (dict(head=dict(in_channels=32 * [1])), 'in_channels'),
    (dict(num_classes=0), 'num_classes must .* got 0'),
    (dict(neck=dict(type='GlobalAveragePooling')), 'neck'),
])
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_another_backbone_is_refused():
    with pytest.raises(ValueError, match='needs a RevCol whose .* but got RevColC2f with num_columns=4'):
        MODELS.build(dict(type='IntermediateSupervisionClassifier',
                          backbone=dict(type='RevColC2f', arch=dict(channels=CHANNELS, depths=(1, 1, 1, 1), num_columns=4)),
                          head=dict(type='IntermediateSupervisionHead', num_classes=10, in_channels=CHANNELS)))


def test_another_head_is_referred_to_the_plain_classifier():
    with pytest.raises(ValueError, match='got LinearClsHead: .*ImageClassifier'):
        build(head=dict(type='LinearClsHead', in_channels=32))


def test_images_that_cannot_be_rebuilt_are_refused():
    with pytest.raises(ValueError, match='multiples of 32.*48×64 pixels'):
        build().loss(torch.rand(1, 3, 48, 64), samples_of([0]))


def test_outputs_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r'\(4, 3\)'):
        build().backbone(torch.rand(1, 3, 32, 32), outputs=[(3, 3), (4, 3)])
