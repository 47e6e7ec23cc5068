"""Evolution of a list of timesteps and of the blocks that each of them leaves out, under a budget of blocks run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A way to run the model.

    Attributes:
        entries: which steps of a fine run, rising, the first one always among them.
        left_out: for each of them, the numbers of the blocks that are left out, rising.
    """

    entries: tuple[int, ...]
    left_out: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Space:
    """What candidates are made of.

    Attributes:
        entries: steps of the fine run.
        blocks: of the model.
        steps: the budget: as many blocks may run as in so many whole steps.
        most: blocks that one step may leave out.
    """

    entries: int
    blocks: int
    steps: int
    most: int = 0

    def even(self) -> Candidate:
        """Whole steps, evenly spread.

        Example:
            >>> Space(entries=50, blocks=4, steps=5).even().entries
            (0, 10, 20, 30, 40)
        """
        entries = tuple(round(n * self.entries / self.steps) for n in range(self.steps))
        return Candidate(entries, ((),) * self.steps)

    def fresh(self, dice: random.Random) -> Candidate:
        """Anything within the budget.

        Example:
            >>> found = Space(entries=50, blocks=4, steps=5, most=2).fresh(random.Random(0))
            >>> 5 <= len(found.entries) <= 10, found.entries[0]
            (True, 0)
        """
        return self.fitted({0: self._some(dice)}, dice)

    def mutated(self, parent: Candidate, probability: float, dice: random.Random) -> Candidate:
        """Each entry but the first moved, and each set of blocks drawn anew, with this probability.

        Example:
            >>> space = Space(entries=50, blocks=4, steps=5)
            >>> len(space.mutated(space.even(), 0.5, random.Random(0)).entries)
            5
        """
        genes = dict(zip(parent.entries, parent.left_out, strict=True))
        for entry in parent.entries:
            blocks = self._some(dice) if dice.random() < probability else genes[entry]
            if entry and dice.random() < probability:
                del genes[entry]
                entry = dice.choice([n for n in range(self.entries) if n not in genes])
            genes[entry] = blocks
        return self.fitted(genes, dice)

    def crossed(self, one: Candidate, two: Candidate, dice: random.Random) -> Candidate:
        """At each place in the list, the step of one or the other; of the longer one the rest.

        Example:
            >>> space = Space(entries=50, blocks=4, steps=5)
            >>> space.crossed(space.even(), space.even(), random.Random(0)) == space.even()
            True
        """
        short, long = sorted((one, two), key=lambda parent: len(parent.entries))
        genes = dict(zip(long.entries, long.left_out, strict=True))
        for n in range(len(short.entries)):
            if dice.random() < 0.5:
                genes.pop(long.entries[n], None)
                genes[short.entries[n]] = short.left_out[n]
        return self.fitted(genes, dice)

    def fitted(self, genes: dict[int, tuple[int, ...]], dice: random.Random) -> Candidate:
        """Brought within the budget, and filled up to it.

        Args:
            genes: entry -> blocks that it leaves out.
            dice: for what has to be added or dropped.
        """
        genes = {0: (), **genes}
        budget, least = self.steps * self.blocks, self.blocks - self.most
        while (used := self._used(genes)) > budget:
            open_to = [entry for entry, blocks in sorted(genes.items()) if len(blocks) < self.most]
            if open_to:
                entry = dice.choice(open_to)
                spare = [n for n in range(self.blocks) if n not in genes[entry]]
                genes[entry] = tuple(sorted((*genes[entry], dice.choice(spare))))
            else:
                del genes[dice.choice(sorted(entry for entry in genes if entry))]
        while budget - used >= least and len(genes) < self.entries:
            entry = dice.choice([n for n in range(self.entries) if n not in genes])
            genes[entry] = self._some(dice, self.blocks - (budget - used))
            used = self._used(genes)
        ordered = sorted(genes.items())
        return Candidate(tuple(entry for entry, _ in ordered), tuple(blocks for _, blocks in ordered))

    def _used(self, genes: dict[int, tuple[int, ...]]) -> int:
        return sum(self.blocks - len(blocks) for blocks in genes.values())

    def _some(self, dice: random.Random, least: int = 0) -> tuple[int, ...]:
        count = dice.randint(max(0, least), self.most) if self.most else 0
        return tuple(sorted(dice.sample(range(self.blocks), count)))


def evolve(
    score: Callable[[Candidate], float],
    spaces: Sequence[Space],
    population: int,
    probability: float,
    dice: random.Random,
) -> tuple[Candidate, float]:
    """Search the candidate of the lowest score.

    The first population is the even list, lists close to it, and, for half of it, anything. Of all that was scored a
    fifth of a population breeds; a generation is half mutations, a fifth crossings, and anything for the rest. No
    candidate is scored twice.

    Args:
        score: what to minimise.
        spaces: of each population, the first one included; later ones may allow more.
        population: candidates in each, at least 2.
        probability: of a mutation.
        dice: all that is drawn.

    Returns:
        the best candidate, and its score.

    Example:
        >>> wanted = (0, 3, 4, 9)
        >>> far = lambda found: sum(abs(a - b) for a, b in zip(found.entries, wanted))
        >>> best, least = evolve(far, [Space(10, 1, 4)] * 10, 20, 0.25, random.Random(0))
        >>> best.entries, least
        ((0, 3, 4, 9), 0)
    """
    scores: dict[Candidate, float] = {}

    def add(count: int, make: Callable[[], Candidate]) -> None:
        """Score so many new ones, as far as there are any."""
        for _ in range(10 * count):
            if count <= 0:
                return
            candidate = make()
            if candidate not in scores:
                scores[candidate] = score(candidate)
                count -= 1

    first, half = spaces[0], population // 2
    add(1, first.even)
    add(half - 1, lambda: first.mutated(first.even(), probability, dice))
    add(population - len(scores), lambda: first.fresh(dice))

    def generation(space: Space) -> None:
        parents = sorted(scores, key=scores.__getitem__)[: max(2, population // 5)]
        before = len(scores)
        add(half, lambda: space.mutated(dice.choice(parents), probability, dice))
        add(population // 5, lambda: space.crossed(dice.choice(parents), dice.choice(parents), dice))
        add(population - (len(scores) - before), lambda: space.fresh(dice))

    for space in spaces[1:]:
        generation(space)
    best = min(scores, key=scores.__getitem__)
    return best, scores[best]
