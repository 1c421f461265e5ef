//! Message definitions: the text of common ROS 2 types, a parser of ROS 1 and ROS 2 definitions, and the
//! names of types.
//!
//! The texts hold field names and types only, as the public interface packages define them; comments and
//! constants are left out.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::LazyLock;

/// Line between the definitions of a concatenated schema.
const SEPARATOR: &str = "================================================================================";

/// Single definitions: type, then fields separated by `;`. Nested types are written `pkg/Name`.
const DEFINITIONS: &[(&str, &str)] = &[
    ("action_msgs/msg/GoalInfo", "unique_identifier_msgs/UUID goal_id;builtin_interfaces/Time stamp"),
    ("action_msgs/msg/GoalStatus", "action_msgs/GoalInfo goal_info;int8 status"),
    ("action_msgs/msg/GoalStatusArray", "action_msgs/GoalStatus[] status_list"),
    ("builtin_interfaces/msg/Duration", "int32 sec;uint32 nanosec"),
    ("builtin_interfaces/msg/Time", "int32 sec;uint32 nanosec"),
    (
        "diagnostic_msgs/msg/DiagnosticArray",
        "std_msgs/Header header;diagnostic_msgs/DiagnosticStatus[] status",
    ),
    (
        "diagnostic_msgs/msg/DiagnosticStatus",
        "byte level;string name;string message;string hardware_id;diagnostic_msgs/KeyValue[] values",
    ),
    ("diagnostic_msgs/msg/KeyValue", "string key;string value"),
    ("geometry_msgs/msg/Accel", "geometry_msgs/Vector3 linear;geometry_msgs/Vector3 angular"),
    ("geometry_msgs/msg/AccelStamped", "std_msgs/Header header;geometry_msgs/Accel accel"),
    ("geometry_msgs/msg/AccelWithCovariance", "geometry_msgs/Accel accel;float64[36] covariance"),
    (
        "geometry_msgs/msg/AccelWithCovarianceStamped",
        "std_msgs/Header header;geometry_msgs/AccelWithCovariance accel",
    ),
    ("geometry_msgs/msg/Point", "float64 x;float64 y;float64 z"),
    ("geometry_msgs/msg/Point32", "float32 x;float32 y;float32 z"),
    ("geometry_msgs/msg/PointStamped", "std_msgs/Header header;geometry_msgs/Point point"),
    ("geometry_msgs/msg/Polygon", "geometry_msgs/Point32[] points"),
    ("geometry_msgs/msg/PolygonStamped", "std_msgs/Header header;geometry_msgs/Polygon polygon"),
    ("geometry_msgs/msg/Pose", "geometry_msgs/Point position;geometry_msgs/Quaternion orientation"),
    ("geometry_msgs/msg/Pose2D", "float64 x;float64 y;float64 theta"),
    ("geometry_msgs/msg/PoseArray", "std_msgs/Header header;geometry_msgs/Pose[] poses"),
    ("geometry_msgs/msg/PoseStamped", "std_msgs/Header header;geometry_msgs/Pose pose"),
    ("geometry_msgs/msg/PoseWithCovariance", "geometry_msgs/Pose pose;float64[36] covariance"),
    (
        "geometry_msgs/msg/PoseWithCovarianceStamped",
        "std_msgs/Header header;geometry_msgs/PoseWithCovariance pose",
    ),
    ("geometry_msgs/msg/Quaternion", "float64 x 0;float64 y 0;float64 z 0;float64 w 1"),
    ("geometry_msgs/msg/QuaternionStamped", "std_msgs/Header header;geometry_msgs/Quaternion quaternion"),
    ("geometry_msgs/msg/Transform", "geometry_msgs/Vector3 translation;geometry_msgs/Quaternion rotation"),
    (
        "geometry_msgs/msg/TransformStamped",
        "std_msgs/Header header;string child_frame_id;geometry_msgs/Transform transform",
    ),
    ("geometry_msgs/msg/Twist", "geometry_msgs/Vector3 linear;geometry_msgs/Vector3 angular"),
    ("geometry_msgs/msg/TwistStamped", "std_msgs/Header header;geometry_msgs/Twist twist"),
    ("geometry_msgs/msg/TwistWithCovariance", "geometry_msgs/Twist twist;float64[36] covariance"),
    (
        "geometry_msgs/msg/TwistWithCovarianceStamped",
        "std_msgs/Header header;geometry_msgs/TwistWithCovariance twist",
    ),
    ("geometry_msgs/msg/Vector3", "float64 x;float64 y;float64 z"),
    ("geometry_msgs/msg/Vector3Stamped", "std_msgs/Header header;geometry_msgs/Vector3 vector"),
    ("geometry_msgs/msg/Wrench", "geometry_msgs/Vector3 force;geometry_msgs/Vector3 torque"),
    ("geometry_msgs/msg/WrenchStamped", "std_msgs/Header header;geometry_msgs/Wrench wrench"),
    (
        "nav_msgs/msg/MapMetaData",
        "builtin_interfaces/Time map_load_time;float32 resolution;uint32 width;uint32 height;\
         geometry_msgs/Pose origin",
    ),
    ("nav_msgs/msg/OccupancyGrid", "std_msgs/Header header;nav_msgs/MapMetaData info;int8[] data"),
    (
        "nav_msgs/msg/Odometry",
        "std_msgs/Header header;string child_frame_id;geometry_msgs/PoseWithCovariance pose;\
         geometry_msgs/TwistWithCovariance twist",
    ),
    ("nav_msgs/msg/Path", "std_msgs/Header header;geometry_msgs/PoseStamped[] poses"),
    (
        "rcl_interfaces/msg/Log",
        "builtin_interfaces/Time stamp;uint8 level;string name;string msg;string file;string function;\
         uint32 line",
    ),
    ("rosgraph_msgs/msg/Clock", "builtin_interfaces/Time clock"),
    (
        "sensor_msgs/msg/CameraInfo",
        "std_msgs/Header header;uint32 height;uint32 width;string distortion_model;float64[] d;\
         float64[9] k;float64[9] r;float64[12] p;uint32 binning_x;uint32 binning_y;\
         sensor_msgs/RegionOfInterest roi",
    ),
    ("sensor_msgs/msg/CompressedImage", "std_msgs/Header header;string format;uint8[] data"),
    (
        "sensor_msgs/msg/Image",
        "std_msgs/Header header;uint32 height;uint32 width;string encoding;uint8 is_bigendian;uint32 step;\
         uint8[] data",
    ),
    (
        "sensor_msgs/msg/Imu",
        "std_msgs/Header header;geometry_msgs/Quaternion orientation;float64[9] orientation_covariance;\
         geometry_msgs/Vector3 angular_velocity;float64[9] angular_velocity_covariance;\
         geometry_msgs/Vector3 linear_acceleration;float64[9] linear_acceleration_covariance",
    ),
    (
        "sensor_msgs/msg/JointState",
        "std_msgs/Header header;string[] name;float64[] position;float64[] velocity;float64[] effort",
    ),
    (
        "sensor_msgs/msg/LaserScan",
        "std_msgs/Header header;float32 angle_min;float32 angle_max;float32 angle_increment;\
         float32 time_increment;float32 scan_time;float32 range_min;float32 range_max;float32[] ranges;\
         float32[] intensities",
    ),
    (
        "sensor_msgs/msg/NavSatFix",
        "std_msgs/Header header;sensor_msgs/NavSatStatus status;float64 latitude;float64 longitude;\
         float64 altitude;float64[9] position_covariance;uint8 position_covariance_type",
    ),
    ("sensor_msgs/msg/NavSatStatus", "int8 status -2;uint16 service"),
    (
        "sensor_msgs/msg/PointCloud2",
        "std_msgs/Header header;uint32 height;uint32 width;sensor_msgs/PointField[] fields;\
         bool is_bigendian;uint32 point_step;uint32 row_step;uint8[] data;bool is_dense",
    ),
    ("sensor_msgs/msg/PointField", "string name;uint32 offset;uint8 datatype;uint32 count"),
    (
        "sensor_msgs/msg/RegionOfInterest",
        "uint32 x_offset;uint32 y_offset;uint32 height;uint32 width;bool do_rectify",
    ),
    ("std_msgs/msg/Bool", "bool data"),
    ("std_msgs/msg/ColorRGBA", "float32 r;float32 g;float32 b;float32 a"),
    ("std_msgs/msg/Empty", ""),
    ("std_msgs/msg/Float32", "float32 data"),
    ("std_msgs/msg/Float64", "float64 data"),
    ("std_msgs/msg/Header", "builtin_interfaces/Time stamp;string frame_id"),
    ("std_msgs/msg/Int32", "int32 data"),
    ("std_msgs/msg/Int64", "int64 data"),
    ("std_msgs/msg/String", "string data"),
    ("std_msgs/msg/UInt8", "uint8 data"),
    ("std_msgs/msg/UInt32", "uint32 data"),
    ("tf2_msgs/msg/TFMessage", "geometry_msgs/TransformStamped[] transforms"),
    ("unique_identifier_msgs/msg/UUID", "uint8[16] uuid"),
    ("vision_msgs/msg/BoundingBox2D", "vision_msgs/Pose2D center;float64 size_x;float64 size_y"),
    ("vision_msgs/msg/BoundingBox3D", "geometry_msgs/Pose center;geometry_msgs/Vector3 size"),
    (
        "vision_msgs/msg/Detection2D",
        "std_msgs/Header header;vision_msgs/ObjectHypothesisWithPose[] results;\
         vision_msgs/BoundingBox2D bbox;string id",
    ),
    ("vision_msgs/msg/Detection2DArray", "std_msgs/Header header;vision_msgs/Detection2D[] detections"),
    (
        "vision_msgs/msg/Detection3D",
        "std_msgs/Header header;vision_msgs/ObjectHypothesisWithPose[] results;\
         vision_msgs/BoundingBox3D bbox;string id",
    ),
    ("vision_msgs/msg/Detection3DArray", "std_msgs/Header header;vision_msgs/Detection3D[] detections"),
    ("vision_msgs/msg/ObjectHypothesis", "string class_id;float64 score"),
    (
        "vision_msgs/msg/ObjectHypothesisWithPose",
        "vision_msgs/ObjectHypothesis hypothesis;geometry_msgs/PoseWithCovariance pose",
    ),
    ("vision_msgs/msg/Point2D", "float64 x;float64 y"),
    ("vision_msgs/msg/Pose2D", "vision_msgs/Point2D position;float64 theta"),
];

