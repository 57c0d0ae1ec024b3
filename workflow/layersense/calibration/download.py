"""Fetch files over HTTP: resumed, checked, retried with patience, from few connections at once.

A file is written beside its target as ``.NAME.part`` and renamed when it is whole and passes its
check, so a target is complete wherever it exists, and is never fetched again. What an interrupted
call left is taken up where it ended, if the server still has the same file by its strong ETag,
which is kept beside it as ``.NAME.etag``.
"""

import email.utils
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
import tenacity

from layersense.errors import LayersenseError

TRIES = 6
"""How often a file is tried without getting any further."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try, and at most: each wait is about twice the one before."""
PATIENCE = 600.0
"""The longest that a server may ask to wait (``Retry-After``) and be waited for, in seconds."""
STALL = 30.0
"""Seconds without a byte after which a connection is given up."""
UNFIT_TRIES = 2
"""How often a file is fetched that came whole and is not what was expected."""
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed later."""


@dataclass(frozen=True)
class Wanted:
    """A file to fetch."""

    url: str
    """Where it lies; ``http`` or ``https``."""
    target: Path
    limit: int
    """The most bytes it may have."""
    check: Callable[[Path], None]
    """Raises :class:`LayersenseError` if the file is not what was expected."""


class RefusedError(LayersenseError):
    """A server's answer that no further try would change; other files may still be fetched."""


