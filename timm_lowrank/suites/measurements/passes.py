"""`TestPass`: one forward pass of each test image through a network, for all measurements that need no gradient."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.capture import Recording, Tap, evaluating, recording
from ...core.views import FLATTEN, View
from ...errors import CaptureError, EvaluationError
from ...evaluation.arguments import check_logits
from ...evaluation.cushion import cushions_of_pass
from ...evaluation.pixels import bare
from ...evaluation.representations import network_of, taps_of


class Reading(enum.Enum):
    """What can be read off a forward pass."""

    CLASSES = "classes"  # the most likely class of each image
    ACTIVATIONS = "activations"  # of the measured layers
    CUSHIONS = "cushions"  # of every convolution and linear layer


class TestPass:
    """The test images through one network, chunk by chunk: each chunk once, when the first measurement asks for it.

    A pass takes along what others will ask of the same chunk, so that they find it. Activations of all test images
    are kept, (images, features) of each layer in the memory of the processor; the rest is a few numbers an image.

    Args:
        expected: what will be asked of each chunk; anything else can be asked for, too, at the price of a second pass.
    """

    __test__ = False  # for pytest

    def __init__(
        self,
        model: nn.Module,  # takes pixels in [0, 1]
        images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
        layers: Sequence[str],
        chunk: int,
        expected: Mapping[int, frozenset[Reading]],
    ) -> None:
        self._model, self._images, self._layers, self._chunk = model, images, list(layers), chunk
        self._expected = expected
        self._taps: list[Tap] | None = None
        self._activations: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._read: dict[tuple[Reading, int], Any] = {}  # an error where it could not be read

    def classes(self, rows: range) -> Tensor:
        """(rows,) int64, on the device of the images.

        Raises:
            EvaluationError: the network gives no finite logits.
        """
        return torch.cat(self._ask(Reading.CLASSES, rows))

    def activations(self, rows: range, views: Mapping[str, View] | None = None) -> dict[str, Tensor]:
        """{layer: (samples, features)} of the network's dtype, in the memory of the processor.

        Args:
            views: of layers whose samples are not whole images.

        Raises:
            EvaluationError: as `evaluation.activations`.
        """
        self._ask(Reading.ACTIVATIONS, rows)
        found = {}
        for layer, kept in self._activations.items():
            values = kept[rows.start : rows.stop]
            view = (views or {}).get(layer, FLATTEN)
            found[layer] = view.rows(values.view(len(values), *self._shapes[layer]))
        return found

    def cushions(self, rows: range) -> dict[str, Tensor]:
        """{layer: (rows,) float64} of the layers that run once, as `evaluation.layer_cushion`."""
        parts = self._ask(Reading.CUSHIONS, rows)
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    def _ask(self, reading: Reading, rows: range) -> list[Any]:
        """What was read off each chunk of the rows, which begin and end with a chunk."""
        found = []
        for chunk in range(rows.start // self._chunk, -(-rows.stop // self._chunk)):
            if (reading, chunk) not in self._read:
                wanted = self._expected.get(chunk, frozenset()) | {reading}
                self._run(chunk, {each for each in wanted if (each, chunk) not in self._read})
            value = self._read[reading, chunk]
            if isinstance(value, EvaluationError):
                raise EvaluationError(str(value)) from value
            found.append(value)
        return found

    def _run(self, chunk: int, wanted: set[Reading]) -> None:
        """What cannot be read leaves its error behind and the other readings alone."""
        rows = slice(chunk * self._chunk, (chunk + 1) * self._chunk)
        batch = self._images[rows]
        record, cushions = Recording(), None
        if Reading.ACTIVATIONS in wanted and self._taps is None:
            try:
                self._taps = taps_of(self._model, batch, self._layers)
            except EvaluationError as error:
                self._read[Reading.ACTIVATIONS, chunk] = error
                wanted = wanted - {Reading.ACTIVATIONS}
                if not wanted:
                    return
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            if Reading.CUSHIONS in wanted:  # before `recording`, whose hooks torch's own cannot be added to
                cushions = stack.enter_context(cushions_of_pass(self._model))
            if Reading.ACTIVATIONS in wanted:
                record = stack.enter_context(recording(network_of(self._model), self._taps or []))
            logits = bare(self._model)(batch)
        for reading in wanted:
            try:
                value: Any = None
                if reading is Reading.CLASSES:
                    value = check_logits(logits, len(batch)).argmax(dim=1)
                elif reading is Reading.ACTIVATIONS:
                    self._keep(record, rows)
                elif cushions is not None:
                    value = {layer: ratios.cpu() for layer, ratios in cushions(len(batch)).items()}
            except EvaluationError as error:
                value = error
            self._read[reading, chunk] = value

    def _keep(self, record: Recording, rows: slice) -> None:
        for tap in self._taps or []:
            try:
                seen = record.activation(tap)
            except CaptureError as error:
                raise EvaluationError(str(error)) from error
            values = seen.flatten(1)
            if tap.layer not in self._activations:
                self._shapes[tap.layer] = seen.shape[1:]
                self._activations[tap.layer] = torch.empty(len(self._images), values.shape[1], dtype=values.dtype)
            self._activations[tap.layer][rows] = values.cpu()
