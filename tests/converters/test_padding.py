# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Kernel padding: the same network with larger kernels, in whatever kind of file it lies."""
import copy
import hashlib
import json
import os
import resource
import signal
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from revcol_mm.checkpoint import CheckpointError, files, load_pretrained, pad_checkpoint, read_checkpoint
from revcol_mm.models import RevCol
from tests.common import load_tool

NANO = dict(channels=[4, 6, 8, 10], depths=[1, 1, 1, 1], num_columns=2)
pad_kernels = load_tool('pad_kernels')


def revcol(kernel_size=3, seed=0):
    """LayerScale 1 instead of 1e-6, so that the blocks matter as they do in a trained network."""
    torch.manual_seed(seed)
    return RevCol(NANO, kernel_size=kernel_size, layer_scale_init_value=1.).eval()


def kernels(weights):
    return {key: value for key, value in weights.items() if 'subnet' in key and key.endswith('dwconv.weight')}


def centre(kernel, size=3):
    start = (kernel.shape[-1] - size) // 2
    return kernel[..., start:start + size, start:start + size]


def border(kernel, size=3):
    outside = torch.ones(kernel.shape, dtype=torch.bool)
    centre(outside, size).fill_(False)
    return kernel[outside]


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'ckpt.pth'
    torch.save(dict(model=revcol().state_dict()), path)
    return path


WRAPPINGS = {
    'bare': lambda weights: weights,
    'module': lambda weights: {f'module.{key}': value for key, value in weights.items()},
    'model': lambda weights: dict(model=weights, epoch=3),
    'state_dict': lambda weights: dict(meta=dict(epoch=1), state_dict=weights),
    'detector': lambda weights: dict(state_dict=OrderedDict(
        **{f'backbone.{key}': value for key, value in weights.items()}, **{'neck.dwconv.weight': torch.ones(4, 1, 3, 3)})),
    'module.backbone': lambda weights: dict(state_dict={f'module.backbone.{key}': value for key, value in weights.items()}),
    'classifier': lambda weights: dict(model={
        **weights, 'decoder_blocks.0.proj_layers.0.3.dwconv.weight': torch.ones(4, 1, 3, 3),
        'cls.classifier.1.bias': torch.ones(3)}),
}


def weights_in(contents):
    return next((contents[key] for key in ('state_dict', 'model') if key in contents), contents)


@pytest.mark.parametrize('wrap', WRAPPINGS.values(), ids=WRAPPINGS.keys())
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_only_the_kernels_of_the_backbone_change(tmp_path, wrap, dtype):
    before = wrap({key: value.to(dtype) for key, value in revcol().state_dict().items()})
    torch.save(before, tmp_path / 'ckpt.pth')
    pad_kernels.main([str(tmp_path / 'ckpt.pth'), '--size', '7'])
    after = read_checkpoint(str(tmp_path / 'ckpt_k7.pth'))

    assert list(after) == list(before)
    assert after.get('meta') == before.get('meta') and after.get('epoch') == before.get('epoch')
    before, after = weights_in(before), weights_in(after)
    assert list(after) == list(before)
    assert len(kernels(before)) == 8
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        if key in kernels(before):
            assert after[key].shape == (*value.shape[:2], 7, 7)
            assert torch.equal(centre(after[key]), value)
        else:
            assert torch.equal(after[key], value)


@pytest.mark.parametrize('size', [5, 7, 11, 13])
def test_the_network_computes_the_same(checkpoint, size):
    """To 1e-5 of the largest feature: what a border of 1e-7 can do to sums of at most 13² terms, through two columns."""
    pad_kernels.main([str(checkpoint), '--size', str(size)])
    padded = revcol(size, seed=1)
    load_pretrained(padded, str(checkpoint).replace('.pth', f'_k{size}.pth'))
    image = torch.randn(1, 3, 70, 65)
    with torch.no_grad():
        for before, after in zip(revcol()(image), padded(image)):
            assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize('std', [1e-7, 1e-3])
