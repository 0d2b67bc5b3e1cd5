"""A model's sub-networks as llama.cpp knows them, and the sidecar that narrows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from swift_gguf.errors import SidecarError, SubnetworkError
from swift_gguf.gguf.sidecar import Sidecar, path_beside, read
from swift_gguf.native import SidecarHandle, SubnetworkHandle, library
from swift_gguf.subnetwork import SubNetwork


class Handles:
    """Native sub-networks of a model, each made when a pass first needs it.

    path: the model's file.
    wanted: the sidecar to use; ``auto``: the one beside the model, if it is there and its own.
    """

    def __init__(self, path: Path, *, wanted: Path | Literal["auto"] | None) -> None:
        self.sidecar: Sidecar | None = None
        self.refusal: str | None = None
        """Why the sidecar beside the model is not used, if there is one."""
        self.loaded_sidecar: SidecarHandle | None = None
        self._path, self._wanted = path, wanted
        self._model: Any = None
        self._has_experts = False
        self._made: dict[SubNetwork, SubnetworkHandle] = {}

    def open(self, model: Any, *, n_layer: int, has_experts: bool) -> None:
        """Looks at the sidecar's header; its weights are loaded when a pass first needs them.

        model: llama.cpp's, which must outlive this, or `close`.
        has_experts: a mixture is narrowed without a sidecar.

        Raises:
            SidecarError: the one that was asked for cannot be used.
        """
        self._model, self._has_experts = model, has_experts
        place = path_beside(self._path) if self._wanted == "auto" else self._wanted
        if place is None or (self._wanted == "auto" and not place.exists()):
            return
        try:
            found = read(place, model=self._path)
            if len(found.n_narrow) != n_layer:
                raise SidecarError(f"{place} is for {len(found.n_narrow)} layers")
            self.sidecar = found
        except SidecarError as error:
            self.leave_aside(error)

    def leave_aside(self, error: SidecarError) -> None:
        """Goes on without the sidecar, where it was only found.

        Raises:
            SidecarError: this one, where it was asked for.
        """
        if self._wanted != "auto":
            raise error
        self.sidecar, self.refusal = None, str(error)

    def of(self, subnetwork: SubNetwork | None) -> SubnetworkHandle | None:
        """None: the whole model.

        Raises:
            SubnetworkError: it needs a sidecar, and there is none.
            SidecarError: the sidecar cannot be loaded.
        """
        if subnetwork is None:
            return None
        if subnetwork not in self._made:
            is_narrow = subnetwork.narrow_ffn and not self._has_experts
            sidecar = self._load_sidecar() if is_narrow or subnetwork.draft_head else None
            self._made[subnetwork] = library().subnetwork(subnetwork, sidecar)
        return self._made[subnetwork]

    def _load_sidecar(self) -> SidecarHandle:
        if self._model is None or self.sidecar is None:
            raise SubnetworkError(
                "a narrow FFN or a draft head needs a sidecar; run swift-gguf prepare"
            )
        if self.loaded_sidecar is None:
            self.loaded_sidecar = library().sidecar(self._model, self.sidecar.path)
        return self.loaded_sidecar

    def usable_sidecar(self) -> Sidecar | None:
        """The sidecar, loaded; one that was found beside the model and cannot be, is left aside.

        Raises:
            SidecarError: the one that was asked for cannot be loaded.
        """
        try:
            if self._model is not None and self.sidecar is not None:
                self._load_sidecar()
        except SidecarError as error:
            self.leave_aside(error)
        return self.sidecar

    def close(self) -> None:
        """Frees them; before the model."""
        self._made.clear()
        self.loaded_sidecar = self._model = None
