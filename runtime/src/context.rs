//! What the robot has seen: a rolling, subsampled memory of video latents.
//!
//! ```text
//! frame ─► FrameSampler (every k-th, segments) ─► GroupStage (four frames) ─► GroupEncoder (once)
//!       ─► ContextMemory (fixed ring of latents, keyed by source latent index)
//! ```
//!
//! * The sampler decides on the stamp and the size alone, so that frames that are not kept are never decoded.
//! * A frame is encoded once; a latent keeps the index that it had in its source video (the rotary position
//!   of the network), the stamp of its last frame and the base's pose at that stamp where odometry is known.
//! * All memory is taken when the parts are made. Every frame and latent that is not kept is counted and
//!   every eviction has a stated reason.

use crate::image::RgbImage;
use crate::planar::Pose2;
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::backend::BackendError;
pub use mindseye_engines::model::codec::GROUP;
use std::fmt;
use std::sync::Arc;

/// Why a new segment began. Frames of one latent never come from two segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentReason {
    /// The first frame of all.
    First,
    /// No frame for longer than the configured gap.
    Gap {
        /// Time between the two frames.
        lasted: TimeDelta,
    },
    /// The camera's resolution changed.
    Resolution {
        /// Width and height before.
        from: (u32, u32),
        /// Width and height now.
        to: (u32, u32),
    },
    /// Stamps far behind the newest one, or behind it for long: a bag that starts again, a restarted simulation, a
    /// corrected clock.
    ClockBackwards {
        /// How far back.
        by: TimeDelta,
    },
}

impl SegmentReason {
    /// Whether latents from before are still usable. Across a gap the odometry frame goes on; after a clock
    /// that jumped back, or with another camera, neither poses nor pictures can be compared.
    pub fn keeps_history(self) -> bool {
        matches!(self, Self::First | Self::Gap { .. })
    }
}

impl fmt::Display for SegmentReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => write!(f, "first frame"),
            Self::Gap { lasted } => write!(f, "no frame for {:.2} s", lasted.as_secs_f64()),
            Self::Resolution { from, to } => {
                write!(f, "camera changed from {}x{} to {}x{}", from.0, from.1, to.0, to.1)
            }
            Self::ClockBackwards { by } => write!(f, "stamps went back by {:.3} s", by.as_secs_f64()),
        }
    }
}

/// What the sampler says about one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Decode and keep this frame.
    pub keep: bool,
    /// A new segment begins with this frame.
    pub segment: Option<SegmentReason>,
    /// The frame does not continue the stream and is dropped: its stamp is behind the newest one, or it is the first of
    /// another size.
    pub late: bool,
}

/// Which frames are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Every k-th.
    Every(usize),
    /// At most one per period, whatever the camera's rate: what a model was trained with. Frames up to a tenth
    /// early count, since cameras jitter.
    Period(TimeDelta),
}

/// Stamps up to this far behind the newest one are late frames, not another clock.
const LATE_MAX: TimeDelta = TimeDelta::from_millis(1000);
/// So many late frames in a row are another clock all the same.
const LATE_FRAMES_MAX: usize = 30;

/// Keeps some frames of a stream and notices where the stream breaks.
///
/// A single frame never breaks it: one that is out of order, or of another size, is dropped until a second one confirms
/// it. A frame that ran ahead of the stream is forgotten when two frames go on from the one before it.
#[derive(Clone, Debug)]
pub struct FrameSampler {
    keep: Keep,
    max_gap: TimeDelta,
    last: Option<(Timestamp, (u32, u32))>,
    /// Stamp of the frame before `last`.
    before: Option<Timestamp>,
    astray: Option<Astray>,
    since_segment: usize,
    last_kept: Timestamp,
}

/// Frames in a row that continue each other, but not the stream.
#[derive(Clone, Copy, Debug)]
struct Astray {
    first: Timestamp,
    newest: Timestamp,
    size: (u32, u32),
    frames: usize,
}

impl FrameSampler {
    /// A sampler that begins a new segment when frames are further apart than `max_gap`.
    pub fn new(keep: Keep, max_gap: TimeDelta) -> Self {
        let last_kept = Timestamp::ZERO;
        Self { keep, max_gap, last: None, before: None, astray: None, since_segment: 0, last_kept }
    }

