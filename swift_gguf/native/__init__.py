"""Finds, loads and calls llama.cpp's library.  Only this package uses ctypes."""

from swift_gguf.native.binding import (
    SUBLAYER_STATUS,
    Cost,
    FfnObserver,
    Library,
    SidecarHandle,
    StopFlag,
    SubnetworkHandle,
    buffer,
    library,
)

__all__ = [
    "SUBLAYER_STATUS",
    "Cost",
    "FfnObserver",
    "Library",
    "SidecarHandle",
    "StopFlag",
    "SubnetworkHandle",
    "buffer",
    "library",
]
