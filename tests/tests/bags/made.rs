//! Bags made byte by byte, to say what no writer would say.

/// A record of an MCAP file: opcode, length, body.
pub fn record(op: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![op];
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    prefixed(text.as_bytes())
}

fn prefixed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

fn map(pairs: &[(&str, &str)]) -> Vec<u8> {
    prefixed(&pairs.iter().flat_map(|(k, v)| [text(k), text(v)].concat()).collect::<Vec<u8>>())
}

pub fn schema(id: u16, name: &str, encoding: &str, data: &[u8]) -> Vec<u8> {
    record(3, &[&id.to_le_bytes()[..], &text(name), &text(encoding), &prefixed(data)].concat())
}

pub fn channel(id: u16, schema: u16, topic: &str, encoding: &str, metadata: &[(&str, &str)]) -> Vec<u8> {
    let head = [id.to_le_bytes(), schema.to_le_bytes()].concat();
    record(4, &[&head[..], &text(topic), &text(encoding), &map(metadata)].concat())
}

fn message(channel: u16, sequence: u32, log: u64, data: &[u8]) -> Vec<u8> {
    let mut body = channel.to_le_bytes().to_vec();
    body.extend(sequence.to_le_bytes());
    body.extend(log.to_le_bytes());
    body.extend((log + 1).to_le_bytes());
    body.extend(data);
    record(5, &body)
}

pub fn attachment(name: &str, media_type: &str, data: &[u8]) -> Vec<u8> {
    let mut body = 11u64.to_le_bytes().to_vec();
    body.extend(12u64.to_le_bytes());
    body.extend(text(name));
    body.extend(text(media_type));
    body.extend((data.len() as u64).to_le_bytes());
    body.extend(data);
    body.extend(crc32(&body).to_le_bytes());
    record(9, &body)
}

pub fn metadata(name: &str, entries: &[(&str, &str)]) -> Vec<u8> {
    record(12, &[text(name), map(entries)].concat())
}

/// CRC-32 of ISO 3309, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// A CDR string.
pub fn string_cdr(content: &str) -> Vec<u8> {
    let mut cdr = vec![0, 1, 0, 0];
    cdr.extend((content.len() as u32 + 1).to_le_bytes());
    cdr.extend(content.as_bytes());
    cdr.push(0);
    cdr
}

/// A chunk as the index describes it.
struct Indexed {
    start: u64,
    end: u64,
    at: usize,
    len: usize,
    index_len: usize,
    channels: Vec<u16>,
}

/// An MCAP file in the making.
pub struct Mcap {
    pub bytes: Vec<u8>,
    chunks: Vec<Indexed>,
    /// Schemas and channels, which the summary repeats.
    declared: Vec<u8>,
    counts: Vec<(u16, u64)>,
    /// Messages that the statistics add to those that are there.
    pub more: u64,
}

impl Mcap {
    pub fn new(profile: &str) -> Self {
        let mut bytes = b"\x89MCAP0\r\n".to_vec();
        bytes.extend(record(1, &[text(profile), text("made by a test")].concat()));
        Self { bytes, chunks: Vec::new(), declared: Vec::new(), counts: Vec::new(), more: 0 }
    }

    /// A schema or channel, before the messages.
    pub fn declare(&mut self, record: Vec<u8>) {
        self.bytes.extend(&record);
        self.declared.extend(record);
    }

    /// Any record, outside chunks.
    pub fn put(&mut self, record: &[u8]) {
        self.bytes.extend(record);
    }

    fn count(&mut self, channel: u16) {
        match self.counts.iter_mut().find(|(known, _)| *known == channel) {
            Some((_, count)) => *count += 1,
            None => self.counts.push((channel, 1)),
        }
    }

    /// A message outside chunks.
    pub fn bare(&mut self, channel: u16, log: u64, data: &[u8]) {
        self.bytes.extend(message(channel, 1, log, data));
        self.count(channel);
    }

    /// A stored chunk of messages (channel, sequence, log time, data) whose index claims this range. With `others`,
    /// records before the messages. Without `indexed`, there is no message index.
    pub fn chunk(
        &mut self,
        (start, end): (u64, u64),
        messages: &[(u16, u32, u64, Vec<u8>)],
        others: &[u8],
        indexed: bool,
    ) {
        let mut records = others.to_vec();
        let mut entries: Vec<(u16, Vec<u8>)> = Vec::new();
        for (channel, sequence, log, data) in messages {
            let entry = [log.to_le_bytes(), (records.len() as u64).to_le_bytes()].concat();
            match entries.iter_mut().find(|(known, _)| known == channel) {
                Some((_, of_channel)) => of_channel.extend(entry),
                None => entries.push((*channel, entry)),
            }
            records.extend(message(*channel, *sequence, *log, data));
            self.count(*channel);
        }
        let mut body = start.to_le_bytes().to_vec();
        body.extend(end.to_le_bytes());
        body.extend((records.len() as u64).to_le_bytes());
        body.extend(crc32(&records).to_le_bytes());
        body.extend(text(""));
        body.extend((records.len() as u64).to_le_bytes());
        body.extend(&records);
        let at = self.bytes.len();
        self.bytes.extend(record(6, &body));
        let len = self.bytes.len() - at;
        let (mut channels, mut index) = (Vec::new(), Vec::new());
        if indexed {
            for (channel, of_channel) in entries {
                channels.push(channel);
                index.extend(record(7, &[&channel.to_le_bytes()[..], &prefixed(&of_channel)].concat()));
            }
        }
        self.bytes.extend(&index);
        self.chunks.push(Indexed { start, end, at, len, index_len: index.len(), channels });
    }