    /// Judges a frame by its stamp and size (pixels). The first frame of a segment is always kept; a frame
    /// that repeats the stamp before it is not.
    pub fn offer(&mut self, captured_at: Timestamp, size: (u32, u32)) -> Offer {
        let skip = Offer { keep: false, segment: None, late: false };
        let segment = match self.last {
            None => Some(SegmentReason::First),
            Some((last, last_size)) if captured_at < last || size != last_size => {
                match self.stray(captured_at, size, last, last_size) {
                    Stray::Late => return Offer { late: true, ..skip },
                    Stray::NewestRanAhead => {
                        self.last_kept = self.last_kept.min(captured_at);
                        None
                    }
                    Stray::Segment(reason) => Some(reason),
                }
            }
            Some((last, _)) if captured_at == last => return skip,
            Some((last, _)) if captured_at.since(last) > self.max_gap => {
                Some(SegmentReason::Gap { lasted: captured_at.since(last) })
            }
            Some(_) => None,
        };
        self.astray = None;
        self.before = self.last.map(|(last, _)| last);
        self.last = Some((captured_at, size));
        if segment.is_some() {
            self.since_segment = 0;
        }
        let keep = match self.keep {
            Keep::Every(k) => self.since_segment.is_multiple_of(k.max(1)),
            Keep::Period(period) => {
                self.since_segment == 0 || captured_at.since(self.last_kept).0 >= period.0 / 10 * 9
            }
        };
        if keep {
            self.last_kept = captured_at;
        }
        self.since_segment += 1;
        Offer { keep, segment, late: false }
    }

    /// Judges a frame that does not continue the stream.
    fn stray(
        &mut self,
        captured_at: Timestamp,
        size: (u32, u32),
        last: Timestamp,
        last_size: (u32, u32),
    ) -> Stray {
        let follows = |a: Timestamp| captured_at > a && captured_at.since(a) <= self.max_gap;
        let run = match self.astray {
            Some(run) if run.size == size && follows(run.newest) => {
                Astray { newest: captured_at, frames: run.frames + 1, ..run }
            }
            _ => Astray { first: captured_at, newest: captured_at, size, frames: 1 },
        };
        self.astray = Some(run);
        if size == last_size
            && run.frames >= 2
            && self.before.is_some_and(|before| run.first > before && follows(before))
        {
            return Stray::NewestRanAhead;
        }
        let by = last.since(captured_at);
        let needed = if size == last_size && by <= LATE_MAX { LATE_FRAMES_MAX } else { 2 };
        match run.frames < needed {
            true => Stray::Late,
            false if captured_at < last => Stray::Segment(SegmentReason::ClockBackwards { by }),
            false => Stray::Segment(SegmentReason::Resolution { from: last_size, to: size }),
        }
    }
}

/// What a frame is that does not continue the stream.
enum Stray {
    /// Out of order, or not yet confirmed.
    Late,
    /// In order, because the newest frame's stamp was wrong.
    NewestRanAhead,
    /// The beginning of something else.
    Segment(SegmentReason),
}

/// Turns four frames into one latent. Streaming encoders carry state from group to group.
pub trait GroupEncoder {
    /// Values per latent: `channels * height * width`.
    fn latent_len(&self) -> usize;

    /// Frames that the next latent takes: [`GROUP`], or 1 where a stream begins with a frame of its own.
    fn group_len(&self) -> usize {
        GROUP
    }

    /// Encodes [`GroupEncoder::group_len`] frames of the model's size, oldest first, into `latent`
    /// (`[channels, height, width]`, normalised as the denoiser wants it).
    ///
    /// # Errors
    /// When the backend fails; a stream's state is what it was before.
    fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError>;

    /// Encodes one still frame as the first latent of a clip, without touching the streaming state.
    ///
    /// # Errors
    /// When the backend fails.
    fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError>;

    /// Forgets the streaming state; called at the start of a segment.
    fn reset(&mut self);
}

/// Why a group of frames could not be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A buffer or frame has the wrong size.
    #[error("frame encoder: {what} has {got} values, expected {expected}")]
    Size {
        /// Which one.
        what: &'static str,
        /// Wanted.
        expected: usize,
        /// Got.
        got: usize,
    },
    /// The backend failed.
    #[error("frame encoder: {0}")]
    Backend(#[from] BackendError),
}

/// Kept frames on their way to the encoder. Their memory is used again by the next group.
#[derive(Debug, Default)]
pub struct GroupStage {
    frames: Vec<RgbImage>,
    filled: usize,
}

impl GroupStage {
    /// Adds a copy of a frame; `true` when the group has `wanted` frames and must be encoded and cleared.
    pub fn push(&mut self, frame: &RgbImage, wanted: usize) -> bool {
        match self.frames.get_mut(self.filled) {
            Some(place) => place.copy_from(frame),
            None => self.frames.push(frame.clone()),
        }
        self.filled += 1;
        self.filled >= wanted
    }

    /// The frames so far, oldest first.
    pub fn frames(&self) -> &[RgbImage] {
        &self.frames[..self.filled]
    }

    /// Drops the frames; returns how many there were.
    pub fn clear(&mut self) -> usize {
        std::mem::take(&mut self.filled)
    }
}

/// What is known about a stored latent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentInfo {
    /// Index in the source video, in latents: the network's temporal position.
    pub index: u64,
    /// Segment that it belongs to, counted from 0.
    pub segment: u32,
    /// Stamp of its last frame.
    pub captured_at: Timestamp,
    /// `odom_from_base` at that stamp; `None` without odometry.
    pub odom_from_base: Option<Pose2>,
}

