//! Draws one training sample as a picture: `cargo run --release -p mindseye-train --example sample -- CONFIG SEED OUT.png`.

use std::path::Path;

use mindseye_engines::model::codec::LinearCodec;
use mindseye_train::codec_fit::fit_codec;
use mindseye_train::config::TrainConfig;
use mindseye_train::data::{SEEN_SHARE, Source, Task};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (config, model) = TrainConfig::load(Path::new(&args[1])).expect("configuration");
    let difficulty = config.world().expect("difficulty");
    let codec = fit_codec(&model, &difficulty, config.seed, 3000);
    let decoder = LinearCodec::new(model.codec, codec.basis.clone(), codec.mean.clone()).expect("codec");
    let mut source = Source::new(&model, difficulty, Some(codec));
    let seed: u64 = args[2].parse().expect("seed");
    let (w, h) = (model.codec.width, model.codec.height);
    let zoom = 6;
    let tasks = [(Task::Ground, false), (Task::Ground, true), (Task::Navigate, false), (Task::Absent, true)];
    let rows = tasks.len();
    let (pw, ph) = (model.latents() * (w + 2) * zoom, rows * (h + 2) * 4 * zoom);
    let mut picture = vec![40u8; pw * ph * 3];
    for (row, (task, augment)) in tasks.into_iter().enumerate() {
        let s = source.sample(seed, task, augment);
        let tokens = model.dit.tokens_per_frame();
        println!(
            "{task:?} ids {:?} index {:?} object {} start {:?}",
            s.ids, s.context_index, s.object, s.map_from_start
        );
        for t in 0..model.latents() {
            let seen: Vec<f32> = s.seen.get(t * tokens..(t + 1) * tokens).unwrap_or_default().to_vec();
            let on = seen.iter().any(|v| *v >= SEEN_SHARE);
            println!("  {t}: pose {:.2?} locate {:.2?} seen {on} {:.2?}", s.pose[t], s.locate[t], seen);
            let n = model.codec.channels * tokens;
            let frames = decoder.decode_group(&s.latents[t * n..(t + 1) * n]);
            for k in 0..4 {
                for y in 0..h * zoom {
                    for x in 0..w * zoom {
                        for c in 0..3 {
                            let v = frames[((k * 3 + c) * h + y / zoom) * w + x / zoom];
                            let at = ((row * 4 + k) * (h + 2) * zoom + y) * pw + t * (w + 2) * zoom + x;
                            picture[at * 3 + c] = ((v + 1.0) * 127.5).clamp(0.0, 255.0) as u8;
                        }
                    }
                }
            }
        }
    }
    mindseye_base::picture::save_png(std::path::Path::new(&args[3]), pw, ph, &picture).expect("a picture");
}
