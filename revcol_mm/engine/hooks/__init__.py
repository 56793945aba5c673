# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""Training hooks; :mod:`revcol_mm.engine` imports them."""
