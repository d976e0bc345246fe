"""`Watch`: says so, once and loudly, when a training loop forgot half of the branch."""

from __future__ import annotations

import warnings

from ..errors import LowRankWarning

PATIENCE = 50  # training forwards


class Watch:
    """Counts what a training loop calls, from switch-on to the first `update`."""

    def __init__(self) -> None:
        self.forwards = 0  # since switch-on; those of a compiled network are not seen
        self.penalties = 0
        self._done = False

    def forward(self) -> None:
        """A training forward happened."""
        if self._done:
            return
        self.forwards += 1
        if self.forwards >= PATIENCE and not self.penalties:
            self._warn(f"{self.forwards} training forwards passed, but penalty() was never called")

    def penalty(self) -> None:
        """The penalty of a forward was asked for."""
        if self._done:
            return
        self.penalties += 1
        if self.penalties >= PATIENCE:
            self._warn(
                f"penalty() was called {self.penalties} times, but update() never, so W and b stay what they were",
                "call model.update() after optimizer.step(), or timm_lowrank.attach(optimizer, model) once",
            )

    def update(self) -> None:
        """The Update Step was made: the loop knows what it does."""
        self._done = True

    def end(self, unused: bool) -> None:
        """Training pauses; `unused` says whether the last forward's activations were never asked for.

        The forwards of a compiled network can only be noticed here.
        """
        if unused and not self._done and not self.forwards and not self.penalties:
            self._warn("a compiled network was trained, but penalty() was never called")

    def _warn(self, what: str, advice: str | None = None) -> None:
        self._done = True
        advice = advice or (
            "add model.penalty() to the loss, or use timm_lowrank.LossHook(criterion, model) as the criterion. "
            "To train without the branches, model.enable(False)"
        )
        warnings.warn(f"the low-rank branches have no effect: {what}; {advice}", LowRankWarning, stacklevel=5)
