"""Signed 8- and 4-bit numbers in 32-bit words, as exact float16, without a conversion for each.

A field p of n bits that stands at the foot of a float16 mantissa is 1024 + u, u = q + 2^(n-1) being its unsigned form:
one logical operation makes two of them, from the two halves of a word, and one subtraction leaves q. Numbers of four bits
at bits 4 to 7 are 1024 + 16 u; a sixteenth of that less 64 + 8 is q again, so that a word is shifted only once.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(words):
    """The lower and the upper half of each word as float16."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def integers(words, BITS: tl.constexpr):
    """The numbers of words int32 [N, W], in their order: float16 [N, W * 32 / BITS]. BITS is 8 or 4."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    shifted = words >> 8
    # Exclusive or turns the sign bit over and sets the exponent of 1024.
    if BITS == 8:
        a0, a2 = _halves((words & 0x00FF00FF) ^ 0x64806480)
        a1, a3 = _halves((shifted & 0x00FF00FF) ^ 0x64806480)
        return (tl.join(tl.join(a0, a2), tl.join(a1, a3)) - 1152.0).reshape(N, 4 * W)
    else:
        a0, a4 = _halves((words & 0x000F000F) ^ 0x64086408)
        a2, a6 = _halves((shifted & 0x000F000F) ^ 0x64086408)
        a1, a5 = _halves((words & 0x00F000F0) ^ 0x64806480)
        a3, a7 = _halves((shifted & 0x00F000F0) ^ 0x64806480)
        even = tl.join(tl.join(a0, a4), tl.join(a2, a6)) - 1032.0
        odd = tl.join(tl.join(a1, a5), tl.join(a3, a7)) * 0.0625 - 72.0
        return tl.join(even, odd).reshape(N, 8 * W)