    /// The file, with a summary.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend(record(15, &[0; 4]));
        let start = self.bytes.len() as u64;
        self.bytes.extend(&self.declared);
        let total = self.counts.iter().map(|(_, n)| n).sum::<u64>() + self.more;
        let mut body = total.to_le_bytes().to_vec();
        body.extend([0; 14]);
        body.extend((self.chunks.len() as u32).to_le_bytes());
        body.extend([0; 16]);
        let mut counts = Vec::new();
        for (at, (channel, count)) in self.counts.iter().enumerate() {
            counts.extend(channel.to_le_bytes());
            counts.extend((count + if at == 0 { self.more } else { 0 }).to_le_bytes());
        }
        body.extend(prefixed(&counts));
        self.bytes.extend(record(11, &body));
        for chunk in &self.chunks {
            let mut body = Vec::new();
            for number in [chunk.start, chunk.end, chunk.at as u64, chunk.len as u64] {
                body.extend(number.to_le_bytes());
            }
            let offsets: Vec<u8> =
                chunk.channels.iter().flat_map(|c| [&c.to_le_bytes()[..], &[0; 8]].concat()).collect();
            body.extend(prefixed(&offsets));
            body.extend((chunk.index_len as u64).to_le_bytes());
            body.extend(text(""));
            body.extend([0; 16]);
            self.bytes.extend(record(8, &body));
        }
        let footer = [&start.to_le_bytes()[..], &[0; 12]].concat();
        self.bytes.extend(record(2, &footer));
        self.bytes.extend(b"\x89MCAP0\r\n");
        self.bytes
    }
}

/// A record of a ROS 1 bag.
fn ros1_record(fields: &[(&str, &[u8])], data: &[u8]) -> Vec<u8> {
    let header = ros1_fields(fields);
    [prefixed(&header), prefixed(data)].concat()
}

fn ros1_fields(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let one = |(name, value): &(&str, &[u8])| prefixed(&[name.as_bytes(), b"=", value].concat());
    fields.iter().flat_map(one).collect()
}

fn ros1_time(seconds: u32) -> Vec<u8> {
    [seconds.to_le_bytes(), [0; 4]].concat()
}

/// A connection of a ROS 1 bag: topic, type, definition, further fields.
pub struct Connection<'a> {
    pub topic: &'a str,
    pub type_name: &'a str,
    pub definition: &'a [u8],
    pub more: &'a [(&'a str, &'a [u8])],
}

/// A ROS 1 bag with one stored chunk of messages (connection, seconds, data), and messages outside it. With `silent`,
/// the index says that the chunk is empty.
pub fn ros1_bag(
    connections: &[Connection<'_>],
    messages: &[(u32, u32, Vec<u8>)],
    bare: &[(u32, u32, Vec<u8>)],
    silent: bool,
) -> Vec<u8> {
    let declared: Vec<u8> = connections
        .iter()
        .zip(0u32..)
        .flat_map(|(c, id)| {
            let mut fields: Vec<(&str, &[u8])> = vec![
                ("topic", c.topic.as_bytes()),
                ("type", c.type_name.as_bytes()),
                ("md5sum", b"*"),
                ("message_definition", c.definition),
            ];
            fields.extend(c.more);
            let id = id.to_le_bytes();
            ros1_record(&[("op", &[7]), ("conn", &id), ("topic", c.topic.as_bytes())], &ros1_fields(&fields))
        })
        .collect();
    let put = |(connection, seconds, data): &(u32, u32, Vec<u8>)| {
        let (id, time) = (connection.to_le_bytes(), ros1_time(*seconds));
        ros1_record(&[("op", &[2]), ("conn", &id), ("time", &time)], data)
    };
    let mut chunk = declared.clone();
    chunk.extend(messages.iter().flat_map(put));
    let size = (chunk.len() as u32).to_le_bytes();
    let mut body = ros1_record(&[("op", &[5]), ("compression", b"none"), ("size", &size)], &chunk);
    body.extend(bare.iter().flat_map(put));

    let head_len = 4096u64;
    let first = 13 + head_len;
    let index_pos = (first + body.len() as u64).to_le_bytes();
    let (conn_count, chunk_count) = ((connections.len() as u32).to_le_bytes(), 1u32.to_le_bytes());
    let fields: [(&str, &[u8]); 4] =
        [("op", &[3]), ("index_pos", &index_pos), ("conn_count", &conn_count), ("chunk_count", &chunk_count)];
    let header_len = 4 + ros1_fields(&fields).len() as u64;
    let pad = vec![b' '; (head_len - header_len - 4) as usize];
    let mut bytes = b"#ROSBAG V2.0\n".to_vec();
    bytes.extend(ros1_record(&fields, &pad));
    bytes.extend(body);
    bytes.extend(declared);
    let (low, high) = (messages.iter().map(|m| m.1).min(), messages.iter().map(|m| m.1).max());
    let mut counts = Vec::new();
    for id in 0..connections.len() as u32 {
        let count = messages.iter().filter(|m| m.0 == id).count() as u32;
        counts.extend(id.to_le_bytes());
        counts.extend((if silent { 0 } else { count }).to_le_bytes());
    }
    let (position, start, end) =
        (first.to_le_bytes(), ros1_time(low.unwrap_or(0)), ros1_time(high.unwrap_or(0)));
    let count = (connections.len() as u32).to_le_bytes();
    bytes.extend(ros1_record(
        &[
            ("op", &[6]),
            ("ver", &1u32.to_le_bytes()),
            ("chunk_pos", &position),
            ("start_time", &start),
            ("end_time", &end),
            ("count", &count),
        ],
        &counts,
    ));
    bytes
}
