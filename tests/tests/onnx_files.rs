//! ONNX files: what is written is read back, the same model gives the same bytes, and damage is an error.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::path::Path;

use mindseye_engines::onnx::{
    Attribute, AttributeValue, DataType, Dim, ExternalData, Graph, Initializer, Model, Node, OnnxError,
    SaveOptions, ValueInfo,
};

/// A small model with every kind of attribute and several element types.
fn sample() -> Model {
    let info = |name: &str, dims: &[Dim]| ValueInfo {
        name: name.into(),
        dtype: Some(DataType::F32),
        shape: Some(dims.to_vec()),
    };
    let weights: Vec<f32> = (0..512).map(|i| i as f32 / 7.0).collect();
    let inner = Graph { name: "inner".into(), ..Graph::default() };
    let attributes = [
        Attribute::int("i", -3),
        Attribute::float("f", 0.25),
        Attribute::text("s", "text"),
        Attribute::ints("is", &[1, -1, i64::MAX]),
        Attribute { name: "fs".into(), value: AttributeValue::Floats(vec![1.5, -0.0]) },
        Attribute { name: "ss".into(), value: AttributeValue::Strings(vec![b"a".to_vec(), vec![]]) },
        Attribute {
            name: "t".into(),
            value: AttributeValue::Tensor(Box::new(Initializer::from_i64("", &[2], &[5, -6]))),
        },
        Attribute { name: "g".into(), value: AttributeValue::Graph(Box::new(inner)) },
    ];
    let mut first = Node::new("first", "MatMul", &["x", "w"], &["h"]);
    first.attributes = attributes.to_vec();
    let graph = Graph {
        name: "sample".into(),
        nodes: vec![first, Node::new("second", "Clip", &["h", "", "most"], &["y"])],
        initializers: vec![
            Initializer::from_f32("w", &[16, 32], &weights),
            Initializer::from_f32("most", &[], &[3.0]),
            Initializer::from_bytes("half", DataType::F16, &[3], vec![0, 60, 0, 64, 0, 66]),
            Initializer::from_bytes("nibbles", DataType::I4, &[3], vec![0x21, 0x03]),
        ],
        inputs: vec![info("x", &["rows".into(), 16.into()])],
        outputs: vec![info("y", &["rows".into(), Dim::Unknown])],
        value_infos: vec![ValueInfo { name: "h".into(), dtype: None, shape: None }],
    };
    let mut model = Model::new(graph);
    model.metadata.push(("key".into(), "value".into()));
    model
}

#[test]
fn round_trip_keeps_everything() {
    let model = sample();
    let bytes = model.to_bytes().unwrap();
    assert_eq!(bytes, model.to_bytes().unwrap(), "same model, same bytes");
    let read = Model::parse(bytes.clone(), None).unwrap();
    assert_eq!(read.to_bytes().unwrap(), bytes, "reading and writing again changes nothing");
    assert_eq!(read.opset(), 21);
    assert_eq!(read.graph.nodes[1].inputs, ["h", "", "most"]);
    assert_eq!(read.graph.inputs, model.graph.inputs);
    assert_eq!(read.graph.outputs, model.graph.outputs);
    let half = read.graph.initializer("half").unwrap();
    assert_eq!(half.to_f32().unwrap(), [1.0, 2.0, 3.0]);
    assert!(matches!(read.graph.nodes[0].attribute("is"), Some(AttributeValue::Ints(v)) if v[2] == i64::MAX));
}

#[test]
fn weights_beside_the_graph() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    let saved = sample()
        .save(&path, &SaveOptions { external: ExternalData::Always, ..SaveOptions::default() })
        .unwrap();
    assert_eq!(saved.data.as_deref(), Some(dir.path().join("model.onnx.data").as_path()));
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "no temporary file is left: {names:?}");
    let read = Model::load(&path).unwrap();
    assert_eq!(read.to_bytes().unwrap(), sample().to_bytes().unwrap());

    // The data file is cut: an error that names tensor and file.
    let data = saved.data.unwrap();
    let bytes = std::fs::read(&data).unwrap();
    std::fs::write(&data, &bytes[..bytes.len() - 1]).unwrap();
    let error = Model::load(&path).unwrap_err().to_string();
    assert!(error.contains("\"w\"") && error.contains("model.onnx.data"), "{error}");
}

/// A link may stay within the folder; it may not lead out of it.
#[cfg(unix)]
#[test]
fn weights_behind_a_link_out_of_the_folder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&outside).unwrap();
    let (graph, data) = (inside.join("m.onnx"), inside.join("m.onnx.data"));
    sample().save(&graph, &SaveOptions { external: ExternalData::Always, ..SaveOptions::default() }).unwrap();
    for (place, fits) in [(inside.join("w"), true), (outside.join("w"), false)] {
        std::fs::rename(&data, &place).unwrap();
        std::os::unix::fs::symlink(&place, &data).unwrap();
        match Model::load(&graph) {
            Ok(_) => assert!(fits),
            Err(e) => assert!(!fits && e.to_string().contains("outside of the model's own folder"), "{e}"),
        }
        std::fs::remove_file(&data).unwrap();
        std::fs::rename(&place, &data).unwrap();
    }
}