def test_the_border_is_drawn_from_the_normal_distribution(std):
    weights = {f'subnet0.level{level}.blocks.0.dwconv.weight': torch.ones(width, 1, 3, 3)
               for level, width in enumerate((64, 128, 256, 512))}
    model = RevCol(dict(channels=(64, 128, 256, 512), depths=(1, 1, 1, 1), num_columns=1)).state_dict()
    padded, _ = pad_checkpoint({**model, **weights}, 7, std)
    drawn = torch.cat([border(kernel) for kernel in kernels(padded).values()]).double() / std  # 38,400 numbers
    # Five standard errors of the mean, of the deviation, and of the share within one deviation.
    assert abs(drawn.mean()) < 5 / len(drawn)**0.5
    assert abs(drawn.std() - 1) < 5 / (2 * len(drawn))**0.5
    assert abs((drawn.abs() < 1).double().mean() - 0.6827) < 5 * (0.6827 * 0.3173 / len(drawn))**0.5
    assert len(drawn.unique()) > 0.99 * len(drawn)


def test_half_precision_rounds_the_border_to_its_smallest_step():
    """float16 has steps of 2^-24 there, which add step²/12 to the variance: 1.5 % to the deviation; a quarter becomes 0."""
    model = RevCol(dict(channels=(64, 128, 256, 512), depths=(1, 1, 1, 1), num_columns=1)).half().state_dict()
    padded, report = pad_checkpoint(model, 7)
    drawn = torch.cat([border(kernel) for kernel in kernels(padded).values()])
    assert drawn.dtype == torch.float16
    steps = drawn.double() * 2**24
    assert torch.equal(steps, steps.round())
    assert abs(drawn.double().std() / 1.0147e-7 - 1) < 0.02
    assert 0.2 < (drawn == 0).double().mean() < 0.3
    assert any('float16' in note for note in report.notes)


def test_the_same_seed_gives_the_same_bytes_under_any_name(checkpoint, tmp_path):
    for name, seed in (('a.pth', 3), ('another-name.pth', 3), ('c.pth', 4)):
        pad_kernels.main([str(checkpoint), '--size', '5', '--seed', str(seed), '--out', str(tmp_path / name)])
    assert sha(tmp_path / 'a.pth') == sha(tmp_path / 'another-name.pth') != sha(tmp_path / 'c.pth')