static CONCATENATED: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let table: BTreeMap<&str, &str> = DEFINITIONS.iter().copied().collect();
    table.keys().map(|name| (*name, concatenate(&table, name))).collect()
});

fn concatenate(table: &BTreeMap<&str, &str>, root: &str) -> String {
    let mut text = String::new();
    let mut queue = vec![root.to_owned()];
    let mut next = 0;
    while let Some(name) = queue.get(next).cloned() {
        if next > 0 {
            let _ = write!(text, "{SEPARATOR}\nMSG: {}\n", name.replace("/msg/", "/"));
        }
        for field in table.get(name.as_str()).copied().unwrap_or("").split(';').filter(|f| !f.is_empty()) {
            let _ = writeln!(text, "{field}");
            let nested = normalize_type(field.split([' ', '[']).next().unwrap_or(""));
            if nested.contains('/') && !queue.contains(&nested) {
                queue.push(nested);
            }
        }
        next += 1;
    }
    text
}

/// The concatenated `ros2msg` definition of a common ROS 2 type, as an MCAP schema carries it.
///
/// ```
/// let text = mindseye_bridge::bag::schema::ros2msg("nav_msgs/msg/Path").unwrap();
/// assert!(text.contains("MSG: geometry_msgs/Quaternion\n"));
/// ```
#[must_use]
pub fn ros2msg(type_name: &str) -> Option<&'static str> {
    CONCATENATED.get(type_name).map(String::as_str)
}

