//! Message definitions: the text of common ROS 2 types, a parser of ROS 1 and ROS 2 definitions, and the
//! names of types.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::LazyLock;

use super::definitions::{CURRENT, EARLIER};

/// Line between the definitions of a concatenated schema.
const SEPARATOR: &str = "================================================================================";

static CONCATENATED: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let table: BTreeMap<&str, &str> = CURRENT.iter().copied().collect();
    table.keys().map(|name| (*name, concatenate(&table, name))).collect()
});

/// As [`CONCATENATED`], with the layouts that types had in earlier distributions: only types that nest such a one.
static CONCATENATED_EARLIER: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let mut table: BTreeMap<&str, &str> = CURRENT.iter().copied().collect();
    table.extend(EARLIER.iter().copied());
    let texts = table.keys().map(|name| (*name, concatenate(&table, name)));
    texts.filter(|(name, text)| CONCATENATED.get(name) != Some(text)).collect()
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

/// The definition that a common type had in earlier ROS 2 distributions, where it or a type that it nests has changed.
pub(crate) fn earlier_ros2msg(type_name: &str) -> Option<&'static str> {
    CONCATENATED_EARLIER.get(type_name).map(String::as_str)
}

/// The definition of the first type of a concatenated text.
fn own_part(text: &str) -> &str {
    text.split(SEPARATOR).next().unwrap_or("")
}

/// Packages whose types, apart from the header, have the same layout in ROS 1 and ROS 2.
const SHARED_PACKAGES: [&str; 8] = [
    "actionlib_msgs",
    "diagnostic_msgs",
    "geometry_msgs",
    "nav_msgs",
    "sensor_msgs",
    "std_msgs",
    "tf2_msgs",
    "trajectory_msgs",
];

/// What a ROS 1 definition that lacks the part of a nested type means by it.
fn ros1_part(type_name: &str) -> Option<String> {
    match type_name {
        "std_msgs/msg/Header" => Some("uint32 seq\ntime stamp\nstring frame_id\n".to_owned()),
        // Fields were added while ROS 1 was in use.
        "sensor_msgs/msg/BatteryState" => None,
        name => {
            let shared = SHARED_PACKAGES.contains(&name.split('/').next().unwrap_or(""))
                || name.starts_with("builtin_interfaces/");
            let text = earlier_ros2msg(name).or_else(|| ros2msg(name)).filter(|_| shared)?;
            Some(own_part(text).to_owned())
        }
    }
}

/// Every type that [`ros2msg`] knows.
pub fn known_types() -> impl Iterator<Item = &'static str> {
    CURRENT.iter().map(|(name, _)| *name)
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
    /// A nested type is defined in IDL.
    #[error("definition of {type_name}: it is written in IDL, which is not read")]
    Idl {
        /// The type.
        type_name: String,
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

/// What stands in for nested types that a definition lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FillIn {
    Nothing,
    /// The table of common types.
    Ros2,
    /// The common types as ROS 1 has them.
    Ros1,
}

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
    /// A sequence of at most so many items; on the wire as [`Sequence`](Self::Sequence).
    Bounded(u32),
}

#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub name: String,
    pub item: Item,
    pub count: Count,
    /// The type of one item as it is written, without bounds: `float64`, `string`, `Header`.
    pub base: String,
    /// Longest string that is allowed; 0 without a bound.
    pub text_bound: u32,
}

impl Field {
    /// Array brackets as a definition writes them.
    fn brackets(&self) -> String {
        match self.count {
            Count::One => String::new(),
            Count::Fixed(n) => format!("[{n}]"),
            Count::Sequence => "[]".to_owned(),
            Count::Bounded(n) => format!("[<={n}]"),
        }
    }
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
    /// Parses a ROS 1 or ROS 2 definition. `fill_in` says where nested types come from that the text lacks.
    pub fn parse(type_name: &str, text: &str, fill_in: FillIn) -> Result<Self, SchemaError> {
        let root = normalize_type(type_name);
        let mut sections = Sections::new();
        for section in split_sections(&root, text) {
            sections.entry(section.name.clone()).or_insert(section);
        }
        let mut schema = Self { types: Vec::new() };
        schema.add(&root, &sections, fill_in, 0)?;
        Ok(schema)
    }

    /// The definition of a common type of today's ROS 2.
    pub fn current(type_name: &str) -> Option<Self> {
        Self::parse(type_name, ros2msg(type_name)?, FillIn::Nothing).ok()
    }

    /// The definition that a common type had in earlier distributions, where it differs.
    pub fn earlier(type_name: &str) -> Option<Self> {
        Self::parse(type_name, earlier_ros2msg(type_name)?, FillIn::Nothing).ok()
    }

