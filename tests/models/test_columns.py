# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Columns whose blocks are not ConvNeXt: ViT, C2f, Transformer encoders."""
import copy
import math
import re

import pytest
import torch
from mmdet.registry import MODELS as DETECTION
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, Registry
from mmengine.structures import InstanceData
from mmpretrain.registry import MODELS as CLASSIFICATION
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from revcol_mm import classification  # noqa: F401
from revcol_mm.models.backbones.c2f import RevColC2f
from revcol_mm.models.backbones.sequence import RevColTransformerEncoder, WideMemoryDecoderLayer
from revcol_mm.models.backbones.vit import CosineAttention, RevColViT, ViTBlock
from revcol_mm.models.necks.simple_fpn import SimpleFPN
from revcol_mm.reversible import ReversibilityError, run_reversibly
from tests.common import CONFIGS, ROOT, gradients_of, mostly_slow

TINY_VIT = dict(embed_dims=32, depths=(1, 1, 2, 1), num_heads=4, num_columns=4)
TINY_C2F = dict(channels=(8, 12, 16, 20), depths=(1, 1, 2, 1), num_columns=4)


def build(kind, **kwargs):
    torch.manual_seed(0)
    if kind == 'vit':
        model = RevColViT(TINY_VIT, img_size=64, **kwargs)
    elif kind == 'c2f':
        model = RevColC2f(TINY_C2F, **kwargs)
    else:
        model = RevColTransformerEncoder(32, 4, 64, **kwargs)
    with torch.no_grad():  # weights at which every F weighs about as much as the shortcut, and no norm magnifies rounding
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(math.sqrt(1 / (parameter.shape[1] * parameter.var())))
    return model


def arguments(kind):
    torch.manual_seed(1)
    if kind == 'sequence':
        padding = torch.arange(9) >= torch.tensor([[9], [5]])
        return torch.randn(2, 9, 32), dict(src_key_padding_mask=padding)
    return torch.randn(4, 3, 75, 64), {}


