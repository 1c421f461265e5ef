//! Decodes arbitrary bytes as compressed and as raw images of every encoding.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("sources.rs");

const ENCODINGS: [&str; 30] = [
    "rgb8", "bgr8", "rgba8", "bgra8", "mono8", "mono16", "rgb16", "bgr16", "rgba16", "bgra16", "8UC1", "8UC3", "8UC4",
    "16UC1", "16UC3", "32FC1", "bayer_rggb8", "bayer_bggr8", "bayer_gbrg8", "bayer_grbg8", "bayer_rggb16",
    "bayer_bggr16", "bayer_gbrg16", "bayer_grbg16", "yuv422", "yuv422_yuy2", "nv12", "nv21", "nv24", "64FC4",
];
const FORMATS: [&str; 4] = ["16UC1", "32FC1", "16UC1; compressedDepth rvl", "32FC1; compressedDepth rvl"];

libfuzzer_sys::fuzz_target!(|input: (u8, u16, u16, u16, bool, &[u8])| {
    let (kind, width, height, step, is_bigendian, data) = input;
    let limits = image::Limits { pixels_max: 1 << 20 };
    let (mut rgb, mut depth) = (Vec::new(), Vec::new());
    if let Ok(size) = image::decode_compressed_rgb8(data, &limits, &mut rgb) {
        assert_eq!(rgb.len(), size.width as usize * size.height as usize * 3);
    }
    let format = FORMATS[usize::from(kind) % FORMATS.len()];
    let _ = image::decode_compressed_depth(data, format, &limits, &mut depth);
    let _ = (image::compressed_size(data), image::compressed_kind(data, format));
    let encoding = ENCODINGS[usize::from(kind) % ENCODINGS.len()];
    let raw = image::RawImage {
        width: width.into(),
        height: height.into(),
        encoding,
        step: step.into(),
        is_bigendian,
        data,
    };
    if image::decode_raw_rgb8(&raw, &limits, &mut rgb).is_ok() {
        assert_eq!(rgb.len(), usize::from(width) * usize::from(height) * 3);
    }
    if image::decode_raw_depth(&raw, &limits, &mut depth).is_ok() {
        assert_eq!(depth.len(), usize::from(width) * usize::from(height));
    }
});
