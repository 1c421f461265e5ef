//! The picture of a training run: `metrics.jsonl` drawn as `curve.png`.

use std::fs;
use std::io;
use std::path::Path;

use mindseye_base::picture::save_png;
use mindseye_world::draw::{Canvas, text_width};
use serde_json::Value;

use crate::error::TrainError;

/// Name of the metrics file in a run's directory.
pub const METRICS: &str = "metrics.jsonl";
/// Name of the picture in a run's directory.
pub const CURVE: &str = "curve.png";

const INK: [u8; 3] = [44, 46, 54];
const FADED: [u8; 3] = [120, 122, 130];
const GRID: [u8; 3] = [222, 222, 226];
const PAPER: [u8; 3] = [252, 252, 250];
/// Colours that stay apart for most eyes (Okabe and Ito, 2008), and a dark one.
const COLOURS: [[u8; 3]; 7] = [
    [44, 46, 54],
    [0, 114, 178],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [230, 159, 0],
    [86, 180, 233],
];

/// A quantity over steps: name in the legend, place in a line of the metrics file.
struct Series {
    name: &'static str,
    pointer: &'static str,
}

struct Panel {
    title: &'static str,
    /// Logarithmic values.
    log: bool,
    /// Fixed range of values, if any.
    range: Option<(f64, f64)>,
    series: &'static [Series],
}

const fn series(name: &'static str, pointer: &'static str) -> Series {
    Series { name, pointer }
}

const PANELS: [Panel; 4] = [
    Panel {
        title: "Training losses (log scale)",
        log: true,
        range: None,
        series: &[
            series("total", "/losses/total"),
            series("video", "/losses/video"),
            series("mask", "/losses/mask"),
            series("context pose", "/losses/context_pose"),
            series("target pose", "/losses/target_pose"),
            series("place", "/losses/locate"),
            series("attributes", "/losses/attributes"),
        ],
    },
    Panel {
        title: "Unseen houses: median heading error (degrees)",
        log: false,
        range: None,
        series: &[
            series("mask and poses", "/eval/mask_yaw_deg"),
            series("pose head", "/eval/head_yaw_deg"),
            series("context poses", "/eval/context_yaw_deg"),
        ],
    },
    Panel {
        title: "Unseen houses: median position error (m)",
        log: false,
        range: None,
        series: &[
            series("mask and poses", "/eval/mask_position_m"),
            series("pose head", "/eval/head_position_m"),
        ],
    },
    Panel {
        title: "Unseen houses: shares",
        log: false,
        range: Some((0.0, 1.0)),
        series: &[
            series("mask < 25 deg", "/eval/mask_within_25"),
            series("head < 25 deg", "/eval/head_within_25"),
            series("absent AUC", "/eval/absent_auc"),
        ],
    },
];

/// Draws `metrics.jsonl` of a run's directory as `curve.png` beside it: losses over steps, and errors on unseen
/// houses. Values that are no numbers are left out, and so is an unfinished last line. Without any metrics nothing
/// is written.
///
/// # Errors
/// A line that is not JSON or has no step, a file that cannot be read or written.
pub fn plot(dir: &Path) -> Result<(), TrainError> {
    plot_to(dir, &dir.join(CURVE))
}

