//! The schemas that Foxglove publishes (package `foxglove`, protocol buffers), as far as they are sent: names, numbers and
//! types of their fields, and file descriptors out of them. `tests/python/foxglove.py` holds them against the published ones.

use mindseye_engines::protobuf::Writer;
use std::sync::LazyLock;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `foxglove.CompressedImage`.
    CompressedImage,
    /// `foxglove.PosesInFrame`.
    PosesInFrame,
    /// `foxglove.SceneUpdate`.
    SceneUpdate,
    /// `foxglove.Log`.
    Log,
}

impl Kind {
    const ALL: [Self; 4] = [Self::CompressedImage, Self::PosesInFrame, Self::SceneUpdate, Self::Log];

    /// The schema's full name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CompressedImage => "foxglove.CompressedImage",
            Self::PosesInFrame => "foxglove.PosesInFrame",
            Self::SceneUpdate => "foxglove.SceneUpdate",
            Self::Log => "foxglove.Log",
        }
    }

    /// A `google.protobuf.FileDescriptorSet` of the schema and all that it needs.
    pub fn descriptors(self) -> &'static [u8] {
        static ALL: LazyLock<[Vec<u8>; 4]> = LazyLock::new(|| Kind::ALL.map(|kind| file_set(kind.name())));
        &ALL[self as usize]
    }
}

/// Fields of each message: number, name, type. A type with a capital letter is a message, with `[]` there are several,
/// after `enum` it is one of the message's own.
const MESSAGES: [(&str, &str); 22] = [
    ("google.protobuf.Timestamp", "1 seconds int64, 2 nanos int32"),
    ("google.protobuf.Duration", "1 seconds int64, 2 nanos int32"),
    ("foxglove.Vector3", "1 x double, 2 y double, 3 z double"),
    ("foxglove.Point3", "1 x double, 2 y double, 3 z double"),
    ("foxglove.Quaternion", "1 x double, 2 y double, 3 z double, 4 w double"),
    ("foxglove.Color", "1 r double, 2 g double, 3 b double, 4 a double"),
    ("foxglove.KeyValuePair", "1 key string, 2 value string"),
    ("foxglove.Pose", "1 position Vector3, 2 orientation Quaternion"),
    ("foxglove.CompressedImage", "1 timestamp Timestamp, 4 frame_id string, 2 data bytes, 3 format string"),
    ("foxglove.PosesInFrame", "1 timestamp Timestamp, 2 frame_id string, 3 poses Pose[]"),
    (
        "foxglove.Log",
        "1 timestamp Timestamp, 2 level enum Level, 3 message string, 4 name string, 5 file string, 6 line fixed32",
    ),
    (
        "foxglove.ArrowPrimitive",
        "1 pose Pose, 2 shaft_length double, 3 shaft_diameter double, 4 head_length double, 5 head_diameter double, \
         6 color Color",
    ),
    ("foxglove.CubePrimitive", "1 pose Pose, 2 size Vector3, 3 color Color"),
    ("foxglove.SpherePrimitive", "1 pose Pose, 2 size Vector3, 3 color Color"),
    (
        "foxglove.CylinderPrimitive",
        "1 pose Pose, 2 size Vector3, 3 bottom_scale double, 4 top_scale double, 5 color Color",
    ),
    (
        "foxglove.LinePrimitive",
        "1 type enum Type, 2 pose Pose, 3 thickness double, 4 scale_invariant bool, 5 points Point3[], 6 color Color, \
         7 colors Color[], 8 indices fixed32[]",
    ),
    (
        "foxglove.TriangleListPrimitive",
        "1 pose Pose, 2 points Point3[], 3 color Color, 4 colors Color[], 5 indices fixed32[]",
    ),
    (
        "foxglove.TextPrimitive",
        "1 pose Pose, 2 billboard bool, 3 font_size double, 4 scale_invariant bool, 5 color Color, 6 text string",
    ),
    (
        "foxglove.ModelPrimitive",
        "1 pose Pose, 2 scale Vector3, 3 color Color, 4 override_color bool, 5 url string, 6 media_type string, 7 data bytes",
    ),
    ("foxglove.SceneEntityDeletion", "1 timestamp Timestamp, 2 type enum Type, 3 id string"),
    (
        "foxglove.SceneEntity",
        "1 timestamp Timestamp, 2 frame_id string, 3 id string, 4 lifetime Duration, 5 frame_locked bool, \
         6 metadata KeyValuePair[], 7 arrows ArrowPrimitive[], 8 cubes CubePrimitive[], 9 spheres SpherePrimitive[], \
         10 cylinders CylinderPrimitive[], 11 lines LinePrimitive[], 12 triangles TriangleListPrimitive[], \
         13 texts TextPrimitive[], 14 models ModelPrimitive[]",
    ),
    ("foxglove.SceneUpdate", "1 deletions SceneEntityDeletion[], 2 entities SceneEntity[]"),
];

/// Enumerations within messages; values count from 0.
const ENUMERATIONS: [(&str, &str, &str); 3] = [
    ("foxglove.LinePrimitive", "Type", "LINE_STRIP LINE_LOOP LINE_LIST"),
    ("foxglove.SceneEntityDeletion", "Type", "MATCHING_ID ALL"),
    ("foxglove.Log", "Level", "UNKNOWN DEBUG INFO WARNING ERROR FATAL"),
];