def test_the_padded_network_trains(checkpoint):
    pad_kernels.main([str(checkpoint), '--size', '7'])
    model = revcol(7).train()
    load_pretrained(model, str(checkpoint).replace('.pth', '_k7.pth'))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image, losses = torch.randn(2, 3, 64, 64), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(sum(((feature - 1)**2).mean() for feature in model(image)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    # Adam moves every weight that has a gradient by about 1e-3 per step, far from the 1e-7 it started at.
    assert border(model.subnet0.level0.blocks[0].dwconv.weight).abs().median() > 1e-4


def test_padding_twice_is_padding_once_for_the_centre():
    model = revcol().state_dict()
    once, _ = pad_checkpoint(model, 5)
    twice, _ = pad_checkpoint(once, 9)
    for key, kernel in kernels(twice).items():
        assert torch.equal(centre(kernel, 5), once[key]) and torch.equal(centre(kernel), model[key])


def test_kernels_that_share_memory_go_on_sharing_it(tmp_path):
    weights = revcol().state_dict()
    keys = [f'subnet{column}.level0.blocks.0.dwconv.weight' for column in (0, 1)]
    weights[keys[1]] = weights[keys[0]]
    torch.save(weights, tmp_path / 'tied.pth')
    pad_kernels.main([str(tmp_path / 'tied.pth'), '--size', '5'])
    tied = [read_checkpoint(str(tmp_path / 'tied_k5.pth'))[key] for key in keys]
    assert torch.equal(*tied)
    both = read_checkpoint(str(tmp_path / 'tied_k5.pth'))
    assert both[keys[0]].data_ptr() == both[keys[1]].data_ptr()


def test_safetensors_in_and_out(tmp_path):
    from safetensors.torch import load_file, save_file
    weights = revcol().state_dict()
    save_file(weights, tmp_path / 'w.safetensors')
    pad_kernels.main([str(tmp_path / 'w.safetensors'), '--size', '5'])
    expected, _ = pad_checkpoint(weights, 5)
    after = load_file(tmp_path / 'w_k5.safetensors')
    # A safetensors file has its own order, and the border is drawn in the order of the file.
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in expected.items()}
    assert all(torch.equal(centre(after[key]), value) for key, value in kernels(weights).items())


def test_several_sizes_a_report_and_a_dry_run(checkpoint, tmp_path, capsys):
    report = tmp_path / 'report.json'
    pad_kernels.main([str(checkpoint), '--size', '5', '7', '--dry-run'])
    assert 'dry run' in capsys.readouterr().out and os.listdir(tmp_path) == ['ckpt.pth']
    pad_kernels.main([str(checkpoint), '--size', '5', '7', '--out', str(tmp_path / 'to-{size}.pth'), '--report', str(report)])
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pth', 'report.json', 'to-5.pth', 'to-7.pth']
    printed = capsys.readouterr().out
    for size in (5, 7):
        assert f'3×3 → {size}×{size}' in printed and f'kernel_size={size}' in printed
        entry = json.loads(report.read_text())[str(tmp_path / f'to-{size}.pth')]
        assert entry['size'] == size and sorted(entry['kernels']['model']) == sorted(kernels(revcol().state_dict()))


@pytest.mark.parametrize('arguments', [
    ['ckpt.pth', '--size', '7', '5'], ['--size', '7', '5', 'ckpt.pth'], ['--size', '7', '5', '--seed', '1', 'ckpt.pth'],
    ['--seed', '1', 'ckpt.pth', '--size', '7', '5'], ['--size', '7', '5', 'ckpt.pth', '--seed', '1'], ], ids=' '.join)
def test_options_and_the_checkpoint_come_in_any_order(arguments):
    args = pad_kernels.parse_args(arguments)
    assert (args.checkpoint, args.size) == ('ckpt.pth', [7, 5])


@pytest.mark.parametrize('arguments, sentence', [
    (['--size', '7'], 'a checkpoint and at least one kernel size'),
    (['--size', 'ckpt.pth'], 'a checkpoint and at least one kernel size'),
    (['ckpt.pth', '--size', 'seven'], 'must be an integer, but got seven'), (['ckpt.pth'], '--size')], ids=str)
def test_a_missing_or_wrong_size_is_a_matter_of_usage(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as usage:
        pad_kernels.parse_args(arguments)
    assert usage.value.code == 2
    assert sentence in capsys.readouterr().err


# Training checkpoints


class Model(BaseModel):

    def __init__(self, kernel_size=3, neck=False):
        super().__init__()
        self.backbone = revcol(kernel_size)
        self.neck = nn.Conv2d(4, 4, 3, padding=1, groups=4) if neck else nn.Identity()

    def forward(self, inputs, data_samples=None, mode='loss'):
        features = self.backbone(torch.stack(list(inputs)))
        return dict(loss=sum((feature**2).mean() for feature in (self.neck(features[0]), *features[1:])))


class Images(torch.utils.data.Dataset):
    metainfo = dict()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 32, 32), float(index)))


def train(work_dir, kernel_size=3, epochs=1, optimizer=dict(type='AdamW', lr=1e-3), neck=False, layer_decay=False, **settings):
    wrapper = dict(optimizer=optimizer)
    if layer_decay:
        wrapper.update(constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.9))
    torch.manual_seed(0)
    run = Runner(
        model=Model(kernel_size, neck), work_dir=str(work_dir), train_cfg=dict(by_epoch=True, max_epochs=epochs),
        train_dataloader=dict(dataset=Images(), batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False),
                              collate_fn=dict(type='pseudo_collate'), num_workers=0),
        optim_wrapper=wrapper, default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[EMAHook(momentum=0.1)], default_scope='mmengine', log_level='WARNING',
        experiment_name=f'padding-{work_dir.name}-{kernel_size}-{epochs}', **settings)
    run.train()
    return run


@pytest.mark.parametrize('settings_', [
    dict(), dict(layer_decay=True), dict(layer_decay=True, neck=True), dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))],
    ids=['AdamW', 'layer decay', 'layer decay, other kernels', 'SGD'])
