"""How many draft steps a captured round has: about as many as the drafts of late came to."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from .methods.base import Method
from .recipe import Recipe

# Rounds after which the number of steps is thought over, and the windows of them that growing waits for at most.
WINDOW, LONGEST_WAIT = 32, 32
# Recipes of a method that are remembered: every skip set that a search settles on has its own.
KEPT = 64


def lengths(recipe: Recipe) -> list[int]:
    """The numbers of draft steps a recipe is served with, ascending: powers of two, and last its own.

    It is only its own where drafts do not end early, or where no passes are run for them; and for rejection sampling,
    whose draws follow from how many were drafted: the text of a seed must not depend on what was decoded before it.
    """
    most = recipe.num_draft_tokens
    early = (recipe.confident or recipe.limited) and not (recipe.rejection or recipe.ngrams or recipe.steps)
    return [*(1 << power for power in range((most - 1).bit_length())), most] if early and most > 1 else [most]


def cuts(recipe: Recipe) -> list[Recipe]:
    """The recipe with every number of draft steps it is served with."""
    return [replace(recipe, num_draft_tokens=steps) for steps in lengths(recipe)]


@dataclass
class Depth:
    """The draft steps of one recipe, one of `choices`, and what its drafts came to.

    They shrink to the fewest that less than a quarter of a window's rounds drafted beyond. They grow to the next choice
    where all tokens were drafted and accepted in half of a window's rounds: only then is it seen that there might be
    more. Where that was a mistake, the next attempt waits for twice as many windows, and any other change ends that.
    """

    choices: list[int]
    steps: int = 0
    # Of every round of this window, the greatest depth of a draft, and the most tokens that were accepted of one.
    drafted: list[int] = field(default_factory=list[int])
    accepted: list[int] = field(default_factory=list[int])
    # Windows since the last change, how many a growth waits for, and the steps before it if that was one.
    windows: int = 0
    wait: int = 1
    before: int = 0

    def __post_init__(self) -> None:
        self.steps = self.choices[-1]

    def count(self, drafted: int, accepted: int) -> None:
        """Take in a round of `steps` draft steps."""
        self.drafted.append(drafted)
        self.accepted.append(accepted)
        if len(self.drafted) < WINDOW:
            return
        self.windows += 1
        enough = next(n for n in self.choices if n == self.steps or 4 * sum(d > n for d in self.drafted) < WINDOW)
        full = 2 * sum(a >= self.steps for a in self.accepted) >= WINDOW
        if enough < self.steps:
            # What lasted no longer than it was waited for was not worth the change.
            failed = enough == self.before and self.windows <= self.wait
            self.wait = min(2 * self.wait, LONGEST_WAIT) if failed else 1
            self._change(enough, 0)
        elif full and self.steps < self.choices[-1] and self.windows >= self.wait:
            self._change(next(n for n in self.choices if n > self.steps), self.steps)
        self.drafted.clear()
        self.accepted.clear()

    def _change(self, steps: int, before: int) -> None:
        self.steps, self.before, self.windows = steps, before, 0


class Depths:
    """The draft steps of the recipes of every method; what each is served with follows from counts, never from a clock.

    A step costs its launches even if no draft is left in it. Texts do not depend on the number of steps. Where a method
    chooses the draft's length itself (`limited`) its choice is the most that is served, and learnt about on its own: it
    reckons with the steps it asks for, which are then all there are, and learns from recorded rounds of the host, which
    nothing shortens.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Method, OrderedDict[tuple[Recipe, int], Depth]] = WeakKeyDictionary()

    def serve(self, method: Method, recipe: Recipe) -> Recipe:
        """The recipe with as many draft steps as pay; it is the method's, before `choosing`."""
        depth = self._of(method, recipe)
        return recipe if depth is None else replace(recipe, num_draft_tokens=depth.steps)

    def count(self, method: Method, recipe: Recipe, steps: int, drafted: int, accepted: int) -> None:
        """A round served for that recipe with so many steps: the depth of its deepest draft, the most it accepted.

        What was under way before a change, or is served until a graph is built, says nothing of the number of now.
        """
        depth = self._of(method, recipe)
        if depth is not None and depth.steps == steps:
            depth.count(drafted, accepted)

    def _of(self, method: Method, recipe: Recipe) -> Depth | None:
        """What is known of a recipe, whose sampled and greedy requests share it; None if its steps are fixed."""
        choices = lengths(recipe)
        if len(choices) == 1:
            return None
        if recipe.limited:
            # A method may give up drafting while rounds are under way: none are left then.
            choices = [n for n, shorter in zip(choices, [0, *choices], strict=False) if shorter < method.limit]
        if not choices:
            return None
        known = self._known.setdefault(method, OrderedDict())
        key = recipe, len(choices)
        depth = known[key] = known.pop(key, None) or Depth(choices)
        if len(known) > KEPT:
            known.popitem(last=False)
        return depth
