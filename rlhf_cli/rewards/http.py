"""A scorer behind an HTTP endpoint (`remote` says how it is asked).

    POST url   {"prompts": ["…", …], "responses": ["…", …]}   ->   {"scores": [0.3, null, …]}

null is a score that is missing. An endpoint that does not answer ends the run, which then goes on from
its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.recipes import Http
from rlhf_cli.remote import Server
from rlhf_cli.rewards.written import Scorer, numbers

FORM = '{"scores": […]}'


def endpoint(source: Http) -> Scorer:
    """Scores one batch per request over a connection that is kept.

    The scorer raises UserError when the endpoint does not answer, or not with scores.
    """
    server = Server("reward.source", source)

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        body = {"prompts": list(prompts), "responses": list(responses)}
        scores = server.post("", body, lambda said: said["scores"], FORM)
        return numbers(scores, len(prompts), server.whose)

    return score
