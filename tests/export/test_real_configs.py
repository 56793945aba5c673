# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Real configs at full width, with random weights that find much: export_model checks each file against the model itself."""
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from revcol_mm.export import export_model
from tests.common import load_config
from tests.export.demo import spread_scores

SIZES = [(225, 323), (256, 256)]


@pytest.mark.slow
@pytest.mark.parametrize('name, bounds', [
    ('cascade_rcnn_revcol_t', dict(boxes=0.02, scores=2e-4, unmatched=0.02, masks=2e-3)),
    ('dino_revcol_b_in22k', dict(boxes=0.02, scores=2e-4, unmatched=0.02)),
    ('upernet_revcol_t', dict(logits=1e-5)),
    ('mask2former_revcol_t', dict(labels=1e-5)),
])
def test_file_of_a_real_config_predicts_what_the_model_does(name, bounds, tmp_path):
    cfg = load_config(name)
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(1)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    spread_scores(model)
    deviations = export_model(model.eval(), str(tmp_path / 'net.onnx'), SIZES)
    assert list(deviations) == SIZES
    for deviation in deviations.values():
        assert deviation.keys() == bounds.keys()
        assert all(deviation[key] <= bound for key, bound in bounds.items()), deviation
