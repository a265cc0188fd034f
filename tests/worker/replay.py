"""What stands in for a CUDA graph on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """The operations of one pass, and a way to run them again on the memory that they ran on, and no Python else."""

    def __init__(self):
        super().__init__()
        self._operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        self._operations.append((operation, args, kwargs or {}, output))
        return output

    def replay(self):
        for operation, args, kwargs, output in self._operations:
            for before, now in zip(tree_leaves(output), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(now, torch.Tensor) and now.data_ptr() != before.data_ptr():
                    before.copy_(now)  # else a view, or written in place