def step(model, inputs, kwargs, dtype=torch.float32):
    """One training step's gradients, of all parameters and of the input."""
    inputs = inputs.to(dtype).clone().requires_grad_()
    torch.manual_seed(2)  # of drop path and dropout
    outputs = model(inputs, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs, )
    generator = torch.Generator().manual_seed(3)
    loss = sum((output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum() for output in outputs)
    loss.backward()
    return {'input': inputs.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def relative_error(gradients, reference):
    assert gradients.keys() == reference.keys()
    difference = sum((gradients[name].double() - value.double()).square().sum() for name, value in reference.items())
    return (difference / sum(value.double().square().sum() for value in reference.values())).sqrt().item()


KINDS = [('vit', dict(drop_path_rate=0.3)), ('c2f', {}), ('sequence', dict(dropout=0.1))]


@pytest.mark.parametrize('kind, options', KINDS)
def test_reversible_gradients_equal_those_of_plain_autograd(kind, options):
    plain, reversible = build(kind, **options), build(kind, reversible=True, **options)
    inputs, kwargs = arguments(kind)
    assert relative_error(step(reversible, inputs, kwargs), step(plain, inputs, kwargs)) < 1e-5
    assert reversible.drift < 1e-6
    # In float32 both paths round the features, at different places. What is left in float64 is the engine's own error, about
    # 1e-16 times what the columns amplify.
    plain, reversible = (build(kind, reversible=flag, **options).double() for flag in (False, True))
    assert relative_error(*(step(model, inputs, kwargs, torch.float64) for model in (reversible, plain))) < 1e-10


@pytest.mark.parametrize('kind, options', KINDS)
def test_each_parameter_is_as_exact_as_under_plain_autograd(kind, options):
    inputs, kwargs = arguments(kind)
    exact = step(build(kind, **options).double(), inputs, kwargs, torch.float64)
    plain = step(build(kind, **options), inputs, kwargs)
    reversible = step(build(kind, reversible=True, **options), inputs, kwargs)
    for name, reference in exact.items():
        allowed, error = (((gradients[name].double() - reference).norm() / reference.norm()).item()
                          for gradients in (plain, reversible))
        assert error < 3 * allowed + 1e-5, name


@pytest.mark.parametrize('kind', ['vit', 'c2f', 'sequence'])
def test_every_parameter_but_the_first_columns_shortcut_is_trained(kind):
    gradients = step(build(kind, reversible=True), *arguments(kind))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    untrained = {name for name, p in build(kind).named_parameters() if not p.requires_grad}
    assert untrained == {f'subnet0.alpha{level}' for level in range(4)}


@pytest.mark.parametrize('kind', ['vit', 'c2f', 'sequence'])
def test_trains_reversibly_in_bfloat16(kind):
    exact = step(build(kind), *arguments(kind))
    with torch.autocast('cpu', torch.bfloat16):
        plain, reversible = (step(build(kind, reversible=flag), *arguments(kind)) for flag in (False, True))
    # bfloat16 has 8 bits, and every rounding that falls otherwise is amplified: the yardstick is what plain autograd loses.
    assert relative_error(reversible, exact) < 1.5 * relative_error(plain, exact)


@pytest.mark.parametrize('kind', ['vit', 'c2f', 'sequence'])
def test_checkpointing_and_copies_give_the_same_gradients(kind):
    inputs, kwargs = arguments(kind)
    reference = step(build(kind), inputs, kwargs)
    assert relative_error(step(build(kind, with_cp=True), inputs, kwargs), reference) < 1e-6
    original = build(kind, reversible=True)
    duplicate = copy.deepcopy(original)
    assert relative_error(step(duplicate, inputs, kwargs), reference) < 1e-5
    assert all(parameter.grad is None for parameter in original.parameters())


@pytest.mark.parametrize('kind', ['vit', 'c2f', 'sequence'])
def test_frozen_stages_stay_as_they_are_while_the_rest_trains(kind):
    inputs, kwargs = arguments(kind)
    model = build(kind, reversible=True, frozen_stages=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, inputs, kwargs)
    frozen = ('stem.', 'subnet0.', 'subnet1.')
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name.startswith(frozen))
    reference = step(build(kind, frozen_stages=2), inputs, kwargs)
    gradients = gradients_of(model)
    assert relative_error(gradients, {name: reference[name] for name in gradients}) < 1e-5


@pytest.mark.parametrize('kind', ['vit', 'c2f', 'sequence'])
def test_layer_depth_is_the_position_in_the_grid_of_blocks_and_columns(kind):
    model = build(kind)
    num_layers = sum(model.depths) + model.num_columns + 1
    for name, _ in model.named_parameters():
        layer, total = model.get_layer_depth('backbone.' + name, 'backbone.')
        assert total == num_layers
        if name.startswith('stem.'):
            assert layer == 0
        elif name.startswith('subnet'):
            assert 1 <= layer <= num_layers - 2
    assert model.get_layer_depth('subnet2.level2.fusion.down.0.weight') == (2 + 2 + 1, num_layers)
    assert model.get_layer_depth('subnet3.alpha3') == (4, num_layers)
    assert model.get_layer_depth('bbox_head.fc.weight', 'backbone.') == (num_layers - 1, num_layers)


# --- RevCol-ViT

@pytest.mark.parametrize('arch, num_columns, patch_size, parameters, flops', mostly_slow([
    ('small', 4, 16, 20.87e6, 4.6e9),  # as the appendix states it; printed: 16M, 4.6G
    ('base', 4, 16, 89.06e6, 18.8e9),  # printed: 67M, 18.8G
    ('small', 3, 14, 16e6, 4.6e9),  # what gives the printed figures, all four
    ('base', 3, 14, 67e6, 18.8e9),
], [('small', 3, 14, 16e6, 4.6e9)]))
def test_vit_counts(arch, num_columns, patch_size, parameters, flops):
    with torch.device('meta'):
        backbone = RevColViT(dict(RevColViT.ARCHS[arch], num_columns=num_columns), patch_size=patch_size).eval()
        classifier = nn.Sequential(nn.LayerNorm(backbone.embed_dims), nn.Linear(backbone.embed_dims, 1000))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            features = backbone(torch.zeros(1, 3, 224, 224))
            classifier(features[-1].mean((2, 3)))
    count = sum(p.numel() for module in (backbone, classifier) for p in module.parameters())
    assert count == pytest.approx(parameters, rel=0.02)
    assert counter.get_total_flops() / 2 == pytest.approx(flops, rel=0.02)


def test_vit_returns_contiguous_maps_of_one_resolution_for_any_image_size():
    model = RevColViT(TINY_VIT, img_size=(64, 96), out_indices=(1, 3)).eval()
    for size, grid in (((64, 96), (4, 6)), ((65, 95), (5, 6)), ((16, 7), (1, 1)), ((33, 130), (3, 9))):
        outputs = model(torch.randn(2, 3, *size))
        assert [tuple(output.shape) for output in outputs] == [(2, 32, *grid)] * 2
        assert all(output.is_contiguous() for output in outputs)


def test_vit_maps_lie_as_the_image_does():
    """What moves in the image by one patch moves in the map by one place, up to positions (here 0) and global attention."""
    model = RevColViT(TINY_VIT, img_size=64).eval()
    with torch.no_grad():
        model.stem.pos_embed.zero_()
        image = torch.randn(1, 3, 48, 64)
        rolled = model(image.roll((16, 32), (2, 3)))
        for feature, moved in zip(model(image), rolled):
            torch.testing.assert_close(feature.roll((1, 2), (2, 3)), moved, rtol=1e-3, atol=1e-3)


def test_cosine_attention_is_softmax_of_scaled_cosines():
    attention = CosineAttention(8, 2).double()
    with torch.no_grad():
        attention.logit_scale.copy_(torch.tensor([math.log(3.), 100.]))  # the second is clamped to log 100
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    qkv = attention.qkv(x)
    heads = []
    for head, scale in enumerate((3., 100.)):
        q, k, v = (part[..., 4 * head:4 * head + 4] for part in qkv.split(8, dim=-1))
        cosine = torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
        heads.append((scale * cosine).softmax(-1) @ v)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, -1)))


