//! Streaming messages in order across chunks and files.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use super::cdr::HeaderStamp;
use super::side::{PRIVATE_BYTES_MAX, PrivateRecord};
use super::source::{Payload, Pool};
use super::{Bag, Chunk, Damage, Entry, OpenFile, TopicId, file_label};

/// The stamp by which messages are ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// When the recorder received them.
    #[default]
    LogTime,
    /// When they were sent; formats that do not store it use the log time. Reads the bag twice.
    PublishTime,
    /// `header.stamp`; messages without a header use the log time. Reads the bag twice.
    HeaderTime,
}

/// What is read of a bag.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// Topics by name; `None`: all.
    pub topics: Option<Vec<String>>,
    /// First stamp wanted (of the chosen order), in nanoseconds since the Unix epoch.
    pub start_ns: Option<i64>,
    /// Last stamp wanted.
    pub end_ns: Option<i64>,
    /// Order of the messages.
    pub order: Order,
    /// Threads that decompress ahead; `None`: one per core, at most 4; 0: none.
    pub threads: Option<usize>,
}

/// One message as it lies in the bag.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RawMessage {
    /// Its topic.
    pub topic: TopicId,
    /// Which of [`TopicInfo::publishers`](super::TopicInfo::publishers) sent it.
    pub publisher: u32,
    /// Sequence number that the recorder gave it; 0 where the format has none.
    pub sequence: u32,
    /// When the recorder received it, in nanoseconds since the Unix epoch.
    pub log_time_ns: i64,
    /// When it was sent; the log time where the format does not store it.
    pub publish_time_ns: i64,
    /// The stamp by which the messages are ordered.
    pub order_time_ns: i64,
    /// The bytes, in the encoding of the topic; message compression is already undone.
    pub data: Payload,
}

/// A chunk that waits to be loaded.
#[derive(Clone, Copy)]
struct Planned {
    start_ns: i64,
    file: u32,
    chunk: u32,
}

/// A loaded chunk, filtered and sorted.
struct Sorted {
    data: Vec<u8>,
    entries: Vec<(i64, Entry)>,
    /// Messages of the chunk, before any choice.
    loaded: u64,
    private: Vec<PrivateRecord>,
    damage: Vec<Damage>,
}

/// What the loading threads need.
struct Shared {
    files: Arc<Vec<OpenFile>>,
    stamps: Vec<Option<HeaderStamp>>,
    wanted: Vec<bool>,
    order: Order,
    start_ns: i64,
    end_ns: i64,
    pool: Pool,
}

impl Shared {
    fn load(&self, planned: Planned) -> Sorted {
        let open = &self.files[planned.file as usize];
        let mut chunk = Chunk { data: self.pool.take(), ..Chunk::default() };
        open.file.load(planned.chunk as usize, &mut chunk);
        let Chunk { data, entries, private, damage } = chunk;
        let loaded = entries.len() as u64;
        let mut sorted = true;
        let mut last = i64::MIN;
        let entries: Vec<(i64, Entry)> = entries
            .iter()
            .filter_map(|entry| {
                let topic = open.topics.get(entry.topic as usize)?.0;
                let publishers = &open.publishers[entry.topic as usize];
                let publisher = publishers.get(entry.publisher as usize).copied().unwrap_or(0);
                let entry = Entry { topic, publisher, ..*entry };
                if !self.wanted[topic as usize] {
                    return None;
                }
                let key = match self.order {
                    Order::LogTime => entry.log_ns,
                    Order::PublishTime => entry.publish_ns,
                    Order::HeaderTime => self.stamps[topic as usize]
                        .and_then(|stamp| stamp.of(&data[entry.start..entry.start + entry.len]))
                        .unwrap_or(entry.log_ns),
                };
                if key < self.start_ns || key > self.end_ns {
                    return None;
                }
                sorted &= key >= last;
                last = key;
                Some((key, entry))
            })
            .collect();
        let mut entries = entries;
        if !sorted {
            entries.sort_by_key(|(key, _)| *key);
        }
        Sorted { data, entries, loaded, private, damage }
    }
}

/// Loads planned chunks ahead, in order: lane `k % lanes` delivers chunk `k`.
struct Pipeline {
    shared: Arc<Shared>,
    plan: Arc<Vec<Planned>>,
    next: usize,
    lanes: Vec<Receiver<Sorted>>,
}

