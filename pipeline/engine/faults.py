"""What an error of a batch means: too little memory, a device that is gone, or a prompt that cannot be computed."""

import torch

from pipeline.capture import MatrixMissed
from pipeline.errors import Interrupted

PROMPT_ERRORS = (RuntimeError, IndexError, ValueError, ArithmeticError, MemoryError, MatrixMissed)
"""What torch and models raise over what they are given; and a model that passes a matrix by for some prompts."""


class DeviceLost(Interrupted):
    """Nothing works on the device any more, as far as this process is concerned."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_NO_DEVICE = ("cuda error", "device-side assert", "hip error", "ecc error", "unspecified launch failure")
_DEVICE_ERRORS = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of this machine; a smaller batch may fit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether it ends the use of the device by this process."""
    if is_out_of_memory(error):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_DEVICE)
    return isinstance(error, _DEVICE_ERRORS) or said
