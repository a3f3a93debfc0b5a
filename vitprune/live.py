"""Which heads or hidden blocks of a module are live: its buffers, and what goes along with a state dict."""
import operator
from collections.abc import Sequence

import torch
from torch import Tensor


class Live:
    """What PrunedAttention and PrunedMlp share; a class before timm's own.

    A state dict holds what is live in its metadata: `load_state_dict` of such a model takes it over, any other model does not miss it. A
    model whose blocks are being learned keeps to its schedule, and one of other sizes to what it has. Each of the two has `_choice()`,
    what goes along ("live" and what belongs to it; {} where it cannot be read), and its inverse `_take(choice, device)`.
    """
    _first: str  # the layer whose outputs are the units
    _live_ids: tuple[int, ...] | None = None  # of the buffer `live`, read without waiting for a GPU

    def _choose(self, kind: str, ids: Sequence[int] | None, count: int, device: torch.device | None) -> None:
        """Store which of `count` units are live, None where all are."""
        name, device = type(self).__name__, device or next(self.parameters()).device
        if ids is not None:
            try:
                whole = list(ids)
                if any(isinstance(i, bool) or getattr(i, "dtype", None) == torch.bool for i in whole):  # a mask, not ids
                    raise TypeError
                whole = [operator.index(i) for i in whole]
            except TypeError:
                raise TypeError(f"{name}: live must be ids of {kind}, got {ids!r}") from None
            ids = whole
            if sorted(set(ids)) != ids or (ids and not (0 <= ids[0] and ids[-1] < count)):
                raise ValueError(f"{name}: live must be ascending ids of {kind} in 0..{count - 1}, each once, got {ids}")
        self._live_ids = None if ids is None or len(ids) == count else tuple(ids)
        self._put("live", None if self._live_ids is None else torch.tensor(ids, dtype=torch.int32, device=device))

    def _put(self, name: str, value: Tensor | None) -> None:
        """Make that the buffer, not part of the state dict; one like it takes the values, since a CUDA graph reads where it lies."""
        old = self._buffers.get(name)
        if old is None or value is None or (old.shape, old.dtype, old.device) != (value.shape, value.dtype, value.device):
            self.register_buffer(name, value, persistent=False)
        else:
            old.copy_(value)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (about := getattr(destination, "_metadata", {}).get(prefix[:-1])) is not None:
            about.update(self._choice())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        own, given = getattr(getattr(self, self._first), "weight", None), state_dict.get(f"{prefix}{self._first}.weight")
        if "live" in local_metadata and own is not None and (given is None or given.shape == own.shape):  # else it says what is wrong
            assigned = given is not None and local_metadata.get("assign_to_params_buffers", False)
            try:
                self._take(local_metadata, given.device if assigned else own.device)
            except (KeyError, TypeError, ValueError) as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
