#!/usr/bin/env python3
"""Writes tests/data/e4m3: what ml_dtypes says of float8_e4m3fn.

    pip install numpy ml_dtypes
    python3 tests/python/make_e4m3_vectors.py

`values.txt`: the value of each of the 256 codes, in order, one a line (exact decimals of a float32, or nan).
`rounded.bin`: for each 16-bit float by its bits, 0 to 65535, the code that it rounds to, one byte each. ml_dtypes has
no saturation, the ONNX operator QuantizeLinear has: values beyond 448 get the code of 448 with their sign here, and
infinities too. NaN gets 0x7f.
"""

import pathlib

import ml_dtypes
import numpy as np

out = pathlib.Path(__file__).resolve().parents[1] / "data" / "e4m3"
codes = np.arange(256, dtype=np.uint8)
values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
(out / "values.txt").write_text("".join(f"{float(v)!r}\n" for v in values))
halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
clipped = np.clip(halves, -448.0, 448.0)
rounded = clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).copy()
rounded[np.isnan(halves)] = 0x7F
(out / "rounded.bin").write_bytes(rounded.tobytes())
print(f"{len(values)} codes, {len(rounded)} roundings, ml_dtypes {ml_dtypes.__version__}")
