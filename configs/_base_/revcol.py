# RevCol-T with the authors' ImageNet-1K weights, in place of whatever backbone a detector's or segmentor's own base has; larger
# sizes override. Under a name of its own, since those bases bring a `model`.
revcol_tiny = dict(
    _delete_=True,
    type='RevCol',
    arch='tiny',
    drop_path_rate=0.3,
    reversible=True,  # False: plain autograd, faster, with memory that grows with the columns
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_tiny_1k.pth'))
