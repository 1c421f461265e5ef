//! What a bag holds beside messages: attachments, metadata records, records of private kinds.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::OpenFile;

/// A file that was put into a bag.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attachment {
    /// Its name, for example `calibration.yaml`.
    pub name: String,
    /// Its media type, for example `text/yaml`; may be empty.
    pub media_type: String,
    /// When it was recorded, in nanoseconds since the Unix epoch.
    pub log_time_ns: u64,
    /// When it was made, in nanoseconds since the Unix epoch; 0 when that is not known.
    pub create_time_ns: u64,
    /// Its size in bytes.
    pub bytes: u64,
    content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// File of the bag, and the first byte in it.
    File {
        file: usize,
        at: u64,
    },
    Memory(Arc<[u8]>),
}

/// Names and values that a recorder wrote down.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MetadataRecord {
    /// Its name.
    pub name: String,
    /// What it says.
    pub entries: BTreeMap<String, String>,
}

/// A record of a kind that the format leaves to applications.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrivateRecord {
    /// Its kind: 128 or more.
    pub opcode: u8,
    /// Its content.
    pub data: Arc<[u8]>,
}

/// Everything beside the messages of one file.
#[derive(Debug, Default)]
pub(super) struct SideRecords {
    pub attachments: Vec<Attachment>,
    pub metadata: Vec<MetadataRecord>,
    pub private: Vec<PrivateRecord>,
    /// Memory that the private records take.
    private_bytes: usize,
}

impl Attachment {
    /// An attachment whose content starts at byte `at` of the file that is being opened.
    pub(super) fn in_file(
        (name, media_type): (String, String),
        (log_time_ns, create_time_ns): (u64, u64),
        at: u64,
        bytes: u64,
    ) -> Self {
        let content = Content::File { file: 0, at };
        Self { name, media_type, log_time_ns, create_time_ns, bytes, content }
    }

    /// An attachment that is not part of a file of the bag.
    pub(super) fn in_memory(name: &str, media_type: &str, data: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            media_type: media_type.to_owned(),
            log_time_ns: 0,
            create_time_ns: 0,
            bytes: data.len() as u64,
            content: Content::Memory(data.into()),
        }
    }

    /// Says which file of the bag it lies in.
    pub(super) fn of_file(mut self, number: usize) -> Self {
        if let Content::File { file, .. } = &mut self.content {
            *file = number;
        }
        self
    }
}

pub(super) fn read_attachment<E: From<io::Error>>(
    files: &[OpenFile],
    attachment: &Attachment,
    each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    const PIECE: u64 = 1 << 20;
    let (file, start) = match &attachment.content {
        Content::Memory(data) => return each(data),
        Content::File { file, at } => (files.get(*file), *at),
    };
    let file = file.ok_or_else(|| E::from(io::ErrorKind::NotFound.into()))?;
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < attachment.bytes {
        buffer.resize((attachment.bytes - done).min(PIECE) as usize, 0);
        let got = file.file.read_at(start + done, &mut buffer).map_err(E::from)?;
        if got < buffer.len() {
            return Err(E::from(io::ErrorKind::UnexpectedEof.into()));
        }
        each(&buffer)?;
        done += got as u64;
    }
    Ok(())
}

/// Private records that are kept of one file, in bytes; later ones are dropped, which is reported.
pub(super) const PRIVATE_BYTES_MAX: usize = 64 << 20;

impl SideRecords {
    /// Keeps a private record; false when there is no room for it.
    pub fn keep_private(&mut self, opcode: u8, data: &[u8]) -> bool {
        /// Of a record without content.
        const RECORD_BYTES: usize = 64;
        self.private_bytes = self.private_bytes.saturating_add(data.len() + RECORD_BYTES);
        if self.private_bytes > PRIVATE_BYTES_MAX {
            return false;
        }
        self.private.push(PrivateRecord { opcode, data: data.into() });
        true
    }
}
