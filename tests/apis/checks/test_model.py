# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Heads and evaluators against the data."""
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric, MultiDatasetsEvaluator
from mmengine.config import ConfigDict
from mmengine.dataset import ConcatDataset
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.datasets import CustomDataset
from mmseg.datasets import BaseSegDataset
from torch import nn

from revcol_mm.apis.checks.model import check_semantic_maps, check_sliding_window
from revcol_mm.apis.checks.run import DataChecks
from revcol_mm.apis.config import load_config
from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.test import parse_test_args
from revcol_mm.utils.configs import config_path
from tests.apis.checks.made_up import Head, check_maps, coco_set, loaders, model_of, write_coco, write_folders, write_maps


def test_an_evaluator_with_other_images_is_refused(checks, tmp_path):
    val = coco_set(write_coco(tmp_path, 'val'))
    metric = CocoMetric(str(write_coco(tmp_path, 'other', objects=('disc', 'square', 'disc'))))
    with pytest.raises(LaunchError, match='val_evaluator.ann_file must list the images of val_dataloader.*has 1 others'):
        checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))


def test_an_evaluator_with_the_same_ids_of_other_images_is_refused(checks, tmp_path):
    def rename(content):
        content['images'][0]['file_name'] = 'else.png'

    val, metric = coco_set(write_coco(tmp_path, 'val')), CocoMetric(str(write_coco(tmp_path, 'other', change=rename)))
    with pytest.raises(LaunchError, match="1 of its 2 images .*'0.png'.* are not in it"):
        checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))


def test_a_copy_of_the_annotation_file_is_accepted(checks, tmp_path):
    val, metric = coco_set(write_coco(tmp_path, 'val')), CocoMetric(str(write_coco(tmp_path, 'copy')))
    checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))


@pytest.mark.parametrize('count', [1, 3])
def test_heads_of_another_number_of_classes_are_refused(checks, tmp_path, count):
    dataset = coco_set(write_coco(tmp_path))
    with pytest.raises(LaunchError, match=rf'2 classes of train_dataloader, .*model.bbox_head \(Head\) is {count}: set num_cl'):
        checks.check(loaders(train=dataset), model_of(count), {})


@pytest.mark.parametrize('count', [1, 3])
def test_heads_of_classifiers_and_segmentors_are_checked_too(checks, tmp_path, count):
    with pytest.raises(LaunchError, match=r'model.decode_head .* set num_classes=2'):
        check_maps(checks, BaseSegDataset(**write_maps(tmp_path, [0, 1]), metainfo=dict(classes=('a', 'b'))), count)
    other = DataChecks()
    other.watch()
    dataset = CustomDataset(data_root=write_folders(tmp_path / 'c', 'a', 'b'))
    other.stop()
    with pytest.raises(LaunchError, match=r'model.head .* set num_classes=2'):
        other.check(loaders(train=dataset), nn.ModuleDict(dict(head=Head(count))), {})


def test_a_head_that_counts_more_ranks_than_classes_is_refused(checks, tmp_path):
    head = Head(2)
    head.cal_acc, head.topk = True, (1, 5)
    dataset = CustomDataset(data_root=write_folders(tmp_path, 'a', 'b'))
    with pytest.raises(LaunchError, match=r'topk of model.head must be at most the 2 classes.*is \(1, 5\): set topk=\(1,\)'):
        checks.check(loaders(train=dataset), nn.ModuleDict(dict(head=head)), {})


@pytest.mark.parametrize('steps, found', [
    ([LoadAnnotations(with_bbox=True)], 'set with_seg=True and data_prefix.seg in the data set; for a training without'),
    ([LoadAnnotations(with_bbox=True, with_seg=True)], 'its data_prefix names only img: set data_prefix.seg')])
def test_a_semantic_branch_without_semantic_maps_is_refused(checks, tmp_path, steps, found):
    dataset = coco_set(write_coco(tmp_path), pipeline=steps)
    model = nn.ModuleDict(dict(roi_head=nn.ModuleDict(dict(semantic_head=Head(183), bbox_head=Head(2)))))
    with pytest.raises(LaunchError, match=found):
        checks.check(loaders(train=dataset), model, {})


