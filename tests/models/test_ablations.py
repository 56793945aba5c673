# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The networks of table 6: columns without reversible connections, and a single column in RevNet's way."""
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from revcol_mm.models import HRNetColumns, RevCol, RevNetConvNeXt
from revcol_mm.reversible import ReversibilityError
from revcol_mm.utils.planning import Plan
from tests.common import gradients_of, live_bytes, load_config, small_arch, worst_error

ARCH = dict(channels=(32, 48, 64, 96), depths=(1, 1, 3, 2))


def revnet(arch=ARCH, **kwargs) -> RevNetConvNeXt:
    """A net in training mode whose LayerScale and γ are so far from their initial values that F and γ matter."""
    torch.manual_seed(0)
    net = RevNetConvNeXt(arch, **kwargs).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith('.gamma'):
                parameter.uniform_(0.1, 1)
            elif 'alpha' in name:
                parameter.uniform_(0.5, 1.5)
    return net


def hrnet(**kwargs) -> HRNetColumns:
    torch.manual_seed(0)
    return HRNetColumns(small_arch(), layer_scale_init_value=0.5, **kwargs).train()


def gradients(net: nn.Module, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Gradients of all parameters and of the image for a loss that reads every output."""
    net = net.to(dtype)
    image = torch.randn(2, 3, 75, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(2)  # of DropPath
    sum(feature.square().mean() for feature in net(image)).backward()
    return dict(gradients_of(net), image=image.grad)


class TestRevNet:

    def test_a_level_is_equation_1(self):
        """x[t] = F[t](x[t-1]) + γ[t]·x[t-2], written out; F[t] is ConvNeXt's block less its residual."""
        net = revnet().double().eval()
        image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        x, expected = net.stem(image), []
        for level in net.columns[0].children():
            x = level.fusion(x)
            two_before, before = x.chunk(2, dim=1)
            for unit in level.blocks:
                for block, gamma in zip(unit.levels, unit.gammas):
                    hidden = nn.functional.gelu(block.pwconv1(block.norm(block.dwconv(before).movedim(1, -1))))
                    f = (block.gamma * block.pwconv2(hidden)).movedim(-1, 1)
                    two_before, before = before, f + gamma * two_before
            x = torch.cat([two_before, before], dim=1)
            expected.append(x)
        for actual, feature in zip(net(image), expected):
            torch.testing.assert_close(actual, feature, rtol=0, atol=1e-12)
            assert actual.is_contiguous()

    # In float64 only the order of sums differs, 1e-16 each; float32 gradients are themselves off by about 1e-6.
    @pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_reversible_gradients_are_those_of_plain_autograd(self, dtype, tolerance):
        plain, reversible = (gradients(revnet(drop_path_rate=0.3, reversible=flag), dtype) for flag in (False, True))
        assert all(gradient.abs().max() > 0 for gradient in plain.values())
        assert worst_error(reversible, plain) <= tolerance

    def test_checkpointing_and_stored_columns_are_plain_training(self):
        plain = gradients(revnet())
        assert worst_error(gradients(revnet(with_cp=True)), plain) <= 1e-6
        assert worst_error(gradients(revnet(reversible=True, stored_columns=1)), plain) == 0

    @pytest.mark.slow
    def test_memory_does_not_grow_with_the_units(self):
        kept = {}
        for reversible in (False, True):
            for units in (2, 8):
                net = revnet(dict(channels=(16, 32, 48, 64), depths=(units, ) * 4), reversible=reversible)
                image = torch.randn(4, 3, 128, 128)
                kept[reversible, units], _ = live_bytes(lambda: net(image), lambda features: sum(
                    feature.sum() for feature in features).backward())
        assert kept[True, 8] < 1.02 * kept[True, 2]
        assert kept[False, 8] > 3 * kept[False, 2]

    @pytest.mark.parametrize('level', range(4))
    def test_a_level_that_computes_something_else_the_second_time_is_found(self, level):
        net = revnet(reversible=True)
        block = net.get_submodule(f'subnet0.level{level}.blocks.0.level1')
        original, calls = block.forward, []
        block.forward = lambda *args: original(*args) * (1 + len(calls) + 0 * (calls.append(1) or 0))
        with pytest.raises(ReversibilityError, match='threshold'):
            gradients(net)

    @pytest.mark.parametrize('stages,trained', [(0, 'subnet0'), (1, None)])
    def test_frozen_stages_get_no_gradient(self, stages, trained):
        net = revnet(reversible=True, frozen_stages=stages)
        features = net(torch.randn(1, 3, 64, 64))
        assert all(feature.requires_grad == bool(trained) for feature in features)
        if trained:
            sum(feature.sum() for feature in features).backward()
            assert {name.partition('.')[0] for name in gradients_of(net)} == {trained}

    def test_layer_depth_counts_units(self):
        net = RevNetConvNeXt(ARCH)
        assert net.get_layer_depth('stem.0.weight') == (0, 9)
        assert net.get_layer_depth('subnet0.level2.fusion.0.weight') == (3, 9)
        assert net.get_layer_depth('subnet0.level2.blocks.1.level0.dwconv.weight') == (4, 9)
        assert net.get_layer_depth('subnet0.level3.blocks.1.alpha0') == (7, 9)
        assert net.get_layer_depth('head.weight') == (8, 9)

    def test_a_checkpoint_loads(self, tmp_path):
        net = revnet()
        torch.save(dict(state_dict={f'backbone.{name}': value for name, value in net.state_dict().items()}), tmp_path / 'a.pth')
        other = MODELS.build(dict(type='RevNetConvNeXt', arch=ARCH, init_cfg=dict(
            type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))))
        other.init_weights()
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())

    @pytest.mark.parametrize('arch,sentence', [
        (dict(ARCH, channels=(32, 47, 64, 96)), r"arch\['channels'\] must be even numbers"),
        (dict(ARCH, num_columns=2), 'must be a dict with the keys channels, depths'), ('base', 'must be one of tiny, t')])
    def test_unusable_architectures_are_refused(self, arch, sentence):
        with pytest.raises(ValueError, match=sentence):
            RevNetConvNeXt(arch)


