# The paper trains no segmentor on RevCol-XL, and its weights are not public. Rates are RevCol-L's. Put your own ImageNet-22K
# weights where `checkpoint` says (--cfg-options model.backbone.init_cfg.checkpoint=… for another place).
_base_ = 'upernet_revcol_l_in22k.py'

model = dict(
    backbone=dict(arch='xlarge', init_cfg=dict(checkpoint='checkpoints/revcol_xlarge_22k.pth')),
    decode_head=dict(in_channels=[224, 448, 896, 1792]),
    auxiliary_head=dict(in_channels=896))