/// The full name of a message that a field holds.
fn full_name(short: &str) -> &'static str {
    let is_it = |name: &&str| name.rsplit('.').next() == Some(short);
    MESSAGES.iter().map(|(name, _)| *name).find(is_it).unwrap_or_default()
}

/// The file of a message, as the published ones are called.
fn file_of(name: &str) -> String {
    match name.strip_prefix("google.protobuf.") {
        Some(short) => format!("google/protobuf/{}.proto", short.to_lowercase()),
        None => format!("{}.proto", name.replace('.', "/")),
    }
}

/// One field as it stands in [`MESSAGES`].
struct Field<'a> {
    number: i64,
    name: &'a str,
    kind: &'a str,
    is_enum: bool,
    is_repeated: bool,
}

fn fields(of: &str) -> Vec<Field<'static>> {
    let text = MESSAGES.iter().find(|(name, _)| *name == of).map_or("", |(_, fields)| *fields);
    let field = |text: &'static str| {
        let mut words = text.split_whitespace();
        let (number, name) = (words.next()?.parse().ok()?, words.next()?);
        let (first, second) = (words.next()?, words.next());
        let kind = second.unwrap_or(first);
        Some(Field {
            number,
            name,
            kind: kind.trim_end_matches("[]"),
            is_enum: second.is_some(),
            is_repeated: kind.ends_with("[]"),
        })
    };
    text.split(", ").filter_map(field).collect()
}

impl Field<'_> {
    /// `FieldDescriptorProto.Type`, and the name of the type where it has one.
    fn kind(&self, of: &str) -> (i64, String) {
        let number = match self.kind {
            _ if self.is_enum => return (14, format!(".{of}.{}", self.kind)),
            "double" => 1,
            "int64" => 3,
            "int32" => 5,
            "fixed32" => 7,
            "bool" => 8,
            "string" => 9,
            "bytes" => 12,
            message => return (11, format!(".{}", full_name(message))),
        };
        (number, String::new())
    }

    /// The message that it holds, if it holds one.
    fn message(&self) -> Option<&'static str> {
        let is_message = !self.is_enum && self.kind.starts_with(char::is_uppercase);
        is_message.then(|| full_name(self.kind))
    }
}

/// A `FileDescriptorSet`: every file after those that it needs.
fn file_set(root: &'static str) -> Vec<u8> {
    fn order(name: &'static str, out: &mut Vec<&'static str>) {
        for needed in fields(name).iter().filter_map(Field::message) {
            order(needed, out);
        }
        if !out.contains(&name) {
            out.push(name);
        }
    }
    let mut names = Vec::new();
    order(root, &mut names);
    let mut set = Writer::default();
    for name in names {
        set.message(1, |file| write_file(file, name));
    }
    set.bytes
}

/// A `FileDescriptorProto` with one message.
fn write_file(file: &mut Writer, name: &str) {
    let (package, short) = name.rsplit_once('.').unwrap_or_default();
    let fields = fields(name);
    let mut needed: Vec<String> = fields.iter().filter_map(Field::message).map(file_of).collect();
    needed.sort();
    needed.dedup();
    file.text(1, &file_of(name));
    file.text(2, package);
    for needed in &needed {
        file.text(3, needed);
    }
    file.message(4, |message| {
        message.text(1, short);
        for field in &fields {
            let (kind, type_name) = field.kind(name);
            message.message(2, |out| {
                out.text(1, field.name);
                out.int(3, field.number);
                out.int(4, if field.is_repeated { 3 } else { 1 });
                out.int(5, kind);
                out.text(6, &type_name);
            });
        }
        for (_, enumeration, values) in ENUMERATIONS.iter().filter(|(of, ..)| *of == name) {
            message.message(4, |out| {
                out.text(1, enumeration);
                for (number, value) in (0..).zip(values.split(' ')) {
                    out.message(2, |out| {
                        out.text(1, value);
                        out.int(2, number);
                    });
                }
            });
        }
    });
    file.text(12, "proto3");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_a_type_that_is_known() {
        for (name, text) in MESSAGES {
            let fields = fields(name);
            assert_eq!(fields.len(), text.split(", ").count(), "{name}");
            for field in fields {
                let (kind, type_name) = field.kind(name);
                let ends = |held: &str| held.ends_with(&format!(".{}", field.kind));
                match kind {
                    11 => assert!(field.message().is_some_and(ends), "{name}.{}: {type_name}", field.name),
                    14 => assert!(
                        ENUMERATIONS.iter().any(|(of, e, _)| *of == name && *e == field.kind),
                        "{name}.{}",
                        field.name
                    ),
                    _ => assert!(field.message().is_none(), "{name}.{}", field.name),
                }
            }
        }
    }

    #[test]
    fn files_come_after_those_that_they_need() {
        let text = String::from_utf8_lossy(Kind::SceneUpdate.descriptors()).into_owned();
        // The first place of a name is its own file's, but for the files that name it before: none does.
        let at = |file: &str| text.find(file).unwrap_or_else(|| panic!("no {file}"));
        for (before, after) in [
            ("foxglove/Color.proto", "foxglove/ArrowPrimitive.proto"),
            ("google/protobuf/duration.proto", "foxglove/SceneEntity.proto"),
            ("foxglove/SceneEntity.proto", "foxglove/SceneUpdate.proto"),
        ] {
            assert!(at(before) < at(after), "{before} {after}");
        }
        assert!(Kind::Log.descriptors().len() < 600 && Kind::SceneUpdate.descriptors().len() > 2000);
    }
}