def test_cosine_attention_survives_half_precision():
    attention = CosineAttention(8, 2)
    for factor in (1e-9, 1e4):  # in float16 or bfloat16 the squares would vanish, or overflow
        x = torch.randn(1, 4, 8) * factor
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast('cpu', dtype):
                assert attention(x).isfinite().all()


def test_vit_ffns_start_smaller_the_deeper_they_sit():
    model = RevColViT(dict(RevColViT.ARCHS['small'], num_columns=2))
    for name, block in model.named_modules():
        if isinstance(block, ViTBlock):
            expected = 0.02 / math.sqrt(2 * model.get_layer_depth(name)[0])
            assert block.ffn[-1].weight.std().item() == pytest.approx(expected, rel=0.02)  # 200,704 draws
            assert block.ffn[0].weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize('arguments_, named', [
    (dict(arch='tiny'), "arch must .* got 'tiny'"),
    (dict(arch=dict(embed_dims=32)), 'num_heads'),
    (dict(arch=dict(TINY_VIT, num_heads=5)), 'num_heads'),
    (dict(arch=dict(TINY_VIT, depths=(1, 1))), 'depths'),
    (dict(patch_size=0), 'patch_size must .* got 0'),
    (dict(img_size=(1, 2, 3)), 'img_size'),
    (dict(drop_path_rate=1.), 'drop_path_rate'),
    (dict(out_indices=(4, )), 'out_indices'),
    (dict(frozen_stages=5), 'frozen_stages must .* got 5'),
    (dict(reversible=True, with_cp=True), 'with_cp'),
])
def test_vit_refuses_arguments_it_cannot_use(arguments_, named):
    with pytest.raises(ValueError, match=named):
        RevColViT(**{'arch': TINY_VIT, **arguments_})


def test_a_missing_channel_is_named():
    with pytest.raises(ValueError, match=r'\(2, 1, 64, 64\)'):
        RevColViT(TINY_VIT)(torch.zeros(2, 1, 64, 64))


# --- C2f

def test_c2f_follows_the_published_variant():
    model = RevColC2f()
    assert (model.channels, model.depths, model.num_columns) == ((32, 64, 96, 128), (2, 3, 6, 3), 5)
    model.eval()
    with torch.no_grad():
        for (height, width), sizes in {(64, 96): [(16, 24), (8, 12), (4, 6), (2, 3)],
                                       (75, 53): [(18, 13), (9, 6), (4, 3), (2, 1)]}.items():
            outputs = model(torch.randn(1, 3, height, width))
            assert [tuple(output.shape) for output in outputs] == [
                (1, channels, *size) for channels, size in zip(model.channels, sizes)]
            assert all(output.is_contiguous() for output in outputs)


