# Table 8, kernel 7. The paper pre-trains RevCol-T with this kernel size, and those weights are not public. The best
# replacement is the public 3x3 weights, padded: python tools/pad_kernels.py checkpoints/revcol_tiny_1k.pth --size 7
_base_ = 'cascade_rcnn_revcol_t_1x.py'

model = dict(backbone=dict(kernel_size=7, init_cfg=dict(checkpoint='checkpoints/revcol_tiny_1k_k7.pth')))
