"""The graphs of a bundle, each opened when it is first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from moiie_runtime.backends.session import Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError


class Sessions:
    """Opens graphs once and keeps them. A session must only be run while `lock` is held.

    Args:
        bundle: an opened bundle.
        open_session: opens the session of a component.

    Attributes:
        lock: to be held while a session is asked for and run; the same thread may take it again.
        opening_seconds: time spent opening graphs so far.
    """

    def __init__(self, bundle: Bundle, open_session: Callable[[str], Session]) -> None:
        self.lock = threading.RLock()
        self.opening_seconds = 0.0
        self._root = bundle.root
        self._open_session = open_session
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

    def close(self) -> None:
        """Close all sessions. Closing twice is allowed."""
        with self.lock:
            self._closed = True
            while self._opened:
                self._opened.popitem()[1].close()
