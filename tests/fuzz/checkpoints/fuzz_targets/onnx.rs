//! Reads arbitrary bytes as an ONNX model; what is accepted can be written and read again, to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mindseye_engines::onnx::Model;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(model) = Model::parse(bytes.to_vec(), None) {
        for tensor in &model.graph.initializers {
            assert!(tensor.byte_len() <= 8 * bytes.len() as u64);
            let _ = tensor.to_f32();
            let _ = tensor.to_i64();
        }
        let written = model.to_bytes().expect("all data are in memory");
        let again = Model::parse(written.clone(), None).expect("what was written can be read");
        assert_eq!(again.to_bytes().expect("all data are in memory"), written);
    }
});
