//! Intake of camera frames allocates nothing in the steady state: counted by the allocator, per thread.
#![allow(unsafe_code)] // an allocator cannot be written without

use mindseye::context::{EncodeError, GroupEncoder, Keep};
use mindseye::image::{ModelCamera, RgbImage};
use mindseye::imagine::NoClock;
use mindseye::profile::Profile;
use mindseye::senses::{Sense, Senses, SensesConfig};
use mindseye_bridge::msg::{Header, Image, RosType};
use mindseye_bridge::ros::{Attachment, Qos, QueuePolicy, RosConfig, RosSession};
use mindseye_bridge::{TimeDelta, Timestamp};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;
use zenoh::Wait;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is handed to the system's allocator unchanged; the counter is a plain thread-local
// cell without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's own promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's own promise, passed on.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's own promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations<T>(f: impl FnOnce() -> T) -> (u64, T) {
    let before = ALLOCATIONS.with(Cell::get);
    let out = f();
    (ALLOCATIONS.with(Cell::get) - before, out)
}

fn message(number: i64, width: u32, height: u32) -> Vec<u8> {
    Image {
        header: Header::new(at(number), "camera_optical_frame"),
        height,
        width,
        encoding: "bgr8".into(),
        step: width * 3,
        data: vec![number as u8; (width * height * 3) as usize],
        ..Default::default()
    }
    .encode()
}

fn at(number: i64) -> Timestamp {
    Timestamp::ZERO + TimeDelta::from_millis(1000 + 33 * number)
}

/// An encoder that allocates nothing, in place of the model's, whose engine does as it likes.
struct Means;

impl GroupEncoder for Means {
    fn latent_len(&self) -> usize {
        8
    }
    fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
        latent.fill(f32::from(frames[frames.len() - 1].data[0]));
        Ok(())
    }
    fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
        latent.fill(f32::from(frame.data[0]));
        Ok(())
    }
    fn reset(&mut self) {}
}

/// In one process a put calls the subscribers' callbacks on the putting thread, so that the receiving side
/// can be counted: ours against a subscriber that does nothing with the sample. Then the consumer's side, as the
/// senses' thread of a node does it: out of the queue, in one piece, through the senses into the memory. Every frame is
/// kept and every fourth becomes a latent.
#[test]
fn steady_state() {
    let session = RosSession::open(&RosConfig::in_process("agent")).unwrap();
    let plain = session.zenoh();
    let _bare = plain.declare_subscriber("bare").callback(drop).wait().unwrap();
    let subscriber = session
        .raw_subscriber(
            "/camera",
            Image::NAME,
            Some(Image::HASH),
            &Qos::SENSOR_DATA,
            QueuePolicy::KeepLast(16),
        )
        .unwrap();
    let config = SensesConfig { keep: Keep::Every(1), capacity: 4, ..SensesConfig::default() };
    let mut senses = Senses::new(config, ModelCamera::from_fov(24, 16, 1.5), Box::new(Means));
    let (mut scratch, mut profile) = (Vec::new(), Profile::default());
    let key = format!("0/camera/sensor_msgs::msg::dds_::Image_/{}", Image::HASH);
    let attachment = Attachment { sequence: 1, source_stamp_ns: 2, gid: [3; 16] }.to_bytes();
    let ours = plain.declare_publisher(key).wait().unwrap();
    let theirs = plain.declare_publisher("bare").wait().unwrap();

    let mut intake_counts = Vec::new();
    let mut put_counts = Vec::new();
    for number in 0..50 {
        // In two pieces, as large messages come over a network.
        let bytes = message(number, 640, 480);
        let (head, tail) = bytes.split_at(60_000);
        let mut payload = zenoh::bytes::ZBytes::writer();
        payload.append(head.into());
        payload.append(tail.into());
        let payload = payload.finish();
        let put = |publisher: &zenoh::pubsub::Publisher<'static>| {
            let payload = payload.clone();
            allocations(|| publisher.put(payload).attachment(attachment).wait().unwrap()).0
        };
        put_counts.push((put(&theirs), put(&ours)));
        let (count, frame) = allocations(|| {
            let sample = subscriber.recv_timeout(Duration::from_secs(10)).expect("frame");
            let cdr = sample.bytes(&mut scratch);
            senses
                .take(Sense::Image, cdr, sample.info.received_at, &NoClock, &mut profile)
                .expect("taken")
                .frame
        });
        assert_eq!(frame, Some(at(number)));
        intake_counts.push(count);
    }
    println!(
        "allocations per put (bare, ours): {:?}; per frame taken: {:?}",
        put_counts[49], intake_counts[49]
    );
    assert!(intake_counts[0] > 0, "the counter counts");
    assert!(intake_counts[5..].iter().all(|c| *c == 0), "{intake_counts:?}");
    assert!(put_counts[5..].iter().all(|(bare, ours)| ours <= bare), "{put_counts:?}");
    let counts = senses.counts();
    assert_eq!((counts.kept, counts.latents, counts.failed), (50, 12, 0));
    assert_eq!(senses.context().scene().unwrap().newest.data[0], 49);
}
