"""A scorer behind an HTTP endpoint.

    POST url   {"prompts": ["…", …], "responses": ["…", …]}   ->   {"scores": [0.3, null, …]}

null is a score that is missing. Refusals that may pass (no connection, a timeout, 429, 5xx) are tried
again after 1, 2, 4, … seconds; any other answer is a mistake in the set-up and ends the run, which then
goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import httpx

from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Http
from rlhf_cli.rewards.written import numbers

LONGEST_WAIT = 60.0
"""Seconds between two attempts at most."""


class Endpoint:
    """Scores one batch per request over a connection that is kept."""

    def __init__(self, source: Http) -> None:
        headers = {}
        if source.key_env is not None:
            key = os.environ.get(source.key_env)
            if not key:
                raise UserError(
                    f"reward.source.key_env={source.key_env}, but that is not set in the environment;"
                    f" export {source.key_env}=KEY, or set reward.source.key_env=null."
                )
            headers["Authorization"] = f"Bearer {key}"
        self._source = source
        self._client = httpx.Client(timeout=source.timeout, headers=headers)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Raises UserError when the endpoint does not answer, or not with scores."""
        url = self._source.url
        sent = {"prompts": list(prompts), "responses": list(responses)}
        for attempt in range(self._source.retries + 1):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), LONGEST_WAIT))
            try:
                answer = self._client.post(url, json=sent)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(
                    f"reward.source.url={url} is no address ({error}); give one as http://HOST:PORT."
                ) from error
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            if answer.status_code != 429 and answer.status_code < 500:
                return self._scores(answer, len(prompts))
            fault = f"status {answer.status_code}"
        raise UserError(
            f"reward.source.url={url} did not answer in {self._source.retries + 1} attempts of"
            f" {self._source.timeout:g} s ({fault}); start the server and give the same command again."
        )

    def _scores(self, answer: httpx.Response, wanted: int) -> list[float]:
        whose = f"reward.source.url={self._source.url}"
        if answer.is_error:
            raise UserError(f"{whose} refused with status {answer.status_code}: {_start(answer)}")
        try:
            scores = answer.json()["scores"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{whose} must answer with {{"scores": […]}}, but answered {_start(answer)}'
            ) from None
        return numbers(scores, wanted, whose)


def _start(answer: httpx.Response) -> str:
    return repr(answer.text[:80])
