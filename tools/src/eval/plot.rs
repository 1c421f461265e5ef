//! Charts with intervals.

use std::path::Path;

use anyhow::Context;
use mindseye::image::RgbImage;
use mindseye_world::draw::{Canvas, text_width};

use super::stats::Figure;

const INK: [u8; 3] = [44, 46, 54];
const FADED: [u8; 3] = [120, 122, 130];
const GRID: [u8; 3] = [222, 222, 226];
const PAPER: [u8; 3] = [252, 252, 250];
/// Colours that stay apart for most eyes (Okabe and Ito, 2008).
const COLOURS: [[u8; 3]; 6] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [44, 46, 54], [204, 121, 167], [230, 159, 0]];

/// A quantity over something.
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Places and figures; those that are no numbers are left out.
    pub points: Vec<(f64, Figure)>,
}

/// One chart.
pub struct Chart {
    /// Its title.
    pub title: String,
    /// What runs along.
    pub axis: String,
    /// Names of the places 0, 1, 2, ...; points are then not joined.
    pub names: Vec<String>,
    /// What is drawn.
    pub series: Vec<Series>,
}

const PANEL: (usize, usize) = (860, 500);

/// Draws charts, two in a row, into a PNG.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(charts: &[Chart], path: &Path) -> anyhow::Result<()> {
    let rows = charts.len().div_ceil(2);
    let mut canvas = Canvas::new(2 * PANEL.0, rows.max(1) * PANEL.1, PAPER);
    for (k, chart) in charts.iter().enumerate() {
        panel(&mut canvas, ((k % 2) * PANEL.0, (k / 2) * PANEL.1), chart);
    }
    let image = RgbImage { width: canvas.width, height: canvas.height, data: canvas.rgb };
    image.save_png(path).with_context(|| path.display().to_string())
}

fn panel(canvas: &mut Canvas, corner: (usize, usize), chart: &Chart) {
    let (x0, y0) = ((corner.0 + 70) as f32, (corner.1 + 50) as f32);
    let (x1, y1) = ((corner.0 + PANEL.0 - 190) as f32, (corner.1 + PANEL.1 - 70) as f32);
    canvas.text(corner.0 as i64 + 70, corner.1 as i64 + 18, &chart.title, 2, INK);
    let points = || chart.series.iter().flat_map(|s| &s.points).filter(|p| p.1.value.is_finite());
    let low = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let high = points().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high.max(low + 1.0)) };
    let top = points().map(|p| p.1.high.max(p.1.value)).fold(1.0, f64::max);
    let (inset, span) = (24.0, x1 - x0 - 48.0);
    let x_of = |x: f64| x0 + inset + span * ((x - low) / (high - low)) as f32;
    let y_of = |y: f64| y1 - (y1 - y0) * (y / top).clamp(0.0, 1.0) as f32;
    for k in 0..=5 {
        let value = top * f64::from(k) / 5.0;
        let y = y_of(value);
        canvas.line((x0, y), (x1, y), 1.0, GRID);
        let text = format!("{value:.2}");
        canvas.text(x0 as i64 - 10 - text_width(&text, 2) as i64, y as i64 - 7, &text, 2, FADED);
    }
    let mut places: Vec<f64> = points().map(|p| p.0).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    for place in &places {
        let text = match chart.names.get(*place as usize) {
            Some(name) => name.clone(),
            None => format!("{place}"),
        };
        let zoom = if chart.names.is_empty() { 2 } else { 1 };
        canvas.text(
            x_of(*place) as i64 - text_width(&text, zoom) as i64 / 2,
            y1 as i64 + 12,
            &text,
            zoom,
            FADED,
        );
    }
    canvas.line((x0, y0), (x0, y1), 2.0, FADED);
    canvas.line((x0, y1), (x1, y1), 2.0, FADED);
    let middle = ((x0 + x1) / 2.0) as i64 - text_width(&chart.axis, 2) as i64 / 2;
    canvas.text(middle, y1 as i64 + 38, &chart.axis, 2, FADED);
    let count = chart.series.len().max(1) as f32;
    for (k, series) in chart.series.iter().enumerate() {
        let colour = COLOURS[k % COLOURS.len()];
        // Side by side, so that intervals do not hide each other.
        let shift = if chart.names.is_empty() { 3.0 } else { 12.0 } * (k as f32 - (count - 1.0) / 2.0);
        let seen: Vec<(f32, &Figure)> = series
            .points
            .iter()
            .filter(|p| p.1.value.is_finite())
            .map(|p| (x_of(p.0) + shift, &p.1))
            .collect();
        if chart.names.is_empty() {
            let line: Vec<(f32, f32)> = seen.iter().map(|(x, f)| (*x, y_of(f.value))).collect();
            canvas.polyline(&line, 2.0, colour);
        }
        for (x, f) in &seen {
            canvas.line((*x, y_of(f.low)), (*x, y_of(f.high)), 1.5, colour);
            canvas.disc((*x, y_of(f.value)), 4.5, colour);
        }
        let (x, y) = (x1 + 16.0, y0 + 14.0 + 30.0 * k as f32);
        canvas.line((x, y), (x + 18.0, y), 4.0, colour);
        canvas.text(x as i64 + 26, y as i64 - 7, &series.name, 2, INK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::stats::share;

    #[test]
    fn charts_have_ink_of_every_series() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("chart.png");
        let points = |k: usize| (0..4).map(|x| (f64::from(x), share((0..20).map(|i| i < 5 * k)))).collect();
        let series = (1..4).map(|k| Series { name: format!("s{k}"), points: points(k) }).collect();
        let chart = Chart { title: "t".into(), axis: "x".into(), names: Vec::new(), series };
        let empty =
            Chart { title: "nothing".into(), axis: String::new(), names: Vec::new(), series: Vec::new() };
        draw(&[chart, empty], &path)?;
        let mut reader =
            png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path)?)).read_info()?;
        let mut rgb = vec![0; reader.output_buffer_size().context("a size")?];
        let info = reader.next_frame(&mut rgb)?;
        assert_eq!((info.width as usize, info.height as usize), (2 * PANEL.0, PANEL.1));
        for colour in &COLOURS[..3] {
            let ink = rgb.chunks_exact(3).filter(|p| *p == colour).count();
            assert!(ink > 300, "{colour:?}: {ink} pixels");
        }
        Ok(())
    }
}
