"""llama.cpp's library: finding it, calling it, its structs.  ctypes lives here and nowhere else."""

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
