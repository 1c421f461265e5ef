//! Layouts, decoding by hand, and fake detectors: tiny graphs of our own that always see the same things.

use super::*;
use crate::onnx::{Attribute, AttributeValue, Graph, Initializer, Model, Node, SaveOptions, ValueInfo};

fn port(name: &str, dtype: DataType, shape: &[usize]) -> Port {
    Port { name: name.into(), dtype, shape: shape.iter().map(|n| dim(*n)).collect() }
}

/// 0 stands for a size that is not known.
fn dim(n: usize) -> Dim {
    if n == 0 { Dim::from("n") } else { Dim::from(n) }
}

#[test]
fn layouts_are_seen_from_names_and_shapes() {
    let image = || port("images", DataType::F32, &[1, 3, 64, 96]);
    let yolo = |columns, objectness| Some(Layout::Yolo { output: "out".into(), columns, objectness });
    let detr = |sizes: Option<&str>| {
        let own = |s: &str| s.to_owned();
        Some(Layout::Detr {
            sizes: sizes.map(own),
            labels: own("labels"),
            boxes: own("boxes"),
            scores: own("scores"),
        })
    };
    let three = || {
        vec![
            port("labels", DataType::I64, &[1, 0]),
            port("boxes", DataType::F32, &[1, 0, 4]),
            port("scores", DataType::F32, &[1, 0]),
        ]
    };
    let one = |shape: &[usize]| vec![port("out", DataType::F32, shape)];
    let check = |name: &str, inputs: &[Port], outputs: &[Port], want: Option<Layout>| {
        assert_eq!(layout(inputs, outputs, 80).map(|l| l.0), want, "{name}");
    };
    let sizes = || port("orig_target_sizes", DataType::I64, &[1, 2]);
    check("DETR", &[image(), sizes()], &three(), detr(Some("orig_target_sizes")));
    check("DETR without sizes", &[image()], &three(), detr(None));
    let mut shuffled = three();
    shuffled.rotate_left(1);
    check("DETR in another order", &[sizes(), image()], &shuffled, detr(Some("orig_target_sizes")));
    check("rows with objectness", &[image()], &one(&[1, 25_200, 85]), yolo(false, true));
    check("rows without", &[image()], &one(&[1, 8400, 84]), yolo(false, false));
    check("columns", &[image()], &one(&[1, 84, 8400]), yolo(true, false));
    check("columns of any number", &[image()], &one(&[0, 84, 0]), yolo(true, false));
    check("as many boxes as attributes", &[image()], &one(&[1, 84, 85]), yolo(false, true));
    check("a classifier", &[image()], &one(&[1, 80]), None);
    check("masks too", &[image()], &one(&[1, 116, 8400]), None);
    check("a second picture", &[image(), image()], &one(&[1, 84, 8400]), None);
    check("a batch", &[port("images", DataType::F32, &[4, 3, 64, 64])], &one(&[1, 84, 8400]), None);
    check("boxes alone", &[image()], &three()[1..2], None);
    let open = port("images", DataType::F32, &[0, 3, 0, 0]);
    assert_eq!(picture_input(&[open]), Some(("images".into(), OPEN_SIDE, OPEN_SIDE)));
    assert_eq!(picture_input(&[image()]), Some(("images".into(), 96, 64)));
}

#[test]
fn overlapping_boxes_of_one_class_are_one_thing() {
    let one = |class, score, x: f32| Detection { class, score, area: [x, 0.0, x + 10.0, 10.0] };
    // 9 of 11 columns in common: 0.82; 6 of 14: 0.43.
    let all = vec![one(0, 0.5, 1.0), one(0, 0.9, 0.0), one(1, 0.6, 0.0), one(0, 0.4, 4.0)];
    let kept: Vec<f32> = decode::thinned(all, 0.5).iter().map(|d| d.score).collect();
    assert_eq!(kept, [0.9, 0.6, 0.4]);
}

/// A graph whose outputs are constants; the picture counts nothing, boxes of DETR-like ones are shares of the size.
fn fake(outputs: Vec<(ValueInfo, Node)>, constants: Vec<Initializer>, sizes: bool) -> Model {
    let info = |name: &str, dtype, shape: &[usize]| ValueInfo {
        name: name.into(),
        dtype: Some(dtype),
        shape: Some(shape.iter().map(|n| dim(*n)).collect()),
    };
    let mut inputs = vec![info("images", DataType::F32, &[1, 3, 32, 64])];
    let mut nodes = vec![
        Node::new("mean", "ReduceMean", &["images"], &["mean"]).with(Attribute::int("keepdims", 0)),
        Node::new("nothing", "Mul", &["mean", "zero"], &["nothing"]),
    ];
    if sizes {
        inputs.push(info("orig_target_sizes", DataType::I64, &[1, 2]));
        let mut cast = Node::new("cast", "Cast", &["orig_target_sizes"], &["size"]);
        cast.attributes.push(Attribute { name: "to".into(), value: AttributeValue::Int(1) });
        let concat = Node::new("twice", "Concat", &["size", "size"], &["corners"]);
        nodes.extend([cast, concat.with(Attribute::int("axis", 1))]);
    }
    let mut graph = Graph { name: "fake detector".into(), inputs, nodes, ..Graph::default() };
    graph.initializers.push(Initializer::from_f32("zero", &[], &[0.0]));
    graph.initializers.extend(constants);
    for (info, node) in outputs {
        graph.outputs.push(info);
        graph.nodes.push(node);
    }
    Model::new(graph)
}

