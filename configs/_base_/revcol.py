# RevCol-T with the authors' ImageNet-1K weights. It replaces the backbone of a detector's or segmentor's own base; configs of
# larger sizes override it. It has a name of its own, because those bases define `model`.
revcol_tiny = dict(
    _delete_=True,
    type='RevCol',
    arch='tiny',
    drop_path_rate=0.3,
    reversible=True,  # False: plain autograd, faster, with memory that grows with the columns
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/megvii-research/RevCol/releases/download/checkpoint/revcol_tiny_1k.pth'))
