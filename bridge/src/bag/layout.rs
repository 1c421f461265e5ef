//! Under which type hash the messages of a topic travel: the layout that was recorded decides, not the name alone.
//!
//! Types keep their name and change their layout: `visualization_msgs/Marker` gained fields with Humble, `vision_msgs`
//! was reworked several times, ROS 1 has its own layouts of both. rmw_zenoh matches by RIHS01 hash (REP-2011), which is
//! the SHA-256 of the type description, so a message under the hash of another layout is received and cannot be decoded.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mindseye_base::file::sha256;

use super::cdr::{TranscodeError, check_cdr};
use super::schema::{self, Count, Field, FillIn, Item, Schema, SchemaError};
use super::{Encoding, TopicInfo};

/// Stands in the place of a hash for ROS 2 Humble, which knows none.
const HASH_NOT_SUPPORTED: &str = "TypeHashNotSupported";

/// ROS 1 types that have another name in ROS 2 and the same layout.
const RENAMED: [(&str, &str); 1] = [("tf/msg/tfMessage", "tf2_msgs/msg/TFMessage")];

/// How the hash of a [`TypeKey`] was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HashBasis {
    /// The bag holds it.
    Recorded,
    /// The recorded layout is that of today's type of this name.
    Current,
    /// Computed from a recorded layout of a type that is not one of the common ones.
    Computed,
    /// The type of this name has another layout today: computed from the recorded one. Subscribers of today's type do
    /// not receive the messages.
    OtherLayout,
    /// Nothing is known of the layout: the key of Humble, which carries no hash.
    NameOnly,
}

/// Type name and hash under which a topic is published.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TypeKey {
    /// `pkg/msg/Name`; a renamed ROS 1 type has its ROS 2 name.
    pub type_name: String,
    /// `RIHS01_` and 64 hex digits, or `TypeHashNotSupported`.
    pub hash: String,
    /// Where the hash comes from.
    pub basis: HashBasis,
}

/// Why a topic cannot be published as what it was recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TypeKeyError {
    /// The topic has no type.
    #[error("topic {topic}: the bag does not say of which type it is")]
    NoType {
        /// Topic name.
        topic: String,
    },
    /// The messages are not ROS messages.
    #[error("topic {topic}: messages are {encoding}, not ROS")]
    Foreign {
        /// Topic name.
        topic: String,
        /// Encoding of the messages.
        encoding: String,
    },
    /// The definition is missing or cannot be used.
    #[error("topic {topic}: {source}")]
    Schema {
        /// Topic name.
        topic: String,
        /// What is wrong with the definition.
        source: SchemaError,
    },
    /// The bag holds no definition, and the messages are not of the layout that the type has.
    #[error(
        "topic {topic}: the bag holds no definition, and the messages do not fit {type_name} as any known ROS 2 has it: \
         {source}"
    )]
    Unfit {
        /// Topic name.
        topic: String,
        /// `pkg/msg/Name`.
        type_name: String,
        /// Why today's layout does not fit.
        source: TranscodeError,
    },
}

/// Finds the hash of a topic. `samples` are some of its messages as little-endian CDR: they are looked at only where
/// the bag holds neither a hash nor a definition.
///
/// # Errors
/// The topic is not ROS, or the hash of its layout cannot be found out.
pub fn type_key(topic: &TopicInfo, samples: &[Vec<u8>]) -> Result<TypeKey, TypeKeyError> {
    let name = || topic.name.clone();
    if topic.type_name.is_empty() {
        return Err(TypeKeyError::NoType { topic: name() });
    }
    if !topic.encoding.is_ros() {
        let encoding = topic.encoding.name().to_owned();
        return Err(TypeKeyError::Foreign { topic: name(), encoding });
    }
    let renamed = RENAMED.iter().find(|(old, _)| *old == topic.type_name).map(|(_, new)| *new);
    let type_name = renamed.unwrap_or(&topic.type_name).to_owned();
    if let Some(hash) = &topic.type_hash {
        return Ok(TypeKey { type_name, hash: hash.clone(), basis: HashBasis::Recorded });
    }
    match recorded_schema(topic) {
        Some(Ok(mut schema)) => {
            schema.rename_root(&type_name);
            Ok(key_of_schema(type_name, &schema))
        }
        // An IDL cannot be hashed here; the name is all there is to go by.
        Some(Err(SchemaError::Idl { .. })) => by_samples(topic, type_name, samples),
        Some(Err(source)) => Err(TypeKeyError::Schema { topic: name(), source }),
        None if topic.encoding == Encoding::Ros1 => {
            let (type_name, missing) = (topic.type_name.clone(), topic.type_name.clone());
            Err(TypeKeyError::Schema { topic: name(), source: SchemaError::Missing { type_name, missing } })
        }
        None => by_samples(topic, type_name, samples),
    }
}

