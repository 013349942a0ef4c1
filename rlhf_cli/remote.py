"""Asking a server over HTTP: JSON is sent, JSON is answered.

A refusal that may pass (no connection, one that breaks, no whole answer in time, 429, 5xx) is tried again:
when the server says so in Retry-After, else after 1, 2, 4, … seconds, for all threads alike. Any other
answer is a mistake in the set-up and ends the command. No more of an answer is read than `LONGEST_ANSWER`,
and a key is never shown, not even where a server repeats it.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar

import httpx

from rlhf_cli.errors import UserError

LONGEST_WAIT = 300.0
"""Seconds between two attempts at most; a server that asks for more ends the command."""
LONGEST_ANSWER = 16 * 2**20
"""Bytes of an answer at most."""
SHOWN = 80
"""Characters of an answer in an error."""

Read = TypeVar("Read")


class Address(Protocol):
    """Where a server is, and how patient to be with it."""

    @property
    def url(self) -> str:
        """Its address."""

    @property
    def key_env(self) -> str | None:
        """Variable of the environment that holds the bearer token; None sends none."""

    @property
    def timeout(self) -> float:
        """Seconds to wait for an answer."""

    @property
    def retries(self) -> int:
        """Further attempts after one that failed."""


class Passing(Exception):
    """A refusal that may pass."""

    def __init__(self, fault: str, pause: float | None = None) -> None:
        """pause: seconds that the server asks to be left alone."""
        super().__init__(fault)
        self.pause = pause


class Server:
    """One server; several threads may ask."""

    def __init__(
        self, place: str, address: Address, at_once: int = 1, per_minute: int | None = None
    ) -> None:
        """place: of `address` in the configuration; at_once: most requests on their way.

        Raises UserError if the environment has no key where one is wanted.
        """
        self.whose = f"{place}.url={address.url}"
        self._place, self._address = place, address
        self._key = _key(f"{place}.key_env", address.key_env)
        self._pace = Pace(per_minute)
        self._client = httpx.Client(
            timeout=address.timeout,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=at_once),
        )

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def post(self, path: str, body: object, read: Callable[[Any], Read], form: str) -> Read:
        """What `read` makes of the answer to `body`, which is sent to `path` below the address.

        read: raises ValueError, LookupError or TypeError if the answer has not the `form` it should have.
        Raises UserError when there is no answer, or not of that form.
        """
        address = self._address
        url = address.url.rstrip("/") + path if path else address.url
        for attempt in range(address.retries + 1):
            self._pace.wait()
            try:
                text = self._answer(url, body)
                break
            except Passing as refusal:
                fault = str(refusal)
                if attempt < address.retries:
                    self._back_off(attempt, refusal.pause)
        else:
            raise UserError(
                f"{self.whose} did not answer in {address.retries + 1} attempts of"
                f" {address.timeout:g} s ({fault}); see to the server and give the same command again,"
                " which goes on from what is done."
            )
        try:
            return read(json.loads(text))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(
                f"{self.whose} must answer {form}, but answered {_start(text)}."
            ) from None

    def _answer(self, url: str, body: object) -> str:
        """The text of an answer. Raises Passing if the server may have one later, else UserError."""
        until = time.monotonic() + self._address.timeout
        try:
            with self._client.stream("POST", url, json=body) as answer:
                text = self._text(answer, until)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(
                f"{self.whose} is no address ({error}); give one as http://HOST:PORT/PATH."
            ) from error
        except httpx.RequestError as error:
            raise Passing(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        status = answer.status_code
        if status == 429 or status >= 500:
            raise Passing(f"status {status}: {_start(text)}", _asked_to_wait(answer))
        if not answer.is_success:
            raise UserError(
                f"{self.whose} refused with status {status}: {_start(text)}; what {self._place} says,"
                " its key_env included, must be what the server wants."
            )
        return text

    def _text(self, answer: httpx.Response, until: float) -> str:
        """The body without the key, which some servers repeat."""
        parts, size = list[bytes](), 0
        for part in answer.iter_bytes():
            parts.append(part)
            size += len(part)
            if size > LONGEST_ANSWER:
                raise UserError(
                    f"{self.whose} answers with more than {LONGEST_ANSWER >> 20} MiB; see whether it is the"
                    " server that was meant."
                )
            if time.monotonic() > until:  # each part came in time, but the whole does not
                raise Passing("its answer does not end")
        text = b"".join(parts).decode(errors="replace")
        return text.replace(self._key, "***") if self._key else text

    def _back_off(self, attempt: int, pause: float | None) -> None:
        if pause is None:
            time.sleep(min(2.0**attempt, LONGEST_WAIT))
        elif pause <= LONGEST_WAIT:
            self._pace.hold(pause)
        else:
            raise UserError(
                f"{self.whose} wants no request for {pause:.0f} s; give the same command again after that,"
                " and it goes on from what is done."
            )


class Pace:
    """When a request may begin, over all threads."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = -math.inf
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until it is this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            time.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Let no request begin before so many seconds have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _key(where: str, variable: str | None) -> str:
    """The key, out of the environment; empty where none is wanted."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    # The message of a library that cannot send a key would show it.
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            f"{where}={variable}, but the environment has no key there, or one with line ends or letters"
            f" beyond ASCII; export {variable}=KEY, or set {where}=null."
        )
    return key


def _asked_to_wait(answer: httpx.Response) -> float | None:
    """Seconds until the moment that Retry-After names, as a number or a date; None without one."""
    said = answer.headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    return max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0)


def _start(text: str) -> str:
    return repr(text[:SHOWN])
