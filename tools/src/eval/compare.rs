//! `eval compare`: several bundles on the same houses, each sampled as it says itself: quality and cost side by side.
//!
//! For students against their teacher, the one-way mask against joint attention, one precision against another. All
//! bundles must make pictures of the same size. The context is chosen by each model itself, as the runtime does.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;

use super::ablation::{Variant, one_house, summary, table};
use super::report::write_atomically;
use super::visit::{Bench, CommonArgs};

/// Arguments of `eval compare`.
#[derive(clap::Args, Debug, Clone)]
pub struct CompareArgs {
    /// Bundles to compare.
    #[arg(required = true, value_name = "BUNDLE")]
    pub bundles: Vec<PathBuf>,
    /// Shared arguments.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Runs `eval compare`.
///
/// # Errors
/// A bundle or a file that cannot be used; bundles with pictures of different sizes.
pub fn run(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    if args.common.bundle.is_some() {
        bail!("--bundle has no place here: name all bundles one after another");
    }
    let benches = args
        .bundles
        .iter()
        .map(|b| Bench::new(&CommonArgs { bundle: Some(b.clone()), ..args.common.clone() }))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let size = |b: &Bench| (b.camera.width, b.camera.height);
    if let Some(other) = benches.iter().find(|b| size(b) != size(&benches[0])) {
        bail!(
            "bundles with pictures of {:?} and {:?} pixels cannot be compared",
            size(&benches[0]),
            size(other)
        );
    }
    let began = Instant::now();
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    for (path, bench) in args.bundles.iter().zip(&benches) {
        let spec = bench.pipeline.spec();
        let settings = spec.settings.clone();
        let examiner = bench.examiner(&args.common)?;
        let variants = [Variant::shipped(&settings, spec.context_max)];
        let lines =
            bench.each(&args.common, |tools, seed| one_house(bench, tools, &examiner, &variants, seed))?;
        eprintln!("{}: {} houses, {:.0} s", path.display(), lines.len(), began.elapsed().as_secs_f64());
        let manifest = bench.pipeline.bundle().manifest();
        let halves = if manifest.component.contains_key("denoiser_cached") { ", context kept" } else { "" };
        if rows.is_empty() {
            rows.push(("the true drive through the codec".to_owned(), Some(summary(&lines, "truth"))));
        }
        let figures = summary(&lines, "base");
        documents.push(serde_json::json!({
            "bundle": bench.pipeline.bundle().hash(),
            "path": path,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "context_kept": !halves.is_empty(),
            "figures": figures,
        }));
        let guidance = match settings.guidance {
            1.0 => "no CFG".to_owned(),
            w => format!("CFG {w}"),
        };
        let label = format!("{} ({} steps, {guidance}{halves})", path.display(), settings.steps);
        rows.push((label, Some(figures)));
    }
    let text = format!(
        "Bundles compared: {} houses ({}) from seed {}, {:.0} s. 95 % intervals in brackets; passes through the network and \
         milliseconds (median, with {} houses at a time) are those of one drive.\n\n{}",
        args.common.houses,
        args.common.difficulty,
        args.common.seed,
        began.elapsed().as_secs_f64(),
        args.common.jobs,
        table("bundle", &rows)
    );
    if let Some(path) = &args.common.markdown {
        write_atomically(path, text.as_bytes())?;
    }
    if args.common.json {
        let document = serde_json::json!({
            "houses": args.common.houses,
            "seed": args.common.seed,
            "difficulty": args.common.difficulty,
            "bundles": documents,
        });
        println!("{document}");
    } else {
        print!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}