/// The definition of a topic as ROS 2 has it; `None` when the bag carries none that is a message definition.
fn recorded_schema(topic: &TopicInfo) -> Option<Result<Schema, SchemaError>> {
    let recorded = topic.schema.as_ref()?;
    let text = String::from_utf8_lossy(&recorded.data);
    match recorded.encoding.as_str() {
        "ros1msg" => Some(
            schema::ros2msg_from_ros1(&topic.type_name, &text)
                .and_then(|text| Schema::parse(&topic.type_name, &text, FillIn::Nothing)),
        ),
        "ros2msg" if !text.trim().is_empty() => Some(Schema::parse(&topic.type_name, &text, FillIn::Ros2)),
        "ros2idl" => Some(Err(SchemaError::Idl { type_name: topic.type_name.clone() })),
        _ => None,
    }
}

fn key_of_schema(type_name: String, schema: &Schema) -> TypeKey {
    let current = Schema::current(&type_name);
    let basis = match &current {
        Some(current) if same_layout(current, schema) => HashBasis::Current,
        Some(_) => HashBasis::OtherLayout,
        None => HashBasis::Computed,
    };
    TypeKey { hash: rihs01(schema), type_name, basis }
}

/// Without a definition: the layout that all samples fit.
fn by_samples(topic: &TopicInfo, type_name: String, samples: &[Vec<u8>]) -> Result<TypeKey, TypeKeyError> {
    let Some(current) = Schema::current(&type_name) else {
        let hash = HASH_NOT_SUPPORTED.to_owned();
        return Ok(TypeKey { type_name, hash, basis: HashBasis::NameOnly });
    };
    let fits = |schema: &Schema| samples.iter().try_for_each(|cdr| check_cdr(schema, cdr));
    match fits(&current) {
        Ok(()) => Ok(TypeKey { hash: rihs01(&current), type_name, basis: HashBasis::Current }),
        Err(source) => match Schema::earlier(&type_name).filter(|earlier| fits(earlier).is_ok()) {
            Some(earlier) => Ok(TypeKey { hash: rihs01(&earlier), type_name, basis: HashBasis::OtherLayout }),
            None => Err(TypeKeyError::Unfit { topic: topic.name.clone(), type_name, source }),
        },
    }
}

/// The definition text for messages of a type whose bag holds none: that of the layout which all samples (little-endian
/// CDR) fit; `None` when the type is not known or fits none.
pub(super) fn definition_for(type_name: &str, samples: &[&[u8]]) -> Option<&'static str> {
    let fits = |schema: Option<Schema>| {
        schema.is_some_and(|schema| samples.iter().all(|cdr| check_cdr(&schema, cdr).is_ok()))
    };
    if fits(Schema::current(type_name)) {
        return schema::ros2msg(type_name);
    }
    if fits(Schema::earlier(type_name)) { schema::earlier_ros2msg(type_name) } else { None }
}

/// Longest description of a layout that is compared.
const LAYOUT_CHARS_MAX: usize = 1 << 20;

/// True when messages of both types have the same bytes: names of fields and of types do not matter.
fn same_layout(a: &Schema, b: &Schema) -> bool {
    same_layout_at((a, 0), (b, 0))
}

fn same_layout_at(a: (&Schema, usize), b: (&Schema, usize)) -> bool {
    let text = |(schema, index): (&Schema, usize)| {
        let mut text = String::new();
        describe_layout(schema, index, &mut text).then_some(text)
    };
    matches!((text(a), text(b)), (Some(a), Some(b)) if a == b)
}

