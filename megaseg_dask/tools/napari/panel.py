"""The panel "Segment with MegaSeg": a form, a button, and what a run says while it works.

The run is that of ``megaseg segment``, in a thread; its events come to the thread of the window
as a signal.
"""

from typing import Any

from napari.layers import Image, Labels, Layer
from napari.qt.threading import create_worker
from napari.utils import progress
from napari.viewer import Viewer
from qtpy.QtCore import Signal
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QWidget,
)

from megaseg_dask.errors import MegasegError, SettingsError
from megaseg_dask.events import Event, Notice, PatchProgress, Progress, Result, Step
from megaseg_dask.messages import (
    doubt_line,
    failure_line,
    patches_line,
    result_line,
    stage_phrase,
)
from megaseg_dask.models.cache import cached_names
from megaseg_dask.models.registry import PUBLISHED
from megaseg_dask.plan.settings import Settings, parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.tools.napari.reader import of_kinds, origin_of, read_layers
from megaseg_dask.tools.view.gallery import IMAGE, LABELS, SCORES


class SegmentPanel(QWidget):  # type: ignore[misc]
    """Segments the image of a layer, and adds its labels and scores."""

    happened = Signal(object)

    def __init__(self, napari_viewer: Viewer) -> None:
        """Make the form; napari passes its viewer by this name."""
        super().__init__()
        self._viewer = napari_viewer
        self._bar: Any = None
        self._worker: Any = None
        self.image = QComboBox()
        self.model = QComboBox()
        self.model.setEditable(True)
        self.model.addItems(sorted({*PUBLISHED, *cached_names()}))
        self.model.addItem("starter")
        self.model.setToolTip("The name of a model, or the path of a MegaSeg bundle")
        self.threshold = QLineEdit("0.5")
        self.threshold.setToolTip("A number from 0 to 1, or a method: otsu, yen, li, triangle, …")
        self.min_size = QLineEdit("0")
        self.min_size.setToolTip("Objects with fewer voxels are removed")
        self.target = QLineEdit()
        self.target.setPlaceholderText("folder that is written, such as segmented.zarr")
        self.button = QPushButton("Segment")
        self.message = QLabel()
        self.message.setWordWrap(True)
        self._lay_out()
        self.button.clicked.connect(self._start_or_stop)
        self.happened.connect(self._show)
        for change in (self._viewer.layers.events.inserted, self._viewer.layers.events.removed):
            change.connect(self._list_images)
        self._list_images()

    def _lay_out(self) -> None:
        browse = QPushButton("…")
        browse.clicked.connect(self._browse)
        target = QHBoxLayout()
        target.addWidget(self.target)
        target.addWidget(browse)
        form = QFormLayout(self)
        form.addRow("Image and channel", self.image)
        form.addRow("Model", self.model)
        form.addRow("Threshold", self.threshold)
        form.addRow("Smallest object", self.min_size)
        form.addRow("Write to", target)
        form.addRow(self.button)
        form.addRow(self.message)

    def _browse(self) -> None:
        file, _ = QFileDialog.getSaveFileName(self, "Write to", self.target.text())
        if file:
            self.target.setText(file)

    def _list_images(self) -> None:
        chosen = self.image.currentText()
        self.image.clear()
        self.image.addItems([layer.name for layer in self._viewer.layers if _is_image(layer)])
        self.image.setCurrentText(chosen)

    # -- a run

    def _start_or_stop(self) -> None:
        if self._worker is not None:
            self._worker.quit()
            self.message.setText("Stopping after the tasks that are running")
            return
        try:
            source, target, settings = self._request()
        except MegasegError as error:
            self.message.setText(str(error))
            return
        self.button.setText("Stop")
        self.message.setText("Starting")
        self._worker = create_worker(self._run, source, target, settings, _start_thread=False)
        self._worker.returned.connect(self._end)
        self._worker.errored.connect(self._end)
        self._worker.start()

    def _request(self) -> tuple[str, str, Settings]:
        """Return the address of the image, the target, and the settings of the run.

        Raises:
            SettingsError: Something is missing, or has a value that is not allowed.
        """
        name = self.image.currentText()
        target = self.target.text().strip()
        if not name:
            raise SettingsError("Open an OME-Zarr image first, with the reader MegaSeg")
        if not target:
            raise SettingsError("Write to: name the folder to write, such as segmented.zarr")
        origin = origin_of(self._viewer.layers[name].metadata)
        if origin is None:
            raise SettingsError(
                f"{name} was opened by another reader. Open its OME-Zarr with the reader MegaSeg. "
                "Write other files as OME-Zarr first: megaseg import FILE IMAGE.zarr"
            )
        values = {
            "model": self.model.currentText(),
            "threshold": self.threshold.text(),
            "min_size": self.min_size.text(),
        }
        if origin["channel"] is not None:
            values["channel"] = origin["channel"]
        return origin["address"], target, parse_settings(values)

    def _run(self, source: str, target: str, settings: Settings) -> Result | MegasegError | None:
        """Segment, in a thread of its own; ``None`` if the run was stopped."""
        try:
            return segment(source, target, settings, emit=self._emit)
        except MegasegError as error:
            return error
        except KeyboardInterrupt:
            return None

    def _emit(self, event: Event) -> None:
        # napari asks for it too, when its window closes.
        if self._worker.abort_requested:
            # A run ends by it as by Ctrl-C, and the same request resumes it.
            raise KeyboardInterrupt
        self.happened.emit(event)

    # -- what it says

    def _show(self, event: Event) -> None:
        match event:
            case Step():
                self.message.setText(event.text)
            case Notice():
                self.message.setText(event.text)
            case Progress():
                self._show_progress(event)
            case PatchProgress():
                self.message.setText(patches_line(event))

    def _show_progress(self, event: Progress) -> None:
        phrase = stage_phrase(event.stage)
        if self._bar is None or self._bar.desc != f"{phrase}: ":
            self._close_bar()
            self._bar = progress(total=event.n_tasks, desc=phrase)
        self._bar.update(event.n_done - self._bar.n)
        self.message.setText(f"{phrase}: {event.n_done} of {event.n_tasks}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _end(self, outcome: Result | Exception | None) -> None:
        self._worker = None
        self._close_bar()
        self.button.setText("Segment")
        if outcome is None:
            self.message.setText("Stopped. Press Segment again to resume.")
            return
        if isinstance(outcome, Exception):
            self.message.setText(str(outcome))
            return
        lines = [result_line(outcome), *outcome.warnings]
        lines += map(doubt_line, outcome.doubts)
        lines += map(failure_line, outcome.failures[:1])
        self.message.setText("\n".join(lines))
        self._add_layers(outcome.target)

    def _add_layers(self, target: str) -> None:
        try:
            made = list(of_kinds(read_layers(target), (LABELS, SCORES)))
        except MegasegError as error:
            # The labels of some fields may be missing.
            self.message.setText(f"{self.message.text()}\n{error}")
            return
        for layer in self._viewer.layers:
            if isinstance(layer, Labels):
                # One label image would hide another.
                layer.visible = False
        for layer in made:
            self._viewer.add_layer(Layer.create(*layer))


def _is_image(layer: Layer) -> bool:
    """Return whether a layer can be segmented, as far as is known."""
    origin = origin_of(layer.metadata)
    return isinstance(layer, Image) and (origin is None or origin["kind"] == IMAGE)
