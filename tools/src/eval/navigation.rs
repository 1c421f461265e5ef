//! `eval navigation`: drives along given poses.
//!
//! * **PSNR, SSIM, LPIPS** of the imagined images against the true ones, beside two trivial answers: a copy of the first
//!   image, and for each pose the remembered image whose pose (oracle odometry) is nearest to it (metres plus radians).
//!   The drive of the video alone, the one that is held to what was seen, and what was seen, carried into the given views
//!   without a network, stand beside each other, by what is known of the remembered pictures in three dimensions: nothing
//!   (poses and depth are what the model reads in them), poses (by typical odometry), exact poses and true depth.
//! * **Following**: how far the imagined drive is from the poses that were given, at the last image of each latent, twice:
//!   by the model's own pose head, and by registering its images in the true house (see [`super::space`]), which the
//!   model has no say in. Registered true images say what registration itself is worth.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use mindseye::context::GROUP;
use mindseye::ground::Mind;
use mindseye::guide::{Carry, HeldMind};
use mindseye::image::RgbImage;
use mindseye::imagine::{
    Budget, ContextLatents, Flow, NoClock, Prompt, RolloutSettings, imagine, roll_out_held,
};
use mindseye::recall::{Recall, RecallView, poses_by_head, views_of};
use mindseye_bridge::geometry::planar_isometry;
use mindseye_bridge::time::TimeDelta;
use mindseye_world::{Frame, Pose2, random_drive_from, wrap_angle};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::grounding::{Regime, Told};
use super::picture::{Lpips, LpipsSession, motion, psnr, squared_difference, ssim};
use super::report::{Table, write_atomically};
use super::space::Space;
use super::stats::{Figure, mean, median};
use super::visit::{Bench, CommonArgs, Tools, Visit, picture, plain_pose, world_pose};

#[derive(Clone, Copy, Debug, Serialize)]
struct Likeness {
    psnr: f64,
    ssim: f64,
    lpips: Option<f64>,
}

/// Heading (degrees) and place (m) errors.
type Off = [f64; 2];

#[derive(Clone, Debug, Serialize)]
struct FollowedPath {
    house: u64,
    /// By the names in [`KINDS`]; those of carried pictures where the model reads depth.
    rows: BTreeMap<&'static str, Likeness>,
    /// Mean absolute difference of neighbouring images, 0..1: imagined and true.
    motion: [f64; 2],
    by_head: Vec<Off>,
    by_registration: Vec<Off>,
    registered_truth: Vec<Off>,
}

fn likeness(pairs: &[(&RgbImage, &RgbImage)], lpips: &mut Option<LpipsSession>) -> anyhow::Result<Likeness> {
    let n = pairs.len().max(1) as f64;
    let learned = match lpips {
        None => None,
        Some(l) => {
            let mut sum = 0.0;
            for (a, b) in pairs {
                sum += l.distance(a, b)?;
            }
            Some(sum / n)
        }
    };
    Ok(Likeness {
        psnr: psnr(pairs.iter().map(|(a, b)| squared_difference(a, b)).sum::<f64>() / n),
        ssim: pairs.iter().map(|(a, b)| ssim(a, b)).sum::<f64>() / n,
        lpips: learned,
    })
}

fn off(a: Pose2, b: Pose2) -> Off {
    [wrap_angle(a.yaw - b.yaw).abs().to_degrees(), a.distance(b)]
}