/// Every type that [`ros2msg`] knows.
pub fn known_types() -> impl Iterator<Item = &'static str> {
    DEFINITIONS.iter().map(|(name, _)| *name)
}

/// A type name as `pkg/msg/Name`, from `pkg/Name`, `pkg/msg/Name` or `pkg::msg::dds_::Name_`. Other names
/// (`foxglove.CompressedImage`) stay as they are.
///
/// ```
/// use mindseye_bridge::bag::schema::normalize_type;
/// assert_eq!(normalize_type("sensor_msgs/Image"), "sensor_msgs/msg/Image");
/// assert_eq!(normalize_type("nav_msgs::msg::dds_::Path_"), "nav_msgs/msg/Path");
/// ```
#[must_use]
pub fn normalize_type(name: &str) -> String {
    if name.contains("::dds_::") {
        let plain = name.replace("::dds_::", "/").replace("::", "/");
        return plain.strip_suffix('_').unwrap_or(&plain).to_owned();
    }
    let mut parts = name.split('/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(package), Some(type_name), None) if !package.is_empty() && !type_name.is_empty() => {
            format!("{package}/msg/{type_name}")
        }
        _ => name.to_owned(),
    }
}

/// Why a message definition cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SchemaError {
    /// A line is not a field, a constant or a comment.
    #[error("definition of {type_name}: line {line:?} is not a field")]
    BadLine {
        /// Type whose definition holds the line.
        type_name: String,
        /// The line, shortened.
        line: String,
    },
    /// A nested type has no definition.
    #[error("definition of {type_name}: type {missing} is not defined")]
    Missing {
        /// Type that uses it.
        type_name: String,
        /// Type that is missing.
        missing: String,
    },
    /// Types contain each other, or are nested deeper than [`MAX_DEPTH`].
    #[error("definition of {type_name}: types are nested deeper than 32")]
    TooDeep {
        /// Type at which the limit was met.
        type_name: String,
    },
}