/// One protobuf field of bytes.
fn field(number: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = body.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(body);
    out
}

fn check_refused(what: &str, bytes: Vec<u8>, folder: Option<&Path>, wanted: &str) {
    match Model::parse(bytes, folder) {
        Ok(_) => panic!("{what}: accepted"),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(wanted), "{what}: {text:?} does not say {wanted:?}");
        }
    }
}

/// A model of one initializer with these fields.
fn one_tensor(tensor: &[u8]) -> Vec<u8> {
    field(7, &field(5, tensor))
}

#[test]
fn damage_is_an_error_that_says_where() {
    let name = field(8, b"weight");
    let external = |location: &str| {
        let entry = [field(1, b"location"), field(2, location.as_bytes())].concat();
        one_tensor(&[&[0x08, 4, 0x10, 1][..], &name, &field(13, &entry), &[0x70, 1]].concat())
    };
    let huge = [&[0x08][..], &[0xff; 9], &[0x01, 0x10, 1], &name].concat();
    let product = [&[0x08][..], &[0xff, 0xff, 0xff, 0xff, 0x07][..]].concat().repeat(3);
    let node = |inputs: &[&str], outputs: &[&str]| {
        let mut body: Vec<u8> = inputs.iter().flat_map(|i| field(1, i.as_bytes())).collect();
        body.extend(outputs.iter().flat_map(|o| field(2, o.as_bytes())));
        body.extend(field(4, b"Relu"));
        field(7, &field(1, &body))
    };
    let mut nested = field(4, b"If");
    for _ in 0..20 {
        let attribute = [field(1, b"g"), field(6, &field(1, &nested)), vec![0xa0, 0x01, 5]].concat();
        nested = [field(4, b"If"), field(5, &attribute)].concat();
    }
    let dir = tempfile::tempdir().unwrap();
    let table: Vec<(&str, Vec<u8>, Option<&Path>, &str)> = vec![
        ("nothing", vec![], None, "no graph"),
        ("text", b"this is no model".to_vec(), None, "byte"),
        ("length beyond the file", vec![0x3a, 0x7f, 0], None, "needs 127 bytes, only 1 are left"),
        ("endless number", vec![0x08, 0xff, 0xff], None, "ends inside a number"),
        ("number of 11 bytes", [&[0x08][..], &[0xff; 11]].concat(), None, "64 bits"),
        ("group", vec![0x0b], None, "wire type 3"),
        ("negative size", one_tensor(&huge), None, "\"weight\""),
        ("size overflow", one_tensor(&[&product[..], &[0x10, 1], &name].concat()), None, "too large"),
        (
            "too few bytes",
            one_tensor(&[&[0x08, 4, 0x10, 1][..], &name, &field(9, &[0; 15])].concat()),
            None,
            "needs 16",
        ),
        ("unknown type", one_tensor(&[&[0x10, 99][..], &name].concat()), None, "type 99"),
        ("strings", one_tensor(&[&[0x10, 8][..], &field(6, b"x"), &name].concat()), None, "strings"),
        ("no folder", external("w.data"), None, "not read from a file"),
        ("parent folder", external("../secret"), Some(dir.path()), "own folder"),
        ("absolute path", external("/etc/passwd"), Some(dir.path()), "own folder"),
        ("no such file", external("w.data"), Some(dir.path()), "w.data"),
        ("unknown input", node(&["ghost"], &["y"]), None, "\"ghost\""),
        ("graphs in graphs", field(7, &field(1, &nested)), None, "graphs inside each other"),
        ("a function", [field(7, &[]), vec![0xca, 0x01, 0]].concat(), None, "function"),
    ];
    for (what, bytes, folder, wanted) in table {
        check_refused(what, bytes, folder, wanted);
    }
}

/// Small objects in the file are large in memory: their number is limited.
#[test]
fn millions_of_tiny_nodes_are_refused() {
    let node = field(1, &field(4, b"A"));
    let graph = node.repeat(4_100_000 / 2 * 2);
    let error = Model::parse(field(7, &graph), None).unwrap_err();
    assert!(matches!(error, OnnxError::Limit { .. }), "{error}");
}

/// Every prefix and many single-byte changes of a good file: an error or a model, never a panic.
#[test]
fn mutations_do_not_panic() {
    let good = sample().to_bytes().unwrap();
    let mut refused = 0;
    for length in (0..good.len()).step_by(7) {
        refused += usize::from(Model::parse(good[..length].to_vec(), None).is_err());
    }
    assert!(refused > good.len() / 10, "cut files are refused: {refused}");
    let mut state = 1u64;
    for _ in 0..4000 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let mut bytes = good.clone();
        let at = (state >> 33) as usize % bytes.len();
        bytes[at] = (state >> 20) as u8;
        if let Ok(model) = Model::parse(bytes, None) {
            let written = model.to_bytes().unwrap();
            assert_eq!(Model::parse(written.clone(), None).unwrap().to_bytes().unwrap(), written);
            for tensor in &model.graph.initializers {
                let _ = tensor.to_f32();
            }
        }
    }
}
