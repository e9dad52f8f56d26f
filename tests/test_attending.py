"""Which conditions attention looks at, on a model that is told where to look."""

import numpy as np
import pytest
import torch

from csc_model.contrast import ContrastConfig
from csc_model.model import CSC
from csc_model.objective import Objective
from jobs.attending import Attended, attended, attention_plot
from jobs.config import load_config
from pipeline.loader import Batch
from tests.small_models import new_model
from tests.test_losses import NUM_SPEAKERS, SMALL, episodes
from tests.test_objective import in_double

EPISODES, CONDITIONS, SAMPLES = 6, 3, 4000


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    shape = (EPISODES, CONDITIONS, 3)
    gains_db = torch.zeros(shape)
    gains_db[:, :, 1] = torch.tensor([-20.0, 0.0, 20.0])  # the first condition is the cleanest
    gains_db[:, :, 2] = -torch.inf
    speakers = torch.tensor([0, 1]).expand(EPISODES, CONDITIONS, 2).clone()
    speakers[-1, 0, 0] = -1  # an episode whose target is not always there
    count = EPISODES * CONDITIONS * 3
    return Batch(
        torch.randint(-3000, 3000, (count, SAMPLES), dtype=torch.int16, generator=draw),
        torch.arange(count).view(shape),
        gains_db,
        torch.full(shape, -1),
        speakers,
        torch.zeros(EPISODES, dtype=torch.int64),
        torch.zeros(EPISODES, dtype=torch.bool),
        torch.arange(EPISODES),
    )


def test_weights_stand_beside_how_clean_conditions_are() -> None:
    found = attended(new_model("tcn-conv"), [batch(), batch()], None)
    assert len(found.weight) == 2 * (EPISODES - 1) * CONDITIONS**2
    assert found.itself.sum() == 2 * (EPISODES - 1) * CONDITIONS
    by_query = found.weight.reshape(-1, CONDITIONS)
    assert by_query.sum(1) == pytest.approx(np.full(len(by_query), CONDITIONS), rel=1e-5)
    expected = np.tile([20.0, 0.0, -20.0], len(by_query))
    assert found.cleaner_db == pytest.approx(expected, abs=1.0)
    assert attention_plot(found).startswith(b"\x89PNG")


def test_whoever_looks_at_the_cleaner_is_seen_to() -> None:
    cleaner_db = np.linspace(-10, 10, 40)
    itself = np.zeros(40, bool)
    assert Attended(cleaner_db, cleaner_db**3, itself).rank_correlation == pytest.approx(1)
    assert Attended(cleaner_db, -cleaner_db, itself).rank_correlation == pytest.approx(-1)
    assert np.isnan(Attended(cleaner_db, cleaner_db, ~itself).rank_correlation)


@pytest.mark.parametrize("attend", [True, False])
@pytest.mark.parametrize("conditions", [1, 2, 3])
@pytest.mark.parametrize("name", ["table", "batch", "in_mix"])
def test_attention_is_learned_where_its_queries_have_a_gradient(
    name: str, conditions: int, attend: bool
) -> None:
    torch.manual_seed(0)
    contrast = ContrastConfig(set=name)  # type: ignore[arg-type]
    module = Objective(CSC(SMALL["tcn"]), NUM_SPEAKERS, contrast=contrast, attend=attend).double()
    given = in_double(episodes(0, conditions=conditions))
    module(given._replace(allowed=torch.ones_like(given.allowed))).total.backward()
    gradient = module.model.attention.query.weight.grad
    learned = gradient is not None and gradient.abs().max().item() > 1e-12
    settings = (
        f"train.contrast.set='{name}'",
        f"build.mixing.conditions={conditions}",
        f"train.attend={str(attend).lower()}",
    )
    assert load_config("demo", settings).learns_attention == learned
