"""What PPO trains: a policy and a critic, of its own or a head on the policy's blocks.

The trainable parameters are `{"policy": ..., "value": ...}`, each as `common.split_variables` gives them; a critic that
shares the policy's blocks is a head among the policy's parameters, and there is no `value`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from jaxalign.methods import balance, common
from jaxalign.methods.ppo_config import Config
from jaxalign.models import Model, add_score_head
from jaxalign.types import Array, Batch, PyTree, Variables

CRITIC_LOADS = "critic_loads"


@dataclass(frozen=True)
class Models:
    """The policy, and the model with a score head that is its critic: the same one where they share their blocks."""

    policy: Model
    value: Model


def add_critic(
    config: Config, model: Model, variables: Variables, key: jax.Array, start: tuple[Model, Variables] | None = None
) -> tuple[Models, dict[str, Variables]]:
    """The models that are trained, and their variables by role.

    Args:
      config: the method's.
      model: the policy.
      variables: its variables; the result shares their arrays (`init` copies).
      key: of a new head's draw, whose standard deviation is 0: the first values are 0.
      start: what the critic begins as, the policy by default: a reward model, which keeps its head, or a language
        model, which gets a new one. `separate` critics only.

    Raises:
      ValueError: `start` with a shared critic.
    """
    if config.critic == "shared":
        if start is not None:
            raise ValueError(
                "a shared critic is a head on the policy's blocks: set critic to separate, or give no start"
            )
        both, joined = add_score_head(model, variables, key, std=0.0, keep_lm_head=True)
        return Models(both, both), {"policy": joined}
    critic, begun = start or (model, variables)
    if not critic.config.score_head:
        critic, begun = add_score_head(critic, begun, key, std=0.0)
    if critic.config.vocab_size != model.config.vocab_size:
        sizes = f"{critic.config.vocab_size} and {model.config.vocab_size}"
        raise ValueError(f"critic and policy read different tokens: their vocabularies have {sizes} entries")
    return Models(model, critic), {"policy": variables, "value": begun}


def policy_of(params: PyTree, frozen: PyTree) -> Variables:
    """The policy's variables; with a shared critic the score head is among them (see `models.drop_score_head`)."""
    return common.join_variables(params["policy"], frozen["policy"])


def value_of(params: PyTree, frozen: PyTree) -> Variables:
    """The critic's variables."""
    role = "value" if "value" in params else "policy"
    return common.join_variables(params[role], frozen[role])


class Router(NamedTuple):
    """A load-balancing loss: its weight, of which model, the field of the batch's loads, and the metric's name."""

    weight: float
    model: Model
    variables: Callable[[PyTree, PyTree], Variables]
    loads: str
    name: str


def routers_of(config: Config, models: Models) -> list[Router]:
    """Those of the policy and of a critic of its own, as far as they have experts."""
    known = [Router(0.0, models.policy, policy_of, balance.LOADS, "aux_loss")]
    if config.critic == "separate":
        known.append(Router(0.0, models.value, value_of, CRITIC_LOADS, "critic/aux_loss"))
    sparse = [each for each in known if any(each.model.config.sparse_layers)] or known[:1]
    given = config.router_aux_loss_coef
    found = [each._replace(weight=balance.coefficient(given, each.model)) for each in sparse]
    return [each for each in found if each.weight]


def loads_counter(config: Config, router: Router) -> balance.Count:
    """What says how many tokens of a micro-batch go to each of its experts, under the dropout of the loss."""

    def count(params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array | None) -> Array:
        key = None if config.disable_dropout else key
        own = critic_key(key) if router.loads == CRITIC_LOADS else key
        return balance.read_loads(router.model, router.variables(params, frozen), batch, own)

    return count


def critic_key(key: jax.Array | None) -> jax.Array | None:
    """The key of the critic's own dropout."""
    return None if key is None else jax.random.fold_in(key, 1)
