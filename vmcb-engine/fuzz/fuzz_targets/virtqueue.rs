//! libFuzzer around `bodies/virtqueue.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| godwit_fuzz::virtqueue::run(data));
