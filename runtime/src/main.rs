//! The `mindseye` command; see [`mindseye::cli`].

fn main() -> std::process::ExitCode {
    mindseye::cli::main()
}
