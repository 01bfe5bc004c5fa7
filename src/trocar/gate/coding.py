"""Numbers as they leave: rounded to exactly the bits that are charged for them.

At 32 bits a number is the float32 that the engine gave. Below, numbers of one output are whole steps of one
scale (8 bits by default, 16 at most); log-probabilities are whole steps from 0 downwards; probabilities are steps
of [0, 1]; numbers that stand alone, as a receipt's norms, are 16-bit floats. All of it is a function of the
charged bits, so no other bit of a number leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.graph.cost import FLOAT_BITS, Prices
from trocar.wire import packing

F32 = npt.NDArray[np.float32]
COARSE: Final = range(4, 17)
_MANTISSA: Final = 23
_SIGN_AND_EXPONENT: Final = 9
_LARGEST: Final = 1e38


@dataclass(frozen=True, slots=True)
class Coder:
    """Rounds numbers at the prices of one request; `bits_*` say what they then cost."""

    prices: Prices

    @property
    def exact(self) -> bool:
        return self.prices.scalar_bits == FLOAT_BITS

    def numbers(self, values: F32) -> F32:
        """Numbers of one output, any shape: steps of their largest."""
        require_finite(values)
        if self.exact or not values.size:
            return values
        flat, bits = values.reshape(-1), self.prices.scalar_bits
        scale = packing.scale_of(flat)
        rounded = packing.from_steps(packing.to_steps(flat, scale, bits), scale, bits)
        return rounded.reshape(values.shape)

    def bits_numbers(self, count: int) -> int:
        return count * self.prices.scalar_bits + self.prices.scale_bits

    def logprobs(self, values: F32) -> F32:
        """Log-probabilities in nats: steps of `step` from 0 down to `floor`, which stands for everything below."""
        require_finite(values)
        if self.exact:
            return values
        steps = np.clip(np.rint(-values.astype(np.float64) / self.step), 0, 2**self.prices.scalar_bits - 1)
        return (0.0 - steps * self.step).astype(np.float32)

    @property
    def step(self) -> float:
        """Distance of neighbouring log-probabilities, in nats; 0 when they are not rounded."""
        bits = self.prices.scalar_bits
        return 0.0 if self.exact else (16.0 if bits <= 8 else 32.0) / 2**bits

    @property
    def floor(self) -> float | None:
        """The lowest log-probability that is told apart, in nats; None when they are not rounded."""
        return None if self.exact else -self.step * (2**self.prices.scalar_bits - 1)

    def bits_each(self, count: int) -> int:
        """Of log-probabilities or probabilities, which share no scale."""
        return count * self.prices.scalar_bits

    def probabilities(self, values: F32) -> F32:
        """Numbers of [0, 1] in equal steps."""
        require_finite(values)
        if self.exact:
            return values
        most = 2**self.prices.scalar_bits - 1
        steps = np.rint(np.clip(values, 0.0, 1.0).astype(np.float64) * most) + 0.0  # there is one zero
        rounded: F32 = (steps / most).astype(np.float32)
        return rounded

    def alone(self, values: F32) -> F32:
        """Numbers that share nothing: floats of `norm_bits` bits."""
        return round_to_bits(values, self.prices.norm_bits)

    def bits_alone(self, count: int) -> int:
        return count * self.prices.norm_bits


def require_finite(values: F32) -> None:
    """Refuses NaN, infinities and numbers so large that rounding could make one.

    Raises:
        RunFailed: `result_not_finite`.
    """
    if not (np.abs(values) < _LARGEST).all():  # also true for NaN
        raise errors.refuse("result_not_finite", "", "a result is NaN or infinite")


def round_to_bits(values: F32, bits: int) -> F32:
    """Rounds float32 to the nearest float of `bits` bits (8 exponent bits), ties to even.

    Args:
        values: float32, any shape.
        bits: 10 to 32.

    Raises:
        RunFailed: `result_not_finite`.
        ServerFault: `bad_bits`.
    """
    if not _SIGN_AND_EXPONENT < bits <= _SIGN_AND_EXPONENT + _MANTISSA:
        raise errors.refuse("bad_bits", "bits", f"a float of {bits} bits; it must be in [10, 32]")
    require_finite(values)
    drop = _MANTISSA - (bits - _SIGN_AND_EXPONENT)
    if drop == 0:
        return values
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1) + ((raw >> np.uint32(drop)) & np.uint32(1))
    kept = (raw + half) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    return kept.view(np.float32)
