"""Devices: what a vendor's datasheet says of one GPU, decimal units, dense (not sparse) peaks, one direction."""

from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.units import GB, TB, TFLOP
from traces.errors import InputError

FP4_WITH_SCALES_BYTES = 0.5625  # 4 bits and an 8-bit scale for every 16 elements (NVFP4); MXFP4 has one for 32

# Bytes an element, scales included; `half` and `int8` are what NCCL's tables call two bytes and one.
DTYPE_BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "half": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "nvfp4": FP4_WITH_SCALES_BYTES,
    "fp4": FP4_WITH_SCALES_BYTES,
    "w4a16_mxfp4": 0.53125,
    "mxfp4": 0.53125,
}


def known_dtype(dtype: str) -> bool:
    """Whether `dtype_bytes` knows it."""
    return dtype in DTYPE_BYTES


def dtype_bytes(dtype: str) -> float:
    """Bytes an element of weights of `dtype`; `InputError` lists the known ones."""
    if dtype not in DTYPE_BYTES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One rank's accelerator.

    `peak_flops` FLOP/s by bytes an element of the weights (2: bf16, 1: fp8, 0.5: fp4); `memory_bytes`;
    `memory_bandwidth` bytes/s; `scale_up` and `scale_out` bytes/s to the other ranks of its node (NVLink)
    and to other nodes (its NIC), one direction; `ranks_per_node` in the scale-up domain; `sms` streaming
    multiprocessors and `l2_bytes` of second-level cache, from the vendor's architecture papers; `host_bandwidth`
    bytes/s from the host's memory (PCIe, or NVLink-C2C shared by the two GPUs of a superchip). `kernels_of`: the GPU
    of the same silicon whose measured kernels stand for this one's; empty: none. Only its links may differ.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[float, float]
    scale_up: float
    scale_out: float
    ranks_per_node: int
    sms: int
    l2_bytes: float
    host_bandwidth: float
    kernels_of: str = ""

    def runs_kernels_of(self, gpu: str) -> bool:
        """Whether kernels that were measured on `gpu` hold here: on this GPU, or on the one of the same silicon.

        >>> DEVICES["h800_sxm"].runs_kernels_of("h100_sxm"), DEVICES["h100_sxm"].runs_kernels_of("h800_sxm")
        (True, False)
        """
        return gpu in (self.name, self.kernels_of)

    @property
    def measured_as(self) -> str:
        """The GPU whose measured kernels hold here."""
        return self.kernels_of or self.name

    def peak(self, weight_bytes: float) -> float:
        """FLOP/s for weights of `weight_bytes` an element; what has no peak of its own is unpacked to bf16 first.

        >>> DEVICES["h100_sxm"].peak(1.0) / DEVICES["h100_sxm"].peak(0.53)  # fp8, 4-bit
        2.0
        """
        width = 2.0 if weight_bytes > 1 else 1.0 if weight_bytes > FP4_WITH_SCALES_BYTES else 0.5
        return self.peak_flops.get(width, self.peak_flops[2])


def _h100(name: str, *, memory_bytes: float, memory_bandwidth: float, scale_up: float, kernels_of: str = "") -> Device:
    return Device(
        name=name,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory_bandwidth,
        peak_flops={2: 989 * TFLOP, 1: 1978 * TFLOP},
        scale_up=scale_up,
        scale_out=50 * GB,
        ranks_per_node=8,
        sms=132,
        l2_bytes=50e6,
        host_bandwidth=64 * GB,
        kernels_of=kernels_of,
    )


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100_sxm",
            memory_bytes=85.9 * GB,
            memory_bandwidth=2.039 * TB,
            peak_flops={2: 312 * TFLOP},
            scale_up=300 * GB,
            scale_out=25 * GB,
            ranks_per_node=8,
            sms=108,
            l2_bytes=40e6,
            host_bandwidth=32 * GB,
        ),
        _h100("h100_sxm", memory_bytes=85.9 * GB, memory_bandwidth=3.35 * TB, scale_up=450 * GB),
        _h100("h200_sxm", memory_bytes=151 * GB, memory_bandwidth=4.8 * TB, scale_up=450 * GB),
        _h100(
            "h800_sxm",
            memory_bytes=85.9 * GB,
            memory_bandwidth=3.35 * TB,
            scale_up=200 * GB,
            kernels_of="h100_sxm",
        ),
        Device(
            name="b200_sxm",
            memory_bytes=193 * GB,
            memory_bandwidth=7.7 * TB,
            peak_flops={2: 2250 * TFLOP, 1: 4500 * TFLOP, 0.5: 9000 * TFLOP},
            scale_up=900 * GB,
            scale_out=100 * GB,
            ranks_per_node=8,
            sms=148,
            l2_bytes=126e6,
            host_bandwidth=64 * GB,
        ),
        Device(
            name="gb200",
            memory_bytes=198.7 * GB,
            memory_bandwidth=8 * TB,
            peak_flops={2: 2500 * TFLOP, 1: 5000 * TFLOP, 0.5: 10000 * TFLOP},
            scale_up=900 * GB,
            scale_out=100 * GB,
            ranks_per_node=72,
            sms=148,
            l2_bytes=126e6,
            host_bandwidth=225 * GB,
        ),
        Device(
            name="l40s",
            memory_bytes=48.3 * GB,
            memory_bandwidth=864 * GB,
            peak_flops={2: 362 * TFLOP, 1: 733 * TFLOP},
            scale_up=32 * GB,
            scale_out=50 * GB,
            ranks_per_node=8,
            sms=142,
            l2_bytes=96e6,
            host_bandwidth=32 * GB,
        ),
        Device(
            name="b300_sxm",
            memory_bytes=288.4 * GB,
            memory_bandwidth=7.75 * TB,
            peak_flops={2: 2250 * TFLOP, 1: 4500 * TFLOP, 0.5: 14000 * TFLOP},
            scale_up=900 * GB,
            scale_out=100 * GB,
            ranks_per_node=8,
            sms=148,
            l2_bytes=126e6,
            host_bandwidth=64 * GB,
        ),
        Device(
            name="gb300",
            memory_bytes=298 * GB,
            memory_bandwidth=8 * TB,
            peak_flops={2: 2500 * TFLOP, 1: 5000 * TFLOP, 0.5: 15000 * TFLOP},
            scale_up=900 * GB,
            scale_out=100 * GB,
            ranks_per_node=72,
            sms=148,
            l2_bytes=126e6,
            host_bandwidth=225 * GB,
        ),
        Device(
            name="rtx_pro_6000_server",
            memory_bytes=102.6 * GB,
            memory_bandwidth=1.792 * TB,
            peak_flops={2: 467.8 * TFLOP, 1: 935.6 * TFLOP, 0.5: 1871.2 * TFLOP},
            scale_up=64 * GB,
            scale_out=50 * GB,
            ranks_per_node=8,
            sms=188,
            l2_bytes=128e6,
            host_bandwidth=64 * GB,
        ),
    )
}


def device(name: str) -> Device:
    """The datasheet of `name`; `InputError` lists the known ones."""
    if name not in DEVICES:
        raise InputError(f"unknown gpu {name!r}; known are {', '.join(DEVICES)}")
    return DEVICES[name]