/// Writes what lies on the wire, one letter or number for each item; false when it becomes too long.
fn describe_layout(schema: &Schema, index: usize, out: &mut String) -> bool {
    let fields = &schema.types[index].fields;
    if fields.is_empty() {
        // An empty struct has one octet.
        out.push_str("1 ");
    }
    for field in fields {
        match field.count {
            Count::One => {}
            Count::Fixed(n) => drop(write!(out, "{n}(")),
            Count::Sequence | Count::Bounded(_) => out.push_str("*("),
        }
        match field.item {
            Item::Number(size) if field.base.starts_with("float") => drop(write!(out, "f{size} ")),
            Item::Number(size) => drop(write!(out, "{size} ")),
            Item::Stamp => out.push_str("4 4 "),
            Item::Text => out.push_str("s "),
            Item::WideText => out.push_str("w "),
            Item::Nested(nested) => {
                if !describe_layout(schema, nested, out) {
                    return false;
                }
            }
        }
        if field.count != Count::One {
            out.push(')');
        }
        if out.len() > LAYOUT_CHARS_MAX {
            return false;
        }
    }
    true
}

/// The RIHS01 hash of a ROS 2 definition. Parts that have the layout of a common type count as that type, so that a
/// definition translated from ROS 1 (`K` where ROS 2 says `k`, `int8` where it says `byte`) gets the hash of ROS 2.
pub(crate) fn rihs01(schema: &Schema) -> String {
    let mut described = BTreeMap::new();
    describe(schema, 0, &mut described);
    let root = schema.types.first().map_or("", |t| t.name.as_str());
    let mut text = format!("{{\"type_description\": {}", type_json(root, described.get(root)));
    text.push_str(", \"referenced_type_descriptions\": [");
    let others = described.iter().filter(|(name, _)| *name != root);
    let others: Vec<String> = others.map(|(name, fields)| type_json(name, Some(fields))).collect();
    text.push_str(&others.join(", "));
    text.push_str("]}");
    format!("RIHS01_{}", sha256(text.as_bytes()))
}

/// Collects the fields, as JSON, of a type and of all that it nests.
fn describe(schema: &Schema, index: usize, out: &mut BTreeMap<String, Vec<String>>) {
    let name = &schema.types[index].name;
    if out.contains_key(name) {
        return;
    }
    let common = Schema::current(name).filter(|common| same_layout_at((common, 0), (schema, index)));
    let (schema, index) = common.as_ref().map_or((schema, index), |common| (common, 0));
    let message = &schema.types[index];
    let mut fields: Vec<String> = message.fields.iter().map(|field| field_json(schema, field)).collect();
    if fields.is_empty() {
        fields.push(json("structure_needs_at_least_one_member", UINT8, 0, 0, ""));
    }
    out.insert(name.clone(), fields);
    for field in &message.fields {
        if let Item::Nested(nested) = field.item {
            describe(schema, nested, out);
        }
    }
}

fn type_json(name: &str, fields: Option<&Vec<String>>) -> String {
    let fields = fields.map_or_else(String::new, |f| f.join(", "));
    format!("{{\"type_name\": \"{name}\", \"fields\": [{fields}]}}")
}

fn json(name: &str, id: u8, capacity: u32, text_bound: u32, nested: &str) -> String {
    format!(
        "{{\"name\": \"{name}\", \"type\": {{\"type_id\": {id}, \"capacity\": {capacity}, \
         \"string_capacity\": {text_bound}, \"nested_type_name\": \"{nested}\"}}}}"
    )
}

// Numbers of type_description_interfaces/msg/FieldType.
const NESTED: u8 = 1;
const UINT8: u8 = 3;
/// A string with a bound has the number of the string and this.
const BOUNDED_TEXT: u8 = 4;
const ARRAY: u8 = 48;
const BOUNDED_SEQUENCE: u8 = 96;
const UNBOUNDED_SEQUENCE: u8 = 144;