/// One house and its path. Long, since every kind of 3-D information is sampled and compared alike.
fn one(bench: &Bench, tools: &mut Tools, lpips: Option<&Lpips>, seed: u64) -> anyhow::Result<FollowedPath> {
    let camera = &bench.camera;
    let mut v = bench.visit(seed, tools.encoder.as_mut())?;
    let spec = tools.mind.spec().clone();
    let images = 1 + (spec.settings.target_latents - 1) * GROUP;
    let drive = random_drive_from(&v.house, &mut v.rng, v.here, images);
    let mount = spec.mounting.context("this model was not trained for one camera")?;
    let along: Vec<_> =
        drive.iter().map(|p| planar_isometry(plain_pose(v.here.relative(*p))) * mount).collect();
    let rays = tools.mind.camera_rays(&along, None)?;
    let null_text = tools.mind.encode_text("")?;
    let picks = mindseye::context::spread(v.memory.len(), spec.context_max);
    let seen = ContextLatents {
        index: picks.iter().map(|i| v.memory[*i].info.index).collect(),
        latents: picks.iter().flat_map(|i| v.memory[*i].latent.iter().copied()).collect(),
        first: tools.mind.encode_still(&v.newest)?,
    };
    let mut settings = spec.settings.clone();
    settings.candidates = 1;
    settings.seed = seed;
    let prompt = Prompt { text: &null_text, null_text: &null_text, camera: Some(&rays) };
    let budget = Budget { clock: &NoClock, until: None };
    let imagined = imagine(tools.mind.denoiser(), &seen, prompt, &settings, budget, &mut |_| Flow::Continue)?;
    let sampled = imagined.rollouts.first().context("no drive was sampled")?;
    let frames = tools.mind.decode(&sampled.latents)?;

    let mut frame = Frame::new();
    let truth: Vec<RgbImage> = drive.iter().map(|p| picture(&v.house, *p, camera, &mut frame)).collect();
    let nearest: Vec<&RgbImage> = drive
        .iter()
        .filter_map(|pose| {
            let cost = |p: Pose2| p.distance(*pose) + wrap_angle(p.yaw - pose.yaw).abs();
            let remembered =
                v.memory.iter().filter_map(|c| Some((world_pose(c.info.odom_from_base?), &c.picture)));
            remembered.min_by(|a, b| cost(a.0).total_cmp(&cost(b.0))).map(|(_, picture)| picture)
        })
        .collect();
    let mut lpips = lpips.map(Lpips::session).transpose()?;
    let mut compare = |ours: Vec<&RgbImage>| {
        let pairs: Vec<_> = ours.into_iter().zip(&truth[1..]).collect();
        likeness(&pairs, &mut lpips)
    };
    let mut rows = BTreeMap::from([
        ("model", compare(frames.iter().skip(GROUP).collect())?),
        ("copy_first", compare(vec![&v.newest; images - 1])?),
        ("nearest_remembered", compare(nearest.iter().skip(1).copied().collect())?),
    ]);
    for (known, [held, warp]) in Known::ALL {
        let Some(drives) = guided(bench, tools, &v, (known, seed), (&seen, prompt, &settings), &along)?
        else {
            break;
        };
        rows.insert(held, compare(drives.held.iter().skip(GROUP).collect())?);
        rows.insert(warp, compare(drives.carried.iter().collect())?);
    }

    // Where the drive went: at the last image of each latent.
    let ends: Vec<usize> = (1..spec.settings.target_latents).map(|k| GROUP * k).collect();
    let heads = &sampled.heads.pose[sampled.heads.context.min(sampled.heads.pose.len())..];
    let by_head = ends
        .iter()
        .zip(heads.iter().skip(1))
        .map(|(i, h)| {
            let [x, y, c, s] = h.map(f64::from);
            off(v.here.compose(Pose2::unwrapped(x, y, s.atan2(c))), drive[*i])
        })
        .collect();
    let mut space = Space::new(&v.house, camera);
    let coded = tools.coded_drive(&truth)?;
    let mut registered = |frames: &[RgbImage]| -> Vec<Off> {
        let images: Vec<&RgbImage> = frames.iter().skip(GROUP).collect();
        let poses = space.register(&images, Some(v.here), &[]);
        ends.iter().filter_map(|i| Some(off(*poses.get(i - 1)?, drive[*i]))).collect()
    };
    Ok(FollowedPath {
        house: seed,
        rows,
        motion: [motion(&frames[GROUP - 1..]), motion(&truth)],
        by_head,
        by_registration: registered(&frames),
        registered_truth: registered(&coded),
    })
}

/// What is known of remembered pictures beside themselves.
#[derive(Clone, Copy, PartialEq)]
enum Known {
    /// Nothing: poses are the pose head's, depth is the depth reader's.
    Pictures,
    /// Poses by typical odometry; depth is the depth reader's.
    Poses,
    /// Exact poses and true depth.
    PosesAndDepth,
}