class _RetryError(Exception):
    """A try that failed and may succeed later.

    Args:
        why: what happened, for messages.
        wait: seconds that the server asked to wait, if it did.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _UnfitError(_RetryError):
    """What came whole, and is not what was expected."""


Progress = Callable[[int, int | None], None]
"""Called now and then with the bytes that are there, and how many there will be if known."""


class Downloader:
    """A client with a limited number of connections; use it in a ``with`` block.

    Args:
        connections: at most so many at once, to all servers together.
    """

    def __init__(self, connections: int) -> None:
        from layersense import __version__

        self.connections = connections
        self._stop = threading.Event()
        self._client = httpx.Client(
            follow_redirects=True,
            timeout=httpx.Timeout(STALL, pool=None),
            limits=httpx.Limits(max_connections=connections),
            # The bytes are to be those that the server counts and tags.
            headers={"User-Agent": f"layersense/{__version__}", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._client.close()

    def fetch_all(self, files: Iterable[Wanted], done: Callable[[], None]) -> list[RefusedError]:
        """Fetch files, and go on past those that a server refuses for good.

        Args:
            files: what to fetch.
            done: called after each file that was fetched.

        Returns:
            What was refused.

        Raises:
            LayersenseError: a server cannot be reached after all tries, or the disk is full; the
                rest is given up then.
        """
        refused: list[RefusedError] = []
        pool = ThreadPoolExecutor(self.connections)
        try:
            for future in as_completed([pool.submit(self.fetch, file) for file in files]):
                try:
                    future.result()
                except RefusedError as error:
                    refused.append(error)
                else:
                    done()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()
        return refused

    def fetch(self, file: Wanted, progress: Progress = lambda there, whole: None) -> None:
        """Fetch one file, unless it is there.

        Args:
            file: what to fetch.
            progress: told how far it is.

        Raises:
            RefusedError: the server does not have it, or what it has is not what was expected.
            LayersenseError: it cannot be reached after all tries, or the file not be written.
        """
        if file.target.exists():
            return
        _check_url(file.url)
        best = tried_at_best = unfit = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal best, tried_at_best, unfit
            unfit += isinstance(_error(state), _UnfitError)
            # A large file over a bad line needs many tries, each of which gets further.
            there = _size(_part(file.target))
            if there > best:
                best, tried_at_best = there, state.attempt_number - 1
            tried = state.attempt_number - tried_at_best
            return tried >= TRIES or unfit >= UNFIT_TRIES or self._stop.is_set()

        try:
            file.target.parent.mkdir(parents=True, exist_ok=True)
            for attempt in tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(_RetryError),
                wait=_wait,
                stop=stop,
                sleep=tenacity.sleep_using_event(self._stop),
                reraise=True,
            ):
                with attempt:
                    self._try(file, progress)
        except _UnfitError as error:
            raise RefusedError(
                f"{shown(file.url)}: what came is not what was expected, twice: {error}; correct "
                "the address, or leave its rows out"
            ) from error
        except _RetryError as error:
            raise LayersenseError(
                f"{shown(file.url)}: could not be fetched in {TRIES} tries ({error}); connect to "
                "the network or try again later, what is complete is kept"
            ) from error
        except OSError as error:
            raise LayersenseError(
                f"{file.target}: cannot be written ({error.strerror or error}); free disk space or "
                "choose a writable folder"
            ) from error

    def _try(self, file: Wanted, progress: Progress) -> None:
        part, tag = _part(file.target), file.target.with_name(f".{file.target.name}.etag")
        start = _size(part)
        etag = tag.read_text(encoding="latin-1") if start and tag.exists() else ""
        headers = {}
        if start and etag:
            headers = {"Range": f"bytes={start}-", "If-Range": etag}
        else:
            start = 0
        try:
            with self._client.stream("GET", file.url, headers=headers) as response:
                start = self._check_answer(file, response, start)
                if start == 0:
                    part.unlink(missing_ok=True)
                    _keep_tag(tag, response)
                self._receive(file, response, part, start, progress)
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise RefusedError(
                f"{shown(file.url)}: leads to no file ({error}); correct the address"
            ) from error
        except httpx.TransportError as error:
            raise _RetryError(_reason(error)) from error
        try:
            file.check(part)
        except LayersenseError as error:
            part.unlink(missing_ok=True)
            # Such as a page of a proxy that says "please log in": it may be gone the next time.
            raise _UnfitError(str(error)) from error
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file.target)
        tag.unlink(missing_ok=True)

    def _check_answer(self, file: Wanted, response: httpx.Response, start: int) -> int:
        """Return where the answer's bytes begin."""
        status = response.status_code
        if file.url.startswith("https:") and response.url.scheme != "https":
            raise RefusedError(
                f"{shown(file.url)}: leads to {shown(str(response.url))}, which is not encrypted; "
                "correct the address"
            )
        if status == 206:
            found = response.headers.get("Content-Range", "")
            if start and found.startswith(f"bytes {start}-"):
                return start
            _part(file.target).unlink(missing_ok=True)
            raise _RetryError(
                f"the server sent another part ({found or 'unnamed'}) than was asked for"
            )
        if status == 416:
            _part(file.target).unlink(missing_ok=True)
            raise _RetryError("the file has changed on the server")
        if status in AGAIN:
            wait = _retry_after(response)
            if wait is not None and wait > PATIENCE:
                raise LayersenseError(
                    f"{shown(file.url)}: the server answers {status} and asks to come back in "
                    f"{wait:.0f} s; run the same command then, what is complete is kept"
                )
            raise _RetryError(
                f"the server answers {status} {response.reason_phrase}".rstrip(), wait
            )
        if status != 200:
            raise RefusedError(
                f"{shown(file.url)}: the server answers {status} {response.reason_phrase}; "
                "correct the address, or leave its rows out"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise RefusedError(
                f"{shown(file.url)}: the server sends it packed "
                f"({response.headers['Content-Encoding']}), which was not asked for; fetch it by "
                "hand"
            )
        return 0

    def _receive(
        self,
        file: Wanted,
        response: httpx.Response,
        part: Path,
        start: int,
        progress: Progress,
    ) -> None:
        length = response.headers.get("Content-Length", "")
        whole = start + int(length) if length.isdecimal() else None
        there = start
        with part.open("ab") as out:
            if max(there, whole or 0) > file.limit:
                raise RefusedError(_too_large(file))
            for chunk in response.iter_raw():  # a chunk size would hold back what came last
                out.write(chunk)
                there += len(chunk)
                if there > file.limit:
                    raise RefusedError(_too_large(file))
                progress(there, whole)
                if self._stop.is_set():
                    raise _RetryError("it was given up because another file failed")
        if whole is not None and there != whole:
            raise _RetryError(f"{there} of {whole} bytes came")


def shown(url: str) -> str:
    """Return an address for messages: without user, password and query, which may be secret."""
    try:
        parts = httpx.URL(url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.host}{port}{parts.path}"
    except httpx.InvalidURL:
        return repr(url[:100])


def _check_url(url: str) -> None:
    with suppress(httpx.InvalidURL):
        parts = httpx.URL(url)
        if parts.scheme in ("http", "https") and parts.host:
            return
    raise RefusedError(f"{shown(url)}: expected an address that begins with http:// or https://")


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _keep_tag(tag: Path, response: httpx.Response) -> None:
    """Keep what proves at the next try that the server's file is the same."""
    etag = response.headers.get("ETag", "")
    if etag.startswith('"') and response.headers.get("Accept-Ranges") != "none":
        tag.write_text(etag, encoding="latin-1", errors="replace")
    else:
        tag.unlink(missing_ok=True)


_backoff = tenacity.wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT)


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _wait(state: tenacity.RetryCallState) -> float:
    error = _error(state)
    asked = error.wait if isinstance(error, _RetryError) else None
    return _backoff(state) if asked is None else asked


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that a server asks to wait: a number, or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"nothing came for {STALL:.0f} s"
    return str(error) or type(error).__name__


def _too_large(file: Wanted) -> str:
    return (
        f"{shown(file.url)}: has more than {file.limit / 2**20:.0f} MiB, which is not what was "
        "expected; correct the address"
    )
