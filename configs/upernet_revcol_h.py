# RevCol-H with kernels padded to 7x7, as in the authors' release; for the paper's 13x13 (appendix D.3.1) pad to 13 and add
#   --cfg-options model.backbone.kernel_size=13 model.backbone.init_cfg.checkpoint=checkpoints/revcol_huge_megdata_k13.pth
# Pre-trained weights: revcol_models/classification/revcol_huge_megdata.pth of https://huggingface.co/LarryTsai/RevCol,
# the authors' own. Put them where `checkpoint` says, padded by
#   python tools/pad_kernels.py checkpoints/revcol_huge_megdata.pth --size 7
_base_ = '_base_/upernet_revcol_640.py'

model = dict(
    backbone=dict(arch='huge', kernel_size=7, init_cfg=dict(checkpoint='checkpoints/revcol_huge_megdata_k7.pth')),
    decode_head=dict(in_channels=[360, 720, 1440, 2880], channels=1440),
    auxiliary_head=dict(in_channels=1440))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
param_scheduler = _base_.param_scheduler_warmup_3000
train_dataloader = dict(batch_size=1)  # 8 GPUs x 1 image
auto_scale_lr = dict(base_batch_size=8)