/// Why a latent left the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// The memory was full and this latent's neighbours in time were the closest pair: `gap` latents remain
    /// between them. History stays as evenly spread as it can be.
    Crowded {
        /// Index of the latent that left.
        index: u64,
        /// Distance between its neighbours.
        gap: u64,
    },
    /// The memory was full and nothing else could leave.
    Oldest {
        /// Index of the latent that left.
        index: u64,
    },
}

impl Eviction {
    /// Index of the latent that left.
    pub fn index(self) -> u64 {
        match self {
            Self::Crowded { index, .. } | Self::Oldest { index } => index,
        }
    }
}

impl fmt::Display for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crowded { index, gap } => {
                write!(f, "latent {index} left: its neighbours are only {gap} latents apart")
            }
            Self::Oldest { index } => write!(f, "latent {index} left: the oldest of a full memory"),
        }
    }
}

/// A fixed ring of latents: uniform over history, and always the newest.
#[derive(Debug)]
pub struct ContextMemory {
    latent_len: usize,
    picture: (usize, usize),
    detail: Option<(usize, usize)>,
    capacity: usize,
    recent: usize,
    latents: Vec<f32>,
    pictures: Vec<u8>,
    details: Vec<u8>,
    /// Ascending by index; the second value is the place in `latents` and `pictures`.
    entries: Vec<(LatentInfo, usize)>,
    free: Vec<usize>,
    evicted: u64,
}

impl ContextMemory {
    /// A memory of `capacity` latents (at least 2) of `latent_len` values, each with its last frame of
    /// `picture` = (width, height) pixels and, where a model reads depth, also of `detail` pixels. The newest `recent`
    /// latents are never evicted. All memory is taken here.
    pub fn new(
        capacity: usize,
        recent: usize,
        latent_len: usize,
        picture: (usize, usize),
        detail: Option<(usize, usize)>,
    ) -> Self {
        let capacity = capacity.max(2);
        Self {
            latent_len,
            picture,
            detail,
            capacity,
            recent: recent.clamp(1, capacity - 1),
            latents: vec![0.0; capacity * latent_len],
            pictures: vec![0; capacity * picture.0 * picture.1 * 3],
            details: vec![0; capacity * detail.map_or(0, |(width, height)| width * height * 3)],
            entries: Vec::with_capacity(capacity),
            free: (0..capacity).rev().collect(),
            evicted: 0,
        }
    }