/// [`plot`] with the picture somewhere else.
///
/// # Errors
/// As [`plot`].
pub fn plot_to(dir: &Path, out: &Path) -> Result<(), TrainError> {
    let metrics = dir.join(METRICS);
    let failed = |path: &Path, source: io::Error| TrainError::Io { path: path.to_path_buf(), source };
    let text = match fs::read_to_string(&metrics) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(&metrics, e)),
    };
    let mut lines: Vec<(f64, Value)> = Vec::new();
    for (k, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let at = k + 1;
        match serde_json::from_str::<Value>(line) {
            Ok(value) => match value.pointer("/step").and_then(Value::as_f64) {
                Some(step) => lines.push((step, value)),
                None => return Err(TrainError::NoStep { path: metrics, line: at }),
            },
            // A run under way may be writing its last line.
            Err(_) if !text.ends_with('\n') && at == text.lines().count() => {}
            Err(source) => return Err(TrainError::Metrics { path: metrics, line: at, source }),
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    let name =
        fs::canonicalize(dir).ok().and_then(|d| d.file_name().map(|n| n.to_string_lossy().into_owned()));
    let canvas = draw(&lines, &name.unwrap_or_default());
    save_png(out, canvas.width, canvas.height, &canvas.rgb).map_err(|e| failed(out, e))
}

fn draw(lines: &[(f64, Value)], name: &str) -> Canvas {
    const PANEL: (usize, usize) = (800, 480);
    const HEAD: usize = 56;
    let mut canvas = Canvas::new(2 * PANEL.0, HEAD + 2 * PANEL.1, PAPER);
    let last = &lines[lines.len() - 1];
    let end = canvas.text(24, 20, name, 3, INK);
    let facts = format!("step {}", last.0);
    let end = canvas.text(end + 12, 26, &facts, 2, FADED);
    if let Some(lr) = last.1.pointer("/lr").and_then(Value::as_f64) {
        canvas.text(end, 26, &format!(", learning rate {lr:.2e}"), 2, FADED);
    }
    let steps = lines.iter().map(|l| l.0).fold(1.0, f64::max);
    for (k, panel) in PANELS.iter().enumerate() {
        let corner = ((k % 2) * PANEL.0, HEAD + (k / 2) * PANEL.1);
        draw_panel(&mut canvas, corner, PANEL, panel, lines, steps);
    }
    canvas
}

/// The finite values of a series; positive ones for a logarithmic axis. More than `bins` are averaged in groups.
fn values(lines: &[(f64, Value)], series: &Series, log: bool, bins: usize) -> Vec<(f64, f64)> {
    let all: Vec<(f64, f64)> = lines
        .iter()
        .filter_map(|(step, line)| Some((*step, line.pointer(series.pointer)?.as_f64()?)))
        .filter(|(_, v)| v.is_finite() && (!log || *v > 0.0))
        .collect();
    all.chunks(all.len().div_ceil(bins).max(1))
        .map(|c| {
            let n = c.len() as f64;
            (c.iter().map(|p| p.0).sum::<f64>() / n, c.iter().map(|p| p.1).sum::<f64>() / n)
        })
        .collect()
}

fn draw_panel(
    canvas: &mut Canvas,
    corner: (usize, usize),
    size: (usize, usize),
    panel: &Panel,
    lines: &[(f64, Value)],
    steps: f64,
) {
    const LEGEND: usize = 230;
    let (x0, y0) = ((corner.0 + 84) as f32, (corner.1 + 44) as f32);
    let (x1, y1) = ((corner.0 + size.0 - LEGEND) as f32, (corner.1 + size.1 - 56) as f32);
    canvas.text(corner.0 as i64 + 84, corner.1 as i64 + 14, panel.title, 2, INK);
    let curves: Vec<Vec<(f64, f64)>> =
        panel.series.iter().map(|s| values(lines, s, panel.log, 400)).collect();
    let bounds =
        curves.iter().flatten().fold((f64::INFINITY, f64::NEG_INFINITY), |b, p| (b.0.min(p.1), b.1.max(p.1)));
    let empty = bounds.0 > bounds.1;
    let (low, high) = match panel.range {
        Some(range) => range,
        None if empty && panel.log => (0.1, 1.0),
        None if empty => (0.0, 1.0),
        None if panel.log => {
            let (a, b) = (bounds.0.log10().floor(), bounds.1.log10().ceil());
            (10f64.powf(a), 10f64.powf(if b > a { b } else { a + 1.0 }))
        }
        None => (0.0, if bounds.1 > 0.0 { bounds.1 * 1.05 } else { 1.0 }),
    };
    let place = |step: f64, value: f64| {
        let k = if panel.log {
            (value.log10() - low.log10()) / (high.log10() - low.log10())
        } else {
            (value - low) / (high - low)
        };
        (x0 + (x1 - x0) * (step / steps) as f32, y1 - (y1 - y0) * k.clamp(0.0, 1.0) as f32)
    };
    // Grid and numbers.
    for value in if panel.log { decades(low, high) } else { ticks(low, high, 6) } {
        let y = place(0.0, value).1;
        let whole = !panel.log || (value.log10() - value.log10().round()).abs() < 1e-9;
        canvas.line((x0, y), (x1, y), 1.0, GRID);
        if whole {
            let text = number(value);
            canvas.text(x0 as i64 - 10 - text_width(&text, 2) as i64, y as i64 - 7, &text, 2, FADED);
        }
    }
    for step in ticks(0.0, steps, 5) {
        let x = place(step, high).0;
        canvas.line((x, y0), (x, y1), 1.0, GRID);
        let text = count(step);
        canvas.text(x as i64 - text_width(&text, 2) as i64 / 2, y1 as i64 + 10, &text, 2, FADED);
    }
    canvas.line((x0, y0), (x0, y1), 2.0, FADED);
    canvas.line((x0, y1), (x1, y1), 2.0, FADED);
    canvas.text((x1 as i64) - 24, y1 as i64 + 30, "step", 2, FADED);
    if empty {
        canvas.text(x0 as i64 + 20, ((y0 + y1) * 0.5) as i64 - 8, "nothing measured yet", 2, FADED);
        return;
    }
    // Curves and legend with the last values; the first series lies on top.
    for (k, curve) in curves.iter().enumerate().rev() {
        let colour = COLOURS[k % COLOURS.len()];
        let points: Vec<(f32, f32)> = curve.iter().map(|p| place(p.0, p.1)).collect();
        canvas.polyline(&points, if k == 0 { 3.0 } else { 2.0 }, colour);
        if points.len() <= 40 {
            for p in &points {
                canvas.disc(*p, 3.5, colour);
            }
        }
    }
    for (k, (series, curve)) in panel.series.iter().zip(&curves).enumerate() {
        let (x, y) = (x1 + 14.0, y0 + 12.0 + 46.0 * k as f32);
        canvas.line((x, y), (x + 18.0, y), 4.0, COLOURS[k % COLOURS.len()]);
        canvas.text(x as i64 + 26, y as i64 - 7, series.name, 2, INK);
        if let Some(p) = curve.last() {
            canvas.text(x as i64 + 26, y as i64 + 12, &number(p.1), 2, FADED);
        }
    }
}

/// Round values inside a range, about `count` of them.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return Vec::new();
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|k| k * power).find(|s| *s >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last.min(first + 50)).map(|k| k as f64 * step).collect()
}

