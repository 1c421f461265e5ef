//! The drive that is shown, held to what was seen.
//!
//! Once it is known where a drive leads, what was seen can be carried into each of its views ([`crate::recall`]). While the
//! drive is sampled, each step's estimate is decoded, the carried pixels take the place of the network's as far as they
//! are to be trusted, and the frames are encoded again: `x0 = E(m * carried + (1 - m) * D(x0))`. Holes, seams, what was
//! never seen are the network's, and so is the red box: that of the drive that was sampled before. What is shown is held once
//! more, so that carried pixels do not go through the codec, and also in the pixels of remembered pictures
//! ([`Carry::in_detail`]).
//!
//! A drive that was led along the answer's own path is no witness of the place: it is what a person sees of the way. The
//! place is told by drives that were sampled from the video alone.

use crate::boxes::{FoundBox, find_box};
use crate::context::GROUP;
use crate::ground::Mind;
use crate::image::RgbImage;
use crate::imagine::{Held, ImagineError};
use crate::planar::{Pose2, between, wrap_angle};
use crate::recall::{Outline, Recall};
use crate::served::Imagine;
use mindseye_landmarks::Carried;
use nalgebra::Isometry3;

/// The poses of the frames of a drive, one for the given first frame (here) and one for each of the [`GROUP`] of each other
/// latent: `path` has one pose per latent, the first one here; the last `boxed` latents stand at the end. The path is
/// bent so that it ends at `end`.
pub fn along(path: &[Pose2], boxed: usize, end: Option<Pose2>) -> Vec<Pose2> {
    let Some(last) = path.len().checked_sub(1) else { return Vec::new() };
    let arrives = last.saturating_sub(boxed).max(1).min(last);
    let claimed = path[last];
    // What the end is off by is spread over the way.
    let bent: Vec<Pose2> = (0..=last)
        .map(|i| {
            let part = (i as f64 / arrives as f64).min(1.0);
            let Some(end) = end else { return path[i] };
            if part >= 1.0 {
                return end;
            }
            let (dx, dy) = (end.x - claimed.x, end.y - claimed.y);
            let turn = wrap_angle(end.yaw - claimed.yaw);
            Pose2::new(path[i].x + part * dx, path[i].y + part * dy, path[i].yaw + part * turn)
        })
        .collect();
    let steps = (1..=GROUP).map(|k| k as f64 / GROUP as f64);
    let on_the_way = bent.windows(2).flat_map(|w| steps.clone().map(|part| between(w[0], w[1], part)));
    std::iter::once(bent[0]).chain(on_the_way).collect()
}

/// How much a carried pixel counts for its trust: all from 1 / 1.5 on. Pixels trusted .1 to .5 are off by as much as the
/// network's (mean squares of about 500 in simulated rooms), those above .7 by less than 200.
const TRUSTED: f32 = 1.5;

/// What was seen, carried into the views of a drive.
#[derive(Clone, Debug)]
pub struct Carry {
    /// One for each frame after the given first one, in the model's pixels; holes are filled.
    views: Vec<Carried>,
    /// The same in the pixels of remembered pictures.
    finer: Vec<Carried>,
    /// Frames at the end that show the box.
    boxed: usize,
    /// The box of the drive that was sampled from the video alone, and its last frames.
    drawn: Option<(FoundBox, Vec<RgbImage>)>,
}

impl Carry {
    /// For a drive along these poses of the camera, relative to here (the first one being here), of which the last `boxed`
    /// frames show a box: the one that was `drawn` in the frames of a drive that was sampled before, where there is one.
    pub fn new(
        recall: &mut Recall,
        cameras: &[Isometry3<f64>],
        boxed: usize,
        drawn: Option<(FoundBox, &[RgbImage])>,
    ) -> Self {
        let (mut views, mut finer): (Vec<Carried>, Vec<Carried>) = (Vec::new(), Vec::new());
        let by = recall.finer();
        for pair in cameras.windows(2) {
            if let Some((view, fine)) = views.last().zip(finer.last()).filter(|_| pair[0] == pair[1]) {
                let still = (view.clone(), fine.clone());
                views.push(still.0);
                finer.push(still.1);
                continue;
            }
            let carried = recall.carry(&pair[1]);
            carried.fill();
            views.push(carried.reduced(by));
            finer.push(carried.clone());
        }
        let tail = |frames: &[RgbImage]| frames[frames.len().saturating_sub(boxed)..].to_vec();
        let drawn = drawn.filter(|_| boxed > 0).map(|(found, frames)| (found, tail(frames)));
        Self { views, finer, boxed, drawn }
    }

    /// The carried pictures alone: what a drive looks like that no network had a part in.
    pub fn pictures(&self) -> Vec<RgbImage> {
        self.views.iter().map(Carried::picture).collect()
    }

    /// Puts carried pixels in the place of those of decoded frames (the given first one [`GROUP`] times, then one for each
    /// view), as far as they are to be trusted. The outline of the box in the last frames is the one that was drawn before;
    /// without one, theirs stays, where it scores at least `box_min`.
    pub fn hold(&self, frames: &mut [RgbImage], box_min: f64) {
        let outline = self.outline(frames, box_min);
        if let Some((outline, (_, drawn))) = outline.as_ref().zip(self.drawn.as_ref()) {
            let last = frames.len().saturating_sub(drawn.len());
            for (frame, drawn) in frames[last..].iter_mut().zip(drawn) {
                let on_it = |at: usize| outline.holds(at % drawn.width, at / drawn.width);
                let pixels = frame.data.chunks_exact_mut(3).zip(drawn.data.chunks_exact(3)).enumerate();
                pixels.filter(|(at, _)| on_it(*at)).for_each(|(_, (own, drawn))| own.copy_from_slice(drawn));
            }
        }
        self.lay_over(frames, &self.views, outline.as_ref(), 1);
    }