    /// Bytes taken, all of them from the start.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.latents[..]) + self.pictures.len() + self.details.len()
    }

    /// Stores a latent with its last frame, `detail` being the frame in more pixels. `info.index` must be larger than every stored index, and the
    /// sizes those of the memory; otherwise nothing is stored and an error tells why.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn store(
        &mut self,
        info: LatentInfo,
        latent: &[f32],
        picture: &RgbImage,
        detail: Option<&RgbImage>,
    ) -> Result<Option<Eviction>, StoreError> {
        if latent.len() != self.latent_len {
            return Err(StoreError::Size { what: "latent", expected: self.latent_len, got: latent.len() });
        }
        if (picture.width, picture.height) != self.picture {
            let expected = self.picture.0 * self.picture.1 * 3;
            return Err(StoreError::Size { what: "picture", expected, got: picture.data.len() });
        }
        if detail.map(|d| (d.width, d.height)) != self.detail {
            let pixels = |size: Option<(usize, usize)>| size.map_or(0, |(width, height)| width * height * 3);
            let got = detail.map_or(0, |d| d.data.len());
            return Err(StoreError::Size { what: "detail", expected: pixels(self.detail), got });
        }
        if let Some((newest, _)) = self.entries.last()
            && info.index <= newest.index
        {
            return Err(StoreError::Order { newest: newest.index, got: info.index });
        }
        let (place, eviction) = match self.free.pop() {
            Some(place) => (place, None),
            None => {
                let (at, eviction) = self.choose_eviction();
                self.evicted += 1;
                (self.entries.remove(at).1, Some(eviction))
            }
        };
        self.latents[place * self.latent_len..][..self.latent_len].copy_from_slice(latent);
        let bytes = picture.data.len();
        self.pictures[place * bytes..][..bytes].copy_from_slice(&picture.data);
        if let Some(detail) = detail {
            let bytes = detail.data.len();
            self.details[place * bytes..][..bytes].copy_from_slice(&detail.data);
        }
        self.entries.push((info, place));
        Ok(eviction)
    }

    /// The entry whose neighbours are closest to each other; the earliest of equals. The oldest latent and the
    /// newest `recent` ones stay while there is another choice.
    fn choose_eviction(&self) -> (usize, Eviction) {
        let index = |i: usize| self.entries[i].0.index;
        let last = self.entries.len().saturating_sub(self.recent);
        (1..last)
            .filter(|i| i + 1 < self.entries.len())
            .map(|i| (index(i + 1) - index(i - 1), i))
            .min()
            .map_or((0, Eviction::Oldest { index: index(0) }), |(gap, i)| {
                (i, Eviction::Crowded { index: index(i), gap })
            })
    }

    /// Forgets everything; the memory stays allocated.
    pub fn clear(&mut self) {
        self.evicted += self.entries.len() as u64;
        for (_, place) in self.entries.drain(..) {
            self.free.push(place);
        }
    }

    /// Number of latents held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when nothing is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Largest number of latents.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Latents that have left so far.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// What is known of the latent at `position` (0 = oldest).
    pub fn info(&self, position: usize) -> Option<&LatentInfo> {
        self.entries.get(position).map(|(info, _)| info)
    }

    /// Corrects the pose of the latent with this index, if it is still held: odometry of its own time may come
    /// after the frame.
    pub fn set_pose(&mut self, index: u64, odom_from_base: Pose2) {
        if let Some((info, _)) = self.entries.iter_mut().find(|(info, _)| info.index == index) {
            info.odom_from_base = Some(odom_from_base);
        }
    }

    /// The values of the latent at `position` (0 = oldest).
    pub fn latent(&self, position: usize) -> Option<&[f32]> {
        let (_, place) = self.entries.get(position)?;
        self.latents.get(place * self.latent_len..(place + 1) * self.latent_len)
    }

    /// The last frame of the latent at `position` (0 = oldest).
    pub fn picture(&self, position: usize) -> Option<RgbImage> {
        let (_, place) = self.entries.get(position)?;
        let bytes = self.picture.0 * self.picture.1 * 3;
        RgbImage::from_rgb(
            self.picture.0,
            self.picture.1,
            self.pictures[place * bytes..(place + 1) * bytes].to_vec(),
        )
    }

    /// The same frame in more pixels, where such are kept.
    pub fn detail(&self, position: usize) -> Option<RgbImage> {
        let (_, place) = self.entries.get(position)?;
        let (width, height) = self.detail?;
        let bytes = width * height * 3;
        RgbImage::from_rgb(width, height, self.details[place * bytes..(place + 1) * bytes].to_vec())
    }

    /// A copy of everything, oldest first: what one goal works on while new frames keep coming.
    pub fn snapshot(&self) -> Vec<ContextLatent> {
        (0..self.len()).filter_map(|i| self.copy(i)).collect()
    }

    /// A copy of the latent at `position` (0 = oldest), with its pictures.
    pub fn copy(&self, position: usize) -> Option<ContextLatent> {
        Some(ContextLatent {
            info: *self.info(position)?,
            latent: self.latent(position)?.to_vec(),
            picture: self.picture(position)?,
            detail: self.detail(position),
            by: None,
        })
    }
}

/// A stored latent, copied out.
#[derive(Clone, Debug)]
pub struct ContextLatent {
    /// Where and when it was seen.
    pub info: LatentInfo,
    /// `[channels, height, width]`.
    pub latent: Vec<f32>,
    /// Its last frame at the model's size.
    pub picture: RgbImage,
    /// The same frame in the pixels of which the model reads depth, where it does.
    pub detail: Option<RgbImage>,
    /// The robot that saw it, where it is not this one.
    pub by: Option<Arc<str>>,
}

/// `count` positions out of `0..len`, evenly spread, ascending, with the first and the last among them (the
/// last alone when `count` is 1). All of them when `len <= count`.
pub fn spread(len: usize, count: usize) -> Vec<usize> {
    match (len, count) {
        (0, _) | (_, 0) => Vec::new(),
        (_, 1) => vec![len - 1],
        _ if len <= count => (0..len).collect(),
        _ => (0..count).map(|i| (i * (len - 1) + (count - 1) / 2) / (count - 1)).collect(),
    }
}

/// Stretches of a long history, newest first, each as long as the recordings that a model was trained on: positions into
/// `index` (ascending), first and last included.
///
/// A stretch spans at most `span` indices, but holds at least `least` latents where there are so many: what is left of
/// old history is thin. Neighbours overlap by half, so that whatever takes less than half a stretch to pass by is
/// whole in one of them. Together they cover everything. One stretch where `index` is not longer than `span`.
pub fn stretches(index: &[u64], span: u64, least: usize) -> Vec<(usize, usize)> {
    let mut all = Vec::new();
    let Some(mut end) = index.len().checked_sub(1) else { return all };
    loop {
        let within = index.partition_point(|i| *i + span < index[end]);
        let begin = within.min((end + 1).saturating_sub(least.max(1)));
        all.push((begin, end));
        if begin == 0 {
            return all;
        }
        // Half a stretch earlier, but not before one that reaches the beginning.
        let half = index.partition_point(|i| *i + span / 2 < index[end]).min(begin + (end - begin) / 2);
        let first_end = index.partition_point(|i| *i <= index[0] + span).max(least.min(index.len())) - 1;
        end = half.max(first_end).min(end - 1);
    }
}

