# The demo's detector on the backbone of the classification demo (four columns), with 7x7 kernels: what benchmarks/carry_over.py
# fine-tunes. Weights, padded to 7x7:
#   --cfg-options model.backbone.init_cfg._delete_=True model.backbone.init_cfg.type=Pretrained \
#     model.backbone.init_cfg.checkpoint=…
_base_ = 'cascade_rcnn_revcol_nano_digits.py'

model = dict(backbone=dict(arch=dict(num_columns=4), kernel_size=7))