def test_a_semantic_branch_is_accepted_with_semantic_maps(checks, tmp_path):
    path = write_coco(tmp_path)
    dataset = CocoDataset(ann_file=str(path), metainfo=dict(classes=('disc', 'square')),
                          pipeline=[LoadAnnotations(with_seg=True)],
                          data_prefix=dict(img=str(tmp_path / 'train'), seg=str(tmp_path / 'train')))
    check_semantic_maps(nn.ModuleDict(dict(semantic_head=Head(183))), [dataset], 'train_dataloader')


def test_class_names_of_the_evaluation_of_single_classes_are_those_of_the_file(checks, tmp_path):
    """Ids that are not sorted: mmdet alone swaps the names of the results."""
    path = write_coco(tmp_path, 'val', objects=('disc', 'square'), ids=dict(disc=90, square=7))
    val, metric = coco_set(path), CocoMetric(str(path), classwise=True)
    checks.check(loaders(val=val), model_of(2), dict(val=Evaluator([metric])))
    metric.dataset_meta = val.metainfo
    for index in range(2):  # the disc is found, the square is not
        instance, = val.get_data_info(index)['instances']
        prediction = dict(bboxes=torch.tensor([instance['bbox']]), scores=torch.tensor([0.9]), labels=torch.tensor([0]))
        metric.process({}, [dict(img_id=index, ori_shape=(40, 50), pred_instances=prediction)])
    metrics = metric.evaluate(2)
    assert metrics['coco/disc_precision'] > 0.4 and metrics['coco/square_precision'] == 0


def test_images_of_several_sets_with_one_id_are_refused_for_an_evaluation(checks, tmp_path):
    sets = [coco_set(write_coco(tmp_path, name)) for name in ('val', 'more')]
    metric = CocoMetric()
    with pytest.raises(LaunchError, match='4 images have 2 ids'):
        checks.check(loaders(val=ConcatDataset(sets)), model_of(2), dict(val=Evaluator([metric])))


def test_each_metric_of_several_sets_is_checked_against_its_own(checks, tmp_path):
    files = [write_coco(tmp_path, 'val'), write_coco(tmp_path, 'more', objects=('disc', ))]
    metrics = [CocoMetric(str(path)) for path in files]
    evaluator = MultiDatasetsEvaluator(metrics, ('val', 'more'))
    checks.check(loaders(val=ConcatDataset(list(map(coco_set, files)))), model_of(2), dict(val=evaluator))
    assert all(metric.cat_ids == [1, 2] for metric in metrics)


def test_a_boundary_head_has_its_own_two_classes(checks, tmp_path):
    class STDCHead(Head):
        pass

    model = nn.ModuleDict(dict(decode_head=Head(3), auxiliary_head=nn.ModuleList([Head(3), STDCHead(2)])))
    dataset = BaseSegDataset(**write_maps(tmp_path, [0, 1, 2]), metainfo=dict(classes=('a', 'b', 'c')))
    checks.check(loaders(train=dataset), model, {})


def test_a_sliding_window_of_mask2former_gives_the_map_of_the_whole_image(monkeypatch):
    from mmseg.models.decode_heads import Mask2FormerHead, MaskFormerHead
    for kind in (Mask2FormerHead, MaskFormerHead):  # restored after the test
        monkeypatch.setattr(kind, 'predict', kind.predict)
    cfg = load_config(parse_test_args([config_path('demo/mask2former_revcol_nano_digits'), 'x.pth']))
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    sample = dict(img_shape=(96, 96), ori_shape=(96, 96), pad_shape=(96, 96))
    with torch.no_grad():
        whole = model.inference(image, [dict(sample)])
        model.test_cfg = ConfigDict(mode='slide', crop_size=(64, 64), stride=(32, 32))
        with pytest.raises(RuntimeError):
            model.inference(image, [dict(sample)])
        check_sliding_window(model)
        assert model.inference(image, [dict(sample)]).shape == whole.shape
        model.test_cfg.update(crop_size=(96, 96))
        torch.testing.assert_close(model.inference(image, [dict(sample)]), whole)


def test_all_heads_of_another_size_are_named(checks, tmp_path):
    model = nn.ModuleDict(dict(bbox_head=Head(2), mask_head=Head(80), auxiliary_head=Head(150)))
    with pytest.raises(LaunchError, match=r'model.mask_head \(Head\) is 80, that of model.auxiliary_head \(Head\) is 150: set '
                                          'num_classes=2'):
        checks.check(loaders(train=coco_set(write_coco(tmp_path))), model, {})
