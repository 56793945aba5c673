# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""The parameters of a module, wherever FullyShardedDataParallel and torch.compile have put them."""
from typing import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.utils.parametrize import is_parametrized


def find_parameters(module: nn.Module, names: Sequence[str], label: str) -> dict[str, Tensor]:
    """Returns name and tensor of every parameter that a module uses.

    A parameter that is tied has an entry under each of its names. The parameters of a shared submodule have one entry each,
    under its first name.

    Args:
        module (nn.Module): the module.
        names (Sequence[str]): names of its parameters when it was built. Inside a forward pass of FullyShardedDataParallel the
            parameters are plain attributes, which ``named_parameters()`` does not list; they are found by these names.
        label (str): the module's name, for the message.

    Returns:
        dict[str, Tensor]: the tensors by name.

    Raises:
        RuntimeError: if a part of the module is sharded by itself, because its parameters are not available outside of it.
    """
    found: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        if isinstance(part, (FSDPModule, FullyShardedDataParallel)):
            raise RuntimeError(f'{label}{"." * bool(prefix)}{prefix} is sharded by itself, but reversible training needs all '
                               'parameters of a column at once: shard whole columns (strategy.type=RevColFSDPStrategy does so; '
                               "FSDP's mixed precision wraps every BatchNorm by itself), or build the backbone with "
                               'reversible=False')
        found.update({f'{prefix}.{leaf}' if prefix else leaf: parameter
                      for leaf, parameter in part._parameters.items() if parameter is not None})
    known = set(map(id, found.values()))
    for name in names:
        if name not in found:
            place, _, leaf = name.rpartition('.')
            try:
                owner = module.get_submodule(place)
                if is_parametrized(owner, leaf):  # it is computed from parameters that were found above
                    continue
                value = getattr(owner, leaf)
            except AttributeError:  # the parameter was removed after the module was built, for example by folding
                continue
            if isinstance(value, Tensor) and id(value) not in known:  # torch.compile's wrapper lists the same tensors again
                found[name] = value
    return found
