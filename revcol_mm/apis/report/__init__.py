# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""``tools/test.py --report``: what a test has found, in one HTML page that needs no other file.

=====================  =======================================================================================
file                   what it does
=====================  =======================================================================================
:mod:`detection`       per-class AP, precision-recall curves and confusions from pycocotools' evaluation
:mod:`segmentation`    per-class IoU and confusions of pixels
:mod:`classification`  per-class accuracy, precision-recall curves and confusions
:mod:`findings`        what the three have in common, and its pictures
:mod:`page`            the HTML
=====================  =======================================================================================
"""
from .reporter import Reporter

__all__ = ['Reporter']
