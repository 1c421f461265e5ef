//! What a detector's outputs say.

use super::{Detection, DetectorError};
use crate::backend::{Elements, Tensor};

/// Where the picture lies in the network's input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// Pixels of the input per pixel of the picture, along x and y.
    pub scale: [f32; 2],
    /// Left and upper edge in the input.
    pub edge: [f32; 2],
}

impl Placed {
    fn area(self, corners: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|k| (corners[k] - self.edge[k % 2]) / self.scale[k % 2])
    }
}

/// How a YOLO-like output is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub columns: bool,
    pub objectness: bool,
}

fn wrong(name: &str, tensor: &Tensor, wanted: &'static str) -> DetectorError {
    DetectorError::Output {
        name: name.to_owned(),
        shape: tensor.shape.clone(),
        values: tensor.data.len(),
        wanted,
    }
}

/// Labels, boxes and scores.
pub(super) fn detr(
    names: [&str; 3],
    [labels, boxes, scores]: &[Tensor; 3],
    placed: Placed,
    score_min: f32,
) -> Result<Vec<Detection>, DetectorError> {
    let classes: Vec<i64> = match &labels.data {
        Elements::I64(v) => v.clone(),
        Elements::I32(v) => v.iter().map(|v| i64::from(*v)).collect(),
        Elements::F32(_) => return Err(wrong(names[0], labels, "integers")),
    };
    let areas = boxes.as_f32().ok_or_else(|| wrong(names[1], boxes, "floats"))?;
    let sure = scores.as_f32().ok_or_else(|| wrong(names[2], scores, "floats"))?;
    if areas.len() != 4 * classes.len() {
        return Err(wrong(names[1], boxes, "four numbers for each label"));
    }
    if sure.len() != classes.len() {
        return Err(wrong(names[2], scores, "one number for each label"));
    }
    let each = classes.iter().zip(areas.chunks_exact(4)).zip(sure);
    Ok(each
        .filter(|(_, score)| **score >= score_min)
        .filter_map(|((class, area), score)| {
            let class = usize::try_from(*class).ok()?;
            Some(Detection { class, score: *score, area: placed.area([area[0], area[1], area[2], area[3]]) })
        })
        .collect())
}

/// Boxes with a score per class; the best class of each.
pub(super) fn yolo(
    name: &str,
    output: &Tensor,
    rows: Rows,
    placed: Placed,
    score_min: f32,
) -> Result<Vec<Detection>, DetectorError> {
    let values = output.as_f32().ok_or_else(|| wrong(name, output, "floats"))?;
    let &[1, a, b] = &output.shape[..] else { return Err(wrong(name, output, "three axes, the first of 1")) };
    let (n, attributes) = if rows.columns { (b, a) } else { (a, b) };
    let first = 4 + usize::from(rows.objectness);
    if attributes <= first || values.len() != a * b {
        return Err(wrong(name, output, "boxes with a score per class"));
    }
    let value = |of: usize, k: usize| values[if rows.columns { k * n + of } else { of * attributes + k }];
    let mut found = Vec::new();
    for of in 0..n {
        let whole = if rows.objectness { value(of, 4) } else { 1.0 };
        if whole.is_nan() || whole < score_min {
            continue;
        }
        let best = (first..attributes).max_by(|i, j| value(of, *i).total_cmp(&value(of, *j)));
        let Some(best) = best else { continue };
        let score = whole * value(of, best);
        if score >= score_min {
            let [x, y, w, h] = std::array::from_fn(|k| value(of, k));
            let corners = [x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h];
            found.push(Detection { class: best - first, score, area: placed.area(corners) });
        }
    }
    Ok(found)
}

/// Leaves of boxes of one class that overlap the surest.
pub(super) fn thinned(mut all: Vec<Detection>, overlap_max: f32) -> Vec<Detection> {
    all.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut kept: Vec<Detection> = Vec::new();
    for one in all {
        let again = kept.iter().any(|k| k.class == one.class && overlap(&k.area, &one.area) > overlap_max);
        if !again && kept.len() < super::DETECTIONS_MAX {
            kept.push(one);
        }
    }
    kept
}

/// Intersection over union.
fn overlap(a: &[f32; 4], b: &[f32; 4]) -> f32 {
    let side = |k: usize| (a[k + 2].min(b[k + 2]) - a[k].max(b[k])).max(0.0);
    let area = |c: &[f32; 4]| (c[2] - c[0]).max(0.0) * (c[3] - c[1]).max(0.0);
    let both = side(0) * side(1);
    both / (area(a) + area(b) - both).max(1e-9)
}

/// Cuts off what lies outside the picture; false when nothing is left, or a number is none.
pub(super) fn clip(area: &mut [f32; 4], width: usize, height: usize) -> bool {
    if !area.iter().all(|v| v.is_finite()) {
        return false;
    }
    for (k, v) in area.iter_mut().enumerate() {
        *v = v.clamp(0.0, if k % 2 == 0 { width as f32 } else { height as f32 });
    }
    area[2] - area[0] >= 1.0 && area[3] - area[1] >= 1.0
}
