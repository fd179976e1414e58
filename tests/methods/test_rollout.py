"""A rollout's way into micro-batches, and what packed passes say back to each completion."""

import jax
import numpy as np
import pytest

from jaxalign.methods.offline import Layout
from jaxalign.methods.rollout import pack_prompts, prompts_by_place, run_passes
from jaxalign.sharding import MeshConfig, make_mesh
from jaxalign.types import Experience

PROMPTS, SIZE, WIDTH, STEPS, LENGTH = 11, 2, 40, 8, 64


def rollout() -> Experience:
    """The long prompts first, all in one micro-batch if they kept their order."""
    rng = np.random.default_rng(3)
    sizes = np.array([40, 38, 37, 36, 6, 5, 5, 4, 3, 2, 1])
    lengths = rng.integers(1, STEPS + 1, PROMPTS * SIZE)
    mask = np.arange(STEPS) < lengths[:, None]
    return Experience(
        prompts=rng.integers(1, 99, (PROMPTS, WIDTH)) * (np.arange(WIDTH) < sizes[:, None]),
        prompt_lengths=sizes,
        examples=np.arange(PROMPTS),
        tokens=rng.integers(100, 10_000, (PROMPTS * SIZE, STEPS)) * mask,
        lengths=lengths,
        finish=np.ones(PROMPTS * SIZE, np.int32),
        scores=np.zeros((PROMPTS * SIZE, 1)),
        fields={},
    )


@pytest.mark.parametrize("share_prompt", [True, False])
def test_micro_batches_get_about_as_many_tokens(share_prompt):
    """Each takes as many rows as the one that needs most: 2 rows of 64 where four long prompts together need 4."""
    experience, layout = rollout(), Layout(12, 4, LENGTH)
    members = np.arange(PROMPTS)
    order = prompts_by_place(experience, members, layout, share_prompt=share_prompt)
    assert sorted(order) == [-1, *members]
    held = experience.lengths.reshape(PROMPTS, SIZE).sum(1) + experience.prompt_lengths * (1 if share_prompt else SIZE)
    loads = np.where(order >= 0, held[order], 0).reshape(3, 4).sum(1)
    assert loads.max() <= 1.2 * loads.mean() and held[:4].sum() > 1.7 * loads.max()
    batch = pack_prompts(experience, members, layout, share_prompt=share_prompt)
    assert batch.rows.tokens.shape == (3, 2 if share_prompt else 4, LENGTH)
    # Nothing is lost, nothing comes twice.
    expected = sorted(token for row in experience.prompts for token in row[row > 0])
    assert sorted(batch.rows.tokens[(batch.rows.tokens > 0) & (batch.rows.tokens < 100)]) == sorted(
        expected * (1 if share_prompt else SIZE)
    )


@pytest.mark.parametrize("share_prompt", [True, False])
def test_what_a_pass_says_of_a_token_comes_back_to_it(share_prompt):
    """A pass that says which token is asked for gives the rollout's own tokens, also of a part of its prompts."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    passes = {"asked": lambda params, batch: np.asarray(batch.predictions.targets, np.float32)}
    experience, layout = rollout(), Layout(8, 3, 2 * LENGTH)
    found = run_passes(experience, passes, None, layout, mesh, share_prompt=share_prompt)
    np.testing.assert_array_equal(found.fields["asked"], experience.tokens)
