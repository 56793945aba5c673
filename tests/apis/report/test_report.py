# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The page of tools/test.py --report: its values against independent computations, and that it needs no other file."""
import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation.metrics import coco_metric
from mmengine.config import Config
from mmpretrain.structures import DataSample
from sklearn.metrics import precision_recall_curve

from revcol_mm.apis.errors import LaunchError
from revcol_mm.apis.report import Reporter
from revcol_mm.apis.report.classification import ClassificationCollector, recall_and_precision
from revcol_mm.apis.report.detection import find_of_detection, match, recorded_evaluations
from revcol_mm.apis.report.findings import Findings, Judged, extremes
from revcol_mm.apis.report.segmentation import SegmentationCollector
from revcol_mm.apis.test import test as run_test
from revcol_mm.apis.train import train

NAMES = ('disc', 'square', 'star')


class Page(HTMLParser):
    """The tables of a page by their ids, its pictures, and everything that would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[bytes] = []
        self.foreign: list[str] = []
        self.open: list[str] = []
        self.cell = False
        self.feed(text)
        assert not self.open  # every element ends

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ('meta', 'img'):
            self.open.append(tag)
        self.foreign += [tag] * (tag in ('script', 'link', 'iframe', 'object'))
        self.foreign += [value for key in ('src', 'href') if (value := attributes.get(key, 'data:'))[:5] != 'data:']
        if tag == 'table':
            self.rows = self.tables.setdefault(attributes['id'], [])
        elif tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')
            self.cell = True
        elif tag == 'img':
            self.pictures.append(base64.b64decode(attributes['src'].partition('base64,')[2]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data

    def columns(self, name: str) -> dict[str, list[str]]:
        head, *rows = self.tables[name]
        return dict(zip(head, zip(*rows)))


def written(findings: Findings, tmp_path: Path, **metrics) -> Page:
    """The page of findings, without pictures of images."""
    reporter = Reporter(str(tmp_path / 'report.html'), Config(dict(default_scope='mmdet', launcher='none')), 'x.pth')
    reporter.seconds, reporter.sizes, reporter._findings = [1.], [1], lambda: replace(findings, images=[])
    reporter.write(metrics)
    return Page((tmp_path / 'report.html').read_text())


# Values --------------------------------------------------------------------------------------------------------------------

def evaluate(truths: list[tuple], found: list[tuple], tmp_path: Path, ids=(1, 2, 3)):
    """pycocotools' evaluation of (image, class, box) and (image, class, box, score), through mmdet's metric."""
    images = [dict(id=index, file_name=f'{index}.png', width=100, height=100) for index in (1, 2)]
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(dict(
        images=images, categories=[dict(id=index, name=name) for index, name in zip(ids, NAMES)],
        annotations=[dict(id=number + 1, image_id=image, category_id=ids[label], bbox=box, area=box[2] * box[3], iscrowd=0)
                     for number, (image, label, box) in enumerate(truths)])))
    metric = coco_metric.CocoMetric(str(path), metric='bbox')
    metric.dataset_meta = dict(classes=NAMES)
    samples = []
    for image in images:
        own = [one for one in found if one[0] == image['id']]
        boxes = torch.tensor([box for _, _, box, _ in own], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        samples.append(dict(img_id=image['id'], ori_shape=(100, 100), pred_instances=dict(
            bboxes=boxes, labels=torch.tensor([label for _, label, _, _ in own], dtype=torch.long),
            scores=torch.tensor([score for *_, score in own]))))
    metric.process({}, samples)
    with recorded_evaluations() as kept:
        metrics = metric.evaluate(len(samples))
    return kept, metrics


@pytest.mark.parametrize('ids', [(1, 2, 3), ('d', 'q', 't')])
def test_ap_confusions_and_f1_are_those_of_a_case_computed_by_hand(tmp_path, ids):
    truths = [(1, 0, [0, 0, 20, 20]), (1, 1, [40, 40, 20, 20]), (2, 0, [0, 0, 20, 20]), (2, 1, [60, 0, 20, 20])]
    found = [(1, 0, [0, 0, 20, 20], .9), (1, 1, [40, 40, 20, 20], .8),  # both right
             (2, 1, [0, 0, 20, 20], .7),                              # a disc that is taken for a square
             (2, 0, [60, 60, 20, 20], .6),                            # nothing is there
             (2, 1, [60, 0, 20, 20], .1)]                             # right, but too unsure to count as one
    kept, metrics = evaluate(truths, found, tmp_path, ids)
    result = find_of_detection(kept, {1: 'one.png', 2: 'two.png'}, {index: label for label, index in enumerate(ids)})
    assert result.classes == list(NAMES) and result.table['objects'] == [2, 2, 0]
    # Disc: one of two objects, found first: 51 of the 101 points of recall. Square: found first and third, so that precision
    # is 1 up to half of the objects, and 2/3 beyond.
    expected = [51 / 101, (51 + 50 * 2 / 3) / 101, float('nan')]
    assert result.table['box AP'] == pytest.approx(expected, nan_ok=True)
    assert np.nanmean(result.table['box AP']) == pytest.approx(metrics['coco/bbox_mAP'], abs=5e-4)  # which is rounded
    assert result.confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert {image.path: image.score for image in result.images} == {'one.png': 1., 'two.png': 0.}
    curves = dict(result.curves)
    recall, precision = curves['square']
    assert precision[recall <= 0.5] == pytest.approx([1.] * 51) and precision[-1] == pytest.approx(2 / 3)
    assert 'star' not in curves


def test_the_mean_of_the_classes_is_the_metric_with_more_than_100_predictions_in_an_image(tmp_path):
    truths = [(1, 0, [0, 0, 20, 20]), (1, 1, [40, 40, 20, 20])]
    wrong = [(1, label, [80, 80, 10, 10], 1 - number / 1000) for label in (0, 1) for number in range(105)]
    found = [*wrong, (1, 0, [0, 0, 20, 20], .1), (1, 1, [40, 40, 20, 20], .95)]  # the first one is the 106th of its class
    kept, metrics = evaluate(truths, found, tmp_path)
    table = find_of_detection(kept, {1: 'one.png', 2: 'two.png'}, {1: 0, 2: 1, 3: 2}).table
    assert table['box AP'][0] == 0 < table['box AP50'][0]
    for column, metric in (('box AP', 'mAP'), ('box AP50', 'mAP_50'), ('box AP75', 'mAP_75')):
        assert np.nanmean(table[column]) == pytest.approx(metrics[f'coco/bbox_{metric}'], abs=5e-4)  # which is rounded


def test_small_images_are_enlarged_with_their_boxes_and_masks(tmp_path):
    cv2.imwrite(str(tmp_path / '1.png'), np.zeros((100, 100, 3), np.uint8))
    kept, _ = evaluate([(1, 0, [10, 20, 30, 40])], [(1, 0, [10, 20, 30, 40], .9)], tmp_path)
    kept['bbox'].cocoGt.anns[1]['segmentation'] = [[10, 20, 40, 20, 40, 60, 10, 60]]
    found = kept['bbox'].cocoDt.anns[1]
    found['segmentation'] = kept['bbox'].cocoGt.anns[1]['segmentation']
    judged, _ = find_of_detection(dict(kept, segm=kept['bbox']), {1: str(tmp_path / '1.png'), 2: 'two.png'}, {1: 0}).images
    drawn = []
    judged.draw(SimpleNamespace(add_datasample=lambda name, image, sample, **kwargs: drawn.append((image, sample))), 'x.png')
    (image, sample), = drawn
    assert image.shape == (300, 300, 3)
    for part in (sample.gt_instances, sample.pred_instances):
        assert part.bboxes.tolist() == [[30, 60, 120, 180]]
        assert part.masks.shape == (1, 300, 300) and part.masks[0, 60:180, 30:120].all() and part.masks.sum() == 120 * 90


def test_a_prediction_takes_the_free_object_that_it_overlaps_most_and_crowds_count_for_nothing():
    near, far, crowd = [0, 0, 10, 10], [0, 2, 10, 10], [50, 50, 40, 40]
    found = [near, near, [60, 60, 10, 10], [20, 80, 5, 5]]
    pairs = match([near, far, crowd], [0, 1, 2], [False, False, True], found, [0, 0, 2, 2])
    assert pairs == [(0, 0), (1, 0), (-1, 2)]  # the second one overlaps `far` by two thirds; the third lies in the crowd
    assert match([], [], [], [], []) == []
    assert match([near], [1], [False], [], []) == [(1, -1)]


@pytest.mark.parametrize('ignored', [255, 254])
def test_pixels_are_counted_as_by_mmseg_s_metric(tmp_path, ignored):
    from mmengine.structures import PixelData
    from mmseg.evaluation import IoUMetric
    from mmseg.structures import SegDataSample
    generator = np.random.default_rng(0)
    collector, metric = SegmentationCollector(NAMES, ignored), IoUMetric(ignore_index=ignored)
    metric.dataset_meta = dict(classes=NAMES)
    for index in range(40):
        truth, found = generator.integers(0, 3, (2, 1, 6, 7))
        truth[0, 0, :2] = ignored
        found[0] = np.where(generator.random((6, 7)) < index / 40, truth[0] % ignored, found[0])
        sample = SegDataSample(metainfo=dict(img_path=str(index)))
        sample.set_data(dict(gt_sem_seg=PixelData(data=torch.from_numpy(truth)),
                             pred_sem_seg=PixelData(data=torch.from_numpy(found))))
        collector.add([sample])
        metric.process({}, [sample.to_dict()])
    result, expected = collector.findings(), metric.evaluate(40)
    assert 100 * np.mean(result.table['IoU']) == pytest.approx(expected['mIoU'], abs=0.006)  # which is rounded
    assert 100 * np.mean(result.table['accuracy']) == pytest.approx(expected['mAcc'], abs=0.006)
    assert sum(result.table['pixels']) == 40 * 40
    best, worst = extremes(result.images)
    assert len(best) == len(worst) == 4 and len(result.images) <= 32
    assert min(map(int, (image.path for image in best))) > max(map(int, (image.path for image in worst)))


def test_precision_and_recall_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    scores, positive = generator.random(50).round(1), generator.random(50) < 0.4  # with equal scores
    recall, precision = recall_and_precision(scores, positive)
    theirs, their_recall, _ = precision_recall_curve(positive, scores)
    assert recall[::-1] == pytest.approx(their_recall[:-1]) and precision[::-1] == pytest.approx(theirs[:-1])


def test_the_accuracy_of_each_class_and_what_it_is_taken_for_are_counted():
    collector = ClassificationCollector(NAMES)
    for truth, scores in ((0, [.7, .2, .1]), (0, [.1, .8, .1]), (1, [0., 1., 0.]), (0, [.6, .2, .2])):
        sample = DataSample(metainfo=dict(img_path=f'{scores}')).set_gt_label(truth).set_pred_score(torch.tensor(scores))
        collector.add([sample])
    result = collector.findings()
    assert result.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert result.table['top-1'] == pytest.approx([2 / 3, 1, float('nan')], nan_ok=True)
    assert [round(image.score, 1) for image in result.images] == [.7, .1, 1., .6]
    assert [name for name, _ in result.curves] == ['disc', 'square']


@pytest.mark.parametrize('labels', [[], [0, 2]])
def test_images_with_several_labels_or_none_are_refused(labels):
    sample = DataSample(metainfo=dict(img_path='x.jpg')).set_gt_label(torch.tensor(labels, dtype=torch.long))
    with pytest.raises(LaunchError, match=f'one label for each image, but x.jpg has {len(labels)}: leave --report out'):
        ClassificationCollector(NAMES).add([sample])


def test_classes_of_one_name_are_all_shown(tmp_path, monkeypatch):
    names = ('crane', 'truth', 'crane')
    monkeypatch.setattr(f'{__name__}.NAMES', names)
    kept, _ = evaluate([(1, label, [0, 0, 20, 20]) for label in range(3)], [(1, 0, [0, 0, 20, 20], .9)], tmp_path)
    monkeypatch.undo()
    collector = ClassificationCollector(names)
    for truth, found in ((0, 2), (1, 1), (2, 2)):
        sample = DataSample(metainfo=dict(img_path='')).set_gt_label(truth).set_pred_score(torch.eye(3)[found])
        collector.add([sample])
    of_boxes = find_of_detection(kept, {1: '', 2: ''}, {1: 0, 2: 1, 3: 2})
    for result, counts in ((of_boxes, [['1', '0', '0', '0'], ['0', '0', '0', '1'], ['0', '0', '0', '1'], ['0', '0', '0', '0']]),
                           (collector.findings(), [['0', '0', '1'], ['0', '1', '0'], ['0', '0', '1']])):
        assert [name for name, _ in result.curves] == list(names)
        shown = written(result, tmp_path).tables
        assert [row[0] for row in shown['classes'][1:]] == list(names)
        head, *rows = shown['confusion']
        assert head == ['truth', *result.confused] and [row[1:] for row in rows] == counts


def test_no_image_is_among_the_best_and_the_worst():
    images = [Judged(score, str(score), None) for score in (.3, .1, .2)]
    best, worst = extremes(images)
    assert [image.score for image in best] == [.3, .2] and [image.score for image in worst] == [.1]


# Pages ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.usefixtures('own_surroundings', 'no_visualizer_of_another_run')
@pytest.mark.parametrize('name, metric, column', [('detection', 'coco/bbox_mAP', 'box AP'), ('segmentation', 'mIoU', 'IoU'),
                                                  ('classification', 'accuracy/top1', 'top-1')])
def test_a_page_has_the_metrics_of_the_test_and_needs_no_other_file(workshop, tmp_path, name, metric, column):
    config = str(workshop / f'{name}.py')
    train([config, '--work-dir', 'work'])
    assert cv2.imread('work/curves.png') is not None
    options = ['--cfg-options', 'model.test_cfg.rcnn.score_thr=0.'] if name == 'detection' else []
    metrics = run_test([config, 'work/iter_2.pth', '--work-dir', 'work', '--report', 'report.html', *options])
    shown = Page((tmp_path / 'report.html').read_text())
    assert not shown.foreign
    assert all(cv2.imdecode(np.frombuffer(picture, np.uint8), 1) is not None for picture in shown.pictures)
    count = 8 if name == 'classification' else 2
    assert len(shown.pictures) == count + (1 if name == 'segmentation' else 2)
    values = {key: -1 if value == '–' else float(value) for key, value in zip(*shown.columns('metrics').values())}
    assert values == pytest.approx(metrics, abs=5e-4)
    values = np.array([float(value) for value in shown.columns('classes')[column] if value != '–'])
    weights = [int(value) for value in shown.columns('classes')['images']] if name == 'classification' else None
    factor = 1 if name == 'detection' else 100
    assert factor * np.average(values, weights=weights) == pytest.approx(metrics[metric], abs=factor * 1e-3)
    names = shown.columns('classes')['class']
    assert names[:10] == tuple('0123456789') and len(shown.tables['confusion']) >= 1 + len(names)


def test_metrics_that_are_no_numbers_are_shown_as_text(tmp_path):
    findings = Findings({}, NAMES, np.eye(3, dtype=int), NAMES, 'chance', [])
    metrics = dict(python=0.25, missing=-1, tensor=torch.tensor(0.5), array=np.array(0.75), numpy=np.float32(1), none=None,
                   list=[0.5, 0.25], values=np.array([1, 2]), tensors=torch.tensor([1, 2]), text='good')
    shown = dict(written(findings, tmp_path, **metrics).tables['metrics'][1:])
    assert shown == dict(python='0.250', missing='–', tensor='0.500', array='0.750', numpy='1.000', none='None',
                         list='[0.5, 0.25]', values='[1 2]', tensors='tensor([1, 2])', text='good')


def test_a_report_that_is_not_possible_is_refused_with_the_reason(tmp_path):
    def reporter(path='report.html', **settings):
        cfg = Config(dict(default_scope='mmdet', launcher='none') | settings, filename='x.py', cfg_text=' ')
        return Reporter(path, cfg, 'x.pth')

    for arguments, said in ((dict(path='report'), 'must be a file that ends in .html, but got report'),
                            (dict(launcher='pytorch'), 'one process, but got --launcher pytorch'),
                            (dict(default_scope='mmrotate'), "default_scope of x.py is 'mmrotate'")):
        with pytest.raises(LaunchError, match=said):
            reporter(**arguments)
    with pytest.raises(Exception, match='does not exist'):
        reporter(str(tmp_path / 'none' / 'report.html'))
