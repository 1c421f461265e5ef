//! Where the program finds libtorch when it runs: the folder that it was linked with (`build.sh` names it).

fn main() {
    println!("cargo:rerun-if-env-changed=MINDSEYE_LIBTORCH_LIB");
    if let Ok(lib) = std::env::var("MINDSEYE_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