def test_training_resumes_with_larger_kernels(tmp_path, settings_):
    train(tmp_path / 'run', **settings_)
    before = read_checkpoint(str(tmp_path / 'run' / 'epoch_1.pth'))
    pad_kernels.main([str(tmp_path / 'run' / 'epoch_1.pth'), '--size', '5'])
    after = read_checkpoint(str(tmp_path / 'run' / 'epoch_1_k5.pth'))

    padded = 0
    for index, moments in before['optimizer']['state'].items():
        for name, moment in moments.items():
            other = after['optimizer']['state'][index][name]
            if isinstance(moment, torch.Tensor) and moment.shape != other.shape:
                padded += 1
                assert torch.equal(centre(other), moment) and not border(other).any()
            else:
                assert torch.equal(torch.as_tensor(moment), torch.as_tensor(other))
    assert padded == 8 * (1 if 'optimizer' in settings_ else 2)

    ema = {key[len('module.'):]: value for key, value in kernels(after['ema_state_dict']).items()}
    for key, kernel in kernels(after['state_dict']).items():
        assert torch.equal(border(ema[key]), border(kernel))  # the average of a border is the border
        assert torch.equal(centre(ema[key]), before['ema_state_dict'][f'module.{key}'])

    resumed = train(tmp_path / 'resumed', 5, 2, load_from=str(tmp_path / 'run' / 'epoch_1_k5.pth'), resume=True, **settings_)
    assert resumed.epoch == 2 and resumed.iter == 4


def test_the_next_step_moves_the_centre_as_without_padding():
    """With a border of zeros the gradients of the centre are the same, so what the moments do to it must be, too.

    In float64, because Adam divides by the root of the second moment, which magnifies rounding.
    """
    models = {3: revcol().double().train(), 5: revcol(5).double().train()}
    optimizer = torch.optim.AdamW(models[3].parameters(), lr=1e-3)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def step(model, optimizer):
        optimizer.zero_grad()
        sum((feature**2).mean() for feature in model(image)).backward()
        optimizer.step()

    for _ in range(3):
        step(models[3], optimizer)
    padded, report = pad_checkpoint(dict(model=models[3].state_dict(), optimizer=optimizer.state_dict()), 5, std=0.)
    assert report.moments == 16
    models[5].load_state_dict(padded['model'])
    larger = torch.optim.AdamW(models[5].parameters(), lr=1e-3)
    larger.load_state_dict(copy.deepcopy(padded['optimizer']))
    step(models[3], optimizer)
    step(models[5], larger)
    for key, kernel in kernels(models[5].state_dict()).items():
        torch.testing.assert_close(centre(kernel), models[3].state_dict()[key], rtol=0, atol=1e-9)


def test_optimizer_states_by_name_are_padded(tmp_path):
    """FSDP keeps them so."""
    weights = {**revcol().state_dict(), 'neck.weight': torch.ones(4, 1, 3, 3)}
    state = {name: dict(step=torch.tensor(1.), exp_avg=torch.ones_like(value)) for name, value in weights.items()}
    padded, report = pad_checkpoint(dict(state_dict=weights, optimizer=dict(state=state, param_groups=[])), 5)
    moments = padded['optimizer']['state']
    assert report.moments == 8 and moments['neck.weight']['exp_avg'].shape[-1] == 3
    assert all(moments[name]['exp_avg'].shape == kernel.shape for name, kernel in kernels(padded['state_dict']).items())


@pytest.mark.parametrize('optimizer', [
    dict(state=[1], param_groups=[]), dict(state={0: dict(m=torch.ones(4, 1, 3, 3))}, param_groups=[3]), 5, torch.ones(2)],
    ids=['state', 'param_groups', 'number', 'tensor'])
def test_an_optimizer_of_another_form_is_left_out_loudly(optimizer):
    weights = {**revcol().state_dict(), 'neck.weight': torch.ones(4, 1, 3, 3)}
    padded, report = pad_checkpoint(dict(model=weights, optimizer=optimizer), 5)
    assert 'optimizer' not in padded and 'WITHOUT the optimizer state' in report.notes[0]


def test_where_moments_cannot_be_told_apart_the_optimizer_is_left_out_loudly(tmp_path, capsys):
    train(tmp_path / 'run', neck=True)
    pad_kernels.main([str(tmp_path / 'run' / 'epoch_1.pth'), '--size', '5'])
    assert 'WITHOUT the optimizer state' in capsys.readouterr().out
    after = read_checkpoint(str(tmp_path / 'run' / 'epoch_1_k5.pth'))
    assert 'optimizer' not in after and after['meta']['epoch'] == 1
    train(tmp_path / 'next', 5, neck=True, load_from=str(tmp_path / 'run' / 'epoch_1_k5.pth'))


# While loading


