"""How initial weights and learning rates depend on the width: not at all, or by the maximal update parametrization.

With `mup`, the change of every activation in a step does not depend on the width, and the best learning rate hardly does.
m is `dim / base_dim`. All other widths are to grow with `dim`: hidden units, and the number of heads of a fixed size. The
number of layers is to be fixed.

| role | initial std | AdamW's rate | Muon's rate |
|---|---|---|---|
| embedding, tied or not, and head | 1 | 1 | |
| norms | | 1 | |
| attention, feed-forward blocks, experts | m^-1/2 | m^-1 | m^-1/2; m^-1 head by head |
| router | m^-1/2 | m^-1 | |

Logits are divided by m. This is the form of Yang et al. 2022, table 8, in which one matrix can be embedding and head. An
expert has the rules of the dense block with equal active units (Complete-muE, Peng et al. 2026). A router has the rate of
an output matrix (table 3), but the initial scale of a hidden one: with that of an output matrix, 1/m, gates would be evener
in wider models at first. Muon's updates have a spectral norm of the rate times `update_scale`, which grows
with sqrt(m); it should be sqrt(rows / columns) of the matrix (Yang et al. 2023, condition 1), which does not depend on m,
or falls with m^-1/2 for a head with a fixed number of rows.
"""

from typing import Literal

from moelm.config import ModelConfig
from moelm.model.roles import HIDDEN_ROLES, Role


def init_factor(config: ModelConfig, role: Role) -> float:
    """The factor on the standard deviation of the initial weights of a role."""
    return float(config.width_ratio**-0.5) if role in (*HIDDEN_ROLES, "router") else 1.0


def lr_factor(config: ModelConfig, role: Role, optimizer: Literal["adamw", "muon"], by_head: bool = False) -> float:
    """The factor on the learning rate of a role.

    Args:
        optimizer: which updates it.
        by_head: whether Muon orthogonalizes the rows of each head by themselves.
    """
    if role not in (*HIDDEN_ROLES, "router"):
        return 1.0
    return float(config.width_ratio ** (-0.5 if optimizer == "muon" and not by_head else -1.0))
