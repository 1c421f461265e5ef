#!/usr/bin/env python3
"""Checks exported graphs with the official ONNX checker and against onnxruntime.

How to run (nothing of mindseye is needed beyond the exported files):

    pip install numpy onnx onnxruntime
    cargo run --release -p mindseye-tools -- export BUNDLE --out graphs --vectors
    python3 tests/python/check_onnx.py graphs

`--vectors` writes `<graph>.vectors.safetensors` beside every graph: seeded inputs (`in.*`) and the outputs that the
embedded backend gives for them (`out.*`). This script checks every `*.onnx` of the folder with
`onnx.checker.check_model(full_check=True)`, runs it in onnxruntime on the same inputs and compares. It ends with
status 1 when a graph is refused, an output differs by more than the tolerance, or there was nothing to check.
"""

import argparse
import json
import pathlib
import struct
import sys

import numpy as np
import onnx
import onnxruntime

DTYPES = {"F32": np.float32, "I64": np.int64, "I32": np.int32}


def read_safetensors(path):
    """Name -> array. Header length (u64), JSON header, raw data."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    body = memoryview(data)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            array = np.frombuffer(body[start:end], DTYPES[entry["dtype"]])
            tensors[name] = array.reshape(entry["shape"])
    return tensors


def check(path, tolerance):
    """Returns a line for people and whether all is well."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    operators = sorted({node.op_type for node in model.graph.node})
    vectors = path.with_name(path.name + ".vectors.safetensors")
    line = f"{path.name}: {len(model.graph.node)} nodes, {len(operators)} operators, checker passed"
    if not vectors.exists():
        return line + ", no vectors: not run", True
    tensors = read_safetensors(vectors)
    inputs = {name[3:]: array for name, array in tensors.items() if name.startswith("in.")}
    wanted = {name[4:]: array for name, array in tensors.items() if name.startswith("out.")}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Signed 8-bit stays signed: onnxruntime 1.32 on x86 else rewrites it and refuses its own graph.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    # Products with 4-bit weights in floats: by default onnxruntime rounds their inputs to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    if sorted(names) != sorted(wanted):
        return f"{line}, outputs {names} but vectors hold {sorted(wanted)}", False
    worst = 0.0
    for name, got in zip(names, session.run(names, inputs)):
        if got.shape != wanted[name].shape:
            return f"{line}, {name}: shape {got.shape}, wanted {wanted[name].shape}", False
        if got.size:
            scale = max(1.0, float(np.abs(wanted[name]).max()))
            worst = max(worst, float(np.abs(got - wanted[name]).max()) / scale)
    good = bool(np.isfinite(worst)) and worst <= tolerance
    verdict = "ok" if good else f"MORE THAN {tolerance:g}"
    return f"{line}, onnxruntime differs by {worst:.2e} {verdict}", good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative to the largest value, at least 1")
    arguments = parser.parse_args()
    graphs = sorted(arguments.folder.rglob("*.onnx"))
    failed = not graphs
    if failed:
        print(f"{arguments.folder}: no .onnx file")
    for path in graphs:
        try:
            line, good = check(path, arguments.tolerance)
        except Exception as error:  # the checker's and the runtime's own errors say what is wrong
            line, good = f"{path.name}: {type(error).__name__}: {error}", False
        print(line)
        failed |= not good
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
