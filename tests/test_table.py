"""The loss on the speaker table is a classifier's, and bounds what vectors tell of speakers."""

import pytest
import torch
import torch.nn.functional as F

from csc_model.contrast import ContrastConfig
from csc_model.losses import si_snr_db
from csc_model.model import CSC
from csc_model.objective import Episodes, Objective
from tests.test_losses import NUM_SPEAKERS, SMALL, episodes
from tests.test_objective import in_double, objective, with_absences


def one_by_one(given: Episodes) -> list[Episodes]:
    count = range(len(given.anchors))
    return [Episodes(*(x[n : n + 1] for x in given if x is not None)) for n in count]


def test_the_information_does_not_hang_on_the_size_of_the_batch() -> None:
    module, given = objective("table").double(), in_double(episodes(0, batch=4))
    module.occurrences.fill_(1e9)  # as after many steps
    whole = module(given).mi_lower_bound_nats.item()
    parts = [module(part).mi_lower_bound_nats.item() for part in one_by_one(given)]
    assert sum(parts) / 4 == pytest.approx(whole, rel=1e-6)


def test_speakers_are_counted_as_they_occur() -> None:
    module, given = objective("table"), with_absences(episodes(0))
    for _ in range(2):
        module(given)
    heard = given.speakers[given.speakers >= 0]
    assert torch.equal(module.occurrences, 2 * heard.bincount(minlength=NUM_SPEAKERS).float())


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_on_the_table_the_loss_is_the_cross_entropy_of_a_classifier(kernel: str) -> None:
    config = ContrastConfig(kernel=kernel, scale=7.0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    module = Objective(CSC(SMALL["tcn"]), NUM_SPEAKERS, contrast=config).double()
    given = in_double(episodes(2))
    given = given._replace(allowed=torch.eye(2, dtype=torch.bool).expand(3, 2, 2))
    losses = module(given)
    references, speakers = given.references.flatten(0, 1), given.speakers.flatten(0, 1)
    output = module.model(given.mixtures.flatten(0, 1))
    vectors = F.normalize(module.model.attention(output.embeddings.flatten(0, 1)[:, None]), dim=-1)
    vectors = vectors.view_as(output.embeddings)  # slots, then the mixture as it is
    table = F.normalize(module.table, dim=-1)
    items, targets = [], []
    for mixture, (estimates, voices) in enumerate(zip(output.sources, references, strict=True)):
        straight, crossed = (si_snr_db(estimates, voices[list(o)]).sum() for o in ((0, 1), (1, 0)))
        order = [0, 1] if straight > crossed else [1, 0]
        said = F.one_hot(speakers[mixture][order], NUM_SPEAKERS).double()
        energy = voices[order].square().mean(-1)
        items += [*vectors[mixture]]
        targets += [*said, (energy / energy.sum()) @ said]
    rows = torch.stack(items)
    logits = 7 * rows @ table.T if kernel == "cosine" else -7 * torch.cdist(rows, table).square()
    expected = F.cross_entropy(logits, torch.stack(targets))
    torch.testing.assert_close(losses.contrastive_nats, expected)
    of_slots = logits.unflatten(0, (-1, 3))[:, :2].flatten(0, 1)
    right = torch.stack(targets).unflatten(0, (-1, 3))[:, :2].argmax(-1).flatten()
    share = right.bincount(minlength=NUM_SPEAKERS) / len(right)
    bound = torch.special.entr(share).sum() - F.cross_entropy(of_slots, right)
    torch.testing.assert_close(losses.mi_lower_bound_nats, bound, rtol=1e-6, atol=1e-6)