    /// Gives the root another name.
    pub fn rename_root(&mut self, type_name: &str) {
        if let Some(root) = self.types.first_mut() {
            type_name.clone_into(&mut root.name);
        }
    }

    fn add(
        &mut self,
        name: &str,
        sections: &Sections,
        fill_in: FillIn,
        depth: usize,
    ) -> Result<usize, SchemaError> {
        if depth > MAX_DEPTH {
            return Err(SchemaError::TooDeep { type_name: name.to_owned() });
        }
        if let Some(at) = self.types.iter().position(|t| t.name == name) {
            return Ok(at);
        }
        let body = match sections.get(name) {
            Some(section) if section.idl => return Err(SchemaError::Idl { type_name: name.to_owned() }),
            Some(section) => Some(section.body.clone()),
            None => match fill_in {
                FillIn::Nothing => None,
                FillIn::Ros2 => ros2msg(name).map(|text| own_part(text).to_owned()),
                FillIn::Ros1 => ros1_part(name),
            },
        };
        let Some(body) = body else {
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
            let Declared { base, text_bound, count } = declared(name, line, type_text)?;
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
            let base = base.to_owned();
            fields.push(Field { name: field_name.to_owned(), item, count, base, text_bound });
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

/// The part of one type in a concatenated definition.
struct Section {
    name: String,
    body: String,
    /// Written in IDL, not as a message definition.
    idl: bool,
}

type Sections = HashMap<String, Section>;

fn split_sections(root: &str, text: &str) -> Vec<Section> {
    let section = |name: String, idl| Section { name, body: String::new(), idl };
    let mut current = section(root.to_owned(), false);
    let mut done = Vec::new();
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
            let named = [("MSG:", false), ("IDL:", true)];
            let named = named.iter().find_map(|(mark, idl)| Some((trimmed.strip_prefix(mark)?, *idl)));
            if let Some((name, idl)) = named {
                done.push(std::mem::replace(&mut current, section(normalize_type(name.trim()), idl)));
                continue;
            }
        }
        current.body.push_str(line);
        current.body.push('\n');
    }
    done.push(current);
    done
}

/// Type and name of the field on a line; `None` for blank lines, comments and constants.
fn field_line<'a>(type_name: &str, line: &'a str) -> Result<Option<(&'a str, &'a str)>, SchemaError> {
    let bare = line.split('#').next().unwrap_or("").trim();
    // ROS 1's own parser passes over lines of backslashes, which some packages carry.
    if bare.bytes().all(|b| b == b'\\') {
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

/// The type of a field, taken apart.
struct Declared<'a> {
    base: &'a str,
    text_bound: u32,
    count: Count,
}

fn declared<'a>(type_name: &str, line: &str, type_text: &'a str) -> Result<Declared<'a>, SchemaError> {
    let bad = || SchemaError::BadLine {
        type_name: type_name.to_owned(),
        line: line.trim().chars().take(80).collect(),
    };
    let number = |text: &str| text.trim().parse::<u32>().map_err(|_| bad());
    let (base, count) = match type_text.split_once('[') {
        None => (type_text, Count::One),
        Some((base, size)) => {
            let size = size.strip_suffix(']').ok_or_else(bad)?;
            let count = match size.strip_prefix("<=") {
                Some(bound) => Count::Bounded(number(bound)?),
                None if size.is_empty() => Count::Sequence,
                None => Count::Fixed(number(size)?),
            };
            (base, count)
        }
    };
    // A bound on a string does not change the wire.
    let (base, text_bound) = match base.split_once("<=") {
        Some((base, bound)) => (base, number(bound)?),
        None => (base, 0),
    };
    if base.is_empty() {
        return Err(bad());
    }
    Ok(Declared { base, text_bound, count })
}

fn resolve(name: &str, package: &str, sections: &Sections) -> String {
    if name.contains('/') {
        return normalize_type(name);
    }
    let local = format!("{package}/msg/{name}");
    if sections.contains_key(&local) {
        return local;
    }
    if name == "Header" {
        return "std_msgs/msg/Header".to_owned();
    }
    let tail = format!("/{name}");
    let mut found: Vec<&String> = sections.keys().filter(|k| k.ends_with(&tail)).collect();
    found.sort();
    found.first().map_or(local, |k| (*k).clone())
}

