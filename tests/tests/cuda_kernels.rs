//! The CUDA kernels without a GPU: their values in the emulator of `tests/cuda-emulator`, and that the emulator finds
//! faults. Skipped, in one line, where g++ is missing.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Sources of the kernels.
const FILES: [&str; 7] =
    ["gemm.cu", "gemm8.cu", "conv.cu", "attention.cu", "rows.cu", "elementwise.cu", "sampler.cu"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn kernels() -> PathBuf {
    root().join("engines/src/cuda/kernels")
}

/// Compiles `values.cpp` with the kernels of this folder; `None`, with the reason printed, where g++ is missing.
fn compile(kernels: &Path, out: &Path, flags: &[&str]) -> Option<()> {
    let emulator = root().join("tests/cuda-emulator");
    let mut gxx = Command::new("g++");
    gxx.args(["-O1", "-std=c++17", "-Wall", "-Werror", "-Wno-unused", "-Wno-unknown-pragmas"]).args(flags);
    gxx.arg("-I").arg(kernels).arg("-I").arg(&emulator).arg(emulator.join("values.cpp")).arg("-o").arg(out);
    match gxx.output() {
        Err(e) => {
            println!("SKIP: kernels are emulated by programs that g++ compiles: {e}");
            None
        }
        Ok(done) => {
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Some(())
        }
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn every_kernel_agrees_with_sums_in_f64() {
    let dir = tempfile::tempdir().unwrap();
    let values = dir.path().join("values");
    let undefined = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"];
    if compile(&kernels(), &values, &undefined).is_none() {
        return;
    }
    let output = Command::new(&values).output().unwrap();
    println!("{}", text(&output));
    assert!(output.status.success());
    // A kernel that is not tried would be one of which nothing is known.
    let sources: String = FILES.map(|f| std::fs::read_to_string(kernels().join(f)).unwrap()).concat();
    // Two of them are macros, which are used several times.
    let used = ["\nATTENTION(", "\nCONV("].map(|name| sources.matches(name).count());
    let written = sources.matches("KERNEL __launch_bounds__").count() - 2 + used.iter().sum::<usize>();
    let tried =
        text(&output).lines().filter(|l| l.contains("shapes, worst") && !l.contains("kernels")).count();
    assert_eq!(tried, written);
}

/// A mistake in a kernel, and the family of kernels in whose test it must show.
struct Fault {
    what: &'static str,
    file: &'static str,
    right: &'static str,
    /// What takes its place: the mistake where `FAULT`.
    planted: &'static str,
    family: &'static str,
}

const FAULTS: &[Fault] = &[
    Fault {
        what: "a copy that is not waited for",
        file: "attention.cu",
        right: "wait_copies<1>();",
        planted: "if (FAULT) wait_copies<2>(); else wait_copies<1>();",
        family: "attention",
    },
    Fault {
        what: "rows written at another place than they are read from",
        file: "attention.cu",
        right: "copy16(to + chunk<PITCH>(r, c),",
        planted: "copy16(to + (FAULT ? r * PITCH + 8 * c : chunk<PITCH>(r, c)),",
        family: "attention",
    },
    Fault {
        what: "lanes that load the wrong matrices",
        file: "gemm.cu",
        right: "load_matrices(fa[i], sa + swizzle4(wm + 16 * i + (lane & 15), kk / 8 + (lane >> 4)));",
        planted: "load_matrices(fa[i], sa + (FAULT ? swizzle4(wm + 16 * i + (lane & 7) + (lane >> 4) * 8, kk / 8 + (lane >> 3 & 1)) : swizzle4(wm + 16 * i + (lane & 15), kk / 8 + (lane >> 4))));",
        family: "gemm",
    },
    Fault {
        what: "keys that do not exist",
        file: "attention.cu",
        right: "s[i][e] = key < nk ? x : NOTHING;",
        planted: "s[i][e] = FAULT || key < nk ? x : NOTHING;",
        family: "attention",
    },
    Fault {
        what: "sums that keep an older maximum",
        file: "attention.cu",
        right: "sums[i][e] *= shrink[e / 2];",
        planted: "sums[i][e] *= FAULT ? 1.f : shrink[e / 2];",
        family: "attention",
    },
    Fault {
        what: "bytes of another depth",
        file: "gemm8.cu",
        right: "multiply_add_bytes(sums[i][2 * j], fa[i], fb[j][0], fb[j][2]);",
        planted: "multiply_add_bytes(sums[i][2 * j], fa[i], fb[j][0], fb[j][FAULT ? 1 : 2]);",
        family: "gemm8",
    },
    Fault {
        what: "rows of bytes read beyond the end",
        file: "gemm8.cu",
        right: "bool read = row0 + r < rows && k0 + 16 * c < k;",
        planted: "bool read = row0 + r < rows && (FAULT || k0 + 16 * c < k);",
        family: "gemm8",
    },
    Fault {
        what: "steps of E4M3 that go on below its least binade",
        file: "elementwise.cu",
        right: "exponent > 121 ? exponent - 3 : 118",
        planted: "FAULT || exponent > 121 ? exponent - 3 : 118",
        family: "elementwise",
    },
    Fault {
        what: "a sampler that corrects what it has overwritten",
        file: "sampler.cu",
        right: "            previous[i] = y;\n",
        planted: "            previous[i] = FAULT ? before : y;\n",
        family: "sampler",
    },
    Fault {
        what: "a missing barrier",
        file: "gemm.cu",
        right: "        block_barrier();\n    }\n    for (int i = 0; i < 4; i++)",
        planted: "        if (!FAULT) block_barrier();\n    }\n    for (int i = 0; i < 4; i++)",
        family: "gemm_any",
    },
    Fault {
        what: "rows read beyond the end",
        file: "gemm.cu",
        right: "bool read = m0 + r < m && k0 + 8 * c < k;",
        planted: "bool read = (FAULT || m0 + r < m) && k0 + 8 * c < k;",
        family: "gemm",
    },
    Fault {
        what: "an unaligned copy",
        file: "gemm.cu",
        right: "b + (i64)(k0 + r) * n + n0 + 8 * c : b, read);",
        planted: "b + (i64)(k0 + r) * n + n0 + 8 * c - (FAULT && r) : b, read);",
        family: "gemm",
    },
    Fault {
        what: "a convolution without its padding",
        file: "conv.cu",
        right: "if (y < 0 || y >= c.height || x < 0 || x >= c.width) return -1;",
        planted: "if (y < 0 || y >= c.height || (FAULT ? x < -1 : x < 0) || x >= c.width) return -1;",
        family: "conv",
    },
    Fault {
        what: "windows put where the last stage is still read",
        file: "conv.cu",
        right: "bf16* to = stages + step % 2 * STAGE + BM * BK;",
        planted: "bf16* to = stages + (FAULT ? 0 : step % 2) * STAGE + BM * BK;",
        family: "conv",
    },
    Fault {
        what: "frames over time taken for frames side by side",
        file: "conv.cu",
        right: "    x += blockIdx.z * c.picture;",
        planted: "    x += blockIdx.z * (FAULT ? (i64)c.channels * (c.height >> c.shift) * (c.width >> c.shift) : c.picture);",
        family: "conv",
    },
    Fault {
        what: "channels of other warps left out",
        file: "rows.cu",
        right: "for (int i = 0; i < 4; i++) sum += sums[32 * i + threadIdx.x % 32];",
        planted: "for (int i = 0; i < (FAULT ? 3 : 4); i++) sum += sums[32 * i + threadIdx.x % 32];",
        family: "rows",
    },
    Fault {
        what: "lanes that leave before the others sum up",
        file: "rows.cu",
        right: "    float mean = 0.f, square = 0.f;\n",
        planted: "    if (FAULT && lane > 15) return;\n    float mean = 0.f, square = 0.f;\n",
        family: "rows",
    },
];

#[test]
fn planted_faults_show() {
    let dir = tempfile::tempdir().unwrap();
    for file in FILES.into_iter().chain(["device.h", "kernels.cu"]) {
        let mut source = std::fs::read_to_string(kernels().join(file)).unwrap();
        for (i, fault) in FAULTS.iter().enumerate().filter(|(_, f)| f.file == file) {
            assert_eq!(source.matches(fault.right).count(), 1, "{:?} is not once in {file}", fault.right);
            let planted = fault.planted.replace("FAULT", &format!("(planted == {})", i + 1));
            source = source.replace(fault.right, &planted);
        }
        std::fs::write(dir.path().join(file), source).unwrap();
    }
    let values = dir.path().join("values");
    if compile(dir.path(), &values, &[]).is_none() {
        return;
    }
    let run = |family: &str, fault: usize| {
        Command::new(&values).args([family, &fault.to_string()]).output().unwrap()
    };
    for family in ["gemm", "gemm8", "gemm_any", "conv", "attention", "rows", "elementwise", "sampler"] {
        let output = run(family, 0);
        assert!(output.status.success(), "{family} without a fault: {}", text(&output));
    }
    for (i, fault) in FAULTS.iter().enumerate() {
        let output = run(fault.family, i + 1);
        assert!(!output.status.success(), "{} did not show", fault.what);
        let told = text(&output)
            .lines()
            .find(|l| l.starts_with("FAIL") || l.starts_with("emulator"))
            .map(str::to_owned);
        println!("{}: {}", fault.what, told.unwrap_or_else(|| output.status.to_string()));
    }
}