impl Pipeline {
    fn new(shared: Arc<Shared>, plan: Vec<Planned>, threads: usize) -> Self {
        let plan = Arc::new(plan);
        let mut lanes = Vec::new();
        // A thread costs more than a few chunks.
        if plan.len() > 2 {
            for lane in 0..threads {
                let (sender, receiver) = sync_channel(1);
                let (shared, plan) = (Arc::clone(&shared), Arc::clone(&plan));
                let spawned = std::thread::Builder::new().name("bag-read".to_owned()).spawn(move || {
                    for planned in plan.iter().skip(lane).step_by(threads) {
                        if sender.send(shared.load(*planned)).is_err() {
                            return;
                        }
                    }
                });
                if spawned.is_err() {
                    lanes.clear();
                    break;
                }
                lanes.push(receiver);
            }
        }
        Self { shared, plan, next: 0, lanes }
    }

    fn peek(&self) -> Option<Planned> {
        self.plan.get(self.next).copied()
    }

    fn take(&mut self) -> Option<(Planned, Sorted)> {
        let planned = self.peek()?;
        let loaded = match self.lanes.len() {
            0 => self.shared.load(planned),
            // A lane that is gone leaves its work to us.
            lanes => self.lanes[self.next % lanes].recv().unwrap_or_else(|_| self.shared.load(planned)),
        };
        self.next += 1;
        Some((planned, loaded))
    }
}

struct Active {
    data: Arc<Vec<u8>>,
    entries: Vec<(i64, Entry)>,
    next: usize,
}

/// The next message of a loaded chunk: order time, place of the chunk in the bag, slot of the chunk.
type Head = Reverse<(i64, (u32, u32), usize)>;

/// Name and stated number of messages of each file.
fn stated(bag: &Bag) -> Vec<(String, u64, u64)> {
    let names = bag.info.files.iter().map(|path| file_label(path));
    let counts = bag.files.iter().map(|file| file.messages);
    names.zip(counts).map(|(name, count)| (name, count, 0)).collect()
}

/// Messages of a bag in order; made by [`Bag::messages`].
pub struct Messages {
    pipeline: Pipeline,
    slots: Vec<Option<Active>>,
    heads: BinaryHeap<Head>,
    /// Buffers of chunks that are read, maybe still in use by a message.
    retired: Vec<Arc<Vec<u8>>>,
    damage: Vec<Damage>,
    private: Vec<PrivateRecord>,
    private_bytes: usize,
    /// Where everything is read: by file, its name, the number of messages that the index states, and those that came.
    tally: Vec<(String, u64, u64)>,
}