def test_padding_while_loading_is_what_the_tool_does(checkpoint, tmp_path):
    pad_kernels.main([str(checkpoint), '--size', '7'])
    expected = read_checkpoint(str(checkpoint).replace('.pth', '_k7.pth'))['model']
    weights = {f'backbone.{key}': value for key, value in revcol().state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / 'det.pth')

    models = [RevCol(NANO, kernel_size=7, pad_pretrained=True) for _ in range(3)]
    models[2] = nn.Sequential(OrderedDict(backbone=models[2]))
    load_pretrained(models[0], str(checkpoint))
    models[1].load_state_dict(revcol().state_dict())
    load_checkpoint(models[2], str(tmp_path / 'det.pth'), strict=True)
    models[2] = models[2].backbone
    for model in models:
        assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


@pytest.mark.parametrize('shape, found', [((5, 5), 'mixed sizes'), ((5, 3), 'shape'), (None, 'odd size.* has 4×4')])
def test_padding_while_loading_refuses_what_the_tool_refuses(shape, found):
    weights = revcol().state_dict()
    kernels = [key for key in weights if key.endswith('dwconv.weight')]
    for key in kernels if shape is None else kernels[:1]:
        weights[key] = torch.zeros(*weights[key].shape[:2], *(shape or (4, 4)))
    with pytest.raises(CheckpointError, match=found):
        RevCol(NANO, kernel_size=7, pad_pretrained=True).load_state_dict(weights)


# What does not work


def test_a_folded_network_is_named(tmp_path):
    net = revcol()
    net.switch_to_deploy()
    torch.save(net.state_dict(), tmp_path / 'folded.pth')
    with pytest.raises(SystemExit, match='folded.pth holds a folded network of columns'):
        pad_kernels.main([str(tmp_path / 'folded.pth'), '--size', '7'])


def test_a_missing_package_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    (tmp_path / 'in.safetensors').write_bytes(bytes(64))
    for arguments in ([str(tmp_path / 'in.safetensors')], [str(checkpoint), '--out', str(tmp_path / 'out.safetensors')]):
        with pytest.raises(SystemExit, match='need the package safetensors: pip install safetensors'):
            pad_kernels.main([*arguments, '--size', '7'])
    assert not (tmp_path / 'out.safetensors').exists()


def garbage(path):
    path.write_text('{"not": "a checkpoint"}')


def truncated(length):
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def emptied(path):
    path.write_bytes(b'')


def removed(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def with_code(path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / 'sprung'), )

    torch.save(dict(model=Trap()), path)


def saving(change):
    def spoil(path):
        weights = revcol().state_dict()
        torch.save(change(weights) or dict(model=weights), path)
    return spoil


def mixed(weights):
    weights['subnet1.level2.blocks.0.dwconv.weight'] = torch.zeros(8, 1, 5, 5)


def not_finite(weights):
    weights['subnet1.level2.blocks.0.pwconv1.weight'][0, 0] = float('nan')


def without_a_level(weights):
    for key in list(weights):
        if '.level2.' in key:
            del weights[key]


def without_a_weight(weights):
    del weights['subnet1.level3.fusion.down.0.bias']


def of_integers(weights):
    weights.update({key: value.to(torch.int8) for key, value in kernels(weights).items()})


def with_bad_averages(weights):
    average = dict(weights, **{'stem.0.bias': torch.full((4, ), float('nan'))})
    return dict(model=weights, state_dict_ema=average)


def with_wide_averages(weights):
    key = 'subnet0.level0.blocks.0.dwconv.weight'
    return dict(model=weights, state_dict_ema=dict(weights, **{key: torch.zeros(5, 1, 3, 3)}))


def with_a_far_column(weights):
    weights['subnet999999.alpha0'] = torch.zeros(1, 4, 1, 1)


def with_a_far_block(weights):
    weights['subnet0.level1.blocks.999999.gamma'] = torch.zeros(6)


def with_many_columns_of_many_blocks(weights):
    weights.update({f'subnet{column}.alpha0': torch.zeros(()) for column in range(2, 2000)})
    weights.update({f'subnet0.level0.blocks.{block}.gamma': torch.zeros(()) for block in range(1, 2000)})


def too_wide(weights):
    key = 'subnet0.level0.blocks.0.dwconv.weight'
    weights[key] = torch.zeros(()).expand(2**40, 1, 3, 3)



def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.script(nn.Linear(1, 1)).save(path)


