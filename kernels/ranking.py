"""Values and their ids as one integer, so that one reduction finds the highest value and its lowest id."""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(-(2**63))
LOWEST: tl.constexpr = tl.constexpr(-(2**31))
LAST_ID: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(value):
    """An int32 ordered as float32 values are that are no NaN; −0 comes before 0."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(value):
    """`ordered`, but above LOWEST; −0 counts as 0, NaN as the highest value."""
    nan = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, 0x7FFFFFFF, ordered(tl.where(value == 0.0, 0.0, value)))


@triton.jit
def value_of_key(key):
    """The value of which `ordered` made the key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _pair(key, token):
    return (key.to(tl.int64) << 32) | (LAST_ID - token)


@triton.jit
def candidate_of_key(key, token):
    """`candidate`, NONE for LOWEST."""
    return tl.where(key == LOWEST, NONE, _pair(key, token))


@triton.jit
def candidate(value, token):
    """One int64 ordered by value as `key_of` is, then lowest token first."""
    return _pair(key_of(value), token)


@triton.jit
def value_of(best):
    return value_of_key((best >> 32).to(tl.int32))


@triton.jit
def token_of(best):
    return (best & 0x7FFFFFFF) ^ LAST_ID
