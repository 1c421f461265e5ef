//! The report: every house a row that opens, in one file without a script.

use std::fmt::Write as _;
use std::path::Path;

use mindseye::image::RgbImage;
use mindseye::view::{data_url, still_page};
use mindseye_world::draw::Canvas;
use mindseye_world::{MapView, draw_path, draw_pose, draw_robot, top_down_named};
use serde_json::Value;

use super::goal::{Case, MapSheet, Outcome, SheetRow};
use crate::eval::report::write_atomically;

const TRUTH: [u8; 3] = [30, 150, 80];
const IMAGINED: [u8; 3] = [214, 40, 57];
const ROBOT: [u8; 3] = [24, 100, 200];

const STYLE: &str = "main { display: block; max-width: 72rem; margin: auto; } .strip { flex-wrap: wrap; }
summary span { display: inline-block; min-width: 7.5rem; margin-right: .6rem; } summary .good { color: var(--goal); }
summary .bad { color: var(--thing); } img { display: block; max-width: 100%; image-rendering: pixelated; border-radius: .3rem; }
img.frames { height: 4rem; max-width: none; } .scroll { overflow-x: auto; margin-bottom: .5rem; }
td:last-child { text-align: left; overflow-wrap: anywhere; } td:first-child { width: 14rem; vertical-align: top; }";

/// A text as HTML shows it.
fn text(raw: &str) -> String {
    raw.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The house from above with the imagined way, the answer and the truth.
pub(super) fn map(case: &Case<'_>, sheet: &MapSheet) -> RgbImage {
    let view = MapView::fit(case.house, 480, 360);
    let mut canvas = Canvas::new(480, 360, [250, 249, 246]);
    top_down_named(case.house, &view, &mut canvas, 1);
    draw_robot(&view, &mut canvas, case.here, ROBOT);
    draw_path(&view, &mut canvas, &sheet.path, 0, IMAGINED);
    for (pose, colour) in [(case.truth, TRUTH), (sheet.answer, IMAGINED)] {
        if let Some(pose) = pose {
            draw_pose(&view, &mut canvas, pose, 0.5, colour);
        }
    }
    RgbImage { width: canvas.width, height: canvas.height, data: canvas.rgb }
}

fn picture(image: &RgbImage, class: &str, what: &str) -> String {
    let url = data_url("png", &image.to_png().unwrap_or_default());
    format!("<img class=\"{class}\" alt=\"{}\" src=\"{url}\">", text(what))
}

/// Pictures of one size side by side.
fn strip(frames: &[RgbImage], what: &str) -> String {
    let Some(first) = frames.first() else { return String::new() };
    let mut all = RgbImage::filled(first.width * frames.len(), first.height, [0; 3]);
    for (i, frame) in frames.iter().enumerate() {
        all.paste_scaled(frame, i * first.width, 0, 1);
    }
    format!("<h3>{}</h3><div class=\"scroll\">{}</div>", text(what), picture(&all, "frames", what))
}

/// One fact a row; what holds others is written as it is in JSON.
fn facts(outcome: &Outcome) -> String {
    let Ok(Value::Object(all)) = serde_json::to_value(outcome) else { return String::new() };
    let row = |(name, value): (String, Value)| {
        let said = if let Value::String(said) = value { said } else { value.to_string() };
        format!("<tr><td>{}</td><td>{}</td></tr>", text(&name.replace('_', " ")), text(&said))
    };
    all.into_iter().filter(|(_, value)| !value.is_null()).map(row).collect()
}

fn house(out: &mut String, outcome: &Outcome, sheet: &SheetRow) {
    let number = |v: Option<f64>, unit: &str, digits: usize| {
        v.map_or_else(|| "&ndash;".to_owned(), |v| format!("{v:.digits$} {unit}"))
    };
    let arrived =
        outcome.rows.get("model").and_then(|row| row.reached).is_some_and(|reached| reached.arrived);
    let kind = if arrived { "good" } else { "bad" };
    let _ = write!(
        out,
        "<details><summary><span>house {}</span><span>{}</span><span class=\"{kind}\">{}, {}</span><span>{}, {}</span>\
         <span>consistency {}</span></summary>",
        outcome.house,
        text(&outcome.goal),
        outcome.status,
        if arrived { "arrived" } else { "not arrived" },
        number(outcome.answer.map(|a| a[1]), "m", 2),
        number(outcome.answer.map(|a| a[0]), "degrees off", 0),
        number(outcome.consistency, "", 2),
    );
    if let Some(reason) = &outcome.reason {
        let _ = write!(out, "<p>{}</p>", text(reason));
    }
    *out += &strip(&sheet.frames, "The drive that was imagined");
    *out += &strip(&sheet.truth, "The true drive to it");
    if let Some(map) = &sheet.map {
        *out +=
            "<h3>From above: red the imagined way and the answer, green the true goal, blue the robot</h3>";
        *out += &picture(map, "map", "The house from above");
    }
    let _ = write!(out, "<h3>All figures</h3><table><tbody>{}</tbody></table></details>", facts(outcome));
}

/// Writes the report: the tables as they are printed, then a row for each house.
pub(super) fn report(path: &Path, tables: &str, results: &[(Outcome, SheetRow)]) -> anyhow::Result<()> {
    let command: Vec<String> = std::env::args().skip(1).collect();
    let mut body = String::from("<header><h1>mindseye <span>eval grounding</span></h1></header><main>");
    let _ = write!(
        body,
        "<section class=\"panel\"><h2>Figures</h2><pre>{}</pre><h2>To do it again</h2><pre>mindseye-tools {}</pre>\
         <p class=\"note\">mindseye {}</p></section><section class=\"panel\"><h2>Houses</h2>",
        text(tables),
        text(&command.join(" ")),
        env!("CARGO_PKG_VERSION")
    );
    for (outcome, sheet) in results {
        house(&mut body, outcome, sheet);
    }
    body += "</section></main>";
    write_atomically(path, still_page("mindseye: eval grounding", STYLE, &body).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stay_texts() {
        assert_eq!(text("<b a=\"1\">&amp;"), "&lt;b a=&quot;1&quot;&gt;&amp;amp;");
        let frames = vec![RgbImage::filled(3, 2, [1, 2, 3]); 2];
        let shown = strip(&frames, "a < b");
        assert!(shown.contains("a &lt; b") && !shown.contains("a < b"), "{shown}");
        assert!(strip(&[], "nothing").is_empty());
    }
}
