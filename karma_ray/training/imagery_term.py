"""The image loss L_img of a joint step (equation 8): its global means, its gap and its cost.

Legend: B windows, M decoded positions, R = B M rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.model.imagery import ImageTargets
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import rank_of
from karma_ray.training.flops import BodyCost, Learns, projector_cost


def num_images(batch: Batch) -> Tensor:
    """Count this worker's decoded positions whose item has an image; the others have no loss."""
    return (batch.visual_mask & batch.decode_mask).sum()


def image_means(
    model: KarmaModel, batch: Batch, interest: Tensor, first: Tensor | None, count: Tensor
) -> dict[str, Tensor]:
    """Return this part's shares of the global means over `count` images, by log name.

    `first` [R] has Task 1's losses if Task 1 has image queries; interest [R, D] is h at the
    decoded positions, for Task 2. `loss/image` averages the tasks in use, so that its scale does
    not depend on `img_cond`.
    """
    assert model.imagery is not None
    found = {} if first is None else {"image/task1": first.sum() / count}
    if model.imagery.in_task2:
        found["image/task2"] = model.interest_image_losses(batch, interest).sum() / count
    return {"loss/image": torch.stack(list(found.values())).mean(), **found}


def image_gap(
    model: KarmaModel, batch: Batch, interest: Tensor, shuffled: Tensor
) -> dict[str, float]:
    """Return L_img(shuffled h) - L_img(h) through Task 2: 0 when the head ignores h.

    Empty if Task 2 has no image queries or the batch no image; interest and shuffled are [R, D].
    """
    images = ImageTargets.of(batch)
    if model.imagery is None or not model.imagery.in_task2 or not images.mask.any():
        return {}
    own, other = (
        model.image_losses(rows, images)[images.mask].mean() for rows in (interest, shuffled)
    )
    return {"image_gap": float(other - own)}


def image_flops(model: KarmaModel, batch: Batch) -> float:
    """Return the useful operations of the visual term on this worker, both passes (flops.py).

    A branch is assumed to attend to one query and one item per earlier step.
    """
    if model.imagery is None:
        return 0.0
    imagery, user, batch = model.imagery, model.interest.user_decoder, batch.on_host()
    has_image = batch.visual_mask & batch.decode_mask
    counts = torch.stack([has_image.sum(), (has_image * (2 * batch.decode_step + 1)).sum()])
    images, seen = (int(value) for value in counts.tolist())
    slots, total = imagery.shape.num_tokens + 2, 0.0
    if imagery.in_task1:
        pairs = slots * (seen + images * (len(user.prompt) + slots))
        learns: Learns = "all" if rank_of(user.body) is None else "adapters"
        total += BodyCost.of(user.body).step(images * slots, pairs, learns)
    if imagery.in_task2:
        body = model.decodability.decoder(user.body)
        learns = "all" if rank_of(body) is None else "adapters"
        if model.decodability.config.recon_decoder == "frozen" and body is not user.body:
            learns = "nothing"
        pairs = images * (slots * (slots + 1) + 1)
        total += BodyCost.of(body).step(images * (slots + 1), pairs, learns)
        total += projector_cost(model) * images
    connector, head = (
        sum(value.numel() for value in part.parameters() if value.dim() == 2)
        for part in (imagery.connector, imagery.head)
    )
    tokens = imagery.shape.num_tokens * images * (imagery.in_task1 + imagery.in_task2)
    return total + 6.0 * tokens * (connector + imagery.num_draws * head)
