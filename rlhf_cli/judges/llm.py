"""A language model as a judge, behind OpenAI's chat-completions protocol.

    POST url/chat/completions   {"model": …, "messages": […], "temperature": 0, "max_tokens": …}

`remote` says how it is asked. An endpoint that does not answer ends the command; what was answered until
then is kept, so that giving it again goes on where it ended.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UserError
from rlhf_cli.judges.cache import Answers, Question
from rlhf_cli.judges.prompts import verdict, wording
from rlhf_cli.recipes import Chat
from rlhf_cli.remote import Server

ASKED = 2
"""Times a question is asked whose answer cannot be read."""
CHARACTERS = 4
"""Of a token, for the estimate."""
FORM = "as OpenAI's chat completions do, to whose address /chat/completions is added"


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
            source = self._source
            with closing(Server("judge", source, source.parallel, source.per_minute)) as server:
                self._ask(server, new, answered)
        return [verdict(self._answers.get(question) or "") for question in questions]

    def _ask(
        self, server: Server, questions: Sequence[Question], answered: Callable[[], None]
    ) -> None:
        failed = threading.Event()

        def settle(question: Question) -> None:
            if failed.is_set():
                return
            try:
                self._answers.add(question, self._heard(server, question))
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

    def _heard(self, server: Server, question: Question) -> str:
        """The last answer to a question that is asked until it can be read, or often enough."""
        body = {
            "model": self._source.model,
            "messages": [{"role": "user", "content": _wording(question)}],
            "temperature": 0,
            "max_tokens": self._source.max_tokens,
        }
        for _ in range(ASKED):
            said = server.post("/chat/completions", body, _said, FORM)
            if not math.isnan(verdict(said)):
                break
        return said

    def _new(self, questions: Sequence[Question]) -> list[Question]:
        return [q for q in dict.fromkeys(questions) if self._answers.get(q) is None]


def _said(answer: Any) -> str:
    """What the model said; it may say nothing (null), which is not readable."""
    said = answer["choices"][0]["message"]["content"] or ""
    if not isinstance(said, str):
        raise TypeError
    return said


def _wording(question: Question) -> str:
    return wording(question.version, question.prompt, question.first, question.second)
