"""Random numbers that belong to a position: a function of (seed, split, sequence, position).

Which positions share a block, a batch or a run does not change them. A sequence gets a 64-bit key
by a hash, a position one by a mix of it, and a draw one more mix: SplitMix64 (Steele, Lea and
Flood 2014), whose output function passes the usual test batteries on a counter.

torch has no unsigned 64-bit arithmetic, but int64 wraps around alike; shifts are masked.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

# With this many bits, a uniform number u < 1 times a float64 above 0 never rounds up to the
# float64.
_BITS = 52


def sequence_key(seed: int, split: str, number: int) -> int:
    """The key of a sequence, a signed 64-bit number."""
    text = f"{seed} {split} {number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def position_keys(key: int, start: int, count: int) -> npt.NDArray[np.int64]:
    """The keys [count] of the positions from `start` on, of the sequence with this key."""
    counter = torch.arange(start + 1, start + count + 1)
    keys: npt.NDArray[np.int64] = _mix(key + counter * _signed(_GAMMA)).numpy()
    return keys


def uniforms(keys: torch.Tensor, num: int) -> torch.Tensor:
    """keys [T] int64 -> [T, num] float64, uniform in [0, 1) and independent."""
    counter = torch.arange(1, num + 1, device=keys.device)
    bits = _mix(keys[:, None] + counter * _signed(_GAMMA))
    return _shifted(bits, 64 - _BITS).to(torch.float64) * 2.0**-_BITS


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The output function of SplitMix64, elementwise."""
    state = (state ^ _shifted(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shifted(state, 27)) * _signed(_MIX_2)
    return state ^ _shifted(state, 31)


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """A shift to the right that brings in zeros."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    """The signed number of the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number