/// Why a latent was not stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A size differs from the memory's.
    #[error("context memory: {what} has {got} values, expected {expected}")]
    Size {
        /// Which.
        what: &'static str,
        /// Wanted.
        expected: usize,
        /// Got.
        got: usize,
    },
    /// Indices must ascend.
    #[error("context memory: latent {got} comes after latent {newest}; indices must ascend")]
    Order {
        /// The newest stored index.
        newest: u64,
        /// The one given.
        got: u64,
    },
}

/// Counts of what became of the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ContextCounts {
    /// Frames offered.
    pub offered: u64,
    /// Frames left out by subsampling, and repeats.
    pub skipped: u64,
    /// Frames out of order, and single frames of another size.
    pub late: u64,
    /// Frames kept for a group.
    pub kept: u64,
    /// Kept frames lost because their group was never filled (a new segment began).
    pub cut_off: u64,
    /// Kept frames lost because the encoder or the decoder failed.
    pub failed: u64,
    /// Latents stored.
    pub latents: u64,
    /// Segments begun.
    pub segments: u64,
}

/// The intake side of the context: samples, groups, encodes, and says what to store.
///
/// It owns no latents, so that the thread which encodes holds the memory's lock only while it copies.
pub struct ContextIntake {
    sampler: FrameSampler,
    stage: GroupStage,
    latent: Vec<f32>,
    next_index: u64,
    segment: u32,
    counts: ContextCounts,
}

/// A latent ready to be stored.
pub struct Encoded<'a> {
    /// Where and when.
    pub info: LatentInfo,
    /// Its values.
    pub latent: &'a [f32],
    /// Its last frame.
    pub picture: &'a RgbImage,
}

impl ContextIntake {
    /// An intake for latents of `latent_len` values.
    pub fn new(sampler: FrameSampler, latent_len: usize) -> Self {
        Self {
            sampler,
            stage: GroupStage::default(),
            latent: vec![0.0; latent_len],
            next_index: 0,
            segment: 0,
            counts: ContextCounts::default(),
        }
    }

    /// Judges a frame before it is decoded. On a new segment the unfinished group is dropped (and counted);
    /// the caller clears the memory when [`SegmentReason::keeps_history`] says so.
    pub fn offer(
        &mut self,
        captured_at: Timestamp,
        size: (u32, u32),
        encoder: &mut dyn GroupEncoder,
    ) -> Offer {
        let offer = self.sampler.offer(captured_at, size);
        self.counts.offered += 1;
        if let Some(reason) = offer.segment {
            self.counts.cut_off += self.stage.clear() as u64;
            self.counts.segments += 1;
            if reason != SegmentReason::First {
                self.segment += 1;
            }
            encoder.reset();
        }
        match offer {
            Offer { late: true, .. } => self.counts.late += 1,
            Offer { keep: true, .. } => self.counts.kept += 1,
            _ => self.counts.skipped += 1,
        }
        offer
    }

    /// A kept frame could not be decoded: count it and go on.
    pub fn frame_failed(&mut self) {
        self.counts.failed += 1;
    }

