"""What a device can compute at best, which model FLOPs utilisation (MFU, arXiv:2204.02311) is a share of."""

import torch

# Dense products of 16 bits in TFLOP/s, from NVIDIA's data sheets; the first name that a device's name contains counts.
_PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """TFLOP/s of a GPU, where it is known for the type."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    device_name = torch.cuda.get_device_name(device)
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)