fn output(name: &str, dtype: DataType, shape: &[usize], node: Node) -> (ValueInfo, Node) {
    let shape = Some(shape.iter().map(|n| Dim::from(*n)).collect());
    (ValueInfo { name: name.into(), dtype: Some(dtype), shape }, node)
}

/// Sees a cup (class 1) in the right half, lower part, and little else.
fn fake_detr() -> Model {
    fake(
        vec![
            output("labels", DataType::I64, &[1, 2], Node::new("l", "Identity", &["which"], &["labels"])),
            output(
                "boxes",
                DataType::F32,
                &[1, 2, 4],
                Node::new("b", "Mul", &["where", "corners"], &["boxes"]),
            ),
            output(
                "scores",
                DataType::F32,
                &[1, 2],
                Node::new("s", "Add", &["sure", "nothing"], &["scores"]),
            ),
        ],
        vec![
            Initializer::from_i64("which", &[1, 2], &[1, 0]),
            Initializer::from_f32("where", &[1, 2, 4], &[0.5, 0.25, 0.75, 1.25, 0.0, 0.0, 0.5, 0.5]),
            Initializer::from_f32("sure", &[1, 2], &[0.9, 0.1]),
        ],
        true,
    )
}

/// The same two boxes and an overlapping one, in pixels of a 64 x 32 input, into which a 100 x 100 picture is put in columns
/// 16 to 48.
fn fake_yolo(columns: bool, objectness: bool) -> Model {
    // Centre, size, classes: the cup at columns 32 to 40 and rows 8 to 32 of the input.
    let rows = [
        [36.0, 20.0, 8.0, 24.0, 0.0, 0.9],
        [36.5, 20.0, 8.0, 24.0, 0.0, 0.8],
        [24.0, 8.0, 16.0, 16.0, 0.1, 0.0],
    ];
    let mut values: Vec<Vec<f32>> = rows.iter().map(|r| r.to_vec()).collect();
    if objectness {
        values.iter_mut().for_each(|r| r.insert(4, 1.0));
    }
    let k = values[0].len();
    values.resize(8, vec![0.0; k]);
    let n = values.len();
    let flat: Vec<f32> = match columns {
        false => values.concat(),
        true => (0..k).flat_map(|c| values.iter().map(move |r| r[c])).collect(),
    };
    let shape = if columns { [1, k, n] } else { [1, n, k] };
    let node = Node::new("o", "Add", &["all", "nothing"], &["output0"]);
    fake(
        vec![output("output0", DataType::F32, &shape, node)],
        vec![Initializer::from_f32("all", &shape, &flat)],
        false,
    )
}

#[test]
fn fake_detectors_of_every_layout_see_what_they_were_made_to() {
    let dir = tempfile::tempdir().unwrap();
    let picture = vec![90u8; 100 * 100 * 3];
    let saved = |name: &str, mut model: Model, named: bool| {
        let path = dir.path().join(name);
        if named {
            model.metadata.push(("names".into(), "{0: 'bed', 1: 'cup'}".into()));
        }
        model.save(&path, &SaveOptions::default()).unwrap();
        path
    };
    for (name, model) in [
        ("detr.onnx", fake_detr()),
        ("rows.onnx", fake_yolo(false, true)),
        ("plain-rows.onnx", fake_yolo(false, false)),
        ("columns.onnx", fake_yolo(true, false)),
    ] {
        let path = saved(name, model, true);
        let mut detector = Detector::open(&path, None, 1).unwrap();
        assert_eq!(detector.classes(), ["bed", "cup"]);
        let found = detector.detect(&picture, (100, 100), 0.3).unwrap();
        let [cup] = &found[..] else { panic!("{name}: {found:?}") };
        assert_eq!((cup.class, cup.score), (1, 0.9), "{name}");
        // Cut off at the lower edge.
        let want = [50.0, 25.0, 75.0, 100.0];
        let near = cup.area.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-3);
        assert!(near, "{name}: {:?}", cup.area);
        let all = detector.detect(&picture, (100, 100), 0.05).unwrap();
        assert_eq!(all.iter().map(|d| d.class).collect::<Vec<_>>(), [1, 0], "{name}: {all:?}");
        let short = detector.detect(&picture[1..], (100, 100), 0.3).unwrap_err();
        assert!(short.to_string().contains("29999 bytes"), "{short}");
        assert_eq!(detector.detect(&picture, (100, 100), 0.3).unwrap(), found, "{name}: goes on afterwards");
    }
    // Names from files.
    let path = saved("unnamed.onnx", fake_yolo(true, false), false);
    let error = Detector::open(&path, None, 1).unwrap_err().to_string();
    assert!(error.contains("unnamed.txt") && error.contains("coco_classes.txt"), "{error}");
    let list = dir.path().join("list");
    std::fs::write(&list, "bed\ncup\n\n").unwrap();
    assert_eq!(Detector::open(&path, Some(&list), 1).unwrap().classes(), ["bed", "cup"]);
    std::fs::write(dir.path().join("unnamed.txt"), "bed\ncup\nbook\nclock\nvase").unwrap();
    let error = Detector::open(&path, None, 1).unwrap_err().to_string();
    assert!(error.contains("2 classes, but 5 names"), "{error}");
    // Another kind of network.
    let node = Node::new("o", "Add", &["all", "nothing"], &["logits"]);
    let constant = Initializer::from_f32("all", &[1, 2], &[0.1, 0.9]);
    let other = fake(vec![output("logits", DataType::F32, &[1, 2], node)], vec![constant], false);
    let error = Detector::open(&saved("other.onnx", other, true), None, 1).unwrap_err().to_string();
    assert!(error.contains("takes images f32 [1, 3, 32, 64] and gives logits f32 [1, 2]"), "{error}");
}
