"""Forward passes that begin at the layer where a change begins, for models of which a few parameters change between two passes.

What comes before the first layer that uses a changed parameter gives what it gave, so its output is taken from a recorded pass.
A parameter's depth is the number of layers done when a module that owns it is first called: 0 for embeddings, n in layer n, the
number of layers for a final norm or a head. It is seen in the recorded pass, not guessed from names; a module that was never
called, and layers that are shared or run in another order (ALBERT), have depth 0: the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Resumable:
    """A transformers model as a callable. Calls are numbered: the k-th call of every pass must get the same inputs.

    groups  parameters that change together: only outputs that one of these groups begins with are held
    """

    def __init__(self, model: Any, groups: Collection[Sequence[Any]]) -> None:
        from torch.nn import ModuleList

        lists = [module for module in model.modules() if isinstance(module, ModuleList)]
        self._model, self._groups = model, list(groups)
        self._layers = list(max(lists, key=len, default=()))
        wanted = {id(one) for group in groups for one in group}
        owned = [(module, [id(one) for one in module.parameters(recurse=False) if id(one) in wanted]) for module in model.modules()]
        self._owners = [(module, ids) for module, ids in owned if ids]
        self._depths: list[dict[int, int]] = []
        self._held: list[dict[int, Any]] = []
        self._calls = 0
        self._changed: Sequence[Any] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, a pass runs whole, and is what later ones resume from."""
        self._depths, self._held, self._changed = [], [], None
        yield

    @contextmanager
    def resuming(self, changed: Sequence[Any]) -> Iterator[None]:
        """Inside, a pass in which only these parameters differ from the recorded one."""
        self._calls, self._changed = 0, changed
        yield

    def __call__(self, **inputs: Any) -> Any:
        if self._changed is None:
            return self._record(inputs)
        number, self._calls = self._calls, self._calls + 1
        start = self._start(number, self._changed)
        if start == 0:
            return self._model(**inputs)
        output = self._held[number][start]
        skipped = self._layers[:start]
        try:
            for layer in skipped:
                layer.forward = lambda *_, **__: output
            return self._model(**inputs)
        finally:
            for layer in skipped:
                layer.__dict__.pop("forward", None)

    def _start(self, number: int, changed: Sequence[Any]) -> int:
        return min((self._depths[number].get(id(one), 0) for one in changed), default=0)

    def _record(self, inputs: dict[str, Any]) -> Any:
        outputs: list[Any] = []
        order: list[int] = []
        depths: dict[int, int] = {}

        def enters(ids: Sequence[int]) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                for one in ids:
                    depths.setdefault(one, len(outputs))

            return hook

        def leaves(place: int) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                order.append(place)
                outputs.append(output)

            return hook

        hooks = [module.register_forward_pre_hook(enters(ids)) for module, ids in self._owners]
        hooks += [layer.register_forward_hook(leaves(place)) for place, layer in enumerate(self._layers)]
        try:
            result = self._model(**inputs)
        finally:
            for one in hooks:
                one.remove()
        self._depths.append(depths if order == list(range(len(self._layers))) else {})
        starts = {self._start(-1, group) for group in self._groups}
        self._held.append({start: outputs[start - 1] for start in starts if start})
        return result