impl Messages {
    pub(super) fn new(bag: &Bag, options: &ReadOptions) -> Self {
        let info = bag.info();
        let wanted: Vec<bool> = info
            .topics
            .iter()
            .map(|t| options.topics.as_ref().is_none_or(|names| names.contains(&t.name)))
            .collect();
        let threads = options
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get().min(4)));
        let stamps = match options.order {
            Order::HeaderTime => info.topics.iter().map(HeaderStamp::find).collect(),
            _ => vec![None; info.topics.len()],
        };
        let shared = |start_ns, end_ns| {
            Arc::new(Shared {
                files: Arc::clone(&bag.files),
                stamps: stamps.clone(),
                wanted: wanted.clone(),
                order: options.order,
                start_ns,
                end_ns,
                pool: Pool::default(),
            })
        };
        let (start_ns, end_ns) = (options.start_ns.unwrap_or(i64::MIN), options.end_ns.unwrap_or(i64::MAX));
        let mut plan = Vec::new();
        for (file, open) in bag.files.iter().enumerate() {
            let all = wanted.iter().all(|w| *w);
            let of_file = |topic: u32| open.topics.get(topic as usize).is_some_and(|t| wanted[t.0 as usize]);
            for (chunk, meta) in open.file.chunks().iter().enumerate() {
                if all || open.file.may_hold(chunk, &of_file) {
                    plan.push((
                        Planned { start_ns: meta.start_ns, file: file as u32, chunk: chunk as u32 },
                        meta.end_ns,
                    ));
                }
            }
        }
        let in_range = |start: i64, end: i64| start <= end_ns && end >= start_ns;
        let plan: Vec<Planned> = if options.order == Order::LogTime {
            plan.into_iter().filter(|(p, end)| in_range(p.start_ns, *end)).map(|(p, _)| p).collect()
        } else {
            // First pass: where each chunk lies in the wanted order.
            let everything = plan.into_iter().map(|(p, _)| p).collect();
            let mut first = Pipeline::new(shared(i64::MIN, i64::MAX), everything, threads);
            let mut ranged = Vec::new();
            while let Some((planned, sorted)) = first.take() {
                if let (Some((low, _)), Some((high, _))) = (sorted.entries.first(), sorted.entries.last())
                    && in_range(*low, *high)
                {
                    ranged.push(Planned { start_ns: *low, ..planned });
                }
                first.shared.pool.give(sorted.data);
            }
            ranged
        };
        let everything = options.topics.is_none()
            && options.start_ns.is_none()
            && options.end_ns.is_none()
            && options.order == Order::LogTime;
        let tally = if everything { stated(bag) } else { Vec::new() };
        let mut plan = plan;
        plan.sort_by_key(|p| (p.start_ns, p.file, p.chunk));
        Self {
            pipeline: Pipeline::new(shared(start_ns, end_ns), plan, threads),
            slots: Vec::new(),
            heads: BinaryHeap::new(),
            retired: Vec::new(),
            damage: Vec::new(),
            private: Vec::new(),
            private_bytes: 0,
            tally,
        }
    }

    /// Records of private kinds that lay among the messages; complete after the last message.
    #[must_use]
    pub fn private_records(&self) -> &[PrivateRecord] {
        &self.private
    }

    fn keep_private(&mut self, records: Vec<PrivateRecord>) {
        /// Of a record without content.
        const RECORD_BYTES: usize = 64;
        for record in records {
            self.private_bytes = self.private_bytes.saturating_add(record.data.len() + RECORD_BYTES);
            if self.private_bytes <= PRIVATE_BYTES_MAX {
                self.private.push(record);
            }
        }
    }

    /// Holds what was read of each file against what its index states.
    fn compare(&mut self) {
        for (file, stated, came) in std::mem::take(&mut self.tally) {
            let of_file = || self.damage.iter().filter(|d| d.file == file);
            // Damage that cannot say how much it cost explains any number.
            if of_file().any(|d| d.messages_lost.is_none()) {
                continue;
            }
            let lost: u64 = of_file().filter_map(|d| d.messages_lost).sum();
            if came + lost != stated {
                let what = format!("the index counts {stated} messages, {came} were read");
                let missing = stated.saturating_sub(came + lost);
                self.damage.push(Damage::new(&file, what).messages(Some(missing)));
            }
        }
    }

    /// Damage met so far; complete after the last message.
    #[must_use]
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    fn activate(&mut self, planned: Planned, sorted: Sorted) {
        self.damage.extend(sorted.damage);
        if let Some((_, _, came)) = self.tally.get_mut(planned.file as usize) {
            *came += sorted.loaded;
        }
        self.keep_private(sorted.private);
        for buffer in self.retired.drain(..) {
            if let Ok(buffer) = Arc::try_unwrap(buffer) {
                self.pipeline.shared.pool.give(buffer);
            }
        }
        let Some((key, _)) = sorted.entries.first() else {
            self.pipeline.shared.pool.give(sorted.data);
            return;
        };
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.heads.push(Reverse((*key, (planned.file, planned.chunk), slot)));
        self.slots[slot] = Some(Active { data: Arc::new(sorted.data), entries: sorted.entries, next: 0 });
    }
}

impl Iterator for Messages {
    type Item = RawMessage;

    fn next(&mut self) -> Option<RawMessage> {
        loop {
            let next_key = self.heads.peek().map(|Reverse((key, ..))| *key);
            let must_load = match (self.pipeline.peek(), next_key) {
                (Some(planned), Some(key)) => planned.start_ns <= key,
                (Some(_), None) => true,
                (None, _) => false,
            };
            if !must_load {
                break;
            }
            let (planned, sorted) = self.pipeline.take()?;
            self.activate(planned, sorted);
        }
        if self.heads.is_empty() {
            self.compare();
        }
        let mut head = self.heads.peek_mut()?;
        let Reverse((key, _, slot)) = *head;
        let active = self.slots[slot].as_mut()?;
        let (_, entry) = active.entries[active.next];
        active.next += 1;
        let message = RawMessage {
            topic: TopicId(entry.topic),
            publisher: entry.publisher,
            sequence: entry.sequence,
            log_time_ns: entry.log_ns,
            publish_time_ns: entry.publish_ns,
            order_time_ns: key,
            data: Payload::new(Arc::clone(&active.data), entry.start, entry.len),
        };
        match active.entries.get(active.next) {
            Some((next_key, _)) => head.0.0 = *next_key,
            None => {
                std::collections::binary_heap::PeekMut::pop(head);
                // The message below still uses the buffer: it is reused when the next chunk comes in.
                if let Some(done) = self.slots[slot].take() {
                    self.retired.push(done.data);
                }
            }
        }
        Some(message)
    }
}
