//! The figures as Markdown tables, and the sheet of pictures.

use std::path::Path;

use anyhow::Context;
use mindseye::context::GROUP;
use mindseye::image::RgbImage;
use mindseye_world::draw::Canvas;

use super::adds;
use super::figures::{Figures, Part, PoseRow, Rulers, Summary};
use super::goal::{Outcome, SheetRow};
use crate::eval::report::Table;
use crate::eval::stats::Figure;
use crate::eval::visit::Bench;

/// All tables. `lpips`: whether weights were given; `examiner_secs`: time to train or read the examiner (s).
pub(super) fn markdown(head: &str, figures: &Figures, lpips: bool, examiner_secs: f64) -> String {
    let mut text = head.to_owned();
    text += &drives_table(&figures.rows, lpips);
    if let Some(rulers) = &figures.rulers {
        text += "\n";
        text += &rulers_table(rulers);
    }
    text += "\n";
    text += &poses_table(&figures.poses);
    text += "\n";
    let mut t = Table::new(&["gate", "value"]);
    for (name, figure) in &figures.gate {
        t.row([name.replace('_', " "), figure.text(3)]);
    }
    text += &t.text();
    text += "\n";
    text += &adds::table(&figures.added);
    text += "\n";
    text += &parts_table(&figures.parts);
    if let Some(q) = figures.examiner {
        text += &format!(
            "\nExaminer ({:.0} s to train it, or to read it from where it is kept): depth of true coded pictures off by \
             {:.1} % (median, {} pictures), colour and shape of true boxed things named rightly {:.3} ({} things); SD \
             tells a true drive in another house from one in this house with AUC {}.\n",
            examiner_secs,
            100.0 * q.depth_relative_median,
            q.pictures,
            q.named,
            q.things,
            figures.sd_tells_rooms_apart.text(3)
        );
    }
    if !lpips {
        text += "\nLPIPS is left out: no weights were given (--lpips FILE).\n";
    }
    text
}

fn rulers_table(r: &Rulers) -> String {
    let mut t = Table::new(&["what SD is worth", "value"]);
    let rows: [(&str, Figure, usize); 9] = [
        ("SD of the model: largest over its pictures (m)", r.sd_m, 3),
        ("the same, mean over its pictures (m)", r.sd_mean_m, 3),
        ("SD of the true drive, blurred to the model's PSNR (m)", r.blurred_sd_m, 3),
        ("SD of the true drive, with noise to the model's PSNR (m)", r.noisy_sd_m, 3),
        ("model less blurred true drive (m)", r.over_blurred_m, 3),
        ("model less noisy true drive (m)", r.over_noisy_m, 3),
        ("video only: pictures off the path that is claimed (m)", r.off_path_m, 3),
        ("IF(SD<0.1) of the model", r.followed_sd_0_1, 2),
        ("IF(SD<0.1) of the true drive through the codec (ceiling)", r.followed_sd_0_1_ceiling, 2),
    ];
    for (what, figure, digits) in rows {
        t.row([what.to_owned(), figure.text(digits)]);
    }
    t.text()
}

fn poses_table(poses: &[PoseRow]) -> String {
    let mut t = Table::new(&[
        "goal pose read from",
        "heading, median (deg)",
        "within 15 deg",
        "within 25 deg",
        "position, median (m)",
    ]);
    for r in poses {
        t.row([
            r.from.to_owned(),
            r.heading_deg_median.text(1),
            r.within_15_deg.text(3),
            r.within_25_deg.text(3),
            r.position_m_median.text(3),
        ]);
    }
    t.text()
}

fn parts_table(parts: &[Part]) -> String {
    let mut t = Table::new(&[
        "goals",
        "n",
        "pose given",
        "path free",
        "IF",
        "IF(SD<0.2)",
        "SD (m)",
        "heading (deg)",
        "position (m)",
        "arrival",
    ]);
    for p in parts {
        t.row([
            p.of.clone(),
            p.instruction_followed.n.to_string(),
            p.found.text(2),
            p.path_free.text(2),
            p.instruction_followed.text(2),
            p.followed_sd_0_2.text(2),
            p.sd_m.text(3),
            p.heading_deg_median.text(1),
            p.position_m_median.text(2),
            p.arrived.text(2),
        ]);
    }
    t.text()
}

