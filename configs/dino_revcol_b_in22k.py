_base_ = '_base_/dino_revcol.py'
