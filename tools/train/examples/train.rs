//! Trains a configuration into a directory: `cargo run --release -p mindseye-train --example train -- CONFIG OUT`.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use mindseye_train::config::TrainConfig;
use mindseye_train::error::TrainError;
use mindseye_train::trainer::Trainer;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, config, out] = args.as_slice() else {
        eprintln!("usage: train CONFIG OUT");
        std::process::exit(2);
    };
    let result = TrainConfig::load(Path::new(config)).map_err(TrainError::from).and_then(|(config, model)| {
        let mut trainer = Trainer::open(config, model, Path::new(out))?;
        trainer.run(&AtomicBool::new(false), |m, speed| {
            let rate = speed.samples_per_sec;
            let l = &m.losses;
            println!(
                "{:6} {:8} {rate:6.1}/s total {:.3} video {:.4} mask {:.3} ctx {:.3} tgt {:.3} loc {:.3} attr {:.3} norm {:.2} {}",
                m.step, m.samples, l.total, l.video, l.mask, l.context_pose, l.target_pose, l.locate,
                l.attributes, m.grad_norm,
                m.eval.map_or_else(String::new, |e| format!("{e:.2?}")),
            );
        })
    });
    if let Err(e) = result {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}