    /// Held frames in the pixels of remembered pictures: what was never seen is the network's, enlarged. The first
    /// [`GROUP`] are `first`.
    pub fn in_detail(&self, frames: &[RgbImage], first: Option<&RgbImage>, box_min: f64) -> Vec<RgbImage> {
        let Some((fine, coarse)) = self.finer.first().zip(self.views.first()) else { return Vec::new() };
        let by = fine.width / coarse.width.max(1);
        let outline = self.outline(frames, box_min);
        let mut out: Vec<RgbImage> = frames.iter().map(|f| enlarged(f, by, outline.as_ref())).collect();
        if let Some(first) = first.filter(|f| (f.width, f.height) == (fine.width, fine.height)) {
            out.iter_mut().take(GROUP).for_each(|frame| frame.clone_from(first));
        }
        self.lay_over(&mut out, &self.finer, outline.as_ref(), by);
        out
    }

    /// The outline of the box in the last frames.
    fn outline(&self, frames: &[RgbImage], box_min: f64) -> Option<Outline> {
        if let Some((found, drawn)) = &self.drawn {
            return Some(Outline::of(found, &drawn.iter().collect::<Vec<_>>()));
        }
        let tail = &frames[frames.len().saturating_sub(self.boxed)..];
        let found = find_box(tail).filter(|b| self.boxed > 0 && b.score >= box_min)?;
        Some(Outline::of(&found, &tail.iter().collect::<Vec<_>>()))
    }

    /// Lays views over frames of their size, of which an outline's pixels have `by` each way.
    fn lay_over(&self, frames: &mut [RgbImage], views: &[Carried], outline: Option<&Outline>, by: usize) {
        let last = frames.len().saturating_sub(self.boxed);
        for (i, (frame, view)) in frames.iter_mut().skip(GROUP).zip(views).enumerate() {
            let outline = outline.filter(|_| i + GROUP >= last);
            let pixels = frame.data.chunks_exact_mut(3).zip(view.rgb.iter().zip(&view.trust)).enumerate();
            for (at, (pixel, (carried, trust))) in pixels {
                let (x, y) = (at % view.width / by, at / view.width / by);
                if outline.is_some_and(|o| o.holds(x, y)) {
                    continue;
                }
                let m = (trust * TRUSTED).min(1.0);
                for (own, carried) in pixel.iter_mut().zip(carried) {
                    let held = m * carried * 255.0 + (1.0 - m) * f32::from(*own);
                    *own = held.round().clamp(0.0, 255.0) as u8;
                }
            }
        }
    }
}

/// A picture with `by` times its pixels each way: those of an outline as they are, between all others colours change evenly.
fn enlarged(picture: &RgbImage, by: usize, outline: Option<&Outline>) -> RgbImage {
    let (width, height) = (by * picture.width, by * picture.height);
    let mut data = Vec::with_capacity(width * height * 3);
    // The two nearest pixels of an axis, and the share of the second.
    let between = |at: usize, count: usize| {
        let place = ((at as f32 + 0.5) / by as f32 - 0.5).clamp(0.0, (count - 1) as f32);
        (place as usize, (place as usize + 1).min(count - 1), place.fract())
    };
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        if outline.is_some_and(|o| o.holds(x / by, y / by)) {
            data.extend(picture.pixel(x / by, y / by));
            continue;
        }
        let ((x0, x1, across), (y0, y1, down)) = (between(x, picture.width), between(y, picture.height));
        let [a, b, c, d] = [(x0, y0), (x1, y0), (x0, y1), (x1, y1)].map(|(x, y)| picture.pixel(x, y));
        data.extend((0..3).map(|k| {
            let mix = |p: [u8; 3], q: [u8; 3]| f32::from(p[k]) * (1.0 - across) + f32::from(q[k]) * across;
            (mix(a, b) * (1.0 - down) + mix(c, d) * down).round() as u8
        }));
    }
    RgbImage { width, height, data }
}

/// A mind whose estimates are held to what was seen.
pub struct HeldMind<'a> {
    /// The mind.
    pub mind: &'a mut dyn Mind,
    /// What was seen.
    pub carry: &'a Carry,
}

impl Held for HeldMind<'_> {
    fn imaginer(&mut self) -> Box<dyn Imagine + '_> {
        self.mind.imaginer()
    }

    fn hold(&mut self, clean: &mut [f32]) -> Result<(), ImagineError> {
        let box_min = self.mind.spec().box_min;
        let mut frames = self.mind.decode(clean).map_err(|e| ImagineError::Hold(e.into()))?;
        self.carry.hold(&mut frames, box_min);
        let given = self.mind.spec().latent_len;
        let others = frames.get(GROUP..).unwrap_or_default();
        let held = self.mind.encode_frames(others).map_err(|e| ImagineError::Hold(e.into()))?;
        // A codec that cannot encode them by themselves leaves the estimate as it is.
        if let Some(held) = held.filter(|held| held.len() + given == clean.len()) {
            clean[given..].copy_from_slice(&held);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "guide_tests.rs"]
mod tests;
