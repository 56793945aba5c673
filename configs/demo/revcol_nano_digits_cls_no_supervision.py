# The classification demo without intermediate supervision: one classifier, on the last column.
_base_ = 'revcol_nano_digits_cls.py'

model = dict(
    type='ImageClassifier',
    backbone=dict(out_indices=(3, )),
    head=dict(
        _delete_=True,
        type='RevColClsHead',
        num_classes=10,
        in_channels=128,
        cal_acc=True,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

val_evaluator = dict(_delete_=True, type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
