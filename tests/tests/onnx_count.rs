//! Arithmetic and parameters of the presets, against independent figures (a FLOP counter on the reference
//! implementations, and the published parameter counts).

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::path::PathBuf;

use mindseye_tools::model::{cost, table};

fn preset(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../configs/models").join(name)
}

#[track_caller]
fn close(what: &str, got: f64, wanted: f64, relative: f64) {
    assert!((got / wanted - 1.0).abs() <= relative, "{what}: got {got}, wanted {wanted}");
}

#[test]
fn wan22_5b_costs_what_the_reference_costs() {
    let cost = cost(&preset("wan22-5b.toml")).unwrap();
    // What is published, and the projection of 24 camera channels to a width of 3072.
    assert_eq!(cost.dit_parameters, 4_999_787_712 + 25 * 3072);
    assert_eq!(cost.text_parameters, Some(5_680_910_336));
    assert_eq!(cost.vae_parameters, Some(704_688_668));
    assert_eq!((cost.context_latents, cost.target_latents, cost.tokens_per_latent), (85, 46, 104));
    let tflop = |start: &str| {
        let row = cost.rows.iter().find(|r| r.what.starts_with(start));
        row.unwrap_or_else(|| panic!("no row {start:?}")).tflop
    };
    close("joint", tflop("denoiser, joint"), 189.9, 0.01);
    close("prefill", tflop("denoiser, prefill"), 107.8, 0.01);
    close("cached", tflop("denoiser, cached"), 67.1, 0.01);
    close("VAE encode", tflop("VAE encode: one group"), 1.487, 0.01);
    close("VAE decode", tflop("VAE decode: one latent"), 7.836, 0.01);
    close("text", tflop("text encoder"), 4.8, 0.02);
    assert!(cost.joint_over_cached >= 2.5, "{}", cost.joint_over_cached);
    let seconds = &cost.rows[0].seconds;
    assert_eq!(seconds[0].0, "a100");
    close("a100", seconds[0].1, 189.9e12 / 312e12, 0.01);
    let state = |start: &str| cost.rows.iter().find(|r| r.what.starts_with(start)).unwrap().state_gb;
    // 85 latents of 104 tokens, keys and values of width 3072 in 30 layers.
    close("keys and values", state("denoiser, prefill"), 3.26, 0.01);
    close("decoder caches, in and out", state("VAE decode: one latent"), 2.0 * 2.0 * 0.190, 0.01);
    assert!(table(&cost).contains("4 999 864 512 parameters"));
}

#[test]
fn every_shipped_model_is_counted() {
    let folder = preset("house-tiny.toml").parent().unwrap().to_owned();
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let cost = cost(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(cost.dit_parameters > 100_000, "{}", path.display());
        count += 1;
    }
    assert!(count >= 3, "{count} models");
}

#[test]
fn house_tiny_is_counted_too() {
    let cost = cost(&preset("house-tiny.toml")).unwrap();
    assert!(cost.dit_parameters > 100_000 && cost.dit_parameters < 20_000_000, "{}", cost.dit_parameters);
    assert!(cost.vae_parameters.is_none());
    // 14 words, four ids before them, rows of 64, and a norm.
    assert_eq!(cost.text_parameters, Some(18 * 64 + 64));
}

#[test]
fn a_configuration_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    let good = std::fs::read_to_string(preset("house-tiny.toml")).unwrap();
    std::fs::write(&path, good.replace("head_dim = 48", "head_dim = 47")).unwrap();
    let error = format!("{:#}", cost(&path).unwrap_err());
    assert!(error.contains("bad.toml") && error.contains("head_dim"), "{error}");
}
