"""The states of one sample under Picard iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Trajectory:
    """Known states of one sample, and guesses after them.

    Args:
        place: the step that the first known state begins.
        state: the state, of any shape.

    Attributes:
        base: place of the last known state; states before it are known as well, those after it are guesses.
        states: by the step that they begin.
    """

    def __init__(self, place: int, state: torch.Tensor) -> None:
        self.base, self.states = place, {place: state}

    def window(self, size: int, end: int) -> range:
        """The places to evaluate: the base and guesses after it, which are made up where there are none yet.

        Args:
            size: most places.
            end: number of steps, whose state needs no evaluation.

        Example:
            >>> Trajectory(2, torch.zeros(1)).window(4, 5)
            range(2, 5)
        """
        last, until = max(self.states), min(self.base + size, end)
        self.states.update(dict.fromkeys(range(last + 1, until + 1), self.states[last]))
        return range(self.base, until)

    def slide(self, stepped: Sequence[torch.Tensor], limits: Sequence[float]) -> int:
        """Carry out one Picard iteration.

        Args:
            stepped: the sample after the scheduler's step from each state of the window, the base first.
            limits: largest mean square change with which a state counts as known, for each state of the window but the
                base.

        Returns:
            by how many states the known ones grew: at least 1, at most the window.

        Example:
            >>> path = Trajectory(0, torch.tensor([1.0]))
            >>> places = path.window(2, 4)
            >>> path.slide([0.5 * path.states[place] for place in places], [0.0])
            1
            >>> path.states[1], path.states[2]
            (tensor([0.5000]), tensor([0.]))
        """
        base, count = self.base, len(stepped)
        wide = torch.promote_types(stepped[0].dtype, torch.float32)
        before = torch.stack([self.states[base + j] for j in range(count)]).to(wide)
        after = torch.stack(list(stepped))
        new = (before[0] + (after.to(wide) - before).cumsum(0)).to(after.dtype)
        new[0] = after[0]
        grown = count
        if count > 1:
            errors = (new[:-1].to(wide) - before[1:]).flatten(1).square().mean(1).tolist()
            # The first state that fails is made of known ones only, so that it is known too.
            grown = next((j + 1 for j, error in enumerate(errors) if not error <= limits[j]), count)
        self.states.update({base + 1 + j: state for j, state in enumerate(new)})
        self.base = base + grown
        return grown

    def forget_before(self, place: int) -> None:
        """Drop the states that begin earlier steps."""
        self.states = {key: state for key, state in self.states.items() if key >= place}