/// A ROS 1 definition as the equivalent ROS 2 text: `time` and `duration` become `builtin_interfaces`,
/// `char` and `byte` plain numbers, `Header` loses `seq`; constants and comments are dropped.
///
/// # Errors
/// The definition cannot be parsed.
pub fn ros2msg_from_ros1(type_name: &str, text: &str) -> Result<String, SchemaError> {
    let schema = Schema::parse(&normalize_type(type_name), text, FillIn::Ros1)?;
    let mut out = String::new();
    let mut used = Vec::new();
    for (at, message) in schema.types.iter().enumerate() {
        if at > 0 {
            let _ = write!(out, "{SEPARATOR}\nMSG: {}\n", message.name.replace("/msg/", "/"));
        }
        for field in &message.fields {
            if message.name == "std_msgs/msg/Header" && field.name == "seq" {
                continue;
            }
            let base = match (field.item, field.base.as_str()) {
                (Item::Stamp, "time") => {
                    used.push("Time");
                    "builtin_interfaces/Time".to_owned()
                }
                (Item::Stamp, _) => {
                    used.push("Duration");
                    "builtin_interfaces/Duration".to_owned()
                }
                (_, "char") => "uint8".to_owned(),
                (_, "byte") => "int8".to_owned(),
                (Item::Nested(n), _) => schema.types[n].name.replace("/msg/", "/"),
                (_, other) => other.to_owned(),
            };
            let _ = writeln!(out, "{base}{} {}", field.brackets(), field.name);
        }
    }
    for name in ["Time", "Duration"] {
        let full = format!("builtin_interfaces/msg/{name}");
        if used.contains(&name) && !schema.types.iter().any(|t| t.name == full) {
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
            let schema = Schema::parse(name, ros2msg(name).unwrap(), FillIn::Nothing);
            assert!(schema.is_ok(), "{name}: {schema:?}");
        }
    }

    #[test]
    fn definitions_parse_or_are_refused() {
        // definition, fields of the root or the start of the error
        let cases: &[(&str, Result<usize, &str>)] = &[
            ("uint8 X=1\nint32 a # comment\nstring<=10 b \"x\"\nfloat64[<=3] c\n", Ok(3)),
            ("string S=a # b = c\ntime t\nduration[2] d", Ok(2)),
            ("int32 a\n\\\nint32 b\n  \\\\\n", Ok(2)),
            ("int32", Err("definition of p/msg/T: line \"int32\" is not a field")),
            ("int32[x] a", Err("definition of p/msg/T: line \"int32[x] a\" is not a field")),
            ("q/U u", Err("definition of p/msg/T: type q/msg/U is not defined")),
            ("T t", Err("definition of p/msg/T: types are nested deeper than 32")),
            ("int32[4294967296] a", Err("definition of p/msg/T: line")),
        ];
        for (text, want) in cases {
            match (Schema::parse("p/T", text, FillIn::Nothing), want) {
                (Ok(got), Ok(want)) => assert_eq!(got.types[0].fields.len(), *want, "{text}"),
                (Err(got), Err(want)) => assert!(got.to_string().starts_with(want), "{text}: {got}"),
                (got, want) => panic!("{text}: got {got:?}, want {want:?}"),
            }
        }
    }

    #[test]
    fn nested_types_that_are_absent_are_those_of_the_same_ros() {
        let fields = |fill_in| {
            let schema = Schema::parse("p/T", "Header h\nfloat64 x\n", fill_in).unwrap();
            schema.types[1].fields.iter().map(|f| f.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(fields(FillIn::Ros1), ["seq", "stamp", "frame_id"]);
        assert_eq!(fields(FillIn::Ros2), ["stamp", "frame_id"]);
        // Layouts that are not the same in ROS 1 are not guessed.
        let refused = Schema::parse("p/T", "visualization_msgs/Marker m\n", FillIn::Ros1).unwrap_err();
        assert!(refused.to_string().contains("visualization_msgs/msg/Marker is not defined"), "{refused}");
        let own = format!("Header h\n{}\nMSG: p/Header\nuint64 id\n", "=".repeat(80));
        assert_eq!(Schema::parse("p/T", &own, FillIn::Ros2).unwrap().types[1].name, "p/msg/Header");
        let idl =
            format!("p/U u\n{}\nIDL: p/msg/U\nmodule p {{ struct U {{ float v; }}; }};\n", "=".repeat(80));
        let refused = Schema::parse("p/T", &idl, FillIn::Ros2).unwrap_err();
        assert_eq!(refused, SchemaError::Idl { type_name: "p/msg/U".to_owned() });
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
        // A header that the definition lacks, and lines of backslashes.
        let short = ros2msg_from_ros1("p/T", "Header header\n\\\nfloat64 x\n").unwrap();
        let want = format!(
            "std_msgs/Header header\nfloat64 x\n{line}\nMSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\n\
             string frame_id\n{line}\nMSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n"
        );
        assert_eq!(short, want);
    }
}