/// 1, 2 and 5 times the powers of ten inside a range.
fn decades(low: f64, high: f64) -> Vec<f64> {
    let (a, b) = (low.log10().round() as i32, high.log10().round() as i32);
    (a..=b.min(a + 30))
        .flat_map(|p| [1.0, 2.0, 5.0].map(|k| k * 10f64.powi(p)))
        .filter(|v| *v <= high * 1.000_001)
        .collect()
}

/// A value with three significant digits.
fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-4..1e6).contains(&size) {
        return format!("{value:.1e}");
    }
    let digits = (2 - size.log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A number of steps.
fn count(value: f64) -> String {
    if value >= 10_000.0 { format!("{}k", number(value / 1000.0)) } else { number(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_ticks() {
        let check = |low: f64, high: f64, count: usize, wanted: &[f64]| {
            let got = ticks(low, high, count);
            assert_eq!(got.len(), wanted.len(), "{low}..{high}: {got:?}");
            assert!(got.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-9), "{low}..{high}: {got:?}");
        };
        check(0.0, 1.0, 5, &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        check(0.0, 1000.0, 5, &[0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
        check(0.0, 37.0, 6, &[0.0, 10.0, 20.0, 30.0]);
        check(0.0, 0.0, 6, &[]);
        check(0.0, f64::NAN, 6, &[]);
    }

    #[test]
    fn three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (12.190_195, "12.2"),
            (0.188_2, "0.188"),
            (950.0, "950"),
            (0.5, "0.5"),
            (1e-7, "1.0e-7"),
        ] {
            assert_eq!(number(value), text);
        }
        assert_eq!(count(25_000.0), "25k");
    }

    #[test]
    fn a_run_becomes_a_picture() {
        let dir = tempfile::tempdir().unwrap();
        let curve = dir.path().join(CURVE);
        plot(dir.path()).unwrap();
        assert!(!curve.exists(), "no metrics, no picture");
        let line = |step: u32, total: &str, eval: &str| {
            format!("{{\"step\":{step},\"losses\":{{\"total\":{total},\"video\":0.1}}{eval}}}\n")
        };
        let eval = ",\"eval\":{\"mask_yaw_deg\":12.0,\"head_yaw_deg\":null,\"absent_auc\":0.9}";
        let good = [line(50, "10.0", ""), line(100, "null", eval), line(150, "2.5", eval)].concat();
        for (text, wanted) in [
            (good.clone(), Ok(())),
            (format!("{good}{{\"step\":2"), Ok(())),
            (format!("{good}nonsense\n"), Err("line 4")),
            (format!("{{}}\n{good}"), Err("line 1: no step")),
        ] {
            fs::write(dir.path().join(METRICS), &text).unwrap();
            let _ = fs::remove_file(&curve);
            match (plot(dir.path()), wanted) {
                (Ok(()), Ok(())) => {
                    let reader = png::Decoder::new(io::BufReader::new(fs::File::open(&curve).unwrap()));
                    let mut reader = reader.read_info().unwrap();
                    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
                    let info = reader.next_frame(&mut rgb).unwrap();
                    assert_eq!((info.width, info.height), (1600, 1016));
                    // Curves are drawn: the heading panel has ink of its first colour inside the axes.
                    let inked = rgb.chunks_exact(3).filter(|p| *p == COLOURS[1]).count();
                    assert!(inked > 100, "{inked} pixels of the video loss");
                }
                (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{e}"),
                (got, _) => panic!("{text:?}: {got:?}"),
            }
        }
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert!(!left.iter().any(|n| n.to_string_lossy().ends_with(".tmp")), "{left:?}");
    }
}
