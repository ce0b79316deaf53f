"""Random draws that belong to a sample: a function of (seed, sample id, purpose, step), of nothing else.

A counter-based generator (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014) hashes
(key of the sample, step, position) to 64 bits. So a sample draws the same numbers in a batch of 1 or 32, in any
order, before and after a restart; the integers are equal on CPU and GPU and the floats agree to rounding. Global
random state is neither read nor changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as signed 64 bit
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB
_LOW23 = (1 << 23) - 1  # 23 bits and a half are exact in float32, so 1.0 is never reached


def sample_keys(seed: int, sample_ids: Sequence[str], purpose: str, device: torch.device | str = "cpu") -> Tensor:
    """int64 [B]: one key a sample; different purposes draw independent numbers."""
    digests = [
        hashlib.blake2b(f"{seed}\0{purpose}\0{sample_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for sample_id in sample_ids
    ]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64, device=device)


def _bits(keys: Tensor, step: int | Tensor, count: int) -> Tensor:
    """int64 [B, count]: 64 hashed bits a position. keys: int64 [B]; step: one for all, or int64 [B]."""
    start = _mix(keys + (torch.as_tensor(step, device=keys.device) + 1) * _GOLDEN)
    counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return _mix(start[:, None] + counter)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; its shifts are logical, and torch's are arithmetic, hence the masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))).mul_(_MIX1)
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX2)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def uniform(keys: Tensor, step: int | Tensor, shape: Sequence[int]) -> Tensor:
    """float32 [B, *shape] in the open interval (0, 1). keys: int64 [B] of `sample_keys`."""
    bits = _bits(keys, step, math.prod(shape))
    return _to_unit(bits >> 41).view(len(keys), *shape)


def normal(keys: Tensor, step: int | Tensor, shape: Sequence[int]) -> Tensor:
    """float32 [B, *shape], standard normal by Box and Muller: two numbers from each 64 bits."""
    count = math.prod(shape)
    bits = _bits(keys, step, (count + 1) // 2)
    radius = _to_unit(bits >> 41).log_().mul_(-2).sqrt_()
    angle = _to_unit(bits >> 8).mul_(2 * math.pi)
    pair = torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], dim=1)
    return pair[:, :count].view(len(keys), *shape)


def _to_unit(bits: Tensor) -> Tensor:
    return bits.bitwise_and_(_LOW23).to(torch.float32).add_(0.5).mul_(2.0**-23)


def tie_breakers(keys: Tensor, count: int) -> Tensor:
    """int64 [B, count]: a random permutation of the positions of each sample, to order equal values by."""
    return _bits(keys, 0, count).argsort(dim=1)
