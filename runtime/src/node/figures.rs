//! Figures that the node's threads share.

use super::NodeCounts;
use crate::context::ContextCounts;
use crate::profile::Profile;
use crate::senses::{ContextHandle, SenseFaults};
pub(super) use mindseye_base::sync::lock;
use mindseye_bridge::ros::SubscriberCounts;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Figures that the threads share.
#[derive(Default)]
pub(super) struct Figures {
    pub context: Mutex<ContextCounts>,
    pub profile: Mutex<Profile>,
    /// The senses' own, copied over now and then: nobody waits for a lock while a frame is encoded.
    pub senses_profile: Mutex<Profile>,
    pub camera: Mutex<SubscriberCounts>,
    pub poses_dropped: AtomicU64,
    pub events_dropped: AtomicU64,
    pub bad_messages: AtomicU64,
    pub ignored_frames: AtomicU64,
    pub segments: Mutex<String>,
    /// What is wrong with the senses.
    pub faults: Mutex<SenseFaults>,
}

impl Figures {
    /// Durations per stage, of senses and mind together.
    pub fn profile(&self) -> Profile {
        let mut all = lock(&self.profile).clone();
        all.absorb(&lock(&self.senses_profile));
        all
    }

    /// Counts so far.
    pub fn counts(&self, context: &ContextHandle) -> NodeCounts {
        let camera = *lock(&self.camera);
        NodeCounts {
            context: *lock(&self.context),
            camera_received: camera.received,
            camera_dropped: camera.dropped + camera.missed,
            latents: context.latents(),
            bad_messages: self.bad_messages.load(Ordering::Relaxed),
        }
    }
}
