"""What goes wrong while a run trains, how it is seen, and what to do about it.

    spike, not-finite   the loss jumps, or loss or gradient is NaN or Inf: the run goes back to the last good point, leaves
                        the batch out and goes on; where it soon happens again, at half the learning rate for some time
    overfitting         the held-out loss rises: the run stops, and the best adapter is what is written
    dead-adapter        factors whose gradient is exactly zero in every step so far
    exploding-scale     an update that is larger than the weight it is added to
    forgetting          the loss on general text is much higher than before the run

Plain numbers in and out: the loop does what is decided here. The state is JSON, so a resumed run decides as one that was not
interrupted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from veneer.errors import VeneerError

# What is called a jump. In a simulation (losses that are level, fall or go down by epochs, with a spread from 3% to 80%, or with
# one in 20 three times as large) it was wrong 5 times in 100,000 steps at most, and saw 98% of the losses that were 20 times
# what they should be.
WINDOW = 20  # losses that a new one is compared with
ENOUGH = 8  # of them, before anything is called a jump
FAR = 5.0  # times the spread of the losses' logarithms
LEAST_SPREAD = 0.1
ABOVE = 4.0  # times the largest of them
LEAST_JUMP = 0.5  # nats: near zero a loss may be many times the one before and mean nothing
LOST, KNEW = 0.9, 0.6  # of the loss of guessing: a jump above the one, where the median was below the other
AGAIN, CALM = (
    20,
    100,
)  # steps: a second jump so soon after one halves the learning rate; so many without one double it again
TRIES = 5  # jumps at one place before a run gives up
WATCHED = 20  # steps in which each factor has to get a gradient once
LARGE = 1.0  # update over weight
OVERFIT = 1.05  # held-out loss over the best
FORGOT = 1.2  # loss on general text over that before the run

ADVICE = {
    "spike": "look at the rows of that step; if it happens often, lower train.learning_rate or train.max_grad_norm",
    "not-finite": "look at the rows of that step; if it happens often, lower train.learning_rate, or use dtype bfloat16",
    "overfitting": "train fewer epochs, use more rows, a lower rank or some lora.dropout",
    "dead-adapter": "leave these layers out of lora.targets: they take no part on such data, or what follows them is zero",
    "exploding-scale": "lower train.learning_rate, or lora.alpha over lora.r; the adapter outweighs the model it was put on",
    "forgetting": "train fewer epochs, lower train.learning_rate or the rank, or mix general rows into the data",
}


def finding(code: str, step: int, what: str) -> dict[str, Any]:
    return {"code": code, "step": step, "what": what, "advice": ADVICE[code]}


class Guard:
    """Whether a step's loss and gradient are as they should be, which batches are left out, and at what share of its
    learning rate a run goes on.

    Args:
        steps: of the run. A step whose batch is left out takes one that the run would not come to: all others stay as they are.
        on: whether jumps are looked for; what is not finite never passes.
        guessing: the loss of a model that knows nothing, ln of the vocabulary.
    """

    def __init__(self, steps: int, on: bool = True, guessing: float = math.inf) -> None:
        self.on, self.guessing = on, guessing
        self.spare = steps  # the next step's worth of the data, as `Order` counts them, that no step takes
        self.losses: list[float] = []
        self.instead: list[list[int]] = []  # a step, and which it takes in place of its own
        self.scale = 1.0
        self.slowed = 0  # the step at which it last changed
        self.events: list[dict[str, Any]] = []  # each time the run went back
        self.furthest = self.tries = 0  # the step that was not passed yet, and how often it was tried

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: value for key, value in vars(self).items() if key not in _GIVEN} | {"losses": [*self.losses]}

    def load(self, state: dict[str, Any]) -> None:
        spare = self.spare  # the run may be longer now
        vars(self).update({key: value for key, value in state.items() if key in vars(self) and key not in _GIVEN})
        self.spare = max(spare, self.spare)

    def data_step(self, step: int) -> int:
        """Which step's worth of the data step `step` takes."""
        return next((other for left_out, other in self.instead if left_out == step), step)

    def judge(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step before it is applied: "not-finite", "spike" or None.

        A jump is a loss whose logarithm is FAR times further above the median of the last WINDOW than these lie apart, and
        LEAST_JUMP above it: and either ABOVE times the largest of them, which rows of different kinds alone hardly ever are, or
        as high as guessing, where the model knew better.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not-finite"
        if not self.on or len(self.losses) < ENOUGH or loss <= 0:
            return None
        logs = [math.log(max(x, 1e-12)) for x in self.losses]
        middle = statistics.median(logs)
        spread = max(LEAST_SPREAD, 1.4826 * statistics.median(abs(x - middle) for x in logs))
        usual = statistics.median(self.losses)
        far = math.log(loss) - middle > FAR * spread and loss > usual + LEAST_JUMP
        lost = loss > LOST * self.guessing and usual < KNEW * self.guessing
        return "spike" if far and (loss > ABOVE * max(self.losses) or lost) else None

    def passed(self, step: int, loss: float) -> None:
        """A step that was applied."""
        self.losses = [*self.losses, loss][-WINDOW:]
        if step >= self.furthest:
            self.tries = 0
        if self.scale < 1 and step - self.slowed >= CALM:
            self.scale, self.slowed = min(1.0, 2 * self.scale), step

    def back(self, kind: str, step: int, good: int, loss: float, norm: float) -> dict[str, Any]:
        """Step `step` was not good and the run goes back to `good`: leave out its batch, learn slower if this is not the
        first time of late; returns what is to be said.

        Raises:
            VeneerError: it has been tried TRIES times.
        """
        self.tries = self.tries + 1 if step <= self.furthest or not self.events else 1
        self.furthest = max(self.furthest, step)
        if self.tries > TRIES:
            raise VeneerError(
                f"step {step + 1}: the loss or its gradient was not good in {TRIES} tries, each with another batch: found "
                f"loss {loss:g}, gradient {norm:g}",
                hint=f"lower train.learning_rate (it was halved {-int(math.log2(self.scale))} times here), or look at the data",
            )
        again = self.on and bool(self.events) and step + 1 - self.events[-1]["step"] < AGAIN
        self.instead = [*(pair for pair in self.instead if pair[0] != step), [step, self.spare]]
        self.spare += 1
        if again:
            self.scale /= 2
        self.slowed = step
        what = f"loss {loss:.4g}" if kind == "spike" else f"loss {loss:g}, gradient {norm:g}"
        slower = f", at {self.scale:g} of the learning rate" if self.scale != 1 else ""
        where = f"went back to step {good}" if good < step else "it was not applied"
        found = finding(kind, step + 1, f"{what}: {where}, left its batch out{slower}") | {"back_to": good}
        self.events.append(found)
        return found


_GIVEN = ("on", "guessing")  # by the run, not by its past


class Gradients:
    """Which factors have had a gradient that is not zero everywhere: B is zero at the start, so A has none in step 1."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.silent = {name for name in parameters if "lora_A" in name or "lora_B" in name}

    def see(self, parameters: dict[str, Any]) -> None:
        heard = [name for name in self.silent if (g := parameters[name].grad) is not None and bool(g.any())]
        self.silent.difference_update(heard)

    def found(self, step: int) -> dict[str, Any] | None:
        if not self.silent:
            return None
        names = sorted(self.silent)
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        return finding("dead-adapter", step, f"no gradient so far: {', '.join(names[:3])}{more}")


def overfitting(losses: list[float], step: int) -> dict[str, Any] | None:
    """Of the held-out losses so far: whether the last two rose, to more than OVERFIT times the best."""
    best = min((loss for loss in losses if math.isfinite(loss)), default=math.inf)
    if len(losses) < 3 or not losses[-3] < losses[-2] < losses[-1] or losses[-1] <= OVERFIT * best:
        return None
    return finding("overfitting", step, f"held-out loss {best:.4f}, then {losses[-2]:.4f} and {losses[-1]:.4f}")


def exploding(shares: Iterable[tuple[str, float]], step: int) -> dict[str, Any] | None:
    """Of layers and the length of their update over that of their weight."""
    large = sorted(((share, name) for name, share in shares if share > LARGE), reverse=True)
    if not large:
        return None
    share, name = large[0]
    return finding(
        "exploding-scale", step, f"the update of {name} is {share:.1f} times its weight, {len(large)} are above 1"
    )


def forgetting(before: float, after: float, step: int) -> dict[str, Any] | None:
    """Of the losses on general text before and after a run."""
    if after <= FORGOT * before:  # NaN is not
        return None
    return finding("forgetting", step, f"loss on general text {before:.3f} before, {after:.3f} after")


def update_share(left: Tensor, right: Tensor, scaling: float, weight_norm: float) -> float:
    """|scaling B A| / |W| (Frobenius) of B (out, r), A (r, in): from r x r products, no dense update."""
    squared = ((left.T @ left) * (right @ right.T)).sum().clamp_(min=0)
    return scaling * float(squared.sqrt()) / max(weight_norm, torch.finfo(torch.float32).tiny)


# Plain text of several kinds, on which forgetting is measured.
GENERAL_TEXT = (
    "The river rose in the night and by morning the lower fields were under water. Farmers moved their cattle to the hill, "
    "and the school stayed closed for two days while the road was cleared of branches and mud.",
    "Plants take in carbon dioxide through small openings in their leaves. With the energy of light they turn it, together "
    "with water from the roots, into sugar, and give off oxygen. At night, without light, they breathe as animals do.",
    "To make the bread, mix the flour with salt and yeast, add warm water and knead the dough for ten minutes. Let it rest "
    "until it is twice as large, shape it, let it rise again, and bake it in a hot oven for half an hour.",
    "In 1869 two railway lines met in the west, and the journey across the continent, which had taken months, took a week. "
    "Towns grew where the trains stopped for water, and others, which they passed by, were soon empty.",
    "A triangle with sides of 3, 4 and 5 has a right angle, because 9 plus 16 is 25. If the sides are doubled the area is "
    "four times as large, while the angles stay the same.",
    "def largest(numbers):\n    best = numbers[0]\n    for number in numbers[1:]:\n        if number > best:\n"
    "            best = number\n    return best\n",
    "Dear Ms. Keller, thank you for your letter of the third of May. We are sorry that the parcel did not arrive in time. A "
    "new one was sent to you today, and you will not be charged for it. Kind regards, the customer service team.",
    "Question: What is the capital of France, and which river runs through it?\nAnswer: Paris, and the Seine.",
)
