"""Machines that a run is planned for: described in a YAML file, or this one."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import yaml

from backlens.config import flag, parse_max_memory
from backlens.errors import BacklensError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of one kind. Speeds are per device; a run reaches the share `efficiency` of each."""

    name: str = "cluster"
    nodes: int = 1
    gpus: int = 1
    """GPUs per node; 0 for nodes that compute on their CPUs, which count as one device per node."""
    memory: int = 80 * 10**9
    """Bytes per device. In YAML a size such as 80GB."""
    tflops: float
    """Teraflops per device for dense products in the weights' type."""
    float32_tflops: float
    """Teraflops per device for dense products in float32, which the lens computes in."""
    float64_tflops: float
    """Teraflops per device in float64, which Gram matrices and spectra are computed in."""
    memory_gbps: float
    """GB/s between a device and its own memory."""
    link_gbps: float
    """GB/s between two devices of one node."""
    storage_gbps: float
    """GB/s between a node and the storage, for the model and for the tables."""
    encode_mbps: float = 12.0
    """MB/s of Parquet that one replica's writing thread makes. Measured on one core of an AMD EPYC: 9 to 20."""
    operation_us: float = 10.0
    """Microseconds that one small operation takes when Python starts it."""
    efficiency: float = 0.5
    """Share of the stated speeds that a run reaches."""
    dollars_per_hour: float | None = None
    """Price per node."""

    @property
    def devices(self) -> int:
        """Devices per node."""
        return max(1, self.gpus)


_PROBE_SECONDS = 0.1
"""Seconds that each speed of this machine is measured for."""


def read_cluster(path: str) -> Cluster:
    """Read a description of machines.

    Raises BacklensError for any other file, and names the key that is missing or unknown.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BacklensError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise BacklensError(f"{path}: a cluster is a mapping, e.g. `nodes: 8`")
    known = {field.name: field for field in fields(Cluster)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = (
                nearest(flag(name), [flag(each) for each in known])
                or f"; known: {', '.join(map(flag, known))}"
            )
            raise BacklensError(f"{path}: unknown key '{key}'{hint}")
        values[name] = _value(path, name, value)
    try:
        return Cluster(**values)
    except TypeError as error:
        missing = re.findall(r"'(\w+)'", str(error))
        raise BacklensError(f"{path}: lacks {', '.join(map(flag, missing))}") from error


def _value(path: str, name: str, value: Any) -> Any:
    if name == "name":
        return str(value)
    if name == "memory":
        return parse_max_memory(f"0:{value}")[0]
    whole = name in ("nodes", "gpus")
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or value < 0 or (value == 0 and name != "gpus"):
        raise BacklensError(
            f"{path}: {flag(name)} is {value!r}; give a {'whole ' if whole else ''}number above 0"
        )
    return value


def this_machine() -> Cluster:
    """Measure the device that a run here would use, with a few short products and passes over memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passing = torch.randn(2**22, device=device)
    size = 1024
    return Cluster(
        name="this machine",
        gpus=torch.cuda.device_count(),
        memory=_memory(device),
        tflops=_products(size, torch.float32, device) / 1e12,
        float32_tflops=_products(size, torch.float32, device) / 1e12,
        float64_tflops=_products(size, torch.float64, device) / 1e12,
        memory_gbps=passing.nbytes / _seconds(lambda: passing.abs_().sum().item()) / 1e9,
        link_gbps=16.0,
        storage_gbps=1.0,
        operation_us=1e6 * _seconds(lambda: passing[:8].add_(1.0)),
        efficiency=1.0,
    )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _products(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: (a @ a).sum().item())


def _seconds(action: Callable[[], object]) -> float:
    action()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _PROBE_SECONDS:
        action()
        count += 1
    return (time.perf_counter() - started) / count
