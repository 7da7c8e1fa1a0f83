"""The graphs of a bundle, each opened when it is first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions, Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError


class Sessions:
    """Opens graphs once and keeps them. A session must only be run while `lock` is held.

    Args:
        bundle: an opened bundle.
        open_session: opens the session of a component.
        options: what the sessions are opened with.

    Attributes:
        lock: to be held while a session is asked for and run; the same thread may take it again.
        opening_seconds: time spent opening graphs so far.
    """

    def __init__(
        self, bundle: Bundle, open_session: Callable[[str], Session], options: EngineOptions = PORTABLE_OPTIONS
    ) -> None:
        self.lock = threading.RLock()
        self.opening_seconds = 0.0
        self._root = bundle.root
        self._open_session = open_session
        self._options = options
        self._opened: dict[str, Session] = {}
        self._closed = False

    @property
    def opened(self) -> tuple[str, ...]:
        """The components that are open now, in the order they were opened."""
        return tuple(self._opened)

    def get(self, component: str) -> Session:
        """The session of a component.

        Raises:
            MoiieError: it cannot be opened, or all were closed.
        """
        with self.lock:
            if self._closed:
                raise MoiieError(f"{self._root}: the model is closed", "load the bundle again")
            if component not in self._opened:
                start = time.perf_counter()
                self._opened[component] = self._open_session(component)
                self.opening_seconds += time.perf_counter() - start
            return self._opened[component]

    def end_prefill(self) -> None:
        """Let go of what only encoders and prefill use, where the form of the bundle asks for that."""
        with self.lock:
            for component in self._options.after_prefill:
                if component in self._opened:
                    self._opened.pop(component).close()
            if self._options.shared is not None:
                self._options.shared.end_prefill()

    def close(self) -> None:
        """Close all sessions. Closing twice is allowed."""
        with self.lock:
            self._closed = True
            while self._opened:
                self._opened.popitem()[1].close()