BAD_FILES = [
    (garbage, 'cannot be read as a checkpoint'), (emptied, 'is empty'),
    *((truncated(length), 'cannot be read as a checkpoint') for length in (1, 100, 20000, -100, -1)),
    (removed, 'does not exist'), (folder, 'is not a file'), (with_code, 'is refused: it refers to'),
    (saving(lambda weights: [1, 2]), 'holds no weights'), (saving(lambda weights: dict(meta=1)), 'holds no weights'),
    (saving(lambda weights: {'conv.weight': torch.ones(1)}), 'holds no RevCol'), (saving(mixed), 'kernels of mixed sizes'),
    (saving(not_finite), 'NaN or infinite values: subnet1.level2.blocks.0.pwconv1.weight'),
    (saving(without_a_level), r'no blocks of the levels \[2\]'),
    (saving(without_a_weight), '1 weights are missing: subnet1.level3.fusion.down.0.bias'), (saving(of_integers), 'torch.int8'),
    (saving(with_bad_averages), 'state_dict_ema.*: 1 weights hold NaN or infinite values: stem.0.bias'),
    (saving(with_wide_averages), 'has 5 channels in one place and 4 in another'),
    (saving(with_a_far_column), 'its columns must have .*, but have 0, 1, 999999'),
    (saving(with_a_far_block), 'its blocks of level 1 must have .*, but have 0, 999999'),
    (saving(with_many_columns_of_many_blocks), r'weights for 2000 columns of \(2000, 1, 1, 1\) blocks'),
    (saving(too_wide), 'no RevCol that can be built'),
    (saving(lambda weights: weights.update({3: torch.ones(1)})), 'names of weights must be strings, but got 3'),
    (script, 'is refused: it is a TorchScript archive')]


@pytest.mark.parametrize('spoil, sentence', BAD_FILES, ids=[sentence for _, sentence in BAD_FILES])
def test_bad_files_get_a_sentence(checkpoint, tmp_path, spoil, sentence):
    spoil(checkpoint)
    before = sorted(os.listdir(tmp_path)), checkpoint.is_file() and sha(checkpoint)
    with pytest.raises(SystemExit, match=f'error: .*{sentence}') as refusal:
        pad_kernels.main([str(checkpoint), '--size', '7'])
    assert 'ckpt.pth' in refusal.value.code and '\n' not in refusal.value.code and 'weights_only' not in refusal.value.code
    assert before == (sorted(os.listdir(tmp_path)), checkpoint.is_file() and sha(checkpoint))


@pytest.mark.parametrize('contents', [b'', b'{"a": 1}', b'\xff' * 100, None], ids=['empty', 'text', 'bytes', 'cut off'])
def test_bad_safetensors_get_a_sentence(tmp_path, contents):
    from safetensors.torch import save
    path = tmp_path / 'ckpt.safetensors'
    path.write_bytes(save(revcol().state_dict())[:20000] if contents is None else contents)
    with pytest.raises(SystemExit, match='error: .*ckpt.safetensors (must be a safetensors file|is empty)'):
        pad_kernels.main([str(path), '--size', '7'])
    assert os.listdir(tmp_path) == ['ckpt.safetensors']


@pytest.mark.parametrize('arguments, sentence', [
    (['--size', '4'], 'size must be odd, so that the kernel has a centre, but got 4'),
    *((['--size', size], f'size must be larger than that of ckpt.pth, 3, but got {size}') for size in ('3', '1', '-5')),
    (['--size', '5', '4'], 'odd'), (['--size', '7', '--std', '-1'], 'std must be finite and not negative, but got -1'),
    (['--size', '5', '7', '--out', 'x.pth'], "must contain '{size}'"),
    (['--size', '5', '--out', 'no/such/folder.pth'], 'output folder no/such does not exist'),
    (['--size', '5', '--out', 'ckpt.pth', '--force'], 'must not be the input'),
    (['--size', '5', '--out', '.'], 'must be a file'),
    (['--size', '7', '--out', 'there.pth'], 'there.pth exists already: choose another name, or replace it with force'),
    (['--size', '7', '--seed', str(2**64)], f'seed must be an integer of at most 64 bits, but got {2**64}'),
    (['--size', '7', '--std', '1e39'], "ckpt.pth['model'], padded with std=1e+39: 8 weights hold NaN or infinite"),
    (['--size', '7', '--out', 'new.pth', '--report', './new.pth'], 'new.pth is named twice')], ids=str)