/// Deepest nesting of types that a definition may have.
pub const MAX_DEPTH: usize = 32;

/// What one item of a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A number of 1, 2, 4 or 8 bytes.
    Number(u8),
    /// Two 4-byte numbers: ROS 1 time and duration.
    Stamp,
    /// A string.
    Text,
    /// A string of 16-bit characters.
    WideText,
    /// A nested message, by its place in [`Schema::types`].
    Nested(usize),
}

/// How often an item is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    One,
    Fixed(u32),
    Sequence,
}

#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub name: String,
    pub item: Item,
    pub count: Count,
}

#[derive(Clone, Debug)]
pub(crate) struct MessageType {
    /// Normalised name.
    pub name: String,
    pub fields: Vec<Field>,
}

/// A parsed definition with everything that it nests; the root is the first type.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    pub types: Vec<MessageType>,
}

impl Schema {
    /// Parses a ROS 1 or ROS 2 definition. Nested types that the text lacks are taken from the table of
    /// common types when `fill_in` is set.
    pub fn parse(type_name: &str, text: &str, fill_in: bool) -> Result<Self, SchemaError> {
        let root = normalize_type(type_name);
        let mut sections: HashMap<String, String> = HashMap::new();
        for (name, body) in split_sections(&root, text) {
            sections.entry(name).or_insert(body);
        }
        let mut schema = Self { types: Vec::new() };
        schema.add(&root, &sections, fill_in, 0)?;
        Ok(schema)
    }

    fn add(
        &mut self,
        name: &str,
        sections: &HashMap<String, String>,
        fill_in: bool,
        depth: usize,
    ) -> Result<usize, SchemaError> {
        if depth > MAX_DEPTH {
            return Err(SchemaError::TooDeep { type_name: name.to_owned() });
        }
        if let Some(at) = self.types.iter().position(|t| t.name == name) {
            return Ok(at);
        }
        let built_in = || {
            let text = ros2msg(name)?;
            Some(text.split(SEPARATOR).next().unwrap_or("").to_owned())
        };
        let Some(body) = sections.get(name).cloned().or_else(|| if fill_in { built_in() } else { None })
        else {
            return Err(SchemaError::Missing { type_name: name.to_owned(), missing: name.to_owned() });
        };
        let at = self.types.len();
        self.types.push(MessageType { name: name.to_owned(), fields: Vec::new() });
        let package = name.split('/').next().unwrap_or("").to_owned();
        let mut fields = Vec::new();
        for line in body.lines() {
            let Some((type_text, field_name)) = field_line(name, line)? else {
                continue;
            };
            let (base, count) = array_of(name, line, type_text)?;
            let item = match base {
                "bool" | "byte" | "char" | "int8" | "uint8" | "octet" => Item::Number(1),
                "int16" | "uint16" => Item::Number(2),
                "int32" | "uint32" | "float32" => Item::Number(4),
                "int64" | "uint64" | "float64" => Item::Number(8),
                "string" => Item::Text,
                "wstring" => Item::WideText,
                "time" | "duration" => Item::Stamp,
                nested => {
                    let full = resolve(nested, &package, sections);
                    let index = self.add(&full, sections, fill_in, depth + 1).map_err(|e| match e {
                        SchemaError::Missing { missing, .. } => {
                            SchemaError::Missing { type_name: name.to_owned(), missing }
                        }
                        other => other,
                    })?;
                    // A type that holds itself would have no end.
                    if self.reaches(index, at) {
                        return Err(SchemaError::TooDeep { type_name: name.to_owned() });
                    }
                    Item::Nested(index)
                }
            };
            fields.push(Field { name: field_name.to_owned(), item, count });
        }
        self.types[at].fields = fields;
        Ok(at)
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        let mut seen = vec![false; self.types.len()];
        let mut queue = vec![from];
        while let Some(at) = queue.pop() {
            if at == to {
                return true;
            }
            if std::mem::replace(&mut seen[at], true) {
                continue;
            }
            queue.extend(self.types[at].fields.iter().filter_map(|f| match f.item {
                Item::Nested(n) => Some(n),
                _ => None,
            }));
        }
        false
    }

