"""Bytes of the tensors that are alive, counted operator by operator: on a device or on none (`meta`)."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class StorageTracker(TorchDispatchMode):
    """
    Context that counts the bytes of all storages that operators make, those of the backward included.

    What a kernel takes inside and gives back (a workspace), fragments and the runtime are not counted.

    Attributes:
        current (`int`): bytes that are alive now.
        peak (`int`): the most that were alive at a time.
    """

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self._sizes = WeakIdKeyDictionary()  # bytes in a list, which changes; `None` where ignored

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tree: Any) -> None:
        """Count the storages of all tensors in `tree` that aren't counted yet."""
        for each in tree_iter(tree):
            if isinstance(each, Tensor):
                for part in _parts(each):
                    self._count(part)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Count nothing for the storages of `tensors`, whatever is done with them."""
        for each in tensors:
            for part in _parts(each):
                self._count(part, is_ignored=True)

    def resized(self, storage: UntypedStorage) -> None:
        """Count a storage by its new size: FSDP2 frees gathered weights by resizing, which is no operator."""
        if size := self._sizes.get(storage):
            self.current += storage.nbytes() - size[0]
            size[0] = storage.nbytes()
            self.peak = max(self.peak, self.current)

    def _count(self, tensor: Tensor, is_ignored: bool = False) -> None:
        storage = tensor.untyped_storage()
        if storage in self._sizes:
            return
        self._sizes[storage] = size = None if is_ignored else [storage.nbytes()]
        if size is not None:
            self.current += size[0]
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._release, size)

    def _release(self, size: list[int]) -> None:
        self.current -= size[0]

    def reset_peak(self) -> None:
        """Let the peak begin anew at what is alive now."""
        self.peak = self.current


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold a tensor's numbers: those inside of a wrapper, such as a rank's share."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue] of every wrapper
    inner = [getattr(tensor, name) for name in names]  # of a rank's share its mesh of devices too
    return [part for each in inner if isinstance(each, Tensor) for part in _parts(each)]


def parameters_and_buffers(*modules: torch.nn.Module) -> list[Tensor]:
    """Return what modules hold for as long as they live."""
    return [tensor for module in modules for tensors in (module.parameters(), module.buffers()) for tensor in tensors]
