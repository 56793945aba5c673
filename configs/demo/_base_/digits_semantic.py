# What the segmentors on the bundled digits share, as digits_coco.py for the detectors. Background is a class of its own. It
# is left out of the mean IoU, because it would make the mean too good.
_base_ = 'digits_coco.py'

digits_meta = dict(
    classes=(*'0123456789', 'background'),
    palette=[[230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180], [70, 240, 240],
             [240, 50, 230], [210, 245, 60], [0, 128, 128], [0, 0, 0]])
digits_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
digits_test_pipeline = digits_train_pipeline
digits_train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root=_base_.digits_root,
        metainfo=digits_meta,
        img_suffix='.jpg',
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        pipeline=digits_train_pipeline))
digits_val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root=_base_.digits_root,
        metainfo=digits_meta,
        img_suffix='.jpg',
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        pipeline=digits_test_pipeline))
digits_evaluator = dict(_delete_=True, type='ForegroundIoUMetric', iou_metrics=['mIoU'])
