"""Pure tensor functions of quantization, and the one door to fused kernels.

Everything here computes in float32 (float64 stays float64), whatever the dtype of its input.
"""

from hf_robustq.functional.axes import Axis, along, channels_along, from_rows, others, rows
from hf_robustq.functional.fused import CACHED, flatten, fused, memory_order, no_autocast, unflatten, working_dtype
from hf_robustq.functional.moments import Scalar, central_moments, chunks, inner, kurtosis
from hf_robustq.functional.noise import Noise, normal
from hf_robustq.functional.quantize import SMALLEST, autocast_dtype, fake_quantize

__all__ = [
    "CACHED",
    "SMALLEST",
    "Axis",
    "Noise",
    "Scalar",
    "along",
    "autocast_dtype",
    "central_moments",
    "channels_along",
    "chunks",
    "fake_quantize",
    "flatten",
    "from_rows",
    "fused",
    "inner",
    "kurtosis",
    "memory_order",
    "no_autocast",
    "normal",
    "others",
    "rows",
    "unflatten",
    "working_dtype",
]
