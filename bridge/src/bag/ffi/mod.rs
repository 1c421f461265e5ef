//! The only unsafe code of the bag readers: calls into liblz4.
#![allow(unsafe_code)]

pub(super) mod lz4;
