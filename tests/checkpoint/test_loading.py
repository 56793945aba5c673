# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""`init_cfg=dict(type='Pretrained', checkpoint=…)`: all of the backbone out of any file that holds it, or an error."""
import pytest
import torch
from mmengine.logging import MMLogger

from revcol_mm.checkpoint import CheckpointError, load_pretrained
from revcol_mm.checkpoint.loading import check_weights
from revcol_mm.models import RevCol

NANO = dict(channels=[4, 6, 8, 10], depths=[1, 2, 1, 1], num_columns=3)
HEADS = {'cls': {'cls.classifier.1.weight': torch.ones(3, 10)},
         'supervised': {'cls_blocks.0.classifier.1.weight': torch.ones(3, 10),
                        'decoder_blocks.0.normal_layers.0.0.dwconv.weight': torch.ones(8, 1, 3, 3)},
         'detector': {'neck.lateral_convs.0.conv.weight': torch.ones(3, 4, 1, 1), 'rpn_head.rpn_cls.bias': torch.ones(3)}}


def weights(**settings):
    torch.manual_seed(7)
    return RevCol(dict(NANO, **settings.pop('arch', {})), **settings).state_dict()


def prefixed(prefix, names):
    return {prefix + name: value for name, value in names.items()}


FILES = {
    'bare': lambda: weights(),
    'bare, module': lambda: prefixed('module.', weights()),
    'bare, backbone': lambda: prefixed('backbone.', weights()),
    'model': lambda: dict(model=weights()),
    'model, classifier': lambda: dict(model={**weights(), **HEADS['cls']}, optimizer=dict(state={}), epoch=3),
    'model, supervision, module': lambda: dict(model=prefixed('module.', {**weights(), **HEADS['supervised']})),
    'state_dict': lambda: dict(state_dict=weights()),
    'detector': lambda: dict(meta={}, state_dict={**prefixed('backbone.', weights()), **HEADS['detector']}),
    'detector, module': lambda: dict(state_dict=prefixed('module.', {**prefixed('backbone.', weights()), **HEADS['detector']})),
    'deep inside': lambda: dict(state_dict=prefixed('student.encoder.', weights())),
    'both wrappings, one of them empty': lambda: dict(state_dict={}, model=weights()),
}


@pytest.fixture
def log(monkeypatch):
    lines = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'handle', lambda record: lines.append(record.getMessage()))
    return lines


@pytest.mark.parametrize('kind', FILES)
def test_every_wrapping_loads_completely(tmp_path, kind):
    torch.save(FILES[kind](), tmp_path / 'w.pth')
    torch.manual_seed(1)
    model = RevCol(NANO, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')))
    model.init_weights()
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights().items())


def test_what_was_loaded_left_out_and_missing_is_logged(tmp_path, log):
    torch.save(FILES['model, classifier'](), tmp_path / 'w.pth')
    load_pretrained(RevCol(NANO, out_norm_cfg=dict(type='LN'), out_indices=(3, )), str(tmp_path / 'w.pth'))
    count = len(weights())
    assert log[-1] == (f'RevCol: loaded {count} of {count + 2} weights from {tmp_path}/w.pth; '
                       'left out: cls (1), optimizer, epoch; missing: norm3.weight, norm3.bias')


def test_two_networks_under_prefixes_of_one_length_are_not_chosen_from(tmp_path):
    torch.save({**prefixed('student.', weights()), **prefixed('teacher.', weights())}, tmp_path / 'two.pth')
    with pytest.raises(CheckpointError, match=r'holds 2, under student\., teacher\.: name one of these as prefix'):
        load_pretrained(RevCol(NANO), str(tmp_path / 'two.pth'))


def test_a_prefix_can_be_named(tmp_path):
    two = {**prefixed('student.', weights()), **prefixed('teacher.', {name: value + 1 for name, value in weights().items()})}
    torch.save(dict(state_dict=two), tmp_path / 'w.pth')
    for prefix in ('teacher', 'teacher.'):
        model = RevCol(NANO, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), prefix=prefix))
        model.init_weights()
        assert torch.equal(model.stem[0].weight, weights()['stem.0.weight'] + 1)
    with pytest.raises(CheckpointError, match="holds no weights of RevCol under 'nobody.'"):
        load_pretrained(RevCol(NANO), str(tmp_path / 'w.pth'), prefix='nobody')