    /// Takes a kept frame at the model's size with the base's pose at its stamp. Every fourth one yields a
    /// latent; with a streaming encoder also the first one of a segment.
    ///
    /// # Errors
    /// When the encoder fails; the group is dropped and counted, and a stream begins anew with the next frame.
    pub fn push(
        &mut self,
        frame: &RgbImage,
        captured_at: Timestamp,
        odom_from_base: Option<Pose2>,
        encoder: &mut dyn GroupEncoder,
    ) -> Result<Option<Encoded<'_>>, EncodeError> {
        if !self.stage.push(frame, encoder.group_len()) {
            return Ok(None);
        }
        let index = self.next_index;
        self.next_index += 1;
        if let Err(error) = encoder.encode_group(self.stage.frames(), &mut self.latent) {
            self.counts.failed += self.stage.clear() as u64;
            // The group is missing from the stream: what comes next does not continue it.
            encoder.reset();
            return Err(error);
        }
        let last = self.stage.clear() - 1;
        self.counts.latents += 1;
        Ok(Some(Encoded {
            info: LatentInfo { index, segment: self.segment, captured_at, odom_from_base },
            latent: &self.latent,
            picture: &self.stage.frames[last],
        }))
    }

    /// Counts so far.
    pub fn counts(&self) -> ContextCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn picture(value: u8) -> RgbImage {
        RgbImage::filled(2, 1, [value; 3])
    }

    fn info(index: u64) -> LatentInfo {
        LatentInfo { index, segment: 0, captured_at: Timestamp(index as i64), odom_from_base: None }
    }

    /// The plain model: a vector of (index, first latent value, first picture byte) under the same rule,
    /// written the slow and obvious way.
    struct Plain {
        capacity: usize,
        recent: usize,
        held: Vec<(u64, f32, u8)>,
    }

    impl Plain {
        fn store(&mut self, index: u64, value: f32, byte: u8) -> Option<u64> {
            let mut left = None;
            if self.held.len() == self.capacity {
                let mut victim = 0;
                let mut best = u64::MAX;
                for i in 0..self.held.len() {
                    let protected = i == 0 || i >= self.held.len() - self.recent;
                    if !protected {
                        let gap = self.held[i + 1].0 - self.held[i - 1].0;
                        if gap < best {
                            best = gap;
                            victim = i;
                        }
                    }
                }
                left = Some(self.held.remove(victim).0);
            }
            self.held.push((index, value, byte));
            left
        }
    }

    proptest! {
        #[test]
        fn memory_behaves_like_the_plain_model(
            capacity in 2usize..12,
            recent in 1usize..12,
            steps in proptest::collection::vec((1u64..5, 0u8..40), 1..120),
        ) {
            let recent = recent.clamp(1, capacity - 1);
            let mut memory = ContextMemory::new(capacity, recent, 3, (2, 1), None);
            let mut plain = Plain { capacity, recent, held: Vec::new() };
            let (latents, pictures) = (memory.latents.as_ptr(), memory.pictures.as_ptr());
            let mut index = 0;
            for (step, action) in steps {
                index += step;
                if action == 0 {
                    memory.clear();
                    plain.held.clear();
                    continue;
                }
                let value = index as f32 * 0.5;
                let eviction = memory.store(info(index), &[value, 1.0, 2.0], &picture(action), None).unwrap();
                let left = eviction.map(|e| match e {
                    Eviction::Crowded { index, .. } | Eviction::Oldest { index } => index,
                });
                prop_assert_eq!(left, plain.store(index, value, action));
                let held: Vec<_> = (0..memory.len())
                    .map(|i| {
                        let picture = memory.picture(i).unwrap();
                        (memory.info(i).unwrap().index, memory.latent(i).unwrap()[0], picture.data[0])
                    })
                    .collect();
                prop_assert_eq!(&held, &plain.held);
                prop_assert_eq!(held.last().unwrap().0, index, "the newest is always there");
            }
            prop_assert!(memory.len() <= capacity);
            prop_assert_eq!(latents, memory.latents.as_ptr(), "no memory is taken after the start");
            prop_assert_eq!(pictures, memory.pictures.as_ptr());
        }

        #[test]
        fn history_stays_evenly_spread(capacity in 6usize..32, total in 40u64..400) {
            let mut memory = ContextMemory::new(capacity, 1, 1, (2, 1), None);
            for index in 0..total {
                memory.store(info(index), &[0.0], &picture(0), None).unwrap();
            }
            let indices: Vec<u64> = (0..memory.len()).map(|i| memory.info(i).unwrap().index).collect();
            prop_assert_eq!(indices[0], 0, "the oldest stays");
            let widest = indices.windows(2).map(|w| w[1] - w[0]).max().unwrap();
            let even = total as f64 / capacity as f64;
            prop_assert!((widest as f64) <= 3.0 * even + 3.0, "widest {widest}, even {even}: {indices:?}");
        }

        #[test]
        fn spread_is_even(len in 0usize..200, count in 0usize..40) {
            let chosen = spread(len, count);
            prop_assert_eq!(chosen.len(), len.min(count));
            prop_assert!(chosen.windows(2).all(|w| w[0] < w[1]));
            if count > 0 && len > 0 {
                prop_assert_eq!(*chosen.last().unwrap(), len - 1);
            }
            if count > 1 && len > count {
                prop_assert_eq!(chosen[0], 0);
                let steps: Vec<usize> = chosen.windows(2).map(|w| w[1] - w[0]).collect();
                let (low, high) = (steps.iter().min().unwrap(), steps.iter().max().unwrap());
                prop_assert!(high - low <= 1, "{steps:?}");
            }
        }

        #[test]
        fn stretches_cover_a_history_newest_first(
            steps in proptest::collection::vec(1u64..30, 0..150), span in 1u64..60, least in 1usize..8,
        ) {
            let mut at = 0;
            let index: Vec<u64> = steps.iter().map(|s| { at += s; at }).collect();
            let all = stretches(&index, span, least);
            prop_assert_eq!(all.is_empty(), index.is_empty());
            prop_assert!(all.len() <= index.len());
            for (i, (begin, end)) in all.iter().copied().enumerate() {
                prop_assert!(begin <= end && end < index.len());
                let size = end - begin + 1;
                prop_assert!(index[end] - index[begin] <= span || size == least.min(index.len()), "{:?}", all);
                prop_assert!(size >= least.min(index.len()));
                prop_assert!(i > 0 || end == index.len() - 1, "the newest comes first");
                if i > 0 {
                    prop_assert!(end < all[i - 1].1 && end + 1 >= all[i - 1].0, "no latent is left out: {:?}", all);
                }
            }
            prop_assert!(all.last().is_none_or(|(begin, _)| *begin == 0));
        }

        #[test]
        fn every_frame_is_accounted_for(
            frames in proptest::collection::vec((-3i64..8, 0u32..12), 1..200),
            keep_every in 1usize..5,
            streaming in proptest::bool::ANY,
        ) {
            let sampler = FrameSampler::new(Keep::Every(keep_every), TimeDelta(5));
            let mut intake = ContextIntake::new(sampler, 1);
            let mut encoder = Sum { fail_every: 3, streaming, ..Sum::default() };
            let mut stamp = 1000;
            let (mut stored, mut last) = (0, None);
            for (step, size) in frames {
                stamp += step;
                let size = if size == 0 { 48 } else { 24 };
                let offer = intake.offer(Timestamp(stamp), (size, 16), &mut encoder);
                if offer.keep
                    && let Ok(Some(e)) = intake.push(&picture(1), Timestamp(stamp), None, &mut encoder)
                {
                    stored += 1;
                    prop_assert!(last.is_none_or(|l| e.info.index > l));
                    last = Some(e.info.index);
                }
            }
            let c = intake.counts();
            prop_assert_eq!(c.offered, c.skipped + c.kept + c.late);
            let waiting = intake.stage.frames().len() as u64;
            prop_assert_eq!(c.kept, encoder.encoded + c.cut_off + c.failed + waiting);
            prop_assert_eq!(c.latents, stored);
            prop_assert!(streaming || encoder.encoded == GROUP as u64 * stored);
            // A stream begins with every segment, and anew where a group is missing from it.
            prop_assert_eq!(encoder.resets, c.segments + encoder.groups / encoder.fail_every);
        }
    }

    /// A fake encoder: the last picture's first byte, failing now and then. A streaming one takes a single frame first.
    #[derive(Default)]
    struct Sum {
        groups: u64,
        encoded: u64,
        resets: u64,
        fail_every: u64,
        streaming: bool,
        started: bool,
    }

    impl GroupEncoder for Sum {
        fn latent_len(&self) -> usize {
            1
        }
        fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
            assert_eq!(frames.len(), self.group_len());
            self.groups += 1;
            if self.groups.is_multiple_of(self.fail_every) {
                return Err(EncodeError::Backend(BackendError::Unknown { name: "made to fail".into() }));
            }
            self.encoded += frames.len() as u64;
            self.started = true;
            latent[0] = f32::from(frames[frames.len() - 1].data[0]);
            Ok(())
        }
        fn group_len(&self) -> usize {
            if self.streaming && !self.started { 1 } else { GROUP }
        }
        fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
            latent[0] = f32::from(frame.data[0]);
            Ok(())
        }
        fn reset(&mut self) {
            self.resets += 1;
            self.started = false;
        }
    }

    #[test]
    fn stretches_overlap_by_half() {
        let even: Vec<u64> = (0..60).collect();
        assert_eq!(stretches(&even, 23, 6), [(36, 59), (24, 47), (12, 35), (0, 23)]);
        assert_eq!(stretches(&even[..24], 23, 6), [(0, 23)]);
        let thin: Vec<u64> = (0..10).map(|i| 20 * i).collect();
        assert_eq!(stretches(&thin, 23, 6), [(4, 9), (1, 6), (0, 5)]);
        assert!(stretches(&[], 23, 6).is_empty());
    }

    #[test]
    fn streams_break_for_stated_reasons() {
        use SegmentReason as R;
        let ms = TimeDelta::from_millis;
        let mut sampler = FrameSampler::new(Keep::Every(3), ms(500));
        type Case = (i64, (u32, u32), bool, Option<R>, bool);
        let cases: [Case; 13] = [
            (0, (24, 16), true, Some(R::First), false),
            (100, (24, 16), false, None, false),
            (200, (24, 16), false, None, false),
            (300, (24, 16), true, None, false),
            (300, (24, 16), false, None, false), // a repeat
            (800, (24, 16), false, None, false),
            (1301, (24, 16), true, Some(R::Gap { lasted: ms(501) }), false),
            (1401, (48, 32), false, None, true), // it takes two
            (1501, (48, 32), true, Some(R::Resolution { from: (24, 16), to: (48, 32) }), false),
            (1601, (48, 32), false, None, false),
            (301, (48, 32), false, None, true), // it takes two
            (401, (48, 32), true, Some(R::ClockBackwards { by: ms(1200) }), false),
            (501, (48, 32), false, None, false),
        ];
        for (i, (stamp, size, keep, segment, late)) in cases.into_iter().enumerate() {
            let offer = sampler.offer(Timestamp::ZERO + ms(stamp), size);
            assert_eq!(offer, Offer { keep, segment, late }, "frame {i}");
        }
        assert!(R::Gap { lasted: ms(1) }.keeps_history());
        assert!(!R::ClockBackwards { by: ms(1) }.keeps_history());
        assert_eq!(R::Gap { lasted: ms(501) }.to_string(), "no frame for 0.50 s");
    }

    #[test]
    fn frames_out_of_order_are_dropped_and_no_more() {
        // stamps in ms; which of them (by place) are dropped as late, and which begin a segment
        let check = |what: &str, stamps: &[i64], late: &[usize], segments: &[usize]| {
            let mut sampler = FrameSampler::new(Keep::Every(1), TimeDelta::from_millis(500));
            let (mut dropped, mut begun) = (vec![], vec![]);
            for (i, stamp) in stamps.iter().enumerate() {
                let offer = sampler.offer(Timestamp::ZERO + TimeDelta::from_millis(*stamp), (24, 16));
                assert!(!(offer.late && offer.keep));
                dropped.extend(offer.late.then_some(i));
                begun.extend(offer.segment.map(|_| i));
            }
            assert_eq!((dropped.as_slice(), begun.as_slice()), (late, segments), "{what}");
        };
        check("swapped", &[5000, 5100, 5300, 5200, 5400, 5500], &[3], &[0]);
        check("two swaps", &[5000, 5200, 5100, 5400, 5300, 5500], &[2, 4], &[0]);
        check("a burst out of order", &[5000, 5300, 5100, 5200, 5400], &[2], &[0]);
        check("one far behind", &[5000, 5100, 100, 5200, 5300], &[2], &[0]);
        check("one far ahead", &[5000, 5100, 9_005_000, 5200, 5300, 5400], &[3], &[0, 2]);
        check("one a little ahead", &[5000, 5100, 5500, 5200, 5300, 5400], &[3], &[0]);
        check("a clock set back by little", &[5000, 5100, 5200, 4800, 4900, 5000, 5300], &[3, 4, 5], &[0]);
        check("a bag that starts again", &[5000, 5100, 5200, 0, 100, 200], &[3], &[0, 4]);
        let slow: Vec<i64> = [5000, 5400].into_iter().chain((0..40).map(|i| 4990 + i)).collect();
        check("behind for long", &slow, &(2..31).collect::<Vec<_>>(), &[0, 31]);
    }

    #[test]
    fn a_frame_that_ran_ahead_does_not_stop_the_sampling() {
        let period = TimeDelta::from_millis(100);
        let mut sampler = FrameSampler::new(Keep::Period(period), TimeDelta::from_millis(500));
        let stamps = (0..5).chain([90_000]).chain(5..20).map(|i| 1000 + 100 * i);
        let kept = stamps.filter(|at| sampler.offer(Timestamp(at * 1_000_000), (24, 16)).keep).count();
        assert!(kept >= 19, "{kept} of 21 kept");
    }

    #[test]
    fn a_period_is_kept_at_any_camera_rate() {
        for (rate_hz, want) in [(5.0, 5), (10.0, 10), (20.0, 10), (30.0, 10), (60.0, 10), (15.0, 8)] {
            let mut sampler =
                FrameSampler::new(Keep::Period(TimeDelta::from_millis(100)), TimeDelta::from_millis(500));
            let kept = (0..rate_hz as i64 * 10)
                .filter(|i| {
                    // Stamps jitter by up to 4 ms.
                    let jitter = (i * 7919 % 9 - 4) as f64 * 1e-3;
                    let at = 1000.0 + *i as f64 / rate_hz + jitter;
                    sampler.offer(Timestamp::from_secs_f64(at), (24, 16)).keep
                })
                .count();
            assert!(
                kept.abs_diff(10 * want) <= 5,
                "{rate_hz} Hz: {kept} in ten seconds, wanted {want} a second"
            );
        }
    }

    #[test]
    fn wrong_sizes_and_orders_are_refused() {
        let mut memory = ContextMemory::new(4, 1, 2, (2, 1), None);
        memory.store(info(5), &[0.0, 1.0], &picture(3), None).unwrap();
        assert_eq!(
            memory.store(info(5), &[0.0, 1.0], &picture(3), None),
            Err(StoreError::Order { newest: 5, got: 5 })
        );
        assert!(matches!(memory.store(info(6), &[0.0], &picture(3), None), Err(StoreError::Size { .. })));
        let wide = RgbImage::filled(3, 1, [0; 3]);
        assert!(matches!(memory.store(info(6), &[0.0, 1.0], &wide, None), Err(StoreError::Size { .. })));
        assert_eq!(memory.len(), 1);
    }
}
