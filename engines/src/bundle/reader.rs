//! TOML tables to typed values. Unlike `toml`'s own, errors say where, what was wanted and what was got as values, and
//! keys that a type would fill with a default are missed all the same: what is in a bundle was written by a tool.

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde::{Serialize, forward_to_deserialize_any};
use std::fmt::{self, Display};
use toml::{Table, Value};

/// A value that is not what its type wants.
#[derive(Debug)]
pub(super) struct Mismatch {
    /// Keys and positions from the innermost outwards while reading, the other way round afterwards.
    pub path: Vec<String>,
    pub wanted: String,
    pub got: String,
}

impl Mismatch {
    fn new(wanted: impl Display, got: impl Display) -> Self {
        Self { path: Vec::new(), wanted: wanted.to_string(), got: got.to_string() }
    }

    fn at(mut self, key: impl Into<String>) -> Self {
        self.path.push(key.into());
        self
    }

    /// Name of the table (empty at the top) and the key in it.
    pub fn place(&self) -> (String, String) {
        match self.path.split_last() {
            None => (String::new(), String::new()),
            Some((key, table)) => (table.join("."), key.clone()),
        }
    }
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: wanted {}, got {}", self.path.join("."), self.wanted, self.got)
    }
}

impl std::error::Error for Mismatch {}

fn one_of(names: &[&str]) -> String {
    match names {
        [] => "no key at all".to_owned(),
        [name] => (*name).to_owned(),
        _ => format!("one of {}", names.join(", ")),
    }
}

/// What a visitor expects, in the words of TOML.
fn plain(expected: &dyn Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "usize" | "u8" | "u16" | "u32" | "u64" => "a whole number from 0 on".to_owned(),
        "i8" | "i16" | "i32" | "i64" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "an array".to_owned(),
        "a map" => "a table".to_owned(),
        _ if text.starts_with("struct ") => "a table".to_owned(),
        _ => text,
    }
}

impl Error for Mismatch {
    fn custom<T: Display>(what: T) -> Self {
        Self::new("a value that can be read", what)
    }

    fn invalid_type(got: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let got = match got {
            Unexpected::Map => "a table".to_owned(),
            Unexpected::Seq => "an array".to_owned(),
            other => other.to_string().replace('`', ""),
        };
        Self::new(plain(expected), got)
    }

    fn invalid_value(got: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(got, expected)
    }

    fn invalid_length(got: usize, expected: &dyn Expected) -> Self {
        Self::new(plain(expected), format!("{got} values"))
    }

    fn unknown_variant(got: &str, names: &'static [&'static str]) -> Self {
        Self::new(one_of(names), format!("{got:?}"))
    }

    fn unknown_field(got: &str, names: &'static [&'static str]) -> Self {
        Self::new(one_of(names), "a key that does not exist").at(got)
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new("a value", "nothing").at(key)
    }
}

struct Reader<'a>(&'a Value);

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = Mismatch;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match self.0 {
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Boolean(flag) => visitor.visit_bool(*flag),
            Value::Datetime(_) => Err(Error::invalid_type(Unexpected::Other("a date"), &visitor)),
            Value::Array(values) => {
                let mut items = Items { values, next: 0 };
                let value = visitor.visit_seq(&mut items)?;
                if items.next < values.len() {
                    return Err(Mismatch::new(
                        format!("{} values", items.next),
                        format!("{} values", values.len()),
                    ));
                }
                Ok(value)
            }
            Value::Table(table) => visitor.visit_map(Entries { rest: table.iter(), value: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        match self.0 {
            Value::String(text) => {
                let text: StrDeserializer<'_, Mismatch> = text.as_str().into_deserializer();
                text.deserialize_enum(name, variants, visitor)
            }
            Value::Table(table) if table.len() == 1 => {
                let entries = Entries { rest: table.iter(), value: None };
                MapAccessDeserializer::new(entries).deserialize_enum(name, variants, visitor)
            }
            other => Err(Mismatch::new(one_of(variants), other.type_str())),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

struct Items<'a> {
    values: &'a [Value],
    next: usize,
}

impl<'de> SeqAccess<'de> for &mut Items<'de> {
    type Error = Mismatch;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Mismatch> {
        let Some(value) = self.values.get(self.next) else { return Ok(None) };
        let at = self.next;
        self.next += 1;
        seed.deserialize(Reader(value)).map(Some).map_err(|e| e.at(at.to_string()))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.values.len() - self.next)
    }
}

struct Entries<'a> {
    rest: toml::map::Iter<'a, String, Value>,
    value: Option<(&'a str, &'a Value)>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Mismatch;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Mismatch> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some((key, value));
        let name: StrDeserializer<'_, Mismatch> = <&str>::into_deserializer(key);
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Mismatch> {
        let Some((key, value)) = self.value.take() else {
            return Err(Error::custom("a value without a key"));
        };
        seed.deserialize(Reader(value)).map_err(|e| e.at(key))
    }
}

/// Reads a table. Every key that `T` writes must be there, also those that its own reading would fill in.
pub(super) fn read<T: DeserializeOwned + Serialize>(table: &Table) -> Result<T, Mismatch> {
    let value = Value::Table(table.clone());
    let read = T::deserialize(Reader(&value)).map_err(|mut e| {
        e.path.reverse();
        e
    })?;
    let whole = Value::try_from(&read).map_err(|e| Mismatch::new("values that TOML can hold", e))?;
    let mut path = Vec::new();
    if find_missing(&whole, &value, &mut path) {
        return Err(Mismatch { path, ..Mismatch::new("a value", "nothing") });
    }
    Ok(read)
}

/// Whether `given` lacks a key that `whole` has; `path` then leads to the first.
fn find_missing(whole: &Value, given: &Value, path: &mut Vec<String>) -> bool {
    let mut inside = |key: String, whole: &Value, given: Option<&Value>| {
        path.push(key);
        let found = given.is_none_or(|given| find_missing(whole, given, path));
        if !found {
            path.pop();
        }
        found
    };
    match (whole, given) {
        (Value::Table(whole), Value::Table(given)) => {
            whole.iter().any(|(key, value)| inside(key.clone(), value, given.get(key)))
        }
        (Value::Array(whole), Value::Array(given)) => {
            whole.iter().zip(given).enumerate().any(|(i, (w, g))| inside(i.to_string(), w, Some(g)))
        }
        _ => false,
    }
}
