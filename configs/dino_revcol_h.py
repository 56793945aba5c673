# RevCol-H with DINO on COCO, from the Objects365 model of dino_revcol_h_o365.py (section 3.2). The layers that depend on the
# number of classes have other shapes, so they start from new weights; mmengine's warning names them.
#
# What the paper leaves open, and the choice here: 12 epochs, a drop after 11, and half the learning rate of the 22K models.
_base_ = '_base_/dino_revcol.py'

load_from = 'work_dirs/dino_revcol_h_o365/epoch_12.pth'

model = dict(
    backbone=dict(arch='huge', kernel_size=7, drop_path_rate=0.5, init_cfg=None),
    neck=dict(in_channels=[360, 720, 1440, 2880]))

optim_wrapper = dict(optimizer=dict(lr=5e-5), paramwise_cfg=dict(layer_decay_rate=0.8))
train_cfg = dict(max_epochs=12)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)]
train_dataloader = dict(batch_size=1)  # 16 GPUs x 1 image