def test_running_statistics_are_updated_once_a_step():
    """After one and after two steps they are those of plain training, to float32 rounding; a second update would be 3 % off."""
    models = [build('c2f'), build('c2f', reversible=True)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6) for model in models]
    for iteration in range(1, 3):
        for model, optimizer in zip(models, optimizers):
            inputs, kwargs = arguments('c2f')
            optimizer.zero_grad()
            step(model, inputs * iteration, kwargs)
            optimizer.step()
        plain, reversible = (dict(model.named_buffers()) for model in models)
        for name, buffer in plain.items():
            if name.endswith('num_batches_tracked'):
                assert buffer == reversible[name] == iteration
            else:
                torch.testing.assert_close(reversible[name], buffer, rtol=1e-4, atol=1e-5)


def test_cumulative_statistics_too():
    options = dict(norm_cfg=dict(type='BN', momentum=None))
    plain, reversible = build('c2f', **options), build('c2f', reversible=True, **options)
    for _ in range(2):
        for model in (plain, reversible):
            step(model, *arguments('c2f'))
    buffers = dict(reversible.named_buffers())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-4, atol=1e-5)


def test_norm_eval_keeps_the_statistics():
    model = build('c2f', reversible=True, norm_eval=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    step(model.train(), *arguments('c2f'))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_c2f_refuses_odd_widths_and_small_images():
    with pytest.raises(ValueError, match='even'):
        RevColC2f(dict(TINY_C2F, channels=(8, 12, 15, 20)))
    with pytest.raises(ValueError, match=r'\(1, 3, 31, 64\)'):
        RevColC2f(TINY_C2F)(torch.zeros(1, 3, 31, 64))


# --- sequences

def test_padding_influences_neither_outputs_nor_gradients():
    model = build('sequence', dropout=0., reversible=True)
    inputs, kwargs = arguments('sequence')
    padding = kwargs['src_key_padding_mask']
    other = torch.where(padding[..., None], 7 * torch.randn_like(inputs), inputs)
    outputs, gradients = [], []
    for source in (inputs, other):
        model.zero_grad()
        output = model(source, **kwargs)[~padding]
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append(gradients_of(model))
    torch.testing.assert_close(*outputs)
    assert relative_error(*gradients) < 1e-5
    model.eval()
    with torch.no_grad():
        short = model(inputs[1:, :5])
        torch.testing.assert_close(model(inputs, **kwargs)[1:, :5], short, rtol=1e-4, atol=1e-5)


def test_a_causal_mask_hides_the_future_in_forward_and_backward():
    model = build('sequence', dropout=0., reversible=True)
    inputs = arguments('sequence')[0].requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    (model(inputs, mask=mask, is_causal=True)[:, 4] * torch.randn(32)).sum().backward()
    assert inputs.grad[:, 5:].abs().max() == 0
    assert inputs.grad[:, :5].abs().amin() > 0


def test_a_mask_that_wants_a_gradient_is_refused():
    model = build('sequence', reversible=True)
    with pytest.raises(ValueError, match='src_mask'):
        model(arguments('sequence')[0], mask=torch.zeros(9, 9, requires_grad=True))


def test_the_recomputation_sees_the_context_of_its_own_forward_pass():
    """Without it the rebuilt features would differ, and the drift check would stop the step."""
    model = build('sequence', dropout=0.)
    x, kwargs = arguments('sequence')
    calls = [dict(src_key_padding_mask=kwargs['src_key_padding_mask']), {}]
    outputs = [run_reversibly(model.columns, x.requires_grad_(), context=call) for call in calls]
    reference = [torch.autograd.grad(model.columns[-1](x, _features(model, x, call), context=call)[3].sum(), x)[0]
                 for call in calls]
    for output, gradient in zip(outputs, reference):
        torch.testing.assert_close(torch.autograd.grad(output[3].sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)
    output = run_reversibly(model.columns, x, context=(call := dict(src_key_padding_mask=torch.zeros(2, 9, dtype=torch.bool))))
    call['src_key_padding_mask'][:, 4:] = True  # a mask changed behind the engine's back
    with pytest.raises(ReversibilityError):
        output[3].sum().backward()


def _features(model, x, context):
    p = None
    for column in model.columns[:-1]:
        p = column(x, p, context=context)
    return p


@pytest.mark.parametrize('batch_first', [True, False])
def test_is_an_encoder_of_torchs_transformer(batch_first):
    encoder = RevColTransformerEncoder(32, 4, 64, num_columns=3, batch_first=batch_first, reversible=True)
    model = nn.Transformer(32, 4, num_decoder_layers=1, dim_feedforward=64, dropout=0., custom_encoder=encoder,
                           batch_first=batch_first)
    # Its constructor draws all matrices anew; γ, a vector here, keeps the value that columns need.
    assert all((gamma == 0.5).all() for column in encoder.columns for gamma in column.gammas)
    shape = (2, 9, 32) if batch_first else (9, 2, 32)
    source, target = torch.randn(shape), torch.randn(shape)
    padding = arguments('sequence')[1]['src_key_padding_mask']
    output = model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert output.shape == shape
    output.sum().backward()
    assert encoder.drift < 1e-6


def test_batch_first_only_transposes():
    first, second = build('sequence', batch_first=True).eval(), build('sequence', batch_first=False).eval()
    inputs, kwargs = arguments('sequence')
    with torch.no_grad():
        torch.testing.assert_close(second(inputs.transpose(0, 1), **kwargs).transpose(0, 1), first(inputs, **kwargs))


def test_a_wider_decoder_reads_the_encoders_memory():
    encoder = build('sequence', reversible=True)
    decoder = nn.TransformerDecoder(WideMemoryDecoderLayer(48, 4, memory_dim=32, dim_feedforward=64), 2)
    output = decoder(torch.randn(2, 6, 48), encoder(arguments('sequence')[0]))
    assert output.shape == (2, 6, 48)
    output.sum().backward()
    assert encoder.stem.embedding is None and encoder.subnet0.level0.blocks[0].linear1.weight.grad.abs().sum() > 0


def test_sinusoidal_positions_are_those_of_the_original_transformer():
    stem = RevColTransformerEncoder(32, 4, 64, dropout=0.).stem
    positions = stem(torch.zeros(1, 50, 32))[0]
    for position, index in ((0, 0), (7, 3), (49, 15)):
        angle = position / 10000 ** (2 * index / 32)
        assert positions[position, 2 * index].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert positions[position, 2 * index + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_encoder_defaults_count_as_stated():
    """4 columns of 4 layers of width 768: 16 layers, 12 down paths, 9 up paths."""
    with torch.device('meta'):
        model = RevColTransformerEncoder()
    layer = 4 * 768 * 769 + 768 * 3072 * 2 + 768 + 3072 + 4 * 768
    path = 768 * 769 + 2 * 768
    assert sum(p.numel() for p in model.columns[1].level1.parameters()) == layer + 2 * path
    assert sum(p.numel() for p in model.parameters()) == 16 * layer + 21 * path + 16 * 768 + 2 * 768


def test_unusable_sequences_are_refused():
    model = build('sequence')
    with pytest.raises(ValueError, match='vocab_size'):
        model(torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r'\(2, 9, 31\)'):
        model(torch.zeros(2, 9, 31))
    with pytest.raises(ValueError, match='nhead=5'):
        RevColTransformerEncoder(32, 5)


class Reverser(nn.Module):
    """Says a sequence backwards: at each place, the token that stands as far from the other end."""

    def __init__(self, reversible):
        super().__init__()
        self.encoder = RevColTransformerEncoder(
            32, 4, 64, depths=(1, 1), num_columns=3, dropout=0., vocab_size=8, reversible=reversible)
        self.head = nn.Linear(32, 8)

    def forward(self, tokens, padding):
        return self.head(self.encoder(tokens, src_key_padding_mask=padding))


def _sentences(count, generator):
    lengths = torch.randint(4, 9, (count, 1), generator=generator)
    tokens = torch.randint(0, 8, (count, 8), generator=generator)
    places = torch.arange(8).expand(count, 8)
    padding = places >= lengths
    return tokens, padding, tokens.gather(1, (lengths - 1 - places).clamp_min(0))


@pytest.mark.slow
def test_learns_to_reverse_sequences_of_any_length():
    """Positions count from the front, so that the end has to be found through the padding mask."""
    losses = {True: [], False: []}
    for reversible, steps in ((False, 5), (True, 250)):
        torch.manual_seed(0)
        model, generator = Reverser(reversible), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 250)
        for _ in range(steps):
            tokens, padding, target = _sentences(64, generator)
            loss = nn.functional.cross_entropy(model(tokens, padding)[~padding], target[~padding])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[reversible].append(loss.item())
    assert losses[True][:5] == pytest.approx(losses[False], rel=1e-4)
    with torch.no_grad():
        tokens, padding, target = _sentences(256, torch.Generator().manual_seed(1))
        correct = (model.eval()(tokens, padding).argmax(-1) == target)[~padding]
    assert correct.float().mean() > 0.99


# --- in OpenMMLab

@pytest.mark.parametrize('name, options', [
    ('RevColViT', dict(arch=TINY_VIT)), ('RevColC2f', dict(arch=TINY_C2F)), ('RevColTransformerEncoder', dict(d_model=24))])
def test_builds_from_a_config_in_any_scope(name, options):
    scope = Registry('model', parent=MODELS, scope='revcol_test_scope')
    try:
        assert type(scope.build(dict(type=name, **options))).__name__ == name
    finally:
        MODELS.children.pop('revcol_test_scope')


def test_the_documentations_examples_run():
    examples = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/columns.md').read_text(encoding='utf-8'), re.DOTALL)
    assert len(examples) == 3
    names = {}
    try:
        exec(examples[0], names)
        names['RevMLP'](reversible=True)(torch.randn(2, 5, 16, requires_grad=True))[0].sum().backward()
        with torch.device('meta'), torch.no_grad():  # full-size networks, shapes only
            for example in examples[1:]:
                exec(example, names)
    finally:
        MODELS.module_dict.pop('RevMLP', None)


@pytest.mark.parametrize('size, drop_path_rate, parameters', [('s', 0.1, 20.87e6), ('b', 0.2, 89.06e6)])
def test_imagenet_configs_hold_the_stated_networks(size, drop_path_rate, parameters):
    config = Config.fromfile(CONFIGS / f'revcol_vit_{size}_in1k.py')
    assert config.model.backbone.drop_path_rate == drop_path_rate
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device('meta'):
        model = CLASSIFICATION.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert isinstance(model.backbone, RevColViT) and model.backbone.reversible


def _images_with_a_box(count):
    samples = []
    for _ in range(count):
        masks = torch.zeros(1, 128, 128, dtype=torch.bool)
        masks[:, 30:70, 20:80] = True
        sample = DetDataSample(metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128), pad_shape=(128, 128),
                                             batch_input_shape=(128, 128), scale_factor=(1., 1.), img_id=0))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[20., 30., 80., 70.]]), labels=torch.tensor([3]),
            masks=BitmapMasks(masks.numpy().astype('uint8'), 128, 128))
        samples.append(sample)
    return torch.randn(count, 3, 128, 128), samples