    /// True when the first field is a `std_msgs/msg/Header`.
    pub fn starts_with_header(&self) -> bool {
        self.types.first().and_then(|t| t.fields.first()).is_some_and(|f| {
            f.count == Count::One
                && matches!(f.item, Item::Nested(n) if self.types[n].name == "std_msgs/msg/Header")
        })
    }
}

fn split_sections(root: &str, text: &str) -> Vec<(String, String)> {
    let mut sections = vec![(root.to_owned(), String::new())];
    let mut expect_name = false;
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.len() >= 40 && trimmed.bytes().all(|b| b == b'=') {
            expect_name = true;
            continue;
        }
        if expect_name {
            if trimmed.is_empty() {
                continue;
            }
            expect_name = false;
            if let Some(name) = trimmed.strip_prefix("MSG:") {
                sections.push((normalize_type(name.trim()), String::new()));
                continue;
            }
        }
        let (_, body) = sections.last_mut().expect("the root section is there from the start");
        body.push_str(line);
        body.push('\n');
    }
    sections
}

/// Type and name of the field on a line; `None` for blank lines, comments and constants.
fn field_line<'a>(type_name: &str, line: &'a str) -> Result<Option<(&'a str, &'a str)>, SchemaError> {
    let bare = line.split('#').next().unwrap_or("").trim();
    if bare.is_empty() {
        return Ok(None);
    }
    let bad = || SchemaError::BadLine {
        type_name: type_name.to_owned(),
        line: line.trim().chars().take(80).collect(),
    };
    let (type_text, rest) = bare.split_once(char::is_whitespace).ok_or_else(bad)?;
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
    let (name, tail) = rest.split_at(end);
    if name.is_empty() {
        return Err(bad());
    }
    if tail.trim_start().starts_with('=') {
        return Ok(None);
    }
    Ok(Some((type_text, name)))
}

fn array_of<'a>(type_name: &str, line: &str, type_text: &'a str) -> Result<(&'a str, Count), SchemaError> {
    let bad = || SchemaError::BadLine {
        type_name: type_name.to_owned(),
        line: line.trim().chars().take(80).collect(),
    };
    let (base, count) = match type_text.split_once('[') {
        None => (type_text, Count::One),
        Some((base, size)) => {
            let size = size.strip_suffix(']').ok_or_else(bad)?;
            if size.is_empty() || size.starts_with("<=") {
                (base, Count::Sequence)
            } else {
                (base, Count::Fixed(size.parse().map_err(|_| bad())?))
            }
        }
    };
    // A bound on a string does not change the wire.
    let base = base.split("<=").next().unwrap_or(base);
    if base.is_empty() {
        return Err(bad());
    }
    Ok((base, count))
}

fn resolve(name: &str, package: &str, sections: &HashMap<String, String>) -> String {
    if name.contains('/') {
        return normalize_type(name);
    }
    if name == "Header" {
        return "std_msgs/msg/Header".to_owned();
    }
    let local = format!("{package}/msg/{name}");
    if sections.contains_key(&local) {
        return local;
    }
    let tail = format!("/{name}");
    sections.keys().find(|k| k.ends_with(&tail)).cloned().unwrap_or(local)
}

