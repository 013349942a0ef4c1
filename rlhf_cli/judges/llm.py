"""A language model as a judge, behind OpenAI's chat-completions protocol.

    POST url/chat/completions   {"model": …, "messages": […], "temperature": 0, "max_tokens": …}

Refusals that may pass (no connection, a timeout, 429, 5xx) are tried again: when the endpoint says so in
Retry-After, for all workers alike, else after 1, 2, 4, … seconds. Any other refusal ends the command;
what was answered until then is kept, so that giving it again goes on where it ended.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from rlhf_cli.errors import UserError
from rlhf_cli.judges.cache import Answers, Question
from rlhf_cli.judges.prompts import verdict, wording
from rlhf_cli.recipes import Chat

LONGEST_WAIT = 300.0
"""Seconds between two attempts at most; an endpoint that asks for more ends the command."""
ASKED = 2
"""Times a question is asked whose answer cannot be read."""
CHARACTERS = 4
"""Of a token, for the estimate."""


@dataclass(frozen=True)
class Estimate:
    """What asking will take, if every answer can be read and no request fails."""

    calls: int
    cached: int
    """Questions that were answered before."""
    tokens_in: int
    """Sent, at four characters each."""
    tokens_out: int
    """Answered at most."""
    price: float | None
    """At most; None where a price is not given."""


class Judge:
    """Answers questions from its cache, and asks the endpoint the others."""

    def __init__(self, source: Chat) -> None:
        self._source = source
        self._answers = Answers(Path(source.cache).expanduser())

    def question(self, prompt: str, first: str, second: str) -> Question:
        """Which of two responses is better, in this judge's wording."""
        return Question(self._source.model, self._source.prompt, prompt, first, second)

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """What `verdicts` would take; asks nobody."""
        source, new = self._source, self._new(questions)
        sent = math.ceil(sum(len(_wording(question)) for question in new) / CHARACTERS)
        answered = len(new) * source.max_tokens
        price = None
        if source.price_in is not None and source.price_out is not None:
            price = (sent * source.price_in + answered * source.price_out) / 1e6
        return Estimate(len(new), len(set(questions)) - len(new), sent, answered, price)

    def verdicts(self, questions: Sequence[Question], answered: Callable[[], None]) -> list[float]:
        """1 where the first response is better, 0 where the second is, 1/2 for a tie, nan if unreadable.

        answered: called after each new answer. Raises UserError if the endpoint does not answer.
        """
        if new := self._new(questions):
            with closing(Endpoint(self._source)) as endpoint:
                self._ask(endpoint, new, answered)
        return [verdict(self._answers.get(question) or "") for question in questions]

    def _ask(
        self, endpoint: Endpoint, questions: Sequence[Question], answered: Callable[[], None]
    ) -> None:
        failed = threading.Event()

        def settle(question: Question) -> None:
            if failed.is_set():
                return
            try:
                self._answers.add(question, _heard(endpoint, question))
            except UserError:
                failed.set()
                raise

        pool = ThreadPoolExecutor(self._source.parallel)
        try:
            for one in as_completed([pool.submit(settle, question) for question in questions]):
                one.result()
                answered()
        finally:
            # Answers on their way are paid for: they are waited for, and kept.
            pool.shutdown(cancel_futures=True)

    def _new(self, questions: Sequence[Question]) -> list[Question]:
        return [q for q in dict.fromkeys(questions) if self._answers.get(q) is None]


class Endpoint:
    """One question per request; several threads may ask."""

    def __init__(self, source: Chat) -> None:
        self._source = source
        self._key = _key(source.key_env)
        self._pace = Pace(source.per_minute)
        self._client = httpx.Client(
            timeout=source.timeout,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=source.parallel),
        )

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def ask(self, words: str) -> str:
        """The answer to one message. Raises UserError when there is none, or not in the protocol."""
        source = self._source
        whose = f"judge.url={source.url}"
        body = {
            "model": source.model,
            "messages": [{"role": "user", "content": words}],
            "temperature": 0,
            "max_tokens": source.max_tokens,
        }
        for attempt in range(source.retries + 1):
            self._pace.wait()
            pause = None
            try:
                answer = self._client.post(f"{source.url.rstrip('/')}/chat/completions", json=body)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(
                    f"{whose} is no address ({error}); give one as http://HOST:PORT/v1."
                ) from error
            except httpx.RequestError as error:
                fault = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if answer.status_code != 429 and answer.status_code < 500:
                    return self._said(answer)
                fault = f"status {answer.status_code}: {self._start(answer)}"
                pause = _asked_to_wait(answer)
            if attempt < source.retries:
                self._back_off(attempt, pause)
        raise UserError(
            f"{whose} did not answer in {source.retries + 1} attempts of {source.timeout:g} s"
            f" ({fault}); see to the server and give the same command again, which goes on from here."
        )

    def _back_off(self, attempt: int, pause: float | None) -> None:
        if pause is None:
            time.sleep(min(2.0**attempt, LONGEST_WAIT))
        elif pause <= LONGEST_WAIT:
            self._pace.hold(pause)
        else:
            raise UserError(
                f"judge.url={self._source.url} wants no request for {pause:.0f} s; give the same"
                " command again after that, and it goes on from here."
            )

    def _said(self, answer: httpx.Response) -> str:
        whose = f"judge.url={self._source.url}"
        if answer.is_error:
            raise UserError(
                f"{whose} refused with status {answer.status_code}: {self._start(answer)}; judge.model"
                " and judge.key_env must be what the endpoint wants."
            )
        try:
            said = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(
                f"{whose} must answer as OpenAI's chat completions do, but answered"
                f" {self._start(answer)}; give the address to which /chat/completions is added."
            ) from None
        # A model may answer with nothing (null), which is not readable.
        return self._without_key(said or "")

    def _start(self, answer: httpx.Response) -> str:
        return repr(self._without_key(answer.text)[:80])

    def _without_key(self, text: str) -> str:
        """Some endpoints repeat what they were sent."""
        return text.replace(self._key, "***") if self._key else text


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


def _heard(endpoint: Endpoint, question: Question) -> str:
    """The last answer to a question that is asked until it can be read, or often enough."""
    for _ in range(ASKED):
        said = endpoint.ask(_wording(question))
        if not math.isnan(verdict(said)):
            break
    return said


def _wording(question: Question) -> str:
    return wording(question.version, question.prompt, question.first, question.second)


def _key(variable: str | None) -> str:
    """The key, out of the environment; empty where none is wanted."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    # The message of a library that cannot send a key would show it.
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            f"judge.key_env={variable}, but the environment has no key there, or one with line ends or"
            f" letters beyond ASCII; export {variable}=KEY, or set judge.key_env=null."
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
