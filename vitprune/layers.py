"""Drop-in attention, MLP and block of a timm vision transformer that skip what is pruned."""
from collections.abc import Sequence

import torch
from timm.layers import GELU, Attention, DropPath, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from . import ops
from .dense import alive_only, dense, drop, exact_gelu, idle, normalise, plain, watched
from .learned import Gate
from .live import Live
from .ops.linear import weight_and_bias
from .ops.sliced_linear import gather, spread
from .split import LEAK, Split


def adopt(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """A `cls` that takes over the state of `module`, an instance of its timm base class; that one is spent."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    new._prepare()
    return new


def _outputs(layer: nn.Module, x: Tensor, live: Tensor, width: int) -> Tensor:
    """The live blocks of layer(x); of one that is watched, wrapped or reparametrised by computing them all."""
    if plain(layer, alive_only()):
        return ops.sliced_linear(x, *weight_and_bias(layer), live, side="out", width=width)
    return gather(layer(x), x.dim() - 1, live, width)


def _inputs(layer: nn.Module, y: Tensor, live: Tensor, width: int, units: int) -> Tensor:
    """The layer of so many inputs, of which the dead are zero and y has the live ones."""
    if plain(layer, alive_only()):
        return ops.sliced_linear(y, *weight_and_bias(layer), live, side="in", width=width)
    return layer(spread(y.new_empty(*y.shape[:-1], units), y.dim() - 1, live, width, y))


class PrunedAttention(Live, Attention):
    """timm's `Attention` (same arguments, same parameter names) under a token policy, with live heads only.

    live: ascending ids of the heads that remain, or None for all; the others are neither computed nor given a gradient, but where a
        layer is wrapped, reparametrised or watched by hooks, which is called whole.
    attn_drop acts on plain attention only, not under a policy (as in DynamicViT's code) nor on packed rows.
    Raises ValueError for `gated` and `scale_norm`, which mix heads.
    """

    _first = "qkv"

    def __init__(self, *args, live: Sequence[int] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()
        self.set_live(live)

    def _prepare(self) -> None:
        if getattr(self, "gate", None) is not None or not isinstance(self.norm, nn.Identity):
            raise ValueError("PrunedAttention: gated and scale_norm must be off: they mix heads")
        if "live" not in self._buffers:
            self.set_live(None)
            self.set_dims(None)
            self.head_gate = self.dim_gate = None

    def set_live(self, live: Sequence[int] | None, device: torch.device | None = None) -> None:
        """Choose the live heads: ascending ids, or None for all. device: by default that of the weights."""
        self._choose("heads", live, self.num_heads, device)
        self._put("live_qkv", None if self.live is None else torch.cat([self.live + i * self.num_heads for i in range(3)]))  # rows of qkv

    def _choice(self) -> dict:
        if self.dims is not None and (type(self.dims) is not Tensor or self.dims.is_meta):
            return {}
        return {"live": self._live_ids, "dims": None if self.dims is None else self.dims.tolist()}

    def _take(self, choice: dict, device: torch.device) -> None:
        if self.head_gate is None:
            self.set_live(choice["live"], device)
            self.set_dims(None if choice["dims"] is None else torch.tensor(choice["dims"], device=device))

    def set_dims(self, dims: Tensor | None) -> None:
        """Choose the live dimensions of each head: ascending ids, int64 [2, H, K], of q and k and of v; or None for all.

        The others are multiplied by zero; `compact` turns them into speed."""
        self._put("dims", dims)

    @property
    def live_heads(self) -> int:
        """The number of heads that are computed."""
        live = self._buffers["live"]
        return self.num_heads if live is None else live.shape[0]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, policy: Tensor | None = None,
                *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
                class_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, N, C] -> [B, N, C]; or packed rows x [T, C] with cu_seqlens int32 [B+1] and max_seqlen -> [T, C].

        policy [B, N]: keys to keep (`ops.policy_attention`); attn_mask, is_causal: as timm's, not together with a policy.
        class_attention: also return what token 0 attends, mean over heads, [B, N].
        Raises ValueError for combinations that have no meaning.
        """
        masked = attn_mask is not None or is_causal
        if masked and (policy is not None or cu_seqlens is not None):
            raise ValueError("PrunedAttention: attn_mask and is_causal must be off where a policy or cu_seqlens is given")
        if policy is not None and cu_seqlens is not None:
            raise ValueError("PrunedAttention: policy must be None for packed rows, whose dropped tokens are gone")
        if self.live_heads == 0:
            if class_attention:
                raise ValueError("PrunedAttention: class_attention must be False in a layer without heads")
            return self.project(self._nothing(x, policy) if self.training else x[..., :0])
        y, scores = self.attend(self.qkv_of(x), attn_mask, is_causal, policy, cu_seqlens, max_seqlen, class_attention)
        return (self.project(y), scores) if class_attention else self.project(y)

    def _nothing(self, x: Tensor, policy: Tensor | None) -> Tensor:
        """[..., 0] that hangs on every parameter and on the policy: zeros are a gradient, and DDP waits for one."""
        q, k, v = self.qkv_of(x).unflatten(-1, (3, 0, self.head_dim)).unbind(-3)
        y = ((self.q_norm(q) + self.k_norm(k)).to(v.dtype) + v).flatten(-2)
        return y if policy is None else y + policy[..., None][..., :0].to(y.dtype)

    def attend(self, qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, policy: Tensor | None = None,
               cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
               class_attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """What lies between the products: qkv [..., 3*H*D] of the H > 0 live heads -> [..., H*D], and with class_attention the scores."""
        H, masked, parts = self.live_heads, attn_mask is not None or is_causal, self._modules  # without the search of Module.__getattr__
        normed = not isinstance(parts["q_norm"], nn.Identity)
        dropout = parts["attn_drop"].p if self.training else 0.0
        dims = self._dims()
        q = k = v = None
        if normed or class_attention or policy is not None or masked or dropout or dims is not None:
            q, k, v = (qkv.unflatten(-1, (3, H, self.head_dim)).unbind(-3) if cu_seqlens is not None else
                       (t.transpose(1, 2) for t in ops.split_qkv(qkv, H)))  # [B, N, H, D]
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            if dims is not None:
                q, v = q * dims[0].to(q.dtype), v * dims[1].to(v.dtype)
        if cu_seqlens is not None or (policy is None and not (masked or dropout)):
            if q is not None and (normed or dims is not None):
                qkv = torch.stack((q, k, v), -3).flatten(-3)
            y = ops.short_attention(qkv, num_heads=H, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=self.scale)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if policy is not None:
                y = ops.policy_attention(q, k, v, policy, scale=self.scale)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal,
                                                   scale=self.scale)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            y = y.transpose(1, 2).flatten(2)
        if self.head_gate is not None and self.live is None:  # live heads were chosen: what their gates would do is done
            y = (y.unflatten(-1, (H, self.head_dim)) * self.head_gate().to(y.dtype)[:, None]).flatten(-2)
        return y, _class_attention(q, k, self.scale) if class_attention else None

    def project(self, y: Tensor) -> Tensor:
        """y [..., H*D] of the live heads -> [..., C]."""
        live, parts = self._buffers["live"], self._modules
        y = dense(parts["proj"], y) if live is None else _inputs(parts["proj"], y, live, self.head_dim, self.num_heads * self.head_dim)
        return drop(parts["proj_drop"], y)

    def _dims(self) -> Tensor | None:
        """What multiplies the dimensions of the live heads, [2, H, D]; None where all are as they are."""
        if self.dim_gate is not None:
            return self.dim_gate()
        dims = self._buffers["dims"]
        if dims is None:
            return None
        factors = torch.zeros(2, self.num_heads, self.head_dim, device=dims.device).scatter(-1, dims, 1.0)
        return factors if self.live is None else factors[:, self.live]

    def qkv_of(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., 3*H*D] of the live heads."""
        live, qkv = self._buffers["live_qkv"], self._modules["qkv"]
        return dense(qkv, x) if live is None else _outputs(qkv, x, live, self.head_dim)


def _class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:  # [B, N, H, D] x2 -> [B, N]
    scores = torch.einsum("bhd,bnhd->bhn", q[:, 0], k) * scale
    return scores.float().softmax(-1).mean(1)


class PrunedMlp(Live, Mlp):
    """timm's `Mlp` (same arguments, same parameter names) that computes its live hidden blocks only.

    live: ascending ids of the `width`-wide blocks of hidden units that remain, or None for all.
    Raises ValueError for `use_conv`, for a `norm_layer`, which mixes hidden units, and for activations other than exact GELU.
    """

    _first = "fc1"

    def __init__(self, *args, live: Sequence[int] | None = None, width: int = 64, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()
        self.set_live(live, width)

    def _prepare(self) -> None:
        if not isinstance(self.fc1, nn.Linear):
            raise ValueError("PrunedMlp: use_conv must be False")
        if not isinstance(self.norm, nn.Identity):
            raise ValueError("PrunedMlp: norm_layer must be None: it mixes hidden units")
        if type(self.act).__name__ != "GELU" or getattr(self.act, "approximate", "none") != "none":
            raise ValueError(f"PrunedMlp: act_layer must be the exact GELU, got {self.act}")
        if "live" not in self._buffers:
            self.set_live(None)
            self.hidden_gate = None

    def set_live(self, live: Sequence[int] | None, width: int = 64, device: torch.device | None = None) -> None:
        """Choose the live blocks of `width` hidden units: ascending ids, or None for all. device: by default that of the weights."""
        hidden = self.fc1.out_features
        if live is not None and (width < 1 or hidden % width):
            raise ValueError(f"PrunedMlp: width must be a divisor of the hidden size {hidden}, got {width}")
        self.width = width
        self._choose("hidden blocks", live, hidden // width if width else 0, device)

    def _fuses(self) -> bool:
        """Whether the MLP may be one operator: all is as timm made it, nothing lies between its products, nobody watches them."""
        parts, dead = self._modules, self._buffers["live"] is not None
        alone = dead and alive_only()
        if not dead and (self.hidden_gate is not None or any(type(parts[n]._parameters.get("weight")) is not nn.Parameter
                                                             for n in ("fc1", "fc2"))):  # kernels take no subclass of tensors
            return False
        return (plain(parts["fc1"], alone) and plain(parts["fc2"], alone)
                and exact_gelu(parts["act"], alone) and idle(parts["drop1"], alone))

    def _choice(self) -> dict:
        return {"live": self._live_ids, "width": self.width}

    def _take(self, choice: dict, device: torch.device) -> None:
        if self.hidden_gate is None:
            self.set_live(choice["live"], self.width if choice["live"] is None else choice["width"], device)

    @property
    def live_hidden(self) -> int:
        """The number of hidden units that are computed."""
        return self.fc1.out_features if self.live is None else self.live.shape[0] * self.width

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., C] -> [..., C], plus the residual [..., C] where one is given."""
        live, parts = self._buffers["live"], self._modules
        fc1, drop1, fc2, drop2 = parts["fc1"], parts["drop1"], parts["fc2"], parts["drop2"]
        if residual is not None and self.training and drop2.p > 0:
            return residual + self(x)
        if not (live is None and x.is_cpu) and self._fuses():  # a CPU has oneDNN's calls where nothing is dead
            y = ops.sliced_mlp(x, *weight_and_bias(fc1), *weight_and_bias(fc2), live, width=self.width, residual=residual)
        elif live is None:
            y = drop(drop1, dense(fc1, x, parts["act"]))
            if self.hidden_gate is not None:
                y = (y.unflatten(-1, (-1, self.width)) * self.hidden_gate().to(y.dtype)[:, None]).flatten(-2)
            y = dense(fc2, y, residual=residual)
        else:
            y = drop1(parts["act"](_outputs(fc1, x, live, self.width)))
            y = _inputs(fc2, y, live, self.width, self.fc1.out_features)
            y = y if residual is None else residual + y
        return drop(drop2, y)


class PrunedBlock(Block):
    """timm's pre-norm transformer `Block` that takes a token policy or packed rows."""

    def _prepare(self) -> None:
        for name, cls in (("attn", PrunedAttention), ("mlp", PrunedMlp)):
            if not isinstance(getattr(self, name), cls):
                setattr(self, name, adopt(cls, getattr(self, name)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, policy: Tensor | None = None,
                *, class_attention: bool = False, normal: Tensor | None = None, **packed) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, N, C] (or packed rows [T, C]) -> the same shape; normal: norm1(x), where it is known; the others are PrunedAttention's."""
        parts = self._modules
        normal = normalise(parts["norm1"], x) if normal is None else normal
        y = parts["attn"](normal, attn_mask, is_causal, policy, class_attention=class_attention, **packed)
        y, scores = y if class_attention else (y, None)
        x = self._finish(x, y)
        return (x, scores) if class_attention else x

    def splits(self) -> bool:
        """Whether `forward_split` equals `forward`: every part is as made here or by timm, all but attention works token by token and
        draws nothing, and nobody watches or has compiled it."""
        def plain(m: nn.Module) -> bool:
            return type(m) in _PLAIN and m._compiled_call_impl is None and not watched(m) and not (
                m.training and m is not self.attn.attn_drop and (getattr(m, "p", 0) > 0 or (getattr(m, "drop_prob", 0) or 0) > 0))
        return self.attn.live_heads > 0 and not _has_any_global_hook() and all(map(plain, self.modules()))

    def forward_split(self, kept: Tensor, dropped: Tensor, split: Split, policy: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` for tokens in two parts, kept [L, C] and dropped [M, C] by policy [B, N]; only the kept ones' gradient is computed."""
        attn = self.attn  # kept ones first, with a gradient: autocast may remember a weight as it was cast first
        qkv = attn.qkv_of(normalise(self.norm1, kept))
        with torch.no_grad():
            unseen = attn.qkv_of(normalise(self.norm1, dropped))
        y, unread = split.part(attn.attend(split.join(qkv, unseen, LEAK), policy=policy)[0])
        kept = self._finish(kept, attn.project(y))
        with torch.no_grad():
            return kept, self._finish(dropped, attn.project(unread))

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows attention, whose output is y; token by token."""
        parts = self._modules
        norm, scale, path = parts["norm2"], parts["ls1"], parts["drop_path1"]
        known = isinstance(norm, nn.LayerNorm) and norm.weight is not None and isinstance(scale, (nn.Identity, LayerScale))
        if known and not watched(norm) and not watched(scale):
            x, y = ops.add_norm(x, drop(path, y), *weight_and_bias(norm), norm.eps,
                                gamma=scale.gamma if isinstance(scale, LayerScale) else None)
        else:
            x = x + path(scale(y))
            y = norm(x)
        mlp, scale, path = parts["mlp"], parts["ls2"], parts["drop_path2"]
        if isinstance(scale, nn.Identity) and isinstance(path, nn.Identity) and not any(map(watched, (mlp, scale, path))):
            return mlp(y, x)
        return x + path(scale(mlp(y)))


_PLAIN = {PrunedBlock, PrunedAttention, PrunedMlp, Gate, LayerScale, DropPath, LayerNorm, nn.LayerNorm, nn.Linear, nn.GELU, GELU,
          nn.Dropout, nn.Identity}