@pytest.mark.slow
def test_a_detector_on_vit_columns_trains_and_predicts():
    register_all_modules(init_default_scope=False)
    config = Config.fromfile(CONFIGS / 'demo/mask_rcnn_revcol_vit_digits.py')
    config.model.test_cfg.rcnn.score_thr = 0.  # after four steps no score is high
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = DETECTION.build(config.model)
        images, samples = _images_with_a_box(2)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(4):
            parts = model.loss(images, samples)
            loss = sum(sum(part) if isinstance(part, list) else part for name, part in parts.items() if 'loss' in name)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert model.backbone.drift < 1e-6
        assert losses[-1] < losses[0]
        predictions = model.eval().predict(images, samples)
    assert len(predictions) == 2
    for found in (prediction.pred_instances for prediction in predictions):
        assert len(found) > 0 and found.bboxes.shape == (len(found), 4) and found.masks.shape == (len(found), 128, 128)


def test_simple_fpn_makes_contiguous_scales_of_one_map_or_of_one_map_each():
    neck = SimpleFPN(32, 16, scale_factors=(4, 2, 1, 0.5), num_outs=5)
    maps = tuple(torch.randn(2, 32, 6, 10) for _ in range(4))
    sizes = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    each, one = neck(maps), neck(maps[-1:])
    for outputs in (each, one):
        assert [tuple(output.shape) for output in outputs] == [(2, 16, *size) for size in sizes]
        assert all(output.is_contiguous() for output in outputs)
    torch.testing.assert_close(each[3], one[3])  # the last scale reads the last map either way
    assert not torch.allclose(each[0], one[0])


def test_simple_fpn_refuses_what_it_cannot_scale():
    with pytest.raises(ValueError, match='scale_factors'):
        SimpleFPN(32, scale_factors=(3, 1))
    with pytest.raises(ValueError, match='num_outs must .* got 1'):
        SimpleFPN(32, scale_factors=(2, 1), num_outs=1)
    with pytest.raises(ValueError, match='2 maps'):
        SimpleFPN(32)([torch.zeros(1, 32, 4, 4)] * 2)