class TestHRNet:

    def test_reversible_training_is_refused(self):
        with pytest.raises(ValueError, match='reversible must be False for HRNetColumns, because its columns have no inverse'):
            HRNetColumns('tiny', reversible=True)
        with pytest.raises(ValueError, match='HRNetColumns, whose columns have no inverse'):
            Plan(load_config('hrnet_columns_in1k'))

    def test_every_level_reads_every_level_of_the_column_before(self):
        column, sizes = hrnet().columns[1], [(18, 17), (9, 8), (4, 4), (2, 2)]
        x, *p = (torch.randn(1, width, *size) for width, size in zip((8, 8, 16, 24, 32), (sizes[0], *sizes)))
        for below, level in zip((x, *p), column.levels):
            read = [feature.clone().requires_grad_() for feature in p]
            level(below, *read).square().sum().backward()
            assert all(feature.grad.abs().max() > 0 for feature in read)

    def test_the_fusion_is_the_sum_of_its_paths(self):
        """Level 2 written out: two steps down from level 0, one from level 1, identity from level 2, up from level 3."""
        fusion = hrnet().columns[1].level2.fusion
        below, p = torch.randn(1, 16, 9, 8), [torch.randn(1, width, *size) for width, size in zip(
            (8, 16, 24, 32), [(18, 17), (9, 8), (4, 4), (2, 2)])]
        linear, norm = fusion.from3.channel_reschedule
        up = norm(linear(p[3].movedim(1, -1))).movedim(-1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
        first, gelu, second = fusion.from0
        assert [step[0].weight.shape[:2] for step in (first, second)] == [(8, 8), (24, 8)] and isinstance(gelu, nn.GELU)
        expected = fusion.down(below) + second(gelu(first(p[0]))) + fusion.from1[0](p[1]) + p[2] + up
        torch.testing.assert_close(fusion(below, *p), expected)

    def test_there_is_no_shortcut_past_f(self):
        net = hrnet()
        assert not any('alpha' in name for name, _ in net.named_parameters())
        column, p = net.columns[1], [torch.randn(1, width, size, size) for width, size in zip((8, 16, 24, 32), (16, 8, 4, 2))]
        for index, level in enumerate(column.levels):
            level.fusion.forward = lambda below, *p, index=index: torch.zeros_like(p[index])
        one, other = (column(p[0], features) for features in (p, [2 * feature for feature in p]))
        assert all(torch.equal(a, b) for a, b in zip(one, other))

    def test_stem_and_first_column_are_revcols(self):
        """The first column has nothing before it: the same parameters, γ apart, and the same features."""
        net, base = hrnet(), RevCol(small_arch(), layer_scale_init_value=0.5)
        missing, unexpected = base.load_state_dict(net.state_dict(), strict=False)
        assert not [name for name in (*missing, *unexpected) if name.startswith(('stem', 'subnet0')) and 'alpha' not in name]
        image, outputs = torch.randn(1, 3, 65, 64), [(0, level) for level in range(4)]
        assert all(torch.equal(a, b) for a, b in zip(net(image, outputs), base(image, outputs)))

    def test_checkpointing_gives_the_same_gradients(self):
        plain = gradients(hrnet(drop_path_rate=0.3))
        assert len(plain) == 1 + len(list(hrnet().parameters())) and all(value.abs().max() > 0 for value in plain.values())
        assert worst_error(gradients(hrnet(drop_path_rate=0.3, with_cp=True)), plain) <= 1e-6

    def test_a_folded_network_computes_the_same(self):
        net, image = hrnet().eval(), torch.randn(1, 3, 75, 64)
        with torch.no_grad():
            expected = net(image)
            net.switch_to_deploy()
            for actual, feature in zip(net(image), expected):
                torch.testing.assert_close(actual, feature, rtol=0, atol=1e-5 * feature.abs().max().item())