fn field_json(schema: &Schema, field: &Field) -> String {
    let nested = match field.item {
        Item::Nested(index) => schema.types[index].name.as_str(),
        _ => "",
    };
    let item = match field.base.as_str() {
        "int8" => 2,
        // `char` of a message definition is an unsigned octet.
        "uint8" | "char" => UINT8,
        "int16" => 4,
        "uint16" => 5,
        "int32" => 6,
        "uint32" => 7,
        "int64" => 8,
        "uint64" => 9,
        "float32" => 10,
        "float64" => 11,
        "bool" => 15,
        "byte" | "octet" => 16,
        "string" => 17,
        "wstring" => 18,
        _ => NESTED,
    };
    let item = if field.text_bound > 0 { item + BOUNDED_TEXT } else { item };
    let (offset, capacity) = match field.count {
        Count::One => (0, 0),
        Count::Fixed(n) => (ARRAY, n),
        Count::Bounded(n) => (BOUNDED_SEQUENCE, n),
        Count::Sequence => (UNBOUNDED_SEQUENCE, 0),
    };
    json(&field.name, item + offset, capacity, field.text_bound, nested)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bag::SchemaText;

    fn topic(type_name: &str, encoding: Encoding, schema: Option<(&str, &str)>) -> TopicInfo {
        let mut topic = TopicInfo::new("/t", type_name, encoding);
        topic.schema = schema.map(|(encoding, text)| SchemaText {
            encoding: encoding.to_owned(),
            data: text.as_bytes().into(),
        });
        topic
    }

    /// Hashes that ROS installations report (`ros2 topic info -v`, metadata.yaml of Jazzy bags).
    const KNOWN: [(&str, &str); 12] = [
        (
            "builtin_interfaces/msg/Time",
            "RIHS01_b106235e25a4c5ed35098aa0a61a3ee9c9b18d197f398b0e4206cea9acf9c197",
        ),
        ("std_msgs/msg/Empty", "RIHS01_20b625256f32d5dbc0d04fee44f43c41e51c70d3502f84b4a08e7a9c26a96312"),
        ("std_msgs/msg/String", "RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18"),
        ("std_msgs/msg/Header", "RIHS01_f49fb3ae2cf070f793645ff749683ac6b06203e41c891e17701b1cb597ce6a01"),
        (
            "geometry_msgs/msg/PoseStamped",
            "RIHS01_10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8",
        ),
        (
            "sensor_msgs/msg/CameraInfo",
            "RIHS01_b3dfd68ff46c9d56c80fd3bd4ed22c7a4ddce8c8348f2f59c299e73118e7e275",
        ),
        ("nav_msgs/msg/Odometry", "RIHS01_3cc97dc7fb7502f8714462c526d369e35b603cfc34d946e3f2eda2766dfec6e0"),
        (
            "diagnostic_msgs/msg/DiagnosticArray",
            "RIHS01_5a8a36efb05fb25070fa0fb3810290c0e6cd4862b54a8fb975a1ee8dc55a333e",
        ),
        ("tf2_msgs/msg/TFMessage", "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087"),
        (
            "visualization_msgs/msg/Marker",
            "RIHS01_45b13ccf791f225962bf74e746f9644518855d783a6f42ba0cc14fde2b4f3ce0",
        ),
        (
            "vision_msgs/msg/Detection3DArray",
            "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018",
        ),
        (
            "rcl_interfaces/msg/ParameterEvent",
            "RIHS01_043e627780fcad87a22d225bc2a037361dba713fca6a6b9f4b869a5aa0393204",
        ),
    ];

    #[test]
    fn hashes_are_those_of_ros() {
        for (name, want) in KNOWN {
            assert_eq!(rihs01(&Schema::current(name).unwrap()), want, "{name}");
        }
    }

    #[test]
    fn the_layout_decides_and_not_the_name() {
        let line = "=".repeat(80);
        let header1 = format!("{line}\nMSG: std_msgs/Header\nuint32 seq\ntime stamp\nstring frame_id\n");
        // ROS 1 spells the matrices of CameraInfo with capitals, and the level of a status is a byte in both.
        let info = format!(
            "Header header\nuint32 height\nuint32 width\nstring distortion_model\nfloat64[] D\nfloat64[9] K\n\
             float64[9] R\nfloat64[12] P\nuint32 binning_x\nuint32 binning_y\nsensor_msgs/RegionOfInterest roi\n\
             {header1}{line}\nMSG: sensor_msgs/RegionOfInterest\nuint32 x_offset\nuint32 y_offset\nuint32 height\n\
             uint32 width\nbool do_rectify\n"
        );
        let status = "byte level\nstring name\nstring message\nstring hardware_id\nKeyValue[] values\n";
        let status = format!("{status}{line}\nMSG: diagnostic_msgs/KeyValue\nstring key\nstring value\n");
        let status_array = format!(
            "Header header\nDiagnosticStatus[] status\n{header1}{line}\nMSG: diagnostic_msgs/DiagnosticStatus\n{status}"
        );
        let early_marker = schema::earlier_ros2msg("visualization_msgs/msg/Marker").unwrap();
        let hash = |name: &str| KNOWN.iter().find(|(n, _)| *n == name).unwrap().1;
        let tf = schema::ros2msg("tf2_msgs/msg/TFMessage")
            .unwrap()
            .replace("builtin_interfaces/Time stamp", "uint32 seq\ntime stamp");
        // type, encoding, definition, hash that it has or must not have, basis
        use HashBasis::{Computed, Current, OtherLayout};
        type Case<'a> = (&'a str, Encoding, (&'a str, &'a str), Result<&'a str, &'a str>, HashBasis);
        let cases: Vec<Case<'_>> = vec![
            (
                "sensor_msgs/msg/CameraInfo",
                Encoding::Ros1,
                ("ros1msg", &info),
                Ok(hash("sensor_msgs/msg/CameraInfo")),
                Current,
            ),
            (
                "diagnostic_msgs/msg/DiagnosticArray",
                Encoding::Ros1,
                ("ros1msg", &status_array),
                Ok(hash("diagnostic_msgs/msg/DiagnosticArray")),
                Current,
            ),
            (
                "tf/msg/tfMessage",
                Encoding::Ros1,
                ("ros1msg", &tf),
                Ok(hash("tf2_msgs/msg/TFMessage")),
                Current,
            ),
            (
                "visualization_msgs/msg/Marker",
                Encoding::Cdr,
                ("ros2msg", early_marker),
                Err(hash("visualization_msgs/msg/Marker")),
                OtherLayout,
            ),
            (
                "vision_msgs/msg/Detection3DArray",
                Encoding::Ros1,
                ("ros1msg", "Header header\nint64[] detections\n"),
                Err(hash("vision_msgs/msg/Detection3DArray")),
                OtherLayout,
            ),
            ("my_msgs/msg/Own", Encoding::Cdr, ("ros2msg", "float64 x\n"), Err(""), Computed),
        ];
        for (name, encoding, schema, want, basis) in cases {
            let key =
                type_key(&topic(name, encoding, Some(schema)), &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(key.basis, basis, "{name}");
            match want {
                Ok(want) => assert_eq!(key.hash, want, "{name}"),
                Err(other) => {
                    assert!(key.hash.starts_with("RIHS01_") && key.hash != other, "{name}: {key:?}")
                }
            }
        }
    }

    /// A marker without points, in the layout of Foxy: header, namespace, numbers, pose, scale, colour, life time, flag,
    /// two empty sequences, two texts, a flag.
    fn early_marker() -> Vec<u8> {
        let mut body: Vec<u8> = Vec::new();
        let words = |body: &mut Vec<u8>, words: &[u32]| {
            words.iter().for_each(|w| body.extend(w.to_le_bytes()));
        };
        words(
            &mut body,
            &[7, 0, 2, u32::from_le_bytes(*b"m\0\0\0"), 2, u32::from_le_bytes(*b"n\0\0\0"), 3, 1, 0],
        );
        body.resize(body.len().next_multiple_of(8) + 10 * 8 + 4 * 4 + 8, 0);
        body.extend([1, 0, 0, 0]);
        words(&mut body, &[0, 0, 6]);
        body.extend(b"hello\0\0\0");
        words(&mut body, &[1]);
        body.extend([0, 1]);
        [&[0, 1, 0, 0][..], &body].concat()
    }

    /// A `Detection2DArray` of one chair, as vision_msgs 2 (Foxy) has it: the id in the hypothesis, the picture within.
    fn early_detections() -> Vec<u8> {
        let mut body: Vec<u8> = Vec::new();
        let word = |body: &mut Vec<u8>, w: u32| {
            body.resize(body.len().next_multiple_of(4), 0);
            body.extend(w.to_le_bytes());
        };
        let text = |body: &mut Vec<u8>, text: &str| {
            word(body, text.len() as u32 + 1);
            body.extend(text.as_bytes());
            body.push(0);
        };
        let header = |body: &mut Vec<u8>| {
            [7, 0].into_iter().for_each(|w| word(body, w));
            text(body, "camera");
        };
        let doubles = |body: &mut Vec<u8>, count: usize| {
            body.resize(body.len().next_multiple_of(8), 0);
            (0..count).for_each(|i| body.extend((i as f64).to_le_bytes()));
        };
        header(&mut body);
        word(&mut body, 1); // detections
        header(&mut body);
        word(&mut body, 1); // results
        text(&mut body, "chair");
        doubles(&mut body, 1 + 7 + 36); // score, pose, covariance
        doubles(&mut body, 3 + 2); // box: centre with heading, size
        header(&mut body); // source_img
        [1, 1].into_iter().for_each(|w| word(&mut body, w));
        text(&mut body, "rgb8");
        body.push(0);
        [3, 3].into_iter().for_each(|w| word(&mut body, w));
        body.extend([1, 2, 3]);
        body.push(1); // is_tracking
        text(&mut body, "t1");
        [&[0, 1, 0, 0][..], &body].concat()
    }

    #[test]
    fn detections_of_foxy_are_told_by_their_messages() {
        let name = "vision_msgs/msg/Detection2DArray";
        let detections = early_detections();
        assert!(check_cdr(&Schema::current(name).unwrap(), &detections).is_err());
        let key = type_key(&topic(name, Encoding::Cdr, None), std::slice::from_ref(&detections)).unwrap();
        assert_eq!(key.basis, HashBasis::OtherLayout);
        assert_ne!(key.hash, rihs01(&Schema::current(name).unwrap()));
        let text = definition_for(name, &[&detections]).unwrap();
        assert!(
            text.contains("sensor_msgs/Image source_img") && text.contains("string id\nfloat64 score"),
            "{text}"
        );
        // Every type of the package that nests a changed one has an earlier definition.
        for name in ["Detection2D", "Detection3D", "Detection3DArray", "ObjectHypothesisWithPose"] {
            assert!(Schema::earlier(&format!("vision_msgs/msg/{name}")).is_some(), "{name}");
        }
        assert!(Schema::earlier("vision_msgs/msg/BoundingBox3D").is_none(), "it never changed");
    }

    #[test]
    fn without_a_definition_the_messages_must_fit() {
        let name = "visualization_msgs/msg/Marker";
        let early = type_key(&topic(name, Encoding::Cdr, None), &[early_marker()]).unwrap();
        assert_eq!(early.basis, HashBasis::OtherLayout);
        assert_eq!(early.hash, rihs01(&Schema::earlier(name).unwrap()));
        let odd = vec![vec![0, 1, 0, 0, 9, 9]];
        let refused = type_key(&topic("nav_msgs/msg/Odometry", Encoding::Cdr, None), &odd).unwrap_err();
        assert!(matches!(refused, TypeKeyError::Unfit { .. }), "{refused}");
        let unknown = type_key(&topic("my_msgs/msg/Own", Encoding::Cdr, None), &odd).unwrap();
        assert_eq!((unknown.basis, unknown.hash.as_str()), (HashBasis::NameOnly, "TypeHashNotSupported"));
        assert_eq!(definition_for(name, &[&early_marker()]), schema::earlier_ros2msg(name));
        assert_eq!(definition_for("nav_msgs/msg/Odometry", &[&odd[0]]), None);
        let none = topic("std_msgs/msg/String", Encoding::Ros1, None);
        assert!(matches!(type_key(&none, &[]), Err(TypeKeyError::Schema { .. })));
        let nameless = topic("", Encoding::Cdr, None);
        assert!(matches!(type_key(&nameless, &[]), Err(TypeKeyError::NoType { .. })));
    }
}