fn drives_table(rows: &[(&str, &str, Summary)], lpips: bool) -> String {
    type Column = (&'static str, fn(&Summary) -> Figure, usize);
    let mut columns: Vec<Column> = vec![
        ("SD (m)", |s| s.scores.sd_m, 3),
        ("mean", |s| s.scores.sd_mean_m, 3),
        ("IF", |s| s.scores.instruction_followed, 2),
        ("IF(SD<0.2)", |s| s.scores.followed_sd_0_2, 2),
        ("IF(SD<0.1)", |s| s.scores.followed_sd_0_1, 2),
        ("in place", |s| s.scores.in_place, 2),
        ("named", |s| s.scores.named, 2),
        ("boxed", |s| s.scores.box_centred, 2),
        ("nearest view", |s| s.scores.nearest_view, 2),
        ("PSNR (dB)", |s| s.scores.psnr_db, 1),
        ("PSNR along its own way (dB)", |s| s.own_way_psnr_db, 1),
        ("worst picture (dB)", |s| s.own_way_worst_db, 1),
        ("SSIM", |s| s.scores.ssim, 2),
        ("DD", |s| s.dynamic_degree, 2),
        ("heading (deg)", |s| s.heading_deg_median, 1),
        ("position (m)", |s| s.position_m_median, 2),
        ("pose given", |s| s.found, 2),
        ("arrival", |s| s.arrived, 2),
        ("within 1.2 m", |s| s.arrived_within_1_2_m, 2),
        ("SPL", |s| s.spl, 2),
    ];
    if lpips {
        columns.insert(11, ("LPIPS", |s| s.scores.lpips, 3));
    }
    let mut head = vec!["drive"];
    head.extend(columns.iter().map(|c| c.0));
    let mut t = Table::new(&head);
    for (_, what, s) in rows {
        let mut cells = vec![(*what).to_owned()];
        cells.extend(columns.iter().map(|(_, get, digits)| get(s).text(*digits)));
        t.row(cells);
    }
    t.text()
}

/// First pictures, every other imagined picture, and beneath each what the house shows from where it claims to be taken; at
/// the right the last picture of the true drive. For the first houses.
pub(super) fn sheet(path: &Path, results: &[(Outcome, SheetRow)], bench: &Bench) -> anyhow::Result<()> {
    let (w, h) = (bench.camera.width, bench.camera.height);
    let zoom = (120 / w.max(1)).max(1);
    let shown = results.len().min(16);
    let imagined =
        results.iter().map(|r| r.1.frames.len().saturating_sub(GROUP).div_ceil(2)).max().unwrap_or(0);
    let columns = 2 + imagined;
    let (cw, ch) = (w * zoom + 4, 2 * (h * zoom + 4) + 20);
    let mut canvas = Canvas::new(columns * cw + 24, shown * ch + 24, [24, 24, 28]);
    let title = "first picture, imagined drive (every second picture), end of the true drive; beneath: the house from there";
    canvas.text(8, 4, title, 1, [160, 160, 160]);
    for (row, (o, s)) in results.iter().take(shown).enumerate() {
        let y = (row * ch + 36) as i64;
        let verdict = o.rows.get("model").and_then(|r| r.verdict).unwrap_or_default();
        let yes = |b: bool| if b { "yes" } else { "no" };
        let title = format!(
            "{} {}: {:?}, IF {}, in place {}, named {}{}{}",
            o.house,
            o.goal,
            o.status,
            yes(verdict.followed),
            yes(verdict.in_place),
            yes(verdict.named),
            verdict.sd.map_or_else(String::new, |sd| format!(", SD {sd:.2} m")),
            o.answer.map_or_else(String::new, |[deg, m]| format!(", answer off {deg:.0} deg, {m:.2} m")),
        );
        canvas.text(8, y - 16, &title, 2, [230, 230, 230]);
        let mut put = |column: usize, down: usize, picture: &RgbImage| {
            let (x, y) = ((8 + column * cw) as i64, y + (down * (h * zoom + 4)) as i64);
            canvas.blit_scaled(x, y, w * zoom, h * zoom, (&picture.data, picture.width));
        };
        put(0, 0, &s.newest);
        for (i, f) in s.frames.iter().skip(GROUP + 1).step_by(2).enumerate() {
            put(i + 1, 0, f);
        }
        for (i, f) in s.house.iter().skip(2).step_by(2).enumerate() {
            put(i + 1, 1, f);
        }
        if let Some(last) = s.truth.last() {
            put(columns - 1, 0, last);
        }
    }
    let (cw, ch) = (canvas.width, canvas.height);
    let image = RgbImage { width: cw, height: ch, data: canvas.rgb };
    image.save_png(path).with_context(|| path.display().to_string())
}
