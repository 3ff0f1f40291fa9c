"""Exact evaluation: every image once, on any number of ranks (contract 8)."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.data.source import ImageSource, Pass
from largebatch.distributed.environment import Ranks
from largebatch.distributed.kernels import deterministic
from largebatch.errors import DataError
from largebatch.recipe.batch import block
from largebatch.recipe.order import evaluation_batches
from largebatch.training.precision import Autocast


def evaluate(
    model: nn.Module,
    source: ImageSource,
    ranks: Ranks,
    *,
    images_per_batch: int,
    autocast: Autocast = nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
    confusion: Tensor | None = None,
) -> dict[str, float]:
    """``val/loss``, ``val/top1_error`` and ``val/top5_error`` (percent) over all images of `source`.

    The batches do not depend on N, and each rank writes the sums of its own batches into a row of its own, so
    the sum over ranks adds zeros to them and is the same to the last bit on any N. ``val/images`` is their
    number; ``val/skipped_images``, if any, that of images which could not be read and are left out. The error among
    the best five is left out for sets of five classes or fewer. `confusion`, int64 [classes, classes] on the device,
    gets the number of images by true and by predicted class added. Of images with several labels, the
    loss is binary cross-entropy, an error one whose best class (or best five) is none of them, and `confusion` has it
    in the row of each.
    """
    batches = evaluation_batches(source.images, images_per_batch)
    mine = block(len(batches), ranks.world_size, ranks.rank)
    rows = torch.zeros(len(batches), 4, dtype=torch.float64, device=ranks.device)
    passes = [Pass(0, np.arange(batches[b].start, batches[b].stop)) for b in mine]
    training = [module for module in model.modules() if module.training]
    model.eval()
    ranks.whereabouts.enter("evaluation")
    with torch.no_grad(), deterministic(ranks.device, wanted=True):
        for row, (images, labels) in zip(mine, source.stream(passes, augment=False), strict=True):
            if not len(images):  # all of them were left out
                continue
            with autocast():
                logits = model(images.contiguous(memory_format=memory_format))
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            rows[row] = _sums(logits.float() if logits.dtype != torch.float64 else logits, best, labels)
            if confusion is not None:
                position = torch.arange(len(labels), device=labels.device)
                position, true = (position, labels) if labels.ndim == 1 else labels.nonzero(as_tuple=True)
                confusion.index_put_((true, best[position, 0]), confusion.new_ones(()), accumulate=True)
            ranks.whereabouts.enter("evaluation")  # the same phase again is progress
    for module in training:  # not model.train(): a part that its owner keeps in eval mode stays so
        module.training = True
    if confusion is not None:
        confusion.copy_(ranks.sum(confusion))
    loss, top1, top5, count = ranks.sum(rows).sum(dim=0).tolist()
    skipped = source.images - count
    assert skipped == 0 or source.leaves_out, f"evaluated {count} of {source.images} images"
    if not count:
        raise DataError("no validation image can be read; the warnings above name them")
    result = {"val/loss": loss / count, "val/top1_error": 100 * (count - top1) / count, "val/images": count}
    if source.classes > 5:
        result["val/top5_error"] = 100 * (count - top5) / count
    if skipped:
        result["val/skipped_images"] = skipped
    return result


def _sums(logits: Tensor, best: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, images right at first, images right among the first five, images; float64 [4]."""
    if labels.ndim == 1:
        right = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    else:
        right = labels.gather(1, best) > 0
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1).double().sum()
    counts = [right[:, 0].sum().double(), right.any(1).sum().double(), loss.new_tensor(float(len(labels)))]
    return torch.stack([loss, *counts])