impl Known {
    /// With the names of its rows: held, and carried alone.
    const ALL: [(Self, [&'static str; 2]); 3] = [
        (Self::Pictures, ["guided_pictures", "warp_pictures"]),
        (Self::Poses, ["guided", "warp"]),
        (Self::PosesAndDepth, ["guided_depth", "warp_depth"]),
    ];
}

/// A drive that was held to what was seen.
struct HeldDrive {
    /// As [`Mind::decode`] gives it.
    held: Vec<RgbImage>,
    /// What was carried alone, without the given first frame.
    carried: Vec<RgbImage>,
}

/// The drive held to what was seen; none where the model reads no depth.
fn guided(
    bench: &Bench,
    tools: &mut Tools,
    v: &Visit,
    (known, seed): (Known, u64),
    (seen, prompt, settings): (&ContextLatents, Prompt<'_>, &RolloutSettings),
    along: &[nalgebra::Isometry3<f64>],
) -> anyhow::Result<Option<HeldDrive>> {
    let spec = tools.mind.spec().clone();
    let (Some(mounting), Some(_)) = (spec.mounting, spec.detail) else { return Ok(None) };
    let regime = if known == Known::PosesAndDepth { Regime::Exact } else { Regime::Typical };
    let scene = Told::of(v, regime, seed).scene;
    let here = scene.odom_from_base.unwrap_or_default();
    let budget = Budget { clock: &NoClock, until: None };
    let mut views = if known == Known::Pictures {
        let memory = ContextLatents {
            index: scene.memory.iter().map(|c| c.info.index).collect(),
            latents: scene.memory.iter().flat_map(|c| c.latent.iter().copied()).collect(),
            first: seen.first.clone(),
        };
        let poses = poses_by_head(&mut tools.mind, &memory, prompt, settings, budget)?;
        let posed =
            scene.memory.iter().zip(poses).filter_map(|(c, pose)| {
                Some(RecallView { picture: c.detail.as_ref()?, here_from_base: pose? })
            });
        posed.collect()
    } else {
        views_of(&scene.memory, (scene.captured_at, here), here).0
    };
    views.push(RecallView { picture: &v.newest_detail, here_from_base: Default::default() });
    let error = if known == Known::PosesAndDepth { Some(0.0) } else { bench.true_depth };
    tools.mind.by.read_depth(error);
    tools.mind.by.learn_depth(&[v], &bench.camera);
    let Some(mut recall) = Recall::new(&mut tools.mind, &views, &mounting)? else { return Ok(None) };
    let carry = Carry::new(&mut recall, along, 0, None);
    let mut held = HeldMind { mind: &mut tools.mind, carry: &carry };
    let go_on = &mut |_: usize, _: &[f32]| Flow::Continue;
    let rollout = roll_out_held(&mut held, seen, prompt, settings, 0, (budget, TimeDelta(1)), go_on)?;
    let mut held = tools.mind.decode(&rollout.context("no drive was sampled")?.latents)?;
    carry.hold(&mut held, spec.box_min);
    Ok(Some(HeldDrive { held, carried: carry.pictures() }))
}

/// Ways to make images: name, what is known of the remembered ones in three dimensions, what it is.
const KINDS: [(&str, &str, &str); 9] = [
    ("model", "none", "the model, video only"),
    ("guided_pictures", "none", "the model, held to what was seen: its own poses and depth"),
    ("warp_pictures", "none", "what was carried alone, no network"),
    ("guided", "poses", "the model, held to what was seen: typical odometry, its own depth"),
    ("warp", "poses", "what was carried alone, no network"),
    ("guided_depth", "poses, depth", "the model, held to what was seen: exact poses, true depth"),
    ("warp_depth", "poses, depth", "what was carried alone, no network"),
    ("copy_first", "-", "copy of the first image"),
    ("nearest_remembered", "poses", "nearest remembered image (oracle poses)"),
];

/// Ways to say where images were taken, with their errors against the given poses.
type Way = (&'static str, &'static str, fn(&FollowedPath) -> &Vec<Off>);
const WAYS: [Way; 3] = [
    ("by_head", "the model, by its pose head", |d| &d.by_head),
    ("by_registration", "the model, its images registered in the true house", |d| &d.by_registration),
    ("registered_truth", "true images, registered (what the measure is worth)", |d| &d.registered_truth),
];

/// The figures of many paths.
struct Figures {
    /// PSNR over copying the first image (dB), in the order of [`KINDS`].
    gain_over_copy: [Figure; 9],
    gain_over_nearest: Figure,
    motion: Figure,
    /// PSNR (dB), SSIM and LPIPS in the order of [`KINDS`].
    likeness: [[Figure; 3]; 9],
    /// Heading (degrees) and place (m), medians over all latents and at the end, in the order of [`WAYS`].
    following: [[Figure; 4]; 3],
}

impl Figures {
    fn of(paths: &[FollowedPath]) -> Self {
        let of = |get: &dyn Fn(&FollowedPath) -> f64| mean(paths.iter().map(get));
        let gain = |name: &str, over: &str| {
            let psnr = |d: &FollowedPath, name: &str| Some(d.rows.get(name)?.psnr);
            mean(paths.iter().filter_map(|d| Some(psnr(d, name)? - psnr(d, over)?)))
        };
        Self {
            gain_over_copy: KINDS.map(|(name, ..)| gain(name, "copy_first")),
            gain_over_nearest: gain("model", "nearest_remembered"),
            motion: of(&|d| d.motion[0] / d.motion[1].max(1e-9)),
            likeness: KINDS.map(|(name, ..)| {
                let all = || paths.iter().filter_map(|d| d.rows.get(name));
                [
                    mean(all().map(|l| l.psnr)),
                    mean(all().map(|l| l.ssim)),
                    mean(all().filter_map(|l| l.lpips)),
                ]
            }),
            following: WAYS.map(|(_, _, get)| {
                let all = |k: usize| median(paths.iter().flat_map(get).map(|o| o[k]));
                let last = |k: usize| median(paths.iter().filter_map(|d| get(d).last()).map(|o| o[k]));
                [all(0), all(1), last(0), last(1)]
            }),
        }
    }

    fn markdown(&self, head: &str, lpips: bool) -> String {
        let mut text = head.to_owned();
        let head =
            ["images", "3-D information", "PSNR (dB)", "over copying the first image (dB)", "SSIM", "LPIPS"];
        let mut t = Table::new(&head);
        for (((_, known, what), [psnr, ssim, lpips]), gain) in
            KINDS.iter().zip(&self.likeness).zip(&self.gain_over_copy)
        {
            if psnr.n > 0 {
                let figures = [psnr.text(2), gain.text(2), ssim.text(3), lpips.text(3)];
                t.row([(*what).to_owned(), (*known).to_owned()].into_iter().chain(figures));
            }
        }
        text += &t.text();
        text += &format!(
            "\nVideo only: PSNR over the nearest remembered image {} dB, motion over true motion {}.\n\n",
            self.gain_over_nearest.text(2),
            self.motion.text(2)
        );
        let mut t = Table::new(&[
            "following the given poses",
            "heading, median (deg)",
            "position, median (m)",
            "heading at the end (deg)",
            "position at the end (m)",
        ]);
        for ((_, what, _), f) in WAYS.iter().zip(&self.following) {
            t.row([(*what).to_owned(), f[0].text(1), f[1].text(2), f[2].text(1), f[3].text(2)]);
        }
        text += &t.text();
        if !lpips {
            text += "\nLPIPS is left out: no weights were given (--lpips FILE).\n";
        }
        text
    }

    fn document(&self) -> Map<String, Value> {
        let likeness =
            |[psnr, ssim, lpips]: &[Figure; 3]| json!({"psnr_db": psnr, "ssim": ssim, "lpips": lpips});
        let following = |f: &[Figure; 4]| {
            json!({
                "heading_deg_median": f[0], "position_m_median": f[1],
                "end_heading_deg_median": f[2], "end_position_m_median": f[3],
            })
        };
        let rows: Map<String, Value> =
            KINDS.iter().zip(&self.likeness).map(|(k, f)| (k.0.to_owned(), likeness(f))).collect();
        let ways: Map<String, Value> =
            WAYS.iter().zip(&self.following).map(|(w, f)| (w.0.to_owned(), following(f))).collect();
        let at = |name: &str| KINDS.iter().position(|kind| kind.0 == name).unwrap_or(0);
        let psnr = |name: &str| self.likeness[at(name)][0];
        let document = json!({
            "psnr_db": psnr("model"),
            "psnr_copy_first_db": psnr("copy_first"),
            "psnr_nearest_context_db": psnr("nearest_remembered"),
            "gain_over_copy_first_db": self.gain_over_copy[at("model")],
            "guided_gain_over_copy_first_db": self.gain_over_copy[at("guided")],
            "warp_gain_over_copy_first_db": self.gain_over_copy[at("warp")],
            "gain_over_nearest_context_db": self.gain_over_nearest,
            "motion_over_true_motion": self.motion,
            "rows": rows,
            "following": ways,
        });
        match document {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}

/// Runs `eval navigation`.
///
/// # Errors
/// A bundle or a file that cannot be used; a model that takes no poses.
pub fn run(args: &CommonArgs) -> anyhow::Result<ExitCode> {
    let bench = Bench::new(args)?;
    let lpips = args.lpips.as_deref().map(Lpips::open).transpose()?;
    let began = Instant::now();
    let paths = bench.each(args, |tools, seed| one(&bench, tools, lpips.as_ref(), seed))?;
    let figures = Figures::of(&paths);
    let seconds = began.elapsed().as_secs_f64();
    let bundle = bench.pipeline.bundle().hash();
    let head = format!(
        "Navigation: {} houses ({}) from seed {}, bundle {bundle}, {seconds:.0} s. 95 % intervals in brackets.\n\n",
        args.houses, args.difficulty, args.seed
    );
    let text = figures.markdown(&head, lpips.is_some());
    if let Some(path) = &args.markdown {
        write_atomically(path, text.as_bytes())?;
    }
    if args.json {
        let mut document = figures.document();
        document.insert("bundle".into(), bundle.into());
        document.insert("houses".into(), args.houses.into());
        document.insert("seed".into(), args.seed.into());
        document.insert("difficulty".into(), args.difficulty.clone().into());
        document
            .insert("lpips".into(), if lpips.is_some() { "given" } else { "left out: no --lpips" }.into());
        document.insert("seconds".into(), seconds.into());
        document.insert("drives".into(), serde_json::to_value(&paths)?);
        println!("{}", Value::Object(document));
    } else {
        print!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likeness_by_hand() -> anyhow::Result<()> {
        let flat = |v: u8| RgbImage::filled(8, 8, [v; 3]);
        let (a, b, c) = (flat(100), flat(110), flat(130));
        // Mean squares of 100 and 900: 500; 10 log10(255^2 / 500) = 21.14 dB.
        let l = likeness(&[(&a, &b), (&a, &c)], &mut None)?;
        assert!((l.psnr - 21.141).abs() < 1e-3 && l.lpips.is_none(), "{l:?}");
        assert!(l.ssim < 1.0 && l.ssim > 0.9, "only the brightness differs: {l:?}");
        assert_eq!(likeness(&[(&a, &a)], &mut None)?.psnr, 60.0);
        Ok(())
    }

    #[test]
    fn errors_are_short_turns_and_straight_distances() {
        let a = Pose2::new(0.0, 0.0, 175f64.to_radians());
        let [turn, far] = off(a, Pose2::new(3.0, 4.0, -175f64.to_radians()));
        assert!((turn - 10.0).abs() < 1e-9 && (far - 5.0).abs() < 1e-12, "{turn} {far}");
    }

    #[test]
    fn figures_are_means_of_gains_and_medians_of_errors() {
        let like = |psnr: f64| Likeness { psnr, ssim: psnr / 100.0, lpips: None };
        let path = |model: f64, copy: f64, nearest: f64, motion: [f64; 2], head: [f64; 3]| FollowedPath {
            house: 0,
            rows: BTreeMap::from([
                ("model", like(model)),
                ("guided", like(model + 5.0)),
                ("copy_first", like(copy)),
                ("nearest_remembered", like(nearest)),
            ]),
            motion,
            by_head: head.map(|h| [h, h / 10.0]).to_vec(),
            by_registration: Vec::new(),
            registered_truth: vec![[1.0, 0.5]],
        };
        let paths = [
            path(20.0, 14.0, 19.0, [0.2, 0.4], [1.0, 2.0, 9.0]),
            path(22.0, 18.0, 23.0, [0.3, 0.2], [3.0, 4.0, 7.0]),
        ];
        let f = Figures::of(&paths);
        assert_eq!((f.gain_over_copy[0].value, f.gain_over_nearest.value), (5.0, 0.0));
        // The third row of carried pictures is not there.
        assert_eq!((f.gain_over_copy[3].value, f.gain_over_copy[4].n), (10.0, 0));
        assert_eq!((f.likeness[0][0].value, f.likeness[7][0].value), (21.0, 16.0));
        assert!((f.motion.value - 1.0).abs() < 1e-12, "{:?}", f.motion);
        // 1, 2, 3, 4, 7, 9: the upper middle is 4; at the ends 7 and 9: 9.
        let [heading, position, end_heading, end_position] = f.following[0];
        assert_eq!((heading.value, position.value), (4.0, 0.4));
        assert_eq!((end_heading.value, end_position.value), (9.0, 0.9));
        assert_eq!((f.following[1][0].n, f.following[2][1].value), (0, 0.5));
        let document = f.document();
        assert_eq!(document["gain_over_copy_first_db"]["value"], 5.0);
        assert_eq!(document["rows"]["model"]["psnr_db"]["value"], 21.0);
        assert_eq!(document["following"]["by_head"]["end_heading_deg_median"]["value"], 9.0);
        let text = f.markdown("", false);
        assert!(text.contains("LPIPS is left out") && text.contains("| poses | 26.00"), "{text}");
    }
}
