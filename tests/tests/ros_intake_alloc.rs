//! Intake of camera frames allocates nothing in the steady state: counted by the allocator, per thread.
#![allow(unsafe_code)] // an allocator cannot be written without

use mindseye_bridge::msg::{Header, Image, RosType};
use mindseye_bridge::ros::{Attachment, CameraIntake, RosConfig, RosSession};
use mindseye_bridge::{FramePool, Timestamp};
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

fn message(width: u32, height: u32) -> Vec<u8> {
    Image {
        header: Header::new(Timestamp(5), "camera_optical_frame"),
        height,
        width,
        encoding: "bgr8".into(),
        step: width * 3,
        data: vec![9; (width * height * 3) as usize],
        ..Default::default()
    }
    .encode()
}

/// In one process a put calls the subscribers' callbacks on the putting thread, so that the receiving side
/// can be counted: ours against a subscriber that does nothing with the sample. Then the consumer's side.
#[test]
fn steady_state() {
    let session = RosSession::open(&RosConfig::in_process("agent")).unwrap();
    let plain = session.zenoh();
    let _bare = plain.declare_subscriber("bare").callback(drop).wait().unwrap();
    let mut intake = CameraIntake::subscribe(&session, "/camera", FramePool::new(4)).unwrap();
    let key = format!("0/camera/sensor_msgs::msg::dds_::Image_/{}", Image::HASH);
    let attachment = Attachment { sequence: 1, source_stamp_ns: 2, gid: [3; 16] }.to_bytes();
    let ours = plain.declare_publisher(key).wait().unwrap();
    let theirs = plain.declare_publisher("bare").wait().unwrap();
    // In two pieces, as large messages come over a network.
    let bytes = message(640, 480);
    let (head, tail) = bytes.split_at(60_000);
    let mut payload = zenoh::bytes::ZBytes::writer();
    payload.append(head.into());
    payload.append(tail.into());
    let payload = payload.finish();

    let mut intake_counts = Vec::new();
    let mut put_counts = Vec::new();
    for _ in 0..50 {
        let put = |publisher: &zenoh::pubsub::Publisher<'static>| {
            let payload = payload.clone();
            allocations(|| publisher.put(payload).attachment(attachment).wait().unwrap()).0
        };
        put_counts.push((put(&theirs), put(&ours)));
        let (count, frame) = allocations(|| intake.next(Duration::from_secs(10)));
        let frame = frame.expect("frame").expect("decoded");
        assert_eq!((frame.width, frame.height, frame.rgb.len()), (640, 480, 640 * 480 * 3));
        intake_counts.push(count);
    }
    println!(
        "allocations per put (bare, ours): {:?}; per frame taken: {:?}",
        put_counts[49], intake_counts[49]
    );
    assert!(intake_counts[0] > 0, "the counter counts");
    assert!(intake_counts[5..].iter().all(|c| *c == 0), "{intake_counts:?}");
    assert!(put_counts[5..].iter().all(|(bare, ours)| ours <= bare), "{put_counts:?}");
    assert_eq!(intake.counts().decoded, 50);
}
