# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What the columns of a trained network have learnt: heat maps, similarities, memory. See docs/analysis.md.

Levels and columns are counted from 0, as in ``backbone(x, outputs=[(column, level), …])``.
"""
