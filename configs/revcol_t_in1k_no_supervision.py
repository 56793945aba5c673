# RevCol-T without intermediate supervision (table 7), with one classifier on the last column: 81.4 top-1 in the paper.
_base_ = 'revcol_t_in1k.py'

model = dict(
    type='ImageClassifier',
    backbone=dict(out_indices=(3, )),
    head=dict(
        _delete_=True,
        type='RevColClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

val_evaluator = dict(_delete_=True, type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
