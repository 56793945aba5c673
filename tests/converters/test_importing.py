# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Files of the authors' release load strictly into the current models, and go back to the authors' names unchanged."""
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

from revcol_mm.checkpoint import CheckpointError, export_official, import_checkpoint, publish_checkpoint, read_checkpoint
from revcol_mm.converters import is_official, pad_checkpoint, to_current_names
from revcol_mm.models import HRNetColumns, RevCol, RevColC2f, RevColViT, RevNetConvNeXt
from tests.common import CONFIGS, DATA, load_tool, mostly_slow, small_arch

SHAPES = json.loads(gzip.decompress((DATA / 'official_state_dict_shapes.json.gz').read_bytes()))
DIVISORS = dict(tiny=16, small=16, base=18, large=32, xlarge=56, huge=90)  # of the widths, down to C0 = 4


import_main, publish_main = load_tool('import_checkpoint').main, load_tool('publish_checkpoint').main


def arch_of(size):
    arch = dict(RevCol.ARCHS[size])
    return dict(arch, channels=[width // DIVISORS[size] for width in arch['channels']], depths=list(arch['depths']))


def official(size, kernel_size=3, num_classes=1000, heads='single', dtype=torch.float32):
    """Weights with exactly the names of a released classifier of this size, and its shapes at a fraction of the width."""
    torch.manual_seed(0)
    wide = {factor * width for width in RevCol.ARCHS[size]['channels'] for factor in (1, 4)}
    c0, c1, c2, c3 = arch_of(size)['channels']
    shapes = {}
    for name, shape in SHAPES[size].items():
        if name.startswith('cls.'):
            continue
        shape = [dim // DIVISORS[size] if dim in wide else dim for dim in shape]
        shapes[name] = shape[:2] + [kernel_size] * 2 if name.endswith('dwconv.weight') else shape

    def classifier(prefix):
        shapes.update({f'{prefix}.classifier.0.weight': [c3], f'{prefix}.classifier.0.bias': [c3],
                       f'{prefix}.classifier.1.weight': [num_classes, c3], f'{prefix}.classifier.1.bias': [num_classes]})

    if heads == 'single':
        classifier('cls')
    elif heads == 'supervised':
        for i in range(4):
            classifier(f'cls_blocks.{i}')
        for i in range(3):
            decoder = f'decoder_blocks.{i}'
            if num_classes > 1000:
                shapes.update({f'{decoder}.projback.0.weight': [c3], f'{decoder}.projback.0.bias': [c3],
                               f'{decoder}.projback.1.weight': [3072, c3, 1, 1], f'{decoder}.projback.1.bias': [3072]})
                continue
            for j, (wide_, c) in enumerate(((c3, c2), (c2, c1), (c1, c0))):
                block = f'{decoder}.normal_layers.{j}.0'
                shapes.update({
                    f'{block}.gamma': [c], f'{block}.dwconv.weight': [c, 1, 3, 3], f'{block}.dwconv.bias': [c],
                    f'{block}.norm.weight': [c], f'{block}.norm.bias': [c], f'{block}.pwconv1.weight': [c, c],
                    f'{block}.pwconv1.bias': [c], f'{block}.pwconv2.weight': [c, c], f'{block}.pwconv2.bias': [c],
                    f'{decoder}.proj_layers.{j}.0.weight': [c, wide_, 1, 1], f'{decoder}.proj_layers.{j}.0.bias': [c],
                    f'{decoder}.proj_layers.{j}.1.weight': [c], f'{decoder}.proj_layers.{j}.1.bias': [c]})
            shapes.update({f'{decoder}.projback.0.weight': [48, c0, 1, 1], f'{decoder}.projback.0.bias': [48]})
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def conv(shapes, name, out, in_, size, norm=False, bias=None):
    """mmcv's ConvModule, or a bare convolution: names and shapes as mmcv 1 wrote them."""
    shapes[f'{name}.conv.weight'] = [out, in_, size, size]
    if norm:
        shapes.update({f'{name}.bn.{part}': [out] for part in ('weight', 'bias', 'running_mean', 'running_var')})
        shapes[f'{name}.bn.num_batches_tracked'] = []
    else:
        shapes[f'{name}.conv.bias'] = [out]


def linear(shapes, name, *shape):
    shapes[f'{name}.weight'], shapes[f'{name}.bias'] = list(shape), [shape[0]]


def mmdet2(size='tiny', width=8, fc=16, classes=80):
    """Cascade Mask R-CNN as mmdet 2 wrote it."""
    shapes = {}
    for i, channels in enumerate(arch_of(size)['channels']):
        conv(shapes, f'neck.lateral_convs.{i}', width, channels, 1)
        conv(shapes, f'neck.fpn_convs.{i}', width, width, 3)
    linear(shapes, 'rpn_head.rpn_conv', width, width, 3, 3)
    linear(shapes, 'rpn_head.rpn_cls', 3, width, 1, 1)
    linear(shapes, 'rpn_head.rpn_reg', 12, width, 1, 1)
    for stage in range(3):
        head = f'roi_head.bbox_head.{stage}'
        linear(shapes, f'{head}.fc_cls', classes + 1, fc)
        linear(shapes, f'{head}.fc_reg', 4 * classes, fc)
        for i in range(4):
            conv(shapes, f'{head}.shared_convs.{i}', width, width, 3, norm=True)
        linear(shapes, f'{head}.shared_fcs.0', fc, width * 49)
        for i in range(4):
            conv(shapes, f'roi_head.mask_head.{stage}.convs.{i}', width, width, 3)
        linear(shapes, f'roi_head.mask_head.{stage}.upsample', width, width, 2, 2)
        linear(shapes, f'roi_head.mask_head.{stage}.conv_logits', classes, width, 1, 1)
    meta = dict(CLASSES=('person', 'bicycle'), PALETTE=[(1, 2, 3)], mmdet_version='2.25.0', epoch=36)
    return whole_model(size, 3, shapes, meta)


def mmseg0(size='tiny', kernel_size=3, width=8, classes=150):
    """UPerNet as mmseg 0.x wrote it."""
    shapes, channels = {}, arch_of(size)['channels']
    linear(shapes, 'decode_head.conv_seg', classes, width, 1, 1)
    for i in range(4):
        conv(shapes, f'decode_head.psp_modules.{i}.1', width, channels[3], 1, norm=True)
    conv(shapes, 'decode_head.bottleneck', width, channels[3] + 4 * width, 3, norm=True)
    for i in range(3):
        conv(shapes, f'decode_head.lateral_convs.{i}', width, channels[i], 1, norm=True)
        conv(shapes, f'decode_head.fpn_convs.{i}', width, width, 3, norm=True)
    conv(shapes, 'decode_head.fpn_bottleneck', width, 4 * width, 3, norm=True)
    linear(shapes, 'auxiliary_head.conv_seg', classes, width, 1, 1)
    conv(shapes, 'auxiliary_head.convs.0', width, channels[2], 3, norm=True)
    meta = dict(CLASSES=['wall', 'building'], PALETTE=[[1, 2, 3]], mmseg_version='0.20.0')
    return whole_model(size, kernel_size, shapes, meta)


def whole_model(size, kernel_size, head_shapes, meta):
    weights = {f'backbone.{name}': value for name, value in official(size, kernel_size, heads=None).items()}
    weights.update({name: torch.randn(shape).abs() if shape else torch.tensor(7) for name, shape in head_shapes.items()})
    return dict(meta=meta, state_dict=weights, optimizer=dict(state={}, param_groups=[]))


def narrow(tmp_path, name, model):
    """One of our configs at reduced width: a file that inherits it."""
    path = tmp_path / f'narrow_{name}.py'
    path.write_text(f'_base_ = {str(CONFIGS / (name + ".py"))!r}\nmodel = {model}\n')
    return str(path)


def detector_config(tmp_path, width=8, fc=16):
    arch = arch_of('tiny')
    heads = (f'[dict(head, in_channels={width}, conv_out_channels={width}, fc_out_channels={fc}) '
             'for head in _base_.model.roi_head.bbox_head]')
    return narrow(tmp_path, 'cascade_rcnn_revcol_t', (
        f'dict(backbone=dict(arch=dict(_delete_=True, **{arch})), '
        f'neck=dict(in_channels={arch["channels"]}, out_channels={width}), '
        f'rpn_head=dict(in_channels={width}, feat_channels={width}), roi_head=dict(bbox_head={heads}, '
        f'mask_head=dict(in_channels={width}, conv_out_channels={width})))'))


def segmentor_config(tmp_path, name='upernet_revcol_t', size='tiny', width=8):
    channels = arch_of(size)['channels']
    return narrow(tmp_path, name, dict(
        backbone=dict(arch=dict(arch_of(size), _delete_=True)), decode_head=dict(in_channels=channels, channels=width),
        auxiliary_head=dict(in_channels=channels[2], channels=width)))


def classifier_config(tmp_path, name='revcol_t_in1k', size='tiny', single=False):
    channels = arch_of(size)['channels']
    return narrow(tmp_path, name, dict(backbone=dict(arch=dict(arch_of(size), _delete_=True)),
                                       head=dict(in_channels=channels[3] if single else channels)))


def load_strictly(config, path):
    """Into the model of the config, as mmengine does; raises if a name or a shape differs."""
    config = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    load_checkpoint(model, str(path), strict=True)
    return model


def save(contents, path):
    torch.save(contents, path)
    return str(path)


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


CLASSIFIERS = {
    'tiny 1K': (dict(size='tiny', heads='supervised'), 'revcol_t_in1k', False),
    'tiny 1K, plain model': (dict(size='tiny', heads='supervised'), 'revcol_t_in1k_no_supervision', True),
    'base 22K': (dict(size='base', heads='supervised', num_classes=21841), 'revcol_b_in22k', False),
    'base 1K, fine-tuned': (dict(size='base'), 'revcol_b_in1k_384_ft', True),
    'huge 1K, fine-tuned': (dict(size='huge'), 'revcol_h_in1k_640_ft', True),
}


@pytest.mark.parametrize('kind', mostly_slow(CLASSIFIERS, list(CLASSIFIERS)[:2]))
def test_released_classifiers_load_strictly(tmp_path, capsys, kind):
    arguments, name, single = CLASSIFIERS[kind]
    weights = official(**arguments)
    path = save(dict(model=weights), tmp_path / 'released.pth')
    config = classifier_config(tmp_path, name, arguments['size'], single)
    import_main([path, '--config', config])
    printed = capsys.readouterr().out
    assert 'classification' in printed and f'classes:     {arguments.get("num_classes", 1000)}' in printed
    model = load_strictly(config, tmp_path / 'released_mm.pth')
    assert torch.equal(model.backbone.state_dict()['subnet3.level1.blocks.0.dwconv.weight'],
                       weights['subnet3.level1.blocks.0.dwconv.weight'])
    last = weights['cls.classifier.1.weight' if 'cls.classifier.1.weight' in weights else 'cls_blocks.3.classifier.1.weight']
    ours = model.head.cls if single else model.head.cls_blocks[3]
    assert torch.equal(ours.classifier[1].weight, last)
    assert ('with intermediate supervision' in printed) != single
    # 1 of 4 classifiers is kept, of 4 weights each; a decoder has 3 stages of 4 + 9 weights, and 2 more
    assert ('dropped:     135 (12 of cls_blocks, 123 of decoder_blocks)' in printed) == ('plain' in kind)


def test_cascade_mask_rcnn_of_mmdet_2_loads_strictly(tmp_path, capsys):
    contents = mmdet2()
    import_main([save(contents, tmp_path / 'det.pth'), '--config', detector_config(tmp_path)])
    printed = capsys.readouterr().out
    assert 'detection' in printed and 'classes:     80' in printed and 'mapped:      0' in printed
    model = load_strictly(detector_config(tmp_path), tmp_path / 'det_mm.pth')
    for name, value in contents['state_dict'].items():
        assert torch.equal(model.state_dict()[name], value)
    # where the current inferencers look for the classes
    assert read_checkpoint(str(tmp_path / 'det_mm.pth'))['meta']['dataset_meta'] == dict(
        classes=('person', 'bicycle'), palette=[(1, 2, 3)])


@pytest.mark.parametrize('size, kernel_size, name', mostly_slow(
    [('tiny', 3, 'upernet_revcol_t'), ('huge', 7, 'upernet_revcol_h')], ['tiny']))
def test_upernet_of_mmseg_0_loads_strictly(tmp_path, capsys, size, kernel_size, name):
    contents = mmseg0(size, kernel_size)
    config = segmentor_config(tmp_path, name, size)
    import_main([save(contents, tmp_path / 'seg.pth'), '--config', config])
    printed = capsys.readouterr().out
    assert 'segmentation' in printed and f'kernel size: {kernel_size}' in printed and 'classes:     150' in printed
    model = load_strictly(config, tmp_path / 'seg_mm.pth')
    for name, value in contents['state_dict'].items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize('size', ['tiny', 'base'])
def test_files_of_the_full_size_are_recognised(size):
    weights = {name: torch.zeros(()).expand(shape) for name, shape in SHAPES[size].items()}
    converted, report = import_checkpoint(dict(model=weights))
    assert (report.task, report.num_classes) == ('classification', 1000)
    assert (report.backbone.arch, report.backbone.kernel_size) == (size, 3)
    assert len(converted['state_dict']) == len(weights) and not report.dropped


RELEASED = {
    'single': lambda: dict(model=official('tiny')),
    'supervised': lambda: dict(model=official('small', heads='supervised')),
    'half': lambda: dict(model=official('tiny', dtype=torch.float16)),
    'bfloat16': lambda: dict(model=official('tiny', dtype=torch.bfloat16)),
    'module.': lambda: dict(model={f'module.{name}': value for name, value in official('tiny').items()}),
    'bare': lambda: official('tiny'),
    'no heads': lambda: dict(model=official('tiny', heads=None)),
    'mmdet 2': mmdet2,
    'mmseg 0.x': mmseg0,
}


@pytest.mark.parametrize('kind', RELEASED)
def test_the_round_trip_is_exact(tmp_path, kind):
    contents = RELEASED[kind]()
    wrapping = next((key for key in ('state_dict', 'model') if key in contents), None)
    import_main([save(contents, tmp_path / 'a.pth'), '--out', str(tmp_path / 'b.pth')])
    import_main([str(tmp_path / 'b.pth'), '--to-official', '--out', str(tmp_path / 'c.pth')])
    back = read_checkpoint(str(tmp_path / 'c.pth'))
    before, after = (contents[wrapping], back[wrapping]) if wrapping else (contents, back)
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value)


def test_averaged_weights_on_request(tmp_path, capsys):
    weights, average = official('tiny'), {name: value + 1 for name, value in official('tiny').items()}
    path = save(dict(model=weights, state_dict_ema=average, optimizer={}, epoch=3), tmp_path / 'train.pth')
    import_main([path, '--ema'])
    converted = read_checkpoint(str(tmp_path / 'train_mm.pth'))['state_dict']
    assert torch.equal(converted['backbone.stem.0.bias'], average['stem.0.bias'])
    with pytest.raises(SystemExit, match='holds no averaged weights'):
        import_main([save(dict(model=weights), tmp_path / 'plain.pth'), '--ema'])


def test_buffers_of_mmcv_1s_averages_are_dropped_and_reported():
    contents = mmseg0()
    contents['state_dict'].update({f'ema_{name.replace(".", "_")}': value for name, value in contents['state_dict'].items()})
    converted, report = import_checkpoint(contents)
    assert len(report.dropped) == len(converted['state_dict']) == report.kept


def test_tensors_that_share_memory_come_through_in_both_formats(tmp_path):
    weights = official('tiny')
    weights['subnet1.level0.blocks.0.gamma'] = weights['subnet0.level0.blocks.0.gamma']
    path = save(dict(model=weights), tmp_path / 'tied.pth')
    import_main([path])
    import_main([path, '--out', str(tmp_path / 'tied.safetensors')])
    one, two = (read_checkpoint(str(tmp_path / name)) for name in ('tied_mm.pth', 'tied.safetensors'))
    keys = [f'backbone.subnet{column}.level0.blocks.0.gamma' for column in (0, 1)]
    assert one['state_dict'][keys[0]].data_ptr() == one['state_dict'][keys[1]].data_ptr()
    assert {name: value.tolist() for name, value in two.items()} == {
        name: value.tolist() for name, value in one['state_dict'].items()}


# What does not fit


def remove(*parts):
    return lambda weights: [weights.pop(name) for name in list(weights) if any(part in name for part in parts)]


def spoil(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize('change, sentence', [
    (remove('.level3.'), r'no blocks of the levels \[3\]'),
    (remove('subnet2.'), 'its columns must have the numbers 0, 1, … without gaps, but have 0, 1, 3'),
    (remove('subnet1.alpha'), '4 weights are missing: subnet1.alpha0'),
    (spoil('subnet9.alpha0', torch.zeros(1)), 'its columns must have .*, but have 0, 1, 2, 3, 9'),
    (spoil('cls.classifier.1.bias', torch.zeros(1000, dtype=torch.int8)), r'cls.classifier.1.bias \(torch.int8\)'),
    (spoil('cls.classifier.1.bias', torch.zeros(1000).to_sparse()), 'cls.classifier.1.bias .*sparse_coo'),
    (spoil(7, torch.zeros(1)), 'names of weights must be strings, but got 7'),
    (spoil('subnet1.level0.blocks.0.dwconv.weight', torch.zeros(4, 1, 5, 5)), 'kernels of mixed sizes'),
    (spoil('subnet1.alpha1', torch.full((1, 8, 1, 1), float('nan'))), 'NaN or infinite values: subnet1.alpha1'),
    (spoil('subnet1.alpha1', torch.zeros(1, 9, 1, 1)), '1 weights have another shape: subnet1.alpha1'),
    (spoil('extra.weight', torch.zeros(1)), 'of no known kind: .* the file holds extra.weight'),
    (remove('subnet'), 'holds no RevCol'),
    (remove('cls.classifier.1.bias'), 'does not fit .*: 1 weights are missing: head.cls.classifier.1.bias'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_spoilt_files_are_refused_by_name(tmp_path, change, sentence):
    weights = official('tiny')
    change(weights)
    path = save(dict(model=weights), tmp_path / 'released.pth')
    before = sha(path)
    config = classifier_config(tmp_path, 'revcol_t_in1k_no_supervision', single=True)
    with pytest.raises(SystemExit, match=f'error: .*released.pth.*{sentence}'):
        import_main([path, '--config', config])
    assert sha(path) == before and not (tmp_path / 'released_mm.pth').exists()


def test_a_config_that_does_not_fit_is_refused_with_the_names(tmp_path):
    plain = classifier_config(tmp_path, 'revcol_t_in1k_no_supervision', single=True)
    for weights, sentence in (
            (official('small'), 'have no place in the model: backbone.subnet4.alpha0'),
            (official('tiny', kernel_size=7), r'level0.blocks.0.dwconv.weight \(4, 1, 7, 7\) instead of \(4, 1, 3, 3\)'),
            (official('tiny', num_classes=10), r'head.cls.classifier.1.weight \(10, 32\) instead of \(1000, 32\)')):
        with pytest.raises(SystemExit, match=sentence):
            import_main([save(dict(model=weights), tmp_path / 'released.pth'), '--config', plain])
    with pytest.raises(SystemExit, match='weights are missing: neck.lateral_convs'):
        import_main([save(dict(model=official('tiny', heads=None)), tmp_path / 'r.pth'), '--config', detector_config(tmp_path)])


@pytest.mark.parametrize('text, sentence', [
    (None, 'there is no config .*config.py'), ('model = dict(', 'config.py is not a valid config: SyntaxError'),
    ('a = 1', 'config.py must define a model, but has none'),
    ("model = dict(type='Nothing')", 'the model of .*config.py cannot be built: KeyError: .*Nothing'),
    ("default_scope = 'mmpretrain'\nmodel = dict(type='ImageClassifier', backbone=dict(type='RevCol'), "
     "head=dict(type='LinearClsHead'))", 'the model of .*config.py cannot be built: TypeError: .*num_classes'),
], ids=['absent', 'syntax', 'no model', 'unknown type', 'missing argument'])
def test_a_config_that_is_none_gets_a_sentence(tmp_path, text, sentence):
    path = save(dict(model=official('tiny')), tmp_path / 'r.pth')
    if text:
        (tmp_path / 'config.py').write_text(text)
    with pytest.raises(SystemExit, match=f'error: {sentence}|error: .*{sentence}'):
        import_main([path, '--config', str(tmp_path / 'config.py')])
    assert not (tmp_path / 'r_mm.pth').exists()


def test_our_configs_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(dict(model=official('tiny')), tmp_path / 'r.pth')
    with pytest.raises(SystemExit, match='r.pth does not fit .*revcol_t_in1k_no_supervision.py: .* have another shape: '):
        import_main([path, '--config', 'revcol_t_in1k_no_supervision'])


@pytest.mark.parametrize('contents, sentence', [
    (dict(meta=5), "its 'meta' must be a dict, but is of type int"),
    (dict(meta=dict(dataset_meta=5)), "'dataset_meta' of its 'meta' must be a dict, but is of type int"),
    (dict(meta=dict(revcol_mm=5)), "'revcol_mm' of its 'meta' must be what an import writes, but is 5"),
    (dict(meta=dict(revcol_mm=dict(wrapping=[]))), "'revcol_mm' of its 'meta' must be what an import writes, but is {")])
def test_a_meta_of_another_form_gets_a_sentence(tmp_path, contents, sentence):
    path = save(dict(contents, state_dict=mmseg0()['state_dict']), tmp_path / 'seg.pth')
    ways = [(import_main, [path]), (publish_main, [path])] if 'revcol_mm' not in sentence else []
    ways += [(import_main, [path, '--to-official'])] if 'dataset_meta' not in sentence else []
    for main, arguments in ways:
        with pytest.raises(SystemExit, match=f'error: .*seg.pth: {sentence}'):
            main(arguments)
    assert os.listdir(tmp_path) == ['seg.pth']


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_the_authors_names_are_not_turned_into_themselves(tmp_path, prefix):
    path = save(dict(model={prefix + name: value for name, value in official('tiny').items()}), tmp_path / 'r.pth')
    with pytest.raises(SystemExit, match="r.pth must hold names with 'backbone.', but its names are the authors' already"):
        import_main([path, '--to-official'])
    assert os.listdir(tmp_path) == ['r.pth']


def test_what_else_is_left_out_is_reported(tmp_path, capsys):
    weights = official('tiny')
    path = save(dict(model=weights, state_dict_ema=weights, optimizer={}, epoch=3), tmp_path / 'train.pth')
    import_main([path, '--dry-run'])
    assert 'dropped:     0; state_dict_ema (averaged weights: ema takes them); optimizer; epoch\n' in capsys.readouterr().out
    import_main([path, '--dry-run', '--ema'])
    assert 'dropped:     0; model; optimizer; epoch\n' in capsys.readouterr().out
    import_main([save(dict(weights, epoch=3), tmp_path / 'bare.pth'), '--dry-run'])
    assert 'dropped:     0; epoch\n' in capsys.readouterr().out


def test_outputs_are_never_replaced_unasked_and_a_dry_run_writes_nothing(tmp_path):
    path = save(dict(model=official('tiny')), tmp_path / 'r.pth')
    import_main([path, '--dry-run'])
    assert os.listdir(tmp_path) == ['r.pth']
    (tmp_path / 'r_mm.pth').write_text('precious')
    with pytest.raises(SystemExit, match='r_mm.pth exists already: .* replace it with force'):
        import_main([path])
    with pytest.raises(SystemExit, match='must not be the input'):
        import_main([path, '--out', path, '--force'])
    assert (tmp_path / 'r_mm.pth').read_text() == 'precious'
    import_main([path, '--force'])
    assert 'state_dict' in read_checkpoint(str(tmp_path / 'r_mm.pth'))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_import_and_export_are_inverse(data):
    arch = dict(channels=data.draw(st.lists(st.integers(1, 4), min_size=4, max_size=4)),
                depths=data.draw(st.lists(st.integers(1, 2), min_size=4, max_size=4)),
                num_columns=data.draw(st.integers(1, 3)), deep_to_shallow=data.draw(st.booleans()))
    kernel_size = data.draw(st.sampled_from([1, 3, 7]))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    heads = data.draw(st.sets(st.sampled_from(['cls.classifier.1.weight', 'cls_blocks.3.classifier.1.weight',
                                               'decoder_blocks.0.projback.0.weight'])))
    prefix = data.draw(st.sampled_from(['', 'module.']))
    wrapping = data.draw(st.sampled_from([None, 'model', 'state_dict']))
    weights = {**RevCol(arch, kernel_size=kernel_size).state_dict(), **{name: torch.ones(2, 3) for name in heads}}
    names = data.draw(st.permutations(list(weights))) if data.draw(st.booleans()) else list(weights)
    weights = {prefix + name: weights[name].to(dtype) for name in names}

    converted, report = import_checkpoint({wrapping: weights} if wrapping else weights)
    assert report.backbone.kernel_size == kernel_size and len(converted['state_dict']) == len(weights)
    assert all(name.startswith(('backbone.', 'head.')) for name in converted['state_dict'])
    back = export_official(converted)
    back = back[wrapping] if wrapping else back
    assert list(back) == list(weights)
    assert all(value is weights[name] for name, value in back.items())


# Publishing


def test_publishing_strips_names_and_describes(tmp_path, capsys):
    contents = mmdet2()
    contents.update(message_hub=dict(log_scalars={}), param_schedulers=[dict(last_step=3)],
                    ema_state_dict={f'module.{name}': value for name, value in contents['state_dict'].items()})
    path = save(contents, tmp_path / 'epoch_36.pth')
    before = sha(path)
    publish_main([path, '--out', str(tmp_path / 'detector.pth')])
    published, = tmp_path.glob('detector-*.pth')
    assert published.stem == f'detector-{sha(published)[:8]}'
    written = read_checkpoint(str(published))
    assert set(written) == {'meta', 'state_dict'} and written['meta']['epoch'] == 36
    assert {name: value.tolist() for name, value in written['state_dict'].items()} == {
        name: value.tolist() for name, value in contents['state_dict'].items()}
    load_strictly(detector_config(tmp_path), published)
    description = json.loads(published.with_suffix('.json').read_text())
    assert description['sha256'] == sha(published) and description['file'] == published.name
    assert (description['task'], description['num_classes'], description['kernel_size']) == ('detection', 80, 3)
    assert description['classes'] == ['person', 'bicycle'] and description['trained'] == dict(epoch=36)
    assert description['backbone_parameters'] == sum(
        value.numel() for name, value in contents['state_dict'].items() if name.startswith('backbone.'))
    assert sha(path) == before and str(published) in capsys.readouterr().out


def test_publishing_the_same_weights_gives_the_same_name(tmp_path):
    paths = []
    for name in 'ab':
        (tmp_path / name).mkdir()
        paths.append(publish_checkpoint(save(mmseg0(), tmp_path / f'{name}.pth'), str(tmp_path / name / 'w.pth')))
    assert Path(paths[0][0]).name == Path(paths[1][0]).name and sha(paths[0][0]) == sha(paths[1][0])


def test_publishing_into_a_folder_keeps_the_name(tmp_path):
    source = save(mmseg0(), tmp_path / 'seg.ckpt')
    (tmp_path / 'published').mkdir()
    for folder in ('published', 'published/'):
        path, sidecar, _ = publish_checkpoint(source, str(tmp_path / folder), force=True)
        assert sorted(os.listdir(tmp_path / 'published')) == sorted(map(os.path.basename, (path, sidecar)))
        assert Path(path).name.startswith('seg-') and path.endswith('.pth')
    with pytest.raises(CheckpointError, match='the output folder .*/none does not exist'):
        publish_checkpoint(source, str(tmp_path / 'none') + os.sep)


def test_publishing_as_safetensors(tmp_path):
    path, sidecar, description = publish_checkpoint(save(mmseg0(), tmp_path / 'seg.pth'), str(tmp_path / 'seg.safetensors'))
    assert path.endswith('.safetensors') and sidecar.endswith('.json') and description['num_classes'] == 150
    load_strictly(segmentor_config(tmp_path), path)


@pytest.mark.parametrize('backbone', [
    RevColViT(dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=2, num_columns=2), img_size=32),
    RevColC2f(dict(channels=(4, 6, 8, 10), depths=(1, 1, 1, 1), num_columns=2)), HRNetColumns(small_arch(2)),
    RevNetConvNeXt(dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1)))], ids=lambda value: type(value).__name__)
def test_models_with_our_other_backbones_are_published_with_less_of_a_description(tmp_path, backbone):
    weights = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    weights['head.cls.classifier.1.weight'] = torch.ones(5, 8)
    contents = dict(state_dict=weights, optimizer={}, meta=dict(epoch=2, dataset_meta=dict(classes=tuple('abcde'))))
    path, _, description = publish_checkpoint(save(contents, tmp_path / 'run.pth'), str(tmp_path / 'other.pth'))
    published = read_checkpoint(path)
    assert set(published) == {'meta', 'state_dict'} and list(published['state_dict']) == list(weights)
    assert published['meta'] == contents['meta']
    assert (description['task'], description['num_classes'], description['trained']) == ('classification', 5, dict(epoch=2))
    assert description['classes'] == list('abcde') and 'arch' not in description and 'kernel_size' not in description
    assert description['backbone_parameters'] == sum(parameter.numel() for parameter in backbone.parameters())
    weights['backbone.stem.0.weight'] = torch.full((8, 3, 4, 4), float('nan'))
    with pytest.raises(CheckpointError, match='NaN or infinite values: backbone.stem.0.weight'):
        publish_checkpoint(save(contents, tmp_path / 'run.pth'))


def test_a_folded_model_with_hrnets_paths_is_not_published(tmp_path):
    backbone = HRNetColumns(small_arch(2))
    backbone.switch_to_deploy()
    weights = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match='run.pth holds a folded network of columns .*inference only'):
        publish_checkpoint(save(dict(state_dict=weights, meta={}), tmp_path / 'run.pth'))


def test_columns_with_hrnets_paths_are_not_taken_for_revcols():
    with pytest.raises(CheckpointError, match="x.pth must hold a RevCol, but its columns are not RevCol's: they are"):
        pad_checkpoint(HRNetColumns(small_arch(2)).state_dict(), 7, filename='x.pth')


def test_publishing_writes_two_formats_and_no_other(tmp_path):
    path = save(mmseg0(), tmp_path / 'seg.ckpt')
    with pytest.raises(SystemExit, match='pub.txt must end in .pth or .safetensors, but ends in .txt'):
        publish_main([path, '--out', str(tmp_path / 'pub.txt')])
    assert os.listdir(tmp_path) == ['seg.ckpt']
    assert publish_checkpoint(path)[0].endswith('.pth')


def test_publishing_refuses_with_a_sentence_and_leaves_nothing(tmp_path):
    contents = mmseg0()
    contents['state_dict']['decode_head.conv_seg.bias'][3] = float('inf')
    path = save(contents, tmp_path / 'seg.pth')
    with pytest.raises(SystemExit, match='seg.pth: 1 weights hold NaN or infinite values: decode_head.conv_seg.bias'):
        publish_main([path])
    with pytest.raises(SystemExit, match='output folder .* does not exist'):
        publish_main([save(mmseg0(), path), '--out', str(tmp_path / 'absent' / 'x.pth')])
    with pytest.raises(SystemExit, match='does not exist'):
        publish_main([str(tmp_path / 'absent.pth')])
    assert os.listdir(tmp_path) == ['seg.pth']
    publish_main([path])
    with pytest.raises(SystemExit, match='exists already: .* replace it with force'):
        publish_main([path])


def test_the_errors_of_the_library_name_the_file():
    with pytest.raises(CheckpointError, match='my.pth holds no weights'):
        import_checkpoint({'model': 3}, filename='my.pth')


@pytest.mark.parametrize('kind', RELEASED)
def test_what_is_converted_while_it_is_loaded_is_what_an_import_writes(tmp_path, kind):
    contents = RELEASED[kind]()
    assert is_official(contents)
    imported = import_checkpoint(contents)[0]
    current = to_current_names(contents, 'x.pth')
    assert list(current['state_dict']) == list(imported['state_dict'])
    assert all(current['state_dict'][name] is value for name, value in imported['state_dict'].items())
    assert current['meta'] == {key: value for key, value in imported['meta'].items() if key != 'revcol_mm'}
    for own in (current, imported, imported['state_dict']):  # and no file is converted twice
        assert not is_official(own) and to_current_names(own, 'x.pth') is own


def test_a_backbone_of_this_package_and_other_networks_are_not_converted():
    backbone = official('tiny', heads=None)
    for own in (backbone, dict(state_dict=backbone), dict(model={'conv.weight': torch.zeros(1)}), [1], {},
                dict(meta=dict(CLASSES=('a', )), state_dict={'backbone.conv1.weight': torch.zeros(1)})):
        assert to_current_names(own, 'x.pth') is own
