"""torch, loaded when it is first used.

Planning asks an algorithm what it needs and none of its mathematics; torch takes longer to load than all
else that a plan is made of. A module of algorithms may as well import it the usual way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()
