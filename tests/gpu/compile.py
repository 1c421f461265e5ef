#!/usr/bin/env python3
"""Compiles the CUDA kernels to PTX, without a GPU.

    python3 tests/gpu/compile.py            # writes engines/src/cuda/kernels/kernels.ptx.gz
    python3 tests/gpu/compile.py --check    # compiles, compares with that file, and assembles it for every chip

NVRTC and ptxas come from the wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12 (45 MB, of which nothing is
installed), which pip fetches into target/cuda-wheels once; where they cannot be had, one line says so. NVRTC 12.6
writes PTX 8.5, which drivers of CUDA 12.5 (555) and newer take. `--check` wants the same text to the byte, no spilled
registers on any chip, and tensor-core instructions in every kernel whose name says bf16 or int8.
"""
import ctypes
import glob
import gzip
import os
import re
import subprocess
import sys
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KERNELS = f"{ROOT}/engines/src/cuda/kernels"
PACKED = f"{KERNELS}/kernels.ptx.gz"
WHEELS = os.environ.get("MINDSEYE_CUDA_WHEELS", f"{ROOT}/target/cuda-wheels")
# Of kernels whose name has the key.
TENSOR_INSTRUCTIONS = {"bf16": "HMMA.16816.F32.BF16", "int8": "IMMA.16832.S8.S8"}
PTX = f"{WHEELS}/kernels.ptx"
CHIPS = ["sm_80", "sm_87", "sm_89", "sm_90"]


def wheel(name):
    """Folder of an unpacked wheel, or None."""
    folder = f"{WHEELS}/{name.replace('==', '-')}"
    if not os.path.isdir(folder):
        os.makedirs(WHEELS, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "-d", WHEELS, name]
        if subprocess.run(fetch, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
            return None
        [file] = glob.glob(f"{WHEELS}/{name.split('==')[0].replace('-', '_')}-*.whl")
        with zipfile.ZipFile(file) as z:
            z.extractall(folder)
        os.remove(file)
    return folder


def nvrtc(folder):
    find = lambda pattern: glob.glob(f"{folder}/nvidia/cuda_nvrtc/lib/{pattern}")[0]
    # Without this first, globally, NVRTC does not find its own headers.
    ctypes.CDLL(find("libnvrtc-builtins.so*"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(find("libnvrtc.so*"))


def compile_ptx(library):
    headers = {os.path.basename(f): open(f).read() for f in sorted(glob.glob(f"{KERNELS}/*.h") + glob.glob(f"{KERNELS}/*.cu"))}
    source = headers.pop("kernels.cu")
    array = lambda items: (ctypes.c_char_p * len(items))(*[i.encode() for i in items])
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", len(headers), array(list(headers.values())), array(list(headers)))
    if made:
        sys.exit(f"nvrtcCreateProgram: {made}")
    options = ["--gpu-architecture=compute_80", "--std=c++17"]
    failed = library.nvrtcCompileProgram(program, len(options), array(options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if failed:
        sys.exit(log.value.decode())
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, text)
    return text.value


def assemble(ptxas, chip):
    """What ptxas says of each kernel: registers, spilled bytes; and the machine code."""
    cubin = f"{WHEELS}/kernels.{chip}.cubin"
    done = subprocess.run([ptxas, "-v", f"-arch={chip}", PTX, "-o", cubin], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ptxas {chip}: {done.stderr}")
    kernels, name = {}, None
    for line in done.stderr.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
        elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name] = [int(m[1]) + int(m[2])]
        elif m := re.search(r"Used (\d+) registers", line):
            kernels[name].append(int(m[1]))
    return kernels, cubin


def tensor_instructions(disassembler, cubin):
    """Tensor-core instructions of each kernel."""
    text = subprocess.run([disassembler, cubin], capture_output=True, text=True, check=True).stdout
    counts, name = {}, None
    for line in text.splitlines():
        if m := re.search(r"\.section\s+\.text\.(\w+)", line):
            name = m[1]
        elif any(i in line for i in TENSOR_INSTRUCTIONS.values()):
            counts[name] = counts.get(name, 0) + 1
    return counts


def main():
    folder = wheel("nvidia-cuda-nvrtc-cu12==12.6.85")
    if folder is None:
        return print("SKIP: the wheel nvidia-cuda-nvrtc-cu12 cannot be had; the PTX was not compared")
    text = compile_ptx(nvrtc(folder))
    if "--check" not in sys.argv:
        packed = gzip.compress(text, 9, mtime=0)
        with open(PACKED, "wb") as f:
            f.write(packed)
        return print(f"{PACKED}: {len(packed)} bytes, unpacked {len(text)}")
    if gzip.open(PACKED).read() != text:
        sys.exit("kernels.ptx.gz is not what the sources compile to: run tests/gpu/compile.py")
    with open(PTX, "wb") as f:
        f.write(text)
    print(f"kernels.ptx.gz is what NVRTC 12.6.85 makes of the sources ({len(text)} bytes)")
    tools = wheel("nvidia-cuda-nvcc-cu12==12.6.85")
    if tools is None:
        return print("SKIP: the wheel nvidia-cuda-nvcc-cu12 cannot be had; the PTX was not assembled")
    ptxas = f"{tools}/nvidia/cuda_nvcc/bin/ptxas"
    os.chmod(ptxas, 0o755)
    dis = wheel("nvidia-cuda-nvdisasm==13.5.37")
    disassembler = dis and next(iter(glob.glob(f"{dis}/nvidia/**/nvdisasm", recursive=True)), None)
    if disassembler:
        os.chmod(disassembler, 0o755)
    else:
        print("SKIP: the wheel nvidia-cuda-nvdisasm cannot be had; no tensor-core instructions were looked for")
    for chip in CHIPS:
        kernels, cubin = assemble(ptxas, chip)
        spilled = {name: values for name, values in kernels.items() if values[0]}
        if spilled or not kernels:
            sys.exit(f"{chip}: registers are spilled: {spilled}")
        line = ", ".join(f"{name} {values[1]}" for name, values in sorted(kernels.items()))
        print(f"{chip}: {len(kernels)} kernels, nothing spilled; registers: {line}")
        if disassembler:
            counts = tensor_instructions(disassembler, cubin)
            without = [n for n in kernels if any(t in n for t in TENSOR_INSTRUCTIONS) and not counts.get(n)]
            if without:
                sys.exit(f"{chip}: no tensor-core instruction in {', '.join(without)}")
            print(f"{chip}: {', '.join(TENSOR_INSTRUCTIONS.values())}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


main()
