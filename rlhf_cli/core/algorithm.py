"""What an algorithm is: a frozen dataclass whose fields are its hyperparameters and whose methods are
its mathematics.

It never averages, never sees a process group, a config library or a logger. The shape of a term is the
unit it judges: `[P,G,T]` tokens, `[P,G]` responses, `[P]` prompts. The engine alone turns terms into
one number (`core.masked.total`), with denominators known before backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, get_args

from rlhf_cli.core.rollout import Forward, Rollout, Source
from rlhf_cli.recipes import Optim, Update

if TYPE_CHECKING:
    from torch import Tensor

Terms: TypeAlias = "Mapping[str, Tensor]"
"""Named, unreduced contributions, each `[P,G,T]`, `[P,G]` or `[P]`."""
State: TypeAlias = "Mapping[str, Tensor]"
"""What an algorithm remembers between rollouts; saved with the checkpoint."""


class Model(Enum):
    """Models an algorithm may ask for beside the policy."""

    REF = "ref"
    REWARD = "reward"
    CRITIC = "critic"
    GUIDE = "guide"
    """A second policy, trained before and frozen: another parent of the run."""
    Q = "q"
    """A network with a value for every token in every state, and its slowly following copy."""


@dataclass(frozen=True)
class Sampling:
    """How many responses per prompt come from where; G is the sum.

    The prompts are those of the preference pairs if `dataset` is asked for, of the demonstrations if
    `demo` is, and else the training prompts.
    """

    policy: int = 0
    ref: int = 0
    greedy: int = 0
    mixture: int = 0
    dataset: int = 0
    """0 or 2."""
    mismatch: int = 0
    demo: int = 0
    """0 or 1."""
    mixture_ref: float = 0.0
    """Weight of log pi_ref in the mixture; the rest is log pi's."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """[G] the source of each response, in the order they are laid out."""
        return tuple(source for source in get_args(Source) for _ in range(getattr(self, source)))

    @property
    def responses(self) -> int:
        """G."""
        return len(self.sources)


@dataclass(frozen=True)
class Targets:
    """What `prepare` derives from a rollout; no gradient flows into it."""

    advantage: Tensor | None = None
    """[P,G,T] or [P,G]."""
    returns: Tensor | None = None
    """[P,G,T] what the critic should have said."""
    label: Tensor | None = None
    """[P,C] probability that the first of each pair is preferred; pairs in the order of `core.pairs`."""
    baseline: Tensor | None = None
    """[P] a level that what is said of the prompt's responses is compared with."""

    def take(self, prompts: Tensor) -> Targets:
        """The same targets for some prompts only."""
        picked = {
            f.name: value[prompts]
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        return replace(self, **picked)

    def trim(self, length: int) -> Targets:
        """The same targets without the response columns past `length`."""
        cut = {
            name: value[..., :length]
            for name in ("advantage", "returns")
            if (value := getattr(self, name)) is not None and value.dim() == 3
        }
        return replace(self, **cut)


class Algorithm(Protocol):
    """The contract; see `algos/p3o.py` for a complete example."""

    needs: ClassVar[frozenset[Model]]
    """Models beside the policy; prunes the chain of stages and the forwards of a rollout."""
    couples_group: ClassVar[bool]
    """Whether responses to one prompt are judged together (then one response per prompt makes no sense)."""
    shift_invariant: ClassVar[bool]
    """Whether r(x,y) + delta(x) leaves every gradient unchanged; tested both ways."""
    trains_reward: ClassVar[bool]
    """Whether the reward model learns with the policy; then `now.score` is there."""
    revision: ClassVar[int]
    """Raised whenever the numbers of the algorithm change; part of the run's key."""

    @property
    def update(self) -> Update:
        """The sampling budget and how often each response is learned from."""
        ...

    @property
    def optim(self) -> Optim:
        """The optimiser of the policy."""
        ...

    def sampling(self) -> Sampling:
        """Who answers each prompt."""
        ...

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Once per rollout, without gradient, over the whole rollout on every process."""
        ...

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """Differentiable, pure, per prompt; the sum of the averaged terms is minimised."""
        ...

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """Terms that are only logged, averaged the same way."""
        ...

    def side(self) -> Sampling:
        """Rows of a second stream, of the dataset only: as many as there are prompts, in every step."""
        ...

    def side_loss(self, now: Forward, rollout: Rollout) -> Terms:
        """Terms of the second stream, named otherwise than those of `loss` and averaged by themselves."""
        ...

    def wants_entropy(self) -> bool:
        """Whether `now.entropy` is to be there."""
        ...

    def replayed(self) -> int:
        """How many rollouts to keep; above 1, each update learns from prompts drawn out of them all."""
        ...

    def critic_only(self) -> int:
        """How many rollouts, at the beginning, teach the critic alone."""
        ...


class Defaults:
    """The parts of the contract that most algorithms leave as they are here; there are no fields."""

    trains_reward: ClassVar[bool] = False

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Nothing to prepare."""
        return Targets(), state

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """Nothing to log beyond the loss."""
        return {}

    def side(self) -> Sampling:
        """No second stream."""
        return Sampling()

    def side_loss(self, now: Forward, rollout: Rollout) -> Terms:
        """No second stream."""
        return {}

    def wants_entropy(self) -> bool:
        """No."""
        return False

    def replayed(self) -> int:
        """Only the newest."""
        return 1

    def critic_only(self) -> int:
        """None."""
        return 0
