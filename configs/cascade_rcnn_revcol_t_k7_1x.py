# Table 8, kernel 7. The paper pre-trains RevCol-T with this kernel size, and those weights are not public. The best
# replacement is the public 3x3 weights, which are padded while they are loaded.
_base_ = 'cascade_rcnn_revcol_t_1x.py'

model = dict(backbone=dict(kernel_size=7, pad_pretrained=True))
