# UPerNet for RevCol on ADE20K, crops of 640x640 (ImageNet-22K and extra-data pre-training).
_base_ = './upernet_revcol.py'

crop_size = (640, 640)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor, test_cfg=dict(crop_size=crop_size, stride=(426, 426)))

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (2560, 640)  # RandomResize
train_pipeline[3].crop_size = crop_size  # RandomCrop
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (2560, 640)  # Resize
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(2560 * ratio), int(640 * ratio)), keep_ratio=True) for ratio in _base_.img_ratios]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
