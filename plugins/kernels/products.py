"""Matrix products that mean the same when they are interpreted."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """a @ b + total, summed in float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as its bits and would multiply those. Products of 16-bit floats are exact here.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)
