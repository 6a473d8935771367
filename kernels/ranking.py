"""Values and their ids as one integer, so that one reduction finds the highest value and its lowest id."""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(-(2**63))
_LAST_ID: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def candidate(value, token):
    """One int64 ordered by value, then lowest token first; −0 counts as 0, NaN as the highest value."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, key)
    return (key.to(tl.int64) << 32) | (_LAST_ID - token)


@triton.jit
def value_of(best):
    key = (best >> 32).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def token_of(best):
    return (best & 0x7FFFFFFF) ^ _LAST_ID
