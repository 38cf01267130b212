"""What Triton's interpreter lacks for Liger's kernels."""

from collections.abc import Callable
from typing import Any


def mend_interpreter(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Numbers with a type, which a compiled kernel gets and the interpreter leaves Python's own; and CUDA's library of
    functions."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_type(value: Any) -> Any:
        return (
            tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
            if type(value) is float
            else convert(value)
        )

    put(interpreter, "_implicit_cvt", with_type)
    put(rms_norm, "rsqrt", lambda value: tl.rsqrt(value))
