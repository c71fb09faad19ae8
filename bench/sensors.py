# SPDX-License-Identifier: Apache-2.0
"""Clocks, power, temperature and throttling of a GPU while it works, from NVML.

NVML comes with the driver and is read through nvidia-ml-py (the extra "gpu").  Without either the
columns stay empty and the run says so: a time without its clock is still a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# NVML's bits of "clocks event reasons"; idle, and clocks set by an application, are no throttling.
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Reading:
    """None: not read.  throttle: reasons joined by "; ", or "none"."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle: str | None = None


class Sensors:
    """Of one device; `missing` says why it reads nothing, where it does."""

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        self.driver = ""
        self._nvml: Any = None
        if device.type != "cuda":
            self.missing = "no GPU"
            return
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed: pip install 'reeltime[gpu]'"
            return
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            driver = pynvml.nvmlSystemGetDriverVersion()
        except (pynvml.NVMLError, AttributeError, TypeError) as error:
            self.missing = f"NVML: {error}"
            return
        self.driver = driver.decode() if isinstance(driver, bytes) else str(driver)
        self._nvml = pynvml

    def read(self) -> Reading:
        """Takes about a millisecond; a sensor that this card lacks gives None."""
        if self._nvml is None:
            return Reading()
        nvml, handle = self._nvml, self._handle

        def ask(question: Callable[..., Any], *which: Any) -> Any:
            try:
                return question(handle, *which)
            except nvml.NVMLError:
                return None

        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = ask(reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        milliwatts = ask(nvml.nvmlDeviceGetPowerUsage)
        return Reading(
            sm_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            power_w=None if milliwatts is None else milliwatts / 1e3,
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            throttle=None if bits is None else throttled(bits),
        )


def throttled(bits: int) -> str:
    return "; ".join(name for bit, name in REASONS.items() if bits & bit) or "none"
