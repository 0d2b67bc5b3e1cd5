"""What the routes share: the model's thread, the metrics, and information about the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from swift_gguf import __version__
from swift_gguf.server.metrics import Metrics
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.served import ServedLlama, Tally, Work
from swift_gguf.server.worker import Job, Worker


class Service:
    """A model and its queue of requests.

    load: loads the model, in the model's thread.
    on_loaded: called in that thread when the model is loaded, or when loading failed (`error`).
    stop_loading: makes `load` end early.
    """

    def __init__(
        self,
        load: Callable[[], ServedLlama],
        options: ServerOptions,
        *,
        on_loaded: Callable[[], None] = lambda: None,
        stop_loading: Callable[[], None] = lambda: None,
    ) -> None:
        self.options = options
        self._worker = Worker(
            load,
            queue_size=options.queue_size,
            on_loaded=on_loaded,
            stop_loading=stop_loading,
        )
        self.metrics = Metrics(
            waiting=lambda: self._worker.n_waiting,
            running=lambda: self._worker.n_running,
            read_ahead=lambda: self.model.n_read_ahead if self.model else 0,
        )
        self._created = int(time.time())
        self.start, self.stop, self.close = (
            self._worker.start,
            self._worker.stop,
            self._worker.close,
        )
        self.drain, self.stop_current = self._worker.drain, self._worker.stop_current
        self.require_model, self.vocabulary = self._worker.require_model, self._worker.vocabulary

    @property
    def error(self) -> BaseException | None:
        """The reason why the model could not be loaded."""
        return self._worker.error

    @property
    def is_stuck(self) -> bool:
        """See `Worker.is_stuck`."""
        return self._worker.is_stuck

    @property
    def model(self) -> ServedLlama | None:
        """The model; None while it is loading."""
        return self._worker.model

    def submit(self, work: Work) -> Job[ServedLlama]:
        """Queues work on the model.

        Raises:
            ApiError: 503, as in `Worker.submit`.
        """
        return self._worker.submit(work, timeout_s=self.options.timeout_s)

    def count(self, tally: Tally, queue_s: float) -> None:
        """Adds a request to the metrics."""
        self.metrics.count(tally, queue_s)

    # -- about the model ---------------------------------------------------------------------------

    def model_card(self) -> dict[str, Any]:
        """The answer of /v1/models."""
        card = {
            "id": self.options.alias,
            "object": "model",
            "created": self._created,
            "owned_by": "swift-gguf",
        }
        if model := self._worker.model:
            card["meta"] = model.meta()
        return card

    def props(self) -> dict[str, Any]:
        """The answer of /props.

        Raises:
            ApiError: 503, as in `require_model`.
        """
        model, sampling = self.require_model(), self.options.sampling
        return {
            "default_generation_settings": {
                "n_ctx": model.n_ctx(),
                "params": {
                    "n_predict": self.options.n_predict or -1,
                    "seed": -1 if sampling.seed is None else sampling.seed,
                    "temperature": sampling.temperature,
                    "top_k": sampling.top_k,
                    "top_p": sampling.top_p,
                    "min_p": sampling.min_p,
                    "repeat_penalty": sampling.repeat_penalty,
                    "presence_penalty": sampling.presence_penalty,
                    "frequency_penalty": sampling.frequency_penalty,
                },
            },
            "total_slots": 1,
            "model_alias": self.options.alias,
            "modalities": {"vision": False, "audio": False},
            "chat_template": model.chat_template,
            "build_info": f"swift-gguf {__version__}",
            "speculation": model.about_speculation(),
        }
