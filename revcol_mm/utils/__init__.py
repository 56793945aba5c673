# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Configs by name, and counting of FLOPs and of memory."""
