# Table 8, kernel 5. The paper pre-trains RevCol-T with this kernel; those weights are not public. The next best are its 3x3
# ones, padded: python tools/pad_kernels.py checkpoints/revcol_tiny_1k.pth --size 5
_base_ = 'cascade_rcnn_revcol_t_1x.py'

model = dict(backbone=dict(kernel_size=5, init_cfg=dict(checkpoint='checkpoints/revcol_tiny_1k_k5.pth')))
