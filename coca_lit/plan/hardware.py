"""GPUs by name. Figures are those of the makers' data sheets: dense products, accumulated in fp32."""

from typing import NamedTuple


class Gpu(NamedTuple):
    bf16: float  # peak, TFLOP/s
    tf32: float  # peak, TFLOP/s, of products in fp32
    memory: float  # GB


GPUS = {
    "A100-40GB": Gpu(312, 156, 40),
    "A100": Gpu(312, 156, 80),
    "H100": Gpu(989, 494, 80),
    "H200": Gpu(989, 494, 141),
    "L40S": Gpu(362, 183, 48),
    "RTX-4090": Gpu(165, 83, 24),
}
