"""Names of the engines, apart from what opens them: an option is declared without any of it."""

from typing import Literal

EngineName = Literal["torch", "openvino"]
