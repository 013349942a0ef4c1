"""Draws one rollout and asks every model an algorithm needs what it thinks of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.rollout import Rollout, Source, ended
from rlhf_cli.engine.dialogue import Line, Partner, converse
from rlhf_cli.engine.forward import Rows, per_row, per_token
from rlhf_cli.engine.placement import present
from rlhf_cli.engine.sampler import Draw, Expert, Sampler, draw, left_pad, uniforms
from rlhf_cli.engine.world import World
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor, Scorer, log_probs, next_logits
from rlhf_cli.models.tuning import Policy
from rlhf_cli.recipes import Drawing

Ask = tuple[Sequence[Sequence[int]], int, Tensor, int, int, int, float]
"""What `draw` is told after the models, in its order."""
PLAIN = Drawing(temperature=1.0, noise=0.0)
"""As every evaluation draws."""


@dataclass(frozen=True)
class Judges:
    """Frozen models beside the policy; None where nothing asks for them."""

    ref: Policy | None
    reward: Scorer | None
    guide: PreTrainedModel | None = None
    weight: float = 1.0
    """What a unit of the reward model counts beside what is said of the texts."""
    texts: Callable[[Sequence[str], Sequence[str]], list[float]] | None = None
    """Scores prompts and responses as texts; NaN is a score that is missing."""

    def present(self, device: torch.device) -> AbstractContextManager[None]:
        """While those of them that wait in the host's memory can be asked."""
        models = (self.ref, self.reward, self.guide)
        return present([m for m in models if isinstance(m, nn.Module)], device)