/// A ROS 1 definition as the equivalent ROS 2 text: `time` and `duration` become `builtin_interfaces`,
/// `char` and `byte` plain numbers, `Header` loses `seq`; constants and comments are dropped.
///
/// # Errors
/// The definition cannot be parsed.
pub fn ros2msg_from_ros1(type_name: &str, text: &str) -> Result<String, SchemaError> {
    let root = normalize_type(type_name);
    // Parsing first makes sure that every nested type is there.
    let schema = Schema::parse(&root, text, true)?;
    let mut bodies: HashMap<String, String> = HashMap::new();
    for (name, body) in split_sections(&root, text) {
        bodies.entry(name).or_insert(body);
    }
    let mut out = String::new();
    let (mut time, mut duration) = (false, false);
    for (at, message) in schema.types.iter().enumerate() {
        if at > 0 {
            let _ = write!(out, "{SEPARATOR}\nMSG: {}\n", message.name.replace("/msg/", "/"));
        }
        if message.name == "std_msgs/msg/Header" {
            out.push_str("builtin_interfaces/Time stamp\nstring frame_id\n");
            time = true;
            continue;
        }
        let body = bodies.get(&message.name).map_or("", String::as_str);
        let lines = body.lines().filter_map(|l| field_line(&message.name, l).ok().flatten());
        for (field, (type_text, _)) in message.fields.iter().zip(lines) {
            let (base, suffix) = match type_text.find('[') {
                Some(at) => type_text.split_at(at),
                None => (type_text, ""),
            };
            let base = match (field.item, base) {
                (Item::Stamp, "time") => {
                    time = true;
                    "builtin_interfaces/Time".to_owned()
                }
                (Item::Stamp, _) => {
                    duration = true;
                    "builtin_interfaces/Duration".to_owned()
                }
                (_, "char") => "uint8".to_owned(),
                (_, "byte") => "int8".to_owned(),
                (Item::Nested(n), _) => schema.types[n].name.replace("/msg/", "/"),
                (_, other) => other.to_owned(),
            };
            let _ = writeln!(out, "{base}{suffix} {}", field.name);
        }
    }
    for (used, name) in [(time, "Time"), (duration, "Duration")] {
        if used {
            let _ = write!(out, "{SEPARATOR}\nMSG: builtin_interfaces/{name}\nint32 sec\nuint32 nanosec\n");
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_type_parses_without_help() {
        for name in known_types() {
            let schema = Schema::parse(name, ros2msg(name).unwrap(), false);
            assert!(schema.is_ok(), "{name}: {schema:?}");
        }
    }

    #[test]
    fn definitions_parse_or_are_refused() {
        // definition, fields of the root or the start of the error
        let cases: &[(&str, Result<usize, &str>)] = &[
            ("uint8 X=1\nint32 a # comment\nstring<=10 b \"x\"\nfloat64[<=3] c\n", Ok(3)),
            ("string S=a # b = c\ntime t\nduration[2] d", Ok(2)),
            ("int32", Err("definition of p/msg/T: line \"int32\" is not a field")),
            ("int32[x] a", Err("definition of p/msg/T: line \"int32[x] a\" is not a field")),
            ("q/U u", Err("definition of p/msg/T: type q/msg/U is not defined")),
            ("T t", Err("definition of p/msg/T: types are nested deeper than 32")),
            ("int32[4294967296] a", Err("definition of p/msg/T: line")),
        ];
        for (text, want) in cases {
            match (Schema::parse("p/T", text, false), want) {
                (Ok(got), Ok(want)) => assert_eq!(got.types[0].fields.len(), *want, "{text}"),
                (Err(got), Err(want)) => assert!(got.to_string().starts_with(want), "{text}: {got}"),
                (got, want) => panic!("{text}: got {got:?}, want {want:?}"),
            }
        }
    }

    #[test]
    fn ros1_definitions_become_ros2_text() {
        let line = "=".repeat(80);
        let text = format!(
            "uint8 A=1\nHeader header\ntime t\nchar c\nbyte[] b\nOther[2] o\n{line}\nMSG: std_msgs/Header\n\
             uint32 seq\ntime stamp\nstring frame_id\n{line}\nMSG: p/Other\nduration d\n"
        );
        let want = format!(
            "std_msgs/Header header\nbuiltin_interfaces/Time t\nuint8 c\nint8[] b\np/Other[2] o\n{line}\n\
             MSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n{line}\nMSG: p/Other\n\
             builtin_interfaces/Duration d\n{line}\nMSG: builtin_interfaces/Time\nint32 sec\n\
             uint32 nanosec\n{line}\nMSG: builtin_interfaces/Duration\nint32 sec\nuint32 nanosec\n"
        );
        assert_eq!(ros2msg_from_ros1("p/T", &text).unwrap(), want);
    }
}
