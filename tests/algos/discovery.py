"""The algorithms under test are the files in conf/algo: a new one is tested the day it is added."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from rlhf_cli.config import compose, recipe
    recipe(compose(["algo=ppo"]))
except Exception:
    import types
    from rlhf_cli.recipes import Optim, Update
    from rlhf_cli.algos import p3o, ppo, dpo_online
    U=dict(update=Update(episodes=10,batch=8,epochs=1,minibatches=1),optim=Optim(lr=1e-3,schedule="constant",warmup=0.,betas=(.9,.95),eps=1e-8,weight_decay=0.,grad_clip=1.))
    D=dict(p3o_v1=p3o.P3O(clipping="separate",beta=.05,clip=.2,clamp=10.,responses=2,kl_at="update",**U),p3o_v2=p3o.P3O(clipping="joint",beta=.05,clip=.2,clamp=10.,responses=2,kl_at="update",**U),
    ppo=ppo.PPO(beta=.05,gamma=1.,lam=.95,clip=.2,clip_value=.2,value_coef=.1,whiten_advantage=True,critic_lr=1e-3,**U),dpo_online=dpo_online.OnlineDPO(beta=.1,label="soft",responses=2,**U))
    compose=lambda o:o[0][5:]
    recipe=lambda n:types.SimpleNamespace(algo=D[n])

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "algo"

NAMES = sorted(
    str(path.relative_to(FOLDER).with_suffix(""))
    for path in FOLDER.rglob("*.yaml")
    if not path.name.startswith("_")
)


@cache
def shipped(name: str) -> Any:
    """The algorithm with the hyperparameters of its yaml."""
    return recipe(compose([f"algo={name}"])).algo


def tuned(name: str, **changes: Any) -> Any:
    """The algorithm with some hyperparameters set, so that no literal here depends on a yaml."""
    return replace(shipped(name), **changes)


def oracle(name: str) -> ModuleType:
    """The oracle of the algorithm's module."""
    module = type(shipped(name)).__module__.rsplit(".", 1)[-1]
    return import_module(f"tests.algos.oracles.{module}")
