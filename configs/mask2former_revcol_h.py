# RevCol-H with kernels padded to 13x13 (appendix D.3.1) and a widened Mask2Former head.
# Pre-trained weights: revcol_models/classification/revcol_huge_megdata.pth of https://huggingface.co/LarryTsai/RevCol,
# the authors' own. Put them where `checkpoint` says, padded by
#   python tools/pad_kernels.py checkpoints/revcol_huge_megdata.pth --size 13
# The paper prints 2439M parameters (table 3) and no settings. The backbone has 2175M with these kernels, which leaves 264M for
# the head. The standard head has some 20M. Here it is widened, as is usual behind huge backbones: 1024 channels throughout
# (pixel decoder, queries, transformer decoder), 32 heads, 200 queries, FFNs of 4096 in the pixel decoder (four times the width,
# as in the standard head) and 5120 in the decoder (five times; the standard head's eight times would give a head of 316M). The
# head then has 260M, and the whole model 2435M.
_base_ = '_base_/mask2former_revcol_640.py'

width = 1024
model = dict(
    backbone=dict(arch='huge', kernel_size=13, init_cfg=dict(checkpoint='checkpoints/revcol_huge_megdata_k13.pth')),
    decode_head=dict(
        in_channels=[360, 720, 1440, 2880],
        feat_channels=width,
        out_channels=width,
        num_queries=200,
        pixel_decoder=dict(
            encoder=dict(
                layer_cfg=dict(
                    self_attn_cfg=dict(embed_dims=width, num_heads=32),
                    ffn_cfg=dict(embed_dims=width, feedforward_channels=4 * width))),
            positional_encoding=dict(num_feats=width // 2)),
        positional_encoding=dict(num_feats=width // 2),
        transformer_decoder=dict(
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=width, num_heads=32),
                cross_attn_cfg=dict(embed_dims=width, num_heads=32),
                ffn_cfg=dict(embed_dims=width, feedforward_channels=5 * width)))))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
param_scheduler = _base_.param_scheduler_warmup_3000
train_dataloader = dict(batch_size=1)  # 8 GPUs x 1 image
auto_scale_lr = dict(base_batch_size=8)