def test_half_precision_files_load_into_the_modules_own_dtype(tmp_path):
    torch.save({name: value.half() for name, value in weights().items()}, tmp_path / 'w.pth')
    model = RevCol(NANO)
    load_pretrained(model, str(tmp_path / 'w.pth'))
    assert model.stem[0].weight.dtype == torch.float32
    assert torch.equal(model.stem[0].weight, weights()['stem.0.weight'].half().float())


def test_integers_may_count_and_index_and_no_more():
    check_weights({'stem.1.num_batches_tracked': torch.tensor(3), 'backbone.deployed': torch.tensor(True),
                   'neck.attn.relative_position_index': torch.ones(2, dtype=torch.long)}, 'w.pth')
    for key in ('neck.weight', 'head.fc.bias', 'weight', 'backbone.subnet0.alpha0', 'module.stem.pos_embed'):
        with pytest.raises(CheckpointError, match=rf'{key} \(torch.int64\)'):
            check_weights({key: torch.ones(2, dtype=torch.long)}, 'w.pth')


def test_nothing_is_loaded_onto_the_meta_device(tmp_path, log):
    with torch.device('meta'):
        model = RevCol(NANO, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'absent.pth')))
    model.init_weights()
    assert 'meta device' in log[-1]


def without(part):
    return {name: value for name, value in weights().items() if part not in name}


@pytest.mark.parametrize('contents, sentence', [
    (lambda: dict(model={'conv.weight': torch.ones(3)}), 'holds no weights of RevCol: its names are conv.weight'),
    (lambda: dict(meta='nothing'), 'holds no weights: it must be a state dict'),
    (lambda: without('subnet2.'), r'does not fit RevCol: \d+ weights are missing: subnet2.alpha0, .*'),
    (lambda: without('pwconv1.bias'), 'does not fit RevCol: 15 weights are missing: subnet0.level0.blocks.0.pwconv1.bias'),
    (lambda: weights(arch=dict(num_columns=4)), 'weights have no place in the model: subnet3.alpha0'),
    (lambda: weights(arch=dict(depths=[1, 2, 2, 1])), 'have no place in the model: subnet0.level2.blocks.1.gamma'),
    (lambda: weights(arch=dict(channels=[4, 6, 8, 12])),
     r'another shape: subnet0.alpha3 \(1, 12, 1, 1\) instead of \(1, 10, 1, 1\)'),
    (lambda: weights(kernel_size=5), 'has kernels of 5×5, but the model has 3×3: build it with kernel_size=5'),
    (lambda: weights(kernel_size=1), r'1×1, but the model has 3×3: pad them, python tools/pad_kernels.py \S+w.pth --size 3'),
    (lambda: {**weights(), 'stem.0.bias': torch.full((4, ), float('nan'))}, 'NaN or infinite values: stem.0.bias'),
    *((lambda dtype=dtype: {key: value.to(dtype) for key, value in weights().items()},
       rf'w.pth: all weights must be dense .*, but \d+ weights are not: stem.0.weight \({dtype}\)')
      for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    (lambda: {**weights(), 'stem.0.bias': torch.ones(4).to_sparse()},
     r'1 weights are not: stem.0.bias \(torch.float32, torch.sparse_coo\)'),
    (lambda: {**weights(), 'stem.0.bias': torch.ones(4, device='meta')}, r'stem.0.bias \(torch.float32, without data\)'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_does_not_fit_completely_is_an_error_and_changes_nothing(tmp_path, contents, sentence):
    torch.save(contents(), tmp_path / 'w.pth')
    model = RevCol(NANO)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_pretrained(model, str(tmp_path / 'w.pth'))
    assert 'w.pth' in str(error.value)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.pth does not exist'):
        load_pretrained(RevCol(NANO), str(tmp_path / 'absent.pth'))
