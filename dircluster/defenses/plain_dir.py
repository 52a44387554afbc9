"""Algorithm 1 as one writes it for an experiment: what `dircluster benchmark --compare` times the step of DIR against.

The maths and the draws are those of :class:`~dircluster.defenses.dir.DirRecipe` with the paper's crafting; the habits
are others. Each mask is a pass of its own, samples are crafted by a whole backward pass, which computes the gradients
of the weights too, and nothing that is at hand is used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster.config import require
from dircluster.defenses.dir import DirRecipe, MaskedPurifier
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Modules
from dircluster.presets.dir import DirRun, with_fast_crafting, with_paper_crafting


def compared(run: DirRun) -> dict[str, tuple[DirRun, Callable[[Modules], Recipe] | None]]:
    """What a step is timed in turns by name: a run, and the recipe where it is not that of the run's last stage.

    The paper's step written plainly, the same by DIR's recipe, and the one with fast crafting.
    """
    knobs = run.dir
    require(
        run.attack.norm == "linf" and not knobs.joint and knobs.crafting_masks == "shared" and not knobs.mse_weight,
        "--compare is of Algorithm 1: attack.norm linf, dir.crafting_masks shared, dir.mse_weight 0, no dir.joint",
    )
    paper = with_paper_crafting(run)

    def plain(modules: Modules) -> PlainDirRecipe:
        denoiser = modules["denoiser"]
        assert isinstance(denoiser, MaskedPurifier)
        return PlainDirRecipe(denoiser, modules["classifier"], paper.dir, paper.attack)

    eager = replace(paper, training=replace(paper.training, compile="off", capture="off"))
    return {"plain": (eager, plain), "paper": (paper, None), "fast": (with_fast_crafting(run), None)}


class PlainDirRecipe(DirRecipe):
    """DIR's step, written plainly; for a maximum norm, shared masks and a frozen target."""

    @property
    def capturable(self) -> bool:
        return False  # it drops gradients that a recording would go on writing to

    def purify(self, images: Tensor, permutations: Tensor) -> Tensor:
        """x~ of Eq. 5: (N, C, H, W), (N, T) -> (N, C, H, W)."""
        masks = self.denoiser.masks(permutations)
        return torch.stack([self.denoiser.restore_each(images, masks[i : i + 1])[0] for i in range(len(masks))]).mean(0)

    def attack(self, batch: Batch) -> Batch:
        """PGD on h(g(.)) (line 5)."""
        epsilon, step, images = self.threat.epsilon, self.threat.step, batch.images
        weights = list(self.parameters())
        so_far = [weight.grad for weight in weights]  # of the micro-batches before this one
        self.zero_grad()
        adversarial = (images + epsilon * (2 * batch.draws["pgd"] - 1)).clamp(0, 1)
        for _ in range(self.threat.steps):
            adversarial = adversarial.detach().requires_grad_()
            logits = self.classifier(self.purify(adversarial, batch.draws["masks"]))
            torch.autograd.backward(F.cross_entropy(logits.float(), batch.labels, reduction="sum"))
            assert adversarial.grad is not None
            moved = adversarial.detach() + step * adversarial.grad.sign()
            adversarial = torch.min(torch.max(moved, images - epsilon), images + epsilon).clamp(0, 1)
        for weight, gradient in zip(weights, so_far, strict=True):
            weight.grad = gradient
        return replace(batch, adversarial=adversarial)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """Eq. 5 to 7, the perturbation of Eq. 4 among them (lines 7 to 10)."""
        epsilon, steps, normal = self.threat.epsilon, self.config.perturb_steps, batch.draws["perturbation"]
        step = self.threat.step_for(steps) if self.config.perturb_step_size is None else self.config.perturb_step_size
        with torch.no_grad():
            restored = self.purify(batch.attacked, batch.draws["masks"])
            reference = self.classifier(restored).float().softmax(dim=1)
        delta = 1e-3 * normal
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            found = self.classifier(restored + delta).float().log_softmax(dim=1)
            torch.autograd.backward(F.kl_div(found, reference, reduction="sum"))
            assert delta.grad is not None
            delta = (delta.detach() + step * delta.grad.sign()).clamp(-epsilon, epsilon)
        restored = self.purify(batch.attacked, batch.draws["masks"])
        logits = self.classifier(restored)
        adversarial = F.cross_entropy(logits.float(), batch.labels)
        other = self.classifier(restored + delta).float().log_softmax(dim=1)
        representation = F.kl_div(other, logits.float().log_softmax(dim=1), log_target=True, reduction="batchmean")
        loss = adversarial + self.config.alpha * representation
        return {"loss": loss, "adversarial": adversarial, "representation": representation}