def test_bad_arguments_get_a_sentence(checkpoint, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'there.pth').write_text('precious')
    before = sha(checkpoint)
    with pytest.raises(SystemExit) as refusal:
        pad_kernels.main(['ckpt.pth', *arguments])
    assert refusal.value.code.startswith('error: ') and sentence in refusal.value.code
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pth', 'there.pth'] and sha(checkpoint) == before
    assert (tmp_path / 'there.pth').read_text() == 'precious'


def test_force_replaces(checkpoint, tmp_path):
    (tmp_path / 'ckpt_k5.pth').write_text('old')
    pad_kernels.main([str(checkpoint), '--size', '5', '--force'])
    assert read_checkpoint(str(tmp_path / 'ckpt_k5.pth'))


@pytest.mark.parametrize('disk', ['full', 'file too large'])
def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch, disk):
    previous, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if disk == 'full':
        def open_full(path, mode):  # the kernel's own ENOSPC, while the real file appears as well
            open(path, mode).close()
            return open('/dev/full', 'wb')
        monkeypatch.setattr(files, 'open', open_full, raising=False)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, previous[1]))
    try:
        with pytest.raises(SystemExit, match='error: .*ckpt_k7.pth could not be written: (No space left|File too large)'):
            pad_kernels.main([str(checkpoint), '--size', '7', '9'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ['ckpt.pth']


def test_two_writers_of_one_file_do_not_meet_and_it_gets_the_usual_permissions(tmp_path):
    path = tmp_path / 'out.pth'
    previous = os.umask(0o027)
    try:
        with files.write_whole(str(path)) as one, files.write_whole(str(path)) as two:
            one.write(b'one')
            two.write(b'two, which is complete first')
    finally:
        os.umask(previous)
    assert path.read_bytes() == b'one' and os.listdir(tmp_path) == ['out.pth']
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize('interruption', [KeyboardInterrupt, SystemExit, CheckpointError])
def test_an_interruption_leaves_nothing_behind(tmp_path, interruption):
    with pytest.raises(interruption), files.write_whole(str(tmp_path / 'out.pth')) as file:
        file.write(b'half')
        raise interruption
    assert os.listdir(tmp_path) == []


def test_being_killed_leaves_no_half_written_file_under_the_name(tmp_path):
    (tmp_path / 'out.pth').write_text('old')
    child = os.fork()
    if child == 0:
        try:
            with files.write_whole(str(tmp_path / 'out.pth')) as file:
                file.write(b'half')
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / 'out.pth').read_text() == 'old'


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_padding_keeps_centre_dtype_order_and_everything_else(data):
    arch = dict(channels=data.draw(st.lists(st.integers(1, 5), min_size=4, max_size=4)),
                depths=data.draw(st.lists(st.integers(1, 2), min_size=4, max_size=4)),
                num_columns=data.draw(st.integers(1, 2)), deep_to_shallow=data.draw(st.booleans()))
    size_before = data.draw(st.sampled_from([1, 3, 5]))
    size = size_before + 2 * data.draw(st.integers(1, 3))
    prefix = data.draw(st.sampled_from(['', 'module.', 'backbone.', 'module.backbone.', 'model.encoder.']))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    seed = data.draw(st.integers(0, 2**31))
    weights = {prefix + key: value.to(dtype) for key, value in RevCol(arch, kernel_size=size_before).state_dict().items()}
    weights.update({f'head.{name}.weight': torch.ones(1, 1, size_before, size_before)
                    for name in data.draw(st.lists(st.sampled_from('abc'), unique=True))})
    original = {key: value.clone() for key, value in weights.items()}
    wrapping = data.draw(st.sampled_from([None, 'model', 'state_dict']))

    padded, report = pad_checkpoint({wrapping: weights} if wrapping else weights, size, seed=seed)
    padded = padded[wrapping] if wrapping else padded
    assert list(padded) == list(weights) and report.size_before == size_before
    for key, value in original.items():
        assert torch.equal(weights[key], value)  # the input is left alone
        assert padded[key].dtype == value.dtype
        assert torch.equal(centre(padded[key], size_before) if key in kernels(weights) else padded[key], value)
    RevCol(arch, kernel_size=size).to(dtype).load_state_dict(
        {key[len(prefix):]: value for key, value in padded.items() if not key.startswith('head.')})
