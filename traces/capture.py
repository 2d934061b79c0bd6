"""Recording what the routers of a torch model say while it runs, without a change to the model."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from traces.errors import InputError


class RouterCapture:
    """While open, collects the logits of `routers`, one a layer, from every forward pass.

    A router is a module that returns its logits [..., E], or a tuple whose first tensor is the logits, as the gates of
    Hugging Face models do. With `keep_hidden` its input [..., D] is kept too. Leading axes become one: T.
    """

    def __init__(self, routers: Sequence[nn.Module], *, keep_hidden: bool = False) -> None:
        if not routers:
            raise InputError("no routers to record: the model has no module that looks like one")
        self.routers = routers
        self.keep_hidden = keep_hidden
        self._logits_by_layer: list[list[Tensor]] = [[] for _ in routers]
        self._hidden_by_layer: list[list[Tensor]] = [[] for _ in routers]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer, router in enumerate(self.routers):
            self._handles.append(router.register_forward_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def logits_LTE(self) -> NDArray[np.float32]:
        """What was collected: [L, T, E]. Errors: `InputError` where layers saw different numbers of tokens."""
        return _stack(self._logits_by_layer, "logits")

    def hidden_LTD(self) -> NDArray[np.float32]:
        """The routers' inputs: [L, T, D]. Errors: `InputError` as `logits_LTE`, and without `keep_hidden`."""
        if not self.keep_hidden:
            raise InputError("hidden states were not recorded; open RouterCapture with keep_hidden=True")
        return _stack(self._hidden_by_layer, "hidden states")

    def _hook(self, layer: int) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            logits = _first_tensor(output if isinstance(output, tuple) else (output,))
            if logits is None or not logits.is_floating_point():
                found = type(output).__name__ if logits is None else f"a tensor of {logits.dtype}"
                raise InputError(
                    f"router of layer {layer} ({type(module).__name__}) returned {found}, not logits; "
                    "record the module that computes the logits"
                )
            self._logits_by_layer[layer].append(_rows(logits))
            if self.keep_hidden:
                hidden = _first_tensor((*args, *kwargs.values()))
                assert hidden is not None, "a router without an input"
                self._hidden_by_layer[layer].append(_rows(hidden))

        return collect


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)


def _rows(values: Tensor) -> Tensor:
    # A copy, since the model may reuse the memory.
    return values.detach().reshape(-1, values.shape[-1]).to(device="cpu", dtype=torch.float32, copy=True)


def _stack(parts_by_layer: list[list[Tensor]], what: str) -> NDArray[np.float32]:
    rows = [sum(len(part) for part in parts) for parts in parts_by_layer]
    if not rows[0] or len(set(rows)) > 1:
        raise InputError(f"the layers recorded {what} of {rows} tokens; each must see the same tokens, at least one")
    return torch.stack([torch.cat(parts) for parts in parts_by_layer]).numpy()
