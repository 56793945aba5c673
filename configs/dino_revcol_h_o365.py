# RevCol-H with kernels padded to 7x7 (appendix D.3.1), first step of the paper's best detector: DINO on Objects365 v2. The
# second, dino_revcol_h.py, is COCO.
# Pre-trained weights: revcol_models/classification/revcol_huge_megdata.pth of https://huggingface.co/LarryTsai/RevCol,
# the authors' own. Put them where `checkpoint` says, padded by
#   python tools/pad_kernels.py checkpoints/revcol_huge_megdata.pth --size 7
#
# What the paper leaves open, and the choice here: 12 epochs, mmdet's short schedule, at twice the batch, since Objects365 v2
# has fifteen times the images of COCO; layer decay as in RevCol-H's ImageNet fine-tuning, drop path as RevCol-L's detectors.
_base_ = '_base_/dino_revcol.py'

model = dict(
    backbone=dict(
        arch='huge', kernel_size=7, drop_path_rate=0.5, init_cfg=dict(checkpoint='checkpoints/revcol_huge_megdata_k7.pth')),
    neck=dict(in_channels=[360, 720, 1440, 2880]),
    bbox_head=dict(num_classes=365))

optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay_rate=0.8))
train_cfg = dict(max_epochs=12)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)]
auto_scale_lr = dict(base_batch_size=32)  # 32 GPUs x 1 image

data_root = 'data/Objects365/Obj365_v2/'
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type='Objects365V2Dataset',
        data_root=data_root,
        ann_file='annotations/zhiyuan_objv2_train.json',
        data_prefix=dict(img='train/')))
val_dataloader = dict(
    dataset=dict(
        type='Objects365V2Dataset',
        data_root=data_root,
        ann_file='annotations/zhiyuan_objv2_val.json',
        data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/zhiyuan_objv2_val.json')
test_evaluator = val_evaluator
