"""The frames of a live source: the newest, however slow they are taken; a lost source is reached again."""

# Tests: tests/inputs/test_sources.py.
from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeAlias

from PIL import Image

from paliedge.errors import ImageError, PaliEdgeError
from paliedge.inputs.video import FrameOptions, VideoFrame, lost

_LOG = logging.getLogger(__name__)
FrameThunk: TypeAlias = "Callable[[], Image.Image] | None"
"""A frame that is turned into a picture only when somebody wants it; None where a source has nothing yet."""
FrameSource: TypeAlias = "Callable[[], Generator[FrameThunk, None, None]]"
"""Connects to a live source and gives its frames until it ends, raises, or is closed."""
WATCHDOG_S = 10.0
"""A live source without a frame for so long is lost."""
MAX_DELAY_S = 30.0
"""The longest wait before connecting again."""
_JOIN_S = 2.0


class _FrameBuffer:
    """Where the newest frames wait; shared by the reader that fills it and the one who takes."""

    def __init__(self, options: FrameOptions) -> None:
        self.changed = threading.Condition()
        self.shots: deque[tuple[int, float, Callable[[], Image.Image]]] = deque()
        self.num_dropped = 0
        self._options = options
        self._num_seen = 0

    def put(self, shot: Callable[[], Image.Image], moment_s: float) -> None:
        """Keep the frame unless it is left out; under `changed`."""
        number = self._num_seen
        self._num_seen += 1
        if number % self._options.every:
            return
        if len(self.shots) >= self._options.buffer:
            self.shots.popleft()
            self.num_dropped += 1
        self.shots.append((number, moment_s, shot))
        self.changed.notify_all()


class _ReaderThread(threading.Thread):
    """One connection to a live source, read as fast as it gives frames."""

    def __init__(self, feed: FrameSource, shelf: _FrameBuffer) -> None:
        super().__init__(name="paliedge-reader", daemon=True)  # a device that hangs must not keep the program
        self.error: PaliEdgeError | None = None
        self.last_s = time.monotonic()
        self._feed = feed
        self._shelf = shelf
        self._is_stopped = False

    def run(self) -> None:
        error: PaliEdgeError = lost("the end of the stream")
        try:
            with closing(self._feed()) as shots:
                for shot in shots:
                    if not self._keep(shot):
                        return
        except PaliEdgeError as problem:
            error = problem
        except Exception as problem:  # a thread has nobody to raise to
            error = lost(f"{type(problem).__name__} in the reader")
        with self._shelf.changed:
            self.error = self.error or error
            self._shelf.changed.notify_all()

    def _keep(self, shot: FrameThunk) -> bool:
        with self._shelf.changed:
            if self._is_stopped:
                return False
            if shot:
                self.last_s = time.monotonic()
                self._shelf.put(shot, self.last_s)
            return True

    def stop(self) -> None:
        """Let the thread end at its next frame, and wait for that a little."""
        with self._shelf.changed:
            self._is_stopped = True
        self.join(_JOIN_S)


class LiveFrames:
    """The frames of a live source: the newest, however slow they are taken; a lost source is reached again.

    Waits 1, 2, 4 ... 30 seconds before each further attempt; a frame sets that back to 1.

    Args:
        feed: connects to the source.
        options: which frames are taken, and how often a lost source is tried.
        report: gets a line when the source is lost.
        watchdog_s: a source without a frame for so long is lost; in seconds.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        feed: FrameSource,
        options: FrameOptions,
        report: Callable[[str], None],
        *,
        watchdog_s: float = WATCHDOG_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._feed = feed
        self._options = options
        self._report = report
        self._watchdog_s = watchdog_s
        self._sleep = sleep
        self._shelf = _FrameBuffer(options)

    @property
    def num_dropped(self) -> int:
        """Frames that nobody took because newer ones came."""
        return self._shelf.num_dropped

    def __iter__(self) -> Generator[VideoFrame, None, None]:
        """Frames until the attempts are used up.

        Raises:
            ImageError: the source is lost for good.
            MissingExtraError: what reads it is not installed.
        """
        failures, start_s = 0, None
        while True:
            reader = _ReaderThread(self._feed, self._shelf)
            reader.start()
            try:
                while taken := self._take(reader):
                    number, moment_s, shot = taken
                    start_s = moment_s if start_s is None else start_s
                    failures = 0
                    yield VideoFrame(number, moment_s - start_s, shot())
            finally:
                reader.stop()
            error = reader.error or lost("the end of the stream")
            if not isinstance(error, ImageError) or failures == self._options.reconnect:
                raise error
            delay_s = min(2.0**failures, MAX_DELAY_S)
            failures += 1
            _LOG.debug("attempt %d failed: %s", failures, error)
            self._report(f"source lost: {error.found}; connecting again in {delay_s:.0f} s")
            self._sleep(delay_s)

    def _take(self, reader: _ReaderThread) -> tuple[int, float, Callable[[], Image.Image]] | None:
        """The oldest frame that waits, else the next to come; None when the reader has lost the source."""
        with self._shelf.changed:
            while not self._shelf.shots:
                quiet_s = time.monotonic() - reader.last_s
                if not reader.error and quiet_s >= self._watchdog_s:
                    reader.error = lost(f"no frame for {self._watchdog_s:.0f} s")
                if reader.error:
                    return None
                self._shelf.changed.wait(self._watchdog_s - quiet_s)
            return self._shelf.shots.popleft()