def laid_out(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    width: int,
    longest: int,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [N,L], attention [N,L] and mask [N,T] of given responses; L = width + longest, T = longest."""
    left, real = left_pad(prompts, width, pad)
    right = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest)
    for row, ids in enumerate(responses):
        right[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1.0
    return torch.cat([left, right], 1), torch.cat([real, mask.bool()], 1), mask


@dataclass(frozen=True)
class Asked:
    """A prompt, and the responses to it that are given rather than drawn."""

    prompt: Sequence[int]
    given: tuple[Sequence[int], ...] = ()
    """One per source that is not drawn, in the order of `Sampling.sources`."""
    text: str = ""
    """The prompt as text, for whoever replies to it or judges texts."""
    answer: Sequence[int] | None = None
    """Another response, whose score is subtracted from those of all others; None subtracts nothing."""


@dataclass(frozen=True)
class Collector:
    """Everything about drawing that does not change during a run."""

    world: World
    tokenizer: PreTrainedTokenizerBase
    judges: Judges
    micro_batch: int
    max_response_tokens: int
    seed: int
    unended: float | None = None
    """Score of a response without end token, in place of the reward model's (or added to it, if
    `unended_adds`); None keeps that."""
    unended_adds: bool = False
    drawing: Drawing = PLAIN
    """Temperature of what is drawn from the policy, and noise of its scores."""
    missing: Literal["stop", "leave", "keep"] = "stop"
    """What a prompt does with a response whose score is missing: it ends the run, or leaves the rollout,
    the next fully scored prompt standing in for it; keep leaves the score NaN."""
    learned_reward: bool = False
    """Whether scores are those of the actor's own reward model."""
    partner: Partner | None = None
    """Who replies to a turn of the policy and pays for it; None where one response is all there is."""
    soft_beta: float | None = None
    """Coefficient of the entropy in the soft values of a Q network; None without one."""
    sampler: Sampler | None = None
    """Who draws from the policy; None is the trained model itself."""
    reuse: bool = False
    """Whether log-probabilities with which the trained model drew stand for those of a forward pass of its
    own, which the same weights make the same but for rounding."""
    old: bool = True
    """Whether the policy is asked about the responses; else `logp_old` is nan, for whoever learns from all of
    them in one step, which begins with that very pass."""
    together: bool = False
    """Whether some model's layers are gathered from all processes, so that these must draw in step."""

    def collect(
        self, actor: Actor, asked: Sequence[Asked], sampling: Sampling, stream: str, step: int
    ) -> tuple[Rollout, Mapping[str, float]]:
        """Draws and scores responses to all that is `asked`, shared out over the processes.

        Returns the whole rollout, on every process, and for the metrics the seconds spent drawing and
        scoring, and how far a sampler's log-probabilities are from the trainer's.
        """
        began = time.perf_counter()
        group = sampling.responses
        mine = self.world.share(len(asked))
        rows = range(mine.start * group, mine.stop * group)
        # The last uniforms of each row are its coin and its noise.
        uniform = uniforms(self.seed, stream, step, rows, self.max_response_tokens + 2)
        width = max(len(each.prompt) for each in asked)
        asks_ref = bool(sampling.ref or sampling.mixture)
        with (
            self._weights(actor, sampling),
            self.judges.present(self.world.device) if asks_ref else nullcontext(),
        ):
            told, *answers = self._answers(actor, asked[mine], sampling, uniform, width)
        tokens, attention, mask, *paid = answers
        drew = time.perf_counter()
        with self.judges.present(self.world.device):
            known = told.clone() if self._knows(sampling, told, mask) else None
            said = self._ask(actor, tokens, attention, mask, group, known)
            gap = self._gap(told, said["logp_old"])
            if paid:
                said |= {"reward": paid[0], "score": paid[0].sum(-1)}
            elif (score := self._score(actor, asked[mine], tokens, attention, mask)) is not None:
                said["score"] = score - self._start(actor, asked[mine], width, group)
        said["coin"] = uniform[:, -2].to(self.world.device)
        if "score" in said and self.drawing.noise > 0:
            normal = torch.special.ndtri(uniform[:, -1].clamp(1e-6, 1 - 1e-6).double()).float()
            said["score"] = said["score"] + self.drawing.noise * normal.to(self.world.device)
        whole = {
            name: self.world.gather(value).unflatten(0, (len(asked), group))
            for name, value in {
                "tokens": tokens,
                "attention": attention,
                "mask": mask,
                **said,
            }.items()
        }
        for name in ("logp_ref", "score", "value_old"):
            whole.setdefault(name, None)
        rollout = self._scored(Rollout(source=sampling.sources, **whole))
        seconds = {"generate": drew - began, "score": time.perf_counter() - drew}
        return rollout, {f"perf/{name}_seconds": took for name, took in seconds.items()} | gap

    def _weights(self, actor: Actor, sampling: Sampling) -> AbstractContextManager[None]:
        """While the sampler, if there is one, has the policy's weights for what is asked of it."""
        if self.sampler is None or not (sampling.policy or sampling.greedy):
            return nullcontext()
        return self.sampler.holding(actor.policy)

    def _knows(self, sampling: Sampling, told: Tensor, mask: Tensor) -> bool:
        """Whether what was drawn came with the policy's own log-probabilities, all of it."""
        own = self.reuse and self.sampler is None and self.partner is None
        if not own or set(sampling.sources) != {"policy"}:
            return False
        return not bool((told[mask.bool()] == torch.inf).any())

    def _gap(self, told: Tensor, logp: Tensor) -> dict[str, float]:
        """Mean |log-probability of the sampler - that of the trainer|, both [n,T], over all processes.

        Nothing where the trained model draws. Raises UserError beyond `sampler.max_gap`.
        """
        if self.sampler is None:
            return {}
        drawn = told != torch.inf
        apart = (told - logp)[drawn].abs().double()
        sums = self.world.sum({"apart": float(apart.sum()), "count": float(drawn.sum())})
        if not sums["count"]:
            return {}
        gap = sums["apart"] / sums["count"]
        if not gap <= self.sampler.max_gap:  # nan is not
            raise UserError(
                f"sampler.max_gap={self.sampler.max_gap:g}, but the sampler's log-probabilities are"
                f" {gap:.2g} nats per token away from the trainer's: it has other weights, or computes"
                " otherwise; draw with sampler=native, or set a larger sampler.max_gap if rounding explains"
                " so much."
            )
        return {"sampler/gap": gap}

    def _answers(
        self,
        actor: Actor,
        asked: Sequence[Asked],
        sampling: Sampling,
        uniform: Tensor,
        width: int,
    ) -> tuple[Tensor, ...]:
        """tokens [P*G,L], attention [P*G,L] and mask [P*G,T] of all responses, drawn and given.

        Before these, what a sampler says of its log-probabilities [P*G,T], inf elsewhere; behind them, if a
        partner pays for what is drawn, that, [P*G,T].
        """
        sources = sampling.sources
        laws = self._laws(actor, sampling)
        parts: list[tuple[Tensor, ...]] = [()] * len(sources)
        by_place = uniform[:, :-2].unflatten(0, (len(asked), len(sources)))
        end, pad = int(self.tokenizer.eos_token_id), int(self.tokenizer.pad_token_id)
        prompts = [each.prompt for each in asked]
        told = torch.full_like(by_place, torch.inf, device=self.world.device)
        for source, (experts, temperature) in laws.items():
            places = [g for g, s in enumerate(sources) if s == source]
            rows = by_place[:, places].flatten(0, 1)
            if self.partner is not None:
                said = self._dialogues(experts, temperature, asked, len(places), rows, width)
            else:
                ask = (prompts, len(places), rows, width, end, pad, temperature)
                drawn = self._drawn(source, experts, ask)
                if drawn.logp is not None and source == "policy":
                    told[:, places] = drawn.logp.unflatten(0, (len(asked), len(places)))
                said = tuple(t.clone() for t in (drawn.tokens, drawn.attention, drawn.mask))
            split = [t.unflatten(0, (len(asked), len(places))) for t in said]
            for i, g in enumerate(places):
                parts[g] = tuple(t[:, i] for t in split)
        given = [g for g, source in enumerate(sources) if source not in laws]
        for i, g in enumerate(given):
            responses = [each.given[i] for each in asked]
            laid = laid_out(prompts, responses, width, self.max_response_tokens, pad)
            # A demonstration of a task is a turn that nobody replied to: it was paid nothing.
            paid = () if self.partner is None else (torch.zeros_like(laid[2]),)
            parts[g] = tuple(t.to(self.world.device) for t in (*laid, *paid))
        stacked = [torch.stack(ts, 1) for ts in zip(*parts, strict=True)]
        return tuple(t.flatten(0, 1) for t in (told, *stacked))

    def _drawn(self, source: Source, experts: Sequence[Expert], ask: Ask) -> Draw:
        """What `ask` says, from the sampler if it has what is drawn from: the policy and nothing else."""
        if self.sampler is not None and source in ("policy", "greedy"):
            return self.sampler.draw(*ask)
        return draw(experts, *ask, self._all_ended if self.together else None)

    def _all_ended(self, here: bool) -> bool:
        return self.world.sum({"drawing": float(not here)})["drawing"] == 0

    def _dialogues(
        self,
        experts: Sequence[Expert],
        temperature: float,
        asked: Sequence[Asked],
        each: int,
        uniform: Tensor,
        width: int,
    ) -> tuple[Tensor, ...]:
        """As `draw`, for `each` dialogues per prompt instead of responses, and what was paid [n,T]."""
        assert self.partner is not None
        end, pad = int(self.tokenizer.eos_token_id), int(self.tokenizer.pad_token_id)
        lines = [Line(a.text, list(a.prompt)) for a in asked for _ in range(each)]

        def turns(contexts: list[list[int]], ahead: Tensor) -> list[list[int]]:
            widest = max(map(len, contexts))
            drawn = draw(experts, contexts, 1, ahead, widest, end, pad, temperature)
            ids = drawn.tokens[:, widest:]
            return [row[m.bool()].tolist() for row, m in zip(ids, drawn.mask, strict=True)]

        converse(lines, self.partner, turns, self._encode, self._decode, uniform, end)
        prompts = [a.prompt for a in asked for _ in range(each)]
        tokens, attention, mask = laid_out(
            prompts, [x.ids for x in lines], width, self.max_response_tokens, pad
        )
        paid = torch.zeros_like(mask)
        for row, line in enumerate(lines):
            length = len(line.ids)
            attention[row, width : width + length] = torch.tensor(line.attention)
            mask[row, :length] = torch.tensor(line.mask)
            paid[row, :length] = torch.tensor(line.reward)
        return tuple(t.to(self.world.device) for t in (tokens, attention, mask, paid))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _laws(
        self, actor: Actor, sampling: Sampling
    ) -> dict[Source, tuple[Sequence[Expert], float]]:
        """For each source that is drawn: out of what, and at which temperature."""
        at, laws = self.drawing.temperature, dict[Source, tuple[Sequence[Expert], float]]()
        if sampling.policy:
            laws["policy"] = [Expert(actor.policy)], at
        if sampling.greedy:
            laws["greedy"] = [Expert(actor.policy)], 0.0
        if sampling.ref:
            assert self.judges.ref is not None
            laws["ref"] = [Expert(self.judges.ref)], at
        if sampling.mixture:
            assert self.judges.ref is not None
            share = sampling.mixture_ref
            laws["mixture"] = [Expert(actor.policy, 1 - share), Expert(self.judges.ref, share)], at
        return laws

    def _ask(
        self,
        actor: Actor,
        tokens: Tensor,
        attention: Tensor,
        mask: Tensor,
        group: int,
        known: Tensor | None,
    ) -> dict[str, Tensor]:
        """[n,T] log-probabilities and values of this process's rows; known: those of the policy."""
        batch = (tokens, attention, mask, self.micro_batch, group)
        heat = self.drawing.temperature
        said = {
            name: per_token(
                lambda r, m=model: log_probs(m, *r.asked, temperature=heat),  # type: ignore[misc]
                *batch,
            )
            for name, model in {
                "logp_old": actor.policy if known is None and self.old else None,
                "logp_ref": self.judges.ref,
                "logp_guide": self.judges.guide,
            }.items()
            if model is not None
        }
        if known is not None:
            said["logp_old"] = torch.where(mask.bool(), known, 0.0)
        elif not self.old:
            said["logp_old"] = torch.full_like(mask, torch.nan)
        if (critic := actor.critic) is not None:
            said["value_old"] = per_token(lambda r: critic(*r.asked), *batch)
        elif self.soft_beta is not None:
            said["value_old"] = per_token(lambda r: self._soft_value(actor, r), *batch)
        return said

    def _score(
        self,
        actor: Actor,
        asked: Sequence[Asked],
        tokens: Tensor,
        attention: Tensor,
        mask: Tensor,
    ) -> Tensor | None:
        """[n] what this process's rows are worth; None if nobody is there to say."""
        model = actor.reward if self.learned_reward else self.judges.reward
        texts, score = self.judges.texts, torch.zeros(len(tokens), device=tokens.device)
        if model is None and texts is None:
            return None
        if model is not None:
            ask = (tokens, attention, mask, self.micro_batch, len(tokens) // len(asked))
            score += self.judges.weight * per_row(lambda r: model(*r.asked), *ask)
        if texts is not None:
            each = len(tokens) // len(asked)
            prompts = [a.text for a in asked for _ in range(each)]
            score += torch.tensor(texts(prompts, self._texts(tokens, attention, mask))).to(score)
        if self.unended is not None:
            cut = score + self.unended if self.unended_adds else self.unended
            score = torch.where(self._ended(tokens, mask), score, cut)
        return score

    def _start(self, actor: Actor, asked: Sequence[Asked], width: int, group: int) -> Tensor:
        """[n] what the scores of this process's rows are counted from."""
        answers = [each.answer for each in asked if each.answer is not None]
        zero = torch.zeros(len(asked) * group, device=self.world.device)
        if not answers:
            return zero
        pad = int(self.tokenizer.pad_token_id)
        prompts = [each.prompt for each in asked]
        laid = laid_out(prompts, answers, width, self.max_response_tokens, pad)
        score = self._score(actor, asked, *(t.to(self.world.device) for t in laid))
        assert score is not None
        return zero + score.repeat_interleave(group)

    def _scored(self, rollout: Rollout) -> Rollout:
        """The rollout by the rule for scores that are missing. Raises UserError if that says stop."""
        if rollout.score is None or self.missing == "keep":
            return rollout
        known = rollout.score.isfinite().all(1)
        if known.all():
            return rollout
        scored = known.nonzero().squeeze(-1)
        if self.missing == "stop" or len(scored) == 0:
            count = int((~rollout.score.isfinite()).sum())
            raise UserError(
                f"{count} of {rollout.score.numel()} responses got no score that is a number; mend what"
                " gives the scores and run the same command again, or let such prompts leave their"
                " rollout with reward.missing=leave."
            )
        # The next fully scored prompt, round the end.
        standing = torch.searchsorted(scored, torch.arange(len(known), device=known.device))
        return rollout.take(scored[standing % len(scored)])

    def _soft_value(self, actor: Actor, rows: Rows) -> Tensor:
        """[n,T] sum_a pi(a|s) [ Qbar(s,a) - beta log(pi(a|s) / pi_ref(a|s)) ], Qbar the slow copy."""
        assert self.judges.ref is not None and actor.q_target is not None
        assert self.soft_beta is not None
        heat = self.drawing.temperature
        logps, ref = (
            (next_logits(m, *rows.asked) / heat).float().log_softmax(-1)
            for m in (actor.policy, self.judges.ref)
        )
        q = next_logits(actor.q_target, *rows.asked).float()
        return (logps.exp() * (q - self.soft_beta * (logps - ref))).sum(-1)

    def texts(self, rollout: Rollout) -> list[str]:
        """Decoded responses, prompt by prompt, without end tokens; dialogues with the replies in them."""
        flat = (rollout.tokens.flatten(0, 1), rollout.attention.flatten(0, 1))
        return self._texts(*flat, rollout.mask.flatten(0, 1))

    def _texts(self, tokens: Tensor, attention: Tensor, mask: Tensor) -> list[str]:
        longest = mask.shape[-1]
        ids, kept = tokens[:, -longest:], attention[:, -longest:].bool()
        return self.tokenizer.batch_decode(
            [row[m].tolist() for row, m in zip(ids, kept, strict=True)], skip_special_tokens=True
        )

    def ended(self, rollout: Rollout) -> Tensor:
        """[P,G] 1.0 where the response closes with the end token."""
        return self._ended(rollout.tokens, rollout.mask).float()

    def _ended(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return ended(tokens, mask, int(self.tokenizer.eos_token_id))
